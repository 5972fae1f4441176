"""PEFT's files of models in which a module or a weight is reached in unusual ways, and the task that a file names."""

import copy
import dataclasses
import json
from collections import OrderedDict

import peft
import pytest
import safetensors.torch
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from architectures import small
from cases import move, tiny_models
from peft_oracle import edit, saved, wrapped
from sklearn_stand_in import stand_in
from test_field import HEAD, bert, ids

pytestmark = [pytest.mark.filterwarnings("ignore:.*target_parameters.*"), pytest.mark.filterwarnings("ignore:build")]


class Net(nn.Module):
    """One linear layer in two slots, as detection heads that all decoder layers share."""

    def __init__(self):
        super().__init__()
        one = nn.Linear(8, 8)
        self.heads = nn.ModuleList([one, nn.Linear(8, 8), one])

    def forward(self, x):
        for head in self.heads:
            x = head(x).tanh()
        return x


class Shared(nn.Module):
    """A block that runs several times, as in ALBERT."""

    def __init__(self):
        super().__init__()
        block, other = (nn.ModuleDict({"lin": nn.Linear(8, 8)}) for _ in range(2))
        self.layers = nn.ModuleList([block, block, other])

    def forward(self, x):
        for layer in self.layers:
            x = layer["lin"](x).tanh()
        return x


def peft_of(model, folder, **fields):
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, init_lora_weights=False, **fields)).eval()
    theirs.save_pretrained(folder)
    return theirs


def through_peft(model, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_layer_registered_twice_is_refused_both_ways_and_the_way_out_works(tmp_path):
    model, x = Net().eval(), torch.randn(3, 8)
    theirs = peft_of(model, tmp_path / "a", target_modules=["heads.0", "heads.1"])
    out = r'"heads\.0": the layer stands at "heads\.2" too.*model\.set_submodule\("heads\.2", copy\.deepcopy\(model\.get_submodule'
    with pytest.raises(ValueError, match="(?s)from_peft: .*" + out):
        ll.from_peft(model, tmp_path / "a")
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    with pytest.raises(ValueError, match="(?s)to_peft: .*" + out):
        ll.to_peft(adapt, adapt.init(), tmp_path / "b")
    apart = copy.deepcopy(model)
    apart.set_submodule("heads.2", copy.deepcopy(apart.get_submodule("heads.0")))
    adapt, params = ll.from_peft(apart, tmp_path / "a")
    close(adapt(params, x), theirs(x))
    ll.to_peft(adapt, params, tmp_path / "b")
    close(through_peft(apart, tmp_path / "b")(x), theirs(x))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT writes one place of each, and warns of its own files too
def test_block_registered_twice_goes_both_ways(tmp_path):
    model, x = Shared().eval(), torch.randn(3, 8)
    theirs = peft_of(model, tmp_path / "a", target_modules=["lin"])
    adapt, params = ll.from_peft(model, tmp_path / "a")
    close(adapt(params, x), theirs(x))
    ll.to_peft(adapt, move(params), tmp_path / "b")
    close(through_peft(model, tmp_path / "b")(x), adapt(move(params), x))


def test_whole_module_registered_twice_is_refused(tmp_path):
    model = Net().eval()
    peft_of(model, tmp_path / "a", target_modules=["heads.1"], modules_to_save=["heads.0"])
    with pytest.raises(ValueError, match=r'"heads\.0": the layer stands at "heads\.2" too'):
        ll.from_peft(model, tmp_path / "a")
    adapt = ll.build(model, [ll.LoRAConfig(r=2, target_names=r"1$"), ll.FullConfig(target_names=r"heads\.0$")])
    with pytest.raises(ValueError, match=r'"heads\.0": the layer stands at "heads\.2" too'):
        ll.to_peft(adapt, adapt.init(), tmp_path / "b")


# Modules trained as a whole


class Counting(nn.Module):
    """A layer beside buffers, of which the file holds one."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.register_buffer("kept", torch.randn(8))
        self.register_buffer("left", torch.randn(8), persistent=False)

    def forward(self, x):
        return self.lin(x) + self.kept + self.left


class Tied(nn.Module):
    """Two layers of one weight, and one layer at two places."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.again = self.c

    def forward(self, x):
        return self.again(self.b(self.c(self.a(x).tanh())).tanh())


WHOLE = {"norm": lambda: nn.BatchNorm1d(8), "buffers": Counting, "ties": Tied}


def with_whole(case):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), WHOLE[case]()).eval(), torch.randn(3, 8)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("case", WHOLE)
def test_whole_modules_with_buffers_and_ties_go_both_ways(case, tmp_path):
    model, x = with_whole(case)
    theirs = wrapped(model, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    theirs.save_pretrained(tmp_path / "theirs")
    want = theirs(x)
    close(through_peft(model, tmp_path / "theirs")(x), want)
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    close(adapt(params, x), want)
    ll.to_peft(adapt, params, tmp_path / "ours")
    close(through_peft(model, tmp_path / "ours")(x), want)
    assert set(saved(tmp_path / "ours")) == set(saved(tmp_path / "theirs"))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("method", ["lora", "ln_tuning"])
def test_buffers_that_moved_are_refused_and_the_way_out_works(method, tmp_path):
    model, x = with_whole("norm")
    configs = {
        "lora": peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]),
        "ln_tuning": peft.LNTuningConfig(target_modules=["1"]),
    }
    theirs = wrapped(model, configs[method])
    with torch.no_grad():
        for _ in range(2):
            theirs.train()(3 * x + 1)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r'running_mean": expected the model.s own, .*Load it into the model first'):
        ll.from_peft(model, tmp_path / "theirs")
    own = {key.rpartition(".")[2]: t for key, t in saved(tmp_path / "theirs").items()}
    model[1].load_state_dict({**model[1].state_dict(), **{name: t for name, t in own.items() if name in dict(model[1].named_buffers())}})
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    close(adapt(params, x), theirs(x))


def test_names_of_one_parameter_that_differ_are_refused(tmp_path):
    model, _ = with_whole("ties")
    wrapped(model, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])).save_pretrained(tmp_path)
    tensors = saved(tmp_path)
    tensors["base_model.model.1.b.weight"] = tensors["base_model.model.1.b.weight"] + 1
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r'1\.b\.weight": expected what "a\.weight" holds'):
        ll.from_peft(model, tmp_path)


# What else a file of PEFT's may hold


class Headed(nn.Module):
    """A layer, one beside it, and a head of several layers."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))

    def forward(self, x):
        return self.head(self.k(self.q(x).tanh()).tanh())


BIASES = {
    "head of layers, all": {"bias": "all", "modules_to_save": ["head"]},
    "head of layers, lora_only": {"bias": "lora_only", "modules_to_save": ["head"]},
    "head of one layer": {"bias": "all", "modules_to_save": ["k"]},
    "dora": {"bias": "all", "use_dora": True},
    "dora, lora_only": {"bias": "lora_only", "use_dora": True},
    "dora, head": {"bias": "all", "use_dora": True, "modules_to_save": ["head"]},
    "negative": {"lora_alpha": -3},
    "negative, dora": {"lora_alpha": -3, "use_dora": True},
    "negative, one layer": {"lora_alpha": 5, "alpha_pattern": {"k": -2}, "lora_bias": True, "target_modules": ["q", "k"]},
    "negative, mica": {"lora_alpha": -3, "init_lora_weights": "mica"},
    "nothing tied": {"ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
@pytest.mark.filterwarnings(r"ignore:.*invalid shape. base_model.*lora_B\.bias")
@pytest.mark.parametrize("case", BIASES)
def test_files_with_biases_and_signs_go_both_ways(case, tmp_path):
    torch.manual_seed(0)
    model, x = Headed().eval(), torch.randn(3, 8)
    theirs = wrapped(model, peft.LoraConfig(**{"r": 2, "target_modules": ["q"], **BIASES[case]}))
    own = theirs.base_model.model.q.base_layer.bias
    if "use_dora" in BIASES[case] and own is not None:
        own.data.copy_(model.q.bias)  # which DoRA here does not train
    theirs.save_pretrained(tmp_path / "theirs")
    want = theirs(x)
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    close(adapt(params, x), want)
    ll.to_peft(adapt, params, tmp_path / "ours")
    close(through_peft(model, tmp_path / "ours")(x), want)


def test_bias_that_moved_beside_dora_is_refused_and_the_way_out_works(tmp_path):
    torch.manual_seed(0)
    model, x = Headed().eval(), torch.randn(3, 8)
    theirs = wrapped(model, peft.LoraConfig(r=2, target_modules=["q"], bias="lora_only", use_dora=True))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r'q\.base_layer\.bias": expected the model.s own, .* trains no bias, .*Load it into the model first'
    ):
        ll.from_peft(model, tmp_path)
    model.q.bias.data.copy_(saved(tmp_path)["base_model.model.q.base_layer.bias"])
    adapt, params = ll.from_peft(model, tmp_path)
    close(adapt(params, x), theirs(x))


@pytest.mark.parametrize(
    ("key", "message"), [("original_module", "the model.s own"), ("modules_to_save.default", 'what ".*head.0.bias" holds')]
)
def test_copies_of_biases_that_differ_are_refused(key, message, tmp_path):
    model = Headed().eval()
    wrapped(model, peft.LoraConfig(r=2, target_modules=["q"], bias="all", modules_to_save=["head"])).save_pretrained(tmp_path)
    tensors = saved(tmp_path)
    tensors[f"base_model.model.head.{key}.0.bias"] = torch.ones(8)
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf'head\.{key}\.0\.bias": expected {message}'):
        ll.from_peft(model, tmp_path)


def test_negative_scale_of_a_start_is_refused_with_a_way_out(tmp_path):
    model = Headed().eval()
    peft_of(model, tmp_path, target_modules=["q"])
    edit(tmp_path, lora_alpha=-3, init_lora_weights="olora")
    with pytest.raises(ValueError, match=r"lora_alpha in .* to be >= 0, found -3\. Merge"):
        ll.from_peft(model, tmp_path)


NAMED = {
    "lora": peft.LoraConfig(r=2, target_modules=["q", "k"]),
    "dora": peft.LoraConfig(r=2, target_modules=["q", "k"], use_dora=True),
    "ia3": peft.IA3Config(target_modules=["q"], feedforward_modules=[]),
}


@pytest.mark.parametrize("case", NAMED)
def test_keys_with_the_adapters_name_inside_are_read_as_peft_does(case, tmp_path):
    torch.manual_seed(0)
    model, x = Headed().eval(), torch.randn(3, 8)
    theirs = wrapped(model, NAMED[case])
    theirs.save_pretrained(tmp_path)
    inside = {key: t.contiguous() for key, t in theirs.state_dict().items() if ".default" in key}
    assert len(inside) == len(saved(tmp_path))
    safetensors.torch.save_file(inside, tmp_path / "adapter_model.safetensors")
    close(through_peft(model, tmp_path)(x), theirs(x))
    adapt, params = ll.from_peft(model, tmp_path)
    close(adapt(params, x), theirs(x))


def tied_llama():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "tie_word_embeddings": True})).eval()


TYING = {
    "layer": ({"target_modules": ["embed_tokens"]}, None),
    "module": ({"modules_to_save": ["embed_tokens"]}, ["lm_head", "model.embed_tokens"]),
    "both modules": ({"modules_to_save": ["embed_tokens", "lm_head"]}, ["lm_head", "model.embed_tokens"]),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("case", TYING)
def test_trained_ties_are_refused_and_the_way_out_works(case, tmp_path):
    fields, modules = TYING[case]
    model = tied_llama()
    theirs = wrapped(model, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "ensure_weight_tying": True, **fields}))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ensure_weight_tying: expected it off at .* set it to false in the file"):
        ll.from_peft(model, tmp_path)
    edit(tmp_path, ensure_weight_tying=False, modules_to_save=modules)
    adapt, params = ll.from_peft(model, tmp_path)
    close(adapt(params, {"input_ids": ids()}).logits, theirs(input_ids=ids()).logits)


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
def test_ties_of_tokens_are_what_they_are_here(tmp_path):
    model = tied_llama()
    theirs = wrapped(model, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5], ensure_weight_tying=True))
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    close(adapt(params, {"input_ids": ids()}).logits, theirs(input_ids=ids()).logits)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_rows_that_move_a_head_with_an_adapter_are_refused_in_the_files_terms(tmp_path):
    model = tied_llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], trainable_token_indices=[3, 5])
    wrapped(model, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'"model\.embed_tokens": its trained rows move "lm_head" too, which .* has an adapter of its own'):
        ll.from_peft(model, tmp_path)


WEIGHTS = {
    "llama": (["k_proj"], ["q_proj.weight", "mlp.up_proj.weight"]),
    "gpt2": (["mlp.c_proj"], ["c_attn.weight"]),
    "llama, its embedding": (["k_proj"], ["embed_tokens.weight"]),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_of_layers_among_target_parameters_go_both_ways(case, tmp_path):
    modules, parameters = WEIGHTS[case]
    model, batch = tiny_models[case.partition(",")[0]]()
    model, batch = model.eval(), {"input_ids": batch["input_ids"]}
    fields = {"fan_in_fan_out": True} if case == "gpt2" else {}
    if fields:  # PEFT's wrapper of parameters does not take the field
        modules, fields = [], {}
    theirs = peft_of(model, tmp_path / "a", target_modules=modules, target_parameters=parameters, **fields)
    adapt, params = ll.from_peft(model, tmp_path / "a")
    want = theirs(**batch).logits
    assert (want - model(**batch).logits).abs().max() > 1e-3
    close(adapt(params, batch).logits, want)
    ll.to_peft(adapt, params, tmp_path / "b")
    close(through_peft(model, tmp_path / "b")(**batch).logits, want)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_patterns_hold_at_parameters_by_their_whole_names(tmp_path):
    model, batch = tiny_models["llama"]()
    model, batch = model.eval(), {"input_ids": batch["input_ids"]}
    parameters = ["q_proj.weight", "up_proj.weight", "embed_tokens.weight"]
    patterns = {
        "alpha_pattern": {"q_proj": 3, "up_proj.weight": 5, "embed_tokens.weight": 7, "k_proj": 11},  # the first names no parameter
        "rank_pattern": {"up_proj": 5, "q_proj.weight": 3},
    }
    theirs = peft_of(model, tmp_path / "a", target_modules=["k_proj"], target_parameters=parameters, **patterns)
    adapt, params = ll.from_peft(model, tmp_path / "a")
    close(adapt(params, batch).logits, theirs(**batch).logits)
    ll.to_peft(adapt, params, tmp_path / "b")
    close(through_peft(model, tmp_path / "b")(**batch).logits, theirs(**batch).logits)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_layer_that_a_variant_cannot_adapt_here_is_refused_with_the_files_way_out(tmp_path):
    model = tiny_models["llama"]()[0].eval()
    peft_of(model, tmp_path, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    message = r'from_peft: (?s:.*)"model\.embed_tokens": DoRAConfig: not at such a layer here .*: merge it in PEFT'
    with pytest.raises(ValueError, match=message):
        ll.from_peft(model, tmp_path)


class Stack(nn.Module):
    """Matrices in one parameter, `(n, o, i)`, or `(n, i, o)` where the class says so."""

    def __init__(self, shape, is_transposed):
        super().__init__()
        self.w, self.is_transposed = nn.Parameter(torch.randn(3, *shape)), is_transposed

    def forward(self, x):
        return x @ (self.w if self.is_transposed else self.w.mT)


LAST = {"0.18.1": (False, False), "0.19.0": (False, True), "0.19.1": (True, False), None: (False, False)}
"""Whether PEFT takes the last axis for the input, by its version: of a plain stack, and of one that is transposed."""


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(6, 6), (6, 4)])
@pytest.mark.parametrize("version", LAST)
def test_stacks_are_read_by_the_axes_of_the_version_that_wrote_them(version, shape, is_transposed, tmp_path):
    model, n, r = nn.Sequential(Stack(shape, is_transposed)), 3, 2
    last = LAST[version][is_transposed]
    i, o = shape[::-1] if last else shape
    a, b = torch.randn(n * r, i), torch.randn(o, r * n)
    delta = torch.einsum("ore,eri->eoi", b.reshape(o, r, n), a.reshape(n, r, i))  # as in PEFT
    fields = {"peft_type": "LORA", "r": r, "lora_alpha": 3, "target_parameters": ["0.w"], "peft_version": version, "revision": None}
    tmp_path.joinpath("adapter_config.json").write_text(json.dumps(fields))
    names = ("lora_A", "lora_B")
    tensors = {f"base_model.model.0.{name}.weight": t for name, t in zip(names, (a, b))}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapt, params = ll.from_peft(model, tmp_path)
    close(adapt.merge(params)["0.w"], (model[0].w + 1.5 * (delta if last else delta.mT)).detach())
    ll.to_peft(adapt, params, tmp_path / "again")
    close(ll.from_peft(model, tmp_path / "again")[0].merge(params)["0.w"], adapt.merge(params)["0.w"])
    x = torch.randn(3, 5, 4 if shape == (6, 4) and not is_transposed else 6)
    close(through_peft(model, tmp_path / "again")(x), adapt(params, x))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_older_folders_of_square_stacks_from_here_are_read_as_they_were_written(is_transposed, tmp_path):
    model = nn.Sequential(Stack((6, 6), is_transposed))
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=("w$",)))
    params = ll.tree_map(lambda t: t + torch.randn_like(t), adapt.init())
    ll.to_peft(adapt, params, tmp_path)
    place = tmp_path / "adapter_config.json"
    fields = json.loads(place.read_text())
    assert fields["peft_version"] == "0.19.1"
    assert "revision" not in fields
    place.write_text(json.dumps({**fields, "peft_version": "0.18.0"}))  # as they were
    again, read = ll.from_peft(model, tmp_path)
    close(again.merge(read)["0.w"], adapt.merge(params)["0.w"])


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.l = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 4)

    def forward(self, x):
        return self.l(x @ self.w)


def test_parameter_of_the_model_itself_is_refused_by_name(tmp_path):
    adapt = ll.build(Root(), ll.LoRAConfig(r=2, target_names=r"^w$"))
    with pytest.raises(ValueError, match=r'"w": a parameter of the model itself'):
        ll.to_peft(adapt, adapt.init(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


# The task


def task_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())["task_type"]


CONFIGS = {
    "llama": tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    ),
    "bert": tf.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4),
    "t5": tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0),
    "gpt2": tf.GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=64, n_positions=16),
    "clip": tf.CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, eos_token_id=2
    ),
    "vit": tf.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4),
}
TASKS = {
    "LlamaForCausalLM": ("llama", "CAUSAL_LM", peft.AutoPeftModelForCausalLM),
    "GPT2LMHeadModel": ("gpt2", "CAUSAL_LM", peft.AutoPeftModelForCausalLM),
    "T5ForConditionalGeneration": ("t5", "SEQ_2_SEQ_LM", peft.AutoPeftModelForSeq2SeqLM),
    "LlamaForSequenceClassification": ("llama", "SEQ_CLS", peft.AutoPeftModelForSequenceClassification),
    "BertForSequenceClassification": ("bert", "SEQ_CLS", peft.AutoPeftModelForSequenceClassification),
    "BertForTokenClassification": ("bert", "TOKEN_CLS", peft.AutoPeftModelForTokenClassification),
    "BertForQuestionAnswering": ("bert", "QUESTION_ANS", peft.AutoPeftModelForQuestionAnswering),
    "BertModel": ("bert", "FEATURE_EXTRACTION", peft.AutoPeftModelForFeatureExtraction),
    "BertForMaskedLM": ("bert", None, None),
    "CLIPTextModel": ("clip", None, None),  # takes no embeddings in the place of tokens, which PEFT's class passes
    "ViTForImageClassification": ("vit", None, None),
    "ViTModel": ("vit", None, None),
}


def first(output):
    return output[0] if output[0].dim() else output[1]


@pytest.mark.parametrize("name", TASKS)
def test_task_is_that_of_the_model_and_its_auto_class_loads_the_file(name, tmp_path):
    config, task, auto = TASKS[name]
    model = getattr(tf, name)(copy.deepcopy(CONFIGS[config])).eval()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base").eval()
    body = ll.LoRAConfig(r=2, target_names=r"(q|query|q_proj|c_attn)$")
    whole = [ll.FullConfig(target_names=HEAD)] if task in ("SEQ_CLS", "TOKEN_CLS") else []
    adapt = ll.build(model, [body, *whole])
    params = move(adapt.init())
    ll.to_peft(adapt, params, tmp_path / "a")
    assert task_in(tmp_path / "a") == task
    batch = {"input_ids": ids(2)}
    batch |= {"decoder_input_ids": ids(2)} if config == "t5" else {}
    if config == "vit":
        batch = {"pixel_values": torch.randn(2, 3, 8, 8)}
    want = first(adapt(params, batch))
    close(first(through_peft(model, tmp_path / "a")(**batch)), want)
    if auto is not None:
        close(first(auto.from_pretrained(tmp_path / "a").eval()(**batch)), want)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
def test_task_of_a_file_is_kept(task, tmp_path):
    model = tf.LlamaForCausalLM(CONFIGS["llama"]).eval()
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    ll.to_peft(adapt, adapt.init(), tmp_path / "a")
    place = tmp_path / "a" / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "task_type": task}))
    adapt, params = ll.from_peft(model, tmp_path / "a")
    ll.to_peft(adapt.train(), params, tmp_path / "b")
    assert task_in(tmp_path / "b") == (task or "CAUSAL_LM")


def test_classifier_with_a_low_rank_head_has_no_task_since_pefts_class_would_shut_it_out(tmp_path):
    model = bert()
    adapt = ll.build(model, ll.LoRAConfig(r=2, exclude_names=()))
    params = move(adapt.init())
    ll.to_peft(adapt, params, tmp_path / "a")
    assert task_in(tmp_path / "a") is None
    close(through_peft(model, tmp_path / "a")(input_ids=ids()).logits, adapt(params, {"input_ids": ids()}).logits)
    again, read = ll.from_peft(model, tmp_path / "a")
    close(again(read, {"input_ids": ids()}).logits, adapt(params, {"input_ids": ids()}).logits)


def distilbert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 32}
    return tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**sizes, num_labels=3)).eval()


INSIDE = {
    "every layer": (ll.LoRAConfig(r=2), None),  # of which one is "pre_classifier", that ends as the head's name does
    "the body": (ll.LoRAConfig(r=2, target_names="q_lin$"), "SEQ_CLS"),
    "both heads": ([ll.LoRAConfig(r=2, target_names="q_lin$"), ll.FullConfig(target_names="classifier$")], "SEQ_CLS"),
    "one head": ([ll.LoRAConfig(r=2, target_names="q_lin$"), ll.FullConfig(target_names="pre_classifier$")], "SEQ_CLS"),
}


@pytest.mark.parametrize("case", INSIDE)
def test_heads_are_those_whose_names_end_as_pefts_do(case, tmp_path):
    model, (cfg, task) = distilbert(), INSIDE[case]
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    ll.to_peft(adapt, params, tmp_path / "a")
    assert task_in(tmp_path / "a") == task
    want = adapt(params, {"input_ids": ids()}).logits
    close(through_peft(model, tmp_path / "a")(input_ids=ids()).logits, want)
    again, read = ll.from_peft(model, tmp_path / "a")
    close(again(read, {"input_ids": ids()}).logits, want)


def test_pefts_own_file_of_such_heads_goes_both_ways(tmp_path):
    model = distilbert()
    theirs = wrapped(model, peft.LoraConfig(r=2, target_modules=["q_lin"], task_type="SEQ_CLS"))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    close(adapt(params, {"input_ids": ids()}).logits, theirs(input_ids=ids()).logits)
    ll.to_peft(adapt, params, tmp_path / "ours")
    close(through_peft(model, tmp_path / "ours")(input_ids=ids()).logits, theirs(input_ids=ids()).logits)


def test_classifier_whose_head_is_not_adapted_keeps_it(tmp_path):
    model = bert(head=3)
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="query$"))
    params = move(adapt.init())
    ll.to_peft(adapt, params, tmp_path / "a")
    assert task_in(tmp_path / "a") == "SEQ_CLS"
    close(through_peft(model, tmp_path / "a")(input_ids=ids()).logits, adapt(params, {"input_ids": ids()}).logits)
    again, read = ll.from_peft(model, tmp_path / "a")
    close(again(read, {"input_ids": ids()}).logits, adapt(params, {"input_ids": ids()}).logits)


# Patterns and values of the config


class Marked(nn.Module):
    """Layers whose names have the marks of expressions."""

    def __init__(self):
        super().__init__()
        self.add_module("a+b", nn.Linear(8, 8))
        self.inner = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})

    def forward(self, x):
        return self.inner["down"](self.inner["up"](self.get_submodule("a+b")(x).tanh()).tanh())


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:The following .* did not match")  # but PEFT takes its value
def test_pattern_that_is_a_whole_path_holds_there_whatever_marks_it_has(tmp_path):
    model = Marked().eval()
    theirs = peft_of(model, tmp_path, target_modules=["a+b", "up"], alpha_pattern={"a+b": 3}, rank_pattern={"a+b": 4})
    adapt, params = ll.from_peft(model, tmp_path)
    close(adapt(params, X), theirs(X))


def test_order_of_patterns_that_peft_loses_is_reported_and_the_way_out_works(tmp_path):
    model, order = Marked().eval(), {"up": 30, "inner.up": 4}
    theirs = peft_of(model, tmp_path, target_modules=["up", "down"], alpha_pattern=order)
    with pytest.warns(UserWarning, match=r'(?s)alpha_pattern at "inner\.up".*PEFT sorts them.*Put that one first'):
        adapt, params = ll.from_peft(model, tmp_path)
    close(adapt(params, X), through_peft(model, tmp_path)(X))
    assert (adapt(params, X) - theirs(X)).abs().max() > 1e-2
    edit(tmp_path, alpha_pattern=order)
    adapt, params = ll.from_peft(model, tmp_path)
    close(adapt(params, X), theirs(X))


RANKS = {
    "lora": peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["up", "down"], rank_pattern={"up": 4, "inner.up": 3}),
    "lokr": peft.LoKrConfig(r=1, init_weights=False, target_modules=["up", "down"], rank_pattern={"up": 1, "inner.up": 2}),
}


@pytest.mark.parametrize("case", RANKS)
def test_ranks_of_tensors_say_which_pattern_held(case, tmp_path):
    model = Marked().eval()
    theirs = wrapped(model, RANKS[case])
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    close(adapt(params, X), theirs(X))
    ll.to_peft(adapt, params, tmp_path / "ours")
    close(through_peft(model, tmp_path / "ours")(X), theirs(X))


@pytest.mark.filterwarnings("ignore:.*invalid shape")
def test_alpha_of_zero_is_the_rank_in_adalora(tmp_path):
    model = Marked().eval()
    theirs = wrapped(model, peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, lora_alpha=0, target_modules=["up"]))
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    assert [cfg.alpha for cfg in adapt.configs] == [3]
    close(adapt(params, X), theirs(X))
    adapt = ll.build(model, ll.AdaLoRAConfig(init_r=3, target_r=2, total_step=9, alpha=0.0))
    with pytest.raises(ValueError, match="alpha=0: PEFT takes init_r in its place"):
        ll.to_peft(adapt, adapt.init(), tmp_path / "refused")


def test_fields_that_adalora_inherits_and_does_not_use_are_free(tmp_path):
    model = Marked().eval()
    unused = {"use_rslora": True, "alpha_pattern": {"up": 7}, "lora_bias": True}
    theirs = wrapped(model, peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, lora_alpha=2, target_modules=["up"], **unused))
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    close(adapt(params, X) - model(X), theirs(X) - model(X))


@pytest.mark.parametrize("cfg", [ll.IA3Config(target_roles=()), ll.ROADConfig(group_size=4)], ids=lambda c: c.name)
def test_deviations_of_half_precision_are_written_whole(cfg, tmp_path):
    model = Marked().eval()
    adapt = ll.build(model, dataclasses.replace(cfg, dtype=torch.bfloat16))
    params = ll.tree_map(lambda p: p + 0.003 * torch.randn(p.shape).to(p), adapt.init(seed=0))
    ll.to_peft(adapt, params, tmp_path / "ours")
    base, want = model(X), adapt(params, X)
    assert (through_peft(model, tmp_path / "ours")(X) - want).abs().max() < 1e-2 * (want - base).abs().max()


def test_share_above_one_is_all_there_is_in_pefts_file_too(tmp_path):
    model = Marked().eval()
    adapt = ll.build(model, ll.FRoDConfig(sparse_rate=2.5))
    params = move(adapt.init(seed=0), scale=0.05)
    ll.to_peft(adapt, params, tmp_path / "ours")
    close(through_peft(model, tmp_path / "ours")(X), adapt(params, X))


def test_kernels_that_lie_the_other_way_are_refused(tmp_path):
    tall, wide = (nn.Sequential(nn.Conv2d(4, 4, size), nn.Flatten()) for size in ((3, 1), (1, 3)))
    peft_of(tall, tmp_path, target_modules=["0"])
    with pytest.raises(ValueError, match=r'"base_model\.model\.0\.lora_A\.weight": expected 2 axes .*found \(2, 4, 3, 1\)'):
        ll.from_peft(wide, tmp_path)


def test_one_expert_for_a_router_is_refused(tmp_path):
    adapt = ll.build(Marked(), ll.LilyConfig(r=2, num_B=1))
    with pytest.raises(ValueError, match="num_B=1: PEFT's router needs two"):
        ll.to_peft(adapt, adapt.init(), tmp_path / "refused")


def deepseek():
    """Return a model with a dense block, a block of experts fused by transformers, and an expert that all tokens share."""
    torch.manual_seed(0)
    config = tf.DeepseekV3Config(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4},
        **{"qk_nope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        **{"first_k_dense_replace": 1, "pad_token_id": 0},
    )
    return tf.DeepseekV3ForCausalLM(config).eval(), {"input_ids": torch.randint(1, 64, (2, 6))}


OF_EXPERTS = [
    ll.LoRAConfig(r=2),
    ll.PiSSAConfig(r=2),
    [ll.LoRAConfig(r=2, target_names=r"q_a_proj|down_proj"), ll.LoRAConfig(r=3, alpha=5, target_names=r"(gate|up)_proj$")],
]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("cfg", OF_EXPERTS, ids=["lora", "pissa", "two ranks"])
def test_layers_named_as_single_experts_go_both_ways(cfg, tmp_path):
    """PEFT took their names for those of experts that are one parameter now, and left the layers out without a word."""
    model, batch = deepseek()
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    assert any(path.endswith("shared_experts.gate_proj") for path in params)
    assert any(path.endswith("layers.0.mlp.up_proj") for path in params)
    ll.to_peft(adapt, params, tmp_path / "a")
    want, base = adapt(params, batch).logits, model(**batch).logits
    close(through_peft(model, tmp_path / "a")(**batch).logits - base, want - base)
    again, read = ll.from_peft(model, tmp_path / "a")
    close(again(read, batch).logits - base, want - base)
    assert not any("gate_proj" in name for name in json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"])


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("cfg", "found"),
    [
        (ll.LoRAConfig(r=2, dropout=0.1), r"dropout\. The same params fit a config with dropout=0\.0\."),
        (ll.LoRAConfig(r=2, lora_bias=True), "lora_bias"),
        (ll.DoRAConfig(r=2), "another method"),
    ],
    ids=["dropout", "bias", "dora"],
)
def test_what_peft_has_not_at_such_layers_is_refused_and_the_way_out_works(cfg, found, tmp_path):
    model, batch = deepseek()
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    with pytest.raises(ValueError, match=rf'gate_proj": {type(cfg).__name__} at a name that PEFT takes for the experts .* found {found}'):
        ll.to_peft(adapt, params, tmp_path / "a")
    if getattr(cfg, "dropout", 0.0):
        plain = ll.build(model, ll.LoRAConfig(r=2))
        ll.to_peft(plain, params, tmp_path / "a")
        close(through_peft(model, tmp_path / "a")(**batch).logits, adapt.eval()(params, batch).logits)
    others = ll.build(model, type(cfg)(**{**vars(cfg), "target_names": r"self_attn\."}))  # elsewhere PEFT has it
    some = move(others.init())
    ll.to_peft(others, some, tmp_path / "b")
    close(through_peft(model, tmp_path / "b")(**batch).logits, others.eval()(some, batch).logits)


@pytest.mark.parametrize("fields", [{"r": 2, "oft_block_size": 0}, {"r": 0, "oft_block_size": 4}], ids=["blocks", "rounded"])
@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")
def test_rotations_of_several_widths_go_both_ways(fields, tmp_path):
    """PEFT has one number of blocks, or one width that it rounds, for all layers; the widths were read and not written."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)), torch.randn(5, 8)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.OFTConfig(target_modules=["0", "2", "4"], **fields)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "oft_R" in name:
                p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    assert len({cfg.block_size for cfg in adapt.configs}) > 1
    ll.to_peft(adapt, params, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    want = theirs(x) - model(x)
    for found in (adapt(params, x), again(x)):
        assert (found - model(x) - want).abs().max() < 1e-5 * want.abs().max()


def test_rotations_of_widths_that_peft_has_no_word_for_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adapt = ll.build(model, [ll.OFTConfig(block_size=k, target_names=(f"^{n}$",)) for n, k in enumerate((2, 4))])
    with pytest.raises(ValueError, match=r"to_peft: expected configs that agree.*\n.*oft_block_size: 2 and 4 at .*\n.*ll.save"):
        ll.to_peft(adapt, adapt.init(), tmp_path)


PACKED = {
    "tokens": (ll.TokensConfig(token_ids=(1, 5), target_names=r"^0$"), "PEFT moves rows of a `weight` as it is stored"),
    "kasa": (ll.KaSAConfig(r=2), "PEFT's start has this meaning in an nn.Linear alone"),
}


@pytest.mark.parametrize("backend", ["nf4", "8-bit"])
@pytest.mark.parametrize("name", PACKED)
def test_what_peft_has_not_at_packed_layers_is_refused_both_ways_and_the_way_out_works(name, backend, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    from quantised_models import twins

    (cfg, reason), model = PACKED[name], nn.Sequential(nn.Linear(64, 64, bias=False))
    packed, dense = twins(model, backend)
    adapt = ll.build(packed, cfg)
    params, x = move(adapt.init()), torch.randn(3, 64)
    with pytest.raises(ValueError, match=rf'(?s)to_peft.*"0": \w+: {reason}.*ll\.save'):
        ll.to_peft(adapt, params, tmp_path / "a")
    ll.save(adapt, params, tmp_path / "a.safetensors")
    twin, read = ll.load(dense, tmp_path / "a.safetensors")
    ll.to_peft(twin, read, tmp_path / "dense")  # the rows and the start of the weight that the codes stand for
    with pytest.raises(ValueError, match=rf'(?s)from_peft.*"0": \w+: {reason}'):
        ll.from_peft(packed, tmp_path / "dense")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "dense")
    torch.testing.assert_close(theirs(x) - dense(x), adapt(params, x) - adapt.base(x), rtol=1e-3, atol=1e-4)


def test_tokens_of_a_layer_with_a_bias_which_peft_leaves_out_are_refused_both_ways(tmp_path):
    model = nn.Sequential(nn.Linear(8, 6))
    wrapped(model, peft.TrainableTokensConfig(target_modules=["0"], token_indices=[1, 4])).save_pretrained(tmp_path / "theirs")
    reason = r'"0": TokensConfig: PEFT multiplies by the weight alone there, without the bias of the Linear'
    with pytest.raises(ValueError, match=rf"(?s)from_peft.*{reason}"):
        ll.from_peft(model, tmp_path / "theirs")
    adapt = ll.build(model, ll.TokensConfig(token_ids=(1, 4), target_names="^0$"))
    with pytest.raises(ValueError, match=rf"(?s)to_peft.*{reason}"):
        ll.to_peft(adapt, move(adapt.init()), tmp_path / "ours")


# What PEFT's own tests adapt


def images(channels, kernel, dims=2):
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return nn.Sequential(conv(channels, 4, kernel)), torch.randn(3, channels, *[5] * dims)


def vectors(i, o):
    return nn.Sequential(nn.Linear(i, o)), torch.randn(3, i)


GATES = {
    "a pixel": (lambda: images(4, 1), ["0"]),
    "a pixel, another width": (lambda: images(6, 1), "0"),
    "a voxel": (lambda: images(4, 1, 3), ["0"]),
    "outputs of a convolution": (lambda: images(4, 3), []),
    "outputs of a pixel": (lambda: images(4, 1), "other"),
    "one input": (lambda: vectors(1, 5), ["0"]),
    "one output": (lambda: vectors(5, 1), []),
    "one number, input": (lambda: vectors(1, 1), ["0"]),
    "one number, output": (lambda: vectors(1, 1), []),
}


@pytest.mark.parametrize("case", GATES)
def test_gates_whose_shape_does_not_say_are_those_of_the_config(case, tmp_path):
    torch.manual_seed(0)
    (model, x), inputs = GATES[case][0](), GATES[case][1]
    theirs = wrapped(model, peft.IA3Config(target_modules=["0"], feedforward_modules=inputs))
    theirs.save_pretrained(tmp_path / "a")
    adapt, params = ll.from_peft(model, tmp_path / "a")
    close(adapt(params, x) - model(x), theirs(x) - model(x))
    ll.to_peft(adapt, params, tmp_path / "b")
    close(through_peft(model, tmp_path / "b")(x) - model(x), theirs(x) - model(x))


@pytest.mark.parametrize("dims", [2, 3])
def test_gates_of_the_channels_of_patches_are_refused(dims, tmp_path):
    model, _ = images(4, 3, dims)
    wrapped(model, peft.IA3Config(target_modules=["0"], feedforward_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'"0": IA3FFConfig on a convolution: PEFT gates each channel of its input'):
        ll.from_peft(model, tmp_path)
    adapt = ll.build(model, ll.IA3FFConfig(target_names="^0$"))
    with pytest.raises(ValueError, match=r'"0": IA3FFConfig on a convolution: PEFT gates each channel of its input'):
        ll.to_peft(adapt, adapt.init(), tmp_path)


def test_gates_under_older_names_are_those_of_the_config(tmp_path):
    class Backbone(nn.Module):
        base_model_prefix = "net"

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(4, 4, 1))

        def forward(self, x):
            return self.net(x)

    torch.manual_seed(0)
    model, x = Backbone(), torch.randn(2, 4, 3, 3)
    for names in ("0", ["0"]):
        theirs = wrapped(model.net, peft.IA3Config(target_modules=["0"], feedforward_modules=names))
        theirs.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match='"0" as "net.0"'):
            adapt, params = ll.from_peft(model, tmp_path)
        close(adapt(params, x) - model(x), theirs(x) - model(x))


class Attending(nn.Module):
    """Attention whose input is all of its arguments."""

    def __init__(self):
        super().__init__()
        self.add_module("0", nn.MultiheadAttention(8, 2))

    def __getitem__(self, k):
        return self.get_submodule(str(k))

    def forward(self, x):
        return self[0](x, x, x)[0]


ELSEWHERE = {
    "attention": (lambda: (Attending(), torch.randn(3, 8)), lambda: peft.LoraConfig(r=2, target_modules=["0"])),
    "hira": (lambda: images(4, 3), lambda: peft.HiraConfig(r=2, target_modules=["0"])),
    "lokr": (lambda: images(4, 3), lambda: peft.LoKrConfig(r=2, target_modules=["0"])),
    "hira of tokens": (lambda: (nn.Sequential(nn.Embedding(9, 4)), ids() % 9), lambda: peft.HiraConfig(r=2, target_modules=["0"])),
    "oft of tokens": (
        lambda: (nn.Sequential(nn.Embedding(9, 4)), ids() % 9),
        lambda: peft.OFTConfig(oft_block_size=2, target_modules=["0"]),
    ),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_methods_of_linear_layers_alone_are_refused_elsewhere_and_the_way_out_works(case, tmp_path):
    torch.manual_seed(0)
    (model, x), config = ELSEWHERE[case][0](), ELSEWHERE[case][1]()
    theirs = wrapped(model, config)
    theirs.save_pretrained(tmp_path)
    kind, method = type(model[0]).__name__, config.peft_type.value
    with pytest.raises(ValueError, match=rf'"0" \({kind}\): PEFT.s {method} is not read at such a layer: merge it in PEFT') as e:
        ll.from_peft(model, tmp_path)
    assert str(e.value).count(method) == 1  # not once for each tensor
    want = theirs(x)
    merged = theirs.merge_and_unload()
    adapt = ll.build(merged, ll.LoRAConfig(r=2, target_names="^0"))
    close(adapt(adapt.init(), x), want)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_layers_that_are_no_norms_are_whole_modules_in_ln_tuning(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), torch.randn(3, 8)
    for targets in (["0"], ["0", "1"]):
        theirs = wrapped(model, peft.LNTuningConfig(target_modules=targets))
        theirs.save_pretrained(tmp_path / "a")
        adapt, params = ll.from_peft(model, tmp_path / "a")
        close(adapt(params, x), theirs(x))
    assert [cfg.name for cfg in adapt.configs] == ["full", "ln_tuning"]
    ll.to_peft(adapt, params, tmp_path / "b")
    close(through_peft(model, tmp_path / "b")(x), theirs(x))


@pytest.mark.parametrize("alpha", [None, 3])
def test_ranks_that_peft_lowers_to_a_width_are_one_rank(alpha, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)), torch.randn(3, 8)
    theirs = wrapped(model, peft.DeftConfig(r=4, alpha=alpha, target_modules=["0", "1"]))
    theirs.save_pretrained(tmp_path / "a")
    adapt, params = ll.from_peft(model, tmp_path / "a")
    assert [cfg.r for cfg in adapt.configs] == [4, 2]
    ll.to_peft(adapt, params, tmp_path / "b")
    close(through_peft(model, tmp_path / "b")(x) - model(x), theirs(x) - model(x))
    lower = ll.build(model, [ll.DEFTConfig(r=3, target_names="0"), ll.DEFTConfig(r=1, target_names="1")])
    with pytest.raises(ValueError, match=r'r: 3 and 1 at "1"'):
        ll.to_peft(lower, lower.init(), tmp_path / "c")


GROUPED = {
    "two groups": lambda: nn.Conv2d(4, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "a series": lambda: nn.Conv1d(4, 4, 3, groups=2),
    "pixels": lambda: nn.Conv2d(4, 8, 1, groups=2, stride=2),
}


@pytest.mark.parametrize("case", GROUPED)
def test_loha_of_kernels_in_groups_goes_both_ways(case, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(GROUPED[case]())
    x = torch.randn(3, 4, *[7] * (model[0].weight.dim() - 2))
    theirs = wrapped(model, peft.LoHaConfig(r=2, alpha=3, target_modules=["0"]))
    theirs.save_pretrained(tmp_path / "a")
    adapt, params = ll.from_peft(model, tmp_path / "a")
    assert (theirs(x) - model(x)).abs().max() > 1e-3
    close(adapt(params, x) - model(x), theirs(x) - model(x))
    ll.to_peft(adapt, params, tmp_path / "b")
    close(through_peft(model, tmp_path / "b")(x) - model(x), theirs(x) - model(x))


@pytest.mark.parametrize("targets", [["0"], ["0", "1"]], ids=str)
def test_nothing_is_dropped_at_an_embedding_as_in_peft(targets, tmp_path):
    """Its training went on with dropped tokens, without a word."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4)).eval(), ids() % 9
    theirs = wrapped(model, peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.5))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    assert {t.path: cfg.dropout for t, cfg in zip(adapt.targets, adapt.configs)} == dict(list({"0": 0.0, "1": 0.5}.items())[: len(targets)])
    torch.manual_seed(3)
    want = theirs.train()(x)
    torch.manual_seed(3)
    close(adapt.train()(params, x), want)
    ll.to_peft(adapt, params, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["lora_dropout"] == [0.0, 0.5][len(targets) - 1]
    close(through_peft(model, tmp_path / "ours")(x), theirs.eval()(x))


def test_dropout_of_outputs_at_kernels_in_groups_is_refused_and_the_way_out_works(tmp_path):
    """A training that went on here dropped nothing, without a word."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), torch.randn(3, 4, 7, 7)
    theirs = wrapped(model, peft.LoHaConfig(r=2, rank_dropout=0.3, target_modules=["0"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'"0": LoHaConfig: no dropout at such a layer here .*set it to 0 in the file'):
        ll.from_peft(model, tmp_path)
    edit(tmp_path, rank_dropout=0.0)
    adapt, params = ll.from_peft(model, tmp_path)
    close(adapt(params, x), theirs(x))


# Configs inside a config


def test_empty_config_of_kasa_has_pefts_defaults(tmp_path):
    """It was read as plain LoRA, without the start that KaSA takes off."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    peft_of(model, tmp_path, target_modules=["0"], kasa_config=peft.KasaConfig())
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "kasa_config": {}}))
    adapt, params = ll.from_peft(model, tmp_path)
    assert type(adapt.configs[0]) is ll.KaSAConfig
    close(adapt(params, x) - model(x), through_peft(model, tmp_path)(x) - model(x))


@pytest.mark.parametrize("name", ["velora_config", "monteclora_config", "arrow_config", "use_bdlora"])
def test_empty_config_of_a_method_that_is_not_here_is_refused(name, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    peft_of(model, tmp_path, target_modules=["0"])
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, name: {}}))
    with pytest.raises(ValueError, match=rf"{name}: expected it off, found {{}}"):
        ll.from_peft(model, tmp_path)


@pytest.mark.parametrize("sizes", [(1, 6), (6, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("names", [[], ["0"], "0|1"], ids=str)
def test_gates_of_a_single_number_are_of_inputs_where_the_file_names_them(names, sizes, tmp_path):
    model, x = nn.Sequential(nn.Linear(*sizes)).eval(), torch.randn(4, sizes[0])
    theirs = wrapped(model, peft.IA3Config(target_modules=["0"], feedforward_modules=names))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    assert type(adapt.configs[0]) is (ll.IA3FFConfig if names else ll.IA3Config)
    close(adapt(params, x), theirs(x))
    ll.to_peft(adapt, params, tmp_path / "ours")
    close(through_peft(model, tmp_path / "ours")(x), theirs(x))


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_rank_that_peft_lowers_to_the_layers_width_keeps_the_scale_of_the_one_asked_for(start, rslora, tmp_path):
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 1)).eval(), torch.randn(4, 6)
    fields = {"r": 4, "lora_alpha": 3, "init_lora_weights": start, "use_rslora": rslora}
    theirs = wrapped(model, peft.LoraConfig(target_modules=["0", "2", "3"], **fields))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    assert [cfg.r for cfg in adapt.configs] == [4, 3, 1]
    close(adapt(params, x), theirs(x))
    edit(tmp_path / "theirs", r=2)
    with pytest.raises(ValueError, match=r'expected 4 at "0", as its tensors have, found 2'):
        ll.from_peft(model, tmp_path / "theirs")


@pytest.mark.parametrize("bias", [True, False])
def test_rank_of_subspaces_goes_to_the_width_with_the_biases(bias, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    model, x = nn.Sequential(nn.Linear(5, 16, bias=bias)).eval(), torch.randn(4, 5)
    theirs = wrapped(model, peft.AdamssConfig(target_modules=["0"], num_subspaces=3))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    assert adapt.constants["0"]["V"].shape == ((6, 6) if bias else (5, 5))
    close(adapt(params, x), theirs(x))


def test_subspaces_by_rounding_are_refused_both_ways_and_the_way_out_works(tmp_path, monkeypatch):
    stand_in(monkeypatch)
    model, x = nn.Sequential(nn.Linear(32, 16)).eval(), torch.randn(4, 32)  # square U: its rows are all of one distance
    reason = r'(?s){}.*"0": AdaMSSConfig has groups that rounding decides.*train with a lower r'
    wrapped(model, peft.AdamssConfig(target_modules=["0"], num_subspaces=3)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=reason.format("from_peft")):
        ll.from_peft(model, tmp_path / "theirs")
    adapt = ll.build(model, ll.AdaMSSConfig(num_subspaces=3))
    with pytest.raises(ValueError, match=reason.format("to_peft")):
        ll.to_peft(adapt, move(adapt.init()), tmp_path / "ours")
    adapt = ll.build(model, ll.AdaMSSConfig(num_subspaces=3, r=8))
    params = move(adapt.init())
    ll.to_peft(adapt, params, tmp_path / "ours")
    close(through_peft(model, tmp_path / "ours")(x), adapt(params, x))


@pytest.mark.parametrize("start", [True, "bat"], ids=["bone", "bat"])
def test_files_of_bone_are_those_of_miss(start, tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 12)).eval(), torch.randn(4, 8)
    theirs = wrapped(model, peft.MissConfig(target_modules=["0"], r=4, init_weights=start))
    theirs.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    old = {key.replace(".miss_block", ".bone_block"): t for key, t in tensors.items()}  # as PEFT wrote before it removed Bone
    assert old.keys() != tensors.keys()
    safetensors.torch.save_file(old, tmp_path / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    written = {key: value for key, value in fields.items() if key not in ("mini_r", "miss_dropout", "peft_version")}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**written, "peft_type": "BONE"}))
    adapt, params = ll.from_peft(model, tmp_path)
    close(adapt(params, x), theirs(x))


# What PEFT lowers to nothing


NARROW = {
    "osf": ((8, 8, 3), {"effective_rank": 5}, "2"),
    "osf share": ((8, 8, 6), {"effective_rank": 2, "rank_pattern": {"2": 1.0}}, "2"),
    "oft": ((7, 4, 6), {"r": 0, "oft_block_size": 3}, "0"),
    "oft blocks": ((4, 8, 6), {"r": 4, "oft_block_size": 0}, "0"),
    "oft shared": ((7, 4, 6), {"r": 0, "oft_block_size": 3, "block_share": True}, "0"),
}


@pytest.mark.parametrize("case", NARROW)
@pytest.mark.filterwarnings("ignore:Invalid `")
def test_layers_that_peft_leaves_nothing_to_train_are_those_of_the_model(case, tmp_path):
    (i, k, o), fields, idle = NARROW[case]
    config = peft.OSFConfig if case.startswith("osf") else peft.OFTConfig
    model, x = nn.Sequential(nn.Linear(i, k), nn.Tanh(), nn.Linear(k, o)).eval(), torch.randn(4, i)
    theirs = wrapped(model, config(target_modules=["0", "2"], **fields))
    theirs.save_pretrained(tmp_path / "theirs")
    empty = [key for key, t in saved(tmp_path / "theirs").items() if not t.numel()]
    assert empty
    assert all(f".{idle}." in key for key in empty)
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    assert [t.path for t in adapt.targets] == [{"0": "2", "2": "0"}[idle]]
    close(adapt(params, x) - model(x), theirs(x) - model(x))
    ll.to_peft(adapt, params, tmp_path / "ours")
    close(through_peft(model, tmp_path / "ours")(x) - model(x), theirs(x) - model(x))
    wrapped(model, config(target_modules=[idle], **fields)).save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match=rf'"{idle}": nothing to train.*the model as it is computes the same'):
        ll.from_peft(model, tmp_path / "alone")


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside LoRA"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tokens_that_a_file_names_twice_are_trained_once(beside, tied, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, batch = (
        tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, tie_word_embeddings=tied)).eval(),
        {"input_ids": torch.tensor([[3, 5, 3, 9]])},
    )
    alone = peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 5, 3])
    cfg = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5, 3]) if beside else alone
    theirs = peft.get_peft_model(copy.deepcopy(model), cfg)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    theirs.eval().save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    assert next(cfg for cfg in adapt.configs if cfg.name == "tokens").token_ids == (3, 5)
    close(adapt(params, batch).logits, theirs(**batch).logits)
    ll.to_peft(adapt, params, tmp_path / "ours")
    close(through_peft(model, tmp_path / "ours")(**batch).logits, theirs(**batch).logits)


# Models that look as if PEFT had wrapped them, and models that it has


class Around(nn.Module):
    """A module of a user's own whose layer has the name that PEFT gives to what it wraps."""

    def __init__(self):
        super().__init__()
        self.base_layer, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.other(self.base_layer(x).tanh())


@pytest.mark.parametrize("fields", [{}, {"bias": "lora_only"}, {"modules_to_save": ["head"]}], ids=str)
@pytest.mark.parametrize("names", [["base_layer"], ["other"], ["base_layer", "other"], ["inner.base_layer"]], ids=str)
def test_layers_beside_one_named_base_layer_go_both_ways(names, fields, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(OrderedDict(inner=Around(), head=nn.Linear(8, 4))).eval(), torch.randn(4, 8)
    theirs = wrapped(model, peft.LoraConfig(r=2, target_modules=names, **fields))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    close(adapt(params, x), theirs(x))
    ll.to_peft(adapt, params, tmp_path / "ours")
    close(through_peft(model, tmp_path / "ours")(x), theirs(x))
    ll.save(adapt, params, tmp_path / "a.safetensors")
    adapt, params = ll.load(model, tmp_path / "a.safetensors")
    close(adapt(params, x), theirs(x))


def test_layers_of_a_model_that_looks_wrapped_are_adapted_by_their_whole_path():
    model = nn.Sequential(Around())
    for names in ((), "base_layer$", "other"):
        with pytest.raises(ValueError, match=r"Where they are the model's own.*target_names=\(r\"\^0\\.(base_layer|other)\$\", \.\.\.\)"):
            ll.build(model, ll.LoRAConfig(r=2, target_names=names))
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=(r"^0\.base_layer$",)))
    assert [t.path for t in adapt.targets] == ["0.base_layer"]


def test_models_that_wear_pefts_layers_are_named_and_the_way_out_works(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    theirs = peft_of(model, tmp_path, target_modules=["0"])
    want = theirs(x)
    for worn, found in ((theirs, "nothing"), (theirs.base_model.model, r"an adapter of another library around it \(Linear\)")):
        message = rf'(?s)"0": expected a linear layer, found {found}.*without layers of PEFT.*peft_model\.unload\(\)'
        with pytest.raises(ValueError, match=message):
            ll.from_peft(worn, tmp_path)
    adapt, params = ll.from_peft(theirs.unload(), tmp_path)
    close(adapt(params, x), want)


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}], ids=["whole", "adapted"]
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_files_of_a_grown_vocabulary_name_the_way_out_and_it_works(fields, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, batch = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).eval(), {"input_ids": torch.tensor([[3, 5, 66]])}
    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(67)
    theirs = peft_of(grown, tmp_path, **{"target_modules": ["q_proj"], **fields})
    with pytest.raises(ValueError, match=r"\(67, 16\)(?s:.*)model\.resize_token_embeddings\((67|n)\)"):
        ll.from_peft(model, tmp_path)
    model.resize_token_embeddings(67)
    if "modules_to_save" not in fields:
        with pytest.raises(ValueError, match=r"differs from the model's own\. Load it into the model first"):
            ll.from_peft(model, tmp_path)
        tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
        model.load_state_dict({"model.embed_tokens.weight": tensors["base_model.model.model.embed_tokens.base_layer.weight"]}, strict=False)
        model.lm_head.load_state_dict(grown.lm_head.state_dict())  # which such a file has not
    adapt, params = ll.from_peft(model, tmp_path)
    close(adapt(params, batch).logits, theirs(**batch).logits)


def test_pickled_tensors_are_not_opened_and_the_way_out_works(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    theirs = peft_of(model, tmp_path, target_modules=["0"])
    tensors = tmp_path / "adapter_model.safetensors"
    torch.save(safetensors.torch.load_file(tensors), tmp_path / "adapter_model.bin")
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r'save_file\(torch\.load\("adapter_model\.bin", weights_only=True\)'):
        ll.from_peft(model, tmp_path)
    safetensors.torch.save_file(torch.load(tmp_path / "adapter_model.bin", weights_only=True), tensors)
    adapt, params = ll.from_peft(model, tmp_path)
    close(adapt(params, x), theirs(x))


# Models whose layers transformers renames as PEFT loads them


@pytest.mark.skipif(not hasattr(tf, "LagunaForCausalLM"), reason="transformers before the class")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_layers_that_peft_does_not_find_again_are_named(tmp_path):
    """A table has `mlp.shared_expert.` for older names, where the point stands for the s of the present ones."""
    model, batch = small("LagunaForCausalLM")
    names = ["q_proj", "shared_experts.down_proj"]
    theirs = peft_of(model, tmp_path / "theirs", target_modules=names)
    want = theirs(**batch).logits
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    close(adapt(params, batch).logits, want)
    with pytest.warns(UserWarning, match=r'to_peft: PEFT .*loads the layers "model\.layers\.1\.mlp\.shared_experts\.down_proj" without'):
        ll.to_peft(adapt, params, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        assert (through_peft(model, tmp_path / folder)(**batch).logits - want).abs().max() > 1e-3
    model.load_state_dict(adapt.merge(params), strict=False)
    close(model(**batch).logits, want)
    few = ll.build(model, ll.LoRAConfig(r=2, target_names="q_proj$"))
    ll.to_peft(few, few.init(), tmp_path / "few")


# Starts that PEFT takes off the weight, at weights that are shared or saved


STARTS = {"pissa": {"init_lora_weights": "pissa"}, "olora": {"init_lora_weights": "olora"}, "kasa": {"kasa_config": peft.KasaConfig()}}


def headed(tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, tie_word_embeddings=tied)).eval(), {"input_ids": torch.tensor([[3, 5, 9]])}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_starts_that_move_a_shared_weight_too_are_refused_both_ways(start, tmp_path):
    """PEFT's embedding changes with its head, so that the model without training is another one."""
    model, batch = headed(tied=True)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["lm_head"], **STARTS[start])).eval()
    assert (theirs(**batch).logits - model(**batch).logits).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    reason = r'"lm_head": (KaSAConfig: )?PEFT takes its start off the weight, which "model\.embed_tokens" shares'
    with pytest.raises(ValueError, match=reason):
        ll.from_peft(model, tmp_path / "theirs")
    if start == "kasa":
        adapt = ll.build(model, ll.KaSAConfig(r=2, target_names="lm_head", exclude_names=()))
        with pytest.raises(ValueError, match=reason):
            ll.to_peft(adapt, adapt.init(), tmp_path / "ours")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_weight_that_a_start_has_moved_is_named_and_the_way_out_works(start, tmp_path):
    model, batch = headed(tied=False)
    theirs = wrapped(model, peft.LoraConfig(r=2, target_modules=["lm_head"], **STARTS[start]))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r'lm_head\.base_layer\.weight": it is what the start left .* save_embedding_layers=False'):
        ll.from_peft(model, tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    close(adapt(params, batch).logits, theirs(**batch).logits)


SECOND_NAMES = {
    "of another layer": ("bert", {}),
    "of another layer, roberta": ("roberta", {}),
    "of an adapted layer": ("bert", {"target_modules": ["query", "decoder"]}),
    "of a whole module": ("bert", {"modules_to_save": ["cls"]}),
}


@pytest.mark.parametrize("case", SECOND_NAMES)
def test_second_name_of_a_layers_bias_is_that_bias(case, tmp_path):
    name, options = SECOND_NAMES[case]
    model, batch = tiny_models[name]()
    model.eval()
    theirs = wrapped(model, peft.LoraConfig(**{"r": 2, "target_modules": ["query"], "bias": "all", **options}))
    want = theirs(**batch).logits
    theirs.save_pretrained(tmp_path / "theirs")
    ends = ("decoder.bias", "decoder.base_layer.bias", "predictions.bias", "lm_head.bias")
    assert sum(key.endswith(ends) for key in saved(tmp_path / "theirs")) >= 2
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    close(adapt(params, batch).logits, want)
    ll.to_peft(adapt, params, tmp_path / "ours")
    close(through_peft(model, tmp_path / "ours")(**batch).logits, want)
