"""A frozen base split over the processes of a mesh by torch's FSDP2, for the functional path.

A sharded clone holds each weight as a `DTensor` of which this process owns one part; nothing of the user's model is aliased. A clone that
is to be called is woken first: `fully_shard` is laid over its structure and takes these parts as its own. So the clones for adapted, mixed
and base calls share one set of parts. The adapter's placeholders are left out: params are whole on every process.

FSDP gathers a block's weights when its forward begins and again when its backward does, and frees their memory in between. A gradient of a
gradient, in reverse mode twice, would run the backward of a backward, which FSDP is not told of, over freed memory: that is refused.
"""

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.clone.adapter import placeholders
from lora_lite.clone.per_call import Replica, Replicas
from lora_lite.clone.reads import hide_reads
from lora_lite.clone.structure import clone_again
from lora_lite.core.errors import listed, nearest
from lora_lite.core.plan import Plan
from lora_lite.layers.find import distribute
from lora_lite.layers.kind import Kind


@dataclass(frozen=True)
class Sharding:
    """The mesh over which a base is split, and the expression of the blocks that are gathered one at a time."""

    mesh: Any
    blocks: str


def shard_plan(plan: Plan, sharding: Sharding) -> Plan:
    """Return a plan over this process's part of the base, with the constants on the mesh's device."""
    base, device = shard_base(plan.base, sharding, plan.kinds), _device(sharding.mesh)
    constants = {path: {name: c.to(device) for name, c in own.items()} for path, own in plan.constants.items()}
    shared = {variant: {name: c.to(device) for name, c in common.items()} for variant, common in plan.shared.items()}
    return replace(plan, base=base, constants=constants, shared=shared, sharding=sharding)


def shard_base(base: nn.Module, sharding: Sharding, kinds: Sequence[type[Kind]] = ()) -> nn.Module:
    """Clone a module tree with this process's part of every weight, copied to the mesh's device one weight at a time.

    Raises:
        ValueError: where `blocks` matches nothing, the mesh has more than one axis, or a weight cannot be split; it names them.
    """
    _require_mesh(sharding.mesh)
    _blocks(base, sharding.blocks)
    clone, device = clone_again(base, kinds), _device(sharding.mesh)
    distribute(clone.modules(), device, kinds)
    odd = [n for n, p in clone.named_parameters() if type(p) is not nn.Parameter or p.is_meta or not p.dim()]
    if odd:
        raise ValueError(
            f"shard: expected plain weights with data and at least one axis, found others at {listed(odd)}. Offloaded and already sharded "
            "layers cannot be split here. A class of weights that no kind reads needs a Kind with distribute(layer, device)."
        )
    parts: dict[int, nn.Parameter] = {}
    for module in clone.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in parts:
                    parts[id(weight)] = nn.Parameter(_own_part(weight.detach(), sharding.mesh), requires_grad=False)
                module._parameters[name] = parts[id(weight)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device, copy=True)
    return clone


def wake(clone: nn.Module, sharding: Sharding) -> nn.Module:
    """Lay FSDP over a sharded clone, in place: block by block, and the rest as the root."""
    from torch.distributed.fsdp import fully_shard

    hide_reads(clone)
    parts = _hollowed(clone)
    held_apart = placeholders(clone)
    for block in (*_blocks(clone, sharding.blocks), clone):
        # The root too is resharded: its embeddings would otherwise stay whole in each of the clones.
        try:
            fully_shard(block, mesh=sharding.mesh, reshard_after_forward=True, ignored_params=held_apart)
        except RuntimeError as e:
            if "floating point" not in str(e):
                raise
            raise ValueError(
                f"adapt.shard: expected a torch whose fully_shard takes packed weights, found {torch.__version__}. Install torch 2.13 or "
                "later, or split the dense model."
            ) from e
    for module, name, part in parts:  # before its first forward FSDP takes what it finds in its parameters' places
        module._parameters[name] = part
    return clone


def _hollowed(clone: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Replace the parts, which `fully_shard` would refuse, by weights without data. Return the parts with their places."""
    parts: list[tuple[nn.Module, str, nn.Parameter]] = []
    held_apart = placeholders(clone)
    hollow: dict[int, nn.Parameter] = {}
    for module in clone.modules():
        for name, part in module._parameters.items():
            if part is None or part in held_apart:
                continue
            if id(part) not in hollow:  # one for each weight, so that tied ones stay tied
                hollow[id(part)] = nn.Parameter(torch.empty(part.shape, dtype=part.dtype, device="meta"), requires_grad=False)
            parts.append((module, name, part))
            module._parameters[name] = hollow[id(part)]
    return parts


class ShardedReplicas(Replicas):
    """The one woken clone of a sharded base: collectives have an order, so threads cannot each have their own."""

    def __init__(self, make: Callable[[], Replica], sharding: Sharding) -> None:
        super().__init__(make)
        self._thread = threading.get_ident()
        wake(self.main.module, sharding)

    def here(self) -> Replica:
        """Return the clone.

        Raises:
            RuntimeError: inside two reverse-mode transforms or `torch.compile`, or in another thread than the one that sharded.
        """
        if torch.compiler.is_compiling() or _reverse_levels() > 1:
            raise RuntimeError(
                "adapt: expected at most one reverse-mode transform and no torch.compile around a sharded adapt, found more. Take second "
                "derivatives forward over reverse, as ll.hvp does, or use an adapt that is not sharded."
            )
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                "adapt: expected a sharded adapt to be called in the thread that made it, found another one. Every process must issue its "
                "collectives in the same order; call it from one thread."
            )
        return self.main


def _reverse_levels() -> int:
    """Count the reverse-mode transforms of torch.func that are active."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Grad for level in stack)


def _own_part(weight: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    rows = -(-len(weight) // mesh.size())  # as FSDP divides: equal parts, the last ones shorter or empty
    part = weight[rows * mesh.get_local_rank() : rows * (mesh.get_local_rank() + 1)]
    part = part.to(_device(mesh), copy=True, memory_format=torch.contiguous_format)
    stride = torch.empty(weight.shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=weight.shape, stride=stride)


def _device(mesh: Any) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _blocks(module: nn.Module, pattern: str) -> list[nn.Module]:
    try:
        found = [m for path, m in module.named_modules() if path and re.search(pattern, path)]
    except (re.error, TypeError) as e:
        raise ValueError(f"shard: expected blocks as a regular expression, found {pattern!r} ({e}). Write e.g. r'layers\\.\\d+$'.") from e
    if not found:
        paths = [path for path, _ in module.named_modules() if path]
        raise ValueError(f'shard: expected blocks="{pattern}" to match a module, found none. Closest: {nearest(pattern, paths)}.')
    return found


def _require_mesh(mesh: Any) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"shard: expected mesh as a DeviceMesh, found {type(mesh).__name__}. Use torch.distributed.device_mesh.init_device_mesh."
        )
    if mesh.ndim != 1:
        raise ValueError(f'shard: expected a mesh of one axis, found {mesh.ndim}. Take one, e.g. mesh["shard"].')
