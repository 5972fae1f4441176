"""What the benchmarks share: the model, each variant beside PEFT's same method, interleaved timing, peak memory, results files."""

import copy
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import lora_lite as ll

RESULTS = Path(__file__).parent / "results"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = r"(q|k|v|o|gate|up|down)_proj$"


def llama(width: int, layers: int, vocab: int = 512) -> transformers.LlamaForCausalLM:
    """Build a Llama with random frozen weights: width in features, eight heads at most."""
    torch.manual_seed(0)
    heads = min(8, width // 8)
    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3 // 64 * 64 or 2 * width, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(vocab_size=vocab, num_attention_heads=heads, num_key_value_heads=heads, **sizes)
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


def batch_of(rows: int, tokens: int, vocab: int = 512) -> dict[str, torch.Tensor]:
    """Draw a batch of token ids that are their own labels."""
    ids = torch.randint(vocab, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def pairs(r: int) -> dict[str, tuple[ll.AdapterConfig, peft.PeftConfig]]:
    """Pair each variant with PEFT's config of the same method on the same layers."""
    lora = {"r": r, "lora_alpha": r, "target_modules": list(LINEAR)}
    ia3 = {"target_modules": list(LINEAR)}
    return {
        "lora": (ll.LoRAConfig(r=r, alpha=r, target_names=NAMES), peft.LoraConfig(**lora)),
        "dora": (ll.DoRAConfig(r=r, alpha=r, target_names=NAMES), peft.LoraConfig(**lora, use_dora=True)),
        "pissa": (ll.PiSSAConfig(r=r, alpha=r, target_names=NAMES), peft.LoraConfig(**lora, init_lora_weights="pissa")),
        "ia3": (ll.IA3Config(target_names=NAMES), peft.IA3Config(**ia3, feedforward_modules=[])),
        "ia3_ff": (ll.IA3FFConfig(target_names=NAMES), peft.IA3Config(**ia3, feedforward_modules=list(LINEAR))),
    }


def moved(params: dict[str, dict[str, torch.Tensor]], scale: float = 0.01) -> dict[str, dict[str, torch.Tensor]]:
    """Move params off their start, where most variants are the identity."""
    g = torch.Generator().manual_seed(2)
    return {p: {n: t + scale * torch.randn(t.shape, generator=g) for n, t in leaves.items()} for p, leaves in params.items()}


def peft_model(model: torch.nn.Module, config: peft.PeftConfig) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """Give PEFT's model over a copy of the base, and what it trains."""
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    return adapted, [p for p in adapted.parameters() if p.requires_grad]


def steps(model: Any, batch: dict[str, Any], r: int) -> dict[str, Callable[[], Any]]:
    """Give one training step, forward and backward, of the frozen base (to its input), of each variant and of PEFT's."""

    def frozen() -> Any:
        rows = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        loss = model(inputs_embeds=rows, labels=batch["labels"], use_cache=False).loss
        return torch.autograd.grad(loss, rows)

    found: dict[str, Callable[[], Any]] = {"frozen": frozen}
    for name, (cfg, peft_cfg) in pairs(r).items():
        adapt = ll.build(model, cfg)
        params = moved(adapt.init(seed=0))
        step = ll.value_and_grad(lambda p, adapt=adapt: adapt(p, batch).loss)
        found[name] = lambda step=step, params=params: step(params)
        theirs, trained = peft_model(model, peft_cfg)
        found[f"peft {name}"] = lambda m=theirs, t=trained: torch.autograd.grad(m(**batch).loss, t)
    return found


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Time every call in turn, `repeats` rounds: seconds, in order. Rounds drift together, so ratios within one do not."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warmup + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(times: dict[str, list[float]], over: str) -> dict[str, dict[str, float]]:
    """Give each call's ratio to `over`, pair by pair within a round: median, quartiles, and the median time in milliseconds."""
    out = {}
    for name, values in times.items():
        pairwise = sorted(a / b for a, b in zip(values, times[over]))
        low, mid, high = statistics.quantiles(pairwise, n=4)
        out[name] = {"median": mid, "low": low, "high": high, "ms": statistics.median(values) * 1e3, "n": len(values)}
    return out


def peak_bytes(call: Callable[[], Any]) -> int:
    """Give the most bytes that a call held at once beyond what was held before it, from the allocator's own events."""
    call()  # caches that stay are not part of the step
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine(threads: int) -> dict[str, Any]:
    """Name what the figures depend on."""
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, ll)}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    ).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return {"commit": commit, "versions": versions, "cpu": cpu, "threads": threads, "python": platform.python_version()}


def _cpuinfo() -> Iterable[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write(name: str, facts: dict[str, Any], results: dict[str, Any]) -> Path:
    """Write a results file, dated and named by commit."""
    date = datetime.date.today().isoformat()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date}-{facts['commit'] or 'none'}-{name}.json"
    path.write_text(json.dumps({"date": date, **facts, "results": results}, indent=1) + "\n")
    return path
