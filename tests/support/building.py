"""Compile C++ sources and link them, and cache what was built.

Plain subprocess calls to $CXX (g++): it avoids needing CMake, ninja or nvcc. Objects are keyed by
the contents of everything they include and by the flags, so that a second run compiles nothing,
and a change compiles only what it reaches.
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


class BuildError(RuntimeError):
    pass


def compile_and_link(
    name: str,
    compiled: Iterable[tuple[Path, Sequence[str]]],
    link_flags: Sequence[str],
    root: Path = ROOT,
) -> Path:
    """Build `name` from sources (relative to `root`), each with its flags; return its path.

    Sources ending in .cu are compiled as C++.
    """
    with one_at_a_time(root):
        objects = compile_objects(compiled, root)
        return link(name, objects, link_flags, root)


def compile_objects(
    compiled: Iterable[tuple[Path, Sequence[str]]], root: Path = ROOT
) -> list[Path]:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: _compile(*job, root=root), compiled))


def link(name: str, objects: Sequence[Path], flags: Sequence[str], root: Path = ROOT) -> Path:
    key = _digest([str(path) for path in objects], flags)
    output = _cache(root) / f"linked-{key}" / name
    if not output.exists():
        _say(f"linking {name}")
        _run([*compiler(), *map(str, objects), *flags], output, root)
    return output


@contextlib.contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """What one process of a parallel test run builds, the others wait for and find."""
    _cache(root).mkdir(exist_ok=True)
    with open(_cache(root) / "objects.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(source: Path, flags: Sequence[str], root: Path) -> Path:
    command = [*compiler(), *flags]
    command += ["-x", "c++"] if source.suffix == ".cu" else []
    key = _digest([_compiler_version(), *command, str(source)], _inputs(command, source, root))
    output = _cache(root) / "objects" / f"{source.stem}-{key}.o"
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


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


@functools.cache
def _compiler_version() -> str:
    return _output([*compiler(), "--version"], ROOT)


def _cache(root: Path) -> Path:
    return root / "build"


def _say(text: str) -> None:
    print(f"[build] {text}", file=sys.stderr, flush=True)
