"""VB-LoRA: its two starts, the formula written out, and one bank for all layers, chosen from as the logits are trained."""

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.variants.vblora import SHORT, VBLoRAConfig, mixtures, places

f64 = torch.float64
SMALL = {"r": 3, "num_vectors": 10, "vector_length": 4}


def by_hand(u, bank, k):
    """Mix the bank's vectors for one sub-vector."""
    weights = torch.zeros(len(bank), dtype=bank.dtype)
    best = u.argsort(descending=True)[:k]
    weights[best] = u[best].softmax(0)
    return weights @ bank


@pytest.mark.parametrize("k", [1, 2, 5])
def test_values_are_those_of_the_formula(k):
    W, x = ll.Frozen(torch.randn(12, 8, dtype=f64), torch.randn(12, dtype=f64)), torch.randn(5, 8, dtype=f64)
    bank, u, v = torch.randn(10, 4, dtype=f64), torch.randn(3, 2, 10, dtype=f64), torch.randn(3, 3, 10, dtype=f64)
    A = torch.stack([torch.cat([by_hand(u[p, t], bank, k) for t in range(2)]) for p in range(3)])
    B = torch.stack([torch.cat([by_hand(v[t, p], bank, k) for t in range(3)]) for p in range(3)], dim=1)
    got = ll.functional.vblora({"bank": bank, "logits_A": u, "logits_B": v}, W, x, topk=k)
    assert torch.allclose(got, W(x) + x @ A.T @ B.T, atol=1e-10)


@pytest.mark.parametrize("h", [2, 10, SHORT - 1, SHORT])
def test_two_maxima_are_the_two_best(h):
    logits = torch.randn(50, h, dtype=f64)
    best = logits.argsort(-1, descending=True)[:, :2]
    assert torch.equal(places(logits, 2), best)
    assert torch.equal(torch.func.vmap(lambda rows: places(rows, 2))(logits.view(10, 5, h)), best.view(10, 5, 2))


def test_zero_start_leaves_the_model_and_moves_it_at_the_first_step():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)), torch.randn(5, 8)
    adapt = ll.build(model, VBLoRAConfig(**SMALL))
    params = adapt.init(seed=0)
    assert torch.equal(adapt(params, x), model(x))
    assert {path: list(leaves) for path, leaves in params.items()}["vblora"] == ["bank"]
    assert not params["vblora"]["bank"][5:].any()
    for path in "02":
        factor = {name: torch.cat(mixtures(params[path][f"logits_{name}"].flatten(0, 1), params["vblora"]["bank"], 2, 1)) for name in "AB"}
        assert factor["A"].abs().amin() > 0
        assert not factor["B"].any()
    grads = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(params)[1]
    assert grads["vblora"]["bank"][5:].any()


def test_random_start_is_that_of_the_paper():
    adapt = ll.build(nn.Sequential(nn.Linear(64, 64)), VBLoRAConfig(num_vectors=64, vector_length=32, start="random"))
    params = adapt.init(seed=0)
    bank, u = params["vblora"]["bank"], params["0"]["logits_A"]
    assert bank.abs().max() <= 0.02
    assert bank.std() == pytest.approx(0.02 / 3**0.5, rel=0.1)
    assert u.std() == pytest.approx(0.1, rel=0.1)
    assert adapt.configs[0].identity is None


def test_a_bfloat16_model_chooses_the_vectors_that_the_trained_logits_name():
    cfg = VBLoRAConfig(num_vectors=64, vector_length=4, start="random", init_vector_bank_bound=1.0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    adapt, x = ll.build(model, cfg), torch.randn(9, 64).bfloat16()
    params = adapt.init(seed=0)
    params["0"] = {name: logits + 8 for name, logits in params["0"].items()}  # no other choice, but fewer digits for it
    u = params["0"]["logits_A"]
    assert not torch.equal(u.topk(2).indices, u.bfloat16().topk(2).indices)  # else nothing is tested
    change = adapt(params, x).float() - model(x).float()
    want = x.float() @ (adapt.merge(params)["0.weight"].float() - model[0].weight.float()).T
    assert (change - want).norm() < 2e-2 * want.norm()


def test_widths_that_no_vector_fits_are_named():
    with pytest.raises(ValueError, match=r"VBLoRAConfig\.vector_length: expected a divisor of o = 6, found 4"):
        ll.build(nn.Sequential(nn.Linear(8, 6)), VBLoRAConfig(**SMALL))


def test_bank_is_large_enough_for_both_halves():
    with pytest.raises(ValueError, match=r"VBLoRAConfig\.num_vectors: expected at least 4, found 3"):
        VBLoRAConfig(num_vectors=3)
    assert VBLoRAConfig(num_vectors=3, start="random").num_vectors == 3
