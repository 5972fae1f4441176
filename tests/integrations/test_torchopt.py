"""torchopt: functional optimisers over a tree of params, and an inner loop that is differentiated, for every variant."""

import pytest
import torch
from subjects import EACH, flat

import lora_lite as ll

torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed: pip install torchopt")


def adamw(case):
    """Three steps are those of torch's AdamW on the same leaves."""
    s = case()
    adapt, params, x, y = s.adapt, s.params, s.x, s.y

    def loss(params):
        return (adapt(params, x) - y).square().mean()

    ours = ll.tree_map(torch.clone, params)
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.5, 0.75)}  # of a few bits: torchopt corrects the bias in float32
    optimizer = torch.optim.AdamW(ll.tree_leaves(ours), **options)
    functional, theirs = torchopt.adamw(**options), params
    state = functional.init(theirs)
    for _ in range(3):
        ll.set_grads(ours, ll.value_and_grad(loss)(ours)[1])
        optimizer.step()
        updates, state = functional.update(s.grad(loss)(theirs), state, params=theirs, inplace=False)
        theirs = torchopt.apply_updates(theirs, updates, inplace=False)
    moved, want = (flat(ll.tree_map(torch.sub, tree, params)) for tree in (theirs, ours))
    torch.testing.assert_close(moved, want, rtol=1e-6, atol=1e-9)
    assert want.abs().max() > 1e-3


def inner_loop(case):
    """The gradient through a step of an optimiser with momentum is that of the same step, written out."""
    s = case()
    adapt, params, x, y = s.adapt, s.params, s.x, s.y
    inner = torchopt.sgd(lr=1e-3, momentum=0.9)

    def loss(params, rows):
        return (adapt(params, x[rows]) - y[rows]).square().mean()

    def learned(start):
        state, fast = inner.init(start), start
        for rows in (slice(0, 1), slice(1, 2)):
            grads = s.grad(lambda p, rows=rows: loss(p, rows))(fast)
            updates, state = inner.update(grads, state, inplace=False)
            fast = torchopt.apply_updates(fast, updates, inplace=False)
        return loss(fast, slice(2, 4))

    def written_out(start):
        first = s.grad(lambda p: loss(p, slice(0, 1)))(start)
        fast = ll.tree_map(lambda p, g: p - 1e-3 * g, start, first)
        second = s.grad(lambda p: loss(p, slice(1, 2)))(fast)
        return loss(ll.tree_map(lambda p, g, h: p - 1e-3 * (0.9 * g + h), fast, first, second), slice(2, 4))

    got, want, plain = (flat(s.grad(f)(params)) for f in (learned, written_out, lambda p: loss(p, slice(2, 4))))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert not torch.equal(want, plain)


CHECKS = {"torchopt": (adamw, inner_loop)}


@EACH
@pytest.mark.parametrize("check", CHECKS["torchopt"], ids=lambda check: check.__name__)
def test_torchopt(case, check):
    check(case)
