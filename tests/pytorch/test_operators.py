"""The operators themselves: opcheck, direct calls, what they say."""

from __future__ import annotations

import pytest
import torch

from ipo_ext.diagnostics import info
from tests.support import hidden, logits
from tests.support.backends import Backend
from tests.support.cases import LogprobsCase, evaluate, same_bits
from tests.support.forms import FORMS, forms, leaf
from tests.support.operators import (
    call_operator,
    example_arguments,
    group_for,
    opcheck,
    operator,
)
from tests.support.subjects import SUBJECTS

# -------------------------------------------------------------------------------------------------
# Every operator


@pytest.mark.parametrize("name", [name.removeprefix("ipo_ext::") for name in info.operators()])
def test_opcheck(backend: Backend, name: str) -> None:
    with group_for(name):
        arguments = example_arguments(name, backend.device)
        arguments[0].requires_grad_(name in SUBJECTS)
        results = torch.library.opcheck(operator(name), arguments)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


# -------------------------------------------------------------------------------------------------
# In every form


@forms
@pytest.mark.parametrize("mode", ["differentiated", "gradient", "loss-only"])
def test_opcheck_of_the_loss(backend: Backend, form: str, mode: str) -> None:
    case = FORMS[form]().to(backend.device)
    trainer = leaf(case) if mode == "differentiated" else case.trainer_logprobs
    opcheck("ipo_loss", case, trainer_logprobs=trainer, with_gradient=mode != "loss-only")


@forms
@pytest.mark.parametrize("float64", [False, True])
def test_opcheck_of_the_means(backend: Backend, form: str, float64: bool) -> None:
    metrics = FORMS[form]().to(backend.device).call().metrics
    arguments = (metrics.sums, metrics.extremes, float64)
    torch.library.opcheck(operator("metric_means"), arguments)


@forms
def test_a_direct_call_differentiates_as_the_api(backend: Backend, form: str) -> None:
    case = FORMS[form]().to(backend.device)
    trainer = leaf(case)
    loss = call_operator("ipo_loss", case, trainer_logprobs=trainer)[0]
    (gradient,) = torch.autograd.grad(loss * 3, trainer)
    assert same_bits(gradient, evaluate(case, grad_loss=3.0).gradient)


def test_backward_needs_the_gradient(case: LogprobsCase) -> None:
    outputs = call_operator("ipo_loss", case, trainer_logprobs=leaf(case), with_gradient=False)
    assert outputs[1].numel() == 0
    with pytest.raises(RuntimeError, match="expected with_gradient=True to run backward"):
        outputs[0].backward()


# -------------------------------------------------------------------------------------------------
# From logits and from hidden states


def test_opcheck_from_logits(backend: Backend) -> None:
    normalizer = torch.tensor(3.0, device=backend.device)
    case = logits.random_case(token_temperature=True, normalizer=normalizer).to(backend.device)
    case.logits.requires_grad_()
    for name, softcap in (("ipo_loss_from_logits", 0.0), ("token_logprobs", 3.0)):
        opcheck(name, case, softcap=softcap)
    gradient = torch.randn(5, device=backend.device)
    torch.library.opcheck(operator("scale_"), (gradient, normalizer))
    narrower = torch.empty(5, dtype=torch.float16, device=backend.device)
    torch.library.opcheck(operator("scale_into"), (gradient, normalizer, narrower))


def test_opcheck_from_hidden(backend: Backend) -> None:
    how = {"token_temperature": True, "chunk_size": 16}
    for has_bias in (False, True):
        case = hidden.random_case(has_bias=has_bias, **how).to(backend.device)
        for name in case.leaves:
            getattr(case, name).requires_grad_()
        for num_active in (None, hidden.TOKENS - 2):
            opcheck("ipo_loss_from_hidden", case, num_active=num_active)
        opcheck("linear_token_logprobs", case, softcap=3.0)


def test_the_operator_says_what_it_was_not_told_to_make(backend: Backend) -> None:
    case = hidden.random_case(chunk_size=16).to(backend.device)
    states = case.hidden.requires_grad_()

    def loss(**needed: bool) -> torch.Tensor:
        return call_operator("ipo_loss_from_hidden", case, **needed)[0]

    with pytest.raises(RuntimeError, match="expected needs_grad_hidden=True"):
        loss(needs_grad_hidden=False, needs_grad_weight=True).backward()
    needed = {"needs_grad_hidden": True, "needs_grad_weight": False}
    biased = hidden.random_case(chunk_size=16, has_bias=True).to(backend.device)
    biased.bias.requires_grad_()
    with pytest.raises(RuntimeError, match="expected needs_grad_bias=True"):
        call_operator("ipo_loss_from_hidden", biased, needs_grad_bias=False)[0].backward()
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss(**needed), states, create_graph=True)
    (ours,) = torch.autograd.grad(2 * loss(**needed), states)
    torch.testing.assert_close(ours, evaluate(case, grad_loss=2.0).grad_hidden)
