"""Which tests run which code: for Python by lines (coverage.py's contexts), for C++ by functions (a
library compiled with ``library.TRACE``). Of a test's parameters a seeded few stand for all."""

from __future__ import annotations

import ctypes
import json
import random
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PARAMETERS = 2  # of each test
ROOM = 1 << 16  # of trace.cpp


class Recorder:
    """A plugin of pytest: writes {"tests": {id: seconds}, "lines": {file: {line: ids}}}."""

    def __init__(self, output: Path) -> None:
        import coverage

        self.output = output
        self.seconds: dict[str, float] = {}
        self.say_nothing: set[str] = set()  # tests that do not pass on what is not mutated
        self.lines: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.functions: dict[str, list[int]] = {}
        self.coverage = coverage.Coverage(
            data_file=None, source=["python/ipo_ext"], config_file=False
        )
        self.coverage.start()
        self.library: ctypes.CDLL | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        kept = sampled(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        library = self.traced_library()
        library.reset_trace()
        start = time.monotonic()
        yield
        self.seconds[item.nodeid] = round(time.monotonic() - start, 3)
        out = (ctypes.c_uint64 * ROOM)()
        self.functions[item.nodeid] = out[: library.read_trace(out)]

    def traced_library(self) -> ctypes.CDLL:
        if self.library is None:
            from ipo_ext import _C

            self.library = ctypes.CDLL(_C.__file__)
            self.library.read_trace.restype = ctypes.c_uint64
        return self.library

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or report.failed:
            self.say_nothing.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.seconds = {t: s for t, s in self.seconds.items() if t not in self.say_nothing}
        root = Path.cwd()
        data: Any = self.coverage.get_data()
        for path in data.measured_files():
            file = str(Path(path).relative_to(root))
            for line, contexts in data.contexts_by_lineno(path).items():
                self.lines[file][line] = [c for c in contexts if c in self.seconds]
        places = definitions(
            self.traced_library()._name, sorted(set().union(*self.functions.values()))
        )
        for test, functions in self.functions.items():
            if test in self.seconds:
                for file, line in {places[f] for f in functions if f in places}:
                    self.lines[file][line].append(test)
        if len(self.seconds) > 0:
            content = {"tests": self.seconds, "lines": self.lines}
            self.output.write_text(json.dumps(content))


def sampled(items: list[pytest.Item]) -> list[pytest.Item]:
    by_function: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        by_function[function_of(item.nodeid)].append(item)
    kept: set[pytest.Item] = set()
    for function, group in by_function.items():
        kept |= set(random.Random(function).sample(group, min(PARAMETERS, len(group))))
    return [item for item in items if item in kept]


def function_of(test: str) -> str:
    return test.split("[")[0]


def definitions(library: str, functions: list[int]) -> dict[int, tuple[str, int]]:
    """Where the functions at these offsets in the library are defined, of those below csrc."""
    done = subprocess.run(
        ["addr2line", "-e", library],
        input="\n".join(map(hex, functions)),
        capture_output=True,
        text=True,
        check=True,
    )
    places = {}
    for function, place in zip(functions, done.stdout.splitlines(), strict=True):
        if match := re.search(r"(csrc/\S+):(\d+)", place):
            places[function] = (str(Path(match[1])), int(match[2]))
    return places
