"""The parts of what is timed: each has measurements to do, a way to print them, and a results file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from common import machine, write
from processes import Job, measured
from timing import device


class Part(NamedTuple):
    """One results file in the making: its kind, its jobs, whose results are one mapping in the end, and how to print it."""

    kind: str
    jobs: Sequence[Job]
    show: Callable[[Mapping[str, Any]], None]
    quick: bool


def run(parts: Sequence[Part]) -> None:
    """Do the jobs of all parts in turn, so that those of each lie far apart; print what came of them and write the results files."""
    found = iter(measured([job for part in parts for job in part.jobs]))
    for part in parts:
        results = {key: value for _ in part.jobs for key, value in next(found).items()}
        part.show(results)
        write(part.kind, machine(1, part.jobs[0].processes, device()), results, part.quick)
