"""RandLoRA: PEFT's bases from a seed, the dense formula, and the rank that it is made for."""

import copy

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.variants.randlora import RandLoRAConfig, bases

f64 = torch.float64


@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"very_sparse": True}], ids=str)
def test_bases_are_those_of_peft_and_stand_once(options):
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16))
    config = peft.RandLoraConfig(r=7, target_modules=["0", "2"], projection_prng_key=3, **options)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).base_model
    adapt = ll.build(model, RandLoRAConfig(r=7, seed=3, **options))
    assert torch.equal(adapt.constants["randlora"]["A"], theirs.randlora_A["default"])
    assert torch.equal(adapt.constants["randlora"]["B"], theirs.randlora_B["default"])
    assert adapt.constants["0"] == adapt.constants["2"] == {}


@pytest.mark.parametrize(("i", "o"), [(12, 17), (17, 12), (12, 12)])
def test_values_are_those_of_the_dense_sum_which_has_full_rank(i, o):
    W, x, r = ll.Frozen(torch.zeros(o, i, dtype=f64)), torch.eye(i, dtype=f64), 5
    k, m, n = min(i, o), max(i, o), 3
    L, G = torch.randn(r, n, dtype=f64), torch.randn(n, k, dtype=f64)
    shared = {name: t.double() for name, t in bases([W], r, 0).items()}
    dense = torch.zeros(m, k, dtype=f64)
    for p in range(r):
        for q in range(n):
            column = p * n + q  # of B, whose columns run over ranks fastest
            dense += torch.outer(shared["B"][:, column // r, column % r], L[p, q] * shared["A"][p, 0] * G[q])
    got = ll.functional.randlora({"Lambda": L, "Gamma": G}, W.with_constants(shared), x, scale=2.0)
    assert torch.allclose(got, 2.0 * (dense.T if k == i else dense), atol=1e-10)
    assert torch.linalg.matrix_rank(dense) == k


@pytest.mark.parametrize(("options", "share"), [({"sparse": True}, 1 / 3), ({"very_sparse": True}, 1 / 8)], ids=str)
def test_sparse_bases_have_the_share_of_the_paper(options, share):
    B = RandLoRAConfig(r=8, **options).share([ll.Frozen(torch.zeros(64, 80))])["B"]
    assert len(B.unique()) == 3
    assert (B != 0).float().mean() == pytest.approx(share, rel=0.05)
    assert B.std() == pytest.approx(1.0, rel=1e-4)


def test_bases_of_one_entry_are_refused_and_the_way_out_works():
    model = torch.nn.Sequential(torch.nn.Linear(8, 1))
    with pytest.raises(ValueError, match=r"RandLoRAConfig\.r: expected bases whose entries differ.*r=1 .* 1 outputs"):
        ll.build(model, ll.RandLoRAConfig(r=1))
    adapt = ll.build(model, ll.RandLoRAConfig(r=2))
    params = ll.tree_map(lambda p: p + 0.1, adapt.init())
    assert adapt(params, torch.randn(3, 8)).isfinite().all()
