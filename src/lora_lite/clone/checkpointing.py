"""Activation checkpointing with explicit params: named blocks keep their inputs and recompute the rest in the backward pass.

torch's own checkpoint recomputes after `functional_call` has handed its tensors back, and so without the params. Here everything that a
block reads and that is swapped for a call (its inputs, masks, params, buffers) is an explicit input of an autograd Function, put back in
place for the recomputation. `torch.compile` cannot trace such a Function: there torch's own checkpoint runs under plain autograd, and
inside a transform the compiler decides what to recompute.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from lora_lite.clone.block_function import BlockFunction
from lora_lite.clone.held import Held
from lora_lite.clone.hooked_outputs import require_no_escape, watched
from lora_lite.clone.recomputed import Recipe, Recompute, random_state
from lora_lite.core.errors import nearest
from lora_lite.core.invocation import is_cache
from lora_lite.core.tracing import dual_numbers, transformed


def install(clone: nn.Module, pattern: str | None) -> None:
    """Checkpoint the blocks whose paths match `pattern`, and those of a model whose own checkpointing is on.

    Raises:
        ValueError: where `pattern` matches no module.
    """
    names = {module: f'block "{path}"' for path, module in clone.named_modules()}
    for block in check_pattern(clone, pattern):
        own = vars(block).pop("forward", None) or functools.partial(type(block).forward, block)
        vars(block)["forward"] = functools.partial(_recomputed, names[block], block, own)
        vars(block)["gradient_checkpointing"] = False  # ours, not also the model's own
    for module in clone.modules():
        if "_gradient_checkpointing_func" in vars(module):
            vars(module)["_gradient_checkpointing_func"] = _model_checkpoint
        _drop_grad_hooks(module)


def check_pattern(model: nn.Module, pattern: str | None, call: str = "build") -> list[nn.Module]:
    """List the blocks whose paths match `pattern`, none for None. `call` is whose argument it is.

    Raises:
        ValueError: where `pattern` matches no module.
    """
    if pattern is None:
        return []
    expression = _compile(pattern, call)
    blocks = [m for path, m in model.named_modules() if path and expression.search(path)]
    if not blocks:
        paths = [path for path, _ in model.named_modules() if path]
        raise ValueError(f'{call}: expected remat="{pattern}" to match a block, found none. Closest: {nearest(pattern, paths)}.')
    return blocks


def _compile(pattern: str, call: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern + "")  # a string, not bytes
    except (re.error, TypeError) as e:
        raise ValueError(f"{call}: expected remat as a regular expression, found {pattern!r} ({e}). Write e.g. r'layers\\.\\d+$'.") from e


def _recomputed(name: str, block: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    args, kwargs = _without_caches(args, kwargs)
    return recompute(name, own, block, args, kwargs)


def _model_checkpoint(fn: Callable[..., Any], *args: Any, **_: Any) -> Any:
    """Stand in for the checkpoint function that a transformers model calls: `fn` wraps a block's own forward."""
    kwargs: dict[str, Any] = {}
    while isinstance(fn, functools.partial):
        args, kwargs, fn = (*fn.args, *args), {**fn.keywords, **kwargs}, fn.func
    block = getattr(fn, "__self__", None)
    if block is None:  # a plain function with the block as its first argument
        block, fn, args = args[0], functools.partial(fn, args[0]), args[1:]
    return recompute(f"a block of class {type(block).__name__}", fn, block, args, kwargs)


def _drop_grad_hooks(module: nn.Module) -> None:
    """Leave out transformers' hooks that call `requires_grad_` on activations: not allowed under a transform, and not needed."""
    for table in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(table.items()):
            if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
                del table[key]


def _without_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take key-value caches away: a recomputed block would fill them twice and so attend to its own past."""
    caches = [value for value in (*args, *kwargs.values()) if is_cache(value)]
    if not caches or not torch.is_grad_enabled():
        return args, kwargs
    if any(map(_filled, caches)):
        raise ValueError(
            "remat: expected no filled key-value cache where gradients are taken, found one among a block's inputs. Pass use_cache=False, "
            "or build without remat to differentiate through a cached prefix."
        )
    keep = {name: None if is_cache(value) else value for name, value in kwargs.items()}
    if "use_cache" in keep:
        keep["use_cache"] = False
    return tuple(None if is_cache(value) else value for value in args), keep


def _filled(cache: Any) -> bool:
    """Whether a cache holds anything. One of states alone, as Mamba's, counts no tokens, and raises where it is asked."""
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError:
        return bool(cache.has_previous_state())


def recompute(name: str, fn: Callable[..., Any], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `fn(*args, **kwargs)`, the forward of `block`, keeping only its inputs for the backward pass. Messages call it `name`.

    Dual numbers of the user's own pass through it as it is: forward mode keeps nothing, and torch has no second level of it for a rule.
    """
    if not torch.is_grad_enabled() or dual_numbers():
        return fn(*args, **kwargs)
    if torch.compiler.is_compiling():
        return _compiled(fn, block, args, kwargs)
    run = BlockFunction(name, fn, block, args, kwargs)
    with watched(block) as seen:
        made = Recompute.apply(Recipe(run, random_state(block, run.inputs)), *run.inputs)
    require_no_escape(seen, run.kept)
    run.require_no_escape()
    return run.result(made)


def _compiled(fn: Callable[..., Any], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Leave recomputation to the compiler: torch's checkpoint where plain autograd runs, its own partitioning inside a transform."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] + Held.of(block).tensors
    if not transformed() and any(t.requires_grad for t in tensors):
        return checkpoint(fn, *args, use_reentrant=False, **kwargs)
    return fn(*args, **kwargs)
