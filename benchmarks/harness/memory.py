"""How much memory a step holds at its peak, beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


# ---- What a step allocates as tensors ----


def peak_of_tensors(step: Callable[[], object], device: str) -> int:
    """The most bytes of tensors that a step holds at once, what it returns included.

    On the CPU by torch's profiler, on CUDA by torch's allocator. A step warms up.
    """
    step()
    return _peak_on_cuda(step) if device == "cuda" else _peak_by_profiler(step)


def _peak_by_profiler(step: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _peak_on_cuda(step: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


# ---- What a step takes of the machine ----


def peaks_of_process(step: Callable[[], object], device: str, repeats: int) -> list[int]:
    """Bytes at the peak of each of `repeats` steps, less those before it; a step warms up.

    On the CPU the high-water mark of the whole process, which Linux can set back; its pages are
    counted when they are touched. On CUDA what torch's allocator has handed out.
    """
    measure = _peak_on_cuda if device == "cuda" else _high_water_mark
    step()
    return [measure(step) for _ in range(repeats)]


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call whose process has held nothing before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _high_water_mark(step: Callable[[], object]) -> int:
    gc.collect()
    _give_free_memory_back()
    _CLEAR_REFS.write_text("5")  # VmHWM := VmRSS
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"no {name} in {_STATUS}")


# ---- glibc's allocator ----


def keep_freed_memory() -> bool:
    """Has glibc hand freed memory out again instead of back to the system; whether it could.

    Its own thresholds depend on what was freed before: one subject would pay for another's pages.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim_threshold, mmap_max = -1, -4  # M_ of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


def _give_free_memory_back() -> None:
    """What the allocator keeps for later would hide what a step allocates."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
