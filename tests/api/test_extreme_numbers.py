"""Numbers that float64 holds and float32 does not: right, or refused in a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ipo_ext
from ipo_ext import IPOConfig
from tests.support import hidden, logits, logprobs
from tests.support.backends import Backend
from tests.support.cases import Case, evaluate

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32, torch.float64]
TINY = [1e-45, 2.9e-39, 1e-40, 1e-300, 5e-324]  # as tensors in float64

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def from_logprobs(dtype: torch.dtype) -> Case:
    case = logprobs.random_case(40)
    return case.with_(trainer_logprobs=case.trainer_logprobs.to(dtype))


FORMS: dict[str, Callable[[torch.dtype], Case]] = {
    "ipo_loss": from_logprobs,
    "from_logits": lambda dtype: logits.random_case(40, 65, dtype),
    "from_hidden": lambda dtype: hidden.random_case(40, dtype=dtype),
}


@dtypes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", TINY)
def test_a_tiny_normalizer_of_no_tokens(
    backend: Backend, form: str, dtype: torch.dtype, number: float
) -> None:
    """``mask.sum().clamp(min=1e-300)``: 0, whatever the masked tokens hold."""
    normalizer = torch.tensor(number, dtype=torch.float64)
    case = FORMS[form](dtype).with_(normalizer=normalizer)
    nothing = case.with_(
        loss_mask=torch.zeros_like(case.loss_mask),
        advantages=torch.full_like(case.advantages, math.nan),
    ).to(backend.device)
    ours = evaluate(nothing)
    assert ours.loss == 0
    assert not any(gradient.any() for gradient in ours.gradients)


@dtypes
@pytest.mark.parametrize("number", TINY)
def test_a_tiny_normalizer_makes_no_nan(
    backend: Backend, dtype: torch.dtype, number: float
) -> None:
    """Gradients beyond the dtype are infinite, those of tokens that pay nothing stay 0."""
    normalizer = torch.tensor(number, dtype=torch.float64)
    case = from_logprobs(dtype).with_(normalizer=normalizer).to(backend.device)
    ours, plain = evaluate(case), evaluate(case.with_(normalizer=None))
    assert not ours.gradient.isnan().any()
    assert torch.equal(ours.gradient != 0, plain.gradient != 0)
    assert torch.equal(ours.gradient.sign(), plain.gradient.sign())


@dtypes
@pytest.mark.parametrize("number", TINY)
@pytest.mark.parametrize("each", [False, True])
def test_a_tiny_temperature_is_the_limit(
    backend: Backend, dtype: torch.dtype, number: float, *, each: bool
) -> None:
    """The largest logit has all of the probability: none of its rows is dropped."""
    scores = torch.randn(30, 65, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = scores.double().argmax(-1)
    temperature = torch.tensor(number, dtype=torch.float64)
    temperature = temperature.expand(30) if each else temperature
    leaf = scores.to(backend.device).requires_grad_()
    values = ipo_ext.token_logprobs(
        leaf, labels.to(backend.device), temperature=temperature.to(backend.device)
    )
    ties = (scores == scores.amax(-1, keepdim=True)).sum(-1)
    for value, expected in zip(values, (-ties.double().log(), ties.double().log()), strict=True):
        torch.testing.assert_close(value.double().cpu(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(values[0].sum(), leaf)
    assert not gradient[(ties == 1).to(backend.device)].any()


@pytest.mark.parametrize("number", [1e29, 1e38, 1e39, 1e44, 1e300, 1.7e308])
def test_a_huge_temperature_is_the_limit(backend: Backend, number: float) -> None:
    scores = torch.randn(30, 65).to(backend.device).requires_grad_()
    temperature = torch.tensor(number, dtype=torch.float64)
    labels = torch.arange(30, device=backend.device)
    values = ipo_ext.token_logprobs(scores, labels, temperature=temperature)
    torch.testing.assert_close(values[0], torch.full_like(values[0], -math.log(65)))
    torch.testing.assert_close(values[1], torch.full_like(values[1], math.log(65)))
    assert torch.autograd.grad(values[0].sum(), scores)[0].isfinite().all()


@pytest.mark.parametrize("softcap", [1.2e-38, 1e-20, 1e20, 1e30, 3.4e38])
def test_a_softcap_at_either_end(backend: Backend, softcap: float) -> None:
    scores = torch.randn(30, 65).to(backend.device)
    labels = torch.arange(30, device=backend.device)
    capped = softcap * torch.tanh(scores.double() / softcap)
    exact = capped.log_softmax(-1)
    ours, entropy = ipo_ext.token_logprobs(scores, labels, softcap=softcap)
    expected = exact.gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-5, atol=1e-5
    )


REFUSED: list[tuple[str, float, str]] = [
    ("normalizer", 2.9e-39, r"expected a number from 2\.94e-39 to 1\.8e\+308 in .*, got 2\.9e-39"),
    ("normalizer", 1e-300, r"expected a number from 2\.94e-39 to 1\.8e\+308 in .*, got 1e-300"),
    ("temperature", 9e-31, r"expected a number from 1e-30 to 1e\+30 in .* got 9e-31"),
    ("temperature", 2e30, r"expected a number from 1e-30 to 1e\+30 in .* got 2e\+30"),
    ("logit_scale", 9e-31, r"expected a number from 1e-30 to 1e\+30 or None, got 9e-31"),
    ("logit_scale", 2e30, r"expected a number from 1e-30 to 1e\+30 or None, got 2e\+30"),
    ("softcap", 7e-46, r"expected a number from 1\.18e-38 to 3\.4e\+38, .* got 7e-46"),
    ("softcap", 3.5e38, r"expected a number from 1\.18e-38 to 3\.4e\+38, .* got 3\.5e\+38"),
]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "number", "words"), REFUSED)
def test_numbers_that_float32_does_not_hold_are_refused(
    dtype: torch.dtype, name: str, number: float, words: str
) -> None:
    for form in FORMS:
        case = FORMS[form](dtype)
        if hasattr(case, name):
            with pytest.raises(ValueError, match=f"^{name}: {words}"):
                case.with_(**{name: number}).call()


@pytest.mark.parametrize("name", ["normalizer", "temperature", "softcap", "logit_scale"])
def test_float64_holds_more(backend: Backend, name: str) -> None:
    case = logits.random_case(40, 65, torch.float64, inference_dtype=torch.float64)
    more: dict[str, Any] = {name: 1e-40}
    assert evaluate(case.with_(**more).to(backend.device)).loss.isfinite()


@pytest.mark.parametrize("tau", ["adv_tau", "kl_tau", "teacher_tau"])
def test_taus_that_float32_does_not_hold_are_refused(tau: str) -> None:
    words = f"{tau}: expected a number of at most 3.4e\\+38, the largest of float32, got 1e\\+39"
    with pytest.raises(ValueError, match=words):
        IPOConfig(**{tau: 1e39})
    IPOConfig(**{tau: 3.4e38})
