"""OLoRA: its start against the whole decomposition, and its values against the paper's residual form."""

import pytest
import torch

import lora_lite as ll
from lora_lite.variants.olora import OLoRAConfig

f64 = torch.float64


@pytest.mark.parametrize(("i", "o"), [(14, 10), (10, 14), (10, 10)])
@pytest.mark.parametrize("r", [1, 4, 10])
def test_start_is_the_first_part_of_the_whole_decomposition(i, o, r):
    weight = torch.randn(o, i, dtype=f64)
    start = OLoRAConfig(r=r).constants(ll.Frozen(weight), torch.Generator())
    Q, R = torch.linalg.qr(weight)
    assert torch.allclose(start["B0"], Q[:, :r], atol=1e-12)
    assert torch.allclose(start["A0"], R[:r], atol=1e-12)
    assert torch.allclose(start["B0"].T @ start["B0"], torch.eye(r, dtype=f64), atol=1e-12)


def test_values_are_those_of_the_residual_form():
    W, x = ll.Frozen(torch.randn(9, 12, dtype=f64), torch.randn(9, dtype=f64)), torch.randn(5, 12, dtype=f64)
    dA, dB = torch.randn(3, 12, dtype=f64), torch.randn(9, 3, dtype=f64)
    Q, R = torch.linalg.qr(W.weight)
    dense = W.weight - 2.0 * Q[:, :3] @ R[:3] + 2.0 * (Q[:, :3] + dB) @ (R[:3] + dA)
    got = ll.functional.olora({"dA": dA, "dB": dB}, W, x, scale=2.0)
    assert torch.allclose(got, x @ dense.T + W.bias, atol=1e-10)


def test_rank_is_at_most_the_smaller_width():
    with pytest.raises(ValueError, match=r"OLoRAConfig\.r: expected at most min\(i, o\) = 6"):
        OLoRAConfig(r=7).constants(ll.Frozen(torch.randn(6, 9)), torch.Generator())
