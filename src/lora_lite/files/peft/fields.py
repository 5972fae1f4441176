"""The fields of `adapter_config.json`: which are read, which say nothing about the mathematics, and what they are for a layer."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

DEFAULTS: dict[str, dict[str, Any]] = {
    "LORA": {
        **{"r": 8, "lora_alpha": 8, "use_rslora": False, "lora_dropout": 0.0, "use_dora": False},
        **{"init_lora_weights": True, "lora_bias": False, "bias": "none", "alora_invocation_tokens": None},
        "kasa_config": None,
    },
    "IA3": {},
    "BEFT": {},
    "DELORA": {"r": 8, "delora_lambda": 15, "module_dropout": 0.0},
    "HRA": {"r": 8},
    "ROAD": {"variant": "road_1", "group_size": 64},
    "VERA": {"r": 256, "projection_prng_key": 0, "d_initial": 0.1, "vera_dropout": 0.0},
    "PVERA": {"r": 256, "projection_prng_key": 0, "d_initial": 0.1, "pvera_dropout": 0.0},
    "RANDLORA": {
        **{"r": 32, "randlora_alpha": 640, "projection_prng_key": 0, "randlora_dropout": 0.0},
        **{"sparse": False, "very_sparse": False},
    },
    "VBLORA": {
        **{"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2, "vblora_dropout": 0.0},
        **{"init_vector_bank_bound": 0.02, "init_logits_std": 0.1},
    },
    "TINYLORA": {
        **{"r": 2, "u": 64, "weight_tying": 0.0, "projection_seed": 42, "init_v_bound": 0.02, "tinylora_dropout": 0.0},
    },
    "UNILORA": {"r": 4, "theta_d_length": 256, "proj_seed": 42, "init_theta_d_bound": 0.02, "unilora_dropout": 0.0},
    "FROD": {"sparse_rate": 0.01, "regularization_alpha": 1e-3, "projection_prng_key": 0, "frod_dropout": 0.0},
    "ADALORA": {
        **{"init_r": 12, "target_r": 8, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85},
        **{"orth_reg_weight": 0.5, "total_step": None, "lora_alpha": 8, "lora_dropout": 0.0},
    },
    "LN_TUNING": {},
    "LOHA": {"r": 8, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0},
    "LOKR": {
        **{"r": 8, "alpha": 8, "decompose_both": False, "decompose_factor": -1},
        **{"rank_dropout": 0.0, "module_dropout": 0.0, "rank_dropout_scale": False},
    },
    "HIRA": {"hira_dropout": 0.0},
    "GRALORA": {"r": 32, "alpha": 64, "gralora_k": 2, "hybrid_r": 0, "gralora_dropout": 0.0},
    "BOFT": {"boft_dropout": 0.0},
    "TRAINABLE_TOKENS": {},
    "OFT": {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "block_share": False, "coft": False, "eps": 6e-5},
    "MISS": {"r": 64, "mini_r": 1, "init_weights": True, "miss_dropout": 0.0},
    "SHIRA": {"r": 32, "random_seed": None},
    "C3A": {},
    "FOURIERFT": {"scaling": 150.0, "random_loc_seed": 777},
    "WAVEFT": {"scaling": 25.0, "random_loc_seed": 777, "use_idwt": True, "wavelet_family": "db1"},
    "PSOFT": {
        **{"r": 32, "psoft_dropout": 0.0, "ab_svd_init": "psoft_init", "psoft_orth": True, "psoft_mag_b": True, "psoft_mag_a": True},
        **{"use_cayley_neumann": False, "num_cayley_neumann_terms": 5, "cayley_neumann_eps": None},
    },
    "LILY": {"r": 32, "stride_A": 1, "num_B": 2, "scaling": 1.0, "init_weights": True},
    "PEANUT": {"r": 32, "depth": 0, "act_fn": "relu", "scaling": 1.0},
    "SUPERTUNING": {"sparsity": 0.99, "select_top": True, "r": None, "lora_alpha": None, "lora_dropout": 0.0},
    "OSF": {"effective_rank": None},
    "GLORA": {"r": 8, "config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"},
    "ADAMSS": {
        **{"r": 100, "num_subspaces": 5, "subspace_rank": 1, "use_dynamic_rank": False, "svd_threshold": 0.1, "random_seed": 0},
        **{"use_asa": False, "asa_target_subspaces": 50, "init_warmup": 50, "final_warmup": 1000, "mask_interval": 100},
        **{"asa_importance_beta": 0.85, "asa_uncertainty_beta": 0.85, "asa_schedule_exponent": 3.0},
    },
    "DEFT": {"alpha": None, "decomposition_method": "relu", "para": False, "deft_dropout": 0.0},
}
"""The fields that are read, of each PEFT type, with PEFT's defaults."""

PATTERNS = {
    "LORA": {"r": "rank_pattern", "lora_alpha": "alpha_pattern"},
    "LOHA": {"r": "rank_pattern", "alpha": "alpha_pattern"},
    "LOKR": {"r": "rank_pattern", "alpha": "alpha_pattern"},
    "DELORA": {"r": "rank_pattern", "delora_lambda": "lambda_pattern"},
    "C3A": {"block_size": "block_size_pattern"},
    "FOURIERFT": {"n_frequency": "n_frequency_pattern"},
    "WAVEFT": {"n_frequency": "n_frequency_pattern"},
    "OSF": {"effective_rank": "rank_pattern"},
}
"""The fields that a layer may have of its own, with the field that holds the exceptions."""

BY_PATH = {"C3A", "FOURIERFT"}
"""The PEFT types whose exceptions are for one layer where they are its whole path, without the marks of an expression."""

ANY = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
ANY |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "modules_to_save"}
_OF_LORA = {"rank_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
_OF_LORA |= {"trainable_token_indices", "target_parameters", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config"}
_OF_LORA |= {"ensure_weight_tying"}
FREE: dict[str, set[str]] = {
    "LORA": {*_OF_LORA, "alpha_pattern"},
    "ADALORA": {*_OF_LORA, "r", "init_lora_weights", "use_rslora", "alpha_pattern", "lora_bias"},  # it inherits them, and uses none
    "VERA": {"save_projection", "init_weights"},
    "TINYLORA": {"save_projection", "init_weights"},
    "UNILORA": {"save_indices", "init_weights"},
    "FROD": {"save_projection", "init_weights", "progressbar", "runtime_offload_base_weight"},
    "PVERA": {"save_projection", "init_weights", "generator_seed"},  # the seed is of the noise
    "RANDLORA": {"save_projection", "init_weights"},
    "VBLORA": set(),
    "LILY": set(),
    "IA3": {"feedforward_modules", "init_ia3_weights"},
    "DELORA": {"rank_pattern", "lambda_pattern", "init_weights"},
    "HRA": {"init_weights"},
    "BEFT": {"init_weights"},
    "ROAD": {"init_weights"},
    "LN_TUNING": set(),
    "LOHA": {"rank_pattern", "alpha_pattern", "init_weights"},
    "LOKR": {"rank_pattern", "alpha_pattern", "init_weights"},
    "HIRA": {"r", "rank_pattern", "init_weights"},  # PEFT leaves the pattern out; ranks are read off the tensors
    "GRALORA": {"init_weights"},
    "BOFT": {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "init_weights"},  # read off the tensors
    "TRAINABLE_TOKENS": {"token_indices", "init_weights"},
    "OFT": {"r", "oft_block_size", "module_dropout", "init_weights"},  # PEFT does not apply this dropout; blocks are read off the tensors
    "MISS": set(),
    "SHIRA": {"mask_type", "init_weights"},
    "C3A": {"block_size", "block_size_pattern", "init_weights"},  # blocks are read off the tensors
    "FOURIERFT": {"n_frequency", "n_frequency_pattern", "init_weights"},  # as their number is
    "WAVEFT": {"n_frequency", "n_frequency_pattern", "proportional_parameters", "init_weights"},
    "PSOFT": {"psoft_alpha", "psoft_svd_lowrank_niter", "random_seed", "init_weights"},  # PEFT's scale cancels
    "PEANUT": {"init_weights"},
    "SUPERTUNING": {"save_precomputed_indices", "init_weights"},
    "OSF": {"rank_pattern", "target_svd_config", "init_weights"},
    "GLORA": {"init_weights"},
    "ADAMSS": {"init_weights"},
    "DEFT": {"r", "init_weights", "init_scale"},  # r is read off the tensors, since PEFT lowers it to the output's width
}
"""The fields that may have any value, of each PEFT type: what they say is in the tensors, or nothing in the mathematics."""

UNDROPPED = "undropped"
"""A field that no file has: paths of the embeddings, at which PEFT's LoRA drops nothing."""

OFF: tuple[Any, ...] = (None, False, "none", [], {}, "")


def version_of(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the numbers of the PEFT that wrote a file; none where it was older than 0.18, which does not say."""
    return tuple(int(part) for part in re.findall(r"\d+", str(fields.get("peft_version") or ""))[:3])


def shifts_weights(fields: Mapping[str, Any]) -> bool:
    """Whether PEFT takes a start off the layers' own weights, in place."""
    if fields["peft_type"] != "LORA":
        return False
    return fields.get("init_lora_weights") in ("pissa", "olora") or fields.get("kasa_config") not in (None, False)


def carried(fields: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return the fields with patterns that give the layer at `new` the values of `old`."""
    found = dict(fields)
    for name, patterns in PATTERNS.get(fields["peft_type"], {}).items():
        value = resolve(found, name, old)
        if value != resolve(found, name, new):
            found[patterns] = {f"^{re.escape(new)}": value, **(found.get(patterns) or {})}
    return found


def resolve(fields: Mapping[str, Any], name: str, path: str) -> Any:
    """Return a field's value for one layer, by the first pattern that matches the path as PEFT matches, else the common one."""
    for value in of_patterns(fields, name, path):
        return value
    value = fields.get(name)
    return DEFAULTS[fields["peft_type"]].get(name) if value is None else value


def of_patterns(fields: Mapping[str, Any], name: str, path: str) -> Iterator[Any]:
    """Yield a field's values of all patterns that match a layer's path. Where none does, PEFT takes that of the path itself."""
    patterns, found = fields.get(PATTERNS.get(fields["peft_type"], {}).get(name, "")) or {}, False
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            found = True
            yield value
    if not found and path in patterns:
        yield patterns[path]
