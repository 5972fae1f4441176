"""MiSS: the dense formulas of its three forms, parameter counts, the padded shard."""

import peft
import pytest
import torch
from peft_layer import LAYERS, compare, matrix

import lora_lite as ll
from lora_lite.testing import check_variant
from lora_lite.variants.miss import miss

FORMS = {"default": {}, "mini": {"mini_r": 2}, "bat": {}}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("init", FORMS)
def test_is_pefts(layer, init):
    theirs = peft.MissConfig(r=4, target_modules=["0"], init_weights=True if init == "default" else init, **FORMS[init])
    compare(layer, ll.MiSSConfig(r=4, init=init, **FORMS[init]), theirs, {"D": ("miss_block", 0.0)})


def test_the_update_is_the_shared_matrix_beside_itself():
    D = torch.randn(5, 12, dtype=torch.float64)
    update = matrix(miss, {"D": D}, 12) - torch.eye(12)
    assert torch.allclose(update, D.t().repeat(1, 3)[:, :12], rtol=0, atol=1e-14)  # the last shard is cut
    assert torch.linalg.matrix_rank(update) == 5


def test_mini_repeats_the_update_in_each_group_of_outputs():
    D = torch.randn(4, 3, dtype=torch.float64)
    update = matrix(miss, {"D": D}, 12, start="mini") - torch.eye(12)
    assert torch.allclose(update, D.t().repeat(4, 3), rtol=0, atol=1e-14)


def test_bat_is_the_papers_block_formula():
    D, weight, x = torch.randn(3, 4, 4).double(), torch.randn(12, 8).double(), torch.randn(5, 8).double()
    merged = weight.clone()
    for a in range(0, 12, 4):
        for b in range(0, 8, 4):
            block = weight[a : a + 4, b : b + 4]
            merged[a : a + 4, b : b + 4] += block @ D[a // 4] + D[a // 4]
    assert torch.allclose(miss({"D": D}, weight, x, start="bat"), x @ merged.t(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("init", "count"), [("default", 8 * 32), ("mini", 8 * 2), ("bat", 8 * 32)])
def test_parameter_counts_are_the_papers(init, count):
    adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(16, 32)), ll.MiSSConfig(r=8, mini_r=2, init=init))
    assert adapt.num_params == count


def test_passes_the_kit_with_defaults():
    check_variant(ll.MiSSConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 20}, r"MiSSConfig\.r: expected at most i = 12, found 20"),
        ({"r": 8, "init": "bat"}, r"MiSSConfig\.r: expected a divisor of i = 12, found 8\. Use e\.g\. 6"),
        ({"r": 6, "init": "bat"}, r"MiSSConfig\.r: expected a divisor of o = 20, found 6"),
        ({"r": 4, "mini_r": 3, "init": "mini"}, r"MiSSConfig\.mini_r: expected a divisor of o = 20, found 3"),
        ({"init": "best"}, r"MiSSConfig\.start: expected one of "),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ll.build(torch.nn.Sequential(torch.nn.Linear(12, 20)), ll.MiSSConfig(**options))
