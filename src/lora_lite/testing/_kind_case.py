"""The model on which a kind of layer is checked: one layer of it, a batch, and the variants that use parts which it offers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_lite.adapt import Adapt
from lora_lite.build import build
from lora_lite.core.config import AdapterConfig, with_fields
from lora_lite.core.errors import require_type
from lora_lite.core.tree import Tree, tree_map
from lora_lite.layers.kind import Kind
from lora_lite.layers.kinds import as_kinds
from lora_lite.prepare.targets import find_targets
from lora_lite.testing._case import close, fail
from lora_lite.variants.dora import DoRAConfig
from lora_lite.variants.full import FullConfig
from lora_lite.variants.hra import HRAConfig
from lora_lite.variants.ia3 import IA3Config
from lora_lite.variants.ln_tuning import LNTuningConfig
from lora_lite.variants.lora import LoRAConfig
from lora_lite.variants.loreft import LoReFTConfig
from lora_lite.variants.pissa import PiSSAConfig
from lora_lite.variants.tokens import TokensConfig

VARIANTS: dict[str, tuple[AdapterConfig, ...]] = {
    "linear": (LoRAConfig(r=2), IA3Config(), PiSSAConfig(r=2), DoRAConfig(r=2), HRAConfig(r=2), TokensConfig(token_ids=(0, 1))),
    "norm": (LNTuningConfig(),),
    "module": (FullConfig(target_names=("layer",)),),
    "block": (LoReFTConfig(r=2),),
}
"""The variants that a kind of each site is tried with: together they use every part that a kind may offer."""

ROWS = 4


class _Around(nn.Module):
    """A model around the layer, so that it has a path and a dtype of its own. It returns the layer's output without what is beside it.

    Args:
        layer: the layer.
        whole: whether it returns all that the layer returns.
    """

    def __init__(self, layer: nn.Module, whole: bool = False) -> None:
        super().__init__()
        self.layer, self.whole = layer, whole

    def forward(self, x: Any) -> Any:
        y = self.layer(x)
        return y if self.whole or isinstance(y, Tensor) else _output(y)


def _output(y: Any) -> Tensor:
    """Return the output among all that a layer returns: its first floating tensor."""
    found = [leaf for leaf in pytree.tree_leaves(y) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not found:
        fail("a layer that returns a floating tensor", type(y).__name__)
    return found[0]


@dataclass(frozen=True)
class KindCase:
    """A model with one layer of the kind, in float64 where it is floating, and a batch of `ROWS` rows."""

    kind: type[Kind]
    model: _Around
    x: Any
    names: str

    @property
    def whole(self) -> nn.Module:
        """The same model, which returns all that the layer returns."""
        return _Around(self.model.layer, whole=True).eval()

    def config(self, cfg: AdapterConfig) -> AdapterConfig:
        """Return a config in float64 that asks for the layer."""
        return with_fields(cfg, dtype=torch.float64, target_names=(self.names,), exclude_names=())

    @property
    def tolerance(self) -> float:
        """The allowed distance of values: rounding, in float32 for a packed weight."""
        target = find_targets(self.model, self.config(VARIANTS[self.kind.site][0]), kinds=(self.kind,))[0]
        return 1e-9 if self.kind.at(self.model, target.path).dtype == torch.float64 else 1e-5

    @property
    def variants(self) -> list[AdapterConfig]:
        """The variants that use only parts which the kind offers."""
        return [cfg for cfg in VARIANTS[self.kind.site] if set(cfg.uses) <= set(self.kind.gives)]

    def adapted(self, cfg: AdapterConfig, **options: Any) -> tuple[Adapt, Tree]:
        """Build a variant on the layer, with params off their start."""
        adapt = build(self.model, self.config(cfg), kinds=(self.kind,), progress=False, **options)
        g = torch.Generator().manual_seed(0)
        return adapt, tree_map(lambda p: p + 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype), adapt.init(seed=0))


def make_kind_case(
    kind: type[Kind], make_layer: Callable[[], nn.Module], make_input: Callable[[], Any] | None = None, names: str = r"^layer$"
) -> KindCase:
    """Make the case of a kind, on which single checks of `KIND_CHECKS` run.

    Args:
        kind, make_layer, make_input, names: as in `check_kind`.
    """
    as_kinds((kind,))  # facts that no check could read fail here, once
    require_type(callable(make_layer), "check_kind(MyKind, make_layer)", "make_layer", "a function that returns a layer", make_layer)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layer: Any = make_layer()
        require_type(isinstance(layer, nn.Module), "check_kind(MyKind, make_layer)", "what make_layer returns", "a layer", layer)
        model = _Around(layer).double().eval().requires_grad_(False)
        x = make_input() if make_input is not None else _input(kind, model)
    if not isinstance(x, Tensor) or x.shape[:1] != (ROWS,):
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"check_kind: expected make_input to return one tensor with {ROWS} rows on its first axis, found {found}. Put a layer that "
            'takes several into a module that takes one and splits it, and name the layer inside, e.g. names=r"^layer\\.inner$".'
        )
    x = x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
    return KindCase(kind, model, x, names)


def _input(kind: type[Kind], model: _Around) -> Tensor:
    W = kind.at(model, "layer")
    return torch.randn(ROWS, 3, W.in_features, dtype=torch.float64)


def same_results(got: Any, want: Any, tolerance: float) -> None:
    """Hold all that an adapted layer returns against all that the layer returns."""
    (leaves, tree), (wanted, form) = pytree.tree_flatten(got), pytree.tree_flatten(want)
    if tree != form:
        fail(f"the layer to return {form}", tree)
    for leaf, own in zip(leaves, wanted):
        if isinstance(leaf, Tensor) and isinstance(own, Tensor):
            close("what the layer returns", leaf, own, tolerance)
        elif type(leaf) is not type(own) or (not isinstance(own, Tensor) and leaf != own):
            fail(f"the layer to return {own!r} beside its output", repr(leaf))
