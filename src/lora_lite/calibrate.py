"""Gather the statistics that a variant's start is derived from, where it depends on data.

The batches run through a private clone in evaluation mode, without a graph. Targets that begin with the same statistic and are given
the same tensors end with the same one, held once: `q`, `k` and `v` of a block.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lora_lite._errors import listed
from lora_lite._progress import shown
from lora_lite.clone import clone_module
from lora_lite.plan import Entries
from lora_lite.remat import install
from lora_lite.replica import Replica
from lora_lite.statistics import statistic_of

IGNORED = -100
"""The label of a position that takes no part in the loss."""


def require_data(entries: Entries, calibration: Any) -> None:
    """Refuse calibrated configs without data, data without calibrated configs, and what is not an iterable of batches."""
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
            f"build: expected calibration as an iterable of batches, found {type(calibration).__name__}. Wrap a single batch as [batch]."
        )


@torch.no_grad()
def gather(base: nn.Module, entries: Entries, batches: Iterable[Any], progress: bool = True) -> dict[str, Any]:
    """Run the batches through a clone of `base` and give the statistics of each calibrated target's inputs, by path.

    Raises:
        ValueError: for no batch, a target that saw no token, or values that are not finite; it names the targets.
    """
    clone = clone_module(base)
    install(clone, None)
    run = Replica(clone.eval(), [])
    watch = Watch({target.path: statistic_of(cfg) for target, cfg in entries if cfg.calibrated})
    for path in watch.states:
        hook = functools.partial(watch.see, path)
        clone.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    seen = 0
    for batch in shown(batches, "calibration", progress):
        watch.begin(batch)
        try:
            run({}, batch, {})
        except Exception as e:
            e.add_note(f"in batch {seen} of the calibration data")
            raise
        seen += 1
    _check(watch.states, seen)
    return watch.states


class Watch:
    """The statistics of some layers while a model runs; `kinds` gives for each path its empty statistic and whether labels mask."""

    def __init__(self, kinds: Mapping[str, tuple[Callable[[], Any], bool]]) -> None:
        starts = {kind: kind[0]() for kind in kinds.values()}
        self.states = {path: starts[kind] for path, kind in kinds.items()}
        self._label_mask = {path: kind[1] for path, kind in kinds.items()}
        self.begin(None)

    def begin(self, batch: Any) -> None:
        """Turn to a batch."""
        self._batch = batch
        self._next: Any = weakref.WeakKeyDictionary()  # statistic -> the tensor added to it -> (the tensor's version, what that gave)

    def see(self, path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Add a layer's input to its statistic, or take what another layer's addition of the same tensor to the same one gave."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        state, version = self.states[path], 0 if x.is_inference() else x._version
        following = self._next.setdefault(state, WeakIdKeyDictionary())
        if following.get(x, (None,))[0] != version:  # another tensor, or the same one written to since
            rows = _unmasked(x, _masks(self._batch, self._label_mask[path]))
            following[x] = (version, state.add(rows) if len(rows) else state)
        self.states[path] = following[x][1]


def _masks(batch: Any, label_mask: bool) -> list[Tensor]:
    """Give what a batch says of its positions: `(b, t)`, True where one counts."""
    if not isinstance(batch, Mapping):
        return []
    masks = [(batch.get("attention_mask"), lambda m: m != 0), (batch.get("labels") if label_mask else None, lambda m: m != IGNORED)]
    return [counts(m) for m, counts in masks if isinstance(m, Tensor) and m.dim() == 2]


def _unmasked(x: Tensor, masks: list[Tensor]) -> Tensor:
    """Give the rows `(n, i)` of an input at the positions that count, by the masks that match its leading axes."""
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
    infinite = [path for path, state in states.items() if not torch.as_tensor(getattr(state, "mean_abs", 0.0)).isfinite().all()]
    if infinite:
        raise ValueError(f"build: expected finite inputs in calibration, found inf or nan at {listed(infinite)}. Check the batches.")
