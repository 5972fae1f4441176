"""PEFT's `task_type`: which of its classes wraps a model, and so which `AutoPeftModelFor...` loads an adapter."""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lora_lite.core.tree import join

_ENDINGS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""The modules that PEFT's class of a task trains as a whole, asked or not."""


def task_of(model: nn.Module, targets: Iterable[str], whole: Iterable[str] = ()) -> str | None:
    """Infer the task of a model of transformers from its class; None where PEFT's classes of tasks would not run it.

    They call the model with `input_ids` and `inputs_embeds`; that of a classifier takes the head as trained whole, which shuts other
    targets in it out; that of a sequence-to-sequence model asks for an encoder and a decoder.

    Args:
        model: the model.
        targets: paths of the targets that are not trained as a whole.
        whole: paths of those that are: one may be a head, and not a part of it.
    """
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or "inputs_embeds" not in inspect.signature(model.forward).parameters:
        return None
    task = next((task for ending, task in _ENDINGS.items() if name.endswith(ending)), None)
    if task is None and name.endswith("Model") and getattr(model, "base_model", None) is model:
        task = "FEATURE_EXTRACTION"
    if task == "SEQ_2_SEQ_LM" and not getattr(config, "is_encoder_decoder", True):
        return None
    heads = [path for path, _ in model.named_modules() if path.endswith(_HEADS.get(task or "", ()))]
    shut_out = [*targets, *(path for path in whole if path not in heads)]
    return None if any(join(path, "").startswith(join(head, "")) for path in shut_out for head in heads) else task


def heads_of(model: nn.Module, task: str | None, whole: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of the heads that PEFT's class of a task looks for in the file, by name; those of `whole` are there already."""
    ends, found = _HEADS.get(task or "", ()), dict[str, Tensor]()
    for path, module in model.named_modules():
        if ends and path.endswith(ends) and path not in set(whole):
            found |= {join(path, name): t.detach().cpu().contiguous().clone() for name, t in module.state_dict().items()}
    return found
