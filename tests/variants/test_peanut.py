"""PEANuT: the dense update as the paper builds it, its cost, the activations, PEFT's files that cannot be read."""

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from transformers.activations import ACT2FN

import lora_lite as ll
from cases import derived, move
from lora_lite.files.peft.rows import ROWS
from lora_lite.variants.peanut import ACTIVATIONS, peanut


def _layer(cfg):
    generator = torch.Generator().manual_seed(2)
    W = ll.Frozen(torch.randn(20, 12, generator=generator, dtype=torch.float64))
    start, _ = derived(cfg, W)
    return W, move({"": {name: t.double() for name, t in start.items()}})[""]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_is_the_papers_network_on_the_columns_of_the_weight(depth):
    W, params = _layer(ll.PEANuTConfig(r=4, depth=depth, act_fn="gelu"))
    update = torch.zeros_like(W.weight)
    for column in range(12):
        h = nn.functional.gelu(params["A"] @ W.weight[:, column])
        seen = []
        for n in range(depth):
            seen.append(h)
            h = nn.functional.gelu(params["E"][n] @ h)
        for n in range(depth):
            h = nn.functional.gelu(params["D"][n] @ h) + seen[depth - 1 - n]
        update[:, column] = 0.5 * params["B"] @ h
    x = torch.randn(3, 12, dtype=torch.float64)
    got = peanut(params, W, x, act_fn="gelu", scaling=0.5) - W(x)
    torch.testing.assert_close(got, x @ update.t(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    h = torch.linspace(-8, 8, 101)
    torch.testing.assert_close(ACTIVATIONS[name](h), ACT2FN[name](h))


@pytest.mark.parametrize("name", ["hardswish", "swish", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"])
def test_functions_that_torch_has_are_read_by_each_of_their_names(name):
    read = ROWS["peanut"].read({"peft_type": "PEANUT", "act_fn": name}, "0", {})
    h = torch.linspace(-8, 8, 101)
    torch.testing.assert_close(ACTIVATIONS[ll.PEANuTConfig(**read).act_fn](h), ACT2FN[name](h))


def test_an_activation_that_torch_lacks_is_refused_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8))
    peft.get_peft_model(model, peft.PeanutConfig(r=2, act_fn="laplace", target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'PEANuTConfig\.act_fn: expected one of "relu".*found .laplace.*merge_and_unload'):
        ll.from_peft(nn.Sequential(nn.Linear(6, 8)), tmp_path)


def test_a_file_without_a_middle_layer_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8))
    peft.get_peft_model(model, peft.PeanutConfig(r=2, depth=3, target_modules=["0"])).save_pretrained(tmp_path)
    place = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(place)
    del tensors["base_model.model.0.peanut_encoders.1.weight"]
    safetensors.torch.save_file(tensors, place)
    with pytest.raises(ValueError, match=r'unexpected "base_model\.model\.0\.peanut_encoders\.0\.weight"'):
        ll.from_peft(nn.Sequential(nn.Linear(6, 8)), tmp_path)
