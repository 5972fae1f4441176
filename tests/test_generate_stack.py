"""Generation with one adapter a prompt: each row gives what the module of its own adapter gives for it alone."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import FIVE, assert_trees_equal, by_name, move

PROMPTS = torch.tensor([[0, 0, 5, 9], [4, 8, 15, 16], [0, 7, 7, 3], [9, 21, 33, 40]])
"""Padded on the left by zeros."""
MASK = (PROMPTS != 0).long()
INDEX = [2, 0, 1, 2]
LENGTH = 5
SETTINGS = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "pad_token_id": 0}
RETURNED = {"num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
WAYS = {
    "greedy": {"do_sample": False},
    "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "uncached": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "returned": {"do_sample": False, "num_beams": 3, **RETURNED},
}
CASES = [*(("llama", way) for way in WAYS), *((name, way) for name in ("t5", "qwen3_moe") for way in ("greedy", "returned"))]


def started(tiny, name="llama", cfg=FIVE[0], **overrides):
    model, _ = tiny(name, **overrides)
    adapt = ll.build(model, cfg)
    return adapt, [move(adapt.init(seed=k), seed=k, scale=0.5) for k in range(3)]


def tokens(output):
    return output if isinstance(output, torch.Tensor) else output.sequences


def alone(adapt, members, how, index=INDEX):
    """Generate each prompt by itself with the module of its own adapter."""
    modules, rows = [adapt.module(member) for member in members], enumerate(index)
    made = [modules[k].generate(PROMPTS[n : n + 1], attention_mask=MASK[n : n + 1], **how, **SETTINGS) for n, k in rows]
    return torch.cat([tokens(row) for row in made])


@pytest.mark.parametrize(("name", "way"), CASES)
@torch.no_grad()
def test_each_row_generates_as_its_adapter_alone(tiny, name, way):
    adapt, members = started(tiny, name)
    got, other = (
        tokens(adapt.module(ll.stack(members), index=index).generate(PROMPTS, attention_mask=MASK, **WAYS[way], **SETTINGS))
        for index in (INDEX, [0, 1, 2, 0])
    )
    assert torch.equal(got, alone(adapt, members, WAYS[way]))
    assert not torch.equal(got, other), "the adapters change no token, so this shows nothing"


@pytest.mark.parametrize("cfg", [*FIVE[1:], ll.VeRAConfig(r=8), ll.OFTConfig(block_size=8), ll.LoReFTConfig(r=2)], ids=by_name)
@torch.no_grad()
def test_every_variant_generates_with_beams(tiny, cfg):
    adapt, members = started(tiny, cfg=cfg)
    module = adapt.module(ll.stack(members), index=torch.tensor(INDEX))
    got = module.generate(PROMPTS, attention_mask=MASK, **WAYS["beams"], **SETTINGS)
    assert torch.equal(got, alone(adapt, members, WAYS["beams"]))


@torch.no_grad()
def test_groups_generate_without_an_index(tiny):
    adapt, members = started(tiny)
    module = adapt.module(ll.stack(members[:2]))
    got = module.generate(PROMPTS, attention_mask=MASK, **WAYS["beams"], **SETTINGS)
    assert torch.equal(got, alone(adapt, members, WAYS["beams"], [0, 0, 1, 1]))


@torch.no_grad()
def test_inputs_may_be_expanded_by_a_static_method(tiny, monkeypatch):
    """As in transformers 5.17, where the module itself was taken for the size."""
    own = tf.LlamaForCausalLM._expand_inputs_for_generation

    def expand(expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        return own(None, expand_size, is_encoder_decoder, input_ids, **kwargs)

    monkeypatch.setattr(tf.LlamaForCausalLM, own.__name__, staticmethod(expand))
    adapt, members = started(tiny)
    got = adapt.module(ll.stack(members[:2])).generate(PROMPTS, attention_mask=MASK, **WAYS["beams"], **SETTINGS)
    assert torch.equal(got, alone(adapt, members, WAYS["beams"], [0, 0, 1, 1]))


class OneByOne(tf.LlamaForCausalLM):
    """A model whose forward runs each row through the module of its own adapter."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs):
        each = len(input_ids) // len(self.rows)
        parts = zip(self.rows, input_ids.split(each), attention_mask.split(each), position_ids.expand(len(input_ids), -1).split(each))
        logits = [module(input_ids=i, attention_mask=m, position_ids=p, use_cache=False).logits for module, i, m, p in parts]
        return tf.modeling_outputs.CausalLMOutputWithPast(logits=torch.cat(logits))


@pytest.mark.parametrize("how", [{"num_return_sequences": 2}, {"num_beams": 2}], ids=["returned", "beams"])
@torch.no_grad()
def test_samples_are_those_of_a_model_that_runs_row_by_row(tiny, how):
    adapt, members = started(tiny)
    model, _ = tiny("llama")
    oracle = OneByOne(model.config).eval()
    object.__setattr__(oracle, "rows", [adapt.module(members[k]) for k in INDEX])
    made = []
    for module in (adapt.module(ll.stack(members), index=INDEX), oracle):
        torch.manual_seed(3)
        settings = {**SETTINGS, "attention_mask": MASK, "do_sample": True, "top_k": 8, "temperature": 1.3, "use_cache": False}
        made.append(module.generate(PROMPTS, **how, **settings))
    assert torch.equal(*made)
    assert made[0].shape[0] == len(INDEX) * how.get("num_return_sequences", 1)


@torch.no_grad()
def test_a_loop_with_a_cache_equals_single_rows(tiny):
    adapt, members = started(tiny)
    module, prompts = adapt.module(ll.stack(members), index=INDEX), PROMPTS + 1
    cache, alone = tf.DynamicCache(), [tf.DynamicCache() for _ in INDEX]
    for ids in (prompts, prompts[:, :1]):
        got = module(input_ids=ids, past_key_values=cache).logits
        want = [adapt(members[k], {"input_ids": ids[n : n + 1]}, past_key_values=alone[n]).logits for n, k in enumerate(INDEX)]
        torch.testing.assert_close(got, torch.cat(want), rtol=1e-5, atol=1e-5)


def test_a_module_of_a_stack_trains_checkpointed_and_is_read_back(tiny):
    model, _ = tiny("llama")
    adapt = ll.build(model, FIVE[0], remat=r"layers\.\d+$")
    stacked = ll.stack([move(adapt.init(seed=k), seed=k) for k in range(2)])
    module, batch = adapt.module(stacked, index=[1, 0, 1, 1]), {"input_ids": PROMPTS, "use_cache": False}
    assert_trees_equal(adapt.params(module), stacked)
    module(**batch).logits.square().sum().backward()
    _, grads = ll.value_and_grad(lambda p: adapt.mixed(p, batch, [1, 0, 1, 1]).logits.square().sum())(stacked)
    named = dict(module.named_parameters())
    for path, leaves in grads.items():
        for name, grad in leaves.items():
            torch.testing.assert_close(named[f"{path}.adapter.{name}"].grad, grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_copies_of_a_module_generate_too(tiny):
    adapt, members = started(tiny)
    module = adapt.module(ll.stack(members), index=INDEX)
    want = module.generate(PROMPTS, **WAYS["beams"], **SETTINGS)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    del module
    for other in copies:
        assert torch.equal(other.generate(PROMPTS, **WAYS["beams"], **SETTINGS), want)


def test_a_generation_that_fails_leaves_the_module_as_it_was(tiny):
    adapt, members = started(tiny)
    module = adapt.module(ll.stack(members), index=INDEX)
    want = module.generate(PROMPTS, **WAYS["greedy"], **SETTINGS)
    with pytest.raises(Exception, match="num_return_sequences"):
        module.generate(PROMPTS, num_beams=2, num_return_sequences=3, **SETTINGS)
    assert torch.equal(module.generate(PROMPTS, **WAYS["greedy"], **SETTINGS), want)


class Table(nn.Module):
    """A linear layer that is called on a table as long as the batch has rows, beside one that is called on the rows."""

    def __init__(self):
        super().__init__()
        self.table, self.rows, self.positions = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return self.rows(x) + self.table(self.positions).sum(0)


def test_rows_are_known_and_not_guessed():
    adapt = ll.build(Table(), ll.LoRAConfig(r=2))
    module = adapt.module(ll.stack([move(adapt.init(seed=k)) for k in range(2)]), index=[0, 1, 1, 0])
    with pytest.raises(ValueError, match=r'adapt.module: at "table" expected an input whose first axis is made of the batch\'s rows'):
        module(torch.randn(4, 8))


@pytest.mark.parametrize(
    ("index", "error", "match"),
    [
        ([0, 3], ValueError, r"adapt.module: expected index in 0..2, found 3"),
        (torch.tensor([0, -1]), ValueError, r"adapt.module: expected index in 0..2, found -1"),
        ([], ValueError, r"adapt.module: expected index to name the adapter of one row at least"),
        ([0.5], TypeError, r"adapt.module: expected index as integers"),
        (torch.zeros(2), TypeError, r"adapt.module: expected index as a vector of integers"),
    ],
)
def test_wrong_index_is_refused(tiny, index, error, match):
    adapt, members = started(tiny)
    with pytest.raises(error, match=match):
        adapt.module(ll.stack(members), index=index)
    with pytest.raises(ValueError, match="expected leaves with one leading adapter axis"):
        adapt.module(members[0], index=[0])


@pytest.mark.parametrize("index", [[0, 1], [0, 1, 2], [0, 1, 2, 0, 1, 2, 0, 1]], ids=len)
def test_rows_other_than_those_of_the_index_are_refused(tiny, index):
    adapt, members = started(tiny)
    module = adapt.module(ll.stack(members), index=index)
    with pytest.raises(ValueError, match=f"adapt.module: expected {len(index)} prompts, an adapter's number each in index, found 4"):
        module.generate(PROMPTS, **SETTINGS)
    with pytest.raises(ValueError, match=f"adapt.module: expected a batch of {len(index)} rows, .* found 4"):
        module(input_ids=PROMPTS)


def test_a_checkpoint_that_begins_after_the_build_is_refused_with_the_way_out(tiny):
    model, batch = tiny("llama")
    batch = {**batch, "use_cache": False}
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    stacked = ll.stack([adapt.init(seed=k) for k in range(2)])
    module = adapt.module(stacked, index=[0] * len(batch["input_ids"])).train()
    module.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match=r"found such hooks, as of a checkpoint.*Switch checkpointing on before build"):
        module(**batch)
    model.gradient_checkpointing_enable()
    module = ll.build(model, ll.LoRAConfig(r=2)).module(stacked, index=[0] * len(batch["input_ids"])).train()
    model.gradient_checkpointing_disable()
    module(**batch).logits.sum().backward()
