"""`to_lora`: exact at the rank of the update, the best approximation below it, refused where LoRA cannot follow."""

from itertools import pairwise

import pytest
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import move

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).eval()


def _build(model, cfg):
    adapt = ll.build(model, cfg)
    return adapt, ll.tree_map(lambda p: p + 0.2 * torch.randn(p.shape), adapt.init())


RANKS = {
    "lora": (ll.LoRAConfig(r=3), 3),
    "pissa": (ll.PiSSAConfig(r=3), 6),
    "delora": (ll.DeLoRAConfig(r=2, init="copy"), 4),
    "hra": (ll.HRAConfig(r=4), 4),
    "dora": (ll.DoRAConfig(r=2), 12),
    "oft": (ll.OFTConfig(block_size=4), 12),
    "lora_xs": (ll.LoRAXSConfig(r=2), 2),
    "vera": (ll.VeRAConfig(r=3), 3),
    "ia3_ff": (ll.IA3FFConfig(), 12),
}


@pytest.mark.parametrize("case", RANKS)
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_outputs_are_the_same_at_the_rank_of_the_update(model, case, alpha):
    cfg, rank = RANKS[case]
    adapt, params = _build(model, cfg)
    x = torch.randn(5, 12)
    lora, tree, errors = ll.to_lora(adapt, params, r=rank, alpha=alpha)
    assert {c.name for c in lora.configs} == {"lora"}
    assert set(errors) == set(tree) == {t.path for t in adapt.targets}
    assert errors["0"] < 1e-6
    want = adapt(params, x) - model(x)
    if max(errors.values()) < 1e-6:
        assert (lora(tree, x) - model(x) - want).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(lora.base(x), model(x))


def test_error_shrinks_with_the_rank_and_is_that_of_the_best_approximation(model):
    adapt, params = _build(model, ll.OFTConfig(block_size=4))
    merged, values = adapt.merge(params), []
    singular = torch.linalg.svdvals((merged["0.weight"] - model[0].weight).detach().double())
    for r in range(1, 13):
        errors = ll.to_lora(adapt, params, r=r)[2]
        best = float(singular[r:].norm() / singular.norm())
        assert errors["0"] == pytest.approx(best, rel=1e-4, abs=1e-6)
        values.append(errors["0"])
    assert all(a > b for a, b in pairwise(values))
    assert values[-1] < 1e-6 < 0.1 < values[0]


def test_rank_above_the_layer_is_filled_with_zeros(model):
    adapt, params = _build(model, ll.LoRAConfig(r=3))
    lora, tree, errors = ll.to_lora(adapt, params, r=15)
    assert tree["2"]["A"].shape == (15, 20)
    assert not tree["2"]["A"][8:].any()
    assert max(errors.values()) < 1e-6
    assert torch.isfinite(lora(tree, torch.randn(2, 12))).all()


def test_update_of_nothing_has_no_error(model):
    adapt = ll.build(model, ll.LoRAConfig())
    lora, tree, errors = ll.to_lora(adapt, adapt.init(), r=2)
    assert errors == {"0": 0.0, "2": 0.0}
    x = torch.randn(2, 12)
    assert torch.equal(lora(tree, x), model(x))


@pytest.mark.parametrize("cfg", [ll.IA3Config(), ll.ROADConfig(group_size=4), ll.BitFitConfig()], ids=lambda cfg: cfg.name)
def test_variants_that_move_the_bias_are_named(model, cfg):
    adapt, params = _build(model, cfg)
    with pytest.raises(ValueError, match=f'(?s)to_lora: expected .*"0": {type(cfg).__name__} moves the bias.*"2": '):
        ll.to_lora(adapt, params, r=4)


def test_gate_of_a_layer_without_a_bias_becomes_lora():
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    adapt, params = _build(model, ll.IA3Config())
    lora, tree, errors = ll.to_lora(adapt, params, r=6)
    x = torch.randn(4, 8)
    torch.testing.assert_close(lora(tree, x), adapt(params, x))
    assert errors["0"] < 1e-6


def test_arguments_are_checked(model):
    adapt, params = _build(model, ll.LoRAConfig())
    with pytest.raises(ValueError, match="to_lora: expected alpha > 0"):
        ll.to_lora(adapt, params, r=2, alpha=0.0)
    with pytest.raises(ValueError, match="to_lora: expected params that fit"):
        ll.to_lora(adapt, {}, r=2)
    with pytest.raises(ValueError, match=r"LoRAConfig\.r: expected an integer >= 1"):
        ll.to_lora(adapt, params, r=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_params_of_a_training_that_went_astray_are_named(model, value):
    """They were said to move the bias, and the decomposition of `combine` failed."""
    adapt, params = _build(model, ll.DoRAConfig(r=2))
    params["2"]["B"][0, 0] = value
    for convert in (lambda: ll.to_lora(adapt, params, r=2), lambda: ll.combine(adapt, [adapt.init(), params], [1.0, 1.0])):
        with pytest.raises(ValueError, match=r'expected finite params, found inf or nan at "2\.B"'):
            convert()


def test_rows_that_move_a_tied_head_are_refused_and_the_way_out_works():
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    adapt = ll.build(model, ll.TokensConfig(token_ids=(3, 4)))
    params = move(adapt.init())
    with pytest.raises(ValueError, match=r'"model\.embed_tokens": TokensConfig moves "lm_head" too, which share the weight'):
        ll.to_lora(adapt, params, r=2)
    beside = ll.build(model, [ll.TokensConfig(token_ids=(3, 4)), ll.DoRAConfig(r=2)])
    with pytest.raises(ValueError, match="Leave these targets out when building"):
        ll.to_lora(beside, move(beside.init()), r=2)
    untied = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()
    adapt, ids = ll.build(untied, ll.TokensConfig(token_ids=(3, 4))), torch.tensor([[3, 5, 4]])
    params = move(adapt.init())
    lora, tree, errors = ll.to_lora(adapt, params, r=2)
    assert max(errors.values()) < 1e-6
    torch.testing.assert_close(lora(tree, (ids,)).logits, adapt(params, (ids,)).logits, rtol=1e-4, atol=1e-5)
