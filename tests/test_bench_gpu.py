"""The script for a GPU keeps what it has measured, whatever ends it; compiled steps are checked and go on where they were stopped."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch

import compiled
import gpu
import gsm8k
import report
from common import gpu_parts, methods
from common.measure import batch_of, llama
from common.record import Record, file_name

FACTS = {"commit": "abc.changes", "device": "cuda", "versions": {"torch": "2.11.0+cu130"}}


def test_a_files_name_can_be_copied_anywhere():
    assert file_name("2030-01-02", FACTS, "speed") == "2030-01-02-abc.changes-speed-cuda.json"
    assert file_name("2030-01-02", {"commit": "ab+c d/é"}, "speed") == "2030-01-02-ab.c.d..-speed.json"


def test_each_figure_is_on_the_disk_at_once_and_goes_on_from_there(tmp_path):
    path = tmp_path / "a" / "speed.json"
    record = Record(path, "2030-01-02", FACTS)
    record.keep(("models", "variants", "lora"), {"step": 1.0})
    found = json.loads(path.read_text())
    assert found.pop("written") > "2026", "the moment of the last figure"
    assert found == {"date": "2030-01-02", **FACTS, "results": {"models": {"variants": {"lora": {"step": 1.0}}}}}
    again = Record(path, "2030-01-03", FACTS)
    assert ("models", "variants", "lora") in again
    assert ("models", "variants", "oft") not in again
    assert ("models", "variants", "lora", "step", "ms") not in again
    again.keep(("models", "variants", "oft"), {})
    assert list(Record(path, "", FACTS).tree["results"]["models"]["variants"]) == ["lora", "oft"]
    assert Record(path, "", {**FACTS, "commit": "other"}).tree["results"] == {}
    assert [p.name for p in path.parent.iterdir()] == ["speed.json"]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    record = Record(tmp_path / "speed.json")
    record.keep(("a",), 1)
    with pytest.raises(TypeError):
        record.keep(("b",), object())
    assert json.loads((tmp_path / "speed.json").read_text())["results"] == {"a": 1}


def test_time_is_split_by_shares_and_what_is_left_over_goes_on():
    names = list(gpu.PARTS)
    assert set(names) == set(gpu_parts.PARTS)
    assert gpu.allotted(names[-1], names[-1:], 77.0) == 77.0
    left, total = 540.0, 0.0
    for k, name in enumerate(names):
        seconds = gpu.allotted(name, names[k:], left - total)
        assert seconds > 20  # a process needs some to begin
        total += seconds
    assert total == pytest.approx(540)
    assert gpu.allotted("steps", names[1:], 540.0) > gpu.allotted("steps", names, 540.0)


@pytest.mark.parametrize(
    ("code", "state", "why"),
    [
        ("print('fine')", "done", None),
        ("import sys; print('one'); sys.exit('two: three')", "failed", "two: three"),
        ("import os; os._exit(3)", "failed", "exit status 3"),
        ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", "cut off", None),
    ],
)
def test_a_part_ends_as_it_may_or_with_its_time(tmp_path, monkeypatch, code, state, why):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    log = tmp_path / "log"
    log.write_text("")
    found = gpu.run_part([sys.executable, "-c", code], 1.5 if state == "cut off" else 60, log, {"PYTHONUNBUFFERED": "1"})
    assert (found["state"], found.get("why")) == (state, why)


def options(tmp_path, *words):
    return ["gpu.py", "--device", "cpu", "--quick", "--out", str(tmp_path), *words]


def states(tmp_path):
    return {name: part["state"] for name, part in json.loads((tmp_path / "gpu.json").read_text())["results"]["parts"].items()}


@pytest.fixture
def _signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_signals")
def test_a_part_that_fails_or_cannot_run_is_noted_and_the_next_goes_on(tmp_path, monkeypatch, capsys):
    ran = []

    def stand_in(command, seconds, log, environment):
        name = command[command.index("--inside") + 1]
        assert states(tmp_path)[name] == "running"  # noted before: a machine may be taken away
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        ran.append(name)
        return {"state": "failed", "seconds": 1.0, "why": "broken"} if name == "steps" else {"state": "done", "seconds": 1.0}

    monkeypatch.setattr(gpu, "run_part", stand_in)
    monkeypatch.setattr(gpu, "missing", lambda needs: [name for name in ("bitsandbytes",) if name in needs])
    monkeypatch.setattr(sys, "argv", options(tmp_path))
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    assert ran == [name for name in gpu.USUAL if name not in ("tests", "quantised")]
    lacking = {"tests": "left out", "quantised": "left out"}
    assert states(tmp_path) == {**dict.fromkeys(gpu.USUAL, "done"), "steps": "failed", **lacking}
    first, *_ = said = capsys.readouterr().out.splitlines()
    assert first == "gpu: not installed here: bitsandbytes. For every part: pip install bitsandbytes"
    assert len(said) == 1 + len(gpu.USUAL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.usefixtures("_signals")
def test_no_gpu_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"expected a GPU that PyTorch sees, found none\. .* --device cpu"):
        gpu.main()
    assert not (tmp_path / "out").exists()


def test_a_row_that_fails_is_noted_and_one_that_is_kept_is_not_measured_again(tmp_path):
    record, ran = Record(tmp_path / "speed.json"), []

    def row(name):
        ran.append(name)
        if name == "bad":
            raise SystemExit("expected one thing,\nfound another")
        return {"median": 1.0, "rounds": [1.0]}

    rows = [((name,), lambda name=name: row(name)) for name in ("a", "bad", "b")]
    for _ in range(2):
        with pytest.raises(SystemExit, match="steps: 1 failed: bad"):
            gpu_parts.each("steps", tmp_path, record, rows)
    assert ran == ["a", "bad", "b", "bad"]
    assert Record(tmp_path / "speed.json").tree["results"] == {"a": {"median": 1.0}, "b": {"median": 1.0}}
    failed = json.loads((tmp_path / "gpu.json").read_text())["results"]["failed"]
    assert failed == {"steps": {"bad": "SystemExit: expected one thing, found another"}}


def test_a_part_whose_time_is_over_ends_at_once(tmp_path):
    def told():
        raise SystemExit(gpu_parts.TOLD)

    with pytest.raises(SystemExit, match=gpu_parts.TOLD):
        gpu_parts.each("steps", tmp_path, Record(tmp_path / "speed.json"), [(("a",), told), (("b",), lambda: pytest.fail("went on"))])


def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph=False, dynamic=None: f)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, of norms
@pytest.mark.parametrize("name", ["lora", "hra", "loreft", "ln_tuning", "pvera"])
def test_compiled_steps_are_those_of_eager_mode(name, monkeypatch):
    uncompiled(monkeypatch)
    pair = methods.pairs(4)[name]
    calls, seconds, failed = compiled.compiled(llama(32, 1, vocab=64), pair, batch_of(3, 8, vocab=64))
    want = {"frozen", "ours", "eager", "value_and_grad"} | ({"peft"} if pair.peft else set())
    want |= {"mixed", "mixed eager"} if pair.cfg.adapts != "module" else set()
    assert set(calls) == set(seconds) == want
    assert not failed
    row = compiled.timed(calls, seconds, 2)
    assert {"over_frozen", "over_eager", "value_and_grad", "compile_seconds"} <= set(row)
    assert ("mixed" in row) == ("mixed" in calls)


def test_compiled_steps_with_other_gradients_are_not_timed(monkeypatch):
    def wrong(f, fullgraph=False, dynamic=None):
        def scaled(*args):
            found = f(*args)
            return 1.1 * found if fullgraph and isinstance(found, torch.Tensor) else found

        return scaled

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(SystemExit, match=r"compiled step of lora \(ours\) to give the eager gradients"):
        compiled.compiled(llama(32, 1, vocab=64), methods.pairs(4)["lora"], batch_of(2, 8, vocab=64))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_what_peft_cannot_compile_is_noted_beside_our_steps(monkeypatch):
    def other(f, fullgraph=False, dynamic=None):
        def broken():
            raise ValueError("no graph\nof this")

        return broken if f.__code__.co_argcount == 0 else f  # theirs alone takes nothing

    monkeypatch.setattr(torch, "compile", other)
    calls, _, failed = compiled.compiled(llama(32, 1, vocab=64), methods.pairs(4)["lora"], batch_of(2, 8, vocab=64))
    assert failed == {"peft": "ValueError: no graph of this"}
    assert "peft" not in calls
    assert "ours" in calls


ROW = {"over_frozen": {"median": 1.1}, "value_and_grad": {"over_frozen": {"median": 1.2}}, "compile_seconds": {"ours": 3.0, "frozen": 9.0}}


def test_compilation_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    asked = []

    def stand_in(names, *rest):
        asked.append(list(names))
        for name in names:
            yield name, ROW if name != "oft" else {"failed": "no graph"}

    monkeypatch.setattr(compiled, "rows", stand_in)
    sizes = compiled.SIZES["quick"]
    for _ in range(2):
        record = Record(tmp_path / "2030-01-02-abc-compiled.json", "2030-01-02", {"commit": "abc", "threads": 1})
        assert compiled.keep(record, ["lora", "oft", "loreft"], sizes, 8, 3, 1) == {"oft": "no graph"}
    assert asked == [["lora", "oft", "loreft"], ["oft"]]
    text = dict(report.sections(tmp_path))["compiled"]
    assert "| LoRA | 1.10 | - | - | 1.20 | - | - | 3 |" in text


def test_a_file_that_was_cut_off_is_no_section(tmp_path):
    cut = {"speed": {"models": {"width": 8}}, "memory": {"width": 8}, "serving": {}, "compiled": {}, "symbolic": {"costs": {}}}
    for kind, found in cut.items():
        name = file_name("2030-01-02", FACTS, kind)
        Path(tmp_path / name).write_text(json.dumps({**FACTS, "threads": 1, "machine": "GPU", "results": found}))
    parts = dict(report.sections(tmp_path))
    for marker in ("gpu", "gpu-memory", "gpu-compiled", "gpu-populations", "gpu-serving", "symbolic"):
        assert parts[marker] == report.NONE


def test_trainings_are_kept_one_by_one_and_the_rest_goes_on(tmp_path, monkeypatch):
    asked = []

    def measured(s, *loaded):
        assert loaded == ("model", "tokenizer")
        if s.variant == "oft" and not asked:
            raise ValueError("no start")
        return {"init_seconds": 1.0}

    def runs(jobs, out, workers):
        asked.append({name: (s.variant, facts) for name, (s, facts) in jobs.items()})
        return iter([(name, {"test": {"exact": 0.5}} if name == "lora" else {"failed": "no end"}) for name in jobs])

    monkeypatch.setattr(gsm8k, "load_model", lambda s, where: ("model", "tokenizer"))
    monkeypatch.setattr(gsm8k, "measured", measured)
    monkeypatch.setattr(gsm8k, "runs", runs)
    monkeypatch.setattr(gsm8k, "frozen", lambda s, out: {"test": {"exact": 0.0}})
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"learned: 1 failed: .*oft"):
            gpu_parts.learned(tmp_path, quick=True, names=None)
    assert asked == [{"lora": ("lora", {"init_seconds": 1.0})}, {"oft": ("oft", {"init_seconds": 1.0})}]
    found = json.loads(next(tmp_path.glob("*-symbolic*.json")).read_text())["results"]
    assert (list(found["variants"]), list(found["costs"]), found["frozen"]) == (["lora"], ["lora", "oft"], {"test": {"exact": 0.0}})
    assert json.loads((tmp_path / "gpu.json").read_text())["results"]["failed"] == {"learned": {"oft": "no end"}}
