"""Runs the CUDA kernels under the address and undefined-behaviour sanitizers, on nasty shapes.

`python -m tests.emulator.sanitize` fails at the first report. The operators are built with
sanitizers and loaded into an ordinary Python, whose allocations the preloaded runtime watches; the
tests with the markers below then run them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.emulator import build, operators
from tests.support.building import compiler

SELECTED = "emulated and (reaches_every_kernel or tempts_kernels_out_of_bounds)"


def main() -> int:
    library = operators.build_operators(sanitize=build.ADDRESS_AND_UNDEFINED)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", SELECTED, "tests/loss", "tests/api"],
        cwd=build.ROOT,
        env=sanitized_environment(library),
    ).returncode


def sanitized_environment(library: Path) -> dict[str, str]:
    """Leaks are Python's own; stacks are fibres, so freed frames are not worth keeping."""
    return {
        **os.environ,
        "IPO_EXT_EMULATED_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(runtime(name) for name in ("libasan.so", "libstdc++.so")),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }


def runtime(name: str) -> str:
    """The compiler's own copy of a runtime library. libstdc++ must be there when ASan starts."""
    command = [*compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
