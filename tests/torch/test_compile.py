"""The operators under torch's transforms: opcheck, compile, export, torch.func; what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ipo_ext import IPOConfig, IPOLoss, IPOMetrics, IPOOutput, _operators, ipo_loss, reference
from tests.support.backends import Backend
from tests.support.cases import (
    DTYPES,
    Case,
    assert_same_bits,
    cu_seqlens,
    evaluate,
    operator_gradient,
    random_case,
    same_bits,
    strided,
)

TOKENS = 100

FORMS: dict[str, Callable[[], Case]] = {
    "plain": lambda: random_case(TOKENS),
    "packed": lambda: random_case(TOKENS, segments="empty-between"),
    "everything": lambda: random_case(
        TOKENS, teacher=True, weights=True, segments="sevens", normalizer=torch.tensor(70)
    ),
    "bf16": lambda: random_case(TOKENS, dtypes=DTYPES["bf16"], normalizer=torch.tensor(7.5)),
    "fp16": lambda: random_case(TOKENS, dtypes=DTYPES["fp16"], weights=True),
    "fp64-inference": lambda: random_case(TOKENS, dtypes=DTYPES["fp64-inference"], teacher=True),
    "strided": lambda: random_case(TOKENS, weights=True).map_tokens(lambda t: strided(t, 10)),
    "all-masked": lambda: random_case(TOKENS, masked=1.0),
    "empty": lambda: random_case(0, segments="one"),
}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def case(backend: Backend) -> Case:
    return FORMS["everything"]().to(backend.device)


def output_of(case: Case) -> Callable[..., IPOOutput]:
    """``ipo_loss`` as a function of the trainer's log-probabilities; compilers trace it."""
    arguments = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}

    def output(trainer: torch.Tensor, **changes: Any) -> IPOOutput:
        return ipo_loss(**{**arguments, "trainer_logprobs": trainer, **changes})

    return output


def loss_of(case: Case) -> Callable[[torch.Tensor], torch.Tensor]:
    output = output_of(case)
    return lambda trainer: output(trainer).loss


def token_arguments(case: Case) -> tuple[torch.Tensor, ...]:
    return case.trainer_logprobs, case.inference_logprobs, case.advantages, case.loss_mask


def leaf(case: Case) -> torch.Tensor:
    return case.trainer_logprobs.detach().requires_grad_()


def compiled(function: Any = ipo_loss, backend: Any = "inductor") -> Any:
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def operator_arguments(case: Case, trainer: torch.Tensor, with_gradient: bool = True) -> list[Any]:
    """What the API passes to the operator."""
    config = case.config
    return [
        trainer,
        case.inference_logprobs,
        case.advantages,
        case.loss_mask,
        case.teacher_logprobs,
        case.loss_weights,
        case.cu_seqlens,
        case.normalizer,
        *config.settings(case.compute_dtype),
        with_gradient,
    ]


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def assert_same_tree(a: Any, b: Any) -> None:
    """Same structure (types included) and the same bits in every tensor."""
    assert pytree.tree_structure(a) == pytree.tree_structure(b)
    assert all(same_bits(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


# ---------------------------------------------------------------------------------------------
# The operators themselves


@forms
@pytest.mark.parametrize("mode", ["differentiated", "gradient", "loss-only"])
def test_opcheck_of_the_loss(backend: Backend, form: str, mode: str) -> None:
    case = FORMS[form]().to(backend.device)
    trainer = leaf(case) if mode == "differentiated" else case.trainer_logprobs
    arguments = operator_arguments(case, trainer, with_gradient=mode != "loss-only")
    torch.library.opcheck(_operators.library().ipo_loss, arguments)


@forms
@pytest.mark.parametrize("float64", [False, True])
def test_opcheck_of_the_means(backend: Backend, form: str, float64: bool) -> None:
    metrics = FORMS[form]().to(backend.device).call(ipo_loss).metrics
    arguments = (metrics.sums, metrics.extremes, float64)
    torch.library.opcheck(_operators.library().metric_means, arguments)


@forms
def test_a_direct_call_differentiates_as_the_api(backend: Backend, form: str) -> None:
    case = FORMS[form]().to(backend.device)
    trainer = leaf(case)
    loss = _operators.library().ipo_loss(*operator_arguments(case, trainer))[0]
    (gradient,) = torch.autograd.grad(loss * 3, trainer)
    assert same_bits(gradient, evaluate(case, scale=lambda loss: loss * 3).gradient)


def test_backward_needs_the_gradient(case: Case) -> None:
    trainer = leaf(case)
    outputs = _operators.library().ipo_loss(*operator_arguments(case, trainer, with_gradient=False))
    assert outputs[1].numel() == 0
    with pytest.raises(RuntimeError, match="expected with_gradient=True to run backward"):
        outputs[0].backward()


# ---------------------------------------------------------------------------------------------
# torch.compile


@forms
def test_compiled_equals_eager(backend: Backend, form: str) -> None:
    case = FORMS[form]().to(backend.device)
    assert_same_bits(evaluate(case, compiled()), evaluate(case))


@forms
def test_compiled_without_gradient_equals_eager(backend: Backend, form: str) -> None:
    case = FORMS[form]().to(backend.device)
    assert_same_tree(case.call(compiled(backend="aot_eager")), case.call(ipo_loss))


def test_a_compiled_module_equals_eager(case: Case) -> None:
    module = IPOLoss(IPOConfig(teacher_tau=0.5, kl_tau=0.1))
    case = case.with_(config=module.config, trainer_logprobs=leaf(case))

    def forward(*tokens: torch.Tensor, config: IPOConfig, **optional: Any) -> IPOOutput:
        return module(*tokens, **optional)

    assert_same_tree(case.call(compiled(forward)), case.call(ipo_loss))


def test_a_config_may_be_made_inside_the_compiled_function(case: Case) -> None:
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


def test_metrics_leave_a_compiled_function(case: Case) -> None:
    output = output_of(case)

    def read(trainer: torch.Tensor) -> Any:
        metrics = output(trainer).metrics
        total = metrics.total()
        return metrics, total + total, sum([metrics, metrics]), dict(metrics), metrics["ess"]

    trainer = leaf(case)
    traced = compiled(read, "aot_eager")(trainer)
    assert isinstance(traced[0], IPOMetrics)
    assert list(traced[0]) == list(traced[3])
    assert_same_tree(traced, read(trainer))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_float_normalizers_compile_at_most_twice(backend: Backend, requires_grad: bool) -> None:
    case = random_case(TOKENS).to(backend.device)
    case = case.with_(trainer_logprobs=case.trainer_logprobs.requires_grad_(requires_grad))
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(backend=counter)
    for step in range(20):
        case = case.with_(normalizer=3.5 + 11 * step)
        assert same_bits(case.call(function).loss, case.call(ipo_loss).loss)
    assert counter.frame_count <= 2


def test_new_lengths_recompile_at_most_once(backend: Backend) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(backend=counter)
    for lengths in ([20, 30, 14], [9, 0, 80, 11], [5, 6], [400, 1, 1, 1, 600], [3] * 50):
        case = random_case(sum(lengths)).to(backend.device)
        case = case.with_(cu_seqlens=cu_seqlens(lengths).to(backend.device))
        assert_same_bits(evaluate(case, function), evaluate(case))
    assert counter.frame_count <= 2


def test_compiled_backward_runs_twice_where_asked(case: Case) -> None:
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


# ---------------------------------------------------------------------------------------------
# Other tracers


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_loss_and_gradient(backend: Backend, mode: str) -> None:
    case = random_case(TOKENS).to(backend.device)

    def both(*tokens: torch.Tensor) -> list[torch.Tensor]:
        loss = ipo_loss(*tokens).loss
        return [loss.detach(), *torch.autograd.grad(loss, tokens[0])]

    arguments = (leaf(case), *token_arguments(case)[1:])
    graph = make_fx(both, tracing_mode=mode)(*arguments)
    assert_same_tree(graph(*arguments), both(*arguments))


@pytest.mark.parametrize("strict", [False, True])
def test_export(backend: Backend, strict: bool) -> None:
    tokens = torch.export.Dim("tokens")
    names = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")
    arguments = token_arguments(random_case(TOKENS).to(backend.device))
    program = torch.export.export(
        IPOLoss(), arguments, dynamic_shapes={key: {0: tokens} for key in names}, strict=strict
    )
    other = token_arguments(random_case(37, seed=1).to(backend.device))
    assert_same_tree(program.module()(*other), ipo_loss(*other))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_can_be_saved(backend: Backend, strict: bool) -> None:
    case = FORMS["packed"]().to(backend.device)
    optional = {"cu_seqlens": case.cu_seqlens}
    arguments = token_arguments(case)
    program = torch.export.export(IPOLoss(), arguments, optional, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert_same_tree(loaded(*arguments, **optional), ipo_loss(*arguments, **optional))


def test_an_output_is_a_pytree(case: Case) -> None:
    output = case.call(ipo_loss)
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t * 2, output)
    assert isinstance(doubled, IPOOutput)
    assert isinstance(doubled.metrics, IPOMetrics)
    assert same_bits(doubled.loss, output.loss * 2)
    assert same_bits(doubled.metrics["is_masked"], output.metrics["is_masked"] * 2)
    assert list(doubled.metrics) == list(output.metrics)


# ---------------------------------------------------------------------------------------------
# Reverse mode


@forms
def test_func_grad_equals_autograd(backend: Backend, form: str) -> None:
    case = FORMS[form]().to(backend.device)
    expected = evaluate(case).gradient
    for transform in (torch.func.grad, torch.func.jacrev):
        assert same_bits(transform(loss_of(case))(case.trainer_logprobs), expected)


def test_a_retained_graph_gives_the_same_gradient(case: Case) -> None:
    trainer = leaf(case)
    loss = loss_of(case)(trainer)
    loss.backward(retain_graph=True)
    first = trainer.grad.clone()
    loss.backward()
    assert same_bits(trainer.grad, first * 2)


def test_a_changed_gradient_is_not_handed_out_again(case: Case) -> None:
    trainer = leaf(case)
    loss = loss_of(case)(trainer)
    (first,) = torch.autograd.grad(loss, trainer, retain_graph=True)
    expected = first.clone()
    (half,) = torch.autograd.grad(loss, trainer, loss.new_tensor(0.5), retain_graph=True)
    assert same_bits(half, expected * 0.5)
    first.zero_()
    with contextlib.suppress(RuntimeError):  # torch's words for a saved tensor that has changed
        (second,) = torch.autograd.grad(loss, trainer)
        assert same_bits(second, expected)


def test_several_incoming_gradients_at_once(case: Case) -> None:
    trainer = leaf(case)
    loss = loss_of(case)(trainer)
    factors = loss.new_tensor([1.0, 0.5])
    (gradients,) = torch.autograd.grad(loss, trainer, factors, is_grads_batched=True)
    (expected,) = torch.autograd.grad(loss_of(case)(trainer), trainer)
    assert same_bits(gradients, torch.stack([expected, expected * 0.5]))


def test_fakes_run_a_whole_step(case: Case) -> None:
    with FakeTensorMode() as mode:
        fake = pytree.tree_map_only(torch.Tensor, mode.from_tensor, vars(case))
        fake = Case(**fake)
        trainer = leaf(fake)
        (gradient,) = torch.autograd.grad(loss_of(fake)(trainer), trainer)
    assert gradient.shape == trainer.shape


def test_gradients_accumulate_over_micro_batches(backend: Backend) -> None:
    case = random_case(TOKENS).to(backend.device)
    trainer = leaf(case)
    for part in (slice(0, 31), slice(31, 77), slice(77, TOKENS)):
        whole = case.with_(trainer_logprobs=trainer, normalizer=13.0)
        whole.map_tokens(lambda t, part=part: t[part]).call(ipo_loss).loss.backward()
    assert same_bits(trainer.grad, evaluate(case.with_(normalizer=13.0)).gradient)


def test_the_gradient_follows_the_factor(case: Case) -> None:
    expected = operator_gradient(case)
    gradient = evaluate(case, scale=lambda loss: loss * -4).gradient
    assert same_bits(gradient, (expected * -4).to(gradient.dtype))


# ---------------------------------------------------------------------------------------------
# What is refused, in words


def squared(case: Case, trainer: torch.Tensor) -> torch.Tensor:
    (first,) = torch.autograd.grad(loss_of(case)(trainer) ** 2, trainer, create_graph=True)
    return torch.autograd.grad(first.sum(), trainer)[0]


def penalised(case: Case, trainer: torch.Tensor) -> torch.Tensor:
    """A gradient penalty, whose own gradient would be silently 0 if the first were a constant."""
    loss = loss_of(case)(trainer)
    (first,) = torch.autograd.grad(loss, trainer, create_graph=True)
    return torch.autograd.grad(loss + first.norm(), trainer)[0]


def by_the_operator(case: Case, trainer: torch.Tensor) -> torch.Tensor:
    loss = _operators.library().ipo_loss(*operator_arguments(case, trainer))[0]
    (first,) = torch.autograd.grad(loss, trainer, create_graph=True)
    return torch.autograd.grad(first.sum(), trainer)[0]


def grad_of_grad(case: Case, trainer: torch.Tensor) -> torch.Tensor:
    first = torch.func.grad(loss_of(case))
    return torch.func.grad(lambda x: first(x).sum())(trainer.detach())


def jacrev_of_jacrev(case: Case, trainer: torch.Tensor) -> torch.Tensor:
    return torch.func.jacrev(torch.func.jacrev(loss_of(case)))(trainer.detach())


@pytest.mark.parametrize(
    "second", [squared, penalised, by_the_operator, grad_of_grad, jacrev_of_jacrev]
)
def test_a_second_derivative_is_refused(
    case: Case, second: Callable[[Case, torch.Tensor], torch.Tensor]
) -> None:
    with pytest.raises(NotImplementedError, match="the loss cannot be differentiated twice"):
        second(case, leaf(case))


def jvp(case: Case, trainer: torch.Tensor) -> Any:
    return torch.func.jvp(loss_of(case), (trainer.detach(),), (torch.ones_like(trainer),))


def jvp_to_a_constant(case: Case, trainer: torch.Tensor) -> Any:
    def loss(inference: torch.Tensor) -> torch.Tensor:
        return case.with_(inference_logprobs=inference).call(ipo_loss).loss

    return torch.func.jvp(loss, (case.inference_logprobs,), (torch.ones_like(trainer),))


def dual(case: Case, trainer: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return loss_of(case)(forward_ad.make_dual(trainer, torch.ones_like(trainer)))


def dual_without_grad(case: Case, trainer: torch.Tensor) -> Any:
    with torch.no_grad():
        return dual(case, trainer)


def hessian(case: Case, trainer: torch.Tensor) -> Any:
    return torch.func.hessian(loss_of(case))(trainer.detach())


@pytest.mark.parametrize("forward", [jvp, jvp_to_a_constant, dual, dual_without_grad, hessian])
def test_forward_mode_is_refused(case: Case, forward: Callable[[Case, torch.Tensor], Any]) -> None:
    with pytest.raises(NotImplementedError, match="the loss has no forward-mode derivative"):
        forward(case, leaf(case))


def test_the_reference_has_what_is_refused() -> None:
    case = random_case(10, dtypes=DTYPES["fp64"])

    def loss(trainer: torch.Tensor) -> torch.Tensor:
        return case.with_(trainer_logprobs=trainer).call(reference.ipo_loss).loss

    direction = torch.ones(10, dtype=torch.float64)
    _, tangent = torch.func.jvp(loss, (case.trainer_logprobs,), (direction,))
    torch.testing.assert_close(tangent, evaluate(case).gradient.sum())
    trainer = leaf(case)
    (first,) = torch.autograd.grad(loss(trainer), trainer, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), trainer)
    step = 1e-6
    nearby = evaluate(case.with_(trainer_logprobs=case.trainer_logprobs + step)).gradient
    torch.testing.assert_close(second, (nearby - first) / step, rtol=1e-4, atol=1e-4)


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
