"""The user's quantised model: it works before, between and after, in either order, and nothing of it is changed."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import move

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
from quantised_models import BACKENDS, dequantised, facts, quantised_layer, same, twins  # noqa: E402

CFG = ll.LoRAConfig(r=4, target_names="0")  # so that layer 2 is quantised and no target


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))  # whole blocks: bitsandbytes repacks no others


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["training", "evaluation"])
def model(backend, request):
    return twins(mlp(), backend)[0].train(request.param)


def test_building_calling_and_failing_change_nothing(model):
    before = facts(model)
    adapt = ll.build(model, CFG)
    params = adapt.init()
    adapt(params, torch.randn(2, 64))
    adapt.base(torch.randn(2, 64))
    adapt.train()(params, torch.randn(2, 64))
    adapt.eval().base(torch.randn(2, 64, dtype=torch.bfloat16).float())
    torch.func.grad(lambda p: adapt(p, torch.randn(2, 64)).square().sum())(params)
    module = adapt.module(params)
    module(torch.randn(2, 64)).sum().backward()
    module.state_dict()
    adapt.merge(params)
    with pytest.raises(Exception, match="shape"):
        adapt(params, torch.randn(2, 63))
    assert same(before, facts(model))


def test_share_of_the_model_is_that_of_the_dense_one(model):
    share = ll.build(model, CFG).summary().splitlines()[-1]
    assert share == ll.build(mlp(), CFG).summary().splitlines()[-1] == "4.63% of the model's 16,576 params"


def test_users_forward_is_what_it_was(model):
    x = torch.randn(5, 64)
    untouched = copy.deepcopy(model)
    adapt = ll.build(model, CFG)
    params = move(adapt.init())
    adapt(params, x)
    adapt.module(params)(x)
    for _ in range(2):
        assert torch.equal(model(x), untouched(x))
        assert same(_bytes(facts(model)), _bytes(facts(untouched)))


def _bytes(found):
    return {key: value for key, value in found.items() if key.endswith(".bytes")}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_users_forward_leaves_the_adapted_model_as_it_was(model, grad):
    x = torch.randn(5, 64)
    adapt, late = ll.build(model, CFG), ll.build(model, CFG)
    params = move(adapt.init())
    before = adapt(params, x)
    with torch.set_grad_enabled(grad):
        model(x)
    model.state_dict()
    assert torch.equal(adapt(params, x), before)
    assert torch.equal(late(params, x), before), "nothing had been called when this one was built"
    assert torch.equal(adapt.train()(params, x), before)
    assert torch.equal(adapt.module(params)(x), before)


def test_building_after_the_users_forward(model):
    x = torch.randn(5, 64, requires_grad=True)  # without a gradient bitsandbytes may repack a 4-bit weight, and round its scales
    before = ll.build(model, CFG).base(x)
    model(x)
    before_again = facts(model)
    assert torch.equal(ll.build(model, CFG).base(x), before)
    assert same(before_again, facts(model))


def test_training_and_evaluation_are_one_map(model):
    x = torch.randn(5, 64)
    adapt = ll.build(model, CFG)
    assert torch.equal(adapt.train().base(x), adapt.eval().base(x))


def test_base_is_the_users_model_within_the_backends_noise(backend):
    model, x = twins(mlp(), backend)[0], torch.randn(5, 64, requires_grad=True)
    base = ll.build(model, CFG).base(x).detach()
    assert float((base - model.train()(x).detach()).abs().max()) < 1e-6
    assert float((base - model.eval()(x).detach()).abs().max()) < (5e-2 if backend == "8-bit" else 1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_weight_that_bitsandbytes_repacked_for_evaluation_is_read(nested):
    """On processors with bfloat16 vectors `Linear4bit` rewrites its weight in evaluation; done by hand here, so that it runs on all."""
    layer = quantised_layer(nn.Linear(64, 96), "nf4-nested" if nested else "nf4")
    scales = layer.weight.quant_state
    absmax = scales.absmax
    if nested:
        absmax = bnb.functional.dequantize_blockwise(scales.absmax, scales.state2) + scales.offset
    twin = copy.deepcopy(layer)
    state = twin.weight.quant_state
    state.absmax, state.nested = absmax.bfloat16().float(), False
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, scales)
    before = (layer.weight.data.clone(), layer.weight.quant_state.absmax.clone())
    adapt = ll.build(nn.Sequential(layer), ll.LoRAConfig(r=2))
    assert torch.equal(adapt._replicas.main.bindings[0][1].W.dense(), bnb.functional.dequantize_4bit(twin.weight.data, state))
    assert torch.equal(layer.weight.data, before[0])
    assert torch.equal(layer.weight.quant_state.absmax, before[1])
    assert layer.weight.quant_state.packing_format_for_cpu


def test_clone_keeps_classes_dtypes_and_state_dict(model):
    adapt = ll.build(model, CFG)
    module = adapt.module(adapt.init())
    for path, layer in model.named_modules():
        assert isinstance(module.get_submodule(path), type(layer))
        if path in ("0", "2"):
            mine = module.get_submodule(path)
            assert (type(mine.weight), mine.weight.dtype) == (type(layer.weight), layer.weight.dtype)
            assert mine.weight.data_ptr() == layer.weight.data_ptr(), "shared, not copied"
            assert not _bookkeeping(mine) & _bookkeeping(layer), "what bitsandbytes writes to is the clone's own"
    own, theirs = module.state_dict(), model.state_dict()
    assert {key for key in own if "adapter" not in key} == set(theirs)
    assert all(torch.equal(own[key], tensor) for key, tensor in theirs.items())


def _bookkeeping(layer):
    """Return the identities of the objects that bitsandbytes rewrites, or finds others by."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return {id(layer.state), id(layer.weight)}
    state = layer.weight.quant_state
    assert layer.weight.module is layer
    return {id(layer.weight), id(state), id(layer.quant_state), *([id(state.state2)] if state.nested else [])}


def test_module_can_be_copied_and_moved(model):
    adapt, x = ll.build(model, CFG), torch.randn(2, 64)
    params = move(adapt.init())
    module = adapt.module(params)
    before = facts(model)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(x), adapt(params, x))
    assert torch.equal(module.to("cpu")(x), adapt(params, x))
    module._apply(torch.clone)  # as a move to another device does: weights in other memory
    for layer in (module[0], module[2]):
        assert layer.weight.data_ptr() not in (model[0].weight.data_ptr(), model[2].weight.data_ptr())
    assert torch.equal(module(x), adapt(params, x))
    assert same(before, facts(model))


def test_layers_that_are_not_quantised_yet_are_refused():
    model = nn.Sequential(bnb.nn.Linear4bit(64, 96), nn.Tanh(), bnb.nn.Linear8bitLt(96, 64, has_fp16_weights=False), nn.Linear(64, 64))
    for cfg in (ll.LoRAConfig(), ll.LoRAConfig(target_names="3")):
        with pytest.raises(
            ValueError, match=r'(?s)build: expected quantised layers.*"0" \(Linear4bit\) is not quantised yet.*model\.to.*"2"'
        ):
            ll.build(model, cfg)
    ll.build(model.to("cpu"), ll.LoRAConfig())
    with pytest.raises(ValueError, match=r'"0" \(Linear8bitLt\) keeps 16-bit weights .*has_fp16_weights=False'):
        ll.build(nn.Sequential(bnb.nn.Linear8bitLt(64, 96)), ll.LoRAConfig())


def test_training_quantised_modules_whole_is_refused(model):
    with pytest.raises(ValueError, match=r'FullConfig at "2", found quantised ones at "2", which cannot be trained\. Leave them out'):
        ll.build(model, ll.FullConfig(target_names="2"))


class OwnForward(bnb.nn.Linear4bit):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclass_with_a_forward_of_its_own():
    odd = OwnForward(64, 64, compute_dtype=torch.float32).to("cpu")
    model = nn.Sequential(odd, quantised_layer(nn.Linear(64, 64), "nf4")).train()
    with pytest.raises(ValueError, match=r'forward of its own at "0" \(OwnForward\)'):
        ll.build(model, ll.LoRAConfig())
    x = torch.randn(2, 64)
    assert torch.equal(ll.build(model, ll.LoRAConfig(target_names="1")).base(x), model(x)), "beside the targets it keeps its forward"


class Doubled(bnb.nn.Linear8bitLt):
    def forward(self, x):
        return 2 * super().forward(x)


def test_forward_of_its_own_does_not_reach_the_users_layer():
    odd = Doubled(64, 64, has_fp16_weights=False).to("cpu")
    model = nn.Sequential(odd, quantised_layer(nn.Linear(64, 64), "8-bit")).train()
    before, x = facts(model), torch.randn(2, 64)
    adapt = ll.build(model, ll.LoRAConfig(target_names="1"))
    adapt.base(x)
    assert same(before, facts(model)), "its forward would have moved the scales"
    model(x)
    adapt.base(x)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes))
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


LOADED = {
    "4-bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "8-bit": {"load_in_8bit": True},
}


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=4), ll.PiSSAConfig(r=4), ll.DoRAConfig(r=4), ll.EVAConfig(r=4)], ids=lambda cfg: cfg.name)
def test_transformers_model_from_disk(checkpoint, tmp_path, loaded, cfg):
    config = tf.BitsAndBytesConfig(**LOADED[loaded])
    model = tf.AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, device_map={"": "cpu"})
    dense = copy.deepcopy(model)
    for path, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight.data = dequantised(layer)
            dense.set_submodule(path, plain)
    ids = torch.randint(3, 64, (2, 7))
    batch = {"input_ids": ids, "labels": ids}
    before = facts(model)
    calibration = [batch] if cfg.calibrated else None
    adapt = ll.build(model, cfg, calibration=calibration)
    assert len(adapt.targets) == 14
    params = move(adapt.init())
    assert torch.equal(adapt(adapt.init(), batch).logits, adapt.base(batch).logits)
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(model, tmp_path / "a.safetensors")
    twin, _ = ll.load(dense, tmp_path / "a.safetensors")  # the same constants: an SVD magnifies the last digit of its input
    for a in (adapt, again):
        got, want = (b(read, batch).logits - b.base(batch).logits for b in (a, twin))
        assert float((got - want).abs().max()) < 1e-5 * max(1.0, float(want.abs().max()))
        got, want = (ll.value_and_grad(lambda p, b=b: 100 * b(p, batch).loss)(read)[1] for b in (a, twin))
        for g, w in zip(ll.tree_leaves(got), ll.tree_leaves(want)):
            assert float((g - w).abs().max()) < 1e-5 * max(1.0, float(w.abs().max()))
    assert float((twin(read, batch).logits - twin.base(batch).logits).abs().max()) > 1e-2
    module = adapt.eval().module(params)
    assert torch.equal(module(**batch).logits, adapt.eval()(params, batch).logits)
    assert module.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape == (2, 9)
    assert same(before, facts(model))
    model(**batch)
    assert torch.equal(adapt(params, batch).logits, again(read, batch).logits)


@pytest.mark.parametrize("packed", [bnb.nn.Embedding4bit, bnb.nn.Embedding8bit])
def test_packed_embedding_is_named_as_one_and_each_way_out_works(packed):
    model = nn.Sequential(packed(16, 64), nn.Linear(64, 4)).to("cpu")
    for cfg in (ll.LoRAConfig(r=2, target_names="^0$"), ll.TokensConfig(token_ids=(1,), target_names="^0$")):
        with pytest.raises(ValueError, match=rf'"0 \({packed.__name__}\)", packed as codes that no kind reads\. Load them unpacked'):
            ll.build(model, cfg)
    with pytest.raises(ValueError, match=rf'"0 \({packed.__name__}\)" among them\..*exclude_names=\(r"\^0\$"'):
        ll.build(model, ll.LoRAConfig(r=2, target_names=r"^[01]$"))
    adapt, ids = ll.build(model, ll.LoRAConfig(r=2, target_names=r"^[01]$", exclude_names=(r"^0$",))), torch.randint(16, (2, 3))
    params = move(adapt.init())
    wanted = model(ids) + 8 * model[0](ids) @ params["1"]["A"].T @ params["1"]["B"].T
    torch.testing.assert_close(adapt(params, ids), wanted, rtol=1e-4, atol=1e-4)
    loaded = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 4))
    assert [target.path for target in ll.build(loaded, ll.LoRAConfig(r=2, target_names="^0$")).targets] == ["0"]
