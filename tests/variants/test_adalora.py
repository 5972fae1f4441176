"""AdaLoRA: PEFT's values, gradients, orthogonality term, and its masks over a whole schedule."""

import copy

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.variants.adalora import orthogonality

SCHEDULE = {"init_r": 6, "target_r": 2, "tinit": 4, "tfinal": 6, "deltaT": 3, "total_step": 30}


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False))
    config = peft.AdaLoraConfig(**SCHEDULE, lora_alpha=8, target_modules=["0", "2"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    adapt = ll.build(model, ll.AdaLoRAConfig(**SCHEDULE))
    generator = torch.Generator().manual_seed(1)
    params = {
        path: {n: p + 0.3 * torch.randn(p.shape, generator=generator) for n, p in leaves.items()} for path, leaves in adapt.init().items()
    }
    trained = {(path, name): _parameter(theirs, path, name) for path, leaves in params.items() for name in leaves}
    for (path, name), parameter in trained.items():
        parameter.data.copy_(params[path][name].view(parameter.shape))
    return model, adapt, params, theirs, trained


def _parameter(theirs, path, name):
    return getattr(theirs.base_model.model.get_submodule(path), f"lora_{name}")["default"]


def test_values_and_gradients_are_those_of_peft(pair):
    model, adapt, params, theirs, trained = pair
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    want = theirs.base_model.model(x) - model(x)
    assert (adapt(params, x) - model(x) - want).abs().max() <= 1e-5 * want.abs().max()
    _, grads = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(params)
    wanted = zip(trained, torch.autograd.grad(theirs.base_model.model(x).square().sum(), list(trained.values())))
    for (path, name), want in wanted:
        assert (grads[path][name] - want.view(grads[path][name].shape)).abs().max() <= 1e-5 * want.abs().max()


def test_orthogonality_is_the_mean_of_norms(pair):
    _, _, params, _, trained = pair
    norms = []
    for (_, name), p in trained.items():
        if name != "E":
            gram = p @ p.T if name == "A" else p.T @ p
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram))))
    assert torch.allclose(orthogonality(params), torch.stack(norms).mean())


def test_masks_are_those_of_peft_over_a_whole_schedule(pair):
    _, adapt, params, theirs, trained = pair
    cfg, state = adapt.configs[0], None
    kept = []
    for step in range(1, SCHEDULE["total_step"] + 1):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        _, grads = ll.value_and_grad(lambda p, x=x: adapt(p, x).square().mean())(params)
        theirs.zero_grad()
        theirs.base_model.model(x).square().mean().backward()
        params = ll.tree_map(lambda p, g: p - 0.05 * g, params, grads)
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= 0.05 * parameter.grad
        before = copy.deepcopy(params)
        new, state = cfg.update(params, grads, state)
        assert all(torch.equal(a, b) for a, b in zip(ll.tree_leaves(params), ll.tree_leaves(before)))  # a pure function
        params = new
        theirs.base_model.update_and_allocate(step)
        for (path, name), parameter in trained.items():
            assert (params[path][name] - parameter.view(params[path][name].shape)).abs().max() <= 1e-5, (step, path, name)
        kept.append(sum(int((leaves["E"] != 0).sum()) for leaves in params.values()))
    assert kept[0] == 12
    assert kept[-1] == 4
    assert kept[5] < 12


def test_update_needs_the_length_of_the_training(pair):
    _, _, params, _, _ = pair
    with pytest.raises(ValueError, match=r"AdaLoRAConfig.total_step: expected the number of optimiser steps, found None"):
        ll.AdaLoRAConfig().update(params, params)
