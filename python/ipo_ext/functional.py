"""The loss as functions: checks the arguments, then makes one operator call."""

from __future__ import annotations

import math

import torch

from ipo_ext import _checks, _operators
from ipo_ext.config import IPOConfig
from ipo_ext.metrics import IPOMetrics
from ipo_ext.output import IPOOutput

_DEFAULT = IPOConfig()


def ipo_loss(
    trainer_logprobs: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    teacher_logprobs: torch.Tensor | None = None,
    loss_weights: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    config: IPOConfig = _DEFAULT,
) -> IPOOutput:
    r"""The IPO+KL loss from per-token log-probabilities (tier 1).

    Per active token, with ``x = trainer_logprob - inference_logprob`` and ``r = exp(x)``: kept
    where x and r are finite and ``log(dppo_mask_low) <= x <= log(dppo_mask_high)``; a kept token
    pays ``w * (-A' * r + kl_tau * x**2)``, every other token exactly 0, whatever it holds. Source:
    PrimeIntellect-ai/prime-rl pull request 2423; docs/math.md derives it.

    Everything is computed in float64 if either log-probability is float64, else in float32.

    Args:
        trainer_logprobs: ``[...]``, natural logarithms, any floating dtype; the only input that
            receives a gradient.
        inference_logprobs: same shape, any floating dtype: what the tokens were sampled with.
        advantages: same shape, any floating dtype. A constant, like every input below.
        loss_mask: same shape, bool: the tokens that train.
        teacher_logprobs: same shape; needed for ``config.teacher_tau > 0``, otherwise only
            measured (metric ``teacher_kl``).
        loss_weights: same shape, a factor of each token's loss; default 1.
        cu_seqlens: int32 ``[segments + 1]``, first token of each packed sequence, then the number
            of tokens (flash-attention's convention, tokens counted row by row); every metric then
            has shape ``[segments]``.
        normalizer: what the sum is divided by, usually the global number of loss tokens: a float
            > 0, or a 0-dim tensor (on the inputs' device or on the CPU; 0 gives loss 0 and zero
            gradients). Default 1.
        config: bounds and taus.

    Returns:
        An ``IPOOutput`` of the 0-dim loss and its metrics; nothing is synchronised.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, a device or a float is not as above, or a constant requires grad.
        RuntimeError: on CPU, ``cu_seqlens`` is no partition of the tokens, or a tensor normalizer
            is negative or NaN. On CUDA these make the loss and every gradient NaN instead.

    Example:
        >>> out = ipo_loss(trainer, inference, advantages, mask, normalizer=mask.sum())
        >>> out.loss.backward()
        >>> out.metrics["is_masked"]
    """
    if not isinstance(config, IPOConfig):
        raise TypeError(
            f"config: expected an IPOConfig, got {type(config).__name__}; "
            "use IPOConfig.from_mapping"
        )
    if normalizer is not None and not isinstance(normalizer, torch.Tensor):
        normalizer = _normalizer_tensor(normalizer, trainer_logprobs)
    _checks.check_per_token_loss(
        trainer_logprobs,
        inference_logprobs,
        advantages,
        loss_mask,
        teacher_logprobs,
        loss_weights,
        cu_seqlens,
        normalizer,
        config.teacher_tau,
    )
    _checks.check_constants(
        (
            ("inference_logprobs", inference_logprobs),
            ("advantages", advantages),
            ("teacher_logprobs", teacher_logprobs),
            ("loss_weights", loss_weights),
            ("normalizer", normalizer),
        )
    )
    with_gradient = trainer_logprobs.requires_grad and torch.is_grad_enabled()
    compute = _checks.compute_dtype(trainer_logprobs, inference_logprobs)
    taus = (config.adv_tau, config.kl_tau, config.teacher_tau)
    # float(): read here, or torch.compile (2.13) reads them inside the first of two calls of the
    # loss in a graph, and fails at the second.
    settings = [float(value) for value in (*config.log_bounds(compute), *taus)]
    loss, _, means, sums, extremes = _operators.run_ipo_loss(
        trainer_logprobs,
        inference_logprobs,
        advantages,
        loss_mask,
        teacher_logprobs,
        loss_weights,
        cu_seqlens,
        normalizer,
        *settings,
        with_gradient,
    )
    metrics = IPOMetrics(means, sums, extremes, has_teacher=teacher_logprobs is not None)
    return IPOOutput(loss, metrics)


def _normalizer_tensor(normalizer: float, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(normalizer, (int, float)):
        raise TypeError(
            f"normalizer: expected a float or a 0-dim tensor, got {type(normalizer).__name__}"
        )
    if not 0 < normalizer < math.inf:
        raise ValueError(
            f"normalizer: expected a finite number > 0 or a tensor, got {normalizer!r}"
        )
    if torch.compiler.is_compiling():
        # A number that the graph computes with: as a constant, each new value would recompile.
        return like.new_ones((), dtype=torch.float64) * normalizer
    return torch.scalar_tensor(normalizer, dtype=torch.float64)
