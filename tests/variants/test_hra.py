"""HRA: PEFT's numbers, orthogonality, the compact chain beside the dense product, precision of small updates, zero columns."""

import peft
import pytest
import torch
from peft_layer import LAYERS, compare, matrix

import lora_lite as ll
from cases import COSTLY
from lora_lite.testing import check_variant
from lora_lite.variants.hra import HRAConfig, hra

SIDES = ("in", "out")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("r", [2, 4, 8])
def test_passes_the_kit(r, side):
    check_variant(HRAConfig(r=r, side=side), skip=COSTLY)


def test_declares_an_identity_to_the_bit():
    assert HRAConfig.identity == 0.0  # what the kit then holds it to, in float32 and bfloat16


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("r", [2, 4, 16])
def test_is_pefts(layer, r):
    compare(layer, HRAConfig(r=r), peft.HRAConfig(r=r, target_modules=["0"]), {"U": ("hra_u", 0.0)})


@pytest.mark.parametrize("layer", LAYERS)
def test_is_pefts_far_from_the_start(layer):
    compare(layer, HRAConfig(r=8), peft.HRAConfig(r=8, init_weights=False, target_modules=["0"]), {"U": ("hra_u", 0.0)}, scale=1.0)


def _chain(U):
    R = torch.eye(U.shape[0], dtype=U.dtype)
    for u in U.t():
        R = R - 2 * torch.outer(R @ u, u) / (u @ u)
    return R


@pytest.mark.parametrize("r", [2, 6, 30])
def test_the_compact_form_is_the_product_of_reflections(r):
    U = torch.randn(12, r, dtype=torch.float64)
    R = matrix(hra, {"U": U}, 12)
    assert torch.allclose(R, _chain(U), rtol=0, atol=1e-11)
    assert torch.allclose(R @ R.t(), torch.eye(12, dtype=U.dtype), rtol=0, atol=1e-11)


def test_the_output_side_reflects_the_output_without_the_bias():
    U, weight, bias = torch.randn(10, 4).double(), torch.randn(10, 6).double(), torch.randn(10).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    y = hra({"U": U}, ll.Frozen(weight, bias), x, side="out")
    assert torch.allclose(y, x @ weight.t() @ _chain(U).t() + bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_singular_values_of_the_weight_stay(side):
    weight = torch.randn(12, 12, dtype=torch.float64)
    U = torch.randn(12, 4, dtype=torch.float64)
    merged = hra({"U": U}, weight, torch.eye(12, dtype=U.dtype), side=side).t()
    assert torch.allclose(torch.linalg.svdvals(merged), torch.linalg.svdvals(weight), rtol=0, atol=1e-12)


def test_equal_pairs_are_the_identity_to_the_bit_whatever_their_length():
    u = torch.randn(24, 8) * torch.logspace(-6, 6, 8)
    for dtype in (torch.float32, torch.bfloat16):
        U, x = u.repeat_interleave(2, 1).to(dtype), torch.randn(5, 24).to(dtype)
        assert torch.equal(hra({"U": U}, torch.eye(24).to(dtype), x), x)


@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_the_error_of_a_small_update_is_that_of_adding_it_to_the_input(size):
    U = torch.randn(64, 4).repeat_interleave(2, 1) + size * torch.randn(64, 8)
    x = torch.randn(5, 64)
    got = hra({"U": U}, torch.eye(64), x).double() - x.double()
    want = x.double() @ (_chain(U.double()) - torch.eye(64).double()).t()
    assert (got - want).abs().max() < 4 * torch.finfo(torch.float32).eps * x.abs().max()


def test_a_zero_column_gives_finite_values_and_gradients():
    for zeros in ((0,), (0, 1), (0, 1, 2, 3)):
        U = torch.randn(6, 4)
        U[:, zeros] = 0
        grads, y = torch.func.grad_and_value(lambda U: hra({"U": U}, torch.eye(6), torch.randn(3, 6)).square().sum())(U)
        assert y.isfinite()
        assert grads.isfinite().all()


def test_direction_alone_counts():
    U = torch.randn(12, 4, dtype=torch.float64)
    scaled = U * torch.tensor([3.0, -0.1, 1e3, -1.0])
    assert torch.allclose(matrix(hra, {"U": U}, 12), matrix(hra, {"U": scaled}, 12), rtol=0, atol=1e-11)


def test_opposite_strengths_undo_each_other_to_first_order():
    cfg = HRAConfig(r=4)
    start = torch.randn(12, 2, dtype=torch.float64).repeat_interleave(2, 1)
    step = torch.randn(12, 4, dtype=torch.float64)

    def left(size):
        one = {"U": start + size * step}
        product = matrix(hra, cfg.steer(one, -1.0), 12) @ matrix(hra, one, 12)
        return float((product - torch.eye(12)).abs().max())

    assert left(1e-2) < 1e-2
    assert left(1e-3) < left(1e-2) / 50  # a first-order rest would fall by 10


@pytest.mark.parametrize("r", [1, 7])
def test_odd_r_is_refused_(r):
    match = rf"HRAConfig.r: expected an even integer >= 2, found {r}"
    with pytest.raises(ValueError, match=match):
        HRAConfig(r=r)


def test_unknown_side_is_refused():
    with pytest.raises(ValueError, match=r"HRAConfig.side: expected one of \"in\", \"out\", found 'left'"):
        HRAConfig(side="left")
