"""What logits are multiplied by, against logits that have been: on every backend, in every form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ipo_ext
from tests.support import hidden, logits
from tests.support.backends import Backend
from tests.support.cases import Evaluation, evaluate, same_bits

# Powers of two: what is computed with them has the same digits, so that nothing may differ.
EXACT = [0.25, 8.0]
SCALINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"token_temperature": True, "softcap": 30.0},
]
exact = pytest.mark.parametrize("scale", EXACT)
scalings = pytest.mark.parametrize("scaling", SCALINGS, ids=str)


def assert_same_results(ours: Evaluation, expected: Evaluation) -> None:
    assert same_bits(ours.loss, expected.loss)
    assert same_bits(ours.output.logprobs, expected.output.logprobs)
    assert same_bits(ours.output.entropy, expected.output.entropy)
    assert same_bits(ours.metrics.means, expected.metrics.means)


@exact
@scalings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_logits(
    backend: Backend, dtype: torch.dtype, scaling: dict[str, Any], scale: float
) -> None:
    options = {"spread": 0.5, "logit_scale": scale, **scaling}  # so no gradient is subnormal
    case = logits.random_case(20, 130, dtype, **options).to(backend.device)
    ours = evaluate(case)
    expected = evaluate(case.with_(logits=scale * case.logits, logit_scale=None))
    assert_same_results(ours, expected)
    assert same_bits(ours.gradient, scale * expected.gradient)


@exact
@scalings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_of_hidden_states(
    backend: Backend, dtype: torch.dtype, scaling: dict[str, Any], scale: float
) -> None:
    case = hidden.random_case(dtype=dtype, logit_scale=scale, **scaling).to(backend.device)
    ours = evaluate(case, chunk_size=16)
    scaled = case.with_(weight=scale * case.weight, logit_scale=None)
    expected = evaluate(scaled, chunk_size=16)
    assert_same_results(ours, expected)
    assert same_bits(ours.grad_hidden, expected.grad_hidden)
    assert same_bits(ours.grad_weight, scale * expected.grad_weight)


@exact
def test_of_log_probabilities(backend: Backend, scale: float) -> None:
    case = hidden.random_case(masked=0).to(backend.device)
    states, weight, labels = case.hidden, case.weight, case.labels
    scores = states @ weight.t()
    for ours, expected in (
        (
            ipo_ext.token_logprobs(scores, labels, logit_scale=scale),
            ipo_ext.token_logprobs(scale * scores, labels),
        ),
        (
            ipo_ext.linear_token_logprobs(states, weight, labels, logit_scale=scale),
            ipo_ext.linear_token_logprobs(states, scale * weight, labels),
        ),
    ):
        assert all(map(same_bits, ours, expected))


def test_a_temperature_in_half_precision_is_divided_in_more(backend: Backend) -> None:
    """1 / 1e-5 is beyond fp16."""
    case = logits.random_case(spread=2e5, logit_scale=1e-5).to(backend.device)
    ones = torch.ones(case.tokens, dtype=torch.float16, device=backend.device)
    assert_same_results(evaluate(case.with_(temperature=ones)), evaluate(case))


@pytest.mark.parametrize("given", [-0.5, 0.0, float("inf")])
def test_a_fault_names_the_temperature_that_was_given(given: float) -> None:
    case = logits.random_case(masked=0)
    temperature = torch.full((case.tokens,), given)
    with pytest.raises(RuntimeError, match=rf"temperature: expected .*, got {given:g} at row 0"):
        case.with_(temperature=temperature, logit_scale=0.25).call()


def test_a_softcap_over_a_scale_that_no_float_holds_is_refused() -> None:
    case = logits.random_case()
    words = r"^softcap / logit_scale: expected a number from .* got 1e\+30 / 1e-10$"
    with pytest.raises(ValueError, match=words):
        case.with_(softcap=1e30, logit_scale=1e-10).call()
