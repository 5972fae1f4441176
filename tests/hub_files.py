"""Small models, a tokenizer and both data sets of `bench/gsm8k.py`, in folders laid out as the Hub lays them out."""

import json

import datasets
import tokenizers
import torch
import transformers as tf

import lora_lite as ll
from common import gsm8k_data
from common.gsm8k_data import published

END = "<|endoftext|>"
VARIANTS = [name for name, cls in ll.VARIANTS.items() if not cls.original]
SMALL = {"road": (("group_size", 16),), "c3a": (("block_size", 16),), "vblora": (("vector_length", 16),)}


def hub_tokenizer():
    """Train a byte-level BPE with an end token."""
    bpe, byte = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.Sequence([digits, byte(False)]), tokenizers.decoders.ByteLevel()
    texts = [gsm8k_data.PROMPT.format(query=f"What is {k} plus 3?") + f" It is {k + 3}. #### {k + 3}" for k in range(50)]
    special = [END, "<|im_end|>"]
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=byte.alphabet()))
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def hub_models():
    """Return a dense model, and a hybrid one as its checkpoint holds it, together with a vision tower; embeddings are tied in both."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    sizes |= {"vocab_size": 320, "tie_word_embeddings": True, "eos_token_id": 0}
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}
    hybrid = tf.Qwen3_5Config(text_config={**sizes, **linear, **layers}, vision_config=vision, tie_word_embeddings=True)
    torch.manual_seed(0)
    return {
        "Qwen3-tiny": tf.Qwen3ForCausalLM(tf.Qwen3Config(num_hidden_layers=2, **sizes)),
        "Qwen3.5-tiny": tf.Qwen3_5ForConditionalGeneration(hybrid),
    }


def write_hub(folder):
    """Write both models, and both data sets with their fields and folders."""
    tokenizer = hub_tokenizer()
    for name, model in hub_models().items():
        model.bfloat16().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    asked = [f"What is {k} plus 3?" + " Natalia sold clips." * (k % 3) for k in range(40)]
    rows = [{"type": "GSM_Rephrased", "query": q, "original_question": q, "response": f"#### {k + 3}"} for k, q in enumerate(asked)]
    (folder / "MetaMathQA").mkdir()
    (folder / "MetaMathQA" / "MetaMathQA-395K.json").write_text(json.dumps(rows))
    (folder / "MetaMathQA" / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "metamath.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(folder / "metamath.parquet")
    card = "configs:\n"
    for name, count in (("main", 7), ("socratic", 2)):
        card += f"- config_name: {name}\n  data_files:\n"
        (folder / "gsm8k" / name).mkdir(parents=True)
        for split, n in (("train", 9), ("test", count)):
            card += f"  - split: {split}\n    path: {name}/{split}-*\n"
            gsm = [{"question": q, "answer": f"{k}+3=<<{k}+3={k + 3}>>{k + 3}\n#### {k + 3}"} for k, q in enumerate(asked[:n])]
            datasets.Dataset.from_list(gsm).to_parquet(folder / "gsm8k" / name / f"{split}-00000-of-00001.parquet")
    (folder / "gsm8k" / "README.md").write_text(f"---\n{card}---\n")


TEMPLATE = """
def generate_{number}(rng, difficulty):
    a = rng.randint(1, 9)
    solution = f"It is {{a + 3}}.\\n#### {{a + 3}}.0"
    return {{"question": f"Sort {number}: what is {{a}} plus 3?", "answer": str(a + 3), "metadata": {{"answer_cot": solution}}}}
"""


def write_symbolic(folder):
    """Write a package of ten templates and a wrong one, laid out as reasoning-gym, which imports what is not installed."""
    inner = folder / "reasoning_gym" / "arithmetic" / "gsm_symbolic"
    inner.mkdir(parents=True)
    for place in (folder / "reasoning_gym", inner.parent, inner):
        (place / "__init__.py").write_text("import a_module_that_is_not_there\n")
    (folder / "reasoning_gym" / "utils.py").write_text("half = 2\n")
    for file, numbers in (("generators_00_49", (0, 1, 2, 3, 4, 32)), ("generators_50_99", (50, 51, 52, 53, 54))):
        text = "".join(TEMPLATE.format(number=number) for number in numbers)
        (inner / f"{file}.py").write_text(f"from reasoning_gym.utils import half\n{text}")


def small(hub, table="qwen3", **given):
    """Return a table's settings for a run of a second."""
    model = str(hub / {"qwen3": "Qwen3-tiny", "qwen3.5": "Qwen3.5-tiny"}[table])
    data = {"train_data": str(hub / "metamath.jsonl"), "test_data": str(hub / "gsm8k")}  # a file: to look through a folder takes longer
    sizes = {"steps": 4, "rows": 2, "accumulate": 2, "r": 8, "longest": 96, "new_tokens": 6, "eval_rows": 3, "valid": 4, "rate": 1e-2}
    given.setdefault("fields", SMALL.get(given.get("variant"), ()))
    return published(table, **{"model": model, **data, **sizes, **given})
