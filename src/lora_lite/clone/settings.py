"""The settings of a copy: its own, so that neither a call nor a tool changes those of the user's model.

Settings are what a class can write as a dict and read from one, as a transformers model's `config`. A forward may write into them, as
classifiers do that note the kind of their labels, and so do tools that take a module. What the user changes is followed by eager calls.
"""

import copy
from typing import Any

from torch import nn

from lora_lite.core.tree import modules_by_path

_METHODS = ("to_dict", "from_dict")


class Settings:
    """The settings of a copy, made its own, and those that they are copies of.

    Args:
        root: a copy that shares its settings with the user's model.
    """

    def __init__(self, root: nn.Module) -> None:
        memo: dict[int, Any] = {}
        theirs: dict[int, Any] = {}
        for module in modules_by_path(root).values():
            for name, value in list(vars(module).items()):
                if hasattr(value, "__dict__") and all(hasattr(type(value), method) for method in _METHODS):
                    theirs[id(value)] = value  # held, so that an `id` stays its own
                    vars(module)[name] = copy.deepcopy(value, memo)
        self._theirs, self._own = theirs, {key: memo[key] for key in theirs}
        self._pairs = [(vars(value), vars(self._own[key])) for key, value in theirs.items()]
        self._noted = [(dict(user), dict(own)) for user, own in self._pairs]

    def follow(self) -> None:
        """Take over what the user has changed since the last call."""
        for n, ((user, own), (was, _)) in enumerate(zip(self._pairs, self._noted)):
            if not _same(user, was):
                fresh = {name: copy.deepcopy(value, dict(self._own)) for name, value in user.items()}
                own.clear()
                own.update(fresh)
                self._noted[n] = dict(user), fresh

    def restore(self) -> None:
        """Put back what a call has changed."""
        for (_, own), (_, kept) in zip(self._pairs, self._noted):
            if not _same(own, kept):
                own.clear()
                own.update(kept)


def _same(now: dict[str, Any], was: dict[str, Any]) -> bool:
    try:
        return now == was  # in C, and by identity first
    except Exception:
        return False  # the comparison of two tensors has no truth value
