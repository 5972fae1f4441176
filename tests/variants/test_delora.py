"""DeLoRA: PEFT's numbers, the bound on the update, and the paper's start with its frozen copy."""

import dataclasses

import peft
import pytest
import torch
from peft_layer import LAYERS, close, compare, matrix
from torch import nn

import lora_lite as ll
from cases import COSTLY, derived
from lora_lite.testing import check_variant
from lora_lite.variants.delora import DeLoRAConfig, delora

STARTS, NORMS = ("zeros", "copy"), ("channel", "scalar", "none")

LEAVES = {"A": ("delora_A", 0.0), "B": ("delora_B", 0.0)}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("w_norm", NORMS)
def test_passes_the_kit(start, w_norm):
    check_variant(DeLoRAConfig(r=4, init=start, w_norm=w_norm), skip=COSTLY)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("r", "lambda0"), [(1, 15.0), (4, 15.0), (4, 0.5), (40, 3.0)])
def test_is_pefts(layer, r, lambda0):
    theirs = peft.DeloraConfig(r=r, delora_lambda=lambda0, target_modules=["0"])
    compare(layer, DeLoRAConfig(r=r, lambda0=lambda0), theirs, {**LEAVES, "l": ("delora_lambda", lambda0)})


@pytest.mark.parametrize("layer", ["wide-bias", "tall-plain"])
def test_dropout_in_training_mode_is_pefts(layer):
    theirs = peft.DeloraConfig(r=4, module_dropout=0.4, target_modules=["0"])
    cfg = DeLoRAConfig(r=4, dropout=0.4)
    compare(layer, cfg, theirs, {**LEAVES, "l": ("delora_lambda", 15.0)}, train=True)


def test_the_first_step_at_pefts_start_is_pefts():
    # B is zero, so its norm is held at PEFT's floor: the gradient there tells the floor.
    model, x = nn.Sequential(nn.Linear(24, 32)), torch.randn(5, 24)
    theirs = peft.get_peft_model(model, peft.DeloraConfig(r=4, target_modules=["0"]))
    layer = theirs.base_model.model.get_submodule("0")
    theirs(x).sum().backward()
    base = layer.base_layer
    params = {"A": layer.delora_A["default"].detach(), "B": torch.zeros(32, 4), "l": torch.zeros(1)}
    grads = torch.func.grad(lambda p: delora(p, ll.Frozen(base.weight.detach()), x, lambda0=15.0).sum())(params)
    close(grads["B"], layer.delora_B["default"].grad, "the gradient of B")
    assert grads["B"].abs().max() > 1e3
    assert not grads["A"].any()
    assert not grads["l"].any()


def _draw(r=4, i=10, o=14):
    return {"A": torch.randn(r, i).double(), "B": torch.randn(o, r).double(), "l": torch.randn(1).double()}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_update_is_bounded_by_lambda_whatever_the_size_of_the_factors(scale):
    params, weight = _draw(), torch.randn(14, 10, dtype=torch.float64)
    bound = 2.0 + params["l"]

    def update(w_norm, **changed):
        return matrix(lambda p, _, x, **s: delora(p, weight, x, **s), {**params, **changed}, 10, lambda0=2.0, w_norm=w_norm) - weight

    plain = update("none", A=scale * params["A"])
    assert plain.norm() <= bound
    assert torch.allclose(plain, update("none"), rtol=0, atol=1e-12)  # only directions count
    one = {"A": params["A"][:1], "B": params["B"][:, :1]}
    assert torch.allclose(update("none", **one).norm(), bound)  # attained at r = 1
    assert torch.allclose(update("scalar"), update("none") * weight.norm(), rtol=0, atol=1e-12)
    assert torch.allclose(update("channel"), update("none") * weight.norm(dim=0), rtol=0, atol=1e-12)


def test_with_a_copy_the_start_is_taken_off():
    cfg, params = DeLoRAConfig(r=4, lambda0=2.0, init="copy"), _draw()
    weight, x = torch.randn(14, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    constants = cfg.constants(ll.Frozen(weight), torch.Generator().manual_seed(0))
    A0, B0, W = constants["A0"].double(), constants["B0"].double(), ll.Frozen(weight, None, {"w": constants["w"]})
    moved = delora({"A": A0 + params["A"], "B": B0 + params["B"], "l": params["l"]}, W, x, lambda0=2.0)
    start = delora({"A": A0, "B": B0, "l": params["l"]}, W, x, lambda0=2.0)
    ours = cfg.forward(params, ll.Frozen(weight, None, constants), x)
    assert torch.allclose(ours - x @ weight.t(), moved - start, rtol=0, atol=1e-12)


def test_with_a_copy_small_increments_keep_their_digits():
    cfg = DeLoRAConfig(r=4, init="copy")
    zero = torch.zeros(14, 10)
    W = ll.Frozen(torch.randn(14, 10))
    constants = cfg.constants(W, torch.Generator().manual_seed(0))
    params, x = {k: 1e-6 * p for k, p in _draw().items()}, torch.randn(3, 10, dtype=torch.float64)
    exact = cfg.forward(params, ll.Frozen(zero.double(), None, constants), x)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        y = cfg.forward({k: p.to(dtype) for k, p in params.items()}, ll.Frozen(zero.to(dtype), None, constants), x.to(dtype))
        assert (y - exact).abs().max() < tolerance * exact.abs().max()


def test_the_copy_does_not_depend_on_the_seed_and_differs_by_target():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    first, second = (ll.build(model, DeLoRAConfig(r=4, init="copy")) for _ in range(2))
    for adapt in (first, second):
        params = [adapt.init(seed) for seed in (0, 1)]
        assert all(not leaf.any() for tree in params for leaves in tree.values() for leaf in leaves.values())
    assert all(torch.equal(first.constants[p][n], second.constants[p][n]) for p in "01" for n in ("A0", "B0", "w"))
    assert not torch.equal(first.constants["0"]["A0"], first.constants["1"]["A0"])


@pytest.mark.parametrize("start", STARTS)
def test_zero_params_and_zero_weights_give_finite_derivatives(start):
    cfg = DeLoRAConfig(r=4, init=start)
    W = ll.Frozen(torch.zeros(14, 10))
    params, constants = derived(cfg, W)
    W, x = ll.Frozen(torch.zeros(14, 10), None, constants), torch.randn(3, 10)

    def loss(p):
        return (cfg.forward(p, W, x) - 1).square().sum()

    along = {k: torch.ones_like(p) for k, p in params.items()}
    grads, slopes = torch.func.jvp(torch.func.grad(loss), ({k: 0 * p for k, p in params.items()},), (along,))
    assert all(t.isfinite().all() for tree in (grads, slopes) for t in tree.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_is_the_base_layer_to_the_bit(dtype):
    cfg = DeLoRAConfig(r=4, lambda0=0.1, w_norm="none")  # 0.1 is not a number of bfloat16
    params = {k: p.to(dtype) for k, p in _draw().items()}
    W, x = ll.Frozen(torch.zeros(14, 10, dtype=dtype)), torch.randn(3, 10).to(dtype)  # a weight would hide the rest in its rounding
    assert not cfg.forward(cfg.steer(params, 0.0), W, x).any()
    assert cfg.forward(cfg.steer(params, 1.0), W, x).any()


def test_the_keyword_init_is_the_field_start():
    cfg = DeLoRAConfig(init="copy")
    assert cfg.start == "copy"
    assert DeLoRAConfig().start == "zeros"
    assert cfg == DeLoRAConfig(start="copy") == dataclasses.replace(DeLoRAConfig(r=4, init="copy"), r=8)
    with pytest.raises(ValueError, match=r"DeLoRAConfig.start: expected one of \"zeros\", \"copy\", found 'one'"):
        DeLoRAConfig(init="one")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"lambda0": 0.0}, r"DeLoRAConfig.lambda0: expected a finite number > 0, found 0.0"),
        ({"w_norm": "row"}, r"DeLoRAConfig.w_norm: expected one of \"channel\", \"scalar\", \"none\", found 'row'"),
        ({"r": 0}, r"DeLoRAConfig.r: expected an integer >= 1, found 0"),
    ],
)
def test_refuses_what_cannot_be(fields, match):
    with pytest.raises(ValueError, match=match):
        DeLoRAConfig(**fields)
