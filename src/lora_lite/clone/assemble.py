"""The clones that an `Adapt` runs on: one whose targets run their variants, copies of it, and one of the frozen model."""

from torch import nn

from lora_lite.clone.bind import adapt_layer, layer_at, rebind, volatile_buffers
from lora_lite.clone.checkpointing import install
from lora_lite.clone.structure import clone_again
from lora_lite.core.plan import Plan
from lora_lite.core.tree import AnyTree
from lora_lite.layers.find import reader_of
from lora_lite.layers.module import FrozenBlock
from lora_lite.layers.parameter import exposed
from lora_lite.layers.prompt import note_prompts


def bound_clone(plan: Plan) -> nn.Module:
    """Give a clone whose targets run their variants; it is a template, and never called itself."""
    clone = clone_again(plan.base)
    for target, cfg in plan.entries:
        path = target.path
        adapt_layer(exposed(clone, path, reader_of(target.kind)), target, cfg, plan.shapes[path], plan.constants_at(path, cfg))
    install(clone, plan.remat)
    note_prompts(clone, [target.path for target, _ in plan.entries if issubclass(target.kind, FrozenBlock)])
    return clone


def plain_copy(base: nn.Module) -> nn.Module:
    """Give a clone that runs the frozen model."""
    copy = clone_again(base)
    install(copy, None)
    return copy


def bound_copy(bound: nn.Module) -> nn.Module:
    """Copy a bound clone, its targets reading the copy."""
    copy = clone_again(bound)
    rebind(copy)
    return copy


def trainable_copy(bound: nn.Module, params: AnyTree) -> nn.Module:
    """Copy a bound clone as a module to be trained: copies of `params` are its trainable parameters, and its small state is its own."""
    module = bound_copy(bound)
    for name, buffer in volatile_buffers(module).items():
        where, _, attribute = name.rpartition(".")
        module.get_submodule(where)._buffers[attribute] = buffer.clone()  # its own state, not the user's
    for path, leaves in params.items():
        layer = layer_at(module, path)
        for name, attribute in layer._lora_lite.names:
            layer.register_parameter(attribute, nn.Parameter(leaves[name].detach().clone()))
    return module
