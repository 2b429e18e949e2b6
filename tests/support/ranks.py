"""Runs a function on the ranks of a process group of gloo; one that hangs is red within seconds."""

from __future__ import annotations

import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE = timedelta(seconds=30)  # a rank whose others do not come raises


def on_ranks(ranks: int, run: Callable[..., None], *args: Any, seconds: float = 240) -> None:
    """``run(*args)`` in so many processes, each a rank of the default group.

    Raises what a rank raises; an AssertionError where they do not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        started = torch.multiprocessing.start_processes(
            _on_a_rank, (ranks, meeting, run, args), nprocs=ranks, join=False
        )
        deadline = time.monotonic() + seconds
        try:
            while not started.join(timeout=1):
                assert time.monotonic() < deadline, f"{ranks} ranks did not end in {seconds} s"
        finally:
            for process in started.processes:
                process.kill()


def _on_a_rank(
    rank: int, ranks: int, meeting: str, run: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # by which torch deprecates collectives
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=ranks,
        timeout=COLLECTIVE,
    )
    run(*args)
    # Else gloo's threads may still run when the process ends, which then aborts.
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of this process, which has none yet."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
