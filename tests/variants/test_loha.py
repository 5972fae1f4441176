"""LoHa: both forms are the entrywise product of two low-rank matrices, whose rank is up to the square of theirs."""

import pytest
import torch

import lora_lite as ll
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
