"""Time this version's steps beside another version's: has any variant become slower or larger? Write a results file.

Each version is loaded by a process of its own. The two take turns, one call each, so that a drift of the machine strikes both, and are
compared within each round.

    git worktree add ../before v0.1.0
    python bench/versions.py ../before/src                     # every variant that both have
    python bench/versions.py ../before/src --variants lora dora --rounds 40
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import lora_lite as ll
from common.measure import batch_of, commit_of, llama, machine, moved, peak_bytes, ratio, seconds, settled, write

HERE = Path(__file__).resolve()
SRC = HERE.parents[1] / "src"
FIELDS: dict[str, dict[str, Any]] = {"full": {"target_names": r"down_proj$"}, "c3a": {"block_size": 64}}
"""The fields of the configs that have no use without any, or none on this model."""
SKIPPED = {"loftq": "needs the weights from before quantisation", "tokens": "needs the numbers of tokens"}
CALLS = ("forward", "step")


class Version:
    """A version of the library in a process of its own, which answers one line for each that it is given."""

    def __init__(self, src: Path) -> None:
        self.src = src
        paths = [str(src), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        words = [sys.executable, str(HERE), str(src), "--serve"]
        self.process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.to, self.back = self.process.stdin, self.process.stdout

    def ask(self, *words: Any) -> Any:
        """Return the answer to a question.

        Raises:
            RuntimeError: where the process has ended or could not answer.
        """
        print(json.dumps(words), file=self.to, flush=True)
        answer = json.loads(self.back.readline() or '{"failed": "the process has ended"}')
        if isinstance(answer, dict) and "failed" in answer:
            raise RuntimeError(f"{self.src}: {answer['failed']}")
        return answer

    def end(self) -> None:
        """Let the process end."""
        self.to.close()
        self.process.wait()
        self.back.close()


def serve() -> dict[str, Any]:
    """Answer the questions on standard input until it ends: the variants, and for one its times and its peak."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    model, batch, calls = llama(512, 2), batch_of(2, 64), dict[str, dict[str, Callable[[], Any]]]()

    def made(name: str) -> dict[str, Callable[[], Any]]:
        cfg = ll.VARIANTS[name](**FIELDS.get(name, {}))
        adapt = ll.build(model, cfg, calibration=[batch] if cfg.calibrated else None, progress=False)
        params = moved(adapt.init(seed=0))
        step = ll.value_and_grad(lambda p: adapt(p, batch).loss)
        return {"forward": torch.no_grad()(lambda: adapt(params, batch)), "step": lambda: step(params)}

    def answer(what: str, *words: str) -> Any:
        if what == "version":
            return ll.__version__
        if what == "variants":
            return [name for name in ll.VARIANTS if name not in SKIPPED]
        [name] = words
        if name not in calls:
            calls.clear()
            calls[name] = made(name)
        return peak_bytes(calls[name]["step"]) if what == "peak" else seconds(calls[name][what], torch.device("cpu"))

    for line in sys.stdin:
        try:
            said = answer(*json.loads(line))
        except Exception as e:  # the other version, and the next variant, go on
            said = {"failed": f"{type(e).__name__}: {e}"}
        print(json.dumps(said), file=answers, flush=True)
    return {}


def compare(new: Version, old: Version, name: str, rounds: int) -> dict[str, Any]:
    """Return a variant's times and peaks in the new version over those in the old one."""
    both, found = {"new": new, "old": old}, dict[str, Any]()
    for what in CALLS:
        times: dict[str, list[float]] = {key: [] for key in both}
        for turn in range(rounds + 2):
            for key in (*both,) if turn % 2 else (*both,)[::-1]:
                took = both[key].ask(what, name)
                times[key] += [took] if turn >= 2 else []
        found[what] = ratio(times, "new", "old")
    peaks = {key: version.ask("peak", name) for key, version in both.items()}
    return {**found, "peak": peaks["new"] / peaks["old"]}


def compare_all(new: Version, old: Version, names: Sequence[str], rounds: int) -> tuple[dict[str, Any], list[str]]:
    """Compare each variant and print a line on it; return what was found, and the names of those that a version could not run."""
    found, failed = dict[str, Any](), []
    for name in tqdm(names, desc="versions", mininterval=5):
        try:
            found[name] = compare(new, old, name, rounds)
        except RuntimeError as e:  # the others go on
            failed.append(name)
            tqdm.write(f"{name:12} failed: {e}")
        else:
            tqdm.write(show(name, found[name]))
    return found, failed


def show(name: str, found: Mapping[str, Any]) -> str:
    """Return a line on a variant."""
    ratios = (f"{what} {found[what]['median']:.2f} [{found[what]['low']:.2f}, {found[what]['high']:.2f}]" for what in CALLS)
    return f"{name:12} {', '.join(ratios)}, peak {found['peak']:.2f}"


def main() -> None:
    """Compare the versions, print a line for each variant, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the folder of the other version's package, such as ../before/src")
    parser.add_argument("--variants", nargs="+", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that all works, measures nothing")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.serve:
        settled(serve)
        return
    if not (o.other / "lora_lite" / "__init__.py").is_file():
        parser.error(f"{o.other}: expected a folder with the package lora_lite, found none. Give the src folder of the other version.")
    new, old = Version(SRC), Version(o.other.resolve())
    shared = [name for name in new.ask("variants") if name in old.ask("variants")]
    unknown = sorted({*(o.variants or ())} - {*shared})
    if unknown:
        parser.error(f"--variants: expected names that both versions have, found {', '.join(unknown)}. They have {', '.join(shared)}.")
    found, failed = compare_all(new, old, o.variants or shared, 2 if o.quick else o.rounds)
    other = {"version": old.ask("version"), "commit": commit_of(o.other, ".")}
    new.end()
    old.end()
    write("versions", machine(1), {"other": other, "skipped": SKIPPED, "variants": found}, o.quick)
    if failed:
        raise SystemExit(f"versions: {len(failed)} of {len(found) + len(failed)} variants failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
