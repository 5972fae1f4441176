"""The tables that the tests draw from: a row for each variant configuration, params off their start, tiny models of many families.

A new variant is one row in `CASES`; a new architecture one function in `tiny_models`.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from lora_lite.core.statistics import needs_loss


@dataclass(frozen=True)
class Row:
    """A variant configuration, and the checks of the kit that it is known to fail, each with the reason.

    `draws` says that it draws at random in training mode, by more than dropout.
    """

    id: str
    cfg: ll.AdapterConfig
    fails: Mapping[str, str] = field(default_factory=dict)
    draws: bool = False


COMPILE_ALL = os.environ.get("LORA_LITE_COMPILE") == "every"
"""Whether all is compiled, as `tox -e compiled` does: to trace a step takes seconds, so that the tests have a sample of them."""
COSTLY = () if COMPILE_ALL else ("compiles",)
"""What options of a variant skip of the kit: each variant's first row in `CASES` is compiled."""

NO_STRENGTH = dict.fromkeys(("steered", "proportional"), "A subspace cannot be missing by half.")
SQUARED = {"proportional": "The one vector that is scaled makes up both factors of the update, or a reflection, which is even in it."}

CASES = (
    Row("lora", ll.LoRAConfig(r=4)),
    Row("lora-rank-one", ll.LoRAConfig(r=1, alpha=3.0)),
    Row("lora-rank-above-width", ll.LoRAConfig(r=40)),
    Row("lora-rslora", ll.LoRAConfig(r=4, alpha=8.0, rslora=True)),
    Row("lora-dropout", ll.LoRAConfig(r=4, dropout=0.3)),
    Row("lora-gaussian", ll.LoRAConfig(r=4, start="gaussian")),
    Row("lora-orthogonal", ll.LoRAConfig(r=4, start="orthogonal")),
    Row("lora-bias", ll.LoRAConfig(r=4, lora_bias=True)),
    Row("lora-own-bias", ll.LoRAConfig(r=4, bias=True)),
    Row("lora-float64", ll.LoRAConfig(r=4, dtype=torch.float64)),
    Row("lora-bfloat16", ll.LoRAConfig(r=4, dtype=torch.bfloat16)),
    Row("pissa", ll.PiSSAConfig(r=4)),
    Row("pissa-full-rank", ll.PiSSAConfig(r=24, alpha=6.0)),
    Row("olora", ll.OLoRAConfig(r=4)),
    Row("olora-full-rank", ll.OLoRAConfig(r=24, alpha=6.0)),
    Row("mica", ll.MiCAConfig(r=4)),
    Row("mica-rslora-dropout", ll.MiCAConfig(r=4, alpha=3.0, rslora=True, dropout=0.3)),
    Row("dora", ll.DoRAConfig(r=4)),
    Row("dora-rslora", ll.DoRAConfig(r=4, alpha=4.0, rslora=True)),
    Row("dora-dropout", ll.DoRAConfig(r=4, dropout=0.3)),
    Row("ia3", ll.IA3Config()),
    Row("ia3-ff", ll.IA3FFConfig()),
    Row("delora", ll.DeLoRAConfig(r=4)),
    Row("delora-copy", ll.DeLoRAConfig(r=4, init="copy")),
    Row("hra", ll.HRAConfig(r=4)),
    Row("hra-out", ll.HRAConfig(r=4, side="out")),
    *(Row(name.replace("_", "-"), ll.ROADConfig(variant=name, group_size=8)) for name in ("road_1", "road_2", "road_4")),
    Row("oft", ll.OFTConfig(block_size=8)),
    Row("oft-exact", ll.OFTConfig(block_size=8, cayley="exact")),
    Row("lora-xs", ll.LoRAXSConfig(r=8, alpha=8.0)),
    Row("ssvd", ll.SSVDConfig(r=8)),
    *(Row(f"antipasto-{core}", ll.AntiPaSTOConfig(r=16, core=core)) for core in ("rotation", "gain", "ablate", "arrow", "dplr")),
    Row("antipasto-both", ll.AntiPaSTOConfig(r=16, rotate_basis="both")),
    *(Row(f"antipasto-{basis}", ll.AntiPaSTOConfig(r=16, basis=basis)) for basis in ("wanda", "corda", "asvd")),
    Row("bitfit", ll.BitFitConfig()),
    Row("eva", ll.EVAConfig(r=4)),
    Row("eva-uncentred-whitened", ll.EVAConfig(r=4, center=False, whiten=True)),
    Row("eva-redistributed", ll.EVAConfig(r=4, rho=2.0)),
    *(Row(f"corda-{method}", ll.CorDAConfig(r=4, method=method)) for method in ("ipm", "kpm")),
    Row("corda-unscaled", ll.CorDAConfig(r=4, alpha=3.0, scaled=False)),
    Row("asvd", ll.ASVDConfig(r=4)),
    Row("loftq", ll.LoftQConfig(r=4)),
    Row("loftq-alpha", ll.LoftQConfig(r=3, alpha=12.0)),
    Row("vera", ll.VeRAConfig(r=8)),
    Row("pvera", ll.PVeRAConfig(r=8), draws=True),
    Row("randlora", ll.RandLoRAConfig(r=8, alpha=16.0)),
    Row("randlora-odd-rank", ll.RandLoRAConfig(r=7, alpha=16.0, sparse=True)),
    Row("randlora-very-sparse", ll.RandLoRAConfig(r=8, alpha=16.0, very_sparse=True, dropout=0.3)),
    Row("vblora", ll.VBLoRAConfig(num_vectors=12, vector_length=4), SQUARED),
    Row("vblora-top-three", ll.VBLoRAConfig(r=3, num_vectors=7, vector_length=2, topk=3, dropout=0.3), SQUARED),
    Row("vblora-random", ll.VBLoRAConfig(num_vectors=12, vector_length=4, start="random"), SQUARED),
    Row("alora", ll.ALoRAConfig(r=4)),
    Row("kasa", ll.KaSAConfig(r=4)),
    Row("kasa-truncated", ll.KaSAConfig(r=3, rslora=True, start="truncated")),
    Row("lily", ll.LilyConfig(r=4)),
    Row("lily-strided", ll.LilyConfig(r=3, stride_A=2, num_B=3, scaling=0.7, start="random")),
    Row("tinylora", ll.TinyLoRAConfig(u=5)),
    Row("tinylora-tied-dropout", ll.TinyLoRAConfig(r=3, u=4, weight_tying=1.0, dropout=0.3)),
    Row("tinylora-uniform", ll.TinyLoRAConfig(r=30, u=3, start="uniform")),
    Row("unilora", ll.UniLoRAConfig(theta_d_length=400)),
    Row("unilora-random", ll.UniLoRAConfig(r=3, theta_d_length=15, start="random"), SQUARED),
    Row("unilora-dropout", ll.UniLoRAConfig(r=2, theta_d_length=301, dropout=0.3)),
    Row("abba", ll.ABBAConfig(r1=3, r2=2)),
    Row("abba-dense", ll.ABBAConfig(r1=6, r2=5, alpha1=2.0, alpha2=3.0)),
    Row("frod", ll.FRoDConfig()),
    Row("frod-sparse-dropout", ll.FRoDConfig(sparse_rate=0.0015, dropout=0.3)),
    Row("adalora", ll.AdaLoRAConfig(init_r=6, target_r=3)),
    Row("lora-ga", ll.LoRAGAConfig(r=4)),
    Row("lora-ga-official", ll.LoRAGAConfig(r=4, direction="random", scale_start="weight_svd", recipe="official")),
    Row("loreft", ll.LoReFTConfig(r=4)),
    Row("loreft-identity", ll.LoReFTConfig(r=4, positions="l1", start="identity")),
    Row("ln-tuning", ll.LNTuningConfig()),
    Row("loha", ll.LoHaConfig(r=2)),
    Row("loha-dense", ll.LoHaConfig(r=6, alpha=3.0)),
    Row("loha-dropout", ll.LoHaConfig(r=2, rank_dropout=0.3, module_dropout=0.2)),
    Row("lokr", ll.LoKrConfig(r=2)),
    Row("lokr-full", ll.LoKrConfig(r=8, start="lycoris")),
    Row("lokr-both", ll.LoKrConfig(r=1, alpha=3.0, decompose_both=True, start="lycoris")),
    Row("lokr-factor", ll.LoKrConfig(r=2, decompose_factor=4)),
    Row("lokr-dropout", ll.LoKrConfig(r=2, rank_dropout=0.3, rank_dropout_scale=True, module_dropout=0.2)),
    Row("ether", ll.ETHERConfig(), SQUARED),
    Row("ether-blocks", ll.ETHERConfig(n_blocks=4), SQUARED),
    Row("ether-out", ll.ETHERConfig(side="out"), SQUARED),
    Row("ether-out-blocks", ll.ETHERConfig(n_blocks=4, side="out"), SQUARED),
    Row("ether-plus", ll.ETHERPlusConfig()),
    Row("ether-plus-blocks", ll.ETHERPlusConfig(n_blocks=4)),
    Row("ether-plus-in", ll.ETHERPlusConfig(n_blocks=2, sides="in")),
    Row("miss", ll.MiSSConfig(r=8)),
    Row("miss-padded-dropout", ll.MiSSConfig(r=7, dropout=0.3)),
    Row("miss-mini", ll.MiSSConfig(r=8, mini_r=4, init="mini")),
    Row("miss-bat", ll.MiSSConfig(r=8, init="bat", dropout=0.3)),
    Row("shira", ll.SHiRAConfig(r=3)),
    Row("shira-seeded", ll.SHiRAConfig(r=2, seed=5)),
    Row("hira", ll.HiRAConfig(r=4)),
    Row("hira-dropout", ll.HiRAConfig(r=4, dropout=0.3)),
    Row("gralora", ll.GraLoRAConfig(r=4)),
    Row("gralora-hybrid", ll.GraLoRAConfig(r=4, k=4, hybrid_r=2, dropout=0.3)),
    Row("boft", ll.BOFTConfig(block_size=4)),
    Row("boft-factors", ll.BOFTConfig(block_size=4, n_butterfly_factor=3)),
    Row("boft-blocks", ll.BOFTConfig(block_size=0, block_num=8, n_butterfly_factor=2, block_dropout=0.3)),
    Row("c3a", ll.C3AConfig(block_size=8)),
    Row("c3a-xavier", ll.C3AConfig(block_size=4, init="xavier_uniform")),
    Row("fourierft", ll.FourierFTConfig(n_frequency=50)),
    Row("fourierft-normal", ll.FourierFTConfig(n_frequency=40, scaling=20.0, seed=3, init="normal")),
    Row("waveft", ll.WaveFTConfig(n_frequency=50)),
    Row("waveft-sparse", ll.WaveFTConfig(n_frequency=40, scaling=4.0, seed=3, use_idwt=False)),
    Row("boft-blocks", ll.BOFTConfig(block_size=0, block_num=4, n_butterfly_factor=2, block_dropout=0.3)),
    Row("tokens", ll.TokensConfig(token_ids=(18, 4, 21))),
    Row("goft", ll.GOFTConfig()),
    Row("goft-norms-tanh", ll.GOFTConfig(norms=True, angle="tanh")),
    Row("qgoft", ll.QGOFTConfig()),
    Row("qgoft-norms", ll.QGOFTConfig(norms=True)),
    Row("svft", ll.SVFTConfig()),
    Row("svft-r", ll.SVFTConfig(r=8)),
    Row("svft-banded", ll.SVFTConfig(pattern="banded", off_diag=2)),
    Row("svft-random", ll.SVFTConfig(pattern="random", off_diag=2)),
    Row("svft-random-start", ll.SVFTConfig(start="random")),
    Row("psoft", ll.PSOFTConfig(r=8)),
    Row("psoft-plain", ll.PSOFTConfig(r=8, mag_a=False, mag_b=False, ab_svd_init="pissa_init")),
    Row("psoft-free", ll.PSOFTConfig(r=8, orth=False, mag_a=False)),
    Row("psoft-series", ll.PSOFTConfig(r=8, cayley="series", terms=4)),
    Row("psoft-bound", ll.PSOFTConfig(r=8, cayley="series", eps=0.3, dropout=0.1)),
    Row("clover", ll.CLOVERConfig(head_dim=8)),
    Row("clover-free", ll.CLOVERConfig(head_dim=8, core="free")),
    Row("deft", ll.DEFTConfig(r=4)),
    Row("deft-qr-dropout", ll.DEFTConfig(r=4, decomposition_method="qr", alpha=6.0, dropout=0.3)),
    *(Row(f"deft-para-{m}", ll.DEFTConfig(r=4, decomposition_method=m, para=True), NO_STRENGTH) for m in ("relu", "qr")),
    Row("peanut", ll.PEANuTConfig(r=4)),
    Row("peanut-deep", ll.PEANuTConfig(r=4, depth=2, act_fn="tanh", scaling=0.7)),
    Row("supertuning-supra", ll.SuperTuningConfig(sparsity=0.9, r=3, dropout=0.3)),
    Row("supertuning", ll.SuperTuningConfig()),
    Row("supertuning-bottom", ll.SuperTuningConfig(sparsity=0.9, select_top=False)),
    Row("osf", ll.OSFConfig()),
    Row("osf-rank", ll.OSFConfig(effective_rank=5)),
    Row("glora", ll.GLoRAConfig(r=4)),
    Row("glora-vector", ll.GLoRAConfig(r=4, config_A_B="vector", config_C="vector", config_D_E="vector")),
    Row("glora-constant", ll.GLoRAConfig(r=4, config_A_B="constant", config_C="none")),
    Row("glora-weight", ll.GLoRAConfig(r=4, config_C="none", config_D_E="none")),
    Row("adamss", ll.AdaMSSConfig(r=8)),
    Row("adamss-ranks", ll.AdaMSSConfig(r=6, num_subspaces=4, subspace_rank=2)),
    Row("full", ll.FullConfig(target_names=r"^\d$")),
)

FIVE = (ll.LoRAConfig(r=4), ll.PiSSAConfig(r=4), ll.DoRAConfig(r=4), ll.IA3Config(), ll.IA3FFConfig())
"""The core variants, for tests over whole models that would take too long for all."""


FIRST = tuple({row.cfg.name: row for row in reversed(CASES)}.values())[::-1]
"""The first row of each variant, for tests over whole models: the kit holds what options change."""

EVERY = (*((row, torch.float64) for row in FIRST), *((Row(cfg.name, cfg), torch.float32) for cfg in FIVE))
"""Each variant in float64, where nothing hides in rounding, and the core variants in float32 too."""

ACROSS = tuple((row, dtype, name) for row, dtype in EVERY for name in ("llama", "bert", "t5") if name != "bert" or dtype == torch.float32)
"""These on a decoder and on an encoder with its decoder, and the core variants on an encoder alone."""


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error of a value, relative to the largest one it is made of, by dtype."""


def by_name(cfg: ll.AdapterConfig) -> str:
    """Name a config in a test's id."""
    return cfg.name


def named(part: Row | torch.dtype) -> str:
    """Name a row and a dtype in a test's id."""
    return part.id if isinstance(part, Row) else str(part).removeprefix("torch.")


@contextlib.contextmanager
def saved_beside(own):
    """Note the storages that autograd keeps for a backward pass beside those of `own` tensors: `{address: storage}`, filled on the way."""
    places, seen = {t.untyped_storage().data_ptr() for t in own}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in places:
            seen[storage.data_ptr()] = storage  # held, so that no two have one address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield seen


def move(params, seed: int = 0, scale: float = 0.1):
    """Move every leaf of a params tree off its start: at init most variants are the identity and a wrong formula passes."""
    generator = torch.Generator().manual_seed(seed)

    def moved(leaf):
        step = scale * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        return leaf + step.to(leaf.device, leaf.dtype)

    return {path: {name: moved(leaf) for name, leaf in leaves.items()} for path, leaves in params.items()}


class Blocks(nn.Module):
    """Two blocks with a norm: something of every sort that a variant may adapt."""

    def __init__(self, i: int = 48, o: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(i, o), nn.Tanh(), nn.Linear(o, i, bias=False), nn.LayerNorm(i)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def derived(cfg: ll.AdapterConfig, W: ll.Frozen, *stats):
    """Return a layer's params at their start, and its constants, as a build derives them."""
    constants = cfg.constants(W, torch.Generator().manual_seed(0), *stats)
    return cfg.init(W.with_constants(constants), torch.Generator().manual_seed(0)), constants


def build_any(model: nn.Module, cfg: ll.AdapterConfig, batches, **options) -> ll.Adapt:
    """Build any row's variant: on data and with a loss where it needs them; a whole module, and a table of tokens, is one linear layer."""
    if cfg.adapts == "module" or ("rows" in cfg.uses and not hasattr(model, "get_input_embeddings")):
        path = next(path for path, m in model.named_modules() if isinstance(m, nn.Linear))
        cfg = dataclasses.replace(cfg, target_names=f"^{re.escape(path)}$")
    options |= {"calibration": batches} if cfg.calibrated else {}
    if cfg.original:
        weights = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}  # tied ones under all their names
        options["original"] = {name: t + 0.01 * torch.randn_like(t) for name, t in weights.items()}
    if needs_loss(cfg):
        options["loss"] = lambda output, batch: tensors_of(output)[0].square().mean()
    return ll.build(model, cfg, **options)


def tensors_of(output) -> list[torch.Tensor]:
    """Return every tensor in a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []


def assert_trees_equal(got, want, tolerance: float = 0.0) -> None:
    """Hold two params trees against each other: the same keys, and leaves equal to the bit or to a tolerance."""
    assert {path: list(leaves) for path, leaves in got.items()} == {path: list(leaves) for path, leaves in want.items()}
    for path, leaves in want.items():
        for name, leaf in leaves.items():
            error = float((got[path][name] - leaf).abs().max())
            bound = tolerance * max(1.0, float(leaf.abs().max()))
            assert error <= bound, f"{path}.{name}: {error:.1e} off, allowed {bound:.1e}"


def in_dtype(params, dtype: torch.dtype):
    """Return params in float64 for a run in float64, where nothing hides in rounding; else in the config's own dtype."""
    return ll.tree_map(lambda p: p.to(dtype), params) if dtype == torch.float64 else params


def assert_gradients_equal(got, want, dtype: torch.dtype) -> None:
    """Hold the gradients of a run in `dtype` against each other, relative to the largest of the tree, or to 1 in float32."""
    largest = max(float(leaf.abs().max()) for leaf in ll.tree_leaves(want))
    assert largest > 1e-8, "a gradient that is not there proves nothing"
    rounded = any(leaf.dtype == torch.bfloat16 for leaf in ll.tree_leaves(want))  # as the params are
    scale, tolerance = (largest, 1e-9) if dtype == torch.float64 else (max(1.0, largest), 1e-2 if rounded else 1e-6)
    assert_trees_equal(*(ll.tree_map(lambda leaf: leaf / scale, tree) for tree in (got, want)), tolerance)


# The models. Each function makes a model with random weights from a config, and a small batch for it.

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _ids(length: int = 7) -> torch.Tensor:
    return torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(1))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _text_batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _text(model: str, config: str, **fields):
    def make(**overrides):
        torch.manual_seed(0)
        settings = getattr(tf, config)(**{**_TEXT, **_TOKENS, **fields, **overrides})
        return getattr(tf, model)(settings), {**_text_batch(), "labels": _ids()}

    return make


def _other(model: str, config: str, batch: Callable[[], dict[str, torch.Tensor]], **fields):
    def make(**overrides):
        torch.manual_seed(0)
        return getattr(tf, model)(getattr(tf, config)(**{**fields, **overrides})), batch()

    return make


tiny_models: dict[str, Callable[..., tuple[nn.Module, dict[str, torch.Tensor]]]] = {
    "llama": _text("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2),
    "mistral": _text("MistralForCausalLM", "MistralConfig", num_key_value_heads=2, sliding_window=4),
    "qwen3": _text("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=8),
    "qwen3_moe": _text(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
    "gemma3": _text("Gemma3ForCausalLM", "Gemma3TextConfig", num_key_value_heads=2, head_dim=8, sliding_window=4),
    "gemma3n": _text(
        *("Gemma3nForCausalLM", "Gemma3nTextConfig"),
        **{"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "num_kv_shared_layers": 2},
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
        **{"altup_num_inputs": 4, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "phi": _text("PhiForCausalLM", "PhiConfig"),
    "opt": _text("OPTForCausalLM", "OPTConfig", ffn_dim=64, word_embed_proj_dim=32),
    "gpt_neox": _text("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "gpt2": _text("GPT2LMHeadModel", "GPT2Config"),
    "falcon": _text("FalconForCausalLM", "FalconConfig", bias=True),
    "bert": _text("BertForMaskedLM", "BertConfig"),
    "roberta": _text("RobertaForMaskedLM", "RobertaConfig"),
    "deberta_v2": _text("DebertaV2ForMaskedLM", "DebertaV2Config", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "modernbert": _text(
        "ModernBertForMaskedLM", "ModernBertConfig", local_attention=4, reference_compile=False, cls_token_id=1, sep_token_id=2
    ),
    "t5": _other(
        *("T5ForConditionalGeneration", "T5Config", lambda: {**_text_batch(), "labels": _ids(5)}),
        **{"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bart": _other(
        *("BartForConditionalGeneration", "BartConfig", lambda: {**_text_batch(), "labels": _ids(5)}),
        **{
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
        **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, **_TOKENS, "decoder_start_token_id": 2},
    ),
    "vit": _other(
        *("ViTForImageClassification", "ViTConfig", lambda: {"pixel_values": _noise(2, 3, 16, 16), "labels": torch.tensor([0, 1])}),
        **{**_IMAGE, "num_labels": 8},
    ),
    "swin": _other(
        *("SwinForImageClassification", "SwinConfig", lambda: {"pixel_values": _noise(2, 3, 16, 16), "labels": torch.tensor([0, 1])}),
        **{"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "num_labels": 8},
    ),
    "clip": _other(
        *("CLIPModel", "CLIPConfig", lambda: {**_text_batch(), "pixel_values": _noise(2, 3, 16, 16)}),
        **{"text_config": {**_TEXT, **_TOKENS}, "vision_config": _IMAGE, "projection_dim": 16},
    ),
    "whisper": _other(
        *("WhisperForConditionalGeneration", "WhisperConfig", lambda: {"input_features": _noise(2, 8, 24), "labels": _ids(5)}),
        **{"vocab_size": 64, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
        **{
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_source_positions": 12,
            "max_target_positions": 16,
        },
        **{**_TOKENS, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    "wav2vec2": _other(
        *("Wav2Vec2ForCTC", "Wav2Vec2Config", lambda: {"input_values": _noise(2, 160)}),
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{
            "conv_dim": (16, 16),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 2),
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
}
"""Model family -> a function giving `(model, batch)`; its keywords override the config's fields."""


def padded(tiny, name: str, **overrides):
    """Return a model that every row of `CASES` fits, and four rows of different lengths without labels."""
    model, batch = tiny(name, **({"num_key_value_heads": 4} if name == "llama" else {}), **overrides)
    batch = {k: torch.cat([v, v.flip(0)]) for k, v in batch.items()}
    labels = batch.pop("labels")
    if name == "t5":
        batch["decoder_input_ids"] = labels
    mask = torch.ones_like(batch["input_ids"])
    for row in range(len(mask)):
        mask[row, len(mask[row]) - row :] = 0
    return model, {**batch, "attention_mask": mask}


def row_of(batch, row: int):
    """Return one row of a batch as a batch."""
    return {name: value[row : row + 1] for name, value in batch.items()}


class C3AForward:
    """PEFT's forward of C3A, to be differentiated by torch: PEFT's own backward gives a wrong gradient to the input."""

    @staticmethod
    def apply(x, w):
        """Return `C x` as PEFT computes it."""
        blocks = x.unflatten(-1, w.shape[1:])
        return torch.fft.fft(torch.einsum("...nb,mnb->...mb", torch.fft.ifft(blocks), torch.fft.fft(w))).real.flatten(-2)


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(ll.AdapterConfig):
    """A bias beside the layer, from outside the package: name, init and forward, nothing else."""

    name: ClassVar[str] = "shift"

    def init(self, W, generator):
        return {"d": torch.zeros(W.out_features)}

    def forward(self, params, W, x):
        return W(x) + params["d"]
