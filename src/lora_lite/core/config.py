"""`AdapterConfig`: the fields and facts that every variant shares, checked, and written to and read from JSON.

A variant's config is the variant: hyperparameters are fields, facts are class variables, `constants`, `init` and `forward`
do the work.
"""

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lora_lite.core.documented import with_inherited
from lora_lite.core.errors import listed, nearest
from lora_lite.core.facts import require_facts
from lora_lite.core.fields import are_integers, at, check_fields, refuse_unknown, refuse_unnamed
from lora_lite.core.frozen import USES, Constants, Frozen, Params
from lora_lite.core.legacy import completed

ROLES = ("reader", "writer", "inner")


class _OfInit:
    """A class's signature: that of its `__init__`, which `inspect` would not ask beside a `__new__`."""

    def __get__(self, _: Any, cls: type) -> inspect.Signature:
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    r"""Base of every variant's config.

    Args:
        dtype: floating dtype in which the params are kept; the adapter computes in the dtype of its input.
        target_roles: any of `"reader"` (`d_in == d_model`), `"writer"` (`d_out == d_model`) and `"inner"`; empty for all.
        target_names: regular expressions, searched in the module's path; empty for all. One string is one expression.
        exclude_names: regular expressions of paths to leave alone. Others than the default are added to it, where `target_names` does not
            ask for a layer of the default itself. Empty to leave nothing out.
        layers: indices of the blocks to adapt, or None for all. They count along the model's list of blocks.

    A subclass gives `name`, `init` and `forward`, and where it derives tensors from a layer, `constants`. Its fields are checked by their
    annotations: `r: ll.Rank = 8`. The other facts are class variables with defaults:

    - `adapts`: the site, a key of `lora_lite.layers.kinds.SITES`: linear layers, norms, whole modules or the outputs of blocks.
    - `uses`: the parts of a layer that it uses, a set of words of `lora_lite.core.frozen.USES`, by default all but `"positions"`. One using
      less can adapt more kinds of layers (an embedding has no input vectors, a packed weight may have no dense form).
    - `calibrated`: whether `constants` needs statistics of the inputs. A class variable `statistic` may name their class, by default
      `lora_lite.Statistics`. With `label_mask` positions whose label is -100 are left out. `lora_lite.Gradient` gathers the weight's
      gradient, for which `build` needs a loss.
    - `original`: whether `constants` needs the layer's weight from before it was quantised, given to it as `stats`.
    - `identity`: relative tolerance of the identity at init; 0.0 for exact, None if it does not start at the base model.
    - `linear`: whether the adapted layer is an affine map of `x`, so that it can be merged: False with `acts_at` or without `rowwise`.
    - `acts_at`: where it acts at some positions only, a function `(model, arguments) -> mask` of a call; see `layers.notes.Masks`.
    - `rowwise`: whether each row of a batch is adapted by itself. If not, `mixed` runs each row as a batch of its own.
    - `cast`: whether the params come in the dtype of the input. A variant that decides by their values says False, and casts its results.
    - `tied`: whether modules that share a target's weight, such as a head tied to an embedding, are adapted with it.
    - `steered`: names of the params that a strength scales; None for all, which is right where the update is linear in them together.
    - `trained`, `macs`: trained numbers per target and multiply-adds per token, as formulas in `i`, `o`, the fields, the numbers of
      `sizes`, and `biased`, whether the layer has a bias; documentation that the conformance kit holds against the counted ones.
    """

    name: ClassVar[str]
    adapts: ClassVar[str] = "linear"
    uses: ClassVar[AbstractSet[str]] = frozenset(USES) - {"positions"}
    acts_at: ClassVar[Any] = None
    calibrated: ClassVar[bool] = False
    original: ClassVar[bool] = False
    identity: ClassVar[float | None] = 0.0
    linear: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True
    cast: ClassVar[bool] = True
    tied: ClassVar[bool] = False
    steered: ClassVar[tuple[str, ...] | None] = None
    trained: ClassVar[str | None] = None
    macs: ClassVar[str | None] = None

    __signature__: ClassVar[Any] = _OfInit()

    def __init_subclass__(cls, **options: Any) -> None:
        """Complete the docstring, since `help` of a config is the documentation of all its fields, and the fact `linear`."""
        super().__init_subclass__(**options)
        said = any("linear" in vars(c) for c in cls.__mro__ if c is not AdapterConfig)
        if not said and (cls.acts_at is not None or not cls.rowwise):
            cls.linear = False
        cls.__doc__ = with_inherited(cls) or cls.__doc__

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        refuse_unnamed(cls, args, AdapterConfig.__dataclass_fields__)
        refuse_unknown(cls, fields)
        return super().__new__(cls)

    dtype: torch.dtype = torch.float32
    # Kept as tuples, whatever is given.
    target_roles: str | Sequence[str] = ()
    target_names: str | Sequence[str] = ()
    exclude_names: str | Sequence[str] = ("lm_head", "embed_tokens")
    layers: int | Sequence[int] | None = None

    def __post_init__(self, init: object = None) -> None:  # noqa: RUF033  # one for the classes that declare `init` and for the others
        """Check the fields. A class that declares `init: InitVar[str]` keeps that option as its field `start`: `init` is the method."""
        if init is not None and not callable(init):  # without the keyword dataclasses pass the method of that name
            object.__setattr__(self, "start", init)
        dtype = getattr(torch, self.dtype, self.dtype) if isinstance(self.dtype, str) else self.dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"{at(self, 'dtype')} a floating torch.dtype, found {self.dtype!r}. Use torch.float32.")
        if torch.finfo(dtype).bits < 16:  # torch stores and casts these, and adds none
            raise TypeError(f"{at(self, 'dtype')} a dtype that can be trained in, of 16 bits or more, found {dtype}. Use torch.float32.")
        object.__setattr__(self, "dtype", dtype)
        for field in ("target_roles", "target_names", "exclude_names"):
            object.__setattr__(self, field, _strings(self, field))
        for role in self.target_roles:
            if role not in ROLES:
                where = at(self, "target_roles")
                raise ValueError(f'{where} any of {listed(ROLES)}, found "{role}". Did you mean {nearest(role, ROLES, 1)}?')
        for field in ("target_names", "exclude_names"):
            patterns(self, field)
        object.__setattr__(self, "layers", _indices(self))
        check_fields(self)

    @property
    def _drops(self) -> tuple[str, ...]:
        """Return the names of the dropouts that are on: they are drawn once a call, for all of its inputs."""
        return tuple(f.name for f in fields(self) if f.name.endswith("dropout") and getattr(self, f.name))

    def sizes(self, i: int, o: int) -> Mapping[str, int]:
        """Return numbers that `trained` and `macs` name beside `i`, `o` and the fields, such as factors that a method finds for `i`."""
        return {}

    def default_names(self, model: Any) -> Sequence[str]:
        """Return the expressions that take the place of `target_names` where it is empty; none for all that the other fields allow."""
        return ()

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        """Derive the frozen tensors of one target. Runs once, at `build`: a loaded file holds them.

        Args:
            W: the frozen layer; its own `constants` are empty.
            generator: the only source of randomness, on the CPU.
            stats: statistics of the layer's input, for calibrated variants; the original weight, for `original` ones; the layer that
                `partner` names, where it names one.

        Returns:
            New tensors by name, of any dtype; `W.constants` holds them from then on.
        """
        return {}

    def init(self, W: Frozen, generator: torch.Generator) -> Params:
        """Return the trained tensors of one target at their start.

        Args:
            W: the frozen layer, its `constants` filled.
            generator: the only source of randomness, on the CPU.

        Returns:
            New tensors by name; `adapt.init` moves them to the layer's device and to `dtype`.
        """
        raise NotImplementedError(f"{type(self).__name__}.init(W, generator) -> params is not defined")

    def partner(self, path: str) -> str | None:
        """Return the path of another linear layer that `constants` of the target at `path` reads, frozen, or None for none."""
        return None

    def allocate(self, stats: Mapping[str, Any]) -> Mapping[str, "AdapterConfig"]:
        """Return the config of each target by path, from the statistics of all targets. A target left out is not adapted."""
        return dict.fromkeys(stats, self)

    def share(self, layers: Sequence[Frozen]) -> Constants:
        """Derive the constants that all targets of this config share. Each target finds them in `W.constants`, beside its own."""
        return {}

    def allot(self, layers: Mapping[str, Frozen]) -> Mapping[str, Constants]:
        """Derive constants of each target, by its path, that depend on all targets of this config, such as its number among them.

        A target finds them in `W.constants`, from `constants` on.

        Args:
            layers: the frozen layers of all targets by path, in the model's order.
        """
        return {}

    def share_init(self, layers: Sequence[Frozen], generator: torch.Generator) -> Params:
        """Return the trained tensors that all targets of this config share, at their start.

        They stand once in the params tree, under the variant's name, and reach `forward` among each target's own params.

        Args:
            layers: the frozen layers of all targets.
            generator: the only source of randomness, on the CPU.
        """
        return {}

    def share_groups(self, layers: Mapping[str, Frozen]) -> Mapping[str, Mapping[str, str]]:
        """Return the params of `init` that a target shares with a group of targets, by its path: each name with the group's first target.

        They stand once in the params tree, under the variant's name, as the first target's `init` made them: its path, a dot, the name.
        They reach `forward` of each target of the group under their own names.

        Args:
            layers: the frozen layers of all targets by path, in the model's order.
        """
        return {}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        """Apply the variant's pure function to one layer: `(*b, i) -> (*b, o)`."""
        raise NotImplementedError(f"{type(self).__name__}.forward(params, W, x) -> y is not defined")

    def steer(self, params: Params, c: float | Tensor) -> Params:
        """Return one target's params at strength `c`: 0 is the base model, 1 the adapter, -1 the opposite.

        The default scales the params that `steered` names.
        """
        own = {name: name.rpartition(".")[2] for name in params}  # those of groups have a path before
        return {name: c * p if self.steered is None or own[name] in self.steered else p for name, p in params.items()}

    def update(self, params: Any, grads: Any, state: Any = None) -> tuple[Any, Any]:
        """Apply the method's own step after an optimiser's, such as pruning: `(params tree, gradients, state) -> (params, state)`.

        A pure function that the training loop calls; `state` is None at the first call. Most methods do nothing. An optimiser of torch's
        goes on with the leaves that it was made with: copy the new ones into them, `ll.tree_map(torch.Tensor.copy_, params, new)`.
        """
        return params, state


def _strings(cfg: AdapterConfig, field: str) -> tuple[str, ...]:
    value = getattr(cfg, field)
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"{at(cfg, field)} a string or a sequence of strings, found {value!r}. Write it as ({'...'!r},).")
    return tuple(values)


def patterns(cfg: AdapterConfig, field: str) -> tuple[str, ...]:
    """Return the regular expressions of a config's field, one or several.

    Raises:
        TypeError: where it holds no strings.
        ValueError: where a string is no regular expression.
    """
    found = _strings(cfg, field)
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as e:
            raise ValueError(f'{at(cfg, field)} a regular expression, found "{pattern}" ({e}). Escape literal text; .* is any.') from e
    return found


def _indices(cfg: AdapterConfig) -> tuple[int, ...] | None:
    value = cfg.layers
    if value is None:
        return None
    values: Any = (value,) if isinstance(value, int) and not isinstance(value, bool) else value
    if not are_integers(values):
        raise TypeError(f"{at(cfg, 'layers')} block indices or None, found {value!r}. Write e.g. layers=(0, 1).")
    indices = tuple(values)
    if not indices or min(indices) < 0:
        raise ValueError(f"{at(cfg, 'layers')} block indices >= 0, found {value!r}. Name at least one, or None for all.")
    return indices


def patterns_of(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return the regular expressions of a field that takes one or several."""
    return (value,) if isinstance(value, str) else tuple(value)


def as_config(cfg: object, call: str = "build") -> AdapterConfig:
    """Complete an object that has `name`, `init` and `forward` by the defaults of `AdapterConfig`. `call` is whose argument it is.

    Raises:
        TypeError: where `cfg` is no such object, or a field or a fact of it holds a value of another type.
        ValueError: where a field holds a value out of bounds.
    """
    missing = [fact for fact in ("name", "init", "forward") if not hasattr(cfg, fact)]
    if isinstance(cfg, type) or missing:
        lacks = f", which lacks {listed(missing)}" if missing and not isinstance(cfg, type) else ""
        raise TypeError(f"{call}: expected a variant's config, found {cfg!r}{lacks}. Pass an instance, e.g. LoRAConfig(r=8).")
    written: Any = type(cfg)
    cls: Any = completed(written, AdapterConfig)
    full: Any = cfg
    if cls is not written:
        full = object.__new__(cls)
        vars(full).update(vars(cfg))
    check_fields(full)
    require_facts(full)
    return full


def with_fields(cfg: AdapterConfig, **values: Any) -> AdapterConfig:
    """Copy a config with other values of the shared fields, whether or not its class is a dataclass."""
    changed = copy.copy(cfg)
    for name, value in values.items():
        object.__setattr__(changed, name, value)
    return changed
