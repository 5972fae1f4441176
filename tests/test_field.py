"""Situations out of public reports: each is the smallest model in which it happened, and what is right there."""

import contextlib
import copy
import gc
import io
import math
import os
import pickle
import re
import signal
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers as tf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx.experimental.proxy_tensor import make_fx

import lora_lite as ll
import processes
from cases import move, tiny_models
from lora_lite.core import alike, tracing
from lora_lite.integrations.linear_layers import LinearLayers
from lora_lite.integrations.trainer import AdapterTrainer

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
HEAD = r"(^|\.)(score|classifier)$"


def bert(seed=0, head=0, dtype=torch.float32):
    """Give a classifier whose body is of one seed and whose head of another, as `from_pretrained` makes it."""
    torch.manual_seed(seed)
    model = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=64, num_labels=3, hidden_dropout_prob=0.0, **SMALL))
    torch.manual_seed(100 + head)
    nn.init.normal_(model.classifier.weight, std=0.2)
    nn.init.normal_(model.classifier.bias, std=0.2)
    return model.to(dtype).eval()


def ids(rows=3, length=7):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(5))


def other_weights(model, pattern, by=0.3):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if pattern in name:
                p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(8)).to(p.dtype))
    return model


# A file gives back the function that was saved


WITH_HEAD = [ll.LoRAConfig(r=4, target_names=r"(query|value)$"), ll.FullConfig(target_names=HEAD)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_head_comes_back_where_the_model_drew_another(tmp_path, dtype):
    adapt = ll.build(bert(head=1, dtype=dtype), WITH_HEAD)
    params = move(adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, loaded = ll.load(bert(head=2, dtype=dtype), tmp_path / "a.safetensors")
    want = adapt(params, {"input_ids": ids()}).logits
    assert (adapt.base({"input_ids": ids()}).logits - again.base({"input_ids": ids()}).logits).abs().max() > 0.1
    torch.testing.assert_close(again(loaded, {"input_ids": ids()}).logits, want, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 2e-2)
    same = ll.load(bert(head=1, dtype=dtype), tmp_path / "a.safetensors")[1]
    assert all(torch.equal(a, b) for a, b in zip(ll.tree_leaves(same), ll.tree_leaves(params)))


def head_comes_back(folder):
    adapt, params = ll.load(bert(head=3), folder / "a.safetensors")
    torch.testing.assert_close(adapt(params, {"input_ids": ids()}).logits, torch.load(folder / "want.pt"), rtol=1e-5, atol=1e-5)
    return os.getpid()


def test_new_head_comes_back_in_another_process(tmp_path):
    adapt = ll.build(bert(head=1), WITH_HEAD)
    params = move(adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    torch.save(adapt(params, {"input_ids": ids()}).logits, tmp_path / "want.pt")
    with processes.context().Pool(1) as pool:
        assert pool.apply(head_comes_back, (tmp_path,)) != os.getpid()


def test_norms_come_back_on_a_model_with_others(tmp_path):
    model = bert()
    adapt = ll.build(model, ll.LNTuningConfig())
    params = move(adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    other = other_weights(bert(), "LayerNorm")
    again, loaded = ll.load(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(again(loaded, (ids(),)).logits, adapt(params, (ids(),)).logits, rtol=1e-5, atol=1e-5)


def arguments(folder, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "learning_rate": 0.05, "per_device_train_batch_size": 3}
    return tf.TrainingArguments(str(folder), max_steps=4, save_strategy="steps", save_steps=2, **{**quiet, **options})


def trainer(model, folder, cfg=WITH_HEAD, **options):
    adapt = ll.build(model, cfg, **options)
    rows = [{"input_ids": row, "labels": k % 3} for k, row in enumerate(ids(12))]
    return AdapterTrainer(adapt, adapt.init(), args=arguments(folder), train_dataset=rows)


def test_resumed_training_goes_on_with_the_head_of_the_checkpoint(tmp_path):
    whole = trainer(bert(head=1), tmp_path)
    whole.train()
    resumed = trainer(bert(head=2), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    got, want = (t.adapt(t.params(), {"input_ids": ids()}).logits for t in (resumed, whole))
    # The displacements start from another head, so their last digits differ, and Adam divides by small gradients: not to the bit.
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_checkpoint_of_other_constants_is_not_resumed(tmp_path):
    cfg = ll.CorDAConfig(r=4, target_names=r"query$")
    first, second = ([{"input_ids": torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(k))}] for k in (1, 2))
    trainer(bert(), tmp_path, cfg, calibration=first).train()
    trainer(bert(), tmp_path, cfg, calibration=first).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    file = tmp_path / "checkpoint-2" / "adapter.safetensors"
    with pytest.raises(ValueError, match=r"expected the constants of .*found others at .*query.*ll\.load"):
        trainer(bert(), tmp_path, cfg, calibration=second).train(resume_from_checkpoint=str(file.parent))
    adapt, params = ll.load(bert(), file)
    rows = [{"input_ids": row, "labels": k % 3} for k, row in enumerate(ids(12))]
    AdapterTrainer(adapt, params, args=arguments(tmp_path), train_dataset=rows).train(resume_from_checkpoint=str(file.parent))


def saved(folder, cfg, model):
    adapt = ll.build(model, cfg)
    ll.save(adapt, move(adapt.init()), folder / "a.safetensors")
    return folder / "a.safetensors"


DERIVED = [cls(r=4, target_names=r"query$") for cls in (ll.DoRAConfig, ll.PiSSAConfig, ll.SSVDConfig, ll.LoRAXSConfig)]


@pytest.mark.parametrize("cfg", DERIVED, ids=lambda cfg: cfg.name)
def test_constants_of_another_weight_are_reported(tmp_path, cfg):
    file = saved(tmp_path, cfg, bert())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.load(bert(), file)
        ll.load(bert(dtype=torch.bfloat16), file)  # the same checkpoint, rounded
    with pytest.warns(
        UserWarning, match=rf'other weights at "bert\.encoder\.layer\.0\.attention\.self\.query"$|{type(cfg).__name__}'
    ) as seen:
        ll.load(other_weights(bert(), "layer.0.attention.self.query"), file)
    assert len(seen) == 1
    assert "layer.1" not in str(seen[0].message)


def test_lora_takes_a_fine_tuned_base_without_a_word(tmp_path):
    file = saved(tmp_path, ll.LoRAConfig(r=4, target_names=r"query$"), bert())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.load(other_weights(bert(), "query"), file)


@pytest.mark.filterwarnings("ignore:build")
def test_low_rank_update_of_another_head_is_reported(tmp_path):
    file = saved(tmp_path, ll.LoRAConfig(r=4, exclude_names=()), bert(head=1))
    with pytest.warns(UserWarning, match=r'other weights at "classifier".*FullConfig'):
        ll.load(bert(head=2), file)


# to_lora says what is lost, biases too


def test_low_rank_form_of_a_whole_module_is_refused_by_name_beside_others():
    adapt = ll.build(bert(), WITH_HEAD)
    with pytest.raises(ValueError, match=r'(?s)to_lora: .*"classifier": FullConfig trains a module as a whole, biases and all'):
        ll.to_lora(adapt, move(adapt.init()), r=4)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_low_rank_form_of_a_whole_linear_layer_is_refused_whatever_moved(name):
    adapt = ll.build(nn.Sequential(nn.Linear(8, 4)), ll.FullConfig(target_names="0"))
    params = {"0": {n: p + (n == name) for n, p in adapt.init()["0"].items()}}
    with pytest.raises(ValueError, match='"0": FullConfig trains a module as a whole'):
        ll.to_lora(adapt, params, r=4)


# Excluding more never includes more


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.up, self.down, self.lm_head = nn.Embedding(9, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 9)

    def forward(self, x):
        return self.lm_head(self.down(self.up(self.embed_tokens(x)).tanh()))


EXCLUDED = {
    "default": ({}, ["up", "down"]),
    "one more": ({"exclude_names": ("up",)}, ["down"]),
    "one more as a string": ({"exclude_names": "up"}, ["down"]),
    "one of the default": ({"exclude_names": ("lm_head",)}, ["up", "down"]),
    "nothing": ({"exclude_names": ()}, ["up", "down", "lm_head"]),
    "one more, the head by name": ({"exclude_names": ("up",), "target_names": ("down", "lm_head$")}, ["down", "lm_head"]),
    "one more, the embedding by name": ({"exclude_names": ("up",), "target_names": ("down", "embed_tokens$")}, ["embed_tokens", "down"]),
    "one more of everything": ({"exclude_names": ("up",), "target_names": ".*"}, ["down"]),
    "the head by both": ({"exclude_names": ("lm_head",), "target_names": ("down", "up")}, ["up", "down"]),
}


@pytest.mark.parametrize(("fields", "want"), EXCLUDED.values(), ids=EXCLUDED)
def test_exclude_names_adds_to_its_default(fields, want):
    assert [t.path for t in ll.find_targets(Headed(), ll.LoRAConfig(r=2, **fields))] == want


def test_layer_of_the_default_that_is_named_is_told_how_to_be_taken():
    """The error said "Change them"."""
    with pytest.raises(ValueError, match=r"leave out all it matches.*exclude_names=\(\) leaves nothing out"):
        ll.find_targets(Headed(), ll.LoRAConfig(r=2, target_names="lm_head$"))
    assert [t.path for t in ll.find_targets(Headed(), ll.LoRAConfig(r=2, target_names="lm_head$", exclude_names=()))] == ["lm_head"]


def test_whole_modules_have_no_default_to_add_to():
    assert [t.path for t in ll.find_targets(Headed(), ll.FullConfig(target_names="lm_head|up", exclude_names="up"))] == ["lm_head"]


def test_layer_in_two_configs_names_the_way_out_and_it_works():
    configs = [ll.LoRAConfig(r=2), ll.DoRAConfig(r=2, target_names="up$")]
    with pytest.raises(ValueError, match=r'in both LoRAConfig and DoRAConfig.*exclude_names=\(r"\^up\$",\)'):
        ll.build(Headed(), configs)
    adapt = ll.build(Headed(), [ll.LoRAConfig(r=2, exclude_names=(r"^up$",)), configs[1]])
    assert [(t.path, c.name) for t, c in zip(adapt.targets, adapt.configs)] == [("down", "lora"), ("up", "dora")]


def test_way_out_of_a_numbered_layer_leaves_no_other_out():
    """`1$` left layer 11 out too, without a word, and `^1` all layers from 10 to 19."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    with pytest.raises(ValueError, match=r'found "1" in both.*exclude_names=\(r"\^1\$",\)') as e:
        ll.build(model, [ll.LoRAConfig(r=2), ll.IA3Config(target_names="^1$")])
    left = re.search(r'exclude_names=\(r"(.*?)",\)', str(e.value))[1]
    assert len(ll.build(model, [ll.LoRAConfig(r=2, exclude_names=left), ll.IA3Config(target_names="^1$")]).targets) == 12
    peft = pytest.importorskip("peft")
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["1"]), model)
    with pytest.raises(ValueError, match="adapters of another library") as e:
        ll.build(wrapped, ll.LoRAConfig(r=2))
    left = re.search(r'exclude_names=\(r"(.*?)", \.\.\.\)', str(e.value))[1]
    assert len(ll.build(wrapped, ll.LoRAConfig(r=2, exclude_names=left)).targets) == 11


# All that an expression names, or an error


def gemma():
    text = {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "vocab_size_per_layer_input": 64}
    text |= {"hidden_size_per_layer_input": 8, "layer_types": ["full_attention"], "num_kv_shared_layers": 0}
    one = {**SMALL, "num_hidden_layers": 1}
    vision = {**one, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4}
    return tf.Gemma4ForConditionalGeneration(tf.Gemma4Config(audio_config=None, vision_config=vision, text_config={**one, **text}))


class QuantLinear(nn.Module):
    """A packed layer of a class that no kind knows."""

    def __init__(self, layer):
        super().__init__()
        self.register_buffer("qweight", (layer.weight.detach() * 64).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 64)


class QuantKind(ll.Kind):
    weight = property(lambda self: self.layer.qweight / 64)
    bias = property(lambda self: None)

    @classmethod
    def fits(cls, layer):
        return isinstance(layer, QuantLinear)


def llava():
    one = {**SMALL, "num_hidden_layers": 1}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**one, image_size=16, patch_size=8),
        text_config=tf.LlamaConfig(**one, vocab_size=64),
        image_token_index=63,
    )
    model = tf.LlavaForConditionalGeneration(config)
    attention = model.model.language_model.layers[0].self_attn
    attention.q_proj = QuantLinear(attention.q_proj)
    return model


def found(model, cfg=None, kinds=(), **fields):
    return [t.path for t in ll.find_targets(model, cfg or ll.LoRAConfig(r=2, **fields), kinds=kinds)]


def test_wrapper_of_a_linear_layer_is_named_and_each_way_out_works():
    model = gemma()
    text, vision = "model.language_model.layers.0.self_attn.q_proj", "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    with pytest.raises(
        ValueError, match=r'q_proj \(Gemma4ClippableLinear\)" among them\. Name the layer inside too, e\.g\. r"q_proj\\\.linear\$"'
    ) as e:
        found(model, target_names=r"q_proj$")
    assert r'exclude_names=(r"^model\.vision_tower\.",)' in str(e.value)
    assert sorted(found(model, target_names=(r"q_proj$", r"q_proj\.linear$"))) == [text, f"{vision}.linear"]
    assert found(model, target_names=r"q_proj$", exclude_names=(r"^model\.vision_tower\.",)) == [text]
    assert sorted(found(model, target_names=r"q_proj")) == [text, f"{vision}.linear"]
    assert len(found(model)) > 10


def test_packed_layer_of_an_unknown_class_is_named_and_each_way_out_works():
    model = llava()
    text, vision = "model.language_model.layers.0.self_attn.q_proj", "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    with pytest.raises(
        ValueError, match=r'language_model\.layers\.0\.self_attn\.q_proj \(QuantLinear\)".*kinds=.*exclude_names=\(r"\^model\\.language'
    ):
        found(model, target_names=r"q_proj$")
    assert found(model, target_names=r"q_proj$", exclude_names=(r"^model\.language_model\.",)) == [vision]
    assert sorted(found(model, target_names=r"q_proj$", kinds=(QuantKind,))) == [text, vision]


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.q_norm, self.act = nn.Linear(8, 8), nn.LayerNorm(8), nn.Sequential(nn.ReLU(), nn.Dropout())
        self.rnn_query = nn.LSTM(8, 8)

    def forward(self, x):
        return self.rnn_query(self.q_norm(self.query(x)))[0]


def test_what_holds_no_matrix_may_be_named_beside_a_layer():
    model = nn.Sequential(Mixed())
    assert found(model, target_names=r"0\.q(uery|_norm)$") == ["0.query"]
    assert found(model, target_names=r"0\.") == ["0.query"]
    with pytest.raises(ValueError, match=r'"0\.rnn_query \(LSTM\)" among them'):
        found(model, target_names=r"query$")
    assert found(model, target_names=r"query$", exclude_names=(r"^0\.rnn_query$",)) == ["0.query"]


# A model that wears adapters already


def worn_by_peft(**fields):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, **fields))


@pytest.mark.parametrize("fields", [{}, {"target_names": r"query$"}, {"target_names": r"query"}, {"target_names": r"attention\."}])
@pytest.mark.filterwarnings("ignore:build")
def test_model_that_wears_the_adapters_of_peft_is_refused_and_each_way_out_works(fields):
    wrapped = worn_by_peft()
    with pytest.raises(
        ValueError,
        match=r'without adapters of another library, found ".*query".*\(peft\'s Linear\).*merge_and_unload.*unload.*exclude_names',
    ) as e:
        ll.build(wrapped, ll.LoRAConfig(r=2, **fields))
    assert 'exclude_names=(r"query", ...)' in str(e.value)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert len(ll.build(merged, ll.LoRAConfig(r=2, **fields)).targets) == len(ll.build(bert(), ll.LoRAConfig(r=2, **fields)).targets)


@pytest.mark.filterwarnings("ignore:build")
def test_first_adapter_of_peft_stays_where_its_layers_are_left_out():
    wrapped = worn_by_peft().eval()
    adapt = ll.build(wrapped, ll.LoRAConfig(r=2, exclude_names="query"))
    assert not [t.path for t in adapt.targets if "query" in t.path or "lora" in t.path]
    assert torch.equal(adapt(adapt.init(), {"input_ids": ids()}).logits, wrapped(input_ids=ids()).logits)
    assert found(wrapped, target_names="key$") == [f"base_model.model.bert.encoder.layer.{k}.attention.self.key" for k in (0, 1)]


def test_head_that_peft_saves_whole_is_refused():
    with pytest.raises(ValueError, match=r'found ".*classifier".*ModulesToSaveWrapper'):
        ll.build(worn_by_peft(modules_to_save=["classifier"]), ll.LoRAConfig(r=2, target_names=r"classifier"))


class Wrapper(nn.Module):
    """As other libraries wrap a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.down, self.up = layer, nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.FullConfig(target_names="base_layer")], ids=lambda cfg: cfg.name)
def test_wrapper_of_another_library_is_refused(cfg):
    with pytest.raises(ValueError, match='found "1"'):
        ll.build(nn.Sequential(nn.Linear(8, 8), Wrapper(nn.Linear(8, 8))), cfg)
    assert found(nn.Sequential(nn.Linear(8, 8), Wrapper(nn.Linear(8, 8))), ll.FullConfig(target_names=r"^1$")) == ["1"]  # adapted whole


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.FullConfig(target_names="up$"), ll.LNTuningConfig()], ids=lambda cfg: cfg.name)
def test_module_of_ours_is_refused_and_each_way_out_works(tmp_path, cfg):
    model = Headed()
    model.norm = nn.LayerNorm(8)
    first = ll.LoRAConfig(r=2, target_names="down$")
    adapt = ll.build(model, first)
    module = adapt.module(move(adapt.init()))
    with pytest.raises(ValueError, match=r'adapt\.module\(params\) made, adapted at "down".*build\(model, \[first, second\]\).*merge'):
        ll.build(module, cfg)
    ll.save(adapt, adapt.init(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"adapt\.module\(params\) made"):
        ll.load(module, tmp_path / "a.safetensors")
    other = ll.LoRAConfig(r=2, target_names="up$") if cfg.name == "lora" else cfg
    assert len(ll.build(model, [first, other]).targets) == 2
    model.load_state_dict(adapt.merge(adapt.init()), strict=False)
    ll.build(model, cfg)


# Blocks are counted along the list of blocks


class Block(nn.Module):
    def __init__(self, experts=0):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))

    def forward(self, x):
        return self.lin(x)


class Body(nn.Module):
    def __init__(self, name, blocks, experts=0):
        super().__init__()
        self.add_module(name, nn.ModuleList(Block(experts) for _ in range(blocks)))


def numbers(model, pattern="lin$", **fields):
    from lora_lite.prepare.blocks import block_indices

    paths = found(model, target_names=pattern, **fields)
    return [block_indices(model, paths)[path] for path in paths]


BLOCKS = {
    "around a model": (nn.Sequential(Body("layers", 3), nn.Identity()), [0, 1, 2]),
    "behind other parts": (nn.Sequential(nn.Identity(), Body("units", 3)), [0, 1, 2]),
    "alone in a list": (nn.Sequential(Body("layers", 3)), [0, 1, 2]),
    "around a sequence": (nn.Sequential(nn.Sequential(*(Block() for _ in range(3))), nn.Identity()), [0, 1, 2]),
    "several towers": (nn.ModuleList([Body("layers", 3), Body("layers", 2)]), [0, 1, 2, 0, 1]),
    "one block": (Body("layers", 1), [0]),
    "experts in blocks": (Body("layers", 2, experts=5), [0, 1]),
    "a list of no usual name": (Body("units", 3, experts=5), [0, 1, 2]),
}


@pytest.mark.parametrize(("model", "want"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_are_counted_along_their_list(model, want):
    assert numbers(model) == want
    assert numbers(model, layers=[want[-1]]) == [want[-1]] * want.count(want[-1])


def test_layers_of_experts_are_those_of_their_block():
    assert numbers(Body("layers", 2, experts=5), r"experts\.", layers=1) == [1] * 5


def test_index_that_no_block_has_names_those_there_are():
    with pytest.raises(ValueError, match=r"found \[3\] in a model with blocks 0 to 2"):
        numbers(nn.Sequential(Body("layers", 3), nn.Identity()), layers=(0, 3))


# Calibration: the positions that count are those of the layer's part of the model


def seq2seq():
    torch.manual_seed(0)
    config = tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(config).eval()


def statistics(model, cfg, batch):
    from lora_lite.build import choose
    from lora_lite.prepare.calibrate import gather

    return gather(model, choose(model, cfg), [batch], progress=False)


def source_and_target(source, target):
    kept, labels = torch.ones(8, source, dtype=torch.long), torch.full((8, target), -100)
    kept[:, 10:], labels[:, :4] = 0, torch.randint(3, 64, (8, 4))
    return {"input_ids": ids(8, source), "attention_mask": kept, "labels": labels}


@pytest.mark.parametrize("target", [12, 13])
def test_encoder_is_calibrated_by_its_own_mask_and_decoder_by_the_labels(target):
    batch = source_and_target(12, target)
    stats = statistics(seq2seq(), ll.EVAConfig(r=4), batch)
    counts = {path: state.count for path, state in stats.items()}
    assert counts["encoder.block.0.layer.0.SelfAttention.q"] == 8 * 10
    assert counts["decoder.block.0.layer.0.SelfAttention.q"] == counts["decoder.block.0.layer.1.EncDecAttention.q"] == 8 * 4
    assert counts["decoder.block.0.layer.1.EncDecAttention.k"] == counts["decoder.block.0.layer.1.EncDecAttention.v"] == 8 * 10
    assert counts["decoder.block.0.layer.2.DenseReluDense.wo"] == 8 * 4


def test_decoders_mask_is_for_the_decoder():
    batch = source_and_target(12, 12)
    own = torch.ones(8, 12, dtype=torch.long)
    own[:, 3:] = 0
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "decoder_input_ids": ids(8, 12)}
    stats = statistics(seq2seq(), ll.ASVDConfig(r=4), {**batch, "decoder_attention_mask": own})
    assert stats["encoder.block.0.layer.0.SelfAttention.q"].count == 80
    assert stats["decoder.block.0.layer.0.SelfAttention.q"].count == 24
    assert statistics(seq2seq(), ll.ASVDConfig(r=4), batch)["decoder.block.0.layer.0.SelfAttention.q"].count == 96


@pytest.mark.parametrize("kind", [tuple, list])
def test_masks_of_a_batch_whose_arguments_are_given_in_order_count(kind):
    """As a `TensorDataset` gives them: the padding was calibrated on."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    stats = statistics(bert(), ll.EVAConfig(r=2, target_names="query$"), kind([ids(), mask]))
    assert {s.count for s in stats.values()} == {18}
    stats = statistics(seq2seq(), ll.EVAConfig(r=4), kind([ids(), mask, ids()]))
    assert {s.count for path, s in stats.items() if path.startswith("encoder")} == {18}


def test_mask_of_the_text_is_not_for_the_vision_tower():
    torch.manual_seed(0)
    small = {**SMALL, "num_hidden_layers": 1}
    model = tf.CLIPModel(
        tf.CLIPConfig(
            text_config={**small, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 2, "pad_token_id": 1},
            vision_config={**small, "image_size": 8, "patch_size": 4},
            projection_dim=16,
        )
    ).eval()
    mask = torch.ones(3, 5, dtype=torch.long)  # the tower has 4 patches and a class token: 5 positions
    mask[:, 3:] = 0
    batch = {"input_ids": ids(3, 5), "attention_mask": mask, "pixel_values": torch.randn(3, 3, 8, 8)}
    counts = {path: s.count for path, s in statistics(model, ll.ASVDConfig(r=4, target_names=r"q_proj$"), batch).items()}
    assert counts == {"text_model.encoder.layers.0.self_attn.q_proj": 9, "vision_model.encoder.layers.0.self_attn.q_proj": 15}


# Tensors land where the layer is, whatever the default device is


CALIBRATED = {"eva", "corda", "asvd", "lora_ga"}
DEFAULTS = {
    **{
        name: cls(r=2)
        for name, cls in ll.VARIANTS.items()
        if "r" in cls.__dataclass_fields__ and name not in ("adalora", "antipasto", "loftq")
    },
    **{name: ll.VARIANTS[name]() for name in ("ia3", "ia3_ff", "bitfit", "ln_tuning", "goft", "qgoft", "supertuning")},
    "vblora": ll.VBLoRAConfig(r=2, num_vectors=8, vector_length=4),
    "boft": ll.BOFTConfig(block_size=4, n_butterfly_factor=2),
    "c3a": ll.C3AConfig(block_size=4, init="gaussian"),
    "fourierft": ll.FourierFTConfig(n_frequency=20),
    "waveft": ll.WaveFTConfig(n_frequency=20),
    "ether": ll.ETHERConfig(n_blocks=2),
    "ether_plus": ll.ETHERPlusConfig(n_blocks=2),
    "clover": ll.CLOVERConfig(head_dim=8),
    "antipasto": ll.AntiPaSTOConfig(r=8),
    "adalora": ll.AdaLoRAConfig(init_r=4, target_r=2, total_step=10),
    "road": ll.ROADConfig(group_size=4),
    "oft": ll.OFTConfig(block_size=4),
    "full": ll.FullConfig(target_names=r"2\.0$"),
}


def stacked_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Sequential(nn.Linear(32, 16), nn.Tanh()), nn.Linear(16, 16)).eval()


@pytest.mark.parametrize("name", DEFAULTS)
def test_everything_is_made_where_the_layer_is(name, tmp_path):
    model, cfg, x = stacked_layers(), DEFAULTS[name], torch.randn(5, 16)
    if name == "loreft":
        pytest.skip("it adapts blocks of hidden states; the draws are those of the others")
    options = {"calibration": [x], "loss": (lambda out, _: out.square().sum()) if name == "lora_ga" else None} if cfg.calibrated else {}
    want = ll.build(model, cfg, **options)
    torch.set_default_device("meta")
    try:
        adapt = ll.build(model, cfg, **options)
        params = adapt.init(seed=3)
        ll.save(adapt, params, tmp_path / "a.safetensors")
        again, loaded = ll.load(model, tmp_path / "a.safetensors")
        y = adapt(params, x)
        stacked = ll.stack([params, adapt.init(seed=4)])
        mixed = adapt.mixed(stacked, x[:4], [0, 1, 1, 0])
        adapt.steer(stacked, 0.5)
        if cfg.linear and name != "ln_tuning":
            adapt.merge_error(params, adapt.merge(params))
        adapt.summary()
        module = adapt.module(params)
    finally:
        torch.set_default_device(None)
    for tree in (params, loaded, adapt.constants, again.constants, adapt.params(module)):
        assert all(leaf.device.type == "cpu" for leaf in ll.tree_leaves(tree))
    assert all(torch.equal(a, b) for a, b in zip(ll.tree_leaves(params), ll.tree_leaves(want.init(seed=3))))
    assert all(torch.equal(a, b) for a, b in zip(ll.tree_leaves(params), ll.tree_leaves(loaded)))
    torch.testing.assert_close(y, want(params, x))
    assert mixed.device.type == "cpu"


OF_VALUES = {FakeTensorMode: ("randlora", "unilora"), None: ("frod",)}  # beside those that are refused in both


@pytest.mark.parametrize("mode", OF_VALUES, ids=["fake", "meta"])
@pytest.mark.parametrize("name", DEFAULTS)
def test_models_without_values_are_built_or_refused_by_name(name, mode):
    cfg = DEFAULTS[name]
    if name == "loreft":
        pytest.skip("it adapts blocks of hidden states")
    with mode() if mode else torch.device("meta"):
        model, x = stacked_layers(), torch.randn(5, 16)
        options = {"calibration": [x], "loss": (lambda out, _: out.square().sum()) if name == "lora_ga" else None} if cfg.calibrated else {}
        if name in OF_VALUES[mode] or name in ("adamss", "asvd", "corda", "lora_ga"):
            with pytest.raises(ValueError, match=f"{type(cfg).__name__} computes its start from values, found weights without any"):
                ll.build(model, cfg, **options)
            return
        adapt = ll.build(model, cfg, **options)
        assert adapt(adapt.init(), x).shape == (5, 16)


@pytest.mark.parametrize("name", ["fourierft", "waveft", "c3a", "goft"])
def test_models_with_values_and_without_share_no_cached_tensors(name):
    """A build under `FakeTensorMode` left its places to all later ones."""
    for mode in (FakeTensorMode, contextlib.nullcontext, FakeTensorMode):
        with mode():
            adapt = ll.build(nn.Sequential(nn.Linear(16, 8)), DEFAULTS[name])
            params = ll.tree_map(lambda p: p + 0.1, adapt.init())
            assert adapt(params, torch.randn(5, 16)).shape == (5, 8)
            assert all((type(c) is torch.Tensor) == (mode is not FakeTensorMode) for c in adapt.constants["0"].values())


def test_files_of_peft_and_low_rank_forms_are_made_where_the_layer_is(tmp_path):
    model = bert()
    torch.set_default_device("meta")
    try:
        adapt = ll.build(model, ll.DeLoRAConfig(r=2, target_names="query$"))
        params = adapt.init()
        ll.to_peft(adapt, params, tmp_path / "a")
        again, read = ll.from_peft(model, tmp_path / "a")
        _, low, _ = ll.to_lora(adapt, params, r=2)
    finally:
        torch.set_default_device(None)
    assert all(leaf.device.type == "cpu" for tree in (read, low, again.constants) for leaf in ll.tree_leaves(tree))
    torch.testing.assert_close(again(read, (ids(),)).logits, adapt(params, (ids(),)).logits, rtol=1e-5, atol=1e-5)


# What is made once is the same, whatever is set around the call


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", sorted(set(DEFAULTS) - {"loreft", *CALIBRATED}))
def test_starts_constants_and_merged_weights_are_the_same_whatever_is_set(name, around):
    """transformers sets the default dtype while it loads, and evaluation loops stand in autocast and inference mode."""
    model, cfg, x = stacked_layers().requires_grad_(False), DEFAULTS[name], torch.randn(5, 16)

    def made(adapt, params):
        found = [adapt.constants, adapt.init(seed=3)]
        if cfg.linear:
            merged = adapt.merge(params)
            found += [
                {"": merged},
                {"": {path: torch.tensor(e, dtype=torch.float64) for path, e in adapt.merge_error(params, merged).items()}},
            ]
        return [leaf for tree in found for leaf in ll.tree_leaves(tree)]

    want = ll.build(model, cfg)
    params = move(want.init(seed=3))
    wanted = made(want, params)
    with AROUND[around]():
        adapt = ll.build(model, cfg)
        found, module = made(adapt, params), adapt.module(params)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    module(x).sum().backward()  # nothing in it is of inference mode
    ll.value_and_grad(lambda p: adapt(p, x).sum())(adapt.init())
    with AROUND[around]():
        started = adapt.init()
    ll.value_and_grad(lambda p: adapt(p, x).sum())(started)


def test_threads_that_build_at_once_make_the_same():
    """The default dtype is that of all threads."""
    model, found = stacked_layers(), []
    want = ll.build(model, ll.VeRAConfig(r=2)).init(seed=1)

    def build():
        for _ in range(6):
            found.append(ll.build(model, ll.VeRAConfig(r=2)).init(seed=1))

    with default_dtype(torch.bfloat16):
        threads = [threading.Thread(target=build) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() is torch.bfloat16
    assert len(found) == 24
    assert all(torch.equal(a, b) for tree in found for a, b in zip(ll.tree_leaves(tree), ll.tree_leaves(want)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "float32"])
def test_weights_are_merged_into_floating_dtypes_alone(dtype):
    """They were cut off to integers."""
    adapt = ll.build(stacked_layers(), ll.LoRAConfig(r=2))
    with pytest.raises(TypeError, match=rf"merge: expected a floating torch\.dtype or None, found '?{dtype}"):
        adapt.merge(adapt.init(), dtype)


def test_file_read_in_inference_mode_can_be_trained(tmp_path):
    model, x = stacked_layers(), torch.randn(5, 16)
    adapt = ll.build(model, ll.PiSSAConfig(r=2))
    ll.save(adapt, adapt.init(), tmp_path / "a.safetensors")
    with torch.inference_mode():
        again, params = ll.load(model, tmp_path / "a.safetensors")
    ll.value_and_grad(lambda p: again(p, x).sum())(params)


# Messages


def test_head_of_a_classifier_that_nobody_asked_for_is_reported_and_the_way_out_works():
    model = bert()
    with pytest.warns(
        UserWarning,
        match=r'LoRAConfig leaves "classifier" out.*FullConfig\(target_names=r"\^classifier\$"\)',
    ):
        ll.build(model, ll.LoRAConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt = ll.build(model, [ll.LoRAConfig(r=2, exclude_names=(r"^classifier$",)), ll.FullConfig(target_names=r"^classifier$")])
        ll.build(model, ll.LoRAConfig(r=2, target_names=("query$", "classifier$")))
        ll.build(model.bert, ll.LoRAConfig(r=2))
    assert dict(zip((t.path for t in adapt.targets), (c.name for c in adapt.configs)))["classifier"] == "full"


def test_fields_of_other_libraries_are_named_as_they_are_here():
    import inspect

    with pytest.raises(TypeError, match=r"LoRAConfig.*'lora_alpha'\. It is called alpha here"):
        ll.LoRAConfig(lora_alpha=8)
    with pytest.raises(TypeError, match=r"'target_modules'\. It is called target_names here"):
        ll.DoRAConfig(target_modules=["q_proj"])
    with pytest.raises(TypeError, match=r"'modules_to_save'\. Put a FullConfig"):
        ll.LoRAConfig(modules_to_save=["score"])
    with pytest.raises(TypeError, match=r"'trainable_token_indices'\. Put a TokensConfig\(token_ids="):
        ll.LoRAConfig(trainable_token_indices=[1])
    with pytest.raises(TypeError, match=r"'rnak'\. Closest: "):
        ll.LoRAConfig(rnak=8)
    parameters = inspect.signature(ll.LoRAConfig).parameters
    assert {"r", "alpha", "target_names", "layers"} <= set(parameters)
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert copy.deepcopy(ll.LoRAConfig(r=3)) == ll.LoRAConfig(r=3)
    assert ll.LoRAConfig(target_names=["q"], layers=[0, 1]).layers == (0, 1)


def test_arguments_in_another_order_are_type_errors(tmp_path):
    model = Headed()
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params, file = adapt.init(), str(tmp_path / "a.safetensors")
    for call, named in (
        (
            lambda: ll.save(file, adapt, params),
            r"save: expected adapt as what build or load returned, found str\. Call save\(adapt, params",
        ),
        (lambda: ll.save(adapt, file, params), r"save: expected params as a params tree.*found str"),
        (lambda: ll.save(params, adapt, file), r"save: expected adapt"),
        (lambda: ll.load(file, model), r"load: expected model"),
        (lambda: ll.load(model, params), r"load: expected path"),
        (lambda: ll.to_peft(params, adapt, file), r"to_peft: expected adapt"),
        (lambda: ll.from_peft(file, model), r"from_peft: expected model"),
        (lambda: ll.to_lora(params, adapt, 2), r"to_lora: expected adapt"),
        (lambda: ll.find_targets(ll.LoRAConfig(), model), r"find_targets: expected model"),
        (lambda: ll.build(ll.LoRAConfig(), model), r"build: expected model"),
    ):
        with pytest.raises(TypeError, match=named):
            call()


def test_stack_names_the_place_that_differs():
    model = Headed()
    four, eight = (ll.build(model, ll.LoRAConfig(r=r)).init() for r in (2, 3))
    with pytest.raises(ValueError, match=r'tree 1 to differ from tree 0 at "up" "A": found \(3, 8\), and \(2, 8\) in tree 0'):
        ll.stack([four, eight])
    with pytest.raises(ValueError, match=r'at "down": found nothing, and a target'):
        ll.stack([four, {"up": four["up"]}])
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r'leading adapter axis, found \(16, 2\) at "up" "B", and \(2, 8\) at "up" "A"'):
        adapt.mixed(four, torch.randint(0, 9, (4, 3)))


def test_layer_that_a_variant_cannot_adapt_names_variants_that_can():
    model = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2))
    with pytest.raises(ValueError, match=r"exclude_names, or adapt it by a config of its own: (\w+)Config") as e:
        ll.build(model, ll.LilyConfig(target_names="^0$"))
    named = str(e.value).rpartition(": ")[2].rstrip(".").split(", ")
    assert named
    for name in named:
        ll.build(model, getattr(ll, name)(target_names="^0$"))


def test_dir_shows_public_names():
    names = [name for name in dir(ll) if not name.startswith("_")]
    assert {"LoRAConfig", "build", "functional", "testing"} <= set(names)
    assert not {"core", "clone", "files", "prepare", "layers"} & set(names)


def test_files_reach_the_disk_before_and_after_they_get_their_names(tmp_path, monkeypatch):
    done, sync, move_to = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"), sync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), move_to(*names)))
    adapt = ll.build(Headed(), ll.LoRAConfig(r=2))
    ll.save(adapt, adapt.init(), tmp_path / "a.safetensors")
    assert done == ["file", "folder", "rename", "folder"]
    done.clear()
    ll.to_peft(adapt, adapt.init(), tmp_path / "a")
    assert done == ["file", "file", "folder", "rename", "rename", "folder"]


# What a forward leaves behind


class Hooking(nn.Module):
    """A model whose forward hooks a layer of torch's own."""

    def __init__(self):
        super().__init__()
        self.lin, self.seen = nn.Linear(4, 4), []

    def forward(self, x):
        self.lin.register_forward_hook(lambda module, args, kwargs, output: 2 * output, with_kwargs=True, always_call=True)
        return self.lin(x)


@pytest.mark.parametrize("remat", [None, r"layers\.\d+$"])
def test_hooks_that_a_forward_installs_are_gone_after_it(remat):
    model, batch = tiny_models["llama"]()  # never called: transformers hooks its blocks when hidden states are first asked for
    model, batch = model.eval(), {"input_ids": batch["input_ids"], "output_hidden_states": True}
    adapt = ll.build(model, ll.LoRAConfig(r=2), remat=remat)
    params = move(adapt.init())
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    want = merged(**batch).hidden_states
    for _ in range(3):
        found = adapt(params, batch).hidden_states
        assert len(found) == len(want)
        for one, other in zip(found, want):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(adapt.base(batch).hidden_states) == len(want)


def test_hooks_of_each_call_are_its_own():
    x = torch.randn(3, 4)
    adapt = ll.build(Hooking(), ll.LoRAConfig(r=2))
    params = move(adapt.init())
    first = adapt(params, x)
    assert torch.equal(adapt(params, x), first)
    assert torch.equal(adapt.mixed(ll.stack([params]), x, [0, 0, 0]), first)
    held = vars(adapt._replicas.main.module.lin)
    assert not any(table for name, table in held.items() if name.startswith("_forward_hooks"))


OPAQUE = {
    "scripted": (lambda: nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4)))), r'TorchScript at "1", "1\.0"'),
    "lazy": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), r'lazy ones at "1\.weight", "1\.bias"'),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*Lazy modules")
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2, target_names="^0$"), ll.FullConfig(target_names="^0$")], ids=["lora", "full"])
@pytest.mark.parametrize("case", OPAQUE)
def test_modules_that_cannot_be_looked_at_are_named_first_of_all(case, cfg):
    make, message = OPAQUE[case]
    for call in (ll.build, ll.find_targets):
        with pytest.raises(ValueError, match=message):
            call(make(), cfg)


class Kept(pickle.Pickler):
    """Notes the tensors that a pickle sends, and sends a word for each."""

    def __init__(self, file):
        super().__init__(file)
        self.sent = []

    def reducer_override(self, obj):
        if type(obj) not in (torch.Tensor, nn.Parameter):
            return NotImplemented
        self.sent.append(weakref.ref(obj))
        return str, ()


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.PiSSAConfig(r=2), ll.VeRAConfig(r=2)], ids=lambda cfg: cfg.name)
def test_module_that_goes_to_another_process_sends_tensors_that_stay(cfg):
    """torch hands memory over by file descriptors. That of a tensor that nothing keeps is closed, and its number given to the next."""
    adapt = ll.build(Headed(), cfg)
    module, pickler = adapt.module(adapt.init()), Kept(io.BytesIO())
    pickler.dump(module)
    sent = pickler.sent
    pickler.clear_memo()
    gc.collect()
    assert len(sent) > 4
    assert not [ref for ref in sent if ref() is None]


@pytest.fixture
def alone():
    """Return the mesh of a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


SPLIT = {
    "FSDP2": lambda model, mesh: fully_shard(model, mesh=mesh),
    "tensor parallelism": lambda model, mesh: parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}),
}


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.PiSSAConfig(r=2), ll.FullConfig(target_names="^0$")], ids=lambda cfg: cfg.name)
@pytest.mark.parametrize("way", SPLIT)
def test_model_that_is_split_already_is_refused_and_the_way_out_works(alone, way, cfg):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    whole, x = ll.build(model, cfg), torch.randn(3, 8)
    params = move(whole.init())
    want = whole(params, x)
    split = whole.shard(alone, blocks="^0$")
    torch.testing.assert_close(split(params, x), want)
    SPLIT[way](model, alone)
    with pytest.raises(ValueError, match=r'split over processes \(DTensor\) at "0".*before it is split'):
        ll.build(model, cfg)


# Arguments and models that are none of those expected


def pair():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))


def losses(output, batch):
    return output.square().sum(-1)


def wrong_arguments():
    """Return calls with an argument of another type, each with the part of the error that names it."""
    adapt, x = ll.build(pair(), ll.LoRAConfig(r=2)), torch.randn(4, 8)
    params = move(adapt.init())
    stacked, given = ll.stack([params, params]), {path: list(leaves.values()) for path, leaves in params.items()}

    def loss(p):
        return adapt(p, x).square().sum()

    return {
        "no function": (lambda: ll.value_and_grad(loss(params)), "value_and_grad: expected f as a function"),
        "no function of hvp": (lambda: ll.hvp(loss(params)), "hvp: expected f as a function"),
        "no model": (lambda: ll.ggn_vp(x, losses), "ggn_vp: expected model_fn as a function"),
        "no loss": (lambda: ll.ggn_vp(loss, x), "ggn_vp: expected loss_fn as a function"),
        "another order": (lambda: ll.per_example_grad(losses, adapt), "per_example_grad: expected adapt"),
        "another order of norms": (lambda: ll.per_example_norm(losses, adapt), "per_example_norm: expected adapt"),
        "another order of Fisher": (lambda: ll.fisher_diag(losses, adapt), "fisher_diag: expected adapt"),
        "no loss of rows": (lambda: ll.fisher_diag(adapt, None), "fisher_diag: expected loss_rows as a function"),
        "map of rows": (lambda: ll.per_example_grad(adapt, losses, row_map={"0": 1}), "expected row_map as a function"),
        "LinearLayers": (lambda: LinearLayers(params, adapt), "LinearLayers: expected adapt"),
        "function of leaves": (lambda: ll.tree_map(params, params), "tree_map: expected f as a function"),
        "loss of a build": (
            lambda: ll.build(pair(), ll.LoRAGAConfig(r=2), calibration=[x], loss=1.0),
            "build: expected loss as a function",
        ),
        "group of a build": (lambda: ll.build(pair(), ll.EVAConfig(r=2), calibration=[x], group=2), "build: expected group"),
        "row map": (lambda: adapt.mixed(stacked, x, [0, 1, 0, 1], row_map=1), "expected row_map as a mapping"),
        "axis": (lambda: adapt.mixed(stacked, x, [0, 1, 0, 1], row_map={"0": None}), "expected row_map to give '0' an axis"),
        "axis True": (lambda: adapt.mixed(stacked, x, [0, 1, 0, 1], row_map={"0": True}), "expected row_map to give '0' an axis"),
        "stack of lists": (lambda: adapt.mixed(given, x), "expected a stack of params trees, found a dict of list"),
        "unstack of lists": (lambda: ll.unstack(given), "expected a stack of params trees, found a dict of list"),
        "tensor as trees": (lambda: ll.stack(torch.tensor(1.0)), "stack: expected trees as a list"),
        "host of a stack": (lambda: ll.stack([(adapt, params)], adapt=params), "stack: expected adapt"),
        "like": (lambda: ll.unstack(stacked, like=2), "unstack: expected like as a list"),
        "member of like": (lambda: ll.unstack(stacked, like=[params, None]), "unstack: expected tree 1 of like as a params tree"),
        "merged": (lambda: adapt.merge_error(params, None), "merge_error: expected merged as a state dict"),
        "merged arrays": (lambda: adapt.merge_error(params, {"0.weight": [1.0]}), "merge_error: expected merged as a state dict"),
        "rank": (lambda: ll.to_lora(adapt, params, None), "to_lora: expected r as an integer"),
        "strength True": (lambda: adapt.steer(params, True), "adapt.steer: expected c as a number"),
        "complex strength": (lambda: adapt.steer(params, torch.tensor(1j)), "adapt.steer: expected c as a real number"),
        "complex weight": (lambda: ll.combine(adapt, [params], [torch.tensor(1j)]), "combine: expected weights as a list of numbers"),
        "weight on meta": (lambda: ll.combine(adapt, [params], [torch.ones((), device="meta")]), "combine: expected weights as a list"),
        "bytes as layers": (lambda: ll.LoRAConfig(layers=b"01"), "LoRAConfig.layers: expected block indices"),
        "bytes as tokens": (lambda: ll.TokensConfig(token_ids=b"ab"), "TokensConfig.token_ids: expected a sequence of integers"),
        "bytes as a call": (lambda: ll.ALoRAConfig(invocation_tokens=b"ab"), "invocation_tokens: expected a sequence of integers"),
        "8 bits to train": (lambda: ll.LoRAConfig(dtype=torch.float8_e4m3fn), "LoRAConfig.dtype: expected a dtype that can be trained in"),
    }


@pytest.mark.parametrize("case", wrong_arguments())
def test_argument_of_another_type_is_named(case):
    call, named = wrong_arguments()[case]
    with pytest.raises(TypeError, match=named):
        call()


def wrong_values():
    """Return calls with a value that no call can use, each with the part of the error that names it."""
    adapt, x = ll.build(pair(), ll.LoRAConfig(r=2)), torch.randn(4, 8)
    params = move(adapt.init())
    stacked = ll.stack([params, params])
    away = ll.tree_map(lambda p: p.to("meta"), params)

    def product(v):
        return ll.hvp(lambda p: adapt(p, x).square().sum())(params, v)

    return {
        "array for a tree": (lambda: adapt(torch.ones(2).numpy(), x), "expected params that fit.*found ndarray"),
        "pad by another name": (lambda: ll.stack([params, params], pad="froze"), "expected pad as True, False or"),
        "other devices": (lambda: ll.stack([params, away]), r'"0" "A": found device meta, and cpu in tree 0'),
        "more in like": (lambda: ll.unstack(stacked, like=[params, {**params, "1.x": params["0"]}]), r'found none for "1\.x" "A"'),
        "direction without a leaf": (
            lambda: product({"0": params["0"]}),
            r'hvp: expected a vector v that fits the params, found:.*missing "1\.A"',
        ),
        "direction in another dtype": (lambda: product(ll.tree_map(lambda p: p.double(), params)), r'"0\.A": expected .*float32.*float64'),
        "direction on meta": (lambda: product(away), r'"0\.A": expected .*cpu, found .*meta'),
        "direction of numbers": (lambda: product(ll.tree_map(lambda p: 1.0, params)), r'"0\.A": expected .*, found float'),
        "rows of a list": (lambda: ll.per_example_grad(adapt, losses)(ll.tree_map(lambda p: p.tolist(), params), x), "expected a tensor"),
        "rows of integers": (lambda: ll.per_example_norm(adapt, losses)(ll.tree_map(lambda p: p.long(), params), x), "a floating dtype"),
        "no batch": (lambda: ll.per_example_norm(adapt, losses)(params, None), "expected a batch with a tensor"),
        "losses that are none": (lambda: ll.per_example_grad(adapt, lambda o, b: None)(params, x), "return shape .*found NoneType"),
        "expression": (lambda: adapt.mixed(stacked, x, [0, 1, 0, 1], row_map={"(": 0}), r"keys of row_map as regular expressions"),
        "infinite strength": (lambda: adapt.steer(params, float("nan")), "expected c as a finite number, found nan"),
        "method": (lambda: ll.combine(adapt, [params], [1.0], method=["cat"]), "expected method to be any of"),
        "huge integer": (lambda: ll.LoRAConfig(alpha=10**400), "LoRAConfig.alpha: expected a finite number"),
        "remat in bytes": (lambda: ll.build(pair(), ll.LoRAConfig(r=2), remat=b"0"), "expected remat as a regular expression"),
    }


@pytest.mark.parametrize("case", wrong_values())
def test_value_that_no_call_can_use_is_named(case):
    call, named = wrong_values()[case]
    with pytest.raises(ValueError, match=f"(?s){named}"):
        call()


WRITERS = {"save": ll.save, "to_kohya": ll.to_kohya, "to_diffusers": ll.to_diffusers, "to_peft": ll.to_peft}


@pytest.mark.parametrize("name", WRITERS)
def test_writers_refuse_a_place_and_params_that_no_file_holds(name, tmp_path):
    model = pair()
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params, place = move(adapt.init()), tmp_path / "a.safetensors"
    away = ll.build(pair().to("meta"), ll.LoRAConfig(r=2))
    for own, tree in ((away, away.init()), (adapt, ll.tree_map(lambda p: p.to_sparse(), params))):
        with pytest.raises(ValueError, match=rf'{name}: expected dense params with data.*"0\.A"'):
            WRITERS[name](own, tree, place)
    if name != "to_peft":
        for folder in (tmp_path, ""):
            with pytest.raises(IsADirectoryError, match=f"{name}: expected the path of a file, found the directory"):
                WRITERS[name](adapt, params, folder)
    assert not list(tmp_path.iterdir())


class Graph(nn.Module):
    """A layer and a neighbourhood, as graph networks hold it: a buffer without strides."""

    def __init__(self, layout):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        matrix = torch.eye(4).roll(1, 0)
        self.register_buffer("near", matrix.to_mkldnn() if layout == "oneDNN" else matrix.to_sparse(layout=layout))

    def forward(self, x):
        near = self.near.to_dense() if self.near.layout is torch._mkldnn else self.near
        return near @ self.layer(x)


@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant):UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, "oneDNN"], ids=str)
def test_buffers_without_strides_are_no_hindrance(layout, tmp_path):
    model, x = Graph(layout), torch.randn(4, 8)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    merged = adapt.merge(params)
    y = adapt(params, x)
    torch.testing.assert_close(y - adapt.base(x), model.near.to_dense() @ (x @ (merged["layer.weight"] - model.layer.weight).t()))
    torch.testing.assert_close(adapt.train()(params, x), y)
    torch.testing.assert_close(adapt.module(params)(x), y)
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, loaded = ll.load(model, tmp_path / "a.safetensors")
    assert torch.equal(again(loaded, x), y)


@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant):UserWarning")
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.FullConfig(target_names="^0$")], ids=lambda cfg: cfg.name)
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_weights_without_strides_are_refused_and_each_way_out_works(layout, cfg):
    model, x = pair(), torch.randn(3, 8)
    dense = model[0].weight
    model[0].weight = nn.Parameter(dense.detach().to_sparse(layout=layout))
    with pytest.raises(ValueError, match=r'build: expected dense weights, found others at "0 \(torch.sparse_c'):
        ll.build(model, cfg)
    assert [t.path for t in ll.build(model, ll.LoRAConfig(r=2, exclude_names="^0$")).targets] == ["1"]
    model[0].weight = nn.Parameter(model[0].weight.to_dense())
    adapt = ll.build(model, cfg)
    assert torch.equal(adapt(adapt.init(), x), model(x))


DECOMPOSED = ("pissa", "mica", "lora_xs", "svft", "ssvd", "psoft", "osf", "frod", "adamss", "kasa", "tinylora")


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("name", DECOMPOSED)
def test_weight_that_is_not_finite_is_named_where_a_start_is_derived_from_it(name, value):
    cls = ll.VARIANTS[name]
    cfg = cls(**({"r": 2} if "r" in cls.__dataclass_fields__ else {}))
    model = pair()
    with torch.no_grad():
        model[1].weight[0, 0] = value
    with pytest.raises(ValueError, match=f"{cls.__name__}: expected a finite weight.*exclude_names"):
        ll.build(model, cfg)
    kept = type(cfg)(**{**{f: getattr(cfg, f) for f in ("r",) if hasattr(cfg, f)}, "exclude_names": "^1$"})
    assert len(ll.build(model, kept).targets) == 1


@pytest.mark.parametrize("cfg", [ll.ASVDConfig(r=2), ll.CorDAConfig(r=2)], ids=lambda cfg: cfg.name)
def test_layer_whose_inputs_are_all_zero_has_no_start_from_them(cfg):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    nn.init.constant_(model[0].bias, -1e3)  # a dead layer
    with pytest.raises(ValueError, match=f"{type(cfg).__name__}: expected inputs that are not all zero") as e:
        ll.build(model, cfg, calibration=[torch.randn(4, 8)])
    assert '"2"' in str(e.value.__notes__)


@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_layers_without_inputs_or_outputs_are_adapted(sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a start that does nothing
        model, x = nn.Sequential(nn.Linear(*sizes)), torch.randn(3, sizes[0])
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    assert torch.equal(adapt(move(adapt.init()), x), model(x))


# Weights that hooks make, that are read, and that are shared


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2, target_names=("0$",)), ll.DoRAConfig(r=2, target_names=("0$",))], ids=["lora", "dora"])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 6), lambda: nn.Conv1d(4, 6, 3), lambda: nn.Conv1d(4, 6, 3, groups=2)])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_a_hook_makes_are_those_of_the_call(layer, cfg):
    """The hook of the older weight norm sets a plain attribute at each call: a load in place was not seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.weight_norm(layer())).eval()
    x = torch.randn(2, 4) if isinstance(model[0], nn.Linear) else torch.randn(2, 4, 7)
    adapt = ll.build(model, cfg)
    start = adapt.init()
    params = ll.tree_map(lambda p: p + 0.1 * torch.randn_like(p), start)
    module = adapt.module(params)
    model.load_state_dict({name: 1.5 * t for name, t in model.state_dict().items()})
    assert torch.equal(adapt.base(x), model(x))
    assert (adapt(start, x) - model(x)).abs().max() < 1e-5
    if cfg.name == "lora":  # DoRA's norms are those at the build
        want = ll.build(model, cfg)(params, x) - model(x)
        for found in (adapt(params, x), module(x)):
            assert (found - model(x) - want).abs().max() < 1e-5 * want.abs().max()


class Reads(nn.Module):
    """Multiplies by a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.w.t()


@pytest.mark.parametrize(
    ("cfg", "way"),
    [
        (ll.BitFitConfig(target_names=("w$",)), "e.g. LoRAConfig"),
        (ll.LoRAConfig(r=2, lora_bias=True, target_names=("w$",)), "set lora_bias=False"),
        (ll.LoRAConfig(r=2, bias=True, target_names=("w$",)), "set bias=False"),
        (ll.LilyConfig(r=2, target_names=("w$",)), "LoRAConfig"),
        (ll.ALoRAConfig(r=2, target_names=("w$",)), "LoRAConfig"),
    ],
)
def test_variants_that_no_weight_holds_are_refused_where_it_is_read(cfg, way):
    """They were refused at the first call."""
    with pytest.raises(ValueError, match=rf'build: {type(cfg).__name__} cannot adapt "w".*The module around this weight reads it.*{way}'):
        ll.build(Reads(), cfg)


class Both(nn.Module):
    """Has a target that is called, one that is read, and a norm with statistics of its own."""

    def __init__(self):
        super().__init__()
        self.lin, self.norm, self.read = nn.Linear(4, 4), nn.BatchNorm1d(4), Reads()

    def forward(self, x):
        return self.read(self.norm(self.lin(x)))


def test_base_weights_of_a_module_are_not_loaded_into_the_users_model():
    torch.manual_seed(0)
    model, other, x = Both().eval(), Both().eval(), torch.randn(3, 4)
    cfgs = [ll.LoRAConfig(r=2, target_names=("lin$", "w$"))]
    adapt = ll.build(model, cfgs)
    params = ll.tree_map(lambda p: p + 0.1 * torch.randn_like(p), adapt.init())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = ll.build(other, cfgs).module(params).state_dict()
    module = adapt.module(adapt.init())
    with pytest.raises(ValueError, match=r'load_state_dict: expected the base weights.*"lin.weight".*strict=False.*assign=True'):
        module.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    module.load_state_dict({**state, **before})  # its own base, as of a checkpoint
    assert torch.equal(module(x), adapt(params, x))
    module = adapt.module(adapt.init())
    module.load_state_dict({name: t for name, t in state.items() if "adapter" in name}, strict=False)
    assert torch.equal(module(x), adapt(params, x))
    module = adapt.module(adapt.init())
    module.load_state_dict(state, assign=True)
    assert torch.equal(module(x), ll.build(other, cfgs)(params, x))  # the weight that is read has its adapter still
    copied = copy.deepcopy(adapt.module(adapt.init()))
    copied.load_state_dict(state)  # its weights are its own
    assert torch.equal(copied(x), module(x))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_module_that_is_trained_whole_is_refused_in_a_mixed_batch(layer):
    adapt = ll.build(nn.Sequential(nn.Linear(4, 4), layer(4, 4, batch_first=True)), ll.FullConfig(target_names=("1$",)))
    members = ll.stack([adapt.init(), adapt.init()])
    with pytest.raises(ValueError, match=r'at "1" expected modules that torch can map over members, found a recurrent one.*one by one'):
        adapt.mixed(members, torch.randn(4, 3, 4), [0, 1, 0, 1])


@pytest.mark.parametrize("c", [math.nan, math.inf, torch.tensor(-math.inf), torch.tensor([1.0, math.nan])], ids=str)
def test_strengths_that_are_no_numbers_are_refused(c):
    adapt = ll.build(nn.Sequential(nn.Linear(4, 4)), ll.LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"adapt.steer: expected c as a finite number, found (nan|inf|-inf)\. Use 0 for the base model"):
        adapt.steer(adapt.init(), c)


def test_complex_strengths_are_refused():
    adapt = ll.build(nn.Sequential(nn.Linear(4, 4)), ll.LoRAConfig(r=2))
    with pytest.raises(TypeError, match=r"adapt.steer: expected c as a real number, found torch.complex64"):
        adapt.steer(adapt.init(), torch.tensor(1j))


def test_dora_of_a_row_of_zeros_is_finite_in_a_narrower_model(tmp_path):
    """Its gain was infinite there where the update is off, since its norms were kept in the dtype that they were computed in."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    model[0].weight.data[0] = 0
    adapt = ll.build(model, ll.DoRAConfig(r=2, alpha=0.0, dtype=torch.float64))
    params = ll.tree_map(lambda p: p + 0.1, adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, loaded = ll.load(copy.deepcopy(model).float(), tmp_path / "a.safetensors")
    assert torch.isfinite(again(loaded, torch.ones(2, 4))).all()


class Running(nn.Linear):
    """Sums over time, which is the first axis."""

    def forward(self, x):
        return super().forward(x).cumsum(0)


class TimeFirst(nn.Module):
    """Hands a layer that takes time first batches that have rows first."""

    def __init__(self):
        super().__init__()
        self.layer = Running(8, 8)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("index", [[0, 1, 0], [1, 1, 0]])
def test_whole_module_that_takes_time_first_sees_time_first_in_a_mixed_batch(index):
    """It saw the rows in the place of time, and mixed them."""
    torch.manual_seed(0)
    adapt = ll.build(TimeFirst(), ll.FullConfig(target_names=("layer$",)))
    members = [ll.tree_map(lambda p: p + 0.1 * torch.randn_like(p), adapt.init()) for _ in range(2)]
    x = torch.randn(3, 5, 8)
    got = adapt.mixed(ll.stack(members), x, index, row_map={"layer$": 1})
    want = torch.cat([adapt(members[k], x[n : n + 1]) for n, k in enumerate(index)])
    assert (got - want).abs().max() < 1e-5
    grads = ll.per_example_grad(adapt, lambda y, _: y.square().sum((1, 2)), row_map=lambda _: {"layer$": 1})(members[0], x)
    for n in range(3):
        alone = ll.value_and_grad(lambda p, n=n: adapt(p, x[n : n + 1]).square().sum())(members[0])[1]
        for found, own in zip(ll.tree_leaves(grads), ll.tree_leaves(alone)):
            assert (found[n] - own).abs().max() < 1e-4 * max(1.0, float(own.abs().max()))


class Swaps(nn.Module):
    """Calls a layer with weights that it has put into it."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return torch.func.functional_call(self.lin, {"weight": self.lin.weight, "bias": self.lin.bias}, (x,))


def test_adapted_weight_that_a_forward_puts_into_its_layer_is_refused():
    """The call did not end but by the depth of its recursion."""
    adapt = ll.build(Swaps(), ll.LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r'adapt: at "lin" expected a layer with its frozen weight.*functional_call.*functional.linear'):
        adapt(adapt.init(), torch.randn(2, 4))


@pytest.mark.parametrize("how", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2}], ids=str)
@torch.no_grad()
def test_speech_model_returns_several_sequences_for_each_adapter(how):
    """It expands its inputs in two steps, of which the first was not seen."""
    torch.manual_seed(0)
    heads = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = tf.WhisperConfig(vocab_size=60, d_model=16, num_mel_bins=8, max_source_positions=20, max_target_positions=30, **heads, **ids)
    config.suppress_tokens = config.begin_suppress_tokens = []
    model = tf.WhisperForConditionalGeneration(config).eval()
    model.generation_config.update(**ids, no_timestamps_token_id=59, is_multilingual=False)
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=("q_proj", "v_proj")))
    members = [ll.tree_map(lambda p: p + 0.5 * torch.randn_like(p), adapt.init()) for _ in range(2)]
    sound, how = torch.randn(2, 8, 40), {**how, "max_new_tokens": 6, "min_new_tokens": 6}
    got = adapt.module(ll.stack(members), index=[1, 0]).generate(input_features=sound, **how)
    alone = [adapt.module(members[1 - n]).generate(input_features=sound[n : n + 1], **how) for n in range(2)]
    assert torch.equal(got, torch.cat(alone))
    assert not torch.equal(*alone)


@pytest.mark.parametrize(
    "call",
    [
        lambda p: ll.lora_plus(p, lr=math.inf),
        lambda p: ll.lora_plus(p, lr=1e-3, ratio=math.inf),
        lambda p: ll.riemannian(p, p, reg=math.inf),
        lambda p: ll.lora_fa(p, p, scale=math.inf),
        lambda p: ll.lora_fa(p, p, scale=1.0, reg=math.inf),
    ],
)
def test_infinite_rates_and_scales_are_refused(call):
    params = ll.build(nn.Sequential(nn.Linear(4, 4)), ll.LoRAConfig(r=2)).init()
    with pytest.raises(ValueError, match=r": expected (lr|ratio|reg|scale) as a finite number.* found inf.*Use "):
        call(params)


# Weights that a hook makes before a layer's forward.

HOOKED = {
    "spectral norm": nn.utils.spectral_norm,
    "weight norm": nn.utils.weight_norm,
    "pruning": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    "pruning of biases": lambda layer: nn.utils.prune.l1_unstructured(layer, "bias", 0.5),
    "pruning twice": lambda layer: nn.utils.prune.random_unstructured(nn.utils.prune.l1_unstructured(layer, "weight", 0.5), "weight", 0.5),
}


def hooked(hook):
    return nn.Sequential(hook(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 4)).eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.DoRAConfig(r=2), ll.HiRAConfig(r=2)], ids=lambda cfg: cfg.name)
@pytest.mark.parametrize("hook", HOOKED.values(), ids=HOOKED)
def test_weights_that_hooks_make_are_those_of_the_parameters_now(hook, cfg):
    """The adapter read what the hook had left in its last call: nothing of a checkpoint, nothing of what was changed in place."""
    trained, model, x = hooked(hook), hooked(hook), torch.randn(3, 8)
    model.load_state_dict(trained.state_dict())
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    y = adapt(params, x)
    assert torch.equal(adapt.base(x), trained(x))

    plain = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    plain.load_state_dict({f"{k}.{name}": getattr(trained[k], name).detach() for k in (0, 2) for name in ("weight", "bias")})
    torch.testing.assert_close(y, ll.build(plain, cfg)(params, x))

    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1.5 if name.startswith("0.") and not name.endswith("_v") else 1.0)
    assert torch.equal(adapt.base(x), model(x))
    torch.testing.assert_close(copy.deepcopy(adapt)(params, x), adapt(params, x))
    sent = io.BytesIO()
    torch.save(adapt, sent)
    sent.seek(0)
    torch.testing.assert_close(torch.load(sent, weights_only=False)(params, x), adapt(params, x))


@pytest.mark.parametrize("groups", [1, 2])
def test_parameters_of_a_parametrised_target_are_no_targets(groups):
    """A name of the layer asked for both: a grouped kernel is read without a gradient, so that the others got none."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3, groups=groups)), nn.ReLU())
    assert [t.path for t in ll.find_targets(model, ll.LoRAConfig(r=2, target_names=r"\d$"))] == ["0"]


def test_parametrised_layers_of_gpt2_are_adapted():
    model = tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=8)).eval()
    nn.utils.prune.l1_unstructured(model.transformer.h[0].attn.c_attn, "weight", 0.5)
    nn.utils.parametrizations.weight_norm(model.transformer.h[0].mlp.c_fc)
    ids = torch.randint(0, 50, (2, 6))
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    torch.testing.assert_close(adapt.base((ids,)).logits, model(ids).logits)
    assert not torch.allclose(adapt(move(adapt.init()), (ids,)).logits, model(ids).logits, atol=1e-3)


# What the page of targets says of variants that are not linear, act at positions or share tensors.


class Bare(nn.Module):
    """A matrix and a stack of them that the module reads."""

    def __init__(self):
        super().__init__()
        self.one, self.many = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x):
        return torch.einsum("noi,bi->bo", self.many, x @ self.one)


BENT, SHIFTS = {"alora", "lily"}, {"bitfit"}
SHARING = {"vera", "pvera", "randlora", "vblora", "unilora", "tinylora", "frod", "lily"}
REFUSED = {
    "convolution": (nn.Sequential(nn.Conv2d(4, 8, 2)), "^0$", {"alora"}),
    "convolution in groups": (nn.Sequential(nn.Conv2d(8, 8, 2, groups=2)), "^0$", BENT),
    "transposed convolution": (nn.Sequential(nn.ConvTranspose2d(4, 8, 2)), "^0$", BENT),
    "packed projection": (nn.MultiheadAttention(8, 2), "in_proj_weight$", BENT | SHIFTS),
    "bare matrix": (Bare(), "one$", BENT | SHIFTS),
    "bare matrices": (Bare(), "many$", BENT | SHIFTS | SHARING),
}
FITTING = {
    "vblora": {"vector_length": 2, "num_vectors": 8},
    "alora": {"invocation_tokens": (3,)},
    "tokens": {"token_ids": (1,)},
    "supertuning": {"sparsity": 0.5},
    "clover": {"head_dim": 4},
    **{name: {"n_frequency": 9} for name in ("fourierft", "waveft")},
    **{name: {"block_size": 2} for name in ("c3a", "oft")},
    **{name: {"r": 2} for name in ("miss", "gralora", "pissa", "olora", "mica", "lora_xs", "ssvd", "kasa", "deft", "psoft", "adamss")},
    **{"antipasto": {"r": 4}, "osf": {"effective_rank": 2}, "shira": {"r": 1}, "abba": {"r1": 2}, "road": {"group_size": 4}},
    **{"adamss": {"r": 2, "num_subspaces": 2}, "unilora": {"theta_d_length": 9}, "miss": {"r": 2, "mini_r": 2}},
}


@pytest.mark.parametrize("case", REFUSED)
def test_variants_that_a_target_refuses_are_those_of_the_page_and_at_build(case):
    """Lily was refused at a bare parameter by the first call alone, and the page named more variants than there are."""
    model, name, want = REFUSED[case]
    for variant, cls in ll.VARIANTS.items():
        if cls.adapts != "linear" or cls.original or cls.calibrated is True:
            continue
        refused = pytest.raises(ValueError, match=f"{cls.__name__} cannot adapt") if variant in want else contextlib.nullcontext()
        with refused:
            ll.build(model, cls(target_names=name, **FITTING.get(variant, {})), progress=False)


@pytest.mark.parametrize(
    ("cfg", "state"),
    [
        (ll.AdaLoRAConfig(init_r=4, target_r=2, total_step=9), lambda adapt: None),
        (ll.AdaMSSConfig(r=4, num_subspaces=2, use_asa=True), lambda adapt: adapt.constants),
    ],
    ids=lambda case: getattr(case, "name", ""),
)
def test_allocation_of_a_stack_is_refused_and_the_way_out_works(cfg, state):
    adapt = ll.build(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), cfg)
    stacked = ll.stack([move(adapt.init(seed=k)) for k in range(2)])
    with pytest.raises(ValueError, match=r'Config.update: expected params of one linear map at each target, found "0" "A" of shape \(2, '):
        cfg.update(stacked, stacked, state(adapt))
    for member in ll.unstack(stacked):
        cfg.update(member, member, state(adapt))


def test_experts_have_no_budget():
    model, cfg = Bare(), ll.AdaLoRAConfig(init_r=4, target_r=2, total_step=9, target_names="many$")
    params = move(ll.build(model, cfg).init())
    with pytest.raises(ValueError, match=r'"many" "A" of shape \(3, 4, 8\).*Experts of one parameter have no budget'):
        cfg.update(params, params)


def test_numbers_of_numpy_are_numbers():
    adapt = ll.build(nn.Sequential(nn.Linear(8, 4)), ll.LoRAConfig(r=2))
    params, x = move(adapt.init()), torch.randn(3, 8)
    for half in (np.float32(0.5), np.float64(0.5), np.float16(0.5)):
        torch.testing.assert_close(adapt.steer(params, half), adapt.steer(params, 0.5))
        both, tree, _ = ll.combine(adapt, [params, params], [half, np.int64(1)], progress=False)
        torch.testing.assert_close(both(tree, x), adapt(adapt.steer(params, 1.5), x))
    ll.combine(adapt, [params], [1.0], "magnitude_prune", density=np.float32(0.5), r=2, progress=False)


def test_ids_in_any_layout_are_looked_up_without_a_word():
    model = nn.Sequential(nn.Embedding(10, 4))
    adapt = ll.build(model, ll.TokensConfig(token_ids=(3,), target_names="^0$"))
    params, ids = move(adapt.init()), torch.randint(0, 10, (5, 2)).t()
    assert torch.equal(adapt(params, ids), adapt(params, ids.contiguous()))


def test_leaves_have_one_order_in_every_process(tmp_path):
    """An optimiser knows its params by their number. Theirs hung on a set of names, whose order differs from process to process."""
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    cfgs = [ll.TinyLoRAConfig(target_names="^0$", weight_tying=1.0), ll.VBLoRAConfig(vector_length=4, num_vectors=8, target_names="^1$")]
    adapt = ll.build(model, [*cfgs, ll.LilyConfig(r=2, target_names="^2$")])
    ll.save(adapt, adapt.init(), tmp_path / "adapter.safetensors")
    loaded, params = ll.load(model, tmp_path / "adapter.safetensors")
    trees = adapt.shapes, adapt.init(), adapt.params(adapt.module(adapt.init())), params, loaded.init()
    orders = [[(path, *leaves) for path, leaves in tree.items()] for tree in trees]
    assert orders[1:] == orders[:-1]
    assert [name for name, *_ in orders[0]] == ["0", "1", "2", *adapt._plan.shared_params()]


def _by_peft(adapt, params, place):
    ll.to_peft(adapt, params, place)
    return ll.from_peft(adapt._plan.base, place)


def _by_kohya(adapt, params, place):
    ll.to_kohya(adapt, params, place)
    return ll.from_kohya(adapt._plan.base, place)


def _by_file(adapt, params, place):
    ll.save(adapt, params, place)
    return ll.load(adapt._plan.base, place)


@pytest.mark.parametrize("way", [_by_peft, _by_kohya, _by_file, lambda *args: ll.to_lora(*args[:2], r=8)[:2]], ids=range(4))
def test_trees_that_come_back_have_the_order_of_their_adapt(way, tmp_path):
    """An optimiser's state knows leaves by their number: it met those of another layer where training went on from a saved file."""
    model = nn.Sequential()
    for name in "bac":
        model.add_module(name, nn.Linear(8, 8))
    adapt = ll.build(model, [ll.LoRAConfig(r=2, target_names="^c$"), ll.LoRAConfig(r=3, target_names="^[ab]$")])
    back, params = way(adapt, move(adapt.init()), tmp_path / "adapter")
    orders = [[(path, *leaves) for path, leaves in tree.items()] for tree in (params, back.init())]
    assert orders[0] == orders[1]


@pytest.mark.parametrize(
    ("write", "read"), [(ll.to_kohya, ll.from_kohya), (ll.to_diffusers, ll.from_diffusers)], ids=["kohya", "diffusers"]
)
def test_transposed_convolutions_are_in_no_file_of_image_tools(write, read, tmp_path):
    """One with as many outputs as inputs was written, and merged by such tools into the transposed kernel. Another failed inside."""
    model = nn.Sequential(nn.ConvTranspose2d(8, 6, 2), nn.Conv2d(6, 6, 2))
    adapt, conv = (ll.build(model, ll.LoRAConfig(r=2, target_names=names)) for names in (r"^\d$", "^1$"))
    with pytest.raises(ValueError, match=r'"0": LoRAConfig: .* transposed ones not'):
        write(adapt, move(adapt.init()), tmp_path / "adapter")
    write(conv, move(conv.init()), tmp_path / "adapter")
    with pytest.raises(ValueError, match='"1": a transposed convolution, of which these files have none'):
        read(nn.Sequential(nn.Identity(), nn.ConvTranspose2d(6, 6, 2)), tmp_path / "adapter")
    params = move(adapt.init())
    ll.save(adapt, params, tmp_path / "own")
    loaded, again = ll.load(model, tmp_path / "own")
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(loaded(again, x), adapt(params, x))


class Sorts(nn.Module):
    """Its rows are sorted on the way, as packed texts are by their length."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        order = x.sum(1).argsort()
        return self.lin(x[order])[order.argsort()]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_trial_that_ends_for_want_of_memory_is_no_answer(error):
    """The rows then passed for those of the batch, in that call and in each after it, and met the adapters of others."""
    model, full = Sorts(), [True]

    def allocate(*_):
        if full[0]:
            raise error("out of memory")

    model.lin.register_forward_pre_hook(allocate)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    stacked, x = ll.stack([move(adapt.init(seed)) for seed in (0, 1)]), torch.tensor([[3.0], [1.0], [2.0], [0.0]]).expand(4, 4)
    with pytest.raises(error, match="out of memory"):
        adapt.mixed(stacked, x, [0, 1, 0, 1])
    full[0] = False
    with pytest.raises(ValueError, match="made of the batch's rows"):
        adapt.mixed(stacked, x, [0, 1, 0, 1])


@pytest.mark.parametrize("remat", [None, "^1$", "checkpointing"])
def test_weights_that_change_before_the_gradient_are_refused_with_remat_too(remat):
    """The block ran again with other weights, and its gradient was that of neither."""
    if remat == "checkpointing":
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=64, **SMALL)).train()
        model.gradient_checkpointing_enable()
        layer, x, remat = model.model.layers[0].mlp.up_proj, ids(), None
    else:
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
        layer, x = model[1][2], torch.randn(3, 4)
    adapt = ll.build(model, ll.LoRAConfig(r=2), remat=remat)
    params = ll.tree_map(lambda p: p.requires_grad_(), move(adapt.init()))

    def loss():
        out = adapt(params, (x,))
        return getattr(out, "logits", out).square().sum()

    late = loss()
    with torch.no_grad():
        layer.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"weight\" changed in place since|modified by an inplace operation"):
        late.backward()
    for p in (p for leaves in params.values() for p in leaves.values()):
        p.grad = None  # of the layers after the block
    loss().backward()
    found = {path: {name: p.grad for name, p in leaves.items()} for path, leaves in params.items()}
    plain = ll.build(model.eval(), ll.LoRAConfig(r=2))
    wanted = torch.func.grad(lambda p: (getattr(out := plain(p, (x,)), "logits", out)).square().sum())(params)
    for path, leaves in wanted.items():
        for name, leaf in leaves.items():
            torch.testing.assert_close(found[path][name], leaf, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(40))
def test_sorted_rows_are_told_apart_whatever_they_hold(seed):
    """Rows were known again by one number: one pair in twelve passed for each other, and each met the adapter of the other."""
    adapt, generator = ll.build(Sorts().eval(), ll.LoRAConfig(r=2)), torch.Generator().manual_seed(seed)
    stacked = ll.stack([move(adapt.init(seed)) for seed in (0, 1)])
    with pytest.raises(ValueError, match="made of the batch's rows"):
        adapt.mixed(stacked, torch.randn(2, 4, generator=generator), [0, 1])


# What a user changes or does around a call


class TimeOut(nn.Module):
    """Returns time first, and what else a result may hold."""

    def __init__(self, how):
        super().__init__()
        self.lin, self.how = nn.Linear(8, 8), how

    def forward(self, x):
        y = self.lin(x)
        return {"time": lambda: y.transpose(0, 1), "mean": lambda: y.mean(), "shared": lambda: (y, self.lin.bias)}[self.how]()


class AroundTimeOut(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.part = TimeOut(how)

    def forward(self, x, **more):
        return self.part(x)


@pytest.mark.parametrize("how", ["time", "mean", "shared"])
@pytest.mark.parametrize("tried", [True, False])
def test_whole_module_whose_result_has_not_the_rows_first_is_refused_in_a_mixed_batch(how, tried):
    """The result had another shape, or rows in the place of time, without a word."""
    adapt = ll.build(AroundTimeOut(how), ll.FullConfig(target_names=("part$",)))
    stacked, x = ll.stack([move(adapt.init()) for _ in range(2)]), torch.randn(4, 4, 8)
    more = {} if tried else {"cache": object()}
    found = "not. Train" if tried else "(has not let its rows be tried|a number for each row)"
    with pytest.raises(ValueError, match=rf'adapt.mixed: at "part" expected a module whose outputs.*{found}'):
        adapt.mixed(stacked, x, [0, 1, 1, 0], **more)


def test_whole_module_whose_result_packs_the_rows_runs_in_a_mixed_batch():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Flatten(0, 1)), nn.Unflatten(0, (-1, 5)))
    adapt = ll.build(model, ll.FullConfig(target_names=("^0$",)))
    members, x = [move(adapt.init()) for _ in range(2)], torch.randn(4, 5, 8)
    got = adapt.mixed(ll.stack(members), x, [0, 1, 1, 0])
    want = torch.cat([adapt(members[k], x[n : n + 1]) for n, k in enumerate([0, 1, 1, 0])])
    torch.testing.assert_close(got, want)


def llama(**more):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=64, **{**SMALL, "num_hidden_layers": 1}, **more)).eval()


class Configured(nn.Module):
    """Does what its config says."""

    def __init__(self):
        super().__init__()
        self.config = tf.PreTrainedConfig(gain=1.0, both=False)
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        y = self.lin(x) * self.config.gain
        return (y, x) if self.config.both else (y,)


def test_compiled_call_sees_what_the_user_changes_in_the_config():
    """The graph had the settings of its trace."""
    model, x = Configured(), torch.randn(2, 4)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params, compiled = move(adapt.init()), torch.compile(lambda p, x: adapt(p, x), backend="eager")
    try:
        compiled(params, x)
        for name, value in [("both", True), ("gain", 3.0), ("both", False), ("gain", 1.0), ("both", True)]:
            setattr(model.config, name, value)
            got, want = compiled(params, x), adapt(params, x)
            assert len(got) == len(want) == 1 + model.config.both
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(want[0], adapt.module(params)(x)[0])
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("called", [True, False])
def test_embeddings_that_are_resized_after_the_build_are_named_and_the_way_out_works(called):
    """A loss failed with an error of shapes in the model's code."""
    model = llama()
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params, batch = move(adapt.init()), {"input_ids": ids(), "labels": ids()}
    if called:
        adapt(params, batch)
    model.resize_token_embeddings(70)
    for call in (lambda: adapt(params, batch), lambda: adapt.base(batch), lambda: adapt.module(params))[: 2 if called else 3]:
        with pytest.raises(ValueError, match=r"found vocab_size changed from 64 to 70 after build.*Build again"):
            call()
    assert ll.build(model, ll.LoRAConfig(r=2))(params, batch).logits.shape[-1] == 70


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_embeddings_with_an_adapter_are_not_resized_in_a_module(name):
    """The new layer had none, and the params were left out in silence."""
    adapt = ll.build(model := llama(), ll.FullConfig(target_names=(f"{name}$",)))
    module = adapt.module(adapt.init())
    with pytest.raises(ValueError, match=f"resize_token_embeddings: expected embeddings without an adapter.*{name}.*Resize the model"):
        module.resize_token_embeddings(70)
    module.resize_token_embeddings()
    module = ll.build(model, ll.LoRAConfig(r=2)).module(ll.build(model, ll.LoRAConfig(r=2)).init())
    module.resize_token_embeddings(70)
    assert module(ids()).logits.shape[-1] == 70
    assert model(ids()).logits.shape[-1] == 64


class Remade(nn.Module):
    """Calls a layer with a weight made of its own, or of another's."""

    def __init__(self):
        super().__init__()
        self.lin, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, own):
        weight = self.lin.weight * 1.0 if own else self.other.weight * 1.0
        return torch.func.functional_call(self.lin, {"weight": weight}, (x,))


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2, target_names=("lin$",)), ll.FullConfig(target_names=("lin$",))], ids=lambda c: c.name)
def test_tensor_made_of_an_adapted_weight_is_not_adapted_again(cfg):
    """The update acted twice."""
    model, x = Remade(), torch.randn(2, 4)
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    for _ in range(2):
        with pytest.raises(ValueError, match=r'adapt: at "lin" expected a layer with its frozen weight.*adapted again.*functional.linear'):
            adapt(params, (x, True))
        adapt(params, (x, False))  # the layer's adapter beside a weight of another's


def test_base_weight_that_is_set_by_hand_to_be_trained_stays(recwarn):
    """A step of an optimiser changed the user's model."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=("0$",)))
    module = adapt.module(params := move(adapt.init()))
    for p in module.parameters():
        p.requires_grad = True
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(2):
        module(torch.randn(3, 4)).square().sum().backward()
        optimiser.step()
    assert "requires_grad: the module shares its base weights" in str(recwarn.pop(UserWarning).message)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not torch.equal(adapt.params(module)["0"]["A"], params["0"]["A"])
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["0.adapter.A", "0.adapter.B"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_of_a_process_that_makes_the_copy_in_another_thread_runs():
    """The lock stayed shut in the child, which waited for ever."""
    adapt = ll.build(nn.Sequential(nn.Linear(4, 4)), ll.VeRAConfig(r=2))
    params, x, inside, go = adapt.init(), torch.randn(2, 4), threading.Event(), threading.Event()
    make = adapt._replicas._make

    def slow():
        inside.set()
        go.wait()
        return make()

    adapt._replicas._make = slow
    thread = threading.Thread(target=lambda: adapt._replicas.main)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        adapt._replicas._make = make
        os._exit(0 if torch.equal(adapt(params, x), adapt.base(x)) else 1)
    ended, status = 0, 1
    for _ in range(300):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    go.set()
    thread.join()
    assert (ended, status) == (child, 0)


def test_child_has_the_default_dtype_that_another_thread_had_set_aside():
    found = alike._Float32()
    with default_dtype(torch.bfloat16):
        found.__enter__()
        found.forked()
        assert torch.get_default_dtype() is torch.bfloat16
        assert not found.inside
        with found:
            assert torch.get_default_dtype() is torch.float32


@torch.no_grad()
def test_threads_that_generate_with_one_module_of_a_stack_are_told():
    """The second failed with an error about its prompts' rows."""
    adapt = ll.build(llama(), ll.LoRAConfig(r=2))
    members = [ll.tree_map(lambda p: p + 0.3 * torch.randn_like(p), adapt.init()) for _ in range(2)]
    module, errors = adapt.module(ll.stack(members), index=[0, 1]), []

    class Meanwhile(tf.LogitsProcessor):
        def __call__(self, input_ids, scores):
            def other():
                for call in (lambda: module.generate(ids(2), max_new_tokens=2), lambda: module(ids(2))):
                    try:
                        call()
                    except RuntimeError as e:
                        errors.append(str(e))

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            return scores

    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    found = module.generate(ids(2), logits_processor=tf.LogitsProcessorList([Meanwhile()]), **how)
    assert len(errors) == 6
    assert all("in one thread at a time" in e and "Make a module for each thread" in e for e in errors)
    assert torch.equal(found, module.generate(ids(2), **how))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_model_that_was_made_in_inference_mode_can_be_trained(name):
    """torch refused to keep its tensors for the backward pass."""
    with torch.inference_mode():
        model = llama()
    adapt = ll.build(model, ll.LoRAConfig(r=2) if name == "lora" else ll.FullConfig(target_names=("lm_head$",)))
    params, batch = move(adapt.init()), {"input_ids": ids(), "labels": ids()}
    got, want = (by(lambda p: adapt(p, batch).loss)(params) for by in (lambda f: lambda p: ll.value_and_grad(f)(p)[1], torch.func.grad))
    for a, b in zip(ll.tree_leaves(got), ll.tree_leaves(want)):
        torch.testing.assert_close(a, b)
    adapt.module(params)(**batch).loss.backward()
    with torch.inference_mode():
        model.model.embed_tokens.weight.mul_(2)  # the memory is one
        assert torch.equal(adapt.base(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu], ids=str)
def test_params_in_8_bits_are_refused(dtype):
    """Their gradients were cut off at the largest number, or lost their sign, in silence."""
    adapt = ll.build(nn.Sequential(nn.Linear(4, 4)), ll.LoRAConfig(r=2))
    params, stacked = (ll.tree_map(lambda p: p.to(dtype), tree) for tree in (adapt.init(), ll.stack([adapt.init()])))
    for call in (lambda: adapt(params, torch.randn(2, 4)), lambda: adapt.mixed(stacked, torch.randn(2, 4))):
        with pytest.raises(ValueError, match=r'"0.A": expected a floating dtype of 16 bits or more, found torch.float8.*leaf.float\(\)'):
            call()


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.IA3Config()], ids=lambda cfg: cfg.name)
def test_error_of_sparse_params_says_that_they_are(cfg):
    adapt = ll.build(nn.Sequential(nn.Linear(4, 4)), cfg)
    with pytest.raises(RuntimeError) as e:
        adapt(ll.tree_map(lambda p: p.to_sparse(), adapt.init()), torch.randn(2, 4))
    assert any("its params are sparse: pass dense ones, leaf.to_dense()" in note for note in e.value.__notes__)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("index", [[0, 1, 1, 0], None, torch.tensor([0, 1, 1, 0])], ids=["list", "none", "tensor"])
def test_mixed_batches_without_values_are_refused_and_the_way_out_works(mode, index):
    adapt = ll.build(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), ll.LoRAConfig(r=2))
    stacked, x = ll.stack([move(adapt.init()) for _ in range(2)]), torch.randn(4, 8)

    def f(p, x):
        return adapt.mixed(p, x, index)

    with pytest.raises(ValueError, match=r'adapt.mixed: expected tensors with values.*tracing_mode="real"'):
        make_fx(f, tracing_mode=mode)(stacked, x)
    traced, other = make_fx(f, tracing_mode="real")(stacked, x), torch.randn(4, 8)
    torch.testing.assert_close(traced(stacked, other), f(stacked, other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("index", [torch.tensor([0, 1, 1, 0]), None], ids=["index", "none"])
def test_mixed_batch_is_traced_by_jit(index):
    """While it traces, an entry of a shape is a tensor: the stack was taken for none."""
    adapt = ll.build(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), ll.LoRAConfig(r=2))
    stacked, x, before = ll.stack([move(adapt.init()) for _ in range(2)]), torch.randn(4, 8), ll.set_typecheck(False)
    try:  # whose checks of shapes would find tensors there, too
        graphs = [
            torch.jit.trace(f, (torch.randn(4, 8),)) for f in (lambda x: adapt.mixed(stacked, x, index), adapt.module(stacked, index))
        ]
    finally:
        ll.set_typecheck(before)
    for traced in graphs:
        torch.testing.assert_close(traced(x), adapt.mixed(stacked, x, index))


@pytest.mark.parametrize("where", ["_vmap_increment_nesting", "_remove_batch_dim", "_leave"])
def test_interrupt_leaves_no_transform_behind(where, monkeypatch):
    """What ran later was taken for the inside of a vmap."""
    adapt = ll.build(nn.Sequential(nn.Linear(8, 8)), ll.LoRAConfig(r=2))
    stacked, x = ll.stack([move(adapt.init()) for _ in range(2)]), torch.randn(4, 8)
    want, own, calls = adapt.mixed(stacked, x, [0, 1, 1, 0]), getattr(tracing, where), []

    def interrupted(*args):
        calls.append(1)
        if where == "_vmap_increment_nesting":
            own(*args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tracing, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            adapt.mixed(stacked, x, [0, 1, 1, 0])
    assert not tracing.transformed()
    assert torch._C._autograd._saved_tensors_hooks_is_enabled()
    assert torch.equal(adapt.mixed(stacked, x, [0, 1, 1, 0]), want)


# Errors, and their ways out


def in_another_thread(call):
    """Return what a call returns or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(call)
        return task.result() if task.exception() is None else task.exception()


@pytest.mark.parametrize("case", ["stack", "generation", "positions"])
def test_module_whose_calls_keep_something_in_its_layers_runs_in_one_thread_at_a_time(case):
    model, _ = tiny_models["llama"]()
    adapt = ll.build(model, ll.ALoRAConfig(r=2, invocation_tokens=(3,)) if case == "positions" else ll.LoRAConfig(r=2))
    members, tokens, others = [move(adapt.init(seed)) for seed in (0, 1)], torch.tensor([[1, 3, 5], [4, 5, 3]]), []

    def made():
        return adapt.module(members[0]) if case == "positions" else adapt.module(ll.stack(members), index=[1, 0])

    module = made()

    def run(m):
        return m.generate(tokens, max_new_tokens=2, pad_token_id=0) if case == "generation" else m(input_ids=tokens).logits

    want = run(made())

    def at_once(*_):
        if threading.current_thread() is threading.main_thread():
            others.append(in_another_thread(lambda: run(module)))

    handle = module.model.layers[1].register_forward_pre_hook(at_once)
    torch.testing.assert_close(run(module), want)  # the other thread's rows, trial and mask are not in it
    handle.remove()
    assert others
    for error in others:
        assert re.search("adapt.module: expected this module to run in one thread at a time.*Make a module for each thread", str(error))
    torch.testing.assert_close(in_another_thread(lambda: run(made())), want)
    with pytest.raises(TypeError):
        module(input_ids=tokens, logits_to_keep="none", labels=object())
    torch.testing.assert_close(in_another_thread(lambda: run(module)), want)  # a call that has raised holds no module


def test_module_of_a_stack_is_not_replicated():
    adapt = ll.build(pair(), ll.LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"found nn\.DataParallel, which splits their rows"):
        adapt.module(ll.stack([adapt.init()]))._replicate_for_data_parallel()


@pytest.mark.parametrize("index", [[0, 1], [0, 1, 0, 1, 0], [0] * 8])
def test_index_of_another_length_than_the_rows_is_named(index):
    adapt = ll.build(pair(), ll.LoRAConfig(r=2))
    stacked = ll.stack([adapt.init(), adapt.init()])
    with pytest.raises(ValueError, match=f"expected index to have a number for each row.*found {len(index)} numbers, and tensors with 4"):
        adapt.mixed(stacked, torch.randn(4, 8), index)


def test_module_of_a_stack_names_itself_and_no_argument_that_it_has_not():
    encoder = nn.TransformerEncoderLayer(8, 2, 8).eval()
    adapt = ll.build(encoder, ll.LoRAConfig(r=2, target_names=r"linear\d$"))
    stacked, x = ll.stack([move(adapt.init(seed)) for seed in (0, 1)]), torch.randn(4, 2, 8)  # (time, rows, width)
    way = "tell the row_map of adapt.mixed where they are, and call that"
    with pytest.raises(ValueError, match=f'adapt.module: at "linear1" expected an input whose first axis .*{way}'):
        adapt.module(stacked, index=[0, 1, 0, 1])(x)
    assert adapt.mixed(stacked, x, [0, 1], row_map={r"linear\d$": 1}).shape == x.shape
    with pytest.raises(ValueError, match=r"adapt\.module: at the batch.*Give each row its member: adapt\.module\(stacked, index=\.\.\.\)"):
        adapt.module(stacked)(torch.randn(3, 2, 8))


def test_stack_in_the_place_of_a_tree_is_named_and_each_way_out_works(tmp_path):
    adapt, x = ll.build(pair(), ll.LoRAConfig(r=2)), torch.randn(4, 8)
    stacked = ll.stack([move(adapt.init(seed)) for seed in (0, 1)])
    for call in (lambda: adapt(stacked, x), lambda: adapt.merge(stacked), lambda: ll.save(adapt, stacked, tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match=r"a stack of 2: run it by adapt\.mixed\(stacked, batch\), or take a member of ll\.unstack"):
            call()
    torch.testing.assert_close(adapt.mixed(stacked, x)[:2], adapt(ll.unstack(stacked)[0], x)[:2])
    with pytest.raises(ValueError, match=r"Use adapt\.init"):
        adapt({**stacked, "1": {}}, x)


def test_names_beside_a_layer_lead_to_it():
    model, _ = tiny_models["qwen3_moe"]()
    for pattern, way in ((r"experts$", r"Name what is inside, e\.g\. r\"(.*)\"\."), (r"mlp$", r"Name what is inside, e\.g\. r\"(.*)\"\.")):
        with pytest.raises(ValueError, match=way) as found:
            ll.build(model, ll.LoRAConfig(r=2, target_names=pattern))
        assert ll.build(model, ll.LoRAConfig(r=2, target_names=re.search(way, str(found.value))[1])).targets
    with pytest.raises(ValueError, match=r'Name r"(.*)"\.') as found:
        ll.build(model, ll.FullConfig(target_names=r"experts\."))
    assert ll.build(model, ll.FullConfig(target_names=re.search(r'Name r"(.*)"\.', str(found.value))[1])).targets
    with pytest.raises(ValueError, match="Leave target_names out, which takes them all"):
        ll.build(model, ll.LoRAConfig(r=2, target_names="all-linear"))


@pytest.mark.parametrize(
    "cfg",
    [
        ll.AdaLoRAConfig(init_r=4, target_r=2, total_step=8),
        ll.AdaMSSConfig(r=4, num_subspaces=2, use_asa=True, init_warmup=0, final_warmup=8, mask_interval=1, asa_target_subspaces=2),
    ],
    ids=["adalora", "adamss"],
)
def test_state_of_an_allocation_holds_no_graph_where_leaves_require_gradients(cfg):
    """It would have kept the tensors of all steps before."""
    adapt, x = ll.build(pair(), cfg), torch.randn(8, 8)
    params = ll.tree_map(lambda p: p.requires_grad_(), move(adapt.init()))
    optimizer, state = torch.optim.SGD(ll.tree_leaves(params), lr=0.1), adapt.constants if cfg.name == "adamss" else None
    for _ in range(3):
        optimizer.zero_grad()
        adapt(params, x).square().mean().backward()
        optimizer.step()
        new, state = cfg.update(params, ll.tree_map(lambda p: p.grad, params), state)
        with torch.no_grad():
            ll.tree_map(torch.Tensor.copy_, params, new)
    parts = torch.utils._pytree.tree_leaves(state)
    held = [t for t in parts if isinstance(t, torch.Tensor) and not any(t is leaf for leaf in ll.tree_leaves(params))]
    assert held
    assert not any(t.requires_grad for t in held)


def two_layers():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


class Late(nn.Module):
    """Makes what it lacks at its first call."""

    def __init__(self, make):
        super().__init__()
        self.first, self.make = nn.Linear(6, 6), make

    def forward(self, x):
        if not hasattr(self, "late"):
            self.late = self.make(self)
        x = self.first(x)
        return self.late(x) if isinstance(self.late, nn.Module) else x * self.late


@pytest.mark.parametrize("make", [lambda model: nn.Linear(6, 6), lambda model: nn.Parameter(torch.randn(6))], ids=["layer", "parameter"])
def test_weights_that_a_forward_makes_are_refused_and_the_way_out_works(make):
    """Each call drew its own, which were those of nobody."""
    model, x = Late(make), torch.randn(3, 6)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    for call in (lambda: adapt(adapt.init(), x), lambda: adapt(adapt.init(), x), lambda: adapt.base(x)):
        with pytest.raises(ValueError, match=r'its forward made "late.*Run the model on one batch before build'):
            call()
    model(x)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    assert torch.equal(adapt(adapt.init(), x), model(x))


@pytest.mark.parametrize("make", [lambda model: model.first, lambda model: torch.ones(6), lambda model: nn.Tanh()])
def test_what_a_forward_makes_without_weights_of_its_own_is_no_hindrance(make):
    adapt, x = ll.build(Late(make), ll.LoRAConfig(r=2)), torch.randn(3, 6)
    assert torch.equal(adapt(adapt.init(), x), adapt.base(x))


class Slotted(nn.Module):
    __slots__ = ("layers", "scale")

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        object.__setattr__(self, "layers", [self.first])
        self.scale = 3.0

    def forward(self, x):
        return self.scale * self.layers[0](x)


def test_slots_of_a_module_lead_to_the_copy():
    model, x = Slotted(), torch.randn(3, 6)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = ll.tree_map(lambda p: p + 0.1, adapt.init())
    assert torch.equal(adapt.base(x), model(x))
    assert not torch.allclose(adapt(params, x), model(x))


class Answers(nn.Module):
    """Has every attribute that it is asked for, as models do that hand on what they lack."""

    def __init__(self):
        super().__init__()
        self.inner = two_layers()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return lambda *args, **kwargs: None

    def forward(self, x):
        return self.inner(x)


def test_module_that_answers_any_attribute_runs():
    """It was asked for the `max_norm` of a table."""
    model, x = Answers(), torch.randn(3, 6)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    assert torch.equal(adapt(adapt.init(), x), model(x))


class Yields(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return (self.layer(x + k) for k in range(2))


def test_forward_that_yields_is_told_to_return_a_list():
    adapt = ll.build(Yields(), ll.LoRAConfig(r=2))
    with pytest.raises(RuntimeError, match=r"outside of a call. Let a forward that yields its results return a list"):
        list(adapt(adapt.init(), torch.ones(2, 6)))


def test_complex_layers_are_refused_and_the_way_out_works():
    """ETHER did not start at the base model there, and PVeRA's merged weights were others than its function."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, dtype=torch.complex64))
    for cfg in (ll.LoRAConfig(r=2), ll.ETHERConfig()):
        with pytest.raises(ValueError, match=r'expected real weights, found complex ones at "1 \(torch.complex64\)"'):
            ll.build(model, cfg)
    assert [t.path for t in ll.build(model, ll.LoRAConfig(r=2, exclude_names="^1$")).targets] == ["0"]


class Filtered(nn.Module):
    """Reads a real matrix beside a complex vector."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6))
        self.filter = nn.Parameter(torch.randn(6, dtype=torch.complex64))

    def forward(self, x):
        return x @ self.table.t() * self.filter.abs()


def test_real_parameter_beside_a_complex_one_is_adapted():
    model, x = Filtered(), torch.randn(3, 6)
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="table$"))
    assert torch.equal(adapt(adapt.init(), x), adapt.base(x))


def test_table_with_max_norm_is_refused_by_its_reason():
    with pytest.raises(ValueError, match=r'found max_norm at "0".*Set max_norm to None'):
        ll.build(nn.Sequential(nn.Embedding(4, 6, max_norm=1.0)), ll.LoRAConfig(r=2, target_names="0"))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("get_peft_model", r"Call build\(model, cfg\)"),
        ("inject_adapter_in_model", r"Call build\(model, cfg\)"),
        ("add_weighted_adapter", r"ll\.combine\(adapt"),
        ("PrefixTuningConfig", r"docs/prompts\.md"),
        ("loader", 'Closest: "(?!_)'),
        ("LoraConfig", "It is called LoRAConfig here"),
        ("VeraConfig", "It is called VeRAConfig here"),
        ("QLoRAConfig", 'Closest: "LoRAConfig"'),
        ("AdapterTrainer", r"lora_lite\.integrations\.trainer"),
    ],
)
def test_names_of_other_libraries_lead_to_those_here(name, way):
    with pytest.raises(AttributeError, match=way):
        getattr(ll, name)
    assert not hasattr(ll, name)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("save", r"ll\.save\(adapt, params, path\)"),
        ("save_pretrained", r"ll\.to_peft\(adapt, params, folder\)"),
        ("print_trainable_parameters", r"adapt\.summary\(\)"),
        ("merge_and_unload", r"adapt\.merge\(params\)"),
        ("disable_adapter", r"adapt\.base\(batch\)"),
        ("set_adapter", r"adapt\(other, batch\)"),
    ],
)
def test_methods_of_other_libraries_lead_to_the_call_here(name, way):
    with pytest.raises(AttributeError, match=way):
        getattr(ll.build(two_layers(), ll.LoRAConfig(r=2)), name)


def test_trees_that_are_given_one_by_one_are_not_printed():
    params = ll.build(two_layers(), ll.LoRAConfig(r=2)).init()
    with pytest.raises(TypeError, match=r"stack: expected pad as.*found dict. Call stack\(\[params, params, ...\]\)"):
        ll.stack(params, params)


def test_bias_that_layers_share_is_not_merged_twice_and_the_way_out_works():
    """The second overwrote the first, in silence."""
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), torch.randn(3, 6)
    model[2].bias = model[0].bias
    adapt = ll.build(model, ll.BitFitConfig())
    with pytest.raises(ValueError, match=r'"0": 0.bias lies in the memory of "2.bias", which would change too'):
        adapt.merge(move(adapt.init()))
    assert adapt.merge(adapt.init()).keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}  # which moves nothing

    adapt = ll.build(model, ll.LoRAConfig(r=2))  # which leaves biases as they are
    params, twin = move(adapt.init()), copy.deepcopy(model)
    twin.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(twin(x), adapt(params, x))


class Doubled(nn.Module):
    """Keeps the weight of its layer as a parameter of its own too."""

    def __init__(self, name):
        super().__init__()
        self.layer, self.name = nn.Linear(6, 6), name
        setattr(self, name, self.layer.weight)

    def forward(self, x):
        return self.layer(x) @ getattr(self, self.name)


@pytest.mark.parametrize(
    ("name", "found"), [("table", 'layer.weight lies in the memory of "table"'), ("weight", "its weight is shared with the model")]
)
def test_weight_under_a_second_name_is_not_merged(name, found):
    """The second name's changed too, in silence."""
    adapt = ll.build(Doubled(name), ll.LoRAConfig(r=2, target_names="layer"))
    with pytest.raises(ValueError, match=f'"layer": {found}'):
        adapt.merge(move(adapt.init()))


def test_layer_at_several_paths_is_merged():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), torch.randn(3, 6)
    model.append(model[0])
    adapt = ll.build(model, ll.LoRAConfig(r=2, bias=True))
    params = move(adapt.init())
    twin = copy.deepcopy(model)
    twin.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(twin(x), adapt(params, x))


def test_stack_of_adapters_on_other_weights_is_refused_and_the_way_out_works():
    """The second one ran on the weights of the first, and gave another model's outputs."""
    model, other, x = pair(), other_weights(pair(), "weight"), torch.randn(4, 8)
    adapts = [ll.build(m, ll.LoRAConfig(r=2)) for m in (model, other)]
    trees = [move(adapt.init(seed)) for seed, adapt in enumerate(adapts)]
    with pytest.raises(ValueError, match=r'stack: expected adapters over the same frozen weights.*\n.*"0" of adapt 1'):
        ll.stack(list(zip(adapts, trees)))
    twin = copy.deepcopy(model)
    for second in (model, twin):  # the same weights, in the same memory or in another
        own = ll.build(second, ll.LoRAConfig(r=2))
        host, stacked = ll.stack([(adapts[0], trees[0]), (own, trees[1])])
        torch.testing.assert_close(host.mixed(stacked, x, [0, 1, 0, 1])[1::2], own(trees[1], x)[1::2])


class Lists(nn.Module):
    """Multiplies by a weight that it takes from a list of its parameters, or asks for the sizes of some."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4, bias=False)

    def forward(self, x, how):
        if how == "penalty":
            return x.sum() + sum(p.square().sum() for p in self.parameters())
        if how == "sizes":
            some = next(self.parameters())
            return self.lin(x) * some.numel() * self.lin.weight.size(0) if some.is_floating_point() else x
        weight = {
            "named": lambda: dict(self.named_parameters())["lin.weight"],
            "first": lambda: next(self.lin.parameters()),
            "state": lambda: self.state_dict()["lin.weight"],
            "path": lambda: self.get_parameter("lin.weight"),
            "attribute": lambda: self.lin.weight,
        }[how]()
        return x @ weight.t()


LISTS = ["named", "first", "state", "path", "attribute", "penalty", "sizes"]


def of_lists(x, weight, how):
    return x.sum() + weight.square().sum() if how == "penalty" else x @ weight.t() * (64 if how == "sizes" else 1)


@pytest.mark.parametrize("how", LISTS)
@pytest.mark.parametrize("name", ["lora", "hra", "full", "vera"])
def test_weights_from_a_list_of_parameters_are_the_adapted_ones(name, how):
    """They were the frozen ones in silence, and a sum over all met the adapter's placeholders."""
    model, x = Lists(), torch.randn(3, 4)
    adapt = ll.build(model, ll.VARIANTS[name](target_names=("lin$",), **({} if name == "full" else {"r": 2})))
    params = move(adapt.init())
    weight, module = adapt.merge(params)["lin.weight"], adapt.module(params)
    names = [name for name, _ in module.named_parameters()]
    for call in (lambda: adapt(params, (x, how)), lambda: module(x, how), lambda: copy.deepcopy(module)(x, how)):
        torch.testing.assert_close(call(), of_lists(x, weight, how))
    torch.testing.assert_close(adapt.base((x, how)), of_lists(x, model.lin.weight.detach(), how))
    assert [name for name, _ in module.named_parameters()] == names
    assert len(names) == len(module.state_dict()) > 1
    if how != "state":  # which is detached
        got = ll.value_and_grad(lambda p: adapt(p, (x, how)).sum())(params)[1]["lin"]
        module(x, how).sum().backward()
        for leaf, p in zip(got.values(), (p for p in module.parameters() if p.requires_grad)):
            torch.testing.assert_close(p.grad, leaf)


def _compiles_whole(model, x, how):
    try:
        torch.compile(model, backend="eager", fullgraph=True)(x, how)
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.mark.parametrize("how", LISTS)
def test_weights_from_a_list_of_parameters_are_the_adapted_ones_where_compiled(how):
    """A module that reads a weight by an attribute did not compile."""
    model, x = Lists(), torch.randn(3, 4)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    want = of_lists(x, adapt.merge(params)["lin.weight"], how)
    if how == "state" and not _compiles_whole(model, x, how):
        pytest.skip("this torch traces no state_dict of any module, as 2.15 does not")
    whole = how != "path"  # the compiler asks the class whether that is a parameter
    try:
        torch.testing.assert_close(torch.compile(lambda p: adapt(p, (x, how)), backend="eager", fullgraph=whole)(params), want)
        torch.testing.assert_close(torch.compile(adapt.module(params), backend="eager", fullgraph=whole)(x, how), want)
    finally:
        torch._dynamo.reset()


def test_weight_that_is_held_twice_is_listed_once():
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    found = []
    model.register_forward_hook(lambda module, *_: found.append(len(list(module.parameters()))))
    adapt = ll.build(model, ll.TokensConfig(token_ids=(1, 2)))
    adapt(adapt.init(), {"input_ids": ids()})
    assert found == [len(list(model.parameters()))]


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.LoRAConfig(r=2, dropout=0.5)], ids=["rows", "dropout"])
def test_question_for_the_size_of_a_weight_reads_none(cfg):
    """It was refused as a read."""
    model, x = Lists().train(), torch.randn(3, 4)
    adapt = ll.build(model, cfg)
    members = [move(adapt.init(seed)) for seed in (0, 1)]
    torch.manual_seed(0)
    adapt(members[0], (x, "sizes"))
    if not cfg.dropout:
        got = adapt.mixed(ll.stack(members), (x, "sizes"), [0, 1, 0])
        torch.testing.assert_close(got[1], adapt(members[1], (x[1:2], "sizes"))[0])


@pytest.mark.parametrize("fullgraph", [True, False])
def test_tensor_made_of_an_adapted_weight_is_not_adapted_again_where_compiled(fullgraph):
    """The update acted twice."""
    model, x = Remade(), torch.randn(2, 4)
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=("lin$",)))
    params = move(adapt.init())
    try:
        compiled = torch.compile(lambda p, own: adapt(p, (x, own)), backend="eager", fullgraph=fullgraph)
        for _ in range(2):
            with pytest.raises(Exception, match=r'adapt: at "lin" expected a layer with its frozen weight.*adapted again'):
                compiled(params, True)
        if fullgraph:  # else the pieces that are compiled by now are taken for reads
            torch.testing.assert_close(compiled(params, False), adapt(params, (x, False)))
    finally:
        torch._dynamo.reset()


def test_settings_that_go_back_and_forth_are_compiled_once_each():
    """Each change was compiled anew, to the limit of the compiler."""
    model, graphs = llama(), []
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())

    def noted(graph, _):
        graphs.append(graph)
        return graph.forward

    try:
        compiled = torch.compile(lambda p, t: adapt(p, {"input_ids": t}), backend=noted)
        for use_cache in [True, False] * 4:
            model.config.use_cache = use_cache
            assert (compiled(params, ids()).past_key_values is None) is not use_cache
        assert len(graphs) == 3  # the first knew of no change
        model.config.use_cache = True
        assert adapt(params, {"input_ids": ids()}).past_key_values is not None
    finally:
        torch._dynamo.reset()


class Keeps(nn.Module):
    """Keeps a weight that it has read."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.last = None

    def forward(self, x):
        self.last = self.lin.weight
        return self.lin(x) + x @ self.last.t()


def test_weight_that_a_forward_keeps_is_no_parameter_of_its_own():
    """The stand-in counts as a parameter where one is asked for, and a module would have registered it."""
    model, x = Keeps(), torch.randn(3, 4)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    module, merged = adapt.module(params), Keeps()
    merged.load_state_dict({**model.state_dict(), **adapt.merge(params)})
    torch.testing.assert_close(adapt(params, x), merged(x))
    torch.testing.assert_close(module(x), merged(x))
    assert "last" not in dict(module.named_parameters())
