"""Checks of a variant's arithmetic on one layer."""

import dataclasses
import math
import unittest
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lite.core.checked import set_typecheck
from lora_lite.core.config import AdapterConfig, with_fields
from lora_lite.core.frozen import USES, Frozen, Stored
from lora_lite.derived.cost import declared, macs_per_token
from lora_lite.layers.kind import Variant
from lora_lite.testing._case import VALUES, Case, Params, close, fail, float32, float64, make_cases, output_of


def facts(cfg: AdapterConfig) -> None:
    """The declared facts have their types."""
    if not isinstance(cfg.name, str) or not cfg.name:
        fail("name to be a non-empty string", repr(cfg.name))
    if not set(cfg.uses) <= set(USES):
        fail(f"uses to hold words among {list(USES)}", sorted(cfg.uses))
    if cfg.identity is not None and not 0 <= cfg.identity < 1:
        fail("identity to be None or a tolerance in [0, 1)", repr(cfg.identity))


def deterministic(cfg: AdapterConfig) -> None:
    """Init and constants draw from their generator only, and init returns new tensors each time."""
    with torch.random.fork_rng([]):
        torch.manual_seed(20_240_229)  # a state in which no variant leaves the generator
        state = torch.get_rng_state()
        for case, again in zip(float32(cfg), float32(cfg)):
            _same_tensors("constants", case.W.constants, again.W.constants)
            _same_tensors("the start", case.start, again.start)
            first, second = (case.cfg.init(case.W, torch.Generator().manual_seed(7)) for _ in range(2))
            _same_tensors("init", first, second)
            for name in first:
                if first[name].data_ptr() == second[name].data_ptr() and first[name].numel():
                    fail(f"init to give a new {name} each time", "the same memory")
            for name, c in case.W.constants.items():
                if c.untyped_storage().data_ptr() == case.W.weight.untyped_storage().data_ptr() and c.numel():
                    fail(f"constants to give a new {name}, which stays where the weight is written", "the weight's own memory")
        if not torch.equal(state, torch.get_rng_state()):
            fail("the global random state untouched", "it moved")


def _same_tensors(made_by: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    if first.keys() != second.keys():
        fail(f"{made_by} to give the same names for the same generator", sorted({*first} ^ {*second}))
    for name in first:
        if not torch.equal(first[name], second[name]):
            fail(f"{made_by} to give the same {name} for the same generator", "another")


def parts(cfg: AdapterConfig) -> None:
    """No part of the layer is used that `uses` does not name: other kinds of layers may lack it."""
    if cfg.adapts != "linear":
        raise unittest.SkipTest("only parts of linear layers differ by kind")
    for case in float32(cfg):
        W = _Watched(case.W, case.x)
        y = output_of(case.cfg, case.params, W, torch.full_like(case.x, math.nan))
        used = W.used | ({"vectors"} if y.isnan().any() else set())
        used -= {"project"} if "vectors" in case.cfg.uses else set()  # who sees the vectors can project them
        if not used <= set(case.cfg.uses):
            fail(f"uses to name {sorted(used)}", f"{sorted(case.cfg.uses)}")


class _Watched(Stored):
    """A layer that notes which of its parts are used. It knows its input: the one that a variant is given is of nan."""

    def __init__(self, W: Frozen, x: Tensor) -> None:
        super().__init__(W.weight, W.bias, W.constants)
        self.used: set[str] = set()
        self._x = x

    @property
    def weight(self) -> Tensor:
        self.used.add("dense")
        return self._weight

    def __call__(self, x: Tensor) -> Tensor:
        self.used.add("output")
        return F.linear(self._known(x), self._weight, self.bias)

    def matmul(self, x: Tensor) -> Tensor:
        self.used.add("matmul")
        return F.linear(x, self._weight)

    def project(self, x: Tensor, A: Tensor, dropout: float = 0.0) -> Tensor:
        self.used.add("project")
        return F.linear(self._known(x), A)

    def add_rows(self, x: Tensor, index: Tensor, D: Tensor) -> Tensor:
        self.used.add("rows")
        return F.linear(self._known(x), self._weight.index_add(0, index, D), self.bias)

    def _known(self, x: Tensor) -> Tensor:
        """Return the input for the one that is not to be read. Others, such as a rotated one, are vectors that the variant made."""
        return self._x if x.shape == self._x.shape and x.isnan().all() else x


def identity(cfg: AdapterConfig) -> None:
    """At its start the variant is the base layer: to the bit, or to the declared tolerance."""
    if cfg.identity is None:
        return
    for case in [*float32(cfg), *make_cases(cfg, torch.bfloat16)]:
        y, y0 = case(case.start), case.W(case.x)
        if cfg.identity == 0.0 and not torch.equal(y, y0):
            fail("the base output exactly at init", f"{float((y - y0).abs().max()):.1e} off")
        error = float((y - y0).norm() / y0.norm())
        if not error <= cfg.identity:
            fail(f"the base output to {cfg.identity} at init", f"{error:.1e} off")


def acts(cfg: AdapterConfig) -> None:
    """Moving each leaf changes the output."""
    for case in float64(cfg):
        for name in case.params:
            still = {**case.params, name: case.start[name]}
            if float((case(case.params) - case(still)).abs().max()) < 1e-8:
                fail(f"{name} to change the output", "no change")


def pure(cfg: AdapterConfig) -> None:
    """Nothing that goes in is modified, and no hidden randomness is used in evaluation mode."""
    for case in float32(cfg):
        tensors = {"x": case.x, "weight": case.W.weight, **case.params, **case.W.constants}
        before = {name: t.clone() for name, t in tensors.items()}
        state = torch.get_rng_state()
        first = case(case.params)
        _unmodified(tensors, before)
        torch.func.grad(lambda p, case=case: case(p).square().sum())(case.params)
        if not torch.equal(first, case(case.params)):
            fail("the same output twice", "another")
        _unmodified(tensors, before)
        if not torch.equal(state, torch.get_rng_state()):
            fail("the global random state untouched", "it moved")


def _unmodified(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.equal(tensor, before[name]):
            fail(f"{name} unmodified", "it changed")


def vmapped(cfg: AdapterConfig) -> None:
    """`vmap` over stacked params, and over gradients by example, equals a loop."""
    for case in float64(cfg):
        members = [{name: c * p for name, p in case.params.items()} for c in (1.0, 0.5, 0.0)]
        stacked = {name: torch.stack([m[name] for m in members]) for name in case.params}
        close("vmap over params", torch.vmap(case.delta)(stacked), torch.stack([case.delta(m) for m in members]), 1e-10)

        def loss(params: Params, x: Tensor, case: Case = case) -> Tensor:
            return case(params, x).square().sum()

        each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(case.params, case.x)
        for name in case.params:
            want = torch.stack([torch.func.grad(loss)(case.params, x)[name] for x in case.x])
            close(f"per-example gradients of {name}", each[name], want, 1e-10)


def rows(cfg: AdapterConfig) -> None:
    """Rows are independent where they are said to be, and any leading axes do: none, several, an empty one."""
    for case in float64(cfg):
        i, o = case.W.in_features, case.W.out_features
        whole = case(case.params)
        for k in range(3) if cfg.rowwise else ():
            close("a row alone", case(case.params, case.x[k]), whole[k], 1e-10)
        if cfg.adapts != "block":  # whose positions are not alike
            one = whole[0, 0] if cfg.rowwise else case(case.params, case.x[:1, :1])[0, 0]
            close("a single vector", case(case.params, case.x[0, 0]), one, 1e-10)
        close("further axes", case(case.params, case.x.view(3, 1, 2, i)), whole.view(3, 1, 2, o), 1e-10)
        if case(case.params, case.x[:0]).shape != (0, 2, o):
            fail(f"an empty batch to give {(0, 2, o)}", tuple(case(case.params, case.x[:0]).shape))


def steered(cfg: AdapterConfig) -> None:
    """Strength 0 is the base layer, 1 the adapter itself, and the strength has a gradient."""
    for case in float64(cfg):
        one, zero = cfg.steer(case.params, 1.0), cfg.steer(case.params, 0.0)
        close("the params at strength 1", case(dict(one)), case(case.params), 1e-10)
        close("strength 0", case(dict(zero)), case.W(case.x), 1e-10)
        strength = torch.tensor(0.5, dtype=torch.float64)
        slope = torch.func.grad(lambda c, case=case: case(dict(cfg.steer(case.params, c))).square().sum())(strength)
        if not slope.abs() > 0:
            fail("a gradient for the strength", float(slope))


def proportional(cfg: AdapterConfig) -> None:
    """A small strength makes an update in proportion to it. One with its square would have the adapter again at -1."""
    for case in float64(cfg):
        zero = torch.zeros((), dtype=torch.float64)
        begun = torch.func.jvp(lambda c, case=case: case(dict(cfg.steer(case.params, c))), (zero,), (zero + 1,))[1]
        if not begun.abs().max() > 0:
            fail("an update in proportion to a small strength", "none in first order. Name in steered one factor of a product")


def positions(cfg: AdapterConfig) -> None:
    """A variant that acts at some positions only leaves the others as the base layer has them, and acts at these as at all."""
    if "positions" not in cfg.uses:
        raise unittest.SkipTest("it acts at all positions")
    for case in float64(cfg):
        W = case.W.with_constants(case.W.constants)
        W.active = torch.tensor([[True, False], [False, False], [True, True]])
        masked, whole, y0 = Variant(case.cfg)(case.params, W, case.x), case(case.params), case.W(case.x)
        close("the base output where it does not act", masked[~W.active], y0[~W.active], 1e-10)
        if cfg.rowwise:
            close("the whole update where it acts", masked[W.active], whole[W.active], 1e-10)


def training(cfg: AdapterConfig) -> None:
    """In training mode it computes the same but for dropout, whose shapes, gradients and `vmap` hold."""
    for evaluated in float32(cfg):
        case = evaluated.in_training()
        drops = dict.fromkeys((name for name in dir(cfg) if name.endswith("dropout")), 0.5)  # rank_dropout too
        if drops:
            case = dataclasses.replace(case, cfg=with_fields(case.cfg, **drops))
            _drops_the_update(case, evaluated)
        elif not torch.equal(case(case.params), evaluated(case.params)):
            fail("the same output in training mode, for want of a field named dropout", "another")

        def loss(params: Params, x: Tensor, case: Case = case) -> Tensor:
            return case(params, x).square().mean()

        for name, grad in torch.func.grad(loss)(case.params, case.x).items():
            if grad.shape != case.params[name].shape or not grad.isfinite().all():
                fail(f"a finite gradient of {name} in training mode", tuple(grad.shape))
        each = torch.vmap(case, (None, 0), randomness="different")(case.params, case.x)
        if each.shape != (3, 2, case.W.out_features) or not each.isfinite().all():
            fail("finite outputs of a vmap with its own dropout for each row", tuple(each.shape))


def _drops_the_update(case: Case, evaluated: Case) -> None:
    """Hold that each field for dropout acts, and on the update alone."""
    names = [name for name in dir(case.cfg) if name.endswith("dropout")]
    for name in names:
        cfg = with_fields(case.cfg, **{other: 0.5 * (other == name) for other in names})
        try:
            cfg.__post_init__()
        except ValueError:  # a config may refuse it beside its other fields
            continue
        one, still = dataclasses.replace(case, cfg=cfg), evaluated(evaluated.params)
        if all(torch.equal(one(one.params), still) for _ in range(20)):  # a whole update may be dropped, or kept, by one draw
            fail(f"another output in training mode at {name}=0.5", f"the same. Drop the input of the update: W.dropped(x, self.{name})")
    if case.cfg.identity == 0.0 and not torch.equal(case(case.start), case.W(case.x)):
        fail("the base output at the start with dropout on", "another. Drop the input of the update, not that of W(x) or the output")


def precision(cfg: AdapterConfig) -> None:
    """In float32 and bfloat16 the update is that of the same numbers in float64. Float32 params serve a bfloat16 layer."""
    for dtype in (torch.float32, torch.bfloat16):
        for case in make_cases(with_fields(cfg, dtype=torch.float32), dtype):
            exact = case.to(torch.float64)
            y = case(case.params)
            if y.dtype != dtype:
                fail(f"the base output's dtype, {dtype}", y.dtype)
            close(f"the output in {dtype}", y, exact(exact.params), VALUES[dtype])
            grads = torch.func.grad(lambda p, case=case: case(p).float().square().mean())(case.params)
            for name, grad in grads.items():
                if grad.dtype != torch.float32 or not grad.isfinite().all():
                    fail(f"a finite float32 gradient of {name}", grad.dtype)


def shapes(cfg: AdapterConfig) -> None:
    """The declared shapes hold under type checking."""
    before = set_typecheck(True)
    try:
        for case in float32(cfg):
            y = case(case.params)
            if y.shape != (3, 2, case.W.out_features):
                fail(f"an output of shape {(3, 2, case.W.out_features)}", tuple(y.shape))
    finally:
        set_typecheck(before)


def counts(cfg: AdapterConfig) -> None:
    """The declared formulas of trained numbers and multiply-adds match the counted ones."""
    for case in float32(cfg):
        i, o = case.W.in_features, case.W.out_features
        shared = cfg.share_groups({"layer": case.W}).get("layer", {})  # what targets share is not one target's
        own = {name: p for name, p in case.cfg.init(case.W, torch.Generator()).items() if name not in shared}
        counted = {"trained": sum(p.numel() for p in own.values()), "macs": macs_per_token(cfg, case.params, case.W)}
        for fact, count in counted.items():
            if declared(cfg, fact, i, o, case.W.bias is not None) not in (None, count):
                fail(f"{fact} = {getattr(cfg, fact)} at i={i}, o={o}", count)
