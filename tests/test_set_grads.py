"""`set_grads`: gradients of a tree reach an optimiser made with its leaves, and a tree that does not fit changes none of them."""

import copy

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import move


@pytest.fixture
def adapt():
    torch.manual_seed(0)
    return ll.build(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), ll.LoRAConfig(r=2))


def loss(adapt, params, x):
    return adapt(params, x).square().mean()


def test_steps_equal_those_of_backward(adapt):
    x = torch.randn(5, 6)
    ours = move(adapt.init())
    theirs = ll.tree_map(lambda p: p.clone().requires_grad_(), ours)
    optimizers = [torch.optim.AdamW(ll.tree_leaves(tree), lr=0.1) for tree in (ours, theirs)]
    for _ in range(3):
        grads = ll.value_and_grad(lambda p: loss(adapt, p, x))(ours)[1]
        ll.set_grads(ours, {path: dict(reversed(leaves.items())) for path, leaves in reversed(grads.items())})  # by name, not by order
        optimizers[1].zero_grad()
        loss(adapt, theirs, x).backward()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, ll.tree_map(torch.Tensor.detach, theirs))


def test_none_leaves_no_gradient(adapt):
    params = adapt.init()
    ll.set_grads(params, ll.tree_map(torch.ones_like, params))
    ll.set_grads(params, None)
    assert all(leaf.grad is None for leaf in ll.tree_leaves(params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("1"), '"1": expected a mapping with "A", "B", found nothing'),
        (lambda g: g["1"].pop("B"), 'missing "1.B"'),
        (lambda g: g["1"].update(C=torch.ones(1)), 'unexpected "1.C"'),
        (lambda g: g["1"].update(A=torch.ones(4, 2)), r'"1.A": expected shape \(2, 4\), found \(4, 2\)'),
        (lambda g: g["1"].update(A=g["1"]["A"].double()), '"1.A": expected dtype torch.float32, found torch.float64'),
        (lambda g: g["1"].update(A=g["1"]["A"].to("meta")), '"1.A": expected device cpu, found meta'),
    ],
)
def test_gradients_of_another_tree_are_refused_and_change_nothing(adapt, change, message):
    params = adapt.init()
    grads = copy.deepcopy(ll.tree_map(torch.ones_like, params))
    change(grads)
    with pytest.raises(ValueError, match=f"(?s)set_grads: expected gradients that fit the params, found:.*{message}"):
        ll.set_grads(params, grads)
    assert all(leaf.grad is None for leaf in ll.tree_leaves(params))


def test_what_value_and_grad_returns_whole_is_refused(adapt):
    params = adapt.init()
    found = ll.value_and_grad(lambda p: loss(adapt, p, torch.randn(2, 6)))(params)
    with pytest.raises(TypeError, match=r"set_grads: expected grads as a tree .*found tuple"):
        ll.set_grads(params, found)
    with pytest.raises(TypeError, match="expected params as a tree"):
        ll.set_grads(ll.tree_leaves(params), found[1])
