"""Generation through the module: token for token what a greedy loop over `adapt` gives, in every way that transformers generates."""

import pytest
import torch
import transformers as tf

import lora_lite as ll
from cases import FIVE, assert_trees_equal, by_name, move

LENGTH = 10
PROMPT = torch.tensor([[5, 9, 12, 7]])
SETTINGS = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "pad_token_id": 0}


def greedy_loop(adapt, params, ids, length=LENGTH):
    """Take the likeliest token each time, without a cache; the end of text is not among them, as with `min_new_tokens`."""
    for _ in range(length):
        logits = adapt(params, {"input_ids": ids, "use_cache": False}).logits[:, -1]
        logits[:, 2] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


def started(tiny, name="llama", cfg=FIVE[0], **overrides):
    model, _ = tiny(name, **overrides)
    adapt = ll.build(model, cfg)
    return adapt, move(adapt.init(), scale=0.5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
@torch.no_grad()
def test_greedy_is_a_loop_over_adapt(tiny, name):
    adapt, params = started(tiny, name)
    got = adapt.module(params).generate(PROMPT, do_sample=False, **SETTINGS)
    assert torch.equal(got, greedy_loop(adapt, params, PROMPT))
    assert not torch.equal(got, greedy_loop(adapt, adapt.init(), PROMPT)), "the adapter changes no token, so this shows nothing"


@pytest.mark.parametrize("cfg", [*FIVE[1:], ll.VeRAConfig(r=8), ll.OFTConfig(block_size=8)], ids=by_name)
@torch.no_grad()
def test_every_variant_generates(tiny, cfg):
    adapt, params = started(tiny, cfg=cfg)
    assert torch.equal(adapt.module(params).generate(PROMPT, do_sample=False, **SETTINGS), greedy_loop(adapt, params, PROMPT))


@torch.no_grad()
def test_static_cache_gives_the_same_tokens(tiny):
    adapt, params = started(tiny)
    module = adapt.module(params)
    got = module.generate(PROMPT, do_sample=False, cache_implementation="static", disable_compile=True, **SETTINGS)
    assert torch.equal(got, greedy_loop(adapt, params, PROMPT))


@pytest.mark.parametrize("how", [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 8, "temperature": 1.3}])
@torch.no_grad()
def test_beams_and_samples_are_those_of_merged_weights(tiny, how):
    adapt, params = started(tiny)
    merged, _ = tiny("llama")
    merged.load_state_dict(adapt.merge(params), strict=False)
    outputs = []
    for model in (adapt.module(params), merged):
        torch.manual_seed(3)
        outputs.append(model.generate(PROMPT, **how, **SETTINGS))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_padded_rows_generate_what_each_alone_does(tiny):
    adapt, params = started(tiny)
    rows = torch.tensor([[0, 0, 5, 9], [4, 8, 15, 16]])
    got = adapt.module(params).generate(rows, attention_mask=(rows != 0).long(), do_sample=False, **SETTINGS)
    assert torch.equal(got[0, 2:], greedy_loop(adapt, params, rows[:1, 2:])[0])
    assert torch.equal(got[1], greedy_loop(adapt, params, rows[1:])[0])


@torch.no_grad()
def test_encoder_decoder_generates(tiny):
    adapt, params = started(tiny, "t5")
    module = adapt.module(params)
    got = module.generate(PROMPT, do_sample=False, **SETTINGS)
    ids = got[:, :1]
    for _ in range(LENGTH):
        logits = adapt(params, {"input_ids": PROMPT, "decoder_input_ids": ids}).logits[:, -1]
        logits[:, module.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, ids)


@torch.no_grad()
def test_generating_changes_neither_the_model_nor_the_params(tiny):
    model, _ = tiny("llama")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapt = ll.build(model, FIVE[0])
    params = move(adapt.init())
    kept = ll.tree_map(torch.clone, params)
    module = adapt.module(params)
    module.generate(PROMPT, do_sample=False, **SETTINGS)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert_trees_equal(params, kept)
    assert_trees_equal(adapt.params(module), kept)


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{k}": k for k in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0", eos_token="w2")


def test_pipeline_takes_the_module(tiny):
    adapt, params = started(tiny)
    pipe = tf.pipeline("text-generation", model=adapt.module(params), tokenizer=word_tokenizer(), device="cpu")
    settings = {"do_sample": False, "max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
    tokens = pipe("w5 w9 w12 w7", return_tensors=True, **settings)[0]["generated_token_ids"]
    with torch.no_grad():
        assert tokens == greedy_loop(adapt, params, PROMPT)[0].tolist()
