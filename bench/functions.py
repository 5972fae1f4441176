"""Time the variants' pure functions by themselves, on bare tensors: forward, `grad` and `vmap`. A part of what `speed.py` measures."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lora_lite as ll
from common import moved
from pairs import build, pairs
from timing import Call, device, interleaved, ratio

MEMBERS = 8


class OneLayer(nn.Module):
    """A model of one linear layer, with a loss for the variants that start from one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(width, width).requires_grad_(False)

    def forward(self, x: Tensor) -> SimpleNamespace:
        logits = self.layer(x)
        return SimpleNamespace(logits=logits, loss=logits.square().mean())


def functions(width: int, tokens: int, r: int, names: Iterable[str], repeats: int) -> dict[str, Any]:
    """Time each variant's function of one layer as a ratio to the frozen layer's, and its `vmap` over members to a loop over them."""
    model, rows = OneLayer(width).to(device()), {}
    x = torch.randn(MEMBERS, tokens, width, generator=torch.Generator().manual_seed(1)).to(device())
    for name in tqdm(list(names), desc="functions", mininterval=5):
        cfg = pairs(r)[name].cfg
        try:
            adapt = build(model, cfg, [{"x": x[0]}])
        except ValueError as e:
            rows[name] = {"left_out": str(e).partition("\n")[0][:120]}  # no function of a linear layer, as with norms
            continue
        params = moved(adapt.init(seed=0))
        if list(params) != ["layer"]:
            rows[name] = {"left_out": "it acts on no linear layer"}
            continue
        constants = {**adapt.constants.get(cfg.name, {}), **adapt.constants["layer"]}
        rows[name] = _times(cfg, params["layer"], ll.Frozen(model.layer.weight, model.layer.bias, constants), x, repeats)
    return {"width": width, "tokens": tokens, "members": MEMBERS, "variants": rows}


def _times(cfg: ll.AdapterConfig, params: Mapping[str, Tensor], W: ll.Frozen, x: Tensor, repeats: int) -> dict[str, Any]:
    stacked = {name: torch.stack([p + 0.01 * k for k in range(len(x))]) for name, p in params.items()}
    members = [{name: p[k] for name, p in stacked.items()} for k in range(len(x))]
    together, one = torch.vmap(lambda p, x: cfg.forward(p, W, x)), x[0]
    grad = torch.func.grad(lambda p, x: cfg.forward(p, W, x).square().mean())

    def loop() -> Tensor:
        return torch.stack([cfg.forward(p, W, row) for p, row in zip(members, x, strict=True)])

    if not torch.allclose(together(stacked, x), loop(), rtol=1e-3, atol=1e-4):
        raise SystemExit(f"bench: expected vmap of {cfg.name} to equal a loop, found others.")
    calls: dict[str, Call] = {
        "frozen": lambda: W(one),
        "forward": lambda: cfg.forward(params, W, one),
        "frozen grad": lambda: torch.func.grad(lambda x: W(x).square().mean())(one),
        "grad": lambda: grad(params, one),
        "loop": loop,
        "vmap": lambda: together(stacked, x),
        "grads in a loop": lambda: [grad(p, row) for p, row in zip(members, x, strict=True)],
        "vmap of grad": lambda: torch.vmap(grad)(stacked, x),
    }
    times = interleaved(calls, repeats, warmup=3)
    over = {"forward": "frozen", "grad": "frozen grad", "vmap": "loop", "vmap of grad": "grads in a loop"}
    return {name: ratio(times, name, beside) for name, beside in over.items()}
