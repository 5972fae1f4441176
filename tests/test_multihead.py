"""Weights that are read and never called: `nn.MultiheadAttention`'s projections and bare parameters, against PEFT and merged models."""

import copy
import dataclasses
import functools

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_lite as ll
from cases import assert_trees_equal, by_name, move
from lora_lite.layers.parameter import ParameterKind

TOLERANCE = 1e-5
ATTENTION = ll.LoRAConfig(r=2, alpha=3.0, target_names=(r"in_proj_weight$", r"out_proj$"))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, **options)

    def forward(self, x, y=None, **options):
        return self.attn(x, x if y is None else y, x if y is None else y, **options)[0]


def _close(got, want):
    got, want = got.detach(), want.detach()
    assert want.abs().max() > 1e-4
    assert float((got - want).abs().max()) <= TOLERANCE * float(want.abs().max())


def _masked(x):
    mask = torch.zeros(x.shape[0], x.shape[1], dtype=torch.bool)
    mask[1, 3:] = True
    return {"key_padding_mask": mask, "need_weights": False}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("options", [lambda x: {}, _masked], ids=["whole", "padded"])
def test_attention_is_pefts(options, bias):
    """PEFT 0.21 merges the output projection's update twice in a forward, once out of autograd's sight: ours is held to it at twice `B`."""
    torch.manual_seed(0)
    model, x = Attention(batch_first=True, bias=bias).eval(), torch.randn(2, 5, 16)
    adapt = ll.build(model, ATTENTION)
    assert [(t.path, t.o, t.i) for t in adapt.targets] == [("attn.in_proj_weight", 48, 16), ("attn.out_proj", 16, 16)]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["attn"]))
    outer = theirs.base_model.model.attn
    inner = outer.base_layer.out_proj
    leaves = {path: {"A": m.lora_A["default"].weight, "B": m.lora_B["default"].weight} for path, m in zip(adapt.shapes, (outer, inner))}
    for leaf in ll.tree_leaves(leaves):
        nn.init.normal_(leaf, std=0.5)
    params = ll.tree_map(lambda leaf: leaf.detach().clone(), leaves)
    params["attn.out_proj"]["B"] *= 2
    weights = torch.randn(2, 5, 16)
    out = theirs(x, **options(x))
    (out * weights).sum().backward()
    _close(adapt(params, x, **options(x)) - model(x, **options(x)), out - model(x, **options(x)))
    for take in (torch.func.grad, lambda f: lambda p: ll.value_and_grad(f)(p)[1]):
        grads = take(lambda p: (adapt(p, x, **options(x)) * weights).sum())(params)
        grads["attn.out_proj"]["A"] /= 2
        for path, names in leaves.items():
            for name, leaf in names.items():
                _close(grads[path][name], leaf.grad)


def test_packed_projection_is_taken_only_where_it_is_named():
    paths = [t.path for t in ll.find_targets(nn.TransformerEncoderLayer(16, 2, 32), ll.LoRAConfig())]
    assert paths == ["self_attn.out_proj", "linear1", "linear2"]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])  # torch's fused attention, whose sums have another order
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"kdim": 12, "vdim": 12}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_starts_at_the_base_model_and_merges(options, grad, fused, monkeypatch):
    torch.manual_seed(0)
    same = functools.partial(torch.testing.assert_close, **({"rtol": 1e-6, "atol": 1e-6} if fused else {"rtol": 0, "atol": 0}))
    model = Attention(**options).eval().requires_grad_(False)  # by a weight with a gradient torch multiplies in another way
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", fused)
    x = torch.randn(2, 5, 16)
    batch = (x, torch.randn(2, 5, 12)) if "kdim" in options else (x,)
    names = (r"[qkv]_proj_weight$", r"out_proj$") if "kdim" in options else ATTENTION.target_names
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=names))
    assert len(adapt.targets) == (4 if "kdim" in options else 2)
    with torch.set_grad_enabled(grad):
        same(adapt(adapt.init(seed=0), batch), model(*batch))
        params = move(adapt.init(seed=0), scale=0.5)
        got = adapt(params, batch)
    state = adapt.merge(params)
    assert set(state) <= set(model.state_dict())
    merged = copy.deepcopy(model)
    merged.load_state_dict(state, strict=False)
    assert (got - model(*batch)).abs().max() > 1e-2
    torch.testing.assert_close(got - model(*batch), merged(*batch) - model(*batch), rtol=1e-4, atol=1e-5)
    same(adapt.base(batch), model(*batch))


def test_encoder_is_adapted_in_every_part_and_remat_gives_the_same(tmp_path):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    cfg = ll.LoRAConfig(r=2, target_names=(r"in_proj_weight$", r"out_proj$", r"linear\d$"))
    plain, lean = ll.build(model, cfg), ll.build(model, cfg, remat=r"layers\.\d+$")
    assert len(plain.targets) == 8
    params = move(plain.init(seed=0))
    weights = torch.randn(2, 5, 16)
    want = ll.value_and_grad(lambda p: (plain(p, x) * weights).sum())(params)[1]
    assert all(leaf.abs().max() > 0 for leaf in ll.tree_leaves(want))
    assert_trees_equal(ll.value_and_grad(lambda p: (lean(p, x) * weights).sum())(params)[1], want, 1e-5)
    ll.save(plain, params, tmp_path / "a.safetensors")
    again, read = ll.load(copy.deepcopy(model), tmp_path / "a.safetensors")
    assert torch.equal(again(read, x), plain(params, x))
    module = plain.module(params)
    with torch.no_grad():  # the module's params would keep torch's fused attention off
        assert torch.equal(module(x), plain(params, x))
    assert_trees_equal(plain.params(module), params)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's fused attention has no rule for vmap
def test_vmap_over_params_is_a_loop():
    model, x = Attention(batch_first=True).eval(), torch.randn(2, 5, 16)
    adapt = ll.build(model, ATTENTION)
    members = [move(adapt.init(seed=k), seed=k) for k in range(2)]
    each = torch.vmap(adapt, in_dims=(0, None))(ll.stack(members), x)
    for k, member in enumerate(members):
        torch.testing.assert_close(each[k], adapt(member, x), rtol=1e-5, atol=1e-6)


def test_mixed_batches_and_dropout_are_refused():
    model, x = Attention(batch_first=True), torch.randn(2, 5, 16)
    adapt = ll.build(model, ATTENTION)
    with pytest.raises(ValueError, match=r'at "attn.(out_proj|in_proj_weight)" expected a target that is called with rows'):
        adapt.mixed(ll.stack([adapt.init()]), x)
    with pytest.raises(ValueError, match=r"it drops inputs.*without dropout"):
        ll.build(model, ll.LoRAConfig(r=2, dropout=0.1, target_names="in_proj_weight"))
    adapt = ll.build(model, ll.LoKrConfig(r=2, module_dropout=0.1, target_names="out_proj")).train()
    with pytest.raises(ValueError, match=r"LoKrConfig has no call to drop in\. Set module_dropout to 0"):
        adapt(adapt.init(), x)


class Bare(nn.Module):
    """A module with a matrix and a stack of matrices of its own."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 8))
        self.experts = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x):
        h = F.linear(x, self.mix)
        return sum(torch.tanh(F.linear(h, self.experts[k])) for k in range(3))


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.bare = Bare()

    def forward(self, x):
        return self.bare(x)


@pytest.mark.filterwarnings("ignore:.*target_parameters.*")
@pytest.mark.parametrize("names", [("mix",), ("experts",), ("mix", "experts")], ids="+".join)
def test_bare_parameters_are_pefts(names):
    torch.manual_seed(0)
    model, x = Around(), torch.randn(4, 8)
    adapt = ll.build(model, ll.LoRAConfig(r=2, alpha=3.0, target_names=tuple(rf"bare\.{n}$" for n in names)))
    assert {t.kind for t in adapt.targets} == {ParameterKind}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=[f"bare.{n}" for n in names])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped = {m.parameter_name: m for m in theirs.modules() if hasattr(m, "parameter_name")}
    assert set(wrapped) == set(names)

    def ours(name, A, B):
        if name == "mix":
            return {"A": A, "B": B}
        return {"A": A.reshape(3, -1, A.shape[-1]), "B": B.reshape(B.shape[0], -1, 3).permute(2, 0, 1)}

    leaves = {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in wrapped.items()}
    for pair in leaves.values():
        for leaf in pair:
            nn.init.normal_(leaf, std=0.3)
    params = {t.path: ours(t.path[5:], *(leaf.detach().clone() for leaf in leaves[t.path[5:]])) for t in adapt.targets}
    out = theirs(x)
    out.square().sum().backward()
    _close(adapt(params, x) - model(x), out - model(x))
    grads = torch.func.grad(lambda p: adapt(p, x).square().sum())(params)
    for name, pair in leaves.items():
        for leaf, want in ours(name, *(p.grad for p in pair)).items():
            _close(grads[f"bare.{name}"][leaf], want)
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(merged(x), adapt(params, x), rtol=1e-4, atol=1e-5)


def test_parameter_of_the_model_itself():
    model, x = Bare(), torch.randn(4, 8)
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=r"^mix$"))
    assert torch.equal(adapt(adapt.init(seed=0), x), model(x))
    assert list(adapt.merge(move(adapt.init(seed=0)))) == ["mix"]
    assert [name for name, _ in model.named_parameters()] == ["mix", "experts"]


@pytest.mark.parametrize("cfg", [ll.HRAConfig(r=2), ll.DoRAConfig(r=2), ll.OFTConfig(block_size=4), ll.PiSSAConfig(r=2)], ids=by_name)
def test_variants_beyond_projections(cfg):
    model, x = Bare().double(), torch.randn(4, 8).double()
    adapt = ll.build(
        model, dataclasses.replace(cfg, target_names=r"^(mix|experts)$" if cfg.name != "oft" else "^mix$", dtype=torch.float64)
    )
    params = move(adapt.init())
    merged = copy.deepcopy(model)
    assert not merged.load_state_dict(adapt.merge(params), strict=False).unexpected_keys
    torch.testing.assert_close(adapt(params, x), merged(x))
    assert (merged(x) - model(x)).abs().max() > 1e-3


def test_a_shift_of_the_output_has_no_place_in_a_bare_weight():
    with pytest.raises(ValueError, match=r'build: BitFitConfig cannot adapt "mix" \(ParameterKind\): it adds to the output of a layer'):
        ll.build(Bare(), ll.BitFitConfig(target_names=r"^mix$"))
