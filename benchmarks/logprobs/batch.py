"""Packed sequences of random log-probabilities, the same for every provider."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ipo_ext import IPOConfig


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

    @property
    def leaves(self) -> tuple[torch.Tensor]:
        return (self.trainer_logprobs,)


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
