"""aLoRA: PEFT's values, gradients and texts, the base's states before the invocation, caches that go on, and what is refused."""

import copy

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import assert_trees_equal, move
from common.arithmetic import CACHE
from peft_oracle import assert_close, edit, wrapped

pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags are not valid")
SPELL = [5, 9]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.3},
        )
    ).eval()


def padded():
    """Rows with one invocation, with two, with none, and with one after padding on the left."""
    ids = torch.randint(10, 64, (4, 9))
    ids[0, 3:5], ids[1, 1:3], ids[1, 6:8], ids[3, 5:7] = (torch.tensor(SPELL) for _ in range(4))
    ids[1, 4], ids[3, :3] = 5, 0
    mask = torch.ones_like(ids)
    mask[3, :3], mask[2, 7:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def ours_and_theirs(model, tmp_path, **options):
    options = {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    theirs = wrapped(model, peft.LoraConfig(r=4, lora_alpha=12, alora_invocation_tokens=SPELL, **options))
    theirs.save_pretrained(tmp_path)
    return *ll.from_peft(model, tmp_path), theirs


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_values_gradients_and_files_are_pefts(model, tiny, name, tmp_path):
    layers = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} if name == "gpt2" else {}
    model = model if name == "llama" else tiny("gpt2")[0]
    adapt, params, theirs = ours_and_theirs(model, tmp_path / "theirs", use_rslora=True, **layers)
    cfg = adapt.configs[0]
    assert isinstance(cfg, ll.ALoRAConfig)
    assert (cfg.r, cfg.alpha, cfg.rslora, cfg.invocation_tokens) == (4, 12, True, tuple(SPELL))
    batch = padded()
    base, want = model(**batch).logits.detach(), theirs(**batch).logits
    assert_close(adapt(params, batch).logits - base, want - base)
    weights = torch.randn(want.shape)
    (want * weights).sum().backward()
    grads = ll.value_and_grad(lambda p: (adapt(p, batch).logits * weights).sum())(params)[1]
    for path, leaves in grads.items():
        layer = theirs.base_model.model.get_submodule(path)
        for name, grad in leaves.items():
            assert_close(grad, getattr(layer, f"lora_{name}")["default"].weight.grad)
    recomputed = ll.build(model, adapt.configs[0], remat=r"(layers|h)\.\d+$")
    assert_trees_equal(ll.value_and_grad(lambda p: (recomputed(p, batch).logits * weights).sum())(params)[1], grads, 1e-5)
    ll.to_peft(adapt, params, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert again.peft_config["default"].alora_invocation_tokens == SPELL
    assert_close(again(**batch).logits - base, want - base)


def test_states_before_the_invocation_are_the_bases_to_the_bit(model, tmp_path):
    adapt, params, _ = ours_and_theirs(model, tmp_path)
    batch = padded()
    base, ours = model(**batch, use_cache=True), adapt(params, batch, use_cache=True)
    begins = [3, 6, 9, 5]
    for layer, plain in zip(ours.past_key_values.layers, base.past_key_values.layers):
        for row, begin in enumerate(begins):
            assert torch.equal(layer.keys[row, :, :begin], plain.keys[row, :, :begin])
            assert torch.equal(layer.values[row, :, :begin], plain.values[row, :, :begin])
            assert begin == 9 or not torch.equal(layer.keys[row, :, begin], plain.keys[row, :, begin])
    assert torch.equal(ours.logits[2], base.logits[2])


def test_generated_texts_are_pefts(model, tmp_path):
    adapt, params, theirs = ours_and_theirs(model, tmp_path)
    batch = {name: t[[0, 1, 3]] for name, t in padded().items()}
    ours = adapt.module(params)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    got, want, plain = (m.generate(**batch, **options) for m in (ours, theirs, model))
    assert torch.equal(got.sequences, want.sequences)
    assert not torch.equal(got.sequences, plain.sequences)
    assert_close(torch.stack(got.logits), torch.stack(want.logits))
    beams = ours.generate(**batch, max_new_tokens=4, num_beams=3, do_sample=False)
    uncached = ours.generate(**batch, max_new_tokens=4, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, uncached)


def test_a_cache_goes_on_where_it_stood(model, tmp_path):
    adapt, params, _ = ours_and_theirs(model, tmp_path)
    ids = padded()["input_ids"][:1]
    whole = adapt(params, {"input_ids": ids}).logits
    for cut in (2, 5, 7):  # before and after the invocation
        first = adapt(params, {"input_ids": ids[:, :cut]}, use_cache=True)
        second = adapt(params, {"input_ids": ids[:, cut:], CACHE: copy.deepcopy(first.past_key_values)}).logits
        torch.testing.assert_close(second, whole[:, cut:], rtol=1e-4, atol=1e-4)
    prefix = model(ids[:1, :3], use_cache=True).past_key_values  # of the base model
    rest = adapt(params, {"input_ids": ids[:1, 3:], CACHE: prefix}).logits
    torch.testing.assert_close(rest, whole[:1, 3:], rtol=1e-4, atol=1e-4)
    prefix.crop(-7)  # before the invocation that it knew
    other = torch.tensor([[20, 21, 22]])  # up to where the other text had it, and on
    cropped = adapt(params, {"input_ids": other, CACHE: prefix}).logits
    want = model(torch.cat([ids[:1, :2], other], 1)).logits[:, 2:]
    torch.testing.assert_close(cropped, want, rtol=1e-4, atol=1e-4)


def test_mixed_rows_have_their_own_places(model):
    adapt = ll.build(model, ll.ALoRAConfig(r=3, invocation_tokens=SPELL))
    members = [move(adapt.init(), seed=k) for k in range(2)]
    batch, index = padded(), [1, 0, 1, 1]
    mixed = adapt.mixed(ll.stack(members), batch, index).logits
    alone = [adapt(members[k], {name: t[row : row + 1] for name, t in batch.items()}).logits[0] for row, k in enumerate(index)]
    torch.testing.assert_close(mixed, torch.stack(alone), rtol=1e-4, atol=1e-4)
    rows = ll.per_example_grad(adapt, lambda out, part: out.logits.square().sum((1, 2)))(members[0], batch)
    one = {name: t[1:2] for name, t in batch.items()}
    want = ll.value_and_grad(lambda p: adapt(p, one).logits.square().sum())(members[0])[1]
    assert_trees_equal(ll.tree_map(lambda g: g[1], rows), want, 1e-3)


def test_a_head_at_the_end_is_adapted_at_the_end(model):
    adapt = ll.build(model, ll.ALoRAConfig(r=3, invocation_tokens=SPELL, target_names="lm_head$", exclude_names=()))
    params, batch = move(adapt.init()), padded()
    torch.testing.assert_close(adapt(params, batch, logits_to_keep=3).logits, adapt(params, batch).logits[:, -3:])


def test_compiled_calls_see_the_invocation(model):
    adapt = ll.build(model, ll.ALoRAConfig(r=3, invocation_tokens=SPELL, target_names="q_proj"))
    params, ids = move(adapt.init()), padded()["input_ids"]
    got = torch.compile(lambda p, ids: adapt(p, {"input_ids": ids}, use_cache=False).logits, backend="aot_eager")(params, ids)
    torch.testing.assert_close(got, adapt(params, {"input_ids": ids}).logits, rtol=1e-4, atol=1e-4)


def test_what_has_no_invocation_is_refused(model, tmp_path):
    adapt = ll.build(model, ll.ALoRAConfig(r=3, invocation_tokens=SPELL))
    with pytest.raises(ValueError, match="expected input_ids, in which the invocation is looked for, found none"):
        adapt(adapt.init(), {"inputs_embeds": torch.randn(1, 4, 32)})
    everywhere = ll.build(model, ll.ALoRAConfig(r=3))
    with pytest.raises(ValueError, match=r"invocation_tokens=\(\): PEFT needs a token"):
        ll.to_peft(everywhere, everywhere.init(), tmp_path / "everywhere")
    with pytest.raises(TypeError, match="invocation_tokens: expected a sequence of integers, found 'hey'"):
        ll.ALoRAConfig(invocation_tokens="hey")
    with pytest.raises(ValueError, match="it acts at some positions of a text"):
        ll.build(nn.Sequential(nn.Conv1d(4, 4, 3)), ll.ALoRAConfig(r=2, invocation_tokens=SPELL, target_names="0"))
    with pytest.raises(ValueError, match="not linear"):
        adapt.merge(adapt.init())
    _ = ours_and_theirs(model, tmp_path)
    edit(tmp_path, use_dora=True)
    with pytest.raises(ValueError, match=r'alora_invocation_tokens in .* beside a plain LoRA, found "use_dora"'):
        ll.from_peft(model, tmp_path)
