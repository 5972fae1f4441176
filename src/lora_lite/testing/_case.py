"""`Case`: one layer with a variant on it, and how results are compared."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.config import AdapterConfig, as_config, with_fields
from lora_lite.core.frozen import Frozen
from lora_lite.core.statistics import needs_loss, statistic_of
from lora_lite.layers.kind import Variant
from lora_lite.prepare.derive import own_constants
from lora_lite.prepare.start import own_start

VALUES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error of a value, relative to the largest entry of what it is compared with, by dtype."""
GRADIENTS = 1e-6
"""Largest relative error of a directional derivative in float64 against central differences."""

_SIZES = ((24, 32), (48, 64), (64, 128), (128, 256), (256, 512))
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A layer with a variant on it, the object of a check.

    Attributes:
        cfg: the variant, its target fields at their defaults.
        W: the frozen layer, with the variant's constants.
        start: the params as `share_init` and `init` return them.
        params: the same moved off the start.
        x: an input `(3, 2, i)`.
    """

    cfg: AdapterConfig
    W: Frozen
    start: Params
    params: Params
    x: Tensor

    def __call__(self, params: Params, x: Tensor | None = None) -> Tensor:
        """Run the variant on the layer."""
        return output_of(self.cfg, params, self.W, self.x if x is None else x)

    def delta(self, params: Params, x: Tensor | None = None) -> Tensor:
        """Compute the variant's update of the layer's own output."""
        x = self.x if x is None else x
        return self(params, x) - self.W(x)

    def to(self, dtype: torch.dtype) -> "Case":
        """Return the same numbers in another dtype. Integer and boolean constants keep theirs."""
        W = self.W
        bias = None if W.bias is None else W.bias.to(dtype)
        constants = {k: c.to(dtype) if c.is_floating_point() else c for k, c in W.constants.items()}
        frozen = Frozen(W.weight.to(dtype), bias, constants, W.training)
        cast = {k: p.to(dtype) for k, p in self.params.items()}
        return Case(self.cfg, frozen, {k: p.to(dtype) for k, p in self.start.items()}, cast, self.x.to(dtype))

    def in_training(self) -> "Case":
        """Return the same case with the layer in training mode."""
        return dataclasses.replace(self, W=Frozen(self.W.weight, self.W.bias, self.W.constants, training=True))


def make_cases(cfg: AdapterConfig, dtype: torch.dtype) -> list[Case]:
    """Make a wide layer with a bias and a tall one without, in sizes that fit the config."""
    defaults = {f.name: f.default for f in dataclasses.fields(AdapterConfig) if f.name != "dtype"}
    cfg = with_fields(as_config(cfg), **defaults)
    for small, large in _SIZES:
        try:
            return [_make_case(cfg, dtype, small, large, bias=True), _make_case(cfg, dtype, large, small, bias=False)]
        except ValueError as e:
            refusal = e
    raise ValueError(f"check_variant: expected {cfg!r} to fit a layer of at most {_SIZES[-1]}, found none that init accepts.") from refusal


def _make_case(cfg: AdapterConfig, dtype: torch.dtype, i: int, o: int, *, bias: bool) -> Case:
    g = torch.Generator().manual_seed(i)
    weight = (torch.randn(o, i, generator=g) / i**0.5).to(dtype)
    W = Frozen(weight, torch.randn(o, generator=g).to(dtype) if bias else None)
    stats = _statistics(cfg, i, o, dtype) if cfg.calibrated else unquantised(weight) if cfg.original else None
    allotted = cfg.allot({"layer": W}).get("layer", {})
    constants = own_constants(cfg, W, torch.Generator().manual_seed(0), stats, allotted)
    shared = cfg.share_init([W], torch.Generator().manual_seed(1))
    W = Frozen(weight, W.bias, {**cfg.share([W]), **constants})
    start = {name: p.detach().to(cfg.dtype) for name, p in {**shared, **own_start(cfg, W, torch.Generator().manual_seed(0))}.items()}
    moved = {name: p + 0.1 * torch.randn(p.shape, generator=g).to(p.dtype) for name, p in start.items()}
    return Case(cfg, W, start, moved, torch.randn(3, 2, i, generator=g).to(dtype))


def _statistics(cfg: AdapterConfig, i: int, o: int, dtype: torch.dtype) -> Any:
    empty, x = statistic_of(cfg)[0](), inputs(i).to(dtype)
    if not needs_loss(cfg):
        return empty.add(x)
    return empty.add(x, torch.randn(len(x), o, generator=torch.Generator().manual_seed(o)).to(dtype))


def unquantised(weight: Tensor) -> Tensor:
    """Return a weight as it may have been before it was quantised: itself with some noise."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.shape[0]))
    return weight + (0.1 * noise).to(weight.dtype)


def inputs(i: int) -> Tensor:
    """Make calibration data `(4 i, i)`: a mean that is not zero and a covariance that is not round."""
    g = torch.Generator().manual_seed(i)
    return torch.randn(i, generator=g) + torch.randn(4 * i, i, generator=g) @ torch.randn(i, i, generator=g) / i**0.5


def output_of(cfg: AdapterConfig, params: Params, W: Frozen, x: Tensor) -> Tensor:
    """Run a variant on a layer. Its forward has to return a tensor, and errors of its own are explained where their cause is known."""
    try:
        y = _run(cfg, params, W, x)
    except KeyError as e:
        if e.args and isinstance(e.args[0], str) and e.args[0] not in {*params, *W.constants}:
            fail(f"forward to read params among {sorted(params)} and constants among {sorted(W.constants)}", f"that it reads {e}")
        raise
    except RuntimeError as e:
        others = [name for name, c in W.constants.items() if c.is_floating_point() and c.dtype != x.dtype]
        if others and any(word in str(e) for word in ("dtype", "scalar type")):
            fail(f"constants cast where forward uses them, as by W.constants[{others[0]!r}].to(x.dtype)", f"an error: {e}")
        raise
    if not isinstance(y, Tensor):
        fail("forward to return a tensor, the output (*b, o)", type(y).__name__)
    out: Tensor = y
    return out


def _run(cfg: AdapterConfig, params: Params, W: Frozen, x: Tensor) -> Any:
    try:
        return Variant(cfg)(params, W, x)
    except Exception as e:
        e.add_note(f"in forward on x {tuple(x.shape)}, {x.dtype}")
        raise


def float64(cfg: AdapterConfig) -> list[Case]:
    return make_cases(with_fields(cfg, dtype=torch.float64), torch.float64)


def float32(cfg: AdapterConfig) -> list[Case]:
    return make_cases(with_fields(cfg, dtype=torch.float32), torch.float32)


def fail(expected: str, found: object) -> None:
    raise AssertionError(f"expected {expected}, found {found}")


def told(check: str, e: Exception) -> str:
    """Return the line for a check that failed: with the error's type unless the check itself raised it, and with the error's notes."""
    kind = "" if isinstance(e, AssertionError) else f"{type(e).__name__}: "
    return f"{check}: {kind}{e}" + "".join(f" ({note})" for note in getattr(e, "__notes__", ()))


def close(what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    if got.shape != want.shape:
        fail(f"{what} of shape {tuple(want.shape)}", tuple(got.shape))
    error = float((got.detach().double() - want.detach().double()).abs().max()) if want.numel() else 0.0
    bound = tolerance * max(1.0, float(want.detach().double().abs().max()) if want.numel() else 1.0)
    if not error <= bound:
        fail(f"{what} within {bound:.1e}", f"{error:.1e} off")
