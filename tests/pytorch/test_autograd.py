"""Reverse mode by autograd and torch.func; what has no derivative is refused in words."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import ipo_ext
from ipo_ext import reference
from tests.support import hidden, logits
from tests.support.backends import Backend
from tests.support.cases import LogprobsCase, evaluate, same_bits
from tests.support.forms import FORMS, TOKENS, forms, leaf, loss_of
from tests.support.logprobs import DTYPES, random_case
from tests.support.operators import call_operator, operator_gradient
from tests.support.subjects import Subject, per_token

# -------------------------------------------------------------------------------------------------
# Every public function


def test_func_grad_of_every_function_equals_autograd(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(backend.device)
    gradient = torch.func.grad(subject.objective)(first, *constants)
    assert same_bits(gradient, subject.gradient(first, *constants))


def test_vmap_is_refused(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(backend.device)
    inputs = [first, *constants]
    batch = [tensor.unflatten(0, (4, -1)) if per_token(tensor) else tensor for tensor in inputs]
    dimensions = tuple(0 if per_token(tensor) else None for tensor in inputs)
    for function in (subject.objective, torch.func.grad(subject.objective)):
        with pytest.raises(NotImplementedError, match="vmap over the loss is not supported"):
            torch.vmap(function, dimensions)(*batch)


# -------------------------------------------------------------------------------------------------
# Reverse mode


@forms
def test_func_grad_equals_autograd(backend: Backend, form: str) -> None:
    case = FORMS[form]().to(backend.device)
    expected = evaluate(case).gradient
    for transform in (torch.func.grad, torch.func.jacrev):
        assert same_bits(transform(loss_of(case))(case.trainer_logprobs), expected)


def test_a_retained_graph_gives_the_same_gradient(case: LogprobsCase) -> None:
    trainer = leaf(case)
    loss = loss_of(case)(trainer)
    loss.backward(retain_graph=True)
    first = trainer.grad.clone()
    loss.backward()
    assert same_bits(trainer.grad, first * 2)


def test_a_changed_gradient_is_not_handed_out_again(backend: Backend, subject: Subject) -> None:
    """A graph that is kept gives each backward pass a gradient of its own."""
    first, constants = subject.inputs(backend.device)
    expected = subject.gradient(first, *constants)
    leaf = first.detach().requires_grad_()
    target = subject.objective(leaf, *constants)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(target, leaf, retain_graph=True)
        assert same_bits(gradient, expected)
        gradient.zero_()
    (gradient,) = torch.autograd.grad(target, leaf)
    assert same_bits(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("rows_apart", [False, True])
def test_a_kept_graph_from_logits(
    backend: Backend, dtype: torch.dtype, *, inplace: bool, rows_apart: bool
) -> None:
    case = logits.random_case(24, 13, dtype).to(backend.device)
    leaf = case.logits.detach().requires_grad_()

    def call() -> torch.Tensor:
        room = torch.nn.functional.pad(leaf, (0, 3)) * 1
        scores = room[:, :13] if rows_apart else leaf * 1
        return case.with_(logits=scores).call(inplace=inplace).loss * 0.3

    (expected,) = torch.autograd.grad(call(), leaf)
    loss = call()
    for keep in (True, True, False):
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=keep)
        assert same_bits(gradient, expected)
        gradient.zero_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_kept_graph_from_hidden(backend: Backend, dtype: torch.dtype) -> None:
    case = hidden.random_case(dtype=dtype, has_bias=True).to(backend.device)
    expected = evaluate(case, grad_loss=0.3)
    leaves = [getattr(case, name).detach().requires_grad_() for name in case.leaves]
    loss = case.with_(**dict(zip(case.leaves, leaves, strict=True))).call().loss * 0.3
    for keep in (True, True, False):
        gradients = torch.autograd.grad(loss, leaves, retain_graph=keep)
        for gradient, truth in zip(gradients, expected.gradients, strict=True):
            assert same_bits(gradient, truth)
            gradient.zero_()


def test_without_a_kept_graph_the_gradient_is_not_copied(backend: Backend) -> None:
    case = logits.random_case().to(backend.device)
    leaf = case.logits.detach().requires_grad_()
    scores = leaf * 1
    loss = case.with_(logits=scores).call(inplace=True).loss
    handed: list[int] = []
    scores.register_hook(lambda gradient: handed.append(gradient.data_ptr()))
    loss.backward(retain_graph=True)
    loss.backward()
    assert handed[0] != scores.data_ptr()
    assert handed[1] == scores.data_ptr()


def test_several_incoming_gradients_at_once(case: LogprobsCase) -> None:
    trainer = leaf(case)
    loss = loss_of(case)(trainer)
    factors = loss.new_tensor([1.0, 0.5])
    (gradients,) = torch.autograd.grad(loss, trainer, factors, is_grads_batched=True)
    (expected,) = torch.autograd.grad(loss_of(case)(trainer), trainer)
    assert same_bits(gradients, torch.stack([expected, expected * 0.5]))


def test_gradients_accumulate_over_micro_batches(backend: Backend) -> None:
    case = random_case(TOKENS).to(backend.device)
    trainer = leaf(case)
    for part in (slice(0, 31), slice(31, 77), slice(77, TOKENS)):
        whole = case.with_(trainer_logprobs=trainer, normalizer=13.0)
        whole.map_tokens(lambda t, part=part: t[part]).call().loss.backward()
    assert same_bits(trainer.grad, evaluate(case.with_(normalizer=13.0)).gradient)


def test_the_gradient_follows_the_factor(case: LogprobsCase) -> None:
    expected = operator_gradient(case)
    gradient = evaluate(case, grad_loss=-4.0).gradient
    assert same_bits(gradient, (expected * -4).to(gradient.dtype))


def test_func_grad_from_logits(backend: Backend) -> None:
    case = logits.random_case().to(backend.device)
    ours = torch.func.grad(lambda z: 2 * case.with_(logits=z).call().loss)(case.logits)
    assert torch.equal(ours, evaluate(case, grad_loss=2.0).gradient)


def test_func_grad_from_hidden(backend: Backend) -> None:
    case = hidden.random_case().to(backend.device)
    ours = torch.func.grad(lambda w: 2 * case.with_(weight=w).call().loss)(case.weight)
    assert torch.equal(ours, evaluate(case, grad_loss=2.0).grad_weight)


@pytest.mark.parametrize("has_bias", [False, True])
def test_compiled_autograd(backend: Backend, *, has_bias: bool) -> None:
    case = hidden.random_case(has_bias=has_bias).to(backend.device)
    expected = evaluate(case)
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in case.leaves}
    loss = case.with_(**{name: leaf * 1 for name, leaf in leaves.items()}).call().loss
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        loss.backward()
    for parameter, gradient in zip(leaves.values(), expected.gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


# -------------------------------------------------------------------------------------------------
# Once


def test_one_backward_without_a_kept_graph(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(backend.device)
    leaf = first.detach().requires_grad_()
    target = subject.objective(leaf, *constants)
    torch.autograd.grad(target, leaf)
    with pytest.raises(RuntimeError, match="Specify retain_graph=True"):
        torch.autograd.grad(target, leaf)


def test_second_derivatives_from_logits(backend: Backend) -> None:
    case = logits.random_case().to(backend.device)
    leaf = case.logits.requires_grad_()
    (gradient,) = torch.autograd.grad(case.call().loss ** 2, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        gradient.sum().backward()
    logprobs, _ = ipo_ext.token_logprobs(leaf, case.labels)
    (gradient,) = torch.autograd.grad(logprobs.sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        gradient.sum().backward()


# -------------------------------------------------------------------------------------------------
# A second derivative, and forward mode


def squared(case: LogprobsCase, trainer: torch.Tensor) -> torch.Tensor:
    (first,) = torch.autograd.grad(loss_of(case)(trainer) ** 2, trainer, create_graph=True)
    return torch.autograd.grad(first.sum(), trainer)[0]


def penalised(case: LogprobsCase, trainer: torch.Tensor) -> torch.Tensor:
    """A gradient penalty, whose own gradient would be silently 0 if the first were a constant."""
    loss = loss_of(case)(trainer)
    (first,) = torch.autograd.grad(loss, trainer, create_graph=True)
    return torch.autograd.grad(loss + first.norm(), trainer)[0]


def by_the_operator(case: LogprobsCase, trainer: torch.Tensor) -> torch.Tensor:
    loss = call_operator("ipo_loss", case, trainer_logprobs=trainer)[0]
    (first,) = torch.autograd.grad(loss, trainer, create_graph=True)
    return torch.autograd.grad(first.sum(), trainer)[0]


def grad_of_grad(case: LogprobsCase, trainer: torch.Tensor) -> torch.Tensor:
    first = torch.func.grad(loss_of(case))
    return torch.func.grad(lambda x: first(x).sum())(trainer.detach())


def jacrev_of_jacrev(case: LogprobsCase, trainer: torch.Tensor) -> torch.Tensor:
    return torch.func.jacrev(torch.func.jacrev(loss_of(case)))(trainer.detach())


@pytest.mark.parametrize(
    "second", [squared, penalised, by_the_operator, grad_of_grad, jacrev_of_jacrev]
)
def test_a_second_derivative_is_refused(
    case: LogprobsCase, second: Callable[[LogprobsCase, torch.Tensor], torch.Tensor]
) -> None:
    with pytest.raises(NotImplementedError, match="the loss cannot be differentiated twice"):
        second(case, leaf(case))


def jvp(case: LogprobsCase, trainer: torch.Tensor) -> Any:
    return torch.func.jvp(loss_of(case), (trainer.detach(),), (torch.ones_like(trainer),))


def jvp_to_a_constant(case: LogprobsCase, trainer: torch.Tensor) -> Any:
    def loss(inference: torch.Tensor) -> torch.Tensor:
        return case.with_(inference_logprobs=inference).call().loss

    return torch.func.jvp(loss, (case.inference_logprobs,), (torch.ones_like(trainer),))


def dual(case: LogprobsCase, trainer: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return loss_of(case)(forward_ad.make_dual(trainer, torch.ones_like(trainer)))


def dual_without_grad(case: LogprobsCase, trainer: torch.Tensor) -> Any:
    with torch.no_grad():
        return dual(case, trainer)


def hessian(case: LogprobsCase, trainer: torch.Tensor) -> Any:
    return torch.func.hessian(loss_of(case))(trainer.detach())


@pytest.mark.parametrize("forward", [jvp, jvp_to_a_constant, dual, dual_without_grad, hessian])
def test_forward_mode_is_refused(
    case: LogprobsCase, forward: Callable[[LogprobsCase, torch.Tensor], Any]
) -> None:
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


def test_a_second_derivative_from_hidden_is_refused(backend: Backend) -> None:
    case = hidden.random_case(has_bias=True).to(backend.device)
    leaves = [getattr(case, name).requires_grad_() for name in case.leaves]
    hidden_states, weight, bias = leaves
    linear, _ = ipo_ext.linear_token_logprobs(hidden_states, weight, case.labels, bias=bias)
    linear = linear.sum()
    for loss, tensor in itertools.product((lambda: case.call().loss, lambda: linear), leaves):
        (gradient,) = torch.autograd.grad(loss() + (tensor**2).sum(), tensor, create_graph=True)
        with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
            torch.autograd.grad(gradient.sum(), tensor)


def test_forward_mode_and_vmap_from_hidden_are_refused(backend: Backend) -> None:
    case = hidden.random_case().to(backend.device)

    def loss(states: torch.Tensor) -> torch.Tensor:
        return case.with_(hidden=states).call().loss

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (case.hidden,), (torch.ones_like(case.hidden),))
    with pytest.raises(NotImplementedError, match="vmap over the loss is not supported"):
        torch.func.vmap(torch.func.grad(loss))(case.hidden.expand(2, *case.hidden.shape))
