"""``python -m ipo_ext info``: what was built, what it runs under, which GPUs it covers."""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ipo_ext import _C
from ipo_ext._ops import torch_internals
from ipo_ext._ops.library import NAMESPACE

DISPATCH_KEYS = ("CPU", "CUDA", "Meta", "Autograd")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ipo_ext info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    as_json = parser.parse_args(argv).json
    found = facts()
    print(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))
    return 0


def facts() -> dict[str, Any]:
    """Everything that ``info`` prints, ready for JSON."""
    return {
        "version": _C.VERSION,
        "commit": _C.COMMIT,
        "torch_at_build": _C.TORCH_AT_BUILD,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "module": _C.__file__,
        "cpu_architecture": _C.CPU_ARCHITECTURE,
        "cuda_compiler": _C.CUDA_COMPILER,
        "cuda_architectures": list(_C.CUDA_ARCHITECTURES),
        "gpus": gpus(),
        "operators": operators(),
    }


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch sees, each with the code of this build that it runs."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        {
            "name": torch.cuda.get_device_name(index),
            "capability": list(torch.cuda.get_device_capability(index)),
            "code": code_for(torch.cuda.get_device_capability(index), _C.CUDA_ARCHITECTURES),
        }
        for index in range(count)
    ]


def code_for(capability: tuple[int, int], architectures: Iterable[str]) -> str | None:
    """The compiled code that a GPU runs, its own before PTX; None if it runs none of it.

    Architectures are CMake's: 80-real is code for 8.x from 8.0 on, 80-virtual is PTX for every
    later GPU, 80 is both. A suffix a or f binds code and PTX to one GPU or one family.
    """
    major, minor = capability
    ptx = None
    for architecture in sorted(architectures, key=_number, reverse=True):
        number, suffix, kind = _parsed(architecture)
        same_major = number // 10 == major
        if suffix == "a":
            runs = number == 10 * major + minor
        else:
            runs = same_major and number % 10 <= minor
        if runs and kind != "-virtual":
            return f"sm_{number}{suffix}"
        if kind != "-real" and ptx is None and (runs or (not suffix and number < 10 * major)):
            ptx = f"compute_{number}{suffix} (PTX)"
    return ptx


def _parsed(architecture: str) -> tuple[int, str, str]:
    match = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", architecture)
    return (int(match[1]), match[2], match[3] or "") if match else (0, "a", "")


def _number(architecture: str) -> int:
    return _parsed(architecture)[0]


def operators() -> dict[str, list[str]]:
    """Operator to the dispatch keys that it has a kernel for."""
    return {
        name: [key for key in DISPATCH_KEYS if torch_internals.has_kernel(name, key)]
        for name in torch_internals.registered_operators(NAMESPACE)
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """``facts`` as a person reads them."""
    compiler = facts["cuda_compiler"]
    rows = [
        ("ipo_ext", f"{facts['version']}, commit {facts['commit'] or 'unknown'}"),
        ("torch", f"{facts['torch']}, built with {facts['torch_at_build']}"),
        ("python", f"{facts['python']}, {facts['platform']}"),
        ("module", facts["module"]),
        ("CPU loops", f"compiled for {facts['cpu_architecture']}"),
        ("CUDA compiler", f"nvcc {compiler}" if compiler else "none: a build without CUDA"),
        ("architectures", " ".join(facts["cuda_architectures"]) or "none"),
        *((f"GPU {index}", _gpu_line(gpu)) for index, gpu in enumerate(facts["gpus"])),
        *([] if facts["gpus"] else [("GPU", "none that torch sees")]),
        *((name, " ".join(keys)) for name, keys in facts["operators"].items()),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _gpu_line(gpu: dict[str, Any]) -> str:
    major, minor = gpu["capability"]
    covered = (
        f"covered by {gpu['code']}"
        if gpu["code"]
        else f"NOT covered; rebuild with CUDAARCHS={major}{minor}"
    )
    return f"{gpu['name']}, compute capability {major}.{minor}: {covered}"
