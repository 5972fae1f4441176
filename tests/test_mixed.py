"""Mixed batches equal a loop, values, gradients and strengths, for every variant, on three families of transformers, with padding."""

import numpy as np
import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import (
    ACROSS,
    FIRST,
    Blocks,
    assert_gradients_equal,
    assert_trees_equal,
    build_any,
    in_dtype,
    move,
    named,
    padded,
    row_of,
)

STRENGTHS = {"vector": torch.tensor([0.0, 1.0, -0.5, 1.5]).double(), "scalar": torch.tensor(0.7).double(), "number": 0.7}


def _members(adapt, count):
    return [move(adapt.init(seed=k), seed=k) for k in range(count)]


def _close(got, want, tolerance=1e-6):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


def first(output):
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def _loss(output):
    return first(output).square().flatten(1).mean(1)


def _with_output(output):
    return _loss(output).sum(), first(output)


@pytest.mark.parametrize(("row", "dtype", "name"), ACROSS, ids=named)
def test_rows_and_gradients_of_a_mixed_batch_equal_a_loop(tiny, name, row, dtype):
    model, batch = padded(tiny, name)
    adapt = build_any(model.to(dtype), row.cfg, [batch])
    members, index = [in_dtype(m, dtype) for m in _members(adapt, 3)], [2, 0, 2, 1]
    (_, outputs), grads = ll.value_and_grad(lambda p: _with_output(adapt.mixed(p, batch, index)), has_aux=True)(ll.stack(members))
    want = [ll.tree_map(torch.zeros_like, member) for member in members]
    for n, k in enumerate(index):
        (_, output), grad = ll.value_and_grad(lambda p, n=n: _with_output(adapt(p, row_of(batch, n))), has_aux=True)(members[k])
        _close(outputs[n], output[0], 1e-12 if dtype == torch.float64 else 1e-6)
        assert (output[0] - first(adapt.base(row_of(batch, n)))[0]).abs().max() > 1e-8  # the members act
        want[k] = ll.tree_map(torch.add, want[k], grad)
    assert_gradients_equal(grads, ll.stack(want), dtype)


@pytest.mark.parametrize("row", FIRST, ids=named)
def test_groups_equal_a_loop_for_every_variant(row):
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(6, 5, 48)
    adapt = build_any(model, row.cfg, [torch.randn(40, 7, 48)])
    members = _members(adapt, 3)
    got = adapt.mixed(ll.stack(members), x)
    for k, member in enumerate(members):
        rows = x[2 * k : 2 * k + 2]
        _close(got[2 * k : 2 * k + 2], torch.cat([adapt(member, part) for part in ([rows] if row.cfg.rowwise else rows.split(1))]))


@pytest.mark.parametrize("row", [row for row in FIRST if "steered" not in row.fails], ids=named)
def test_members_at_their_own_strength_equal_a_loop(tiny, row):
    model, batch = padded(tiny, "llama", num_hidden_layers=1)
    adapt = build_any(model.double(), row.cfg, [batch])
    members = [in_dtype(member, torch.float64) for member in _members(adapt, 4)]

    def losses(c):
        output = adapt.mixed(adapt.steer(ll.stack(members), c), batch)
        return output.logits.square().sum(), output.logits

    def alone(n, c):
        output = adapt(adapt.steer(members[n], c), row_of(batch, n))
        return output.logits.square().sum(), output.logits

    for strength in STRENGTHS.values():
        vector = isinstance(strength, torch.Tensor) and strength.dim()
        each = strength if vector else [strength] * 4
        for n, logits in enumerate(losses(strength)[1]):
            _close(logits, alone(n, each[n])[1][0], 1e-12)
        if isinstance(strength, torch.Tensor):
            slope = torch.func.grad(lambda c: losses(c)[0])(strength)
            slopes = torch.stack([torch.func.grad(lambda c, n=n: alone(n, c)[0])(each[n]) for n in range(4)])
            _close(slope, slopes if vector else slopes.sum(), 1e-10)
            assert slope.abs().max() > 1e-4


def test_strength_by_row_where_rows_share_a_member(tiny):
    model, batch = padded(tiny, "llama", num_hidden_layers=1)
    adapt = ll.build(model, ll.DoRAConfig(r=2))
    members, index, c = _members(adapt, 2), torch.tensor([1, 0, 1, 1]), torch.tensor([0.0, 0.5, 1.0, -1.0])
    rows = ll.tree_map(lambda p: p[index], ll.stack(members))
    got = first(adapt.mixed(adapt.steer(rows, c), batch))
    for n, k in enumerate(index.tolist()):
        _close(got[n], first(adapt(adapt.steer(members[k], float(c[n])), row_of(batch, n)))[0])


def test_one_tree_at_several_strengths_is_a_stack(tiny):
    model, batch = padded(tiny, "llama", num_hidden_layers=1)
    adapt = ll.build(model, ll.HRAConfig(r=2))
    (member,), c = _members(adapt, 1), torch.tensor([0.0, 0.5, 1.0, -1.0], dtype=torch.float64)
    stacked = adapt.steer(member, c)
    assert {leaf.dtype for leaf in ll.tree_leaves(stacked)} == {torch.float32}  # a strength is a scalar: it promotes nothing
    for one, strength in zip(ll.unstack(stacked), c.tolist()):
        assert_trees_equal(one, adapt.steer(member, strength), 1e-6)
    assert first(adapt.mixed(stacked, batch)).shape[0] == 4


def test_steering_and_mixing_compile_in_one_graph(tiny):
    """LoRA's are in test_compile.py, with a gradient."""
    model, batch = padded(tiny, "llama", num_hidden_layers=1)
    batch.pop("attention_mask")
    adapt = ll.build(model, ll.DoRAConfig(r=2))
    stacked, c = ll.stack(_members(adapt, 4)), torch.tensor([0.0, 0.5, 1.0, -1.0])

    def output(p, c):
        return first(adapt.mixed(adapt.steer(p, c), batch))

    torch.compiler.reset()
    compiled = torch.compile(output, fullgraph=True, backend="aot_eager")
    _close(compiled(stacked, c), output(stacked, c))
    with torch.compiler.set_stance("fail_on_recompile"):
        _close(compiled(stacked, c.flip(0)), output(stacked, c.flip(0)))


def test_a_zero_tree_is_a_base_row(tiny):
    model, batch = padded(tiny, "llama")
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    member = move(adapt.init())
    zeros = ll.tree_map(torch.zeros_like, member)
    with torch.no_grad():
        got = first(adapt.mixed(ll.stack([zeros, member]), batch, [0, 1, 0, 1]))
        base = first(adapt.base(batch))
    _close(got[[0, 2]], base[[0, 2]])
    assert (got[1] - base[1]).abs().max() > 1e-3


def test_stack_and_unstack_undo_each_other(tiny):
    model, _ = tiny("llama")
    members = _members(ll.build(model, ll.LoRAConfig(r=2)), 3)
    for member, again in zip(members, ll.unstack(ll.stack(members)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ll.tree_leaves(member), ll.tree_leaves(again)))


def test_stack_takes_any_iterable_of_trees():
    adapt = ll.build(nn.Sequential(nn.Linear(8, 4)), ll.LoRAConfig(r=2))
    trees = [adapt.init(seed=k) for k in range(3)]
    assert_trees_equal(ll.stack(tree for tree in trees), ll.stack(trees))
    for wrong, found in (([], "none"), (iter(()), "none"), (trees[0], "one tree")):
        with pytest.raises(ValueError, match=f"stack: expected at least one params tree, in a list, found {found}. Pass a list"):
            ll.stack(wrong)


def test_seeds_and_indices_may_be_numpys():
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    assert_trees_equal(adapt.init(seed=np.int64(3)), adapt.init(seed=3))
    stacked = ll.stack(_members(adapt, 2))
    assert torch.equal(adapt.mixed(stacked, x, np.array([1, 0])), adapt.mixed(stacked, x, [1, 0]))
    with pytest.raises(TypeError, match="expected index as integers"):
        adapt.mixed(stacked, x, np.array([1.0, 0.0]))


def test_mixed_batches_under_remat_and_in_training_mode_with_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adapt = ll.build(model, ll.LoRAConfig(r=2, dropout=0.5)).train()
    lean = ll.build(model, ll.LoRAConfig(r=2, dropout=0.5), remat=r"^0$").train()
    members, x = _members(adapt, 2), torch.ones(4, 8)

    def grads(adapt):
        torch.manual_seed(3)
        return ll.value_and_grad(lambda p: adapt.mixed(p, x, [0, 1, 0, 1]).square().sum())(ll.stack(members))[1]

    for a, b in zip(ll.tree_leaves(grads(adapt)), ll.tree_leaves(grads(lean))):
        _close(a, b)
    out = adapt.mixed(ll.stack(members), x, [0, 0, 1, 1])
    assert not torch.equal(out[0], out[1])  # the rows are equal, what dropout leaves of them is not


def test_groups_and_their_gradient_compile_in_one_graph(tiny):
    """With an index they do in test_compile.py."""
    model, batch = padded(tiny, "llama", num_hidden_layers=1)
    batch.pop("attention_mask")
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    one, two = (ll.stack(_members(adapt, 2)) for _ in range(2))

    def loss(p):
        return first(adapt.mixed(p, batch)).square().mean()

    torch.compiler.reset()
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    for a, b in zip(ll.tree_leaves(compiled(one)), ll.tree_leaves(torch.func.grad(loss)(one))):
        _close(a, b)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(two)


@pytest.mark.parametrize("index", [None, [], torch.tensor([], dtype=torch.long)], ids=["groups", "list", "tensor"])
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.HRAConfig(r=2), ll.DoRAConfig(r=2)])
def test_batch_without_rows_keeps_its_shape(cfg, index):
    adapt = ll.build(torch.nn.Linear(8, 4), cfg)
    assert adapt.mixed(ll.stack(_members(adapt, 2)), torch.ones(0, 3, 8), index).shape == (0, 3, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_index_may_be_of_any_integer_dtype(dtype):
    adapt = ll.build(torch.nn.Linear(8, 4), ll.LoRAConfig(r=2))
    stacked, x, index = ll.stack(_members(adapt, 2)), torch.randn(3, 8), [1, 0, 1]
    assert torch.equal(adapt.mixed(stacked, x, torch.tensor(index, dtype=dtype)), adapt.mixed(stacked, x, index))


def test_index_may_be_an_iterator(tiny):
    model, batch = padded(tiny, "llama")
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    stacked, index = ll.stack(_members(adapt, 2)), [1, 0, 0, 1]
    want = adapt.mixed(stacked, batch, index).logits
    assert torch.equal(adapt.mixed(stacked, batch, iter(index)).logits, want)
    assert torch.equal(adapt.module(stacked, iter(index))(**batch).logits, want)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda a, p, b: a.mixed(p, b, iter([0, 5, 0, 1])), ValueError, r"expected index in 0..1, found 5"),
        (lambda a, p, b: a.mixed(p, b, [0, 5, 0, 1]), ValueError, r"expected index in 0..1, found 5"),
        (lambda a, p, b: a.mixed(p, b, torch.tensor([0, 2, 0, 1])), ValueError, r"expected index in 0..1, found 2"),
        (lambda a, p, b: a.mixed(p, b, torch.tensor([0, -1, 0, 1])), ValueError, r"expected index in 0..1, found -1"),
        (lambda a, p, b: a.mixed(p, b, []), ValueError, r"a number for each row of the batch, found none for 4 rows"),
        (lambda a, p, b: a.mixed(p, b, 1), TypeError, r"expected index as integers, a row each, found 1\. .* in a list"),
        (lambda a, p, b: a.module(p, 1), TypeError, r"adapt.module: expected index as integers, a row each, found 1"),
        (lambda a, p, b: a.mixed(p, b, [0.5, 1, 0, 1]), TypeError, r"expected index as integers, a row each, found 0.5"),
        (lambda a, p, b: a.mixed(p, b, torch.zeros(4)), TypeError, r"expected index as a vector of integers, found torch.float32"),
        (lambda a, p, b: a.mixed(p, b, [0, 1, 0]), ValueError, r"index to have a number for each row of the batch, found 3"),
        (lambda a, p, b: a.mixed(a.init(), b), ValueError, r"expected leaves with one leading adapter axis"),
        (lambda a, p, b: ll.stack([]), ValueError, r"expected at least one params tree"),
        (lambda a, p, b: ll.stack([a.init(), {}]), ValueError, r"tree 1 to differ from tree 0"),
        (
            lambda a, p, b: a.steer(p, torch.ones(3)),
            ValueError,
            r"scalar or of shape \(2,\), a strength for each member, found shape \(3,\)",
        ),
        (lambda a, p, b: a.steer(p, torch.ones(2, 1)), ValueError, r"found shape \(2, 1\)\. For a strength by row, gather"),
        (lambda a, p, b: a.steer(a.init(), torch.ones(2, 2)), ValueError, r"scalar or a vector, found shape \(2, 2\)"),
        (lambda a, p, b: a.steer(p, [0.5, 1.0]), TypeError, r"expected c as a number or a tensor, found list. Wrap a list"),
        (lambda a, p, b: a.steer({**p, "x": {}}, 1.0), ValueError, r'steer: .*\n  - unexpected "x"'),
    ],
)
def test_bad_input_is_refused(tiny, call, error, match):
    model, batch = padded(tiny, "llama")
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    with pytest.raises(error, match=match):
        call(adapt, ll.stack(_members(adapt, 2)), batch)
