"""What the CUDA kernels cost by their machine code, on any machine; exits 1 above a budget.

    python scripts/sass_budget.py [NAME ...] [--device H200] [--update]

Compiles with the build's own flags for sm_90, disassembles, and prints for each budget of
scripts/sass/budgets.json the instructions of every pipe, a token or a vector, and the time that the
busiest pipe and the issue of instructions take at least on a device. A budget is of one of

    loop    the cheapest way round a loop that executes the anchors, regular expressions of
            instructions, in order: branches for other dtypes and for tails are left out
    region  all instructions of a C++ function, wherever it was inlined: unrolled code
    path    the cheapest way from the kernel's entry to its end, likewise; also the latency of one
            warp alone
    kernel  all of it

`--update` writes what was found as the budgets. They are of one release of nvcc: under another the
figures are printed and nothing fails. Needs nvcc, and nvdisasm from the CUDA toolkit or from PyPI's
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import compiled_kernels
from sass import pipes
from sass.listing import Instruction, Kernel, kernels_of
from sass.ways import Flow

BUDGETS = Path(__file__).parent / "sass" / "budgets.json"
ARCHITECTURE = "90"
ITEMS = 2**24  # for which a device's floor is printed


class Code(NamedTuple):
    """One kernel: its instructions, and what nvcc reports of it."""

    kernel: Kernel
    registers: int


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="of budgets; default: all")
    parser.add_argument("--root", type=Path, default=compiled_kernels.ROOT, help="a checkout")
    parser.add_argument("--budgets", type=Path, default=BUDGETS, metavar="FILE.json")
    parser.add_argument("--device", choices=pipes.DEVICES, default="H200")
    parser.add_argument("--update", action="store_true")
    arguments = parser.parse_args()

    document = json.loads(arguments.budgets.read_text())
    wanted = arguments.names or [entry["name"] for entry in document["budgets"]]
    entries = [entry for entry in document["budgets"] if entry["name"] in wanted]
    if unknown := set(wanted) - {entry["name"] for entry in entries}:
        parser.error(f"no budget is called {', '.join(sorted(unknown))}")
    if arguments.update and arguments.names:
        parser.error("--update writes all budgets, which are of one release of nvcc: name none")
    release = nvcc_release()
    binds = release == document["nvcc"]
    if not binds:
        print(f"nvcc is {release}: the budgets, of {document['nvcc']}, are only printed\n")
    code = compiled({entry["source"] for entry in entries}, arguments.root.resolve())
    print_header(arguments.device)
    above = 0
    for entry in entries:
        figures = figures_of(entry, code, arguments.root)
        too_much = exceeded(entry["at_most"], figures)
        above += bool(too_much)
        print_row(entry, figures, too_much, pipes.DEVICES[arguments.device])
        if arguments.update:
            entry["at_most"] = {name: figures[name] for name in entry["at_most"]}
    if arguments.update:
        document["nvcc"] = release
        arguments.budgets.write_text(json.dumps(document, indent=2) + "\n")
        return 0
    if above:
        print(f"\n{above} of {len(entries)} are above their budgets")
    return 1 if above and binds else 0


def nvcc_release() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    assert found, "nvcc --version names no release"
    return found[1]


def compiled(sources: set[str], root: Path) -> dict[str, Code]:
    """Every kernel of the sources by its demangled name. Line numbers change no instruction."""
    found = {}
    disassembler = compiled_kernels.nvdisasm()
    with tempfile.TemporaryDirectory() as folder:
        for cubin, resources in compiled_kernels.compile_all(
            [ARCHITECTURE], Path(folder), root, sorted(map(Path, sources)), ["-lineinfo"]
        ):
            kernels = kernels_of(cubin, disassembler)
            for kernel in resources:
                name = compiled_kernels.demangled(kernel.symbol)
                found[name] = Code(kernels[kernel.symbol], kernel.registers)
    return found


def figures_of(entry: dict[str, Any], code: dict[str, Code], root: Path) -> dict[str, float]:
    """Instructions by pipe for one item, and registers and bytes of the kernel, and so on."""
    name = entry["kernel"]
    if name not in code:
        raise SystemExit(f"{entry['name']}: no kernel is called {name}; there are {sorted(code)}")
    kernel, registers = code[name]
    chosen = chosen_of(entry, kernel, root)
    if not chosen:
        raise SystemExit(f"{entry['name']}: nothing of {name} is what the budget is of")
    per = entry.get("per", 1)
    figures = {pipe: round(count / per, 2) for pipe, count in pipes.counts_of(chosen).items()}
    figures |= {"registers": registers, "bytes": 16 * len(kernel.instructions)}
    if "path" in entry:
        figures["cycles"] = pipes.latency(chosen)
    return figures


def chosen_of(entry: dict[str, Any], kernel: Kernel, root: Path) -> Sequence[Instruction]:
    if "loop" in entry:
        return Flow(kernel).cheapest_loop(entry["loop"])
    if "path" in entry:
        return Flow(kernel).cheapest_path(entry["path"])
    if "region" in entry:
        file, function = entry["region"].split(":")
        first, last = lines_of(root / "csrc/kernels/cuda" / file, function)
        within = [(Path(file).name, line) for line in range(first, last + 1)]
        return [i for i in kernel.instructions if any(line in within for line in i.source)]
    return kernel.instructions


def lines_of(path: Path, function: str) -> tuple[int, int]:
    """The first and the last line of a function, by its name and its indentation."""
    lines = path.read_text().splitlines()
    for first, line in enumerate(lines):
        head = re.match(rf"( *)[^/;]*\b{function}\(", line)
        if head and not line.rstrip().endswith(";"):
            end = next(n for n in range(first, len(lines)) if lines[n] == head[1] + "}")
            return first + 1, end + 1
    raise SystemExit(f"{path}: no function is called {function}")


def exceeded(at_most: dict[str, float], figures: dict[str, float]) -> dict[str, float]:
    return {name: limit for name, limit in at_most.items() if figures[name] > limit}


def print_header(device: str) -> None:
    names = " ".join(f"{name:>7}" for name in ("issue", *pipes.PIPES))
    print(f"instructions an item, sm_90; floors of 2^24 items on one {device}, without memory")
    print(f"{'what':<44} {names} {'registers':>9} {'KiB':>5} {'floors, us':>22}")


def print_row(
    entry: dict[str, Any],
    figures: dict[str, float],
    too_much: dict[str, float],
    device: pipes.Device,
) -> None:
    counts = " ".join(f"{figures[name]:7.2f}" for name in ("issue", *pipes.PIPES))
    print(f"{entry['name']:<44} {counts} {figures['registers']:9.0f} ", end="")
    print(f"{figures['bytes'] / 1024:5.0f} ", end="")
    if "cycles" in figures:
        print(f"{figures['cycles']:.0f} cycles, one warp alone", end="")
    elif "loop" in entry:
        cycles = pipes.floors(figures)
        issue = cycles.pop("issue")
        busiest = max(cycles, key=lambda name: cycles[name])
        for name, of_pipe in ((busiest, cycles[busiest]), ("issue", issue)):
            print(f"{name} {device.microseconds(of_pipe, ITEMS):.0f} ", end="")
    for name, limit in too_much.items():
        print(f"  ABOVE: {name} {figures[name]:g}, budget {limit:g}", end="")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
