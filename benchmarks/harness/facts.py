"""Where, with what and from which source a benchmark's figures were taken."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import ipo_ext
from benchmarks.harness import machine
from ipo_ext import _C

ROOT = Path(__file__).resolve().parents[2]


def facts(benchmark: str, device: str) -> dict[str, Any]:
    """What every results file begins with."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": commit(),
        "machine": _machine(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "ipo_ext": ipo_ext.__version__,
            "ipo_ext_built_with": {
                "torch": _C.TORCH_AT_BUILD,
                "nvcc": _C.CUDA_COMPILER or None,
                "architectures": list(_C.CUDA_ARCHITECTURES),
            },
        },
    }


def commit() -> str:
    """The commit's hash, "-dirty" with changes; IPO_EXT_COMMIT where there is no repository."""
    head = machine.output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not head:
        return os.environ.get("IPO_EXT_COMMIT", "unknown")
    status = "--no-optional-locks", "-C", str(ROOT), "status", "--porcelain"
    return head + ("-dirty" if machine.output_of("git", *status) else "")


def _command() -> str:
    """The command line, with `-m` and a module's name where it was started so."""
    spec = sys.modules["__main__"].__spec__
    script = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return shlex.join(["python", *script, *sys.argv[1:]])


def _machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": machine.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": machine.load_average(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        driver = "--query-gpu=driver_version", "--format=csv,noheader"
        found["gpu"] = {
            "name": properties.name,
            "driver": machine.output_of("nvidia-smi", *driver),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return found
