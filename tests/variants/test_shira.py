"""SHiRA: PEFT's places, a high rank, the two ways to its product."""

import peft
import pytest
import torch
from peft_layer import LAYERS, compare, matrix
from torch import nn

import lora_lite as ll
from lora_lite.testing import check_variant
from lora_lite.variants import _sparse
from lora_lite.variants.shira import shira


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dense", [0, 512])
def test_is_pefts_in_both_forms(layer, dense, monkeypatch):
    monkeypatch.setattr(_sparse, "DENSE", dense)
    compare(layer, ll.SHiRAConfig(r=3, seed=5), peft.ShiraConfig(r=3, random_seed=5, target_modules=["0"]), {"s": ("shira_weight", 0.0)})


def test_places_are_pefts_of_the_same_seed():
    model = nn.Sequential(nn.Linear(24, 32))
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(24, 32)), peft.ShiraConfig(r=3, random_seed=5, target_modules=["0"]))
    want = theirs.base_model.model.get_submodule("0").shira_indices["default"]
    got = ll.build(model, ll.SHiRAConfig(r=3, seed=5)).constants["0"]["indices"]
    assert got.dtype == want.dtype == torch.int32
    assert torch.equal(got, want)


def test_gathered_it_passes_the_kit(monkeypatch):
    monkeypatch.setattr(_sparse, "DENSE", 0)
    check_variant(ll.SHiRAConfig(r=2), skip=["counts"])


def test_the_update_has_lora_s_numbers_and_a_high_rank():
    s, eye = torch.randn(2 * 64, dtype=torch.float64), torch.eye(32)
    update = matrix(shira, {"s": s}, 32) - eye
    assert update.count_nonzero() == 2 * 64
    assert torch.linalg.matrix_rank(update) > 24


def test_without_a_seed_places_differ_between_layers_and_are_the_same_in_each_build():
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    first, again = (ll.build(model, ll.SHiRAConfig(r=3)).constants for _ in range(2))
    assert torch.equal(first["0"]["indices"], again["0"]["indices"])
    assert not torch.equal(first["0"]["indices"], first["1"]["indices"])


def test_more_places_than_the_weight_has_are_refused():
    with pytest.raises(ValueError, match=r"SHiRAConfig\.r: expected at most 7 for a layer of shape \(20, 12\), found 8"):
        ll.build(nn.Sequential(nn.Linear(12, 20)), ll.SHiRAConfig(r=8))
