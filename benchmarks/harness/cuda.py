"""What only a GPU needs: inputs beyond its L2 cache, CUDA graphs, launches and waits counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from benchmarks.harness.timing import Mark, Step

# ---- The L2 cache ----


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties().L2_cache_size)


def flush_buffer() -> torch.Tensor:
    """Twice the L2 cache, for EventClock."""
    return torch.empty(2 * l2_bytes(), dtype=torch.int8, device="cuda")


def sets_beyond_cache(bytes_per_set: int, cache_bytes: int, most: int = 64) -> int:
    """How many input sets to rotate so that together they are twice the cache, at most `most`."""
    return max(1, min(most, math.ceil(2 * cache_bytes / bytes_per_set)))


# ---- Graphs ----


def graph_step(calls: Sequence[Callable[[], object]]) -> Step:
    """A step that replays one CUDA graph of all `calls`: their kernels without Python between.

    Divide its duration by `len(calls)`.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Held until all are captured: otherwise every call would write into the same memory, and
        # find it in the cache.
        outputs = [call() for call in calls]

    def step(mark: Mark) -> object:
        graph.replay()
        mark()
        return outputs

    return step


# ---- What a call does to the device ----


def waits_for_device(call: Callable[[], object]) -> bool:
    """Whether a call makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def launches(call: Callable[[], object]) -> int | None:
    """How many kernels a call launches, copies not counted; None where the profiler sees none."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "emcpy" not in event.name
    ]
    return len(on_device) or None
