"""The support page is complete, its cells are ok or expected, and a cell of wrong numbers is told from one that holds."""

import pytest

pytest.importorskip("bitsandbytes", reason="the matrix has cells of quantised layers")

from support_cells import CELLS, EXPECTED, columns, kind, outcome, page
from support_subjects import ROWS, Subject


def test_the_page_has_every_variant_and_every_cell():
    found = page()["results"]
    assert found["cells"] == columns()
    for library, rows in ROWS.items():
        assert list(found[library]) == list(rows)
        assert all(list(cells) == list(CELLS) for cells in found[library].values())


def test_every_cell_of_ours_on_the_page_is_ok_or_expected():
    for name, cells in page()["results"]["lora_lite"].items():
        for cell, said in cells.items():
            assert kind(said) == EXPECTED.get((name, cell), "ok"), f"{name} {cell}: {said}"


def test_a_cell_of_wrong_numbers_says_so():
    right = ROWS["lora_lite"]["lora"]

    def wrong(*args, **kwargs):
        subject = right(*args, **kwargs)
        return Subject(lambda p, ids: subject.logits(p, ids) + 0.1 * ids.float().mean(), subject.params, adapt=subject.adapt)

    assert kind(outcome(CELLS["mixed"], wrong)) == "wrong numbers"
    assert outcome(CELLS["grad"], lambda model: 1 / 0) == "ZeroDivisionError: division by zero"
