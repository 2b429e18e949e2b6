"""Compile ipo_ext._C of any source tree for the CPU, quickly: the version of each SIMD loop that
this machine chooses comes from that tree, the others, which are never called, from this one."""

from __future__ import annotations

import functools
import json
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.support import building
from tests.support.building import ROOT

TORCH = Path(torch.__file__).parent
KERNELS = Path("csrc/kernels/cpu")
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-Wno-psabi", "-fvisibility=hidden", "-Icsrc"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
INFO = {  # of the build, as CMake defines them
    "VERSION": "0",
    "COMMIT": "mutation",
    "TORCH_AT_BUILD": torch.__version__,
    "CUDA_COMPILER": "",
    "CUDA_ARCHITECTURES": "",
}

# Records which functions run, those that are inlined too; what torch's headers define aside.
TRACE = (
    *("-g1", "-finstrument-functions"),
    "-finstrument-functions-exclude-file-list=/usr/,site-packages,pybind11",
)
TRACER = Path("tests/mutation/trace.cpp")

# The CPU kernels that are compiled once, not for each instruction set.
PLAIN = ("dispatch", "histogram", "ipo_loss", "logits", "scale", "score_centering", "support")


def build_library(root: Path, flags: Sequence[str] = (), extra: Sequence[Path] = ()) -> Path:
    """``_C`` of the sources of ``root``, within it."""
    torch_flags = (f"-isystem{TORCH / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000")
    plain = [KERNELS / f"{name}.cpp" for name in PLAIN]
    jobs = [(source, (*FLAGS, *flags)) for source in (*plain, *extra)]
    jobs += simd_jobs(chosen_arch(), flags)
    jobs.append((Path("csrc/ops/register.cpp"), (*FLAGS, *torch_flags, *flags)))
    with building.one_at_a_time(root):
        objects = building.compile_objects(jobs, root)
        return building.link(
            f"_C{sysconfig.get_config_var('EXT_SUFFIX')}",
            [*objects, *other_objects()],  # of equal inline functions the first is linked
            [
                *(
                    "-shared",
                    "-Wl,-Bsymbolic-functions",
                ),  # glibc has a tracer too, which does nothing
                *(f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed"),
                *("-ltorch", "-ltorch_cpu", "-lpthread", "-ldl"),
            ],
            root,
        )


@functools.cache
def other_objects() -> list[Path]:
    """What no mutation reaches: the other instruction sets, and the module's attributes."""
    import pybind11

    defined = (f'-DIPO_EXT_{name}="{value}"' for name, value in INFO.items())
    include = (pybind11.get_include(), sysconfig.get_path("include"))
    flags = (*FLAGS, *defined, *(f"-isystem{path}" for path in include))
    jobs = [(Path("csrc/bindings.cpp"), flags)]
    for arch in archs():
        if arch != chosen_arch():
            jobs += simd_jobs(arch)
    with building.one_at_a_time(ROOT):
        return building.compile_objects(jobs, ROOT)


def simd_jobs(arch: str, flags: Sequence[str] = ()) -> list[tuple[Path, Sequence[str]]]:
    march = [] if arch == "baseline" else [f"-march={arch.replace('x86_64_', 'x86-64-')}"]
    how = (*FLAGS, f"-DIPO_EXT_CPU_ARCH={arch}", *march, *flags)
    return [
        (KERNELS / f"{name}_simd.cpp", how)
        for name in ("histogram", "ipo_loss", "sequence", "components", "logits", "scale")
    ]


def archs() -> list[str]:
    x86 = "x86_64" in sysconfig.get_platform()
    return ["x86_64_v4", "x86_64_v3", "baseline"] if x86 else ["baseline"]


@functools.cache
def chosen_arch() -> str:
    """What csrc/kernels/cpu/dispatch.h chooses at run time."""
    return next(arch for arch in archs() if arch == "baseline" or _is_supported(arch))


def _is_supported(arch: str) -> bool:
    features = {"x86_64_v4": {"avx512f", "avx512bw", "avx512vl"}, "x86_64_v3": {"avx2", "fma"}}
    words = set(Path("/proc/cpuinfo").read_text().split())
    return features[arch] <= words


if __name__ == "__main__":  # in a process of its own, for a tree that may not compile
    try:
        print(json.dumps({"library": str(build_library(Path(sys.argv[1])))}))
    except building.BuildError as error:
        print(json.dumps({"error": str(error)}))
