"""DeepSpeed's engine in fp16: ``auto_cast`` rounds plain positional arguments, not a batch."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from unittest import mock

import deepspeed
import torch

from tests.support.host_casts import Policy, assert_casts_plain_arguments_alone, run_on_two_ranks


def on_rank(rank: int, meeting: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    model = Policy()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "fp16": {"enabled": True, "auto_cast": True},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    accelerator = type(deepspeed.accelerator.get_accelerator())
    backend = importlib.import_module("deepspeed.comm.torch")
    with (
        mock.patch.object(accelerator, "is_fp16_supported", return_value=True),  # CPUs are refused
        mock.patch.object(backend, "build_shm_op", return_value=None),  # it compiles C++
    ):
        deepspeed.init_distributed("gloo")
        engine, *_ = deepspeed.initialize(model=model, config=settings)
    assert_casts_plain_arguments_alone(engine, rank)


def test_a_batch_is_not_cast(tmp_path: Path) -> None:
    run_on_two_ranks(on_rank, tmp_path)
