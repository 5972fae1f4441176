"""TinyLoRA: the groups of layers that share a vector, the dense formula, and the paper's count of parameters."""

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll


@pytest.mark.parametrize(("layers", "tying"), [(1, 0.0), (8, 0.0), (8, 0.4), (8, 0.5), (7, 0.6), (5, 0.9), (4, 1.0)])
def test_groups_are_those_of_peft(layers, tying):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    adapt = ll.build(model, ll.TinyLoRAConfig(u=3, weight_tying=tying))
    config = peft.TinyLoraConfig(u=3, weight_tying=tying, target_modules=[str(n) for n in range(layers)])
    theirs = peft.get_peft_model(nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))), config).base_model
    for path, constants in adapt.constants.items():
        layer = theirs.model.get_submodule(path)
        assert int(constants["group"]) == int(layer._tinylora_v_key["default"])
        assert torch.equal(constants["P"], layer.tinylora_P["default"])
    assert adapt.num_params == 3 * len(theirs.tinylora_v["default"])


def test_thirteen_parameters_are_all_of_the_model():
    model, x = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))), torch.randn(3, 6)
    adapt = ll.build(model, ll.TinyLoRAConfig(u=13, weight_tying=1.0))
    params = adapt.init()
    assert adapt.num_params == 13
    _, grads = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(params)
    assert grads["tinylora"]["v"].shape == (1, 13)
    assert grads["tinylora"]["v"].abs().min() > 0


def test_dense_formula_in_float64():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 5)).double()
    adapt = ll.build(layers, ll.TinyLoRAConfig(r=3, u=4, dtype=torch.float64))
    v, x = torch.randn(2, 4).double(), torch.randn(6, 7).double()
    y = x
    for n, layer in enumerate(layers):
        U, S, Vh = torch.linalg.svd(layer.weight.detach())
        signs = Vh[:3].gather(1, Vh[:3].abs().argmax(1, keepdim=True)).sign()[:, 0]
        R = sum(v[n, k] * P for k, P in enumerate(adapt.constants[str(n)]["P"].double()))
        root = torch.diag(S[:3].sqrt() * signs)
        y = y @ (layer.weight + U[:, :3] @ root @ R @ root @ Vh[:3]).T + layer.bias
    torch.testing.assert_close(adapt({"0": {}, "1": {}, "tinylora": {"v": v}}, x), y.detach())


def test_share_of_tied_vectors_is_at_most_one():
    with pytest.raises(ValueError, match=r"TinyLoRAConfig\.weight_tying: expected a share in \[0, 1\], found 1\.5"):
        ll.TinyLoRAConfig(weight_tying=1.5)
