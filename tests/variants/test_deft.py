"""DEFT: the papers' weight in the dense, a subspace that is gone, a factor without jumps, PEFT's narrow layers."""

import copy

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import derived, move
from lora_lite.variants.deft import deft, orthonormal

EYE = torch.eye(12, dtype=torch.float64)


def _layer(cfg):
    generator = torch.Generator().manual_seed(2)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((20, 12), (20,)))
    W = ll.Frozen(weight, bias)
    start, constants = derived(cfg, W)
    constants = {name: t.double() for name, t in constants.items()}
    return W.with_constants(constants), move({"": {name: t.double() for name, t in start.items()}})[""]


@pytest.mark.parametrize("method", ["relu", "qr"])
def test_is_the_papers_weight_that_writes_back_what_it_takes_out(method):
    W, params = _layer(ll.DEFTConfig(r=3, decomposition_method=method))
    P0, P = W.constants["P0"], W.constants["P0"] + params["dP"]
    (_, U0), (Q, U) = ((M, M.clamp(min=0)) if method == "relu" else (orthonormal(M),) * 2 for M in (P0, P))
    R = U0.t() @ W.weight / 0.7 + params["dR"]
    want = W.weight - Q @ U.t() @ W.weight + 0.7 * Q @ R
    got = deft(params, W, EYE, method=method, scale=0.7) - W.bias
    torch.testing.assert_close(got.t(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("i", "o", "r"), [(70, 33, 2), (7, 5, 3), (24, 129, 5), (5, 33, 7)])
def test_start_is_the_base_model_to_the_bit_whatever_the_sizes(i, o, r, dtype):
    model, x = nn.Sequential(nn.Linear(i, o)).to(dtype), torch.randn(4, i, dtype=dtype)
    adapt = ll.build(model, ll.DEFTConfig(r=r, decomposition_method="qr"))
    for seed in range(5):
        assert torch.equal(adapt(adapt.init(seed=seed), x), model(x))


def test_para_with_an_orthonormal_factor_removes_a_subspace():
    W, params = _layer(ll.DEFTConfig(r=3, decomposition_method="qr", para=True))
    left = (deft(params, W, EYE, method="qr") - W.bias).t()
    assert torch.linalg.matrix_rank(W.weight) == 12
    assert torch.linalg.matrix_rank(left) == 12 - max(0, 12 - (20 - 3)), "17 directions of the output hold all 12 of the input"
    Q = orthonormal(W.constants["P0"] + params["dP"])
    assert (Q.t() @ left).abs().max() < 1e-12
    torch.testing.assert_close(Q.t() @ Q, torch.eye(3, dtype=torch.float64))


def test_the_factor_has_no_jump_where_lapacks_has_one():
    P = torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    either = [P.clone(), P.clone()]
    either[0][0, 0], either[1][0, 0] = 1e-9, -1e-9
    ours, lapack = ([f(M) for M in either] for f in (orthonormal, lambda M: torch.linalg.qr(M).Q))
    assert (ours[0] - ours[1]).abs().max() < 1e-8
    assert (lapack[0] - lapack[1]).abs().max() > 0.1


def test_a_layer_that_is_narrower_than_pefts_rank_is_read(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 2)), torch.randn(4, 6)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.DeftConfig(r=8, target_modules=["0"], init_weights=False))
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    assert adapt.configs[0].r == 2
    torch.testing.assert_close(adapt(params, x), theirs(x))


def test_refusals_name_the_way_out():
    with pytest.raises(ValueError, match=r"DEFTConfig\.r: expected at most o = 2, found 8\. Lower r or leave the layer out"):
        ll.build(nn.Sequential(nn.Linear(6, 2)), ll.DEFTConfig())
    with pytest.raises(ValueError, match=r"DEFTConfig\.dropout: expected 0 with para=True"):
        ll.DEFTConfig(para=True, dropout=0.1)
    adapt = ll.build(nn.Sequential(nn.Linear(6, 8)), ll.DEFTConfig(para=True))
    with pytest.raises(ValueError, match=r"DEFTConfig\.para: expected False for a strength.*Merge it"):
        adapt.steer(adapt.init(), 0.5)
