"""BOFT: any number of factors is PEFT's product of dense matrices; the rotation is orthogonal and mixes as widely as the paper says."""

import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer

import lora_lite as ll
from lora_lite.variants.boft import boft, spared


def _dense(Q):
    """Return the rotation in float64 from matrices as wide as the input, with PEFT's permutations."""
    m, n, k, _ = Q.shape
    eye, R = torch.eye(k, dtype=Q.dtype), torch.eye(n * k, dtype=Q.dtype)
    for j in range(m):
        X = (Q[j] - Q[j].mT) / 2
        D = torch.block_diag(*((eye - X) @ torch.linalg.inv(eye + X)))
        order = BOFTLayer.block_butterfly_perm(None, n * k, n >> j, k // 2, m - 1)
        P = BOFTLayer.perm2mat(None, order).to(Q.dtype)
        R = P @ D @ P.t() @ R
    return R


def _case(m, n, k, o=5, scale=1.0):
    g = torch.Generator().manual_seed(0)
    Q, s, weight, bias, x = (
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((m, n, k, k), (o,), (o, n * k), (o,), (2, 3, n * k))
    )
    return {"Q": scale * Q, "s": s}, ll.Frozen(weight, bias), x


@pytest.mark.parametrize(("m", "n", "k"), [(1, 3, 5), (1, 4, 4), (2, 6, 2), (3, 4, 6), (4, 16, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_factors_are_the_product_of_dense_matrices(m, n, k, bias):
    params, W, x = _case(m, n, k)
    W = W if bias else ll.Frozen(W.weight)
    want = (1 + params["s"]) * (x @ _dense(params["Q"]) @ W.weight.t()) + (W.bias if bias else 0)
    torch.testing.assert_close(boft(params, W, x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_rotation_is_orthogonal_and_mixes_twice_as_many_inputs_with_each_factor(m):
    params, _, _ = _case(m, 8, 4)
    params["s"] = torch.zeros(32, dtype=torch.float64)
    R = boft(params, torch.eye(32, dtype=torch.float64), torch.eye(32, dtype=torch.float64))
    torch.testing.assert_close(R @ R.t(), torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-13)
    assert set((R.abs() > 1e-12).sum(1).tolist()) == {4 * 2 ** (m - 1)}


def test_dropout_leaves_a_share_of_one_factor_unturned():
    params, _, x = _case(2, 8, 4, o=32)
    train = ll.Frozen(torch.eye(32, dtype=torch.float64), training=True)
    factors = set()
    for seed in range(8):
        torch.manual_seed(seed)
        ones = spared(params["Q"], 0.6)
        assert sorted(ones.sum((1, 2, 3)).tolist()) == [4, 8]  # PEFT rounds 0.6 of eight blocks down
        factors.add(int(ones.sum((1, 2, 3)).argmin()))
        torch.manual_seed(seed)
        got = boft(params, train, x, block_dropout=0.6)
        torch.testing.assert_close(got, (1 + params["s"]) * (x @ _dense(params["Q"] * ones)), rtol=1e-12, atol=1e-12)
    assert factors == {0, 1}


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"BOFTConfig\.block_num: expected 0 with block_size=4, found 2"):
        ll.BOFTConfig(block_num=2)
    with pytest.raises(ValueError, match=r"BOFTConfig\.block_num: expected at least 1 with block_size=0, found 0\. Set one"):
        ll.BOFTConfig(block_size=0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8))
    with pytest.raises(ValueError, match=r"BOFTConfig\.block_size: expected a divisor of i = 12, found 5"):
        ll.build(model, ll.BOFTConfig(block_size=5)).init()
    with pytest.raises(ValueError, match=r"n_butterfly_factor: expected at most 2 for 6 blocks of 2, found 3\. Use 2"):
        ll.build(model, ll.BOFTConfig(block_size=2, n_butterfly_factor=3)).init()
    ll.build(model, ll.BOFTConfig(block_size=2, n_butterfly_factor=2)).init()
    with pytest.raises(TypeError, match="It is called n_butterfly_factor here"):
        ll.BOFTConfig(boft_n_butterfly_factor=2)
