"""A vocabulary shared by ranks, in compiled graphs: the same bits, and no exchange is dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import ipo_ext
from ipo_ext._ops import torch_internals
from ipo_ext._ops.arguments import EXCHANGING
from ipo_ext._ops.changing_numbers import twin
from tests.support import hidden, shards
from tests.support.cases import evaluate, same_bits
from tests.support.ranks import alone, on_ranks

FUNCTIONS = (
    "token_logprobs",
    "ipo_loss_from_logits",
    "ipo_loss_from_hidden",
    "linear_token_logprobs",
    "LinearIPOLoss",
    "IPOLMHead",
)
Scores = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def function_of(name: str, dtype: torch.dtype, group: Any) -> tuple[Scores, list[torch.Tensor]]:
    """A scalar to differentiate and the log-probabilities; hidden states and this rank's weight."""
    case = hidden.random_case(dtype=dtype, token_temperature=True, chunk_size=16)
    vocabulary = len(case.weight)
    part = shards.uneven(vocabulary, dist.get_rank(), dist.get_world_size())
    shard = {"tp_group": group, "vocab_size": vocabulary}
    how = {"temperature": case.temperature, "softcap": 4.0}
    inputs = (case.labels, case.inference_logprobs, case.advantages, case.loss_mask)
    weight = part.of(case.weight)
    head = ipo_ext.IPOLMHead(nn.Linear(2, 2, bias=False), **shard)
    module = ipo_ext.LinearIPOLoss(**shard)

    def run(states: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if name == "token_logprobs":
            logits = states @ weight.t()
            logprobs, entropy = ipo_ext.token_logprobs(logits, case.labels, **how, **shard)
            return (2 * logprobs + entropy)[0:9].sum(), logprobs
        if name == "linear_token_logprobs":
            logprobs, entropy = ipo_ext.linear_token_logprobs(
                states, weight, case.labels, chunk_size=16, **how, **shard
            )
            return (2 * logprobs + entropy)[0:9].sum(), logprobs
        if name == "ipo_loss_from_logits":
            output = ipo_ext.ipo_loss_from_logits(states @ weight.t(), *inputs, **how, **shard)
        elif name == "ipo_loss_from_hidden":
            output = ipo_ext.ipo_loss_from_hidden(states, weight, *inputs, **how, **shard)
        elif name == "LinearIPOLoss":
            output = module(states, weight, *inputs, **how)
        else:
            output = torch.func.functional_call(head, {"weight": weight}, (states, *inputs), how)
        return output.loss, output.logprobs

    return run, [case.hidden, weight]


def results_of(run: Scores, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    objective, logprobs = run(*leaves)
    return [objective.detach(), logprobs.detach(), *torch.autograd.grad(objective, leaves)]


def compiled_on_two_ranks(backends: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for name in FUNCTIONS:
        for dtype in dtypes:
            group = mesh if name in shards.MODULES else dist.group.WORLD
            run, leaves = function_of(name, dtype, group)
            eager = results_of(run, leaves)
            for backend in backends:
                torch._dynamo.reset()
                compiled = torch.compile(run, fullgraph=True, backend=backend)
                for ours, theirs in zip(results_of(compiled, leaves)[1:], eager[1:], strict=True):
                    assert same_bits(ours, theirs), (name, dtype, backend)


def test_compiled() -> None:
    on_ranks(2, compiled_on_two_ranks, ("aot_eager",), (torch.float32,))


@pytest.mark.slow
def test_compiled_by_all_backends() -> None:
    dtypes = (torch.float32, torch.bfloat16)
    on_ranks(2, compiled_on_two_ranks, ("aot_eager", "inductor"), dtypes, seconds=1800)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_no_compiler_drops_an_exchange(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that this rank does not use, others may; and an exchange is one with all of them."""
    gathered, exchanges = torch_internals.gathered, []

    def counted(*inputs: Any) -> torch.Tensor:
        exchanges.append(1)
        return gathered(*inputs)

    monkeypatch.setattr(torch_internals, "gathered", counted)
    with alone() as group:
        logits, labels = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
        name = group.group_name
        arguments = (logits, labels, None, 0.0, None, True, 0, 6, name, "")

        def unused(logits: torch.Tensor) -> torch.Tensor:
            torch.ops.ipo_ext.token_logprobs_sharded(logits, *arguments[1:])
            return logits * 2

        torch.compile(unused, fullgraph=True, backend=backend)(logits)
    assert exchanges == [1]


class Policy(nn.Module):
    """A trunk, and a head over the ranks of tp."""

    def __init__(self, weight: torch.Tensor, tp: Any) -> None:
        super().__init__()
        width = weight.shape[1]
        self.trunk = nn.Linear(width, width, bias=False, dtype=weight.dtype)
        nn.init.eye_(self.trunk.weight)
        linear = nn.Linear(width, len(weight), bias=False, dtype=weight.dtype)
        self.head = ipo_ext.IPOLMHead(linear, tp_group=tp)
        self.head.weight = nn.Parameter(distribute_tensor(weight, tp, [Shard(0)]))

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor, batch: ipo_ext.LossBatch
    ) -> ipo_ext.IPOOutput:
        return self.head(self.trunk(hidden), labels, batch)


def fsdp_on_four_ranks() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    case = hidden.random_case(tokens=8, dtype=torch.float64, normalizer=7.0)
    model = Policy(case.weight, mesh["tp"])
    fully_shard(model.head, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    mine = slice(4 * mesh["dp"].get_local_rank(), 4 * mesh["dp"].get_local_rank() + 4)
    inputs = (case.inference_logprobs[mine], case.advantages[mine], case.loss_mask[mine])
    batch = ipo_ext.LossBatch(*inputs, normalizer=case.normalizer / 2)
    model(case.hidden[mine], case.labels[mine], batch).loss.backward()
    whole = evaluate(case)
    of_head, of_trunk = model.head.weight.grad, model.trunk.weight.grad
    torch.testing.assert_close(of_head.full_tensor(), whole.grad_weight)
    torch.testing.assert_close(of_trunk.full_tensor(), whole.grad_hidden.t() @ case.hidden)


@pytest.mark.slow
def test_inside_fsdp() -> None:
    """On a mesh of dp x tp, whose tp ranks have the same tokens; tp brings no factor."""
    on_ranks(4, fsdp_on_four_ranks)


def test_every_operator_that_exchanges_keeps_its_place() -> None:
    from torch._higher_order_ops.effects import _get_effect
    from torch._library.effects import EffectType

    for name in EXCHANGING:
        for each in (name, twin(name)):
            assert _get_effect(f"ipo_ext::{each}") == EffectType.ORDERED


def test_collectives() -> None:
    with alone() as group:
        name = group.group_name
        tensor = torch.arange(6.0).view(2, 3)
        assert torch.equal(torch_internals.gathered(tensor, name), tensor[None])
        assert torch.equal(torch_internals.sum_of_ranks(tensor, name), tensor)
        assert torch_internals.member_of(name) == (0, 1)
        for start in (torch_internals.gathered_later, torch_internals.scattered_later):
            assert torch.equal(torch_internals.waited(start(tensor, name, 1)), tensor)
