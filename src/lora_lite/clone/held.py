"""The tensors that a call has swapped into a block, as explicit inputs of the block's recomputation."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lora_lite.clone.attach import bindings_inside
from lora_lite.clone.state import State, volatile
from lora_lite.layers.access import ReadTensor


def _now(binding: Any) -> Any:
    if binding.off:
        return {}
    return binding.registered() if binding.params is None else binding.params


def _bindings_around(block: nn.Module, inside: Sequence[Any]) -> list[Any]:
    """List the bindings of modules around a block that adapt parameters in it, as one that trains the whole encoder does."""
    stand_ins = (vars(m).get(name) for m in block.modules() for name in m._parameters)
    found = {id(s.binding): s.binding for s in stand_ins if isinstance(s, ReadTensor)}
    return [binding for binding in found.values() if binding not in inside]


class Held:
    """The params and buffers that a call has swapped into a block: explicit inputs of the block's recomputation."""

    def __init__(
        self,
        params: list[tuple[Any, list[str]]],
        index: Tensor | None,
        buffers: list[tuple[dict[str, Any], str]],
        written: list[bool],
        parts: list[tuple[Any, dict[str, Tensor]]],
    ) -> None:
        self._params, self._index, self._buffers, self._written = params, index, buffers, written
        self._parts = [(W, list(moved)) for W, moved in parts]
        self._off = any(binding.off for binding, _ in params)
        self._rows = next((binding.rows for binding, _ in params if binding.rows is not None), None)
        held = [(_now(binding), names) for binding, names in params]
        self.tensors: list[Tensor] = [leaves[name] for leaves, names in held for name in names]
        self.tensors += [] if index is None else [index]
        self.tensors += [table[name].clone() if own else table[name] for (table, name), own in zip(buffers, written)]
        self.tensors += [tensor for _, moved in parts for tensor in moved.values()]

    @classmethod
    def of(cls, block: nn.Module) -> "Held":
        """Find the params and buffers that a call has swapped into a block."""
        bound = bindings_inside(block)
        around = _bindings_around(block, bound)
        parts = [(b.W, b.W.moved_in(block)) for b in around if b.W.moving]
        bound += [b for b in around if not b.W.moving]
        params = [(b, list(_now(b))) for b in bound]
        index = next((b.index for b in bound if b.index is not None), None)
        buffers = [(m, name, b) for m in block.modules() for name, b in m._buffers.items() if b is not None]
        written = [volatile(b, m.training) for m, name, b in buffers]
        return cls(params, index, [(m._buffers, name) for m, name, _ in buffers], written, parts)

    @contextmanager
    def in_place(self, tensors: Sequence[Tensor], state: State | None) -> Iterator[list[Tensor]]:
        """Put tensors where these stood for the length of a run. The context is a list of the buffers of the run.

        The first run, which has no `state`, leaves the block as its forward does. A later one begins with the block's state before that,
        and leaves no trace.
        """
        given = iter(tensors)
        before = [b.standing for b, _ in self._params]
        params: dict[Any, Any] = {}
        stood = [table.get(name) for table, name in self._buffers]
        around = None if state is None else state.now()
        try:
            for binding, names in self._params:
                params[binding] = {name: next(given) for name in names}
            index = None if self._index is None else next(given)
            for binding, own in params.items():
                binding.set(None if self._off else own, self._rows, index, self._off)
            if state is not None:
                state.put(state.kept)
            placed = [next(given).clone() if own else next(given) for own in self._written]
            for (table, name), own in zip(self._buffers, placed):
                table[name] = own
            with ExitStack() as wholes:
                for W, moved in self._parts:
                    wholes.enter_context(W.swapped({name: next(given) for name in moved}))
                yield placed
        finally:
            for (binding, _), was in zip(self._params, before):
                binding.set(*was)
            if state is not None:
                for (table, name), tensor in zip(self._buffers, stood):
                    table[name] = tensor
                state.put(around)  # type: ignore[arg-type]
