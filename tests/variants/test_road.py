"""ROAD: PEFT's numbers, rotations that preserve norms, and the deviation form."""

import peft
import pytest
import torch
from peft_layer import LAYERS, compare, matrix
from torch import nn

import lora_lite as ll
from cases import COSTLY, move
from lora_lite.testing import check_variant
from lora_lite.variants.road import ROADConfig, road

VARIANTS = ("road_1", "road_2", "road_4")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [2, 8])
def test_passes_the_kit(variant, group_size):
    check_variant(ROADConfig(variant=variant, group_size=group_size), skip=COSTLY)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_is_pefts(layer, variant, group_size):
    theirs = peft.RoadConfig(variant=variant, group_size=group_size, target_modules=["0"])
    leaves = {"theta": ("road_theta", 0.0), "a": ("road_alpha", 1.0)}
    compare(layer, ROADConfig(variant=variant, group_size=group_size), theirs, leaves)


def test_without_stretch_it_is_a_rotation_that_the_opposite_strength_undoes():
    cfg = ROADConfig(group_size=4)
    params = {"theta": torch.randn(6, dtype=torch.float64), "a": torch.zeros(6, dtype=torch.float64)}
    R = matrix(road, params, 12, variant="road_1", group_size=4)
    back = matrix(road, cfg.steer(params, -1.0), 12, variant="road_1", group_size=4)
    eye = torch.eye(12, dtype=torch.float64)
    assert torch.allclose(R @ R.t(), eye, rtol=0, atol=1e-12)
    assert torch.allclose(back @ R, eye, rtol=0, atol=1e-12)
    assert (R - eye).abs().max() > 0.1


def test_half_groups_are_paired():
    params = {"theta": torch.tensor([torch.pi / 2, 0.0]), "a": torch.zeros(2)}
    y = road(params, torch.eye(4), torch.tensor([1.0, 2.0, 3.0, 4.0]), variant="road_1", group_size=4)
    assert torch.allclose(y, torch.tensor([-3.0, 2.0, 1.0, 4.0]), rtol=0, atol=1e-6)


TURN = 0.2421875
"""An angle in bfloat16 whose cosine lies midway between two numbers of it."""


def test_in_few_digits_a_small_turn_costs_one_rounding():
    params = {"theta": torch.full((64,), TURN, dtype=torch.bfloat16), "a": torch.zeros(64, dtype=torch.bfloat16)}
    x = torch.cat((torch.linspace(1, 2, 64), torch.zeros(64))).bfloat16()
    y = road(params, torch.eye(128, dtype=torch.bfloat16), x, variant="road_1", group_size=128).double()
    cos, sin = torch.tensor([TURN], dtype=torch.float64).cos(), torch.tensor([TURN], dtype=torch.float64).sin()
    want = torch.cat((cos * x[:64].double(), sin * x[:64].double()))
    assert ((y - want).abs() / want)[:64].max() < 1.05 * 2.0**-8  # a cosine rounded by itself would cost half as much again


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"variant": "road_3"}, r"ROADConfig.variant: expected one of \"road_1\", \"road_2\", \"road_4\", found 'road_3'"),
        ({"group_size": 7}, r"ROADConfig.group_size: expected an even integer >= 2, found 7"),
        ({"group_size": 0}, r"ROADConfig.group_size: expected an even integer >= 2, found 0"),
    ],
)
def test_refuses_what_cannot_be(fields, match):
    with pytest.raises(ValueError, match=match):
        ROADConfig(**fields)


def test_names_group_sizes_that_fit():
    match = r"ROADConfig.group_size: expected a divisor of o = 100, found 64. Use e.g. 50 or 100 or 20\."
    with pytest.raises(ValueError, match=match) as e:
        ll.build(torch.nn.Sequential(torch.nn.Linear(8, 100)), ROADConfig())
    assert 'at target "0"' in "".join(e.value.__notes__)


def test_compiled_step_on_a_cpu_computes_each_angle_once():
    """The compiler had taken sines and cosines anew for every token, 1.28 of a frozen step's time."""
    torch.manual_seed(0)
    adapt = ll.build(nn.Sequential(nn.Linear(8, 16)), ll.ROADConfig(group_size=4))
    params, x = move(adapt.init()), torch.randn(77, 8)
    with torch._inductor.config.patch({"cpp.simdlen": 1}):  # to look for vector units would compile a program for each sort
        compiled = torch.compile(adapt, fullgraph=True, dynamic=False)
        got, [code] = torch._inductor.utils.run_and_get_code(compiled, params, x)
    torch.testing.assert_close(got, adapt(params, x))
    angles, tokens = code.split("<static_cast<int64_t>(77L)", 1)  # the loop over tokens stands behind that over outputs
    assert "std::sin" in angles
    assert "std::sin" not in tokens
    assert "std::cos" not in tokens
