"""MiCA: its frozen factor against the SVD, and what it writes where."""

import pytest
import torch

import lora_lite as ll
from lora_lite.variants.mica import MiCAConfig

f64 = torch.float64


@pytest.mark.parametrize(("i", "o"), [(14, 10), (10, 14)])
def test_the_frozen_factor_spans_the_directions_that_the_weight_writes_least(i, o):
    weight = torch.randn(o, i, dtype=f64)
    B = MiCAConfig(r=3).constants(ll.Frozen(weight), torch.Generator())["B"]
    U, S, _ = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(B @ B.T, U[:, -3:] @ U[:, -3:].T, atol=1e-10)
    assert torch.allclose((B.T @ weight).norm(dim=1), S[-3:], atol=1e-10)


def test_values_are_those_of_the_dense_form_without_constants_too():
    W, x, A = (
        ll.Frozen(torch.randn(9, 12, dtype=f64), torch.randn(9, dtype=f64)),
        torch.randn(5, 12, dtype=f64),
        torch.randn(3, 12, dtype=f64),
    )
    B = MiCAConfig(r=3).constants(W, torch.Generator())["B"]
    want = x @ (W.weight + 2.0 * B @ A).T + W.bias
    for layer in (W, W.with_constants({"B": B})):
        assert torch.allclose(ll.functional.mica({"A": A}, layer, x, scale=2.0), want, atol=1e-10)


def test_rank_is_at_most_the_smaller_width():
    with pytest.raises(ValueError, match=r"MiCAConfig\.r: expected at most min\(i, o\) = 6"):
        MiCAConfig(r=7).constants(ll.Frozen(torch.randn(6, 9)), torch.Generator())
