"""VeRA: PEFT's values and gradients with one pair of projections for layers of different widths, which stands once."""

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False))


def _pair(model):
    import copy

    theirs = peft.get_peft_model(copy.deepcopy(model), peft.VeraConfig(r=5, target_modules=["0", "2"], projection_prng_key=3))
    adapt = ll.build(model, ll.VeRAConfig(r=5, seed=3))
    generator = torch.Generator().manual_seed(1)
    params = {
        path: {n: p + 0.3 * torch.randn(p.shape, generator=generator) for n, p in leaves.items()} for path, leaves in adapt.init().items()
    }
    trained = {}
    for path, leaves in params.items():
        layer = theirs.base_model.model.get_submodule(path)
        for name, leaf in leaves.items():
            parameter = getattr(layer, f"vera_{name}")["default"]
            parameter.data.copy_(leaf)
            trained[path, name] = parameter
    return adapt, params, theirs, trained


def test_projections_are_those_of_peft_and_stand_once(model):
    adapt, _, theirs, _ = _pair(model)
    shared = adapt.constants["vera"]
    assert torch.equal(shared["A"], theirs.base_model.vera_A["default"])
    assert torch.equal(shared["B"], theirs.base_model.vera_B["default"])
    assert adapt.constants["0"] == adapt.constants["2"] == {}
    layers = [binding.W for _, binding in adapt._replicas.main.bindings]
    assert layers[0].constants["A"].data_ptr() == layers[1].constants["A"].data_ptr() == shared["A"].data_ptr()


def test_values_and_gradients_are_those_of_peft(model):
    adapt, params, theirs, trained = _pair(model)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    got, want = adapt(params, x) - model(x), theirs(x) - model(x)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    _, grads = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(params)
    wanted = dict(zip(trained, torch.autograd.grad(theirs(x).square().sum(), list(trained.values()))))
    for (path, name), want in wanted.items():
        assert (grads[path][name] - want).abs().max() <= 1e-5 * want.abs().max()


def test_file_holds_the_projections_once(model, tmp_path):
    adapt, params, _, _ = _pair(model)
    path = tmp_path / "vera.safetensors"
    ll.save(adapt, params, path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        assert sorted(k for k in file.keys() if k.startswith("constant/")) == ["constant/vera.A", "constant/vera.B"]  # noqa: SIM118
    again, read = ll.load(model, path)
    x = torch.randn(3, 12)
    assert torch.equal(again(read, x), adapt(params, x))


def test_two_configs_that_share_under_one_name_are_refused(model):
    with pytest.raises(ValueError, match="Use one config for all layers"):
        ll.build(model, [ll.VeRAConfig(r=2, target_names="0"), ll.VeRAConfig(r=4, target_names="2")])
