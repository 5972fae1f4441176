"""GLoRA: the dense formula for every choice of paths, PEFT's stand-ins of zeros, layers without a bias."""

import itertools

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import lora_lite as ll
from cases import derived, move
from lora_lite.variants.glora import glora

PATHS = [*itertools.product(("lora", "vector", "constant", "none"), ("lora", "vector", "none"), ("vector", "constant", "none"))][:-1]


def _column(params, name, o, i):
    """Return a path as a matrix that broadcasts to `(o, i)`."""
    if f"{name}d" in params:
        return params[f"{name}d"] @ params[f"{name}u"].reshape(params[f"{name}d"].shape[1], -1)
    return params[name].reshape(-1, 1) if name in params else torch.zeros(1, 1, dtype=torch.float64)


CASES = [(paths, bias) for paths in PATHS for bias in (True, False) if bias or paths[0] != "none"]


@pytest.mark.parametrize(("paths", "bias"), CASES)
def test_is_the_papers_weight_and_bias(paths, bias):
    weight, b = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    W = ll.Frozen(weight, b if bias else None)
    start, _ = derived(ll.GLoRAConfig(r=2, **dict(zip(("config_A_B", "config_C", "config_D_E"), paths))), W)
    params = move({"": {name: p.double() for name, p in start.items()}})[""]
    A, B, C, D, E = (_column(params, name, 8, 6) for name in "ABCDE")
    x = torch.randn(5, 6, dtype=torch.float64)
    want = x @ (weight + weight * A + B).t()
    if bias:
        want = want + b + b * D[:, 0] + E[:, 0] + (weight @ C.expand(6, 1))[:, 0]
    torch.testing.assert_close(glora(params, W, x), want, rtol=0, atol=1e-12)


def test_a_layer_without_a_bias_and_without_a_path_is_refused():
    with pytest.raises(ValueError, match=r"GLoRAConfig\.config_A_B: expected a path that this layer has: it has no bias, found 'none'"):
        ll.build(nn.Sequential(nn.Linear(6, 8, bias=False)), ll.GLoRAConfig(config_A_B="none"))
    with pytest.raises(ValueError, match=r'config_A_B: expected another than "none" where config_C and config_D_E are "none"'):
        ll.GLoRAConfig(config_A_B="none", config_C="none", config_D_E="none")


def test_stand_ins_of_zeros_that_hold_numbers_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8))
    peft.get_peft_model(model, peft.GloraConfig(config_A_B="none", target_modules=["0"])).save_pretrained(tmp_path)
    place = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(place)
    tensors["base_model.model.0.glora_A.zeros"][0, 0] = 1.0
    safetensors.torch.save_file(tensors, place)
    with pytest.raises(ValueError, match=r'"base_model\.model\.0\.glora_A\.zeros": expected zeros'):
        ll.from_peft(nn.Sequential(nn.Linear(6, 8)), tmp_path)
