"""Compiles each file of CUDA kernels with the build's own flags and reads what nvcc says of it."""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


class Resources(NamedTuple):
    """What ptxas reports of one kernel for one architecture."""

    symbol: str  # mangled
    architecture: str  # sm_90
    registers: int
    shared: int  # bytes known at compile time; what a launch asks for comes on top
    stack: int  # bytes
    spills: int  # bytes stored and loaded


def sources(root: Path = ROOT) -> list[Path]:
    """Every .cu file of the library, relative to ``root``."""
    return sorted(path.relative_to(root) for path in (root / "csrc/kernels/cuda").rglob("*.cu"))


def flags(root: Path = ROOT) -> list[str]:
    """What CMakeLists.txt gives nvcc in a release build, architectures and warnings aside."""
    text = (root / "CMakeLists.txt").read_text()
    options = re.search(r"<COMPILE_LANGUAGE:CUDA>:([^>]*)>", text)
    assert options, "CMakeLists.txt no longer sets options for CUDA in the form looked for here"
    return ["-std=c++17", "-O3", "-DNDEBUG", "-Icsrc", *options[1].split()]


def compile_all(
    architectures: Iterable[str],
    folder: Path,
    root: Path = ROOT,
    files: Iterable[Path] | None = None,
    more_flags: Sequence[str] = (),
) -> Iterator[tuple[Path, list[Resources]]]:
    """Yield the cubin in ``folder`` and the kernels of every (file, "90"), in order.

    ``files`` are relative to ``root``; default: all that hold kernels.
    """
    files = sources(root) if files is None else files
    jobs = [(file, architecture) for file in files for architecture in architectures]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda job: compile_one(*job, folder, root, more_flags), jobs)


def compile_one(
    source: Path, architecture: str, folder: Path, root: Path, more_flags: Sequence[str] = ()
) -> tuple[Path, list[Resources]]:
    cubin = folder / f"{'-'.join(source.with_suffix('').parts)}-{architecture}.cubin"
    command = ["nvcc", *flags(root), "-Xptxas=-v", f"-arch=sm_{architecture}"]
    command += [*more_flags, "-cubin", str(source), "-o", str(cubin)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return cubin, resources(done.stdout + done.stderr)


def resources(report: str) -> list[Resources]:
    """The kernels in a report of ptxas."""
    found = []
    entries = list(ENTRY.finditer(report))
    for entry, end in zip(entries, [*entries[1:], None], strict=True):
        part = report[entry.end() : end.start() if end else len(report)]
        spills, registers, shared = (p.search(part) for p in (SPILLS, REGISTERS, SHARED))
        assert spills, f"no spill report for {entry[1]}"
        assert registers, f"no register report for {entry[1]}"
        stack, stored, loaded = map(int, spills.groups())
        static = int(shared[1]) if shared else 0
        found.append(Resources(*entry.groups(), int(registers[1]), static, stack, stored + loaded))
    return found


def nvdisasm() -> str:
    """The toolkit's program, or the one of the package from PyPI."""
    if program := shutil.which("nvdisasm"):
        return program
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvdisasm":
            return str(file.locate())
    raise SystemExit("nvdisasm was not found; install the package nvidia-cuda-nvdisasm")


def demangled(symbol: str) -> str:
    """A kernel's name and template arguments, without our namespaces and its parameters."""
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|\(ipo_ext::\w+::\w+\)(?=\d)", "", text)
    text = re.sub(r"ipo_ext::(cuda::)?|^void ", "", text)
    return re.sub(r"\(.*\)$", "", text)
