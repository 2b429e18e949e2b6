"""Fuzzes every public function against the reference in float64, and prints what is wrong.

`python scripts/fuzz.py --minutes 10 --seed 1 --processes 2` makes random calls (dtypes, shapes,
strides, mask rules, packed sequences, garbage, options, and calls that must be refused) and judges
them. What fails is minimised, printed as a script of its own, and the exit status is 1. Case N of a
seed is the same in every run: `--seed S --case N` runs that one alone. With `--state FILE` cases
add up over runs and seeds, and a seed goes on where its last run stopped. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import queue
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from fuzzing.calls import FUNCTIONS, Call, run  # noqa: E402
from fuzzing.generate import BATCH, calls_of_batch  # noqa: E402
from fuzzing.hostile import SHARE, break_a_rule  # noqa: E402
from fuzzing.judge import judge  # noqa: E402
from fuzzing.minimise import minimised, script_of, verdict_of  # noqa: E402

SAVE_SECONDS = 20.0
LEAST_SHARE = 0.05  # of all cases, of each function


class Failure(NamedTuple):
    function: str
    case: int
    script: str  # empty where one of its kind was printed


class Done(NamedTuple):
    """A batch that was run."""

    function: str
    refused: int  # calls that had to be refused
    failures: list[Failure]


# -------------------------------------------------------------------------------------------------
# One batch


def cases_of_batch(seed: int, batch: int) -> list[Call]:
    """All calls of a batch, some of them broken."""
    choose = random.Random(f"{seed}/{batch}/hostile")
    return [
        break_a_rule(call, choose) if choose.random() < SHARE else call
        for call in calls_of_batch(seed, batch)
    ]


def run_batch(seed: int, batch: int, known: set[str]) -> Done:
    calls = cases_of_batch(seed, batch)
    results = [run(call) for call in calls]
    failures = [
        _failure(call, batch * BATCH + i, verdict, known)
        for i, (call, verdict) in enumerate(zip(calls, judge(calls, results), strict=True))
        if verdict is not None
    ]
    return Done(calls[0].function, sum(call.fault is not None for call in calls), failures)


def _failure(call: Call, case: int, verdict: str, known: set[str]) -> Failure:
    """With a script, unless the same was wrong with the same function before."""
    kind = f"{call.function}: {verdict.split('[')[0].split(':')[0]}"
    if kind in known:
        return Failure(call.function, case, "")
    known.add(kind)
    small = minimised(call)
    script = script_of(small, verdict_of(small) or f"{verdict} (not when run again)")
    return Failure(call.function, case, script)


# -------------------------------------------------------------------------------------------------
# Processes


@contextlib.contextmanager
def backend(name: str) -> Any:
    """Points the Python API at the operators of a backend."""
    if name == "cpu":
        yield
        return
    from tests.support.backends import Backend

    with Backend(name).active():
        yield


def work(options: argparse.Namespace, first: int, at: Any, results: Any) -> None:
    """Runs every ``processes``-th batch from ``first`` on until the time or its parent is over."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of inference log-probabilities in 16 bits
    known: set[str] = set()
    batch = first
    with backend(options.backend):  # which the emulator may have to be built for
        deadline = time.monotonic() + options.minutes * 60
        while time.monotonic() < deadline and (options.batches is None or batch < options.batches):
            if not parent.is_alive():  # killed: nobody counts what is run
                return
            at.value = batch
            results.put((batch, run_batch(options.seed, batch, known)))
            batch += options.processes
    at.value = -1


class Tally:
    """What has been run so far, here and in the runs that the state tells of."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path, self.seed = options.state, str(options.seed)
        before = json.loads(self.path.read_text()) if self.path and self.path.exists() else {}
        self.cases = collections.Counter(before.get("cases", {}))
        self.failures = collections.Counter(before.get("failures", {}))
        self.refused = before.get("refused", 0)
        self.runs = before.get("runs", [])
        self.next = before.get("next", {})
        self.key = f"{options.backend}/{self.seed}"
        self.started, self.here, self.failed_here = time.monotonic(), 0, 0
        self.done: set[int] = set()

    @property
    def first(self) -> int:
        """The first batch that no run has seen."""
        return int(self.next.get(self.key, 0))

    def add(self, batch: int, done: Done) -> None:
        self.cases[done.function] += BATCH
        self.failures[done.function] += len(done.failures)
        self.refused += done.refused
        self.here += BATCH
        self.failed_here += len(done.failures)
        self.done.add(batch)

    @property
    def rate(self) -> float:
        return self.here / max(time.monotonic() - self.started, 1e-9)

    def save(self, end: bool = False) -> None:
        if not self.path:
            return
        after = {**self.next, self.key: max(self.done, default=self.first - 1) + 1}
        runs = [*self.runs, self._run()] if self.here else self.runs
        state = {"cases": self.cases, "failures": self.failures, "refused": self.refused,
                 "next": after, "runs": runs}  # fmt: skip
        scratch = self.path.with_suffix(".writing")
        scratch.write_text(json.dumps(state, indent=1) + "\n")
        scratch.replace(self.path)

    def _run(self) -> dict[str, Any]:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        seconds = round(time.monotonic() - self.started)
        return {"key": self.key, "commit": commit, "cases": self.here, "seconds": seconds}

    def line(self) -> str:
        total = sum(self.cases.values())
        return (
            f"{self.here:,} cases, {self.rate:.0f}/s, {self.failed_here} failures; {total:,} in all"
        )

    def table(self) -> str:
        total = max(sum(self.cases.values()), 1)
        lines = [f"{'function':24}{'cases':>12}{'share':>8}{'failures':>10}"]
        for name in FUNCTIONS:
            share = self.cases[name] / total
            lines.append(f"{name:24}{self.cases[name]:12,}{share:8.1%}{self.failures[name]:10}")
        lines.append(f"{'all':24}{sum(self.cases.values()):12,}{1:8.1%}"
                     f"{sum(self.failures.values()):10}")  # fmt: skip
        lines.append(f"{self.refused:,} of them had to be refused; {self.rate:.0f} cases/s here")
        return "\n".join(lines)


def fuzz(options: argparse.Namespace) -> int:
    tally = Tally(options)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    places = [context.Value("q", -1) for _ in range(options.processes)]
    if options.batches is not None:
        options.batches += tally.first
    workers = [
        context.Process(target=work, args=(options, tally.first + i, place, results))
        for i, place in enumerate(places)
    ]
    for worker in workers:
        worker.start()
    _gather(tally, workers, results)
    crashed = [(w, p.value) for w, p in zip(workers, places, strict=True) if w.exitcode]
    tally.save()
    print(tally.table())
    for worker, batch in crashed:
        print(f"a process ended with status {worker.exitcode} in batch {batch}, one of the cases "
              f"{batch * BATCH} to {batch * BATCH + BATCH - 1}: run each with --case")  # fmt: skip
    return int(bool(tally.failed_here or crashed))


def _gather(tally: Tally, workers: list[Any], results: Any) -> None:
    """Counts and prints until every worker has ended and all that they sent has come."""
    said = saved = time.monotonic()
    while True:
        alive = any(worker.is_alive() for worker in workers)
        with contextlib.suppress(queue.Empty):
            while True:
                batch, done = results.get(timeout=0.5)
                tally.add(batch, done)
                _print_failures(tally, done)
        now = time.monotonic()
        if now - said > (2 if sys.stderr.isatty() else 60):
            end = "\r" if sys.stderr.isatty() else "\n"
            print(tally.line(), file=sys.stderr, end=end, flush=True)
            said = now
        if now - saved > SAVE_SECONDS:
            tally.save()
            saved = now
        if not alive:
            break
    for worker in workers:
        worker.join()


def _print_failures(tally: Tally, done: Done) -> None:
    for failure in done.failures:
        print(f"\n# Case {failure.case} of seed {tally.seed}: {failure.function}")
        print(failure.script or "# As one before.", flush=True)


def run_case(options: argparse.Namespace) -> int:
    """One case alone, with all of its numbers if it fails."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    batch, place = divmod(options.case, BATCH)
    with backend(options.backend):
        call = cases_of_batch(options.seed, batch)[place]
        verdict = verdict_of(call)
        if verdict is None:
            print(f"case {options.case} of seed {options.seed}: nothing is wrong")
            return 0
        small = minimised(call)
        print(script_of(small, verdict_of(small) or verdict))
        return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--backend", choices=("cpu", "emulated"), default="cpu")
    parser.add_argument("--batches", type=int, help=f"at most so many, of {BATCH} cases each")
    parser.add_argument("--case", type=int, help="run this one alone")
    parser.add_argument("--state", type=Path, help="cumulates over runs, as JSON")
    options = parser.parse_args()
    sys.exit(fuzz(options) if options.case is None else run_case(options))


if __name__ == "__main__":
    main()
