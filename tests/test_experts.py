"""Experts in one module as targets: each against a linear layer of its own, against PEFT's `target_parameters`, and by memory."""

import copy
import dataclasses
import gc
import weakref

import peft
import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_lite as ll
from cases import assert_trees_equal, move, tiny_models
from lora_lite.layers.experts import ExpertsKind

TOLERANCE = 1e-5
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _qwen(**options):
    return tiny_models["qwen3_moe"](**options)[0]


def _mixtral(**options):
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(tf.MixtralConfig(**_SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, **options))


def _gpt_oss(**options):
    torch.manual_seed(0)
    config = tf.GptOssConfig(**_SIZES, intermediate_size=24, head_dim=8, num_local_experts=4, num_experts_per_tok=2, **options)
    model = tf.GptOssForCausalLM(config)
    for module in model.modules():
        if hasattr(module, "gate_up_proj_bias"):  # transposed weights, and biases
            torch.nn.init.normal_(module.gate_up_proj_bias)
            torch.nn.init.normal_(module.down_proj_bias)
    return model


MODELS = {"qwen3_moe": _qwen, "mixtral": _mixtral, "gpt_oss": _gpt_oss}
BOTH = ll.LoRAConfig(r=3, alpha=5.0, target_names=r"experts\.(gate_up_proj|down_proj)$")


def _make(name, implementation="eager", **options):
    model = MODELS[name](**options).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # the routing and the updates are to be far from ties and from zero
    model.set_experts_implementation(implementation)
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": ids}


def test_experts_are_taken_only_where_they_are_named():
    model, _ = _make("qwen3_moe")
    assert not [t for t in ll.find_targets(model, ll.LoRAConfig()) if t.kind is ExpertsKind]
    targets = ll.find_targets(model, ll.LoRAConfig(target_names="experts"))
    assert [t.path.rpartition("mlp.")[2] for t in targets] == 2 * ["experts.gate_up_proj", "experts.down_proj"]
    assert [(t.o, t.i, t.role) for t in targets[:2]] == [(32, 32, "reader"), (32, 16, "writer")]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_starts_at_the_base_model(name, implementation):
    model, batch = _make(name, implementation)
    adapt = ll.build(model, BOTH)
    params = adapt.init(seed=0)
    assert params["model.layers.0.mlp.experts.gate_up_proj"]["A"].shape == (4, 3, 32)
    with torch.no_grad():
        got, want = adapt(params, batch).logits, model(**batch).logits
    if implementation == "eager":
        assert torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # the others sum in another order


def _theirs(model, cfg, names):
    """PEFT's model with random factors, and its factors as ours, `(n, r, i)` and `(n, o, r)`, by target."""
    config = peft.LoraConfig(r=cfg.r, lora_alpha=cfg.alpha, target_modules=[], target_parameters=[f"mlp.experts.{n}" for n in names])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    leaves = {}
    for path, module in theirs.base_model.model.named_modules():
        if hasattr(module, "parameter_name"):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            torch.nn.init.normal_(A, std=0.2)
            torch.nn.init.normal_(B, std=0.2)
            leaves[f"{path.replace('.base_layer', '')}.{module.parameter_name}"] = (A, B)
    return theirs, leaves


def _ours(A, B, n):
    return {"A": A.detach().reshape(n, -1, A.shape[-1]), "B": B.detach().reshape(B.shape[0], -1, n).permute(2, 0, 1)}


@pytest.mark.filterwarnings("ignore:.*target_parameters.*")
@pytest.mark.parametrize("names", [["gate_up_proj", "down_proj"], ["down_proj"]], ids="+".join)
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_pefts(name, names):
    model, batch = _make(name)
    cfg = ll.LoRAConfig(r=3, alpha=5.0, target_names=tuple(rf"experts\.{n}$" for n in names))
    adapt = ll.build(model, cfg)
    theirs, leaves = _theirs(model, cfg, names)
    assert set(leaves) == set(adapt.shapes)
    params = {path: _ours(A, B, 4) for path, (A, B) in leaves.items()}
    out = theirs(**batch)
    out.loss.backward()
    base = model(**batch).logits.detach()
    update = (out.logits - base).detach()
    assert update.abs().max() > 1e-2
    assert float((adapt(params, batch).logits - base - update).abs().max()) <= TOLERANCE * float(update.abs().max())
    for take in (torch.func.grad, lambda f: lambda p: ll.value_and_grad(f)(p)[1]):
        grads = take(lambda p: adapt(p, batch).loss)(params)
        for path, (A, B) in leaves.items():
            for leaf, want in _ours(A.grad, B.grad, 4).items():
                assert float((grads[path][leaf] - want).abs().max()) <= TOLERANCE * max(float(want.abs().max()), 1e-2), (path, leaf)


class _Peak(TorchDispatchMode):
    """The largest number of bytes that tensors made inside hold at once."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}  # their views are no memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key, size):
        self.known.discard(key)
        self.now -= size


def _peak(model, step):
    step()
    gc.collect()
    with _Peak(model) as mode:
        step()
    return mode.peak


@pytest.mark.filterwarnings("ignore:.*target_parameters.*")
def test_takes_less_memory_than_updates_of_all_experts():
    model, batch = _make("qwen3_moe", num_experts=16, hidden_size=128, moe_intermediate_size=128)
    adapt = ll.build(model, BOTH)
    theirs, _ = _theirs(model, BOTH, ["gate_up_proj", "down_proj"])
    params = move(adapt.init(seed=0))
    ours = _peak(model, lambda: ll.value_and_grad(lambda p: adapt(p, batch).loss)(params))
    peak = _peak(theirs, lambda: theirs(**batch).loss.backward())
    one_layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].mlp.experts.parameters())
    print(f"ours {ours:,} peft {peak:,} experts of a layer {one_layer:,}")
    assert peak > 2 * one_layer  # PEFT forms the adapted weights of both layers' experts
    assert ours < one_layer


@pytest.mark.parametrize(
    "cfg",
    [BOTH, *(c(target_names="gate_up_proj") for c in (ll.IA3Config, ll.BitFitConfig, ll.DoRAConfig, ll.PiSSAConfig))],
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_give_the_forward(name, cfg):
    model, batch = _make(name)
    adapt = ll.build(model, cfg)
    params = move(adapt.init(seed=0))
    merged = copy.deepcopy(model)
    if cfg.name == "bitfit" and name != "gpt_oss":
        with pytest.raises(ValueError, match="moves the bias, and the layer has none"):
            adapt.merge(params)
        return
    state = adapt.merge(params)
    assert not merged.load_state_dict(state, strict=False).unexpected_keys
    base, want = model(**batch).logits, adapt(params, batch).logits
    assert (want - base).abs().max() > 1e-3
    torch.testing.assert_close(merged(**batch).logits - base, want - base, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_mixed_batch_is_a_loop_and_gives_gradients_by_row(name):
    model, batch = _make(name)
    batch = {"input_ids": batch["input_ids"]}
    adapt = ll.build(model, ll.LoRAConfig(r=3, target_names=(r"experts\.", r"q_proj$")))
    members = [move(adapt.init(seed=k), seed=k) for k in range(2)]
    for index in ([1, 0], [1, 1], None):
        mixed = adapt.mixed(ll.stack(members), batch, index).logits
        for row, k in enumerate(index or [0, 1]):
            torch.testing.assert_close(mixed[row], adapt(members[k], batch).logits[row], rtol=1e-4, atol=2e-5)
    by_row = ll.per_example_grad(adapt, lambda out, _: out.logits.square().mean((1, 2)))(members[0], batch)
    for row in range(2):
        alone = torch.func.grad(lambda p, row=row: adapt(p, {"input_ids": batch["input_ids"][[row]]}).logits.square().mean())(members[0])
        assert_trees_equal(ll.tree_map(lambda g, row=row: g[row], by_row), alone, 1e-4)


def test_saves_steers_binds_and_leaves_the_model_alone(tmp_path):
    model, batch = _make("qwen3_moe")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    adapt = ll.build(model, BOTH)
    params = move(adapt.init(seed=0))
    want = adapt(params, batch).logits
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(copy.deepcopy(model), tmp_path / "a.safetensors")
    assert_trees_equal(read, params)
    assert torch.equal(again(read, batch).logits, want)
    module = adapt.module(params)
    assert torch.equal(module(**batch).logits, want)
    assert_trees_equal(adapt.params(module), params)
    assert torch.equal(adapt(adapt.steer(params, 0.0), batch).logits, adapt.base(batch).logits)
    torch.testing.assert_close(adapt.train()(params, batch).logits, want)
    assert classes == [type(m) for m in model.modules()]
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_remat_gives_the_same_gradients():
    model, batch = _make("qwen3_moe")
    plain, lean = ll.build(model, BOTH), ll.build(model, BOTH, remat=r"layers\.\d+$")
    params = move(plain.init(seed=0))
    want, got = (ll.value_and_grad(lambda p, a=a: a(p, {**batch, "use_cache": False}).loss)(params)[1] for a in (plain, lean))
    assert_trees_equal(got, want, 1e-6)


def test_compiles_in_one_graph_where_the_model_does():
    model, batch = _make("qwen3_moe", "batched_mm")
    adapt = ll.build(model, BOTH)
    params = move(adapt.init(seed=0))
    torch.compiler.reset()
    compiled = torch.compile(lambda p: adapt(p, batch).loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params), adapt(params, batch).loss)


def test_calibrated_variants_are_refused():
    model, batch = _make("qwen3_moe")
    with pytest.raises(ValueError, match=r"is calibrated on .*all experts at once"):
        ll.build(model, ll.EVAConfig(r=2, target_names="gate_up_proj"), calibration=[batch])


def test_quantities_are_those_of_one_expert():
    model, _ = _make("qwen3_moe")
    adapt = ll.build(model, BOTH)
    assert adapt.num_params == 2 * 4 * 3 * (32 + 32 + 32 + 16)
    assert adapt.macs_per_token == 2 * 3 * (32 + 32 + 32 + 16)


@pytest.mark.parametrize(
    "cfg",
    [
        ll.VeRAConfig(r=2),
        ll.RandLoRAConfig(r=2),
        ll.FRoDConfig(),
        ll.UniLoRAConfig(r=2),
        ll.VBLoRAConfig(r=2, num_vectors=8, vector_length=4),
    ],
    ids=lambda cfg: cfg.name,
)
def test_variants_whose_layers_share_tensors_are_refused_by_name(cfg):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3))
    name = r"experts\.down_proj$"
    with pytest.raises(
        ValueError, match=r'cannot adapt "model\.layers\.0\.mlp\.experts\.down_proj": its layers share tensors.*3 linear maps'
    ):
        ll.build(model, dataclasses.replace(cfg, target_names=name))
    assert ll.build(model, [dataclasses.replace(cfg, target_names="q_proj"), ll.LoRAConfig(r=2, target_names=name)]).num_params > 0


def test_variant_of_positions_says_what_experts_lack_and_the_way_out_works():
    model, _ = _make("mixtral")
    with pytest.raises(ValueError, match=r"acts at some positions.*all experts at once, without their places in the text\..*LoRAConfig"):
        ll.build(model, ll.ALoRAConfig(r=2, invocation_tokens=(5,), target_names=r"experts\."))
    assert ll.build(model, ll.LoRAConfig(r=2, target_names=r"experts\.")).targets


def test_experts_whose_weights_bitsandbytes_computes_are_adapted(tmp_path):
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize", reason="bitsandbytes is not installed: pip install bitsandbytes")
    (model, batch), (dense, _) = _make("qwen3_moe"), _make("qwen3_moe")
    for path, experts in list(model.named_modules()):
        for name in ("gate_up_proj", "down_proj") if path.endswith("experts") else ():
            parametrize.replace_parameter_4bit(experts, name)
            getattr(dense.get_submodule(path), name).data = getattr(experts, name).detach().clone()
    cfg = ll.LoRAConfig(r=2, target_names=r"experts")
    adapt, twin = ll.build(model, cfg), ll.build(dense, cfg)
    assert [t.path for t in adapt.targets] == [t.path for t in twin.targets]
    params = move(adapt.init())
    for a, b in zip(*(ll.tree_leaves(torch.func.grad(lambda p, a=a: a(p, batch).loss)(params)) for a in (adapt, twin))):
        torch.testing.assert_close(a, b)
    stacked = ll.stack([params, adapt.init()])
    torch.testing.assert_close(*(a.mixed(stacked, batch).logits for a in (adapt, twin)))
    torch.testing.assert_close(adapt.module(params)(**batch).logits, twin(params, batch).logits)
    with pytest.raises(ValueError, match=r"experts\.down_proj.*computed by a parametrization"):
        adapt.merge(params)
    ll.to_peft(adapt, params, tmp_path / "peft")
    again, read = ll.from_peft(model, tmp_path / "peft")
    torch.testing.assert_close(again(read, batch).logits, twin(params, batch).logits)
