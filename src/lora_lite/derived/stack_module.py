"""A module of a stack: each row of its batches has an adapter of its own, and so has each prompt that it generates from.

A module is called with caches and one token at a time, where the rows of a target's input cannot be tried as `adapt.mixed` tries them. So
the rows are those that the batch has, and what a trial of the first call with arguments of a form has shown.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_lite.clone.bind import Binding
from lora_lite.clone.per_call import Replica
from lora_lite.clone.reads import bindings
from lora_lite.clone.rows import Rows
from lora_lite.core.one_thread import OneThread
from lora_lite.core.tracing import outside_transforms, unwrapped
from lora_lite.derived.mixed import index_of
from lora_lite.derived.rows import PLAIN, equal_groups, require_following
from lora_lite.derived.trial import Seen, runs_of, trial

_STATE = "_lora_lite_rows"
_EXPANSIONS = ("_expand_inputs_for_generation", "_expand_variables_for_generation")
"""The methods by which a generation expands its inputs. The second is that of speech models, which expand by returned sequences first."""
_OWN = ("generate", *_EXPANSIONS)


class RowState:
    """The rows of a module's batches and their members.

    Attributes:
        members: of the stack.
        index: the member of each row; None for equal contiguous groups.
        rows: of the inputs of targets, while a generation runs; None outside of one.
        known: for each form of arguments, how a target's calls follow the batch's rows.
        trying: whether the call that runs is a trial.
        thread: the one whose call runs.
        own: what `generate` and its expansion of inputs were in the module's `__dict__`, where they stood there.
    """

    def __init__(self, members: int, index: Tensor | None, own: Mapping[str, Any]) -> None:
        self.members, self.index, self.own = members, index, dict(own)
        self.rows: int | None = None
        self.known: dict[Any, dict[str, Seen]] = {}
        self.trying = False
        self.thread = OneThread("the rows of its batch")

    @property
    def single(self) -> bool:
        """Whether all rows have the same adapter, so that it does not matter where they are."""
        return (self.members if self.index is None else len(self.index)) == 1

    def of(self, lengths: Sequence[int]) -> int:
        """Return the rows of a batch whose tensors have these lengths."""
        return len(self.index) if self.index is not None else equal_groups(lengths, self.members, "adapt.module(stacked, index=...)")


def give_rows(module: nn.Module, members: int, index: Tensor | Sequence[int] | None) -> None:
    """Let each row of a module's batches take its own member of the stack that its params are.

    Args:
        module: as `trainable_copy` makes it, of stacked params.
        members: of the stack.
        index: the member of each row, `(rows,)`; None for equal contiguous groups.

    Raises:
        ValueError: where `index` is empty or names no member.
        TypeError: where it holds no integers.
    """
    if index is not None:
        index = index_of(index.cpu() if isinstance(index, Tensor) and not index.is_meta else index, members, torch.device("cpu"), "module")
        if index is None or not len(index):
            raise ValueError("adapt.module: expected index to name the adapter of one row at least, found none.")
    table = vars(module)
    state = table[_STATE] = RowState(members, index, {name: table[name] for name in _OWN if name in table})
    _place(module, state)
    module.register_forward_pre_hook(_before_call, with_kwargs=True)
    module.register_forward_hook(_after_call, always_call=True)
    table["_replicate_for_data_parallel"] = _refuse_replicas
    if hasattr(module, "generate"):
        table["generate"] = partial(_generate, module)
        for name in _EXPANSIONS:
            if hasattr(type(module), name):
                table[name] = partial(_expand, module, name)


def _refuse_replicas() -> nn.Module:
    raise ValueError(
        "adapt.module: expected the module of a stack to see whole batches, found nn.DataParallel, which splits their rows and not the "
        "index. Make a module for each device, each with the index of its rows."
    )


def _place(module: nn.Module, state: RowState, rows: int | None = None, known: Mapping[str, Seen] | None = None) -> None:
    """Set the rows and their members at each binding of a module."""
    if state.single:
        rows = None
    seen = known or {}
    beside = {path: own.beside for path, own in seen.items()}
    found = Rows(rows, {path: None for path, own in seen.items() if own.follows}, beside=beside, caller="adapt.module")
    for binding in _bound(module):
        binding.rows, binding.index = found, state.index
        binding.W.follow, binding.W.count = beside.get(binding.path), rows


def _bound(module: nn.Module) -> list[Binding]:
    return [binding for leader in bindings(module).values() for binding in (leader, *leader.followers)]


def _before_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Find the rows of a call of the whole module, before it runs."""
    state: RowState = vars(module)[_STATE]
    if torch.compiler.is_compiling():  # a compiled call is not tried, as in `adapt.mixed`
        return
    state.thread.begin(module)
    if state.trying:
        return
    lengths = [len(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
    rows = state.of(lengths) if state.rows is None else state.rows
    if state.rows is None and lengths and rows not in lengths:
        raise ValueError(
            f"adapt.module: expected a batch of {rows} rows, an adapter's number each in index, found {lengths[0]}. Give each row its "
            "adapter: adapt.module(stacked, index=...); a loop of your own over beams has several rows for each prompt."
        )
    known = _known(module, state, args, kwargs, rows)
    require_following(known, (), "adapt.module")
    _place(module, state, rows, known)


def _after_call(module: nn.Module, args: Any, output: Any) -> None:
    """Let other threads call the module, after a call of it that has ended or raised."""
    state: RowState = vars(module)[_STATE]
    if not (torch.compiler.is_compiling() or state.trying or state.rows is not None):  # not within a trial or a generation
        state.thread.end(module)


def _known(module: nn.Module, state: RowState, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int) -> Mapping[str, Seen]:
    """Return, for each target that a trial reached, how its calls follow the batch's rows. A trial is made without caches."""
    parts = {name: part for name, part in kwargs.items() if all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves(part))}
    leaves = pytree.tree_leaves_with_path((args, parts))
    key = tuple((pytree.keystr(path), leaf.dtype, leaf.dim()) for path, leaf in leaves if isinstance(leaf, Tensor))
    if key not in state.known:
        state.trying = True
        try:
            can = rows > 1 and not state.single and all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves(args))
            with outside_transforms():
                bare = pytree.tree_map_only(Tensor, unwrapped, (args, parts))
                state.known[key] = trial(Replica(module, _bound(module), {}), runs_of(bare, rows)) if can else {}
        finally:
            state.trying = False
    return state.known[key]


def _generate(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Generate with one adapter a prompt."""
    state: RowState = vars(module)[_STATE]
    prompts = _prompts(module, args, kwargs)
    rows = state.of([prompts])
    if rows != prompts:
        raise ValueError(
            f"adapt.module: expected {rows} prompts, an adapter's number each in index, found {prompts}. Give each prompt its adapter: "
            "adapt.module(stacked, index=...). Beams and num_return_sequences take the adapter of their prompt."
        )
    state.thread.begin(module)
    before, state.rows = state.rows, rows
    try:
        _place(module, state, rows)
        return _own(module, state, "generate")(*args, **kwargs)
    finally:
        state.rows = before
        if before is None:
            state.thread.end(module)


def _expand(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Expand the inputs by the number of beams or returned sequences, which stand beside each other, and so the rows."""
    state: RowState = vars(module)[_STATE]
    if name == _EXPANSIONS[0]:
        times = kwargs.get("expand_size", args[0] if args else 1)
    else:
        times = getattr(kwargs.get("generation_config", args[-1] if args else None), "num_return_sequences", None) or 1
    if state.rows is not None:
        state.rows *= times
        _place(module, state, state.rows)
    return _own(module, state, name)(*args, **kwargs)


def _own(module: nn.Module, state: RowState, name: str) -> Any:
    if name in state.own:
        return state.own[name]
    return inspect.getattr_static(type(module), name).__get__(module, type(module))  # a method, or a static one of older transformers


def _prompts(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the number of prompts that a generation starts from: rows of the main input, or of whatever stands in for it."""
    names = ("inputs", getattr(module, "main_input_name", "input_ids"), "inputs_embeds", "input_ids")
    leaves = pytree.tree_leaves((args[:1], [kwargs.get(name) for name in names], dict(kwargs)))
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)
