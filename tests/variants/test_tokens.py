"""Trainable tokens: rows of an embedding, in the lookup and in modules that share its weight, against the dense table and PEFT."""

import copy

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import assert_trees_equal, move, tiny_models
from lora_lite.layers.embedding import EmbeddingKind

IDS = (20, 3, 41)  # in no order: rows of dE are in that of the ids
PATH = {"llama": "model.embed_tokens", "gemma3": "model.embed_tokens", "gpt2": "transformer.wte", "t5": "shared", "whisper": ""}


def _model(family="llama", tied=True, **overrides):
    model, batch = tiny_models[family](tie_word_embeddings=tied, **overrides)
    batch = {name: ids.clone() for name, ids in batch.items()}
    for ids in (batch["input_ids"], batch["labels"]):
        ids[:, 1:4] = torch.tensor(IDS)
    return model.double().eval(), batch


def _config(**fields):
    return ll.TokensConfig(**{"token_ids": IDS, "dtype": torch.float64, **fields})


def _dense(model, path, params):
    """Return the model with the rows in its table, and so in all that shares it."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.get_submodule(path).weight[list(IDS)] += params[path]["dE"]
    return dense


@pytest.fixture(params=[("llama", True), ("llama", False), ("gemma3", True), ("gpt2", True), ("t5", True)], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    family, tied = request.param
    model, batch = _model(family, tied)
    adapt = ll.build(model, _config())
    return model, batch, adapt, move(adapt.init()), PATH[family]


def test_the_input_embedding_is_the_target_and_the_base_model_the_start(case):
    model, batch, adapt, params, path = case
    assert [(t.path, t.kind) for t in adapt.targets] == [(path, EmbeddingKind)]
    assert {name: p.shape for name, p in params[path].items()} == {"dE": (3, 32)}
    with torch.no_grad():
        assert torch.equal(adapt(adapt.init(), batch).logits, model(**batch).logits)


def test_values_and_gradients_are_those_of_the_dense_table_and_its_sharers(case):
    model, batch, adapt, params, path = case
    dense = _dense(model, path, params)
    out = dense(**batch)
    out.loss.backward()
    value, grads = ll.value_and_grad(lambda p: adapt(p, batch).loss)(params)
    torch.testing.assert_close(adapt(params, batch).logits, out.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(value, out.loss)
    torch.testing.assert_close(grads[path]["dE"], dense.get_submodule(path).weight.grad[list(IDS)], rtol=1e-8, atol=1e-10)


def test_merges_into_the_shared_table(case):
    model, batch, adapt, params, path = case
    state = adapt.merge(params)
    assert list(state) == [f"{path}.weight"]
    merged = copy.deepcopy(model)
    assert not merged.load_state_dict(state, strict=False).unexpected_keys
    torch.testing.assert_close(merged(**batch).logits, adapt(params, batch).logits, rtol=1e-9, atol=1e-9)
    assert max(adapt.merge_error(params, state).values()) < 1e-12


def test_rows_of_a_mixed_batch_have_tokens_of_their_own(case):
    _, batch, adapt, params, path = case
    batch = {name: t for name, t in batch.items() if name != "attention_mask"}
    members = [params, move(adapt.init(), seed=1)]
    mixed = adapt.mixed(ll.stack(members), batch, [1, 0]).logits
    for row, k in enumerate([1, 0]):
        torch.testing.assert_close(mixed[row], adapt(members[k], batch).logits[row], rtol=1e-9, atol=1e-9)
    by_row = ll.per_example_grad(adapt, lambda out, _: out.logits.square().sum((1, 2)))(params, batch)
    for row in range(2):
        alone = {name: t[[row]] for name, t in batch.items()}
        want = torch.func.grad(lambda p, alone=alone: adapt(p, alone).logits.square().sum())(params)
        torch.testing.assert_close(by_row[path]["dE"][row], want[path]["dE"], rtol=1e-8, atol=1e-8)


def test_saves_copies_binds_to_a_module_and_recomputes(case, tmp_path):
    model, batch, adapt, params, path = case
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(copy.deepcopy(model), tmp_path / "a.safetensors")
    assert_trees_equal(read, params)
    want = adapt(params, batch).logits
    assert torch.equal(again(read, batch).logits, want)
    assert torch.equal(copy.deepcopy(adapt)(params, batch).logits, want)
    module = adapt.module(params)
    assert torch.equal(module(**batch).logits, want)
    assert torch.equal(copy.deepcopy(module)(**batch).logits, want)
    assert_trees_equal(adapt.params(module), params)
    module(**batch).loss.backward()
    remat = ll.build(model, _config(), remat=r"(lm_head|layers\.0|h\.0|block\.0)$")
    grads, own = (ll.value_and_grad(lambda p, a=a: a(p, batch).loss)(params)[1] for a in (remat, adapt))
    assert_trees_equal(grads, own, 1e-9)
    held = dict(module.named_parameters())
    trained = [p for p in held.values() if p.requires_grad]
    assert len(trained) == 1
    torch.testing.assert_close(trained[0].grad, own[path]["dE"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["dtype", "compile"])
def test_a_tied_model_compiles_and_takes_float32_params_in_bfloat16(name):
    model, batch = _model()
    batch = {"input_ids": batch["input_ids"]}
    adapt = ll.build(model, _config())
    params = move(adapt.init())
    if name == "dtype":
        low = ll.build(model.bfloat16(), ll.TokensConfig(token_ids=IDS))
        params = move(low.init())
        grads = torch.func.grad(lambda p: low(p, batch).logits.float().square().sum())(params)
        assert (params["model.embed_tokens"]["dE"].dtype, low(params, batch).logits.dtype) == (torch.float32, torch.bfloat16)
        assert grads["model.embed_tokens"]["dE"].dtype == torch.float32
        return
    torch.compiler.reset()

    def loss(p):
        return adapt(p, batch, use_cache=False).logits.square().sum()

    for f in (loss, torch.func.grad(loss)):
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(params), f(params))


def test_whoever_reads_the_tied_weight_finds_the_adapted_one():
    model, _ = _model()
    adapt = ll.build(model, _config())
    params = move(adapt.init())
    want = _dense(model, "model.embed_tokens", params).lm_head.weight
    module = adapt.module(params)
    for layer in (module.lm_head, module.model.embed_tokens):
        torch.testing.assert_close(layer.weight + 0.0, want.detach())


def test_only_the_rows_of_the_ids_move():
    model, _ = _model()
    adapt = ll.build(model, _config())
    params = move(adapt.init())
    moved = adapt.merge(params)["model.embed_tokens.weight"] - model.model.embed_tokens.weight
    assert sorted(moved.abs().sum(1).nonzero().flatten().tolist()) == sorted(IDS)
    assert adapt.num_params == 3 * 32


def test_padding_gets_no_gradient_by_the_lookup_and_its_own_by_the_head():
    model, batch = _model(pad_token_id=IDS[1])
    assert model.model.embed_tokens.padding_idx == IDS[1]
    adapt = ll.build(model, _config())
    params = move(adapt.init())
    dense = _dense(model, "model.embed_tokens", params)
    dense(**batch).logits.square().sum().backward()
    grads = torch.func.grad(lambda p: adapt(p, batch).logits.square().sum())(params)
    torch.testing.assert_close(grads["model.embed_tokens"]["dE"], dense.lm_head.weight.grad[list(IDS)])


def test_stands_beside_lora_and_on_a_head_of_its_own_weight():
    model, batch = _model()
    adapt = ll.build(model, [_config(), ll.LoRAConfig(r=2, dtype=torch.float64, target_names=r"(q|v)_proj$")])
    params = move(adapt.init())
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(merged(**batch).logits, adapt(params, batch).logits, rtol=1e-8, atol=1e-8)
    assert len(adapt.unused()) == 0


REFUSED = {
    "twice": ({"token_ids": (3, 5, 3)}, r"TokensConfig\.token_ids: expected each token once, found \(3, 5, 3\)"),
    "negative": ({"token_ids": (3, -1)}, r"TokensConfig\.token_ids: expected ids >= 0, found \(3, -1\)"),
    "large": ({"token_ids": (3, 64)}, r"TokensConfig\.token_ids: expected ids below 64, the number of rows, found \(3, 64\)"),
    "none": ({"token_ids": ()}, r"TokensConfig\.token_ids: expected at least one token, found \(\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ids_that_name_no_row_or_one_twice_are_refused(name):
    fields, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        ll.build(_model()[0], _config(**fields))


def test_a_file_fits_a_table_of_more_rows_and_none_without_its_own(tmp_path):
    (model, batch), place = _model(), tmp_path / "tokens.safetensors"
    rows = model.get_input_embeddings().num_embeddings
    adapt = ll.build(model, _config())
    params = move(adapt.init())
    ll.save(adapt, params, place)
    want = adapt(params, batch).logits
    model.resize_token_embeddings(rows + 4, mean_resizing=False)
    torch.testing.assert_close(ll.load(model, place)[0](params, batch).logits[..., :rows], want)
    model.resize_token_embeddings(max(IDS))
    with pytest.raises(ValueError, match=rf"token_ids: expected ids below {max(IDS)}, the number of rows"):
        ll.load(model, place)
    with pytest.raises(ValueError, match=r"dE"):
        ll.load(_model(hidden_size=64)[0], place)


@pytest.mark.parametrize("ids", [3, "34", (1.0,), (True,)])
def test_ids_of_other_types_are_refused(ids):
    with pytest.raises(TypeError, match=r"TokensConfig\.token_ids: expected a sequence of integers"):
        ll.TokensConfig(token_ids=ids)


def test_targets_that_cannot_be_told_or_followed_are_refused():
    with pytest.raises(ValueError, match=r"Sequential has no get_input_embeddings.*Name it"):
        ll.build(nn.Sequential(nn.Embedding(50, 4)), _config())
    model, _ = _model()
    with pytest.raises(ValueError, match=r'"lm_head" claimed by LoRAConfig. Leave it out: it follows'):
        ll.build(model, [_config(), ll.LoRAConfig(target_names="lm_head", exclude_names=())])

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.lm_head.__class__ = Twice
    with pytest.raises(ValueError, match=r'its weight is shared with "lm_head" \(Twice\), which could not follow'):
        ll.build(model, _config())


@pytest.mark.filterwarnings("ignore")  # Opacus' own, as in test_opacus
@pytest.mark.parametrize("tied", [True, False])
def test_opacus_is_refused_where_it_would_see_a_part_of_the_gradient(tied):
    opacus = pytest.importorskip("opacus")
    model = nn.Sequential(nn.Embedding(11, 8), nn.Tanh(), nn.Linear(8, 11, bias=False)).eval()
    model[2].weight = model[0].weight if tied else model[2].weight
    ids, path = torch.tensor([[3, 0, 7], [7, 7, 1]]), "0"
    adapt = ll.build(model, ll.TokensConfig(token_ids=(7, 3), target_names=f"^{path}$"))
    params = move(adapt.init())
    if tied:
        with pytest.raises(ValueError, match=r'runs the adapter of "0" by itself.*Use ll\.per_example_grad'):
            opacus.GradSampleModule(adapt.module(params))
        return
    module = opacus.GradSampleModule(adapt.module(params), loss_reduction="sum")
    module(ids).square().sum().backward()
    (got,) = [p.grad_sample for p in module.parameters() if p.requires_grad]
    want = ll.per_example_grad(adapt, lambda out, _: out.square().sum((1, 2)))(params, ids)
    torch.testing.assert_close(got, want[path]["dE"])


@pytest.mark.parametrize("tied", [True, False])
def test_pefts_values_and_gradients(tied):
    model, batch = _model(tied=tied)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.TrainableTokensConfig(token_indices=list(IDS)))
    delta = theirs.base_model.model.model.embed_tokens.trainable_tokens_delta["default"]
    adapt = ll.build(model, _config())
    params = move(adapt.init())
    with torch.no_grad():
        delta += params["model.embed_tokens"]["dE"]
    out = theirs(**batch)
    out.loss.backward()
    grads = torch.func.grad(lambda p: adapt(p, batch).loss)(params)
    torch.testing.assert_close(adapt(params, batch).logits, out.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grads["model.embed_tokens"]["dE"], delta.grad.to(torch.float64), rtol=1e-6, atol=1e-9)


def test_on_a_head_of_its_own_weight_they_are_rows_too():
    model, batch = _model(tied=False)
    adapt = ll.build(model, [_config(), _config(token_ids=IDS[:2], target_names=r"lm_head$")])
    params = move(adapt.init())
    assert params["lm_head"]["dE"].shape == (2, 32)
    dense = _dense(model, "model.embed_tokens", params)
    with torch.no_grad():
        dense.lm_head.weight[list(IDS[:2])] += params["lm_head"]["dE"]
    torch.testing.assert_close(adapt(params, batch).logits, dense(**batch).logits, rtol=1e-9, atol=1e-9)
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    assert_trees_equal({"": dict(merged.state_dict())}, {"": dict(dense.state_dict())}, 1e-12)


def test_an_embedding_follows_its_head_as_the_head_the_embedding():
    model, batch = _model()
    adapt, of_head = ll.build(model, _config()), ll.build(model, _config(target_names=r"lm_head$"))
    params = move(adapt.init())
    swapped = {"lm_head": params["model.embed_tokens"]}
    torch.testing.assert_close(of_head(swapped, batch).logits, adapt(params, batch).logits, rtol=1e-9, atol=1e-9)


def test_quantised_layers_stay_and_the_embedding_is_dense():
    bnb = pytest.importorskip("bitsandbytes")
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=True
    )
    model = tf.LlamaForCausalLM(config).eval()
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32)
            packed.load_state_dict(layer.state_dict())
            model.set_submodule(path, packed.to("cpu"))
    batch = {"input_ids": torch.tensor([[1, *IDS, 7]])}
    adapt = ll.build(model, [ll.TokensConfig(token_ids=IDS), ll.LoRAConfig(r=2)])
    params = move(adapt.init())
    dense = {path: leaves for path, leaves in params.items() if "embed" not in path}
    lora = ll.build(_dense(model, "model.embed_tokens", params), ll.LoRAConfig(r=2))
    torch.testing.assert_close(adapt(params, batch).logits, lora(dense, batch).logits, rtol=1e-4, atol=1e-5)
