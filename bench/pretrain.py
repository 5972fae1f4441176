"""Train the base model of the demo and write `base/`: `python bench/pretrain.py`.

The base is a Llama of 0.87 M parameters whose tokens are characters. It sees four kinds of item:

- plain sums and differences, `12+7=19`;
- chains of two or three operations worked step by step, with the mark `####` before the result;
- the same chains with words between their numbers and signs, in no meaningful order: this teaches
  it to find digits and signs in a text as long as a word problem;
- plain sentences (`wording.json`, list `base`) that ask for no number and answer nothing.

It never sees a word problem, a sentence of the lists `train` and `test`, or a fact that is held
out. It does know the worked form of an answer; what it must be taught is when to give one, and
which operations a story means.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from common.arithmetic import (
    END,
    IGNORE,
    PAD,
    VOCAB_SIZE,
    Row,
    chain,
    encode,
    exact_match,
    plain,
    problems,
    scattered,
    sentence,
    sums,
)


@dataclass(frozen=True)
class Stage:
    """A stage of the training: the items that it sees, and how fast it learns."""

    shares: dict[str, float]  # kind of item -> part of the items
    steps: int
    rows: int  # a step
    length: int  # characters a row
    peak: float  # learning rate, per step


# The first stage teaches arithmetic, the second to find its terms in a longer text. Without the
# second, LoRA (r=8, 300 steps) solved 1 of 200 word problems: the base could add, but not look up.
STAGES = (
    Stage({"sum": 0.55, "chain": 0.3, "sentence": 0.15}, 4000, 32, 128, 2e-3),
    Stage({"sum": 0.15, "chain": 0.1, "sentence": 0.15, "scattered": 0.6}, 1200, 24, 160, 1e-3),
)
DRAW = {"sum": plain, "chain": chain, "scattered": scattered}
CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": END,
    "eos_token_id": END,
}


def item(kind: str, rng: random.Random) -> tuple[list[int], list[int]]:
    """Draw one item as tokens and labels; what can't be foretold has no label."""
    if kind == "sentence":
        question, answer = "", sentence(rng)
    else:
        row = DRAW[kind](rng)
        question, answer = row.question, row.answer
    prompt, target = encode(question), encode(answer + "\n")
    return prompt + target, [IGNORE] * len(prompt) + target


def stream(stage: Stage, seed: int) -> Iterator[dict[str, Tensor]]:
    """Return the batches of a stage: items packed to rows, the last item of a row cut short."""
    rng = random.Random(seed)
    kinds, weights = list(stage.shares), list(stage.shares.values())
    for _ in range(stage.steps):
        ids = torch.empty(stage.rows, stage.length, dtype=torch.long)
        labels = torch.empty(stage.rows, stage.length, dtype=torch.long)
        for i in range(stage.rows):
            tokens, marks = [END], [IGNORE]
            while len(tokens) < stage.length:
                t, m = item(rng.choices(kinds, weights)[0], rng)
                tokens, marks = tokens + t, marks + m
            ids[i] = torch.tensor(tokens[: stage.length])
            labels[i] = torch.tensor(marks[: stage.length])
        yield {"input_ids": ids, "labels": labels}


def rate(step: int, stage: Stage, warmup: int = 100) -> float:
    """Return the learning rate: linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return stage.peak * (step + 1) / warmup
    done = (step - warmup) / (stage.steps - warmup)
    return stage.peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: LlamaForCausalLM, stage: Stage, seed: int) -> None:
    """Train the model in place through one stage and print the loss on the way."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.peak, betas=(0.9, 0.95), fused=True)
    start, unseen = time.perf_counter(), sums("test", 200, seed)
    for step, inputs in enumerate(stream(stage, seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, stage)
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 199:
            share, _ = exact_match(lambda b: model(**b), unseen)
            each = (time.perf_counter() - start) / (step + 1)
            facts = f"loss {loss.item():.4f}  unseen sums {share:.3f}  {each:.3f} s/step"
            print(f"step {step + 1:5d}  {facts}", flush=True)


def measure(model: LlamaForCausalLM, rows: list[Row]) -> dict[str, float]:
    """Return the exact match on `rows` with its standard error."""
    share, error = exact_match(lambda b: model(**b), rows)
    return {"exact_match": round(share, 4), "standard_error": round(error, 4), "n": len(rows)}


def main() -> None:
    """Train, measure and write the base model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "common" / "base")
    parser.add_argument("--resume", type=Path, help="folder of a finished first stage")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    if args.resume:
        model = LlamaForCausalLM.from_pretrained(args.resume)
    for number, stage in enumerate(STAGES):
        if not (args.resume and number == 0):
            train(model, stage, args.seed + number)
            model.save_pretrained(args.out)
    facts = {
        "unseen_sums": measure(model, sums("test", 1000, args.seed + 1)),
        "word_problems": measure(model, problems("test", 1000, args.seed + 1)),
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "stages": [asdict(stage) for stage in STAGES],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.out / "metrics.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
