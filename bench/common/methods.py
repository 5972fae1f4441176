"""The one table of variants as the benchmarks run them, each beside PEFT's same method: configs and learning rates.

Every variant of `ll.VARIANTS` takes part with its defaults. A row in `ROWS` says where it differs from them, and names PEFT's config of the
same method or the reason why there is none.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import peft
from peft.tuners.lora.config import CordaConfig

import lora_lite as ll

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # the default targets of our configs


# PEFT's configs, from ours and the layers to adapt


def _lora(cfg: Any, on: Any, **more: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=cfg.r, lora_alpha=cfg.alpha, target_modules=on, **more)


def _kasa(cfg: Any, on: Any) -> peft.PeftConfig | None:
    """Return PEFT's config, or None for a start at the base model, which PEFT lacks."""
    return _lora(cfg, on, kasa_config=peft.KasaConfig(beta=cfg.beta, gamma=cfg.gamma)) if cfg.start == "truncated" else None


def _corda(cfg: Any, on: Any) -> peft.PeftConfig:
    return _lora(cfg, on, init_lora_weights="corda", corda_config=CordaConfig(corda_method=cfg.method))


def _adalora(cfg: Any, on: Any) -> peft.PeftConfig:
    names = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step")
    return peft.AdaLoraConfig(**{n: getattr(cfg, n) for n in names}, lora_alpha=cfg.alpha, target_modules=on)


def _oft(cfg: Any, on: Any) -> peft.PeftConfig:
    series = {"use_cayley_neumann": cfg.cayley == "series", "num_cayley_neumann_terms": cfg.terms}
    return peft.OFTConfig(r=0, oft_block_size=cfg.block_size, target_modules=on, **series)


def _psoft(cfg: Any, on: Any) -> peft.PeftConfig:
    names = {"psoft_orth": cfg.orth, "psoft_mag_b": cfg.mag_b, "psoft_mag_a": cfg.mag_a, "ab_svd_init": cfg.ab_svd_init}
    return peft.PsoftConfig(r=cfg.r, use_cayley_neumann=cfg.cayley == "series", target_modules=on, **names)


def _vera(cfg: Any, on: Any) -> peft.PeftConfig:
    return peft.VeraConfig(r=cfg.r, d_initial=cfg.d_initial, projection_prng_key=cfg.seed, target_modules=on)


def _pvera(cfg: Any, on: Any) -> peft.PeftConfig:
    return peft.PveraConfig(r=cfg.r, d_initial=cfg.d_initial, projection_prng_key=cfg.seed, target_modules=on)


def _tinylora(cfg: Any, on: Any) -> peft.PeftConfig:
    tied = {"weight_tying": cfg.weight_tying, "projection_seed": cfg.seed}
    return peft.TinyLoraConfig(r=cfg.r, u=cfg.u, **tied, target_modules=on)


def _unilora(cfg: Any, on: Any) -> peft.PeftConfig:
    return peft.UniLoraConfig(r=cfg.r, theta_d_length=cfg.theta_d_length, proj_seed=cfg.seed, target_modules=on)


def _frod(cfg: Any, on: Any) -> peft.PeftConfig:
    return peft.FrodConfig(sparse_rate=cfg.sparse_rate, projection_prng_key=cfg.seed, target_modules=on, progressbar=False)


def _loha(cfg: Any, on: Any) -> peft.PeftConfig:
    return peft.LoHaConfig(r=cfg.r, alpha=cfg.alpha, target_modules=on)


def _lokr(cfg: Any, on: Any) -> peft.PeftConfig:
    return peft.LoKrConfig(r=cfg.r, alpha=cfg.alpha, decompose_factor=cfg.decompose_factor, target_modules=on)


def _gralora(cfg: Any, on: Any) -> peft.PeftConfig:
    return peft.GraloraConfig(r=cfg.r, alpha=cfg.alpha, gralora_k=cfg.k, hybrid_r=cfg.hybrid_r, target_modules=on)


def _boft(cfg: Any, on: Any) -> peft.PeftConfig | None:
    """Return PEFT's config, or None for several factors, which PEFT has only where it can compile its CUDA kernel."""
    blocks = {"boft_block_size": cfg.block_size, "boft_block_num": cfg.block_num}
    return peft.BOFTConfig(**blocks, target_modules=on) if cfg.n_butterfly_factor == 1 else None


def _waveft(cfg: Any, on: Any) -> peft.PeftConfig:
    places = {"n_frequency": cfg.n_frequency, "random_loc_seed": cfg.seed}
    return peft.WaveFTConfig(scaling=cfg.scaling, use_idwt=cfg.use_idwt, target_modules=on, **places)


def _randlora(cfg: Any, on: Any) -> peft.PeftConfig:
    options = {"sparse": cfg.sparse, "very_sparse": cfg.very_sparse, "projection_prng_key": cfg.seed}
    return peft.RandLoraConfig(r=cfg.r, randlora_alpha=int(cfg.alpha), target_modules=on, **options)


def _vblora(cfg: Any, on: Any) -> peft.PeftConfig:
    names = ("r", "num_vectors", "vector_length", "topk", "init_vector_bank_bound", "init_logits_std")
    return peft.VBLoRAConfig(**{n: getattr(cfg, n) for n in names}, target_modules=on)


def _lily(cfg: Any, on: Any) -> peft.PeftConfig:
    return peft.LilyConfig(r=cfg.r, stride_A=cfg.stride_A, num_B=cfg.num_B, scaling=cfg.scaling, target_modules=on)


def _delora(cfg: Any, on: Any) -> peft.PeftConfig | None:
    """Return PEFT's config, or None for a start from a frozen copy, which PEFT lacks."""
    return peft.DeloraConfig(r=cfg.r, delora_lambda=cfg.lambda0, target_modules=on) if cfg.start != "copy" else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant that the benchmarks run with other fields than its defaults.

    Attributes:
        fields: from the rank that LoRA has, the fields of the config; `r` and `alpha` are that rank where not given.
        theirs: from our config and a list of target modules, PEFT's config of the same method.
        without: why PEFT has none.
        demo: the fields in the demo's training and in `quality.py`'s; `r=8` and `alpha=8` if not given.
        rate: peak learning rate of the demo's training.
        short_rate: peak learning rate of `quality.py`'s, the best of `--rates` on validation problems; the demo's if not given.
        state: from the adapted model, the state that the first call of the config's `update` takes.
    """

    fields: Callable[[int], dict[str, Any]] = lambda r: {}
    theirs: Callable[[Any, Any], peft.PeftConfig | None] | None = None
    without: str = "PEFT lacks the method."
    demo: Mapping[str, Any] | None = None
    rate: float = 5e-3
    short_rate: float | None = None
    state: Callable[[ll.Adapt], Any] = lambda adapt: None


ROWS: dict[str, Row] = {
    "lora": Row(theirs=_lora, demo={"r": 8, "alpha": 16}, short_rate=1.25e-3),
    "pissa": Row(theirs=partial(_lora, init_lora_weights="pissa"), short_rate=1.25e-3),
    "dora": Row(theirs=partial(_lora, use_dora=True), demo={"r": 8, "alpha": 16}, short_rate=1.25e-3),
    "olora": Row(theirs=partial(_lora, init_lora_weights="olora")),
    "mica": Row(theirs=partial(_lora, init_lora_weights="mica")),
    "ia3": Row(theirs=lambda cfg, on: peft.IA3Config(target_modules=on, feedforward_modules=[]), rate=5e-2, short_rate=2.5e-2),
    "ia3_ff": Row(theirs=lambda cfg, on: peft.IA3Config(target_modules=on, feedforward_modules=on), rate=5e-2),
    "delora": Row(theirs=_delora, demo={"r": 8, "lambda0": 4.0, "start": "copy"}),
    "hra": Row(theirs=lambda cfg, on: peft.HRAConfig(r=cfg.r, target_modules=on), rate=1e-2, short_rate=5e-3),
    "road": Row(
        fields=lambda r: {"group_size": 32},
        theirs=lambda cfg, on: peft.RoadConfig(variant=cfg.variant, group_size=cfg.group_size, target_modules=on),
        demo={"variant": "road_4", "group_size": 32},
        rate=2e-2,
        short_rate=1e-2,
    ),
    "oft": Row(fields=lambda r: {"block_size": max(2, min(32, 2 * r))}, theirs=_oft, demo={"block_size": 16}, short_rate=1.25e-3),
    "lora_xs": Row(fields=lambda r: {"r": 2 * r, "alpha": float(2 * r)}, demo={"r": 32, "alpha": 32}, rate=1e-2, short_rate=2.5e-3),
    "antipasto": Row(fields=lambda r: {"r": 4 * r}, demo={"r": 64}, rate=2e-2, short_rate=1e-2),
    "ssvd": Row(demo={"r": 32}, rate=1e-2, short_rate=2.5e-3),
    "bitfit": Row(theirs=lambda cfg, on: peft.BeftConfig(target_modules=on), rate=2e-2, short_rate=4e-2),
    "eva": Row(
        theirs=lambda cfg, on: _lora(cfg, on, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=cfg.rho)),
        demo={"r": 8, "alpha": 16},
        short_rate=1.25e-3,
    ),
    "corda": Row(theirs=_corda, rate=5e-5, short_rate=2e-4),
    "asvd": Row(short_rate=1.25e-3),
    "loftq": Row(without="It starts from the weight before quantisation, and is LoRA on the dense bases here."),
    "vera": Row(fields=lambda r: {"r": 4 * r}, theirs=_vera, demo={"r": 64}, rate=2e-2, short_rate=8e-2),
    "pvera": Row(fields=lambda r: {"r": 4 * r}, theirs=_pvera, demo={"r": 64}, rate=2e-2),
    "randlora": Row(fields=lambda r: {"r": 4 * r, "alpha": float(8 * r)}, theirs=_randlora, demo={"r": 16, "alpha": 32.0}),
    "vblora": Row(
        fields=lambda r: {"num_vectors": 64, "vector_length": 32},
        theirs=_vblora,
        demo={"num_vectors": 64, "vector_length": 32, "init_vector_bank_bound": 0.1},
    ),
    "lily": Row(fields=lambda r: {"r": 2 * r, "stride_A": 2}, theirs=_lily, demo={"r": 16, "stride_A": 2}),
    "tinylora": Row(fields=lambda r: {"r": 2}, theirs=_tinylora, demo={"r": 2}, rate=2e-2),
    "unilora": Row(theirs=_unilora, demo={"r": 8, "theta_d_length": 4096}, rate=2e-2),
    "abba": Row(fields=lambda r: dict.fromkeys(("r1", "r2"), max(1, r // 2)), rate=1e-3),
    "frod": Row(theirs=_frod, rate=1e-2),
    "adalora": Row(
        fields=lambda r: {"init_r": r * 3 // 2, "target_r": r, "alpha": float(r), "total_step": 1000},
        theirs=_adalora,
        demo={"init_r": 12, "target_r": 8, "deltaT": 10, "alpha": 24.0},
        rate=1e-2,
    ),
    "lora_ga": Row(theirs=lambda cfg, on: _lora(cfg, on, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())),
    "loreft": Row(demo={"r": 8, "positions": "f8+l8"}, rate=1e-2),
    "ln_tuning": Row(theirs=lambda cfg, on: peft.LNTuningConfig(target_modules=".*[nN]orm"), rate=2e-2, short_rate=1.6e-1),
    "loha": Row(theirs=_loha),
    "alora": Row(without="PEFT's acts on texts with an invocation alone; without one it is LoRA.", rate=5e-3),
    "kasa": Row(fields=lambda r: {"start": "truncated"}, theirs=_kasa, demo={"r": 8}, rate=1e-3),
    "lokr": Row(theirs=_lokr),
    "ether": Row(
        theirs=lambda cfg, on: peft.HRAConfig(r=1, target_modules=on) if (cfg.n_blocks, cfg.side) == (1, "in") else None,
        rate=2e-3,
    ),
    "ether_plus": Row(),
    "miss": Row(theirs=lambda cfg, on: peft.MissConfig(r=cfg.r, target_modules=on), rate=1e-2),
    "shira": Row(theirs=lambda cfg, on: peft.ShiraConfig(r=cfg.r, random_seed=cfg.seed, target_modules=on)),
    "hira": Row(theirs=lambda cfg, on: peft.HiraConfig(r=cfg.r, target_modules=on)),
    "gralora": Row(theirs=_gralora),
    "boft": Row(fields=lambda r: {"block_size": 4}, theirs=_boft),
    "c3a": Row(
        fields=lambda r: {"block_size": 64},  # divides all widths of the models here
        theirs=lambda cfg, on: peft.C3AConfig(block_size=cfg.block_size, init_weights=True, target_modules=on),
        rate=1e-1,
    ),
    "fourierft": Row(
        theirs=lambda cfg, on: peft.FourierFTConfig(
            n_frequency=cfg.n_frequency, scaling=cfg.scaling, random_loc_seed=cfg.seed, init_weights=True, target_modules=on
        ),
        rate=5e-2,
    ),
    "waveft": Row(theirs=_waveft, rate=2e-2),
    "goft": Row(rate=1e-2),
    "qgoft": Row(rate=1e-2),
    "psoft": Row(fields=lambda r: {"r": 4 * r}, theirs=_psoft, demo={"r": 32}),
    "clover": Row(fields=lambda r: {"head_dim": max(2, min(32, 2 * r))}, demo={"head_dim": 16}, rate=1e-3),
    "svft": Row(fields=lambda r: {"r": None}, demo={}, rate=5e-2),
    "deft": Row(theirs=lambda cfg, on: peft.DeftConfig(r=cfg.r, decomposition_method=cfg.decomposition_method, target_modules=on)),
    "peanut": Row(theirs=lambda cfg, on: peft.PeanutConfig(r=cfg.r, depth=cfg.depth, act_fn=cfg.act_fn, target_modules=on)),
    "supertuning": Row(
        fields=lambda r: {"r": None, "alpha": None},
        theirs=lambda cfg, on: peft.SupertuningConfig(sparsity=cfg.sparsity, select_top=cfg.select_top, target_modules=on),
    ),
    "osf": Row(
        theirs=lambda cfg, on: peft.OSFConfig(effective_rank=cfg.effective_rank, target_modules=on),
        rate=1e-4,
        state=lambda adapt: adapt.constants,
    ),
    "glora": Row(
        theirs=lambda cfg, on: peft.GloraConfig(
            **{name: getattr(cfg, name) for name in ("r", "config_A_B", "config_C", "config_D_E")}, target_modules=on
        )
    ),
    "adamss": Row(
        fields=lambda r: {"r": 100},
        without="PEFT's needs scikit-learn, which the benchmarks do not install.",
        state=lambda adapt: adapt.constants,
    ),
    "full": Row(
        fields=lambda r: {"target_names": r"(q|v)_proj$"},
        without="Training the weights themselves needs no library.",
        demo={"target_names": r"layers\.\d+\.mlp$"},
        rate=1e-3,
        short_rate=5e-4,
    ),
    "tokens": Row(
        fields=lambda r: {"token_ids": tuple(range(3, 3 + r))},
        theirs=lambda cfg, on: peft.TrainableTokensConfig(token_indices=list(cfg.token_ids)),
        demo={"token_ids": tuple(range(64))},
        rate=5e-2,
    ),
}
"""The variants that run with other fields than their defaults. A variant without a row runs by these, at LoRA's rank."""

METHODS: dict[str, Row] = {name: ROWS.get(name, Row()) for name in ll.VARIANTS}
"""Every variant, as the benchmarks run it."""

MEASURED = [name for name, variant in ll.VARIANTS.items() if not variant.original]
"""The variants that are measured: all but those that start from a weight before quantisation, for these bases are dense."""
FIRST = ("lora", "dora", "pissa", "ia3", "vera", "oft", "hra", "loha", "lokr", "boft", "miss", "bitfit", "ln_tuning", "adalora", "road")
"""The most used variants, which long runs take first."""


# The configs of a variant


def config_of(name: str, r: int, /, **given: Any) -> ll.AdapterConfig:
    """Make a variant's config at LoRA's rank `r`, or the nearest to it; `given` fields come last."""
    cls = ll.VARIANTS[name]
    known = {f.name for f in dataclasses.fields(cls)}
    general = {k: v for k, v in {"r": r, "alpha": float(r)}.items() if k in known}
    return cls(**{**general, **METHODS[name].fields(r), **given})


def demo_config(name: str, steps: int) -> ll.AdapterConfig:
    """Make a variant's config for the demo's training of so many steps, during which AdaLoRA has to end its pruning."""
    cls, own = ll.VARIANTS[name], METHODS[name].demo
    if own is None:
        return config_of(name, 8)
    known = {f.name for f in dataclasses.fields(cls)}
    schedule = {"tinit": steps // 5, "tfinal": steps // 3, "total_step": steps}
    return cls(**{k: v for k, v in schedule.items() if k in known}, **own)


def rank(cfg: ll.AdapterConfig) -> int | None:
    """Return a config's rank, or where there is none its block or group size."""
    return next((getattr(cfg, field) for field in ("r", "init_r", "block_size", "group_size") if hasattr(cfg, field)), None)


def theirs(cfg: ll.AdapterConfig, on: Sequence[str] = LINEAR) -> peft.PeftConfig | None:
    """Return PEFT's config of the same method with the same hyperparameters, or None where it lacks the method."""
    make = METHODS[cfg.name].theirs
    return make(cfg, list(on)) if make is not None else None


def drawn_start(config: peft.PeftConfig) -> bool:
    """Whether PEFT's method starts from drawn numbers: it decomposes no weight and sees no data."""
    decomposed = isinstance(config, peft.PsoftConfig) or getattr(config, "kasa_config", None) is not None
    return getattr(config, "init_lora_weights", True) is True and not decomposed


class Pair(NamedTuple):
    """A variant's config and PEFT's, or None where PEFT lacks the method."""

    cfg: ll.AdapterConfig
    peft: peft.PeftConfig | None


def pairs(r: int) -> dict[str, Pair]:
    """Pair each variant with PEFT's config of the same method on the same layers."""
    configs = [config_of(name, r) for name in MEASURED]
    return {cfg.name: Pair(cfg, theirs(cfg)) for cfg in configs}
