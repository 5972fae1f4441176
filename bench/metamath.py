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


def read(source: str, split: str, columns: Sequence[str], name: str | None = None) -> datasets.Dataset:
    """Give a split of a dataset: `source` is a file (jsonl, json, parquet), which is all one split, a folder, or a name on the Hub.

    A folder is one as the Hub lays it out, or one with a file for each split: `train.jsonl`, `test.jsonl`.

    Raises:
        ValueError: where there is no such dataset, one of `columns` is missing or it has no rows.
    """
    try:
        found = _load(Path(source), source, split, name)
    except (OSError, ValueError, KeyError, StopIteration) as e:  # the last two: no such split, an empty file
        raise ValueError(
            f'gsm8k: expected the split "{split}" of a dataset of the Hub, a folder or a file of {", ".join(FORMATS)} at "{source}", '
            f"found none ({reason(e)}). Correct --train-data or --test-data."
        ) from None  # their own chain is long
    missing = [column for column in columns if column not in found.column_names]
    if missing or not len(found):
        what = f"no {missing} among {found.column_names}" if missing else "no rows"
        raise ValueError(f'gsm8k: expected rows of {list(columns)} in "{source}", found {what}. Use data with the fields of the Hub\'s.')
    return found


def reason(e: Exception) -> str:
    """Give the first line of what an exception says, or its name where it says nothing."""
    return (str(e) or type(e).__name__).splitlines()[0]


def _load(path: Path, source: str, split: str, name: str | None) -> datasets.Dataset:
    if not path.exists():
        return datasets.load_dataset(source, name, split=split)
    files = [str(path)] if path.is_file() else _files(path, split, name)
    kinds = {FORMATS.get(Path(file).suffix) for file in files}
    if None in kinds or len(kinds) > 1:
        raise ValueError(f"files {files}")
    return datasets.load_dataset(kinds.pop(), data_files=files, split="train")


def _files(folder: Path, split: str, name: str | None) -> list[str]:
    """Give the files of a split. A folder is not loaded as such: `datasets` keeps one by its name, and gives what was there before."""
    own = [str(p) for p in sorted(folder.iterdir()) if p.stem == split and p.suffix in FORMATS]
    if own:
        return own[:1]
    named = name if name in datasets.get_dataset_config_names(str(folder)) else None  # else a folder of this one configuration
    return datasets.load_dataset_builder(str(folder), named).config.data_files[split]


def problems(source: str, valid: int, test: int | None, seed: int) -> dict[str, datasets.Dataset]:
    """Give the problems to answer: `valid` of GSM8K's training split, and the first `test` of its test split, None for all.

    Raises:
        ValueError: where they can't be read, or an answer has no number.
    """
    columns = ("question", "answer")
    train, last = (read(source, split, columns, "main") for split in ("train", "test"))
    counts = min(valid, len(train)), min(test or len(last), len(last))
    found = {"valid": train.shuffle(seed=seed).select(range(counts[0])), "test": last.select(range(counts[1]))}
    for rows in found.values():
        for answer in rows["answer"]:
            right("", answer)  # now, and not after the training
    return found


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


def encode(tokenizer: Any, text: str) -> list[int]:
    """Give a text's token ids, after the token that begins texts where the tokenizer has one."""
    begin = tokenizer("").input_ids[:1]  # nothing but special tokens
    return [t for t in begin if t == tokenizer.bos_token_id] + tokenizer(text, add_special_tokens=False).input_ids


def example(tokenizer: Any, query: str, response: str, longest: int) -> Example | None:
    """Give one example's token ids and labels, the response alone labelled; None where the question leaves no room for it."""
    prompt = encode(tokenizer, PROMPT.format(query=query))
    if len(prompt) >= longest:
        return None
    ids = encode(tokenizer, f"{PROMPT.format(query=query)} {response}{tokenizer.eos_token}")[:longest]
    return {"input_ids": ids, "labels": [IGNORE] * len(prompt) + ids[len(prompt) :]}


def examples(tokenizer: Any, rows: Iterable[Mapping[str, str]], longest: int, needed: int) -> list[Example]:
    """Give the first `needed` examples that fit.

    Raises:
        ValueError: where there are fewer.
    """
    found: list[Example] = []
    for row in rows:
        one = example(tokenizer, row["query"], row["response"], longest)
        found += [one] if one is not None else []
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
