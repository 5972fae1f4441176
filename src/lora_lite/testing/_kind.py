"""The conformance kit for kinds of layers: named checks that every kind must pass, and that users run on their own kinds."""

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapt import Adapt
from lora_lite.build import build
from lora_lite.core.config import AdapterConfig
from lora_lite.core.tree import Tree, tree_leaves, tree_map
from lora_lite.files.adapter_file import load, save
from lora_lite.layers.kind import Kind
from lora_lite.prepare.targets import find_targets
from lora_lite.testing._case import close, fail, told
from lora_lite.testing._kind_case import ROWS, VARIANTS, KindCase, make_kind_case, same_results
from lora_lite.transforms.gradients import value_and_grad
from lora_lite.transforms.per_example import per_example_grad
from lora_lite.transforms.stacks import stack
from lora_lite.transforms.to_lora import to_lora
from lora_lite.variants.eva import EVAConfig
from lora_lite.variants.lora import LoRAConfig

_NOT_LINEAR = "It is no linear map."


def found(case: KindCase) -> str | None:
    """The kind is found at the layer. A variant that uses a part which the kind lacks is refused with the kind's reason."""
    refused = None
    targets = find_targets(case.model, case.config(VARIANTS[case.kind.site][0]), kinds=(case.kind,))
    if not targets or any(target.kind is not case.kind for target in targets):
        fail(f"targets of {case.kind.__name__}", [target.kind.__name__ for target in targets])
    for cfg in VARIANTS[case.kind.site]:
        if not set(cfg.uses) <= set(case.kind.gives):
            refused = _refused(case, functools.partial(build, case.model, case.config(cfg), kinds=(case.kind,)))
    return refused


def _refused(case: KindCase, attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except ValueError as e:
        if not case.kind.why or case.kind.why not in str(e):
            fail(f"an error with the kind's reason, why={case.kind.why!r}", str(e))
    else:
        fail("an error that refuses what the kind does not give", "none")
    return case.kind.why


def base(case: KindCase) -> None:
    """At its start, and as `adapt.base`, the adapted model is the model, what the layer returns beside its output included."""
    want, whole = case.model(case.x), case.whole
    results = whole(case.x)
    for cfg in case.variants:
        adapt = build(case.model, case.config(cfg), kinds=(case.kind,), progress=False)
        close("adapt.base", adapt.base(case.x), want, case.tolerance)
        if cfg.identity is not None:
            close(f"{cfg.name} at its start", adapt(adapt.init(), case.x), want, max(case.tolerance, 2 * cfg.identity))
        if not isinstance(results, Tensor):
            adapt = build(whole, case.config(cfg), kinds=(case.kind,), progress=False)
            tolerance = max(case.tolerance, 2 * (cfg.identity or 0.0)) if cfg.identity is not None else math.inf
            same_results(adapt(adapt.init(), case.x), results, tolerance)


def gradient(case: KindCase) -> None:
    """Gradients agree with central differences, and reach every leaf."""
    for cfg in case.variants:
        adapt, params = case.adapted(cfg)
        loss = _loss(adapt, case.x)
        grads = value_and_grad(loss)(params)[1]
        g = torch.Generator().manual_seed(1)
        along = tree_map(lambda p, g=g: torch.randn(p.shape, generator=g, dtype=p.dtype), params)
        if any(not grad.any() for grad in tree_leaves(grads)):
            fail(f"a gradient for every param of {cfg.name}", "none for one")
        if cfg.name == "dora":  # its norm is detached, which finite differences do not see
            continue
        sides = [loss(tree_map(lambda p, d, sign=sign: p + sign * 1e-6 * d, params, along)) for sign in (1, -1)]
        slope = sum((grad * d).sum() for grad, d in zip(tree_leaves(grads), tree_leaves(along)))
        close(f"the gradient of {cfg.name}", torch.as_tensor(slope), (sides[0] - sides[1]) / 2e-6, 1e-5)


def _loss(adapt: Adapt, x: Any) -> Callable[[Tree], Tensor]:
    return lambda params: adapt(params, x).square().sum()


def merged(case: KindCase) -> None:
    """Merged tensors load by the module's own names, with no unexpected key, and give the adapted outputs."""
    for cfg in case.variants:
        adapt, params = case.adapted(cfg)
        if not cfg.linear:
            continue
        weights = adapt.merge(params)
        twin = copy.deepcopy(case.model)
        unexpected = twin.load_state_dict(weights, strict=False).unexpected_keys
        if unexpected:
            fail("merged tensors under names of the module's own state dict", f"unexpected {unexpected}; set the kind's state")
        if any(adapt.merge_error(params, weights).values()) and max(adapt.merge_error(params, weights).values()) > 1e-9:
            fail("a merge error of rounding", adapt.merge_error(params, weights))
        close(f"the model with {cfg.name} merged", twin(case.x), adapt(params, case.x), case.tolerance)


def mixed(case: KindCase) -> str | None:
    """Rows of a mixed batch equal a loop over the members, and per-example gradients a loop over the rows. A kind may refuse both."""
    refused = None
    index = [k % 2 for k in range(ROWS)]
    for cfg in case.variants:
        adapt, params = case.adapted(cfg)
        members = [params, tree_map(lambda p: 0.5 * p, params)]
        try:
            together = adapt.mixed(stack(members), case.x, index)
        except ValueError as e:
            if not case.kind.why:
                fail("a mixed batch, or an error and the kind's reason in `why`", str(e))
            refused = case.kind.why
            continue
        grads = per_example_grad(adapt, lambda out, batch: out.flatten(1).square().sum(1))(params, case.x)
        for row, k in enumerate(index):
            alone = case.x[row : row + 1]
            close(f"a row of a mixed batch of {cfg.name}", together[row], adapt(members[k], alone)[0], case.tolerance)
            want = value_and_grad(_loss(adapt, alone))(params)[1]
            for got, one in zip(tree_leaves(grads), tree_leaves(want)):
                close(f"a per-example gradient of {cfg.name}", got[row], one, 10 * case.tolerance)
    return refused


def counts(case: KindCase) -> None:
    """Params and multiply-adds are counted."""
    for cfg in case.variants:
        adapt, params = case.adapted(cfg)
        if adapt.num_params != sum(p.numel() for p in tree_leaves(params)):
            fail(f"{sum(p.numel() for p in tree_leaves(params))} params", adapt.num_params)
        if adapt.macs_per_token < 0 or "targets" not in adapt.summary():
            fail("multiply-adds of at least 0 and a summary", adapt.macs_per_token)


def saved(case: KindCase) -> None:
    """A saved adapter loads onto a model that was never built on, and gives the same to the bit."""
    for cfg in case.variants:
        fresh = copy.deepcopy(case.model)
        adapt, params = case.adapted(cfg)
        with tempfile.TemporaryDirectory() as folder:
            save(adapt, params, Path(folder) / "adapter.safetensors")
            again, read = load(fresh, Path(folder) / "adapter.safetensors", kinds=(case.kind,))
        if not torch.equal(again(read, case.x), adapt(params, case.x)):
            fail("the loaded adapter's output to equal the saved one's", "another")


def calibrated(case: KindCase) -> str | None:
    """A start derived from the layer's inputs is built on them, or refused with the kind's reason."""
    if case.kind.site != "linear":
        return _NOT_LINEAR
    batches = [case.x]
    if "inputs" not in case.kind.gives or not set(EVAConfig.uses) <= set(case.kind.gives):
        return _refused(
            case, lambda: build(case.model, case.config(EVAConfig(r=2)), kinds=(case.kind,), calibration=batches, progress=False)
        )
    adapt, params = case.adapted(EVAConfig(r=2), calibration=batches)
    if not adapt(params, case.x).isfinite().all():
        fail("a finite output after calibration", "none")
    return None


def converted(case: KindCase) -> str | None:
    """`to_lora` at full rank gives the adapted outputs."""
    if case.kind.site != "linear" or not set(LoRAConfig.uses) <= set(case.kind.gives):
        return _NOT_LINEAR if case.kind.site != "linear" else case.kind.why
    for cfg in case.variants:
        if cfg.name == "ia3" and adapt_moves_bias(case, cfg):
            continue
        adapt, params = case.adapted(cfg)
        target = adapt.targets[0]
        lora, tree, errors = to_lora(adapt, params, r=min(target.i, target.o))
        if max(errors.values()) > 1e-6:
            fail(f"{cfg.name} as LoRA of full rank within 1e-6", errors)
        close(f"{cfg.name} converted to LoRA", lora(tree, case.x), adapt(params, case.x), 1e-5)
    return None


def adapt_moves_bias(case: KindCase, cfg: AdapterConfig) -> bool:
    """Whether a variant moves the bias of the layer, which LoRA cannot."""
    adapt, params = case.adapted(cfg)
    return any(layer.bias is not None for layer in (adapt._plan.layer(t, c) for t, c in adapt._plan.entries)) and bool(params)


def module(case: KindCase) -> None:
    """The bound module gives the same, keeps every class, and has nothing more in its state than the params."""
    for cfg in case.variants:
        adapt, params = case.adapted(cfg)
        bound = adapt.module(params)
        close(f"the module of {cfg.name}", bound(case.x), adapt(params, case.x), 1e-12)
        close(f"a deep copy of the module of {cfg.name}", copy.deepcopy(bound)(case.x), adapt(params, case.x), 1e-12)
        names = set(bound.state_dict()) - set(case.model.state_dict())
        if len(names) != len(tree_leaves(params)) or len(list(bound.buffers())) != len(list(case.model.buffers())):
            fail("nothing but the params beside the model's own state", sorted(names))
        for path, inner in case.model.named_modules():
            if type(bound.get_submodule(path)) is not type(inner):
                fail(f'"{path}" of class {type(inner).__name__}', type(bound.get_submodule(path)).__name__)


def untouched(case: KindCase) -> None:
    """Building, calling and merging leave the model's bytes, classes and attributes as they were, and torch's random state."""
    before = {name: t.clone() for name, t in case.model.state_dict().items()}
    facts = [(type(m), m.training, sorted(vars(m))) for m in case.model.modules()]
    state = torch.get_rng_state()
    for cfg in case.variants:
        adapt, params = case.adapted(cfg)
        value_and_grad(_loss(adapt, case.x))(params)
        adapt.module(params)
    for name, tensor in case.model.state_dict().items():
        if not torch.equal(tensor, before[name]):
            fail(f"the model's {name} as it was", "it changed")
    if facts != [(type(m), m.training, sorted(vars(m))) for m in case.model.modules()]:
        fail("the model's classes, modes and attributes as they were", "a change")
    if not torch.equal(state, torch.get_rng_state()):
        fail("the global random state as it was", "it moved")


KIND_CHECKS: dict[str, Callable[[KindCase], str | None]] = {
    f.__name__: f for f in (found, base, gradient, merged, mixed, counts, saved, calibrated, converted, module, untouched)
}
"""Every check of a kind by name. It returns the reason where something is refused, else None."""


def check_kind(
    kind: type[Kind],
    make_layer: Callable[[], nn.Module],
    make_input: Callable[[], Any] | None = None,
    names: str = r"^layer$",
    skip: Collection[str] = (),
) -> None:
    """Run every check of the kit on a kind of layer.

    Args:
        kind: the class.
        make_layer: makes a layer of the kind; it is put into a model under the name `layer`.
        make_input: makes the layer's input, of 4 rows; by default vectors `(4, 3, i)`.
        names: the expression by which a config asks for it.
        skip: names of checks that do not apply.

    Raises:
        AssertionError: it lists each check that failed, with what was expected and found.
        ValueError: where `skip` names no check.

    Example:
        >>> import torch, lora_lite as ll
        >>> from lora_lite.testing import check_kind
        >>> class Doubled(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> class DoubledKind(ll.Kind):
        ...     weight = property(lambda self: 2 * self.layer.weight)
        ...     bias = property(lambda self: 2 * self.layer.bias)
        ...
        ...     @classmethod
        ...     def fits(cls, layer):
        ...         return isinstance(layer, Doubled)
        ...
        ...     def to_weight(self, dense):
        ...         return dense / 2
        ...
        ...     def to_bias(self, bias):
        ...         return bias / 2
        >>> check_kind(DoubledKind, lambda: Doubled(6, 8))
    """
    unknown = [name for name in skip if name not in KIND_CHECKS]
    if unknown:
        raise ValueError(f"check_kind: expected skip to name checks among {list(KIND_CHECKS)}, found {unknown}.")
    case = make_kind_case(kind, make_layer, make_input, names)
    failures: list[str] = []
    for name, check in KIND_CHECKS.items():
        if name not in skip:
            failures += failure(check, case)
    if failures:
        lines = "\n".join(f"  - {line}" for line in failures)
        raise AssertionError(f"{kind.__name__} fails {len(failures)} of {len(KIND_CHECKS)} checks:\n{lines}")


def failure(check: Callable[[KindCase], str | None], case: KindCase) -> Sequence[str]:
    """Run one check and return a line for its failure, if any."""
    try:
        check(case)
    except Exception as e:
        return [told(check.__name__, e)]
    return []
