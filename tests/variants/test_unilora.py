"""Uni-LoRA: the map from one vector to all factors keeps lengths, as the paper proves, and is PEFT's."""

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll


def factors(adapt, theta):
    """Return each layer's `A` and `B`, by the definition."""
    of = {p: [(c[f"index_{f}"], c[f"scale_{f}"]) for f in "AB"] for p, c in adapt.constants.items()}
    return {path: [theta[index.long()] * scale for index, scale in pair] for path, pair in of.items()}


@pytest.mark.parametrize("start", ["zero", "random"])
def test_lengths_are_kept_and_all_entries_are_used_alike(start):
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
    adapt = ll.build(model, ll.UniLoRAConfig(r=3, theta_d_length=17, start=start))
    theta = torch.randn(17)
    whole = torch.cat([t.flatten() for pair in factors(adapt, theta).values() for t in pair])
    torch.testing.assert_close(whole.square().sum(), theta.square().sum())
    first, second = (torch.cat([c[f"index_{f}"].flatten() for c in adapt.constants.values()]) for f in "AB")
    assert adapt.num_params == 17
    if start == "zero":
        assert first.max() < 8 <= second.min()
    for indices in (first, second) if start == "zero" else (torch.cat([first, second]),):
        uses = indices.unique(return_counts=True)[1]
        assert uses.max() - uses.min() <= 1


def test_indices_are_those_of_peft():
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8)), peft.UniLoraConfig(r=3, theta_d_length=500, target_modules=["0", "1"])
    )
    adapt = ll.build(nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8)), ll.UniLoRAConfig(r=3, theta_d_length=500, start="random"))
    for path, constants in adapt.constants.items():
        layer = theirs.base_model.model.get_submodule(path)
        for f in "AB":
            assert torch.equal(constants[f"index_{f}"].long(), getattr(layer, f"unilora_indices_{f}")["default"])
            assert torch.equal(constants[f"scale_{f}"], getattr(layer, f"unilora_scales_{f}")["default"])


def test_dense_formula_in_float64_and_a_strength_that_is_linear():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 5)).double(), torch.randn(6, 7).double()
    adapt = ll.build(model, ll.UniLoRAConfig(r=3, theta_d_length=30, dtype=torch.float64))
    params = {**adapt.init(), "unilora": {"theta_d": torch.randn(30).double()}}
    for c in (1.0, -0.5):
        y = x
        for layer, (A, B) in zip(model, factors(adapt, params["unilora"]["theta_d"]).values()):
            y = y @ (layer.weight + c * B @ A).T + layer.bias
        torch.testing.assert_close(adapt(adapt.steer(params, c), x), y.detach())


def test_second_half_learns_first():
    model, x = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 5)), torch.randn(6, 7)
    adapt = ll.build(model, ll.UniLoRAConfig(theta_d_length=30))
    _, grads = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(adapt.init())
    first, second = grads["unilora"]["theta_d"].split(15)
    assert not first.any()
    assert second.abs().min() > 0
