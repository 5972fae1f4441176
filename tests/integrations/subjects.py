"""What the tests of other libraries share: a method on a small model, ours or PEFT's, behind one face."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lora_lite as ll
from cases import CASES, Blocks, build_any, move
from common.methods import METHODS
from lora_lite.integrations.linear_layers import LinearLayers

DROPS = ("dropout", "rank_dropout", "module_dropout", "block_dropout")
Tree = dict[str, dict[str, Tensor]]


def _plain(row) -> bool:
    return not row.draws and not any(getattr(row.cfg, d, 0.0) for d in DROPS) and row.cfg.trained != "0"


class _Narrow(nn.Module):
    """A model whose last layer is not adapted, so that it has few outputs."""

    def __init__(self, body: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.body, self.lm_head = body, nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.body(x).mean(1))


@dataclass(frozen=True)
class Subject:
    """An adapted model in float64.

    Attributes:
        adapt: `(params, x) -> outputs`, with `module(params)`.
        params: off their start.
        x: inputs `(rows, 3, i)`.
        y: real labels `(rows, outputs)`.
        layers: the module for tools that see `nn.Linear` layers alone.
    """

    adapt: Any
    params: Tree
    x: Tensor
    y: Tensor
    layers: Callable[[], nn.Module]

    def grad(self, f: Callable[[Tree], Tensor]) -> Callable[[Tree], Tree]:
        """Return the gradient of a scalar function of params, which can be differentiated again."""
        return torch.func.grad(f)

    def jacobian(self, f: Callable[[Tree], Tensor], params: Tree) -> Tree:
        """Return the derivative of `f(params)` by each leaf, `(*output, *leaf)`."""
        return torch.func.jacrev(f)(params)

    def by_row(self, losses: Callable[[Tensor, slice], Tensor], rows: slice = slice(None)) -> Tree:
        """Return the gradients of the losses of some rows, `losses(outputs, rows)`, with a leading axis of rows."""
        return ll.per_example_grad(self.adapt, lambda output, _: losses(output, rows))(self.params, self.x[rows])

    def hvp(self, f: Callable[[Tree], Tensor], along: Tree) -> Tree:
        """Return the Hessian's product with a tree."""
        return ll.hvp(f)(self.params, along)

    def hessian(self, f: Callable[[Tree], Tensor]) -> Tensor:
        """Return the whole Hessian, its axes those of the leaves one after the other."""
        leaves, tree = pytree.tree_flatten(self.params)
        columns = []
        for n in range(sum(leaf.numel() for leaf in leaves)):
            unit = torch.zeros(sum(leaf.numel() for leaf in leaves), dtype=torch.float64)
            unit[n] = 1.0
            parts = [part.view_as(leaf) for part, leaf in zip(unit.split([leaf.numel() for leaf in leaves]), leaves)]
            columns.append(flat(self.hvp(f, pytree.tree_unflatten(parts, tree))))
        return torch.stack(columns)

    def ggn_vp(self, loss: Callable[[Tensor], Tensor], along: Tree) -> Tree:
        """Return the product of the Gauss-Newton matrix of `loss(outputs)` with a tree."""
        return ll.ggn_vp(lambda p: self.adapt(p, self.x), loss)(self.params, along)


class Theirs(Subject):
    """PEFT's model, whose references are plain autograd's, since not every method of PEFT runs under `torch.func`."""

    def grad(self, f):
        def of(params: Tree) -> Tree:
            leaves, tree = pytree.tree_flatten(params)
            leaves = [p if p.requires_grad else p.detach().requires_grad_() for p in leaves]
            value = f(pytree.tree_unflatten(leaves, tree))
            return pytree.tree_unflatten(_of(value, leaves), tree)

        return of

    def jacobian(self, f, params):
        leaves, tree = pytree.tree_flatten(params)
        leaves = [p.detach().requires_grad_() for p in leaves]
        output = f(pytree.tree_unflatten(leaves, tree))
        rows = [[g.detach() for g in _of(value, leaves)] for value in output.flatten()]
        return pytree.tree_unflatten([torch.stack(g).view(*output.shape, *g[0].shape) for g in zip(*rows)], tree)

    def by_row(self, losses, rows=slice(None)):
        x = self.x[rows]
        each = [self.jacobian(lambda p, n=n: losses(self.adapt(p, x[n : n + 1]), _one(rows, n)).sum(), self.params) for n in range(len(x))]
        return ll.tree_map(lambda *leaves: torch.stack(leaves), *each)

    def hvp(self, f, along):
        def slope(params: Tree) -> Tensor:
            return sum((g * v).sum() for g, v in zip(ll.tree_leaves(self.grad(f)(params)), ll.tree_leaves(along)))

        return ll.tree_map(torch.Tensor.detach, self.grad(slope)(self.params))

    def ggn_vp(self, loss, along):
        J = self.jacobian(lambda p: self.adapt(p, self.x).flatten(), self.params)
        Jv = sum((j * v).flatten(1).sum(1) for j, v in zip(ll.tree_leaves(J), ll.tree_leaves(along)))
        output = self.adapt(self.params, self.x).detach()
        curvature = torch.func.hessian(lambda flat: loss(flat.view_as(output)))(output.flatten())
        return ll.tree_map(lambda j: torch.tensordot(curvature @ Jv, j, 1), J)


def _of(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found)]


def _one(rows: slice, n: int) -> slice:
    start = (rows.start or 0) + n
    return slice(start, start + 1)


class _PeftModel:
    """PEFT's model as a function of its trained parameters, and as modules of its own with others."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._trained = [name for name, p in module.named_parameters() if p.requires_grad]

    def start(self) -> Tree:
        own = dict(self._module.named_parameters())
        return {"": {name: own[name].detach() for name in self._trained}}

    def __call__(self, params: Tree, x: Tensor) -> Tensor:
        return torch.func.functional_call(self._module, params[""], (x,))

    def module(self, params: Tree) -> nn.Module:
        other = copy.deepcopy(self._module)
        own = dict(other.named_parameters())
        for name, value in params[""].items():
            own[name].data = value.detach().clone()
        return other


class Unseen(AssertionError):
    """Trained parameters that a tool for linear layers leaves out."""


def linear_layers_of(module: nn.Module, x: Tensor) -> nn.Module:
    """Return PEFT's model, whose linear layers such a tool sees, where their calls with `x` reach all its trained parameters."""
    seen: set[str] = set()
    linear = {path: layer for path, layer in module.named_modules() if type(layer) is nn.Linear}
    notes = [layer.register_forward_hook(lambda *_, path=path: seen.add(f"{path}.weight")) for path, layer in linear.items()]
    module(x)
    for note in notes:
        note.remove()
    require_seen(module, seen, "trained parameters beside the linear layers that are called, which are all that the library sees")
    return module


def require_seen(module: nn.Module, seen: Collection[str], why: str) -> None:
    """Raise where a tool has not seen all trained parameters of a module."""
    if any(p.requires_grad and name not in seen for name, p in module.named_parameters()):
        raise Unseen(why)


TOTAL = {"adalora": {"total_step": 100}, "kasa": {"start": "truncated"}}
"""Fields without which PEFT has no same method."""


@dataclass(frozen=True)
class Case:
    """A method, ours or PEFT's same one; called it is adapted to a small model.

    Attributes:
        cfg: our config.
        of_peft: whether the method is PEFT's.
    """

    cfg: ll.AdapterConfig
    of_peft: bool = False

    def __call__(self, i: int = 48, o: int = 64, rows: int = 4, outputs: int = 2) -> Subject:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(i, o), nn.Tanh(), nn.Linear(o, i, bias=False)) if self.cfg.adapts == "linear" else Blocks(i, o)
        model = _Narrow(body, i, outputs)
        x, y = torch.randn(rows, 3, i).double(), torch.randn(rows, outputs).double()
        return (_theirs if self.of_peft else _ours)(self.cfg, model.eval(), x, y)

    @functools.cached_property
    def exists(self) -> bool:
        """Whether PEFT has the method, by a config alone."""
        return self.cfg.adapts == "linear" and not self.cfg.calibrated and _config(self.cfg) is not None


def _ours(cfg, model, x, y) -> Subject:
    model = model.double()
    if isinstance(cfg, ll.FullConfig):
        cfg = ll.FullConfig(target_names=r"^body\.0$")
    adapt = build_any(model, cfg, [torch.randn(16, *x.shape[1:]).double()])
    params = move(ll.tree_map(Tensor.double, adapt.init()))
    return Subject(adapt, params, x, y, lambda: LinearLayers(adapt, params))


def _config(cfg):
    make = METHODS[cfg.name].theirs
    cfg = dataclasses.replace(cfg, **TOTAL.get(cfg.name, {}))
    return make(cfg, ["body.0"] if cfg.name == "bitfit" else ["body.0", "body.2"]) if make is not None and cfg.name != "tokens" else None


def _theirs(cfg, model, x, y) -> Subject:
    module = peft.get_peft_model(model, _config(cfg)).eval().double()
    for name, p in module.named_parameters():
        if "ranknum" in name:  # AdaLoRA counts
            p.requires_grad_(False)
    adapt = _PeftModel(module)
    params = move(adapt.start())
    return Theirs(adapt, params, x, y, lambda: linear_layers_of(adapt.module(params), x))


FIRST = tuple({row.cfg.name: Case(row.cfg) for row in reversed(CASES) if _plain(row)}.values())[::-1]
"""The first row of each variant that draws nothing in a call."""

THEIRS = tuple(other for case in FIRST if (other := dataclasses.replace(case, of_peft=True)).exists)
"""PEFT's same methods, for linear layers and without calibration."""


def _named(case: Case) -> str:
    return case.cfg.name


EACH = pytest.mark.parametrize("case", FIRST, ids=_named)
LINEAR = pytest.mark.parametrize(
    "case", [case for case in FIRST if case.cfg.adapts == "linear" and case.cfg.linear and case.cfg.rowwise], ids=_named
)


def flat(tree) -> Tensor:
    """Return a tree as a vector."""
    return torch.cat([leaf.flatten() for leaf in ll.tree_leaves(tree)])
