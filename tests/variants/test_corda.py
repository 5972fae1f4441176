"""CorDA: its start against PEFT's and against the definition with an inverse, its modes, and data that its weight does not span."""

import copy
import dataclasses
import importlib
import sys
import types

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from torch import nn

import lora_lite as ll
from lora_lite.variants.corda import CorDAConfig, ScaledStatistics

f64 = torch.float64
STARTS = {"ipm": slice(4), "kpm": slice(-4, None)}


@pytest.fixture
def preprocess_corda(monkeypatch):
    """Return PEFT's function; its module takes a plain dataclass from attrs, which PEFT does not require to be installed."""
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
        return importlib.import_module("peft.tuners.lora.corda").preprocess_corda


def layer_and_batches(i, o):
    """Return a layer and single sequences `(1, t, i)` with a mean, of different sizes and lengths."""
    mix = torch.eye(i) + 0.3 * torch.randn(i, i) / i**0.5  # PEFT inverts the covariance in float32
    batches = [scale * (torch.randn(1, 60 + 20 * k, i) @ mix + 0.5) for k, scale in enumerate((1.0, 3.0, 0.2))]
    return nn.Sequential(nn.Linear(i, o)), batches


@pytest.mark.parametrize("method", list(STARTS))
@pytest.mark.parametrize(("i", "o"), [(24, 32), (32, 24)])
def test_start_is_pefts(i, o, method, preprocess_corda):
    model, batches = layer_and_batches(i, o)
    theirs = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig(corda_method=method)
    )
    other = copy.deepcopy(model)
    preprocess_corda(other, theirs, run_model=lambda: [other(x) for x in batches])
    lora = peft.get_peft_model(other, theirs).base_model.model.get_submodule("0")
    A, B = lora.lora_A["default"].weight.detach(), lora.lora_B["default"].weight.detach()
    start = ll.build(model, CorDAConfig(r=4, alpha=6.0, method=method), calibration=batches).constants["0"]
    product = B @ A
    assert (start["B0"] @ start["A0"] - product).abs().max() <= 1e-5 * product.abs().max()
    assert (start["A0"].abs() - A.abs()).abs().max() <= 1e-4 * A.abs().max()  # a vector's sign is free; PEFT's SVD is float32
    assert (start["B0"].abs() - B.abs()).abs().max() <= 1e-4 * B.abs().max()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("method", list(STARTS))
def test_start_is_the_definition(method, scaled):
    W = ll.Frozen(torch.randn(10, 14, dtype=f64))
    batches = [k * torch.randn(30, 14, dtype=f64) + 1 for k in (1, 4)]
    cfg = CorDAConfig(r=4, alpha=2.0, method=method, scaled=scaled)
    stats = cfg.statistic()
    for x in batches:
        stats = stats.add(x)
    start = cfg.constants(W, torch.Generator(), stats)
    divided = [x / x.max().abs() if scaled else x / 60**0.5 for x in batches]
    C = sum(x.T @ x for x in divided) / (2 if scaled else 1)
    C = C + 0.01 * C.diagonal().mean() * torch.eye(14, dtype=f64)
    U, S, Vh = torch.linalg.svd(W.weight @ C, full_matrices=False)
    keep = STARTS[method]
    want = U[:, keep] @ torch.diag(S[keep]) @ (Vh @ torch.linalg.inv(C))[keep]
    assert torch.allclose(cfg.scale * start["B0"] @ start["A0"], want, atol=1e-10)
    assert torch.allclose(start["B0"].norm(dim=0), (S[keep] / cfg.scale).sqrt(), rtol=1e-10)


def test_scaled_statistics_divide_by_the_signed_maximum_and_weigh_batches_alike():
    small, large = torch.tensor([[1.0, -8.0], [0.0, 2.0]]), torch.tensor([[-3.0, -1.0]])
    stats = ScaledStatistics().add(small).add(large)
    want = (small.T @ small / 4 + large.T @ large / 1) / 2
    assert torch.allclose(stats.second_moment, want)
    assert ScaledStatistics().add(torch.zeros(2, 2)).second_moment.isfinite().all()


@pytest.mark.parametrize("cut", range(5))
def test_scaled_statistics_of_two_processes_are_those_of_one(cut):
    batches = [k * torch.randn(6, 3, dtype=f64) + 1 for k in (1, 4, 2, 3)]
    parts = [ScaledStatistics(), ScaledStatistics()]
    for k, x in enumerate(batches):
        parts[k >= cut] = parts[k >= cut].add(x)
    merged, whole = parts[0].merge(parts[1]), ScaledStatistics()
    for x in batches:
        whole = whole.add(x)
    assert (merged.batches, merged.count) == (whole.batches, whole.count) == (4, 24)
    assert torch.allclose(merged.second_moment, whole.second_moment, rtol=1e-12)


def test_weight_without_full_rank_gives_nothing_along_what_it_lacks():
    weight = torch.randn(8, 3) @ torch.randn(3, 12)
    cfg = CorDAConfig(r=8)
    start = cfg.constants(ll.Frozen(weight), torch.Generator(), cfg.statistic().add(torch.randn(50, 12)))
    assert torch.allclose(cfg.scale * start["B0"] @ start["A0"], weight, atol=1e-4)
    assert start["A0"].isfinite().all()
    assert start["A0"].abs().max() < 100


def test_function_asks_for_the_start_that_the_weight_does_not_give():
    params = {"dA": torch.zeros(2, 6), "dB": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match=r"corda: expected W .*constants A0 and B0, found none.*config\.constants"):
        ll.functional.corda(params, torch.randn(4, 6), torch.randn(3, 6), scale=1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "both"}, r'CorDAConfig\.method: expected one of "ipm", "kpm", found \'both\''),
        ({"scaled": 1}, r"CorDAConfig\.scaled: expected True or False, found 1"),
        ({"r": 0}, r"CorDAConfig\.r: expected an integer >= 1, found 0"),
        ({"alpha": 0.0}, r"CorDAConfig\.alpha: expected a finite number > 0, found 0\.0"),
    ],
)
def test_refuses_fields(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        CorDAConfig(**fields)


def test_refuses_a_rank_above_the_layer():
    with pytest.raises(ValueError, match=r"CorDAConfig\.r: expected at most min\(i, o\) = 3 .*found 4"):
        ll.build(nn.Sequential(nn.Linear(3, 5)), CorDAConfig(r=4), calibration=[torch.randn(9, 3)])
