"""What the toys of docs/dev/recipes.md compute, on every backend.

tests/builds/test_recipes.py runs this file in the copy of the tree to which it has applied the
page's patches, and only there.
"""

from __future__ import annotations

import pytest
import torch

from ipo_ext import (
    IPOConfig,
    IPOMetrics,
    ipo_loss_from_hidden,
    ipo_loss_from_logits,
    reference,
)
from tests.support.backends import Backend
from tests.support.cases import LogprobsCase, evaluate
from tests.support.logprobs import random_case

OFFSET = 0.25


def case_of(backend: Backend, config: IPOConfig, **options: object) -> LogprobsCase:
    return random_case(700, **options).with_(config=config).to(backend.device)


def ratios_of(case: LogprobsCase) -> torch.Tensor:
    return (case.trainer_logprobs - case.inference_logprobs).exp()


def test_the_setting_is_added_to_the_advantage(backend: Backend) -> None:
    case = case_of(backend, IPOConfig(kl_tau=0.0))
    with_offset = case.with_(config=IPOConfig(kl_tau=0.0, adv_offset=OFFSET))
    plain, shifted = evaluate(case), evaluate(with_offset)
    kept = plain.gradient != 0
    assert kept.any()
    assert not kept.all()
    paid = torch.where(kept, -OFFSET * ratios_of(case), 0.0)
    torch.testing.assert_close(shifted.gradient - plain.gradient, paid, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shifted.loss - plain.loss, paid.sum(), rtol=1e-4, atol=1e-3)
    expected = evaluate(with_offset, reference.ipo_loss)
    torch.testing.assert_close(shifted.gradient, expected.gradient, rtol=1e-4, atol=1e-5)


def test_the_setting_reaches_the_loss_from_logits(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 9, generator=generator).to(backend.device).requires_grad_()
    labels = torch.randint(9, (40,), generator=generator).to(backend.device)
    case = random_case(40).to(backend.device)
    rest = (case.inference_logprobs, case.advantages, case.loss_mask)
    config = IPOConfig(0.0, 100.0, adv_offset=OFFSET)
    gradients = [
        torch.autograd.grad(function(logits, labels, *rest, config=config).loss, logits)[0]
        for function in (ipo_loss_from_logits, reference.ipo_loss_from_logits)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [None, "sevens"])
def test_the_metric_is_the_mean_magnitude_of_the_log_ratio(
    backend: Backend, segments: str | None
) -> None:
    case = case_of(backend, IPOConfig(), segments=segments)
    metrics = case.call().metrics
    assert isinstance(metrics, IPOMetrics)
    size = (case.trainer_logprobs - case.inference_logprobs).abs()[case.loss_mask].mean()
    torch.testing.assert_close(metrics.total()["log_ratio_size"], size)
    theirs = case.call(reference.ipo_loss).metrics["log_ratio_size"]
    torch.testing.assert_close(metrics["log_ratio_size"], theirs)


def test_the_mask_rule_drops_what_has_risen(backend: Backend) -> None:
    p = torch.tensor([0.9, 0.65, 0.5, 0.1, 0.9])
    active = torch.tensor([True, True, True, True, False])
    case = LogprobsCase(
        trainer_logprobs=p.log(),
        inference_logprobs=torch.full((5,), 0.5).log(),
        advantages=torch.ones(5),
        loss_mask=active,
        config=IPOConfig.prob_rise(0.2, kl_tau=0.0),
    )
    result = evaluate(case.to(backend.device))
    assert (result.gradient != 0).tolist() == [False, True, True, True, False]
    sides = {name: float(result.metrics[f"is_masked_{name}"]) for name in ("high", "low")}
    assert sides == {"high": 0.25, "low": 0.0}


def test_the_input_scales_the_advantage(backend: Backend) -> None:
    case = case_of(backend, IPOConfig(kl_tau=0.0), weights=True)
    scales = torch.rand(case.tokens).to(backend.device).bfloat16()
    scales[~case.loss_mask] = torch.nan  # a dropped token may hold anything
    scaled = evaluate(case.with_(advantage_scales=scales))
    by_hand = evaluate(case.with_(advantages=case.advantages * scales.float()))
    torch.testing.assert_close(scaled.gradient, by_hand.gradient)
    torch.testing.assert_close(scaled.loss, by_hand.loss, rtol=1e-4, atol=1e-3)
    expected = evaluate(case.with_(advantage_scales=scales), reference.ipo_loss)
    torch.testing.assert_close(scaled.gradient, expected.gradient, rtol=1e-4, atol=1e-5)


def test_the_input_reaches_the_loss_from_hidden_states(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 8, generator=generator).to(backend.device).requires_grad_()
    weight = torch.randn(16, 8, generator=generator).to(backend.device)
    labels = torch.randint(16, (40,), generator=generator).to(backend.device)
    case = random_case(40).to(backend.device)
    rest = (case.inference_logprobs, case.advantages, case.loss_mask)
    options = {"advantage_scales": case.advantages.abs(), "config": IPOConfig(0.0, 100.0)}
    gradients = [
        torch.autograd.grad(function(hidden, weight, labels, *rest, **options).loss, hidden)[0]
        for function in (ipo_loss_from_hidden, reference.ipo_loss_from_hidden)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
