"""The rows of a target's input that belong to each row of the batch: known by a trial, or refused by name."""

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lite.clone.per_call import Replica, Replicas
from lora_lite.clone.rows import Rows, unknown, way_of_rows
from lora_lite.core.errors import listed, require_type
from lora_lite.core.tracing import in_transform, outside_transforms, require_values, unwrapped, while_traced
from lora_lite.derived.compiled_rows import Graph, Layout, Unsure, see_rows, taken_apart
from lora_lite.derived.questions import Question, asked
from lora_lite.derived.trial import Batch, Seen, runs_of, trial

RowMap = Mapping[str, Tensor | Sequence[int] | int]

PLAIN = (Tensor, int, float, str, bool, type(None), torch.dtype)
"""The parts of a batch that a trial may cut, or pass on as they are: a run does not change them."""


class Followed:
    """The targets whose input follows the batch's rows, by the structure of a batch.

    Args:
        replicas: the copies to try.
        group: the processes over which they are sharded; None where they are whole.
    """

    def __init__(self, replicas: Replicas, group: Any = None) -> None:
        self._replicas, self._group = replicas, group
        self._known: dict[Any, dict[str, Seen]] = {}
        self._graphs: dict[str, Graph] = {}
        self._begin = while_traced(lambda layout, mapped: self._new_graph(layout, mapped))
        self._note = while_traced(lambda graph, *unsure: self._graphs[graph].unsure.append(unsure))

    def rows(
        self,
        replica: Replica,
        batch: Any,
        kwargs: Mapping[str, Any],
        members: int,
        index: Tensor | None,
        row_map: RowMap | None = None,
    ) -> Rows:
        """Return the batch's rows, and the targets whose input is known to be made of them, at their first axis and in their order.

        The first batch with rows of a shape runs the frozen model on two of them, each alone and both together, unless the batch holds
        objects that a run may change, such as a cache. In a compiled function the same is done when it runs. In an exported one nothing
        is: each target's input must have the rows alone on its first axis. The processes of a sharded model do it together, each for
        the batches of all.

        Args:
            replica: the copy that is called.
            batch, kwargs: as in `adapt.mixed`.
            members: of the stack.
            index: the member of each row; None for `members` equal contiguous groups.
            row_map: what the caller says of targets whose input has the rows elsewhere.

        Raises:
            ValueError: where a target's input is known not to be, the rows make no equal groups, or `row_map` names no target or no row.
            TypeError: where `row_map` holds no integers.
        """
        plain = (dict(batch) if isinstance(batch, Mapping) else batch, dict(kwargs))
        lengths = _lengths(plain)
        rows = equal_groups(lengths, members) if index is None else len(index)
        if not rows and lengths and min(lengths):
            raise ValueError(
                f"adapt.mixed: expected index to have a number for each row of the batch, found none for {lengths[0]} rows. Give each row "
                "the number of its adapter."
            )
        mapped = _mapped({} if row_map is None else row_map, [path for path, _ in replica.bindings], rows, members, index)
        if torch.compiler.is_compiling():
            if rows < 2:
                return Rows(mapped=mapped)
            if torch.compiler.is_exporting():  # an exported graph runs where no adapt is that could try a batch
                return Rows(rows, {}, mapped, lengths=lengths)
            return self._traced(plain, rows, mapped, lengths)
        known = self._follow(plain, rows, mapped)
        beside, each = ({path: getattr(seen, name) for path, seen in known.items()} for name in ("beside", "each"))
        return Rows(mapped=mapped) if rows < 2 else Rows(rows, each, mapped, beside=beside, lengths=lengths)

    def _follow(self, plain: Any, rows: int, mapped: Collection[str]) -> dict[str, Seen]:
        """Return for each target how its calls follow the rows, by a trial or from memory; nothing where none can be made.

        Raises:
            ValueError: where one does not, here or in another process.
        """
        own = None if plain is None or rows < 2 else self._question(plain, rows, mapped)
        for question in asked(own, self._group):
            if question.key not in self._known:
                with outside_transforms():
                    self._known[question.key] = self._once(trial(self._replicas.here(), question.runs) if question.runs else {})
            require_following(self._known[question.key], question.mapped, "adapt.mixed")
        return {} if own is None else self._known[own.key]

    def _once(self, found: dict[str, Seen]) -> dict[str, Seen]:
        """Return an equal answer that is kept already, else this one. Texts of each length have their own key, and mostly one answer."""
        return next((known for known in reversed(list(self._known.values())) if known == found), found)

    def _question(self, plain: Batch, rows: int, mapped: Collection[str]) -> Question:
        leaves = pytree.tree_leaves_with_path(plain)
        require_values(leaf for _, leaf in leaves)
        key = tuple((pytree.keystr(path), *_facts(leaf, rows)) for path, leaf in leaves)
        if key in self._known or rows not in _lengths(plain) or not all(isinstance(leaf, PLAIN) for _, leaf in leaves):
            return Question(key, tuple(mapped), None)
        with outside_transforms():
            bare = pytree.tree_map_only(Tensor, unwrapped, plain)
            return Question(key, tuple(mapped), runs_of(bare, rows))

    def _traced(self, plain: Any, rows: int, mapped: dict[str, Tensor | int], lengths: Sequence[int]) -> Rows:
        """Let the graph that is traced check the rows of its batches."""
        parts: tuple[list[Tensor], list[int], list[float]] = ([], [], [])
        graph: str = self._begin(taken_apart(plain, *parts), tuple(mapped))
        see_rows(parts, rows, graph)
        return Rows(rows, {}, mapped, functools.partial(self._note, graph), lengths=lengths)

    def _new_graph(self, layout: Layout, mapped: tuple[str, ...]) -> str:
        def check(plain: Any, rows: int, unsure: Sequence[Unsure]) -> None:
            known = self._follow(plain, rows, mapped)
            for path, own, shared in unsure:
                if path not in known:
                    raise ValueError(unknown(path, rows, "another", lengths=_lengths(plain)))
                if own is not None:
                    _require_assumed(path, known[path].beside, own, shared)

        graph = Graph(layout, check)
        self._graphs[graph.name] = graph
        return graph.name


def require_following(known: Mapping[str, Seen], mapped: Collection[str], caller: str) -> None:
    """Refuse targets whose input is known not to follow the batch's rows, where the caller has not mapped them."""
    lost = [path for path, seen in known.items() if not seen.follows and path not in mapped]
    if lost:
        more = f", as at {len(lost) - 1} more targets" if lost[1:] else ""
        raise ValueError(
            f'{caller}: at "{lost[0]}" expected an input whose first axis is made of the batch\'s rows, found one that does not '
            f"grow with them{more}. Leave such layers out with exclude_names, or run the members one by one, or {way_of_rows(caller)}."
        )
    lost = [path for path, seen in known.items() if not seen.returns and path not in mapped]
    if lost:
        raise ValueError(
            f'{caller}: at "{lost[0]}" expected a module whose outputs have the batch\'s rows on their first axis, found one that has them '
            "elsewhere, or not. Train a part of it that returns rows, or run the members one by one."
        )


def _require_assumed(path: str, beside: Mapping[str, int], own: Sequence[str], shared: Sequence[str]) -> None:
    """Refuse a traced target whose tensors beside its input were taken by their shapes for what a trial says that they are not.

    What was one entry for all may have been repeated for each row, by a module before that is trained whole.
    """
    wrong = [name for name in own if beside.get(name) not in (0, 1)] + [name for name in shared if not beside.get(name)]
    if wrong:
        raise ValueError(
            f'adapt.mixed: at "{path}" expected arguments whose rows show in their shapes where a call is compiled, found that those of '
            f"{listed(wrong)} do not. Call it without torch.compile."
        )


def _lengths(plain: Any) -> list[int]:
    return [len(leaf) for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor) and leaf.dim()]


def own_rows(batch: Any, kwargs: Mapping[str, Any], members: int) -> Tensor:
    """Return the member of each row of a batch in equal contiguous groups, for variants that take each row as a batch of its own."""
    leaves = pytree.tree_leaves((dict(batch) if isinstance(batch, Mapping) else batch, dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    device = tensors[0].device if tensors else None
    return torch.arange(members, device=device).repeat_interleave(equal_groups([len(t) for t in tensors], members) // members)


def _mapped(row_map: RowMap, paths: Sequence[str], rows: int, members: int, index: Tensor | None) -> dict[str, Tensor | int]:
    """Return for each target that `row_map` names the axis of the rows, or the member of each entry of its input's first axis."""
    require_type(isinstance(row_map, Mapping), "adapt.mixed(stacked, batch, row_map={pattern: axis})", "row_map", "a mapping", row_map)
    found: dict[str, Tensor | int] = {}
    for pattern, places in row_map.items():
        try:
            named = [path for path in paths if re.search(pattern, path)]
        except (re.error, TypeError) as e:
            raise ValueError(
                f"adapt.mixed: expected the keys of row_map as regular expressions, found {pattern!r} ({e}). Write e.g. re.escape(path)."
            ) from e
        if not named:
            raise ValueError(f"adapt.mixed: expected row_map to name targets, found none for {pattern!r}. Targets are {listed(paths)}.")
        if type(places) is int and places < 0:
            raise ValueError(f"adapt.mixed: expected row_map to give {pattern!r} an axis >= 0, found {places}. Count from the first axis.")
        if isinstance(places, bool) or not isinstance(places, int):
            places = _members_of(pattern, places, rows, members, index)
        found |= dict.fromkeys(named, places)
    return found


def _members_of(pattern: str, places: Tensor | Sequence[int] | bool, rows: int, members: int, index: Tensor | None) -> Tensor:
    try:
        own = torch.as_tensor(places)
    except (RuntimeError, TypeError, ValueError) as e:
        raise TypeError(
            f"adapt.mixed: expected row_map to give {pattern!r} an axis, or the row of each entry as a vector of integers, found "
            f"{places!r} ({e})."
        ) from e
    if own.dim() != 1 or own.is_floating_point() or own.is_complex() or own.dtype == torch.bool:
        raise TypeError(
            f"adapt.mixed: expected row_map to give {pattern!r} an axis, or the row of each entry as a vector of integers, found "
            f"{own.dtype} of shape {tuple(own.shape)}."
        )
    if index is None:
        index = torch.arange(members, device=own.device).repeat_interleave(rows // members)
    if own.device.type == "cpu" and not in_transform() and len(own) and not (own.min() >= 0 and own.max() < rows):
        wrong = own[(own < 0) | (own >= rows)][0]
        raise ValueError(f"adapt.mixed: expected row_map to give {pattern!r} rows in 0..{rows - 1}, found {int(wrong)}.")
    return index[own.to(index.device, torch.long)]


def equal_groups(lengths: Sequence[int], members: int, call: str = "adapt.mixed(stacked, batch, index)") -> int:
    """Return the rows of a batch that come in equal groups, one for each member; of tensors of several lengths the first that can.

    Raises:
        ValueError: where none can, with the `call` that takes an index.
    """
    found = next((n for n in lengths if n % members == 0), None if lengths else members)
    if found is None:
        raise ValueError(
            f"{call.partition('(')[0]}: at the batch expected an input with a multiple of {members} rows, found {lengths[0]}. Give each "
            f"row its member: {call}."
        )
    return found


def _facts(leaf: Any, rows: int) -> tuple[Any, ...]:
    """Return everything about a part of a batch that a trial may depend on, but for its values and the number of rows."""
    if not isinstance(leaf, Tensor):
        return (type(leaf).__qualname__, leaf if isinstance(leaf, bool | int | str) else None)
    own = leaf.dim() > 0 and leaf.shape[0] == rows
    return (type(leaf).__qualname__, leaf.dtype, own, tuple(leaf.shape[1:] if own else leaf.shape))
