"""Each variant as the benchmarks run it, beside PEFT's same method on the same layers.

A new variant takes part by being in `VARIANTS`: its class is made with `r` and `alpha` where it has these fields, on its own default
targets. A row in `OPTIONS` gives it other values, a row in `THEIRS` a counterpart.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.loraga import preprocess_loraga

import lora_lite as ll

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # what our configs take by default

MEASURED = [name for name, variant in ll.VARIANTS.items() if not variant.original]
"""The variants that are measured: all but what starts from a weight before it was quantised, for these bases are dense. It runs as LoRA."""

OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "adalora": lambda r: {"init_r": r * 3 // 2, "target_r": r, "alpha": float(r), "total_step": 1000},
    "antipasto": lambda r: {"r": 4 * r},
    "lora_xs": lambda r: {"r": 2 * r, "alpha": float(2 * r)},
    "vera": lambda r: {"r": 4 * r},
    "oft": lambda r: {"block_size": max(2, min(32, 2 * r))},
    "road": lambda r: {"group_size": 32},
    "full": lambda r: {"target_names": r"(q|v)_proj$"},
}
"""Fields in which a variant differs, from the rank that LoRA has."""


def _lora(cfg: Any, **more: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=cfg.r, lora_alpha=cfg.alpha, target_modules=list(LINEAR), **more)


def _adalora(cfg: Any) -> peft.PeftConfig:
    names = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step")
    return peft.AdaLoraConfig(**{n: getattr(cfg, n) for n in names}, lora_alpha=cfg.alpha, target_modules=list(LINEAR))


def _oft(cfg: Any) -> peft.PeftConfig:
    series = {"use_cayley_neumann": cfg.cayley == "series", "num_cayley_neumann_terms": cfg.terms}
    return peft.OFTConfig(r=0, oft_block_size=cfg.block_size, target_modules=list(LINEAR), **series)


def _vera(cfg: Any) -> peft.PeftConfig:
    return peft.VeraConfig(r=cfg.r, d_initial=cfg.d_initial, projection_prng_key=cfg.seed, target_modules=list(LINEAR))


THEIRS: dict[str, Callable[[Any], peft.PeftConfig]] = {
    "lora": _lora,
    "dora": partial(_lora, use_dora=True),
    "pissa": partial(_lora, init_lora_weights="pissa"),
    "eva": lambda cfg: _lora(cfg, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=cfg.rho)),
    "corda": lambda cfg: _lora(cfg, init_lora_weights="corda", corda_config=CordaConfig(corda_method=cfg.method)),
    "lora_ga": lambda cfg: _lora(cfg, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()),
    "ia3": lambda cfg: peft.IA3Config(target_modules=list(LINEAR), feedforward_modules=[]),
    "ia3_ff": lambda cfg: peft.IA3Config(target_modules=list(LINEAR), feedforward_modules=list(LINEAR)),
    "delora": lambda cfg: peft.DeloraConfig(r=cfg.r, delora_lambda=cfg.lambda0, target_modules=list(LINEAR)),
    "hra": lambda cfg: peft.HRAConfig(r=cfg.r, target_modules=list(LINEAR)),
    "road": lambda cfg: peft.RoadConfig(variant=cfg.variant, group_size=cfg.group_size, target_modules=list(LINEAR)),
    "oft": _oft,
    "vera": _vera,
    "adalora": _adalora,
    "ln_tuning": lambda cfg: peft.LNTuningConfig(target_modules=".*norm"),
}
"""PEFT's config of the same method with the same hyperparameters."""


class Pair(NamedTuple):
    """A variant's config and PEFT's, or None where PEFT lacks the method."""

    cfg: ll.AdapterConfig
    peft: peft.PeftConfig | None


def theirs(cfg: ll.AdapterConfig) -> peft.PeftConfig | None:
    """Give PEFT's config of a variant, or None where PEFT lacks the method, or DeLoRA's start from a frozen copy."""
    return THEIRS[cfg.name](cfg) if cfg.name in THEIRS and getattr(cfg, "start", None) != "copy" else None


def config_of(name: str, r: int) -> ll.AdapterConfig:
    """Make a variant's config at LoRA's rank `r`, or what comes close."""
    cls = ll.VARIANTS[name]
    fields = {f.name for f in dataclasses.fields(cls)}
    values = {k: v for k, v in {"r": r, "alpha": float(r)}.items() if k in fields}
    return cls(**values | OPTIONS.get(name, lambda r: {})(r))


def rank(cfg: ll.AdapterConfig) -> int | None:
    """Give a config's rank, or where there is none its block or group size."""
    return next((getattr(cfg, field) for field in ("r", "init_r", "block_size", "group_size") if hasattr(cfg, field)), None)


def pairs(r: int) -> dict[str, Pair]:
    """Pair each variant with PEFT's config of the same method on the same layers."""
    configs = [config_of(name, r) for name in MEASURED]
    return {cfg.name: Pair(cfg, theirs(cfg)) for cfg in configs}


def build(model: torch.nn.Module, cfg: ll.AdapterConfig, batches: Sequence[Mapping[str, Any]]) -> ll.Adapt:
    """Adapt the model by a variant; one that is calibrated sees the batches."""
    return ll.build(model, cfg, calibration=batches if cfg.calibrated else None, progress=False)


def peft_model(
    model: torch.nn.Module, config: peft.PeftConfig, batches: Sequence[Mapping[str, Any]] = ()
) -> tuple[Any, list[torch.nn.Parameter]]:
    """Give PEFT's model over a copy of the base, and what it trains."""
    return wrapped(copy.deepcopy(model), config, batches)


def wrapped(base: torch.nn.Module, config: peft.PeftConfig, batches: Sequence[Mapping[str, Any]]) -> tuple[Any, list[torch.nn.Parameter]]:
    """Let PEFT adapt the base in place, with the calibration that the method needs, and give what it trains."""
    start = getattr(config, "init_lora_weights", None)
    if start == "corda":
        from peft.tuners.lora.corda import preprocess_corda  # here, since it imports attrs, which PEFT does not declare

        preprocess_corda(base, config, run_model=lambda: _run(base, batches))
    if start == "lora_ga":
        preprocess_loraga(base.requires_grad_(), config, train_step=lambda: [base(**b).loss.backward() for b in batches])
    adapted = peft.get_peft_model(base, config, low_cpu_mem_usage=start == "eva")  # what PEFT advises for EVA
    if start == "eva":
        tensors = [{name: value for name, value in batch.items() if torch.is_tensor(value)} for batch in batches]
        peft.initialize_lora_eva_weights(adapted, tensors, show_progress_bar=False)
    return adapted, [p for p in adapted.parameters() if p.requires_grad]


@torch.no_grad()
def _run(model: torch.nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
    for batch in batches:
        for ids in batch["input_ids"]:
            model(input_ids=ids[None])  # PEFT's CorDA takes one row at a time
