"""Mixed batches and per-example gradients equal a loop, for every variant, on three families of transformers, with padding."""

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import CASES, FIVE, Blocks, build_any, by_name, move

ARCHITECTURES = ("llama", "bert", "t5")


def _members(adapt, count):
    return [move(adapt.init(seed=k), seed=k) for k in range(count)]


def _rows(batch, index):
    return {name: value[index] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _padded(tiny, name):
    """Give a model and four rows of different lengths."""
    model, batch = tiny(name)
    batch = {k: torch.cat([v, v.flip(0)])[:4] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    labels = batch.pop("labels", None)
    if name == "t5":
        batch["decoder_input_ids"] = labels
    mask = torch.ones_like(batch["input_ids"])
    for row in range(len(mask)):
        mask[row, len(mask[row]) - row :] = 0
    return model, {**batch, "attention_mask": mask}


def _close(got, want, tolerance=1e-6):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


def first(output):
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mixed_rows_and_their_gradients_equal_a_loop(tiny, name, cfg):
    model, batch = _padded(tiny, name)
    adapt = ll.build(model, cfg)
    members, index = _members(adapt, 3), [2, 0, 2, 1]
    stacked = ll.stack(members)
    with torch.no_grad():
        got = first(adapt.mixed(stacked, batch, index))
        for row, k in enumerate(index):
            _close(got[row], first(adapt(members[k], _rows(batch, [row])))[0])
    grads = ll.unstack(ll.value_and_grad(lambda p: first(adapt.mixed(p, batch, index)).square().mean())(stacked)[1])
    for k, member in enumerate(members):

        def loss(p, k=k):
            rows = [row for row, taken in enumerate(index) if taken == k]
            return sum(first(adapt(p, _rows(batch, [row]))).square().mean() for row in rows) / len(index)

        want = ll.value_and_grad(loss)(member)[1]
        for a, b in zip(ll.tree_leaves(grads[k]), ll.tree_leaves(want)):
            _close(a, b)


@pytest.mark.parametrize("row", CASES, ids=lambda row: row.id)
def test_groups_equal_a_loop_for_every_variant(row):
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(6, 5, 48)
    adapt = build_any(model, row.cfg, [torch.randn(40, 7, 48)])
    members = _members(adapt, 3)
    got = adapt.mixed(ll.stack(members), x)
    for k, member in enumerate(members):
        _close(got[2 * k : 2 * k + 2], adapt(member, x[2 * k : 2 * k + 2]), 2e-2 if row.cfg.dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_per_example_gradients_equal_a_loop(tiny, name, cfg):
    model, batch = _padded(tiny, name)
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    got = ll.per_example_grad(adapt, lambda output, _: first(output).square().flatten(1).mean(1))(params, batch)
    for row in range(4):
        want = ll.value_and_grad(lambda p, row=row: first(adapt(p, _rows(batch, [row]))).square().mean())(params)[1]
        for a, b in zip(ll.tree_leaves(got), ll.tree_leaves(want)):
            _close(a[row], b)


def test_a_zero_tree_is_a_base_row(tiny):
    model, batch = _padded(tiny, "llama")
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


@pytest.mark.parametrize("given", [None, torch.tensor([1, 0, 1, 0])], ids=["groups", "index"])
def test_mixed_and_its_gradient_compile_in_one_graph(tiny, given):
    model, batch = _padded(tiny, "llama")
    batch.pop("attention_mask")
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    one, two = (ll.stack(_members(adapt, 2)) for _ in range(2))

    def loss(p, index):
        return first(adapt.mixed(p, batch, index)).square().mean()

    torch.compiler.reset()
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    for a, b in zip(ll.tree_leaves(compiled(one, given)), ll.tree_leaves(torch.func.grad(loss)(one, given))):
        _close(a, b)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(two, None if given is None else given.flip(0))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda a, p, b: a.mixed(p, b, [0, 5, 0, 1]), ValueError, r"expected index in 0..1, found 5"),
        (lambda a, p, b: a.mixed(p, b, [0.5, 1, 0, 1]), TypeError, r"expected index as integers, a row each, found 0.5"),
        (lambda a, p, b: a.mixed(p, b, torch.zeros(4)), TypeError, r"expected index as a vector of integers, found torch.float32"),
        (lambda a, p, b: a.mixed(p, b, [0, 1, 0]), ValueError, r"expected the input of .* to have a multiple of 3 rows"),
        (lambda a, p, b: a.mixed(a.init(), b), ValueError, r"expected leaves with one leading adapter axis"),
        (lambda a, p, b: ll.stack([]), ValueError, r"expected at least one params tree"),
        (lambda a, p, b: ll.stack([a.init(), {}]), ValueError, r"tree 1 to differ from tree 0"),
        (lambda a, p, b: ll.per_example_grad(a, lambda o, _: first(o).mean())(a.init(), b), ValueError, r"shape \(4,\), found \(\)"),
    ],
)
def test_bad_input_is_refused(tiny, call, error, match):
    model, batch = _padded(tiny, "llama")
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    with pytest.raises(error, match=match):
        call(adapt, ll.stack(_members(adapt, 2)), batch)
