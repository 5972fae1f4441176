"""Products that run once on whole tensors beneath a `vmap`, against a loop over it, in every nesting of transforms."""

import functools

import pytest
import torch

from lora_lite.core.linalg import add_low_rank
from lora_lite.core.tracing import each_first


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def plain(y0, h, B, scale):
    return y0 + scale * h @ B.t()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("mapped", [(0, 0, 0), (1, 0, None), (None, 0, 0), (0, -1, 2), (0, None, 0), (None, None, 0)], ids=str)
def test_low_rank_product_of_mapped_rows(mapped, lead):
    tensors = [draw(*lead, 6), draw(*lead, 4), draw(6, 4)]
    given = [t if axis is None else torch.stack([t, 2 * t - 1, t + 3], axis) for t, axis in zip(tensors, mapped)]
    of = torch.vmap(functools.partial(add_low_rank, scale=0.3), mapped)(*given)
    want = torch.vmap(functools.partial(plain, scale=0.3), mapped)(*given)
    torch.testing.assert_close(of, want)


def test_low_rank_product_under_nested_transforms():
    y0, h, B = draw(2, 3, 5, 6), draw(2, 3, 5, 4), draw(3, 6, 4)
    members = (0, 0, 0)

    def nested(f):
        loss = lambda *args: f(*args, 0.5).sin().sum()  # noqa: E731
        inner = torch.vmap(torch.vmap(loss, members), (0, 0, None))
        each = torch.vmap(torch.vmap(torch.func.grad(loss, (0, 1, 2)), members), (0, 0, None))
        outside = torch.func.grad(lambda *args: inner(*args).sum(), (0, 1, 2))
        forward = torch.func.jvp(inner, (y0, h, B), (h @ B.mT, h.cos(), B.sin()))
        return inner(y0, h, B), each(y0, h, B), outside(y0, h, B), forward

    torch.testing.assert_close(nested(add_low_rank), nested(plain))


def test_low_rank_product_where_an_outer_vmap_maps_it():
    y0, h, B, c = draw(3, 5, 6), draw(3, 5, 4), draw(3, 6, 4), draw(2)

    def both(f):
        return torch.vmap(lambda y0, h, B: torch.vmap(lambda c: c * f(y0, h, B, 0.5))(c))(y0, h, B)

    torch.testing.assert_close(both(add_low_rank), both(plain))


def test_entries_of_all_rows_are_taken_at_once():
    v, calls = draw(2, 3, 4), []

    def cumulated(v):
        calls.append(v.shape)
        return v.cumsum(1)[:, None]

    torch.testing.assert_close(torch.vmap(lambda v: each_first(cumulated, v))(v), v.cumsum(2)[:, :, None])
    torch.testing.assert_close(each_first(cumulated, v[0]), v[0].cumsum(1)[:, None])
    assert calls == [(6, 4), (3, 4)]
    grads = torch.vmap(torch.func.grad(lambda v: each_first(cumulated, v).square().sum()))(v)
    torch.testing.assert_close(grads, torch.func.grad(lambda v: v.cumsum(2).square().sum())(v))
