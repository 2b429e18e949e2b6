"""The real operators with the CUDA kernels emulated on the CPU, as torch.ops.ipo_ext_emulated."""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.emulator import build

NAMESPACE = "ipo_ext_emulated"
TORCH = Path(torch.__file__).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
LINK = (f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu")


def build_operators(
    root: Path = build.ROOT, sanitize: Sequence[str] = (), flags: Sequence[str] = ()
) -> Path:
    """Compiles csrc/ops and the CUDA kernels of `root` for the emulator, as a library for torch."""
    # The one that takes longest, logits/fp32, not last: two compile at once.
    kernels = sorted(root.glob("csrc/kernels/cuda/**/*.cu"), reverse=True)
    return build.build(
        f"ipo_ext_emulated{sysconfig.get_config_var('SHLIB_SUFFIX')}",
        ["csrc/ops/register.cpp", *(path.relative_to(root) for path in kernels)],
        include=["csrc"],
        flags=[
            *flags,
            f"-isystem{TORCH / 'include'}",
            TARGET,
            f"-DIPO_EXT_NAMESPACE={NAMESPACE}",
            "-DIPO_EXT_CUDA_DISPATCH_KEY=CPU",
            "-DIPO_EXT_WITH_CUDA",
        ],
        link=LINK,
        sanitize=sanitize,
        shared=True,
        root=root,
    )


@functools.cache
def load() -> ctypes.CDLL:
    """Loads and registers the operators once; returns the emulator's C interface.

    IPO_EXT_EMULATED_LIBRARY names a library built elsewhere (under sanitizers, say) to load
    instead.
    """
    from ipo_ext._ops.register import register

    library = os.environ.get("IPO_EXT_EMULATED_LIBRARY") or str(build_operators())
    torch.ops.load_library(library)
    register(NAMESPACE)
    emulator = ctypes.CDLL(library)
    emulator.emulator_set_schedule.argtypes = [ctypes.c_uint64]
    emulator.emulator_launches.restype = ctypes.c_uint64
    emulator.emulator_guarded_alloc.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    emulator.emulator_guarded_alloc.restype = ctypes.c_void_p
    emulator.emulator_guarded_free.argtypes = [ctypes.c_void_p]
    emulator.emulator_guarded_free.restype = ctypes.c_bool
    return emulator
