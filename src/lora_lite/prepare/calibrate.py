"""Gather the statistics that a variant's start is derived from, where it depends on data.

The batches run through a private clone in evaluation mode, without a graph unless gradients are asked for. Targets that begin with the same
statistic and are given the same tensors end with the same one, held once: `q`, `k` and `v` of a block.
"""

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from lora_lite.clone.checkpointing import install
from lora_lite.clone.per_call import Replica, arguments
from lora_lite.clone.settings import Settings
from lora_lite.clone.structure import clone_again
from lora_lite.core.errors import listed
from lora_lite.core.plan import Entries
from lora_lite.core.progress import shown
from lora_lite.core.statistics import needs_loss, statistic_of
from lora_lite.core.tracing import valueless
from lora_lite.prepare.masks import Positions
from lora_lite.prepare.ranks import merged_over_ranks

Loss = Callable[[Any, Any], Tensor]
Inputs = Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor]


def require_data(entries: Entries, calibration: Any, loss: Loss | None) -> None:
    """Refuse calibrated configs without data, a loss or data that no config uses, and data that is no iterable of batches."""
    if loss is not None and not any(needs_loss(cfg) for _, cfg in entries):
        others = sorted({type(cfg).__name__ for _, cfg in entries})
        raise ValueError(f"build: expected no loss, since none of {listed(others)} uses its gradient, found one. Leave loss out.")
    names = sorted({type(cfg).__name__ for _, cfg in entries if cfg.calibrated})
    if names and calibration is None:
        raise ValueError(
            f"build: expected calibration data for {listed(names)}, whose start is derived from the layers' inputs, found none. "
            "Use build(model, cfg, calibration=batches), an iterable of what adapt takes."
        )
    if calibration is None:
        return
    if not names:
        others = sorted({type(cfg).__name__ for _, cfg in entries})
        raise ValueError(f"build: expected no calibration, since none of {listed(others)} uses data, found some. Leave calibration out.")
    if isinstance(calibration, Mapping | Tensor | str) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"build: expected calibration as an iterable of batches, found {type(calibration).__name__}. Wrap a single batch as [batch], a "
            "dataset in a DataLoader."
        )


@torch.no_grad()
def gather(
    base: nn.Module,
    entries: Entries,
    batches: Iterable[Any],
    progress: bool = True,
    loss: Loss | None = None,
    group: Any = None,
    kinds: Sequence[Any] = (),
) -> dict[str, Any]:
    """Run the batches through a clone of `base` and return the statistics of each calibrated target, by path.

    Args:
        base: a plain clone of the model.
        entries: each target with its config.
        batches: as `adapt` takes them.
        progress: show a progress bar.
        loss: `(output, batch) -> scalar`, for statistics of gradients; None for the output's own `.loss`.
        group: a process group, for the statistics of the batches of all its processes; None for those of this one.

    Raises:
        ValueError: for no batch, a target that saw no token, a missing loss, or values that are not finite; it names the targets.
    """
    clone = clone_again(base, kinds)
    install(clone, None)
    run = Replica(clone.eval(), (), {}, Settings(clone))
    calibrated = {target.path: cfg for target, cfg in entries if cfg.calibrated}
    watch = Watch({path: statistic_of(cfg) for path, cfg in calibrated.items()}, Positions(run.module))
    if group is not None:
        _require_mergeable(watch.states)
    with_loss = [path for path, cfg in calibrated.items() if needs_loss(cfg)]
    probe = torch.zeros((), device=_device(clone), requires_grad=True)
    seen_by = {target.path: target.kind.at(clone, target.path).inputs for target, cfg in entries if cfg.calibrated}
    for path in calibrated:
        layer = clone.get_submodule(path)
        if path in with_loss:
            layer.register_forward_hook(functools.partial(watch.see_gradient, path, seen_by[path], probe), with_kwargs=True)
        else:
            layer.register_forward_pre_hook(functools.partial(watch.see, path, seen_by[path]), with_kwargs=True)
    seen = 0
    for batch in shown(batches, "calibration", progress):
        watch.begin(batch)
        try:
            _require_values(arguments(batch, {}), seen, clone)
            if with_loss:
                _backward(run, batch, loss, probe)
            else:
                run.frozen(batch, {})
        except Exception as e:
            e.add_note(f"in batch {seen} of the calibration data")
            if isinstance(batch, Mapping | Tensor | Sequence) and not isinstance(batch, str | bytes):
                e.add_note(_given(batch, clone))
            raise
        seen += 1
    states, seen = (watch.states, seen) if group is None else _of_all(watch.states, seen, clone, group)
    _check(states, seen)
    return states


def _require_values(given: Any, seen: int, clone: nn.Module) -> None:
    """Raise unless a batch has values where the model has them.

    Raises:
        ValueError: for one on meta, which some models take without an error.
    """
    on_meta = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.is_meta]
    if on_meta and _device(clone).type != "meta":
        raise ValueError(
            f"build: expected batch {seen} of the calibration data with values, found tensors on meta. Make it on the model's device, "
            f"{_device(clone)}."
        )


def _given(batch: Any, clone: nn.Module) -> str:
    """Describe a batch beside the arguments that the model takes, for the error of a call."""
    args, kwargs = arguments(batch, {})
    named = {**{str(k): value for k, value in enumerate(args)}, **kwargs}
    shown = ", ".join(f"{name}: {_described(value)}" for name, value in list(named.items())[:8])
    try:
        takes = [name for name in inspect.signature(clone.forward).parameters if name not in ("args", "kwargs")]
    except (TypeError, ValueError):  # a callable that Python cannot look into
        takes = []
    return (
        f"The batch has {shown or 'nothing'}; {type(clone).__name__} takes {listed(takes, 8) or 'anything'}, and lies on {_device(clone)}. "
        "Pass batches as adapt(params, batch) takes them."
    )


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


def _require_mergeable(states: Mapping[str, Any]) -> None:
    lacking = sorted({type(state).__name__ for state in states.values() if not (hasattr(state, "merge") and hasattr(state, "to"))})
    if lacking:
        raise ValueError(
            f"build: expected statistics with merge(other) and to(device) for a group of processes, found none in {listed(lacking)}. Add "
            "them, or leave group out."
        )


def _of_all(states: Mapping[str, Any], seen: int, clone: nn.Module, group: Any) -> tuple[dict[str, Any], int]:
    """Merge statistics over the processes of a group. Each lies on its layers' device again, once for all that share it."""
    merged, seen = merged_over_ranks(states, seen, group)
    devices = {path: _device(clone.get_submodule(path)) for path in merged}
    placed: dict[Any, Any] = {}
    for path, state in merged.items():
        key = id(state), devices[path]
        placed[key] = placed.get(key) or state.to(devices[path])
    return {path: placed[id(state), devices[path]] for path, state in merged.items()}, seen


@torch.enable_grad()
def _backward(run: Replica, batch: Any, loss: Loss | None, probe: Tensor) -> None:
    """Run forward and back as far as the layers' outputs, whose hooks see the gradients pass."""
    torch.autograd.grad(_loss_of(run.frozen(batch, {}), batch, loss), probe, allow_unused=True)


def _loss_of(output: Any, batch: Any, loss: Loss | None) -> Tensor:
    value = getattr(output, "loss", None) if loss is None else loss(output, batch)
    if not isinstance(value, Tensor) or value.dim():
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else "none" if value is None else type(value).__name__
        where = "the model's output to have a .loss" if loss is None else "loss(output, batch) to return a scalar tensor"
        raise ValueError(f"build: expected {where}, found {found}. Put labels into the batches, or pass build(..., loss=f).")
    if not value.requires_grad:
        raise ValueError(
            "build: expected a loss that depends on the calibrated layers, found one without a gradient. Compute it from output."
        )
    return value


class Watch:
    """The statistics of some layers while a model runs.

    Args:
        kinds: for each path its empty statistic and whether labels mask.
        positions: which positions count at each path.
    """

    def __init__(self, kinds: Mapping[str, tuple[Callable[[], Any], bool]], positions: Positions) -> None:
        self._positions = positions
        starts = {kind: kind[0]() for kind in kinds.values()}
        self.states = {path: starts[kind] for path, kind in kinds.items()}
        self._label_mask = {path: kind[1] for path, kind in kinds.items()}
        self.begin(None)

    def begin(self, batch: Any) -> None:
        """Begin a batch, with no sums to reuse."""
        self._batch = batch
        self._next: Any = weakref.WeakKeyDictionary()  # statistic -> the tensor added to it -> (the tensor's version, what that gave)

    def see(self, path: str, inputs: Inputs, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Add a layer's input to its statistic, or reuse the sum where another layer added the same tensor to the same statistic."""
        x = inputs(args, kwargs)
        state, version = self.states[path], 0 if x.is_inference() else x._version
        following = self._next.setdefault(state, WeakIdKeyDictionary())
        if following.get(x, (None,))[0] != version:  # another tensor, or the same one written to since
            rows = _unmasked(x, self._positions.masks(path, self._batch, x, self._label_mask[path]))
            following[x] = (version, state.add(rows) if len(rows) else state)
        self.states[path] = following[x][1]

    @torch.no_grad()
    def see_gradient(
        self, path: str, inputs: Inputs, probe: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor
    ) -> Tensor:
        """Let a layer's output carry a gradient, and add the weight's gradient to the statistic in the backward pass."""
        x = inputs(args, kwargs).detach()

        def add(dy: Tensor) -> None:
            with torch.no_grad():
                self.states[path] = self.states[path].add(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))

        with torch.enable_grad():
            y = y + probe.to(y.device, y.dtype)
        y.register_hook(add)
        return y


def _unmasked(x: Tensor, masks: list[Tensor]) -> Tensor:
    """Return the rows `(n, i)` of an input at the positions that count, by the masks that match its leading axes."""
    keep = None
    for mask in masks:
        if x.dim() == 2 and len(x) == mask.numel():
            mask = mask.reshape(-1)  # tokens in one axis
        elif x.dim() < 3 or x.shape[:2] != mask.shape:
            continue
        mask = mask.to(x.device)
        keep = mask if keep is None else keep & mask
    return (x if keep is None else x[keep]).reshape(-1, x.shape[-1])


def _check(states: Mapping[str, Any], seen: int) -> None:
    if not seen:
        raise ValueError("build: expected at least one batch of calibration data, found none. Was the iterator used up before?")
    unseen = [path for path, state in states.items() if not state.count]
    if unseen:
        raise ValueError(
            f"build: expected each calibrated layer to see a token, found none in {seen} batches at {listed(unseen)}. Use batches that "
            "reach it and are not masked as a whole, or leave it out with exclude_names."
        )
    infinite = [path for path, state in states.items() if not _finite(state)]
    if infinite:
        raise ValueError(f"build: expected finite inputs in calibration, found inf or nan at {listed(infinite)}. Check the batches.")


def _finite(state: Any) -> bool:
    values = [getattr(state, name, None) for name in ("mean_abs", "gradient")]
    return all(valueless(value) or bool(value.isfinite().all()) for value in values if isinstance(value, Tensor))


def _device(module: nn.Module) -> torch.device:
    """Return the device of a module's first tensor. Some packed layers hold buffers only."""
    return next(itertools.chain(module.parameters(), module.buffers())).device
