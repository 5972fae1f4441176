"""Low-rank updates as a Function: the numbers of the dense formula, in the gradient and in its own too, and as little kept as LoRA's."""

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import build_any, saved_beside
from lora_lite.core import low_rank, recompute
from lora_lite.core.low_rank import Factors, added, low_rank_plus

TOKENS, IN, OUT, R = 7, 5, 6, 3
STARTS = ("none", "factors", "diagonal")


def drawn(start):
    """Draw a weight, a bias, outputs, inputs, factors and where they start, all in float64, and the dense update."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((OUT, IN), (OUT,), (TOKENS, OUT), (TOKENS, IN), *2 * ((R, IN), (OUT, R), (R,)))
    W, b, y0, x, A, B, S, A0, B0, S0 = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if start == "none":
        return W, b, y0, x, (A, B), None, B @ A
    if start == "factors":
        return W, b, y0, x, (A, B), Factors(A0, B0), (B0 + B) @ (A0 + A) - B0 @ A0
    return W, b, y0, x, (A, B, S), Factors(A0, B0, S0), (B0 + B) * (S0 + S) @ (A0 + A) - B0 * S0 @ A0


@pytest.mark.parametrize(("given", "start"), [(False, "none"), *((given, start) for given in (False, True) for start in STARTS[1:])])
def test_value_and_gradients_are_those_of_the_dense_update(given, start, monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 0)
    W, b, y0, x, factors, begun, U = drawn(start)

    def f(x, y0, *factors):
        factors = Factors(*factors)
        return added(y0, x, factors, 1.7, begun) if given else low_rank_plus(x, W, b, factors, 1.7, begun)

    inputs = [t.requires_grad_() for t in (x, y0, *factors)]
    torch.testing.assert_close(f(*inputs), (y0 if given else x @ W.T + b) + 1.7 * x @ U.T)
    assert "LowRank" in type(f(*inputs).grad_fn.next_functions[0][0]).__name__
    assert torch.autograd.gradcheck(lambda *t: f(*t) + 0 * t[1], inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda *t: f(*t) + 0 * t[1], inputs)


@pytest.mark.parametrize("small", [0, 1 << 60], ids=["by hand", "plain"])
@pytest.mark.parametrize("start", [*STARTS, "diagonal without a start"])
def test_a_frozen_layer_adds_the_dense_update(start, small, monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", small)
    W, b, _, x, factors, begun, U = drawn(start.partition(" ")[0])
    if " " in start:
        (A, B, S), begun = factors, None
        U = B * S @ A
    want, given = x @ (W + 1.7 * U).T + b, [t.requires_grad_() for t in (x, *factors)]
    got = ll.Frozen(W, b).updated_low_rank(x, factors, 1.7, start=None if begun is None else [t for t in begun if t is not None])
    torch.testing.assert_close(got, want)
    assert all(g.any() for g in torch.autograd.grad(got.square().sum(), given))


def test_a_diagonal_has_a_start_where_the_factors_have_one():
    W, b, _, x, (A, B, S), begun, _ = drawn("diagonal")
    with pytest.raises(ValueError, match=r"found S in factors alone\. Give start one too"):
        ll.Frozen(W, b).updated_low_rank(x, (A, B, S), start=begun[:2])
    with pytest.raises(ValueError, match=r"found S in start alone\. Give factors one too"):
        ll.Frozen(W, b).updated_low_rank(x, (A, B), start=begun)


@pytest.mark.parametrize("start", STARTS[1:])
def test_few_tokens_and_many_give_the_same_numbers(start, monkeypatch):
    W, b, y0, x, factors, begun, U = drawn(start)
    for few in (0, TOKENS):
        monkeypatch.setattr(low_rank, "FEW", few)
        torch.testing.assert_close(low_rank_plus(x, W, b, Factors(*factors), 1.7, begun), x @ (W + 1.7 * U).T + b)
        torch.testing.assert_close(added(y0, x, Factors(*factors), 1.7, begun), y0 + 1.7 * x @ U.T)


@pytest.mark.parametrize("start", STARTS)
def test_only_what_needs_a_gradient_gets_one(start, monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 0)
    W, b, _, x, factors, begun, _ = drawn(start)
    x.requires_grad_()
    for n in range(len(factors)):
        some = [t.requires_grad_() if m == n else t.detach() for m, t in enumerate(factors)]
        got = torch.autograd.grad(low_rank_plus(x, W, b, Factors(*some), 1.7, begun).square().sum(), (some[n], x))
        with torch.no_grad():
            assert not low_rank_plus(x, W, b, Factors(*some), 1.7, begun).requires_grad
        monkeypatch.setattr(recompute, "SMALL", 1 << 60)
        want = torch.autograd.grad(low_rank_plus(x, W, b, Factors(*some), 1.7, begun).square().sum(), (some[n], x))
        monkeypatch.setattr(recompute, "SMALL", 0)
        torch.testing.assert_close(got, want)
    W.requires_grad_()
    (grad,) = torch.autograd.grad(low_rank_plus(x, W, b, Factors(*factors), 1.7, begun).sum(), W)
    torch.testing.assert_close(grad, torch.ones(OUT, TOKENS, dtype=torch.float64) @ x.detach())


def held(cfg, narrow=False, input_gradient=True):
    """Return the bytes that autograd keeps beside weights, constants and params for two layers, the second behind the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(136, 144), nn.Tanh(), nn.Linear(144, 128))
    model = model.to(torch.bfloat16) if narrow else model
    x = torch.randn(400, 136, dtype=model[0].weight.dtype, requires_grad=input_gradient)
    adapt = build_any(model, cfg, [{"input": x.detach()}])
    params = ll.tree_map(lambda p: (p + 0.05 * torch.randn_like(p)).requires_grad_(), adapt.init(seed=0))
    with saved_beside((*ll.tree_leaves(params), *ll.tree_leaves(adapt.constants), *model.parameters())) as seen:
        adapt(params, x)
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cfg", [ll.PiSSAConfig(r=12), ll.OLoRAConfig(r=12), ll.KaSAConfig(r=12)], ids=lambda cfg: cfg.name)
def test_a_product_with_a_start_keeps_what_one_from_zero_keeps(cfg, narrow):
    vectors = 2 * 2 * 12 * 4 if cfg.name == "kasa" else 0  # S, scaled, of each layer
    assert held(cfg, narrow) <= held(ll.LoRAConfig(r=12), narrow) + vectors


LOW_RANK = [
    *(ll.LoRAConfig(r=12), ll.MiCAConfig(r=12), ll.AdaLoRAConfig(init_r=12), ll.DoRAConfig(r=12), ll.OSFConfig(), ll.RandLoRAConfig(r=12)),
    *(
        ll.UniLoRAConfig(r=12),
        ll.VBLoRAConfig(r=12, vector_length=8),
        ll.PEANuTConfig(r=12),
        ll.ABBAConfig(r1=4, r2=4),
        ll.AdaMSSConfig(r=12),
    ),
]


@pytest.mark.parametrize("input_gradient", [True, False], ids=["input too", "params alone"])
@pytest.mark.parametrize("cfg", LOW_RANK, ids=lambda cfg: cfg.name)
def test_no_variant_keeps_more_than_by_plain_autograd(cfg, input_gradient, monkeypatch):
    found = held(cfg, input_gradient=input_gradient)
    monkeypatch.setattr(recompute, "SMALL", 1 << 60)
    assert found <= held(cfg, input_gradient=input_gradient)
