"""Bind the targets of a copy, and the modules elsewhere that have a target's weight."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lora_lite.clone.adapter import Adapter, adapters
from lora_lite.clone.bind import Binding
from lora_lite.core.config import AdapterConfig
from lora_lite.layers.access import module_at
from lora_lite.layers.kind import Kind, Params

_FOLLOWER = "_lora_lite_follower"


class Follower(Binding):
    """Another module with a target's weight, such as a tied head: it runs the variant on its own reading of it, with the same params.

    Args:
        leader: the target's binding.
        W: the module, as the target's kind reads it.
    """

    def __init__(self, leader: Binding, W: Kind) -> None:
        super().__init__(leader.path, leader.cfg, W, leader.adapter, leader.shared)
        self.leader, self.root = leader, leader.root

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self.run(args, kwargs)  # the adapter's own call is that of the target

    def read(self, name: str) -> Tensor:
        return self.leader.read("weight")


def bind_target(
    clone: nn.Module, path: str, kind: type[Kind], cfg: AdapterConfig, shapes: Mapping[str, tuple[int, ...]], constants: Params, shared: Any
) -> Binding:
    """Bind one target of a copy: register its adapter, replace the layer's forward, put stand-ins before weights that the model reads."""
    host = module_at(clone, kind.host(path))
    W = kind.at(clone, path, dict(constants))
    inside = path[len(kind.host(path)) :].lstrip(".")
    adapter = Adapter.on(host, path, f"{inside}_adapter" if inside else "adapter", shapes, cfg.dtype)
    binding = adapter.binding = Binding(path, cfg, W, adapter, shared)
    binding.own = vars(host).get("forward") or functools.partial(type(host).forward, host)
    W.bind(host, binding)
    binding.root = clone
    return binding


def bind_followers(clone: nn.Module, binding: Binding, paths: Sequence[str]) -> list[Binding]:
    """Bind the modules of a copy that share the weight of a bound target."""
    for path in paths:
        module = clone.get_submodule(path)
        W: Any = binding.W.sharer(module)  # whose kind has one: this is checked before a copy is made
        follower = Follower(binding, W)
        follower.own = vars(module).get("forward") or functools.partial(type(module).forward, module)
        W.bind(module, follower)
        vars(module)[_FOLLOWER] = follower
        binding.followers.append(follower)
    return binding.followers


def bindings_inside(block: nn.Module) -> list[Binding]:
    """List the bindings whose modules lie in a part of a bound copy, with those of modules that follow a target elsewhere."""
    followers = [vars(module)[_FOLLOWER] for module in block.modules() if _FOLLOWER in vars(module)]
    return [*(a.binding for a in adapters(block) if a.binding is not None), *followers]
