"""Models in parts: accelerate's device_map is carried into the clone, its offloading refused by name."""

import accelerate
import pytest
import torch

import lora_lite as ll
from cases import FIVE, assert_trees_equal, by_name, move

SPLIT = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


def in_parts(model):
    """Dispatch as over several devices; here all of them are the CPU."""
    return accelerate.dispatch_model(model, {**SPLIT, "model.layers.1": "cpu"}, main_device="cpu", force_hooks=True)


def hooked(model):
    return [path for path, module in model.named_modules() if hasattr(module, "_hf_hook")]


@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
def test_model_in_parts_is_adapted(tiny, cfg):
    plain, batch = tiny("llama")
    adapt = ll.build(plain, cfg)
    params = move(adapt.init())
    want = ll.value_and_grad(lambda p: adapt(p, batch).loss)(params)

    model, _ = tiny("llama")
    in_parts(model)
    before = {path: (vars(m)["forward"], m._hf_hook) for path, m in model.named_modules() if hasattr(m, "_hf_hook")}
    assert len(before) > 10
    parted = ll.build(model, cfg)
    got = ll.value_and_grad(lambda p: parted(p, batch).loss)(params)
    assert torch.equal(got[0], want[0])
    assert_trees_equal(got[1], want[1])
    assert not torch.equal(parted.base(batch).loss, want[0])
    assert before == {path: (vars(m)["forward"], m._hf_hook) for path, m in model.named_modules() if hasattr(m, "_hf_hook")}


def test_inputs_are_moved_where_accelerate_moves_them(tiny, monkeypatch):
    model, batch = tiny("llama")
    in_parts(model)
    moved = []
    pre = accelerate.hooks.AlignDevicesHook.pre_forward
    monkeypatch.setattr(
        accelerate.hooks.AlignDevicesHook, "pre_forward", lambda self, m, *a, **k: (moved.append(m), pre(self, m, *a, **k))[1]
    )
    model(**batch)
    by_model, moved[:] = len(moved), []
    adapt = ll.build(model, FIVE[0])
    for clone in (adapt, adapt.eval()):
        moved.clear()
        clone(move(adapt.init()), batch)
        assert len(moved) == by_model
    theirs = set(map(id, model.modules()))
    assert not any(id(module) in theirs for module in moved)


def test_module_of_a_model_in_parts_trains_generates_and_moves(tiny):
    plain, batch = tiny("llama")
    model, _ = tiny("llama")
    in_parts(model)
    adapt = ll.build(model, FIVE[0], remat=r"layers\.\d+$")
    params = move(adapt.init())
    module = adapt.module(params)
    assert hooked(module) == []
    module(**batch).loss.backward()
    want = ll.value_and_grad(lambda p: adapt(p, batch).loss)(params)[1]
    grads = {p: {n: getattr(module.get_submodule(f"{p}.adapter"), n).grad for n in leaves} for p, leaves in params.items()}
    assert_trees_equal(grads, want)
    ids = batch["input_ids"][:1]
    whole = ll.build(plain, FIVE[0]).module(params)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(module.generate(ids, **settings), whole.generate(ids, **settings))
    module.to(torch.float64)  # not accelerate's `to`, which is the user's model's
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_offloaded_layers_are_refused_by_name(tiny, tmp_path, place):
    (whole, batch), (model, _) = tiny("llama"), tiny("llama")
    if place == "disk":
        accelerate.dispatch_model(model, {**SPLIT, "model.layers.1": "disk"}, main_device="cpu", offload_dir=str(tmp_path))
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"build: expected weights in memory, found.*model\.layers\.[01].*remove_hook_from_module"):
        ll.build(model, ll.LoRAConfig(layers=1))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    adapt = ll.build(model, FIVE[0])
    params = move(adapt.init())
    assert torch.equal(adapt(params, batch).logits, ll.build(whole, FIVE[0])(params, batch).logits)
