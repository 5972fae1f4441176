"""Merged weights compute what `adapt` computes; what a state dict cannot hold is refused by name."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import CASES, FIVE, ShiftConfig, build_any, by_name, move
from lora_lite.layers import identity


@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_merged_copy_computes_what_adapt_computes(tiny, name, cfg):
    model, batch = tiny(name)
    model.double()
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    fresh = copy.deepcopy(model)
    result = fresh.load_state_dict(adapt.merge(params), strict=False)
    assert result.unexpected_keys == []
    with torch.no_grad():
        base = adapt.base(batch).logits
        want = adapt(params, batch).logits - base
        got = fresh(**batch).logits - base
    assert float((got - want).abs().max()) < 1e-10 * max(1.0, float(want.abs().max()))
    assert float(want.abs().max()) > 1e-3


FIRST = list({row.cfg.name: row.cfg for row in reversed(CASES) if row.cfg.linear and row.cfg.adapts == "linear"}.values())


@pytest.mark.parametrize("cfg", FIRST, ids=by_name)
def test_a_large_weight_is_merged_in_parts(cfg, monkeypatch):
    """The parts are those of a weight of 16 MiB and more, here of 1 KiB."""
    model = nn.Sequential(nn.Linear(24, 48), nn.Linear(48, 24)).double()
    adapt = build_any(model, cfg, [torch.randn(64, 24, dtype=torch.float64)])
    params = move(adapt.init())
    want = adapt.merge(params)
    monkeypatch.setattr(identity, "PART", 2048)
    monkeypatch.setattr(identity, "BLOCK", 1024)
    found = adapt.merge(params)
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "scaled", "stack"])
def test_parts_of_other_layouts(tiny, name, monkeypatch):
    if name == "stack":
        model = nn.Module()
        model.experts = nn.Parameter(torch.randn(3, 40, 24))
        cfg = ll.LoRAConfig(r=2, target_names=r"experts$")
    else:
        model, _ = tiny("gpt2" if name == "gpt2" else "gemma3")
        cfg = ll.LoRAConfig(r=2, **({} if name == "gpt2" else {"target_names": r"embed_tokens$", "exclude_names": ()}))
        if name == "scaled":
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    want = adapt.merge(params)
    monkeypatch.setattr(identity, "PART", 1024)
    monkeypatch.setattr(identity, "BLOCK", 512)
    for name, tensor in adapt.merge(params).items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-6)
        assert name.endswith("bias") or not torch.equal(tensor, model.state_dict()[name])


def test_merge_keeps_dtype_and_layout(tiny):
    model, _ = tiny("gpt2")
    model.bfloat16()
    merged = ll.build(model, ll.LoRAConfig(r=2)).merge(ll.build(model, ll.LoRAConfig(r=2)).init())
    own = model.state_dict()
    assert all(torch.equal(tensor, own[name]) and tensor.dtype == torch.bfloat16 for name, tensor in merged.items())


@dataclass(frozen=True, kw_only=True)
class TanhConfig(ShiftConfig):
    """Not an affine map."""

    name: ClassVar[str] = "tanh"
    linear: ClassVar[bool] = False

    def forward(self, params, W, x):
        return W(x) + params["d"].tanh() * x.sum(-1, keepdim=True).tanh()


def test_merge_refuses_a_bias_that_the_layer_lacks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    adapt = ll.build(model, ShiftConfig())
    with pytest.raises(ValueError, match=r'(?s)"1": the adapter moves the bias.*"2": the adapter moves the bias'):
        adapt.merge(move(adapt.init()))
    assert sorted(adapt.merge(adapt.init())) == ["0.bias", "0.weight", "1.weight", "2.weight"], "at the start no bias moves"


def test_merge_refuses_what_is_not_linear_and_what_is_shared(tiny):
    adapt = ll.build(nn.Sequential(nn.Linear(4, 4)), TanhConfig())
    with pytest.raises(ValueError, match='"0": TanhConfig is not linear'):
        adapt.merge(adapt.init())
    model, _ = tiny("llama", tie_word_embeddings=True)
    adapt = ll.build(model, ll.LoRAConfig(r=2, exclude_names=()))
    with pytest.raises(ValueError, match=r'"lm_head": its weight is shared with model\.embed_tokens'):
        adapt.merge(adapt.init())


def _tied(how):
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    first, last = model[0].weight, model[2]
    if how == "one memory":
        last.weight.data = first.data
    elif how == "transposed":
        last.weight = nn.Parameter(first.data.t())
    else:
        both = torch.randn(9, 6)
        model[0].weight, last.weight = nn.Parameter(both[:6]), nn.Parameter(both[3:])
    return model


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2, target_names="0"), ll.FullConfig(target_names="0")], ids=by_name)
@pytest.mark.parametrize("how", ["one memory", "transposed", "overlapping"])
def test_merge_refuses_a_weight_in_the_memory_of_another(how, cfg):
    model = _tied(how)
    adapt = ll.build(model, cfg)
    with pytest.raises(ValueError, match=r'"0": .*(shared with 2|lies in the memory of "2\.weight")'):
        adapt.merge(move(adapt.init()))


def test_parts_of_one_tensor_that_have_no_element_in_common_are_merged():
    table = torch.randn(12, 12)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    for k, part in enumerate((table[:6, :6], table[:6, 6:], table[6:, :6])):
        model[2 * k].weight = nn.Parameter(part)
    adapt, x = ll.build(model, ll.LoRAConfig(r=2)), torch.randn(3, 6)
    params = move(adapt.init())
    want = adapt(params, x)
    model.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(model(x), want)


def test_a_mixing_of_outputs_across_groups_is_merged_as_it_is_computed():
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), torch.randn(2, 8, 5, 5)
    adapt = ll.build(model, ll.ROADConfig(target_names="0", group_size=8))
    params = move(adapt.init())
    want = adapt(params, x)
    assert (want - model(x)).abs().max() > 0.01
    model.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(model(x), want)


def test_rows_of_a_table_move_in_whatever_has_its_memory():
    model, ids = nn.Sequential(nn.Embedding(8, 6), nn.Tanh(), nn.Linear(6, 8, bias=False)), torch.arange(8)[None]
    model[2].weight.data = model[0].weight.data
    adapt = ll.build(model, ll.TokensConfig(target_names="^0$", token_ids=(1, 5)))
    params = move(adapt.init())
    want = adapt(params, ids)
    model.load_state_dict(adapt.merge(params), strict=False)
    assert model[2].weight.data_ptr() == model[0].weight.data_ptr()
    torch.testing.assert_close(model(ids), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_params_that_are_not_finite_are_named(value):
    adapt = ll.build(nn.Sequential(nn.Linear(4, 4, bias=False)), ll.LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r'"0": its params, or tensors beside them, are not finite'):
        adapt.merge(ll.tree_map(lambda p: p + value, adapt.init()))


@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
def test_members_of_a_stack_are_merged_under_vmap(cfg):
    adapt = ll.build(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), cfg)
    members = [move(adapt.init(), seed=k) for k in (0, 1)]
    found = torch.vmap(adapt.merge)(ll.stack(members))
    for k, params in enumerate(members):
        want = adapt.merge(params)
        assert set(found) == set(want)
        for name, tensor in want.items():
            torch.testing.assert_close(found[name][k], tensor)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian], ids=lambda t: t.__name__)
def test_merged_weights_are_not_differentiated_in_reverse_mode(transform):
    adapt = ll.build(nn.Sequential(nn.Linear(8, 4)), ll.LoRAConfig(r=2))
    params, x = move(adapt.init()), torch.randn(3, 8)

    def loss(p, q):
        return (x @ adapt.merge(p)["0.weight"].t() + adapt(q, x)).square().sum()

    with pytest.raises(ValueError, match=r"^adapt.merge: .* Differentiate adapt\(params, batch\)"):
        transform(lambda p: loss(p, p))(params)
    transform(lambda q: loss(params, q))(params)  # constants may be merged


def test_factors_of_to_lora_are_not_differentiated():
    adapt = ll.build(nn.Sequential(nn.Linear(8, 4)), ll.LoHaConfig(r=2))
    params, x = move(adapt.init()), torch.randn(3, 8)

    def loss(p):
        lora, found, _ = ll.to_lora(adapt, p, r=4)
        return lora(found, x).square().sum()

    with pytest.raises(ValueError, match=r"^to_lora: .* Differentiate adapt\(params, batch\)"):
        torch.func.grad(loss)(params)
    torch.func.grad(lambda q: loss(params) + adapt(q, x).sum())(params)  # of constants it may be called


def test_merged_weights_are_differentiated_in_forward_mode():
    adapt = ll.build(nn.Sequential(nn.Linear(8, 4, bias=False)).double(), ll.LoRAConfig(r=2, dtype=torch.float64))
    params, along = move(adapt.init()), move(adapt.init(), seed=1)
    x = torch.eye(8, dtype=torch.float64)
    found = torch.func.jvp(lambda p: adapt.merge(p)["0.weight"].t(), (params,), (along,))[1]
    torch.testing.assert_close(found, torch.func.jvp(lambda p: adapt(p, x), (params,), (along,))[1])
