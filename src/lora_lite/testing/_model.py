"""Checks of a whole model: compiling, saving, and leaving the user's model alone."""

import copy
import tempfile
import unittest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_lite.adapt import Adapt
from lora_lite.build import build
from lora_lite.core.config import AdapterConfig, as_config, with_fields
from lora_lite.core.statistics import needs_loss
from lora_lite.core.tree import Tree, flatten, tree_leaves, tree_map
from lora_lite.derived.merge import merged_layer
from lora_lite.files.adapter_file import load, save
from lora_lite.testing._case import VALUES, Case, Params, close, fail, float32, float64, inputs, unquantised
from lora_lite.transforms.stacks import stack, unstack


def compiles(cfg: AdapterConfig) -> None:
    """The variant traces in one graph, its gradient too."""
    for case in float32(cfg)[:1]:

        def loss(params: Params, x: Tensor, case: Case = case) -> Tensor:
            return case(params, x).square().sum()

        for f in (loss, torch.func.grad(loss)):
            torch.compiler.reset()
            got, want = torch.compile(f, fullgraph=True, backend="aot_eager")(case.params, case.x), f(case.params, case.x)
            for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want)):
                close("the compiled result", a, b, VALUES[torch.float32])


class _Blocks(nn.Module):
    """Two blocks that keep the width."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _model(cfg: AdapterConfig) -> tuple[nn.Module, Tensor]:
    """Make a small model with targets for the variant, and an input."""
    wide, tall = float32(cfg)
    layers = []
    for case in (wide, tall):
        layer = nn.Linear(case.W.in_features, case.W.out_features, bias=case.W.bias is not None)
        layer.weight.data = case.W.weight.clone()
        if case.W.bias is not None:
            layer.bias.data = case.W.bias.clone()
        layers.append(layer)
    if cfg.adapts == "norm":
        return nn.Sequential(layers[0], nn.LayerNorm(wide.W.out_features), layers[1], nn.RMSNorm(wide.W.in_features)).eval(), wide.x
    if cfg.adapts == "block":
        return _Blocks(nn.Sequential(*layers), nn.Sequential(*copy.deepcopy(layers))).eval(), wide.x
    return nn.Sequential(*layers).eval(), wide.x


def _build(model: nn.Module, cfg: AdapterConfig, width: int | None = None, source: nn.Module | None = None) -> tuple[Adapt, Tree]:
    """Adapt a model of `_model`, calibrated where the variant needs it, with params off their start."""
    i = width or next(model.parameters()).shape[-1]
    names = () if cfg.adapts == "block" else (r"^\d$",)
    given: dict[str, Any] = {"calibration": [inputs(i)]} if cfg.calibrated else {}
    if cfg.original:
        layers = {path: layer.weight for path, layer in (source or model).named_modules() if isinstance(layer, nn.Linear)}
        given["original"] = {f"{path}.weight": unquantised(weight.detach()) for path, weight in layers.items()}
    if needs_loss(cfg):
        given["loss"] = lambda output, batch: output.square().mean()
    adapt = build(model, with_fields(float32(cfg)[0].cfg, target_names=names), **given)
    g = torch.Generator().manual_seed(i)
    return adapt, tree_map(lambda p: p + 0.1 * torch.randn(p.shape, generator=g), adapt.init(seed=0))


def merged(cfg: AdapterConfig) -> None:
    """A linear variant's merged weights give its forward."""
    if not cfg.linear:
        return
    if cfg.adapts in ("norm", "module"):  # merged by what it does to the parameters, not as a linear map
        model, x = _model(cfg)
        adapt, params = _build(model, cfg)
        twin = copy.deepcopy(model)
        twin.load_state_dict(adapt.merge(params), strict=False)
        return close("the merged module", twin(x), adapt(params, x), VALUES[torch.float32])
    for case in float64(cfg):
        weight, bias = merged_layer(cfg, case.params, case.W)
        close("the merged layer", case.x @ weight.t() + bias, case(case.params), 1e-10)


def saved(cfg: AdapterConfig) -> None:
    """Saving and loading gives every bit back, onto a model that was never built on."""
    model, x = _model(cfg)
    fresh = copy.deepcopy(model)
    adapt, params = _build(model, cfg)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save(adapt, params, path)
        again, read = load(fresh, path, variants=[type(cfg)])
    for where, leaves in params.items():
        for name, leaf in leaves.items():
            if not torch.equal(read[where][name], leaf):
                fail(f"{where}.{name} bit for bit", "another value")
    if not torch.equal(again(read, x), adapt(params, x)):
        fail("the loaded adapter's output to equal the saved one's", "another")
    first, second = again.init(3), adapt.init(3)
    if not all(torch.equal(first[where][name], leaf) for where, leaves in second.items() for name, leaf in leaves.items()):
        fail("a loaded adapt to init as the saved one does", "other params")


def mixed_batch(cfg: AdapterConfig) -> None:
    """Rows of one batch, each through its own adapter, equal a loop over the adapters, and so do their gradients."""
    model, x = _model(cfg)
    adapt, params = _build(model, cfg)
    members = [tree_map(lambda p, c=c: c * p, params) for c in (1.0, 0.5)]
    index = [1, 0, 1]

    def loss(stacked: Tree) -> Tensor:
        return adapt.mixed(stacked, x, index).square().sum()

    mixed, grads = adapt.mixed(stack(members), x, index), unstack(torch.func.grad(loss)(stack(members)))
    for row, k in enumerate(index):
        close("a row of a mixed batch", mixed[row], adapt(members[k], x[row : row + 1])[0], VALUES[torch.float32])
    for k, member in enumerate(members):
        rows = x[[row for row, taken in enumerate(index) if taken == k]]
        batches = [rows] if cfg.rowwise else rows.split(1)
        alone = torch.func.grad(lambda p, batches=batches: sum(adapt(p, batch).square().sum() for batch in batches))(member)
        for got, want in zip(tree_leaves(grads[k]), tree_leaves(alone)):
            close("a member's gradient in a mixed batch", got, want, 10 * VALUES[torch.float32])  # sums over rows in another order


def stepped(cfg: AdapterConfig) -> None:
    """`update` writes to nothing that it is given, and returns finite params of the same names, shapes and dtypes."""
    cfg = as_config(cfg)
    if type(cfg).update is AdapterConfig.update:
        raise unittest.SkipTest("it has no update of its own")
    model, x = _model(cfg)
    adapt, params = _build(model, cfg)
    grads = torch.func.grad(lambda p: adapt(p, x).square().sum())(params)
    given = [*tree_leaves(params), *tree_leaves(grads)]
    before, forms = [leaf.clone() for leaf in given], _forms(params)
    new, state = _first_update(cfg, adapt, params, grads)
    for _ in range(2):
        if not all(torch.equal(leaf, was) for leaf, was in zip(given, before)):
            fail("update to write to none of the params and gradients", "that one changed. Return new tensors")
        if _forms(new) != forms:
            fail(f"update to return params {forms}", _forms(new))
        if not all(leaf.isfinite().all() for leaf in tree_leaves(new)):
            fail("update to return finite params", "inf or nan")
        new, state = cfg.update(new, grads, state)


def _first_update(cfg: AdapterConfig, adapt: Adapt, params: Tree, grads: Tree) -> tuple[Any, Any]:
    """Run the first update from no state, or from the constants, as some methods do."""
    try:
        return cfg.update(params, grads)
    except ValueError as e:
        refused = e
    try:
        return cfg.update(params, grads, adapt.constants)
    except ValueError:
        raise unittest.SkipTest(f"its update refuses these params: {refused}") from refused


def _forms(tree: Tree) -> dict[str, str]:
    return {name: f"{tuple(p.shape)} {p.dtype}" for name, p in sorted(flatten(tree).items())}


def untouched(cfg: AdapterConfig) -> None:
    """Building, calling and differentiating leave the model's bytes, classes and flags as they were."""
    model, x = _model(cfg)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    facts = [(type(m), m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    adapt, params = _build(model, cfg)
    adapt(params, x)
    torch.func.grad(lambda p: adapt(p, x).square().sum())(params)
    adapt.module(params)
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, before[name]):
            fail(f"the model's {name} as it was", "it changed")
    if facts != [(type(m), m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]:
        fail("the model's classes and flags as they were", "a change")
