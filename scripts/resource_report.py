"""Registers and spills of every CUDA kernel, from nvcc's own report; exits 1 on a spill.

Then how tier 2 keeps rows on chip on an H200: the launcher's own choice, and what fits beside it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
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
    text = re.sub(r"\(anonymous namespace\)::|\(ipo_ext::math::Rules\)", "", text)
    text = re.sub(r"ipo_ext::cuda::|^void ", "", text)
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


def sharing() -> list[list[str]]:
    """[columns, dtype, blocks, threads, steps, rows in turn, shared bytes] of each row."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "row_sharing")
        command = ["nvcc", "-std=c++17", "--expt-relaxed-constexpr", "-Icsrc"]
        subprocess.run([*command, "scripts/row_sharing.cu", "-o", program], cwd=ROOT, check=True)
        done = subprocess.run([program], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def print_rows_on_chip(registers: dict[str, int]) -> None:
    """As a table for docs/performance.md; `registers` by kernel, on sm_90."""
    print(
        "\n| columns | dtype | cluster x threads | registers a thread | shared memory a block ",
        end="",
    )
    print("| blocks a multiprocessor |\n|---|---|---|---|---|---|")
    for columns, dtype, blocks, threads, _, in_turn, shared in sharing():
        stored = {"bf16": "ipo_ext::BFloat16", "fp32": "float"}[dtype]
        kernel = f"logits_rows<{stored}, {stored}, {threads}, false>"
        if int(in_turn) > 0:
            kernel = f"logits_rows_in_turn<{stored}, {stored}>"
        used = registers[kernel]
        together = blocks_together(int(threads), used, int(shared))
        print(f"| {columns} | {dtype} | {blocks} x {threads} | {used} ", end="")
        print(f"| {int(shared) / 1024:g} KiB | {together} |")


def blocks_together(threads: int, registers: int, shared: int) -> int:
    """On sm_90: 64 Ki registers, 8 a thread at once; 228 KiB, of which a block takes 1 more."""
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    return min(2048 // threads, by_registers, (228 << 10) // (shared + 1024))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=["80", "90", "100"])
    arguments = parser.parse_args()
    spilled = 0
    on_sm_90 = {}
    print(f"{'kernel':<64} {'architecture':<13} {'registers':>9} {'stack and spills, bytes':>24}")
    sources = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
    compiled = itertools.product(sources, arguments.architectures)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for text in pool.map(lambda of: report(*of), compiled):
            for kernel, target, registers, bytes_spilled in rows(text):
                print(f"{kernel:<64} {target:<13} {registers:>9} {bytes_spilled:>24}", flush=True)
                spilled += bytes_spilled
                if target == "sm_90":
                    on_sm_90[kernel] = registers
    if on_sm_90:
        print_rows_on_chip(on_sm_90)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
