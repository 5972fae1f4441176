"""Answers to the problems of `gsm8k.py`, kept as they come, and their score."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gsm8k_settings import Settings
from metamath import PROMPT, batch, encode, right


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
            inputs = batch([{"input_ids": ids, "labels": ids} for ids in prompts], tokenizer.pad_token_id, model.device)
            del inputs["labels"]
            out = model.generate(**inputs, max_new_tokens=s.new_tokens, do_sample=False, use_cache=True, **ends)
            texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            new = [{"prediction": text, "right": right(text, answer)} for text, answer in zip(texts, part["answer"], strict=True)]
            file.write("".join(json.dumps(line) + "\n" for line in new))
            file.flush()
            done += new
    share = sum(line["right"] for line in done) / len(done)
    return {"exact": share, "error": math.sqrt(share * (1 - share) / len(done)), "n": len(done)}
