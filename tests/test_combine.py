"""`combine`: laws of the algebra of updates for every linear variant, PEFT's `add_weighted_adapter` as the oracle, and its refusals."""

import copy
import itertools
import math

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import FIRST, build_any, by_name, move
from lora_lite.transforms.merging import METHODS
from quantised_models import BACKENDS, facts, quantised_layer, same

DENSE = {name: {"density": 0.5} if method.prune else {} for name, method in METHODS.items()}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32)).eval()


def update(adapt, params, i=24):
    """Return the change of the output at the rows of the identity and at zero, in float64."""
    x = torch.cat([torch.eye(i), torch.zeros(1, i)])
    return (adapt(params, x) - adapt.base(x)).detach().double()


def miss(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def unchecked():
    """Leave out the checks of shapes, which the conformance kit runs for every variant and which take most of the time here."""
    before = ll.set_typecheck(False)
    yield
    ll.set_typecheck(before)


LINEAR = [row for row in FIRST if row.cfg.linear]


@pytest.mark.parametrize("row", LINEAR, ids=lambda row: row.id)
def test_laws_of_every_linear_variant(row, unchecked):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(24) if row.cfg.adapts == "norm" else nn.Linear(24, 32)).double().eval()
    x = torch.cat([torch.eye(24), torch.zeros(1, 24)]).double()
    adapt = build_any(model, row.cfg, [torch.randn(64, 24, dtype=torch.float64)])
    trees = [move(adapt.init(), seed) for seed in (1, 2)]
    base = model(x).detach()
    a, b = (adapt(tree, x).detach() - base for tree in trees)
    for trees_, weights, method, options, wanted in (
        (trees[:1], [1.0], "linear", {}, a),
        (trees[:1], [-1.0], "cat", {}, -a),
        (trees, [0.7, -0.4], "cat", {}, 0.7 * a - 0.4 * b),
        (trees[::-1], [-0.4, 0.7], "linear", {}, 0.7 * a - 0.4 * b),
        (trees, [0.7, -0.4], "svd", {"r": 24}, 0.7 * a - 0.4 * b),
    ):
        result, params, errors = ll.combine(adapt, trees_, weights, method, **options)
        assert errors.keys() == {"0"}
        assert errors["0"] < 1e-6
        assert miss(result(params, x).detach() - base, wanted) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [row for row in LINEAR if row.cfg.adapts == "linear"], ids=lambda row: row.id)
def test_sums_on_quantised_bases(row, backend, unchecked):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64)).eval()
    model, x = nn.Sequential(quantised_layer(dense[0], backend)).eval(), torch.cat([torch.eye(64), torch.zeros(1, 64)])
    before = facts(model)
    first = dense.state_dict()
    adapt = ll.build(model, row.cfg, original=first) if row.cfg.original else build_any(model, row.cfg, [torch.randn(64, 64)])
    trees = [move(adapt.init(), seed) for seed in (1, 2)]
    base = adapt.base(x).double()
    a, b = (adapt(tree, x).detach() - base for tree in trees)
    for method, options in (("cat", {}), ("svd", {"r": 64})):
        result, params, errors = ll.combine(adapt, trees, [0.7, -0.4], method, **options)
        assert errors["0"] < 1e-5
        assert miss(result(params, x).detach() - base, 0.7 * a - 0.4 * b) < 2e-5
    assert same(before, facts(model))


def test_ranks_add_up_side_by_side_and_are_the_layers_own_on_one_basis(model):
    lora, wide = (ll.build(model, ll.LoRAConfig(r=r)) for r in (4, 20))
    trees = [move(lora.init(), 1), move(lora.init(), 2), move(wide.init(), 3)]
    ranks = {method: ll.combine([lora, lora, wide], trees, [1.0, 2.0, 3.0], method, **DENSE[method])[0].configs[0].r for method in METHODS}
    assert ranks == {**dict.fromkeys(METHODS, 20), "cat": 28, "linear": 24}
    same = ll.combine(lora, [trees[0], lora.steer(trees[0], 0.5)], [1.0, 1.0], "linear")[0]
    assert same.configs[0].r == 4  # the same directions twice


def test_targets_of_one_config_have_one_rank_and_one_config():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 3)).eval()
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    params = move(adapt.init())
    params["1"]["B"] = torch.zeros_like(params["1"]["B"])  # no update here
    result, tree, errors = ll.combine(adapt, [params], [2.0])
    assert [cfg.r for cfg in result.configs] == [4, 4, 4, 3]
    assert len({id(cfg) for cfg in result.configs}) == 2
    assert errors["1"] == 0.0
    result, _, _ = ll.combine(adapt, [params], [2.0], r=5)
    assert {cfg.r for cfg in result.configs} == {5}
    ll.stack([tree, ll.tree_map(torch.zeros_like, tree)])


def test_the_error_is_that_of_the_best_approximation(model):
    adapt = ll.build(model, ll.OFTConfig(block_size=8))
    params = move(adapt.init())
    singular = torch.linalg.svdvals(update(adapt, params)[:24])
    for method, r in itertools.product(("svd", "cat", "linear"), (2, 6)):
        result, tree, errors = ll.combine(adapt, [params], [0.5], method, r=r)
        assert errors["0"] == pytest.approx(float(singular[r:].norm() / singular.norm()), rel=1e-4)
        assert miss(update(result, tree), 0.5 * update(adapt, params)) == pytest.approx(errors["0"], rel=1e-3)


@pytest.mark.parametrize(("cfg", "rank", "most"), [(ll.LoRAConfig(r=3), 3, 3), (ll.HRAConfig(r=4), 4, 64)], ids=["lora", "hra"])
def test_large_updates_of_low_rank_are_found_without_their_decomposition(monkeypatch, cfg, rank, most):
    model = nn.Sequential(nn.Linear(300, 280, bias=False)).eval()
    adapt = ll.build(model, cfg)
    trees = [move(adapt.init(), seed) for seed in (1, 2)]
    whole, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda t, **options: whole.append(min(t.shape)) or svd(t, **options))
    result, tree, _ = ll.combine(adapt, trees, [1.0, -1.0])
    assert max(whole) == most
    assert result.configs[0].r == 2 * rank
    assert miss(update(result, tree, 300), update(adapt, trees[0], 300) - update(adapt, trees[1], 300)) < 1e-5


# Forms


def test_biases_are_part_of_the_update():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4, bias=False)).eval()
    x = torch.cat([torch.eye(8), torch.zeros(1, 8)])
    names = dict(target_names="^0$")
    lora, ia3, shift = (
        ll.build(model[:1], cfg) for cfg in (ll.LoRAConfig(r=2, lora_bias=True, **names), ll.IA3Config(**names), ll.BitFitConfig(**names))
    )
    adapts = [lora, ia3, shift]
    trees = [move(adapt.init(), seed) for seed, adapt in enumerate(adapts)]
    wanted = sum(w * (adapt(tree, x) - adapt.base(x)) for w, adapt, tree in zip((1.0, -2.0, 0.5), adapts, trees))
    result, params, errors = ll.combine(adapts, trees, [1.0, -2.0, 0.5])
    assert result.configs[0].lora_bias
    assert errors["0"] < 1e-6
    assert miss((result(params, x) - result.base(x)).detach(), wanted.detach()) < 1e-5
    other = copy.deepcopy(model[:1])
    other.load_state_dict(result.merge(params), strict=False)
    torch.testing.assert_close(other(x), result(params, x))


@pytest.mark.parametrize("cfg", [ll.IA3Config(), ll.BitFitConfig(), ll.LoRAXSConfig(r=3), ll.SHiRAConfig(r=2)], ids=by_name)
def test_variants_linear_in_their_params_keep_their_form(model, cfg):
    adapt = ll.build(model, cfg)
    a, b = move(adapt.init(), 1), move(adapt.init(), 2)
    result, params, _ = ll.combine(adapt, [a, b], [0.5, -2.0])
    assert {c.name for c in result.configs} == {cfg.name}
    torch.testing.assert_close(params, ll.tree_map(lambda a, b: 0.5 * a - 2.0 * b, a, b))


def test_trees_of_two_calibrations_are_summed_as_updates(model):
    """Equal configs with other constants: the params do not add."""
    adapts = [ll.build(model, ll.SVFTConfig()), ll.build(model, ll.SVFTConfig())]
    adapts[1]._plan.constants["0"]["U"].mul_(-1)
    trees = [move(adapts[0].init(), seed) for seed in (1, 2)]
    result, params, _ = ll.combine(adapts, trees, [1.0, 1.0])
    assert result.configs[0].name == "lora"
    assert miss(update(result, params), update(adapts[0], trees[0]) + update(adapts[1], trees[1])) < 1e-5


def tiny_llama(**options):
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **options)).eval()


def test_adapters_of_other_configs_and_targets_on_one_model(tmp_path):
    """LoRA with tied tokens and a norm, and DoRA elsewhere with other tokens: all in one adapter, saved and loaded."""
    model = tiny_llama(tie_word_embeddings=True)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    ids = torch.arange(8)[None]
    first = ll.build(model, [ll.LoRAConfig(r=3, target_names="q_proj|v_proj"), ll.TokensConfig(token_ids=(1, 5)), ll.LNTuningConfig()])
    second = ll.build(model, [ll.DoRAConfig(r=2, target_names="(q|down)_proj"), ll.TokensConfig(token_ids=(5, 7))])
    trees = [move(first.init(), 1), move(second.init(), 2)]
    weights = [1.0, -0.5]
    result, params, errors = ll.combine([first, second], trees, weights)
    assert max(errors.values()) < 1e-6
    assert list(errors) == [t.path for t in result.targets]

    merged = [adapt.merge(tree, torch.float64) for adapt, tree in ((first, trees[0]), (second, trees[1]), (result, params))]
    for name, found in merged[2].items():
        base = before[name].double()
        wanted = sum(w * (m[name] - base) for w, m in zip(weights, merged) if name in m)
        assert miss(found - base, wanted) < 1e-5, name
    tokens = next(cfg for cfg in result.configs if cfg.name == "tokens")
    assert tokens.token_ids == (1, 5, 7)
    ll.save(result, params, tmp_path / "both.safetensors")
    again, loaded = ll.load(model, tmp_path / "both.safetensors")
    torch.testing.assert_close(again(loaded, ids).logits, result(params, ids).logits)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_modules_trained_as_a_whole_are_summed_and_pruned_by_their_parameters(model):
    adapt = ll.build(model, ll.FullConfig(target_names="^0$"))
    a, b = move(adapt.init(), 1), move(adapt.init(), 2)
    _, params, errors = ll.combine(adapt, [a, b], [1.0, -1.0])
    torch.testing.assert_close(params, ll.tree_map(lambda a, b: a - b, a, b))
    assert max(errors.values()) < 1e-6
    pruned = ll.combine(adapt, [a], [1.0], "magnitude_prune", density=0.25)[1]
    for name, leaf in pruned["0"].items():
        kept = leaf != 0
        assert int(kept.sum()) == leaf.numel() // 4
        assert torch.equal(leaf[kept], a["0"][name][kept])
        assert a["0"][name][~kept].abs().max() <= a["0"][name][kept].abs().min()


def test_embeddings_experts_and_convolutions():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(20, 8), nn.Conv1d(8, 6, 3)
            self.stack = nn.Parameter(torch.randn(2, 6, 5))

        def forward(self, ids):
            return self.conv(self.embed(ids).mT).mT @ self.stack

    torch.manual_seed(0)
    model, ids = Mixed().eval(), torch.arange(10)[None]
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=("embed", "conv", "stack")))
    trees = [move(adapt.init(), seed) for seed in (1, 2)]
    states = [adapt.merge(tree) for tree in trees]
    for method, options in (("cat", {}), ("linear", {}), ("svd", {"r": 4})):
        result, params, errors = ll.combine(adapt, trees, [1.0, -0.5], method, **options)
        assert max(errors.values()) < 1e-6
        other = copy.deepcopy(model)
        own = model.state_dict()
        other.load_state_dict({n: own[n] + (states[0][n] - own[n]) - 0.5 * (states[1][n] - own[n]) for n in states[0]}, strict=False)
        torch.testing.assert_close(result(params, ids), other(ids), rtol=1e-4, atol=1e-5)


def test_scaled_embeddings_keep_their_scale():
    """Gemma scales its lookups, those of the factors too: the update that LoRA holds is that of the table."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=6)
    embed = tf.GemmaForCausalLM(tf.GemmaConfig(**sizes, num_key_value_heads=1)).eval().model.embed_tokens
    model, ids = nn.Sequential(embed), torch.arange(40)
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="0"))
    params = move(adapt.init())
    wanted = (adapt(params, ids) - model(ids)).detach()
    for lora, tree, errors in (ll.combine(adapt, [params], [1.0]), ll.to_lora(adapt, params, r=2)):
        assert errors["0"] < 1e-6
        assert miss((lora(tree, ids) - model(ids)).detach(), wanted) < 1e-5


# Strengths by gradient


@pytest.mark.parametrize("method", ["cat", "linear"])
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.DoRAConfig(r=2), ll.IA3Config()], ids=by_name)
def test_params_are_differentiable_in_the_weights(model, method, cfg):
    adapt = ll.build(model, cfg)
    trees = [move(adapt.init(), seed, 0.3) for seed in (1, 2)]
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))

    def loss(weights):
        result, params, _ = ll.combine(adapt, trees, weights, method)
        return result(params, x).square().sum()

    at, eps = torch.tensor([0.5, -1.0]), 1e-2
    weights = at.clone().requires_grad_()
    loss(weights).backward()
    for k in range(2):
        step = eps * torch.eye(2)[k]
        slope = (loss((at + step).tolist()) - loss((at - step).tolist())) / (2 * eps)
        assert float(weights.grad[k]) == pytest.approx(float(slope), rel=1e-2, abs=1e-2)
    torch.testing.assert_close(torch.func.grad(loss)(at), weights.grad)


@pytest.mark.parametrize("method", ["cat", "linear"])
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.IA3Config()], ids=by_name)
def test_trees_are_constants(model, method, cfg):
    adapt = ll.build(model, cfg)
    tree = ll.tree_map(lambda p: p.requires_grad_(), move(adapt.init(), 1, 0.3))
    result, params, _ = ll.combine(adapt, [tree, tree], [0.5, -2.0], method)
    assert not result(params, torch.ones(5, 24)).requires_grad  # a part of a gradient would be a wrong one


# PEFT's `add_weighted_adapter`


@pytest.fixture(scope="module")
def pefts(tmp_path_factory):
    """Return a function that makes PEFT's model of two LoRAs with options, and the same adapters read by `from_peft`."""
    model = tiny_llama()

    def make(**options):
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], **options)
        theirs = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="one")
        theirs.add_adapter("two", config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                if "lora_" in name:
                    p += 0.1 * torch.randn(p.shape, generator=generator)
        folder = tmp_path_factory.mktemp("peft")
        theirs.save_pretrained(folder)
        return theirs, *zip(*(ll.from_peft(model, folder / name) for name in ("one", "two")))

    return make


def of_peft(theirs, name):
    theirs.base_model.set_adapter(name)
    layers = {path: m for path, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    with torch.no_grad():
        return {path: _change(m, m.base_layer) for path, m in layers.items()}


def of_ours(adapt, params):
    module, base = adapt.module(params), adapt._plan.base
    with torch.no_grad():
        return {t.path: _change(module.get_submodule(t.path), base.get_submodule(t.path)) for t in adapt.targets}


def _change(layer, base):
    x = torch.cat([torch.eye(base.in_features), torch.zeros(1, base.in_features)])
    return layer(x) - base(x)


SAME = {
    "cat": "cat",
    "svd": "svd",
    "ties_svd": "ties",
    "magnitude_prune_svd": "magnitude_prune",
    "dare_linear_svd": "dare_linear",
    "dare_ties_svd": "dare_ties",
}


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1")
def test_equals_pefts_on_plain_lora(pefts):
    """Theirs draws by torch's default generator, so that what draws is compared where nothing is dropped."""
    theirs, adapts, trees = pefts()
    for name, method in SAME.items():
        density = 1.0 if "dare" in name else 0.4
        theirs.add_weighted_adapter(["one", "two"], [0.7, -0.4], name, combination_type=name, density=density)
        wanted = of_peft(theirs, name)
        found = of_ours(*ll.combine(adapts, trees, [0.7, -0.4], method, density=density)[:2])
        assert found.keys() == wanted.keys()
        assert max(miss(found[path], wanted[path]) for path in found) < 1e-4, name
    theirs.add_weighted_adapter(["one"], [-1.0], "opposite", combination_type="linear")
    wanted = of_peft(theirs, "opposite")
    found = of_ours(*ll.combine(adapts[:1], trees[:1], [-1.0], "linear")[:2])
    assert max(miss(found[path], wanted[path]) for path in found) < 1e-4


def test_pefts_linear_sum_of_two_has_cross_terms(pefts):
    """It adds factors, so that two adapters' product has the `B` of one with the `A` of the other. Ours is the sum of the updates."""
    theirs, adapts, trees = pefts()
    theirs.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mean", combination_type="linear")
    a, b, mean = (of_peft(theirs, name) for name in ("one", "two", "mean"))
    found = of_ours(*ll.combine(adapts, trees, [0.5, 0.5], "linear")[:2])
    for path in a:
        wanted = (a[path] + b[path]) / 2
        assert miss(mean[path], wanted) > 0.5
        assert miss(found[path], wanted) < 1e-5


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of biases, which PEFT takes for damaged factors
@pytest.mark.parametrize("options", [{"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_exact_where_pefts_is_not(pefts, options):
    """An adapter with weight 1 is itself here; PEFT's has another scale, lacks the bias, or keeps none of DoRA's magnitudes."""
    theirs, adapts, trees = pefts(**options)
    theirs.add_weighted_adapter(["one"], [1.0], "itself", combination_type="cat")
    a, itself = of_peft(theirs, "one"), of_peft(theirs, "itself")
    found = of_ours(*ll.combine(adapts[:1], trees[:1], [1.0])[:2])
    for path in a:
        assert miss(itself[path], a[path]) > 0.3
        assert miss(found[path], a[path]) < 1e-5


def test_dare_keeps_a_share_that_the_seed_decides_and_the_mean_stays():
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40)).eval()
    adapt = ll.build(model, ll.FullConfig(target_names=r"^\d$"))
    params = ll.tree_map(torch.ones_like, adapt.init())

    def drawn(seed, trees=(params,), weights=(1.0,), method="dare_linear"):
        return ll.combine(adapt, trees, weights, method, density=0.3, seed=seed)[1]["0"]["weight"]

    first = drawn(0)
    assert torch.equal(first, drawn(0))
    assert not torch.equal(first, drawn(1))
    torch.testing.assert_close(first.unique(), torch.tensor([0.0, 1 / 0.3]))
    assert abs(float(first.mean()) - 1) < 0.15
    two = drawn(0, (params, params), (1.0, 1.0))
    assert len(two.unique()) == 3  # each adapter has a draw of its own
    other = ll.build(model, ll.FullConfig(target_names="^0$"))
    alone = ll.combine(other, [other.init() | {"0": params["0"]}], [1.0], "dare_linear", density=0.3)[1]
    assert torch.equal(alone["0"]["weight"], first)  # whichever others are adapted


def test_ties_elects_a_sign_and_averages_those_that_agree():
    adapt = ll.build(nn.Sequential(nn.Linear(4, 1, bias=False)), ll.FullConfig(target_names="0"))
    rows = [[3.0, -1.0, 2.0, 0.0], [1.0, 2.0, -2.0, 0.0], [1.0, 3.0, -4.0, 5.0]]
    trees = [{"0": {"weight": torch.tensor([row])}} for row in rows]
    found = ll.combine(adapt, trees, [1.0, 2.0, 1.0], "ties", density=1.0)[1]["0"]["weight"]
    torch.testing.assert_close(found, torch.tensor([[(3 + 2 + 1) / 3, (4 + 3) / 2, (-4 - 4) / 2, 5.0]]))


# A second adapter on a first


def test_two_configs_on_one_layer_are_summed_and_the_refusal_says_so(model):
    cfgs = ll.LoRAConfig(r=2), ll.DoRAConfig(r=2)
    with pytest.raises(
        ValueError, match=r"(?s)\"0\" in both LoRAConfig and DoRAConfig.*ll\.combine\(\[a, b\], \[a_params, b_params\], \[1, 1\]\)"
    ):
        ll.build(model, cfgs)
    a, b = (ll.build(model, cfg) for cfg in cfgs)
    a_params, b_params = move(a.init(), 1), move(b.init(), 2)
    both, params, _ = ll.combine([a, b], [a_params, b_params], [1, 1])
    assert miss(update(both, params), update(a, a_params) + update(b, b_params)) < 1e-5


@pytest.mark.parametrize("variant", [ll.LoRAConfig, ll.DoRAConfig], ids=["lora", "dora"])
@pytest.mark.parametrize("r", [None, 2])
def test_error_of_updates_that_cancel_is_over_theirs(variant, r):
    torch.manual_seed(0)
    adapt = ll.build(nn.Sequential(nn.Linear(8, 6)), variant(r=2))
    params = ll.tree_map(lambda p: p + 0.1 * torch.randn_like(p), adapt.init())
    _, _, errors = ll.combine(adapt, [params, params, params], [0.3, 0.7, -1.0], "cat" if r is None else "svd", r=r)
    assert errors["0"] < 1e-7


# Refused


def test_bad_arguments_are_refused(model):
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    trees = [move(adapt.init(), seed) for seed in (1, 2)]
    other = ll.build(copy.deepcopy(model).apply(lambda m: hasattr(m, "weight") and nn.init.ones_(m.weight)), ll.LoRAConfig(r=2))
    weights = [1.0, 1.0]
    wide = ll.build(model, ll.LoRAConfig(r=3)).init()
    tracked = torch.ones(2, requires_grad=True)
    mapped = torch.vmap(lambda weights: ll.combine(adapt, trees, weights)[1])
    for call, error, message in (
        (lambda: ll.combine(adapt, trees, weights, "tie"), ValueError, 'expected method to be any of "cat".*Did you mean "ties"'),
        (lambda: ll.combine(adapt, trees, weights, "ties_svd"), ValueError, 'method="ties", with r for svd_rank'),
        (lambda: ll.combine(adapt, trees, [1.0]), ValueError, r"weights of shape \(2,\), .* found \(1,\)"),
        (lambda: ll.combine(adapt, trees, [1.0, math.nan]), ValueError, "finite numbers as weights, found nan"),
        (lambda: ll.combine(adapt, trees, 1.0), TypeError, "expected weights as a list of numbers"),
        (lambda: ll.combine(adapt, [], []), ValueError, "at least one params tree, found none"),
        (lambda: ll.combine(adapt, trees[0], [1.0]), TypeError, "expected trees as a list of params trees.*found dict"),
        (lambda: ll.combine(trees, adapt, weights), TypeError, "expected adapt as what build or load returned"),
        (lambda: ll.combine([adapt], trees, weights), ValueError, "one for each of 2, found 1"),
        (lambda: ll.combine(adapt, [trees[0], wide], weights), ValueError, r"(?s)combine \(tree 1\): expected params that fit.*\(3, 24\)"),
        (lambda: ll.combine([adapt, other], trees, weights), ValueError, '(?s)same frozen weights, .*"0" of adapt 1'),
        (lambda: ll.combine(adapt, trees, weights, "ties"), ValueError, r"expected density in \(0, 1\].*found None"),
        (lambda: ll.combine(adapt, trees, weights, "ties", density=0.0), ValueError, "found 0.0"),
        (lambda: ll.combine(adapt, trees, weights, "dare_linear", density=1.5), ValueError, "found 1.5"),
        (lambda: ll.combine(adapt, trees, weights, "svd", r=0), ValueError, "r as an integer >= 1, found 0"),
        (lambda: ll.combine(adapt, trees, weights, "svd", r=25), ValueError, "r of at most 24, .*found 25"),
        (lambda: ll.combine(adapt, trees, weights, seed="a"), TypeError, "^combine: expected seed as an integer"),
        (lambda: mapped(torch.ones(3, 2)), ValueError, r"combine: expected weights whose values can be read, .*torch\.vmap"),
        (lambda: ll.combine(adapt, trees, tracked, "svd"), ValueError, 'weights without a gradient for method=.svd.*Use "cat" or "linear"'),
        (lambda: ll.combine(adapt, trees, tracked, "cat", r=2), ValueError, "weights without a gradient for method='cat' with r=2"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_targets_that_no_adapter_can_hold_are_named():
    model = tiny_llama(tie_word_embeddings=True)
    adapts = {
        "reft": ll.build(model, ll.LoReFTConfig(r=2)),
        "lora": ll.build(model, ll.LoRAConfig(r=2, target_names=("down_proj", "embed_tokens$"), exclude_names=())),
        "whole": ll.build(model, ll.FullConfig(target_names=r"layers\.1\.mlp$")),
        "layer": ll.build(model, ll.FullConfig(target_names=r"layers\.0\.mlp\.down_proj$")),
        "tokens": ll.build(model, ll.TokensConfig(token_ids=(1,))),
    }
    for names, message in (
        (("reft",), '(?s)expected linear variants.*"model.layers.0": LoReFTConfig is not linear.*"model.layers.1"'),
        (("lora", "layer"), '"model.layers.0.mlp.down_proj": LoRAConfig and FullConfig: one trains it as a whole'),
        (("lora", "whole"), '"model.layers.1.mlp.down_proj": it stands inside "model.layers.1.mlp", which is trained as a whole'),
        (("lora", "tokens"), '"model.embed_tokens": .*one moves its weight in "lm_head" too, where LoRA does not follow'),
    ):
        chosen = [adapts[name] for name in names]
        with pytest.raises(ValueError, match=message):
            ll.combine(chosen, [adapt.init() for adapt in chosen], [1.0] * len(chosen))
