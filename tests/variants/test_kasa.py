"""KaSA: the cut weight written out, both starts, PEFT's weight and regularisers, and what is refused."""

import copy

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import derived, move
from lora_lite.variants.kasa import regularisation
from peft_oracle import edit, wrapped


def test_values_are_those_of_the_cut_weight():
    W, x = ll.Frozen(torch.randn(7, 9).double(), torch.randn(7).double()), torch.randn(5, 9).double()
    cfg = ll.KaSAConfig(r=3, alpha=6.0)
    start, constants = derived(cfg, W)
    params = {name: p.double() + torch.randn_like(p.double()) for name, p in start.items()}
    U, S, Vh = torch.linalg.svd(W.weight, full_matrices=False)
    cut = (U[:, :-3] * S[:-3]) @ Vh[:-3]
    A, B, d = constants["A0"] + params["dA"], constants["B0"] + params["dB"], constants["S0"] / 2 + params["dd"]
    got = ll.functional.kasa(params, W.with_constants(constants), x, scale=cfg.scale)
    torch.testing.assert_close(got, x @ (cut + 2 * (B * d) @ A).T + W.bias, rtol=0, atol=1e-10)


def test_the_truncated_start_is_pefts_model():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)), torch.randn(5, 12)
    adapt = ll.build(model, ll.KaSAConfig(r=3, start="truncated"))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=["0", "2"], kasa_config=peft.KasaConfig()))
    assert (theirs(x) - model(x)).abs().max() > 1e-2  # it does not start at the base model
    torch.testing.assert_close(adapt(adapt.init(), x), theirs(x), rtol=1e-5, atol=1e-5)
    params = adapt.init()
    assert torch.allclose(adapt.constants["0"]["B0"] + params["0"]["dB"], torch.zeros(20, 3))
    assert torch.equal(ll.build(model, ll.KaSAConfig(r=3))(ll.build(model, ll.KaSAConfig(r=3)).init(), x), model(x))


def test_regularisers_are_pefts_and_differentiable_at_the_start(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).eval()
    theirs = wrapped(model, peft.LoraConfig(r=3, target_modules=["0", "2"], kasa_config=peft.KasaConfig(beta=0.2, gamma=0.3)))
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    cfg = adapt.configs[0]
    assert (cfg.start, cfg.beta, cfg.gamma) == ("truncated", 0.2, 0.3)
    torch.testing.assert_close(regularisation(params, adapt.constants, cfg), theirs.base_model._get_kasa_loss(), rtol=1e-5, atol=0)
    at_start = ll.build(model, ll.KaSAConfig(r=3, beta=0.0))
    grads = torch.func.grad(lambda p: regularisation(p, at_start.constants, at_start.configs[0]))(at_start.init())
    assert all(leaf.isfinite().all() and leaf.abs().max() < 1e-2 for leaf in ll.tree_leaves(grads))
    for cause, value, named in (
        ("lora_dropout", 0.1, "lora_dropout"),
        ("use_dora", True, "use_dora"),
        ("init_lora_weights", "pissa", "pissa"),
    ):
        edit(tmp_path, **{"lora_dropout": 0.0, "use_dora": False, "init_lora_weights": True, cause: value})
        with pytest.raises(ValueError, match=f'kasa_config in .* beside a plain LoRA, found "{named}"'):
            ll.from_peft(model, tmp_path)


def test_strength_and_merging_and_ranks():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8)).double(), torch.randn(5, 12).double()
    adapt = ll.build(model, ll.KaSAConfig(r=3, dtype=torch.float64))
    params = move(adapt.init())
    torch.testing.assert_close(adapt(adapt.steer(params, 0.0), x), model(x))
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(merged(x), adapt(params, x))
    with pytest.raises(ValueError, match=r"KaSAConfig\.r: expected less than min\(i, o\) = 8 for a layer of shape \(8, 20\), found 8"):
        ll.build(model, ll.KaSAConfig(r=8))


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("cfg", [ll.KaSAConfig, ll.MiCAConfig], ids=lambda c: c.name)
def test_constants_keep_nothing_of_the_other_components(cfg, r, tmp_path):
    model, x = nn.Sequential(nn.Linear(70, 34)), torch.randn(5, 70)
    adapt = ll.build(model, cfg(r=r))
    for name, c in adapt.constants["0"].items():
        assert c.untyped_storage().nbytes() == c.numel() * c.element_size(), name
    params = move(adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(model, tmp_path / "a.safetensors")
    assert torch.equal(again(read, x), adapt(params, x))
