"""`checked`: the door of every pure function. It accepts a plain weight and, switched on, tests every shape.

beartype looks at the fields of a `TypedDict` not at all, so the fields of the params are tested one by one here, in
one jaxtyping context with `W`, `x`, the statics and the result: the axes `o`, `i`, `r` must agree across all of them.
A field marked `NotRequired` may be missing.
The switch is the environment variable `LORA_LITE_TYPECHECK`, read at import, or `set_typecheck`.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, get_type_hints, is_typeddict

import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import Float, jaxtyped
from torch import Tensor

from lora_lite.core.errors import require_type
from lora_lite.core.frozen import Frozen, as_frozen, in_dtype

_CONF = BeartypeConf(is_pep484_tower=True)  # an integer is a float
_MATRIX, _ANY = Float[Tensor, "o i"], Float[Tensor, "..."]  # once: beartype compiles a test for each new annotation
_enabled = os.environ.get("LORA_LITE_TYPECHECK", "").lower() not in ("", "0", "false", "no", "off")


def set_typecheck(on: bool) -> bool:
    """Switch shape checking on or off for the whole process and return the setting before.

    Raises:
        TypeError: where `on` is neither True nor False.
    """
    require_type(isinstance(on, bool), "set_typecheck(True)", "on", "True or False", on)
    global _enabled
    before, _enabled = _enabled, on
    return before


def checked(fn: Callable[..., Tensor], *, cast: bool = True) -> Callable[..., Tensor]:
    """Wrap a pure function `(params, W, x, *, statics) -> y`.

    `W` may be a plain `(o, i)` tensor. With checking on, every field of the params, `W`, `x`, the statics and the result are tested
    against the annotations of `fn`. Under `torch.compile` the raw function runs, since the checks cannot be traced.

    Args:
        fn: the function.
        cast: whether the params take part in the dtype of `x`, else in their own: `@functools.partial(checked, cast=False)`.

    Raises:
        TypeError: where `fn` lacks an annotation. With checking on a call raises it too, and lists each value that does not fit, what was
            expected and what was found.
    """
    require_type(callable(fn), "checked(fn)", "fn", "a function", fn)
    hints = get_type_hints(fn, include_extras=True)
    if missing := [name for name in ("params", "x", "return") if name not in hints]:
        raise TypeError(
            f"checked: expected {fn.__qualname__}(params, W, x, *, statics) to annotate params, x and its result, found nothing for "
            f'{" and ".join(missing)}. Write e.g. params: ItsParams, x: Float[Tensor, "*b i"], -> Float[Tensor, "*b o"].'
        )
    named = is_typeddict(hints["params"])
    fields = get_type_hints(hints["params"]) if named else None  # without the marks of fields that are not required
    optional = hints["params"].__optional_keys__ if named else frozenset()

    signature = inspect.signature(fn)

    def tested(params: Any, W: Any, x: Any, statics: Mapping[str, Any]) -> Tensor:
        with jaxtyped("context"):  # one set of axis sizes for all the tests below
            faults: list[str] = []
            W = _frozen_or_fault(W, faults)  # the layer first: its widths bind the axes, and the params must agree
            vectors = W.vectors(x) if isinstance(W, Frozen) and isinstance(x, Tensor) else x
            faults += _fault("x", vectors, hints["x"])
            faults += _field_faults(params, fields, optional)
            faults += [f for name, value in statics.items() for f in _fault(name, value, hints.get(name, Any))]
            given = {**params, "W": W, "x": x} if isinstance(params, Mapping) else {"W": W, "x": x}
            _raise(fn, faults, given)
            y = fn(in_dtype(params, W, x) if cast else params, W, x, **statics)
            _raise(fn, _fault("the result", y, hints["return"]), given)
            return y

    door: Any = functools.wraps(fn)(_door(fn, tested, [*signature.parameters.values()][3:], cast))
    door.__signature__ = signature
    return door


_DOOR = """
def make(__fn, __tested, __torch, __Frozen, __as_frozen, __in_dtype):
    def door(params, W, x{declared}):
        if _enabled and not __torch.compiler.is_compiling():
            return __tested(params, W, x, {{{tabled}}})
        if not isinstance(W, __Frozen):
            W = __as_frozen(W)
        {cast}
        return __fn(params, W, x{passed})
    return door
"""
"""The names of its own are such as no static has."""
_CAST = """if W.casts:
            params = __in_dtype(params, W, x)
"""


def _door(fn: Callable[..., Tensor], tested: Callable[..., Tensor], statics: Sequence[inspect.Parameter], cast: bool) -> Any:
    """Make the door of a function, with its statics as keywords by their names.

    Its text is written for these names, as `dataclasses` writes an `__init__`: keywords that are packed into a dictionary and out again
    would be the dearest part of a light layer's call.
    """
    named = [s.name for s in statics if s.kind is not s.VAR_KEYWORD]
    rest = [f"**{s.name}" for s in statics if s.kind is s.VAR_KEYWORD]
    code = _DOOR.format(
        declared="".join(f", {part}" for part in [*(["*", *named] if named else []), *rest]),
        tabled=", ".join([*(f'"{name}": {name}' for name in named), *rest]),
        passed="".join(f", {part}" for part in [*(f"{name}={name}" for name in named), *rest]),
        cast=_CAST if cast else "",
    )
    made: dict[str, Any] = {}
    exec(code, globals(), made)
    door = made["make"](fn, tested, torch, Frozen, as_frozen, in_dtype)
    door.__kwdefaults__ = {s.name: s.default for s in statics if s.name in named and s.default is not s.empty}
    return door


def another_start(fn: Callable[..., Tensor], name: str, constants: Sequence[str] = ()) -> Callable[..., Tensor]:
    """Return `fn` under the name of a method that differs from it in the start alone.

    Args:
        fn: a checked function.
        name: the method's.
        constants: the start, where the weight alone does not determine it: a layer without it is refused.
    """

    @functools.wraps(fn)
    def same(params: Any, W: Frozen | Tensor, x: Tensor, **statics: Any) -> Tensor:
        if constants and not as_frozen(W).constants:
            raise ValueError(
                f"{name}: expected W as a Frozen with the constants {' and '.join(constants)}, found none. They depend on data: take them "
                f"from {name}'s config.constants(W, generator, stats), and pass Frozen(weight, bias, constants)."
            )
        return fn(params, W, x, **statics)

    same.__name__ = same.__qualname__ = name
    same.__doc__ = f"Compute `{fn.__name__}`, from a start of its own; the docstring of {name}'s module has it."
    return same


def _field_faults(params: object, fields: Mapping[str, Any] | None, optional: AbstractSet[str]) -> list[str]:
    if not isinstance(params, Mapping):
        return [f"params: expected a mapping with {', '.join(fields or ('names',))}, found {type(params).__name__}"]
    if fields is None:  # a mapping with any names
        fields = dict.fromkeys(params, _ANY)
    faults = [f'params["{name}"]: not expected' for name in params if name not in fields]
    for name, hint in fields.items():
        if name in params:
            faults += _fault(f'params["{name}"]', params[name], hint)
        elif name not in optional:
            faults.append(f'params["{name}"]: expected {_show_hint(hint)}, found nothing')
    return faults


def _frozen_or_fault(W: Any, faults: list[str]) -> Any:
    if not isinstance(W, Frozen):
        fault = _fault("W", W, _MATRIX)
        faults += fault
        return W if fault else as_frozen(W)
    # A quantised layer has no (o, i) tensor to test; a meta tensor of its shape binds the axes without one.
    faults += _fault("W", torch.empty(W.out_features, W.in_features, device="meta"), _MATRIX)
    return W


def _fault(name: str, value: object, hint: Any) -> list[str]:
    if is_bearable(value, hint, conf=_CONF):
        return []
    return [f"{name}: expected {_show_hint(hint)}, found {_show(value)}"]


def _show_hint(hint: Any) -> str:
    dims = getattr(hint, "dim_str", None)
    return f'{hint.__name__.split("[")[0]}["{dims}"]' if dims is not None else getattr(hint, "__name__", str(hint))


def _show(value: object) -> str:
    if isinstance(value, Frozen):
        return f"({value.out_features}, {value.in_features})"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def _raise(fn: Callable[..., Tensor], faults: list[str], given: Mapping[str, object]) -> None:
    if not faults:
        return
    lines = "".join(f"\n  - {fault}" for fault in faults)
    shown = ", ".join(f"{name} {_show(value)}" for name, value in given.items())
    documented = f"lora_lite.functional.{fn.__name__}" if fn.__module__.startswith("lora_lite.") else f"{fn.__module__}.{fn.__name__}"
    raise TypeError(
        f"{fn.__name__}: the shapes of params, W, x and the result must agree:{lines}\n  given: {shown}\n"
        f"{documented} documents each; W is (o, i), x is (*b, i)."
    )
