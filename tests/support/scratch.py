"""A copy of the source tree that a test may change, built without optimisation and run.

The compiler is called as tests/support/building.py calls it, against the headers that torch brings,
pybind11's among them: no build tool has to be installed, and nothing is fetched.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from tests.emulator import operators
from tests.support import building

ROOT = building.ROOT
PARTS = ("csrc", "docs", "python", "scripts", "tests", "pyproject.toml", "README.md")
UNOPTIMISED = ("-O0", "-g0", "-w", "-fno-sanitize=alignment")

# As in CMakeLists.txt.
FLAGS = ("-std=c++17", *UNOPTIMISED, "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
FLAGS += ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Icsrc")
SIMD_ARCHS = {"baseline": ()}
if platform.machine() in ("x86_64", "AMD64"):
    SIMD_ARCHS |= {f"x86_64_v{level}": (f"-march=x86-64-v{level}",) for level in (3, 4)}
FACTS = ("VERSION", "COMMIT", "TORCH_AT_BUILD", "CUDA_COMPILER", "CUDA_ARCHITECTURES")


def copy_to(root: Path) -> None:
    """Copies what is needed to build the package and run its tests; nothing that was built."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, root / part, ignore=ignored)
        else:
            shutil.copy(source, root / part)


def build_package(root: Path) -> None:
    """Builds ``ipo_ext._C`` of ``root`` with the CPU operators, in its place in the package."""
    torch_headers = f"-isystem{operators.TORCH / 'include'}"
    python_headers = f"-isystem{sysconfig.get_paths()['include']}"
    facts = [f'-DIPO_EXT_{name}=""' for name in FACTS]
    kernels = sorted(root.glob("csrc/kernels/cpu/*.cpp"))
    kernels = [path.relative_to(root) for path in kernels]
    groups = [
        (["csrc/bindings.cpp"], [torch_headers, python_headers, *facts]),
        (["csrc/ops/register.cpp"], [torch_headers, operators.TARGET]),
        ([path for path in kernels if "simd" not in path.name], []),
        *(
            (
                [path for path in kernels if "simd" in path.name],
                [f"-DIPO_EXT_CPU_ARCH={arch}", *flags],
            )
            for arch, flags in SIMD_ARCHS.items()
        ),
    ]
    jobs = [(Path(source), [*FLAGS, *flags]) for sources, flags in groups for source in sources]
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    module = building.compile_and_link(name, jobs, ["-shared", *operators.LINK], root)
    shutil.copy(module, root / "python" / "ipo_ext" / name)


def build_emulated(root: Path) -> Path:
    """Builds the operators of ``root`` with its CUDA kernels emulated; returns the library."""
    return operators.build_operators(root=root, flags=UNOPTIMISED)


def run_tests(root: Path, library: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs tests of ``root``, with its package and ``library`` for the emulated operators.

    Without ``site``, which would put the package that is installed before that of ``root``.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root / "python"), str(root), *sys.path]),
        "IPO_EXT_EMULATED_LIBRARY": str(library),
        "HYPOTHESIS_PROFILE": "ci",
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "-S", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
