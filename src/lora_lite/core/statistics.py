"""Statistics of a layer's inputs: sums alone, so that memory does not grow with the data. `add` returns a new statistic."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lora_lite.core.autocast import full_precision
from lora_lite.core.certificate import Start
from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Frozen
from lora_lite.core.leading import Way, leading_eigenpairs, note


@dataclass(frozen=True, eq=False)
class Means:
    """Means over a layer's inputs, a number for each of the `i` input features.

    Args:
        count: tokens seen.
        mean: `E[x] (i,)`.
        mean_abs: `E|x| (i,)`.
    """

    count: int = 0
    mean: Any = field(default=0.0, repr=False)  # tensors once a row has been added
    mean_abs: Any = field(default=0.0, repr=False)

    def add(self, x: Tensor) -> Self:
        """Return the statistics with the rows of `x (n, i)` added, n >= 1."""
        count = self.count + len(x)
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # mps has no float64
        means = {"mean": x.mean(0, dtype=wide), "mean_abs": x.abs().mean(0, dtype=wide)}
        return replace(self, count=count, **{k: (m - getattr(self, k)) * (len(x) / count) + getattr(self, k) for k, m in means.items()})

    def merge(self, other: Self) -> Self:
        """Return the statistics of the rows of both, as one pass over all of them would up to rounding."""
        if not self.count or not other.count:
            return self if self.count else other
        count, names = self.count + other.count, ("mean", "mean_abs")
        share = other.count / count
        return replace(self, count=count, **{k: getattr(self, k) + (getattr(other, k) - getattr(self, k)) * share for k in names})

    def to(self, device: torch.device | str) -> Self:
        """Return the statistics on a device."""
        return replace(self, **_tensors_on(self, device))


@dataclass(frozen=True, eq=False)
class Statistics(Means):
    """Means and second moments over a layer's inputs.

    Args:
        count: tokens seen.
        mean: `E[x] (i,)`.
        mean_abs: `E|x| (i,)`.
        scatter: sum of `(x - mean) (x - mean)^T`, `(i, i)`, in the dtype of the inputs, at least float32.

    Example:
        >>> import torch, lora_lite as ll
        >>> stats = ll.Statistics().add(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        >>> stats.covariance
        tensor([[1., 0.],
                [0., 0.]])
    """

    scatter: Any = field(default=0.0, repr=False)
    _known: dict[tuple[bool, Way], tuple[Tensor, Tensor, Start]] = field(default_factory=dict, repr=False)

    def add(self, x: Tensor) -> Self:
        new = super().add(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Centred by its own mean and then shifted (Chan, Golub and LeVeque 1983): the sum of raw products would lose the covariance
        # beside a large mean. So float32 does for float32 inputs, in half the memory.
        mean = x.mean(0, dtype=new.mean.dtype)
        rows, shift = x.to(dtype) - mean.to(dtype), (mean - self.mean).to(dtype)
        with full_precision(x):
            scatter = rows.t() @ rows
        scatter.add_(self.scatter).addr_(shift, shift, alpha=self.count * len(x) / new.count)
        return replace(new, scatter=scatter, _known={})

    def merge(self, other: Self) -> Self:
        new = super().merge(other)
        if not self.count or not other.count:
            return new
        shift = (other.mean - self.mean).to(self.scatter.dtype)
        scatter = (self.scatter + other.scatter).addr_(shift, shift, alpha=self.count * other.count / new.count)  # Chan et al., as in `add`
        return replace(new, scatter=scatter, _known={})

    def to(self, device: torch.device | str) -> Self:
        return replace(super().to(device), _known={})

    @property
    def covariance(self) -> Tensor:
        """`E[x x^T] - E[x] E[x]^T`, `(i, i)`."""
        return self.scatter / self.count

    @property
    def second_moment(self) -> Tensor:
        """`E[x x^T]`, `(i, i)`."""
        mean = self.mean.to(self.scatter.dtype)
        return self.covariance.addr_(mean, mean)

    def directions(self, k: int, center: bool = True, svd: Way = "auto") -> tuple[Tensor, Tensor]:
        """Compute the largest `k` variances `(k,)`, descending, and their directions `(i, k)`, about the mean or about zero, in float64.

        Found once for all layers that share the statistic. `svd` is that of `SVDConfig`.
        """
        key = center, svd
        if key not in self._known or len(self._known[key][0]) < k:
            self._known[key] = leading_eigenpairs(exact(self.covariance if center else self.second_moment), k, svd)
        values, vectors, start = self._known[key]
        note(start)
        return values[:k], vectors[:, :k]


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradient of a loss in a layer's weight, a mean over batches.

    Args:
        count: batches seen.
        gradient: `(o, i)`, in float32 or the dtype of the layer's output if that is wider.

    Example:
        >>> import torch, lora_lite as ll
        >>> ll.Gradient().add(torch.ones(5, 3), torch.ones(5, 2)).gradient
        tensor([[5., 5., 5.],
                [5., 5., 5.]])
    """

    of_loss: ClassVar[bool] = True

    count: int = 0
    gradient: Any = field(default=0.0, repr=False)

    def add(self, x: Tensor, dy: Tensor) -> Self:
        """Return the statistic with one batch added: inputs `x (n, i)` and the gradient in the outputs `dy (n, o)`."""
        dtype = torch.promote_types(dy.dtype, torch.float32)
        with full_precision(x):
            new = dy.to(dtype).t() @ x.to(dtype)
        count = self.count + 1
        return replace(self, count=count, gradient=new.sub_(self.gradient).div_(count).add_(self.gradient))

    def merge(self, other: Self) -> Self:
        """Return the statistic of the batches of both."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        return replace(self, count=count, gradient=self.gradient + (other.gradient - self.gradient) * (other.count / count))

    def to(self, device: torch.device | str) -> Self:
        """Return the statistic on a device."""
        return replace(self, **_tensors_on(self, device))


def _tensors_on(statistic: Any, device: torch.device | str) -> dict[str, Any]:
    values = {f.name: getattr(statistic, f.name) for f in fields(statistic)}
    return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def statistic_of(cfg: AdapterConfig) -> tuple[Callable[[], Any], bool]:
    """Return the class of statistics that a calibrated config gathers, and whether ignored labels are left out."""
    return getattr(cfg, "statistic", Statistics), getattr(cfg, "label_mask", False)


def needs_loss(cfg: AdapterConfig) -> bool:
    """Whether a calibrated config gathers gradients of a loss."""
    return cfg.calibrated and getattr(statistic_of(cfg)[0], "of_loss", False)


def require_stats(cfg: AdapterConfig, W: Frozen, stats: Any, name: str) -> Tensor:
    """Return the statistic `name` of a layer's inputs.

    Raises:
        ValueError: where `stats` lacks it or it is of another width.
    """
    value = getattr(stats, name, None)
    if not isinstance(value, Tensor) or value.shape[-1] != W.in_features:
        found = "none" if value is None else f"shape {tuple(getattr(value, 'shape', ()))}"
        raise ValueError(
            f"{type(cfg).__name__}: expected stats.{name} of the inputs of a layer of width {W.in_features}, found {found}. "
            "Use build(model, cfg, calibration=batches), or pass stats=Statistics().add(x)."
        )
    return value
