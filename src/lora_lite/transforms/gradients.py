"""Gradients of functions of a params tree, and their way to torch's optimisers."""

import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lite.core.errors import is_mapping, require_fitting, require_grads, require_tree, require_type
from lora_lite.core.tracing import in_transform
from lora_lite.core.tree import AnyTree, flatten, join, tree_leaves


def value_and_grad(f: Callable[..., Any], has_aux: bool = False) -> Callable[..., tuple[Any, Any]]:
    """Make `(params, *args) -> (value, grads)` of a scalar function `f(params, *args)`.

    `torch.func.grad` always builds the graph of the gradient and holds its memory. Where no transform and no compilation is
    active this takes torch's plain autograd instead; inside them, and inside the function of another, it is torch.func's.

    Args:
        f: returns a scalar tensor, or with `has_aux` a pair of it and anything else.
        has_aux: whether `f` returns such a pair.

    Returns:
        A function that returns `(value, grads)`, or `((value, aux), grads)`. `grads` is a tree like `params`, with zeros for leaves that
        the value does not depend on. On the plain path neither carries a graph, and a value that depends on no leaf is warned of.

    Raises:
        ValueError: where the value is not a scalar tensor, or with `has_aux` the result is no pair.
        TypeError: where `f` is no function, or a leaf of `params` is not a floating tensor.
        RuntimeError: in inference mode, with a version of torch that gives zeros there.

    Example:
        >>> import torch, lora_lite as ll
        >>> value, grads = ll.value_and_grad(lambda p: (p["w"] ** 2).sum())({"w": torch.tensor([1.0, 2.0])})
        >>> float(value), grads["w"].tolist()
        (5.0, [2.0, 4.0])
    """

    require_type(callable(f), "value_and_grad(f)(params)", "f", "a function of params", f)

    def value_and_grads(params: Any, *args: Any) -> tuple[Any, Any]:
        if differentiated_around():
            _require_gradients()
            grads, value = torch.func.grad_and_value(f, has_aux=has_aux)(params, *args)
            return value, grads
        return _plain(f, has_aux, params, args)

    return value_and_grads


class _Around(threading.local):
    """Whether the function of a plain `value_and_grad` runs: one inside it is a part of what that one differentiates."""

    nested = False

    def __enter__(self) -> None:
        self.nested = True

    def __exit__(self, *_: object) -> None:
        self.nested = False  # a plain one is never inside another


_AROUND = _Around()


def differentiated_around() -> bool:
    """Whether something around may differentiate: a transform, a compilation, or a `value_and_grad`."""
    return in_transform() or _AROUND.nested


def _require_gradients() -> None:
    """Refuse inference mode where torch.func gives zeros in it, as torch 2.11 does without a word.

    Raises:
        RuntimeError: there.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and not _gradients_in_inference_mode():
        raise RuntimeError(
            f"value_and_grad: expected a call outside of inference mode, since torch {torch.__version__} gives zeros as gradients in it. "
            "Use torch.no_grad() around the call, or leave inference mode for it by torch.inference_mode(False)."
        )


@functools.cache
def _gradients_in_inference_mode() -> bool:
    with torch.inference_mode():
        return bool(torch.func.grad(torch.square)(torch.ones((), device="cpu")))


def _plain(f: Callable[..., Any], has_aux: bool, params: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
    leaves, spec = pytree.tree_flatten(params)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"value_and_grad: expected floating tensors in params, found {found}. Pass other values after params.")
    variables = [(leaf.clone() if leaf.is_inference() else leaf.detach()).requires_grad_() for leaf in leaves]
    with torch.enable_grad(), _AROUND:
        out = f(pytree.tree_unflatten(variables, spec), *args)
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(
            f"value_and_grad: expected f to return (value, aux), found {type(out).__name__}. Leave has_aux out, or return both."
        )
    value, aux = out if has_aux else (out, None)
    value = require_scalar("value_and_grad", "f", value)
    some: Sequence[Tensor | None] = [None] * len(variables)
    if value.requires_grad:
        some = torch.autograd.grad(value, variables, allow_unused=True)
    if variables and all(grad is None for grad in some):
        warnings.warn(
            "value_and_grad: the value depends on none of the params, and all gradients are zero. Compute it from the params that f is "
            "given, without detach() and outside of torch.no_grad().",
            stacklevel=3,
        )
    grads = [torch.zeros_like(v) if grad is None else grad for v, grad in zip(variables, some)]
    value = value.detach()
    if has_aux:
        value = (value, pytree.tree_map_only(Tensor, Tensor.detach, aux))
    return value, pytree.tree_unflatten(grads, spec)


def require_scalar(call: str, name: str, value: Any) -> Tensor:
    """Return the value of a function that is differentiated, unless it is no real number.

    Raises:
        ValueError: it names the call and the function.
    """
    if not isinstance(value, Tensor) or value.dim() != 0:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{call}: expected {name} to return a scalar tensor, found {found}. Reduce it, e.g. with .mean(); a transformers model's "
            "output has a .loss where the batch has labels."
        )
    if value.is_complex():
        raise ValueError(f"{call}: expected {name} to return a real number, found {value.dtype}. Return e.g. its .abs() or .real.")
    return value


def scalar_of(call: str, name: str, f: Callable[[Any], Any], given: Any) -> Tensor:
    """Return the value of `f`, unless it is no real number."""
    return require_scalar(call, name, f(given))


def set_grads(params: AnyTree, grads: AnyTree | None) -> None:
    """Put a tree of gradients onto the `.grad` of the leaves of params, where torch's optimisers and `clip_grad_norm_` look for it.

    Args:
        params: a params tree, or a stack or a member of one; its leaves are those that the optimiser was made with.
        grads: a tree of the same paths, names, shapes, dtypes and devices, as `value_and_grad` returns it. Its tensors take the place of
            former gradients, as they are: one that lies otherwise in memory than its leaf, or twice in the tree, is copied first. None
            leaves no gradient, so that an optimiser passes the leaves by. So does None for a single leaf, as of
            `torch.autograd.grad(..., allow_unused=True)`.

    Raises:
        ValueError: where `grads` differs from `params`; it lists each departure, and no leaf is changed.
        TypeError: where either is no tree of tensors.

    Example:
        >>> import torch, lora_lite as ll
        >>> params = {"0": {"g": torch.tensor([1.0, 2.0])}}
        >>> optimizer = torch.optim.SGD(ll.tree_leaves(params), lr=0.5)
        >>> value, grads = ll.value_and_grad(lambda p: (p["0"]["g"] ** 2).sum())(params)
        >>> ll.set_grads(params, grads)
        >>> optimizer.step()
        >>> params
        {'0': {'g': tensor([0., 0.])}}
    """
    call = "set_grads(params, grads)"
    if grads is None:
        require_tree(call, "params", params)
        for leaf in tree_leaves(params):
            leaf.grad = None
        return
    grads, none = _filled(params, grads)
    require_grads(call, params, grads)
    own, given = flatten(params), flatten(grads)
    pairs = ((where, leaf.dtype, given[where].dtype) for where, leaf in own.items())
    require_fitting(call, [f'"{where}": expected dtype {wanted}, found {found}' for where, wanted, found in pairs if wanted != found])
    taken: set[int] = set()
    for where, leaf in own.items():
        grad = given[where]
        if where in none:
            leaf.grad = None
            continue
        leaf.grad = grad if _lies_as(leaf, grad) and id(grad) not in taken else torch.empty_like(leaf).copy_(grad)
        taken.add(id(grad))


def _filled(params: AnyTree, grads: Any) -> tuple[Any, set[str]]:
    """Return gradients with the leaf itself for each that is None, and the names of these. What is no tree stays as it is."""
    if not all(isinstance(tree, Mapping) and all(map(is_mapping, tree.values())) for tree in (params, grads)):
        return grads, set()
    none = {join(path, name) for path, leaves in grads.items() for name, grad in leaves.items() if grad is None}
    if not none:
        return grads, none
    own = flatten(params)
    filled = {path: {name: own.get(join(path, name)) if g is None else g for name, g in leaves.items()} for path, leaves in grads.items()}
    return filled, none


def _lies_as(leaf: Tensor, grad: Tensor) -> bool:
    """Whether a gradient has the strides of its leaf, as `backward` leaves it: torch's fused optimisers walk both memories alike."""
    return grad.layout is not leaf.layout or grad.stride() == leaf.stride()
