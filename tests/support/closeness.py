"""Closeness judged against float64, with the error that plain eager code makes as the yardstick.

It avoids fixed tolerances: a kernel may be about as wrong as naive arithmetic in the same dtype,
and at the band's edge a token may change sides only where rounding proves that it could.
"""

from __future__ import annotations

import itertools

import torch

from ipo_ext import _C, reference
from tests.support.cases import (
    evaluate,
    exact_gradient,
    log_ratio,
    naive_gradient,
    operator_gradient,
    same_bits,
    widened,
)


def assert_close(
    ours: torch.Tensor,
    naive: torch.Tensor,
    exact: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    factor: float = 2.0,
    floor: float = 1.0,
    name: str = "value",
) -> None:
    """Fails unless ours is as close to exact as ``factor`` times naive's error plus ``floor`` ulp.

    Errors are measured in ulp of ``scale``, both as the maximum over all elements (a single wrong
    one) and as the root mean square (a small bias of all of them).

    Args:
        ours: the result under test; its dtype defines the ulp.
        naive: the same in eager torch, in the same dtype.
        exact: the same in float64.
        scale: per element, the sum of the magnitudes of the terms that make it (default: its own
            magnitude). Where it is 0, ours must equal exact: an exact zero stays one.
    """
    ours, naive, exact = (tensor.detach().cpu() for tensor in (ours, naive, exact))
    assert exact.dtype == torch.float64, f"{name}: exact must be float64, got {exact.dtype}"
    assert ours.dtype == naive.dtype, f"{name}: dtype {ours.dtype}, naive {naive.dtype}"
    assert ours.shape == exact.shape == naive.shape, f"{name}: {ours.shape} against {exact.shape}"
    scale = exact.abs() if scale is None else scale.detach().cpu().expand_as(exact)
    _assert_same_nonfinite(ours, exact, name)
    finite = exact.isfinite()
    if not finite.any():
        return

    resolution = torch.finfo(ours.dtype)
    ulp = scale[finite] * resolution.eps
    subnormal = resolution.smallest_normal * resolution.eps
    our_errors = _errors_in_ulp(ours[finite], exact[finite], ulp, subnormal)
    naive_errors = _errors_in_ulp(naive[finite], exact[finite], ulp, subnormal)
    naive_errors = naive_errors[naive_errors.isfinite()]
    _assert_within(our_errors, naive_errors, torch.amax, "maximum", factor, floor, name)
    _assert_within(our_errors, naive_errors, _root_mean_square, "rms", factor, floor, name)


def assert_flips_proven(
    ours_kept: torch.Tensor,
    exact_kept: torch.Tensor,
    log_ratio: torch.Tensor,
    rounding: torch.Tensor,
    bounds: tuple[float, float],
    *,
    name: str = "mask",
) -> None:
    """Fails if a token is kept by one only, unless its log-ratio is within rounding of a bound.

    Args:
        ours_kept, exact_kept: the two decisions, bool.
        log_ratio: float64; NaN proves nothing.
        rounding: per token, how far ours may have computed the log-ratio from it.
        bounds: logarithms of the band's ends.
    """
    flipped = (ours_kept != exact_kept).cpu()
    x = log_ratio.detach().cpu().double()
    low, high = bounds
    proven = ((x - low).abs() <= rounding.cpu()) | ((x - high).abs() <= rounding.cpu())
    unproven = (flipped & ~proven).nonzero()
    assert len(unproven) == 0, (
        f"{name}: {len(unproven)} of {int(flipped.sum())} flips are no crossing of "
        f"[{low}, {high}]: first at {unproven[0].tolist()}, "
        f"log-ratio {x[tuple(unproven[0])].item()!r}"
    )


def _assert_same_nonfinite(ours: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    # What overflows ours' dtype may do so.
    rounded = exact.to(ours.dtype)
    same = torch.where(
        rounded.isfinite(), ours.isfinite(), (ours == rounded) | (ours.isnan() & rounded.isnan())
    )
    wrong = (~same).nonzero()
    assert len(wrong) == 0, (
        f"{name}: {len(wrong)} elements differ in being finite: first at {wrong[0].tolist()}, "
        f"got {ours[tuple(wrong[0])].item()!r}, expected {exact[tuple(wrong[0])].item()!r}"
    )


def _errors_in_ulp(
    got: torch.Tensor, exact: torch.Tensor, ulp: torch.Tensor, subnormal: float
) -> torch.Tensor:
    error = (got.double() - exact).abs()
    return torch.where(
        ulp > 0, error / ulp.clamp(min=subnormal), torch.where(error > 0, torch.inf, 0.0)
    )


def _root_mean_square(errors: torch.Tensor) -> torch.Tensor:
    return errors.square().mean().sqrt()


def _assert_within(ours, naive, norm, kind, factor, floor, name) -> None:
    error = norm(ours).item()
    naive_error = norm(naive).item() if naive.numel() else 0.0
    budget = factor * naive_error + floor
    assert error <= budget, (
        f"{name}: {kind} error {error:.3g} ulp, expected at most {factor} * {naive_error:.3g} "
        f"(naive) + {floor} = {budget:.3g}; largest at flat finite index {ours.argmax().item()}"
    )


# ---------------------------------------------------------------------------------------------
# The loss against its reference

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


def magnitudes(case):
    """Per token, in float64: the magnitudes that both loss terms and their derivative are made of.

    Each includes how far a rounding error of its log-ratio moves it.
    """
    wide = widened(case)
    config = case.config

    def only(tensor):
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


def divided(values, normalizer):
    normalizer = 1.0 if normalizer is None else float(normalizer)
    return values / normalizer if normalizer else values * 0


def metric_scales(case):
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


def teacher_distances(case):
    x = log_ratio(case)
    counted = case.loss_mask & x.isfinite() & x.exp().isfinite()
    distance = (case.teacher_logprobs.double() - case.trainer_logprobs.double()).abs()
    return torch.where(counted, distance, 0.0)


def mean_over_active(case, values):
    ends = [0, case.tokens] if case.cu_seqlens is None else case.cu_seqlens.tolist()
    active, values = case.loss_mask.flatten().double(), values.flatten()
    means = [
        values[a:b].sum() / active[a:b].sum().clamp(min=1) for a, b in itertools.pairwise(ends)
    ]
    return torch.stack(means) if case.cu_seqlens is not None else means[0]


def assert_matches_reference(case, device):
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


def assert_metrics_match(case, ours, naive, budget):
    exact, scales = metric_scales(case)
    assert set(ours) == set(exact) == {*EXACT_METRICS, *scales}
    for name in EXACT_METRICS:
        rounded = exact[name].to(case.compute_dtype)
        assert same_bits(ours[name], rounded), f"{name}: {ours[name]} instead of {rounded}"
    for name, scale in scales.items():
        expected = naive[name].to(case.compute_dtype)
        assert_close(ours[name], expected, exact[name], scale=scale, name=name, **budget)


def assert_near_reference(case, device):
    """For few tokens, whose naive errors say little: 8 ulp of the terms' magnitudes."""
    result = evaluate(case.to(device))
    resolution = torch.finfo(case.compute_dtype)
    pg_loss, kl_loss, derivative = magnitudes(case)
    exact, scales = metric_scales(case)

    def near(ours, expected, scale, name):
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


def assert_sums_close(ours, expected, case):
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
