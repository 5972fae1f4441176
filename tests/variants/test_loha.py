"""LoHa: both forms are the entrywise product of two low-rank matrices, whose rank is up to the square of theirs."""

import pytest
import torch

import lora_lite as ll
from lora_lite.core import recompute
from lora_lite.variants import _hadamard
from lora_lite.variants.loha import loha

SIZES = {"Khatri-Rao": (24, 20, 2), "dense": (24, 20, 5)}


def _params(i, o, r):
    g = torch.Generator().manual_seed(0)
    shapes = {"w1_a": (o, r), "w1_b": (r, i), "w2_a": (o, r), "w2_b": (r, i)}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_both_forms_are_the_definition(form, bias):
    i, o, r = SIZES[form]
    assert (r * r * (i + o) < i * o) == (form == "Khatri-Rao")
    p, (weight, x) = _params(i, o, r), (torch.randn(n, i, dtype=torch.float64) for n in (o, 7))
    W = ll.Frozen(weight, torch.randn(o, dtype=torch.float64) if bias else None)
    delta = torch.stack(
        [torch.stack([(p["w1_a"][k] @ p["w1_b"][:, j]) * (p["w2_a"][k] @ p["w2_b"][:, j]) for j in range(i)]) for k in range(o)]
    )
    torch.testing.assert_close(loha(p, W, x, scale=1.5), W(x) + 1.5 * x @ delta.t(), rtol=1e-12, atol=1e-11)


class ByItself(ll.Frozen):
    """A layer whose weight takes no update up."""

    sums = False


@pytest.mark.parametrize("layer", [ll.Frozen, ByItself])
def test_both_forms_have_one_gradient(layer, monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 1)
    p, x, weight = _params(24, 20, 3), torch.randn(2, 7, 24, dtype=torch.float64), torch.randn(20, 24, dtype=torch.float64)
    W, leaves = layer(weight, torch.randn(20, dtype=torch.float64)), [t.requires_grad_() for t in (x, *p.values())]
    found = []
    for matrix in (False, True):
        monkeypatch.setattr(_hadamard, "by_matrix", lambda *_, form=matrix: form)
        y = loha(p, W, x, scale=1.5)
        with torch.no_grad():
            torch.testing.assert_close(loha(p, W, x, scale=1.5), y, rtol=1e-12, atol=1e-12)
        found.append(torch.autograd.grad(y.sin().sum(), leaves, create_graph=True))
        plain = torch.autograd.grad(loha(p, W, x, scale=1.5).sin().sum(), leaves)
        torch.testing.assert_close(plain, [g.detach() for g in found[-1]], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_many_tokens_choose_the_matrix():
    W = ll.Frozen(torch.empty(1344, 512))
    assert [_hadamard.by_matrix(256, W, torch.empty(4, tokens, 512)) for tokens in (4, 32, 256)] == [False, False, True]
    assert _hadamard.by_matrix(256, ll.Frozen(torch.empty(512, 512)), torch.empty(1, 512))


def test_rank_of_the_update_is_the_square_of_the_factors():
    weight = torch.zeros(20, 24, dtype=torch.float64)
    delta = loha(_params(24, 20, 3), weight, torch.eye(24, dtype=torch.float64), scale=1.0)
    assert torch.linalg.matrix_rank(delta) == 9


def test_embedding_of_either_form_learns():
    for r in (1, 8):
        model = torch.nn.Sequential(torch.nn.Embedding(30, 12))
        adapt = ll.build(model, ll.LoHaConfig(r=r, target_names="0"))
        params = {"0": {name: p + 0.3 for name, p in adapt.init()["0"].items()}}
        ids = torch.arange(30)
        torch.testing.assert_close(adapt(params, ids), adapt.merge(params)["0.weight"][ids])
        assert not torch.equal(adapt(params, ids), model(ids))
