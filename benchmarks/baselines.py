"""What ipo_loss is compared with: upstream's loop over sequences; packed forms, eager and compiled.

None of them is guarded as ipo_loss is: where a dropped token's ratio overflows, their gradient is
NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ipo_ext import IPOConfig

Metrics = dict[str, torch.Tensor]
Result = tuple[torch.Tensor, Metrics | None]


# ---- A batch ----


class Batch(NamedTuple):
    """Packed sequences; everything that the host knows beforehand is at hand in host memory."""

    trainer_logprobs: torch.Tensor  # [N], requires grad
    inference_logprobs: torch.Tensor  # [N]
    advantages: torch.Tensor  # [N]
    loss_mask: torch.Tensor  # [N]
    teacher_logprobs: torch.Tensor | None  # [N]
    lengths: list[int]  # [S], tokens of each sequence
    cu_seqlens: torch.Tensor  # [S + 1], int32
    offsets: torch.Tensor  # [S + 1], int64
    loss_scale: float  # number of loss tokens
    config: IPOConfig


def make_batch(
    tokens: int,
    sequences: int,
    *,
    device: torch.device | str = "cpu",
    teacher: bool = False,
    seed: int = 0,
) -> Batch:
    """Random, well-behaved rollouts of unequal lengths: a quarter of each is prompt.

    About 2% of the tokens are dropped. No log-ratio lies within 1e-3 of the band's ends, where
    `exp(x) <= 5` and `x <= log(5)` may differ: every provider has to keep the same tokens.
    """
    random = torch.Generator().manual_seed(seed)
    config = IPOConfig(teacher_tau=0.5) if teacher else IPOConfig()
    lengths = _lengths(tokens, sequences, random)
    ends = torch.tensor([0, *lengths]).cumsum(0)

    inference = -torch.rand(tokens, generator=random) * 4
    log_ratio = torch.randn(tokens, generator=random) * 0.7
    for bound in config.log_bounds(torch.float32):
        near = (log_ratio - bound).abs() < 1e-3
        log_ratio = torch.where(near, torch.full_like(log_ratio, bound * 0.99), log_ratio)
    position = torch.arange(tokens) - torch.repeat_interleave(ends[:-1], ends.diff())
    loss_mask = position >= torch.repeat_interleave(ends.diff() // 4, ends.diff())
    trainer = inference + log_ratio
    teacher_logprobs = trainer + torch.randn(tokens, generator=random) * 0.3 if teacher else None
    return Batch(
        trainer_logprobs=trainer.to(device).requires_grad_(),
        inference_logprobs=inference.to(device),
        advantages=torch.randn(tokens, generator=random).to(device),
        loss_mask=loss_mask.to(device),
        teacher_logprobs=None if teacher_logprobs is None else teacher_logprobs.to(device),
        lengths=lengths,
        cu_seqlens=ends.to(device, torch.int32),
        offsets=ends.to(device),
        loss_scale=float(loss_mask.sum()),
        config=config,
    )


def _lengths(tokens: int, sequences: int, random: torch.Generator) -> list[int]:
    """Random lengths that add up to `tokens`, between half and one and a half of their mean."""
    parts = torch.rand(sequences, generator=random, dtype=torch.float64) + 0.5
    cuts = (parts.cumsum(0) / parts.sum() * tokens).round().long()
    return torch.diff(cuts, prepend=torch.zeros(1, dtype=torch.long)).tolist()


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


def compiled(function: Callable[[Batch], Result]) -> Callable[[Batch], Result]:
    """`packed` or `packed_with_metrics` by torch.compile, for the shapes of the batches it gets."""
    if function is packed:
        loss = torch.compile(_packed_loss, dynamic=False, fullgraph=True)
        return lambda batch: (loss(_inputs(batch), batch.config, batch.loss_scale), None)
    assert function is packed_with_metrics
    both = torch.compile(_packed_loss_and_metrics, dynamic=False, fullgraph=True)
    return lambda batch: both(_inputs(batch), batch.offsets, batch.config, batch.loss_scale)
