"""The forward of a block as a function of tensors alone: all that it reads and that is swapped for a call is an input.

Inputs are the tensors among its arguments, in containers too, the params and buffers of its modules, and tensors with a gradient that stand
in attributes of these. Outputs are the tensors that it makes: those of its result, and those that it writes into containers and attributes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree

from lora_lite.clone.containers import Containers, Place
from lora_lite.clone.held import Held
from lora_lite.clone.listing import parameters_of
from lora_lite.clone.state import State, items, same
from lora_lite.clone.strays import NoStrays, carries, forward_levels, require_no_hidden, require_unwritten, versions
from lora_lite.clone.written import Weights
from lora_lite.core.errors import listed
from lora_lite.core.recompute import unviewed

_CHECKED: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()
"""The sorts of arguments with which a block has been found to read nothing else."""


@dataclass(frozen=True)
class _From:
    """A tensor of the outputs: an input, by its number, or a tensor that the Function makes, in this shape."""

    number: int
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Layout:
    """The outputs of a run: their tree and its leaves, the shapes of the tensors that the Function makes, empty containers for new ones."""

    spec: Any
    leaves: list[Any]
    shapes: list[tuple[int, ...]]
    others: list[Any]


class BlockFunction:
    """The forward of a block as a function of tensors, to be run several times with equal results.

    Args:
        name: the block, for messages.
        fn: its forward.
        block: the block.
        args, kwargs: the arguments of `fn`.

    Attributes:
        inputs: the tensors of its first run.
        kept: ids of the tensors that its runs have handed out. Derivatives forward run it again.
    """

    def __init__(self, name: str, fn: Callable[..., Any], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._name, self._fn, self._block = name, fn, block
        self._containers = Containers()
        given = self._containers.take(args), {key: self._containers.take(value) for key, value in kwargs.items()}
        self._leaves, self._spec = pytree.tree_flatten((*given, self._containers.contents))
        self._places = [k for k, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self._held, self._state = Held.of(block), State(block)
        self._read = dict(_attributes(self._state.kept))
        self.inputs = [*(self._leaves[k] for k in self._places), *self._read.values(), *self._held.tensors]
        self.kept: set[int] = set()
        self._forward = forward_levels()
        self._writes: list[Any] = []  # places of attributes
        self._weights = Weights(block)
        self._versions = self._weights.versions()
        self._layout: _Layout | None = None
        self._checks: NoStrays | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run the block on tensors in the place of its inputs, and return those that it makes."""
        if self._layout is not None:
            self._require_weights()
            return self._as_laid_out(self._run(tensors, nullcontext())[0], self._layout)
        if self._sort() in _CHECKED.get(self._block, ()):
            return self._lay_out(*self._run(tensors, nullcontext()), tensors)
        # Other objects stand for the inputs, so that one that is read from elsewhere too is none of them.
        aliases = {id(t): t.detach() for t in tensors}
        tensors = [aliases[id(t)] for t in tensors]
        smooth = [t for t, given in zip(tensors, self.inputs) if carries(given, self._forward)]
        frozen = [p for p in parameters_of(self._block).values() if not carries(p, self._forward)]
        checks = NoStrays(self._name, [*tensors, *frozen], smooth, self._forward)
        inputs = tensors[: len(self._places) + len(self._read)]
        before = versions(inputs)
        found = self._run(tensors, checks)
        require_unwritten(self._name, inputs, before)
        require_no_hidden(self._name, found[0], self._leaves, [*tensors, *parameters_of(self._block).values(), *self._block.buffers()])
        made = self._lay_out(*found, tensors)
        checks.hand_out([*made, *(leaf for leaf in found[0] if isinstance(leaf, Tensor))])
        self._checks = checks
        return made

    def _require_weights(self) -> None:
        """Refuse to run the block again with weights that have changed since its first run."""
        written = self._weights.written_since(self._versions)
        if written:
            raise RuntimeError(
                f"remat: {self._name} expected the weights of its forward until the gradient is taken, found that {listed(written)} "
                "changed in place since. Take the gradient first, or call adapt again after the change."
            )

    def require_no_escape(self) -> None:
        """Refuse, after a first run, that anything holds what is computed inside and not handed out."""
        if self._checks is not None:
            self._checks.require_no_escape()
            self._checks = None
            _CHECKED.setdefault(self._block, set()).add(self._sort())

    def _sort(self) -> Any:
        """Return the facts that the checks of a first run depend on."""
        return self._block.training, bool(self._forward), *map(type, self._leaves), *map(carries, self.inputs)

    def _run(self, tensors: Sequence[Tensor], checks: AbstractContextManager[Any]) -> tuple[list[Any], Any, list[Any]]:
        """Run the block once, and return the leaves and the structure of all that it hands out, and empty containers for new ones."""
        at, to = len(self._places), len(self._places) + len(self._read)
        with self._held.in_place(tensors[to:], None if self._layout is None else self._state) as placed:
            read = dict(zip(self._read, tensors[at:to]))
            self._put(read)
            own, args, kwargs = self._arguments(tensors[:at])
            with checks:
                result = own.take(self._fn(*args, **kwargs))
            written = self._written(read, placed, own)
        leaves, spec = pytree.tree_flatten((result, written, own.news()))
        return leaves, spec, own.others()

    def result(self, made: Sequence[Tensor]) -> Any:
        """Return the block's result from the tensors that the Function has handed out. What it has written is put in its places."""
        layout: Any = self._layout
        views: dict[_From, Tensor] = {}
        leaves = [self._outside(leaf, made, views) if isinstance(leaf, _From) else leaf for leaf in layout.leaves]
        result, written, news = pytree.tree_unflatten(leaves, layout.spec)
        containers = Containers([*self._containers.objects, *layout.others])
        containers.fill(news.items())
        self._put(self._read | {place: containers.put(value) for place, value in written.items()})
        return containers.put(result)

    def _outside(self, leaf: _From, made: Sequence[Tensor], views: dict[_From, Tensor]) -> Tensor:
        if leaf.shape is None:
            return self.inputs[leaf.number]
        if leaf not in views:
            tensor = made[leaf.number]
            views[leaf] = tensor if tensor.shape == leaf.shape else tensor.view(leaf.shape)
        return views[leaf]

    def _arguments(self, tensors: Sequence[Tensor]) -> tuple[Containers, tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with these tensors, and the containers among them, which are copies."""
        filled = list(self._leaves)
        for k, tensor in zip(self._places, tensors):
            filled[k] = tensor
        args, kwargs, contents = pytree.tree_unflatten(filled, self._spec)
        own = self._containers.copies(contents)
        return own, own.put(args), {name: own.put(value) for name, value in kwargs.items()}

    def _put(self, values: dict[Any, Any]) -> None:
        """Put values into attributes of the block's modules."""
        if not values:
            return
        now = self._state.now()
        for (number, key), value in values.items():
            if type(now[number]) is not list or key < len(now[number]):
                now[number][key] = value
        self._state.put(now)

    def _written(self, read: dict[Any, Tensor], placed: list[Tensor], own: Containers) -> dict[Any, Any]:
        """Return values with tensors that the run has put into attributes, by place; in a later run those of the places of the first."""
        if self._layout is not None:
            now = self._state.now() if self._writes else []
            return {(number, key): own.take(now[number][key]) for number, key in self._writes}
        buffers, written = set(map(id, placed)), {}
        for number, (now, was) in enumerate(zip(self._state.now(), self._state.kept)):
            if isinstance(now, set) or same(now, was):
                continue
            before = dict(items(was))
            for key, value in items(now):
                if value is not read.get((number, key), before.get(key)) and id(value) not in buffers:
                    written[number, key] = own.take(value)
        self._writes = [place for place, value in written.items() if _holds_tensors(value)]
        return {place: written[place] for place in self._writes}

    def _lay_out(self, leaves: list[Any], spec: Any, others: list[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Note where the outputs of the first run come from, and return the tensors that the Function hands out."""
        known = {id(t): n for n, t in enumerate(tensors)}
        made: dict[int, tuple[int, Tensor]] = {}
        origins = []
        for leaf in leaves:
            if isinstance(leaf, Tensor) and id(leaf) in known:
                # An input handed through is not an output of the Function: autograd would take it for a copy.
                origins.append(_From(known[id(leaf)]))
            elif isinstance(leaf, Tensor):
                base = unviewed(leaf, tensors)
                number, _ = made.setdefault(id(base), (len(made), base))
                origins.append(_From(number, tuple(leaf.shape)))
            else:
                origins.append(leaf)
        fresh = [t for _, t in made.values()]
        self._layout = _Layout(spec, origins, [tuple(t.shape) for t in fresh], others)
        self.kept.update(map(id, fresh))
        return fresh

    def _as_laid_out(self, leaves: list[Any], layout: _Layout) -> list[Tensor]:
        """Return the tensors of a later run that correspond to those of the first."""
        fresh: list[Tensor] = []
        for leaf, origin in zip(leaves, layout.leaves, strict=True):
            if isinstance(origin, _From) and origin.shape is not None and origin.number == len(fresh):
                shape = layout.shapes[len(fresh)]
                fresh.append(leaf if leaf.shape == shape else leaf.reshape(shape))
        self.kept.update(map(id, fresh))
        return fresh


def _attributes(kept: list[Any]) -> Iterator[tuple[tuple[int, Any], Tensor]]:
    """Yield the tensors in attributes that may have a gradient: the place of each, and the tensor."""
    for number, place in enumerate(kept):
        values = place.values() if isinstance(place, dict) else place
        if Tensor in map(type, values):  # in C: few attributes are tensors
            for key, value in items(place):
                if type(value) is Tensor and (value.requires_grad or is_functorch_wrapped_tensor(value)):
                    yield (number, key), value


def _holds_tensors(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor | Place) for leaf in pytree.tree_leaves(tree))
