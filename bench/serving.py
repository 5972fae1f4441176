"""Measure serving beside PEFT: switching adapters between calls, many adapters over one base, and generation; write a results file.

One run, interleaved rounds: ratios and differences within a round are compared, never times of different runs. Every timed result is
checked first: the ways of serving must give the same answers, and both libraries the same tokens.

    python bench/serving.py            # the sizes of the documentation
    python bench/serving.py --quick    # a minute
"""

import argparse
import runpy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import torch

import lora_lite as ll
from common.contenders import peft_model
from common.measure import Job, Part, Spread, batch_of, interleaved, llama, milliseconds, moved, ratios, run, spread
from common.methods import pairs

ADAPTERS = 8
SIZES = {"quick": (128, 2, 10, 16, 16), "full": (512, 4, 43, 32, 32)}
"""Width, blocks, blocks where adapters are switched, tokens to generate, requests."""
LOOP = Path(__file__).parent.parent / "docs" / "examples" / "request_loop.py"


def served(model: Any, r: int, adapters: int) -> tuple[ll.Adapt, list[Any], Any]:
    """Build both libraries on one model: an `Adapt`, its trees, and PEFT's model with adapters `"0"`, `"1"`, ... of the same values."""
    pair = pairs(r)["lora"]
    adapt = ll.build(model, pair.cfg).eval()
    trees = [moved(adapt.init(seed=k)) for k in range(adapters)]
    theirs, _ = peft_model(model, pair.peft)
    for k in range(adapters):
        theirs.add_adapter(str(k), pair.peft)
        for path, leaves in trees[k].items():
            layer = theirs.base_model.model.get_submodule(path)
            layer.lora_A[str(k)].weight.data.copy_(leaves["A"])
            layer.lora_B[str(k)].weight.data.copy_(leaves["B"])
    return adapt, trees, theirs.eval()


def differences(times: dict[str, list[float]], of: str, over: str) -> Spread:
    """Return how much longer one call takes than another, pair by pair within a round, in milliseconds."""
    return milliseconds([a - b for a, b in zip(times[of], times[over])])


@torch.inference_mode()
def switching(layers: int, repeats: int) -> dict[str, Any]:
    """Time a call with another adapter than the last one's, beside a call with the same one, on a tiny and deep model."""
    model, batch = llama(16, layers, vocab=64).eval(), batch_of(1, 2, vocab=64)
    adapt, trees, theirs = served(model, r=4, adapters=2)
    theirs.set_adapter("0")
    turn = count()

    def switch() -> Any:
        return adapt(trees[next(turn) % 2], batch)

    def peft_switch() -> Any:
        theirs.set_adapter(str(next(turn) % 2))
        return theirs(**batch)

    calls = {"same": lambda: adapt(trees[0], batch), "switch": switch, "peft same": lambda: theirs(**batch), "peft switch": peft_switch}
    times = interleaved(calls, repeats)
    return {
        "targets": len(adapt.targets),
        "switch_ms": differences(times, "switch", "same"),
        "peft_switch_ms": differences(times, "peft switch", "peft same"),
        "over_peft": ratios(times, "peft switch")["switch"],
    }


@torch.inference_mode()
def throughput(width: int, layers: int, requests: int, tokens: int, threads: int, repeats: int) -> dict[str, Any]:
    """Time a queue of requests, each with its adapter: one by one, in threads, as one mixed batch, and by PEFT's `set_adapter`."""
    model = llama(width, layers).eval()
    adapt, trees, theirs = served(model, r=16, adapters=ADAPTERS)
    ids = batch_of(requests, tokens)["input_ids"]
    index, stacked = [k % ADAPTERS for k in range(requests)], ll.stack(trees)

    @torch.inference_mode()
    def one(k: int) -> torch.Tensor:
        return adapt(trees[index[k]], {"input_ids": ids[k : k + 1], "use_cache": False}).logits

    def by_peft() -> torch.Tensor:
        answers = []
        for k in range(requests):
            theirs.set_adapter(str(index[k]))
            answers.append(theirs(input_ids=ids[k : k + 1], use_cache=False).logits)
        return torch.cat(answers)

    with ThreadPoolExecutor(threads) as pool:
        calls: dict[str, Callable[[], torch.Tensor]] = {
            "one by one": lambda: torch.cat([one(k) for k in range(requests)]),
            "threads": lambda: torch.cat(list(pool.map(one, range(requests)))),
            "mixed": lambda: adapt.mixed(stacked, {"input_ids": ids, "use_cache": False}, index).logits,
            "peft set_adapter": by_peft,
        }
        _agree(calls)
        times = interleaved(calls, repeats)
    per_second = {name: spread([requests / seconds for seconds in values]) for name, values in times.items()}
    sizes = {"width": width, "layers": layers, "requests": requests, "tokens": tokens, "adapters": ADAPTERS, "threads": threads}
    return {**sizes, "requests_per_second": per_second, "over_peft": ratios(times, "peft set_adapter")}


def _agree(calls: dict[str, Callable[[], torch.Tensor]]) -> None:
    answers = {name: call() for name, call in calls.items()}
    want = answers["one by one"]
    for name, answer in answers.items():
        error = float((answer - want).abs().max() / want.abs().max())
        if error > 1e-4:
            raise SystemExit(f"serving: expected every way to give the same answers, found {name} {error:.1e} off.")


@torch.inference_mode()
def generation(width: int, layers: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Time greedy generation with the module, with the frozen model and with PEFT's."""
    model = llama(width, layers).eval()
    adapt, trees, theirs = served(model, r=16, adapters=1)
    theirs.set_adapter("0")
    module, prompt = adapt.module(trees[0]), batch_of(1, 16)["input_ids"]
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    calls = {
        "module": lambda: module.generate(input_ids=prompt, **settings),
        "peft": lambda: theirs.generate(input_ids=prompt, **settings),
        "frozen": lambda: model.generate(input_ids=prompt, **settings),
    }
    if not torch.equal(calls["module"](), calls["peft"]()):
        raise SystemExit("serving: expected both libraries to generate the same tokens, found others.")
    times = interleaved(calls, repeats)
    sizes = {"width": width, "layers": layers, "tokens": tokens}
    return {**sizes, "over_peft": ratios(times, "peft")["module"], "over_frozen": ratios(times, "frozen")["module"]}


@torch.inference_mode()
def arrivals(width: int, layers: int, requests: int, tokens: int, repeats: int, each: int = 2, rows: int = 16) -> dict[str, Any]:
    """Time a queue that grows while it is worked off, `each` requests a step: the documentation's loop, and PEFT's `set_adapter`.

    Both must make the same tokens in float64: in float32 on a GPU a batch's rounding can choose another of two tokens that are near.
    """
    ids = batch_of(requests, 32)["input_ids"]
    prompts = [row[: 8 + k % 9] for k, row in enumerate(ids)]
    exact = _ways(llama(width, layers).double().eval(), prompts, tokens, each, rows)
    if others := [k for k, (a, b) in enumerate(zip(exact["loop"](), exact["peft set_adapter"](), strict=True)) if a != b]:
        raise SystemExit(
            f"serving: expected the loop to make PEFT's tokens, found others for {len(others)} of {requests} requests: {others}."
        )
    times = interleaved(_ways(llama(width, layers).eval(), prompts, tokens, each, rows), repeats)
    per_second = {name: spread([requests * tokens / seconds for seconds in values]) for name, values in times.items()}
    sizes = {"width": width, "layers": layers, "requests": requests, "tokens": tokens, "adapters": ADAPTERS, "each": each, "rows": rows}
    return {**sizes, "tokens_per_second": per_second, "over_peft": ratios(times, "peft set_adapter")["loop"]}


def _ways(model: Any, prompts: Sequence[torch.Tensor], tokens: int, each: int, rows: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Return the two ways to work off a queue of prompts; each returns the tokens that it made."""
    adapt, trees, theirs = served(model, r=16, adapters=ADAPTERS)
    recipe, stacked = runpy.run_path(str(LOOP)), ll.stack(trees)

    def loop() -> list[list[int]]:
        worker = recipe["Loop"](adapt, stacked, rows=rows)
        asked = [recipe["Request"](k % ADAPTERS, prompt, tokens) for k, prompt in enumerate(prompts)]
        coming, done = list(asked), 0
        while done < len(asked):
            worker.waiting.extend(coming[:each])
            del coming[:each]
            done += len(worker.step())
        return [request.made for request in asked]

    def by_peft() -> list[list[int]]:
        made = []
        for k, prompt in enumerate(prompts):
            theirs.set_adapter(str(k % ADAPTERS))
            settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            made.append(theirs.generate(input_ids=prompt[None], **settings)[0, len(prompt) :].tolist())
        return made

    return {"loop": loop, "peft set_adapter": by_peft}


def measure(width: int, layers: int, deep: int, tokens: int, requests: int, repeats: int) -> dict[str, Any]:
    """Do all measurements once, in this process."""
    torch.set_num_threads(1)
    return {name: one() for name, one in measurements(width, layers, deep, tokens, requests, repeats).items()}


def measurements(width: int, layers: int, deep: int, tokens: int, requests: int, repeats: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return each measurement by its name; `deep` is how many blocks the model has whose adapters are switched."""
    return {
        "switching": lambda: switching(deep, 2 * repeats),
        "generation": lambda: generation(width, layers, tokens, repeats),
        "arrivals": lambda: arrivals(width, layers, requests, tokens=tokens, repeats=max(3, repeats // 2)),
        "throughput": lambda: throughput(width, layers, requests, tokens=16, threads=2, repeats=max(4, repeats // 2)),
    }


def part(options: Sequence[str] | None = None) -> Part:
    """Read the options, the command line's if not given, and say what is to be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions of small sizes")
    parser.add_argument("--repeats", type=int, default=6, help="rounds of each measurement in each process")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes")
    o = parser.parse_args(options)
    sizes = SIZES["quick" if o.quick else "full"]
    return Part("serving", [Job(measure, (*sizes, 5 if o.quick else o.repeats), 1 if o.quick else o.processes)], show, o.quick)


def show(results: Mapping[str, Any]) -> None:
    """Print the cost of switching, the rates and the ratio of generation."""
    print(f"switching {results['switching']['targets']} targets, in ms beyond the call:")
    for name, took in (("adapt", results["switching"]["switch_ms"]), ("PEFT's set_adapter", results["switching"]["peft_switch_ms"])):
        print(f"  {took['median']:.3f} [{took['low']:.3f}, {took['high']:.3f}]  {name}")
    for name, rate in results["throughput"]["requests_per_second"].items():
        print(f"{rate['median']:8.1f} requests/s  {name}")
    for name, rate in results["arrivals"]["tokens_per_second"].items():
        print(f"{rate['median']:8.1f} tokens/s    {name}, requests as they come")
    beside = results["generation"]["over_peft"]
    print(f"generate: {beside['median']:.3f} [{beside['low']:.3f}, {beside['high']:.3f}] of PEFT's time")


if __name__ == "__main__":
    run([part()])
