"""Lily: its formula, its groups beside PEFT's, rows that depend on each other, and what is refused for that."""

import copy
import re
from collections import OrderedDict

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import lora_lite as ll
from cases import assert_trees_equal, move
from peft_oracle import assert_close, saved, wrapped

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")


def dense(params, W, x, scaling):
    """The formula with one weight for all vectors."""
    chosen = torch.stack([(params["router"] @ params["A"] @ v).softmax(0) for v in x.reshape(-1, x.shape[-1])]).mean(0)
    mixed = sum(share * B for share, B in zip(chosen, params["B"]))
    return W(x) + scaling * x @ (mixed.T @ params["A"]).T


def test_values_are_those_of_the_formula():
    W, x = ll.Frozen(torch.randn(6, 8).double(), torch.randn(6).double()), torch.randn(3, 5, 8).double()
    params = {"A": torch.randn(4, 8).double(), "B": torch.randn(3, 4, 6).double(), "router": torch.randn(3, 4).double()}
    torch.testing.assert_close(ll.functional.lily(params, W, x, scaling=0.7), dense(params, W, x, 0.7), rtol=0, atol=1e-12)
    assert ll.functional.lily(params, W, x[:0], scaling=0.7).shape == (0, 5, 6)
    grads = torch.func.grad(lambda p: ll.functional.lily(p, W, x[:0], scaling=0.7).sum())(params)
    assert not any(grad.any() for grad in grads.values())  # zeros, where a mean of nothing is not a number


def test_layers_of_one_name_and_shape_share(tiny):
    model, _ = tiny("llama", num_hidden_layers=4)
    adapt = ll.build(model, ll.LilyConfig(r=3, stride_A=2, num_B=5, target_names=r"[qk]_proj|down_proj"))
    params = adapt.init()
    at = "model.layers.{}.self_attn.{}_proj.{}"
    assert params["lily"][at.format(0, "q", "B")].shape == (5, 3, 32)
    names = {(n, name) for n in range(4) for name in "qk"}
    assert {path for path in params["lily"] if "self_attn" in path} == {at.format(n, k, "A") for n, k in names if n in (0, 2)} | {
        at.format(0, k, "B") for k in "qk"
    }
    assert all(list(leaves) == ["router"] for path, leaves in params.items() if path != "lily")
    one = ll.build(model, ll.LilyConfig(r=3, stride_A=3, groups="self_attn", target_names=r"[qo]_proj"))
    firsts = ["0.self_attn.q", "1.self_attn.o", "3.self_attn.q"]  # eight layers of one shape
    assert set(one.init()["lily"]) == {f"model.layers.{p}_proj.A" for p in firsts} | {f"model.layers.{firsts[0]}_proj.B"}


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], r".*layers\.[0-2]\..*\.(q|o)_proj", ["self_attn.q_proj", "mlp.down_proj"]],
    ids=["names", "expression", "longer-names"],
)
def test_groups_are_pefts_both_ways(tiny, targets, tmp_path):
    model, batch = tiny("llama", num_hidden_layers=4)
    del batch["labels"]
    base = model(**batch).logits
    theirs = wrapped(model, peft.LilyConfig(r=3, stride_A=2, num_B=3, scaling=1.5, target_modules=targets))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    want, weights = theirs(**batch).logits, 100 * torch.randn(base.shape)
    assert_close(adapt(params, batch).logits - base, want - base)
    (want * weights).sum().backward()
    grads = ll.value_and_grad(lambda p: (adapt(p, batch).logits * weights).sum())(params)[1]
    of_theirs = {n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in of_theirs.values()) == adapt.num_params
    for path, leaves in grads.items():
        for name, grad in leaves.items():
            where, own = (path, name) if path != "lily" else name.rsplit(".", 1)
            assert_close(grad, of_theirs.pop(f"{where}.lily_{own}.default.weight").view_as(grad))
    assert of_theirs == {}
    ll.to_peft(adapt, params, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours", is_trainable=True).eval()
    assert_close(again(**batch).logits - base, want - base)
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == adapt.num_params  # in the same groups
    assert_trees_equal(ll.from_peft(model, tmp_path / "ours")[1], params)


def test_layers_left_out_stay_out_of_pefts_groups(tiny, tmp_path):
    model, batch = tiny("llama", num_hidden_layers=4)
    adapt = ll.build(model, ll.LilyConfig(r=3, stride_A=2, target_names=r"layers\.[12]\..*q_proj"))
    params = move(adapt.init(), scale=1.0)
    ll.to_peft(adapt, params, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours", is_trainable=True).eval()
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == adapt.num_params
    base = model(**batch).logits
    assert_close(theirs(**batch).logits - base, adapt(params, batch).logits - base)
    crossed = ll.build(model, ll.LilyConfig(r=3, groups=(r"layers\.[01]\.", ""), target_names="[qk]_proj"))
    with pytest.raises(ValueError, match="groups of layers that the ends of their names tell apart"):
        ll.to_peft(crossed, crossed.init(), tmp_path / "crossed")


@pytest.mark.parametrize(("width", "fits"), [(12, True), (8, False)])
def test_an_end_of_another_name_is_no_hindrance_where_the_shapes_tell_the_layers_apart(width, fits, tmp_path):
    """As in a T5, whose `wo` PEFT may take for one of the `o`."""
    ends = [("o", nn.Linear(8, width)), ("wo", nn.Linear(width, 8))]
    model, x = nn.Sequential(*(nn.Sequential(OrderedDict(copy.deepcopy(ends))) for _ in range(2))), torch.randn(3, 8)
    adapt = ll.build(model, ll.LilyConfig(r=3, target_names="o$"))
    params = move(adapt.init(), scale=1.0)
    if not fits:
        with pytest.raises(ValueError, match="groups of layers that the ends of their names tell apart"):
            ll.to_peft(adapt, params, tmp_path / "ours")
        return
    ll.to_peft(adapt, params, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours", is_trainable=True).eval()
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == adapt.num_params
    assert_close(theirs(x) - model(x), adapt(params, x) - model(x))


def test_copies_that_differ_are_named(tiny, tmp_path):
    model, _ = tiny("llama")
    wrapped(model, peft.LilyConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path)
    tensors = saved(tmp_path)
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lily_B.weight"] += 1
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r'"model.layers.1.self_attn.q_proj": expected B as at "model.layers.0.*first of its model'):
        ll.from_peft(model, tmp_path)


def test_rows_depend_on_each_other_and_are_batches_of_their_own_in_a_mixed_one():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double(), torch.randn(6, 5, 8).double()
    adapt = ll.build(model, ll.LilyConfig(r=3, dtype=torch.float64))
    params = move(adapt.init(), scale=0.5)
    assert (adapt(params, x)[:1] - adapt(params, x[:1])).abs().max() > 1e-4
    members = [params, move(params, seed=1)]
    alone = torch.stack([adapt(members[n // 3], x[n : n + 1])[0] for n in range(6)])
    torch.testing.assert_close(adapt.mixed(ll.stack(members), x), alone)
    rows = ll.per_example_grad(adapt, lambda out, batch: out.square().flatten(1).sum(1))(params, x)
    for n in range(6):
        want = ll.value_and_grad(lambda p, n=n: adapt(p, x[n : n + 1]).square().sum())(params)[1]
        assert_trees_equal(ll.tree_map(lambda g, n=n: g[n], rows), want, 1e-12)


def test_what_no_weight_can_hold_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adapt = ll.build(model, ll.LilyConfig(r=3))
    for convert in (adapt.merge, lambda params: ll.to_lora(adapt, params, r=3)):
        with pytest.raises(ValueError, match="LilyConfig is not linear in its input"):
            convert(adapt.init())
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    adapt = ll.build(attention, ll.LilyConfig(r=3, target_names="out_proj"))
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=re.escape("expected a variant that is linear in its input, since the model reads 'weight'")):
        adapt(adapt.init(), (x, x, x))
    with pytest.raises(ValueError, match=r'LilyConfig\.groups: expected a regular expression, found "\("'):
        ll.LilyConfig(groups="(")
