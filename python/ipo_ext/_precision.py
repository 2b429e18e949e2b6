"""A warning for log-probabilities that have lost their digits on the way."""

from __future__ import annotations

import functools
import warnings

import torch


class LowPrecisionWarning(UserWarning):
    """Log-probabilities of the sampler came in 16 bits: the log-ratio holds their rounding."""


def warn_if_rounded(inference_logprobs: torch.Tensor) -> None:
    """Warns of 16-bit log-probabilities, once in a process for each of the two dtypes."""
    if inference_logprobs.dtype in (torch.float16, torch.bfloat16):
        _warn_of_rounding(inference_logprobs.dtype)


# torch.compile calls it while it traces, instead of tracing it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_of_rounding(dtype: torch.dtype) -> None:
    _warn_once(dtype)


@functools.cache
def _warn_once(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    warnings.warn(
        f"inference_logprobs: expected float32 or float64, got {dtype}, whose rounding "
        f"({eps / 2:.1g} of a value, {8 * eps:.1g} at -20) is added to every log-ratio and looks "
        "like mismatch. Keep them in float32. Mixed precision may have cast them on their way into "
        "a forward, as FSDP2 does by default: pass them in an ipo_ext.LossBatch, which it does not "
        "cast, or set MixedPrecisionPolicy(cast_forward_inputs=False). If the sampler gave them in "
        "16 bits, ignore ipo_ext.LowPrecisionWarning",
        LowPrecisionWarning,
        stacklevel=2,
    )
