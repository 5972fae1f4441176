"""Updates that the backward pass computes again: the same numbers as plain autograd, and less kept."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import lora_lite as ll
from cases import CASES, Blocks, build_any, move, named, saved_beside
from lora_lite.core import recompute
from lora_lite.core.recompute import linear_plus, recomputed

CONFIGS = {
    "loha": ll.LoHaConfig(r=12),
    "lokr": ll.LoKrConfig(r=4),
    "fourierft": ll.FourierFTConfig(n_frequency=300),
    "c3a": ll.C3AConfig(block_size=8),
    "frod": ll.FRoDConfig(sparse_rate=0.05),
}


@pytest.fixture(params=CONFIGS)
def adapted(request):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(136, 144), nn.Tanh(), nn.Linear(144, 128)).double()
    adapt = ll.build(model, CONFIGS[request.param])
    params = ll.tree_map(lambda p: (p + 0.05 * torch.randn_like(p)).double(), adapt.init(seed=0))
    return adapt, params, torch.randn(400, 136, dtype=torch.float64), list(model.parameters())


def loss(adapt, x):
    return lambda params: adapt(params, x).square().mean()


def kept(adapt, weights, x, params):
    """Return the gradients, and the bytes that autograd keeps for the backward pass beside params and weights."""
    leaves = ll.tree_map(lambda p: p.clone().requires_grad_(), params)
    frozen = (*weights, *ll.tree_leaves(adapt.constants))
    with saved_beside((*ll.tree_leaves(leaves), *frozen)) as seen:
        value = loss(adapt, x)(leaves)
    held = sum(storage.nbytes() for storage in seen.values())
    return torch.autograd.grad(value, ll.tree_leaves(leaves)), held


def test_gradients_are_those_of_plain_autograd_and_less_is_kept(adapted, monkeypatch):
    adapt, params, x, weights = adapted
    got, held = kept(adapt, weights, x, params)
    monkeypatch.setattr(recompute, "SMALL", 1 << 60)
    want, all_held = kept(adapt, weights, x, params)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert held < all_held - 8 * 128 * 144 / 2  # the second layer's matrix at least, less the factors that are kept in its place


def test_the_gradient_has_a_gradient(adapted, monkeypatch):
    adapt, params, x, _ = adapted
    leaves = ll.tree_map(lambda p: p.clone().requires_grad_(), params)

    def norm():
        grads = torch.autograd.grad(loss(adapt, x)(leaves), ll.tree_leaves(leaves), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), ll.tree_leaves(leaves))

    got = norm()
    monkeypatch.setattr(recompute, "SMALL", 1 << 60)
    for a, b in zip(got, norm(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_transforms_are_not_in_the_way(adapted):
    adapt, params, x, _ = adapted
    want = ll.value_and_grad(loss(adapt, x))(params)[1]
    got = torch.func.grad(loss(adapt, x))(params)
    ll.tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12), got, want)
    with forward_ad.dual_level():
        moving = ll.tree_map(lambda p, g: forward_ad.make_dual(p.clone().requires_grad_(), g), params, want)
        slope = forward_ad.unpack_dual(loss(adapt, x)(moving)).tangent
    torch.testing.assert_close(slope, sum(g.square().sum() for g in ll.tree_leaves(want)))


def test_only_what_needs_a_gradient_gets_one(monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 0)
    x, weight, bias = torch.randn(2, 5, 3), torch.randn(4, 3), torch.randn(4)
    a, b = torch.randn(4, 1, requires_grad=True), torch.randn(1, 3)
    y = linear_plus(x, (4, 3), torch.matmul, (a, b), weight, bias)
    torch.testing.assert_close(y, x @ (weight + a @ b).T + bias)
    (grad,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(grad, torch.ones(10, 4).T @ x.flatten(0, 1) @ b.T)
    assert not recomputed(torch.matmul, a.detach(), b).requires_grad
    with torch.no_grad():
        assert not recomputed(torch.matmul, a, b).requires_grad


def test_a_weight_that_is_trained_too_has_its_gradient(monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 0)
    weight = torch.randn(6, 6, requires_grad=True)
    params = {n: torch.randn(s) for n, s in {"w1_a": (6, 2), "w1_b": (2, 6), "w2_a": (6, 2), "w2_b": (2, 6)}.items()}
    params["w1_a"].requires_grad_()
    (grad,) = torch.autograd.grad(ll.functional.loha(params, weight, torch.eye(6), scale=1.0).sum(), weight)
    torch.testing.assert_close(grad, torch.ones(6, 6))


def test_autocast_of_the_forward_is_that_of_the_recomputation(monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 0)
    a, b, found = torch.randn(4, 3, requires_grad=True), torch.randn(3, 5, requires_grad=True), []
    for f in (recomputed, lambda f, *tensors: f(*tensors)):
        with torch.autocast("cpu", torch.bfloat16):
            y = f(lambda a, b: (a @ b).tanh(), a, b)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), (a, b))))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


VIEWS = {
    "no view": torch.matmul,
    "all of a tensor": lambda a, b: (a @ b).view(-1, 10),
    "a transpose": lambda a, b: (a @ b).t(),
    "a part": lambda a, b: (a @ b)[1:],
    "a given tensor": lambda a, b: a.view(3, 4),
}


@pytest.mark.parametrize("view", VIEWS)
def test_the_value_may_be_changed_in_place(monkeypatch, view):
    monkeypatch.setattr(recompute, "SMALL", 0)
    a, b, found = torch.randn(4, 3, requires_grad=True), torch.randn(3, 5, requires_grad=True), []
    for f in (recomputed, lambda f, *tensors: f(*tensors)):
        y = f(VIEWS[view], a + 0, b + 0)
        y = y.clone() if view == "a given tensor" else y  # as autograd asks: in place, the given tensor would change too
        y.mul_(2).add_(1)
        found.append((y, *torch.autograd.grad(y.square().sum(), (a, b), allow_unused=True)))
    torch.testing.assert_close(found[0], found[1])


IN_PLACE = {
    **CONFIGS,
    "abba": ll.ABBAConfig(r1=6, r2=5),
    "svft": ll.SVFTConfig(),
    "goft": ll.GOFTConfig(),
    "waveft": ll.WaveFTConfig(n_frequency=300),
}


@pytest.mark.parametrize("shape", [(136,), (400, 136), (2, 3, 136), (0, 136), (136, 5, 2)], ids=str)
@pytest.mark.parametrize("name", IN_PLACE)
def test_an_operation_in_place_may_follow_a_target(name, shape):
    model = nn.Sequential(nn.Linear(136, 144), nn.ReLU(inplace=True), nn.Linear(144, 136), nn.ReLU(inplace=True))
    adapt, x = ll.build(model, IN_PLACE[name]), torch.randn(shape)
    x = x.transpose(0, -1) if shape[-1] != 136 else x  # not contiguous
    params = ll.tree_map(lambda p: p + 0.05 * torch.randn_like(p), adapt.init(seed=0))
    got = ll.value_and_grad(loss(adapt, x))(params)
    for layer in model:
        layer.inplace = False
    want = ll.value_and_grad(loss(ll.build(model, IN_PLACE[name]), x))(params)
    torch.testing.assert_close(got, want, equal_nan=True)


def batched_and_looped(cfg, i, o, remat=None):
    """Return the gradients of three losses by one backward pass of a batch of vectors, and by one pass for each."""
    x, weights = torch.randn(3, 2, i, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    adapt = build_any(Blocks(i, o).double(), cfg, [x], remat=remat).eval()  # torch draws nothing in a batched backward pass
    params = ll.tree_map(lambda p: p.double().requires_grad_(), move(adapt.init()))
    losses, options = adapt(params, x).square().mean((1, 2)), {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    leaves = ll.tree_leaves(params)
    each = [torch.autograd.grad(losses, leaves, row, **options) for row in weights]
    return torch.autograd.grad(losses, leaves, weights, is_grads_batched=True, **options), tuple(map(torch.stack, zip(*each)))


@pytest.mark.parametrize("remat", [None, r"^blocks\.0$"], ids=["kept", "recomputed"])
@pytest.mark.parametrize("row", CASES, ids=named)
def test_backward_passes_of_a_batch_of_vectors(row, remat):
    got, want = batched_and_looped(row.cfg, 48, 64, remat)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert max(g.abs().max() for g in want) > 1e-8


@pytest.mark.parametrize(("name", "i", "o"), [*((name, 136, 144) for name in IN_PLACE), ("c3a-wide", 416, 416)])
def test_backward_passes_of_a_batch_of_vectors_in_large_layers(name, i, o):
    got, want = batched_and_looped(IN_PLACE.get(name, ll.C3AConfig(block_size=16)), i, o)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_in_bfloat16_and_with_checkpointed_blocks(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(136, 144)), nn.Linear(144, 128)).bfloat16()
    plain, remat = ll.build(model, CONFIGS[name]), ll.build(model, CONFIGS[name], remat=r"^0$")
    params = ll.tree_map(lambda p: p + 0.05 * torch.randn_like(p), plain.init(seed=0))
    x = torch.randn(400, 136).bfloat16()
    want, got = (ll.value_and_grad(lambda p, adapt=adapt: adapt(p, x).float().square().mean())(params) for adapt in (plain, remat))
    ll.tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8), got[1], want[1])
    assert all(g.isfinite().all() and g.any() for g in ll.tree_leaves(got[1]))
