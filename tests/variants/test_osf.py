"""OSF: both forms against the dense formula, PEFT's trainings, orthogonality to what stays."""

import copy

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import derived, move
from lora_lite.variants.osf import osf, project

SHAPES = [(12, 20), (20, 12), (12, 12)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 400])
def test_both_forms_are_the_papers_weight(shape, tokens):
    W = ll.Frozen(torch.randn(*shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64))
    start, constants = derived(ll.OSFConfig(effective_rank=3), W)
    params = move({"": start})[""]
    U, S, V = torch.linalg.svd(W.weight, full_matrices=False)
    low = {name: constants[f"{name[1]}0"] + p for name, p in params.items()}
    want = (U[:, :3] * S[:3]) @ V[:3] + (low["dU"] * low["dS"]) @ low["dV"]
    x = torch.randn(tokens, shape[1], dtype=torch.float64)
    torch.testing.assert_close(osf(params, W.with_constants(constants), x), x @ want.t() + W.bias, rtol=0, atol=1e-11)


def test_the_form_follows_the_tokens():
    W = ll.Frozen(torch.randn(12, 12))
    start, constants = derived(ll.OSFConfig(effective_rank=3), W)
    layer, built = W.with_constants(constants), []
    layer.updated = lambda x, D: built.append(len(x)) or W.updated(x, D)
    for tokens in (1, 400):
        osf(start, layer, torch.randn(tokens, 12))
    assert built == [400]


def _training(optimiser, ours_before, ours_after):
    """Train PEFT's layers and ours by three steps, and return the model, our params, and both updates of the output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 8))
    x, paths = torch.randn(30, 12), ["0", "2", "4"]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.OSFConfig(target_modules=paths))
    adapt = ll.build(model, ll.OSFConfig())
    params = ll.tree_map(lambda p: p.clone().requires_grad_(), adapt.init())
    opts = [optimiser([p for p in theirs.parameters() if p.requires_grad]), optimiser(ll.tree_leaves(params))]
    for _ in range(3):
        opts[0].zero_grad()
        theirs(x).square().sum().backward()
        opts[0].step()
        _, grads = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(ll.tree_map(torch.detach, params))
        for p, g in zip(ll.tree_leaves(params), ll.tree_leaves(ours_before(grads, adapt.constants))):
            p.grad = g
        opts[1].step()
        with torch.no_grad():
            for p, new in zip(ll.tree_leaves(params), ll.tree_leaves(ours_after(params, grads, adapt.constants))):
                p.copy_(new)
    return model, ll.tree_map(torch.detach, params), adapt(params, x) - model(x), theirs(x) - model(x)


def test_under_gradient_descent_the_projected_params_are_those_of_pefts_projected_gradients():
    update = ll.OSFConfig().update
    _, _, got, want = _training(lambda p: torch.optim.SGD(p, lr=1e-2), lambda g, _: g, lambda p, g, c: update(p, g, c)[0])
    assert want.abs().max() > 0.01
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_with_projected_gradients_adam_does_what_it_does_in_peft():
    _, _, got, want = _training(lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-3), project, lambda p, g, c: p)
    assert want.abs().max() > 0.01
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_after_update_the_params_are_orthogonal_to_what_stays_under_adam_too():
    update = ll.OSFConfig().update
    model, params, _, _ = _training(lambda p: torch.optim.Adam(p, lr=1e-2), lambda g, _: g, lambda p, g, c: update(p, g, c)[0])
    for path, leaves in params.items():
        weight = model.get_submodule(path).weight.detach()
        U, _, V = torch.linalg.svd(weight, full_matrices=False)
        h, dU, dV = min(weight.shape) // 2, leaves["dU"], leaves["dV"]
        assert dU.abs().max() > 1e-3
        assert (U[:, :h].t() @ dU).abs().max() < 1e-6
        assert (dV @ V[:h].t()).abs().max() < 1e-6


def test_other_variants_are_passed_through_and_the_state_is_needed():
    tree = {"0": {"A": torch.ones(2, 2)}}
    assert project(tree, {}) == tree
    with pytest.raises(ValueError, match=r"OSFConfig\.update: expected adapt\.constants as the state, found None"):
        ll.OSFConfig().update(tree, tree)
    with pytest.raises(ValueError, match=r"OSFConfig\.effective_rank: expected from 1 to 5 triplets for a layer of shape \(8, 6\)"):
        ll.build(nn.Sequential(nn.Linear(6, 8)), ll.OSFConfig(effective_rank=6))
