"""MetaMathQA to GSM8K on small models and files laid out as the Hub lays them out: settings, answers, runs that stop and go on, errors."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import tokenizers
import torch
import transformers as tf

import answers
import checkpoint
import finetune
import gsm8k
import lora_lite as ll
import metamath
import tables
from common import device as chosen_device
from common import llama
from gsm8k_settings import config, published

END = "<|endoftext|>"
VARIANTS = [name for name, cls in ll.VARIANTS.items() if not cls.original]
SMALL = {"road": (("group_size", 16),)}


def hub_tokenizer():
    """Train a byte-level BPE with an end token."""
    bpe, byte = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.Sequence([digits, byte(False)]), tokenizers.decoders.ByteLevel()
    texts = [metamath.PROMPT.format(query=f"What is {k} plus 3?") + f" It is {k + 3}. #### {k + 3}" for k in range(50)]
    special = [END, "<|im_end|>"]
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=byte.alphabet()))
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def hub_models():
    """Give a dense model, and a hybrid one as its checkpoint holds it, together with a vision tower; embeddings are tied in both."""
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


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Write both models, and both data sets with their fields and folders."""
    folder, tokenizer = tmp_path_factory.mktemp("hub"), hub_tokenizer()
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
    return folder


def small(hub, table="qwen3", **given):
    """Give a table's settings for a run of a second."""
    model = str(hub / {"qwen3": "Qwen3-tiny", "qwen3.5": "Qwen3.5-tiny"}[table])
    data = {"train_data": str(hub / "MetaMathQA"), "test_data": str(hub / "gsm8k")}
    sizes = {"steps": 4, "rows": 2, "accumulate": 2, "r": 8, "longest": 96, "new_tokens": 6, "eval_rows": 3, "valid": 4, "rate": 1e-2}
    given.setdefault("fields", SMALL.get(given.get("variant"), ()))
    return published(table, **{"model": model, **data, **sizes, **given})


@pytest.fixture
def settings(hub):
    return small(hub)


def trained(s, folder, **more):
    """Start or go on with a run's training in a folder."""
    model, tokenizer = finetune.load_model(s, torch.device("cpu"))
    data = finetune.training_examples(s, tokenizer)
    adapt, state = finetune.start(s, model, data, 0, folder)
    return finetune.train(s, adapt, data, 0, state, folder, **more)


def same(a, b):
    leaves = [torch.utils._pytree.tree_leaves(tree) for tree in (a, b)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(*leaves, strict=True))


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
    assert metamath.answer_of(text) == number


def test_predictions_are_scored_by_the_number_alone():
    reference = "3 + 4 = <<3+4=7>>7\n#### 1,007"
    assert metamath.right("so 1007", reference)
    assert not metamath.right("so 7", reference)
    assert not metamath.right("no idea", reference)
    with pytest.raises(ValueError, match=r"expected a number in the reference.*found 'none'.*42"):
        metamath.right("7", "none")


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
    assert len(ll.find_targets(llama(32, 2), cfg)) in (2, 4, 5)  # blocks, q and v of each, norms


def test_options_change_the_tables_settings(monkeypatch):
    words = ["--variant", "antipasto", "--table", "qwen3.5", "--set", "core=gain", "--set", "basis=corda", "r=64", "--steps", "7"]
    monkeypatch.setattr(sys, "argv", ["gsm8k.py", *words])
    s = gsm8k.settings_of(gsm8k.options())
    assert (s.rate, s.steps, s.targets) == (5e-3, 7, r"down_proj$")
    assert s.fields == (("core", "gain"), ("basis", "corda"), ("r", 64))
    assert (config(s).r, config(s).core, config(s).basis) == (64, "gain", "corda")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "bar=3"], r"expected --set to name fields of LoRAConfig, dtype.*dropout, found \['bar'\]\. Name one"),
        (["--set", "r"], r"expected --set FIELD=VALUE, found \['r'\]\. Write e\.g\."),
        (["--set", "r=0"], r"LoRAConfig\.r: expected an integer >= 1, found 0"),
        (["--set", "rslora=1"], r"LoRAConfig\.rslora: expected True or False, found 1"),
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
    found = metamath.read(str(hub / source), "train", ("query", "response"))
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
        assert len(metamath.problems(str(folder), 50, None, 0)["test"]) == count


def test_problems_are_those_of_the_main_configuration(hub):
    for source in (hub / "gsm8k", hub / "gsm8k" / "main"):
        found = metamath.problems(str(source), valid=50, test=None, seed=0)
        assert {name: len(rows) for name, rows in found.items()} == {"valid": 9, "test": 7}
        assert found["test"]["question"][0] == "What is 0 plus 3?"
    assert len(metamath.problems(str(hub / "gsm8k"), 2, 5, 0)["test"]) == 5


def test_the_language_model_of_a_checkpoint_with_vision_is_loaded_with_its_weights(hub):
    model, tokenizer = finetune.load_model(small(hub, "qwen3.5"), torch.device("cpu"))
    kept = checkpoint.safetensors.torch.load_file(hub / "Qwen3.5-tiny" / "model.safetensors")
    assert type(model) is tf.Qwen3_5ForCausalLM
    assert all(torch.equal(p, kept[name.replace("model.", "model.language_model.", 1)]) for name, p in model.named_parameters())
    assert (model.dtype, tokenizer.padding_side, tokenizer.pad_token) == (torch.bfloat16, "left", END)


def test_only_the_response_is_labelled(hub):
    tokenizer = tf.AutoTokenizer.from_pretrained(hub / "Qwen3-tiny")
    example = metamath.example(tokenizer, "What is 1 + 1?", "It is 2", longest=96)
    labelled = [t for t, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]
    assert tokenizer.decode(labelled) == f" It is 2{END}"
    assert tokenizer.decode(example["input_ids"]).startswith("Question: What is 1 + 1? Think step by step.\nAnswer: It")
    assert len(metamath.example(tokenizer, "What?", "2" * 200, longest=96)["input_ids"]) == 96
    assert metamath.example(tokenizer, "What?" * 50, "2", longest=96) is None
    with pytest.raises(ValueError, match=r"expected 3 training examples of at most 96 tokens, found 1\. Lower --steps"):
        metamath.examples(tokenizer, [{"query": "a", "response": "1"}], 96, 3)
    stacked = metamath.batch([{"input_ids": [5], "labels": [5]}, {"input_ids": [6, 7], "labels": [-100, 7]}], 1, torch.device("cpu"))
    assert stacked["input_ids"].tolist() == [[1, 5], [6, 7]]
    assert stacked["labels"].tolist() == [[-100, 5], [-100, 7]]
    assert stacked["attention_mask"].tolist() == [[0, 1], [1, 1]]


def test_texts_begin_alike_in_training_and_in_answering():
    inner = hub_tokenizer().backend_tokenizer
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", 1)])
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|im_end|>", eos_token=END)
    asked = metamath.encode(tokenizer, metamath.PROMPT.format(query="What?"))
    ids = metamath.example(tokenizer, "What?", "2", longest=96)["input_ids"]
    assert asked == tokenizer(metamath.PROMPT.format(query="What?")).input_ids == ids[: len(asked)]
    assert ids.count(1) == 1


@pytest.mark.parametrize("table", ["qwen3", "qwen3.5"])
@pytest.mark.parametrize("variant", ["lora", "eva", "adalora", "loreft"])
def test_a_run_reaches_a_result_and_a_row_of_the_table(hub, tmp_path, table, variant):
    s = small(hub, table, variant=variant)
    found = gsm8k.run(s, tmp_path / "out")
    assert (found["valid"]["n"], found["test"]["n"]) == (4, 7)
    assert 0 <= found["test"]["exact"] <= 1
    assert 0 < found["last_loss"] < found["first_loss"]
    assert (found["ms"]["step"]["n"], found["peak_bytes"] > 0, found["init_seconds"] > 0) == (5, True, True)
    text = json.dumps({"date": "2030-01-02", "machine": "2-core CPU", "threads": 1, "results": found})
    assert str(hub) not in text
    (tmp_path / f"2030-01-02-abc-gsm8k-{gsm8k.run_name(s)}.json").write_text(text)
    row = dict(zip(*([c.strip() for c in line.split("|")] for line in tables.gsm8k_table(tmp_path).splitlines()[::2]), strict=True))
    rank = {"adalora": "12"}.get(variant, "8")
    assert (row["model"], row["r"], row["params"]) == (Path(s.model).name, rank, tables.count(found["params"]))
    assert "/tmp" not in str(row)


def test_the_table_tells_cores_and_ranks_apart(hub, tmp_path):
    for k, s in enumerate([small(hub, variant="ia3"), small(hub, "qwen3.5", variant="antipasto", r=16)]):
        found = gsm8k.run(s, tmp_path / "out")
        text = json.dumps({"date": "2030-01-02", "machine": "2-core CPU", "threads": 1, "results": found})
        (tmp_path / f"2030-01-0{k + 1}-abc-gsm8k-{gsm8k.run_name(s)}.json").write_text(text)
    first, second = tables.gsm8k_table(tmp_path).splitlines()[2:]
    assert first.startswith("| IA3 | Qwen3-tiny | - |")
    assert second.startswith("| AntiPaSTO core=gain | Qwen3.5-tiny | 16 |")


def test_runs_of_other_settings_have_other_names(hub):
    runs = [{}, {"r": 4}, {"rate": 1e-3}, {"seed": 1}, {"fields": (("dropout", 0.1),)}, {"variant": "dora"}, {"steps": 5}]
    assert len({gsm8k.run_name(small(hub, **given)) for given in runs}) == len(runs)


KILLED = """
import os, signal, sys, dataclasses
from pathlib import Path
import answers, finetune, gsm8k, metamath
place, calls, folder, s = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), eval(sys.argv[4], {"Settings": gsm8k.Settings})
owner, name = {"train": (finetune, "batch"), "evaluate": (answers, "right")}[place]
real, seen = getattr(owner, name), []

def deadly(*args):
    seen.append(1)
    if len(seen) == calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

train = finetune.train
gsm8k.train = lambda *args: train(*args, every=2)
setattr(owner, name, deadly)
gsm8k.run(s, folder)
"""


def test_a_killed_run_ends_as_one_that_was_not(hub, tmp_path):
    s = small(hub, "qwen3.5", variant="adalora", fields=(("dropout", 0.3),))  # with a state of its own, and chance
    found = gsm8k.run(s, tmp_path / "whole")
    before = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for place, calls in (("train", 8), ("evaluate", 4 + 5)):  # at the fourth step; at the second answer of the test's second batch
        words = [sys.executable, "-c", KILLED, place, str(calls), str(tmp_path / "killed"), repr(s)]
        assert subprocess.run(words, env=before, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    again = gsm8k.run(s, tmp_path / "killed")
    whole, killed = (tmp_path / name / gsm8k.run_name(s) for name in ("whole", "killed"))
    states = [checkpoint.load_state(folder / finetune.STATE) for folder in (whole, killed)]
    assert same(*[{name: state[name] for name in ("params", "adam", "update", "losses")} for state in states])
    for name in ("valid.jsonl", "test.jsonl"):
        assert (whole / name).read_text() == (killed / name).read_text()
    for name in ("valid", "test", "first_loss", "last_loss", "settings"):
        assert found[name] == again[name]
    assert same(*[checkpoint.safetensors.torch.load_file(folder / finetune.ADAPTER) for folder in (whole, killed)])


class Stopped(Exception):
    """What a killed run is like to the code that was running."""


@pytest.mark.parametrize("variant", ["lora", "pissa", "corda", "lora_ga"])
def test_a_run_stopped_before_its_first_state_keeps_its_start(settings, tmp_path, monkeypatch, variant):
    s = dataclasses.replace(settings, variant=variant)
    want, losses = trained(s, tmp_path / "whole")
    monkeypatch.setattr(finetune, "tqdm", lambda *args, **more: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        trained(s, tmp_path / "stopped")
    monkeypatch.undo()
    facts = checkpoint.load_state(tmp_path / "stopped" / finetune.STATE)["facts"]
    got, again = trained(s, tmp_path / "stopped")
    assert again == losses
    assert same(got, want)
    assert checkpoint.load_state(tmp_path / "stopped" / finetune.STATE)["facts"] == facts  # its init was timed once


def test_a_run_of_other_settings_is_not_gone_on_with(settings, tmp_path):
    trained(settings, tmp_path)
    for change, found in (({"rate": 0.5}, "rate=0.01 instead of 0.5"), ({"r": 4}, "r=8 instead of 4")):
        with pytest.raises(ValueError, match=rf"expected the run in .* to be this one, found {found}\. Use another --out, or remove"):
            trained(dataclasses.replace(settings, **change), tmp_path)
    (tmp_path / "test.jsonl").write_text("an answer of the run before\n")
    (tmp_path / finetune.STATE).unlink()
    trained(dataclasses.replace(settings, r=4), tmp_path)
    assert not (tmp_path / "test.jsonl").exists()
    assert ll.load(finetune.load_model(settings, torch.device("cpu"))[0], tmp_path / finetune.ADAPTER)[0].configs[0].r == 4


def test_dropout_acts_in_training(settings, tmp_path):
    losses = [trained(dataclasses.replace(settings, fields=(("dropout", p),)), tmp_path / str(p))[1] for p in (0.0, 0.5)]
    assert losses[0][0] == losses[1][0]  # B is zero
    assert losses[0][2] != losses[1][2]


def test_adaloras_penalty_is_minimised_and_not_reported(settings):
    model, tokenizer = finetune.load_model(settings, torch.device("cpu"))
    data = finetune.training_examples(settings, tokenizer)
    rows = [metamath.batch(data[k : k + 2], 0, torch.device("cpu")) for k in (0, 2)]
    found = []
    for weight in (0.0, 0.5, 1.0):
        s = dataclasses.replace(settings, variant="adalora", fields=(("orth_reg_weight", weight),))
        adapt = finetune.build(s, model, data, 0)
        found.append(finetune.gradients(adapt, adapt.init(), rows))
    (none, a), (half, b), (one, c) = found
    assert none == half == one
    first, second = (ll.tree_leaves(ll.tree_map(torch.sub, x, a)) for x in (b, c))
    assert all(torch.allclose(2 * x, y, atol=1e-6) for x, y in zip(first, second, strict=True))
    assert any(x.abs().max() > 1e-3 for x in first)


def test_answers_that_are_there_are_not_made_again(settings, tmp_path):
    model, tokenizer = finetune.load_model(settings, torch.device("cpu"))
    rows, place = metamath.problems(settings.test_data, 4, None, 0)["test"], tmp_path / "test.jsonl"
    want = answers.evaluate(settings, model, tokenizer, rows, place)
    lines = place.read_text().splitlines(keepends=True)
    assert len(lines) == want["n"] == 7
    known = json.dumps({"prediction": "kept", "right": True}) + "\n"
    for kept in (known * 3 + lines[3][:9], known * 4, known * 5 + lines[5][:9]):  # a line cut short by the stop, and a batch of three
        place.write_text(kept)
        found = answers.evaluate(settings, model, tokenizer, rows, place)
        assert place.read_text() == known * 3 + "".join(lines[3:])
        assert found["exact"] == (3 + sum(json.loads(line)["right"] for line in lines[3:])) / 7
    place.write_text(known * 7)
    assert answers.evaluate(settings, model, tokenizer, rows, place) == {"exact": 1.0, "error": 0.0, "n": 7}


def test_answers_end_with_the_token_that_was_taught(settings, tmp_path):
    tokenizer = tf.AutoTokenizer.from_pretrained(settings.model, padding_side="left")
    given = []

    def generate(**inputs):
        given.append(inputs)
        return torch.cat([inputs["input_ids"], torch.full((len(inputs["input_ids"]), 1), 0)], 1)

    rows = metamath.problems(settings.test_data, 4, None, 0)["valid"]
    answers.evaluate(settings, SimpleNamespace(generate=generate, device="cpu"), tokenizer, rows, tmp_path / "valid.jsonl")
    assert {(g["eos_token_id"], g["pad_token_id"], g["use_cache"], g["do_sample"]) for g in given} == {(0, 0, True, False)}
    texts = tokenizer.batch_decode(given[0]["input_ids"], skip_special_tokens=True)
    assert texts == [metamath.PROMPT.format(query=q) for q in rows["question"][:3]]


@pytest.mark.parametrize("table", ["qwen3", "qwen3.5"])
@pytest.mark.parametrize("variant", ["lora", "loreft", "bitfit"])
def test_a_row_doesnt_depend_on_its_padding(hub, table, variant):
    s = small(hub, table, variant=variant, dtype="float32")
    model, tokenizer = finetune.load_model(s, chosen_device())
    data = sorted(finetune.training_examples(s, tokenizer), key=lambda e: len(e["input_ids"]))
    adapt = finetune.build(s, model, data, 0)
    params = ll.tree_map(lambda p: p + 0.1 * torch.randn_like(p), adapt.init())
    alone, beside = ([data[0]], [data[0], data[-1]])
    logits = [adapt(params, metamath.batch(part, 0, model.device), use_cache=False).logits[0] for part in (alone, beside)]
    assert len(logits[0]) < len(logits[1])
    torch.testing.assert_close(logits[0], logits[1][-len(logits[0]) :], rtol=0, atol=1e-5)
    module, steps = adapt.module(params).eval(), []
    for part in (alone, beside):
        rows = metamath.batch([{name: ids[:-5] for name, ids in e.items()} for e in part], 0, model.device)
        del rows["labels"]
        more = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
        out = module.generate(**rows, **more, output_logits=True, return_dict_in_generate=True)
        steps.append(torch.stack(out.logits)[:, 0])
    torch.testing.assert_close(*steps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("table", ["qwen3", "qwen3.5"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_probe_gives_a_row_of_facts(hub, tmp_path, variant, table):
    row = gsm8k.probe(small(hub, table, variant=variant, rate=5e-3, steps=8), tmp_path)
    assert list(row) == [
        *("variant", "targets", "trained", "identity error", "perturbation", "first loss", "last loss", "gradient norm", "moved"),
        *("base gradients", "reload error"),
    ]
    identity = config(small(hub, table, variant=variant)).identity
    assert row["identity error"] <= (float("inf") if identity is None else 0.0 if identity == 0.0 else 0.05)
    if variant == "lora":
        assert (row["targets"], row["trained"]) == {"qwen3": (4, 4 * 8 * 128), "qwen3.5": (2, 2 * 8 * 192)}[table]


def test_a_row_that_shows_a_broken_adapter_is_refused():
    names = ("perturbation", "gradient norm", "moved")
    row = {**dict.fromkeys(names, 1.0), "first loss": 2.0, "last loss": 1.0, "base gradients": 0, "reload error": 0.0}
    gsm8k.require(row)
    faults = {"reload error": (0.1,), "last loss": (2.0, float("nan")), "perturbation": (0.0, float("nan")), "base gradients": (1,)}
    for name, wrong in ((name, wrong) for name, values in faults.items() for wrong in values):
        with pytest.raises(SystemExit, match=rf"found {name} to be wrong"):
            gsm8k.require({**row, name: wrong})


def test_state_comes_back_as_it_was(tmp_path):
    shared = torch.arange(6.0)
    state = {"a": [1, None, {"b": shared[::2], "c": shared.bfloat16()}], "step": torch.tensor(3.0), "d": {}, "e": "text", "tensor": shared}
    checkpoint.save_state(tmp_path / "state", state)
    found = checkpoint.load_state(tmp_path / "state")
    assert torch.equal(found["a"][2]["b"], shared[::2])
    assert found["a"][2]["c"].dtype == torch.bfloat16
    assert (found["a"][:2], float(found["step"]), found["d"], found["e"]) == ([1, None], 3.0, {}, "text")
    assert torch.equal(found["tensor"], shared)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
