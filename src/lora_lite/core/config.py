"""`AdapterConfig`: the fields and facts that every variant shares, checked, and written to and read from JSON.

A variant's config is the variant: hyperparameters are fields, facts are class variables, `init`, `forward` and `steer`
are what it does.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_lite.core.errors import listed, nearest
from lora_lite.core.frozen import Constants, Frozen

ROLES = ("reader", "writer", "inner")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    r"""Base of every variant's config.

    Args:
        dtype: floating dtype in which the params are kept; the adapter computes in the dtype of its input.
        target_roles: any of `"reader"` (`d_in == d_model`), `"writer"` (`d_out == d_model`) and `"inner"`; empty for all.
        target_names: regular expressions, searched in the module's path; empty for all. One string is one expression.
        exclude_names: regular expressions of paths to leave alone.
        layers: indices of the blocks to adapt, or None for all. The index is the first integer in the path.

    A subclass gives `name`, `init` and `forward`; the other facts have defaults:

    - `adapts`: what it adapts, one of `lora_lite.layers.module.ADAPTS`: linear layers, norms, whole modules or the outputs of blocks.
    - `needs`: what it asks of the weight, one of `lora_lite.core.frozen.NEEDS`.
    - `reads`: how its function uses `x`, one of `lora_lite.core.frozen.READS`. What reads less can adapt more: embeddings have no rows.
    - `calibrated`: whether `init` needs statistics of the inputs. Which ones a class variable `statistic` may say, by default
      `lora_lite.Statistics`; with `label_mask` positions whose label is -100 are left out. `lora_lite.Gradient` is that of the weight's
      gradient, for which `build` needs a loss.
    - `original`: whether `init` needs the layer's weight from before it was quantised, given to it as `stats`.
    - `identity`: relative tolerance of the identity at init; 0.0 for exact, None if it does not start at the base model.
    - `linear`: whether the adapted layer is an affine map of `x`, so that it can be merged.
    - `trained`, `macs`: trained numbers per target and multiply-adds per token, as formulas in `i`, `o` and the fields;
      documentation that the conformance kit holds against the counted ones.
    """

    name: ClassVar[str]
    adapts: ClassVar[str] = "linear"
    needs: ClassVar[str] = "nothing"
    reads: ClassVar[str] = "rows"
    calibrated: ClassVar[bool] = False
    original: ClassVar[bool] = False
    identity: ClassVar[float | None] = 0.0
    linear: ClassVar[bool] = True
    trained: ClassVar[str | None] = None
    macs: ClassVar[str | None] = None

    dtype: torch.dtype = torch.float32
    target_roles: tuple[str, ...] = ()
    target_names: tuple[str, ...] = ()
    exclude_names: tuple[str, ...] = ("lm_head", "embed_tokens")
    layers: tuple[int, ...] | None = None

    @property
    def uses(self):  # TEMP
        r = {"output": {"output"}, "projection": {"output", "project"}, "rows": {"output", "project", "vectors"}}[self.reads]
        return frozenset(
            r
            | {"nothing": set(), "product": {"matmul"}, "norms": {"matmul", "dense"}, "dense_init": {"dense"}, "dense": {"dense"}}[
                self.needs
            ]
        )

    def __post_init__(self) -> None:
        dtype = getattr(torch, self.dtype, self.dtype) if isinstance(self.dtype, str) else self.dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"{_at(self, 'dtype')} a floating torch.dtype, found {self.dtype!r}. Use torch.float32.")
        object.__setattr__(self, "dtype", dtype)
        for field in ("target_roles", "target_names", "exclude_names"):
            object.__setattr__(self, field, _strings(self, field))
        for role in self.target_roles:
            if role not in ROLES:
                where = _at(self, "target_roles")
                raise ValueError(f'{where} any of {listed(ROLES)}, found "{role}". Did you mean {nearest(role, ROLES, 1)}?')
        for field in ("target_names", "exclude_names"):
            for pattern in getattr(self, field):
                _compile(self, field, pattern)
        object.__setattr__(self, "layers", _indices(self))

    def init(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> tuple[Mapping[str, Tensor], Constants]:
        """Derive one target's params and constants.

        Args:
            W: the frozen layer. Its `constants` are empty at build; later calls find there what the first one returned,
                so that an SVD or a calibration happens once.
            generator: the only source of randomness, on the CPU.
            stats: statistics of the layer's input, for calibrated variants.

        Returns:
            `(params, constants)`: new tensors; `adapt.init` moves params to the layer's device and to `dtype`.
        """
        raise NotImplementedError(f"{type(self).__name__}.init(W, generator, stats) -> (params, constants) is not defined")

    def allocate(self, stats: Mapping[str, Any]) -> Mapping[str, "AdapterConfig"]:
        """Give the config of each target by path, from the statistics of all; a target left out is not adapted. For calibrated variants."""
        return dict.fromkeys(stats, self)

    def share(self, layers: Sequence[Frozen]) -> Constants:
        """Derive the constants that all targets of this config share; they reach each target's `W.constants` like its own."""
        return {}

    def forward(self, params: Mapping[str, Tensor], W: Frozen, x: Tensor) -> Tensor:
        """Apply the variant's pure function to one layer: `(*b, i) -> (*b, o)`."""
        raise NotImplementedError(f"{type(self).__name__}.forward(params, W, x) -> y is not defined")

    def steer(self, params: Mapping[str, Tensor], c: float | Tensor) -> dict[str, Tensor]:
        """Give one target's params at strength `c`: 0 is the base model, 1 the adapter, -1 the opposite.

        The default scales every param, which is right where the update is linear in them.
        """
        return {name: c * p for name, p in params.items()}

    def update(self, params: Any, grads: Any, state: Any = None) -> tuple[Any, Any]:
        """Do what the method does to its params after an optimiser's step: `(params tree, gradients, state) -> (params, state)`.

        A pure function that the training loop calls; `state` is None at the first call. Most methods do nothing.
        """
        return params, state


def _at(cfg: object, field: str) -> str:
    return f"{type(cfg).__name__}.{field}: expected"


def expect(cfg: object, field: str, ok: bool, expected: str, fix: str) -> None:
    """Raise the three-part error of a config field unless `ok`."""
    if not ok:
        raise ValueError(f"{_at(cfg, field)} {expected}, found {getattr(cfg, field)!r}. {fix}")


def expect_int(cfg: object, field: str, least: int, fix: str) -> None:
    """Require an integer field of at least `least`."""
    value = getattr(cfg, field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_at(cfg, field)} an integer >= {least}, found {value!r}. {fix}")
    expect(cfg, field, value >= least, f"an integer >= {least}", fix)


def expect_number(cfg: object, field: str, low: float, high: float, fix: str) -> None:
    """Require a number in `[low, high)`."""
    value = getattr(cfg, field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{_at(cfg, field)} a number in [{low}, {high}), found {value!r}. {fix}")
    expect(cfg, field, low <= value < high, f"a number in [{low}, {high})", fix)


def expect_bool(cfg: object, field: str) -> None:
    """Require True or False."""
    value = getattr(cfg, field)
    if not isinstance(value, bool):
        raise TypeError(f"{_at(cfg, field)} True or False, found {value!r}. Pass a bool.")


def _strings(cfg: AdapterConfig, field: str) -> tuple[str, ...]:
    value = getattr(cfg, field)
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"{_at(cfg, field)} a string or a sequence of strings, found {value!r}. Write it as ({'...'!r},).")
    return tuple(values)


def _compile(cfg: AdapterConfig, field: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ValueError(f'{_at(cfg, field)} a regular expression, found "{pattern}" ({e}). Escape what is meant literally.') from e


def _indices(cfg: AdapterConfig) -> tuple[int, ...] | None:
    value = cfg.layers
    if value is None:
        return None
    values = (value,) if isinstance(value, int) and not isinstance(value, bool) else value
    ok = isinstance(values, Sequence | range) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if not ok:
        raise TypeError(f"{_at(cfg, 'layers')} block indices or None, found {value!r}. Write e.g. layers=(0, 1).")
    if not values or min(values) < 0:
        raise ValueError(f"{_at(cfg, 'layers')} block indices >= 0, found {value!r}. Name at least one, or None for all.")
    return tuple(values)


def as_config(cfg: object) -> AdapterConfig:
    """Accept any object with `name`, `init` and `forward`; what it lacks takes the defaults of `AdapterConfig`.

    Raises:
        TypeError: where `cfg` is no such object.
    """
    missing = [fact for fact in ("name", "init", "forward") if not hasattr(cfg, fact)]
    if isinstance(cfg, type) or missing:
        lacks = f", which lacks {listed(missing)}" if missing and not isinstance(cfg, type) else ""
        raise TypeError(f"build: expected a variant's config, found {cfg!r}{lacks}. Pass an instance, e.g. LoRAConfig(r=8).")
    if isinstance(cfg, AdapterConfig):
        return cfg
    cls = type(type(cfg).__name__, (type(cfg), AdapterConfig), {"__module__": type(cfg).__module__, "_written": type(cfg)})
    full: Any = object.__new__(cls)
    vars(full).update(vars(cfg))
    return full


def with_fields(cfg: AdapterConfig, **values: Any) -> AdapterConfig:
    """Copy a config with other values of the shared fields, whether or not its class is a dataclass."""
    changed = copy.copy(cfg)
    for name, value in values.items():
        object.__setattr__(changed, name, value)
    return changed


def to_json(cfg: AdapterConfig) -> dict[str, Any]:
    """Write a config as plain values: its variant's name, every field, and what its instance holds besides.

    Raises:
        TypeError: for a value that JSON cannot hold.
    """
    names = [*(f.name for f in dataclasses.fields(cfg)), *vars(cfg)]
    fields = {name: getattr(cfg, name) for name in names}
    fields |= {name: str(value).removeprefix("torch.") for name, value in fields.items() if isinstance(value, torch.dtype)}
    for name, value in fields.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as e:
            raise TypeError(
                f"{_at(cfg, name)} a value that a file can hold, found {value!r} ({e}). Keep the name of it in the field."
            ) from e
    return {**fields, "name": cfg.name}


def from_json(cls: type, fields: Mapping[str, Any]) -> AdapterConfig:
    """Build a config of `cls` from what `to_json` wrote.

    Raises:
        ValueError: for a field that `cls` does not take.
    """
    cls = getattr(cls, "_written", cls)  # the user's own class, where as_config completed it
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "name"}
    known = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set(values)
    if not issubclass(cls, AdapterConfig):  # its shared fields are the defaults, not its own
        values = {k: v for k, v in values.items() if k in known and not hasattr(AdapterConfig, k)}
    unknown = [k for k in values if k not in known]
    if unknown:
        raise ValueError(
            f"{cls.__name__}: expected the fields {listed(sorted(known), 20)}, found also {listed(unknown)}. "
            "Load the file with the version that wrote it."
        )
    return as_config(cls(**values))
