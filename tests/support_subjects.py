"""The subjects of the support matrix: our variants and PEFT's methods behind one face, a function of params and tokens to logits."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lora_lite as ll
from common import methods

RANK = 4  # LoRA's
Params = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """An adapted model.

    Attributes:
        logits: `(params, tokens) -> logits`, pure.
        params: off their start.
        module: the module behind it, PEFT's alone.
        adapt: the function behind it, ours alone.
    """

    logits: Callable[[Params, Tensor], Tensor]
    params: Params
    module: Any = None
    adapt: Any = None

    def loss(self, params: Params, tokens: Tensor) -> Tensor:
        """Return a scalar of the logits."""
        return self.logits(params, tokens).square().mean()

    def members(self, count: int) -> list[Params]:
        """Return several trees off the start."""
        return [moved(self.params, seed) for seed in range(1, count + 1)]


Wrap = Callable[..., Subject]
MILD: dict[str, dict[str, Any]] = {"waveft": {"scaling": 1.0}}
"""Fields of methods whose defaults turn a step of the size that all take here into a change beside which the model is nothing."""


def moved(params: Params, seed: int) -> Params:
    """Move every leaf: at their start most methods are the base model."""
    g = torch.Generator().manual_seed(seed)
    return pytree.tree_map(lambda p: (p + 0.05 * torch.randn(p.shape, generator=g).to(p.dtype)).detach(), params)


def tiny_llama(layers: int = 2) -> nn.Module:
    """Make a Llama of random weights, wide enough for the blocks of 4-bit weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).requires_grad_(False).eval()


def tokens(rows: int = 4) -> Tensor:
    """Draw a batch of tokens."""
    return torch.randint(3, 64, (rows, 6), generator=torch.Generator().manual_seed(1))


def ours(name: str) -> Wrap:
    """Return the way to adapt a model by one of our variants."""
    cfg = methods.config_of(name, RANK, **MILD.get(name, {}))

    def wrap(model: nn.Module, dtype: torch.dtype = torch.float64, **options: Any) -> Subject:
        if cfg.calibrated:
            options["calibration"] = [{"input_ids": tokens(32), "labels": tokens(32), "use_cache": False}]
        if cfg.original:
            options["original"] = {name: 1.01 * t.to(torch.float32) for name, t in tiny_llama().state_dict().items()}
        adapt = ll.build(model, cfg, **options)
        params = ll.tree_map(lambda p: p.to(dtype), adapt.init())
        return Subject(lambda p, ids: adapt(p, ids, use_cache=False).logits, moved(params, 0), adapt=adapt)

    return wrap


def theirs(name: str) -> Wrap:
    """Return the way to adapt a model by PEFT's same method: its trainable parameters swapped in by `functional_call`."""

    def wrap(model: nn.Module, dtype: torch.dtype = torch.float64) -> Subject:
        config = methods.theirs(methods.config_of(name, RANK, **MILD.get(name, {})))
        quantised = any(isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for m in model.modules())
        double = model.dtype == torch.float64  # to which it is cast once made: PEFT's PiSSA takes no float64
        base = model if quantised else copy.deepcopy(model).float() if double else copy.deepcopy(model)
        module = peft.get_peft_model(base, config).eval()
        module = module.double() if double else module
        for p in module.parameters():
            if p.requires_grad:
                p.data = p.data.to(dtype)
        trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad and "ranknum" not in name}  # AdaLoRA counts

        def logits(params: Params, ids: Tensor) -> Tensor:
            return torch.func.functional_call(module, params, (ids,), {"use_cache": False}).logits

        return Subject(logits, moved(trained, 0), module=module)

    return wrap


ROWS: dict[str, dict[str, Wrap]] = {
    "lora_lite": {name: ours(name) for name in ll.VARIANTS},
    "peft": {
        name: theirs(name)
        for name in methods.MEASURED
        if not ll.VARIANTS[name].calibrated and methods.theirs(methods.config_of(name, RANK)) is not None
    },
}
"""Its rows: our variants, and PEFT's same methods; those that start from data are its LoRA from another start, and have none."""
