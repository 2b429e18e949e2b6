"""Every public function under torch's compilers, exporters and transforms; training with them."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import ipo_ext
from backends import Backend
from cases import same_bits
from ipo_ext import _C, IPOConfig, _operators
from ipo_ext.diagnosis import info
from subjects import SUBJECTS, VOCABULARY, Subject

TOKENS = 24


@pytest.fixture(autouse=True)
def _fresh_counters() -> None:
    counters.clear()


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


def per_token(tensor: torch.Tensor) -> bool:
    """Whether it has a row for each of TOKENS tokens, as all but weights have."""
    return tensor.shape[0] == TOKENS


def test_every_public_function_is_a_subject() -> None:
    functions = {name for name in ipo_ext.__all__ if "loss" in name or "logprobs" in name}
    assert set(SUBJECTS) == functions


# ---------------------------------------------------------------------------------------------
# opcheck


def values(operator: str, device: torch.device) -> dict[str, Any]:
    """A value for every name in the operators' schemas."""
    rows = TOKENS, VOCABULARY
    per_token = torch.rand(TOKENS)
    tensors = {
        "trainer_logprobs": -per_token,
        "logits": torch.randn(rows),
        "hidden": torch.randn(rows),
        "weight": torch.randn(VOCABULARY, VOCABULARY),
        "labels": torch.randint(VOCABULARY, (TOKENS,)),
        "inference_logprobs": -torch.rand(TOKENS),
        "advantages": torch.randn(TOKENS),
        "loss_mask": per_token < 0.8,
        "temperature": per_token + 0.5,
        "teacher_logprobs": -per_token,
        "loss_weights": per_token,
        "cu_seqlens": torch.tensor([0, 5, 5, TOKENS], dtype=torch.int32),
        "normalizer": torch.tensor(7.0),
        "logprobs": -per_token,
        "entropy": per_token,
        "softmax_stats": torch.rand(2, TOKENS),
        "grad_logprobs": torch.randn(TOKENS),
        "grad_entropy": torch.randn(TOKENS),
        "fault": torch.zeros(1, dtype=torch.int32),
        "gradient": torch.randn(rows),
        "out": torch.empty(rows, dtype=torch.bfloat16),
        "factor": torch.tensor(0.3),
        "sums": torch.rand(len(_C.SUM_ROWS), 3, dtype=torch.float64),
        "extremes": torch.rand(len(_C.EXTREME_ROWS), 3, dtype=torch.float64),
    }
    numbers = dict(
        zip(("low", "high"), IPOConfig().log_bounds(torch.float32), strict=True),
        **dict.fromkeys(("num_active", "max_active"), TOKENS),
        **dict.fromkeys(("with_gradient", "needs_grad_hidden", "needs_grad_weight"), True),
        mask_rule=1, kl_active=True, adv_tau=1.0, kl_tau=1e-3, teacher_tau=0.3, softcap=4.0,
        rollout_low=None, chunk_size=8, columns=VOCABULARY, float64=False, normalized=True,
    )  # fmt: skip
    known = {name: tensor.to(device) for name, tensor in tensors.items()} | numbers
    # A chunk of rows is not packed.
    return known | {"cu_seqlens": None} if operator.startswith("chunk") else known


@pytest.mark.parametrize("name", [name.removeprefix("ipo_ext::") for name in info.operators()])
def test_opcheck(backend: Backend, name: str) -> None:
    operator = getattr(_operators.library(), name).default
    known = values(name, backend.device)
    arguments = [known[argument.name] for argument in operator._schema.arguments]
    arguments[0].requires_grad_(name in SUBJECTS)
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


# ---------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_compiled_equals_eager(backend: Backend, subject: Subject, mode: str) -> None:
    first, constants = subject.inputs(TOKENS, backend.device)
    compiled = subject._replace(function=torch.compile(subject.function, fullgraph=True, mode=mode))
    expected = subject.gradient(first, *constants)
    for _ in range(3):  # CUDA graphs: warm-up, capture, replay
        torch.compiler.cudagraph_mark_step_begin()
        assert same_bits(compiled.gradient(first, *constants), expected)


def test_a_new_length_recompiles_once(backend: Backend, subject: Subject) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = subject._replace(function=torch.compile(subject.function, backend=counter))
    for tokens in (TOKENS, 40, 7, 100, 33):  # the second makes the size dynamic
        first, constants = subject.inputs(tokens, backend.device)
        assert same_bits(compiled.gradient(first, *constants), subject.gradient(first, *constants))
    assert counter.frame_count == 2
    assert not counters["graph_break"]


# ---------------------------------------------------------------------------------------------
# Other tracers


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_traces_the_gradient(backend: Backend, subject: Subject, mode: str) -> None:
    first, constants = subject.inputs(TOKENS, backend.device)
    graph = make_fx(subject.gradient, tracing_mode=mode)(first, *constants)
    other, others = subject.inputs(TOKENS, backend.device)
    assert same_bits(graph(other, *others), subject.gradient(other, *others))


class Objective(nn.Module):
    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.subject.objective(*inputs)


def test_export(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(TOKENS, backend.device)
    tokens = torch.export.Dim("tokens")
    shapes = tuple({0: tokens} if per_token(tensor) else None for tensor in (first, *constants))
    program = torch.export.export(
        Objective(subject), (first, *constants), dynamic_shapes={"inputs": shapes}
    )
    first, constants = subject.inputs(9, backend.device)
    expected = subject.objective(first, *constants)
    assert same_bits(program.module()(first, *constants), expected)


class Everything(nn.Module):
    """Every public function in one graph: a package takes the C++ compiler seconds."""

    def forward(self, inputs: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: subject.objective(*inputs[name]) for name, subject in SUBJECTS.items()}


def everything(device: torch.device) -> dict[str, list[torch.Tensor]]:
    def inputs(subject: Subject) -> list[torch.Tensor]:
        first, constants = subject.inputs(TOKENS, device)
        return [first, *constants]

    return {name: inputs(subject) for name, subject in SUBJECTS.items()}


def test_aot_inductor_package(backend: Backend, tmp_path: Path) -> None:
    inputs = everything(backend.device)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(Everything(), (inputs,)), package_path=str(tmp_path / "loss.pt2")
    )
    results = torch._inductor.aoti_load_package(package)(inputs)
    torch.testing.assert_close(results, Everything()(inputs))


# ---------------------------------------------------------------------------------------------
# Transforms and modes


def test_func_grad_equals_autograd(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(TOKENS, backend.device)
    gradient = torch.func.grad(subject.objective)(first, *constants)
    assert same_bits(gradient, subject.gradient(first, *constants))


def test_vmap_is_refused(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(TOKENS, backend.device)
    inputs = [first, *constants]
    batch = [tensor.unflatten(0, (4, -1)) if per_token(tensor) else tensor for tensor in inputs]
    dimensions = tuple(0 if per_token(tensor) else None for tensor in inputs)
    for function in (subject.objective, torch.func.grad(subject.objective)):
        with pytest.raises(NotImplementedError, match="vmap over the loss is not supported"):
            torch.vmap(function, dimensions)(*batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_for_products_alone(
    backend: Backend, subject: Subject, dtype: torch.dtype
) -> None:
    first, constants = subject.inputs(TOKENS, backend.device)
    first = first.to(dtype)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        inside = subject.gradient(first, *constants)
    if subject.multiplies:
        weight, *others = constants
        constants = weight.bfloat16(), *others
        first = first.bfloat16()
    assert inside.dtype == dtype
    assert same_bits(inside, subject.gradient(first, *constants).to(dtype))


def test_deterministic_mode_is_accepted(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(TOKENS, backend.device)
    torch.use_deterministic_algorithms(True)
    try:
        inside = subject.gradient(first, *constants)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(inside, subject.gradient(first, *constants))


# ---------------------------------------------------------------------------------------------
# Streams and graphs, where there is a GPU


@pytest.mark.cuda_only
def test_a_side_stream(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(TOKENS, backend.device)
    expected = subject.gradient(first, *constants)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradient = subject.gradient(first, *constants)
    torch.cuda.current_stream().wait_stream(stream)
    assert same_bits(gradient, expected)


@pytest.mark.cuda_only
def test_a_captured_graph_follows_its_inputs(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(TOKENS, backend.device)
    leaf = first.clone().requires_grad_()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # warm-up, as torch asks for before a capture
        subject.gradient(leaf, *constants)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = subject.gradient(leaf, *constants)
    other = first.flip(0)
    leaf.data.copy_(other)
    graph.replay()
    assert same_bits(gradient, subject.gradient(other, *constants))


# ---------------------------------------------------------------------------------------------
# Training: activation checkpointing and FSDP2


class CountOperators(TorchDispatchMode):
    """Counts the calls of each operator that reaches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def forward_operator(subject: Subject) -> Any:
    return getattr(_operators.library(), subject.operator).default


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
    first, constants = subject.inputs(TOKENS, backend.device)
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
    first, constants = subject.inputs(TOKENS, backend.device)
    expected = gradient_of(checkpointed(subject, "none"), first, *constants)
    step, operator = checkpointed(subject, kind), forward_operator(subject)
    gradient, calls = compiled_calls(step, operator, first, *constants)
    assert same_bits(gradient, expected)
    expected_calls = CHECKPOINTS[kind]
    if kind == "plain":
        expected_calls = runs_of_a_checkpointed_function()
        assert expected_calls == 2 or torch.__version__ < (2, 13)
    assert calls == expected_calls


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
    _, constants = subject.inputs(TOKENS, backend.device)
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
    """Tier 3 with the head's own weight: FSDP gathers it for the head's forward pass."""
    subject = SUBJECTS["ipo_loss_from_hidden"]
    hidden, (_, *constants) = subject.inputs(TOKENS, backend.device)
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
