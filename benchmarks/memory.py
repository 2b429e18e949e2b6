"""How much memory a step holds at its peak, beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call whose process has held nothing before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peaks(step: Callable[[], object], device: str, repeats: int) -> list[int]:
    """Bytes at the peak of each of `repeats` steps, less those before it; a step warms up.

    On the CPU the high-water mark of the whole process, which Linux can set back; its pages are
    counted when they are touched. On CUDA what torch's allocator has handed out.
    """
    measure = _peak_on_cuda if device == "cuda" else _peak_of_process
    step()
    return [measure(step) for _ in range(repeats)]


def _peak_of_process(step: Callable[[], object]) -> int:
    gc.collect()
    _give_free_memory_back()
    _CLEAR_REFS.write_text("5")  # VmHWM := VmRSS
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _peak_on_cuda(step: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _give_free_memory_back() -> None:
    """What the allocator keeps for later would hide what a step allocates."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"no {name} in {_STATUS}")
