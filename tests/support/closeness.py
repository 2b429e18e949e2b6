"""Closeness judged against float64, with the error that plain eager code makes as the yardstick.

It avoids fixed tolerances: a kernel may be about as wrong as naive arithmetic in the same dtype,
and at the band's edge a token may change sides only where rounding proves that it could.
"""

from __future__ import annotations

import torch


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
