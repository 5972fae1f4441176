"""The Cayley map, and AntiPaSTO's bounds on its angles: by entry and by block, and what strengths do to them."""

import math

import pytest
import torch

from lora_lite.core.linalg import cayley, cayley_excess, skew
from lora_lite.variants._antipasto_cores import clamped, scaled

f64 = torch.float64


def test_skew_fills_the_upper_triangle_by_rows_and_cayley_is_the_rotation():
    X = skew(torch.arange(1.0, 7.0, dtype=f64), 4)
    assert X.tolist() == [[0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]
    eye = torch.eye(4, dtype=f64)
    want = torch.linalg.inv(eye - X) @ (eye + X)
    assert torch.allclose(cayley(X), want, atol=1e-13)
    assert torch.allclose(cayley(-X), cayley(X).T, atol=1e-13)
    assert cayley_excess(X.bfloat16()).dtype == torch.float32


def angles(t, max_angle, clamp, size):
    """Return the angles of the rotations, from their eigenvalues."""
    R = cayley(skew(clamped(t, max_angle, clamp) / 2, size))
    return torch.linalg.eigvals(R).angle().abs()


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("max_angle", [0.5, 1.0])
def test_element_clamp_bounds_entries_not_angles(size, max_angle):
    bound = 2 * math.atan(math.tan(max_angle / 2) / math.tan(math.pi / (2 * size)))
    t = 100 * torch.randn(200, size * (size - 1) // 2, dtype=f64)
    assert angles(t, max_angle, "element", size).max() <= bound + 1e-9
    assert angles(torch.full_like(t[:1], 100.0), max_angle, "element", size).max().item() == pytest.approx(bound, abs=1e-9)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_spectral_clamp_bounds_angles(size):
    t = 100 * torch.randn(200, size * (size - 1) // 2, dtype=f64)
    assert angles(t, 0.5, "spectral", size).max() <= 0.5 + 1e-9
    one = torch.zeros_like(t[:1])
    one[0, 0] = 100.0
    assert angles(one, 0.5, "spectral", size).max().item() == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("clamp", ["element", "spectral"])
def test_opposite_strength_is_the_inverse_rotation(clamp, dtype):
    t = torch.randn(5, 6).to(dtype)
    forth, back = (scaled(t, c, 0.5, clamp) for c in (0.7, -0.7))
    assert torch.equal(back, -forth)
    R, Rt = (cayley(skew(clamped(s, 0.5, clamp) / 2, 4)) for s in (forth, back))
    assert torch.allclose(R @ Rt, torch.eye(4, dtype=dtype).expand(5, 4, 4), atol=20 * torch.finfo(dtype).eps)
    assert torch.allclose(Rt, R.mT, atol=10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("clamp", ["element", "spectral"])
def test_strength_is_held_at_the_bound(clamp):
    t = 0.8 * torch.randn(5, 6, dtype=f64)
    edge = clamped(1e3 * t, 0.5, clamp)
    assert torch.allclose(clamped(scaled(t, 1e9, 0.5, clamp), 0.5, clamp), edge, atol=1e-12)
    assert torch.allclose(clamped(scaled(1e3 * t, -1.0, 0.5, clamp), 0.5, clamp), -edge, atol=1e-12)
