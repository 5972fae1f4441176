"""Measure a LoRA step on 4-bit and 8-bit bases beside PEFT's and the frozen base's, and write a results file.

One run, one thread, interleaved rounds: ratios within a round are compared. The model is in training mode, where both libraries compute
the same map; that their losses and gradients agree is checked first.

    python bench/quantised.py            # the sizes of the documentation
    python bench/quantised.py --quick    # half a minute
"""

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

import lora_lite as ll
from common.contenders import frozen_step, peft_model
from common.measure import Job, Part, batch_of, device, interleaved, llama, moved, peak_bytes, ratio, ratios, run, sizes_of
from common.methods import pairs

LAYERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "4-bit": lambda layer: bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
    ),
    "8-bit": lambda layer: bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False),
}

SIZES = {
    "quick": {"width": 256, "layers": 2, "rows": 4, "tokens": 64},
    "cpu": {"width": 512, "layers": 4, "rows": 4, "tokens": 64},
    "cuda": {"width": 1024, "layers": 4, "rows": 16, "tokens": 512},
}
TOLERANCE = {("4-bit", "cpu"): 1e-5, ("8-bit", "cpu"): 1e-5, ("4-bit", "cuda"): 1e-5, ("8-bit", "cuda"): 0.1}
"""Largest difference of a gradient from PEFT's: on a GPU its 8-bit layers round the activations to eight bits too, ours do not."""


def quantised(model: Any, bits: str) -> Any:
    """Return a copy of a model with the linear layers of its blocks quantised, in training mode."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            packed = LAYERS[bits](layer)
            packed.load_state_dict(layer.state_dict())
            model.set_submodule(name, packed.to(device()))
    setattr(model, {"4-bit": "is_loaded_in_4bit", "8-bit": "is_loaded_in_8bit"}[bits], True)  # where PEFT looks
    return model.requires_grad_(False).train()


def steps(model: Any, bits: str, batch: dict[str, Any], r: int) -> dict[str, Callable[[], Any]]:
    """Return one step, forward and backward, of the frozen base (to its input), of ours and of PEFT's."""

    cfg, peft_cfg = pairs(r)["lora"]
    adapt = ll.build(model, cfg)
    params = moved(adapt.init(seed=0))
    theirs, trained = peft_model(model, peft_cfg)
    with torch.no_grad():
        for path, leaves in params.items():
            layer = theirs.base_model.model.get_submodule(path)
            layer.lora_A.default.weight.copy_(leaves["A"])
            layer.lora_B.default.weight.copy_(leaves["B"])
    step = ll.value_and_grad(lambda p: adapt(p, batch).loss)
    _agree(step(params)[1], torch.autograd.grad(theirs(**batch).loss, trained), TOLERANCE[bits, device().type])
    return {
        "frozen": lambda: frozen_step(model, batch),
        "lora": lambda: step(params),
        "peft lora": lambda: torch.autograd.grad(theirs(**batch).loss, trained),
    }


def _agree(ours: Any, theirs: Any, tolerance: float) -> None:
    error = max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in zip(ll.tree_leaves(ours), theirs, strict=True))
    if error > tolerance:
        raise SystemExit(f"quantised: expected the same gradients from both libraries to {tolerance:.0e}, found them {error:.1e} apart.")


def compared(bits: str, sizes: dict[str, int], r: int, repeats: int) -> dict[str, Any]:
    """Time the steps and take their peak memory."""
    model = quantised(llama(sizes["width"], sizes["layers"]), bits)
    calls = steps(model, bits, batch_of(sizes["rows"], sizes["tokens"]), r)
    times = interleaved(calls, repeats)
    return {
        **sizes,
        "r": r,
        "over_frozen": ratios(times, "frozen"),
        "over_peft": ratio(times, "lora", "peft lora"),
        "peak_bytes": {name: peak_bytes(call) for name, call in calls.items()},
    }


def measure(sizes: dict[str, int], repeats: int) -> dict[str, Any]:
    """Do all measurements once, in this process."""
    torch.set_num_threads(1)
    return {bits: compared(bits, sizes, r=16, repeats=repeats) for bits in LAYERS}


def part(options: Sequence[str] | None = None) -> Part:
    """Read the options, the command line's if not given, and say what is to be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions of small sizes")
    parser.add_argument("--repeats", type=int, default=6, help="rounds of each measurement in each process")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes")
    o = parser.parse_args(options)
    repeats, processes = (5, 1) if o.quick else (o.repeats, o.processes)
    return Part("quantised", [Job(measure, (sizes_of(SIZES, o), repeats), processes)], show, o.quick)


def show(results: Mapping[str, Any]) -> None:
    """Print the ratios and the peaks."""
    for bits, found in results.items():
        lora, over = found["over_frozen"]["lora"], found["over_peft"]
        print(f"{bits}: {lora['median']:.3f} of the frozen step; {over['median']:.3f} [{over['low']:.3f}, {over['high']:.3f}] of PEFT's")
        for name, size in found["peak_bytes"].items():
            print(f"  peak {size / 2**20:8.1f} MiB  {name}")


if __name__ == "__main__":
    run([part()])
