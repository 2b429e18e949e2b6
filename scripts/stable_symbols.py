"""Lists the functions of torch's stable ABI: declared in shim headers, exported by libraries.

`python scripts/stable_symbols.py TORCH` prints them for the torch package in folder TORCH, a CUDA
build, so that both kinds are seen: "cuda" marks what only the CUDA libraries export.
tests/builds/torch_2_11_symbols.txt is this list for the oldest torch that we support.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

HEADERS = (
    "torch/csrc/inductor/aoti_torch/c/*.h",
    "torch/csrc/inductor/aoti_torch/generated/*.h",
    "torch/csrc/stable/c/shim.h",
)


def declared(torch: Path) -> set[str]:
    """Every identifier before a parenthesis; what is no function, no library exports."""
    headers = [path for pattern in HEADERS for path in (torch / "include").glob(pattern)]
    return {name for path in headers for name in re.findall(r"\b(\w+)\s*\(", path.read_text())}


def exported(library: Path) -> set[str]:
    """The symbols that a shared library defines for others."""
    command = ["nm", "-D", "--defined-only", "--format=posix", str(library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[0].split("@")[0] for line in lines}


def stable_symbols(torch: Path) -> dict[str, bool]:
    """Name to whether only a CUDA build of torch has it."""
    libraries = sorted((torch / "lib").glob("libtorch*.so"))
    everywhere = {name for path in libraries if "cuda" not in path.name for name in exported(path)}
    with_cuda = {name for path in libraries if "cuda" in path.name for name in exported(path)}
    if not with_cuda:
        raise SystemExit(f"{torch}: expected a CUDA build of torch, found no libtorch_cuda.so")
    functions = declared(torch)
    return {name: name not in everywhere for name in functions & (everywhere | with_cuda)}


def torch_version(torch: Path) -> str:
    return re.search(r"__version__ = '(.+?)'", (torch / "version.py").read_text())[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torch", type=Path, help="the folder of a torch package")
    torch = parser.parse_args().torch
    print(f"# Functions of the stable ABI of torch {torch_version(torch)}, the oldest we support:")
    print(
        "# declared in its shim headers and exported by its libraries; cuda: by CUDA builds only."
    )
    print(
        "# Generated: python scripts/stable_symbols.py TORCH > tests/builds/torch_2_11_symbols.txt"
    )
    for name, only_cuda in sorted(stable_symbols(torch).items()):
        print(f"{name} cuda" if only_cuda else name)


if __name__ == "__main__":
    main()
