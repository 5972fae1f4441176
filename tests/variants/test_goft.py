"""GOFT and qGOFT: the dense product of the paper's rotations, what it is orthogonal to, its pairs, and the term of the loss."""

import math

import pytest
import torch
from peft_layer import matrix

import lora_lite as ll
from lora_lite.core import linalg
from lora_lite.core.tracing import vmap_rows
from lora_lite.testing import check_variant
from lora_lite.variants import _tree
from lora_lite.variants._tree import through_tree
from lora_lite.variants.goft import goft
from lora_lite.variants.qgoft import orthogonality, qgoft

WIDTHS = (2, 3, 6, 8, 13, 24, 32)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(i):
    """Return the pairs of the tree, level by level, as the paper's algorithm does: survivors in order, two by two."""
    found, alive = [], list(range(i))
    while len(alive) > 1:
        found += list(zip(alive[0::2], alive[1::2]))
        alive = alive[0::2]
    return found


def product(i, blocks):
    """Return `R = P_L ... P_1`, each pair's 2 x 2 block set into the identity by itself."""
    R = torch.eye(i, dtype=torch.float64)
    for (a, b), block in zip(pairs(i), blocks, strict=True):
        P = torch.eye(i, dtype=torch.float64)
        P[[[a], [b]], [[a, b]]] = block
        R = P @ R
    return R


def rotations(p):
    c, s = p.cos(), p.sin()
    return torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)


@pytest.mark.parametrize("i", [*WIDTHS, 50, 64, 1024, 3584])
def test_there_is_a_pair_for_each_input_but_one(i):
    assert len(pairs(i)) == i - 1 == ll.GOFTConfig().init(ll.Frozen(torch.empty(1, i)), torch.Generator())["p"].numel()


@pytest.mark.parametrize("i", WIDTHS)
@pytest.mark.parametrize("angle", ["raw", "tanh"])
def test_is_the_papers_product_of_rotations_and_orthogonal(i, angle):
    p = draw(i - 1)
    R = product(i, rotations(math.pi * p.tanh() if angle == "tanh" else p))
    got = matrix(goft, {"p": p}, i, angle=angle)
    torch.testing.assert_close(got, R.t(), rtol=0, atol=1e-13)
    torch.testing.assert_close(got @ got.t(), torch.eye(i, dtype=p.dtype), rtol=0, atol=1e-13)
    assert float(torch.linalg.det(got)) == pytest.approx(1.0)


@pytest.mark.parametrize("i", WIDTHS)
def test_free_blocks_are_the_papers_product(i):
    dG, d = draw(i - 1, 2, 2), draw(i, seed=1)
    R = product(i, dG + torch.eye(2, dtype=dG.dtype))
    torch.testing.assert_close(matrix(qgoft, {"dG": dG}, i), R.t(), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix(qgoft, {"dG": dG, "d": d}, i), (1 + d)[:, None] * R.t(), rtol=0, atol=1e-12)


def level_by_level(x, G):
    """Apply the pairs one level after the other, the coarsest first."""
    columns = list(x.unbind(-1))
    for (a, b), (aa, ab, ba, bb) in reversed(list(zip(pairs(len(columns)), G.t()))):
        columns[a], columns[b] = aa * columns[a] + ab * columns[b], ba * columns[a] + bb * columns[b]
    return torch.stack(columns, -1)


@pytest.mark.parametrize("i", [2, 7, 32, 44, 64, 97, 160])
def test_blocks_are_the_levels_one_by_one_and_so_are_their_gradients(i):
    x, G, w = draw(3, 5, i), draw(4, i - 1, seed=1), draw(3, 5, i, seed=2)
    forms = (level_by_level, lambda x, G: through_tree(x, lambda: G))
    want, plain, once_more, by_func = [], [], [], []
    for form, found in zip(forms, (want, plain)):
        leaves = [t.clone().requires_grad_() for t in (x, G)]
        y = form(*leaves)
        grads = torch.autograd.grad((y * w).sum(), leaves, create_graph=True)
        found += [y, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)]
        once_more.append(grads)
        found += torch.autograd.grad((form(*leaves) * w).sum(), leaves)  # by hand, where no graph of it is made
        by_func.append(torch.func.grad(lambda x, G, form=form: (form(x, G) * w).sum(), argnums=(0, 1))(x, G))
    for pair in ((want, plain), once_more, by_func):
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * float(a.detach().abs().max()))
    torch.testing.assert_close(through_tree(x[:, :0], lambda: G), x[:, :0])
    members = torch.stack((G, 1 + G)).requires_grad_()  # mapped, then plain autograd
    mapped = vmap_rows(lambda p, x: through_tree(x, lambda: p["G"]), {"G": members}, torch.stack((x, w)))
    want = torch.stack([level_by_level(a, g) for a, g in zip((x, w), members)])
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), members) for y in (want, mapped))):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * float(a.abs().max()))


def test_blocks_pass_the_kit(monkeypatch):
    monkeypatch.setattr(_tree, "WIDEST", 4)  # the kit's layers are small
    monkeypatch.setattr(linalg, "_FIXED", {})
    check_variant(ll.GOFTConfig(norms=True))


def test_free_blocks_that_are_rotations_are_goft():
    p, d, weight, x = draw(12), draw(13, seed=1), draw(5, 13, seed=2), draw(4, 13, seed=3)
    dG = rotations(p) - torch.eye(2, dtype=p.dtype)
    torch.testing.assert_close(qgoft({"dG": dG, "d": d}, weight, x), goft({"p": p, "d": d}, weight, x), rtol=0, atol=1e-12)
    assert float(orthogonality({"0": {"dG": dG}})) < 1e-30


def test_lengths_stay_in_float32_over_many_levels():
    x, p = torch.randn(8, 4096), torch.randn(4095)
    turned = goft({"p": p}, torch.eye(4096), x)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1), rtol=5e-7, atol=0)
    assert float((turned - x).norm()) > 10


def test_any_vector_is_turned_into_any_other_of_its_length():
    def to_first(v):
        """Return the angles that gather all of `v` in the first input: the finest level first, as `R` has them."""
        v, angles = v.clone(), []
        for a, b in pairs(len(v)):
            angles.append(-torch.atan2(v[b], v[a]))
            v[a], v[b] = torch.hypot(v[a], v[b]), 0.0
        return torch.stack(angles)

    u, v = draw(13), draw(13, seed=1)
    v = v * (u.norm() / v.norm())
    gathered = product(13, rotations(to_first(u))) @ u
    spread = goft({"p": to_first(v)}, torch.eye(13, dtype=u.dtype), gathered)
    torch.testing.assert_close(spread, v, rtol=0, atol=1e-12)


def test_the_first_input_meets_all_and_half_of_them_meet_one():
    R = matrix(goft, {"p": draw(63)}, 64)
    assert int((R != 0).sum()) == 64 * (6 + 1)
    assert sorted((R != 0).sum(0).tolist())[:32] == [2] * 32
    assert int((R[:, 0] != 0).sum()) == 64


def test_the_term_of_the_loss_is_zero_for_orthogonal_columns_of_any_length():
    stretched = rotations(draw(5)) * torch.tensor([2.0, 0.5]) - torch.eye(2)
    assert float(orthogonality({"0": {"dG": stretched}, "1": {"dG": torch.zeros(3, 2, 2)}})) < 1e-28
    G = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert float(orthogonality({"0": {"dG": G - torch.eye(2)}})) == (1 * 2 + 3 * 4) ** 2


@pytest.mark.parametrize("i", [1, 2])
def test_the_narrowest_layers_work(i):
    cfg = ll.GOFTConfig(norms=True)
    W, x = ll.Frozen(draw(3, i)), draw(4, i, seed=1)
    params = cfg.init(W, torch.Generator())
    assert params["p"].shape == (i - 1,)
    torch.testing.assert_close(cfg.forward({name: p.double() for name, p in params.items()}, W, x), W(x), rtol=0, atol=0)
