"""The parts of a run of `gsm8k.py`: its settings, the rows of its data as batches, and the score of answers.

The settings are those of the two tables that wassname/lora-lite published, and a third of models and data out of packages. Departures:
params are float32, where the lineage's are bfloat16, which rounds small steps away; `--set dtype=bfloat16` restores its own. HRA's row of
the first table is of batches of 2, for lack of memory there: `--rows 2`.
"""

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from tqdm import tqdm

import lora_lite as ll
from common import gsm_symbolic
from common.methods import METHODS, demo_config
from common.pretrained import SMOLLM

OWN: dict[str, dict[str, Any]] = {
    "ia3": {"rate": 5e-3, "targets": r"(k_proj|v_proj)$"},
    "ia3_ff": {"rate": 5e-3, "targets": r"down_proj$"},
    "delora": {"rate": 1e-3},
    "antipasto": {"rate": 5e-3, "r": 256},
    "lora_xs": {"rate": 4e-3},
}
"""The fields of a variant, in both tables, in place of LoRA's."""
UNSCALED = ("pissa", "lora_xs")  # alpha is the rank
FIELDS: dict[str, dict[str, Any]] = {"delora": {"lambda0": 0.1}, "road": {"group_size": 64}, "tokens": {"token_ids": tuple(range(64))}}
CORE = {"qwen3.5": {"antipasto": (("core", "gain"),)}}  # its row is the rotation's in the first table, the gain's in the second
CALIBRATION, CALIBRATED = {"eva": 4}, 64  # batches of one variant; of the others, which estimate a covariance


@dataclass(frozen=True)
class Settings:
    """A run. Rows are of one pass; a step adds up the gradients of `accumulate` passes.

    With `tuned` a variant's config and rate are those of the demo, in place of the lineage's one rank, scale and targets.

    Raises:
        ValueError: for a number out of range; it lists each.
    """

    model: str = "Qwen/Qwen3-0.6B-Base"
    variant: str = "lora"
    fields: tuple[tuple[str, Any], ...] = ()
    targets: str = r"(q_proj|v_proj)$"
    r: int = 32
    alpha: float = 64.0
    steps: int = 5000
    rows: int = 4
    accumulate: int = 1
    rate: float = 1e-4
    longest: int = 768
    new_tokens: int = 300
    eval_rows: int = 50
    valid: int = 50
    test: int | None = None
    seed: int = 0
    dtype: str = "bfloat16"
    train_data: str = "meta-math/MetaMathQA"
    test_data: str = "openai/gsm8k"
    tuned: bool = False

    def __post_init__(self) -> None:
        counts = ("r", "steps", "rows", "accumulate", "longest", "new_tokens", "eval_rows", "valid", "test")
        wrong = [f"{name}={value}" for name in counts if (value := getattr(self, name)) is not None and value < 1]
        wrong += [] if self.rate > 0 else [f"rate={self.rate}"]
        if wrong:
            raise ValueError(f"gsm8k: expected counts of at least 1 and a rate above 0, found {', '.join(wrong)}. Correct these.")


TABLES = {
    "qwen3": Settings(),
    "qwen3.5": Settings(model="Qwen/Qwen3.5-0.8B-Base", targets=r"down_proj$", steps=2500, rows=2, accumulate=4, longest=512, eval_rows=16),
    "symbolic": Settings(
        **{"model": SMOLLM, "train_data": gsm_symbolic.NAME, "test_data": gsm_symbolic.NAME, "tuned": True},
        **{"steps": 500, "rows": 16, "longest": 448, "new_tokens": 264, "eval_rows": 340, "valid": 340},
    ),
}
"""The settings of the lineage's two published tables, and of one that needs no Hub; AdamW with decay 0.1, cosine to zero, gradients clipped
to norm 1 in all. No problem of the third is longer than its lengths."""


def published(table: str, **given: Any) -> Settings:
    """Return a variant's settings in one of the tables, changed by those that are given; given fields come after the table's.

    Raises:
        ValueError: for a rank, scale or targets where each variant has its own.
    """
    variant = given.get("variant", "lora")
    if TABLES[table].tuned:
        fixed = sorted(given.keys() & {"r", "alpha", "targets"})
        if fixed:
            raise ValueError(
                f'gsm8k: expected no {", ".join(fixed)} with the table "{table}", where each variant has its own config. Use --set r=16.'
            )
        return dataclasses.replace(TABLES[table], **{"rate": METHODS[variant].short_rate or METHODS[variant].rate, **given})
    own = OWN.get(variant, {}) | given
    own |= {"fields": tuple({**dict(CORE.get(table, {}).get(variant, ())), **dict(given.get("fields", ()))}.items())}
    if variant in UNSCALED and "alpha" not in given:
        own["alpha"] = float(own.get("r", TABLES[table].r))
    return dataclasses.replace(TABLES[table], **own)


def config(s: Settings) -> ll.AdapterConfig:
    """Make the variant's config: the run's rank and targets, the lineage's choices for it, then what the run sets.

    Raises:
        ValueError, TypeError: for a field that the variant lacks or a value that it refuses.
    """
    cls = ll.VARIANTS[s.variant]
    if cls.original:
        raise ValueError(
            f'gsm8k: expected a variant that starts from the weights as they are, found "{s.variant}", which asks for those from before '
            "quantisation. On a dense model it is LoRA: use --variant lora."
        )
    known = list(inspect.signature(cls).parameters)
    unknown = [name for name, _ in s.fields if name not in known]
    if unknown:
        raise ValueError(f"gsm8k: expected --set to name fields of {cls.__name__}, {', '.join(known)}, found {unknown}. Name one of them.")
    if s.tuned:
        return dataclasses.replace(demo_config(s.variant, s.steps), **dict(s.fields))
    general: dict[str, Any] = {"r": s.r, "alpha": s.alpha, "init_r": s.r * 3 // 2, "target_r": s.r, "total_step": s.steps}
    general |= {"target_names": s.targets} if cls.adapts in ("linear", "module") and not cls.tied else {}  # others have names of their own
    return cls(**{**{k: v for k, v in general.items() if k in known}, **FIELDS.get(s.variant, {}), **dict(s.fields)})


IGNORE = -100
PROMPT = "Question: {query} Think step by step.\nAnswer:"  # the lineage's, without which figures could not be compared
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

Example = dict[str, list[int]]


def read(source: str, split: str, columns: Sequence[str], name: str | None = None) -> datasets.Dataset:
    """Return a split of a dataset: `source` is a file (jsonl, json, parquet), which is all one split, a folder, or a name on the Hub.

    A folder is one as the Hub lays it out, or one with a file for each split: `train.jsonl`, `test.jsonl`. The problems of `gsm-symbolic`
    are made, not read.

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
    """Return the first line of an exception's message, or its name where the message is empty."""
    return (str(e) or type(e).__name__).splitlines()[0]


def _load(path: Path, source: str, split: str, name: str | None) -> datasets.Dataset:
    if source == gsm_symbolic.NAME:
        return datasets.Dataset.from_list(gsm_symbolic.problems(split))
    if not path.exists():
        return datasets.load_dataset(source, name, split=split)
    files = [str(path)] if path.is_file() else _files(path, split, name)
    kinds = {FORMATS.get(Path(file).suffix) for file in files}
    if None in kinds or len(kinds) > 1:
        raise ValueError(f"files {files}")
    return datasets.load_dataset(kinds.pop(), data_files=files, split="train")


def _files(folder: Path, split: str, name: str | None) -> list[str]:
    """Return the files of a split. A folder is not loaded as such: `datasets` keeps one by its name, and gives what was there before."""
    own = [str(p) for p in sorted(folder.iterdir()) if p.stem == split and p.suffix in FORMATS]
    if own:
        return own[:1]
    named = name if name in datasets.get_dataset_config_names(str(folder)) else None  # else a folder of this one configuration
    return datasets.load_dataset_builder(str(folder), named).config.data_files[split]


def problems(source: str, valid: int, test: int | None, seed: int) -> dict[str, datasets.Dataset]:
    """Return the problems to answer: `valid` of GSM8K's training split, and the first `test` of its test split, None for all.

    GSM-Symbolic has a split for `valid`: of the templates of the training, with other numbers.

    Raises:
        ValueError: where they can't be read, or an answer has no number.
    """
    columns = ("question", "answer")
    first = "valid" if source == gsm_symbolic.NAME else "train"
    train, last = (read(source, split, columns, "main") for split in (first, "test"))
    counts = min(valid, len(train)), min(test or len(last), len(last))
    found = {"valid": train.shuffle(seed=seed).select(range(counts[0])), "test": last.select(range(counts[1]))}
    for rows in found.values():
        for answer in rows["answer"]:
            right("", answer)  # now, and not after the training
    return found


def answer_of(text: str) -> str | None:
    """Return the number that a text ends with: the last one after the last `####`, or without such a mark the last of all.

    Commas between digits are dropped: `1,234` is `1234`. None where there is no number.
    """
    found = NUMBER.findall(text.rpartition("####")[2])
    return found[-1].replace(",", "") if found else None


def right(prediction: str, reference: str) -> bool:
    """Whether a prediction ends with the reference's number.

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
    """Return a text's token ids, after the token that begins texts where the tokenizer has one."""
    begin = tokenizer("").input_ids[:1]  # nothing but special tokens
    return [t for t in begin if t == tokenizer.bos_token_id] + tokenizer(text, add_special_tokens=False).input_ids


def example(tokenizer: Any, query: str, response: str, longest: int) -> Example | None:
    """Return one example's token ids and labels, the response alone labelled; None where the question leaves no room for it."""
    prompt = encode(tokenizer, PROMPT.format(query=query))
    if len(prompt) >= longest:
        return None
    ids = encode(tokenizer, f"{PROMPT.format(query=query)} {response}{tokenizer.eos_token}")[:longest]
    return {"input_ids": ids, "labels": [IGNORE] * len(prompt) + ids[len(prompt) :]}


def examples(tokenizer: Any, rows: Iterable[Mapping[str, str]], longest: int, needed: int) -> list[Example]:
    """Return the first `needed` examples that fit.

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


def batch(part: Sequence[Example], pad: int, device: torch.device, left: bool = False, multiple: int = 1) -> dict[str, Tensor]:
    """Stack examples, padded right, or left for answers to go on from, to a width that is a multiple of `multiple`.

    A position of the left padding sees no token at all. For such rows a GPU's attention in bfloat16 gave gradients of nan, at one length.
    """
    width = -(-max(len(example["input_ids"]) for example in part) // multiple) * multiple

    def stacked(name: str, fill: int) -> Tensor:
        rows = [(e[name], [fill] * (width - len(e[name]))) for e in part]
        return torch.tensor([empty + row if left else row + empty for row, empty in rows], device=device)

    mask = stacked("input_ids", -1) != -1
    return {"input_ids": stacked("input_ids", pad), "labels": stacked("labels", IGNORE), "attention_mask": mask.long()}


@torch.no_grad()
def evaluate(s: Settings, model: Any, tokenizer: Any, rows: Any, place: Path) -> dict[str, Any]:
    """Answer the questions greedily and score them; answers are kept as they come, and those that are there are not made again."""
    lines = place.read_text("utf-8").split("\n")[:-1] if place.is_file() else []  # a line cut short by a stop has no end
    if len(lines) < len(rows):
        del lines[len(lines) // s.eval_rows * s.eval_rows :]  # a batch cut short: in another batch answers may be rounded otherwise
    done = [json.loads(line) for line in lines[: len(rows)]]
    place.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    # The end that it was taught, whatever the model's own generation config says.
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with place.open("a", encoding="utf-8") as file:
        for k in tqdm(range(len(done), len(rows), s.eval_rows), desc=f"evaluate {place.stem}", mininterval=5):
            part = rows.select(range(k, min(k + s.eval_rows, len(rows))))
            prompts = [encode(tokenizer, PROMPT.format(query=q))[: s.longest] for q in part["question"]]
            inputs = batch([{"input_ids": ids, "labels": ids} for ids in prompts], tokenizer.pad_token_id, model.device, left=True)
            del inputs["labels"]
            out = model.generate(**inputs, max_new_tokens=s.new_tokens, do_sample=False, use_cache=True, **ends)
            texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            new = [{"prediction": text, "right": right(text, answer)} for text, answer in zip(texts, part["answer"], strict=True)]
            file.write("".join(json.dumps(line) + "\n" for line in new))
            file.flush()
            done += new
    n = len(done)
    share = sum(line["right"] for line in done) / n
    p = min(max(share, 0.5 / n), 1 - 0.5 / n)  # none or all right leave a doubt too
    return {"exact": share, "error": math.sqrt(p * (1 - p) / n), "n": n}
