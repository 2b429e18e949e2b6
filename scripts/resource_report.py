"""Registers and spills of every CUDA kernel, from nvcc's own report; exits 1 on a spill."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def report(source: Path, architecture: str) -> str:
    """nvcc's words on one file for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Icsrc"]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += ["-c", str(source), "-o", str(Path(folder) / "kernel.o")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return done.stdout + done.stderr


def demangled(name: str) -> str:
    text = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|ipo_ext::cuda::|^void ", "", text)
    return re.sub(r"\(.*\)$", "", text)


def rows(text: str) -> list[tuple[str, str, int, int]]:
    """(kernel, architecture, registers, bytes spilled) of each kernel in a report."""
    found = []
    entries = list(ENTRY.finditer(text))
    for entry, end in zip(entries, [*entries[1:], None], strict=True):
        part = text[entry.end() : end.start() if end else len(text)]
        spills, registers = SPILLS.search(part), REGISTERS.search(part)
        assert spills, f"no spill report for {entry[1]}"
        assert registers, f"no register report for {entry[1]}"
        spilled = sum(map(int, spills.groups()))
        found.append((demangled(entry[1]), entry[2], int(registers[1]), spilled))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=["80", "90", "100"])
    arguments = parser.parse_args()
    spilled = 0
    print(f"{'kernel':<36} {'architecture':<13} {'registers':>9} {'stack and spills, bytes':>24}")
    for source in sorted((ROOT / "csrc/kernels/cuda").glob("*.cu")):
        for architecture in arguments.architectures:
            for kernel, target, registers, bytes_spilled in rows(report(source, architecture)):
                print(f"{kernel:<36} {target:<13} {registers:>9} {bytes_spilled:>24}", flush=True)
                spilled += bytes_spilled
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
