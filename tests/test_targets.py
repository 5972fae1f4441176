"""The layers that a config takes, none of which is left out in silence."""

import pickle
import warnings

import pytest
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import move
from lora_lite.core.tree import modules_by_path, still

BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def paths(model, **fields):
    return [target.path for target in ll.find_targets(model, ll.LoRAConfig(**fields))]


def in_block(index, *names):
    return [f"model.layers.{index}.{name}" for name in BLOCK if not names or name.rpartition(".")[2] in names]


SELECTIONS = {  # of the tiny Llama: width 32, keys and values 16, feed-forward 64
    "all": ({}, in_block(0) + in_block(1)),
    "readers": ({"target_roles": ("reader",), "layers": (0,)}, in_block(0, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")),
    "writers": ({"target_roles": ("writer",), "layers": (0,)}, in_block(0, "q_proj", "o_proj", "down_proj")),
    "one name as a string": ({"target_names": "q_proj$"}, in_block(0, "q_proj") + in_block(1, "q_proj")),
    "names": ({"target_names": (r"(q|v)_proj$", r"up_proj$"), "layers": (1,)}, in_block(1, "q_proj", "v_proj", "up_proj")),
    "names and roles": ({"target_names": (r"mlp\.",), "target_roles": ("writer",)}, in_block(0, "down_proj") + in_block(1, "down_proj")),
    "layers": ({"layers": (1,)}, in_block(1)),
    "a range of layers": ({"layers": range(1, 2)}, in_block(1)),
    "exclude": ({"exclude_names": ("mlp", "lm_head", "[kvo]_proj")}, in_block(0, "q_proj") + in_block(1, "q_proj")),
    "head": ({"exclude_names": (), "target_names": ("lm_head",)}, ["lm_head"]),
}


@pytest.mark.parametrize(("fields", "want"), SELECTIONS.values(), ids=SELECTIONS)
def test_selection(tiny, fields, want):
    model, _ = tiny("llama")
    assert paths(model, **fields) == want


@pytest.mark.parametrize(
    ("name", "pattern", "layer", "want"),
    [
        ("gpt2", "c_attn", 1, ["transformer.h.1.attn.c_attn"]),
        ("bert", "query", 0, ["bert.encoder.layer.0.attention.self.query"]),
        ("t5", r"decoder.*\.wo$", 1, ["decoder.block.1.layer.2.DenseReluDense.wo"]),
        ("qwen3", "q_proj", 1, ["model.layers.1.self_attn.q_proj"]),
    ],
)
def test_layer_index_is_the_first_integer_of_the_path(tiny, name, pattern, layer, want):
    model, _ = tiny(name)
    assert paths(model, target_names=pattern, layers=(layer,)) == want


def test_roles_by_width():
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 8), nn.Linear(8, 8))  # commonest width: 8
    roles = {"reader": ["0", "3"], "writer": ["2", "3"], "inner": ["1"]}
    assert {role: paths(model, target_roles=(role,)) for role in roles} == roles
    assert [t.role for t in ll.find_targets(model, ll.LoRAConfig())] == ["reader", "inner", "writer", "reader"]


def test_targets_are_a_value_to_print_and_count(tiny):
    model, _ = tiny("llama")
    found = ll.find_targets(model, ll.LoRAConfig(target_names=r"0.*down_proj"))
    assert isinstance(found, tuple)
    assert len(found) == 1
    assert (found[0].i, found[0].o, found[0].role, found[0].shared_with) == (64, 32, "writer", ())
    assert str(found) == "1 targets\n  model.layers.0.mlp.down_proj  writer  (32, 64)"
    assert found == ll.find_targets(model, ll.LoRAConfig(target_names=r"0.*down_proj"))


def test_conv1d_is_read_as_out_by_in(tiny):
    model, _ = tiny("gpt2")
    (target,) = ll.find_targets(model, ll.LoRAConfig(target_names=r"0\.mlp\.c_fc"))
    assert (target.i, target.o) == (32, 128)


def test_tied_weight_is_found_and_reported(tiny):
    model, _ = tiny("llama", tie_word_embeddings=True)
    cfg = ll.LoRAConfig(r=2, exclude_names=(), target_names=("lm_head", "q_proj"))
    tied = {t.path: t.shared_with for t in ll.find_targets(model, cfg) if t.shared_with}
    assert tied == {"lm_head": ("model.embed_tokens",)}
    row = next(line for line in ll.build(model, cfg).summary().splitlines() if line.startswith("lm_head"))
    assert "model.embed_tokens" in row


def test_tied_target_leaves_the_other_holder_alone(tiny):
    model, batch = tiny("llama", tie_word_embeddings=True)
    adapt = ll.build(model, ll.LoRAConfig(r=2, exclude_names=(), target_names="lm_head"))
    params = move(adapt.init())
    with torch.no_grad():
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        want = ll.functional.lora(params["lm_head"], model.lm_head.weight, hidden, scale=8.0)
        assert torch.equal(adapt(params, batch).logits, want)


def test_module_that_is_itself_the_layer(device):
    model = nn.Linear(6, 4).to(device)
    x = torch.randn(3, 6, device=device)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    assert list(adapt.init()) == [""]
    params = move(adapt.init())
    assert torch.equal(adapt(adapt.init(), x), model(x))
    assert torch.equal(adapt(params, x), ll.functional.lora(params[""], ll.Frozen(model.weight, model.bias), x, scale=8.0))
    assert isinstance(adapt.module(params), nn.Linear)
    assert sorted(adapt.merge(params)) == ["bias", "weight"]


def test_layer_held_twice_is_one_target(device):
    lin = nn.Linear(6, 6).to(device)
    model = nn.Sequential(lin, nn.Tanh(), lin)
    x = torch.randn(3, 6, device=device)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    assert list(adapt.init()) == ["0"]
    params = move(adapt.init())
    W = ll.Frozen(lin.weight, lin.bias)
    want = ll.functional.lora(params["0"], W, ll.functional.lora(params["0"], W, x, scale=8.0).tanh(), scale=8.0)
    assert torch.equal(adapt(params, x), want)


def test_sequence_of_configs_is_the_papers_ia3(tiny):
    model, batch = tiny("llama")
    gates = [ll.IA3Config(target_names=r"(k|v)_proj$"), ll.IA3FFConfig(target_names=r"down_proj$")]
    adapt = ll.build(model, gates)
    params = move(adapt.init())
    assert {path.rpartition(".")[2]: tuple(leaves["g"].shape) for path, leaves in params.items()} == {
        "k_proj": (16,),
        "v_proj": (16,),
        "down_proj": (64,),
    }
    assert [cfg.name for cfg in adapt.configs] == ["ia3"] * 4 + ["ia3_ff"] * 2
    assert not torch.allclose(adapt(params, batch).logits, adapt.base(batch).logits)
    only = {path: {"g": g["g"] if "down" in path else 0 * g["g"]} for path, g in params.items()}
    alone = ll.build(model, gates[1])
    want = alone({path: only[path] for path in alone.init()}, batch).logits
    assert torch.equal(adapt(only, batch).logits, want)


def test_overlapping_configs_are_an_error_that_names_both(tiny):
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match=r'one config, found "model.layers.0.self_attn.q_proj" in both LoRAConfig and DoRAConfig'):
        ll.build(model, [ll.LoRAConfig(target_names="q_proj"), ll.DoRAConfig(target_names="0.self_attn")])


def test_heads_are_left_out_with_the_reason_unless_they_are_asked_for():
    config = tf.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    masked, classifier = tf.BertForMaskedLM(config), tf.BertForSequenceClassification(config)
    found = ll.find_targets(masked, ll.LoRAConfig())
    assert found.left_out == {"cls.predictions.decoder": found.left_out["cls.predictions.decoder"]}
    assert "left out, the head of a language model (get_output_embeddings)" in str(found)
    assert pickle.loads(pickle.dumps(found)).left_out == found.left_out
    named = ll.find_targets(masked, ll.LoRAConfig(target_names=r"predictions\.decoder$"))
    assert [t.path for t in named] == ["cls.predictions.decoder"]
    assert set(named.left_out.values()) == {"by target_names"}
    assert not ll.find_targets(masked, ll.LoRAConfig(exclude_names=())).left_out
    assert "classifier" in ll.find_targets(classifier, ll.LoRAConfig()).left_out
    with pytest.warns(UserWarning, match=r'leaves "classifier" out, the head of .*FullConfig\(target_names=r"\^classifier\$"\)'):
        ll.build(classifier, ll.LoRAConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.build(classifier, [ll.LoRAConfig(r=2), ll.FullConfig(target_names=r"^classifier$")])


def test_a_model_that_keeps_its_modules_meanwhile_is_walked_once():
    model, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with still(model):
        assert modules_by_path(model) is modules_by_path(model)
        assert list(modules_by_path(other)) == ["", "0", "1"]
        with still(other):
            assert list(modules_by_path(model, "a")) == ["a", "a.0"]
    model.append(nn.Linear(4, 4))
    assert list(modules_by_path(model)) == ["", "0", "1"]  # nothing is remembered afterwards
    assert [t.path for t in ll.find_targets(model, ll.LoRAConfig())] == ["0", "1"]


class Step(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(8, 4)

    def forward(self, x):
        y = self.rnn(x)
        return self.head(y[0] if isinstance(y, tuple) else y)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells_read_their_adapted_weights(cell):
    model, x = Step(cell(8, 8)), torch.randn(3, 8)
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=r"rnn\.weight_ih$"))
    params = ll.tree_map(lambda p: p + 0.3, adapt.init())
    got = adapt(params, x)
    assert (got - model(x)).abs().max() > 0.01
    model.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(got, model(x))


def test_weights_that_a_recurrent_layer_reads_by_a_list_are_refused_by_name():
    with pytest.raises(ValueError, match=r'by a list of their own: "rnn\.weight_ih_l0"'):
        ll.find_targets(Step(nn.LSTM(8, 8)), ll.LoRAConfig(target_names=r"rnn\.weight_ih_l0$"))


@pytest.mark.parametrize(
    ("model", "way"),
    [
        (nn.Sequential(nn.Conv1d(3, 4, 3)), r'Name other layers, .* target_names=r"0\$"'),
        (nn.Sequential(nn.Embedding(8, 4)), r'Name other layers, .* target_names=r"0\$"'),
        (nn.Sequential(nn.GRU(4, 4)), 'Train recurrent layers whole, with FullConfig: "0"'),
    ],
    ids=["convolution", "embedding", "recurrent"],
)
def test_a_model_without_linear_layers_is_told_what_else_it_has(model, way):
    with pytest.raises(ValueError, match=f"expected a model with nn.Linear or Conv1D layers, found none in Sequential. {way}"):
        ll.find_targets(model, ll.LoRAConfig())
    cfg = ll.FullConfig(target_names="0") if isinstance(model[0], nn.GRU) else ll.LoRAConfig(target_names=r"0$")
    assert [target.path for target in ll.build(model, cfg).targets] == ["0"]
