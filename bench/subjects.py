"""Our variants and PEFT's methods behind one face: a function of params and a batch of tokens that gives logits."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.core.statistics import needs_loss

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Params = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """One adapted model.

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
        """Give a scalar of the logits."""
        return self.logits(params, tokens).square().mean()

    def members(self, count: int) -> list[Params]:
        """Give several trees off the start."""
        return [moved(self.params, seed) for seed in range(1, count + 1)]


def moved(params: Params, seed: int) -> Params:
    """Move every leaf: at their start most methods are the base model."""
    g = torch.Generator().manual_seed(seed)
    return torch.utils._pytree.tree_map(lambda p: (p + 0.05 * torch.randn(p.shape, generator=g).to(p.dtype)).detach(), params)


def tiny_llama(layers: int = 2) -> nn.Module:
    """Make a Llama of random weights, wide enough for the blocks of 4-bit weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).requires_grad_(False).eval()


def tokens(rows: int = 4) -> Tensor:
    """Draw a batch of tokens."""
    return torch.randint(3, 64, (rows, 6), generator=torch.Generator().manual_seed(1))


def ours(cfg: ll.AdapterConfig) -> Callable[..., Subject]:
    """Give the way to adapt a model by one of our variants."""

    def wrap(model: nn.Module, dtype: torch.dtype = torch.float64, **options: Any) -> Subject:
        if cfg.calibrated:
            options["calibration"] = [{"input_ids": tokens(32), "use_cache": False}]
        if cfg.original:
            options["original"] = {name: 1.01 * t.to(torch.float32) for name, t in tiny_llama().state_dict().items()}
        if needs_loss(cfg):
            options["loss"] = lambda output, _: output.logits.square().mean()
        adapt = ll.build(model, cfg, **options)
        params = ll.tree_map(lambda p: p.to(dtype), adapt.init())
        return Subject(lambda p, ids: adapt(p, ids, use_cache=False).logits, moved(params, 0), adapt=adapt)

    return wrap


def theirs(config: Callable[[], peft.PeftConfig]) -> Callable[..., Subject]:
    """Give the way to adapt a model by one of PEFT's methods: its trainable parameters swapped in by `functional_call`."""

    def wrap(model: nn.Module, dtype: torch.dtype = torch.float64) -> Subject:
        quantised = any(isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for m in model.modules())
        double = model.dtype == torch.float64  # to which it is cast once made: PEFT's PiSSA takes no float64
        base = model if quantised else copy.deepcopy(model).float() if double else copy.deepcopy(model)
        module = peft.get_peft_model(base, config()).eval()
        module = module.double() if double else module
        for p in module.parameters():
            if p.requires_grad:
                p.data = p.data.to(dtype)
        trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad and "ranknum" not in name}  # AdaLoRA counts

        def logits(params: Params, ids: Tensor) -> Tensor:
            return torch.func.functional_call(module, params, (ids,), {"use_cache": False}).logits

        return Subject(logits, moved(trained, 0), module=module)

    return wrap


def variants() -> dict[str, ll.AdapterConfig]:
    """Give a config of each variant that fits the tiny model."""
    sized = {
        "adalora": {"init_r": 6, "target_r": 3},
        "antipasto": {"r": 16},
        "full": {"target_names": r"layers\.\d+\.mlp$"},
        "oft": {"block_size": 8},
        "road": {"group_size": 8},
    }
    made = {}
    for name, cls in ll.VARIANTS.items():
        fields = sized.get(name, {"r": 4} if hasattr(cls, "r") else {})
        made[name] = cls(**fields)
    return made


def methods() -> dict[str, Callable[[], peft.PeftConfig]]:
    """Give PEFT's config of each variant that it has."""
    on: dict[str, Any] = {"target_modules": LINEAR}
    low: dict[str, Any] = {**on, "r": 4, "lora_alpha": 16}
    return {
        "lora": lambda: peft.LoraConfig(**low),
        "pissa": lambda: peft.LoraConfig(**low, init_lora_weights="pissa"),
        "dora": lambda: peft.LoraConfig(**low, use_dora=True),
        "ia3": lambda: peft.IA3Config(**on, feedforward_modules=[]),
        "ia3_ff": lambda: peft.IA3Config(**on, feedforward_modules=LINEAR),
        "delora": lambda: peft.DeloraConfig(**on, r=4),
        "hra": lambda: peft.HRAConfig(**on, r=4),
        "road": lambda: peft.RoadConfig(**on, variant="road_1", group_size=8),
        "oft": lambda: peft.OFTConfig(**on, r=0, oft_block_size=8),
        "vera": lambda: peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
        "adalora": lambda: peft.AdaLoraConfig(**on, init_r=6, target_r=3, total_step=100),
        "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    }


def quantised(model: nn.Module, bits: int) -> nn.Module:
    """Put bitsandbytes layers in the place of the blocks' linear ones."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in path:
            if bits == 4:
                new: Any = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            model.set_submodule(path, new.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)  # what PEFT goes by
    return model.eval()


def dequantised(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Give a plain model with the weights that a quantised one stands for."""
    dense = tiny_llama()
    for path in layers:
        layer: Any = model.get_submodule(path)
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            weight = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        dense.get_submodule(path).weight.data = weight.float()
    return dense
