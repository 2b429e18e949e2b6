"""Every public function in a training step: activation checkpointing and FSDP2."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import ipo_ext
from tests.support import hidden
from tests.support.backends import Backend
from tests.support.cases import evaluate, same_bits
from tests.support.hidden import leaves_of
from tests.support.operators import operator
from tests.support.subjects import SUBJECTS, TOKENS, VOCABULARY, Subject

# -------------------------------------------------------------------------------------------------
# Activation checkpointing


class CountOperators(TorchDispatchMode):
    """Counts the calls of each operator that reaches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def forward_operator(subject: Subject) -> Any:
    return operator(subject.operator)


def saving(operator: Any) -> Callable[[], Any]:
    return functools.partial(create_selective_checkpoint_contexts, [operator])


# What is kept of the forward pass, to how often the forward operator runs in a step.
CHECKPOINTS = {"none": 1, "plain": 2, "selective": 1}


def checkpointed(subject: Subject, kind: str) -> Callable[..., torch.Tensor]:
    """The objective on what a layer makes of the inputs, its activations dropped and made again."""

    def layer_and_loss(first: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        return subject.objective(torch.sin(first) * 2, *constants)

    if kind == "none":
        return layer_and_loss
    options = {"context_fn": saving(forward_operator(subject))} if kind == "selective" else {}
    return functools.partial(checkpoint, layer_and_loss, use_reentrant=False, **options)


def gradient_of(step: Callable[..., torch.Tensor], first: torch.Tensor, *rest: Any) -> Any:
    leaf = first.detach().requires_grad_()
    return torch.autograd.grad(step(leaf, *rest), leaf)[0]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpointing(backend: Backend, subject: Subject, kind: str) -> None:
    first, constants = subject.inputs(backend.device)
    expected = gradient_of(checkpointed(subject, "none"), first, *constants)
    with CountOperators() as counted:
        gradient = gradient_of(checkpointed(subject, kind), first, *constants)
    assert same_bits(gradient, expected)
    assert counted.calls[forward_operator(subject).name()] == CHECKPOINTS[kind]


def compiled_calls(step: Callable[..., torch.Tensor], operator: Any, *inputs: Any) -> Any:
    """The gradient of a compiled step, and how often its graphs call the operator."""
    graphs = AotEagerAndRecordGraphs()
    gradient = gradient_of(torch.compile(step, fullgraph=True, backend=graphs), *inputs)
    nodes = [node for graph in graphs.fw_graphs + graphs.bw_graphs for node in graph.graph.nodes]
    return gradient, sum(node.target is operator for node in nodes)


class Sort(torch.autograd.Function):
    """Has two outputs and saves the second, like the Functions of ours."""

    @staticmethod
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.sort(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad_values: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.empty_like(grad_values).scatter_(-1, ctx.saved_tensors[0], grad_values)


def runs_of_a_checkpointed_function() -> int:
    """How often torch runs a Function's operator in a compiled step: 2.11 once, 2.13 twice.

    Where a Function has several outputs, torch 2.11 keeps what it saved.
    """

    def step(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: Sort.apply(torch.sin(x))[0].sum(), x, use_reentrant=False)

    _, runs = compiled_calls(step, torch.ops.aten.sort.default, torch.ones(3))
    return int(runs)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_compiled_checkpointing(backend: Backend, subject: Subject, kind: str) -> None:
    first, constants = subject.inputs(backend.device)
    expected = gradient_of(checkpointed(subject, "none"), first, *constants)
    step, operator = checkpointed(subject, kind), forward_operator(subject)
    gradient, calls = compiled_calls(step, operator, first, *constants)
    assert same_bits(gradient, expected)
    expected_calls = CHECKPOINTS[kind]
    if kind == "plain":
        expected_calls = runs_of_a_checkpointed_function()
        assert expected_calls == 2 or torch.__version__ < (2, 13)
    assert calls == expected_calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_from_hidden(backend: Backend, reentrant: bool) -> None:
    case = hidden.random_case().to(backend.device)
    expected = evaluate(case)
    states, weight = leaves_of(case)

    def loss(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return case.with_(hidden=states, weight=weight).call().loss

    checkpoint(loss, states, weight, use_reentrant=reentrant).backward()
    assert torch.equal(states.grad, expected.grad_hidden)
    assert torch.equal(weight.grad, expected.grad_weight)


# -------------------------------------------------------------------------------------------------
# FSDP2


class Policy(nn.Module):
    """Token by token, two blocks between an embedding and a head: enough to be sharded."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2)
        )
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False)
        return self.head(hidden)


def first_of(subject: Subject, logits: torch.Tensor) -> torch.Tensor:
    """What the function differentiates, from the policy's logits."""
    return logits.log_softmax(-1)[:, 0] if subject is SUBJECTS["ipo_loss"] else logits


@pytest.fixture
def one_process(backend: Backend) -> Iterator[Any]:
    transport = "nccl" if backend.name == "cuda" else "gloo"
    dist.init_process_group(transport, store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(backend.device.type, (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_step_with_fsdp_and_checkpointing(
    backend: Backend, subject: Subject, kind: str, one_process: Any
) -> None:
    """Blocks and loss compiled without a graph break, parameters sharded, as trainers do it."""
    tokens = torch.arange(TOKENS, device=backend.device) % VOCABULARY
    _, constants = subject.inputs(backend.device)
    torch.manual_seed(0)
    policy = Policy().to(backend.device)
    sharded = Policy().to(backend.device)
    sharded.load_state_dict(policy.state_dict())
    for index, block in enumerate(sharded.blocks):
        sharded.blocks[index] = torch.compile(block, fullgraph=True, backend="aot_eager")
        fully_shard(sharded.blocks[index], mesh=one_process)
    fully_shard(sharded, mesh=one_process)
    loss = checkpointed(subject, kind)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")

    loss(first_of(subject, policy(tokens)), *constants).backward()
    compiled(first_of(subject, sharded(tokens)), *constants).backward()
    assert_same_gradients(sharded, policy)
    assert not counters["graph_break"]


def test_a_sharded_head_gives_the_loss(backend: Backend, one_process: Any) -> None:
    """With the head's own weight, which FSDP gathers for the head's forward pass."""
    subject = SUBJECTS["ipo_loss_from_hidden"]
    hidden, (_, *constants) = subject.inputs(backend.device)
    torch.manual_seed(0)
    linear = nn.Linear(VOCABULARY, VOCABULARY, bias=False, device=backend.device)
    head = ipo_ext.IPOLMHead(linear)
    sharded = ipo_ext.IPOLMHead(copy.deepcopy(linear))
    fully_shard(sharded, mesh=one_process)
    for module in (head, sharded):
        module(hidden, *constants).loss.backward()
    assert_same_gradients(sharded, head)


def assert_same_gradients(sharded: nn.Module, plain: nn.Module) -> None:
    for shard, whole in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert isinstance(shard.grad, DTensor)
        torch.testing.assert_close(shard.grad.full_tensor(), whole.grad)
