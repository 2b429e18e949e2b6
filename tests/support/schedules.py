"""Other orders of the same work: threads of the CPU, of emulated kernels, another device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch

from tests.emulator import operators as emulated
from tests.support.backends import Backend

# cudaDeviceAttr, of the imagined device that the emulator runs on: sm_90 unless told otherwise.
MULTIPROCESSORS, CAPABILITY_MAJOR, SHARED_TOGETHER = 16, 75, 81


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def thread_order(seed: int) -> Iterator[None]:
    """Of emulated threads, warps and blocks."""
    emulator = emulated.load()
    emulator.emulator_set_schedule(seed)
    try:
        yield
    finally:
        emulator.emulator_set_schedule(0)


def schedules(backend: Backend) -> list[AbstractContextManager[None]]:
    """Every way to run the same work: by CPU threads, in emulated orders, on CUDA again."""
    if backend.name == "cpu":
        return [torch_threads(count) for count in (1, 2, 2, 3)]
    if backend.name == "emulated":
        return [thread_order(seed) for seed in range(12)]
    return [contextlib.nullcontext() for _ in range(10)]


@contextlib.contextmanager
def imagined_device(attributes: Mapping[int, int]) -> Iterator[None]:
    """Emulated kernels find these attributes of their device."""
    emulator = emulated.load()
    for attribute, value in attributes.items():
        emulator.emulator_set_device_attribute(attribute, value)
    try:
        yield
    finally:
        for attribute in attributes:
            emulator.emulator_set_device_attribute(attribute, -1)
