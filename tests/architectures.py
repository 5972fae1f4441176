"""Every model class of transformers that can be made small: LoRA on its default targets, held against the model itself.

python -m pytest tests/test_architectures.py        # a sample
python tests/architectures.py --write              # all of them, minutes, into docs/architectures.json, for the support page
"""

import argparse
import copy
import datetime
import inspect
import json
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers.models.auto import modeling_auto

import lora_lite as ll

PAGE = Path(__file__).parent.parent / "docs" / "architectures.json"
SECONDS, LARGEST = 8, 3_000_000
TASKS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION")
WIDE = ("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim")
INNER = ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim", "n_inner")
DEEP = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
SMALL = {
    **dict.fromkeys(WIDE, 32),
    **dict.fromkeys(INNER, 48),
    **dict.fromkeys(DEEP, 2),
    **dict.fromkeys(HEADS, 4),
    **{"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_positions": 64, "d_kv": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sliding_window": 8, "state_size": 4},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1},
    **{"image_size": 16, "patch_size": 4, "num_channels": 3, "hidden_sizes": [16, 32], "depths": [1, 1]},
}
"""Sizes by the names that configs have for them."""


def classes():
    """Return the names of the model classes, each once."""
    names = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values() for task in TASKS]
    flat = [n for group in names for found in group for n in ([found] if isinstance(found, str) else found)]
    return [name for name in dict.fromkeys(flat) if hasattr(transformers, name)]


def small(name):
    """Make a small model of a class, and a batch for it."""
    cls = getattr(transformers, name)
    own = cls.config_class()
    config = cls.config_class(**{k: v for k, v in SMALL.items() if hasattr(own, k) and not isinstance(getattr(own, k), dict)})
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters at the smallest sizes that this script knows")
    torch.manual_seed(0)
    model = cls(config).eval().requires_grad_(False)  # by a weight with a gradient torch multiplies in another way
    takes = inspect.signature(model.forward).parameters
    if "input_ids" not in takes:
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    batch = {"input_ids": torch.randint(3, 60, (2, 8))}
    return model, {**batch, "decoder_input_ids": torch.randint(3, 60, (2, 6))} if "decoder_input_ids" in takes else batch


def loss(output):
    return output[0].float().square().mean()


def without_gradient(model, batch, paths):
    """Return the targets to whose own weights the model's loss has no gradient: poolers that nothing reads, layers that it never calls."""
    model = copy.deepcopy(model).requires_grad_(True)
    loss(model(**batch)).backward()
    return {p for p in paths if not any(w.grad is not None and w.grad.any() for w in model.get_submodule(p).parameters() if w.dim() > 1)}


def mergeable(adapt, params):
    """Return the merged weights; None where a target's weight is shared with another layer, which `merge` refuses."""
    try:
        return adapt.merge(params)
    except ValueError as e:
        if "is shared with" not in str(e):
            raise
        return None


def check(name):
    """Hold the adapted model of a class against the model itself; return `ok`, or why it was not tried, or was refused."""
    try:
        model, batch = small(name)
        with torch.no_grad():
            want = model(**batch)[0]
            again = model(**batch)[0]
        without_gradient(model, batch, [])
    except TimeoutError:
        raise
    except Exception as e:
        return f"not built: {type(e).__name__}: {str(e).splitlines()[0][:90] if str(e) else ''}"
    if not torch.equal(want, again):
        return "not built: its output is random in evaluation mode"
    before = {key: t.clone() for key, t in model.state_dict().items()}
    try:
        adapt = ll.build(model, ll.LoRAConfig(r=2))
    except ValueError as e:
        return f"refused: {str(e).splitlines()[0][:160]}"
    params = adapt.init()
    with torch.no_grad():
        assert torch.equal(adapt(params, batch)[0], want), "at init it is not the model"
    params = ll.tree_map(lambda p: p + 0.05 * torch.randn_like(p), params)
    grads = ll.value_and_grad(lambda p: loss(adapt(p, batch)))(params)[1]
    dead = {path for path, leaves in grads.items() if not any(leaf.any() for leaf in leaves.values())}
    with torch.no_grad():
        got = adapt(params, batch)[0]
    merged, update = copy.deepcopy(model), mergeable(adapt, params)
    merged.load_state_dict(update or {}, strict=False)
    if update:
        with torch.no_grad():
            off = (merged(**batch)[0] - got).abs().max() / (got - want).abs().max()
        assert off < 1e-3, f"merged it is off by {float(off):.1e} of the change"
    assert dead <= without_gradient(merged, batch, dead), f"no gradient reaches {sorted(dead)[:3]}"
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items()), "the model has changed"
    return "ok"


def main() -> None:
    """Try every class, print the counts, and write the page's file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/architectures.json")
    o = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

    def ring(*args):
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    results = {}
    for name in classes():
        signal.alarm(SECONDS)
        try:
            results[name] = check(name)
        except TimeoutError:
            results[name] = f"not built: takes more than {SECONDS} s"
        except Exception as e:
            results[name] = f"fails: {type(e).__name__}: {str(e).splitlines()[0][:160] if str(e) else ''}"
        finally:
            signal.alarm(0)
    counts = Counter(said.partition(":")[0] for said in results.values())
    print(dict(counts), *(f"{name}: {said}" for name, said in results.items() if said.startswith(("fails", "refused"))), sep="\n")
    if o.write:
        versions = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
        facts = {"date": datetime.date.today().isoformat(), "versions": versions, "results": results}
        PAGE.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    sys.exit(counts["fails"] > 0)


if __name__ == "__main__":
    main()
