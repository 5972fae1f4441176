"""LoRA+: which leaves learn faster."""

import pytest
import torch
from torch import nn

import lora_lite as ll


@pytest.mark.parametrize(
    ("cfg", "slow", "fast"),
    [
        (ll.LoRAConfig(r=2), {(2, 6)}, {(4, 2)}),
        (ll.DoRAConfig(r=2), {(2, 6), (4,)}, {(4, 2)}),
        (ll.PiSSAConfig(r=2), {(2, 6)}, {(4, 2)}),
        (ll.IA3Config(), {(4,)}, None),
    ],
    ids=lambda part: getattr(part, "name", ""),
)
def test_the_output_factor_learns_faster(cfg, slow, fast):
    params = ll.build(nn.Sequential(nn.Linear(6, 4)), cfg).init()
    groups = ll.lora_plus(params, lr=1e-3, ratio=4.0)
    assert [{tuple(leaf.shape) for leaf in group["params"]} for group in groups] == [shapes for shapes in (slow, fast) if shapes]
    assert [group["lr"] for group in groups] == [1e-3, 4e-3][: len(groups)]
    before = ll.tree_map(torch.clone, params)
    optimizer = torch.optim.SGD(groups)
    for leaf in ll.tree_leaves(params):
        leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    for name, leaf in params["0"].items():
        rate = 4e-3 if name in ("B", "dB") else 1e-3
        torch.testing.assert_close(leaf, before["0"][name] - rate)


def test_rates_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"expected lr > 0 and ratio >= 1, found lr=0.0"):
        ll.lora_plus({}, lr=0.0)
