"""PEFT's files of trained tokens, alone and beside LoRA: read with PEFT's values and gradients, written so that PEFT loads them."""

import copy
import json

import peft
import pytest
import torch

import lora_lite as ll
from cases import assert_trees_equal, move, tiny_models
from peft_oracle import assert_close, edit, saved, wrapped

IDS = [20, 3, 41]
TOLERANCE = 1e-5
ON = ["q_proj", "q", "c_attn"]
THEIRS = {
    "alone": lambda name: peft.TrainableTokensConfig(token_indices=IDS),
    "named": lambda name: peft.TrainableTokensConfig(token_indices=IDS, target_modules=[name]),
    "list": lambda name: peft.LoraConfig(r=2, target_modules=ON, trainable_token_indices=IDS),
    "dict": lambda name: peft.LoraConfig(r=2, target_modules=ON, trainable_token_indices={name: IDS}),
    "dora": lambda name: peft.LoraConfig(r=2, use_dora=True, target_modules=ON, trainable_token_indices=IDS),
    "adalora": lambda name: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=ON, trainable_token_indices=IDS),
}
MODELS = {
    "tied": ("llama", True, "embed_tokens"),
    "untied": ("llama", False, "embed_tokens"),
    "scaled": ("gemma3", True, "embed_tokens"),
    "gpt2": ("gpt2", True, "wte"),
    "t5": ("t5", True, "shared"),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # which PEFT corrects, for GPT-2
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),  # PEFT's, of merging, which is not done here
]


def _model(name):
    family, tied, embedding = MODELS[name]
    model, batch = tiny_models[family](tie_word_embeddings=tied)
    batch = {key: ids.clone() for key, ids in batch.items()}
    batch["input_ids"][:, 1:4] = torch.tensor(IDS)
    return model.eval(), batch, embedding


@pytest.mark.parametrize("case", THEIRS)
@pytest.mark.parametrize("name", MODELS)
def test_files_are_read_with_pefts_values_and_gradients_and_written_back(name, case, tmp_path):
    model, batch, embedding = _model(name)
    theirs = wrapped(model, THEIRS[case](embedding))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    base, out = model(**batch).logits.detach(), theirs(**batch)
    assert_close(adapt(params, batch).logits - base, out.logits - base)
    out.loss.backward()
    grads = ll.value_and_grad(lambda p: adapt(p, batch).loss)(params)[1]
    (path,) = [t.path for t, cfg in zip(adapt.targets, adapt.configs) if cfg.name == "tokens"]
    (delta,) = [p for key, p in theirs.named_parameters() if "trainable_tokens_delta" in key]
    assert_close(grads[path]["dE"], delta.grad)

    ll.to_peft(adapt, params, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours", is_trainable=True).eval()  # else AdaLoRA has no loss
    assert_close(again(**batch).logits - base, out.logits - base)
    before, after = (saved(tmp_path / folder) for folder in ("theirs", "ours"))
    assert set(before) == set(after)
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-6, atol=1e-6)
    back, read = ll.from_peft(model, tmp_path / "ours")
    assert_trees_equal({path: read[path] for path in params}, params, 2e-6)
    assert set(back.configs) == set(adapt.configs)


def test_tables_may_have_tokens_of_their_own(tmp_path):
    model, batch, _ = _model("untied")
    config = peft.LoraConfig(r=2, target_modules=ON, trainable_token_indices={"embed_tokens": IDS, "lm_head": [5]})
    theirs = wrapped(model, config)
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    assert params["lm_head"]["dE"].shape == (1, 32)
    base, want = model(**batch).logits, theirs(**batch).logits
    assert_close(adapt(params, batch).logits - base, want - base)
    ll.to_peft(adapt, params, tmp_path / "ours")
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert fields["trainable_token_indices"] == {"model.embed_tokens": IDS, "lm_head": [5]}
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert_close(again(**batch).logits - base, want - base)


@pytest.mark.parametrize("case", ["alone", "list"])
def test_tables_saved_beside_their_rows_are_held_to_the_model_where_they_are_not_trained(case, tmp_path):
    model, batch, embedding = _model("tied")
    theirs = wrapped(model, THEIRS[case](embedding))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)  # as PEFT does by itself where tokens were added
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS] = 0.0  # drawn anew when the vocabulary was resized
    adapt, params = ll.from_peft(model, tmp_path)
    torch.testing.assert_close(adapt(params, batch).logits, theirs(**batch).logits)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] += 1.0
    with pytest.raises(ValueError, match=r'unexpected weight of "model\.embed_tokens": it differs from the model\'s own'):
        ll.from_peft(model, tmp_path)


def test_half_precision_keeps_rows_in_float32(tmp_path):
    model, batch, embedding = _model("tied")
    model.bfloat16()
    theirs = wrapped(model, THEIRS["list"](embedding))
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    assert {p.dtype for p in ll.tree_leaves(params)} == {torch.float32}
    got, want = (out.logits.float() for out in (adapt(params, batch), theirs(**batch)))
    got, want = got.detach(), want.detach()
    assert float((got - want).abs().max()) <= 2e-2 * float(want.abs().max())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"trainable_token_indices": [20, 3]},
            r'"model\.embed_tokens": expected rows of shape \(2, 32\) for its 2 tokens, found \(3, 32\)',
        ),
        ({"trainable_token_indices": None}, r'unexpected "base_model\.model\.model\.embed_tokens\.token_adapter\.trainable_tokens_delta"'),
        ({"trainable_token_indices": {"lm_head": IDS}}, r"trainable_token_indices: expected the rows of tokens .*found none"),
        ({"trainable_token_indices": [20, 3, 64]}, r"TokensConfig\.token_ids: expected ids below 64"),
        ({"trainable_token_indices": [20, 3, -1]}, r"TokensConfig\.token_ids: expected ids >= 0"),
        (
            {"trainable_token_indices": [20, 3, 3]},
            r'expected one row for each token, found others for "3"\. Leave one row of each in the file',
        ),
    ],
)
def test_files_that_contradict_themselves_are_refused(fields, message, tmp_path):
    model, _, embedding = _model("tied")
    wrapped(model, THEIRS["list"](embedding)).save_pretrained(tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ll.from_peft(model, tmp_path)


def test_a_tie_that_pefts_head_would_not_follow_is_refused_both_ways(tmp_path):
    model, _, embedding = _model("tied")
    wrapped(model, THEIRS["list"](embedding)).save_pretrained(tmp_path / "theirs")
    adapt = ll.build(model, [ll.TokensConfig(token_ids=IDS)])
    model.config.tie_word_embeddings = adapt._plan.base.config.tie_word_embeddings = False  # and yet they share a weight
    with pytest.raises(ValueError, match=r'"model\.embed_tokens": PEFT leaves "lm_head" as it was'):
        ll.from_peft(model, tmp_path / "theirs")
    with pytest.raises(ValueError, match=r'"model\.embed_tokens": TokensConfig: PEFT leaves "lm_head" as it is'):
        ll.to_peft(adapt, adapt.init(), tmp_path / "ours")


def test_other_tokens_of_a_tied_head_are_refused_by_that_name(tmp_path):
    model, _, embedding = _model("tied")
    apart = peft.LoraConfig(r=2, target_modules=ON, trainable_token_indices={embedding: IDS, "lm_head": IDS[:1]})
    wrapped(model, apart).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r'found:\n.*"lm_head": its tokens are others than those of "model\.embed_tokens", .*Run the adapter'
    ):
        ll.from_peft(model, tmp_path)


TOKENS = ll.TokensConfig(token_ids=IDS)
UNWRITABLE = {
    "ia3": ([TOKENS, ll.IA3Config(target_names="q_proj")], 'trained tokens beside "IA3": PEFT has them alone or beside "LORA", "ADALORA"'),
    "full": ([TOKENS, ll.FullConfig(target_names="q_proj")], 'trained tokens and .*trained as a whole: PEFT has both beside "LORA"'),
    "two lists": (
        [TOKENS, ll.TokensConfig(token_ids=(5,), target_names="lm_head")],
        '"lm_head": TokensConfig.token_ids: PEFT has one list for all tables',
    ),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_peft_cannot_express_is_refused(case, tmp_path):
    configs, message = UNWRITABLE[case]
    adapt = ll.build(_model("untied")[0], configs)
    with pytest.raises(ValueError, match=f"(?s)to_peft: expected .*{message}"):
        ll.to_peft(adapt, move(adapt.init()), tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []
