"""Compile C++ and CUDA sources against the emulator, and cache what was built.

Plain subprocess calls to $CXX (g++): it avoids needing CMake, ninja or nvcc to run the kernels.
Objects are keyed by the contents of everything they include and by the flags, so that a second
run compiles nothing, and a change compiles only what it reaches.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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


class BuildError(RuntimeError):
    pass


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
    with _one_at_a_time(root):
        objects = compile_all((*HARNESS_SOURCES, *sources), compile_flags, root)
        return link_all(name, objects, link_flags, root)


def compile_all(sources: Iterable[Path | str], flags: Sequence[str], root: Path) -> list[Path]:
    """The objects of `sources`, as many compiled at once as there are cores."""
    compile_one = functools.partial(_compile, flags=flags, root=root)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, map(Path, sources)))


def link_all(name: str, objects: Sequence[Path], flags: Sequence[str], root: Path) -> Path:
    key = _digest([str(path) for path in objects], flags)
    output = _cache(root) / f"emulator-{key}" / name
    if not output.exists():
        _say(f"linking {name}")
        _run([*_compiler(), *map(str, objects), *flags], output, root)
    return output


@contextlib.contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """What one process of a parallel test run builds, the others wait for and find."""
    _cache(root).mkdir(exist_ok=True)
    with open(_cache(root) / "emulator.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(source: Path, *, flags: Sequence[str], root: Path) -> Path:
    command = [*_compiler(), *flags]
    command += ["-x", "c++"] if source.suffix == ".cu" else []
    key = _digest([_compiler_version(), *command, str(source)], _inputs(command, source, root))
    output = _cache(root) / "emulator-objects" / f"{source.stem}-{key}.o"
    if not output.exists():
        start = time.monotonic()
        _run([*command, "-c", str(source)], output, root)
        _say(f"compiled {source} in {time.monotonic() - start:.1f} s")
    return output


def _inputs(command: Sequence[str], source: Path, root: Path) -> Iterable[bytes]:
    """The contents of the source and of every header it includes, system headers aside."""
    rule = _output([*command, "-MM", str(source)], root)
    for name in rule.replace("\\\n", " ").split(":", 1)[1].split():
        yield (root / name).read_bytes()


def _run(command: Sequence[str], output: Path, root: Path) -> None:
    """Run a command that writes `output`, which appears only when it is complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    _output([*command, "-o", str(partial)], root)
    partial.replace(output)


def _output(command: Sequence[str], root: Path) -> str:
    # Relative paths, and hence __FILE__ in fault reports, start at the repository's root.
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr}")
    if done.stderr:
        _say(done.stderr.rstrip())
    return done.stdout


def _digest(*groups: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for group in groups:
        for item in group:
            data = item.encode() if isinstance(item, str) else item
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))  # which may begin with ccache


@functools.cache
def _compiler_version() -> str:
    return _output([*_compiler(), "--version"], ROOT)


def _cache(root: Path) -> Path:
    return root / "build"


def _say(text: str) -> None:
    print(f"[emulator] {text}", file=sys.stderr, flush=True)
