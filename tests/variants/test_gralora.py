"""GraLoRA: the grid of blocks written out, its rank, and what its config refuses."""

import pytest
import torch

import lora_lite as ll
from lora_lite.variants.gralora import gralora


def _params(i, o, k, r, h=0):
    g = torch.Generator().manual_seed(0)
    shapes = {"A": (k, i // k, r), "B": (k, r, o // k), **({"A_general": (h, i), "B_general": (o, h)} if h else {})}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


def _blocks(params):
    """Return the update as a matrix, block by block: `(o, i)`."""
    A, B = params["A"], params["B"]
    k, _, r = A.shape
    q = r // k
    rows = [torch.cat([(A[n][:, j * q : (j + 1) * q] @ B[j][n * q : (n + 1) * q]).t() for n in range(k)], dim=1) for j in range(k)]
    general = params["B_general"] @ params["A_general"] if "A_general" in params else 0
    return torch.cat(rows) + general


@pytest.mark.parametrize(("i", "o", "k", "r", "h"), [(12, 8, 2, 4, 0), (8, 12, 4, 4, 3), (9, 6, 3, 6, 1), (5, 7, 1, 2, 0)])
def test_update_is_the_grid_of_blocks(i, o, k, r, h):
    params, W, x = _params(i, o, k, r, h), torch.randn(o, i, dtype=torch.float64), torch.randn(2, 3, i, dtype=torch.float64)
    torch.testing.assert_close(gralora(params, W, x, scale=0.5), x @ (W + 0.5 * _blocks(params)).t(), rtol=1e-12, atol=1e-12)


def test_rank_is_k_times_that_of_lora():
    assert torch.linalg.matrix_rank(_blocks(_params(32, 32, 4, 4))) == 16


def test_chunks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"GraLoRAConfig\.r: expected a multiple of k = 4, found 6\. Use e\.g\. r=8"):
        ll.GraLoRAConfig(r=6, k=4)
    model = torch.nn.Sequential(torch.nn.Linear(10, 9))
    with pytest.raises(ValueError, match=r"GraLoRAConfig\.k: expected a divisor of o = 9, found 2\. Use e\.g\. 3"):
        ll.build(model, ll.GraLoRAConfig(r=4)).init()
