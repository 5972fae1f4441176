"""Quantised bases: a variant computes what it does on the dequantised weights, whatever transform runs; nothing dense is kept."""

import copy

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import assert_trees_equal, move
from common.measure import peak_bytes

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
from quantised_models import BACKENDS, quantised_layer, twins  # noqa: E402

CFGS = (ll.LoRAConfig(r=4), ll.PiSSAConfig(r=4), ll.DoRAConfig(r=4), ll.HRAConfig(r=4), ll.IA3Config())


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64, bias=False)).eval()


def adapts(model, backend, cfg, **options):
    packed, dense = twins(model, backend)
    return ll.build(packed, cfg, **options), ll.build(dense, cfg, **options)


def close(got, want, tolerance=1e-5):
    got, want = ([t.detach() for t in torch.utils._pytree.tree_leaves(tree)] for tree in (got, want))
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))
    assert max(float(b.abs().max()) for b in want) > 1e-2, "nothing to compare"


def compiled(f):
    torch.compiler.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def autograd(f, params, x):
    params = ll.tree_map(lambda t: t.detach().requires_grad_(), params)
    return torch.autograd.grad(f(params, x), ll.tree_leaves(params))


TRANSFORMS = {
    "value_and_grad": lambda f: lambda p, x: ll.value_and_grad(f)(p, x)[1],
    "grad": torch.func.grad,
    "grad to the input": lambda f: torch.func.grad(f, argnums=1),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(f), in_dims=(None, 0)),
    "vmap along the last axis": lambda f: lambda p, x: torch.vmap(lambda row: f(p, row), in_dims=-1)(x.movedim(0, -1)),
    "vmap over params": lambda f: lambda p, x: torch.vmap(f, in_dims=(0, None))(ll.stack([p, ll.tree_map(lambda t: 0.5 * t, p)]), x),
    "jvp": lambda f: lambda p, x: torch.func.jvp(f, (p, x), (p, x.sin())),
    "grad of jvp": lambda f: torch.func.grad(lambda p, x: torch.func.jvp(lambda t: f(p, t), (x,), (x.cos(),))[1]),
    "jvp of grad": lambda f: lambda p, x: torch.func.jvp(lambda t: torch.func.grad(f)(p, t), (x,), (x.cos(),))[1],
    "jacrev": lambda f: lambda p, x: torch.func.jacrev(lambda t: f(p, t))(x),
    "compile": compiled,
    "compile of grad": lambda f: compiled(torch.func.grad(f)),
    "compile of vmap": lambda f: compiled(torch.vmap(f, in_dims=(None, 0))),
    "compile of jacrev": lambda f: compiled(lambda p, x: torch.func.jacrev(lambda t: f(p, t))(x)),
    "compile of jvp of grad": lambda f: compiled(TRANSFORMS["jvp of grad"](f)),
    "autograd of compile": lambda f: lambda p, x: autograd(compiled(f), p, x),
    "autograd of compile of vmap": lambda f: lambda p, x: autograd(compiled(lambda p, x: torch.vmap(f, (None, 0))(p, x).sum()), p, x),
}


def eager(f, monkeypatch):
    """Return a transform that leaves compilation out."""

    def run(*args):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", lambda f, **options: f)
            return f(*args)

    return run


@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_transform_gives_what_it_gives_on_the_dequantised_base(backend, how, monkeypatch):
    x = torch.randn(3, 2, 64)
    cfgs = [ll.PiSSAConfig(r=4), ll.DoRAConfig(r=4)]
    if "jvp of grad" in how:
        cfgs = cfgs[:1]
    elif "compile" in how:  # which takes seconds: each transform with both, and each base
        cfgs = [cfgs[(BACKENDS.index(backend) + list(TRANSFORMS).index(how)) % 2]]
    for cfg in cfgs:
        packed, dense = adapts(mlp(), backend, cfg)
        params = move(dense.init())

        def run(adapt, transform, params=params):
            return transform(lambda p, x: adapt(p, x).square().sum())(params, x)

        close(run(packed, TRANSFORMS[how]), eager(run, monkeypatch)(dense, TRANSFORMS[how]))


@pytest.mark.parametrize("cfg", CFGS, ids=lambda cfg: cfg.name)
@pytest.mark.parametrize("backend", ["nf4-nested", "8-bit"])
class TestWholeModel:
    def both(self, tiny, backend, cfg, **options):
        model, batch = tiny("llama", hidden_size=64, intermediate_size=128)
        packed, dense = adapts(model, backend, cfg, **options)
        return packed, dense, move(dense.init()), batch

    def test_step(self, tiny, backend, cfg):
        packed, dense, params, batch = self.both(tiny, backend, cfg)
        close(packed(params, batch).logits - packed.base(batch).logits, dense(params, batch).logits - dense.base(batch).logits)
        close(*(ll.value_and_grad(lambda p, a=a: 100 * a(p, batch).loss)(params) for a in (packed, dense)))

    def test_mixed_batch(self, tiny, backend, cfg):
        packed, dense, params, batch = self.both(tiny, backend, cfg)
        members = ll.stack([params, ll.tree_map(lambda t: -0.5 * t, params)])
        close(*(a.mixed(members, batch, [1, 0]).logits for a in (packed, dense)))
        close(*(torch.func.grad(lambda p, a=a: 100 * a.mixed(p, batch, [1, 0]).loss)(members) for a in (packed, dense)))

    def test_remat(self, tiny, backend, cfg):
        packed, dense, params, batch = self.both(tiny, backend, cfg, remat=r"layers\.\d+$")
        for grad in (lambda f: lambda p: ll.value_and_grad(f)(p)[1], torch.func.grad):
            close(*(grad(lambda p, a=a: 100 * a(p, batch).loss)(params) for a in (packed, dense)))

    def test_identity_save_and_load(self, tiny, backend, cfg, tmp_path):
        packed, _, params, batch = self.both(tiny, backend, cfg)
        model, _ = tiny("llama", hidden_size=64, intermediate_size=128)
        base = packed.base(batch).logits
        if cfg.identity == 0.0:
            assert torch.equal(packed(packed.init(), batch).logits, base)
        ll.save(packed, params, tmp_path / "a.safetensors")
        again, read = ll.load(twins(model, backend)[0], tmp_path / "a.safetensors")
        assert_trees_equal(read, params)
        assert torch.equal(again(read, batch).logits, packed(params, batch).logits)


@pytest.mark.parametrize("backend", ["nf4"])  # a layer of 8 bits compiles above, and takes as long again
def test_compiled_whole_model(tiny, backend):
    model, batch = tiny("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    packed, dense = adapts(model, backend, ll.LoRAConfig(r=4))
    params = move(dense.init())
    close(compiled(lambda p: packed(p, batch).logits)(params), dense(params, batch).logits)
    close(
        compiled(torch.func.grad(lambda p: 100 * packed(p, batch).loss))(params),
        torch.func.grad(lambda p: 100 * dense(p, batch).loss)(params),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dense_weight_is_kept_for_the_backward_pass(backend):
    packed, dense = adapts(mlp(), backend, ll.LoRAConfig(r=4))

    def largest_kept(adapt):
        kept = []
        params = ll.tree_map(lambda t: t.requires_grad_(), adapt.init())
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t):
            loss = adapt(params, torch.randn(2, 64)).sum()
        assert loss.requires_grad
        return max(kept)

    assert largest_kept(dense) >= 4 * 64 * 96, "a dense layer keeps its weight, so this test sees it"
    assert largest_kept(packed) < 64 * 96


STEPS = {
    "autograd": lambda a, wrap: (lambda f: lambda p, x: autograd(f, p, x))(wrap(lambda p, x: a(p, x).sum())),
    "autograd of a mixed batch": lambda a, wrap: (lambda f: lambda p, x: autograd(f, ll.stack([p, p]), x))(
        wrap(lambda p, x: a.mixed(p, x).sum())
    ),
    "grad": lambda a, wrap: wrap(torch.func.grad(lambda p, x: a(p, x).sum())),
    "value_and_grad": lambda a, wrap: wrap(ll.value_and_grad(lambda p, x: a(p, x).sum())),
}


@pytest.mark.parametrize(
    ("backend", "dtype", "how"),
    [
        *(("nf4", torch.float32, how) for how in STEPS),
        ("nf4", torch.bfloat16, "value_and_grad"),
        ("8-bit", torch.float32, "value_and_grad"),
    ],
)
def test_compiled_step_keeps_no_dense_weights(backend, dtype, how):
    layers = [quantised_layer(nn.Linear(256, 256), backend, dtype) for _ in range(8)]
    adapt, x = ll.build(nn.Sequential(*layers), ll.LoRAConfig(r=2)), torch.randn(2, 256, dtype=dtype)
    step, params = STEPS[how](adapt, compiled), move(adapt.init())
    dense = 8 * 256 * 256 * dtype.itemsize
    assert peak_bytes(lambda: step(params, x)) < dense / 2
    with torch.compiler.set_stance("fail_on_recompile"):
        got = step(move(adapt.init(seed=1), seed=1), x)
    close(got, STEPS[how](adapt, lambda f: f)(move(adapt.init(seed=1), seed=1), x), 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_compute_dtype_is_the_layers(compute, given):
    layer = quantised_layer(nn.Linear(64, 96), "nf4", compute).train()  # in training mode bitsandbytes takes no other kernel
    model, x = nn.Sequential(layer), torch.randn(5, 64, dtype=given)
    base = ll.build(model, ll.LoRAConfig(r=2)).base(x).detach()
    own = copy.deepcopy(model)(x).detach()
    assert base.dtype == own.dtype == given
    assert float((base - own).abs().max()) <= (2e-2 if torch.bfloat16 in (compute, given) else 1e-6)
    if given == torch.float32 and compute == torch.bfloat16:
        exact = ll.build(nn.Sequential(quantised_layer(nn.Linear(64, 96), "nf4")), ll.LoRAConfig(r=2)).base(x)
        assert not torch.equal(base, exact), "computed in bfloat16, as the layer says"


def test_float64_inputs_are_computed_in_float64():
    layer = quantised_layer(nn.Linear(64, 96), "nf4", None).double()
    W = ll.build(nn.Sequential(layer), ll.LoRAConfig(r=2))
    x = torch.randn(2, 64, dtype=torch.float64)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    assert float((W.base(x) - x @ weight.t() - layer.bias).detach().abs().max()) < 1e-12


@pytest.mark.parametrize("backend", ["nf4", "8-bit"])
def test_autocast_leaves_the_layers_compute_dtype(backend):
    adapt = ll.build(nn.Sequential(quantised_layer(nn.Linear(64, 96), backend)), ll.LoRAConfig(r=2))
    x = torch.randn(2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapt.base(x)
    assert torch.equal(inside, adapt.base(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_reads_a_quantised_layer(backend):
    packed, dense = twins(nn.Sequential(nn.Linear(64, 96)), backend)
    W = ll.build(packed, ll.LoRAConfig(r=2))._replicas.main.bindings[0][1].W
    x = torch.randn(3, 64)
    assert (W.in_features, W.out_features, W.device.type, W.dtype) == (64, 96, "cpu", torch.float32)
    assert set(W.gives) >= {"output", "project", "vectors", "matmul", "dense"}
    assert torch.equal(W.dense(), dense[0].weight)
    assert W.dense(torch.float64).dtype == torch.float64
    assert torch.equal(W.bias, dense[0].bias)
    assert torch.allclose(W(x), dense(x), atol=1e-6)
    assert torch.allclose(W.matmul(x), dense(x) - dense[0].bias, atol=1e-6)


@pytest.mark.parametrize("backend", ["nf4-nested", "8-bit"])
def test_merged_weights_are_dense(tiny, backend):
    model, batch = tiny("llama", hidden_size=64, intermediate_size=128)
    packed, dense = adapts(model, backend, ll.DoRAConfig(r=4))
    params = move(dense.init())
    merged = packed.merge(params)
    assert {t.dtype for t in merged.values()} == {torch.float32}
    _, plain = twins(model, backend)
    assert plain.load_state_dict(merged, strict=False).unexpected_keys == []
    close(plain(**batch).logits - packed.base(batch).logits, packed(params, batch).logits - packed.base(batch).logits)
    errors = packed.merge_error(params, merged)
    assert set(errors) == set(params)
    assert max(errors.values()) < 1e-5
    rounded = packed.merge_error(params, packed.merge(params, torch.bfloat16))
    assert min(rounded.values()) > 1e-3


def test_merge_error_measures_what_is_missed():
    model = nn.Sequential(nn.Linear(6, 4))
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    merged = adapt.merge(params)
    assert adapt.merge_error(params, {"0.weight": model[0].weight, "0.bias": model[0].bias})["0"] == pytest.approx(1.0, abs=1e-5)
    half = {"0.weight": (model[0].weight + merged["0.weight"]) / 2, "0.bias": merged["0.bias"]}
    assert adapt.merge_error(params, half)["0"] == pytest.approx(0.5, abs=1e-4)
    start = adapt.init()
    assert adapt.merge_error(start, adapt.merge(start))["0"] < 1e-6
    for wrong in ({"0.weight": merged["0.weight"].t(), "0.bias": merged["0.bias"]}, {"0.bias": merged["0.bias"]}):
        with pytest.raises(ValueError, match=r'expected merged tensors "0.weight" of shape \(4, 6\), found none or others'):
            adapt.merge_error(params, wrong)
