"""The rows of a mixed batch, as the bindings of a call see them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of a mixed batch, as the inputs of targets follow them.

    Attributes:
        count: the batch's rows; None where they are not followed.
        known: the targets whose input is known to be made of them, at its first axis and in their order, each with the entries there
            for a row, of all its calls; None where the shapes of another call showed it.
        mapped: of targets whose input has them elsewhere, the axis that they are on, or the member of each entry of the first axis.
        unsure: while a graph is traced, takes the path of a target to be checked when the graph runs. Its input has not the rows alone on
            its first axis; or the tensors beside it are taken, by their shapes, for rows and for what all rows share, by their places.
        beside: of targets that are called with more tensors than their input, the entries of each that all rows share, on its first
            axis, 0 where it has the rows there.
        caller: the call of the user's that gave the rows, for errors.
        lengths: of the first axes of the batch's tensors, for errors.
    """

    count: int | None = None
    known: Mapping[str, Collection[int] | None] = field(default_factory=dict)
    mapped: Mapping[str, Tensor | int] = field(default_factory=dict)
    unsure: Callable[[str, tuple[str, ...] | None, tuple[str, ...]], None] | None = None
    beside: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    caller: str = "adapt.mixed"
    lengths: Sequence[int] = ()

    def require(self, path: str, x: Callable[[], Any]) -> None:
        """Raise unless a target's input is known to be made of the rows, or has exactly them on its first axis.

        Raises:
            ValueError: naming the target.
        """
        each = self.known.get(path, (1,))
        if self.count is None or path in self.mapped or each is None:
            return
        given = x()
        if isinstance(given, Tensor) and given.dim() and given.shape[0] in [self.count * n for n in each]:
            return
        if self.unsure is None:
            found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(unknown(path, self.count, found, self.caller, self.lengths))
        self.unsure(path, None, ())

    def assumed(self, path: str, beside: Callable[[], Mapping[str, Tensor]]) -> dict[str, int] | None:
        """Return, while a graph is traced, what the shapes of the tensors beside a target's input say of them, as in `beside`."""
        if self.unsure is None or self.count is None or not (found := beside()):
            return None
        rows = tuple(name for name, t in found.items() if t.dim() and t.shape[0] == self.count)
        self.unsure(path, rows, tuple(name for name in found if name not in rows))
        return {name: 0 if name in rows else 1 for name in found}


def unknown(path: str, rows: int, found: object, caller: str = "adapt.mixed", lengths: Sequence[int] = ()) -> str:
    """Return the error of a target whose input does not have the rows alone on its first axis, and whose rows no trial has shown.

    Args:
        path: of the target.
        rows: of the batch, as the index has them.
        found: the shape of the input.
        caller: the call of the user's.
        lengths: of the first axes of the batch's tensors: where none is that of the index, this is the reason.
    """
    way = way_of_rows(caller)
    if lengths and rows not in lengths:
        has = " or ".join(map(str, dict.fromkeys(lengths)))
        return (
            f"{caller}: expected index to have a number for each row of the batch, found {rows} numbers, and tensors with {has} on their "
            f'first axis. Give each row the number of its adapter. Where the rows are on another axis, {way}; at "{path}" the input has '
            f"shape {found}."
        )
    return (
        f'{caller}: at "{path}" expected an input with a multiple of {rows} rows whose order is known, found {found}. '
        f"Leave the layer out with exclude_names, or run the members one by one, or {way}."
    )


def way_of_rows(caller: str) -> str:
    """Return the words by which a caller says where a target's input has the rows. A module takes none: `adapt.mixed` does."""
    has = caller == "adapt.mixed"
    return "tell with row_map where they are" if has else "tell the row_map of adapt.mixed where they are, and call that"
