"""The benchmark on glosses: a stand-in for the model and the data shows that the harness chooses, trains, tests and goes on as it says."""

import json
import sys

import pytest
import torch
import transformers

import demo
import glosses
import lora_lite as ll
import report
from common import pretrained
from common.measure import llama
from common.pretrained import Gloss, Split, batch
from glosses import Journal, Setting

NOUN = '  1 This software and database\n{} 05 n 01 dog 0 001 @ 2 n 0000 | a {} animal; "it barked"  \n'
SMALL = Setting(steps=12, rows=8, seeds=2, valid=40, test=60, tokens=8)


def drawn(n, seed):
    """Draw glosses whose class is told by their first token, of several lengths."""
    g = torch.Generator().manual_seed(seed)
    firsts, lengths = torch.randint(5, (n,), generator=g).tolist(), torch.randint(2, 7, (n,), generator=g).tolist()
    return [Gloss("", k, (k + 1, *torch.randint(6, 20, (size,), generator=g).tolist())) for k, size in zip(firsts, lengths, strict=True)]


@pytest.fixture
def stand_in(monkeypatch):
    """Put a tiny encoder and drawn glosses in the place of the packages'."""

    def load():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 24}
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        encoder = transformers.BertModel(transformers.BertConfig(**sizes, **still), add_pooling_layer=False)
        return pretrained.Classifier(encoder, 16, 5).requires_grad_(False).eval()

    monkeypatch.setattr(glosses, "load_classifier", load)
    monkeypatch.setattr(Setting, "split", lambda s: Split(drawn(200, 0), drawn(s.valid, 1), drawn(s.test, 2)))


def test_the_data_files_of_wordnet_are_read(tmp_path):
    for name in pretrained._DATA:
        (tmp_path / name).write_text(NOUN.format("00001", "domestic"), "latin-1")
    (tmp_path / "lexnames").write_text("00\tadj.all\t3\n01\tadj.pert\t3\n", "latin-1")
    assert pretrained.read_glosses(tmp_path) == [Gloss("a domestic animal", 5)] * 5
    assert pretrained.class_names(tmp_path) == ["adj.all", "adj.pert"]


def test_batches_hold_each_row_once_an_epoch_and_rows_of_about_one_length():
    rows = [row._replace(label=k) for k, row in enumerate(drawn(64, 0))]
    parts = list(pretrained.batches(rows, 8, 8, seed=0))
    assert sorted(torch.cat([part["labels"] for part in parts]).tolist()) == list(range(64))
    assert sum(part["input_ids"].numel() for part in parts) < 1.2 * sum(len(row.ids) for row in rows)
    for part in parts:
        assert torch.equal(part["attention_mask"].sum(1), torch.tensor([len(rows[k].ids) for k in part["labels"].tolist()]))
    again = [part["labels"].tolist() for part in pretrained.batches(rows, 8, 8, seed=0)]
    assert again == [part["labels"].tolist() for part in parts]
    assert again != [part["labels"].tolist() for part in pretrained.batches(rows, 8, 8, seed=1)]


def test_a_package_that_lacks_is_named_with_the_way_to_get_it():
    with pytest.raises(SystemExit, match=r"expected the package 'no_such_weights', found it not installed\. Run python -m tox run -e real"):
        pretrained.folder_of("no_such_weights")


def test_padding_changes_no_logits(stand_in):
    model, rows = glosses.load_classifier(), drawn(6, 3)
    together = model(**pretrained.batch(rows)).logits
    for k, row in enumerate(rows):
        torch.testing.assert_close(model(torch.tensor([row.ids])).logits[0], together[k], rtol=1e-4, atol=1e-5)


def test_a_population_of_rates_trains_as_each_would_alone(stand_in):
    adapt = glosses.adapted("lora", SMALL)
    together = glosses.train_at(adapt, "lora", SMALL, [1e-3, 3e-2], [0, 1])
    for member, rate, seed in zip(together, (1e-3, 3e-2), (0, 1), strict=True):
        [alone] = glosses.train_at(adapt, "lora", SMALL, [rate], [seed])
        torch.testing.assert_close(member, alone, rtol=1e-3, atol=1e-4)
    before, after = (glosses.evaluate(lambda rows, p=p: adapt(p, rows), SMALL.tested(0))["loss"] for p in (adapt.init(), together[1]))
    assert after < before


def test_a_sweep_goes_on_where_the_best_rate_is_an_edge(stand_in, monkeypatch):
    asked = []
    monkeypatch.setattr(glosses, "train_at", lambda adapt, name, s, rates, seeds: asked.append(list(rates)) or [adapt.init(0)] * len(rates))
    by_rate = iter([3.0, 2.0, 1.5, 1.0, 0.5, 0.7])
    monkeypatch.setattr(glosses, "evaluate", lambda forward, rows: {"exact": 0.5, "loss": next(by_rate, 0.9)})
    found = glosses.sweep("lora", SMALL)
    middle = glosses.METHODS["lora"].short_rate
    assert asked == [pytest.approx([middle / 9, middle / 3, middle, 3 * middle]), pytest.approx([9 * middle, 27 * middle])]
    assert found["rate"] == pytest.approx(9 * middle)
    assert len(found["sweep"]) == 6
    assert not glosses._better({"loss": float("nan")}, {"loss": 1.0})
    assert glosses._better({"loss": 1.0}, {"loss": float("nan")})


def test_seeds_train_and_test_on_glosses_of_their_own(stand_in):
    halves = [SMALL.tested(k) for k in range(2)]
    assert len(halves[0]) + len(halves[1]) == SMALL.test
    assert not {row.ids for row in halves[0]} & {row.ids for row in halves[1]}
    labels = [torch.cat([part["labels"] for part in SMALL.data(k)]).tolist() for k in range(2)]
    assert labels[0] != labels[1]


@pytest.mark.parametrize("name", ["lora", "adalora", "full", "tokens"])
def test_ours_and_pefts_train_beside_the_head(stand_in, name, monkeypatch):
    monkeypatch.setitem(glosses.OWN, "tokens", lambda s: {"token_ids": (1, 2, 3)})
    found = glosses.done(("ours", name, 0), SMALL, None)
    assert "failed" not in found
    assert found["rate"] in [point["rate"] for point in found["sweep"]]
    assert "failed" not in glosses.done(("ours", name, 1), SMALL, found["rate"])
    if glosses.theirs(glosses.demo_config(name, 12)) is not None:
        beside = glosses.done(("peft", name, 0), SMALL, found["rate"])
        assert "failed" not in beside
        assert beside["params"] - found["params"] in (0, 6)  # AdaLoRA's `ranknum` trains nothing


def test_a_training_that_fails_is_a_row_that_says_so(stand_in, monkeypatch):
    monkeypatch.setattr(glosses, "adapted", lambda name, s: 1 / 0)
    assert glosses.done(("ours", "lora", 0), SMALL, None) == {"failed": "ZeroDivisionError: division by zero"}
    found = {("ours", "lora", 0): {"failed": "why"}}
    assert glosses.results(SMALL, found)["variants"] == {"lora": {"failed": "why"}}


def test_a_journal_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "deep" / "run.jsonl"
    journal = Journal(path)
    journal.add(("ours", "lora", 0), {"exact": 0.5})
    journal.add(("peft", "lora", 1), {"exact": 0.25})
    path.write_text(path.read_text() + '["ours", "dora", 0, {"exa')
    again = Journal(path)
    assert again.found == journal.found
    again.add(("ours", "dora", 0), {"exact": 0.75})
    assert [json.loads(line)[1] for line in path.read_text().splitlines()] == ["lora", "lora", "dora"]


def test_a_run_does_what_its_journal_lacks_and_in_order(tmp_path, monkeypatch):
    class Pool:
        def __init__(self, *args, **kwargs): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...
        def submit(self, f, job, s, rate):
            asked.append((job, rate))
            future = glosses.Future()
            future.set_result({"exact": 0.5, "loss": 1.0, "rate": 0.1, "params": 7, "build_s": 0.0, "sweep": []})
            return future

    asked = []
    monkeypatch.setattr(glosses, "ProcessPoolExecutor", Pool)
    journal = Journal(tmp_path / "run.jsonl")
    journal.add(("ours", "ssvd", 0), {"failed": "why"})
    journal.add(("ours", "probe", 0), {"exact": 0.4, "loss": 1.0, "rate": 0.3, "params": 7, "build_s": 0.0, "sweep": []})
    glosses.run(["ssvd", "lora"], SMALL, journal, 1)
    assert asked == [
        (("ours", "lora", 0), None),
        (("ours", "probe", 1), 0.3),
        (("ours", "lora", 1), 0.1),
        (("peft", "lora", 0), 0.1),
        (("peft", "lora", 1), 0.1),
    ]
    found = glosses.results(SMALL, journal.found)
    assert found["probe"]["exact"] == pytest.approx(0.45)
    assert found["variants"]["lora"]["agree"] is True
    asked.clear()
    glosses.run(["ssvd", "lora"], SMALL, Journal(tmp_path / "run.jsonl"), 1)
    assert asked == []


def test_the_error_of_a_mean_is_at_least_that_of_its_glosses():
    assert glosses.standard_error([0.5, 0.5], 100) == pytest.approx(0.05)
    assert glosses.standard_error([0.3, 0.7], 100) == pytest.approx(0.2)
    assert glosses.standard_error([0.0], 100) > 0


def test_the_results_file_is_of_what_is_there(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(glosses, "write", lambda *args: written.append(args))
    words = "steps=4-rows=16-seeds=1-valid=100-test=200-tokens=16"
    row = {"exact": 0.5, "loss": 1.0, "rate": 0.1, "params": 7, "build_s": 0.0, "sweep": []}
    Journal(tmp_path / f"{words}.jsonl").add(("ours", "lora", 0), row)
    monkeypatch.setattr(sys, "argv", ["glosses.py", "--quick", "--report", "--out", str(tmp_path)])
    glosses.main()
    [(kind, _, found, quick)] = written
    assert (kind, quick, found["variants"]["lora"]["ours"]["rate"]) == ("glosses", True, 0.1)
    assert "lora         50.0%" in capsys.readouterr().out


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.cache_folder() == tmp_path / "lora_lite"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pretrained.cache_folder() == tmp_path / ".cache" / "lora_lite"


def test_the_whole_encoder_trains_in_a_population(stand_in):
    adapt = glosses.adapted("full", SMALL)
    assert {target.path for target in adapt.targets} == {"encoder", "head"}
    assert isinstance(adapt.configs[0], ll.FullConfig)


@pytest.mark.parametrize("name", ["head", "lora", "adalora", "eva"])
def test_the_demo_trains_saves_reloads_and_merges(stand_in, name):
    def load(quantised):
        return glosses.load_classifier()

    tests = [batch(part) for part in demo.by_length(drawn(40, 2), 16)]
    right = lambda output, rows: output.logits.argmax(1) == rows["labels"]  # noqa: E731
    task = demo.Task(load, lambda seed, steps: pretrained.batches(drawn(200, 0), 8, steps, seed), tests, right, True)
    found = demo.run(task, name, load(False), 6, None if name == "head" else 0.25)
    assert found.before == (found.after if name == "head" else 0.25)
    if name in ("lora", "adalora"):
        assert found.trained == ll.build(load(False), demo.config_of(task, name, 6)).num_params
    assert 0 <= found.after <= 1
    assert found.seconds > found.init > 0
    assert "25.0%" in demo.table([found], "head alone") or name == "head"


def test_an_answer_is_right_where_all_its_tokens_are(stand_in):
    def tokenise(text):
        return {"input_ids": [ord(letter) % 50 + 1 for letter in text]}

    tokenise.eos_token = "$"
    rows = pretrained.spelt([("ab", "cd"), ("a", "bcde")], tokenise)
    assert rows["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert (rows["labels"] == -100).tolist() == [[True, True, False, False, False, True], [True, False, False, False, False, False]]
    loss = llama(32, 1, vocab=64)(**rows).loss
    assert loss.isfinite()


def test_the_agreement_of_seeds_is_stated():
    seeds = {"a": [0.71, 0.70], "b": [0.73, 0.72], "c": [0.72, 0.74], "d": [0.72, 0.75]}
    done = {name: {"ours": {"members": pair}} for name, pair in seeds.items()}
    assert report.learned.ranks([0.71, 0.73, 0.72, 0.72]) == [0.5, 3.5, 2.0, 2.0]
    assert "rank correlation of 0.32. Neighbours" in report.learned.order_of_seeds(done)
    assert "1.00. Their order is that of both" in report.learned.order_of_seeds(
        {n: {"ours": {"members": [p[0]] * 2}} for n, p in seeds.items()}
    )
    assert report.learned.order_of_seeds({"a": {"ours": {"members": [0.7]}}}) == ""


def test_what_all_variants_have_in_common_with_a_seed_tells_none_apart():
    generator = torch.Generator().manual_seed(0)
    true, seed = torch.linspace(0.6, 0.8, 400, dtype=torch.float64), torch.tensor([0.03, -0.03])  # seeds far apart, for all alike
    members = (true[:, None] + seed + 0.004 * torch.randn(400, 2, generator=generator)).tolist()
    error, apart = report.learned.told_apart(members)
    assert error == pytest.approx(0.004 / 2**0.5, rel=0.1)
    assert 0.85 < apart < 0.95  # two variants are apart where they differ by 0.008 or more, of 0.2: a share of (1 - 0.04)^2
    assert report.learned.told_apart([[0.5, 0.7], [0.6, 0.8], [0.7, 0.9]]) == pytest.approx((0.0, 1.0), abs=1e-9)


def test_the_table_and_the_plot_of_the_glosses(tmp_path):
    row = {"exact": 0.75, "error": 0.004, "loss": 1.0, "rate": 2e-3, "params": 40960}
    variants = {"lora": {"ours": row, "peft": {**row, "exact": 0.74}, "agree": True}, "ssvd": {"failed": "why"}}
    variants |= {"ia3": {"ours": {**row, "exact": 0.7, "params": 100, "rate": 5e-2}, "peft": {"failed": "why"}}}
    found = {"model": "all-MiniLM-L6-v2", "steps": 100, "rows": 32, "seeds": 2, "test": 100, "probe": row, "variants": variants}
    file = {"date": "2030-01-02", "commit": "abc", "machine": "2-core x86 CPU", "threads": 1, "results": found}
    (tmp_path / "2030-01-02-abc-glosses.json").write_text(json.dumps(file))
    text = dict(report.sections(tmp_path))["glosses"]
    assert (
        "| LoRA | 41.0k | 2.0e-03 | 2 | 75.0% ± 0.4% | 74.0% ± 0.4% | equal |\n| IA3 | 100 | 5.0e-02 | 2 | 70.0% ± 0.4% | - | - |" in text
    )
    assert "Not trained: SSVD." in text
    assert "Not measured yet: PiSSA," in text
    assert "rank correlation" not in text, "two variants have no order to speak of"
    rates = report.learned.glosses_rates(report.t.newest("glosses", tmp_path), "../")
    assert rates.splitlines()[4:] == ["| 0.002 | LoRA |", "| 0.05 | IA3 |"]
    assert (tmp_path / "plots" / "glosses.svg") in report.draw(tmp_path, tmp_path / "plots")
