"""Measure starts from an SVD: by the certified iteration, by the whole decomposition, and as PEFT does, with 4 and 16 power iterations.

PiSSA's on all linear layers of SmolLM2-135M, and of blocks of its widths as drawn: flat spectra, the worst case. Then single layers of 4096
by 4096, whose singular values fall with a power. One thread, rounds interleaved, beside the largest stated bound. Writes a results file.

    python bench/svd_starts.py           # six minutes
    python bench/svd_starts.py --quick   # one block as drawn: shows that all works
"""

import argparse
import copy
import warnings
from typing import Any

import peft
import torch
import transformers
from torch import nn

import lora_lite as ll
from common.measure import Times, device, interleaved, machine, milliseconds, ratio, write
from common.methods import LINEAR
from common.pretrained import SMOLLM, load_smollm
from lora_lite.core.certificate import certified
from lora_lite.core.linalg import truncated_svd

RANK = 16
WIDTH = 4096
POWERS = (1.0, 0.5, 0.0)
ITERATIONS = (4, 16)
"""PEFT's; its docs name 4 for a quick start, 16 for a good one."""


def with_spectrum(weight: torch.Tensor, power: float) -> torch.Tensor:
    """Return a weight with its own singular vectors, and the `j`-th singular value `j^-power`; itself for the power 0."""
    if not power:
        return weight
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U * torch.arange(1, len(S) + 1, device=S.device) ** -power @ Vh


def as_drawn(layers: int) -> nn.Module:
    """Build a Llama with SmolLM2-135M's widths."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes))
    return model.eval().requires_grad_(False).to(device())


def of_model(model: nn.Module, repeats: int) -> dict[str, Any]:
    """Time PiSSA's start on all linear layers of a model."""

    def ours(svd: Any) -> ll.Adapt:
        adapt = ll.build(model, ll.PiSSAConfig(r=RANK, svd=svd), progress=False)
        adapt.init()
        return adapt

    copies = [copy.deepcopy(model) for _ in range(len(ITERATIONS) * (repeats + 1))]  # PEFT changes the model that it adapts

    def theirs(start: Any) -> None:
        peft.get_peft_model(copies.pop(), peft.LoraConfig(r=RANK, target_modules=list(LINEAR), init_lora_weights=start))

    calls: dict[str, Any] = {"ours": lambda: ours("auto"), "exact": lambda: ours("exact")}
    calls |= {f"peft {n}": lambda n=n: theirs(f"pissa_niter_{n}") for n in ITERATIONS}
    starts = ours("auto").starts.values()
    bounds = [start.error for start in starts if start.path != "exact"]
    return {"layers": len(starts), "exact": len(starts) - len(bounds), "bound": max(bounds, default=None)} | of_times(
        interleaved(calls, repeats)
    )


def of_layer(power: float, repeats: int) -> dict[str, Any]:
    """Time the decomposition of one wide layer; PEFT's is torch's randomised one."""
    torch.manual_seed(0)
    W = with_spectrum(torch.randn(WIDTH, WIDTH, device=device()), power)
    calls: dict[str, Any] = {"ours": lambda: certified(W, RANK) or truncated_svd(W, RANK), "exact": lambda: truncated_svd(W, RANK)}
    calls |= {f"peft {n}": lambda n=n: torch.svd_lowrank(W, q=RANK, niter=n) for n in ITERATIONS}
    found = certified(W, RANK)
    facts = {"layers": 1, "exact": int(found is None), "bound": found and found[0].error}
    return facts | of_times(interleaved(calls, repeats, warmup=0))


def of_times(times: Times) -> dict[str, Any]:
    """Return milliseconds, and what ours takes of each other's time."""
    over = {f"over_{name}": ratio(times, "ours", name) for name in times if name != "ours"}
    return {**over, "ms": {name: milliseconds(values) for name, values in times.items()}}


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one block as drawn, one round: shows that all works")
    o = parser.parse_args()
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    torch.set_num_threads(1)
    if o.quick:
        weights = {"as drawn, of SmolLM2's widths": of_model(as_drawn(1), 1)}
    else:
        weights = {SMOLLM: of_model(load_smollm()[0].to(device()), o.repeats)}
        weights["as drawn, of SmolLM2's widths"] = of_model(as_drawn(4), o.repeats)
        for power in POWERS:
            words = f"falling as `j^-{power:g}`" if power else "as drawn"
            weights[f"{WIDTH} by {WIDTH}, {words}"] = of_layer(power, o.repeats)
    write("svd-starts", machine(1, where=device()), {"r": RANK, "weights": weights}, o.quick)


if __name__ == "__main__":
    main()
