"""Runs a function on several ranks, processes of this machine; one that hangs is a failure."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.integrations import conftest  # noqa: F401  # a spawned rank needs what it sets up, too


def on_ranks(
    run: Callable[..., Any],
    *args: Any,
    ranks: int = 2,
    start_method: str = "fork",
    timeout: float = 240,
) -> list[Any]:
    """What ``run(*args)`` returns on each rank, whose environment is that of ``torchrun``.

    Args:
        start_method: "spawn" where this process has begun what a fork waits for, such as compiling;
            a fork need not import the host again, which can take longer than all else.

    Raises:
        AssertionError: they have not ended after ``timeout`` seconds; they are then stopped.
        Exception: what a rank raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, _free_port(), folder, run, args)
        started = torch.multiprocessing.start_processes(
            _on_a_rank, given, nprocs=ranks, join=False, start_method=start_method
        )
        deadline = time.monotonic() + timeout
        while not started.join(timeout=1):
            if time.monotonic() > deadline:
                for process in started.processes:
                    process.kill()
                raise AssertionError(f"{ranks} ranks were to end in {timeout} s, and hang")
        files = [Path(folder) / f"{rank}.pt" for rank in range(ranks)]
        return [torch.load(file, weights_only=False) for file in files]


def in_a_group(run: Callable[..., Any], *args: Any) -> Any:
    """``run(*args)`` in a process group of gloo, of ranks that ``on_ranks`` started."""
    torch.distributed.init_process_group("gloo")
    try:
        return run(*args)
    finally:
        torch.distributed.destroy_process_group()


def _on_a_rank(
    rank: int, ranks: int, port: int, folder: str, run: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.save(run(*args), Path(folder) / f"{rank}.pt")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
