"""Characters, plain arithmetic and word problems: the data of the demo, made offline.

A text is a list of items, each ended by a newline:

    sum       12+7=19
    chain     12+7-4>12+7=19 19-4=15 #### 15
    scattered and 12 caps + will 7 sea, for - 4 the>12+7=19 19-4=15 #### 15
    problem   Ann has 12 pens. Ann finds 7 more. Ann gives 4 to Bob. How many pens has Ann?
              12+7=19 19-4=15 #### 15

Numbers are 0 to 99 (the result of one plain sum may reach 198); nothing is negative. A *fact* is
an unordered pair `{a, b}`: it stands for `a+b`, `b+a` and the two differences of their sum. One
fact in five is held out. Pretraining and the training problems use none of those; every step of
every test problem and every evaluated sum uses one. Sentences come from `wording.json`, whose lists
`base`, `train` and `test` have no sentence in common.
"""

import inspect
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

CHARS = "\n 0123456789+-=#>.,?'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PAD, END = 0, 1  # END is the newline
VOCAB_SIZE = len(CHARS) + 1
IGNORE = -100  # the label that transformers leaves out of the loss
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"  # from 5.24 on, and before
WORDING = json.loads((Path(__file__).parent / "wording.json").read_text())
# Kinds of problem: the sentences in order, and the work in the letters of their numbers, where
# `?` is the sign of the next event.
SHAPES = (
    (("start", "event", "event", "own"), "a?b?c"),
    (("start", "pack", "event", "own"), "a+b+b?c"),
    (("start", "event", "pack", "own"), "a?b+c+c"),
    (("start", "other", "event", "event", "own"), "a?c?d"),
    (("start", "event", "other", "total"), "a?b+c"),
    (("start", "event", "other", "gap"), "a?b-c"),
    (("start", "more", "total"), "a+b+a"),
    (("start", "fewer", "total"), "a-b+a"),
)

Forward = Callable[[Mapping[str, Any]], Any]
Numbers = tuple[int, ...]
Steps = tuple[tuple[int, str, int], ...]  # e.g. ((12, "+", 7), (19, "-", 4))
Worked = tuple[Steps, int]  # the operations and their result


@dataclass(frozen=True)
class Row:
    """A question and its answer; `steps` are its operations, `template` names its sentences."""

    question: str
    answer: str
    value: int
    template: str
    numbers: Numbers
    steps: Steps


def encode(text: str) -> list[int]:
    """Turn text into token ids; a character outside `CHARS` is a ValueError."""
    unknown = sorted(set(text) - set(CHARS))
    if unknown:
        raise ValueError(f"encode: expected characters of CHARS, found {unknown}. Replace them.")
    return [CHARS.index(c) + 1 for c in text]


def decode(ids: Sequence[int]) -> str:
    """Turn token ids into text, up to the first newline or padding."""
    text = "".join(CHARS[i - 1] if i != PAD else "\n" for i in ids)
    return text.partition("\n")[0]


@cache
def held_out(a: int, op: str, b: int) -> bool:
    """Whether the fact behind `a+b` or `a-b` is kept for tests (one in five)."""
    # a-b=c is the fact {b, c}: otherwise 30-12 would give 12+18 away.
    low, high = sorted((a, b) if op == "+" else (b, a - b))
    return zlib.crc32(f"{low} {high}".encode()) % 5 == 0


def _apply(a: int, op: str, b: int) -> int:
    """Work one operation."""
    return a + b if op == "+" else a - b


def _work(expression: str, split: str) -> Worked | None:
    """Work a chain left to right; None where a value leaves 0..99 or a fact isn't of the split."""
    first, *rest = re.findall(r"[+-]|\d+", expression)
    value, steps = int(first), []
    for op, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        result = _apply(value, op, number)
        if not 0 <= result <= 99 or held_out(value, op, number) != (split == "test"):
            return None
        steps.append((value, op, number))
        value = result
    return tuple(steps), value


def _answer(steps: Steps, value: int) -> str:
    """Write the worked answer, e.g. `12+7=19 19-4=15 #### 15`."""
    worked = " ".join(f"{a}{op}{b}={_apply(a, op, b)}" for a, op, b in steps)
    return f"{worked} #### {value}"


def _draw_numbers(plan: str, count: int, split: str, rng: random.Random) -> tuple[Numbers, Worked]:
    """Draw numbers that suit a plan such as `a+b-c`, and its work."""
    while True:
        numbers = (rng.randint(5, 80), *(rng.randint(3, 40) for _ in range(count - 1)))
        letters = dict(zip("abcd", map(str, numbers), strict=False))
        worked = _work("".join(letters.get(c, c) for c in plan), split)
        if worked is not None:
            return numbers, worked


def _draw_problem(split: str, rng: random.Random) -> Row:
    """Draw one problem: its kind, its sentences, its people, then numbers that suit."""
    shape, plan = rng.choice(SHAPES)
    kinds = [rng.choice("+-") if kind == "event" else kind for kind in shape]
    signs = iter(kind for kind in kinds if kind in "+-")
    plan = "".join(next(signs) if c == "?" else c for c in plan)
    numbers, (steps, value) = _draw_numbers(plan, len(kinds) - 1, split, rng)
    people = dict(zip("NMP", rng.sample(WORDING["names"], 3), strict=True))
    picks = [rng.randrange(len(WORDING[split][kind])) for kind in kinds]
    thing = rng.choice(WORDING["things"])
    numbered = zip(kinds, picks, (*numbers, None), strict=True)
    text = " ".join(WORDING[split][k][i].format(x=x, t=thing, **people) for k, i, x in numbered)
    template = f"{split}:" + " ".join(f"{k}{i}" for k, i in zip(kinds, picks, strict=True))
    return Row(text + "\n", _answer(steps, value), value, template, numbers, steps)


def _different(draw: Callable[[], Row], n: int) -> list[Row]:
    """Draw until there are `n` rows with different questions."""
    found: dict[str, Row] = {}
    while len(found) < n:
        row = draw()
        found.setdefault(row.question, row)
    return list(found.values())


def problems(split: str, n: int, seed: int) -> list[Row]:
    """Draw `n` word problems of `split` ("train" or "test"), all different."""
    if split not in ("train", "test"):
        raise ValueError(f'problems: expected split "train" or "test", found {split!r}.')
    rng = random.Random(f"problems {split} {seed}")
    return _different(lambda: _draw_problem(split, rng), n)


def plain(rng: random.Random, split: str = "train") -> Row:
    """Draw a plain sum or difference, e.g. `12+7=` with answer `19`."""
    while True:
        a, op, b = rng.randint(0, 99), rng.choice("+-"), rng.randint(0, 99)
        if op == "-" and a < b:
            a, b = b, a
        if held_out(a, op, b) == (split == "test"):
            value = _apply(a, op, b)
            return Row(f"{a}{op}{b}=", str(value), value, "sum", (a, b), ((a, op, b),))


def sums(split: str, n: int, seed: int) -> list[Row]:
    """Draw `n` plain sums and differences of `split`, all different."""
    rng = random.Random(f"sums {split} {seed}")
    return _different(lambda: plain(rng, split), n)


def chain(rng: random.Random, split: str = "train") -> Row:
    """Draw a chain of two or three operations, e.g. `12+7-4>` with the worked answer."""
    while True:
        terms = [str(rng.randint(0, 99))]
        terms += [rng.choice("+-") + str(rng.randint(0, 60)) for _ in range(rng.randint(2, 3))]
        worked = _work("".join(terms), split)
        if worked is not None:
            numbers = tuple(int(term.lstrip("+-")) for term in terms)
            steps, value = worked
            return Row("".join(terms) + ">", _answer(*worked), value, "chain", numbers, steps)


def scattered(rng: random.Random) -> Row:
    """Draw a chain whose numbers and signs stand far apart, among words that mean nothing."""
    row = chain(rng)
    words = " ".join(sentence(rng) for _ in range(2)).split()
    words = [word for word in words if not any(map(str.isdigit, word))]
    parts = []
    for part in re.findall(r"[+-]|\d+", row.question):
        parts += [*rng.choices(words, k=rng.randint(0, 3)), part]
    text = " ".join(parts + rng.choices(words, k=rng.randint(0, 6)))
    return replace(row, question=text + ">", template="scattered")


def sentence(rng: random.Random) -> str:
    """Draw a plain sentence of the base's own wording: letters, names and repeated numbers."""
    people = dict(zip("NMP", rng.sample(WORDING["names"], 3), strict=True))
    text = rng.choice(WORDING["base"])
    return text.format(x=rng.randint(0, 99), t=rng.choice(WORDING["things"]), **people)


def _pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Stack lists of unequal length, padded on one side."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([[*f, *r] if left else [*r, *f] for r, f in zip(rows, fill, strict=True)])


def batch(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return `input_ids` and `labels`, (n, length) each, padded right; only answers have labels."""
    # No attention mask: attention is causal, so what stands right of the answer can't reach it.
    prompts = [encode("\n" + row.question) for row in rows]
    answers = [encode(row.answer + "\n") for row in rows]
    pairs = list(zip(prompts, answers, strict=True))
    return {
        "input_ids": _pad([p + a for p, a in pairs], PAD),
        "labels": _pad([[IGNORE] * len(p) + a for p, a in pairs], IGNORE),
    }


def batches(rows: Sequence[Row], size: int, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Return `steps` batches of `size` rows, each pass through the rows in a new order."""
    rng, queue = random.Random(seed), []
    for _ in range(steps):
        if len(queue) < size:
            queue += rng.sample(rows, len(rows))
        yield batch(queue[:size])
        queue = queue[size:]


@torch.no_grad()
def generate(forward: Forward, prompts: Sequence[str], max_new: int = 48) -> list[str]:
    """Continue each prompt greedily to its newline; the prompts run together, padded left.

    `forward` takes a mapping with `input_ids`, `attention_mask`, `position_ids`, `use_cache` and
    `CACHE`, as a causal model of transformers does, and returns its output.
    """
    ids = _pad([encode("\n" + prompt) for prompt in prompts], PAD, left=True)
    mask = (ids != PAD).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (n, length): the first character is at 0
    done, out, past = torch.zeros(len(ids), dtype=torch.bool), [], None
    for _ in range(max_new):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        output = forward(inputs | {CACHE: past, "use_cache": True})
        ids, past = output.logits[:, -1:].argmax(-1), output.past_key_values
        out.append(ids)
        done |= ids[:, 0] == END
        if done.all():
            break
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    return [decode(row) for row in torch.cat(out, 1).tolist()]


def _final(text: str) -> str:
    """Take the part that is scored: from the mark on in a worked answer, else all of it."""
    return text[max(text.find("####"), 0) :]


def exact_match(forward: Forward, rows: Sequence[Row], size: int = 100) -> tuple[float, float]:
    """Return the share of rows whose final number is right, and its standard error."""
    right = 0
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        texts = generate(forward, [row.question for row in part])
        pairs = zip(texts, part, strict=True)
        right += sum(_final(text) == _final(row.answer) for text, row in pairs)
    share = right / len(rows)
    return share, (share * (1 - share) / len(rows)) ** 0.5
