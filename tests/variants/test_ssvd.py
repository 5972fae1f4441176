"""SSVD: against the paper's weight written out, its two Cayley maps, ESPnet's orientation, its strength."""

import itertools

import pytest
import torch

import lora_lite as ll
from cases import COSTLY
from lora_lite.variants.ssvd import SSVDConfig, singular_triplets, ssvd

SHAPES = [(7, 12), (12, 7)]  # (o, i)
OPTIONS = list(itertools.product(("first_order", "exact"), (False, True)))
f64 = torch.float64


def params_of(r):
    return {"s": torch.randn(r, dtype=f64), "gate": torch.randn((), dtype=f64), "K": 0.2 * torch.randn(r * (r - 1) // 2, dtype=f64)}


def rotation(K_vec, r, cayley, c=1.0):
    K = torch.zeros(r, r, dtype=f64)
    for value, (k, l) in zip(K_vec, itertools.combinations(range(r), 2)):  # noqa: E741
        K[k, l], K[l, k] = c * value, -c * value
    eye = torch.eye(r, dtype=f64)
    return eye - 2 * K if cayley == "first_order" else (eye - K) @ torch.linalg.inv(eye + K)


def dense(W, params, r, cayley, espnet, c=1.0):
    """Return `W'` of eq. (8)-(9), all singular values in it; signs of the vectors as the variant's."""
    top = singular_triplets(ll.Frozen(W), r)
    rest = W - top["U"] @ torch.diag(top["S"]) @ top["Vh"]
    S = torch.diag(top["S"] + c * params["s"] / (1 + torch.exp(-params["gate"])))
    G = rotation(params["K"], r, cayley, c)
    if espnet and W.shape[0] < W.shape[1]:  # factorised as W^T = Vh^T S U^T, rotated on the right there
        return rest + (top["Vh"].T @ S @ G @ top["U"].T).T
    return rest + top["U"] @ S @ G @ top["Vh"]


@pytest.mark.parametrize("cfg", [SSVDConfig(r=8, cayley=c, espnet_orientation=e) for c, e in OPTIONS] + [SSVDConfig(r=2)], ids=repr)
def test_passes_the_kit(cfg):
    ll.testing.check_variant(cfg, skip=COSTLY)


@pytest.mark.parametrize("c", [1.0, -1.0, 0.0, 2.5])
@pytest.mark.parametrize(("cayley", "espnet"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_weight_at_every_strength(shape, cayley, espnet, c):
    W, params = torch.randn(*shape, dtype=f64), params_of(5)
    x = torch.randn(3, 2, shape[1], dtype=f64)
    cfg = SSVDConfig(r=5, cayley=cayley, espnet_orientation=espnet)
    got = cfg.forward(cfg.steer(params, c), ll.Frozen(W), x) - x @ W.T
    assert torch.allclose(got, x @ (dense(W, params, 5, cayley, espnet, c) - W).T, atol=1e-12)


def test_basis_is_the_svd_of_the_weight():
    W = torch.randn(7, 12, dtype=f64)
    top = singular_triplets(ll.Frozen(W), 7)
    assert torch.allclose(top["U"] * top["S"] @ top["Vh"], W, atol=1e-12)
    assert torch.allclose(top["Vh"] @ top["Vh"].T, torch.eye(7, dtype=f64), atol=1e-12)
    assert top["S"].diff().max() < 0
    for t in singular_triplets(ll.Frozen(W), 3).values():  # no view of the whole decomposition, and laid out as a file gives it
        assert t.is_contiguous()
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


def moved_directions(params, W, cfg):
    """Return `G` itself, out of the variant's update with the singular values left alone."""
    top = singular_triplets(ll.Frozen(W), cfg.r)
    update = cfg.forward({**params, "s": torch.zeros_like(params["s"])}, ll.Frozen(W), torch.eye(W.shape[1], dtype=f64)).T - W
    return torch.diag(1 / top["S"]) @ top["U"].T @ update @ top["Vh"].T + torch.eye(cfg.r, dtype=f64)


def test_exact_map_rotates_and_first_order_departs_with_the_square():
    W, params = torch.randn(7, 12, dtype=f64), params_of(5)
    eye = torch.eye(5, dtype=f64)
    G = moved_directions(params, W, SSVDConfig(r=5, cayley="exact"))
    assert torch.allclose(G.T @ G, eye, atol=1e-12)
    errors = []
    for scale in (1e-2, 1e-3):
        small = {**params, "K": scale * params["K"]}
        errors.append((moved_directions(small, W, SSVDConfig(r=5)) - moved_directions(small, W, SSVDConfig(r=5, cayley="exact"))).norm())
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("cayley", ["first_order", "exact"])
def test_opposite_strength_transposes_the_rotation(cayley):
    cfg, W, params = SSVDConfig(r=5, cayley=cayley), torch.randn(7, 12, dtype=f64), params_of(5)
    forth, back = (moved_directions(cfg.steer(params, c), W, cfg) for c in (0.7, -0.7))
    assert torch.allclose(back, forth.T, atol=1e-12)
    assert not torch.allclose(back, forth, atol=1e-3)


def test_gate_halves_the_shift_at_its_start():
    W, x = torch.randn(7, 12, dtype=f64), torch.randn(3, 12, dtype=f64)
    start = SSVDConfig(r=5).init(ll.Frozen(W), torch.Generator())
    s = torch.randn(5, dtype=f64)
    top = singular_triplets(ll.Frozen(W), 5)
    got = ssvd({**{n: p.double() for n, p in start.items()}, "s": s}, W, x) - x @ W.T
    assert torch.allclose(got, x @ (top["U"] * (0.5 * s) @ top["Vh"]).T, atol=1e-12)


def test_errors_name_the_field():
    with pytest.raises(ValueError, match=r'SSVDConfig.cayley: expected one of "first_order", "exact", found \'series\''):
        SSVDConfig(cayley="series")
    with pytest.raises(ValueError, match=r"SSVDConfig.r: expected an integer >= 2, found 1"):
        SSVDConfig(r=1)
    with pytest.raises(ValueError, match=r"SSVDConfig.r: expected at most min\(i, o\) = 6 .* found 7. Lower r"):
        SSVDConfig(r=7).constants(ll.Frozen(torch.randn(6, 9)), torch.Generator())
