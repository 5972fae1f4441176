"""The product with a few entries of a square matrix: entry by entry it is the dense one, with all of its gradients."""

import pytest
import torch

from lora_lite.variants import _entries
from lora_lite.variants._entries import as_columns, goes_by_entry, times_entries

K, N = 20, 40


def flat(index):
    return index[0].long() * K + index[1]


def drawn(*shape, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    places = torch.randperm(K * K, generator=g)[:N]
    h, values = torch.randn(*shape, K, generator=g, dtype=dtype), torch.randn(N, generator=g, dtype=dtype)
    return h.requires_grad_(), values.requires_grad_(), torch.stack([places // K, places % K]).int()


def product(h, values, index):
    assert goes_by_entry(h, values, index, K)
    return times_entries(h, values, index, flat)


def dense(h, values, index):
    return h @ values.new_zeros(K, K).index_put((index[0].long(), index[1].long()), values).T


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (1, 4), (4, 1)])
def test_is_the_dense_product_with_its_gradients(shape):
    h, values, index = drawn(*shape)
    w, found = torch.randn(*shape, K, dtype=h.dtype), []
    for f in (product, dense):
        y = f(h, values, index)
        first = torch.autograd.grad((y.tanh() * w).sum(), (h, values), create_graph=True)
        found.append((y, first, torch.autograd.grad(sum(g.square().sum() for g in first), (h, values))))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert found[0][0].shape == found[1][0].shape


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_vectors_may_be_rows_or_columns(shape):
    h, values, index = drawn(2, 3)
    V, x = torch.randn(K, 7, dtype=h.dtype), torch.randn(*shape, 7, dtype=h.dtype)
    columns = as_columns(x, V)
    assert columns.reshape(-1, K).t().is_contiguous()
    torch.testing.assert_close(columns, x @ V.T)
    torch.testing.assert_close(product(columns, values, index), dense(x @ V.T, values, index))


def test_only_one_of_both_may_have_a_gradient():
    h, values, index = drawn(5)
    for a, b in ((h.detach(), values), (h, values.detach())):
        grads = [torch.autograd.grad(f(a, b, index).square().sum(), a if a.requires_grad else b) for f in (product, dense)]
        torch.testing.assert_close(*grads)


def test_places_that_change_are_sorted_again():
    h, values, index = drawn(5)
    product(h, values, index)
    index.copy_(index.flip(0))
    torch.testing.assert_close(product(h, values, index), dense(h, values, index))
    kept = len(_entries._ORDERS)
    del index
    assert len(_entries._ORDERS) == kept - 1


def test_many_rows_of_a_jacobian_at_once():
    h, values, index = drawn(5)
    ours, theirs = (torch.autograd.functional.jacobian(lambda v, f=f: f(h, v, index), values, vectorize=True) for f in (product, dense))
    torch.testing.assert_close(ours, theirs)


def test_transforms_and_full_matrices_take_the_dense_way():
    h, values, index = drawn(3)
    seen = [goes_by_entry(h, values, index, 15), *(goes_by_entry(x, values, index, K) for x in (h.float(), h[:0], h.to("meta")))]
    torch.vmap(lambda h: seen.append(goes_by_entry(h, values, index, K)) or h)(h)
    with torch.autograd.forward_ad.dual_level():
        seen.append(goes_by_entry(h, values, index, K))
    with torch.autocast("cpu"):
        seen.append(goes_by_entry(h, values, index, K))
    assert seen == [False] * 7
    tangents = torch.ones_like(h), torch.ones_like(values)
    ours, theirs = (lambda h, v: times_entries(h, v, index, flat)), (lambda h, v: dense(h, v, index))
    torch.testing.assert_close(*(torch.func.jvp(f, (h, values), tangents) for f in (ours, theirs)))
