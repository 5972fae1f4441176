"""MetaMathQA and GSM8K: rows from the Hub or from local files, prompts, batches padded left, and the number that an answer ends with."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

IGNORE = -100
PROMPT = "Question: {query} Think step by step.\nAnswer:"  # the lineage's, without which figures could not be compared
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

Example = dict[str, list[int]]


def read(source: str, split: str, name: str | None = None) -> datasets.Dataset:
    """Give a split of a dataset: `source` is a file (jsonl, json, parquet), which is all one split, a folder, or a name on the Hub.

    A folder is one as the Hub lays it out, or one with a file for each split: `train.jsonl`, `test.jsonl`.
    """
    path = Path(source)
    if path.is_dir():
        path = next((p for p in sorted(path.iterdir()) if p.stem == split and p.suffix in FORMATS), path)
    if path.is_file():
        return datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    return datasets.load_dataset(source, name, split=split)


def answer_of(text: str) -> str | None:
    """Give the number that a text ends with: the last one after the last `####`, or without such a mark the last of all.

    Commas between digits are dropped: `1,234` is `1234`. None where there is no number.
    """
    found = NUMBER.findall(text.rpartition("####")[2])
    return found[-1].replace(",", "") if found else None


def right(prediction: str, reference: str) -> bool:
    """Say whether a prediction ends with the reference's number.

    Raises:
        ValueError: where the reference has none.
    """
    wanted = answer_of(reference)
    if wanted is None:
        raise ValueError(
            f"gsm8k: expected a number in the reference answer, found {reference!r}. Use GSM8K's answers, which end in '#### 42'."
        )
    return answer_of(prediction) == wanted


def encode(tokenizer: Any, query: str, response: str, longest: int) -> Example | None:
    """Give one example's token ids and labels, the response alone labelled; None where the question leaves no room for it."""
    prompt = tokenizer(PROMPT.format(query=query), add_special_tokens=False).input_ids
    if len(prompt) >= longest:
        return None
    text = f"{PROMPT.format(query=query)} {response}{tokenizer.eos_token}"
    ids = tokenizer(text, add_special_tokens=False).input_ids[:longest]
    return {"input_ids": ids, "labels": [IGNORE] * len(prompt) + ids[len(prompt) :]}


def examples(tokenizer: Any, rows: Iterable[Mapping[str, str]], longest: int, needed: int) -> list[Example]:
    """Give the first `needed` examples that fit.

    Raises:
        ValueError: where there are fewer.
    """
    found: list[Example] = []
    for row in rows:
        example = encode(tokenizer, row["query"], row["response"], longest)
        found += [example] if example is not None else []
        if len(found) == needed:
            return found
    raise ValueError(
        f"gsm8k: expected {needed} training examples of at most {longest} tokens, found {len(found)}. Lower --steps or --rows."
    )


def batch(part: Sequence[Example], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Stack examples, padded left."""
    width = max(len(example["input_ids"]) for example in part)

    def stacked(name: str, fill: int) -> Tensor:
        return torch.tensor([[fill] * (width - len(e[name])) + e[name] for e in part], device=device)

    mask = torch.tensor([[0] * (width - len(e["input_ids"])) + [1] * len(e["input_ids"]) for e in part], device=device)
    return {"input_ids": stacked("input_ids", pad), "labels": stacked("labels", IGNORE), "attention_mask": mask}
