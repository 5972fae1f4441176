"""Super-Tuning: PEFT's places, files without them, the two ways to its product."""

import copy

import peft
import pytest
import torch
from peft_layer import LAYERS, compare
from torch import nn

import lora_lite as ll
from lora_lite.testing import check_variant
from lora_lite.variants import _sparse

LEAVES = {"s": ("supertuning_values", 0.0)}
SUPRA = {**LEAVES, "A": ("supertuning_lora_A", 0.0), "B": ("supertuning_lora_B", 0.0)}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dense", [0, 512])
def test_is_pefts_in_both_forms(layer, dense, monkeypatch):
    monkeypatch.setattr(_sparse, "DENSE", dense)
    compare(layer, ll.SuperTuningConfig(sparsity=0.9), peft.SupertuningConfig(sparsity=0.9, target_modules=["0"]), LEAVES)
    theirs = peft.SupertuningConfig(sparsity=0.9, select_top=False, r=3, target_modules=["0"])
    compare(layer, ll.SuperTuningConfig(sparsity=0.9, select_top=False, r=3), theirs, SUPRA)


@pytest.mark.parametrize("top", [True, False])
def test_places_are_pefts_and_those_of_the_largest_entries(top):
    model = nn.Sequential(nn.Linear(24, 32))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.SupertuningConfig(select_top=top, target_modules=["0"]))
    want = theirs.base_model.model.get_submodule("0").supertuning_indices["default"]
    got = ll.build(model, ll.SuperTuningConfig(select_top=top)).constants["0"]["indices"]
    assert got.dtype == want.dtype == torch.int32
    assert torch.equal(got, want)
    rest = torch.ones(24 * 32, dtype=torch.bool).index_fill(0, got.long(), False)
    magnitude = model[0].weight.detach().abs().flatten()
    assert (magnitude[got].min() > magnitude[rest].max()) if top else (magnitude[got].max() < magnitude[rest].min())


def test_gathered_it_passes_the_kit(monkeypatch):
    monkeypatch.setattr(_sparse, "DENSE", 0)
    check_variant(ll.SuperTuningConfig(sparsity=0.9), skip=["counts"])


@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False")
def test_a_file_without_places_is_read_with_those_of_the_weight(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 20)), torch.randn(4, 12)
    config = peft.SupertuningConfig(sparsity=0.9, init_weights=False, save_precomputed_indices=False, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    torch.testing.assert_close(adapt(params, x), theirs(x))


def test_refusals_name_the_way_out():
    with pytest.raises(ValueError, match=r"SuperTuningConfig\.sparsity: expected at most 0\.9792 for a layer of 48 entries, found 0\.99"):
        ll.build(nn.Sequential(nn.Linear(6, 8)), ll.SuperTuningConfig())
    with pytest.raises(ValueError, match=r"SuperTuningConfig\.alpha: expected None without r.*found 4\.0.*e\.g\. r=8"):
        ll.SuperTuningConfig(alpha=4.0)
    with pytest.raises(ValueError, match=r"SuperTuningConfig\.dropout: expected 0 without r"):
        ll.SuperTuningConfig(dropout=0.1)
