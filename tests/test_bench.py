"""The benchmarks measure what they say: statistics, checks of what is timed, training loops, tables from files."""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import agreement
import lora_lite as ll
import processes
import quality
import real_costs
import report
import scaling as growth
import svd_starts
import timings
import versions
from common import contenders, measure, methods, tables
from common.arithmetic import batch as demo_batch
from common.arithmetic import exact_match
from common.measure import batch_of, llama, peak_bytes
from common.pretrained import load_base
from common.record import Record
from quality import evaluate, joined, train_ours, updated

BENCH = Path(__file__).parent.parent / "bench"


def test_ratios_are_taken_within_rounds():
    drifting = {"a": [2.0, 4.0, 6.0, 8.0, 10.0], "b": [1.0, 2.0, 3.0, 4.0, 5.0]}
    assert measure.ratio(drifting, "a", "b") == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 5, "rounds": [2.0] * 5}
    found = measure.spread([1000.0, *map(float, range(1, 20)), -1000.0])
    assert (found["median"], found["low"], found["high"], found["n"]) == (10.0, 1.0, 19.0, 21)
    assert measure.spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 1, "rounds": [2.0]}


def test_rounds_of_fresh_processes_are_pooled(monkeypatch):
    monkeypatch.setattr(measure, "get_context", lambda way: processes.context())
    [found] = measure.measured([measure.Job(processes.scaled, (2.0,), 2)])
    assert found["a"]["b"] == measure.spread([2.0, 4.0, 6.0] * 2)
    assert len({*found["process"][measure.ROUNDS], os.getpid()}) == 3
    low, high = (pytest.approx(bound) for bound in (2.0, 6.0))
    assert measure.without_rounds(found)["a"] == {"b": {"median": 4.0, "low": low, "high": high, "n": 6}, "facts": {"width": 8}}
    assert measure.pooled([processes.scaled(1.0), processes.scaled(2.0)])["a"]["b"]["median"] == 2.5  # of 1, 2, 3, 2, 4, 6


def test_jobs_take_turns_and_those_with_few_processes_lie_far_apart(monkeypatch):
    monkeypatch.setattr(measure, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))  # their order is all
    found = measure.measured([measure.Job(processes.when, (), count) for count in (4, 2, 1)])
    order = sorted((at, job) for job, part in enumerate(found) for at in part["at"][measure.ROUNDS])
    assert [job for _, job in order] == [0, 1, 2, 0, 0, 1, 0]


def test_rounds_interleave_the_calls_and_start_with_each_in_turn():
    seen = []
    times = measure.interleaved({name: lambda name=name: seen.append(name) for name in "abc"}, repeats=2, warmup=1)
    assert "".join(seen) == "abcbcacab"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_every_variant_has_a_config_and_pefts_has_its_numbers():
    found = methods.pairs(8)
    assert set(found) == {name for name, variant in ll.VARIANTS.items() if not variant.original}
    assert {"lora", "dora", "pissa", "eva", "corda", "ia3", "ia3_ff", "delora", "hra", "road", "oft", "vera", "adalora"} <= {
        name for name, pair in found.items() if pair.peft is not None
    }
    for name in ("lora", "hra", "delora", "vera"):
        assert found[name].peft.r == found[name].cfg.r


def test_a_variant_has_pefts_config_or_the_reason_why_not():
    assert list(methods.METHODS) == list(ll.VARIANTS)
    assert set(methods.ROWS) <= set(ll.VARIANTS)
    for name, row in methods.METHODS.items():
        assert row.theirs is not None or row.without.endswith(".")
        assert methods.demo_config(name, 60).name == methods.config_of(name, 4).name == name
    assert methods.theirs(methods.demo_config("delora", 60)) is None  # its start from a frozen copy
    drawn = {name for name, pair in methods.pairs(4).items() if pair.peft is not None and methods.drawn_start(pair.peft)}
    assert {"lora", "dora", "ia3", "vera", "ln_tuning"} <= drawn
    assert not drawn & {"pissa", "eva", "corda", "lora_ga"}


def test_a_variant_without_a_row_takes_part(monkeypatch):
    monkeypatch.delitem(methods.METHODS, "ssvd")
    monkeypatch.setitem(methods.METHODS, "ssvd", methods.Row())
    assert methods.pairs(4)["ssvd"] == (ll.SSVDConfig(r=4), None)
    assert quality.rate_of("ssvd", 60) == (ll.SSVDConfig(r=8), 5e-3)


def test_pefts_model_drops_nothing_where_ours_does_not():
    model = torch.nn.Sequential(llama(32, 1, vocab=64), torch.nn.Dropout(0.5))
    model.forward = model[0].forward
    pair = methods.pairs(4)["eva"]
    theirs, _ = contenders.peft_model(model.eval(), pair.peft, [batch_of(2, 8, vocab=64)])
    dropouts = [m for m in theirs.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    assert not any(m.training for m in dropouts)


@pytest.mark.parametrize("name", timings.CHAIN)
def test_the_chain_has_the_same_numbers_on_both_sides(name):
    base, x = timings.chain_of(6, 16), torch.randn(4, 16)
    adapt, _, model, trained, checked = timings.beside(name, base, x)
    assert len(adapt.targets) == 6
    assert checked["against"] == "peft"
    assert checked["error"] < 1e-4
    assert 0.1 < float(base(x).norm() / x.norm()) < 10  # no input fades on the way
    assert sum(p.numel() for p in trained if p.dim()) - adapt.num_params in (0, 6)  # AdaLoRA's `ranknum` trains nothing
    assert not torch.equal(model(x), base(x))


def test_products_are_those_of_a_layer():
    base, x = timings.chain_of(5, 16), torch.randn(4, 16)
    calls = timings.products(base, x, 8)
    assert torch.equal(calls["base"](), base(x))
    counts = {}
    for name, call in calls.items():
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            call()
        counts[name] = counter.get_total_flops() / 5 / 2 / 4
    assert counts == {"base": 256, "two products": 256, "three products": 512}


def test_what_lora_adds_is_beyond_the_bases_own_call():
    times = {"ours": [5.0, 9.0], "base": [2.0, 3.0], "two products": [2.0, 4.0]}
    assert timings.added(times)["median"] == 1.5


@pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:Unsupported layer type")  # PEFT's, of LoRA-GA and of norms
@pytest.mark.parametrize("name", ["lora", "oft", "eva", "lora_xs", "lora_ga", "ln_tuning", "loreft", "full"])
def test_what_is_timed_is_pefts_output(name):
    model, batch = llama(32, 1, vocab=64), batch_of(2, 8, vocab=64)
    pair = methods.pairs(4)[name]
    c = contenders.contender(model, pair, batch)
    assert c.checked["against"] == ("base" if pair.peft is None or name == "lora_ga" else "peft")  # LoRA-GA's file is of a changed base
    assert sum(t.numel() for t in c.trained) == (0 if pair.peft is None else c.adapt.num_params)
    for calls in (contenders.forwards(model, c, batch), contenders.steps(model, c, batch)):
        assert set(calls) == {"frozen", "ours"} | ({"peft"} if pair.peft is not None else set())
        assert all(call() is not None for call in calls.values())


def test_a_variant_that_departs_from_pefts_is_not_timed(monkeypatch):
    monkeypatch.setattr(ll.LoRAConfig, "scale", property(lambda cfg: 1.1 * cfg.alpha / cfg.r))
    with pytest.raises(SystemExit, match=r"expected lora to give PEFT's output"):
        contenders.contender(llama(32, 1, vocab=64), methods.pairs(4)["lora"], batch_of(2, 8, vocab=64))


def test_peak_memory_is_what_is_held_at_once():
    def call():
        kept = torch.zeros(1000)
        torch.zeros(500) + 1  # 500 and their sum, gone before the next
        return kept.sum()

    assert 0 <= peak_bytes(call) - 4 * (1000 + 500 + 500) < 64  # the sum, and what it needs


def test_teacher_forced_share_is_the_share_of_greedy_answers():
    model, test = load_base(), quality.drawn("test", 12, seed=2)
    rows = quality.drawn("train", 96, seed=0)
    adapt = ll.build(model, ll.LoRAConfig(r=8))
    data = [iter([demo_batch(rows[k : k + 8]) for k in range(0, 96, 8)])]
    params = adapt.init(seed=0)
    reached = train_ours(adapt, data, test, 12, [1e-2])
    assert reached[0][1] < evaluate(lambda b: adapt(params, b), test)[1] / 2  # it learns
    sums = [
        dataclasses.replace(row, question=f"{a}{op}{b}=", answer=str(a + b if op == "+" else a - b))
        for row in test
        for a, op, b in row.steps
    ]
    greedy, _ = exact_match(lambda b: model(**b), sums)
    assert evaluate(lambda b: model(**b), sums)[0] == greedy > 0


def test_members_train_as_they_would_alone():
    rows = quality.drawn("train", 24, seed=0)
    streams = [[demo_batch(rows[k : k + 4]) for k in (0, 8)], [demo_batch(rows[k : k + 4]) for k in (4, 16)]]
    assert len({part["input_ids"].shape for stream in streams for part in stream}) > 1  # padding takes part
    adapt = ll.build(load_base(), ll.LoRAConfig(r=4))
    together = train_ours(adapt, [iter(s) for s in streams], rows[:6], 2, [0.3, 0.1])
    alone = train_ours(adapt, [iter(streams[0])], rows[:6], 2, [0.3])
    _, still = train_ours(adapt, [iter(s) for s in streams], rows[:6], 2, [0.3, 0.0])
    assert together[0] == pytest.approx(alone[0], rel=1e-3)
    assert still == pytest.approx(evaluate(lambda b: adapt.base(b), rows[:6]), rel=1e-6)
    assert together[1][1] != pytest.approx(together[0][1], rel=1e-2)


def test_each_member_is_updated_as_the_method_says():
    cfg = ll.AdaLoRAConfig(init_r=4, target_r=2, total_step=4)
    adapt = ll.build(load_base(), cfg)
    trees, grads = ([ll.tree_map(torch.randn_like, adapt.init(seed=0)) for _ in range(2)] for _ in range(2))
    want = [cfg.update(p, g) for p, g in zip(trees, grads, strict=True)]
    params = ll.stack(trees)
    state = updated(cfg, params, ll.stack(grads), [None, None])
    assert all(torch.equal(a, b) for a, b in zip(ll.tree_leaves(params), ll.tree_leaves(ll.stack([p for p, _ in want])), strict=True))
    assert not torch.equal(ll.tree_leaves(params)[2], ll.tree_leaves(ll.stack(trees))[2])  # it has pruned
    assert [s["step"] for s in state] == [1, 1]


def test_joined_batches_keep_each_members_rows():
    parts = [{"input_ids": torch.ones(1, n, dtype=torch.long), "labels": torch.ones(1, n, dtype=torch.long)} for n in (2, 3)]
    found = joined(parts)
    assert found["input_ids"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert found["labels"].tolist() == [[1, 1, -100], [1, 1, 1]]


def test_a_version_is_timed_beside_another_one(monkeypatch, capsys, tmp_path):
    version = versions.Version(BENCH.parent / "src")
    try:
        rows, failed = versions.compare_all(version, version, ["tokens", "lora"], 2)
        with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
            version.ask("step", "nothing")
        assert "dora" in version.ask("variants"), "it goes on"
    finally:
        version.end()
    assert measure.commit_of(tmp_path) == "none"
    assert failed == ["tokens"]  # it needs fields, and the other goes on
    [found] = rows.values()
    assert found["peak"] == 1.0
    assert all(0 < found[what]["median"] < 10 and found[what]["n"] == 2 for what in versions.CALLS)
    monkeypatch.setattr(sys, "argv", ["versions.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        versions.main()
    assert "expected a folder with the package lora_lite, found none" in capsys.readouterr().err


def test_versions_that_are_slower_beyond_the_spread_are_named():
    even, slow = ({"median": m, "low": m - 0.05, "high": m + 0.05} for m in (1.0, 1.2))
    rows = {"lora": {"forward": even, "step": even, "peak": 1.0}, "dora": {"forward": even, "step": slow, "peak": 1.0}}
    facts = {"commit": "new1", "versions": {"lora_lite": "0.2.0"}}

    def text(rows):
        return tables.versions_table({**facts, "results": {"other": {"version": "0.1.0", "commit": "old1"}, "variants": rows}})

    assert text(rows).startswith("Version 0.2.0 at commit new1 over version 0.1.0 at old1:")
    assert text(rows).endswith("Slower or larger beyond the spread: DoRA.")
    assert text({"lora": rows["lora"]}).endswith("None is slower or larger beyond the spread.")


def test_standard_error_counts_seeds_and_problems():
    assert quality.standard_error([0.5, 0.5], 100) == pytest.approx(0.05)
    assert quality.standard_error([0.4, 0.6], 100) == pytest.approx(math.sqrt(0.01 + 0.0025))
    assert quality.standard_error([0.0], 100) > 0
    assert quality.agree({"exact": 0.5, "error": 0.03}, {"exact": 0.58, "error": 0.03})
    assert not quality.agree({"exact": 0.5, "error": 0.03}, {"exact": 0.6, "error": 0.03})


RATIO = {"median": 1.1, "low": 1.0, "high": 1.2, "n": 4}
SLOW = {"median": 1.3, "low": 1.21, "high": 1.4, "n": 4}

SLOW_STEP = {"over_frozen": {"median": 1.5, "n": 4}, "by_arithmetic": 1.05, "over_peft": SLOW}


def results(kind, **found):
    return {"date": "2030-01-02", "commit": "abc", "machine": "2-core x86 CPU", "threads": 1, "results": found}


def timed(ratio, **more):
    part = {"over_frozen": RATIO, "by_arithmetic": 1.05, "over_peft": ratio, "peft_over_frozen": RATIO, "ms": {"ours": {"median": 30.0}}}
    init = {"over_peft": RATIO, "ms": {"ours": {"median": 20.0}}}
    checked = {"against": "peft", "change": 1.0, "error": 1e-6}
    step = {**part, "ms": {"ours": {"median": 50.0}}}
    return {"r": 16, "params": 81920, "macs_per_token": 2.5e6, "checked": checked, "forward": part, "step": step, "init": init, **more}


@pytest.fixture
def files(tmp_path):
    """Write a results file of each kind: LoRA as fast as PEFT's, DoRA slower, PiSSA beyond its margin in memory, BitFit alone."""
    alone = timed(None, checked={"against": "base", "change": 1.0}, r=None)
    for part in ("forward", "step", "init"):
        alone[part] = {key: value for key, value in alone[part].items() if "peft" not in key}
    sizes = {"width": 512, "layers": 4, "rows": 4, "tokens": 64}
    models = {**sizes, "variants": {"lora": timed(RATIO), "dora": timed(SLOW), "pissa": timed(RATIO), "bitfit": alone}}
    member = {"exact": 0.5, "error": 0.03, "loss": 0.1, "members": [0.5, 0.5]}
    functions = {"variants": {"lora": dict.fromkeys(("forward", "grad", "vmap", "vmap of grad"), RATIO), "bitfit": {"left_out": "a norm"}}}
    speed = {
        "models": models,
        "functions": functions,
        "compiled": {"variants": {"lora": {"over_frozen": RATIO}}},
        "populations": {"8": RATIO},
    }
    peaks = {
        name: {"forward": {"ours": 8, "frozen": 8, "peft": 8}, "step": {"ours": n, "frozen": 90, "peft": 100}}
        for name, n in (("lora", 100), ("pissa", 120))
    }
    beside = {"lora": {"ours": {**member, "params": 40960}, "peft": member, "agree": True}}
    beside |= {"dora": {"ours": {**member, "params": 90000}, "peft": {**member, "exact": 0.9}, "agree": False}}
    quality = {"steps": 80, "rows": 12, "members": 2, "test": 200, "frozen": {"exact": 0.0}}
    quality |= {"full": {**member, "params": 872064}, "variants": beside}
    axes = {axis: {"lora": {"4": RATIO, "8": SLOW}} for axis in ("rank", "width", "rows", "members")}
    held = {**sizes, "width": 256, "variants": peaks, "lora": {"value_and_grad": 100}}
    kinds = {"speed": speed, "memory": held, "quality": quality, "scaling": {"axes": axes}}
    us = {key: {"median": 8.0} for key in ("ours", "peft", "base", "two products", "three products")}
    link = {"forward": {"over_peft": RATIO, "us": us}, "step": {"over_peft": SLOW, "us": us}}
    chain = {"layers": 300, "width": 16, "rows": 4, "r": 8, "variants": {"lora": {**link, "added": RATIO}, "dora": link}}
    kinds["calls"] = {"chain": chain, "starts": {"layers": 2, "width": 512, "r": 16, "variants": {"ia3": {"over_peft": SLOW}}}}
    kinds["speed-cuda"] = {"models": {**sizes, "variants": {"dora": {"step": SLOW_STEP}}}}
    for kind, found in kinds.items():
        (tmp_path / f"2030-01-02-abc-{kind}.json").write_text(json.dumps(results(kind, **found)))
    (tmp_path / "2029-01-02-abc-speed.json").write_text("an older one, which is not read")
    return tmp_path


def test_report_has_the_lineages_columns_and_pefts_ratio(files):
    text = report.overview(files)
    head, line = (next(row for row in text.splitlines() if row.startswith(start)) for start in ("| variant", "| LoRA |"))
    assert head == (
        "| variant | r | params | added MACs/token | forward, ms | backward, ms | init, s | step / PEFT's | peak / PEFT's "
        "| accuracy, 872.1k model | params there |"
    )
    assert line == "| LoRA | 16 | 81.9k | 2.50M | 30 | 20 | 0.020 | 1.10 [1.00, 1.20] | 1.00 | 50.0% ± 3.0% | 41.0k |"
    assert "| BitFit | - | 81.9k | 2.50M | 30 | 20 | 0.020 | - | - | - | - |" in text
    assert "2030-01-02-abc-speed.json`](bench/results/2030-01-02-abc-speed.json), 2-core x86 CPU, 1 thread" in text


def test_report_names_the_model_and_the_threads_of_each_figure(files):
    text = report.overview(files)
    for kind, said in {
        "speed": "Costs: one step of a Llama of 4 layers and width 512,",
        "memory": "Peaks: one step of a Llama of 4 layers and width 256,",
        "quality": "Accuracy: the base Llama of 872.1k params; ",
    }.items():
        (paragraph,) = (p for p in text.split("\n\n") if p.startswith(said))
        assert f"2030-01-02-abc-{kind}.json), 2-core x86 CPU, 1 thread)." in paragraph
    assert "training all of its params 50.0% ± 3.0% (" in text
    assert "LoReFT" not in text
    path = files / "2030-01-02-abc-quality.json"
    found = json.loads(path.read_text())
    trained = found["results"]["variants"]
    trained |= {
        "full": {"ours": {**trained["lora"]["ours"], "params": 589824}},
        "loreft": {"ours": {**trained["lora"]["ours"], "exact": 0.0}},
    }
    path.write_text(json.dumps(found))
    text = report.overview(files)
    assert "50.0% ± 3.0%; the row Full trains 589.8k of them (" in text
    assert "\n\nLoReFT edits " in text
    parts = dict(report.sections(files))
    assert parts["populations"].endswith("2-core x86 CPU, 2 threads.")  # measured on two, whatever the rest of the file was
    assert "two threads" not in parts["populations"]


def test_report_says_plainly_what_is_worse_than_pefts(files):
    text = report.overview(files)
    assert "Costlier than PEFT's beyond the spread: DoRA's forward takes 1.30 [1.21, 1.40] of PEFT's time; DoRA's step" in text
    assert "PiSSA's step takes 1.20 of PEFT's peak memory." in text
    assert "LoRA's" not in text.split("Costlier")[1].split("Costs:")[0]
    assert "another accuracy, beyond two standard errors: DoRA." in text
    memory = json.loads((files / "2030-01-02-abc-memory.json").read_text())
    del memory["results"]["variants"]["pissa"]
    assert "No variant is slower or larger" in report.verdict(None, memory, None)


def test_rates_are_those_of_the_results_file_without_what_learnt_nothing(files):
    found = report.t.newest("quality", files)
    ours = found["results"]["variants"]
    ours["lora"]["ours"]["rate"] = ours["dora"]["ours"]["rate"] = 1.25e-3
    ours |= {"vera": {"ours": {"exact": 0.4, "rate": 8e-2}}, "loreft": {"ours": {"exact": 0.0, "rate": 1e-2}}}
    text = report.learned.rates_table(found, "../")
    assert text.splitlines()[2:] == ["| best rate | variants |", "| --- | --- |", "| 0.0013 | LoRA, DoRA |", "| 0.08 | VeRA |"]
    assert "Llama of 872.1k params, in 80 steps of 12 rows" in text
    assert "(../bench/results/2030-01-02-abc-quality.json)" in text


def test_rows_of_several_files_stand_together_where_machine_versions_and_sizes_are_one(tmp_path):
    def put(day, machine="a GPU", width=8, **variants):
        facts = {"date": day, "machine": machine, "versions": {"torch": "2"}, "threads": 1}
        (tmp_path / f"{day}-compiled-cuda.json").write_text(json.dumps({**facts, "results": {"width": width, "variants": variants}}))

    put("2030-01-01", lora=1, dora=1)
    put("2030-01-02", "another GPU", oft=2)
    put("2030-01-03", width=16, hra=3)
    put("2030-01-04", dora=4)
    put("2030-01-05", lora=5)
    found = report.t.together("compiled-cuda", tmp_path)
    assert found["results"] == {"width": 8, "variants": {"dora": 4, "lora": 5}}, "the newest row of each"
    assert found["files"] == ["2030-01-05-compiled-cuda.json", "2030-01-04-compiled-cuda.json"], "those that a row is from"
    assert report.t.source(found, "../").count("bench/results/") == 2
    assert report.t.together("symbolic-cuda", tmp_path) is None


@pytest.mark.parametrize("copied", [[0, 1, 2], [2, 1, 0]])
def test_files_of_one_day_are_in_the_order_of_what_they_say_not_of_when_they_were_copied(copied, tmp_path):
    """A fresh clone writes them in any order."""
    moments = [("fff", "2030-01-02T09:00:00+00:00"), ("aaa", "2030-01-02T10:00:00+00:00"), ("bbb", None)]
    for when, k in enumerate(copied):
        name, moment = moments[k]
        path = tmp_path / f"2030-01-02-{name}-speed.json"
        path.write_text(json.dumps({"results": k} | ({"written": moment} if moment else {})))
        os.utime(path, (when, when))
    assert [run["results"] for run in report.t.by_age("speed", tmp_path)] == [1, 0, 2]
    assert report.newest("speed", tmp_path)["results"] == 1


def test_mixed_steps_pay_from_where_the_spread_stays_below_one():
    below, above = {"median": 0.8, "low": 0.7, "high": 0.9, "n": 3}, {"median": 0.9, "low": 0.8, "high": 1.1, "n": 3}
    lines = {
        "lora": {"1": above, "2": below, "4": above, "8": below, "16": below},
        "dora": dict.fromkeys(("1", "2", "4", "8", "16"), below),
    }
    growth = {"file": "f.json", "threads": 1, "results": {"layers": 2, "centre": {"width": 256, "rank": 16, "members": 4}, "axes": {}}}
    growth["results"]["axes"] = {"members": lines}
    text = report.many.members_table(growth, "../")
    assert "from 8 members on." in text
    assert "rows each" not in text
    growth["results"]["axes"] |= {"each": {"lora": {"1": below, "32": above}}}
    assert "4 members with more rows each:\n\n| variant | rows each: 1 | rows each: 32 |" in report.many.members_table(growth, "../")
    lines["lora"]["16"] = above
    assert "from more than 16 members on." in report.many.members_table(growth, "../")


@pytest.mark.parametrize("at", [{"members": 2, "each": 1}, {"members": 2, "each": 3}])
def test_mixed_and_loop_are_the_same_step(at, monkeypatch):
    seen = {}
    monkeypatch.setattr(growth, "interleaved", lambda calls, repeats: seen.update({n: call() for n, call in calls.items()}) or {})
    monkeypatch.setattr(growth, "ratio", lambda *args: {})
    growth.members_ratio("lora", {"width": 32, "rank": 4, **at}, 1)
    assert torch.allclose(seen["mixed"][0], sum(loss for loss, _ in seen["loop"]), rtol=1e-5)
    for member, (_, alone) in zip(ll.unstack(seen["mixed"][1]), seen["loop"], strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ll.tree_leaves(member), ll.tree_leaves(alone), strict=True))


def test_what_a_gpu_gave_has_a_part_of_its_own(files):
    parts = dict(report.sections(files))
    assert "| DoRA | 1.50 | 1.05 | 1.30 [1.21, 1.40] |" in parts["gpu"]
    assert "DoRA's step takes 1.30 [1.21, 1.40] of PEFT's time." in parts["gpu"]
    assert "cuda" not in parts["overview"] + parts["steps"]


def test_page_has_every_part_and_no_figure_without_a_file(files, tmp_path):
    text = (BENCH.parent / "docs" / "results.md").read_text("utf-8")
    page = report.page(text, files)
    assert page.count("2030-01-02-abc-") > 6
    assert report.page(page, files) == page
    (tmp_path / "empty").mkdir()
    empty = report.page(text, tmp_path / "empty")
    assert empty.count(report.NONE) == 24
    assert "%" not in "".join(line for line in empty.splitlines() if line.startswith("|"))
    with pytest.raises(ValueError, match='expected a line "<!-- other -->"'):
        report.between(text, "other", "new")


def test_calls_have_a_section_only_where_they_were_measured(files):
    text = (BENCH.parent / "docs" / "results.md").read_text("utf-8")
    assert "| LoRA | 8.0 / 8.0 | 1.10 [1.00, 1.20] | 8.0 / 8.0 | 1.30 [1.21, 1.40] |" in report.page(text, files)
    assert "| IA3 | 1.30 [1.21, 1.40] |" in report.page(text, files)
    for path in files.glob("*-calls.json"):
        path.unlink()
    assert "## Calls" not in report.page(report.page(text, files), files)


def test_a_part_that_was_left_out_is_said_to_be():
    assert report.t.table([]) == "Nothing was measured."


def test_runs_are_compared_by_the_spread_that_they_state(files):
    near, far = {"a": {"b": RATIO}, "n": 3}, {"a": {"b": SLOW}, "n": 4}
    assert agreement.compared(near, {"a": {"b": {**RATIO, "median": 1.15}}}) == {"figures": 1, "apart": []}
    found = agreement.compared(near, far)
    assert found == {"figures": 1, "apart": ["/a/b: 1.10 [1.00, 1.20] and 1.30 [1.21, 1.40]"]}
    assert agreement.told(found).startswith("0 of 1 figures agree within the spread that both state.\n/a/b")
    assert agreement.compared({"ms": RATIO}, {"ms": SLOW})["figures"] == 0  # a time is not compared
    peaks = [{"step": {"ours": n, "frozen": 100, "peft": 200}} for n in (100, 110)]
    assert len(agreement.compared(*peaks)["apart"]) == agreement.compared(*peaks)["figures"] == 2
    shares = [{"exact": exact, "error": 0.03} for exact in (0.5, 0.58, 0.6)]
    assert [len(agreement.compared(shares[0], other)["apart"]) for other in shares] == [0, 0, 1]
    assert "| speed | 1 | 0 |" in report.t.agreement_table({"results": {"speed": found}})


def test_a_file_of_the_agreement_of_two_runs_is_written(files, monkeypatch, capsys):
    newest, written = agreement.newest, []
    monkeypatch.setattr(agreement, "newest", lambda kind, folder=files: newest(kind, folder))
    monkeypatch.setattr(measure, "write", lambda *args: written.append(args))
    monkeypatch.setattr(sys, "argv", ["agreement.py", str(files)])
    agreement.main()
    assert "calls: 6 of 6 figures agree" in capsys.readouterr().out
    [(kind, facts, found)] = written
    assert (kind, set(facts["commits"].values())) == ("agreement", {"abc"})
    assert all(part["figures"] > 0 and part["apart"] == [] for part in found.values())
    assert set(found) == {"speed", "memory", "scaling", "quality", "calls"}


def test_plots_come_out_the_same_from_the_same_results(files, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    first, second = (report.draw(files, tmp_path / name) for name in ("one", "two"))
    assert [p.name for p in first] == ["accuracy.svg", "arithmetic.svg", "scaling.svg"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert a.stat().st_size < 60_000
    assert "LoRA" in first[0].read_text()
    assert report.draw(tmp_path / "one", tmp_path / "three") == []


def test_modules_of_the_benchmarks_can_be_imported():
    for path in BENCH.glob("*.py"):
        importlib.import_module(path.stem)


def test_report_needs_no_peft():
    """The documentation is built where PEFT is not installed."""
    code = f"import sys; sys.modules['peft'] = None; sys.path.append({str(BENCH)!r}); import report"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_costs_on_a_real_model_go_on_row_by_row_and_are_shown(tmp_path, monkeypatch):
    class Here:
        """An executor that runs in this process."""

        def __init__(self, *args, **more):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def submit(self, call, measure, *args):
            ran.append((args[0], list(args[2])))
            return SimpleNamespace(result=lambda: measure(*args))

    ran = []
    monkeypatch.setattr(real_costs, "ProcessPoolExecutor", Here)
    facts = {"commit": "abc", "device": "cpu", "machine": "2-core x86 CPU", "threads": 1}
    path = tmp_path / "2030-01-02-abc-real-costs.json"
    small, large = {"2x8": (2, 8)}, {"2x8": (2, 8), "3x4": (3, 4)}
    for names, sizes in ((["lora", "loreft"], small), (["lora"], large), (["lora"], large)):
        assert not real_costs.measure(names, "small", sizes, 4, 1, Record(path, "2030-01-02", facts))
    assert ran == [("lora", ["2x8"]), ("loreft", ["2x8"]), ("lora", ["3x4"])]
    parts = dict(report.sections(tmp_path))
    text = parts["real-costs"]
    assert "2 rows of 8 tokens:" in text
    assert "3 rows of 4 tokens:" in text
    head = "| variant | step, ms | step / frozen | step / PEFT's | forward / PEFT's | token / PEFT's | peak / frozen | peak / PEFT's |"
    assert text.count(head) == 2
    assert [line.split(" | ")[3].strip(" |") for line in text.splitlines() if line.startswith("| LoReFT | ")] == ["-", "-"]
    tokens = next(iter(Record(path, "", facts).tree["results"]["variants"]["lora"]["sizes"].values()))["token"]
    assert set(tokens["ms"]) == {"frozen", "ours", "peft"}
    wrong = real_costs.measure(["tokens"], "small", small, 4, 1, Record(path, "", facts))  # which the batch has none of
    assert wrong["tokens"].startswith("SystemExit: bench: expected finite logits of tokens that differ")


def test_starts_are_timed_beside_pefts_and_shown(tmp_path):
    layers = svd_starts.of_model(svd_starts.as_drawn(1), repeats=1)
    assert (layers["layers"], layers["exact"]) == (7, 0)  # the iteration reaches its bound at flat spectra too
    assert 0 < layers["bound"] <= 1e-3
    whole = {**layers, "exact": 7, "bound": None}
    facts = {"machine": "2-core x86 CPU", "threads": 1}
    path = tmp_path / "2030-01-02-abc-svd-starts.json"
    path.write_text(json.dumps({**facts, "results": {"r": 16, "weights": {"as drawn": layers, "narrow": whole}}}))
    head, _, first, second, *_ = dict(report.sections(tmp_path))["svd-starts"].splitlines()
    assert head.startswith("| weights | layers | of them whole | start, s | / whole decomposition | / PEFT's 16 iterations |")
    assert first.startswith("| as drawn | 7 | 0 | ")
    assert second.endswith(" | - |")


def test_a_generated_token_is_that_of_the_whole_text():
    model, batch = llama(32, 2), batch_of(2, 6)
    c = real_costs.contender(model, methods.pairs(4)["lora"], batch)
    made = []
    monkey = c._replace(adapt=lambda params, rows: made.append(c.adapt(params, rows)) or made[-1], theirs=None)
    call = real_costs.tokens(model, monkey, {"input_ids": batch["input_ids"]})["ours"]
    for _ in range(2):  # the second as the first: the cache is as it was
        call()
        longer = torch.cat([batch["input_ids"], batch["input_ids"][:, -1:]], 1)
        want = c.adapt(c.params, {"input_ids": longer, "use_cache": False}).logits[:, -1]
        torch.testing.assert_close(made[-1].logits[:, -1], want, rtol=1e-4, atol=1e-5)
