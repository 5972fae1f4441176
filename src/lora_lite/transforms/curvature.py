"""Second-order products over a params tree: Hessian, generalised Gauss-Newton, diagonal of the empirical Fisher.

Fused attention has neither a forward-mode nor a double-backward rule, so these products run torch's plain attention for the length of the
call. A variant that detaches a term (DoRA's norm) has no Hessian of its own: the products are those of the function with that term
held fixed.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from lora_lite.adapt import Adapt
from lora_lite.core.errors import require_type, several
from lora_lite.core.tree import AnyTree, Tree, tree_map
from lora_lite.derived.rows import RowMap
from lora_lite.transforms.gradients import scalar_of
from lora_lite.transforms.per_example import LossRows, chunks, per_example_grad, require_rowwise


@contextmanager
def _plain_attention() -> Iterator[None]:
    if torch.compiler.is_compiling():  # the compiler cannot trace the switch: select the backend around the compiled call
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def along(call: str, params: Any, v: Any) -> Any:
    """Return a direction `v` in the order of the leaves of `params`, for forward mode.

    Raises:
        ValueError: where `v` departs from `params`.
    """
    if torch.compiler.is_compiling():
        return v
    (pairs, spec), (given, _) = pytree.tree_flatten_with_path(params), pytree.tree_flatten_with_path(v)
    found = dict(given)
    faults = [f"unexpected {_place(path)}" for path in found if path not in dict(pairs)]
    for path, leaf in pairs:
        if path not in found:
            faults.append(f"missing {_place(path)}")
        elif (wanted := _form(leaf)) != (form := _form(found[path])):
            faults.append(f"{_place(path)}: expected {wanted}, found {form}")
    if faults:
        raise ValueError(
            f"{call.partition('(')[0]}: expected a vector v that fits the params, found:\n{several(faults)}\nMake it of them, e.g. "
            f"ll.tree_map(torch.randn_like, params), and call {call}."
        )
    return pytree.tree_unflatten([found[path] for path, _ in pairs], spec)


def _place(path: Any) -> str:
    return f'"{".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) or "v"}"'


def _form(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return f"{leaf.dtype} of shape {tuple(leaf.shape)} on {leaf.device}"


def hvp(f: Callable[[Any], Tensor]) -> Callable[[Any, Any], Any]:
    """Make `(params, v) -> H v` of a scalar function of params.

    Args:
        f: gives a scalar tensor.

    Returns:
        A function of params and a tree `v` like them, that gives the Hessian's product with `v`, by forward over reverse mode. It raises
        a ValueError where `v` has other paths, names, shapes, dtypes or devices than `params`, and lists each departure.

    Raises:
        TypeError: where `f` is no function.
        ValueError: from the function returned, where `f` gives no real scalar tensor.

    Example:
        >>> import torch, lora_lite as ll
        >>> params, v = {"0": {"w": torch.tensor([1.0, 2.0])}}, {"0": {"w": torch.tensor([1.0, 0.0])}}
        >>> ll.hvp(lambda p: (p["0"]["w"] ** 3).sum())(params, v)["0"]["w"].tolist()
        [6.0, 0.0]
    """

    require_type(callable(f), "hvp(f)(params, v)", "f", "a function of params", f)

    def product(params: Any, v: Any) -> Any:
        v = along("hvp(f)(params, v)", params, v)
        with _plain_attention():
            return torch.func.jvp(torch.func.grad(functools.partial(scalar_of, "hvp", "f", f)), (params,), (v,))[1]

    return product


def ggn_vp(model_fn: Callable[[Any], Any], loss_fn: Callable[[Any], Tensor]) -> Callable[[Any, Any], Any]:
    """Make `(params, v) -> G v`, the generalised Gauss-Newton product of `loss_fn(model_fn(params))`.

    `G = J^T H J` with `J` the model's Jacobian and `H` the Hessian of the loss at its output: positive where the loss is convex.

    Args:
        model_fn: gives a tensor, or a tree of them.
        loss_fn: gives a scalar of what `model_fn` gives.

    Returns:
        A function of params and a tree `v` like them, as `hvp` returns.

    Raises:
        TypeError: where an argument is no function.
        ValueError: from the function returned, where `loss_fn` gives no real scalar tensor.
    """

    call = "ggn_vp(model_fn, loss_fn)(params, v)"
    require_type(callable(model_fn), call, "model_fn", "a function of params", model_fn)
    require_type(callable(loss_fn), call, "loss_fn", "a function of the model's output", loss_fn)

    def product(params: Any, v: Any) -> Any:
        v = along(call, params, v)
        with _plain_attention():
            output, shift = torch.func.jvp(model_fn, (params,), (v,))[:2]
            bent = torch.func.jvp(torch.func.grad(functools.partial(scalar_of, "ggn_vp", "loss_fn", loss_fn)), (output,), (shift,))[1]
            return torch.func.vjp(model_fn, params)[1](bent)[0]

    return product


def fisher_diag(
    adapt: Adapt, loss_rows: LossRows, chunk_size: int | None = None, row_map: Callable[[Any], RowMap] | None = None
) -> Callable[[AnyTree, Any], Tree]:
    """Make `(params, batch) -> mean over rows of the squared gradients`, the diagonal of the empirical Fisher.

    Args:
        adapt: the adapted model.
        loss_rows: `(output, batch) -> (rows,)`, a loss for each row, as for `per_example_grad`.
        chunk_size: how many rows' gradients to hold at once; None for all.
        row_map: as for `per_example_grad`.

    Returns:
        A function of params and batch that gives a tree like `params`, zeros for a batch of no rows.

    Example:
        >>> import torch, lora_lite as ll
        >>> adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2))
        >>> fisher = ll.fisher_diag(adapt, lambda output, batch: output.square().sum(-1), chunk_size=2)
        >>> fisher(adapt.init(seed=0), torch.randn(5, 8))["0"]["B"].shape
        torch.Size([4, 2])
    """
    require_rowwise("fisher_diag", adapt, loss_rows, chunk_size, row_map)
    grads = per_example_grad(adapt, loss_rows, row_map=row_map)

    def mean_of_squares(params: AnyTree, batch: Any) -> Tree:
        total, seen = None, 0
        for part, rows in chunks(batch, chunk_size, "fisher_diag"):
            squares = tree_map(lambda g: g.square().sum(0), grads(params, part))
            total = squares if total is None else tree_map(torch.add, total, squares)
            seen += rows
        return tree_map(lambda t: t / max(seen, 1), total or {})

    return mean_of_squares
