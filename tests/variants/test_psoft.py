"""PSOFT: the dense form in float64, what stays of the weight, both Cayley maps, the scale that cancels."""

import copy

import peft
import pytest
import torch
from peft_layer import LAYERS

import lora_lite as ll
from cases import derived
from lora_lite.variants.psoft import excess_core


def layer(o=9, i=14):
    g = torch.Generator().manual_seed(0)
    return ll.Frozen(torch.randn(o, i, generator=g, dtype=torch.float64), torch.randn(o, generator=g, dtype=torch.float64))


def moved(cfg, W, scale=0.2):
    params, constants = derived(cfg, W)
    g = torch.Generator().manual_seed(1)
    return {name: scale * torch.randn(p.shape, generator=g, dtype=torch.float64) for name, p in params.items()}, constants


def rotation(Q, r):
    X = torch.zeros(r, r, dtype=Q.dtype)
    X[tuple(torch.triu_indices(r, r, 1))] = Q
    X, eye = X - X.t(), torch.eye(r, dtype=Q.dtype)
    return (eye + X) @ torch.linalg.inv(eye - X)


@pytest.mark.parametrize("ab_svd_init", ["psoft_init", "pissa_init"])
@pytest.mark.parametrize("orth", [True, False])
def test_is_the_papers_product(ab_svd_init, orth):
    W, cfg = layer(), ll.PSOFTConfig(r=5, ab_svd_init=ab_svd_init, orth=orth)
    params, constants = moved(cfg, W)
    R = rotation(params["Q"], 5) if orth else torch.eye(5, dtype=torch.float64) + params["Q"]
    R = (1 + params["b"])[:, None] * R * (1 + params["a"])
    U, S, V = torch.linalg.svd(W.weight, full_matrices=False)
    left, right = (S[:5], torch.ones(5).double()) if ab_svd_init == "psoft_init" else (S[:5].sqrt(), S[:5].sqrt())
    changed = W.weight + (U[:, :5] * left) @ (R - torch.eye(5)) @ (right[:, None] * V[:5])
    x = torch.randn(3, 14, dtype=torch.float64)
    y = cfg.forward(params, W.with_constants(constants), x)
    torch.testing.assert_close(y, x @ changed.t() + W.bias, rtol=0, atol=1e-12)


def test_without_magnitudes_the_rotation_keeps_the_subspace_and_its_singular_values():
    W, cfg = layer(), ll.PSOFTConfig(r=5, mag_a=False, mag_b=False)
    params, constants = moved(cfg, W)
    assert set(params) == {"Q"}
    assert params["Q"].numel() == 10
    core = excess_core(params, 5, "exact", 5, None)
    R = core + torch.eye(5, dtype=core.dtype)
    torch.testing.assert_close(R @ R.t(), torch.eye(5, dtype=R.dtype), rtol=0, atol=1e-14)
    part = constants["B"] @ R @ constants["A"]
    torch.testing.assert_close(torch.linalg.svdvals(part)[:5], torch.linalg.svdvals(W.weight)[:5], rtol=0, atol=1e-12)
    opposite = excess_core({"Q": -params["Q"]}, 5, "exact", 5, None) + torch.eye(5, dtype=core.dtype)
    torch.testing.assert_close(opposite @ R, torch.eye(5, dtype=core.dtype), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("terms", "order"), [(4, 3), (5, 4), (6, 5), (7, 6)])
def test_the_series_approaches_the_exact_map_and_turns_the_same_way(terms, order):
    Q = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def apart(size):
        exact, series = (excess_core({"Q": size * Q}, 5, cayley, terms, None) for cayley in ("exact", "series"))
        return float((exact - series).norm())

    assert apart(1e-2) < 1e-2 * 10**-order * 100
    assert apart(1e-2) / apart(5e-3) == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("size", [1e-3, 10.0])
def test_the_bound_holds_the_norm_of_q_and_leaves_small_ones_alone(size):
    Q = size * torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    norm = float(2**0.5 * Q.norm())
    bounded = {"Q": Q * min(1.0, 0.5 / norm)}
    got = excess_core({"Q": Q}, 5, "series", 5, 0.5)
    torch.testing.assert_close(got, excess_core(bounded, 5, "series", 5, None), rtol=0, atol=1e-14)
    assert torch.func.grad(lambda Q: excess_core({"Q": Q}, 5, "series", 5, 0.5).sum())(torch.zeros_like(Q)).isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_pefts_scale_cancels(name):
    i, o, bias = LAYERS[name]
    model, x = torch.nn.Sequential(torch.nn.Linear(i, o, bias=bias)), torch.randn(3, i)
    outputs = []
    for alpha in (1, 64):
        torch.manual_seed(0)
        theirs = peft.get_peft_model(
            copy.deepcopy(model), peft.PsoftConfig(r=6, psoft_alpha=alpha, init_weights=False, target_modules=["0"])
        )
        outputs.append(theirs(x).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    assert (outputs[0] - model(x)).abs().max() > 1e-2


def test_pefts_file_of_rank_one_has_magnitudes_alone(tmp_path):
    model, x = torch.nn.Sequential(torch.nn.Linear(6, 5)), torch.randn(3, 6)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.PsoftConfig(r=1, target_modules=["0"])).eval()
    torch.nn.init.normal_(theirs.base_model.model[0].psoft_R["default"].vector_b)
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    assert params["0"]["Q"].numel() == 0
    torch.testing.assert_close(adapt(params, x), theirs(x))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"PSOFTConfig.r: expected"):
        derived(ll.PSOFTConfig(r=10), layer())
    with pytest.raises(ValueError, match=r"PSOFTConfig.eps: expected a number in \(0, 1\).*found 1.5"):
        ll.PSOFTConfig(eps=1.5)
