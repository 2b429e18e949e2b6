"""Runs the CUDA kernels under the address and undefined-behaviour sanitizers, on nasty shapes.

`python tests/emulator/sanitize.py` exits 1 at the first report. The operators are built with
sanitizers and loaded into an ordinary Python, whose allocations the preloaded runtime watches.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from emulator import build, operators

# Tier 1 runs every memory case below; tier 2 the tests that reach its shapes, strides and faults.
TIER_2 = (
    "emulated and (matches_float64 or slices_and_shapes or long_rows or contract_faults "
    "or nonfinite or every_cluster or rows_of_every_length or edge_on_every_device)"
)
TIER_2_FILES = ("tests/test_logits.py", "tests/test_logits_variants.py")


def main() -> int:
    if "--inside" in sys.argv:
        return run_cases()
    library = operators.build_operators(sanitize=build.ADDRESS_AND_UNDEFINED)
    tier_1 = [sys.executable, __file__, "--inside"]
    tier_2 = [sys.executable, "-m", "pytest", "-q", "-x", *TIER_2_FILES, "-k", TIER_2]
    for command in (tier_1, tier_2):
        done = subprocess.run(command, cwd=build.ROOT, env=sanitized_environment(library))
        if done.returncode != 0:
            return 1
    return 0


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
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_cases() -> int:
    from backends import Backend
    from cases import MEMORY_CASES, evaluate

    start = time.monotonic()
    with Backend("emulated").active():
        for number, (name, make) in enumerate(MEMORY_CASES.items(), 1):
            print(f"[sanitize] {number}/{len(MEMORY_CASES)} {name}", flush=True)
            result = evaluate(make())
            if result.loss.isfinite() == name.startswith("hostile"):
                print(f"[sanitize] {name}: unexpected loss {result.loss.item()}")
                return 1
    print(f"[sanitize] clean: {len(MEMORY_CASES)} cases in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
