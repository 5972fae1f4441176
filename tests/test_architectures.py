"""A sample of the classes that `architectures.py` tries, and that the support page says what it finds."""

import json

import pytest

from architectures import PAGE, check

SAMPLE = [
    *("LlamaForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM", "FalconForCausalLM", "MixtralForCausalLM", "MambaForCausalLM"),
    *("Gemma2ForCausalLM", "PhiForCausalLM", "OPTForCausalLM", "BartForCausalLM", "BertForMaskedLM", "DebertaV2ForMaskedLM"),
    *("LongformerForMaskedLM", "FNetForMaskedLM", "T5ForConditionalGeneration", "ViTForImageClassification", "SwinForImageClassification"),
]
RESULTS = json.loads(PAGE.read_text("utf-8"))["results"]


@pytest.mark.parametrize("name", SAMPLE)
def test_class_is_as_the_page_says(name):
    assert check(name).partition(":")[0] == RESULTS[name].partition(":")[0]


def test_most_classes_are_held_and_none_fails():
    said = [said.partition(":")[0] for said in RESULTS.values()]
    assert said.count("ok") >= 120
    assert set(said) <= {"ok", "refused", "not built"}
