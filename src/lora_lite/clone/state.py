"""The state of a copy: what its modules hold besides weights, put back after each call.

A model may keep state between calls: a counter, a list it appends to, a buffer registered anew beside an attribute that says for what
length. A call begins with what the model held at the build and leaves nothing behind, so that equal arguments give equal outputs. Tensors
that a forward may write in place are copied for the call. Afterwards `__dict__`, tables and containers are compared with what they held.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_lite.clone.references import containers_in
from lora_lite.core.tree import join
from lora_lite.layers.access import renormed

_SMALL = 2**16
_OURS = "lora_lite."
_TORCHS = "torch.nn.modules."
_TABLES = ("_buffers", "_modules", "_non_persistent_buffers_set")
_HOOKS = tuple(name for name in vars(nn.Module()) if name.startswith(("_forward", "_backward")))
"""The tables of hooks. A forward may install some once and note beside that it did, as those of transformers do for hidden states."""


def volatile_buffers(clone: nn.Module) -> dict[str, Tensor]:
    """Find the buffers that a forward may update in place: BatchNorm's statistics, counters and their like, by name."""
    return {
        join(path, name): buffer
        for path, module in clone.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and volatile(buffer, module.training)
    }


def volatile(tensor: Tensor, training: bool) -> bool:
    """Whether a forward may write a tensor in place. It aliases the user's, so each call gets a copy.

    Small ones are copied whatever they are; of the large ones those that hold floating numbers in training mode, since large integer
    tensors are packed weights and masks, which nobody updates.
    """
    return tensor.device.type != "meta" and (tensor.numel() <= _SMALL or (training and tensor.is_floating_point()))


class State:
    """The state of the modules of a copy, from now on put back after each call.

    Args:
        root: the copy.

    Attributes:
        kept: the state at the start, a list for `put`.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = modules_of_model(root).values()
        foreign = any(map(has_code, modules))
        self._live: list[Any] = []
        tensors: dict[int, tuple[Tensor, list[tuple[Any, Any]]]] = {}
        for module in modules:
            for place in _places(module) if foreign else [module._buffers]:
                for key, value in items(place):
                    if isinstance(value, Tensor) and _may_change(place, module, key, value):
                        tensors.setdefault(id(value), (value, []))[1].append((place, key))
            if renormed(module):
                table = module._parameters
                tensors.setdefault(id(table["weight"]), (table["weight"], []))[1].append((table, "weight"))  # type: ignore[arg-type]
            if foreign:  # else all code that runs is torch's, which keeps its state in buffers
                self._live += _places(module) if has_code(module) or module._buffers else [vars(module)]
        self._tensors = list(tensors.values())
        self._hooks = [vars(module)[name] for module in modules for name in _HOOKS if name in vars(module)] if foreign else []
        self._installed = RemovableHandle.next_id  # of any module's last hook: it tells that none came, at the price of a look
        self.kept = self.now()
        self._hooks_kept = self.kept[len(self._live) :]
        self._empty, self._filled = [p for p in self._live if not p], [p for p in self._live if p]
        self._filled_kept = [was for was in self.kept[: len(self._live)] if was]

    def now(self) -> list[Any]:
        """Return the present state, for `put`."""
        return [_copy(place) for place in (*self._live, *self._hooks)]

    def enter(self) -> None:
        """Put copies in the place of the tensors that a forward may write into; one that is held twice stays one."""
        for tensor, places in self._tensors:
            own = nn.Parameter(tensor.clone(), False) if isinstance(tensor, nn.Parameter) else tensor.clone()
            for place, key in places:
                place[key] = own

    def leave(self) -> None:
        """Put everything back."""
        for tensor, places in self._tensors:
            for place, key in places:
                if type(place) is not list or key < len(place):
                    place[key] = tensor
        try:
            # In C, and by identity first: this is the price of a call that changed nothing.
            same = not any(self._empty) and self._filled == self._filled_kept and self._unhooked()
        except Exception:
            same = False  # the comparison of two tensors has no truth value
        if not same:
            self.put(self.kept)

    def _unhooked(self) -> bool:
        """Whether no hook was installed since the last look, in the modules of the copy."""
        was, self._installed = self._installed, RemovableHandle.next_id
        return was == self._installed or self._hooks == self._hooks_kept

    def put(self, kept: list[Any]) -> None:
        """Make the modules hold what they held."""
        for place, was in zip((*self._live, *self._hooks), kept):
            if not same(place, was):
                place.clear()
                place.extend(was) if hasattr(place, "extend") else place.update(was)


def own_state(module: nn.Module) -> None:
    """Replace tensors of a copy that its forward may write into by clones, so that the user's stay as they are."""
    State(module).enter()


def modules_of_model(root: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a copy by path, without adapters."""
    return {path: module for path, module in root.named_modules() if not type(module).__module__.startswith(_OURS)}


def has_code(module: nn.Module) -> bool:
    """Whether code that is neither torch's nor ours runs in a module: it may keep anything."""
    own = vars(module)
    forward = own.get("forward")
    forward = getattr(forward, "__self__", forward)  # a target's is a method of its binding
    return (
        not type(module).__module__.startswith(_TORCHS)
        or bool(module._forward_hooks or module._forward_pre_hooks)
        or (forward is not None and not getattr(type(forward), "__module__", "").startswith(_OURS))
    )


def _places(module: nn.Module) -> list[Any]:
    """Return the places of a module's state: its `__dict__`, its tables, and the containers in its attributes."""
    own = vars(module)
    tables = [own[name] for name in _TABLES]
    held = {id(c): c for name, value in own.items() if not _skipped(name) for c in containers_in(value)}
    return [own, *tables, *held.values()]


def _skipped(name: str) -> bool:
    """Whether an attribute is a table of torch's, or one of ours."""
    return name in _NOT_STATE or name.startswith("_lora_lite")


_NOT_STATE = frozenset(name for name, value in vars(nn.Module()).items() if hasattr(value, "copy"))


def items(place: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the keys and values of a mapping or a list; other containers have no keys."""
    if isinstance(place, dict):
        yield from place.items()
    elif isinstance(place, list):
        yield from enumerate(place)


def _may_change(place: Any, module: nn.Module, key: Any, value: Tensor) -> bool:
    ours = type(value) is not Tensor or str(key).startswith("_lora_lite")  # a stand-in for a weight would compute it
    return (place is module._buffers or not ours) and volatile(value, module.training)


def _copy(place: Any) -> Any:
    kind = list if isinstance(place, list) else dict if isinstance(place, dict) else set if isinstance(place, set) else type(place)
    return kind(place)


def same(place: Any, was: Any) -> bool:
    """Whether a container holds the same objects as before, in the same order."""
    if len(place) != len(was):
        return False
    if isinstance(place, dict):
        return all(k is j and v is w for (k, v), (j, w) in zip(place.items(), was.items()))
    return place == was if isinstance(place, set) else all(v is w for v, w in zip(place, was))
