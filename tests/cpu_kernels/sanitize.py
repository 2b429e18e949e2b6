"""Runs the bare CPU kernels (driver.cpp) under sanitizers, for the narrowest and the widest vectors
that this machine has.

`python -m tests.cpu_kernels.sanitize` is AddressSanitizer and UndefinedBehaviorSanitizer;
`--thread` is ThreadSanitizer. Fails at the first report. The kernels alone: OpenMP, which torch's
threads are made of, is not known to ThreadSanitizer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.emulator.build import ADDRESS_AND_UNDEFINED
from tests.mutation.library import KERNELS, chosen_arch
from tests.support import building

FOLDER = Path("tests/cpu_kernels")
THREAD = ("-fsanitize=thread",)
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-DIPO_EXT_CPU_ARCH=driven"),
    *(f"-I{FOLDER / 'include'}", "-Icsrc"),  # the driver's dispatch.h before the kernels'
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--thread", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    sanitizers = THREAD if asked.thread else ADDRESS_AND_UNDEFINED
    for arch in sorted({"baseline", chosen_arch()}):
        program = build_driver(arch, sanitizers)
        done = subprocess.run([program, str(asked.rounds)], env=sanitizer_environment())
        if done.returncode != 0:
            print(f"[sanitize] {arch}: failed", file=sys.stderr)
            return 1
    return 0


def build_driver(arch: str, sanitizers: Sequence[str]) -> Path:
    march = [] if arch == "baseline" else [f"-march={arch.replace('x86_64_', 'x86-64-')}"]
    flags = [*FLAGS, *sanitizers]
    sources = [FOLDER / "driver.cpp", *sorted((building.ROOT / KERNELS).glob("*.cpp"))]
    jobs = [
        (
            Path(os.path.relpath(source, building.ROOT)) if source.is_absolute() else source,
            [*flags, *(march if source.stem.endswith("_simd") else [])],
        )
        for source in sources
    ]
    return building.compile_and_link("cpu_kernels", jobs, [*sanitizers, "-lpthread"])


def sanitizer_environment() -> dict[str, str]:
    names = ("ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS")
    return {**os.environ, **dict.fromkeys(names, "halt_on_error=1:print_stacktrace=1")}


if __name__ == "__main__":
    sys.exit(main())
