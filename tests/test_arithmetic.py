"""The demo's data are what `bench/common/arithmetic.py` says: test problems share no fact and no wording with the training's."""

import random

import pytest
import torch

from common import arithmetic
from common.arithmetic import IGNORE, PAD, batch, batches, chain, decode, encode, generate, held_out, plain, problems, scattered, sums


def facts(rows):
    return {held_out(*step) for row in rows for step in row.steps}


def test_facts_of_test_problems_are_held_out():
    rng = random.Random(0)
    assert facts(problems("test", 300, seed=0)) == facts(sums("test", 200, seed=0)) == {True}
    assert facts(problems("train", 300, seed=0)) == facts(sums("train", 200, seed=0)) == {False}
    for draw in (plain, chain, scattered):
        assert facts(draw(rng) for _ in range(100)) == {False}


def test_a_fact_is_a_sum_and_its_differences():
    for a in range(0, 100, 7):
        for b in range(0, 100, 3):
            assert held_out(a, "+", b) == held_out(b, "+", a) == held_out(a + b, "-", a) == held_out(a + b, "-", b)
    share = sum(held_out(a, "+", b) for a in range(100) for b in range(a, 100)) / 5050
    assert share == pytest.approx(0.2, abs=0.02)


def test_sentences_of_base_train_and_test_differ():
    base = set(arithmetic.WORDING["base"])
    train, test = ({text for texts in arithmetic.WORDING[split].values() for text in texts} for split in ("train", "test"))
    assert all((base, train, test))
    assert not base & train
    assert not base & test
    assert not train & test


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_worked_from_the_numbers(split):
    rows = problems(split, 200, seed=1)
    assert len({row.question for row in rows}) == 200
    for row in rows:
        value = row.steps[0][0]
        for a, op, b in row.steps:
            assert a == value
            value = a + b if op == "+" else a - b
            assert 0 <= value <= 99
        assert row.answer.endswith(f"#### {row.value}")
        assert value == row.value
        assert all(str(number) in row.question for number in row.numbers)


def test_text_comes_back_from_its_tokens_and_strange_characters_are_refused():
    assert decode(encode("Ann has 12 pens.\nmore")) == "Ann has 12 pens."
    with pytest.raises(ValueError, match=r"expected characters of CHARS, found \['é'\]"):
        encode("é")
    with pytest.raises(ValueError, match=r"expected split .train. or .test., found .none."):
        problems("none", 1, 0)


def test_only_answers_are_labelled():
    rows = problems("train", 5, seed=0)
    found = batch(rows)
    assert found["input_ids"].shape == found["labels"].shape
    for ids, labels, row in zip(found["input_ids"].tolist(), found["labels"].tolist(), rows, strict=True):
        assert decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORE]) == row.answer
        assert all(label == IGNORE for i, label in zip(ids, labels, strict=True) if i == PAD)


def test_every_pass_through_the_rows_has_another_order():
    rows = problems("train", 6, seed=0)
    first, second, again = ([part["labels"].tolist() for part in batches(rows, 3, 4, seed=s)] for s in (0, 1, 0))
    assert first == again != second


def test_generation_does_not_depend_on_the_other_prompts():
    from common.pretrained import load_base  # here: it needs the models' library

    model, prompts = load_base(), [row.question for row in sums("test", 4, seed=0)] + ["12+7-4+30>"]
    with torch.no_grad():
        together = generate(lambda b: model(**b), prompts)
        assert together == [generate(lambda b: model(**b), [prompt])[0] for prompt in prompts]
