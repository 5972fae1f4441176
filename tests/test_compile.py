"""Under `torch.compile`: one graph, the eager result, and no recompilation for new params.

The kit compiles every variant. What takes seconds here runs for LoRA, and for the others with `LORA_LITE_COMPILE=every`, which
`tox -e compiled` sets.
"""

import shutil

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import COMPILE_ALL, FIVE, Blocks, assert_trees_equal, by_name, move
from common.measure import peak_bytes

INDUCTOR = pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++, found none"))

FORMULAS = [cfg for cfg in FIVE if cfg.name in (("lora", "dora", "ia3") if COMPILE_ALL else ("lora",))]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def one_layer(tiny, cfg, **fields):
    model, batch = tiny("llama", num_hidden_layers=1)
    adapt = ll.build(model, cfg, **fields)
    params = move(adapt.init())
    torch.func.grad(lambda p: adapt(p, batch).loss)(params)
    return adapt, params, batch


@pytest.mark.parametrize("cfg", FORMULAS, ids=by_name)
def test_loss_and_both_gradients_in_one_graph(tiny, cfg):
    adapt, params, batch = one_layer(tiny, cfg)

    def loss(p, b):
        return adapt(p, b).loss

    want, grads = ll.value_and_grad(loss)(params, batch)

    def compiled(f):
        return torch.compile(f, fullgraph=True, backend="aot_eager")

    assert torch.allclose(compiled(loss)(params, batch), want, rtol=1e-6)
    assert_trees_equal(compiled(torch.func.grad(loss))(params, batch), grads, 1e-6)
    step = compiled(ll.value_and_grad(loss))
    value, got = step(params, batch)
    assert torch.allclose(value, want, rtol=1e-6)
    assert_trees_equal(got, grads, 1e-6)

    other = move(adapt.init(seed=1), seed=1)
    with torch.compiler.set_stance("fail_on_recompile"):
        value, got = step(other, batch)
    want, grads = ll.value_and_grad(loss)(other, batch)
    assert torch.allclose(value, want, rtol=1e-6)
    assert_trees_equal(got, grads, 1e-6)


@pytest.mark.parametrize("backend", [INDUCTOR])
def test_generated_code(backend):
    """The model is small, since a C++ compiler takes most of the time; the graphs of a transformer are above."""
    adapt = ll.build(nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 8)), ll.LoRAConfig(r=4))
    params, batch = move(adapt.init()), torch.randn(3, 5, 24)

    def loss(p, b):
        return adapt(p, b).log_softmax(-1).square().mean()

    with torch._inductor.config.patch({"cpp.simdlen": 1}):  # to look for vector units would compile a program for each sort
        value, got = torch.compile(ll.value_and_grad(loss), fullgraph=True, backend=backend)(params, batch)
    want, grads = ll.value_and_grad(loss)(params, batch)
    assert torch.allclose(value, want, rtol=1e-5)
    assert_trees_equal(got, grads, 1e-5)


def test_before_any_eager_call(tiny):
    model, batch = tiny("llama", num_hidden_layers=1)
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    params = move(adapt.init())
    got = torch.compile(lambda p, b: adapt(p, b).loss, fullgraph=True, backend="aot_eager")(params, batch)
    assert torch.allclose(got, adapt(params, batch).loss, rtol=1e-6)


def test_params_that_require_a_gradient(tiny):
    adapt, params, batch = one_layer(tiny, ll.LoRAConfig(r=4))
    _, want = ll.value_and_grad(lambda p: adapt(p, batch).loss)(params)
    leaves = {path: {name: leaf.clone().requires_grad_() for name, leaf in found.items()} for path, found in params.items()}
    torch.compile(lambda p, b: adapt(p, b).loss, fullgraph=True, backend="aot_eager")(leaves, batch).backward()
    assert_trees_equal({path: {name: leaf.grad for name, leaf in found.items()} for path, found in leaves.items()}, want, 1e-6)


def test_recomputed_blocks(tiny):
    adapt, params, batch = one_layer(tiny, ll.LoRAConfig(r=4), remat=r"layers\.\d+$")

    def loss(p, b):
        return adapt(p, b).loss

    want, grads = ll.value_and_grad(loss)(params, batch)
    leaves = {path: {name: leaf.clone().requires_grad_() for name, leaf in found.items()} for path, found in params.items()}
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves, batch)
    got.backward()
    assert torch.allclose(got, want, rtol=1e-6)
    assert_trees_equal({path: {name: leaf.grad for name, leaf in found.items()} for path, found in leaves.items()}, grads, 1e-6)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_recomputed_blocks_are_not_kept():
    model = nn.Sequential(*(Residual() for _ in range(8)))
    x, peaks = torch.randn(256, 32), []
    for remat in (None, r"^\d+$"):
        adapt = ll.build(model, ll.LoRAConfig(r=4), remat=remat)
        leaves = ll.tree_map(lambda t: t.requires_grad_(), move(adapt.init()))
        loss = torch.compile(lambda p, x, a=adapt: a(p, x).square().sum(), fullgraph=True, backend="aot_eager")
        peaks.append(peak_bytes(lambda loss=loss, p=leaves: torch.autograd.grad(loss(p, x), ll.tree_leaves(p))))
    assert peaks[1] < 0.5 * peaks[0]


def by_row(output, batch):
    logits, labels = output.logits[:, :-1], batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def rows(tiny, cfg, remat):
    model, _ = tiny("llama", num_hidden_layers=1)
    adapt = ll.build(model, cfg, remat=remat)
    batches = [{"input_ids": torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(k))} for k in range(2)]
    return adapt, [ll.stack([move(adapt.init(), seed=2 * n + k) for k in range(2)]) for n in range(2)], batches


def same_graph_again(f, first, second, tolerance=1e-6):
    """Compile `f` in one graph, hold it against itself uncompiled, then again for other arguments without another compilation."""
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_trees_equal(compiled(*first), f(*first), tolerance)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_trees_equal(compiled(*second), f(*second), tolerance)


@pytest.mark.parametrize("remat", [None, *([r"layers\.\d+$"] if COMPILE_ALL else [])])
def test_step_of_a_population(tiny, remat):
    adapt, (one, two), (batch, other) = rows(tiny, ll.LoRAConfig(r=4), remat)

    def loss(stacked, strength, batch, index):
        return by_row(adapt.mixed(adapt.steer(stacked, strength), batch, index), batch).sum()

    index, other_index, strength = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 1, 0, 1]), torch.tensor([0.5, 1.5])
    first, second = (one, strength, batch, index), (two, strength.flip(0), other, other_index)
    same_graph_again(lambda *args: ll.value_and_grad(loss)(*args)[1], first, second)


@pytest.mark.parametrize("cfg", FORMULAS, ids=by_name)
def test_gradients_by_row(tiny, cfg):
    adapt, (one, two), (batch, other) = rows(tiny, cfg, None)
    same_graph_again(ll.per_example_grad(adapt, by_row), (ll.unstack(one)[0], batch), (ll.unstack(two)[1], other))


@pytest.mark.parametrize("remat", [r"^blocks\.\d$", *([None] if COMPILE_ALL else [])])
def test_gradients_by_row_in_chunks_and_their_norms(remat):
    adapt = ll.build(Blocks().eval(), ll.LoRAConfig(r=4), remat=remat)
    one, two = (move(adapt.init(), seed=k) for k in range(2))

    def squares(output, batch):
        return output.square().mean((1, 2))

    grads, norms = ll.per_example_grad(adapt, squares, chunk_size=2), ll.per_example_norm(adapt, squares)

    def both(params, batch):
        return {**grads(params, batch), "norms": {"": norms(params, batch)}}

    same_graph_again(both, (one, torch.randn(4, 5, 48)), (two, torch.randn(4, 5, 48)))


def test_params_that_require_a_gradient_in_a_mixed_batch_with_remat(tiny):
    adapt, (one, _), (batch, _) = rows(tiny, ll.LoRAConfig(r=4), r"layers\.\d+$")
    want = ll.value_and_grad(lambda p: by_row(adapt.mixed(p, batch), batch).sum())(one)[1]
    leaves = ll.tree_map(lambda p: p.clone().requires_grad_(), one)
    torch.compile(lambda p: by_row(adapt.mixed(p, batch), batch).sum(), fullgraph=True, backend="aot_eager")(leaves).backward()
    assert_trees_equal(ll.tree_map(lambda leaf: leaf.grad, leaves), want, 1e-6)


def test_compiled_call_leaves_eager_calls_exact(tiny):
    adapt, params, batch = one_layer(tiny, ll.LoRAConfig(r=4))
    before = adapt(params, batch).logits
    torch.compile(lambda p, b: adapt(p, b).loss, fullgraph=True, backend="aot_eager")(move(params, seed=3), batch)
    assert torch.equal(adapt(params, batch).logits, before)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.calls, self.seen = nn.Linear(8, 8), 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        return self.lin(x) * self.calls + len(self.seen)


def test_each_compiled_call_begins_with_what_the_model_held():
    model, x = Counts(), torch.randn(4, 8)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    compiled = torch.compile(lambda p, x: adapt(p, x), fullgraph=True, backend="eager")
    found = [compiled(params, x) for _ in range(3)] + [adapt(params, x)]  # no eager call is the first
    want = ll.build(model, ll.LoRAConfig(r=2))(params, x)
    assert all(torch.equal(y, want) for y in found)
    assert (model.calls, model.seen) == (0, [])


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_rows_of_a_compiled_mixed_batch_are_narrow_under_autocast(inside):
    adapt = ll.build(nn.Sequential(nn.Linear(8, 16)), ll.LoRAConfig(r=2))
    stacked, x = ll.stack([move(adapt.init(), seed=k) for k in (0, 1)]), torch.randn(4, 8)

    def narrow(s):
        with torch.autocast("cpu", torch.bfloat16):
            return adapt.mixed(s, x)

    if inside:
        y = torch.compile(narrow, fullgraph=True, backend="aot_eager")(stacked)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.compile(lambda s: adapt.mixed(s, x), fullgraph=True, backend="aot_eager")(stacked)
    torch.testing.assert_close(y, narrow(stacked), rtol=1e-2, atol=1e-2)  # of the same dtype, too


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.a(x).sin(), lambda x: self.b(x).cos(), (x,))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_branches_of_torch_cond_in_an_eager_call():
    model, x = Branches(), torch.randn(5, 6).abs()
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    merged = {**dict(model.named_parameters()), **adapt.merge(params)}
    for given in (x, -x):
        torch.testing.assert_close(adapt(params, given), torch.func.functional_call(model, merged, (given,)).detach())


def test_exported_mixed_batch_holds_no_operator_of_ours():
    """It was not to be loaded in a process without the adapt."""

    class Mixed(torch.nn.Module):
        def __init__(self, adapt):
            super().__init__()
            self.call = adapt.mixed

        def forward(self, stacked, x, index):
            return self.call(stacked, x, index)

    class Flat(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    x, index = torch.randn(4, 3, 8), torch.tensor([0, 1, 1, 0])
    adapt, flat = (ll.build(of(torch.nn.Linear(8, 8)), ll.LoRAConfig(r=2)) for of in (torch.nn.Sequential, Flat))
    stacked = ll.stack([move(adapt.init(seed)) for seed in (0, 1)])
    graph = torch.export.export(Mixed(adapt), (stacked, x, index))
    assert not [node for node in graph.graph.nodes if "lora_lite" in str(node.target)]
    torch.testing.assert_close(graph.module()(stacked, -x, 1 - index), adapt.mixed(stacked, -x, 1 - index))
    flat.mixed(stacked, x, index)
    with pytest.raises(ValueError, match='at "0" expected an input with a multiple of 4 rows'):
        torch.export.export(Mixed(flat), (stacked, x, index))


def test_errors_of_a_compiled_call_are_shown():
    """The compiler knows no notes on an error, and told of them in its place."""

    class Reads(nn.Linear):
        def forward(self, x):
            return x @ self.weight.t()

    adapt = ll.build(nn.Sequential(Reads(8, 8)), ll.LoRAConfig(r=2))
    stacked, x = ll.stack([adapt.init(seed) for seed in (0, 1)]), torch.randn(2, 8)
    with pytest.raises(torch._dynamo.exc.Unsupported, match='at "0" expected a target that is called with rows of the batch'):
        torch.compile(adapt.mixed, fullgraph=True, backend="eager")(stacked, x, torch.tensor([0, 1]))
