"""PEFT beside ours: one model adapted by both with the same numbers, and the map between the two parametrisations.

Each of our params is `sign * (PEFT's - origin)`: the origin is PEFT's neutral value (0, the row norm, 1, PiSSA's start), the sign is -1
only where the two decompositions chose opposite singular vectors. So each gradient is `sign` times PEFT's.
"""

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_lite as ll


@dataclass(frozen=True)
class Leaf:
    """A trained tensor of PEFT, with the map to ours."""

    theirs: nn.Parameter
    origin: Tensor
    sign: Tensor

    def ours(self, value: Tensor) -> Tensor:
        """Convert a value of PEFT's tensor to ours."""
        return self.sign * (value.detach().reshape(self.origin.shape) - self.origin)

    def grad(self) -> Tensor:
        """Return PEFT's gradient as one of ours."""
        return self.sign * self.theirs.grad.reshape(self.origin.shape)


@dataclass(frozen=True)
class Pair:
    """An `adapt` and a PEFT model over the same frozen weights."""

    adapt: ll.Adapt
    theirs: nn.Module
    leaves: dict[str, dict[str, Leaf]]

    def params(self) -> dict[str, dict[str, Tensor]]:
        """Return PEFT's present values as our params tree."""
        return {path: {name: leaf.ours(leaf.theirs) for name, leaf in leaves.items()} for path, leaves in self.leaves.items()}

    def grads(self) -> dict[str, dict[str, Tensor]]:
        """Return the gradients that PEFT's tensors hold as a tree of ours."""
        return {path: {name: leaf.grad() for name, leaf in leaves.items()} for path, leaves in self.leaves.items()}

    def move(self, seed: int = 0, scale: float = 0.1) -> "Pair":
        """Move every tensor that PEFT trains off its start, so that no update is zero."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for leaves in self.leaves.values():
                for leaf in leaves.values():
                    leaf.theirs.add_(scale * torch.randn(leaf.theirs.shape, generator=generator))
        return self


def pair(model: nn.Module, cfg: ll.AdapterConfig | Sequence[ll.AdapterConfig]) -> Pair:
    """Adapt `model` by both, at PEFT's start. Several configs are IA3's gates, which PEFT has in one config."""
    adapt = ll.build(model, cfg)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft_config(model, adapt))
    leaves = {}
    for target, config in zip(adapt.targets, adapt.configs):
        W = dense(model.get_submodule(target.path))
        leaves[target.path] = _leaves(config, theirs.base_model.model.get_submodule(target.path), W, adapt.constants[target.path])
    trained = {id(p) for p in theirs.parameters() if p.requires_grad}
    assert trained == {id(leaf.theirs) for layer in leaves.values() for leaf in layer.values()}  # nothing that PEFT trains is left out
    return Pair(adapt, theirs, leaves)


class BlockDiagonal:
    """PEFT's CUDA kernel of BOFT in torch: blocks `(m, n, k, k)` as `m` block-diagonal matrices. Without it PEFT takes one factor."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(grad: Tensor, blocks: Tensor) -> list[Tensor]:
        m, n, k, _ = blocks.shape
        each = grad.view(m, n, k, n, k).diagonal(dim1=1, dim2=3)  # (m, k, k, n)
        return [each.permute(0, 3, 1, 2)]


def dense(layer: nn.Module) -> Tensor:
    """Return a layer's weight as `(o, i)`."""
    weight = layer.weight.detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


def peft_config(model: nn.Module, adapt: ll.Adapt) -> peft.PeftConfig:
    """Write our configs as PEFT's, on exactly the layers that ours took."""
    cfg = adapt.configs[0]
    paths = {target.path: config for target, config in zip(adapt.targets, adapt.configs)}
    shared = {
        "target_modules": _any_of(paths),
        "fan_in_fan_out": isinstance(model.get_submodule(adapt.targets[0].path), Conv1D),
    }
    if isinstance(cfg, ll.IA3Config | ll.IA3FFConfig):
        inputs = [path for path, config in paths.items() if isinstance(config, ll.IA3FFConfig)]
        return peft.IA3Config(feedforward_modules=_any_of(inputs), **shared)
    start = "pissa" if isinstance(cfg, ll.PiSSAConfig) else True
    return peft.LoraConfig(
        **{"r": cfg.r, "lora_alpha": cfg.alpha, "lora_dropout": getattr(cfg, "dropout", 0.0), "init_lora_weights": start},
        **{"use_rslora": getattr(cfg, "rslora", False), "use_dora": isinstance(cfg, ll.DoRAConfig), **shared},
    )


def _any_of(paths) -> str | list[str]:
    return "|".join(map(re.escape, paths)) or []  # a string is one expression to PEFT, matched in full


def _leaves(cfg: ll.AdapterConfig, layer: nn.Module, W: Tensor, constants: dict[str, Tensor]) -> dict[str, Leaf]:
    one = torch.ones(())
    if isinstance(cfg, ll.IA3Config | ll.IA3FFConfig):
        gate = layer.ia3_l["default"]
        return {"g": Leaf(gate, torch.ones(gate.numel()), one)}
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if isinstance(cfg, ll.PiSSAConfig):
        signs = (A.detach() * constants["A0"]).sum(1).sign()  # (r,)
        return {"dA": Leaf(A, A.detach().clone(), signs[:, None]), "dB": Leaf(B, B.detach().clone(), signs)}
    found = {"A": Leaf(A, torch.zeros(A.shape), one), "B": Leaf(B, torch.zeros(B.shape), one)}
    if isinstance(cfg, ll.DoRAConfig):
        found["m"] = Leaf(layer.lora_magnitude_vector["default"].weight, W.norm(dim=1), one)
    return found


# Files of PEFT's


def wrapped(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """Adapt a copy of a model by PEFT, in evaluation mode, with every tensor that it trains off its start."""
    theirs = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    return theirs


def saved(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a file of PEFT's."""
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def edit(folder: Path, **fields: object) -> None:
    """Change fields of a file's config."""
    place = folder / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **fields}))


def assert_close(got: Tensor, want: Tensor, what: str = "the update") -> None:
    """Hold two updates, or gradients, against each other to 1e-5 of the largest entry, where there is something to compare."""
    assert got.shape == want.shape, what
    error, largest = float((got - want).detach().abs().max()), float(want.detach().abs().max())
    assert largest > 1e-3, f"{what}: nothing is compared"
    assert error <= 1e-5 * largest, f"{what}: {error / largest:.1e} of the largest entry apart"
