"""The settings, data and answers of MetaMathQA to GSM8K: those of the published tables, whatever the layout, and errors that say so."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import datasets
import pytest
import tokenizers
import torch
import transformers as tf

import gsm8k
import lora_lite as ll
from common import gsm8k_data, gsm8k_train, gsm_symbolic
from common.gsm8k_data import config, published
from common.measure import llama
from common.methods import METHODS, demo_config
from hub_files import END, VARIANTS, hub_tokenizer, small


@pytest.fixture
def settings(hub):
    return small(hub)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", "42"),
        ("He has 3 and 4.\n#### 1,234", "1234"),
        ("The answer is: -17", "-17"),
        ("The answer is 1,234.", "1234"),
        ("#### 5 was said. But it is 6.", "6"),
        ("first #### 5, then #### 7 apples", "7"),
        ("7 before #### none after", None),
        ("It costs $2.50", "2.50"),
        ("no number", None),
        ("", None),
    ],
)
def test_answer_is_the_last_number_after_the_last_mark(text, number):
    assert gsm8k_data.answer_of(text) == number


def test_predictions_are_scored_by_the_number_alone():
    reference = "3 + 4 = <<3+4=7>>7\n#### 1,007"
    assert gsm8k_data.right("so 1007", reference)
    assert not gsm8k_data.right("so 7", reference)
    assert not gsm8k_data.right("no idea", reference)
    with pytest.raises(ValueError, match=r"expected a number in the reference.*found 'none'.*42"):
        gsm8k_data.right("7", "none")


def test_published_settings_are_the_tables():
    first, second = gsm8k.TABLES["qwen3"], gsm8k.TABLES["qwen3.5"]
    same_in_both = {"r": 32, "alpha": 64.0, "rate": 1e-4, "new_tokens": 300, "valid": 50, "test": None, "seed": 0, "dtype": "bfloat16"}
    assert same_in_both.items() <= dataclasses.asdict(first).items() & dataclasses.asdict(second).items()
    assert (first.model, first.steps, first.rows, first.accumulate) == ("Qwen/Qwen3-0.6B-Base", 5000, 4, 1)
    assert (second.model, second.steps, second.rows, second.accumulate) == ("Qwen/Qwen3.5-0.8B-Base", 2500, 2, 4)
    assert [(t.targets, t.longest, t.eval_rows) for t in (first, second)] == [(r"(q_proj|v_proj)$", 768, 50), (r"down_proj$", 512, 16)]


@pytest.mark.parametrize("table", ["qwen3", "qwen3.5"])
def test_variants_have_the_rates_targets_and_scales_of_the_tables(table):
    rates = {name: published(table, variant=name).rate for name in VARIANTS}
    others = {"delora": 1e-3, "ia3": 5e-3, "ia3_ff": 5e-3, "antipasto": 5e-3, "lora_xs": 4e-3}
    assert rates == {**dict.fromkeys(VARIANTS, 1e-4), **others}
    assert published(table, variant="ia3").targets == r"(k_proj|v_proj)$"
    assert published(table, variant="ia3_ff").targets == r"down_proj$"
    for name in ("pissa", "lora_xs"):  # the scale is 1, whatever the rank
        assert config(published(table, variant=name)).alpha == 32.0
        assert config(published(table, variant=name, r=16)).alpha == 16.0
    assert config(published(table, variant="delora")).lambda0 == 0.1
    assert config(published(table, variant="antipasto")).core == {"qwen3": "rotation", "qwen3.5": "gain"}[table]
    assert config(published(table, variant="antipasto")).r == 256
    assert config(published(table, variant="antipasto", r=64)).r == 64
    assert config(published(table, variant="antipasto", fields=(("core", "dplr"),))).core == "dplr"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_config_of_the_published_settings(name):
    cfg = config(published("qwen3", variant=name))
    assert cfg.name == name
    assert len(ll.find_targets(llama(32, 2), cfg)) in (1, 2, 4, 5)  # the embedding, blocks, q and v of each, norms


def test_options_change_the_tables_settings(monkeypatch):
    words = ["--variant", "antipasto", "--table", "qwen3.5", "--set", "core=gain", "--set", "basis=corda", "r=64", "--steps", "7"]
    monkeypatch.setattr(sys, "argv", ["gsm8k.py", *words])
    s = gsm8k.settings_of(gsm8k.options())
    assert (s.rate, s.steps, s.targets) == (5e-3, 7, r"down_proj$")
    assert s.fields == (("core", "gain"), ("basis", "corda"), ("r", 64))
    assert (config(s).r, config(s).core, config(s).basis) == (64, "gain", "corda")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_third_table_has_the_demos_configs_and_rates(name):
    s = published("symbolic", variant=name)
    assert (config(s), s.rate) == (demo_config(name, 500), METHODS[name].short_rate or METHODS[name].rate)


def test_problems_of_held_out_templates_are_the_tests_alone(symbolic):
    found = {split: gsm_symbolic.problems(split) for split in gsm_symbolic.DRAWS}
    sorts = {split: {row["query"].partition(":")[0] for row in rows} for split, rows in found.items()}
    assert (len(sorts["test"]), len(sorts["train"])) == (2, 8)
    assert sorts["train"] == sorts["valid"]
    assert not sorts["train"] & sorts["test"]
    assert "Sort 32" not in set.union(*sorts.values())  # the package says that it is wrong
    asked = {split: [row["query"] for row in rows] for split, rows in found.items()}
    assert not set(asked["train"]) & set(asked["valid"])
    assert all(len(rows) == len(set(rows)) for rows in asked.values())
    assert found == {split: gsm_symbolic.problems(split) for split in gsm_symbolic.DRAWS}
    row = found["train"][0]
    assert row["response"] == row["answer"] == f"It is {gsm8k_data.answer_of(row['answer'])}.\n#### {gsm8k_data.answer_of(row['answer'])}"
    assert row["query"] == row["question"]
    assert not [name for name in sys.modules if name.partition(".")[0] in ("reasoning_gym", "templates")]
    rows = gsm8k_data.problems(gsm_symbolic.NAME, valid=50, test=3, seed=0)
    assert set(rows["valid"]["question"]) == set(asked["valid"])
    assert rows["test"]["question"] == asked["test"][:3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "bar=3"], r"expected --set to name fields of LoRAConfig, dtype.*dropout.*, found \['bar'\]\. Name one"),
        (["--set", "r"], r"expected --set FIELD=VALUE, found \['r'\]\. Write e\.g\."),
        (["--set", "r=0"], r"LoRAConfig\.r: expected an integer >= 1, found 0"),
        (["--set", "rslora=1"], r"LoRAConfig\.rslora: expected True or False, found 1"),
        (["--table", "symbolic", "--r", "8", "--targets", "q$"], r'expected no r, targets with the table "symbolic".*--set r=16'),
        (["--steps", "0", "--test", "0", "--rate", "0"], r"at least 1 and a rate above 0, found steps=0, test=0, rate=0\.0\. Correct"),
        (["--variant", "loftq"], r'expected a variant that starts from the weights as they are, found "loftq".*use --variant lora'),
        (["--variant", "adalora", "--steps", "3", "--set", "tinit=4"], r"AdaLoRAConfig\.total_step: expected more than tinit"),
    ],
)
def test_wrong_options_are_named(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["gsm8k.py", *words])
    with pytest.raises(SystemExit, match=message):
        gsm8k.main()


@pytest.mark.parametrize("option", ["--variant", "--dtype", "--table"])
def test_a_word_that_is_no_choice_is_refused(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["gsm8k.py", option, "none"])
    with pytest.raises(SystemExit):
        gsm8k.main()
    assert "invalid choice: 'none' (choose from" in capsys.readouterr().err


def test_what_doesnt_fit_is_said_before_anything_is_written(hub, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "none.jsonl").write_text(json.dumps({"question": "a", "answer": "none"}) + "\n")
    wrong = [
        ({"model": str(tmp_path / "none")}, r"expected a causal language model .* found none \(.*Correct --model"),
        ({"model": str(hub / "gsm8k")}, r"expected a causal language model"),
        ({"train_data": str(tmp_path / "none.csv")}, r'expected the split "train" of a dataset .*none\.csv", found none.*--train-data'),
        ({"train_data": str(tmp_path / "empty.jsonl")}, r'expected the split "train" of a dataset'),
        ({"train_data": str(hub / "gsm8k" / "main")}, r"expected rows of \['query', 'response'\] in .*found no .* among \['question'"),
        ({"test_data": str(hub / "metamath.jsonl")}, r"expected rows of \['question', 'answer'\] in .*found no .* among \['type'"),
        ({"test_data": str(tmp_path / "none.jsonl")}, r"expected a number in the reference answer, found 'none'"),
        ({"steps": 50}, r"expected 200 training examples of at most 96 tokens, found 40\. Lower --steps"),
        ({"targets": "foo$"}, r'LoRAConfig\.target_names: expected "foo\$" to match'),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            gsm8k.run(small(hub, **given), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["MetaMathQA", "metamath.jsonl", "metamath.parquet"])
def test_training_data_is_read_in_every_layout(hub, source):
    found = gsm8k_data.read(str(hub / source), "train", ("query", "response"))
    assert found.column_names == ["type", "query", "original_question", "response"]
    assert (len(found), found[1]["response"]) == (40, "#### 4")


def test_a_folder_that_was_changed_is_read_anew(tmp_path):
    for count in (3, 5):
        folder = tmp_path / str(count) / "gsm8k"
        for split in ("train", "test"):
            (folder / "main").mkdir(parents=True, exist_ok=True)
            rows = [{"question": "q", "answer": f"#### {k}"} for k in range(count)]
            datasets.Dataset.from_list(rows).to_parquet(folder / "main" / f"{split}-0.parquet")
        split_lines = "".join(f"  - split: {split}\n    path: main/{split}-*\n" for split in ("train", "test"))
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{split_lines}---\n")
        assert len(gsm8k_data.problems(str(folder), 50, None, 0)["test"]) == count


def test_problems_are_those_of_the_main_configuration(hub):
    for source in (hub / "gsm8k", hub / "gsm8k" / "main"):
        found = gsm8k_data.problems(str(source), valid=50, test=None, seed=0)
        assert {name: len(rows) for name, rows in found.items()} == {"valid": 9, "test": 7}
        assert found["test"]["question"][0] == "What is 0 plus 3?"
    assert len(gsm8k_data.problems(str(hub / "gsm8k"), 2, 5, 0)["test"]) == 5


def test_the_language_model_of_a_checkpoint_with_vision_is_loaded_with_its_weights(hub):
    model, tokenizer = gsm8k_train.load_model(small(hub, "qwen3.5"), torch.device("cpu"))
    kept = gsm8k_train.safetensors.torch.load_file(hub / "Qwen3.5-tiny" / "model.safetensors")
    assert type(model) is tf.Qwen3_5ForCausalLM
    assert all(torch.equal(p, kept[name.replace("model.", "model.language_model.", 1)]) for name, p in model.named_parameters())
    assert (model.dtype, tokenizer.padding_side, tokenizer.pad_token) == (torch.bfloat16, "left", END)


def test_only_the_response_is_labelled(hub):
    tokenizer = tf.AutoTokenizer.from_pretrained(hub / "Qwen3-tiny")
    example = gsm8k_data.example(tokenizer, "What is 1 + 1?", "It is 2", longest=96)
    labelled = [t for t, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]
    assert tokenizer.decode(labelled) == f" It is 2{END}"
    assert tokenizer.decode(example["input_ids"]).startswith("Question: What is 1 + 1? Think step by step.\nAnswer: It")
    assert len(gsm8k_data.example(tokenizer, "What?", "2" * 200, longest=96)["input_ids"]) == 96
    assert gsm8k_data.example(tokenizer, "What?" * 50, "2", longest=96) is None
    with pytest.raises(ValueError, match=r"expected 3 training examples of at most 96 tokens, found 1\. Lower --steps"):
        gsm8k_data.examples(tokenizer, [{"query": "a", "response": "1"}], 96, 3)
    part = [{"input_ids": [5], "labels": [5]}, {"input_ids": [6, 7], "labels": [-100, 7]}]
    left, right = (gsm8k_data.batch(part, 1, torch.device("cpu"), left=left) for left in (True, False))
    assert left["input_ids"].tolist() == [[1, 5], [6, 7]]
    assert left["labels"].tolist() == [[-100, 5], [-100, 7]]
    assert left["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert right["input_ids"].tolist() == [[5, 1], [6, 7]]
    assert right["labels"].tolist() == [[5, -100], [-100, 7]]
    assert right["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_texts_begin_alike_in_training_and_in_answering():
    inner = hub_tokenizer().backend_tokenizer
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", 1)])
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|im_end|>", eos_token=END)
    asked = gsm8k_data.encode(tokenizer, gsm8k_data.PROMPT.format(query="What?"))
    ids = gsm8k_data.example(tokenizer, "What?", "2", longest=96)["input_ids"]
    assert asked == tokenizer(gsm8k_data.PROMPT.format(query="What?")).input_ids == ids[: len(asked)]
    assert ids.count(1) == 1


def test_answers_that_are_there_are_not_made_again(settings, tmp_path):
    model, tokenizer = gsm8k_train.load_model(settings, torch.device("cpu"))
    rows, place = gsm8k_data.problems(settings.test_data, 4, None, 0)["test"], tmp_path / "test.jsonl"
    want = gsm8k_data.evaluate(settings, model, tokenizer, rows, place)
    lines = place.read_text().splitlines(keepends=True)
    assert len(lines) == want["n"] == 7
    known = json.dumps({"prediction": "kept", "right": True}) + "\n"
    for kept in (known * 3 + lines[3][:9], known * 4, known * 5 + lines[5][:9]):  # a line cut short by the stop, and a batch of three
        place.write_text(kept)
        found = gsm8k_data.evaluate(settings, model, tokenizer, rows, place)
        assert place.read_text() == known * 3 + "".join(lines[3:])
        assert found["exact"] == (3 + sum(json.loads(line)["right"] for line in lines[3:])) / 7
    place.write_text(known * 7)
    for n in (7, 2):  # fewer than there are, too
        found = gsm8k_data.evaluate(settings, model, tokenizer, rows.select(range(n)), place)
        assert found == {"exact": 1.0, "error": pytest.approx(math.sqrt(0.5 / n * (1 - 0.5 / n) / n)), "n": n}
    assert place.read_text() == known * 7


def test_answers_end_with_the_token_that_was_taught(settings, tmp_path):
    tokenizer = tf.AutoTokenizer.from_pretrained(settings.model, padding_side="left")
    given = []

    def generate(**inputs):
        given.append(inputs)
        return torch.cat([inputs["input_ids"], torch.full((len(inputs["input_ids"]), 1), 0)], 1)

    rows = gsm8k_data.problems(settings.test_data, 4, None, 0)["valid"]
    gsm8k_data.evaluate(settings, SimpleNamespace(generate=generate, device="cpu"), tokenizer, rows, tmp_path / "valid.jsonl")
    assert {(g["eos_token_id"], g["pad_token_id"], g["use_cache"], g["do_sample"]) for g in given} == {(0, 0, True, False)}
    texts = tokenizer.batch_decode(given[0]["input_ids"], skip_special_tokens=True)
    assert texts == [gsm8k_data.PROMPT.format(query=q) for q in rows["question"][:3]]
