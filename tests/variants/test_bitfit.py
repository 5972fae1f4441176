"""BitFit: a shift of the output, for layers with and without a bias."""

import pytest
import torch

import lora_lite as ll
from lora_lite.variants.bitfit import BitFitConfig, bitfit


def test_passes_the_kit():
    ll.testing.check_variant(BitFitConfig())


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_adds_to_the_bias(biased):
    W, x, db = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3), (2, 4, 3), (5,)))
    b = torch.randn(5, dtype=torch.float64) if biased else None
    want = torch.einsum("oi,bti->bto", W, x) + db + (b if biased else 0)
    assert torch.allclose(bitfit({"db": db}, ll.Frozen(W, b), x), want, atol=1e-14)


def test_gives_a_plain_weight_a_bias():
    W, db = torch.randn(5, 3), torch.randn(5)
    assert torch.equal(bitfit({"db": db}, W, torch.zeros(2, 3)), db.expand(2, 5))


def test_adapts_a_layer_without_a_bias():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    adapt = ll.build(model, BitFitConfig())
    params, x = adapt.init(), torch.randn(3, 4)
    assert adapt.num_params == 10
    assert torch.equal(adapt(params, x), model(x))
    shift = torch.randn(4)
    assert torch.allclose(adapt({**params, "2": {"db": shift}}, x) - model(x), shift.expand(3, 4), atol=1e-6)
