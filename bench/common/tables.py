"""Results files as Markdown tables, one function a table."""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora_lite as ll

RESULTS = Path(__file__).parents[1] / "results"

Found = dict[str, Any]

NOTHING = "Nothing was measured."
"""The text of a table without rows."""


def newest(kind: str, folder: Path = RESULTS) -> Found | None:
    """Read the newest results file of a kind. None where there is none."""
    return next(by_age(kind, folder), None)


def by_age(kind: str, folder: Path = RESULTS) -> Iterator[Found]:
    """Read the results files of a kind, the newest first: by the day in the name, the moment in the file, the rest of the name."""
    for _, paths in itertools.groupby(sorted(folder.glob(f"*-{kind}.json"), reverse=True), lambda path: path.name[:10]):
        found = [{"file": path.name, "written": "", **json.loads(path.read_text("utf-8"))} for path in paths]
        yield from sorted(found, key=lambda run: (run["written"], run["file"]), reverse=True)


ROWS = ("variants", "costs")
"""The parts of a results file that have a row for each variant."""


def together(kind: str, folder: Path = RESULTS) -> Found | None:
    """Read the newest results file of a kind, and from older ones of the same machine, versions and sizes the rows that it lacks.

    A device that is lent for minutes measures some variants at a time. `files` names all files that rows are from.
    """
    found, *others = [*by_age(kind, folder)] or [None]
    if found is None:
        return None

    def conditions(run: Found) -> list[Any]:
        return [run["machine"], run["versions"], run["threads"], {k: v for k, v in run["results"].items() if not isinstance(v, dict)}]

    found["files"] = [found["file"]]
    for older in others:
        if conditions(older) != conditions(found):
            continue
        more = {key: {**older["results"].get(key, {}), **found["results"][key]} for key in ROWS if key in found["results"]}
        if any(len(rows) > len(found["results"][key]) for key, rows in more.items()):
            found["results"] |= more
            found["files"].append(older["file"])
    return found


def has(found: Found, *keys: str) -> bool:
    """Whether a results file has a figure at these keys."""
    part = found["results"]
    for key in keys:
        if key not in part:
            return False
        part = part[key]
    return True


def title(name: str) -> str:
    """Return a variant's name as it is written in prose: the first words of its module."""
    cls = ll.VARIANTS.get(name)
    doc = sys.modules[cls.__module__].__doc__ if cls else None
    return (doc or name).strip().partition(":")[0]


def table(rows: list[dict[str, str]]) -> str:
    """Lay out rows with the same headings as a Markdown table."""
    if not rows:
        return NOTHING
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(ratio: Found | None) -> str:
    """Write a ratio with what bounds the middle 90 % of its rounds, where the file has that."""
    if not ratio:
        return "-"
    bounds = f" [{ratio['low']:.2f}, {ratio['high']:.2f}]" if "low" in ratio else ""
    return f"{ratio['median']:.2f}{bounds}"


def count(n: float) -> str:
    """Write a number of parameters or operations."""
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.1f}k" if n >= 1e3 else f"{n:.0f}"


def share(found: Found | None) -> str:
    """Write an accuracy with its standard error."""
    return f"{found['exact']:.1%} ± {found['error']:.1%}" if found else "-"


def source(found: Found, up: str, threads: int | None = None) -> str:
    """Write the source of figures: files, machine, threads, which a part of a file may have other than the rest."""
    where, n = found.get("machine", "CPU"), threads or found["threads"]
    links = " and ".join(f"[`{file}`]({up}bench/results/{file})" for file in found.get("files", [found["file"]]))
    return f"{links}, {where}, {n} thread{'s' * (n > 1)}"


def main_table(speed: Found | None, memory: Found | None, quality: Found | None) -> str:
    """Write the lineage's columns for each variant, and the ratios to PEFT's; last the accuracy, of a model of its own."""
    rows = []
    timed = speed["results"]["models"]["variants"] if speed else {}
    held = memory["results"]["variants"] if memory else {}
    learned = quality["results"]["variants"] if quality else {}
    size = count(quality["results"]["full"]["params"]) if quality else ""
    for name, row in timed.items():
        peak, ours = held.get(name, {}).get("step", {}), learned.get(name, {}).get("ours")
        rows.append(
            {
                "variant": title(name),
                "r": str(row["r"] or "-"),
                "params": count(row["params"]),
                "added MACs/token": count(row["macs_per_token"]),
                "forward, ms": f"{row['forward']['ms']['ours']['median']:.0f}",
                "backward, ms": f"{row['step']['ms']['ours']['median'] - row['forward']['ms']['ours']['median']:.0f}",
                "init, s": f"{row['init']['ms']['ours']['median'] / 1e3:.3f}",
                "step / PEFT's": spread(row["step"].get("over_peft")),
                "peak / PEFT's": f"{peak['ours'] / peak['peft']:.2f}" if "peft" in peak else "-",
                **({f"accuracy, {size} model": share(ours), "params there": count(ours["params"]) if ours else "-"} if quality else {}),
            }
        )
    return table(rows)


UNABLE = {
    "loreft": "edits the first and last positions of a prompt, and copying digits across an answer asks for more than a few edited states: "
    "the task is none for it."
}
"""Why a variant does not learn the task of the accuracies, where it does not."""


def conditions(speed: Found | None, memory: Found | None, quality: Found | None, up: str) -> str:
    """Write under which conditions the main table's figures were found: for each group of columns its model, and its file."""
    words = []
    if speed:
        m = speed["results"]["models"]
        rounds = next(iter(m["variants"].values()))["step"]["over_frozen"]["n"]
        processes = f" in {n} processes" if (n := speed.get("processes", 1)) > 1 else ""
        words.append(
            f"Costs: one step of a Llama of {m['layers']} layers and width {m['width']}, all linear layers or what else a variant adapts, "
            f"{m['rows']} rows of {m['tokens']} tokens; init of one block; medians of {rounds} interleaved rounds{processes}, in brackets "
            f"the middle 90 % of the ratios within a round ({source(speed, up)}). "
            "`r` is the rank, or where there is none the block or group size."
        )
    if memory:
        m = memory["results"]
        words.append(
            f"Peaks: one step of a Llama of {m['layers']} layers and width {m['width']}, {m['rows']} rows of {m['tokens']} tokens "
            f"({source(memory, up)})."
        )
    if quality:
        q = quality["results"]
        part, whole = q["variants"].get("full", {}).get("ours"), q["full"]
        beside = f"; the row Full trains {count(part['params'])} of them" if part else ""
        words.append(
            f"Accuracy: the base Llama of {count(whole['params'])} params; `params there` are those trained for it; unseen word problems "
            f"answered exactly after {q['steps']} steps of {q['rows']} rows, mean of {q['members']} seeds ± standard error over seeds and "
            f"{q['test']} problems. The frozen base reaches {q['frozen']['exact']:.1%}, training all of its params {share(whole)}{beside} "
            f"({source(quality, up)})."
        )
        words += [f"{title(n)} {why}" for n, why in UNABLE.items() if q["variants"].get(n, {}).get("ours", {}).get("exact", 1) < 0.1]
    return "\n\n".join(words)


def step_table(speed: Found) -> str:
    """Write each variant's forward and step over the frozen base's, beside arithmetic and PEFT's."""
    rows = []
    for name, row in speed["results"]["models"]["variants"].items():
        cells = {"variant": title(name)}
        for what in ("forward", "step"):
            part = row[what]
            cells |= {
                f"{what} / frozen": spread(part["over_frozen"]),
                f"{what} by arithmetic": f"{part['by_arithmetic']:.2f}",
                f"{what} / PEFT's": spread(part.get("over_peft")),
            }
        checked = row["checked"]
        cells |= {"init / PEFT's": spread(row["init"].get("over_peft"))}
        cells |= {
            "output checked against": f"PEFT's, to {checked['error']:.0e}" if checked["against"] == "peft" else "the base: it differs"
        }
        rows.append(cells)
    return table(rows)


def gpu_table(speed: Found) -> str:
    """Write each variant's step on a GPU over the frozen base's, beside arithmetic and PEFT's."""
    rows = []
    for name, row in speed["results"]["models"]["variants"].items():
        step = row["step"]
        cells = {"variant": title(name), "step / frozen": spread(step["over_frozen"]), "by arithmetic": f"{step['by_arithmetic']:.2f}"}
        rows.append(cells | {"step / PEFT's": spread(step.get("over_peft"))})
    return table(rows)


def memory_table(memory: Found) -> str:
    """Write peaks of forward and step beside the frozen base's and PEFT's."""
    rows = []
    for name, row in memory["results"]["variants"].items():
        cells = {"variant": title(name)}
        for what in ("forward", "step"):
            part = row[what]
            cells |= {f"{what}, MiB": f"{part['ours'] / 2**20:.1f}", f"{what} / frozen": f"{part['ours'] / part['frozen']:.2f}"}
            cells |= {f"{what} / PEFT's": f"{part['ours'] / part['peft']:.2f}" if "peft" in part else "-"}
        rows.append(cells)
    ways = [{"LoRA's step by": name, "peak, MiB": f"{size / 2**20:.1f}"} for name, size in memory["results"].get("lora", {}).items()]
    return f"{table(rows)}\n\n{table(ways)}"


def real_costs_tables(found: Found) -> str:
    """Write the costs on a pretrained model beside the frozen model's and PEFT's: a table for each size of a batch, then the starts."""
    r, parts = found["results"], []
    for size in dict.fromkeys(size for row in r["variants"].values() for size in row["sizes"]):
        rows = []
        for name, row in r["variants"].items():
            costs = row["sizes"].get(size)
            if costs is None:
                continue
            peak = costs["peak"]["step"]
            cells = {"variant": title(name), "step, ms": f"{costs['step']['ms']['ours']['median']:.0f}"}
            cells |= {"step / frozen": spread(costs["step"]["over_frozen"])}
            cells |= {f"{what} / PEFT's": spread(costs[what].get("over_peft")) for what in ("step", "forward", "token")}
            cells |= {"peak / frozen": f"{peak['ours'] / peak['frozen']:.2f}"}
            rows.append(cells | {"peak / PEFT's": f"{peak['ours'] / peak['peft']:.2f}" if "peft" in peak else "-"})
        parts.append(f"{' rows of '.join(size.split('x'))} tokens:\n\n{table(rows)}")
    starts = [
        {
            **{"variant": title(name), "params": count(row["params"]), "init, s": f"{row['init']['ms']['ours']['median'] / 1e3:.2f}"},
            "init / PEFT's": spread(row["init"].get("over_peft")),
        }
        for name, row in r["variants"].items()
    ]
    return "\n\n".join([f"{r['model']}, r={r['r']} for LoRA.", *parts, "`build` and `init` on the whole model:", table(starts)])


def calls_tables(found: Found) -> str:
    """Write the price of a call on a chain of narrow layers beside PEFT's, and the bare products', then that of a start."""
    chain, starts = found["results"]["chain"], found["results"]["starts"]
    rows = []
    for name, row in chain["variants"].items():
        cells = {"variant": title(name)}
        for what in ("forward", "step"):
            us = row[what]["us"]
            cells |= {
                f"{what}, us a layer: ours / PEFT's": f"{us['ours']['median']:.1f} / {us['peft']['median']:.1f}",
                f"{what} / PEFT's": spread(row[what]["over_peft"]),
            }
        rows.append(cells)
    words = [f"On {chain['layers']} layers of width {chain['width']} with {chain['rows']} rows, r={chain['r']}:", table(rows)]
    if "lora" in chain["variants"]:
        lora = chain["variants"]["lora"]
        base, two, three = (lora["forward"]["us"][key]["median"] for key in ("base", "two products", "three products"))
        words.append(
            f"The base's own call takes {base:.1f} us a layer, LoRA's two bare products with the fused add {two:.1f}, "
            f"all three {three:.1f}. "
            f"LoRA's forward adds {spread(lora['added'])} of its two products' time to the base's."
        )
    begun = [{"variant": title(n), "start / PEFT's": spread(row["over_peft"])} for n, row in starts["variants"].items()]
    begins = f"`build` and `init` over `get_peft_model`, on a Llama of {starts['layers']} layers of width {starts['width']}:"
    return "\n\n".join([*words, begins, table(begun)])


def functions_table(speed: Found) -> str:
    """Write the pure functions' ratios on bare tensors."""
    found = speed["results"]["functions"]
    heads = {"forward": "forward / W x", "grad": "grad / its grad", "vmap": "vmap / loop", "vmap of grad": "vmap of grad / loop"}
    kept = {n: row for n, row in found["variants"].items() if "left_out" not in row}
    return table([{"variant": title(n)} | {head: spread(row[key]) for key, head in heads.items()} for n, row in kept.items()])


def compiled_table(found: Found) -> str:
    """Write the compiled steps' ratios, from a file of their own, or of a speed file that has some."""
    heads = {"over_frozen": "step / compiled frozen step", "over_peft": "step / PEFT's compiled", "over_eager": "step / ours in eager mode"}
    more = {
        ("value_and_grad", "over_frozen"): "`value_and_grad` / compiled frozen step",
        ("mixed", "over_frozen"): "mixed step / compiled frozen step",
        ("mixed", "over_eager"): "mixed step / ours in eager mode",
    }
    kept = found["results"].get("compiled", found["results"]).get("variants", {})
    shown = more if any(what in row for row in kept.values() for what, _ in more) else {}
    rows = []
    for name, row in kept.items():
        cells = {head: spread(row.get(key)) for key, head in heads.items()}
        cells |= {head: spread(row.get(what, {}).get(key)) for (what, key), head in shown.items()}
        seconds = sum(row.get("compile_seconds", {}).get(what, 0.0) for what in ("ours", *dict.fromkeys(what for what, _ in shown)))
        rows.append({"variant": title(name), **cells, **({"compilation of ours, s": f"{seconds:.0f}"} if shown else {})})
    return table(rows)


def svd_starts_table(found: Found) -> str:
    """Write the time of starts from an SVD over the whole decomposition's and PEFT's, with the largest bound on their error."""
    rows = []
    for words, row in found["results"]["weights"].items():
        cells = {"weights": words, "layers": f"{row['layers']}", "of them whole": f"{row['exact']}"}
        cells |= {"start, s": f"{row['ms']['ours']['median'] / 1e3:.2f}", "/ whole decomposition": spread(row["over_exact"])}
        cells |= {f"/ PEFT's {n} iterations": spread(row[f"over_peft {n}"]) for n in (16, 4)}
        rows.append(cells | {"bound on the error": "-" if row["bound"] is None else f"{row['bound']:.1e}"})
    return table(rows)


def quantised_table(found: Found) -> str:
    """Write LoRA's step on quantised bases over the frozen base's and PEFT's, in time and in peak memory."""
    rows = []
    for bits, f in found["results"].items():
        held = f["peak_bytes"]
        rows.append(
            {
                **{"base": bits, "step / frozen": spread(f["over_frozen"]["lora"]), "step / PEFT's": spread(f["over_peft"])},
                **{"peak, MiB": f"{held['lora'] / 2**20:.1f}", "peak / PEFT's": f"{held['lora'] / held['peft lora']:.2f}"},
            }
        )
    return table(rows)


def versions_table(found: Found) -> str:
    """Write each variant's forward, step and peak over the other version's."""
    rows, calls = found["results"]["variants"].items(), ("forward", "step")
    cells = [{"variant": title(name)} | {call: spread(row[call]) for call in calls} | {"peak": f"{row['peak']:.2f}"} for name, row in rows]
    slower = [title(name) for name, row in rows if any(row[call]["low"] > 1 for call in calls) or row["peak"] > 1.005]
    other = found["results"]["other"]
    head = f"Version {found['versions']['lora_lite']} at commit {found['commit']} over version {other['version']} at {other['commit']}:"
    end = f"Slower or larger beyond the spread: {', '.join(slower)}." if slower else "None is slower or larger beyond the spread."
    return f"{head}\n\n{table(cells)}\n\n{end}"


def agreement_table(found: Found) -> str:
    """Write on how many figures two runs agree, and the figures on which they do not."""
    kinds = found["results"]
    rows = [{"measured": kind, "figures": str(f["figures"]), "agree": str(f["figures"] - len(f["apart"]))} for kind, f in kinds.items()]
    apart = [f"- {kind}{line}" for kind, f in kinds.items() for line in f["apart"]]
    return "\n\n".join([table(rows), *(["Apart:", "\n".join(apart)] if apart else [])])
