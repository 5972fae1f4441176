"""LoftQ: it starts at the best low-rank approximation of what quantising lost, from weights that only `build` sees."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_lite as ll
from cases import assert_trees_equal, move, tiny_models

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
from quantised_models import twins


def models(backend="nf4"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).eval()
    return model, *twins(model, backend)


@pytest.mark.parametrize("backend", ["nf4", "fp4", "8-bit"])
@pytest.mark.parametrize("alpha", [8.0, 3.0])
def test_starts_at_the_best_approximation_of_what_was_lost(backend, alpha):
    model, packed, dense = models(backend)
    cfg = ll.LoftQConfig(r=8, alpha=alpha)
    params = ll.build(packed, cfg, original=model.state_dict()).init()
    for path in ("0", "2"):
        lost = model.get_submodule(path).weight.detach() - dense.get_submodule(path).weight
        A, B = params[path]["A"], params[path]["B"]
        torch.testing.assert_close((lost - cfg.scale * B @ A).norm(), torch.linalg.svdvals(lost)[8:].norm())  # Eckart and Young
        torch.testing.assert_close(A.norm(), B.norm())  # the singular values are split evenly


def test_starts_nearer_to_the_model_before_quantisation():
    model, packed, _ = models()
    adapt, x = ll.build(packed, ll.LoftQConfig(r=32), original=model.state_dict()), torch.randn(50, 64)
    missed = [(y - model(x)).detach().norm() for y in (adapt(adapt.init(), x), adapt.base(x))]
    assert missed[0] < 0.8 * missed[1]


def test_originals_from_a_mapping_a_file_and_a_folder_are_one(tmp_path):
    model, packed, _ = models()
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "shards").mkdir()
    for name, tensor in state.items():
        safetensors.torch.save_file({name: tensor}, tmp_path / "shards" / f"{name}.safetensors")
    cfg = ll.LoftQConfig(r=4)
    want = ll.build(packed, cfg, original=state).init()
    for place in (tmp_path / "whole.safetensors", str(tmp_path / "shards")):
        assert_trees_equal(ll.build(packed, cfg, original=place).init(), want)


def test_loading_needs_no_originals(tmp_path):
    model, packed, _ = models()
    adapt = ll.build(packed, ll.LoftQConfig(r=4), original=model.state_dict())
    params = adapt.init()
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(packed, tmp_path / "a.safetensors")
    assert_trees_equal(read, params)
    assert_trees_equal(again.init(seed=5), params)
    stored = sum(t.nelement() for t in safetensors.torch.load_file(tmp_path / "a.safetensors").values())
    assert stored == 2 * adapt.num_params, "params and their start, no weight"


def test_what_is_missing_is_said(tmp_path):
    model, packed, dense = models()
    state = model.state_dict()
    with pytest.raises(ValueError, match=r'before quantisation for "LoftQConfig", found none\. Use build\(model, cfg, original='):
        ll.build(packed, ll.LoftQConfig(r=4))
    with pytest.raises(ValueError, match='expected no original weights, since none of "LoRAConfig" uses them'):
        ll.build(packed, ll.LoRAConfig(r=4), original=state)
    wrong = {"0.weight": state["0.weight"].t(), "0.bias": state["0.bias"]}
    with pytest.raises(
        ValueError, match=r'(?s)"0.weight": expected .*\(128, 64\), found torch.float32 of shape \(64, 128\).*"2.weight".*none'
    ):
        ll.build(packed, ll.LoftQConfig(r=4), original=wrong)
    with pytest.raises(ValueError, match=r'"0.weight": expected a floating weight .*found torch.uint8'):
        ll.build(packed, ll.LoftQConfig(r=4), original=packed.state_dict())
    for place in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"expected original=.* to be a safetensors file or a folder of them, found none"):
            ll.build(packed, ll.LoftQConfig(r=4), original=place)
    with pytest.raises(ValueError, match="expected an original weight that quantising has changed, found the layer's own"):
        ll.build(packed, ll.LoftQConfig(r=4), original=dense.state_dict())
    with pytest.raises(ValueError, match=r"LoftQConfig\.r: expected at most min\(i, o\) = 64"):
        ll.build(packed, ll.LoftQConfig(r=65), original=state)


def test_originals_of_a_conv1d_model_are_read_as_it_stores_them():
    model, batch = tiny_models["gpt2"]()
    model.eval()
    rounded = copy.deepcopy(model)
    for layer in rounded.transformer.h:
        layer.mlp.c_fc.weight.data = layer.mlp.c_fc.weight.data.mul(8).round().div(8)
    adapt = ll.build(rounded, ll.LoftQConfig(r=32, target_names=r"c_fc$"), original=model.state_dict())
    # At full rank it starts at the model before rounding.
    torch.testing.assert_close(adapt(adapt.init(seed=0), batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rounded(**batch).logits, model(**batch).logits)


def test_is_written_as_lora_for_the_quantised_base(tmp_path):
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).eval()
    original = {name: t + 0.1 * torch.randn_like(t) for name, t in model.state_dict().items()}
    adapt, x = ll.build(model, ll.LoftQConfig(r=2, alpha=5.0), original=original), torch.randn(3, 8)
    params = move(adapt.init(seed=0))
    ll.to_peft(adapt, params, tmp_path / "a")
    read, same = ll.from_peft(model, tmp_path / "a")
    assert {cfg.name for cfg in read.configs} == {"lora"}
    torch.testing.assert_close(read(same, x) - model(x), adapt(params, x) - model(x))
