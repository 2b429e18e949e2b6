"""Runs tests in forks of one process that has imported torch, so that a mutation costs its tests.

Started in the root of a source tree; reads jobs, a line of JSON each, and answers each with one.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401  (what forks need is imported once, here)
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401

from tests.mutation import coverage_map

OUTPUT = Path("build/tests.log")
SECONDS_OF_A_TEST = 120  # in which the slowest takes a few


def main() -> None:
    sys.dont_write_bytecode = True  # a mutation may leave a file's size and second unchanged
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(run(**job)), flush=True)


def run(tests: list[str], profile: str = "few", map_to: str | None = None) -> dict[str, Any]:
    """The first test that fails, or the signal that ended them, or neither."""
    start = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.environ["HYPOTHESIS_PROFILE"] = profile
        _in_the_fork(tests, map_to, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        result = json.loads(pipe.read() or "{}")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if not result:
        result = {"caught": f"signal {os.WTERMSIG(status)}"}
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def _in_the_fork(tests: list[str], map_to: str | None, writing: int) -> None:
    os.setpgid(0, 0)
    log = os.open(OUTPUT, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    _import_from_here()
    first = _FirstFailure()
    plugins: list[Any] = [_Selection(), first]
    if map_to is not None:
        plugins.append(coverage_map.Recorder(Path(map_to)))
    code = pytest.main(["-q", "-p", "no:cacheprovider", *tests], plugins=plugins)
    sys.stdout.flush()
    broken = {2: "tests cannot be collected", 3: "pytest broke", 4: "tests cannot be found"}
    caught = first.test or broken.get(int(code))
    os.write(writing, json.dumps({"caught": caught}).encode())
    os._exit(0)


def _import_from_here() -> None:
    """ipo_ext of this tree, not the one that is installed."""
    sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
    sys.path.insert(0, str(Path("python").resolve()))


class _Selection:
    """Of all tests those that a mutated CPU build can fail, but for what torch compiles: that takes
    longest, and eager tests run the same lines. Other processes would run what is installed."""

    elsewhere = ("emulated", "cuda", "slow")

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        kept = [item for item in items if not self.is_left_out(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    def is_left_out(self, item: pytest.Item) -> bool:
        source = inspect.getsource(getattr(item, "function", type(item)))
        others = any(
            word in source for word in ("torch.compile", "compiled", "spawn", "subprocess")
        )
        return others or any(map(item.get_closest_marker, self.elsewhere))


class _FirstFailure:
    test: str | None = None

    def pytest_runtest_logstart(self) -> None:
        """A test without end ends the process: a loop in a kernel lets no Python run."""
        signal.alarm(SECONDS_OF_A_TEST)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.test is None:
            self.test = report.nodeid


if __name__ == "__main__":
    main()
