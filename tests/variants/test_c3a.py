"""C3A: both forms against each other and the dense definition, PEFT's forward, and gradients that PEFT's own backward gets wrong."""

import peft
import pytest
import torch
from peft.tuners.c3a.utils import BlockCircularConvolution
from peft_layer import LAYERS, close, compare, matrix
from torch import nn

import lora_lite as ll
from cases import C3AForward
from lora_lite.testing import check_variant
from lora_lite.variants import c3a as module
from lora_lite.variants.c3a import c3a, circulant, correlate

FORMS = {"transforms": 0, "dense": 10**9}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Choose one of the two forms for layers of any width and for blocks of any size."""
    monkeypatch.setattr(module, "is_wide", lambda W, size: request.param == "transforms")


def _dense(w):
    m, n, k = w.shape
    C = torch.zeros(m * k, n * k, dtype=w.dtype)
    for a in range(m):
        for b in range(n):
            for row in range(k):
                for col in range(k):
                    C[a * k + row, b * k + col] = w[a, b, (col - row) % k]
    return C


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_both_forms_are_the_definition(size):
    w, x = torch.randn(12 // size, 24 // size, size).double(), torch.randn(2, 3, 24).double()
    assert torch.equal(circulant(w), _dense(w))
    assert torch.allclose(correlate(w, x), x @ _dense(w).t(), rtol=0, atol=1e-13)


def test_a_square_block_has_full_rank_with_few_numbers(form):
    w = torch.randn(1, 1, 12, dtype=torch.float64)
    assert torch.linalg.matrix_rank(matrix(c3a, {"w": w}, 12) - torch.eye(12)) == 12


def test_passes_the_kit(form):
    check_variant(ll.C3AConfig(block_size=8), skip=["counts"])


@pytest.mark.parametrize("layer", LAYERS)
def test_is_pefts_forward_and_its_derivative(layer, form, monkeypatch):
    monkeypatch.setattr(peft.tuners.c3a.layer, "BlockCircularConvolution", C3AForward)
    compare(layer, ll.C3AConfig(block_size=8), peft.C3AConfig(block_size=8, target_modules=["0"]), {"w": ("c3a_kernel", 0.0)}, scale=3.0)


def test_pefts_own_gradient_to_the_input_is_not_its_forwards():
    w, x = torch.randn(1, 1, 4), torch.randn(2, 4, requires_grad=True)
    own, right = (torch.autograd.grad(f(x, w).square().sum(), x)[0] for f in (BlockCircularConvolution.apply, C3AForward.apply))
    assert (own - right).abs().max() > 0.1  # when this fails PEFT has mended it, and C3AForward can go
    close(right, 2 * x.detach() @ _dense(w[:, :]).t() @ _dense(w), "the gradient to the input")


def test_pefts_starts_are_options_and_zeros_the_default():
    model = nn.Sequential(nn.Linear(32, 16))
    bounds = {"xavier_uniform": (6 / 48) ** 0.5, "kaiming_uniform": 32**-0.5}
    for start, bound in bounds.items():
        w = ll.build(model, ll.C3AConfig(block_size=2, init=start)).init()["0"]["w"]
        assert 0.9 * bound < w.abs().max() <= bound
    w = ll.build(model, ll.C3AConfig(block_size=2, init="gaussian")).init()["0"]["w"]
    assert 0.8 < w.std() < 1.2
    assert ll.C3AConfig().identity == 0.0
    assert ll.C3AConfig(init="gaussian").identity is None
    assert not ll.build(model, ll.C3AConfig(block_size=2)).init()["0"]["w"].any()


def test_a_wide_layer_takes_transforms_and_agrees_with_the_dense_form(monkeypatch):
    model, cfg, x = nn.Sequential(nn.Linear(512, 384)), ll.C3AConfig(block_size=128), torch.randn(3, 512)
    adapt = ll.build(model, cfg)
    assert adapt.macs_per_token == 4 * 3 * 65
    params = ll.tree_map(torch.randn_like, adapt.init())
    got = adapt(params, x)
    monkeypatch.setattr(module, "is_wide", lambda W, size: False)
    close(got, adapt(params, x), "the output")


def test_a_block_that_divides_no_width_is_refused():
    with pytest.raises(ValueError, match=r"C3AConfig\.block_size: expected a divisor of o = 20, found 6"):
        ll.build(nn.Sequential(nn.Linear(12, 20)), ll.C3AConfig(block_size=6))
