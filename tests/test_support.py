"""The matrix of variants and transforms: what the committed file says of ours is complete, and holds when it is run again."""

import importlib
import json
from pathlib import Path

import pytest

import lora_lite as ll

BENCH = Path(__file__).parent.parent / "bench"
FILES = sorted((BENCH / "results").glob("*-support.json"))

EXPECTED = {
    ("dora", "hvp"): "wrong numbers",  # the norm is held fixed in the gradient, whose derivative is then another function's
    ("full", "four_bit"): "ValueError: FullConfig.target_names",  # packed weights cannot be trained as a whole
    ("full", "eight_bit"): "ValueError: FullConfig.target_names",
}
"""Cells of ours that may be something else than ok, and what."""
COSTLY = ("compile", "four_bit", "eight_bit")
"""Cells that other tests look at: compiling takes seconds, and the kinds of quantised layers have tests of their own."""


def results():
    return json.loads(FILES[-1].read_text("utf-8"))["results"]


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("bitsandbytes", reason="bench/subjects.py makes quantised layers")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("support"), importlib.import_module("subjects")


def test_the_file_has_every_variant_and_every_cell(bench):
    support, subjects = bench
    assert list(results()["lora_lite"]) == list(ll.VARIANTS)
    assert set(results()["peft"]) == set(subjects.methods()) <= set(ll.VARIANTS)
    for library in ("lora_lite", "peft"):
        assert all(list(cells) == list(support.CELLS) for cells in results()[library].values())


@pytest.mark.parametrize("name", ll.VARIANTS)
def test_every_cell_of_ours_is_ok_or_expected(name):
    for cell, said in results()["lora_lite"][name].items():
        assert said == "ok" or said.startswith(EXPECTED.get((name, cell), "ok")), f"{name} {cell}: {said}"


@pytest.mark.parametrize("name", ll.VARIANTS)
def test_cells_hold_when_run_again(bench, name):
    support, subjects = bench
    wrap = subjects.ours(subjects.variants()[name])
    said = {cell: support.outcome(run, wrap) for cell, run in support.CELLS.items() if cell not in COSTLY}
    assert all(words == "ok" or words.startswith(EXPECTED.get((name, cell), "ok")) for cell, words in said.items()), said


def test_a_cell_of_wrong_numbers_says_so(bench):
    support, subjects = bench
    right = subjects.ours(ll.LoRAConfig(r=4))

    def wrong(*args, **kwargs):
        subject = right(*args, **kwargs)
        return subjects.Subject(lambda p, ids: subject.logits(p, ids) + 0.1 * ids.float().mean(), subject.params, adapt=subject.adapt)

    assert support.outcome(support.mixed, wrong).startswith("wrong numbers")
    assert support.outcome(support.grad, lambda model: 1 / 0) == "ZeroDivisionError: division by zero"
