"""Registers and spills of every CUDA kernel, from nvcc's own report; exits 1 on a spill.

Then how rows of logits are kept on chip on an H200: the launcher's plan, and what fits beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import compiled_kernels

ROOT = compiled_kernels.ROOT


def plans() -> list[list[str]]:
    """[columns, dtype, blocks, threads, rows a cluster if pipelined, shared bytes] of each row."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "launch_plan")
        command = ["nvcc", "-std=c++17", "--expt-relaxed-constexpr", "-Icsrc"]
        subprocess.run([*command, "scripts/launch_plan.cu", "-o", program], cwd=ROOT, check=True)
        done = subprocess.run([program], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def print_rows_on_chip(registers: dict[str, int]) -> None:
    """As a table for docs/performance.md; `registers` by kernel, on sm_90."""
    print(
        "\n| columns | dtype | cluster x threads | registers a thread | shared memory a block ",
        end="",
    )
    print("| blocks a multiprocessor |\n|---|---|---|---|---|---|")
    for columns, dtype, blocks, threads, rows_per_cluster, shared in plans():
        stored = {"bf16": "BFloat16", "fp32": "float"}[dtype]
        kernel = f"logits_resident<{stored}, {stored}, {threads}, false>"
        if int(rows_per_cluster) > 0:
            kernel = f"logits_pipelined<{stored}, {stored}>"
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
    with tempfile.TemporaryDirectory() as folder:
        compiled = compiled_kernels.compile_all(arguments.architectures, Path(folder))
        for kernel in (kernel for _, kernels in compiled for kernel in kernels):
            name = compiled_kernels.demangled(kernel.symbol)
            in_memory = kernel.stack + kernel.spills
            print(
                f"{name:<64} {kernel.architecture:<13} {kernel.registers:>9} {in_memory:>24}",
                flush=True,
            )
            spilled += in_memory
            if kernel.architecture == "sm_90":
                on_sm_90[name] = kernel.registers
    if on_sm_90:
        print_rows_on_chip(on_sm_90)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
