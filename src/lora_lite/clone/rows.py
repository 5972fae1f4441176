"""The rows of a mixed batch, as the bindings of a call see them."""

from collections.abc import Callable, Collection, Mapping
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
        unsure: while a graph is traced, takes the path of a target to be checked when the graph runs: its input has not the rows alone on
            its first axis.
        beside: of targets that are called with more tensors than their input, whether each has the rows, on its first axis, or is shared.
    """

    count: int | None = None
    known: Mapping[str, Collection[int] | None] = field(default_factory=dict)
    mapped: Mapping[str, Tensor | int] = field(default_factory=dict)
    unsure: Callable[[str], None] | None = None
    beside: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)

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
            raise ValueError(unknown(path, self.count, tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__))
        self.unsure(path)


def unknown(path: str, rows: int, found: object) -> str:
    """Return the error of a target whose input the model has not let be tried, and which does not have the rows alone on its first axis."""
    return (
        f'adapt.mixed: at "{path}" expected an input with a multiple of {rows} rows whose order is known, found {found}. '
        "Leave the layer out with exclude_names, or run the members one by one, or tell with row_map which rows its entries belong "
        "to. An index has a number for each row of the batch."
    )
