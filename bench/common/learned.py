"""Tables of what variants learn: accuracies, rates, and the demo's."""

import itertools
import json
import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path

import lora_lite as ll
from common.tables import RESULTS, Found, count, share, source, table, title


def quality_table(quality: Found) -> str:
    """Write the accuracy of each variant beside PEFT's training of the same method."""
    rows = []
    for name, row in quality["results"]["variants"].items():
        ours, peft = row["ours"], row.get("peft")
        equal = {True: "equal", False: "not equal"}.get(row.get("agree"), "-")
        rows.append(
            {
                **{"variant": title(name), "params": count(ours["params"]), "accuracy": share(ours), "loss": f"{ours['loss']:.3f}"},
                **{"PEFT's accuracy": share(peft), "PEFT's loss": f"{peft['loss']:.3f}" if peft else "-"},
                "within two standard errors": equal,
            }
        )
    return table(rows)


def rates_table(quality: Found, up: str, without: Collection[str] = ()) -> str:
    """Write the learning rate that was best for each variant in the training of the accuracies, and which training that was.

    Args:
        quality: a results file of accuracies on the small Llama.
        up: the way from the page to the repository.
        without: the variants to leave out.
    """
    q = quality["results"]
    learnt = {n: row["ours"] for n, row in q["variants"].items() if n not in without and row["ours"]["exact"] >= 0.1}
    if not learnt:  # a rate at which nothing was learnt is none to begin with
        return ""
    words = (
        f"Measured on the base Llama of {count(q['full']['params'])} params, in {q['steps']} steps of {q['rows']} rows by AdamW: of a "
        f"rate and its multiples, the best on problems of their own ({source(quality, up)}):"
    )
    return f"{words}\n\n{by_rate(learnt, 2)}"


def by_rate(rows: Found, digits: int) -> str:
    """Lay variants out by their best rates, of so many digits."""
    named: dict[str, list[str]] = {}
    for name, ours in sorted(rows.items(), key=lambda item: item[1]["rate"]):
        named.setdefault(f"{ours['rate']:.{digits}g}", []).append(title(name))
    return table([{"best rate": rate, "variants": ", ".join(names)} for rate, names in named.items()])


def glosses_table(found: Found) -> str:
    """Write the accuracy of each variant on the glosses, its rate and size, beside PEFT's training; the most accurate first."""
    rows, r = [], found["results"]
    done = {name: row for name, row in r["variants"].items() if "ours" in row and "failed" not in row["ours"]}
    for name, row in sorted(done.items(), key=lambda item: -item[1]["ours"]["exact"]):
        ours, peft = row["ours"], row.get("peft", {})
        equal = {True: "equal", False: "not equal"}.get(row.get("agree"), "-")
        rows.append(
            {
                **{"variant": title(name), "params": count(ours["params"]), "rate": f"{ours['rate']:.1e}"},
                **{"seeds": str(len(ours.get("members", ())) or r["seeds"]), "accuracy": share(ours)},
                **{"PEFT's accuracy": share(peft) if "exact" in peft else "-", "within two standard errors": equal},
            }
        )
    probe = f"The linear probe, the head alone on the frozen encoder, reaches {share(r['probe'])}. " if r.get("probe") else ""
    lacking = [title(name) for name in r["variants"] if name not in done]
    failed = f"\n\nNot trained: {', '.join(lacking)}." if lacking else ""
    absent = [title(name) for name in ll.VARIANTS if name not in r["variants"]]
    failed += f"\n\nNot measured yet: {', '.join(absent)}." if absent else ""
    each = r["test"] // r["seeds"]
    facts = f"{r['steps']} steps of {r['rows']} glosses, {r['seeds']} seeds of {each} test glosses each."
    return f"{probe}{facts}{order_of_seeds(done)}\n\n{table(rows)}{failed}"


def order_of_seeds(done: Found) -> str:
    """State how well variants are told apart, and how far two seeds agree on their order. Nothing for fewer than three variants."""
    pairs = [row["ours"]["members"] for row in done.values() if len(row["ours"].get("members", ())) == 2]
    if len(pairs) < 3 or any(len(set(seed)) < 2 for seed in zip(*pairs)):
        return ""
    found = statistics.correlation(*(ranks(seed) for seed in zip(*pairs, strict=True)))
    error, apart = told_apart(pairs)
    words = "Neighbours in the table are not told apart" if found < 0.9 else "Their order is that of both seeds"
    return (
        f" All variants see the same glosses with a seed, so that beside the others each accuracy is known better than by itself, to "
        f"{error:.2%}: what is left of the variance between two seeds of {len(pairs)} variants without what is common to all. A difference "
        f"of {2 * math.sqrt(2) * error:.1%} is two standard errors; {apart:.0%} of all pairs lie further apart. "
        f"The order of the variants by one seed and by the other has a rank correlation of {found:.2f}. {words}."
    )


def told_apart(members: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Analyse the accuracies of variants, each with the same seeds, two ways: by variant and by seed.

    Returns:
        The standard error of a variant's mean beside the others', and the share of pairs of variants that differ by more than two standard
        errors of a difference.
    """
    variants, seeds = len(members), len(members[0])
    means, common = [statistics.mean(row) for row in members], [statistics.mean(seed) for seed in zip(*members, strict=True)]
    whole = statistics.mean(means)
    left = sum((x - m - c + whole) ** 2 for row, m in zip(members, means, strict=True) for x, c in zip(row, common, strict=True))
    error = math.sqrt(left / ((variants - 1) * (seeds - 1)) / seeds)
    far = [abs(a - b) > 2 * math.sqrt(2) * error for a, b in itertools.combinations(means, 2)]
    return error, sum(far) / len(far)


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, equal ones with the mean of theirs."""
    return [sum(v < value for v in values) + 0.5 * sum(v == value for v in values) for value in values]


def glosses_rates(found: Found, up: str) -> str:
    """Write the best learning rate of each variant on the pretrained encoder, of a population's, and which training that was."""
    done = {name: row["ours"] for name, row in found["results"]["variants"].items() if "failed" not in row.get("ours", {"failed": ""})}
    r = found["results"]
    words = (
        f"Measured on {r['model']}, 22.7 M params, in {r['steps']} steps of {r['rows']} glosses by AdamW: of rates in factors of three, "
        f"the best on validation glosses ({source(found, up)}):"
    )
    return f"{words}\n\n{by_rate(done, 1)}"


def gsm8k_table(folder: Path = RESULTS, up: str = "../") -> str:
    """Write every run of `gsm8k.py`, a file each; empty where there is none."""
    rows = []
    for path in sorted(folder.glob("*-gsm8k-*.json")):
        found = json.loads(path.read_text("utf-8"))
        run = found["results"]
        name, *columns = lineage_row(run).items()
        more = {"data": run["settings"]["test_data"], "file": source({**found, "file": path.name}, up)}
        rows.append({**dict([name]), "model": run["settings"]["model"], **dict(columns), **more})
    return table(rows) if rows else ""


def lineage_row(run: Found) -> dict[str, str]:
    """Return the lineage's columns for the results of a run of `gsm8k.py`."""
    s, ms = run["settings"], run["ms"]
    return {
        **{"variant": " ".join([title(s["variant"]), *(f"{name}={value}" for name, value in s["fields"])]), "r": str(run["r"] or "-")},
        **{"test": share(run["test"]), "valid": share(run["valid"])},
        **{"params": count(run["params"]), "added MACs/token": count(run["macs_per_token"])},
        "forward / step, ms": f"{ms['forward']['median']:.0f} / {ms['step']['median']:.0f}",
        **{"init, s": f"{run['init_seconds']:.2f}", "peak, GiB": f"{run['peak_bytes'] / 2**30:.2f}"},
    }


def symbolic_table(found: Found) -> str:
    """Write the lineage's columns for every variant on GSM-Symbolic; the most exact first, on templates held out where any is learnt."""
    before = found["results"].get("frozen")
    base = f" The model itself answers {share(before['test'])} and {share(before['valid'])}." if before else ""
    runs = list(found["results"]["variants"].values())
    s, test, valid = runs[0]["settings"], runs[0]["test"]["n"], runs[0]["valid"]["n"]
    words = (
        f"{s['model']}, {s['dtype']}, {s['steps']} steps of {s['rows']} rows; {test} test problems of templates that no training sees, "
        f"{valid} validation problems of the training's templates with other numbers.{base}"
    )
    best, error = max((run["test"]["exact"], run["test"]["error"]) for run in runs)
    first, second = ("valid", "test") if best < 0.05 else ("test", "valid")
    runs.sort(key=lambda run: (-run[first]["exact"], -run[second]["exact"]))
    if best < 0.05:
        words += (
            f" Held-out templates stay out of reach: no variant answers more than {best:.1%} ± {error:.1%} of them, so that only the "
            f"validation tells variants apart."
        )
    lacking = [title(name) for name in found["results"].get("costs", {}) if name not in found["results"]["variants"]]
    absent = f"\n\nCut off before their end: {', '.join(lacking)}." if lacking else ""
    return f"{words}\n\n{table([lineage_row(run) for run in runs])}{absent}"


def demo_table(demo: Found) -> str:
    """Write the demo's outcome: the accuracy of each variant, and the cost of its step."""
    return table(
        [
            {
                **{"variant": title(o["variant"]), "trained": f"{o['trained']:,}", "exact before": f"{o['before']:.1%}"},
                **{"exact after": f"{o['after']:.1%} ± {o['error']:.1%}"},
                **({"all of it, s": f"{o['seconds']:.0f}"} if "seconds" in o else {"step / frozen step": f"{o['ratio']:.2f}"}),
                "init, s": f"{o['init']:.2f}",
            }
            for o in demo["results"]["outcomes"]
        ]
    )
