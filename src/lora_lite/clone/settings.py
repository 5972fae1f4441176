"""The settings of a copy: its own, so that neither a call nor a tool changes those of the user's model.

Settings are what a class can write as a dict and read from one, as a transformers model's `config`. A forward may write into them, as
classifiers do that note the kind of their labels, and so do tools that take a module. What the user changes is followed by eager calls.
"""

import copy
from typing import Any

from torch import nn

from lora_lite.clone.references import PLAIN
from lora_lite.core.tree import modules_by_path

_METHODS = ("to_dict", "from_dict")
_SIZES = "_lora_lite_sizes"
_RESIZED = "vocab_size"
"""The end of the settings' names that `resize_token_embeddings` changes with the weights."""


class Settings:
    """The settings of a copy, made its own, and those that they are copies of.

    Args:
        root: a copy that shares its settings with the user's model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        memo: dict[int, Any] = {}
        theirs: dict[int, Any] = {}
        for module in modules_by_path(root).values():
            for name, value in list(vars(module).items()):
                if _is_settings(value):
                    theirs[id(value)] = value  # held, so that an `id` stays its own
                    vars(module)[name] = copy.deepcopy(value, memo)
        self._theirs, self._own = theirs, {key: memo[key] for key in theirs}
        self._pairs = [(vars(value), vars(self._own[key])) for key, value in theirs.items()]
        self._noted = [(dict(user), dict(own)) for user, own in self._pairs]
        self._changed: list[set[str]] = [set() for _ in self._pairs]
        for value, sizes in vars(root).get(_SIZES, ()):
            self._require_sizes(vars(value), sizes)

    def follow(self) -> None:
        """Take over what the user has changed since the last call.

        Raises:
            ValueError: where that is the size of weights, which a copy has from the build.
        """
        for n, ((user, own), (was, kept)) in enumerate(zip(self._pairs, self._noted)):
            if not _same(user, was):
                self._require_sizes(user, was)
                changed = {name for name, value in user.items() if name not in was or not _same(was[name], value)}
                fresh = {
                    name: copy.deepcopy(value, dict(self._own)) if name in changed or name not in kept else kept[name]
                    for name, value in user.items()
                }
                self._changed[n] |= {name for name in changed if type(user[name]) in PLAIN}
                own.clear()
                own.update(fresh)
                self._noted[n] = dict(user), fresh

    def _require_sizes(self, user: dict[str, Any], was: dict[str, Any]) -> None:
        sizes = {size for p in self._root.parameters() for size in p.shape}
        for name, now in user.items():
            before = was.get(name)
            if name.endswith(_RESIZED) and type(now) is int and now != before and type(before) is int and before in sizes:
                raise ValueError(
                    f"adapt: expected the model's config to keep the sizes of its weights, found {name} changed from {before} to {now} "
                    "after build, as by resize_token_embeddings. adapt has the weights of the build. Build again on the model as it is "
                    "now: the params of layers whose shapes are as before fit both."
                )

    def read(self) -> None:
        """Read all that the user may change, where the compiler traces: it compares what it has read with each call, and traces anew."""
        for (user, _), settings, changed in zip(self._pairs, self._own.values(), self._changed):
            _read(user)
            for name in changed:  # not left to the trace: the compiled code would depend on what the last call took over
                if name in user:
                    object.__setattr__(settings, name, user[name])

    def restore(self) -> None:
        """Put back what a call has changed."""
        for (_, own), (_, kept) in zip(self._pairs, self._noted):
            if not _same(own, kept):
                own.clear()
                own.update(kept)


def note_sizes(root: nn.Module) -> None:
    """Note on a copy the sizes in its settings at the build: it shares them with the user's model until a call."""
    held = {id(value): value for module in modules_by_path(root).values() for value in vars(module).values() if _is_settings(value)}
    if held:
        sizes = [(value, {name: size for name, size in vars(value).items() if name.endswith(_RESIZED)}) for value in held.values()]
        vars(root)[_SIZES] = sizes


def _is_settings(value: Any) -> bool:
    return hasattr(value, "__dict__") and all(hasattr(type(value), method) for method in _METHODS)


def _read(value: Any) -> None:
    if isinstance(value, dict):
        for inner in value.values():
            _read(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _read(inner)
    elif isinstance(value, bool | int | float | str):
        _NOTHING.get(value)  # a look-up takes the value itself, where the compiler would trace a number as a symbol


_NOTHING: dict[Any, None] = {}


def _same(now: Any, was: Any) -> bool:
    try:
        return bool(now is was or now == was)  # in C, and by identity first
    except Exception:
        return False  # the comparison of two tensors has no truth value
