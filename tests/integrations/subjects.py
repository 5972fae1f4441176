"""What the tests of other libraries share: every variant on a small model, its data, and its params as one vector."""

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import CASES, Blocks, build_any, move

DROPS = ("dropout", "rank_dropout", "module_dropout", "block_dropout")


def _plain(row) -> bool:
    return not row.draws and not any(getattr(row.cfg, d, 0.0) for d in DROPS) and row.cfg.trained != "0"


FIRST = tuple({row.cfg.name: row for row in reversed(CASES) if _plain(row)}.values())[::-1]
"""The first row of each variant that draws nothing in a call."""

EACH = pytest.mark.parametrize("row", FIRST, ids=lambda row: row.cfg.name)
LINEAR = pytest.mark.parametrize(
    "row", [row for row in FIRST if row.cfg.adapts == "linear" and row.cfg.linear and row.cfg.rowwise], ids=lambda row: row.cfg.name
)


class _Narrow(nn.Module):
    """A model whose last layer is not adapted, so that it has few outputs."""

    def __init__(self, body: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.body, self.lm_head = body, nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.body(x).mean(1))


def subject(cfg, i: int = 48, o: int = 64, rows: int = 4, outputs: int = 2):
    """Return an adapted model in float64, params off their start, inputs `(rows, 3, i)` and real labels `(rows, outputs)`."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(i, o), nn.Tanh(), nn.Linear(o, i, bias=False)) if cfg.adapts == "linear" else Blocks(i, o)
    model = _Narrow(body, i, outputs).double().eval()
    x, y = torch.randn(rows, 3, i).double(), torch.randn(rows, outputs).double()
    if isinstance(cfg, ll.FullConfig):
        cfg = ll.FullConfig(target_names=r"^body\.0$")
    adapt = build_any(model, cfg, [torch.randn(16, 3, i).double()])
    params = move(ll.tree_map(torch.Tensor.double, adapt.init()))
    return adapt, params, x, y


def flat(tree) -> torch.Tensor:
    """Return a tree as a vector."""
    return torch.cat([leaf.flatten() for leaf in ll.tree_leaves(tree)])
