"""The normalizer on two by two ranks: with every host the gradient is that of one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ipo_ext
from ipo_ext.distributed import local_sequences, normalizer
from tests.support.logprobs import cu_seqlens
from tests.support.ranks import alone, on_ranks

WIDTH, VOCABULARY = 6, 11
CUTS = (cu_seqlens([9, 0, 15]), cu_seqlens([8]))  # of each data-parallel rank


def inputs(rank: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of a data-parallel rank: states, and what the loss takes. They train different numbers."""
    generator = torch.Generator().manual_seed(rank)
    tokens = int(CUTS[rank][-1])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    others = {
        "labels": torch.randint(VOCABULARY, (tokens,), generator=generator),
        "inference_logprobs": -2.4 + 0.1 * normal(tokens),
        "advantages": normal(tokens),
        "loss_mask": torch.rand(tokens, generator=generator) < 0.7,
    }
    return normal(tokens, WIDTH), others


def policy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCABULARY)).double()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None for grad in grads)
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]


def backward(
    model: Callable[..., Any], states: torch.Tensor, others: dict[str, torch.Tensor], count: Any
) -> torch.Tensor:
    loss = ipo_ext.ipo_loss_from_logits(model(states), **others, normalizer=count).loss
    loss.backward()
    return loss


def of_one_process() -> tuple[int, list[torch.Tensor]]:
    """The global number of tokens, and the gradient of their mean."""
    parts = [inputs(rank) for rank in range(2)]
    states = torch.cat([part[0] for part in parts])
    others = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
    model = policy()
    total = int(others["loss_mask"].sum())
    backward(model, states, others, float(total))
    return total, gradients(model)


def mine(mesh: DeviceMesh) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of a rank that shares the sequences of its data-parallel rank."""
    rank = mesh["dp"].get_local_rank()
    states, others = inputs(rank)
    index = local_sequences(CUTS[rank], mesh["cp"].get_local_rank(), 2, "zigzag").token_index
    return states[index], {name: tensor[index] for name, tensor in others.items()}


class Host(NamedTuple):
    """A row of the docs' table: over how many of four ranks it averages, and adds the rest."""

    model: nn.Module
    averages: int
    arguments: dict[str, Any] = {}  # noqa: RUF012  # of normalizer, beside count and group
    adds_over: dist.ProcessGroup | None = None


def ddp(mesh: DeviceMesh) -> Host:
    return Host(nn.parallel.DistributedDataParallel(policy()), 4)


def fsdp2(mesh: DeviceMesh) -> Host:
    return Host(fully_shard(policy(), mesh=mesh._flatten("dp_cp")), 4)


def fsdp2_that_adds(mesh: DeviceMesh) -> Host:
    model = fully_shard(policy(), mesh=mesh._flatten("dp_cp"))
    model.set_gradient_divide_factor(1.0)
    return Host(model, 1, {"average_over": 1})


def fsdp2_over_dp(mesh: DeviceMesh) -> Host:
    """Gradients are then added over cp."""
    model = fully_shard(policy(), mesh=mesh["dp"])
    return Host(model, 2, {"average_over": mesh["dp"]}, mesh["cp"].get_group())


def with_context_parallel_ranks() -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    total, expected = of_one_process()
    states, others = mine(mesh)
    for make in (ddp, fsdp2, fsdp2_that_adds, fsdp2_over_dp):
        host = make(mesh)
        count = normalizer(others["loss_mask"].sum(), dist.group.WORLD, **host.arguments)
        backward(host.model, states, others, count)
        assert float(count) == total / host.averages
        for ours, theirs in zip(gradients(host.model), expected, strict=True):
            if host.adds_over is not None:
                dist.all_reduce(ours, group=host.adds_over)
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14, msg=make.__name__)


def with_tensor_parallel_ranks() -> None:
    """They have the same tokens: counted once, whatever the host averages over."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    total, expected = of_one_process()
    states, others = inputs(mesh["dp"].get_local_rank())
    for model in (
        fully_shard(policy(), mesh=mesh["dp"]),
        nn.parallel.DistributedDataParallel(policy()),
    ):
        count = normalizer(others["loss_mask"].sum(), mesh["dp"])
        backward(model, states, others, count)
        assert float(count) == total / 2
        for ours, theirs in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


def waits_where_it_is_used() -> None:
    rank = dist.get_rank()
    dist.barrier()
    if rank == 3:
        time.sleep(3)
    began = time.monotonic()
    count = normalizer(rank, average_over=1)
    assert time.monotonic() - began < 2
    assert float(count) == 6
    assert float(normalizer(torch.tensor(0))) == 0


def is_what_aggregate_divides_by() -> None:
    _, others = inputs(dist.get_rank() % 2)
    _, total = ipo_ext.aggregate("token_mean", others["loss_mask"], group=dist.group.WORLD)
    assert float(normalizer(others["loss_mask"].sum())) == float(total) / 4


def on_a_rank() -> None:
    with_context_parallel_ranks()
    with_tensor_parallel_ranks()
    waits_where_it_is_used()
    is_what_aggregate_divides_by()


def test_with_every_host_the_gradient_is_that_of_one_process() -> None:
    on_ranks(4, on_a_rank)


def test_a_compiled_loss_waits_too() -> None:
    states, others = inputs(0)
    expected, model = policy(), policy()
    backward(expected, states, others, float(others["loss_mask"].sum()))
    run = torch.compile(ipo_ext.ipo_loss_from_logits, fullgraph=True, backend="aot_eager")
    with alone():
        count = normalizer(others["loss_mask"].sum())
        run(model(states), **others, normalizer=count).loss.backward()
    for ours, theirs in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "num_tokens: expected an int or", (torch.tensor([1, 2]),)),
        (ValueError, "num_tokens: expected an int or", (1.5,)),
        (ValueError, "num_tokens: expected an int or", (torch.tensor(True),)),
        (TypeError, "group: expected a process group or", (3, "dp")),
        (ValueError, "average_over: expected at least 1 rank", (3, None, 0)),
        (TypeError, "average_over: expected a process group or", (3, None, 0.5)),
    ],
)
def test_refusals_say_what_was_expected(
    error: type[Exception], words: str, arguments: tuple[Any, ...]
) -> None:
    count, group, average_over = (*arguments, None, None)[:3]
    with alone(), pytest.raises(error, match=words):
        normalizer(count, group, average_over=average_over)


def test_without_a_process_group_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="group: expected a process group, got None"):
        normalizer(3)
