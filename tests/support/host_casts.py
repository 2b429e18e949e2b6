"""A head in two processes inside a host: what its cast does to plain arguments and to a batch."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.nn.parallel.distributed import DistributedDataParallel, _MixedPrecision
from torch.utils.data import DataLoader

from ipo_ext import (
    IPOConfig,
    IPOLMHead,
    IPOMetrics,
    IPOOutput,
    LossBatch,
    LowPrecisionWarning,
    _precision,
    reference,
)

ROWS, WIDTH, VOCABULARY = 32, 32, 64
CONFIG = IPOConfig(teacher_tau=0.1)
SECONDS = 120  # for two processes that start, import torch and finish: a few, on an idle machine


class Policy(nn.Module):
    """Gives the head's output, which every host passes on as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.head = head()

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor, *inputs: Any, **optional: Any
    ) -> IPOOutput:
        return self.head(hidden, labels, *inputs, **optional)


def head() -> IPOLMHead:
    linear = nn.Linear(WIDTH, VOCABULARY, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight())
    return IPOLMHead(linear, CONFIG)


def weight() -> torch.Tensor:
    """What 16 bits hold exactly, as they do the hidden states: a cast changes neither."""
    generator = torch.Generator().manual_seed(100)
    return (1.5 * torch.randn(VOCABULARY, WIDTH, generator=generator)).bfloat16().float()


def inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states, labels, and the loss's other inputs in float64, without any mismatch."""
    generator = torch.Generator().manual_seed(rank)

    def uniform() -> torch.Tensor:
        return torch.rand(ROWS, generator=generator, dtype=torch.float64)

    hidden = torch.randn(ROWS, WIDTH, generator=generator).bfloat16().float()
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    temperature = 0.7 + 0.6 * uniform()
    logprobs, _ = reference.linear_token_logprobs(
        hidden, weight(), labels, temperature=temperature, dtype=torch.float64
    )
    others = {
        "inference_logprobs": logprobs,
        "advantages": uniform() - 0.4,
        "loss_mask": uniform() < 0.8,
        "temperature": temperature,
        "teacher_logprobs": logprobs - uniform(),
        "loss_weights": 0.5 + uniform(),
        "normalizer": torch.tensor(23.456, dtype=torch.float64),
    }
    return hidden, labels, others


def assert_exact(rank: int, outcome: IPOOutput) -> None:
    """Loss and metrics are those of the inputs in float64."""
    loss, metrics, *_ = outcome
    assert isinstance(metrics, IPOMetrics)
    hidden, labels, others = inputs(rank)
    expected = reference.ipo_loss_from_hidden(
        hidden, weight(), labels, **others, config=CONFIG, dtype=torch.float64
    )
    torch.testing.assert_close(loss.double(), expected.loss, rtol=2e-5, atol=0)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(
            metrics[name].double(), value, rtol=2e-5, atol=2e-5, msg=lambda text, n=name: n + text
        )


def outcome_and_warnings(call: Callable[[], Any]) -> tuple[Any, int]:
    """What it gives, and how often it warned of log-probabilities in 16 bits."""
    _precision._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = call()
    return outcome, sum(warning.category is LowPrecisionWarning for warning in caught)


def assert_casts_plain_arguments_alone(model: Callable[..., Any], rank: int) -> None:
    """They are off and say so; the same in a batch is exact."""
    hidden, labels, others = inputs(rank)
    names = ("inference_logprobs", "advantages", "loss_mask")
    positional = [others[name] for name in names]
    optional = {name: value for name, value in others.items() if name not in names}

    outcome, warned = outcome_and_warnings(lambda: model(hidden, labels, *positional, **optional))
    metrics = outcome.metrics
    assert warned == 1
    assert metrics["log_ratio_max"] - metrics["log_ratio_min"] > 5e-3  # both are 0 in truth

    outcome, warned = outcome_and_warnings(lambda: model(hidden, labels, LossBatch(**others)))
    assert warned == 0
    assert_exact(rank, outcome)


def run_on_two_ranks(on_rank: Callable[[int, str], None], folder: Path) -> None:
    """``on_rank(rank, file to meet at)`` in two processes; ends them if they hang."""
    context = torch.multiprocessing.start_processes(
        _one_rank, (on_rank, str(folder / "rendezvous")), nprocs=2, join=False
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):  # raises what a rank raised
            assert time.monotonic() < deadline, f"ranks did not finish in {SECONDS} seconds"
    finally:
        for process in context.processes:
            process.kill()


def _one_rank(rank: int, on_rank: Callable[[int, str], None], meeting: str) -> None:
    torch.set_num_threads(1)
    on_rank(rank, meeting)
    # Else gloo's threads may still run when the process ends, which then aborts.
    dist.barrier()
    dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------
# Hosts


def join_group(rank: int, meeting: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )


def on_fsdp2(rank: int, meeting: str) -> None:
    join_group(rank, meeting)
    mesh = init_device_mesh("cpu", (2,))
    exact, cast = Policy(), Policy()
    fully_shard(cast, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert_casts_plain_arguments_alone(cast, rank)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    fully_shard(exact, mesh=mesh, mp_policy=policy)
    hidden, labels, others = inputs(rank)
    assert_exact(rank, exact(hidden.bfloat16(), labels, **others))


def on_fsdp1(rank: int, meeting: str) -> None:
    join_group(rank, meeting)
    policy = MixedPrecision(param_dtype=torch.bfloat16, cast_root_forward_inputs=True)
    model = FullyShardedDataParallel(
        Policy(), device_id=torch.device("cpu"), mixed_precision=policy
    )
    assert_casts_plain_arguments_alone(model, rank)


def on_ddp(rank: int, meeting: str) -> None:
    join_group(rank, meeting)
    # DDP orders its copies of the parameters by streams and events, which CPUs neither have nor
    # need; a torch with CUDA looks for its driver at the first of them.
    with (
        mock.patch.object(torch, "Stream", mock.MagicMock()),
        mock.patch.object(torch, "Event", mock.MagicMock()),
        mock.patch.object(torch.accelerator, "current_stream", mock.MagicMock()),
    ):
        model = DistributedDataParallel(
            Policy(), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16)
        )
        assert_casts_plain_arguments_alone(model, rank)


def accelerator_of(rank: int, meeting: str) -> Any:
    """Accelerate in bf16, of two processes."""
    import accelerate  # of the test extra, which the integrations' environments lack

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, not used
    join_group(rank, meeting)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    assert accelerator.num_processes == 2
    return accelerator


def on_accelerate(rank: int, meeting: str) -> None:
    """Casts outputs and runs under autocast; its loader moves a batch by the batch's own ``to``."""
    accelerator = accelerator_of(rank, meeting)
    loader = DataLoader([0, 1], collate_fn=lambda ranks: (ranks[0], batch_of(ranks[0])))
    model, loader = accelerator.prepare(Policy(), loader)
    hidden, labels, others = inputs(rank)
    with mock.patch.object(LossBatch, "to", autospec=True, side_effect=LossBatch.to) as moves:
        ((index, batch),) = loader
    assert (index, moves.call_count) == (rank, 1)
    for arguments in ({"inference_logprobs": batch}, others):
        outcome, warned = outcome_and_warnings(
            lambda given=arguments: model(hidden, labels, **given)
        )
        assert warned == 0
        assert_exact(rank, outcome)


def batch_of(rank: int) -> LossBatch:
    return LossBatch(**inputs(rank)[2])


HOSTS = (on_fsdp2, on_fsdp1, on_ddp, on_accelerate)
