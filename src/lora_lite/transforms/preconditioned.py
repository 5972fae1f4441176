"""Gradients of LoRA's factors, preconditioned by the other factor: Riemannian preconditioning and LoRA-FA.

Both are functions of a tree of gradients, between the gradient and any optimizer. They take single trees, and stacks of them.
"""

import torch
from torch import Tensor

from lora_lite.core.errors import require_grads
from lora_lite.core.fields import Within, require_number
from lora_lite.core.tree import AnyTree, Apart, apart, together

Tree = dict[str, dict[str, Tensor]]


def riemannian(params: AnyTree, grads: AnyTree, reg: float = 1e-2) -> Tree:
    r"""Return gradients of which those of each pair of factors are scaled by the metric of the other one.

    $$g_A \leftarrow (B^T B + \epsilon I)^{-1} g_A, \qquad g_B \leftarrow g_B (A A^T + \epsilon I)^{-1}$$

    A step along them changes the update `B A` by as much, however its size is shared between the factors. As in PEFT's
    `create_riemannian_optimizer`, but that an embedding's factors are taken too.

    Args:
        params: a params tree; targets with the leaves `A (*k, r, i)` and `B (*k, o, r)` take part.
        grads: the tree of its gradients.
        reg: damping `epsilon` of the inverses, > 0. `B` starts at zero, so that a small one makes the first steps of `A` large.

    Returns:
        A new tree of gradients. Leaves other than `A` and `B` are those of `grads`.

    Raises:
        ValueError: where no target has both factors, `grads` does not fit, or `reg` is out of range.
        TypeError: where either is no tree of tensors.

    Example:
        >>> import torch, lora_lite as ll
        >>> adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2))
        >>> params = adapt.init(seed=0)
        >>> _, grads = ll.value_and_grad(lambda p: adapt(p, torch.ones(3, 8)).sum())(params)
        >>> scaled = ll.riemannian(params, grads)
        >>> params = ll.tree_map(lambda p, g: p - 1e-3 * g, params, scaled)

    Source:
        Zhang, Pilanci, *Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models*, 2024, arXiv:2402.02347, eq. (4).
    """
    call = "riemannian(params, grads)"
    require_number(call, "reg", reg, Within(0, above=True), "Use e.g. reg=1e-2.")
    out, maps = _copied(call, params, grads), apart(params)
    for path in _pairs(maps):
        A, B = maps[path]["A"], maps[path]["B"]
        where = f'riemannian: at "{".".join(filter(None, path))}"'
        out[path]["A"] = _damped_solve(B.mT @ B, out[path]["A"], reg, where)
        out[path]["B"] = _damped_solve(A @ A.mT, out[path]["B"].mT, reg, where).mT
    return together(out)


def lora_fa(params: AnyTree, grads: AnyTree, scale: float, reg: float = 1e-8) -> Tree:
    r"""Return the gradients of `B` by which training `B` alone is nearest to training the whole weight.

    $$g_B \leftarrow \tfrac{1}{s^2}\, g_B (A A^T + \epsilon I)^{-1}, \qquad g_A \leftarrow 0$$

    `A` stays at its start: give the optimizer the leaves `B` alone, or a weight decay would still move `A`. PEFT's
    `create_lorafa_optimizer` takes the product in bfloat16; this one is in the dtype of the params.

    Args:
        params: a params tree; targets with the leaves `A (*k, r, i)` and `B (*k, o, r)` take part.
        grads: the tree of its gradients.
        scale: the scale `s` of the update, > 0: `alpha / r`, or `alpha / sqrt(r)` with `rslora`.
        reg: damping of the inverse, >= 0.

    Returns:
        A new tree of gradients, with zeros for `A`. Leaves other than `A` and `B` are those of `grads`.

    Raises:
        ValueError: where no target has both factors, `grads` does not fit, or a number is out of range.
        TypeError: where either is no tree of tensors.

    Example:
        >>> import torch, lora_lite as ll
        >>> adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2, alpha=4))
        >>> params = adapt.init(seed=0)
        >>> _, grads = ll.value_and_grad(lambda p: adapt(p, torch.ones(3, 8)).sum())(params)
        >>> grads = ll.lora_fa(params, grads, scale=4 / 2)
        >>> float(grads["0"]["A"].abs().max())
        0.0

    Source:
        Zhang, Zhang, Shi, Chu, Li, *LoRA-FA: Memory-Efficient Low-Rank Adaptation for Large Language Models Fine-Tuning*, 2023,
        arXiv:2308.03303. The projection is that of Wang, Liang, He, Wang, Tan, *LoRA-Pro*, 2024, arXiv:2407.18242.
    """
    call = "lora_fa(params, grads, scale=alpha / r)"
    require_number(call, "scale", scale, Within(0, above=True), "Use scale=alpha / r.")
    require_number(call, "reg", reg, Within(0), "Use e.g. reg=1e-8.")
    out, maps = _copied(call, params, grads), apart(params)
    for path in _pairs(maps):
        A = maps[path]["A"]
        out[path]["A"] = torch.zeros_like(A)
        where = f'lora_fa: at "{".".join(filter(None, path))}"'
        out[path]["B"] = _damped_solve(A @ A.mT, out[path]["B"].mT, reg, where).mT / scale**2
    return together(out)


def _copied(call: str, params: AnyTree, grads: AnyTree) -> Apart:
    """Return the gradients as new dicts by linear maps; the leaves are not copied."""
    require_grads(call, params, grads)
    if not _pairs(apart(params)):
        found = sorted({leaf for leaves in params.values() for leaf in leaves})
        name = call.partition("(")[0]
        raise ValueError(f'{name}: expected targets with the leaves "A" and "B", found {found}. Use it with LoRAConfig and its like.')
    return apart(grads)


def _pairs(maps: Apart) -> list[tuple[str, str]]:
    return [place for place, leaves in maps.items() if {"A", "B"} <= set(leaves)]


def _damped_solve(gram: Tensor, rhs: Tensor, reg: float, where: str) -> Tensor:
    """Compute `(gram + reg I)^-1 rhs` in at least float32, in the dtype of `rhs`.

    Raises:
        ValueError: where that has no inverse; it begins with `where`.
    """
    exact = torch.promote_types(gram.dtype, torch.float32)
    eye = torch.eye(gram.shape[-1], dtype=exact, device=gram.device)
    try:
        return torch.linalg.solve(gram.to(exact) + reg * eye, rhs.to(exact)).to(rhs.dtype)
    except torch.linalg.LinAlgError as e:
        raise ValueError(
            f"{where} expected a factor of full rank for reg={reg}, found one whose rows or columns depend on one another ({e}). Raise "
            "reg, e.g. to 1e-4."
        ) from e
