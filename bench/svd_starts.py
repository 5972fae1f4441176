"""Measure starts from an SVD: PiSSA by the Krylov iteration, by the whole decomposition, and PEFT's with 4 and 16 iterations.

The model has the shapes of SmolLM2-135M's layers, and weights whose singular values fall with a power; with the power 0 they are as drawn,
which is the worst case: flat spectra. Single layers of 4096 by 4096 follow. One thread, rounds interleaved, beside the stated bounds.

    python bench/svd_starts.py                      # a minute a round for the wide layers
    python bench/svd_starts.py --layers 2 --quick   # without these
"""

import argparse
import copy
import json
import warnings
from typing import Any

import peft
import torch
import transformers
from torch import nn

import lora_lite as ll
from common.measure import device, interleaved, spread
from common.methods import LINEAR
from lora_lite.core.leading import certified
from lora_lite.core.linalg import truncated_svd

RANK = 16
POWERS = (1.0, 0.5, 0.0)


def with_spectrum(weight: torch.Tensor, power: float) -> torch.Tensor:
    """Return a weight with its own singular vectors, and the `j`-th singular value `j^-power`; itself for the power 0."""
    if not power:
        return weight
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U * torch.arange(1, len(S) + 1, device=S.device) ** -power @ Vh


def small_llama(layers: int, power: float) -> nn.Module:
    """Build a Llama with SmolLM2-135M's widths."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes))
    for name, module in model.named_modules():
        if name.endswith(LINEAR):
            module.weight.data = with_spectrum(module.weight.data, power)
    return model.eval().requires_grad_(False).to(device())


def of_model(layers: int, power: float, repeats: int) -> dict[str, Any]:
    """Time the start of all linear layers of the model."""
    model = small_llama(layers, power)

    def ours(svd: Any) -> ll.Adapt:
        adapt = ll.build(model, ll.PiSSAConfig(r=RANK, svd=svd), progress=False)
        adapt.init()
        return adapt

    copies = [copy.deepcopy(model) for _ in range(2 * (repeats + 1))]  # PEFT changes the model that it adapts

    def theirs(start: Any) -> None:
        peft.get_peft_model(copies.pop(), peft.LoraConfig(r=RANK, target_modules=list(LINEAR), init_lora_weights=start))

    calls: dict[str, Any] = {svd: lambda svd=svd: ours(svd) for svd in ("auto", "exact")}
    calls |= {f"peft {n}": lambda n=n: theirs(f"pissa_niter_{n}") for n in (4, 16)}
    times = interleaved(calls, repeats)
    line = ours("auto").summary().splitlines()[-1]
    return {"power": power, "layers": layers, "starts": line, "s": {name: spread(values) for name, values in times.items()}}


def of_layer(width: int, power: float, repeats: int) -> dict[str, Any]:
    """Time the decomposition of one wide layer."""
    torch.manual_seed(0)
    W = with_spectrum(torch.randn(width, width, device=device()), power)
    calls: dict[str, Any] = {"auto": lambda: certified(W, RANK), "exact": lambda: truncated_svd(W, RANK)}
    calls["lowrank 16"] = lambda: torch.svd_lowrank(W, q=RANK, niter=16)
    found, times = certified(W, RANK), interleaved(calls, repeats, warmup=0)
    return {"power": power, "width": width, "start": found and found[0]._asdict(), "s": {n: spread(values) for n, values in times.items()}}


def main() -> None:
    """Print each measurement as a line of JSON: medians and spreads in seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="without the wide layers")
    o = parser.parse_args()
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    torch.set_num_threads(1)
    for power in POWERS:
        print(json.dumps(of_model(o.layers, power, o.repeats)), flush=True)
    for power in () if o.quick else POWERS:
        print(json.dumps(of_layer(4096, power, o.repeats)), flush=True)


if __name__ == "__main__":
    main()
