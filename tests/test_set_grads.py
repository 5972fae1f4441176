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


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda leaves: torch.optim.AdamW(leaves, lr=0.1, fused=True),  # walks the memories of leaf and gradient side by side
        lambda leaves: torch.optim.LBFGS(leaves, lr=0.1, max_iter=1),  # views each gradient as a vector
    ],
    ids=["fused", "lbfgs"],
)
@pytest.mark.parametrize("members", [None, 2], ids=["alone", "stacked"])
def test_optimisers_that_read_memory_see_gradients_as_backward_leaves_them(optimizer, members):
    """The gradient of PiSSA's `dB` is a transposed product, and so are those of a mixed batch."""
    torch.manual_seed(0)
    adapt, x = ll.build(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)), ll.PiSSAConfig(r=4)), torch.randn(64, 16)
    call = adapt if members is None else adapt.mixed
    ours = move(adapt.init() if members is None else ll.stack([adapt.init(k) for k in range(members)]))
    theirs = ll.tree_map(lambda p: p.clone().requires_grad_(), ours)
    own = [ours] if members is None else ll.unstack(ours)
    one, other = (optimizer([leaf for tree in trees for leaf in ll.tree_leaves(tree)]) for trees in (own, [theirs]))

    def grads_of_ours():
        value, grads = ll.value_and_grad(lambda p: call(p, x).square().mean())(ours)
        assert any(g.stride() != p.stride() for g, p in zip(ll.tree_leaves(grads), ll.tree_leaves(ours)))
        for tree, grad in zip(own, [grads] if members is None else ll.unstack(grads)):
            ll.set_grads(tree, grad)
        return value

    def grads_of_theirs():
        other.zero_grad()
        value = call(theirs, x).square().mean()
        value.backward()
        return value

    for _ in range(3):
        one.step(grads_of_ours)
        other.step(grads_of_theirs)
    torch.testing.assert_close(ours, ll.tree_map(torch.Tensor.detach, theirs), rtol=1e-4, atol=1e-5)


def test_gradient_that_two_leaves_have_in_common_is_clipped_once():
    params = {"0": {"a": torch.zeros(3), "b": torch.zeros(3)}}
    grads = ll.value_and_grad(lambda p: ((p["0"]["a"] + p["0"]["b"]) * torch.arange(3.0)).sum())(params)[1]
    assert grads["0"]["a"] is grads["0"]["b"]
    ll.set_grads(params, grads)
    torch.nn.utils.clip_grad_value_(ll.tree_leaves(params), 1.0)
    torch.nn.utils.clip_grad_norm_(ll.tree_leaves(params), 1.0)
    assert torch.allclose(params["0"]["a"].grad, torch.tensor([0.0, 0.5, 0.5]))
    assert torch.allclose(params["0"]["b"].grad, torch.tensor([0.0, 0.5, 0.5]))


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


def test_none_for_a_leaf_leaves_it_without_a_gradient(adapt):
    params = move(adapt.init())
    ll.set_grads(params, ll.tree_map(torch.ones_like, params))
    ll.set_grads(params, {path: {**leaves, "B": None} for path, leaves in ll.tree_map(torch.ones_like, params).items()})
    assert all((leaf.grad is None) == (name == "B") for leaves in params.values() for name, leaf in leaves.items())
    with pytest.raises(TypeError, match="expected grads as a tree"):
        ll.set_grads(params, {**params, "2": {"A": None}})


@pytest.mark.parametrize(
    "call",
    [
        ll.tree_leaves,
        lambda t: ll.tree_map(torch.zeros_like, t),
        lambda t: ll.set_grads(t, copy.deepcopy(t)),
        lambda t: ll.lora_plus(t, 1.0),
    ],
)
def test_tree_of_trees_is_refused_by_name_and_each_is_taken(adapt, call):
    joint = {"adapter": adapt.init(), "heads": {"a": {"w": torch.ones(3)}}}
    with pytest.raises(TypeError, match=r"expected .*tree \{target path.* at \"adapter\".* by itself"):
        call(joint)
    _, grads = ll.value_and_grad(lambda t: loss(adapt, t["adapter"], torch.randn(2, 6)) + t["heads"]["a"]["w"].sum())(joint)
    for name, tree in joint.items():
        call(tree)
        ll.set_grads(tree, grads[name])
    assert all(leaf.grad is not None for tree in joint.values() for leaf in ll.tree_leaves(tree))
