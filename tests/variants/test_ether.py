"""ETHER and ETHER+: the dense matrices of the paper, and what it says of reflections and their relaxation."""

import math

import pytest
import torch
from peft_layer import matrix

import lora_lite as ll
from lora_lite.variants.ether import ether
from lora_lite.variants.ether_plus import ether_plus

BLOCKS = (1, 2, 4)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projections(u):
    """Return the block-diagonal matrix of the projections onto the rows of `u`."""
    return torch.block_diag(*(torch.outer(row, row) / row.dot(row) for row in u))


def reflection(u):
    return torch.eye(u.numel(), dtype=u.dtype) - 2 * projections(u)


def exchange(u, v):
    return torch.eye(u.numel(), dtype=u.dtype) - projections(u) + projections(v)


@pytest.mark.parametrize("n", BLOCKS)
def test_the_reflected_side_is_the_papers(n):
    weight, bias, x = draw(8, 12), draw(8, seed=1), draw(3, 12, seed=2)
    W = ll.Frozen(weight, bias)
    u, out = draw(n, 12 // n, seed=3), draw(n, 8 // n, seed=4)
    torch.testing.assert_close(ether({"u": u}, W, x), x @ (weight @ reflection(u)).t() + bias, rtol=0, atol=1e-12)
    torch.testing.assert_close(ether({"u": out}, W, x, side="out"), x @ (reflection(out) @ weight).t() + bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", BLOCKS)
def test_both_sides_of_the_relaxation_are_the_papers(n):
    weight, bias, x = draw(8, 12), draw(8, seed=1), draw(3, 12, seed=2)
    W = ll.Frozen(weight, bias)
    one = {"u": draw(n, 12 // n, seed=3), "v": draw(n, 12 // n, seed=4)}
    two = {**one, "u_out": draw(n, 8 // n, seed=5), "v_out": draw(n, 8 // n, seed=6)}
    turned = weight @ exchange(one["u"], one["v"])
    torch.testing.assert_close(ether_plus(one, W, x), x @ turned.t() + bias, rtol=0, atol=1e-12)
    want = x @ (exchange(two["u_out"], two["v_out"]) @ turned).t() + bias
    torch.testing.assert_close(ether_plus(two, W, x), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", BLOCKS)
def test_a_reflection_is_orthogonal_its_own_inverse_and_never_near_the_identity(n):
    u, eye = draw(n, 12 // n), torch.eye(12, dtype=torch.float64)
    H = matrix(ether, {"u": u}, 12)
    torch.testing.assert_close(H @ H, eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(H @ H.t(), eye, rtol=0, atol=1e-13)
    assert float((H - eye).norm()) == pytest.approx(2 * math.sqrt(n))
    assert float(torch.linalg.det(H)) == pytest.approx((-1) ** n)


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2, 2.0])
def test_the_relaxation_stretches_one_direction_and_shrinks_another_by_the_sine_of_the_angle(angle):
    u, w = torch.linalg.qr(draw(6, 2)).Q.t()
    v = math.cos(angle) * u + math.sin(angle) * w
    G = matrix(ether_plus, {"u": 3 * u[None], "v": 0.2 * v[None]}, 6)
    values = torch.linalg.eigvalsh(G)
    assert values[[0, -1]].tolist() == pytest.approx([1 - math.sin(angle), 1 + math.sin(angle)])
    assert float((G - torch.eye(6)).norm()) == pytest.approx(math.sqrt(2) * math.sin(angle))


@pytest.mark.parametrize("sides", ["both", "in"])
@pytest.mark.parametrize("n", BLOCKS)
def test_the_relaxation_starts_at_the_base_model_with_a_gradient(n, sides):
    W, x = ll.Frozen(draw(8, 12).float()), draw(5, 12, seed=1).float()
    cfg = ll.ETHERPlusConfig(n_blocks=n, sides=sides)
    params = cfg.init(W, torch.Generator().manual_seed(0))
    assert torch.equal(cfg.forward(params, W, x), W(x))
    grads = torch.func.grad(lambda p: cfg.forward(p, W, x).square().sum())(params)
    assert all(float(g.abs().max()) > 1e-3 for g in grads.values())


def test_directions_alone_count_and_gradients_are_orthogonal_to_them():
    weight, x, u = draw(8, 12), draw(3, 12, seed=1), draw(3, 4, seed=2)
    long = u * torch.tensor([[2.0], [-0.1], [1e3]])
    torch.testing.assert_close(ether({"u": u}, weight, x), ether({"u": long}, weight, x), rtol=0, atol=1e-12)
    grad = torch.func.grad(lambda u: ether({"u": u}, weight, x).sin().sum())(u)
    assert float(((grad * u).sum(1)).abs().max()) < 1e-13 < float(grad.abs().max())


def test_zero_vectors_leave_their_block_alone_and_have_finite_gradients():
    weight, x = draw(8, 12), draw(3, 12, seed=1)
    u = draw(3, 4, seed=2) * torch.tensor([[1.0], [0.0], [1.0]])
    H = matrix(ether, {"u": u}, 12)
    assert torch.equal(H[4:8], torch.eye(12, dtype=H.dtype)[4:8])
    assert torch.func.grad(lambda u: ether({"u": u}, weight, x).square().sum())(u).isfinite().all()


@pytest.mark.parametrize(("c", "eigenvalue"), [(0.0, 1.0), (0.5, 0.0), (1.0, -1.0), (-1.0, -1.0), (1 / 3, 0.5)])
def test_strength_takes_a_reflected_direction_through_zero(c, eigenvalue):
    u = draw(1, 12)
    H = matrix(ether, ll.ETHERConfig().steer({"u": u}, c), 12)
    torch.testing.assert_close(H @ u[0], eigenvalue * u[0], rtol=0, atol=1e-12)


def test_a_width_that_the_blocks_do_not_divide_is_refused():
    for cfg in (ll.ETHERConfig(n_blocks=5), ll.ETHERPlusConfig(n_blocks=5)):
        with pytest.raises(ValueError, match=rf"{type(cfg).__name__}.n_blocks: expected a divisor of i = 12, found 5. Use e.g. "):
            cfg.init(ll.Frozen(draw(8, 12)), torch.Generator())
