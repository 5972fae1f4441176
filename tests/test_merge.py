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
