"""Embeddings as targets: a lookup is a linear map of one-hot inputs, held against that map, against PEFT and against the merged model."""

import copy

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import FIRST, assert_trees_equal, move, tiny_models
from lora_lite.core.config import with_fields
from lora_lite.layers.embedding import EmbeddingKind

LORA = ll.LoRAConfig(r=4, target_names=r"embed_tokens$", exclude_names=())
VARIANTS = (
    LORA,
    ll.IA3Config(target_names=r"embed_tokens$", exclude_names=()),
    ll.BitFitConfig(target_names=r"embed_tokens$", exclude_names=()),
)
TOLERANCE = 1e-5


def by_name(cfg):
    return cfg.name


def _model(family="llama", **overrides):
    model, batch = tiny_models[family](**overrides)
    return model.eval(), batch


@pytest.fixture(params=["llama", "gemma3"])
def model_and_batch(request):
    return _model(request.param, tie_word_embeddings=False)  # gemma's lookups are scaled


class Tokens(nn.Module):
    """An embedding whose output is the model's."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(11, 6, **options)

    def forward(self, ids):
        return self.embed(ids)


def test_embeddings_are_taken_only_where_they_are_named():
    model, _ = _model()
    kinds = {type(model.get_submodule(t.path)) for t in ll.find_targets(model, ll.LoRAConfig(exclude_names=()))}
    assert kinds == {nn.Linear}
    (target,) = ll.find_targets(model, LORA)
    assert (target.path, target.kind, target.i, target.o) == ("model.embed_tokens", EmbeddingKind, 64, 32)
    both = ll.find_targets(model, ll.LoRAConfig(target_names=r"(q_proj|embed_tokens)$", exclude_names=()))
    assert [t.path for t in both][:2] == ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]
    assert all(t.kind is not EmbeddingKind for t in ll.find_targets(model, ll.LoRAConfig(target_names=r"model\..*", exclude_names=())))


def test_lora_is_the_low_rank_map_of_one_hot_inputs():
    model, ids = Tokens().double(), torch.tensor([[3, 0, 3], [10, 7, 1]])
    adapt = ll.build(model, ll.LoRAConfig(r=2, alpha=3.0, target_names="embed", dtype=torch.float64))
    params = move(adapt.init(seed=0))
    A, B = params["embed"]["A"], params["embed"]["B"]
    one_hot = nn.functional.one_hot(ids, 11).double()
    want = 1.5 * one_hot @ A.t() @ B.t()
    torch.testing.assert_close(adapt(params, ids) - model(ids), want, rtol=1e-10, atol=1e-12)
    got = torch.func.grad(lambda p: adapt(p, ids).square().sum())(params)["embed"]
    dense = torch.func.grad(lambda p: (model(ids).detach() + 1.5 * one_hot @ p["A"].t() @ p["B"].t()).square().sum())(params["embed"])
    for name, grad in dense.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cfg", VARIANTS, ids=by_name)
def test_starts_at_the_base_model_to_the_bit_and_acts(cfg, model_and_batch):
    model, batch = model_and_batch
    adapt = ll.build(model, cfg)
    with torch.no_grad():
        base = model(**batch).logits
        assert torch.equal(adapt(adapt.init(seed=0), batch).logits, base)
        assert not torch.allclose(adapt(move(adapt.init(seed=0)), batch).logits, base, atol=1e-4)


def test_tokens_never_seen_stay_as_they_were():
    model, ids = Tokens(), torch.tensor([[3, 0, 3]])
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="embed"))
    params = adapt.init(seed=0)
    for _ in range(3):
        grads = ll.value_and_grad(lambda p: adapt(p, ids).square().sum())(params)[1]
        params = ll.tree_map(lambda p, g: p - 0.1 * g, params, grads)
    others = torch.tensor([1, 2, 4, 5])
    assert not torch.allclose(adapt(params, ids), model(ids))
    assert torch.equal(adapt(params, others), model(others))


def _peft(model, cfg, **options):
    config = peft.LoraConfig(r=cfg.r, lora_alpha=cfg.alpha, use_rslora=cfg.rslora, target_modules=["embed_tokens"], **options)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    layer = theirs.base_model.model.model.embed_tokens
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    with torch.no_grad():
        A.normal_(std=0.3)
        B.normal_(std=0.3)
    return theirs, A, B


@pytest.mark.parametrize("rslora", [False, True])
def test_values_and_gradients_are_pefts(model_and_batch, rslora):
    model, batch = model_and_batch
    cfg = ll.LoRAConfig(r=4, alpha=6.0, rslora=rslora, target_names=r"embed_tokens$", exclude_names=())
    theirs, A, B = _peft(model, cfg)
    adapt = ll.build(model, cfg)
    params = {"model.embed_tokens": {"A": A.detach(), "B": B.detach()}}
    out = theirs(**batch)
    out.loss.backward()
    base = model(**batch).logits.detach()
    update = (out.logits - base).detach()
    value, grads = ll.value_and_grad(lambda p: adapt(p, batch).loss)(params)
    assert float((adapt(params, batch).logits - base - update).abs().max()) <= TOLERANCE * float(update.abs().max())
    torch.testing.assert_close(value, out.loss.detach(), rtol=TOLERANCE, atol=0)
    for name, leaf in (("A", A), ("B", B)):
        want = leaf.grad
        assert want.abs().max() > 1e-4
        assert float((grads["model.embed_tokens"][name] - want).abs().max()) <= TOLERANCE * float(want.abs().max())


def test_padding_gets_no_gradient_as_in_peft():
    model, ids = Tokens(padding_idx=3), torch.tensor([[3, 0, 3], [10, 7, 1]])
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="embed"))
    grads = torch.func.grad(lambda p: adapt(p, ids).square().sum())(move(adapt.init(seed=0)))
    assert not grads["embed"]["A"][:, 3].any()
    assert grads["embed"]["A"][:, [0, 1, 7, 10]].all()


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2, target_names="embed"), ll.FullConfig(target_names="embed")], ids=by_name)
def test_padding_gets_no_gradient_in_any_row_of_a_mixed_batch(cfg):
    model, ids = Tokens(padding_idx=3), torch.tensor([[3, 0, 3], [10, 3, 1], [3, 3, 5]])
    adapt = ll.build(model, cfg)
    members = [move(adapt.init(seed=k), seed=k) for k in range(2)]
    grads = ll.value_and_grad(lambda p: adapt.mixed(p, ids, [1, 0, 1]).square().sum())(ll.stack(members))[1]
    by_row = ll.per_example_grad(adapt, lambda out, _: out.square().sum((1, 2)))(members[0], ids)
    for k, rows in enumerate(([1], [0, 2])):
        want = ll.value_and_grad(lambda p, rows=rows: adapt(p, ids[rows]).square().sum())(members[k])[1]
        assert_trees_equal(ll.tree_map(lambda g, k=k: g[k], grads), want, 1e-5)
    for row in range(3):
        want = ll.value_and_grad(lambda p, row=row: adapt(p, ids[[row]]).square().sum())(members[0])[1]
        assert_trees_equal(ll.tree_map(lambda g, row=row: g[row], by_row), want, 1e-5)


def test_tangents_of_padding_agree_with_its_gradient():
    model, ids = Tokens(padding_idx=3), torch.tensor([[3, 0, 3], [10, 7, 1]])
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="embed"))
    params = move(adapt.init(seed=0))
    along = {"embed": {"A": torch.ones(2, 11), "B": torch.zeros(6, 2)}}
    _, tangent = torch.func.jvp(lambda p: adapt(p, ids).square().sum(), (params,), (along,))
    grads = torch.func.grad(lambda p: adapt(p, ids).square().sum())(params)
    torch.testing.assert_close(tangent, grads["embed"]["A"].sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cfg", VARIANTS, ids=by_name)
def test_merges_into_the_table(cfg, model_and_batch):
    model, batch = model_and_batch
    adapt = ll.build(model, cfg)
    params = move(adapt.init(seed=0))
    merged = copy.deepcopy(model)
    state = adapt.merge(params)
    assert list(state) == ["model.embed_tokens.weight"]
    assert not merged.load_state_dict(state, strict=False).unexpected_keys
    torch.testing.assert_close(merged(**batch).logits, adapt(params, batch).logits, rtol=1e-5, atol=1e-5)


ADAPTING = [cfg for cfg in (row.cfg for row in FIRST) if cfg.adapts == "linear" and set(cfg.uses) <= EmbeddingKind.gives]
ADAPTING = [cfg for cfg in ADAPTING if cfg.linear and not cfg.calibrated]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cfg", ADAPTING, ids=by_name)
def test_every_variant_that_takes_a_table_computes_what_it_merges(cfg, dtype):
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(240, 48)).to(dtype), torch.randint(24, (2, 9))
    adapt = ll.build(model, with_fields(cfg, target_names=(r"^0$",), dtype=torch.float32))
    params = move(adapt.init(seed=0))
    merged = nn.functional.embedding(ids, adapt.merge(params, torch.float64)["0.weight"])
    update = merged - model(ids).double()
    assert update.abs().max() > 1e-3
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (adapt(params, ids).double() - merged).abs().max() <= bound * merged.abs().max()


def test_tied_head_is_reported_and_not_merged():
    model, _ = _model(tie_word_embeddings=True)
    adapt = ll.build(model, LORA)
    assert adapt.targets[0].shared_with == ("lm_head",)
    with pytest.raises(ValueError, match="its weight is shared with lm_head"):
        adapt.merge(adapt.init())


@pytest.mark.parametrize("cfg", VARIANTS, ids=by_name)
def test_mixed_batch_is_a_loop_and_gives_gradients_by_row(cfg):
    model, batch = _model()
    batch = {"input_ids": batch["input_ids"]}
    adapt = ll.build(model, cfg)
    members = [move(adapt.init(seed=k), seed=k) for k in range(2)]
    mixed = adapt.mixed(ll.stack(members), batch, [1, 0]).logits
    for row, k in enumerate([1, 0]):
        torch.testing.assert_close(mixed[row], adapt(members[k], batch).logits[row], rtol=1e-5, atol=1e-6)
    by_row = ll.per_example_grad(adapt, lambda out, _: out.logits.square().sum((1, 2)))(members[0], batch)
    for row in range(2):
        alone = torch.func.grad(lambda p, row=row: adapt(p, {"input_ids": batch["input_ids"][[row]]}).logits.square().sum())(members[0])
        assert_trees_equal(ll.tree_map(lambda g, row=row: g[row], by_row), alone, 1e-5)


def test_saves_counts_steers_and_binds_to_a_module(tmp_path):
    model, batch = _model()
    adapt = ll.build(model, LORA)
    params = move(adapt.init(seed=0))
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(copy.deepcopy(model), tmp_path / "a.safetensors")
    assert_trees_equal(read, params)
    want = adapt(params, batch).logits
    assert torch.equal(again(read, batch).logits, want)
    assert torch.equal(adapt.module(params)(**batch).logits, want)
    with torch.no_grad():
        assert torch.equal(adapt(adapt.steer(params, 0.0), batch).logits, model(**batch).logits)
    assert (adapt.num_params, adapt.macs_per_token) == (4 * (64 + 32), 4 * 32)


def test_bfloat16_model_takes_float32_params():
    model, ids = Tokens().bfloat16(), torch.tensor([[3, 0, 3]])
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="embed"))
    params = move(adapt.init(seed=0))
    assert adapt(params, ids).dtype == torch.bfloat16
    assert torch.func.grad(lambda p: adapt(p, ids).float().sum())(params)["embed"]["A"].dtype == torch.float32


def test_dropout_leaves_out_the_updates_of_whole_tokens():
    model, ids = Tokens(), torch.arange(11).repeat(50, 1)
    adapt = ll.build(model, ll.LoRAConfig(r=2, dropout=0.5, target_names="embed")).train()
    params = move(adapt.init(seed=0))
    update = (adapt(params, ids) - model(ids)).detach()
    full = (adapt.eval()(params, ids) - model(ids)).detach()
    kept = update.abs().sum(-1) > 1e-6
    assert 0.4 < float(kept.float().mean()) < 0.6
    torch.testing.assert_close(update[kept], 2 * full[kept], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cfg", [ll.HRAConfig(r=2, target_names="embed"), ll.DoRAConfig(r=2, target_names="embed")], ids=by_name)
def test_variants_that_read_rows_are_refused(cfg):
    with pytest.raises(ValueError, match=r'cannot adapt "embed".*token ids.*LoRAConfig'):
        ll.build(Tokens(), cfg)


def test_lookups_that_write_to_their_weight_are_refused():
    with pytest.raises(ValueError, match=r"expected layers that compute W x"):
        ll.build(Tokens(max_norm=1.0), ll.LoRAConfig(target_names="embed"))


def test_compiles_in_one_graph():
    model, ids = Tokens(), torch.tensor([[3, 0, 3]])
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="embed"))
    params = move(adapt.init(seed=0))
    torch.compiler.reset()
    for f in (lambda p: adapt(p, ids).square().sum(), torch.func.grad(lambda p: adapt(p, ids).square().sum())):
        got, want = torch.compile(f, fullgraph=True, backend="aot_eager")(params), f(params)
        torch.testing.assert_close(got, want)


def test_positions_are_an_embedding_too():
    settings = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**settings)).eval()
    ids = torch.randint(0, 64, (2, 7))
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=(r"wpe$", r"c_attn$")))
    params = move(adapt.init(seed=0))
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(merged(ids).logits, adapt(params, (ids,)).logits, rtol=1e-4, atol=1e-5)


def test_a_table_that_was_put_in_place_has_its_own_rows():
    """Vocabularies are grown so by hand; `num_embeddings` still says the old number."""
    model, ids = nn.Sequential(nn.Embedding(10, 4)), torch.tensor([[1, 11]])
    model[0].weight = nn.Parameter(torch.randn(12, 4))
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="0$"))
    params = move(adapt.init())
    torch.testing.assert_close(adapt(params, ids)[0], adapt.merge(params)["0.weight"][ids[0]])
