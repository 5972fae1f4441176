"""Kinds from outside the package: what a subclass of `FrozenQuantised` gives is all that a backend needs."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import CASES, assert_trees_equal, move


class _Opaque(torch.autograd.Function):
    """A product as many backends write it: it cannot run under torch.func."""

    @staticmethod
    def forward(ctx, x, q, scale):
        ctx.save_for_backward(q, scale)
        return x @ (q * scale[:, None]).t()

    @staticmethod
    def backward(ctx, grad):
        q, scale = ctx.saved_tensors
        return grad @ (q * scale[:, None]), None, None


class Int8(nn.Module):
    """A linear layer with a code of eight bits for each weight and a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer("q", (linear.weight.detach() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        y = _Opaque.apply(x, self.q, self.scale)
        return y if self.bias is None else y + self.bias


class FrozenInt8(ll.FrozenQuantised):
    @classmethod
    def fits(cls, layer):
        return isinstance(layer, Int8)

    def dequantise(self, dtype):
        return (self.layer.q * self.layer.scale[:, None]).to(dtype)


class FusedInt8(FrozenInt8):
    """Products of its own, without the dense weight."""

    calls: list[str] = []  # noqa: RUF012

    def product(self, x):
        self.calls.append("product")
        return (x @ self.layer.q.t().to(x.dtype)) * self.layer.scale

    def transpose_product(self, y):
        self.calls.append("transpose")
        return (y * self.layer.scale) @ self.layer.q.to(y.dtype)


class ProductsOnly(FusedInt8):
    gives = frozenset({"output", "project", "vectors", "matmul"})


def pair():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24, bias=False)).eval().requires_grad_(False)
    packed = nn.Sequential(Int8(dense[0]), nn.Tanh(), Int8(dense[2])).eval()
    for k in (0, 2):
        dense[k].weight.data = packed[k].q * packed[k].scale[:, None]
    return packed, dense


def close(got, want):
    for a, b in zip(ll.tree_leaves(got), ll.tree_leaves(want)):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


VARIANTS = {row.cfg.name: row.cfg for row in CASES if row.cfg.adapts == "linear"}


@pytest.mark.parametrize("kind", [FrozenInt8, FusedInt8])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_what_it_does_on_the_dense_base(name, kind):
    cfg, (packed, dense) = VARIANTS[name], pair()
    given = {"calibration": [torch.randn(100, 24)]} if cfg.calibrated else {}
    given |= {"original": {f"{k}.weight": dense[k].weight + 0.01 for k in (0, 2)}} if cfg.original else {}
    given |= {"loss": lambda output, batch: output.square().mean()} if name == "lora_ga" else {}
    cfg = cfg if not cfg.calibrated else replace(cfg, target_names="0")  # one layer, whose input is the same to the last digit
    cfg = replace(cfg, target_names=r"^\d$") if cfg.tied else cfg  # a model without an embedding
    adapt, twin = ll.build(packed, cfg, kinds=(kind,), **given), ll.build(dense, cfg, **given)
    params, x = move(twin.init()), torch.randn(5, 24)
    got, want = ({"": {"": a(params, x) - a.base(x)}} for a in (adapt, twin))
    close(got, want)
    close(*(torch.func.grad(lambda p, a=a: (a(p, x) - a.base(x)).square().sum())(params) for a in (adapt, twin)))


def test_layers_that_are_no_targets_run_their_kind_too():
    packed, dense = pair()
    x = torch.randn(5, 24)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: packed(x).sum())(x)
    cfg = ll.LoRAConfig(r=2, target_names="0")
    adapt, twin = ll.build(packed, cfg, kinds=(FrozenInt8,)), ll.build(dense, cfg)
    params = move(adapt.init())
    close(*(torch.vmap(torch.func.grad(lambda p, x, a=a: a(p, x).square().sum()), (None, 0))(params, x) for a in (adapt, twin)))


def test_fused_products_are_used_for_values_and_gradients():
    packed, _ = pair()
    adapt = ll.build(packed, ll.LoRAConfig(r=2), kinds=(FusedInt8,))
    params = move(adapt.init())
    FusedInt8.calls.clear()
    ll.value_and_grad(lambda p: adapt(p, torch.randn(5, 24)).square().sum())(params)
    assert FusedInt8.calls == ["product", "product", "transpose"]


def test_compiles():
    packed, dense = pair()
    adapt, twin = ll.build(packed, ll.LoRAConfig(r=2), kinds=(FrozenInt8,)), ll.build(dense, ll.LoRAConfig(r=2))
    params, x = move(adapt.init()), torch.randn(5, 24)
    torch.compiler.reset()
    step = torch.compile(torch.func.grad(lambda p: adapt(p, x).square().sum()), fullgraph=True, backend="aot_eager")
    close(step(params), torch.func.grad(lambda p: twin(p, x).square().sum())(params))


def test_targets_saving_loading_and_merging(tmp_path):
    packed, dense = pair()
    assert [str(t) for t in ll.find_targets(packed, ll.LoRAConfig(), kinds=(FrozenInt8,))] == [
        str(t) for t in ll.find_targets(dense, ll.LoRAConfig())
    ]
    adapt, x = ll.build(packed, ll.PiSSAConfig(r=2), kinds=(FrozenInt8,)), torch.randn(5, 24)
    params = move(adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(copy.deepcopy(packed), tmp_path / "a.safetensors", kinds=[FrozenInt8])
    assert_trees_equal(read, params)
    assert torch.equal(again(read, x), adapt(params, x))
    with pytest.raises(ValueError, match='"0": expected a linear layer, found Int8'):
        ll.load(packed, tmp_path / "a.safetensors")
    dense.load_state_dict(adapt.merge(params), strict=False)
    close({"": {"": dense(x)}}, {"": {"": adapt(params, x)}})


def test_what_a_kind_does_not_offer_is_refused():
    packed, _ = pair()
    ll.build(packed, ll.LoRAConfig(r=2), kinds=(ProductsOnly,))
    with pytest.raises(ValueError, match=r'PiSSAConfig cannot adapt "0" \(ProductsOnly\).*calls `W\.dense.*The kind gives less\. L'):
        ll.build(packed, ll.PiSSAConfig(r=2), kinds=(ProductsOnly,))


class Unready(FrozenInt8):
    @classmethod
    def fault(cls, layer):
        return "has no codes yet: run pack(layer)"


def test_a_layer_that_its_kind_cannot_read_is_refused_by_name():
    with pytest.raises(ValueError, match=r'"0" \(Int8\) has no codes yet: run pack\(layer\)'):
        ll.build(pair()[0], ll.LoRAConfig(r=2), kinds=(Unready,))


@pytest.mark.parametrize("kinds", [FrozenInt8, (Int8,), "int8", (FrozenInt8(nn.Linear(2, 2)),), None])
def test_kinds_must_be_a_sequence_of_kinds(kinds):
    for call in (ll.build, ll.find_targets):
        with pytest.raises(TypeError, match=r"kinds: expected a sequence of subclasses of ll.Kind.*Write kinds=\(ItsKind,\)"):
            call(pair()[0], ll.LoRAConfig(), kinds=kinds)


def test_without_its_kind_a_layer_is_unknown():
    with pytest.raises(ValueError, match=r"found none in Sequential.*kinds=\(ItsKind,\)"):
        ll.build(pair()[0], ll.LoRAConfig())


def test_a_subclass_that_gives_nothing_says_what_it_must():
    with pytest.raises(
        NotImplementedError, match=r"FrozenQuantised\.classes is not set, and FrozenQuantised\.fits\(layer\) -> bool is not defined"
    ):
        ll.build(pair()[0], ll.LoRAConfig(), kinds=(ll.FrozenQuantised,))
    empty = type("Empty", (FrozenInt8,), {"dequantise": ll.FrozenQuantised.dequantise})
    adapt = ll.build(pair()[0], ll.LoRAConfig(), kinds=(empty,))
    with pytest.raises(NotImplementedError, match=r"Empty\.dequantise\(dtype\) -> \(o, i\) is not defined"):
        adapt.base(torch.randn(2, 24))
