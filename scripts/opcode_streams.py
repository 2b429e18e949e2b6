"""Whether two states of the CUDA kernels compile to the same instructions.

For each kernel on sm_90: instructions, registers, shared memory, stack, and a hash of its opcodes
with their modifiers, in order, without operands.

    python scripts/opcode_streams.py --save before.json
    python scripts/opcode_streams.py --compare before.json [--rename OLD=NEW ...]

`--compare` lists what differs and exits 1 if anything does; `--rename` replaces a word in the
kernels' names of the saved file. Needs nvcc, and nvdisasm from the CUDA toolkit or from PyPI's
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import compiled_kernels

SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+),", re.MULTILINE)
# An address, perhaps a predicate, then the opcode.
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")

Kernels = dict[str, dict[str, int | str]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=compiled_kernels.ROOT, help="a checkout")
    parser.add_argument("--architecture", default="90")
    parser.add_argument("--save", type=Path, metavar="FILE.json")
    parser.add_argument("--compare", type=Path, metavar="FILE.json")
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW")
    arguments = parser.parse_args()

    kernels = streams(arguments.root.resolve(), arguments.architecture)
    if arguments.save:
        arguments.save.write_text(json.dumps(kernels, indent=1) + "\n")
    if not arguments.compare:
        print_table(kernels)
        return 0
    before = renamed(json.loads(arguments.compare.read_text()), arguments.rename)
    found = differences(before, kernels)
    print("\n".join(found))
    same = len(before.keys() & kernels.keys()) - sum(" -> " in line for line in found)
    print(f"{same} of {len(before)} kernels are the same")
    return 1 if found else 0


def streams(root: Path, architecture: str) -> Kernels:
    """Every kernel of a checkout by its demangled name."""
    kernels: Kernels = {}
    disassembler = compiled_kernels.nvdisasm()
    with tempfile.TemporaryDirectory() as folder:
        for cubin, resources in compiled_kernels.compile_all([architecture], Path(folder), root):
            opcodes = opcodes_of(disassembler, cubin)
            for kernel in resources:
                stream = opcodes[kernel.symbol]
                name = compiled_kernels.demangled(kernel.symbol)
                assert name not in kernels, f"two kernels are called {name}"
                kernels[name] = {
                    "instructions": len(stream),
                    "registers": kernel.registers,
                    "shared": kernel.shared,
                    "stack": kernel.stack,
                    "spills": kernel.spills,
                    "opcodes": hashlib.sha256(" ".join(stream).encode()).hexdigest()[:16],
                }
    return dict(sorted(kernels.items()))


def opcodes_of(disassembler: str, cubin: Path) -> dict[str, list[str]]:
    """The opcodes of each kernel of a cubin, by its mangled name."""
    command = [disassembler, "--print-code", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pieces = SECTION.split(text)
    found = zip(pieces[1::2], pieces[2::2], strict=True)
    return {symbol: OPCODE.findall(code) for symbol, code in found}


def renamed(kernels: Kernels, renames: list[str]) -> Kernels:
    for rename in renames:
        old, new = rename.split("=")
        kernels = {re.sub(rf"\b{old}\b", new, name): of for name, of in kernels.items()}
    return kernels


def differences(before: Kernels, after: Kernels) -> list[str]:
    """One line for each kernel that is new, gone or not the same."""
    found = [f"{name}: gone" for name in before if name not in after]
    found += [f"{name}: new" for name in after if name not in before]
    for name in before.keys() & after.keys():
        changes = [
            f"{fact} {before[name][fact]} -> {after[name][fact]}"
            for fact in before[name]
            if before[name][fact] != after[name][fact]
        ]
        if changes:
            found.append(f"{name}: {', '.join(changes)}")
    return sorted(found)


def print_table(kernels: Kernels) -> None:
    header = ("instructions", "registers", "shared", "stack", "spills", "opcodes")
    print(f"{'kernel':<64} {' '.join(f'{name:>12}' for name in header)}")
    for name, facts in kernels.items():
        print(f"{name:<64} {' '.join(f'{facts[fact]:>12}' for fact in header)}")


if __name__ == "__main__":
    sys.exit(main())
