"""Other implementations of the loss: upstream's loop over sequences; packed forms, eager, compiled.

None of them is guarded as ipo_loss is: where a dropped token's ratio overflows, their gradient is
NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.logprobs.batch import Batch
from ipo_ext import IPOConfig

Metrics = dict[str, torch.Tensor]
Result = tuple[torch.Tensor, Metrics | None]
Call = Callable[[Batch], Result]


# ---- Upstream's way: one sequence after the other ----


def upstream_loop(batch: Batch) -> Result:
    """prime-rl's structure: each packed sequence by itself, added up, divided at the end.

    The formula is that of its pull request 2423; metrics are means over one sequence.
    """
    tensors = [
        batch.trainer_logprobs,
        batch.inference_logprobs,
        batch.advantages,
        batch.loss_mask,
    ]
    if batch.teacher_logprobs is not None:
        tensors.append(batch.teacher_logprobs)
    total: torch.Tensor | float = 0.0
    collected: dict[str, list[torch.Tensor]] = {}
    for sequence in zip(*(tensor.split(batch.lengths) for tensor in tensors), strict=True):
        loss, metrics = _one_sequence(batch.config, *sequence)
        total = total + loss
        for name, value in metrics.items():
            collected.setdefault(name, []).append(value)
    metrics = {name: torch.stack(values) for name, values in collected.items()}
    return total / batch.loss_scale, metrics  # type: ignore[return-value]


def _one_sequence(
    config: IPOConfig,
    trainer_logprobs: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    teacher_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Metrics]:
    log_ratio = trainer_logprobs - inference_logprobs
    ratio = torch.exp(log_ratio)
    mismatch_kl = ratio - log_ratio - 1
    masked_low = ratio < config.dppo_mask_low
    masked_high = ratio > config.dppo_mask_high
    masked = masked_low | masked_high
    keep = loss_mask & ~masked

    advantages = config.adv_tau * advantages
    teacher_kl = None
    if teacher_logprobs is not None:
        teacher_kl = teacher_logprobs - trainer_logprobs
        advantages = advantages + config.teacher_tau * teacher_kl.detach()
    pg_loss = keep * advantages * ratio
    kl_loss = keep * log_ratio**2
    loss = (-pg_loss + config.kl_tau * kl_loss).sum()

    metrics = {
        "mismatch_kl": _safe_mean(mismatch_kl, loss_mask),
        "masked_mismatch_kl": _safe_mean(mismatch_kl, loss_mask & masked),
        "unmasked_mismatch_kl": _safe_mean(mismatch_kl, keep),
        "is_masked": _safe_mean(masked, loss_mask),
        "is_masked_low": _safe_mean(masked_low, loss_mask),
        "is_masked_high": _safe_mean(masked_high, loss_mask),
    }
    if teacher_kl is not None:
        metrics["teacher_kl"] = _safe_mean(teacher_kl, loss_mask)
    return loss, metrics


def _safe_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the masked values, 0 of none. On CUDA the indexing waits for the device."""
    return values.detach()[mask].sum() / torch.clamp_min(mask.sum(), 1)


# ---- Packed: the whole batch in one expression ----


def packed(batch: Batch) -> Result:
    """The loss alone, without any metric."""
    return _packed_loss(_inputs(batch), batch.config, batch.loss_scale), None


def packed_with_metrics(batch: Batch) -> Result:
    """The loss with upstream's metrics, a value for each sequence."""
    return _packed_loss_and_metrics(_inputs(batch), batch.offsets, batch.config, batch.loss_scale)


class _Inputs(NamedTuple):
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    teacher_logprobs: torch.Tensor | None


def _inputs(batch: Batch) -> _Inputs:
    return _Inputs(*batch[:5])


def _packed_loss(inputs: _Inputs, config: IPOConfig, loss_scale: float) -> torch.Tensor:
    log_ratio = inputs.trainer_logprobs - inputs.inference_logprobs
    ratio = log_ratio.exp()
    keep = inputs.loss_mask & (ratio >= config.dppo_mask_low) & (ratio <= config.dppo_mask_high)
    return _packed_sum(inputs, log_ratio, ratio, keep, config) / loss_scale


def _packed_loss_and_metrics(
    inputs: _Inputs, offsets: torch.Tensor, config: IPOConfig, loss_scale: float
) -> tuple[torch.Tensor, Metrics]:
    log_ratio = inputs.trainer_logprobs - inputs.inference_logprobs
    ratio = log_ratio.exp()
    low = inputs.loss_mask & (ratio < config.dppo_mask_low)
    high = inputs.loss_mask & (ratio > config.dppo_mask_high)
    masked = low | high
    keep = inputs.loss_mask & ~masked
    loss = _packed_sum(inputs, log_ratio, ratio, keep, config) / loss_scale

    with torch.no_grad():
        mismatch = torch.where(inputs.loss_mask, ratio - log_ratio - 1, 0.0)
        rows = [inputs.loss_mask, low, high, torch.where(masked, mismatch, 0.0), mismatch]
        if inputs.teacher_logprobs is not None:
            teacher_kl = inputs.teacher_logprobs - inputs.trainer_logprobs
            rows.append(torch.where(inputs.loss_mask, teacher_kl, 0.0))
        sums = torch.segment_reduce(
            torch.stack([row.to(log_ratio.dtype) for row in rows]),
            "sum",
            offsets=offsets.expand(len(rows), -1),
            axis=1,
        )
        active, low_count, high_count, mismatch_masked, mismatch_all, *teacher = sums
        active_or_1 = active.clamp_min(1)
        masked_count = low_count + high_count
        metrics = {
            "mismatch_kl": mismatch_all / active_or_1,
            "masked_mismatch_kl": mismatch_masked / masked_count.clamp_min(1),
            "unmasked_mismatch_kl": (mismatch_all - mismatch_masked)
            / (active - masked_count).clamp_min(1),
            "is_masked": masked_count / active_or_1,
            "is_masked_low": low_count / active_or_1,
            "is_masked_high": high_count / active_or_1,
        }
        if teacher:
            metrics["teacher_kl"] = teacher[0] / active_or_1
    return loss, metrics


def _packed_sum(
    inputs: _Inputs,
    log_ratio: torch.Tensor,
    ratio: torch.Tensor,
    keep: torch.Tensor,
    config: IPOConfig,
) -> torch.Tensor:
    advantages = inputs.advantages
    if config.adv_tau != 1:
        advantages = config.adv_tau * advantages
    if inputs.teacher_logprobs is not None and config.teacher_tau > 0:
        distance = inputs.teacher_logprobs - inputs.trainer_logprobs.detach()
        advantages = advantages + config.teacher_tau * distance
    per_token = config.kl_tau * log_ratio.square() - advantages * ratio
    return torch.where(keep, per_token, 0.0).sum()


# ---- Compiled: the same expressions ----


def compiled(function: Call) -> Call:
    """`packed` or `packed_with_metrics` by torch.compile, for the shapes of the batches it gets."""
    if function is packed:
        loss = torch.compile(_packed_loss, dynamic=False, fullgraph=True)
        return lambda batch: (loss(_inputs(batch), batch.config, batch.loss_scale), None)
    assert function is packed_with_metrics
    both = torch.compile(_packed_loss_and_metrics, dynamic=False, fullgraph=True)
    return lambda batch: both(_inputs(batch), batch.offsets, batch.config, batch.loss_scale)
