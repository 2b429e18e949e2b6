"""Breaks the Python layer and what the CPU runs of csrc, one standard mutation at a time in a
scratch copy, and runs the tests that cover the place.

`python -m tests.mutation` goes on where it was stopped: results are appended to --state, and a
mutation that is there, at an unchanged place, is not run again. A few parameters of each test that
covers the place are run, the quickest first; with --again all of them, on what has survived or was
not covered. Exits 1 if fewer than 95% of the mutations are caught, those listed in
equivalents.json aside.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.mutation import library, of_cpp, of_python
from tests.mutation.coverage_map import function_of
from tests.mutation.mutant import Mutant
from tests.support import building
from tests.support.building import ROOT

COPIED = ("csrc", "python", "tests")
TESTED = ("tests/loss", "tests/api", "tests/pytorch", "tests/integrations/test_prime_rl.py")
# They start other processes, or compile for themselves: they run what is installed, not a scratch.
NOT_TESTED = (
    *("tests/api/test_demo.py", "tests/pytorch/test_host_casts.py"),
    *("tests/pytorch/test_metrics_in_hosts.py", "tests/pytorch/test_compile.py"),
    *("tests/pytorch/test_training.py", "tests/pytorch/test_tracers.py"),
    *("tests/loss/test_exponential.py", "tests/loss/test_large_index.py"),
)
EQUIVALENTS = Path(__file__).parent / "equivalents.json"
GOAL = 0.95


# Of each group so many are run: what its files are, and what is left out as not run on this host.
GROUPS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "python": (
        100,
        ("python/ipo_ext/**/*.py",),
        ("ipo_ext/demo/", "integrations/trl.py", "integrations/verl.py", "__main__.py"),
    ),
    "kernels": (50, ("csrc/kernels/cpu/*", "csrc/kernels/*.h"), ("dispatch.h",)),
    "ops": (25, ("csrc/ops/*",), ("schemas.h",)),
    "math": (25, ("csrc/math/*",), ()),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=ROOT / "build/mutation/results.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--group", choices=GROUPS, action="append")
    parser.add_argument(
        "--again",
        action="store_true",
        help="run what was not caught once more, on all parameters of its tests",
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    asked = parser.parse_args()
    asked.state = asked.state.resolve()  # commands run elsewhere
    asked.state.parent.mkdir(parents=True, exist_ok=True)
    with Run(asked) as run:
        if not asked.report:
            run.go()
        return run.report()


class Run:
    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.results = read_results(asked.state)
        self.deadline = time.monotonic() + 60 * asked.minutes
        self.folder = asked.state.with_name("trees")
        self.trees: queue.Queue[Tree] = queue.Queue()
        self.chosen = {name: choose(name, asked.seed) for name in asked.group or GROUPS}

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        while not self.trees.empty():
            self.trees.get().close()

    def go(self) -> None:
        self.covered = Covered(self.map_file())
        for number in range(self.asked.workers):
            self.trees.put(Tree(self.folder / str(number)))
            self.check_that_tests_are_there(self.trees.queue[-1])
        with concurrent.futures.ThreadPoolExecutor(self.asked.workers) as pool:
            list(pool.map(self.run_group_member, interleaved(self.chosen, self.results, self)))

    def check_that_tests_are_there(self, tree: Tree) -> None:
        if wrong := tree.run_tests(["--collect-only", *self.covered.seconds])["caught"]:
            raise RuntimeError(f"{wrong}: delete coverage.json beside the state and start again")

    def map_file(self) -> Path:
        """Made once and kept beside the state."""
        path = self.asked.state.with_name("coverage.json")
        if not path.exists():
            say("which tests cover what: one run of a few parameters of each")
            tree = Tree(self.folder / "map")
            tree.install(library.build_library(tree.root, library.TRACE, [library.TRACER]))
            tests = [*TESTED, *(f"--ignore={name}" for name in NOT_TESTED)]
            tests.append("--continue-on-collection-errors")
            answer = tree.run_tests(tests, map_to=str(path))
            shutil.copy(tree.root / "build/tests.log", path.with_name("coverage.log"))
            tree.close()
            if not path.exists():
                raise RuntimeError(f"no coverage: {answer}; see coverage.log beside the state")
        return path

    def run_group_member(self, member: tuple[str, Mutant]) -> None:
        group, mutant = member
        if time.monotonic() > self.deadline:
            return
        tree = self.trees.get()
        try:
            start = time.monotonic()
            verdict = self.outcome(tree, mutant)
        finally:
            self.trees.put(tree)
        result = {
            "key": mutant.key,
            "group": group,
            "mutant": str(mutant),
            "text": mutant.text,
            **verdict,
            "seconds": round(time.monotonic() - start),
        }
        self.results[mutant.key] = result
        with self.asked.state.open("a") as file:
            file.write(json.dumps(result) + "\n")
        done = Counter(r["verdict"] for r in self.results.values() if r["group"] == group)
        say(
            f"{group} {dict(done)}: {mutant}: {verdict['verdict']} {verdict.get('by', '')} "
            f"({result['seconds']} s)"
        )

    def outcome(self, tree: Tree, mutant: Mutant) -> dict[str, Any]:
        few, all_of_them = self.covered.tests_of(mutant)
        if not few:
            return {"verdict": "not covered"}
        with tree.mutated(mutant) as error:
            if error:
                return {"verdict": "does not compile"}
            profile = "ci" if self.asked.again else "few"
            tests = all_of_them if self.asked.again else few
            caught = tree.run_tests(["-x", *tests], profile)["caught"]
        return {"verdict": "caught", "by": caught} if caught else {"verdict": "survived"}

    def report(self) -> int:
        equivalents = {entry["key"] for entry in json.loads(EQUIVALENTS.read_text())}
        caught = total = 0
        for group, (quota, _, _) in GROUPS.items():
            rows = [r for r in self.results.values() if r["group"] == group]
            counts = Counter(
                "equivalent" if r["key"] in equivalents and is_missed(r) else r["verdict"]
                for r in rows
            )
            valid = len(rows) - counts["does not compile"] - counts["equivalent"]
            caught, total = caught + counts["caught"], total + valid
            say(f"{group}: {dict(counts)} of {quota} planned")
            for r in rows:
                if is_missed(r) and r["key"] not in equivalents:
                    say(f"  {r['key']} {r['verdict']}: {r['mutant']}")
        share = caught / max(total, 1)
        say(f"caught {caught} of {total}, equivalents aside: {share:.1%}")
        return 0 if share >= GOAL else 1


# -------------------------------------------------------------------------------------------------
# Which mutations


def choose(group: str, seed: int) -> list[Mutant]:
    """Every mutation of a group, in the seed's order, in which the operators take turns."""
    _, patterns, left_out = GROUPS[group]
    by_operator: dict[str, list[Mutant]] = defaultdict(list)
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            file = str(path.relative_to(ROOT))
            if any(part in file for part in left_out):
                continue
            mutants_of = of_python.mutants_of if path.suffix == ".py" else of_cpp.mutants_of
            for mutant in mutants_of(file, path.read_text()):
                by_operator[mutant.operator].append(mutant)
    for operator, mutants in sorted(by_operator.items()):
        random.Random(f"{seed} {operator}").shuffle(mutants)
    longest = max(map(len, by_operator.values()))
    turns = [m[turn] for turn in range(longest) for m in by_operator.values() if turn < len(m)]
    return list({mutant.key: mutant for mutant in turns}.values())


def interleaved(
    chosen: dict[str, list[Mutant]], results: dict[str, Any], run: Run
) -> Iterator[tuple[str, Mutant]]:
    """Of each group in turn what is still to be run, until its quota has been met."""
    if run.asked.again:
        chosen = {
            name: [m for m in mutants if m.key in results] for name, mutants in chosen.items()
        }
    waiting = {name: iter(mutants) for name, mutants in chosen.items()}
    begun: dict[str, set[str]] = defaultdict(set)
    keys = {name: {m.key for m in mutants} for name, mutants in chosen.items()}
    while waiting:
        for name in list(waiting):
            failed = ("does not compile",)
            met = sum(
                results[key]["verdict"] not in failed if key in results else key in begun[name]
                for key in keys[name] & (begun[name] | results.keys())
            )
            if met >= GROUPS[name][0] and not run.asked.again:
                del waiting[name]
                continue
            for mutant in waiting[name]:
                known = results.get(mutant.key)
                if is_missed(known) if known and run.asked.again else known is None:
                    begun[name].add(mutant.key)
                    yield name, mutant
                    break
            else:
                del waiting[name]


def is_missed(result: dict[str, Any]) -> bool:
    return result["verdict"] in ("survived", "not covered")


def read_results(state: Path) -> dict[str, Any]:
    lines = state.read_text().splitlines() if state.exists() else []
    return {result["key"]: result for result in map(json.loads, lines)}


class Covered:
    """Which tests run a mutation's place: its lines in Python, its function in C++."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text())
        self.seconds: dict[str, float] = content["tests"]
        self.lines = {
            file: {int(line): tests for line, tests in lines.items()}
            for file, lines in content["lines"].items()
        }

    def tests_of(self, mutant: Mutant) -> tuple[list[str], list[str]]:
        """A few parameters of each, the quickest first; all parameters."""
        lines = self.lines.get(mutant.file, {})
        if mutant.file.endswith(".py"):
            covering = self.of_python(lines, mutant)
        else:
            before = [line for line in lines if line <= mutant.line]
            covering = set(lines[max(before)]) if before else set()
        few = sorted(covering, key=lambda test: (self.seconds[test], test))
        return few, list(dict.fromkeys(map(function_of, few)))

    def of_python(self, lines: dict[int, list[str]], mutant: Mutant) -> set[str]:
        covering = {
            test
            for line in range(mutant.statement, mutant.line + 1)
            for test in lines.get(line, [])
        }
        if covering or mutant.line not in lines:
            return covering
        return {test for tests in lines.values() for test in tests}  # runs on import


# -------------------------------------------------------------------------------------------------
# A scratch copy


class Tree:
    """A copy of the sources that has a worker of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "build").mkdir(parents=True, exist_ok=True)  # what is compiled in it is kept
        for name in COPIED:
            shutil.rmtree(root / name, ignore_errors=True)
            shutil.copytree(
                ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
            )
        shutil.copy(ROOT / "pyproject.toml", root)
        self.sound = library.build_library(root)
        self.install(self.sound)
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "tests.mutation.worker"],
            cwd=root,
            env={
                **os.environ,
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONUNBUFFERED": "1",
                "CXX": "false",  # a test that compiles for itself runs none of the library
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def install(self, built: Path) -> None:
        target = self.root / "python/ipo_ext" / built.name
        target.unlink(missing_ok=True)  # a new file: the old one may be mapped
        shutil.copy(built, target)

    def run_tests(
        self, tests: list[str], profile: str = "few", map_to: str | None = None
    ) -> dict[str, Any]:
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        job = {"tests": tests, "profile": profile, "map_to": map_to}
        self.worker.stdin.write(json.dumps(job) + "\n")
        self.worker.stdin.flush()
        return json.loads(self.worker.stdout.readline())

    @contextlib.contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[str | None]:
        """The tree with the mutant in; gives the compiler's words if it refuses it."""
        path = self.root / mutant.file
        original = path.read_text()
        mutant.apply(self.root)
        error = None
        try:
            if path.suffix != ".py":
                try:
                    self.install(library.build_library(self.root))
                except building.BuildError as refusal:
                    error = str(refusal)
            yield error
        finally:
            path.write_text(original)
            if path.suffix != ".py":
                self.install(self.sound)

    def close(self) -> None:
        assert self.worker.stdin is not None
        self.worker.stdin.close()
        self.worker.wait()


def say(text: str) -> None:
    print(f"[mutation] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
