"""ASVD: its start against the definition with an inverse, and where it is PiSSA."""

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.variants.asvd import ASVDConfig

f64 = torch.float64


def start(cfg, W, x):
    return cfg.constants(W, torch.Generator(), cfg.statistic().add(x))


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize(("i", "o"), [(14, 10), (10, 14)])
def test_start_is_the_definition(i, o, power):
    W, x = ll.Frozen(torch.randn(o, i, dtype=f64)), torch.randn(50, i, dtype=f64) * torch.arange(1, i + 1) - 2
    cfg = ASVDConfig(r=4, alpha=2.0, power=power)
    got = start(cfg, W, x)
    d = x.abs().mean(0) ** power
    U, S, Vh = torch.linalg.svd(W.weight * d, full_matrices=False)
    want = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4] / d
    assert torch.allclose(cfg.scale * got["B0"] @ got["A0"], want, atol=1e-10)
    assert torch.allclose(got["B0"].norm(dim=0), (S[:4] / d.mean() / cfg.scale).sqrt(), rtol=1e-10)


def test_approximates_the_outputs_of_its_data_better_than_pissa():
    W, x = ll.Frozen(torch.randn(20, 30, dtype=f64)), torch.randn(200, 30, dtype=f64) * torch.logspace(-2, 1, 30, dtype=f64)
    ours, pissas = start(ASVDConfig(r=6, power=1.0), W, x), ll.PiSSAConfig(r=6).constants(W, torch.Generator())
    errors = [(x @ (W.weight - 16 / 6 * s["B0"] @ s["A0"]).T).norm() for s in (ours, pissas)]
    assert errors[0] < 0.5 * errors[1]


def test_is_pissa_at_power_zero():
    W = ll.Frozen(torch.randn(9, 12, dtype=f64))
    got, want = start(ASVDConfig(r=3, power=0.0), W, torch.randn(5, 12)), ll.PiSSAConfig(r=3).constants(W, torch.Generator())
    assert all(torch.allclose(got[name], want[name], atol=1e-12) for name in want)


def test_unit_of_the_inputs_and_dead_features_do_no_harm():
    W, x = ll.Frozen(torch.randn(9, 12, dtype=f64)), torch.randn(40, 12, dtype=f64)
    x[:, 3] = 0
    one, other = start(ASVDConfig(r=3), W, x), start(ASVDConfig(r=3), W, 1e4 * x)
    assert all(torch.allclose(one[name], other[name], atol=1e-10) for name in one)
    assert one["A0"].isfinite().all()


def test_gathers_no_matrix():
    seen = []
    cfg = ASVDConfig(r=2)

    class Spy(ASVDConfig):
        def constants(self, W, generator, stats=None):
            seen.append(stats)
            return cfg.constants(W, generator, stats)

    ll.build(nn.Sequential(nn.Linear(6, 4)), Spy(r=2), calibration=[torch.randn(9, 6)])
    assert [tuple(v.shape) for v in vars(seen[0]).values() if isinstance(v, torch.Tensor)] == [(6,), (6,)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"power": -0.5}, r"ASVDConfig\.power: expected a finite number >= 0, found -0\.5"),
        ({"r": 0}, r"ASVDConfig\.r: expected an integer >= 1, found 0"),
        ({"alpha": 0.0}, r"ASVDConfig\.alpha: expected a finite number > 0, found 0\.0"),
    ],
)
def test_refuses_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ASVDConfig(**fields)


def test_function_asks_for_the_start_that_the_weight_does_not_give():
    params = {"dA": torch.zeros(2, 6), "dB": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match=r"asvd: expected W .*constants A0 and B0, found none.*config\.constants"):
        ll.functional.asvd(params, torch.randn(4, 6), torch.randn(3, 6), scale=1.0)
