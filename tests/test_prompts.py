"""Prefixes and prompts of the page of that name, beside PEFT's."""

import copy
import types

import peft
import pytest
import torch
import transformers

import lora_lite as ll
from test_docs import DOCS, blocks


@pytest.fixture(scope="module")
def page():
    module = types.ModuleType("prompts")
    for _, code in blocks(DOCS / "prompts.md"):
        exec(code, vars(module))
    return module


def wrapped(page, cls, **options):
    theirs = peft.get_peft_model(copy.deepcopy(page.model), cls(task_type="CAUSAL_LM", num_virtual_tokens=5, **options))
    return theirs.eval(), next(p for p in theirs.parameters() if p.requires_grad)


def mask_of(page):
    mask = page.batch["attention_mask"].clone()
    mask[1, :3] = 0  # padded left
    return {**page.batch, "attention_mask": mask}


@pytest.mark.parametrize("cls", [peft.PrefixTuningConfig, peft.CartridgeConfig], ids=["prefix", "cartridge"])
def test_a_prefix_is_that_of_peft(page, cls):
    theirs, weight = wrapped(page, cls, **({"num_frozen_tokens": 0} if cls is peft.CartridgeConfig else {}))
    batch, layers, heads = mask_of(page), page.config.num_hidden_layers, page.config.num_key_value_heads

    def tree(weight):
        parts = weight.view(5, 2 * layers, heads, -1).permute(1, 2, 0, 3)[:, None]  # (2 layers, 1, heads, n, width)
        return {f"layers.{k}": {"keys": parts[2 * k], "values": parts[2 * k + 1]} for k in range(layers)}

    want = theirs(**batch)
    loss, grads = ll.value_and_grad(lambda w: page.adapt.base(page.with_prefix(tree(w), batch)).loss)(weight.detach())
    logits = page.adapt.base(page.with_prefix(tree(weight.detach()), batch)).logits
    assert (logits - page.model(**batch).logits).abs().max() > 1e-2
    torch.testing.assert_close(logits, want.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, want.loss.detach())
    torch.testing.assert_close(grads, torch.autograd.grad(want.loss, weight)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [4, 64])
def test_a_cartridge_is_the_whole_text_where_layers_have_a_window(page, window, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Gemma2Config(vocab_size=64, head_dim=8, sliding_window=window, **sizes)
    model = transformers.Gemma2ForCausalLM(config).eval()
    monkeypatch.setattr(page, "model", model)
    monkeypatch.setattr(page, "adapt", ll.build(model, ll.LoRAConfig(r=2)))
    text, ids = torch.randint(64, (1, 6)), page.batch["input_ids"]
    want = model(input_ids=torch.cat([text.expand(len(ids), -1), ids], 1)).logits[:, 6:]
    got = page.adapt.base(page.with_prefix(page.cache_of(text), page.batch)).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_that_of_peft(page):
    theirs, weight = wrapped(page, peft.PromptTuningConfig)
    batch = mask_of(page)
    want = theirs(**batch)
    loss, grad = ll.value_and_grad(lambda w: page.adapt.base(page.with_prompt(w, batch)).loss)(weight.detach())
    torch.testing.assert_close(page.adapt.base(page.with_prompt(weight.detach(), batch)).logits, want.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, want.loss.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(want.loss, weight)[0], rtol=1e-5, atol=1e-5)


def test_p_tuning_is_that_of_peft(page):
    theirs, _ = wrapped(page, peft.PromptEncoderConfig, encoder_hidden_size=16)
    encoder, batch = theirs.prompt_encoder["default"], mask_of(page)
    start, weights = encoder.embedding.weight, dict(encoder.mlp_head.named_parameters())
    want = theirs(**batch)
    tree = {"prompt": {"start": start.detach()}, "encoder": {name: p.detach() for name, p in weights.items()}}

    def loss(tree):
        prompt = torch.func.functional_call(encoder.mlp_head, tree["encoder"], (tree["prompt"]["start"],))
        return page.adapt.base(page.with_prompt(prompt, batch)).loss

    value, grads = ll.value_and_grad(loss)(tree)
    torch.testing.assert_close(value, want.loss.detach())
    for got, grad in zip(ll.tree_leaves(grads), torch.autograd.grad(want.loss, [start, *weights.values()]), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-5)
