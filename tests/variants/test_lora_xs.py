"""LoRA-XS: against the dense definition on the weight's SVD, its start, its frozen factors."""

import dataclasses

import pytest
import torch

import lora_lite as ll
from cases import COSTLY, derived
from lora_lite.variants.lora_xs import LoRAXSConfig, lora_xs

SHAPES = [(7, 12), (12, 7)]  # (o, i)


def layer(shape, dtype=torch.float64):
    W = torch.randn(*shape, dtype=torch.float64).to(dtype)
    return W, torch.randn(4, 2, shape[1], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("cfg", [LoRAXSConfig(r=8), LoRAXSConfig(r=5, alpha=32.0), LoRAXSConfig(r=8, init="zeros")], ids=repr)
def test_passes_the_kit(cfg):
    ll.testing.check_variant(cfg, skip=COSTLY)


@pytest.mark.parametrize("shape", SHAPES)
def test_update_is_core_between_singular_vectors(shape):
    W, x = layer(shape)
    R = torch.randn(3, 3, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    signs = torch.stack([v[v.abs().argmax()].sign() for v in Vh[:3]])  # the largest entry of a right vector is positive
    delta = (U[:, :3] * signs) @ R @ torch.diag(S[:3]) @ (signs[:, None] * Vh[:3])
    got = lora_xs({"R": R}, W, x, scale=0.7) - x @ W.T
    assert torch.allclose(got, 0.7 * x @ delta.T, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_core_of_ones_is_the_best_approximation(shape):
    """`R = 1` at scale one adds the weight's best rank-r approximation, whatever the signs."""
    W, x = layer(shape)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    got = lora_xs({"R": torch.eye(4, dtype=torch.float64)}, W, x, scale=1.0) - x @ W.T
    assert torch.allclose(got, x @ (U[:, :4] * S[:4] @ Vh[:4]).T, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_start_exactly_with_a_gradient(dtype):
    cfg = LoRAXSConfig(r=4, init="zeros")
    assert (cfg.identity, cfg.start) == (0.0, "zeros")
    W, x = layer((7, 12), dtype)
    params, constants = derived(cfg, ll.Frozen(W))
    frozen = ll.Frozen(W, None, constants)
    assert torch.equal(cfg.forward(params, frozen, x), frozen(x))
    assert torch.func.grad(lambda p: cfg.forward(p, frozen, x).float().square().sum())(params)["R"].abs().max() > 1e-3


def test_default_starts_near_and_at_scale_one():
    cfg = LoRAXSConfig()
    assert (cfg.scale, cfg.start) == (1.0, "normal")
    R = cfg.init(ll.Frozen(torch.randn(32, 24)), torch.Generator().manual_seed(0))["R"]
    assert R.std().item() == pytest.approx(1e-5, rel=0.2)


def test_init_takes_the_basis_it_finds(monkeypatch):
    W = ll.Frozen(torch.randn(6, 9))
    constants = LoRAXSConfig(r=3).constants(W, torch.Generator())
    monkeypatch.setattr(torch.linalg, "svd", None)
    again = ll.Frozen(W.weight, None, constants)
    params = LoRAXSConfig(r=3).init(again, torch.Generator())
    assert lora_xs(params, again, torch.randn(2, 9), scale=1.0).shape == (2, 6)


def test_start_survives_replacing_a_field():
    assert dataclasses.replace(LoRAXSConfig(init="zeros"), r=4).start == "zeros"


def test_errors_name_the_field():
    with pytest.raises(ValueError, match=r'LoRAXSConfig.start: expected one of "normal", "zeros", found \'ones\''):
        LoRAXSConfig(init="ones")
    with pytest.raises(ValueError, match=r"LoRAXSConfig.r: expected at most min\(i, o\) = 6 .* found 7. Lower r"):
        LoRAXSConfig(r=7).constants(ll.Frozen(torch.randn(6, 9)), torch.Generator())
