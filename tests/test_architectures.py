"""A sample of the classes that `architectures.py` tries, and that the support page says what it finds."""

import json

import peft
import pytest
import torch
import transformers
from peft.tuners import tuners_utils

import lora_lite as ll
from architectures import PAGE, check, small

SAMPLE = [
    *("LlamaForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM", "FalconForCausalLM", "MixtralForCausalLM", "MambaForCausalLM"),
    *("Gemma2ForCausalLM", "PhiForCausalLM", "OPTForCausalLM", "BartForCausalLM", "BertForMaskedLM", "DebertaV2ForMaskedLM"),
    *("LongformerForMaskedLM", "FNetForMaskedLM", "T5ForConditionalGeneration", "ViTForImageClassification", "SwinForImageClassification"),
]
RESULTS = json.loads(PAGE.read_text("utf-8"))["results"]


@pytest.mark.parametrize("name", SAMPLE)
def test_class_is_as_the_page_says(name):
    assert check(name).partition(":")[0] == RESULTS[name].partition(":")[0]


@pytest.mark.parametrize("name", [*SAMPLE, "WhisperForConditionalGeneration", "DistilBertForMaskedLM", "BertForSequenceClassification"])
def test_default_targets_are_pefts_all_linear(name):
    try:
        model, _ = small(name)
    except Exception as e:
        pytest.skip(f"not built small: {e}")
    task = "SEQ_CLS" if "SequenceClassification" in name else None
    config = tuners_utils._maybe_include_all_linear_layers(peft.LoraConfig(target_modules="all-linear", task_type=task), model)
    found = ll.find_targets(model, ll.LoRAConfig())
    linear = {path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear | transformers.pytorch_utils.Conv1D)}
    theirs = {path for path in config.target_modules if "lm_head" not in path}  # ours goes by the name: RoBERTa's has a layer before
    assert {t.path for t in found} == theirs
    assert set(found.left_out) == linear - theirs
    assert all(reason in str(found) for reason in found.left_out.values())


def test_most_classes_are_held_and_none_fails():
    said = [said.partition(":")[0] for said in RESULTS.values()]
    assert said.count("ok") >= 120
    assert set(said) <= {"ok", "refused", "not built"}
