"""Annotations of a config's fields, which check the values: a variant writes no check of its own.

`r: Rank = 8` refuses 0, `"8"` and `True`; `side: Literal["in", "out"] = "in"` refuses the rest; plain `int`, `float`, `bool` and `str` are
checked by type. `require_rank` and `require_divisor` hold a field against a layer.
"""

import dataclasses
import functools
import inspect
import math
import sys
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass
from numbers import Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lora_lite.core.errors import listed, nearest, require_type
from lora_lite.core.frozen import Frozen


@dataclass(frozen=True)
class Within:
    """The bounds of a number, for `Annotated[int, Within(2)]`: `low <= value < high`.

    Args:
        low: least value.
        high: end of the range, not part of it.
        above: whether `low` itself is refused.
        even: whether odd integers are refused.
        meaning: noun phrase for the error's way out, e.g. "the rank of the update".
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    even: bool = False
    meaning: str = ""

    def admits(self, value: float) -> bool:
        """Whether a finite number lies within the bounds."""
        return (self.low < value if self.above else self.low <= value) and value < self.high and not (self.even and value % 2)

    def words(self, noun: str) -> str:
        """Return the bounds in words, e.g. "an integer >= 1"."""
        if self.high < math.inf:
            return f"{noun} in {'(' if self.above else '['}{self.low}, {self.high})"
        return noun if self.low == -math.inf else f"{noun} {'>' if self.above else '>='} {self.low}"


_RANK = Within(1, meaning="the rank of the update")

Rank = Annotated[int, _RANK]
Count = Annotated[int, Within(0)]
Size = Annotated[int, Within(1)]
Even = Annotated[int, Within(2, even=True)]
Positive = Annotated[float, Within(0, above=True)]
NonNegative = Annotated[float, Within(0)]
Probability = Annotated[float, Within(0.0, 1.0)]

_LARGEST = sys.float_info.max
_PLAIN = {bool: "True or False", str: "a string"}
_Problem = tuple[type[Exception], str]


def check_fields(cfg: object) -> None:
    """Raise unless every field of a dataclass holds a value that its annotation allows. Annotations of other kinds allow anything.

    Raises:
        TypeError: for a value of another type.
        ValueError: for a value out of bounds.
    """
    cls: Any = type(cfg)
    hints = _hints(cls)
    for field in dataclasses.fields(cfg) if dataclasses.is_dataclass(cfg) else ():
        value, hint = getattr(cfg, field.name, MISSING), hints.get(field.name, Any)
        if value is MISSING or (value is None and field.default is None):  # filled later, or meant to be
            continue
        problem = _problem(hint, value)
        if problem is not None:
            error, expected = problem
            raise error(f"{at(cfg, field.name)} {expected}, found {value!r}. {_way_out(field, hint)}")


OURS = {
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_alpha": "alpha",
    "alora_invocation_tokens": "invocation_tokens",
    "lora_dropout": "dropout",
    "module_dropout": "dropout",
    "vera_dropout": "dropout",
    "miss_dropout": "dropout",
    "hira_dropout": "dropout",
    "gralora_dropout": "dropout",
    "gralora_k": "k",
    "boft_block_size": "block_size",
    "boft_block_num": "block_num",
    "boft_n_butterfly_factor": "n_butterfly_factor",
    "boft_dropout": "block_dropout",
    "randlora_alpha": "alpha",
    "vblora_dropout": "dropout",
    "randlora_dropout": "dropout",
    "psoft_dropout": "dropout",
    "psoft_orth": "orth",
    "psoft_mag_b": "mag_b",
    "psoft_mag_a": "mag_a",
    "pvera_dropout": "dropout",
    "tinylora_dropout": "dropout",
    "frod_dropout": "dropout",
    "unilora_dropout": "dropout",
    "proj_seed": "seed",
    "projection_seed": "seed",
    "use_rslora": "rslora",
    "target_modules": "target_names",
    "target_parameters": "target_names",
    "exclude_modules": "exclude_names",
    "layers_to_transform": "layers",
    "layers_pattern": "layers",
    "oft_block_size": "block_size",
    "delora_lambda": "lambda0",
    "projection_prng_key": "seed",
    "random_seed": "seed",
    "random_loc_seed": "seed",
}
"""Names of fields in this library, by their names in others."""

ELSEWHERE = {
    "modules_to_save": "Put a FullConfig(target_names=...) beside it: build(model, [cfg, ll.FullConfig(...)])",
    "use_dora": "Use DoRAConfig",
    "init_lora_weights": '"gaussian" and "orthogonal" are a start of LoRAConfig; others are configs of their own, e.g. PiSSAConfig',
    "trainable_token_indices": "Put a TokensConfig(token_ids=...) beside it: build(model, [cfg, ll.TokensConfig(...)])",
    "inference_mode": "Nothing is switched: adapt.eval() and adapt.train() return an adapt in that mode",
    "fan_in_fan_out": "It follows from the layer's class",
    "rank_pattern": "Give layers of another rank a config of their own: build(model, [first, second])",
    "alpha_pattern": "Give layers of another alpha a config of their own: build(model, [first, second])",
    "psoft_alpha": "The scale divides one factor and multiplies the update, so that it cancels: leave it out",
    "task_type": "It follows from the model's class",
    "wavelet_family": "Only Haar's wavelet is here, PEFT's db1: others need tables of filters",
    "bias": "LoRAConfig has it; put a BitFitConfig beside it, on other layers",
}
"""Advice for options of other libraries that take another form here."""


def refuse_unknown(cls: Any, given: Mapping[str, object]) -> None:
    """Raise unless a class of configs takes the fields that it is given, with the name that a field has here.

    Raises:
        TypeError: as Python does, and with the way out.
    """
    takes = inspect.signature(cls.__init__).parameters
    unknown = [] if any(p.kind is p.VAR_KEYWORD for p in takes.values()) else [name for name in given if name not in takes]
    if unknown:
        name, names = unknown[0], [n for n in takes if n != "self"]
        ours = OURS.get(name) if OURS.get(name) in names else None
        way = f"It is called {ours} here" if ours else ELSEWHERE.get(name, f"Closest: {nearest(name, names)}")
        raise TypeError(f"{cls.__name__}.__init__() got an unexpected keyword argument '{name}'. {way}.")


def refuse_unnamed(cls: Any, given: Sequence[object], shared: Collection[str]) -> None:
    """Raise where a class of configs is given fields by place that it takes by name alone. `shared` are those of every class.

    Raises:
        TypeError: with the first own field as the example.
    """
    if not given:
        return
    takes = {name: p for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"}
    if all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in takes.values()):
        first = next((name for name in takes if name not in shared), "target_names")
        raise TypeError(
            f"{cls.__name__}: expected fields by name, found {given[0]!r} without one. Write e.g. {cls.__name__}({first}={given[0]!r})."
        )


def at(cfg: object, field: str) -> str:
    """Return the beginning of a field's error."""
    return f"{type(cfg).__name__}.{field}: expected"


def expect(cfg: object, field: str, ok: bool, expected: str, fix: str) -> None:
    """Raise the three-part error of a config field unless `ok`, for conditions on several fields."""
    if not ok:
        raise ValueError(f"{at(cfg, field)} {expected}, found {getattr(cfg, field)!r}. {fix}")


def require_rank(cfg: Any, W: Frozen) -> None:
    """Raise unless the field `r` is at most the smaller width of a layer."""
    o, i = W.out_features, W.in_features
    expected = f"at most min(i, o) = {min(i, o)} for a layer of shape ({o}, {i})"
    expect(cfg, "r", cfg.r <= min(i, o), expected, "Lower r or leave the layer out.")


def require_divisor(cfg: object, field: str, width: int, axis: str, step: int = 1) -> None:
    """Raise unless a field divides the width of a layer's axis `"i"` or `"o"`. The message offers multiples of `step`."""
    size = getattr(cfg, field)
    if width % size == 0:
        return
    fits = sorted((d for d in range(2, width + 1, step) if width % d == 0), key=lambda d: abs(d - size))[:3]
    fix = f"Use e.g. {' or '.join(map(str, fits))}." if fits else "Leave the layer out."
    expect(cfg, field, False, f"a divisor of {axis} = {width}", fix)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Resolve the annotations of a class's fields. A name that cannot be found allows anything."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, hint in vars(base).get("__annotations__", {}).items():
            hints[name] = _resolved(base, name, hint)
    if hints.get("r") is int:
        hints["r"] = Rank
    return hints


def _resolved(base: type, name: str, hint: Any) -> Any:
    here = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
    try:
        return get_type_hints(types.SimpleNamespace(__annotations__={name: hint}), here, include_extras=True)[name]
    except (NameError, TypeError, AttributeError, SyntaxError):
        return Any


def _problem(hint: Any, value: object) -> _Problem | None:
    """Return the class of a bad value's error with the expectation in words, or None for a good value."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = next((extra for extra in args[1:] if isinstance(extra, Within)), None)
        return _problem(args[0], value) if bounds is None else _number(args[0], bounds, value)
    if origin is Literal:
        same = any(value == allowed and type(value) is type(allowed) for allowed in args)
        return None if same else (ValueError if isinstance(value, str) else TypeError, f"one of {listed(args, 20)}")
    if origin in (Union, types.UnionType):
        problems = [_problem(arg, value) for arg in args]
        return None if None in problems else _either([problem for problem in problems if problem])
    if hint in (int, float):
        return _number(hint, Within(), value)
    if hint is type(None):
        return None if value is None else (TypeError, "None")
    return (TypeError, _PLAIN[hint]) if hint in (bool, str) and not isinstance(value, hint) else None


def _number(kind: type, bounds: Within, value: object) -> _Problem | None:
    noun = f"{'an even' if bounds.even else 'an'} integer" if kind is int else "a number" if bounds.high < math.inf else "a finite number"
    expected = bounds.words(noun)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return TypeError, expected
    # An integer that no float can hold is as good as infinite where a number is asked for, and has no place in a tensor elsewhere.
    return None if -_LARGEST <= value <= _LARGEST and bounds.admits(value) else (ValueError, expected)


def are_integers(values: object) -> bool:
    """Whether a value is a sequence of integers. A string is none, nor are bytes, and True is no integer."""
    given = values if isinstance(values, Sequence) and not isinstance(values, str | bytes) else [None]
    return all(isinstance(value, int) and not isinstance(value, bool) for value in given)


def require_number(call: str, name: str, value: object, bounds: Within, way: str) -> None:
    """Raise unless an argument of a call is a finite number within bounds. A tensor without axes is a number too.

    Args:
        call: the call as it should be written, e.g. "lora_plus(params, lr=1e-4)".
        name: the argument's name.
        value: what it is.
        bounds: what it must lie in.
        way: the way out, a sentence.

    Raises:
        TypeError: for no number.
        ValueError: for one out of bounds.
    """
    plain = value
    if isinstance(value, Tensor) and not value.dim() and not value.is_complex() and value.dtype is not torch.bool and not value.is_meta:
        plain = value.item()
    real = isinstance(plain, Real) and not isinstance(plain, bool)
    require_type(real, call, name, "a number", value)
    if _number(float, bounds, float(plain)) is not None:  # type: ignore[arg-type]
        expected = bounds.words("a finite number")
        raise ValueError(f"{call.partition('(')[0]}: expected {name} as {expected}, found {value}. {way}")


def _either(problems: list[_Problem]) -> _Problem:
    return next((error for error, _ in problems if error is ValueError), TypeError), " or ".join(expected for _, expected in problems)


def _way_out(field: "dataclasses.Field[Any]", hint: Any) -> str:
    """Return an error's remedy: how to set the field, with its default as the example."""
    meaning = next((extra.meaning for extra in get_args(hint) if isinstance(extra, Within)), "")
    shown = f'"{field.default}"' if isinstance(field.default, str) else repr(field.default)
    example = "" if field.default is MISSING else f"e.g. {field.name}={shown}"
    if meaning:
        return f"Set {field.name} to {meaning}{', ' + example if example else ''}."
    return f"Use {example}." if example else f"Set {field.name} so."
