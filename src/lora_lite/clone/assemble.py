"""The copies that an `Adapt` runs on: bound ones, whose targets run their variants, and modules to be trained."""

import functools
from collections.abc import Mapping

from torch import Tensor, nn

from lora_lite.clone.adapter import Adapter, adapters
from lora_lite.clone.attach import bind_followers, bind_target
from lora_lite.clone.bind import Binding
from lora_lite.clone.checkpointing import install
from lora_lite.clone.data_parallel import replicable
from lora_lite.clone.listing import keep_lists
from lora_lite.clone.loaded import keep_shared
from lora_lite.clone.reads import show_reads
from lora_lite.clone.resized import refuse_resized_targets
from lora_lite.clone.saved import warn_when_saved
from lora_lite.clone.settings import Settings
from lora_lite.clone.state import own_state
from lora_lite.clone.structure import clone_again
from lora_lite.clone.unfrozen import keep_frozen
from lora_lite.core.alike import made_alike
from lora_lite.core.invocation import ACTIVE
from lora_lite.core.plan import Plan
from lora_lite.core.tracing import require_read, untransformed
from lora_lite.core.tree import modules_by_path, tree_leaves
from lora_lite.layers.access import module_at
from lora_lite.layers.notes import note


def bound_copy(plan: Plan) -> tuple[nn.Module, list[Binding], Settings]:
    """Copy a plan's base and bind the targets to their variants. Return the copy, the bindings, and the settings, which are its own."""
    clone = clone_again(plan.base, plan.kinds, functools.partial(_keep_lists, plan))
    settings = Settings(clone)  # before a kind keeps a module as it is
    shared = {name: _shared(clone, name, plan) for name in plan.shared_params()}
    bound: list[Binding] = []
    for target, cfg in plan.entries:
        path = target.path
        target.kind.install(clone, path)
        if cfg.acts_at is not None:
            note(clone, path, ACTIVE, cfg.acts_at)
        constants = plan.constants_at(path, cfg)
        others = {name: (shared[place], there) for name, (place, there) in plan.places(path, cfg).items()}
        binding = bind_target(clone, path, target.kind, cfg, plan.shapes[path], constants, others)
        bound += [binding, *bind_followers(clone, binding, target.shared_with if cfg.tied else ())]
    show_reads(clone)
    install(clone, plan.remat)
    return clone, bound, settings


def _keep_lists(plan: Plan, clone: nn.Module) -> None:
    """Prepare the lists of all modules that have parameters of a target."""
    keep_lists([clone] if plan.shared_params() else [])
    for target, cfg in plan.entries:
        for host in (module_at(clone, target.kind.host(target.path)), *map(clone.get_submodule, target.shared_with if cfg.tied else ())):
            keep_lists(modules_by_path(host).values())


def _shared(clone: nn.Module, name: str, plan: Plan) -> Adapter:
    """Register the tensors that all targets of a variant share, in a child of a copy's root."""
    dtype = next(cfg.dtype for _, cfg in plan.entries if cfg.name == name)
    return Adapter.on(clone, name, f"{name}_shared", plan.shapes[name], dtype)


@made_alike
@untransformed
def trainable_copy(plan: Plan, params: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
    """Copy a plan's base as a module to be trained. Its trainable parameters are copies of `params`.

    Its small buffers and its settings are its own.

    Raises:
        ValueError: for params of a `torch.func` transform.
    """
    require_read(tree_leaves(params), "adapt.module")
    module, _, _ = bound_copy(plan)
    own_state(module)
    for adapter in adapters(module):
        adapter.fill(params[adapter.path])
    replicable(module)
    warn_when_saved(module)
    keep_shared(module)
    keep_frozen(module)
    refuse_resized_targets(module)
    return module
