"""Tables of results as Markdown: many adapters in one batch, trained and served."""

from common.tables import Found, source, spread, table, title


def members_table(growth: Found, up: str) -> str:
    """Write one mixed step's time over a loop's as members and their rows grow, and from how many members on it pays."""
    r, axes = growth["results"], growth["results"]["axes"]
    at = r["centre"]
    facts = f"a Llama of {r['layers']} layers and width {at['width']}, rank {at['rank']}"
    tokens = r.get("member_tokens", 32)
    parts = [
        f"One mixed step's time over that of as many separate steps, one row of {tokens} tokens a member, on {facts} "
        f"({source(growth, up)}):",
        _grown(axes["members"], "members: {}"),
        f"Each of these is faster than the loop, beyond the spread, from {_pays(axes['members'])} members on.",
    ]
    if "each" in axes:
        parts += [f"{at['members']} members with more rows each:", _grown(axes["each"], "rows each: {}")]
    if "few" in axes:
        parts += ["Members with one row of 16 tokens each:", _grown(axes["few"], "members: {}")]
    return "\n\n".join(parts)


def _grown(lines: Found, head: str) -> str:
    return table(
        [{"variant": title(name)} | {head.format(n): spread(ratio) for n, ratio in points.items()} for name, points in lines.items()]
    )


def _pays(lines: Found) -> str:
    """Return the least value from which on every line stays below 1, spread and all."""
    values = list(next(iter(lines.values())))
    below = [all(points[value]["high"] < 1 for points in lines.values()) for value in values]
    return next((value for k, value in enumerate(values) if all(below[k:])), f"more than {values[-1]}")


def population_threads(speed: Found) -> int:
    """Return the threads on which populations were measured. Files that do not say were written when it was two."""
    return speed["results"].get("population_threads", 2)


def populations_table(speed: Found) -> str:
    """Write the time of many adapters in one mixed batch over a loop's."""
    found = speed["results"]["populations"]
    return table([{"one step, LoRA": name, "time / a loop's": spread(ratio)} for name, ratio in found.items()])


def serving_table(found: Found) -> str:
    """Write the costs of switching, generation and many requests, beside PEFT's."""
    f = found["results"]
    theirs = "PEFT's `set_adapter`"
    rows = []  # of a run that was cut off a part may be lacking
    if "switching" in f:
        what = f"another adapter than in the last call, {f['switching']['targets']} targets, ms"
        rows.append({"": what, "ours": spread(f["switching"]["switch_ms"]), theirs: spread(f["switching"]["peft_switch_ms"])})
    if "generation" in f:
        what = f"generating {f['generation']['tokens']} tokens / PEFT's time"
        rows.append({"": what, "ours": spread(f["generation"]["over_peft"]), theirs: "1"})
    if "arrivals" in f:
        come = f["arrivals"]
        what = f"{come['requests']} requests as they come, {come['each']} a step, {come['tokens']} tokens each, by the loop / PEFT's time"
        rows.append({"": what, "ours": spread(come["over_peft"]), theirs: "1"})
    throughput = f.get("throughput", {"over_peft": {}})
    for name, ratio in throughput["over_peft"].items():
        if not name.startswith("peft"):
            how = f"{throughput['threads']} at once, a thread each" if name == "threads" else name
            what = f"{throughput['requests']} requests for {throughput['adapters']} adapters, {how} / PEFT's time"
            rows.append({"": what, "ours": spread(ratio), theirs: "1"})
    return table(rows)
