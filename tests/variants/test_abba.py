"""ABBA: both forms are the definition, the rank is the product of the two, and the first pair is the weight's best approximation."""

import pytest
import torch

import lora_lite as ll
from lora_lite.variants.abba import abba

SIZES = {"Khatri-Rao": (24, 20, 3, 2), "dense": (24, 20, 4, 5)}


def _params(i, o, r1, r2):
    g = torch.Generator().manual_seed(0)
    shapes = {"A1": (r1, i), "B1": (o, r1), "A2": (r2, i), "B2": (o, r2)}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", SIZES)
def test_both_forms_are_the_definition(form):
    i, o, r1, r2 = SIZES[form]
    assert (r1 * r2 * (i + o) < i * o) == (form == "Khatri-Rao")
    p, (weight, x) = _params(i, o, r1, r2), (torch.randn(n, i, dtype=torch.float64) for n in (o, 7))
    W = ll.Frozen(weight, torch.randn(o, dtype=torch.float64))
    delta = torch.einsum("kp,pl,kq,ql->kl", p["B1"], p["A1"], p["B2"], p["A2"])
    torch.testing.assert_close(abba(p, W, x, scale=1.5), W(x) + 1.5 * x @ delta.t(), rtol=1e-12, atol=1e-11)


def test_rank_of_the_update_is_the_product_of_the_ranks():
    eye = torch.eye(24, dtype=torch.float64)
    delta = abba(_params(24, 20, 3, 4), torch.zeros(20, 24, dtype=torch.float64), eye, scale=1.0)
    assert torch.linalg.matrix_rank(delta) == 12


def test_first_pair_starts_as_the_best_approximation_of_the_weight():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 12))
    adapt = ll.build(model, ll.ABBAConfig(r1=3, r2=5, alpha1=4.0, alpha2=9.0))
    start = adapt.init()["0"]
    U, S, Vh = torch.linalg.svd(model[0].weight.detach())
    torch.testing.assert_close(start["B1"] @ start["A1"], U[:, :3] @ torch.diag(S[:3]) @ Vh[:3])
    torch.testing.assert_close(start["B1"].norm(dim=0), start["A1"].norm(dim=1))  # the singular values are split evenly
    assert start["A2"].abs().max() <= (6 / 16) ** 0.5
    assert start["A2"].abs().max() > (3 / 16) ** 0.5
    moved = {"0": {**start, "B2": torch.randn(12, 5)}}
    delta = (start["B1"] @ start["A1"]) * (moved["0"]["B2"] @ start["A2"])
    torch.testing.assert_close(adapt.merge(moved)["0.weight"] - model[0].weight, 6 * delta, rtol=1e-4, atol=1e-5)


def test_rank_above_the_smaller_width_is_refused():
    with pytest.raises(ValueError, match=r"ABBAConfig\.r1: expected at most min\(i, o\) = 4"):
        ll.build(torch.nn.Sequential(torch.nn.Linear(4, 6)), ll.ABBAConfig(r1=5))
