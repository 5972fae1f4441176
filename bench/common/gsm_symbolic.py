"""GSM-Symbolic out of a package: word problems from templates, worked solutions included, some templates held out.

A template has one text and many names and numbers. The test's problems are of templates that no training sees; the validation's are of the
training's templates, with other numbers. `pretrained.txt` pins the package, reasoning-gym (Apache-2.0), which is installed without its own
dependencies: its generators need none, and of it they alone are imported.

Source: I. Mirzadeh et al., "GSM-Symbolic: Understanding the Limitations of Mathematical Reasoning in Large Language Models",
arXiv 2410.05229, whose templates are of the first hundred problems of GSM8K's test.
"""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from random import Random
from types import ModuleType
from typing import Any

from common.pretrained import folder_of

NAME = "gsm-symbolic"
"""The data's name in the settings of `gsm8k.py`."""
FILES, MAKE = ("generators_00_49", "generators_50_99"), "generate_"
WRONG = {32, 35, 37, 61, 63, 65, 74, 76, 77, 79, 86, 87, 90, 97, 98}
"""The templates that the package marks as in need of repair."""
HELD_OUT = 5
"""The templates of which one is the test's."""
DRAWS = {"train": 400, "valid": 5, "test": 20}
"""Problems of a template; those that a template repeats are left out."""

Generator = Callable[[Random, float], dict[str, Any]]
Problem = dict[str, str]


@cache
def generators() -> dict[int, Generator]:
    """Return the generators of the templates that are right, by number.

    Raises:
        SystemExit: where the package is not installed.
    """
    root = folder_of("reasoning_gym")
    # Packages that stand in for the real ones, whose `__init__` would import all other tasks, with what these depend on.
    names = {"reasoning_gym": root, "templates": root / "arithmetic" / "gsm_symbolic"}
    for name, folder in names.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    try:
        parts = [vars(import_module(f"templates.{file}")) for file in FILES]
        found = {int(name.removeprefix(MAKE)): make for part in parts for name, make in part.items() if name.startswith(MAKE)}
        return {number: found[number] for number in sorted(found) if number not in WRONG}
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]


def templates(split: str) -> list[int]:
    """Return the numbers of a split's templates: for the test those that are held out, for the others the rest."""
    numbers = list(generators())
    held = set(Random(0).sample(numbers, len(numbers) // HELD_OUT))
    return [number for number in numbers if (number in held) == (split == "test")]


@cache
def problems(split: str) -> list[Problem]:
    """Return the problems of a split, `train`, `valid` or `test`: the first of each template, then the second of each, and so on.

    Each is there under the columns of MetaMathQA, `query` and `response`, and of GSM8K, `question` and `answer`. A response is the worked
    solution, which ends in the answer.
    """
    count, seen = DRAWS[split], {problem["query"] for problem in problems("valid")} if split == "train" else set()
    drawn = {number: draws(number, split) for number in templates(split)}
    found = []
    for _ in range(count):
        for number in drawn:
            problem = next(drawn[number])
            found += [problem] if problem["query"] not in seen else []
            seen.add(problem["query"])
    return found


def draws(number: int, split: str) -> Iterator[Problem]:
    """Draw problems of a template without end, the same each time, but others in each split."""
    rng = Random(f"{split} {number}")
    while True:
        drawn = generators()[number](rng, 1.0)
        working, mark, _ = drawn["metadata"]["answer_cot"].rpartition("####")
        response = f"{working}{mark} {drawn['answer']}"  # where some solutions have "22.0", their answer is 22
        yield {"query": drawn["question"], "question": drawn["question"], "response": response, "answer": response}
