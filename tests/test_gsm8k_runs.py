"""Runs of MetaMathQA to GSM8K on small models: results, stops at any moment, padding, and the probe of every variant."""

import dataclasses
import json
import signal
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gsm8k
import lora_lite as ll
import processes
from common import gsm8k_data, gsm8k_train, gsm_symbolic, learned, tables
from common.gsm8k_data import config, published
from common.measure import device as chosen_device
from hub_files import VARIANTS, small


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(gsm8k_train, "ROUNDS", 2)


@pytest.fixture
def settings(hub):
    return small(hub)


def trained(s, folder, **more):
    """Start or go on with a run's training in a folder."""
    model, tokenizer = gsm8k_train.load_model(s, torch.device("cpu"))
    data = gsm8k_train.training_examples(s, tokenizer)
    adapt, state = gsm8k_train.start(s, model, data, 0, folder)
    return gsm8k_train.train(s, adapt, data, 0, state, folder, **more)


def same(a, b):
    leaves = [torch.utils._pytree.tree_leaves(tree) for tree in (a, b)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(*leaves, strict=True))


@pytest.mark.parametrize("table", ["qwen3", "qwen3.5"])
@pytest.mark.parametrize("variant", ["lora", "eva", "adalora", "loreft"])
def test_a_run_reaches_a_result_and_a_row_of_the_table(hub, tmp_path, table, variant):
    s = small(hub, table, variant=variant)
    found = gsm8k.run(s, tmp_path / "out")
    assert (found["valid"]["n"], found["test"]["n"]) == (4, 7)
    assert 0 <= found["test"]["exact"] <= 1
    assert 0 < found["last_loss"] < found["first_loss"]
    assert (found["ms"]["step"]["n"], found["peak_bytes"] > 0, found["init_seconds"] > 0) == (2, True, True)
    text = json.dumps({"date": "2030-01-02", "machine": "2-core CPU", "threads": 1, "results": found})
    assert str(hub) not in text
    (tmp_path / f"2030-01-02-abc-gsm8k-{gsm8k.run_name(s)}.json").write_text(text)
    row = dict(zip(*([c.strip() for c in line.split("|")] for line in learned.gsm8k_table(tmp_path).splitlines()[::2]), strict=True))
    rank = {"adalora": "12"}.get(variant, "8")
    assert (row["model"], row["r"], row["params"]) == (Path(s.model).name, rank, tables.count(found["params"]))
    assert "/tmp" not in str(row)


@pytest.mark.usefixtures("symbolic")
def test_runs_on_held_out_templates_reach_a_table(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(gsm8k, "get_context", lambda way: SimpleNamespace(Pool=ThreadPool))
    sizes = {"steps": 2, "rows": 2, "longest": 96, "new_tokens": 4, "valid": 4, "test": None, "model": str(hub / "Qwen3-tiny")}
    settings = {name: published("symbolic", variant=name, **sizes) for name in ("lora", "osf")}  # one whose update needs a first state
    loaded = gsm8k.load_model(settings["lora"], chosen_device())
    jobs = {name: (s, gsm8k.measured(s, *loaded)) for name, s in settings.items()}
    jobs["broken"] = (dataclasses.replace(settings["lora"], rows=50), {})
    count = len(gsm_symbolic.problems("test"))
    found = {name: json.loads(json.dumps(row)) for name, row in gsm8k.runs(jobs, tmp_path / "out", 1)}
    assert "expected 100 training examples" in found.pop("broken")["failed"]
    for name, row in found.items():
        assert (row["valid"]["n"], row["test"]["n"], row["ms"]) == (4, count, jobs[name][1]["ms"])
    results = {"variants": found, "frozen": gsm8k.frozen(settings["lora"], tmp_path / "out")}
    words, _, head, _, *rows = learned.symbolic_table({"results": results}).splitlines()
    assert f"2 steps of 2 rows; {count} test problems of templates that no training sees, 4 validation problems" in words
    assert "The model itself answers" in words
    assert "no variant answers more than 0.0%" in words
    assert learned.symbolic_table({"results": results | {"costs": {"lora": {}, "oft": {}}}}).endswith("Cut off before their end: OFT.")
    assert head.startswith("| variant | r | test | valid | params | added MACs/token | forward / step, ms |")
    assert {row.split(" | ")[0] for row in rows} == {"| LoRA", "| OSF"}


def test_the_table_tells_cores_and_ranks_apart(hub, tmp_path):
    for k, s in enumerate([small(hub, variant="ia3"), small(hub, "qwen3.5", variant="antipasto", r=16)]):
        found = gsm8k.run(s, tmp_path / "out")
        text = json.dumps({"date": "2030-01-02", "machine": "2-core CPU", "threads": 1, "results": found})
        (tmp_path / f"2030-01-0{k + 1}-abc-gsm8k-{gsm8k.run_name(s)}.json").write_text(text)
    first, second = learned.gsm8k_table(tmp_path).splitlines()[2:]
    assert first.startswith("| IA3 | Qwen3-tiny | - |")
    assert second.startswith("| AntiPaSTO core=gain | Qwen3.5-tiny | 16 |")


def test_runs_of_other_settings_have_other_names(hub):
    runs = [{}, {"r": 4}, {"rate": 1e-3}, {"seed": 1}, {"fields": (("dropout", 0.1),)}, {"variant": "dora"}, {"steps": 5}]
    assert len({gsm8k.run_name(small(hub, **given)) for given in runs}) == len(runs)


def test_a_killed_run_ends_as_one_that_was_not(hub, tmp_path):
    s = small(hub, "qwen3.5", variant="adalora", fields=(("dropout", 0.3),))  # with a state of its own, and chance
    found = gsm8k.run(s, tmp_path / "whole")
    for place, calls in (
        ("train", 8),
        ("evaluate", 11 + 4 + 5),
    ):  # at the fourth step; at the second batch of the test
        process = processes.context().Process(target=processes.run_killed, args=(place, calls, tmp_path / "killed", s))
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
    again = gsm8k.run(s, tmp_path / "killed")
    whole, killed = (tmp_path / name / gsm8k.run_name(s) for name in ("whole", "killed"))
    states = [gsm8k_train.load_state(folder / gsm8k_train.STATE) for folder in (whole, killed)]
    assert same(*[{name: state[name] for name in ("params", "adam", "update", "losses")} for state in states])
    for name in ("valid.jsonl", "test.jsonl"):
        assert (whole / name).read_text() == (killed / name).read_text()
    for name in ("valid", "test", "first_loss", "last_loss", "settings"):
        assert found[name] == again[name]
    assert same(*[gsm8k_train.safetensors.torch.load_file(folder / gsm8k_train.ADAPTER) for folder in (whole, killed)])


class Stopped(Exception):
    """A killed run, as the code that was running sees it."""


@pytest.mark.parametrize("variant", ["lora", "pissa", "corda", "lora_ga"])
def test_a_run_stopped_before_its_first_state_keeps_its_start(settings, tmp_path, monkeypatch, variant):
    s = dataclasses.replace(settings, variant=variant)
    want, losses = trained(s, tmp_path / "whole")
    monkeypatch.setattr(gsm8k_train, "tqdm", lambda *args, **more: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        trained(s, tmp_path / "stopped")
    monkeypatch.undo()
    facts = gsm8k_train.load_state(tmp_path / "stopped" / gsm8k_train.STATE)["facts"]
    got, again = trained(s, tmp_path / "stopped")
    assert again == losses
    assert same(got, want)
    assert gsm8k_train.load_state(tmp_path / "stopped" / gsm8k_train.STATE)["facts"] == facts  # its init was timed once


def test_a_run_of_other_settings_is_not_gone_on_with(settings, tmp_path):
    trained(settings, tmp_path)
    for change, found in (({"rate": 0.5}, "rate=0.01 instead of 0.5"), ({"r": 4}, "r=8 instead of 4")):
        with pytest.raises(ValueError, match=rf"expected the run in .* to be this one, found {found}\. Use another --out, or remove"):
            trained(dataclasses.replace(settings, **change), tmp_path)
    assert same(*(trained(dataclasses.replace(settings, test=n), tmp_path)[0] for n in (None, 3)))  # how many are tested is no matter
    (tmp_path / "test.jsonl").write_text("an answer of the run before\n")
    (tmp_path / gsm8k_train.STATE).unlink()
    trained(dataclasses.replace(settings, r=4), tmp_path)
    assert not (tmp_path / "test.jsonl").exists()
    assert ll.load(gsm8k_train.load_model(settings, torch.device("cpu"))[0], tmp_path / gsm8k_train.ADAPTER)[0].configs[0].r == 4


def test_dropout_acts_in_training(settings, tmp_path):
    losses = [trained(dataclasses.replace(settings, fields=(("dropout", p),)), tmp_path / str(p))[1] for p in (0.0, 0.5)]
    assert losses[0][0] == losses[1][0]  # B is zero
    assert losses[0][2] != losses[1][2]


@pytest.mark.parametrize("what", ["a loss of nan", "gradients of norm nan"])
def test_a_training_ends_where_its_loss_or_gradients_are_not_finite(settings, tmp_path, monkeypatch, what):
    before = gsm8k_train.gradients

    def broken(*args):
        loss, grads = before(*args)
        return (float("nan"), grads) if "loss" in what else (loss, ll.tree_map(lambda g: g * float("nan"), grads))

    monkeypatch.setattr(gsm8k_train, "gradients", broken)
    with pytest.raises(ValueError, match=rf"expected a finite loss and gradients in step 0 of lora, found .*{what}"):
        trained(settings, tmp_path)


def test_adaloras_penalty_is_minimised_and_not_reported(settings):
    model, tokenizer = gsm8k_train.load_model(settings, torch.device("cpu"))
    data = gsm8k_train.training_examples(settings, tokenizer)
    rows = [gsm8k_data.batch(data[k : k + 2], 0, torch.device("cpu")) for k in (0, 2)]
    found = []
    for weight in (0.0, 0.5, 1.0):
        s = dataclasses.replace(settings, variant="adalora", fields=(("orth_reg_weight", weight),))
        adapt = gsm8k_train.build(s, model, data, 0)
        found.append(gsm8k_train.gradients(gsm8k_train.step_of(adapt), adapt.init(), rows))
    (none, a), (half, b), (one, c) = found
    assert none == half == one
    first, second = (ll.tree_leaves(ll.tree_map(torch.sub, x, a)) for x in (b, c))
    assert all(torch.allclose(2 * x, y, atol=1e-6) for x, y in zip(first, second, strict=True))
    assert any(x.abs().max() > 1e-3 for x in first)


@pytest.mark.parametrize("table", ["qwen3", "qwen3.5"])
@pytest.mark.parametrize("variant", ["lora", "loreft", "bitfit"])
def test_a_row_doesnt_depend_on_its_padding(hub, table, variant):
    s = small(hub, table, variant=variant, dtype="float32")
    model, tokenizer = gsm8k_train.load_model(s, chosen_device())
    data = sorted(gsm8k_train.training_examples(s, tokenizer), key=lambda e: len(e["input_ids"]))
    adapt = gsm8k_train.build(s, model, data, 0)
    params = ll.tree_map(lambda p: p + 0.1 * torch.randn_like(p), adapt.init())
    alone, beside = ([data[0]], [data[0], data[-1]])

    def logits(part, left):
        return adapt(params, gsm8k_data.batch(part, 0, model.device, left=left), use_cache=False).logits[0]

    want = logits(alone, False)
    left, right = logits(beside, True), logits(beside, False)
    assert len(want) < len(left)
    torch.testing.assert_close(left[-len(want) :], want, rtol=0, atol=1e-5)
    torch.testing.assert_close(right[: len(want)], want, rtol=0, atol=1e-5)
    module, steps = adapt.module(params).eval(), []
    for part in (alone, beside):
        rows = gsm8k_data.batch([{name: ids[:-5] for name, ids in e.items()} for e in part], 0, model.device, left=True)
        del rows["labels"]
        more = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
        out = module.generate(**rows, **more, output_logits=True, return_dict_in_generate=True)
        steps.append(torch.stack(out.logits)[:, 0])
    torch.testing.assert_close(*steps, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("variant", "table"), [*((v, "qwen3") for v in VARIANTS), ("lora", "qwen3.5"), ("antipasto", "qwen3.5")])
def test_probe_gives_a_row_of_facts(hub, tmp_path, variant, table):
    row = gsm8k.probe(small(hub, table, variant=variant, rate=5e-3, steps=3), tmp_path)
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
    gsm8k_train.save_state(tmp_path / "state", state)
    found = gsm8k_train.load_state(tmp_path / "state")
    assert torch.equal(found["a"][2]["b"], shared[::2])
    assert found["a"][2]["c"].dtype == torch.bfloat16
    assert (found["a"][:2], float(found["step"]), found["d"], found["e"]) == ([1, None], 3.0, {}, "text")
    assert torch.equal(found["tensor"], shared)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
