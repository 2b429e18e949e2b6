"""The loss from log-probabilities against its reference, in the budget of naive arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import torch

from ipo_ext import _C, IPOMetrics, reference
from tests.support.cases import LogprobsCase, evaluate, same_bits
from tests.support.closeness import assert_close
from tests.support.logprobs import kept, log_ratio
from tests.support.operators import operator_gradient

# Metrics made of counts or of one log-ratio alone: exact up to one rounding.
EXACT_METRICS = (
    "is_masked",
    "is_masked_low",
    "is_masked_high",
    "nonfinite",
    "masked_advantage_positive",
    "masked_advantage_negative",
    "log_ratio_min",
    "log_ratio_max",
)
COUNTS = _C.SUM_ROWS.index("masked_advantage_negative") + 1


def widened(case: LogprobsCase) -> LogprobsCase:
    """The same per-token losses in float64: the band's decisions become the mask."""
    wide = case.map_tokens(lambda t: t.double() if t.is_floating_point() else t)
    everything = dataclasses.replace(case.config, dppo_mask_low=0.0, dppo_mask_high=math.inf)
    return wide.with_(loss_mask=kept(case), config=everything)


def exact_gradient(case: LogprobsCase) -> torch.Tensor:
    """The reference's gradient in float64."""
    return evaluate(widened(case), reference.ipo_loss).gradient


def naive_gradient(case: LogprobsCase, dtype: torch.dtype) -> torch.Tensor:
    """The gradient by eager torch in ``dtype``."""
    narrow = widened(case).map_tokens(lambda t: t.to(dtype) if t.is_floating_point() else t)
    return evaluate(narrow, reference.ipo_loss).gradient


def magnitudes(case: LogprobsCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token, in float64: the magnitudes that both loss terms and their derivative are made of.

    Each includes how far a rounding error of its log-ratio moves it.
    """
    wide = widened(case)
    config = case.config

    def only(tensor: torch.Tensor) -> torch.Tensor:
        return torch.where(wide.loss_mask, tensor, 0.0)

    x = only(wide.trainer_logprobs - wide.inference_logprobs)
    advantage = config.adv_tau * only(wide.advantages).abs()
    if config.teacher_tau:
        distance = only(wide.teacher_logprobs - wide.trainer_logprobs)
        advantage = advantage + config.teacher_tau * distance.abs()
    weight = 1.0 if case.loss_weights is None else only(wide.loss_weights).abs()
    pg_loss = weight * advantage * x.exp() * (1 + x.abs())
    kl_loss = weight * config.kl_tau * x**2
    return pg_loss, kl_loss, pg_loss + weight * 2 * config.kl_tau * x.abs()


def divided(values: torch.Tensor, normalizer: float | torch.Tensor | None) -> torch.Tensor:
    normalizer = 1.0 if normalizer is None else float(normalizer)
    return values / normalizer if normalizer else values * 0


def metric_scales(
    case: LogprobsCase,
) -> tuple[Mapping[str, torch.Tensor], dict[str, torch.Tensor]]:
    """For every metric that is a mean of real terms, the mean of their magnitudes, and for those
    of the mismatch how far a rounding error of the log-ratio moves them."""
    exact = case.call(reference.ipo_loss, dtype=torch.float64).metrics
    pg_loss, kl_loss, _ = magnitudes(case)
    x = log_ratio(case).double()
    finite_x = torch.where(case.loss_mask & x.isfinite(), x, 0.0)
    steepness = 1 + finite_x.abs().clamp(max=100).max() if case.tokens else torch.ones(())
    names = ("mismatch_kl", "masked_mismatch_kl", "unmasked_mismatch_kl", "ess")
    scales = {name: exact[name] * steepness for name in names}
    terms = {"pg_loss": pg_loss, "kl_loss": kl_loss}
    if case.teacher_logprobs is not None:
        terms["teacher_kl"] = teacher_distances(case)
    for name, values in terms.items():
        scales[name] = mean_over_active(case, values)
    return exact, scales


def teacher_distances(case: LogprobsCase) -> torch.Tensor:
    x = log_ratio(case)
    counted = case.loss_mask & x.isfinite() & x.exp().isfinite()
    distance = (case.teacher_logprobs.double() - case.trainer_logprobs.double()).abs()
    return torch.where(counted, distance, 0.0)


def mean_over_active(case: LogprobsCase, values: torch.Tensor) -> torch.Tensor:
    ends = [0, case.tokens] if case.cu_seqlens is None else case.cu_seqlens.tolist()
    active, values = case.loss_mask.flatten().double(), values.flatten()
    means = [
        values[a:b].sum() / active[a:b].sum().clamp(min=1) for a, b in itertools.pairwise(ends)
    ]
    return torch.stack(means) if case.cu_seqlens is not None else means[0]


def assert_matches_reference(case: LogprobsCase, device: torch.device) -> None:
    """Loss, gradient and every metric, within the budget that naive arithmetic sets."""
    result = evaluate(case.to(device))
    dtype = case.compute_dtype
    # float64 has no wider type to be judged in: the budget is all floor.
    budget = {"floor": 8.0 if dtype == torch.float64 else 2.0}
    _, _, derivative = magnitudes(case)
    gradient = operator_gradient(case.to(device))
    assert_close(
        gradient,
        naive_gradient(case, dtype),
        exact_gradient(case),
        scale=divided(derivative, case.normalizer),
        name="gradient",
        **budget,
    )
    assert same_bits(result.gradient, gradient.to(case.trainer_logprobs.dtype))

    naive = case.call(reference.ipo_loss)
    exact = case.call(reference.ipo_loss, dtype=torch.float64)
    pg_loss, kl_loss, _ = magnitudes(case)
    assert result.loss.dtype == dtype
    assert_close(
        result.loss,
        naive.loss.to(dtype),
        exact.loss.double(),
        scale=divided((pg_loss + kl_loss).sum(), case.normalizer),
        name="loss",
        **budget,
    )
    assert_metrics_match(case, result.metrics, naive.metrics, budget)


def assert_metrics_match(
    case: LogprobsCase,
    ours: Mapping[str, torch.Tensor],
    naive: Mapping[str, torch.Tensor],
    budget: dict[str, float],
) -> None:
    exact, scales = metric_scales(case)
    assert set(ours.keys()) == set(exact.keys()) == {*EXACT_METRICS, *scales}
    for name in EXACT_METRICS:
        rounded = exact[name].to(case.compute_dtype)
        assert same_bits(ours[name], rounded), f"{name}: {ours[name]} instead of {rounded}"
    for name, scale in scales.items():
        expected = naive[name].to(case.compute_dtype)
        assert_close(ours[name], expected, exact[name], scale=scale, name=name, **budget)


def assert_near_reference(case: LogprobsCase, device: torch.device) -> None:
    """For few tokens, whose naive errors say little: 8 ulp of the terms' magnitudes."""
    result = evaluate(case.to(device))
    resolution = torch.finfo(case.compute_dtype)
    pg_loss, kl_loss, derivative = magnitudes(case)
    exact, scales = metric_scales(case)

    def near(ours: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, name: str) -> None:
        scale = divided(scale, case.normalizer) if name in ("gradient", "loss") else scale
        error = (ours.cpu().double() - expected).abs()
        limit = 8 * resolution.eps * scale.clamp(min=resolution.smallest_normal)
        assert (error <= torch.where(scale > 0, limit, 0.0)).all(), f"{name}: {error} over {limit}"

    loss = case.call(reference.ipo_loss, dtype=torch.float64).loss
    near(operator_gradient(case.to(device)), exact_gradient(case), derivative, "gradient")
    near(result.loss, loss.double(), (pg_loss + kl_loss).sum(), "loss")
    for name in EXACT_METRICS:
        assert same_bits(result.metrics[name], exact[name].to(case.compute_dtype)), name
    for name, scale in scales.items():
        near(result.metrics[name], exact[name], scale, name)


def assert_sums_close(ours: IPOMetrics, expected: IPOMetrics, case: LogprobsCase) -> None:
    """Counts and extremes equal, float64 sums to 1e-12 of the magnitudes that were added."""
    assert torch.equal(ours.sums[:COUNTS], expected.sums[:COUNTS])
    assert torch.equal(ours.extremes, expected.extremes)
    case = case.to("cpu")
    magnitude = expected.sums.abs().cpu()
    magnitude[_C.SUM_ROWS.index("pg_loss")] = magnitudes(case)[0].sum()
    if case.teacher_logprobs is not None:
        magnitude[_C.SUM_ROWS.index("teacher_kl")] = teacher_distances(case).sum()
    error = (ours.sums - expected.sums).abs().cpu()
    assert (error <= 1e-12 * magnitude).all(), dict(zip(_C.SUM_ROWS, error, strict=True))
