"""torch.compile: the same bits as in eager, one graph, few of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import ipo_ext
from ipo_ext import IPOConfig, IPOLoss, IPOMetrics, IPOOutput, ipo_loss
from tests.support import hidden, logits, subjects
from tests.support.backends import Backend
from tests.support.cases import HiddenCase, LogprobsCase, assert_same_bits, evaluate, same_bits
from tests.support.forms import (
    FORMS,
    TOKENS,
    assert_same_tree,
    compiled,
    forms,
    leaf,
    loss_of,
    output_of,
    token_arguments,
)
from tests.support.hidden import leaves_of
from tests.support.logprobs import cu_seqlens, random_case
from tests.support.operators import operator
from tests.support.subjects import SUBJECTS, Subject

# -------------------------------------------------------------------------------------------------
# Every public function


def test_every_public_function_is_a_subject() -> None:
    functions = {name for name in ipo_ext.__all__ if "loss" in name or "logprobs" in name}
    assert set(SUBJECTS) == functions


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_every_function_compiled_equals_eager(
    backend: Backend, subject: Subject, mode: str
) -> None:
    first, constants = subject.inputs(backend.device)
    traced = subject._replace(function=torch.compile(subject.function, fullgraph=True, mode=mode))
    expected = subject.gradient(first, *constants)
    for _ in range(3):  # CUDA graphs: warm-up, capture, replay
        torch.compiler.cudagraph_mark_step_begin()
        assert same_bits(traced.gradient(first, *constants), expected)


def test_a_new_length_recompiles_once(backend: Backend, subject: Subject) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    traced = subject._replace(function=torch.compile(subject.function, backend=counter))
    for tokens in (subjects.TOKENS, 40, 7, 100, 33):  # the second makes the size dynamic
        first, constants = subject.inputs(backend.device, tokens)
        assert same_bits(traced.gradient(first, *constants), subject.gradient(first, *constants))
    assert counter.frame_count == 2
    assert not counters["graph_break"]


# -------------------------------------------------------------------------------------------------
# From log-probabilities


@forms
def test_compiled_equals_eager(backend: Backend, form: str) -> None:
    case = FORMS[form]().to(backend.device)
    assert_same_bits(evaluate(case, compiled()), evaluate(case))


@forms
def test_compiled_without_gradient_equals_eager(backend: Backend, form: str) -> None:
    case = FORMS[form]().to(backend.device)
    assert_same_tree(case.call(compiled(backend="aot_eager")), case.call())


def test_a_compiled_module_equals_eager(case: LogprobsCase) -> None:
    module = IPOLoss(IPOConfig(teacher_tau=0.5, kl_tau=0.1))
    case = case.with_(config=module.config, trainer_logprobs=leaf(case))

    def forward(*tokens: torch.Tensor, config: IPOConfig, **optional: Any) -> IPOOutput:
        return module(*tokens, **optional)

    assert_same_tree(case.call(compiled(forward)), case.call())


def test_a_config_may_be_made_inside_the_compiled_function(case: LogprobsCase) -> None:
    output = output_of(case)

    def loss(trainer: torch.Tensor) -> torch.Tensor:
        config = IPOConfig(dppo_mask_low=0.0, dppo_mask_high=2.0, kl_tau=0.25)
        return output(trainer, config=config).loss

    trainer = leaf(case)
    assert same_bits(compiled(loss)(trainer), loss(trainer))


def test_several_losses_in_one_graph(backend: Backend) -> None:
    case = random_case(TOKENS).to(backend.device)
    constants = token_arguments(case)[1:]

    def micro_batches(trainer: torch.Tensor) -> tuple[torch.Tensor, Any]:
        first = ipo_loss(*(tokens[:40] for tokens in (trainer, *constants)))
        second = ipo_loss(*(tokens[40:] for tokens in (trainer, *constants)))
        return first.loss + second.loss, first.metrics + second.metrics

    trainer = leaf(case)
    eager, traced = micro_batches(trainer), compiled(micro_batches)(trainer)
    assert_same_tree(traced, eager)
    gradients = (torch.autograd.grad(out[0], trainer)[0] for out in (eager, traced))
    assert same_bits(*gradients)


def test_metrics_leave_a_compiled_function(case: LogprobsCase) -> None:
    output = output_of(case)

    def read(trainer: torch.Tensor) -> Any:
        metrics = output(trainer).metrics
        total = metrics.total()
        return metrics, total + total, sum([metrics, metrics]), {**metrics}, metrics["ess"]

    trainer = leaf(case)
    traced = compiled(read, "aot_eager")(trainer)
    assert isinstance(traced[0], IPOMetrics)
    assert list(traced[0].keys()) == list(traced[3])
    assert_same_tree(traced, read(trainer))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_float_normalizers_compile_at_most_twice(backend: Backend, requires_grad: bool) -> None:
    case = random_case(TOKENS).to(backend.device)
    case = case.with_(trainer_logprobs=case.trainer_logprobs.requires_grad_(requires_grad))
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(backend=counter)
    for step in range(20):
        case = case.with_(normalizer=3.5 + 11 * step)
        assert same_bits(case.call(function).loss, case.call().loss)
    assert counter.frame_count <= 2


def test_new_lengths_recompile_at_most_once(backend: Backend) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(backend=counter)
    for lengths in ([20, 30, 14], [9, 0, 80, 11], [5, 6], [400, 1, 1, 1, 600], [3] * 50):
        case = random_case(sum(lengths)).to(backend.device)
        case = case.with_(cu_seqlens=cu_seqlens(lengths).to(backend.device))
        assert_same_bits(evaluate(case, function), evaluate(case))
    assert counter.frame_count <= 2


def test_compiled_backward_runs_twice_where_asked(case: LogprobsCase) -> None:
    trainer = leaf(case)
    with torch._functorch.config.patch(donated_buffer=False):  # torch's condition for it
        loss = case.with_(trainer_logprobs=trainer).call(compiled(backend="aot_eager")).loss
        (first,) = torch.autograd.grad(loss, trainer, retain_graph=True)
        (second,) = torch.autograd.grad(loss, trainer)
    assert same_bits(first, second)


def test_a_compiled_producer_trains_as_in_eager(backend: Backend) -> None:
    case = random_case(TOKENS).to(backend.device)
    logits = torch.randn(TOKENS, 7, device=backend.device, requires_grad=True)

    loss = loss_of(case)

    def produce(logits: torch.Tensor) -> torch.Tensor:
        return loss(logits.log_softmax(-1)[:, 0])

    (eager,) = torch.autograd.grad(produce(logits), logits)
    (traced,) = torch.autograd.grad(compiled(produce)(logits), logits)
    torch.testing.assert_close(traced, eager)


def test_a_poisoned_loss_stays_poisoned_when_compiled(backend: Backend) -> None:
    case = random_case(TOKENS, segments="sevens").to(backend.device)
    case = case.with_(cu_seqlens=case.cu_seqlens.flip(0))
    function = compiled(backend="aot_eager")
    if backend.faults_raise:
        with pytest.raises(RuntimeError, match="cu_seqlens: expected a partition"):
            evaluate(case, function)
    else:
        poisoned = evaluate(case, function)
        assert math.isnan(poisoned.loss)
        assert poisoned.gradient.isnan().all()


# -------------------------------------------------------------------------------------------------
# From logits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("grad_loss", [1.0, 0.3])
def test_compiled_from_logits_equals_eager(
    backend: Backend, dtype: torch.dtype, grad_loss: float
) -> None:
    traced = compiled(ipo_ext.ipo_loss_from_logits)
    for rows in (5, 8):
        scaling = {"temperature": 0.8, "softcap": 9.0, "logit_scale": 0.7}
        options = {**scaling, "normalizer": 3.0 + rows}
        case = logits.random_case(rows, 3 * rows, dtype, **options).to(backend.device)
        eager = evaluate(case, grad_loss=grad_loss)
        assert_same_bits(evaluate(case, traced, grad_loss=grad_loss), eager)


def test_compiled_token_logprobs(backend: Backend) -> None:
    def gradient(function: Any, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logprobs, entropy = function(scores, labels, temperature=0.7)
        return torch.autograd.grad((logprobs * 2 + entropy).sum(), scores)[0]

    traced = compiled(ipo_ext.token_logprobs)
    for rows in (4, 6):
        scores = torch.randn(rows, 21, device=backend.device, requires_grad=True)
        labels = torch.arange(rows, device=backend.device)
        ours = gradient(traced, scores, labels)
        assert torch.equal(ours, gradient(ipo_ext.token_logprobs, scores, labels))


# -------------------------------------------------------------------------------------------------
# From hidden states


@pytest.mark.parametrize("grad_loss", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_compiled_from_hidden_equals_eager(
    backend: Backend, dtype: torch.dtype, grad_loss: float
) -> None:
    traced = compiled(ipo_ext.ipo_loss_from_hidden)
    for tokens in (20, 31):
        how = {"normalizer": 3.0 + tokens, "has_bias": True}
        case = hidden.random_case(tokens, dtype=dtype, **how).to(backend.device)
        eager = evaluate(case, grad_loss=grad_loss)
        assert_same_bits(evaluate(case, traced, grad_loss=grad_loss), eager)


def test_counts_do_not_recompile(backend: Backend) -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    traced = torch.compile(ipo_ext.ipo_loss_from_hidden, fullgraph=True, backend=graphs)
    case = hidden.random_case().to(backend.device)
    least = int(case.loss_mask.sum())
    for step in range(20):
        evaluate(case, traced, num_active=least + step, normalizer=3.0 + step)
    assert graphs.frame_count <= 2


def test_the_graph_holds_one_node_and_no_logits(backend: Backend) -> None:
    nodes: list[torch.fx.Node] = []

    def inspect(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes.extend(graph.graph.nodes)
        return graph.forward

    compiler = aot_autograd(fw_compiler=inspect)
    traced = torch.compile(ipo_ext.ipo_loss_from_hidden, fullgraph=True, backend=compiler)
    evaluate(hidden.random_case(64).to(backend.device), traced)
    assert sum(node.target is operator("ipo_loss_from_hidden") for node in nodes) == 1
    sizes = [
        value.numel()
        for node in nodes
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val"))
        if isinstance(value, torch.Tensor)
    ]
    assert max(sizes) < 64 * hidden.VOCABULARY


def test_compiled_linear_token_logprobs(backend: Backend) -> None:
    def gradients(function: Any, case: HiddenCase) -> tuple[torch.Tensor, ...]:
        leaves = (*leaves_of(case), case.bias.detach().requires_grad_())
        hidden, weight, bias = leaves
        logprobs, entropy = function(hidden, weight, case.labels, temperature=0.7, bias=bias)
        return torch.autograd.grad((logprobs * 2 + entropy).sum(), leaves)

    traced = compiled(ipo_ext.linear_token_logprobs)
    for tokens in (20, 31):
        case = hidden.random_case(tokens, has_bias=True).to(backend.device)
        for ours, eager in zip(
            gradients(traced, case),
            gradients(ipo_ext.linear_token_logprobs, case),
            strict=True,
        ):
            assert torch.equal(ours, eager)
