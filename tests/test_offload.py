"""Models in parts: accelerate's device_map is carried into the clone, and weights that it offloads are fetched there."""

import copy

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


def offload(model, place, folder):
    if place == "disk":
        accelerate.disk_offload(model, str(folder), execution_device="cpu")
    elif place == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:  # a part of the model
        accelerate.dispatch_model(model, {**SPLIT, "model.layers.1": "disk"}, main_device="cpu", offload_dir=str(folder))
    assert any(p.is_meta for p in model.parameters())
    return model


PLACES = pytest.mark.parametrize("place", ["cpu", "disk", "part"])


@PLACES
@pytest.mark.parametrize("remat", [None, r"layers\.\d+$"], ids=["kept", "remat"])
@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
def test_offloaded_model_is_adapted(tiny, tmp_path, place, cfg, remat):
    (whole, batch), (model, _) = tiny("llama"), tiny("llama")
    offload(model, place, tmp_path)
    hooks = {path: (vars(m)["forward"], m._hf_hook) for path, m in model.named_modules() if hasattr(m, "_hf_hook")}
    plain, adapt = (ll.build(m, cfg, remat=remat) for m in (whole, model))
    params, start = move(plain.init(seed=0)), adapt.init(seed=0)
    assert_trees_equal(start, plain.init(seed=0))
    assert all(leaf.device.type == "cpu" for leaf in ll.tree_leaves(start))
    for transform in (ll.value_and_grad, lambda f: lambda p: torch.func.grad_and_value(f)(p)[::-1]):
        want, got = (transform(lambda p, a=a: a(p, batch).loss)(params) for a in (plain, adapt))
        torch.testing.assert_close(got[0], want[0])
        assert_trees_equal(got[1], want[1], 1e-6)
    assert not torch.equal(adapt.base(batch).logits, adapt(params, batch).logits)
    torch.testing.assert_close(adapt.base(batch).logits, whole(**batch).logits)
    assert hooks == {path: (vars(m)["forward"], m._hf_hook) for path, m in model.named_modules() if hasattr(m, "_hf_hook")}
    assert any(p.is_meta for p in model.parameters())
    torch.testing.assert_close(model(**batch).logits, whole(**batch).logits)


@PLACES
def test_offloaded_model_under_transforms_and_in_mixed_batches(tiny, tmp_path, place):
    (whole, batch), (model, _) = (tiny("llama", attn_implementation="eager") for _ in range(2))
    adapts = [ll.build(m, ll.LoRAConfig(r=4)) for m in (whole, offload(model, place, tmp_path))]
    a, b = (move(adapts[0].init(seed=0), seed=seed) for seed in (0, 1))

    def rows(output, batch):
        return output.logits.square().mean((1, 2))

    for run in (
        lambda adapt: adapt.mixed(ll.stack([a, b]), batch, index=torch.tensor([1, 0])).logits,
        lambda adapt: ll.per_example_grad(adapt, rows)(a, batch),
        lambda adapt: ll.hvp(lambda p: adapt(p, batch).logits.square().mean())(a, b),
        lambda adapt: torch.func.jvp(lambda p: adapt(p, batch).logits, (a,), (b,))[1],
    ):
        torch.testing.assert_close(run(adapts[1]), run(adapts[0]), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (ll.value_and_grad(lambda p, adapt=adapt: adapt(p, batch).loss)(a)[1] for adapt in adapts)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "t5", "qwen3_moe", "gemma3n", "wav2vec2"])
def test_weights_of_every_kind_are_fetched(tiny, tmp_path, name):
    (whole, batch), (model, _) = tiny(name), tiny(name)
    plain, adapt = (ll.build(m, ll.LoRAConfig(r=4)) for m in (whole, offload(model, "disk", tmp_path)))
    params = move(plain.init())
    want, got = (ll.value_and_grad(lambda p, a=a: a(p, batch)[0].square().mean())(params) for a in (plain, adapt))
    torch.testing.assert_close(got[0], want[0])
    assert_trees_equal(got[1], want[1], 1e-6)


@PLACES
def test_module_of_an_offloaded_model_trains_and_is_copied(tiny, tmp_path, place):
    (whole, batch), (model, _) = tiny("llama"), tiny("llama")
    plain, adapt = ll.build(whole, FIVE[0]), ll.build(offload(model, place, tmp_path), FIVE[0])
    params = move(plain.init())
    module = adapt.module(params)
    module(**batch).loss.backward()
    want = ll.value_and_grad(lambda p: plain(p, batch).loss)(params)[1]
    grads = {p: {n: getattr(module.get_submodule(f"{p}.adapter"), n).grad for n in leaves} for p, leaves in params.items()}
    assert_trees_equal(grads, want, 1e-6)
    again = copy.deepcopy(adapt)
    torch.testing.assert_close(again(params, batch).logits, plain(params, batch).logits)
    with pytest.raises(RuntimeError, match="accelerate offloads: it cannot be moved or cast"):
        module.to(torch.float64)


def test_gradient_keeps_no_offloaded_weight(tiny, tmp_path):
    model, batch = tiny("llama")
    offload(model, "disk", tmp_path)
    kept = []
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    params = ll.tree_map(lambda t: t.requires_grad_(), move(adapt.init()))
    shapes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        adapt(params, batch).loss.backward()
    assert kept
    assert not shapes & set(kept)


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_what_needs_weights_in_memory_is_refused_by_name(tiny, tmp_path, place):
    (whole, _), (model, _) = tiny("llama"), tiny("llama")
    adapt = ll.build(offload(model, place, tmp_path), FIVE[0])
    params = move(adapt.init())
    with pytest.raises(ValueError, match=r"adapt\.merge: expected weights in memory, found.*model\.layers\.0.*remove_hook_from_module"):
        adapt.merge(params)
    with pytest.raises(ValueError, match=r"build: expected weights in memory.*model\.embed_tokens.*remove_hook_from_module"):
        ll.build(model, ll.TokensConfig(token_ids=(3, 5)))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(ll.build(model, FIVE[0]).merge(params), ll.build(whole, FIVE[0]).merge(params))


def test_weights_that_accelerate_left_on_meta_are_refused_by_name(tiny, tmp_path):
    model, _ = tiny("llama")
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = type(model).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    assert len(ll.build(model, FIVE[0]).targets) > 0
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    with pytest.raises(ValueError, match=r"on meta at \"model\.layers\.0\.self_attn\.q_proj\.weight\".*Load the model again"):
        ll.build(model, FIVE[0])
    model = ll.build(type(model)(model.config).to("meta"), FIVE[0])
    with pytest.raises(ValueError, match=r"adapt\.merge: expected weights with data, found a model on meta\. Build on the loaded"):
        model.merge(model.init())


class Packed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(4, 4)
        self.packed = torch.nn.Module()
        self.packed.weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return self.lin(x)


def test_packed_weights_that_are_offloaded_are_refused_by_name():
    model = accelerate.cpu_offload(Packed(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"expected quantised weights in memory, found.*at \"packed\".*remove_hook_from_module"):
        ll.build(model, ll.LoRAConfig(r=2))


def test_adapter_of_an_offloaded_model_is_calibrated_saved_and_loaded(tiny, tmp_path):
    (whole, batch), (model, _) = tiny("llama"), tiny("llama")
    offload(model, "disk", tmp_path / "weights")
    plain, adapt = (ll.build(m, ll.CorDAConfig(r=4), calibration=[batch]) for m in (whole, model))
    params = move(plain.init(seed=0))
    torch.testing.assert_close(adapt(params, batch).logits, plain(params, batch).logits, rtol=1e-3, atol=1e-4)
    ll.save(adapt, params, tmp_path / "adapter.safetensors")
    again, loaded = ll.load(model, tmp_path / "adapter.safetensors")
    assert torch.equal(again(loaded, batch).logits, adapt(params, batch).logits)
    module = again.module(loaded)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert module.generate(batch["input_ids"][:1], **settings).shape[1] > 3
