"""PEFT's files: read with PEFT's values and gradients, written so that PEFT loads them, refused where they cannot be understood."""

import copy
import json
import re

import peft
import pytest
import safetensors.torch
import torch
import transformers as tf
from peft.tuners.boft import layer as boft
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_lite as ll
from cases import C3AForward
from lora_lite.files.peft import grouped
from lora_lite.files.peft.rows import ROWS
from lora_lite.variants import osf
from peft_oracle import BlockDiagonal, assert_close, edit, saved, wrapped
from sklearn_stand_in import stand_in

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*layer (of type Linear )?has no bias"),  # nothing is merged here
    pytest.mark.filterwarnings("ignore:Found missing adapter keys.*randlora_A"),  # of each layer; those of the model are there
    pytest.mark.filterwarnings(r"ignore:.*invalid shape. base_model.*lora_B\.bias"),  # PEFT takes every vector for a shard
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed when r is odd"),  # one reflection is ETHER
]

TOLERANCE = 1e-5  # float32, relative to the largest entry of the update
EXACT = {
    "bitfit",
    "vblora",
    "vblora-three",
    "randlora",
    "randlora-sparse",
    "randlora-very-sparse",
    "bias",
    "mica",
    "mica-rslora",
    "loha",
    "gralora",
    "gralora-hybrid",
    "hira",
    "lokr",
    "lokr-both",
    "lokr-factor",
    "lokr-bound",
    "vera",
    "pvera",
    "tinylora",
    "lily",
    "lily-three",
    "lily-groups",
    "unilora",
    "unilora-zero",
    "tinylora-tied",
    "tinylora-uniform",
    "adalora",
    "lora",
    "rslora",
    "patterns",
    "gaussian",
    "orthogonal",
    "hra",
    "ether",
    "oft",
    "oft-exact",
    "oft-terms",
    "oft-shared",
    "oft-bound",
    "miss",
    "miss-padded",
    "miss-mini",
    "miss-bat",
    "shira",
    "shira-unseeded",
    "c3a",
    "c3a-pattern",
    "c3a-two-sizes",
    "fourierft",
    "fourierft-pattern",
    "fourierft-two-sizes",
    "waveft",
    "waveft-sparse",
    "waveft-shares",
    "waveft-two-sizes",
    "peanut",
    "peanut-deep",
    "supertuning",
    "supertuning-supra",
    "supertuning-bottom",
    "glora",
    "glora-vector",
    "glora-constant",
    "glora-weight",
    "glora-bias",
    "adamss",
    "adamss-ranks",
}
"""Cases whose tensors PEFT keeps as ours: no neutral value is taken off and added again, which would round."""


@pytest.fixture(autouse=True)
def _kmeans_of_ours(request, monkeypatch):
    if "adamss" in request.node.name:
        stand_in(monkeypatch)


def _stack(linear):
    widths = [(12, 20, True), (20, 8, False), (8, 8, True)]
    layers = [linear(i, o, bias) for i, o, bias in widths]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def _conv1d(i, o, bias):
    layer = Conv1D(o, i)
    nn.init.normal_(layer.weight, std=0.3)
    nn.init.normal_(layer.bias, std=0.5 * bias)
    return layer


def _gpt2():
    config = tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, initializer_range=0.1)
    return tf.GPT2LMHeadModel(config)


MODELS = {"linear": lambda: _stack(nn.Linear), "conv1d": lambda: _stack(_conv1d), "gpt2": _gpt2}
PATHS = {"linear": ["0", "2", "4"], "conv1d": ["0", "2", "4"], "gpt2": ["c_attn", "c_fc", "mlp.c_proj"]}
OUTPUT, INNER = r"0|4|.*c_attn|.*c_fc", r"2|.*mlp\.c_proj"


def _lora(**options):
    return lambda paths, conv1d: peft.LoraConfig(target_modules=paths, fan_in_fan_out=conv1d, **{"r": 4, "lora_alpha": 12, **options})


def _plain(cls, **options):
    return lambda paths, conv1d: cls(target_modules=paths, **options)


def _either(cls, **options):
    return lambda paths, conv1d: cls(target_modules=paths, fan_in_fan_out=conv1d, **options)


def _tinylora(**options):
    return lambda paths, conv1d: peft.TinyLoraConfig(target_modules=paths, fan_in_fan_out=conv1d, **options)


def _unilora(**options):
    fields = {"save_indices": True, **options}
    return lambda paths, conv1d: peft.UniLoraConfig(target_modules=paths, fan_in_fan_out=conv1d, **fields)


def _frod(**options):
    return lambda paths, conv1d: peft.FrodConfig(target_modules=paths, fan_in_fan_out=conv1d, progressbar=False, **options)


def _randlora(**options):
    return lambda paths, conv1d: peft.RandLoraConfig(r=5, target_modules=paths, fan_in_fan_out=conv1d, **{"randlora_alpha": 10, **options})


def _vblora(**options):
    options = {"r": 3, "num_vectors": 9, "vector_length": 4, "init_vector_bank_bound": 1.0, "init_logits_std": 1.0, **options}
    return lambda paths, conv1d: peft.VBLoRAConfig(target_modules=paths, fan_in_fan_out=conv1d, **options)


THEIRS = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True, lora_dropout=0.1),
    "patterns": _lora(rank_pattern={"0|c_attn": 2}, alpha_pattern={r"2|h\.1\..*c_proj": 5}),
    "gaussian": _lora(init_lora_weights="gaussian"),
    "bias": _lora(lora_bias=True, use_rslora=True),
    "own-bias": _lora(bias="lora_only"),
    "all-biases": _lora(bias="all"),
    "orthogonal": _lora(init_lora_weights="orthogonal"),
    "dora": _lora(use_dora=True),
    "dora-rslora": _lora(use_dora=True, use_rslora=True),
    "pissa": _lora(init_lora_weights="pissa"),
    "pissa-rslora": _lora(init_lora_weights="pissa", use_rslora=True),
    "olora": _lora(init_lora_weights="olora"),
    "olora-rslora": _lora(init_lora_weights="olora", use_rslora=True),
    "mica": _lora(init_lora_weights="mica"),
    "mica-rslora": _lora(init_lora_weights="mica", use_rslora=True, lora_dropout=0.1),
    "ia3": lambda paths, conv1d: peft.IA3Config(target_modules=paths, feedforward_modules=[], fan_in_fan_out=conv1d),
    "ia3-both": lambda _, conv1d: peft.IA3Config(target_modules=f"{OUTPUT}|{INNER}", feedforward_modules=INNER, fan_in_fan_out=conv1d),
    "delora": _plain(peft.DeloraConfig, r=3, rank_pattern={"2": 2}, lambda_pattern={"4": 7}),
    "bitfit": _plain(peft.BeftConfig),
    "hra": _plain(peft.HRAConfig, r=4),
    "ether": _plain(peft.HRAConfig, r=1),  # one reflection
    "road_1": _plain(peft.RoadConfig, variant="road_1", group_size=4),
    "road_2": _plain(peft.RoadConfig, variant="road_2", group_size=4),
    "road_4": _plain(peft.RoadConfig, variant="road_4", group_size=2),
    "loha": _plain(peft.LoHaConfig, r=2, alpha=3, rank_pattern={"2": 4}, alpha_pattern={"4": 5}, rank_dropout=0.1, module_dropout=0.2),
    "lokr": _plain(peft.LoKrConfig, r=1, alpha=3, rank_pattern={"2": 3}, alpha_pattern={"4": 5}, rank_dropout=0.1, rank_dropout_scale=True),
    "lokr-both": _plain(peft.LoKrConfig, r=1, decompose_both=True, init_weights="lycoris", module_dropout=0.2),
    "lokr-factor": _plain(peft.LoKrConfig, r=1, decompose_factor=4),
    "lokr-bound": _plain(peft.LoKrConfig, r=1, decompose_factor=3),
    "hira": lambda paths, conv1d: peft.HiraConfig(r=3, target_modules=paths, rank_pattern={"2|c_fc": 2}, fan_in_fan_out=conv1d),
    "gralora": lambda paths, conv1d: peft.GraloraConfig(r=4, alpha=6, target_modules=paths, fan_in_fan_out=conv1d),
    "gralora-hybrid": lambda paths, conv1d: peft.GraloraConfig(
        r=4, alpha=6, gralora_k=4, hybrid_r=3, gralora_dropout=0.1, target_modules=paths, fan_in_fan_out=conv1d
    ),
    "boft": _plain(peft.BOFTConfig, boft_block_size=4),
    "boft-factors": _plain(peft.BOFTConfig, boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=0.1),
    "boft-blocks": _plain(peft.BOFTConfig, boft_block_size=0, boft_block_num=2, boft_n_butterfly_factor=2),
    "vera": lambda paths, conv1d: peft.VeraConfig(r=5, target_modules=paths, projection_prng_key=3, fan_in_fan_out=conv1d),
    "frod": _frod(),
    "frod-dense": _frod(sparse_rate=0.3, projection_prng_key=4, frod_dropout=0.1, regularization_alpha=0.01),
    "kasa": _lora(kasa_config=peft.KasaConfig(beta=0.2, gamma=0.3), use_rslora=True),
    "lily": _plain(peft.LilyConfig, r=4),
    "lily-three": _plain(peft.LilyConfig, r=3, num_B=3, stride_A=2, scaling=0.7, init_weights=False),
    "tinylora": _tinylora(),
    "unilora": _unilora(r=3, theta_d_length=20, proj_seed=7, init_theta_d_bound=0.5, unilora_dropout=0.1),
    "tinylora-tied": _tinylora(r=10, u=3, weight_tying=0.4, projection_seed=5),  # a rank above a width of 8
    "tinylora-uniform": _tinylora(init_weights="uniform", init_v_bound=0.5, tinylora_dropout=0.1, weight_tying=1.0),
    "pvera": lambda paths, conv1d: peft.PveraConfig(r=5, target_modules=paths, projection_prng_key=3, fan_in_fan_out=conv1d),
    "randlora": _randlora(projection_prng_key=3, randlora_alpha=10),
    "randlora-sparse": _randlora(sparse=True, randlora_dropout=0.1),
    "randlora-very-sparse": _randlora(very_sparse=True, sparse=True),
    "vblora": _vblora(),
    "vblora-three": _vblora(topk=3, num_vectors=7, vblora_dropout=0.1),
    "adalora": lambda paths, conv1d: peft.AdaLoraConfig(init_r=5, target_r=3, total_step=9, target_modules=paths, fan_in_fan_out=conv1d),
    "oft": _plain(peft.OFTConfig, oft_block_size=4),
    "oft-exact": _plain(peft.OFTConfig, oft_block_size=4, use_cayley_neumann=False),
    "oft-terms": _plain(peft.OFTConfig, oft_block_size=2, num_cayley_neumann_terms=4),
    "oft-shared": _plain(peft.OFTConfig, oft_block_size=4, block_share=True),
    "oft-bound": _plain(peft.OFTConfig, oft_block_size=4, coft=True, eps=100.0),
    "miss": _plain(peft.MissConfig, r=4),
    "miss-padded": _plain(peft.MissConfig, r=5, miss_dropout=0.1),
    "miss-random": _plain(peft.MissConfig, r=4, init_weights=False),
    "miss-mini": _plain(peft.MissConfig, r=8, mini_r=2, init_weights="mini"),
    "miss-bat": _plain(peft.MissConfig, r=2, init_weights="bat", miss_dropout=0.1),
    "shira": _plain(peft.ShiraConfig, r=3, random_seed=5),
    "shira-unseeded": _plain(peft.ShiraConfig, r=2, init_weights=False),
    "c3a": _plain(peft.C3AConfig, block_size=4),
    "c3a-pattern": _plain(peft.C3AConfig, block_size=4, block_size_pattern={"2": 2}, init_weights=True),
    "fourierft": _either(peft.FourierFTConfig, n_frequency=50, random_loc_seed=5),
    "fourierft-pattern": _either(
        peft.FourierFTConfig, n_frequency=40, scaling=20.0, n_frequency_pattern={"2": 30, "mlp.c_fc": 60}, init_weights=True
    ),
    "waveft": _either(peft.WaveFTConfig, n_frequency=50, random_loc_seed=5),
    "waveft-sparse": _either(peft.WaveFTConfig, n_frequency=40, scaling=4.0, use_idwt=False, wavelet_family="db3", init_weights=False),
    "waveft-pattern": _either(peft.WaveFTConfig, n_frequency=40, n_frequency_pattern={"2": 30, "mlp.c_fc": 60}),
    "waveft-shares": _plain(peft.WaveFTConfig, n_frequency=30, proportional_parameters=True),
    "adamss": _plain(peft.AdamssConfig, r=6, num_subspaces=3),
    "adamss-ranks": _plain(peft.AdamssConfig, r=7, num_subspaces=2, subspace_rank=3, use_dynamic_rank=True, use_asa=True, random_seed=3),
    "psoft": _plain(peft.PsoftConfig, r=4),
    "psoft-plain": _plain(peft.PsoftConfig, r=4, psoft_mag_a=False, psoft_mag_b=False, psoft_alpha=7, psoft_dropout=0.1),
    "psoft-one-vector": _plain(peft.PsoftConfig, r=5, psoft_mag_a=False, ab_svd_init="pissa_init"),
    "psoft-free": _plain(peft.PsoftConfig, r=4, psoft_orth=False),
    "psoft-series": _plain(peft.PsoftConfig, r=4, use_cayley_neumann=True, num_cayley_neumann_terms=4),
    "psoft-bound": _plain(peft.PsoftConfig, r=6, use_cayley_neumann=True, cayley_neumann_eps=0.2),
    "deft": lambda paths, conv1d: peft.DeftConfig(r=3, deft_dropout=0.1, target_modules=paths, fan_in_fan_out=conv1d),
    "deft-alpha": lambda paths, conv1d: peft.DeftConfig(r=3, alpha=5, init_weights=False, target_modules=paths, fan_in_fan_out=conv1d),
    "deft-qr": lambda paths, conv1d: peft.DeftConfig(r=4, decomposition_method="qr", target_modules=paths, fan_in_fan_out=conv1d),
    "deft-para": lambda paths, conv1d: peft.DeftConfig(r=3, para=True, deft_dropout=0.1, target_modules=paths, fan_in_fan_out=conv1d),
    "deft-para-qr": lambda paths, conv1d: peft.DeftConfig(
        r=3, para=True, decomposition_method="qr", target_modules=paths, fan_in_fan_out=conv1d
    ),
    "peanut": _plain(peft.PeanutConfig, r=4, scaling=0.7),
    "peanut-deep": _plain(peft.PeanutConfig, r=4, depth=2, act_fn="swish", init_weights=False),
    "supertuning": _plain(peft.SupertuningConfig, sparsity=0.9),
    "supertuning-supra": _plain(peft.SupertuningConfig, sparsity=0.8, r=2, lora_dropout=0.1),
    "supertuning-bottom": _plain(peft.SupertuningConfig, sparsity=0.8, select_top=False, r=3, lora_alpha=2.5),
    "osf": _plain(peft.OSFConfig),
    "osf-patterns": _plain(peft.OSFConfig, effective_rank=0.3, rank_pattern={"2": 5, "^4$": 0.8}),
    "glora": _plain(peft.GloraConfig, r=3),
    "glora-vector": _plain(peft.GloraConfig, r=3, config_A_B="vector", config_C="vector", config_D_E="vector", init_weights=False),
    "glora-constant": _plain(peft.GloraConfig, config_A_B="constant", config_C="none"),
    "glora-weight": _plain(peft.GloraConfig, config_C="none", config_D_E="none"),
}
LINEAR_ONLY = (
    *("lily", "kasa", "delora", "hra", "ether", "road", "oft", "loha", "lokr", "peanut", "supertuning", "osf", "glora", "adamss"),
    *("miss", "shira", "boft", "c3a", "waveft-shares", "bitfit", "all-biases", "psoft"),
    "olora",  # PEFT's takes a Conv1D's weight transposed, and fails where it is not square
)
SIGNS_FREE = ("pissa", "pissa-rslora", "deft-qr", "osf", "osf-patterns")
"""Cases whose factors have signs of their own, here and in PEFT: those of singular vectors, of an orthonormal factor."""
COPY = re.compile(r"model\..*\.randlora_[AB]$")
"""Keys of the shared bases that PEFT repeats for each layer. They are written once."""
RESIDUAL = ("pissa", "olora")
"""Cases that are written as LoRA of twice the rank."""
PAIRS = [(model, name) for model in MODELS for name in THEIRS if model == "linear" or not name.startswith(LINEAR_ONLY)]


def _make(name):
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 5))
    batch = {"input_ids": ids} if name == "gpt2" else torch.randn(2, 3, 12)
    return MODELS[name]().eval(), batch


def _run(model, batch):
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    return getattr(out, "logits", out)


def _adapted(adapt, params, batch):
    out = adapt(params, batch)
    return getattr(out, "logits", out)


def _moved(tree, scale=0.1):
    return ll.tree_map(lambda p: p + scale * torch.randn(p.shape), tree)


@pytest.fixture(autouse=True)
def _kernel_of_boft(monkeypatch):
    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: BlockDiagonal)


@pytest.fixture(autouse=True)
def _right_gradients_of_c3a(monkeypatch):
    monkeypatch.setattr(peft.tuners.c3a.layer, "BlockCircularConvolution", C3AForward)


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_pefts_file_gives_pefts_values_and_gradients(name, case, tmp_path):
    model, batch = _make(name)
    theirs = wrapped(model, THEIRS[case](PATHS[name], name != "linear"))
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    base, want = _run(model, batch).detach(), _run(theirs, batch)
    assert_close(_adapted(adapt, params, batch) - base, want - base)
    weights = torch.randn(want.shape)
    (want * weights).sum().backward()
    _, grads = ll.value_and_grad(lambda p: (_adapted(adapt, p, batch) * weights).sum())(params)
    grads = osf.project(grads, adapt.constants)  # PEFT's gradients of OSF are projected
    theirs_by_key = {key.replace(".default", "").removesuffix(".weight"): p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    for target, cfg in zip(adapt.targets, adapt.configs):
        for leaf, got in grouped.copies(adapt._plan, grads, target.path).items():
            key = f"base_model.model.{target.path}.{ROWS[cfg.name].leaves[leaf].key}".removesuffix(".weight")
            names = [key.replace("#", str(n)) for n in range(len(got))] if "#" in key else [key]
            found = [theirs_by_key.pop(name).flatten() for name in names if name in theirs_by_key]
            if not found and leaf in adapt._plan.groups.get(target.path, {}):
                continue  # PEFT lists it at the first layer of its group
            want = torch.cat(found)
            got, want = (got.abs(), want.abs()) if case in SIGNS_FREE else (got, want)
            assert_close(got, want.reshape(got.shape), f"the gradient of {target.path}.{leaf}")
    for name in {cfg.name for cfg in adapt.configs if ROWS[cfg.name].shared_leaves}:
        for leaf, whole in grads[name].items():
            key = ROWS[name].shared_leaves[leaf].key.removeprefix("base_model")  # PEFT registers it at each layer, and lists the first
            parts = [(key.replace("#", str(n)), g) for n, g in enumerate(whole)] if "#" in key else [(key, whole)]
            for last, got in parts:
                want = theirs_by_key.pop(next(key for key in theirs_by_key if key.endswith(last)))
                assert_close(got, want, f"the gradient of {name}.{leaf}")
    assert theirs_by_key == {}


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_files_written_back_are_what_peft_loads(name, case, tmp_path):
    model, batch = _make(name)
    theirs = wrapped(model, THEIRS[case](PATHS[name], name != "linear"))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    ll.to_peft(adapt, params, tmp_path / "ours")
    base = _run(model, batch).detach()
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert_close(_run(again, batch) - base, _run(theirs, batch) - base)
    back, values = ll.from_peft(model, tmp_path / "ours")
    assert_close(_adapted(back, values, batch) - base, _adapted(adapt, params, batch) - base)
    before, after = saved(tmp_path / "theirs"), saved(tmp_path / "ours")
    if not case.startswith(RESIDUAL):
        before = {key: t for key, t in before.items() if not COPY.search(key)}
        assert set(before) == set(after)
        for key, tensor in before.items():
            other = after[key].abs() * tensor.sign() if case in SIGNS_FREE else after[key]
            assert torch.equal(tensor, other) if case in EXACT else torch.allclose(tensor, other, rtol=1e-6, atol=1e-6), key
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]  # no temporary folder stays
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


OURS = {
    "lora": ll.LoRAConfig(r=3),
    "two-ranks": [ll.LoRAConfig(r=3, target_names="^0$"), ll.LoRAConfig(r=2, alpha=5.5, target_names="^[24]$")],
    "rslora": ll.LoRAConfig(r=3, rslora=True, dropout=0.1, target_names="^[02]$"),
    "gaussian": ll.LoRAConfig(r=3, start="gaussian"),
    "orthogonal": ll.LoRAConfig(r=4, start="orthogonal"),
    "bias": ll.LoRAConfig(r=3, lora_bias=True),
    "own-bias": ll.LoRAConfig(r=3, bias=True, target_names="^[04]$"),
    "bitfit": ll.BitFitConfig(),
    "bitfit-beside": [ll.LoRAConfig(r=3, target_names="^[02]$"), ll.BitFitConfig(target_names="^4$")],
    "dora": ll.DoRAConfig(r=3),
    "pissa": ll.PiSSAConfig(r=3),
    "olora": ll.OLoRAConfig(r=3),
    "mica": ll.MiCAConfig(r=3),
    "pissa-and-lora": [ll.PiSSAConfig(r=3, target_names="^0$"), ll.LoRAConfig(r=2, target_names="^2$")],
    "ia3-both": [ll.IA3Config(target_names="^[04]$"), ll.IA3FFConfig(target_names="^2$")],
    "ia3-ff": ll.IA3FFConfig(),
    "delora": ll.DeLoRAConfig(r=2),
    "delora-scalar": ll.DeLoRAConfig(r=2, w_norm="scalar", lambda0=2.5),
    "delora-none": ll.DeLoRAConfig(r=2, w_norm="none"),
    "hra": ll.HRAConfig(r=4),
    "ether": ll.ETHERConfig(),
    "road": ll.ROADConfig(variant="road_2", group_size=4),
    "loha": [ll.LoHaConfig(r=2, alpha=5.5, target_names="^[02]$"), ll.LoHaConfig(r=3, target_names="^4$")],
    "lokr": [ll.LoKrConfig(r=2, alpha=5.5, target_names="^[02]$"), ll.LoKrConfig(r=1, target_names="^4$")],
    "lokr-both": ll.LoKrConfig(r=1, decompose_both=True, decompose_factor=3, start="lycoris"),
    "hira": ll.HiRAConfig(r=2, dropout=0.1),
    "gralora": ll.GraLoRAConfig(r=4, k=4, hybrid_r=1, alpha=5.5, dropout=0.1),
    "boft": ll.BOFTConfig(block_size=2, n_butterfly_factor=2, block_dropout=0.1),
    "vera": ll.VeRAConfig(r=5, seed=7),
    "unilora": ll.UniLoRAConfig(r=3, theta_d_length=11, seed=9, start="random", init_theta_d_bound=0.4),
    "unilora-zero": ll.UniLoRAConfig(r=3, theta_d_length=11),
    "frod": ll.FRoDConfig(sparse_rate=0.1, seed=3),
    "kasa": ll.KaSAConfig(r=3),
    "lily": ll.LilyConfig(r=3, stride_A=2, start="random"),
    "lily-groups": ll.LilyConfig(r=3, stride_A=2, groups=".*"),
    "tinylora": ll.TinyLoRAConfig(r=3, u=6, seed=9, weight_tying=0.3),
    "pvera": ll.PVeRAConfig(r=5, seed=7, d_initial=0.3, dropout=0.1),
    "randlora": ll.RandLoRAConfig(r=5, alpha=10.0, seed=7),
    "randlora-sparse": ll.RandLoRAConfig(r=5, alpha=10.0, sparse=True),
    "vblora": ll.VBLoRAConfig(r=3, num_vectors=8, vector_length=4),
    "adalora": ll.AdaLoRAConfig(init_r=4, target_r=2, total_step=9, alpha=3.0),
    "oft": ll.OFTConfig(block_size=4, terms=4),
    "psoft": ll.PSOFTConfig(r=3),
    "psoft-free": ll.PSOFTConfig(r=3, orth=False, mag_b=False, ab_svd_init="pissa_init"),
    "psoft-series": ll.PSOFTConfig(r=6, cayley="series", terms=6, eps=0.3, dropout=0.1),
    "oft-exact": ll.OFTConfig(block_size=2, cayley="exact", block_share=True),
    "miss": ll.MiSSConfig(r=5, dropout=0.1),
    "miss-mini": ll.MiSSConfig(r=8, mini_r=4, init="mini"),
    "miss-bat": ll.MiSSConfig(r=4, init="bat"),
    "shira": ll.SHiRAConfig(r=3),
    "c3a": ll.C3AConfig(block_size=2),
    "c3a-two-sizes": [ll.C3AConfig(block_size=2, target_names="^0$"), ll.C3AConfig(block_size=4, target_names="^[24]$")],
    "fourierft": ll.FourierFTConfig(n_frequency=60, scaling=20.0, seed=3),
    "fourierft-two-sizes": [ll.FourierFTConfig(n_frequency=n, target_names=f"^{path}$") for path, n in (("0", 60), ("2", 30))],
    "waveft": ll.WaveFTConfig(n_frequency=60, scaling=4.0, seed=3),
    "waveft-two-sizes": [ll.WaveFTConfig(n_frequency=n, target_names=f"^{path}$") for path, n in (("0", 60), ("2", 30))],
    "deft": ll.DEFTConfig(r=3, alpha=5.0),
    "deft-qr": ll.DEFTConfig(r=4, decomposition_method="qr"),
    "deft-para": ll.DEFTConfig(r=3, para=True),
    "peanut": ll.PEANuTConfig(r=3),
    "peanut-deep": ll.PEANuTConfig(r=3, depth=2, act_fn="gelu_pytorch_tanh", scaling=2.0),
    "supertuning": ll.SuperTuningConfig(sparsity=0.9),
    "supertuning-supra": ll.SuperTuningConfig(sparsity=0.9, r=3, alpha=2.0),
    "osf": ll.OSFConfig(effective_rank=0.4),
    "adamss": ll.AdaMSSConfig(r=5, num_subspaces=3, subspace_rank=2),
    "glora": ll.GLoRAConfig(r=3),
    "glora-vector": ll.GLoRAConfig(r=3, config_A_B="vector", config_D_E="vector"),
    "glora-bias": ll.GLoRAConfig(config_A_B="none", config_C="vector", target_names="^[04]$"),
    "osf-two-ranks": [ll.OSFConfig(effective_rank=3, target_names="^0$"), ll.OSFConfig(target_names="^[24]$")],
}


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_what_we_write(case, tmp_path):
    model, batch = _make("linear")
    adapt = ll.build(model, OURS[case])
    params = _moved(adapt.init())
    ll.to_peft(adapt, params, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    base = _run(model, batch).detach()
    assert_close(_run(theirs, batch) - base, adapt(params, batch) - base)
    back, again = ll.from_peft(model, tmp_path / "ours")
    assert_close(back(again, batch) - base, adapt(params, batch) - base)
    if not case.startswith(RESIDUAL):
        assert [t.path for t in back.targets] == [t.path for t in adapt.targets]
        for got, want in zip(ll.tree_leaves({p: again[p] for p in params}), ll.tree_leaves(params)):
            assert torch.equal(got, want) if case in {*EXACT, "two-ranks"} else torch.allclose(got, want, rtol=0, atol=2e-6)


@pytest.fixture
def folder(tmp_path):
    """A LoRA that PEFT saved from the linear model."""
    model, _ = _make("linear")
    wrapped(model, peft.LoraConfig(r=4, target_modules=["0", "2"])).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")  # PEFT loads the start beside it to take it off
def test_converted_pissa_is_plain_lora_on_the_weight_as_it_was(tmp_path):
    model, batch = _make("linear")
    theirs = peft.get_peft_model(copy.deepcopy(model), THEIRS["pissa"](PATHS["linear"], False)).eval()
    theirs.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapt, params = ll.from_peft(model, tmp_path / "converted")
    assert {cfg.name for cfg in adapt.configs} == {"lora"}
    base = _run(model, batch).detach()
    assert_close(adapt(params, batch) - base, _run(theirs, batch) - base)


@pytest.mark.parametrize("start", ["eva", None, False])
def test_plain_starts_are_plain_lora(folder, start):
    model, _ = _make("linear")
    _, want = ll.from_peft(model, folder)
    edit(folder, init_lora_weights=start)
    _, params = ll.from_peft(model, folder)
    assert all(torch.equal(a, b) for a, b in zip(ll.tree_leaves(params), ll.tree_leaves(want)))


def test_fields_that_select_layers_and_half_precision_do_not_matter(folder):
    model, _ = _make("linear")
    adapt, params = ll.from_peft(model, folder)
    edit(folder, target_modules="all-linear", exclude_modules=["9"], layers_to_transform=[7], task_type="CAUSAL_LM")
    whole = saved(folder)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        safetensors.torch.save_file({key: t.to(dtype) for key, t in whole.items()}, folder / "adapter_model.safetensors")
        _, rounded = ll.from_peft(model, folder)
        for got, want in zip(ll.tree_leaves(rounded), ll.tree_leaves(params)):
            assert torch.equal(got, want.to(dtype).float())
    assert [t.path for t in adapt.targets] == ["0", "2"]


def test_layers_that_the_config_names_and_the_tensors_lack_are_told(folder):
    """PEFT runs the base model there, with a warning too."""
    model, _ = _make("linear")
    safetensors.torch.save_file({key: t for key, t in saved(folder).items() if ".2." not in key}, folder / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match='target_modules names "2" too, of which the file has no tensors'):
        adapt, _ = ll.from_peft(model, folder)
    assert [t.path for t in adapt.targets] == ["0"]


def test_dropout_and_mode_are_taken_over(folder):
    model, batch = _make("linear")
    edit(folder, lora_dropout=0.5)
    adapt, params = ll.from_peft(model, folder)
    assert torch.equal(adapt(params, batch), adapt(params, batch))
    train = adapt.train()
    assert not torch.equal(train(params, batch), train(params, batch))


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
def test_projections_of_vera_are_those_of_the_file_or_drawn_again(held, tmp_path):
    model, batch = _make("linear")
    theirs = wrapped(model, peft.VeraConfig(r=5, target_modules=["0", "2"], projection_prng_key=3, save_projection=held))
    if held:
        theirs.base_model.vera_A["default"].mul_(3)
    theirs.save_pretrained(tmp_path)
    assert ("base_model.vera_A" in saved(tmp_path)) == held
    adapt, params = ll.from_peft(model, tmp_path)
    base = _run(model, batch).detach()
    assert_close(adapt(params, batch) - base, _run(theirs, batch) - base)


@pytest.mark.parametrize("config", [peft.VeraConfig, peft.PveraConfig, peft.RandLoraConfig])
def test_a_second_adapter_has_the_projections_of_wider_layers(config, tmp_path):
    """PEFT itself does not load such a file alone."""
    model, batch = _make("linear")
    theirs = peft.get_peft_model(copy.deepcopy(model), config(r=4, target_modules=["0", "2", "4"])).eval()
    theirs.add_adapter("second", config(r=4, target_modules=["4"], init_weights=False))
    theirs.set_adapter("second")
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path / "second")
    base = _run(model, batch).detach()
    assert_close(adapt(params, batch) - base, _run(theirs, batch) - base)
    ll.to_peft(adapt, params, tmp_path / "ours")
    assert_close(_run(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval(), batch), _run(theirs, batch))


@pytest.mark.parametrize("asked", [["0", "4"], "0|4"])
def test_indices_of_unilora_are_drawn_again_where_the_file_holds_the_vector_alone(asked, tmp_path):
    model, batch = _make("linear")
    theirs = wrapped(model, peft.UniLoraConfig(r=3, theta_d_length=50, target_modules=asked, init_theta_d_bound=0.5))
    theirs.save_pretrained(tmp_path)
    assert list(saved(tmp_path)) == ["base_model.unilora_theta_d"]
    adapt, params = ll.from_peft(model, tmp_path)
    assert [t.path for t in adapt.targets] == ["0", "4"]
    base = _run(model, batch).detach()
    assert_close(adapt(params, batch) - base, _run(theirs, batch) - base)
    edit(tmp_path, target_modules=r".*", exclude_modules=["2"])
    assert [t.path for t in ll.from_peft(model, tmp_path)[0].targets] == ["0", "4"]


def test_layers_that_no_tensor_names_are_asked_for(tmp_path):
    model, _ = _make("linear")
    wrapped(model, peft.UniLoraConfig(target_modules=["0", "4"])).save_pretrained(tmp_path)
    edit(tmp_path, target_modules=None)
    with pytest.raises(ValueError, match="target_modules: expected names or an expression"):
        ll.from_peft(model, tmp_path)
    edit(tmp_path, target_modules=["0"], layers_to_transform=[0])
    with pytest.raises(ValueError, match="target_modules: expected names of layers of this model, found none"):
        ll.from_peft(model, tmp_path)


@pytest.mark.parametrize("blocks", [{}, {"layers_pattern": "h"}, {"layers_pattern": ["layers", "h"]}])
def test_layers_that_no_tensor_names_are_those_of_the_blocks_asked_for(blocks, tmp_path):
    model, batch = _make("gpt2")
    cfg = peft.UniLoraConfig(r=3, theta_d_length=50, target_modules=["c_attn"], layers_to_transform=1, fan_in_fan_out=True, **blocks)
    theirs = wrapped(model, cfg)
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    assert [t.path for t in adapt.targets] == ["transformer.h.1.attn.c_attn"]
    base = _run(model, batch).detach()
    assert_close(_adapted(adapt, params, batch) - base, _run(theirs, batch) - base)


@pytest.mark.filterwarnings("ignore:Specified to not save projection tensors")
def test_matrices_of_tinylora_are_drawn_again_where_the_file_lacks_them(tmp_path):
    model, batch = _make("linear")
    theirs = wrapped(model, peft.TinyLoraConfig(r=3, u=4, target_modules=["0", "4"], projection_seed=7, save_projection=False))
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    base = _run(model, batch).detach()
    assert_close(adapt(params, batch) - base, _run(theirs, batch) - base)


def test_vectors_of_tinylora_are_counted(tmp_path):
    model, _ = _make("linear")
    wrapped(model, peft.TinyLoraConfig(target_modules=["0", "2", "4"])).save_pretrained(tmp_path)
    tensors = saved(tmp_path)
    safetensors.torch.save_file({k: t for k, t in tensors.items() if not k.endswith("_v.1")}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r'unexpected "base_model\.tinylora_v\.2"'):
        ll.from_peft(model, tmp_path)
    safetensors.torch.save_file({k: t for k, t in tensors.items() if not k.endswith("_v.2")}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r'"tinylora\.v": expected shape \(3, 64\), found \(2, 64\)'):
        ll.from_peft(model, tmp_path)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.filterwarnings("ignore:Specified to not save basis_A")
def test_bases_of_randlora_are_those_of_the_file_or_drawn_again(saved, tmp_path):
    model, batch = _make("linear")
    config = peft.RandLoraConfig(r=5, target_modules=["0", "2"], projection_prng_key=3, randlora_alpha=10, save_projection=saved)
    theirs = wrapped(model, config)
    if saved:
        theirs.base_model.randlora_A["default"].mul_(3)
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    base = _run(model, batch).detach()
    assert_close(adapt(params, batch) - base, _run(theirs, batch) - base)


def test_copies_of_shared_tensors_that_differ_are_named(tmp_path):
    model, _ = _make("linear")
    wrapped(model, peft.RandLoraConfig(r=5, target_modules=["0", "2"])).save_pretrained(tmp_path)
    tensors = {key: t + 1 if key == "base_model.model.2.randlora_A" else t for key, t in saved(tmp_path).items()}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r'unexpected "base_model\.model\.2\.randlora_A"'):
        ll.from_peft(model, tmp_path)


def test_biases_of_the_whole_model_become_bitfit_and_whole_norms(tmp_path):
    model, batch = _make("gpt2")
    theirs = wrapped(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, bias="all"))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    kinds = {(target.path.rpartition(".")[2], cfg.name) for target, cfg in zip(adapt.targets, adapt.configs)}
    assert kinds == {("c_attn", "lora"), ("c_proj", "bitfit"), ("c_fc", "bitfit"), *((name, "full") for name in ("ln_1", "ln_2", "ln_f"))}
    base = _run(model, batch).detach()
    assert_close(_adapted(adapt, params, batch) - base, _run(theirs, batch) - base)
    ll.to_peft(adapt, params, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert_close(_run(again, batch) - base, _run(theirs, batch) - base)


def test_biases_that_did_not_move_are_left_out(tmp_path):
    model, _ = _make("gpt2")
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True, bias="all")).save_pretrained(
        tmp_path
    )
    adapt, _ = ll.from_peft(model, tmp_path)
    assert {cfg.name for cfg in adapt.configs} == {"lora"}


def test_adalora_after_pruning_is_read_with_zeros_for_what_was_cut(tmp_path):
    model, batch = _make("linear")
    theirs = wrapped(model, peft.AdaLoraConfig(init_r=5, target_r=2, total_step=9, target_modules=["0", "2", "4"]))
    theirs(batch).square().sum().backward()
    for step in range(1, 10):
        theirs.base_model.update_and_allocate(step)
    theirs.save_pretrained(tmp_path)
    ranks = [t.shape[0] for key, t in saved(tmp_path).items() if key.endswith("lora_E")]
    assert sum(ranks) == 6
    adapt, params = ll.from_peft(model, tmp_path)
    assert adapt.shapes["0"] == {"A": (5, 12), "B": (20, 5), "E": (5,)}
    assert [int(params[path]["E"].count_nonzero()) for path in params] == ranks
    base = _run(model, batch).detach()
    assert_close(adapt(params, batch) - base, _run(theirs, batch) - base)


def test_norms_of_delora_are_those_of_the_file(tmp_path):
    model, batch = _make("linear")
    theirs = wrapped(model, THEIRS["delora"](PATHS["linear"], False))
    theirs.base_model.model.get_submodule("0").delora_w_norm["default"].mul_(3)
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    base = _run(model, batch).detach()
    assert_close(adapt(params, batch) - base, _run(theirs, batch) - base)


def test_block_sizes_that_peft_would_give_to_other_layers_are_refused(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "deep": nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})})
    sizes = {"^a$": 2, "^deep": 4}
    adapt = ll.build(model, [ll.C3AConfig(block_size=size, target_names=name) for name, size in sizes.items()])
    with pytest.raises(ValueError, match=r'block_size: 2 at "a", which PEFT takes for "deep\.a" too'):
        ll.to_peft(adapt, adapt.init(), tmp_path / "ours")


def test_writing_again_replaces_both_files_and_leaves_others(tmp_path):
    model, batch = _make("linear")
    (tmp_path / "README.md").write_text("mine")
    for cfg in (ll.LoRAConfig(r=2), ll.DoRAConfig(r=3)):
        adapt = ll.build(model, cfg)
        params = _moved(adapt.init())
        ll.to_peft(adapt, params, tmp_path)
    back, again = ll.from_peft(model, tmp_path)
    torch.testing.assert_close(back(again, batch), adapt(params, batch))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    adapt = ll.build(_make("linear")[0], ll.LoRAConfig())
    with pytest.raises(FileNotFoundError, match="expected the parent of"):
        ll.to_peft(adapt, adapt.init(), tmp_path / "no" / "where")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        ll.to_peft(adapt, adapt.init(), tmp_path / "file")
    with pytest.raises(ValueError, match="to_peft: expected params that fit"):
        ll.to_peft(adapt, {}, tmp_path / "ours")


def test_failed_write_leaves_the_old_files_whole(tmp_path, monkeypatch):
    model, _ = _make("linear")
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    ll.to_peft(adapt, adapt.init(), tmp_path / "ours")
    before = {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()}

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        ll.to_peft(adapt, adapt.init(seed=1), tmp_path / "ours")
    assert {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_layer_whose_path_ends_another_is_named_by_an_expression(tmp_path):
    model = nn.ModuleDict({"0": nn.Linear(8, 8), "deep": nn.ModuleDict({"0": nn.Linear(8, 8)})})
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="^0$"))
    ll.to_peft(adapt, adapt.init(), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_modules"] == "0"  # as an expression it is matched in full; in a list it would take "deep.0" too
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert [path for path, layer in theirs.base_model.model.named_modules() if hasattr(layer, "lora_A")] == ["0"]
