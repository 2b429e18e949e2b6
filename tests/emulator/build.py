"""Compile C++ and CUDA sources against the emulator, as tests/support/building.py does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.support.building import ROOT, compile_and_link

HARNESS = Path("tests/emulator")
HARNESS_SOURCES = tuple(
    HARNESS / name
    for name in ("emulator.cpp", "report.cpp", "runtime.cpp", "memory.cpp", "fibre.cpp")
)

# -O1 compiles in half of -O2's time, and the tests take as long with it. A misaligned access calls
# a handler of the emulator: a report with its line, no runtime needed.
COMPILE_FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-ffp-contract=off", "-fsanitize=alignment", "-fno-sanitize-recover=alignment"),
)
LINK_FLAGS = ("-rdynamic", "-lpthread", "-ldl")

# For `sanitize=`: passed to the compiler and the linker.
ADDRESS_AND_UNDEFINED = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)


def build(
    name: str,
    sources: Iterable[Path | str],
    *,
    include: Sequence[Path | str] = (),
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
    sanitize: Sequence[str] = (),
    shared: bool = False,
    root: Path = ROOT,
) -> Path:
    """Build `name` from `sources` (relative to `root`) and the emulator; return its path.

    Sources ending in .cu are compiled as C++. A `.so` with `shared`, an executable without.
    """
    compile_flags = [*COMPILE_FLAGS, *sanitize, f"-I{HARNESS / 'include'}"]
    compile_flags += [f"-I{folder}" for folder in include] + list(flags)
    link_flags = [*sanitize, *(["-shared"] if shared else []), *link, *LINK_FLAGS]
    paths = [Path(source) for source in (*HARNESS_SOURCES, *sources)]
    return compile_and_link(name, [(path, compile_flags) for path in paths], link_flags, root)
