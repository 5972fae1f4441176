"""The product with a tree of 2 x 2 maps, whatever these are.

Level `l` takes the inputs `2 s k` and `2 s k + s` together, `s = 2^l`, the coarsest level first. The finest levels stay inside blocks of
neighbours, and the coarser ones meet the first input of each block alone. So the tree is the product with a small matrix for each block,
after one with a matrix between the blocks. An output has one term for each level that it passed, and so one product of numbers for each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from lora_lite.core.autocast import full_precision
from lora_lite.core.linalg import fixed
from lora_lite.core.recompute import gradients_of
from lora_lite.core.tracing import transformed

WIDEST = 32
"""Largest number of inputs of a block, a power of two; by measurement."""


class Sizes(NamedTuple):
    """Of a tree: the inputs of a block, the blocks, the levels inside of one, all levels."""

    k: int
    n: int
    inner: int
    levels: int


def sizes(i: int) -> Sizes:
    """Return the sizes of the tree over `i` inputs."""
    levels = (i - 1).bit_length()
    inner = min(levels, WIDEST.bit_length() - 1)
    return Sizes(1 << inner, -(-i >> inner), inner, levels)


def _terms(i: int, device: torch.device) -> Tensor:
    """Return the places of the terms of each output, `(3, levels + 1, outputs)`: two factors in the list of maps, and the entry they make.

    Term `l` is the input that joins at level `l`: its factor there, times those by which the outcome is passed on at the finer levels,
    which stand in the rows before. The last term is the input that joins at no level. Outputs are those of the blocks, then between blocks.
    """
    k, n, inner, levels = sizes(i)
    of_block = torch.arange(n * k + n, device=device) < n * k
    row = torch.cat((torch.arange(n * k, device=device), k * torch.arange(n, device=device)))
    level = torch.arange(max(inner, levels - inner), device=device)[:, None] + torch.where(of_block, 0, inner)
    pair, second = row >> (level + 1), row >> level & 1
    joins = 2 * pair + 1 << level
    there = (joins < i) & (level < torch.where(of_block, inner, levels))  # an input without a partner waits
    before = torch.tensor([0, *(i + (1 << m) - 1 >> m + 1 for m in range(levels + inner))], device=device).cumsum(0)[level]
    place = before + pair + 2 * (i - 1) * second
    one, zero, nowhere = 4 * (i - 1), 4 * (i - 1) + 1, n * k * k + n * n
    whole = torch.full_like(row, one)[None]
    passes, factor = torch.where(there, place, one), torch.where(there, place + i - 1, zero)
    first = torch.where(of_block, row * k, nowhere - n * n + row // k * n)[None]
    entry = torch.where(there, first + torch.where(of_block, joins % k, joins // k), nowhere)
    return torch.stack((torch.cat((whole, passes)), torch.cat((factor, whole)), torch.cat((entry, first))))


def _matrices(G: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the matrices in the blocks `(n, k, k)` and between them `(n, n)`, and both factors of their entries."""
    k, n, *_ = sizes(i)
    terms = fixed(_terms, i, G.device)
    passes, factor = torch.cat((G.flatten(), G.new_ones(1), G.new_zeros(1))).index_select(0, terms[:2].flatten()).view(2, *terms.shape[1:])
    entries = passes.cumprod(0) * factor
    flat = G.new_zeros(n * k * k + n * n + 1).index_copy(0, terms[2].flatten(), entries.flatten())
    M, C, _ = flat.split((n * k * k, n * n, 1))
    return M.view(n, k, k), C.view(n, n), passes, factor


def through_tree(x: Tensor, maps: Callable[[], Tensor]) -> Tensor:
    """Apply `x_a' = G_0 x_a + G_1 x_b` and `x_b' = G_2 x_a + G_3 x_b` to the pairs of the tree, the coarsest first.

    Args:
        x: inputs `(*b, i)`.
        maps: returns `G (4, i - 1)`, the pairs level by level from the finest, in at least float32. It runs outside of autocast.
    """
    i = x.shape[-1]
    k, n, *_ = sizes(i)
    with full_precision(x):
        G = maps()
        padded = F.pad(x, (0, n * k - i)) if n * k > i else x  # zeros have no partners
        blocks = padded.reshape(-1, n, k)
        by_hand = not (torch.compiler.is_compiling() or transformed() or forward_ad._current_level >= 0 or x.dtype != G.dtype)
        y = (_Tree.apply(blocks, G, i) if by_hand else _through(blocks, G, i)).reshape(padded.shape)
    return y[..., :i].contiguous() if n * k > i else y  # the layer's product would round another layout otherwise


def _through(x: Tensor, G: Tensor, i: int) -> Tensor:
    M, C, *_ = _matrices(G, i)
    # As deviations from the identity, whose small entries a narrow dtype keeps.
    M, C = ((T - torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)).to(x.dtype) for T in (M, C))
    first, others = x.split((1, x.shape[-1] - 1), -1)
    # Not select_scatter: under vmap its gradient is wrong.
    x = torch.cat((first + (first[..., 0] @ C.t())[..., None], others), -1)
    return x + (x.transpose(0, 1) @ M.mT).transpose(0, 1)


class _Tree(torch.autograd.Function):
    """`_through` in as few passes and calls as there can be, both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, G: Tensor, i: int) -> Tensor:
        M, C, passes, factor = _matrices(G, i)
        first, y = x[..., 0], torch.empty_like(x)
        torch.bmm(x.transpose(0, 1), M.mT, out=y.transpose(0, 1))
        change = torch.addmm(first, first, C.t(), beta=-1)
        ctx.i = i
        ctx.save_for_backward(x, G, change, M, C, passes, factor)
        return y.addcmul_(change[..., None], M[..., 0].contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, G, change, M, C, passes, factor = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed() or is_legacy_batchedtensor(grad):  # the last has no rule for `out`
            return *gradients_of(lambda x, G: _through(x, G, ctx.i), (x, G), grad, ctx.needs_input_grad[:2]), None
        of_blocks, of_x = grad.transpose(0, 1), torch.empty_like(x)
        torch.bmm(of_blocks, M, out=of_x.transpose(0, 1))
        of_first = of_x[..., 0].contiguous()
        of_x[..., 0] = of_first @ C
        if not ctx.needs_input_grad[1]:
            return of_x, None, None
        of_M = torch.bmm(of_blocks.mT, x.transpose(0, 1))
        of_M[..., :1] += of_blocks.mT @ change.t()[..., None]
        terms = fixed(_terms, ctx.i, G.device)
        flat = torch.cat((of_M.flatten(), (of_first.t() @ x[..., 0]).flatten(), of_M.new_zeros(1)))
        of_entries = flat.index_select(0, terms[2].flatten()).view(passes.shape)
        before = passes.cumprod(0)
        of_product = of_entries * factor
        for row in range(len(passes) - 1, 0, -1):
            of_product[row - 1].addcmul_(of_product[row], passes[row])
        of_passes = torch.cat((of_product[:1], of_product[1:] * before[:-1]))  # the first row is fixed
        of_terms = torch.cat((of_passes, of_entries * before)).flatten()
        of_G = of_terms.new_zeros(G.numel() + 2).index_add_(0, terms[:2].flatten(), of_terms)
        return of_x, of_G[:-2].view(G.shape), None
