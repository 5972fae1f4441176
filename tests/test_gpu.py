"""On a GPU every variant computes what it computes on a CPU. Collected with `--device cuda` alone."""

import copy

import pytest
import torch

import lora_lite as ll
from cases import (
    CASES,
    FIRST,
    FIVE,
    TOLERANCE,
    Blocks,
    assert_gradients_equal,
    assert_trees_equal,
    build_any,
    by_name,
    move,
    named,
)
from common.captured import Captured
from quantised_models import BACKENDS, twins


def blocks(dtype=torch.float64):
    torch.manual_seed(0)
    return Blocks().to(dtype).eval(), torch.randn(4, 5, 48, dtype=dtype)


def on(device, tree):
    return ll.tree_map(lambda t: t.to(device), tree)


def as_dtype(tree, dtype):
    return ll.tree_map(lambda t: t.to(dtype), tree)


def gradients(adapt, params, x):
    return ll.value_and_grad(lambda p: adapt(p, x).square().sum())(params)[1]


def assert_close_to_largest(got, want, tolerance=1e-5):
    largest = max(float(leaf.abs().max()) for leaf in ll.tree_leaves(want))
    assert_trees_equal(*(ll.tree_map(lambda leaf: leaf / largest, tree) for tree in (got, want)), tolerance)


def carried(adapt, params, model, folder):
    """Save an adapter, and load it on another model: with its constants, whose signs another SVD would choose anew."""
    ll.save(adapt, params, folder / "a.safetensors")
    return ll.load(model, folder / "a.safetensors")


def batches(x):
    return [x[:2], x[2:]]


@pytest.mark.parametrize("row", CASES, ids=named)
def test_saved_on_a_cpu_it_computes_the_same_on_a_gpu(row, device, tmp_path):
    model, x = blocks()
    adapt = build_any(model, row.cfg, batches(x))
    params = move(as_dtype(adapt.init(), torch.float64))
    there, read = carried(adapt, params, copy.deepcopy(model).to(device), tmp_path)
    assert {leaf.device.type for leaf in ll.tree_leaves(read)} == {"cuda"}
    moved = on(device, params)
    got, want = there(moved, x.to(device)) - there.base(x.to(device)), adapt(params, x) - adapt.base(x)
    assert float(want.abs().max()) > 1e-4, "an adapter that does nothing proves nothing"
    assert torch.allclose(got.cpu(), want, rtol=0, atol=1e-5 * float(want.abs().max()))  # constants are saved in float32
    got, want = on("cpu", gradients(there, moved, x.to(device))), gradients(adapt, params, x)
    assert_close_to_largest(got, want)


@pytest.mark.parametrize("row", [row for row in CASES if row.cfg.name in ("antipasto", "clover", "oft")], ids=named)
def test_long_rows(row, device, tmp_path):
    model, _ = blocks()
    x = torch.randn(3, 256, 48, dtype=torch.float64)  # rows this long are multiplied apart there
    adapt = build_any(model, row.cfg, batches(x))
    params = move(as_dtype(adapt.init(), torch.float64))
    there, _ = carried(adapt, params, copy.deepcopy(model).to(device), tmp_path)
    got, want = there(on(device, params), x.to(device)) - there.base(x.to(device)), adapt(params, x) - adapt.base(x)
    assert torch.allclose(got.cpu(), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert_close_to_largest(on("cpu", gradients(there, on(device, params), x.to(device))), gradients(adapt, params, x))


@pytest.mark.parametrize("row", CASES, ids=named)
def test_built_on_a_gpu(row, device):
    model, x = blocks()
    model, x = model.to(device), x.to(device)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapt = build_any(model, row.cfg, batches(x))
    start = adapt.init(seed=0)
    assert {leaf.device.type for leaf in ll.tree_leaves(start)} == {"cuda"}
    assert_trees_equal(start, adapt.init(seed=0))
    if row.cfg.identity == 0.0:
        assert torch.equal(adapt(start, x), adapt.base(x))
    params = move(as_dtype(start, torch.float64))
    assert_gradients_equal(gradients(adapt, params, x), torch.func.grad(lambda p: adapt(p, x).square().sum())(params), torch.float64)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("row", [row for row in CASES if row.cfg.adapts != "module"], ids=named)
def test_mixed_rows_equal_a_loop(row, device):
    model, x = blocks()
    model, x = model.to(device), x.to(device)
    adapt = build_any(model, row.cfg, batches(x))
    trees = [move(as_dtype(adapt.init(seed=k), torch.float64), seed=k) for k in range(len(x))]
    loop = torch.cat([adapt(tree, x[k : k + 1]) for k, tree in enumerate(trees)])
    assert torch.allclose(adapt.mixed(ll.stack(trees), x), loop, rtol=0, atol=1e-9 * float(loop.abs().max()))


@pytest.mark.parametrize("row", CASES, ids=named)
def test_bfloat16_follows_float32(row, device, tmp_path):
    model, x = blocks(torch.float32)
    model, x = model.to(device), x.to(device)
    adapt = build_any(model, row.cfg, batches(x))
    params = move(adapt.init(), scale=0.05)
    low, read = carried(adapt, params, copy.deepcopy(model).bfloat16(), tmp_path)
    got, want = low(read, x.bfloat16()).float(), adapt(params, x)
    assert float((got - want).abs().max()) <= 2 * TOLERANCE[torch.bfloat16] * float(want.abs().max())


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # the compiler's advice
@pytest.mark.parametrize("cfg", [*FIVE, ll.OFTConfig(block_size=8), ll.HRAConfig(r=4), ll.VeRAConfig(r=8)], ids=by_name)
def test_compiled_equals_eager(cfg, device):
    model, x = blocks(torch.float32)
    model, x = model.to(device), x.to(device)
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    torch.compiler.reset()
    compiled = torch.compile(torch.func.grad(lambda p: adapt(p, x).square().sum()), fullgraph=True)
    assert_gradients_equal(compiled(params), gradients(adapt, params, x), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [row for row in CASES if row.cfg.adapts == "linear"], ids=named)
def test_quantised_equals_dequantised(row, backend, device, tmp_path):
    torch.manual_seed(0)
    model, x = Blocks(64, 128).to(device).eval(), torch.randn(4, 5, 64, device=device)
    packed, dense = twins(model, backend)
    adapt = build_any(dense, row.cfg, batches(x))
    params = move(adapt.init())
    again, _ = carried(adapt, params, packed, tmp_path)
    if not row.cfg.original:  # LoftQ's are those of the model before it was quantised
        assert build_any(packed, row.cfg, batches(x)).shapes == adapt.shapes
    got, want = again(params, x) - again.base(x), adapt(params, x) - adapt.base(x)
    assert torch.allclose(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    want = gradients(adapt, params, x)
    rounded = 1e-2 if row.cfg.dtype == torch.bfloat16 else max(1e-5, 8 * own_rounding(adapt, params, x, dense, want, tmp_path))
    assert_close_to_largest(gradients(again, params, x), want, rounded)  # a gradient has its param's dtype


def own_rounding(adapt, params, x, model, found, folder):
    """Return how far gradients in float32 are from those in float64, by the largest: a scalar's, as GLoRA's, is a sum that cancels."""
    exact, _ = carried(adapt, params, copy.deepcopy(model).double(), folder)
    want = gradients(exact, as_dtype(params, torch.float64), x.double())
    largest = max(float(leaf.abs().max()) for leaf in ll.tree_leaves(want))
    rounding = max(float((a - b).abs().max()) for a, b in zip(ll.tree_leaves(found), ll.tree_leaves(want), strict=True)) / largest
    assert rounding < 1e-3
    return rounding


def test_dropout_with_remat_draws_the_same(tiny, device):
    model, batch = tiny("llama", num_hidden_layers=3)
    cfg = ll.LoRAConfig(r=4, dropout=0.3)
    plain, remat = ll.build(model, cfg).train(), ll.build(model, cfg, remat=r"layers\.\d+$").train()
    params, results = move(plain.init()), []
    for adapt in (plain, remat):
        torch.manual_seed(7)
        results.append(ll.value_and_grad(lambda p, a=adapt: a(p, batch).loss)(params)[1])
    assert_trees_equal(results[1], results[0], 1e-6)


@pytest.mark.parametrize("row", FIRST, ids=named)
def test_a_captured_step_gives_the_gradients_of_each_batch(row, device):
    model, x = blocks(torch.float32)
    adapt = build_any(model.to(device), row.cfg, batches(x.to(device)))
    params = move(adapt.init())

    def step(params, rows):
        return gradients(adapt, params, rows["x"])

    captured = Captured(step)
    for shape in ((4, 5, 48), (4, 5, 48), (3, 7, 48), (4, 5, 48)):
        rows = {"x": torch.randn(shape, device=device)}
        assert_close_to_largest(captured(params, rows), step(params, rows))
        with torch.no_grad():
            ll.tree_map(lambda p: p.add_(0.01 * torch.randn_like(p)), params)  # as an optimiser moves them
    assert not captured.failed


def test_a_step_that_waits_for_the_gpu_is_called_as_it_is(device):
    captured = Captured(lambda params, rows: params * float(rows["x"].sum()))
    for value in (1.0, 2.0):
        x = torch.full((3,), value, device=device)
        assert captured(torch.ones(2, device=device), {"x": x}).tolist() == [3 * value] * 2
    assert "captur" in captured.failed
    assert torch.randn(3, device=device).isfinite().all(), "random numbers are drawn as before"
