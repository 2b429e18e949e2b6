"""Builds from source in every way that docs/installing.md names, and in those that must fail.

A failure must say what was wrong in a sentence. Each build starts from a clean copy of the tree;
`--python` chooses the torch (and needs scikit-build-core, pybind11 and ninja beside it), by default
a fresh environment's. Takes about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("torch==2.13.0", "scikit-build-core", "pybind11", "ninja")
ONE = {"CUDAARCHS": "90-real"}  # one architecture, where the choice is not the point


class Build(NamedTuple):
    name: str
    variables: Mapping[str, str] = MappingProxyType({})
    arguments: tuple[str, ...] = ()
    nvcc: bool = True
    architectures: tuple[str, ...] = ("90-real",)  # that the wheel holds
    failure: str = ""  # what the output of a build that must fail says


BUILDS = (
    Build("nvcc on the PATH", ONE),
    Build("no nvcc", nvcc=False, architectures=()),
    Build("IPO_EXT_CUDA=OFF", {"IPO_EXT_CUDA": "OFF"}, architectures=()),
    Build(
        "IPO_EXT_CUDA=ON without nvcc",
        {"IPO_EXT_CUDA": "ON"},
        nvcc=False,
        failure="IPO_EXT_CUDA=ON, but no CUDA compiler was found. Put nvcc on the PATH",
    ),
    Build(
        "IPO_EXT_CUDA=perhaps",
        {"IPO_EXT_CUDA": "perhaps"},
        failure="IPO_EXT_CUDA: expected AUTO, ON or OFF, got 'perhaps'",
    ),
    Build(
        "TORCH_CUDA_ARCH_LIST",
        {"TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"},
        architectures=("80-real", "90"),
    ),
    Build(
        "TORCH_CUDA_ARCH_LIST, misspelt",
        {"TORCH_CUDA_ARCH_LIST": "Hopper"},
        failure="TORCH_CUDA_ARCH_LIST: expected versions such as '8.0 9.0+PTX', got 'Hopper'",
    ),
    Build(
        "CMAKE_CUDA_ARCHITECTURES, over the others",
        {"CUDAARCHS": "75-real", "TORCH_CUDA_ARCH_LIST": "7.5"},
        ("-C", "cmake.define.CMAKE_CUDA_ARCHITECTURES=90-real"),
    ),
    Build("MAX_JOBS=1", {**ONE, "MAX_JOBS": "1"}),
    Build(
        "old clang",
        {"CXX": "clang++-16", "IPO_EXT_CUDA": "OFF"},
        failure="ipo_ext needs clang 19 or newer",
    ),
    Build("clang", {"CXX": "clang++", "IPO_EXT_CUDA": "OFF"}, architectures=()),
    Build("clang beside nvcc", {**ONE, "CXX": "clang++"}),
)


def run(command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


def fresh_environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", *TOOLS], check=True)
    return python


def attempt(build: Build, python: Path, folder: Path) -> str | None:
    """What is wrong with the outcome, if anything is."""
    source = folder / "source"
    run(["git", "clone", "--quiet", ROOT, source], check=True)
    command = [python, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"]
    command += ["-w", folder / "wheel", *build.arguments, source]
    done = run(command, env=variables(build, python))
    (folder / "log").write_text(done.stdout + done.stderr)
    if build.failure:
        said = " ".join((done.stdout + done.stderr).split())  # CMake breaks lines
        return None if done.returncode and build.failure in said else "did not fail in those words"
    if done.returncode:
        return f"failed, see {folder / 'log'}"
    (wheel,) = (folder / "wheel").glob("*.whl")
    run([python, "-m", "zipfile", "-e", wheel, folder / "site"], check=True)
    found = run(
        [python, "-m", "ipo_ext", "info", "--json"],
        env={**os.environ, "PYTHONPATH": str(folder / "site")},
        cwd=folder,
        check=True,
    )
    architectures = tuple(json.loads(found.stdout)["cuda_architectures"])
    if architectures != build.architectures:
        return f"expected architectures {build.architectures}, got {architectures}"
    return None


def variables(build: Build, python: Path) -> dict[str, str]:
    chosen = {"CUDAARCHS", "TORCH_CUDA_ARCH_LIST", "CUDACXX", "IPO_EXT_CUDA", "MAX_JOBS"}
    kept = {name: value for name, value in os.environ.items() if name not in chosen}
    path = [str(python.parent), *kept["PATH"].split(os.pathsep)]
    if not build.nvcc:
        path = [folder for folder in path if not Path(folder, "nvcc").exists()]
    return {**kept, "PATH": os.pathsep.join(path), **build.variables}


def source_distribution(python: Path, folder: Path) -> str | None:
    """An sdist, and from it a wheel, by pip alone and with its own build requirements."""
    made = "import sys, scikit_build_core.build as b; b.build_sdist(sys.argv[1])"
    run([python, "-c", made, folder], cwd=ROOT, check=True)
    (sdist,) = folder.glob("*.tar.gz")
    venv.create(folder / "pip", with_pip=True)
    bare = folder / "pip" / "bin" / "python"
    done = run([bare, "-m", "pip", "install", sdist], env={**os.environ, **ONE})
    (folder / "log").write_text(done.stdout + done.stderr)
    if done.returncode:
        return f"failed, see {folder / 'log'}"
    verified = run([bare, "-m", "ipo_ext", "verify"], cwd=folder)
    return None if verified.returncode == 0 else verified.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("only", nargs="*", help="builds whose name holds one of these words")
    parser.add_argument("--python", type=Path, help="a Python with torch and the build tools")
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="try builds "))  # spaces must not matter
    python = options.python or fresh_environment(folder / "tools")
    trials = {build.name: lambda path, b=build: attempt(b, python, path) for build in BUILDS}
    trials["sdist, then pip alone"] = lambda path: source_distribution(python, path)
    compilers = {build.name: build.variables.get("CXX") for build in BUILDS}
    wrong = 0
    for index, (name, trial) in enumerate(trials.items()):
        if options.only and not any(word in name for word in options.only):
            continue
        if (compiler := compilers.get(name)) and not shutil.which(compiler):
            print(f"{name}: not tried, no {compiler} on the PATH", flush=True)
            continue
        path = folder / str(index)
        path.mkdir()
        start = time.monotonic()
        found = trial(path)
        wrong += found is not None
        print(f"{name}: {found or 'ok'}, {time.monotonic() - start:.0f} s", flush=True)
    if not wrong:
        shutil.rmtree(folder)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
