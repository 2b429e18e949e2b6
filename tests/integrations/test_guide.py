"""What docs/integrations.md says of sampling and of averaging over ranks, as tests."""

from __future__ import annotations

import math

import torch

from ipo_ext import IPOConfig, ipo_loss, ipo_loss_from_logits, token_logprobs
from tests.support.backends import Backend

TOKENS, VOCAB, KEPT = 8, 32, 4
NO_BAND = IPOConfig(dppo_mask_low=0.0, dppo_mask_high=math.inf, kl_tau=0.0)


def truncated_sampling(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, tokens drawn from the KEPT best, and the mask of those that could be drawn."""
    logits = torch.randn(TOKENS, VOCAB).to(device)
    possible = torch.zeros_like(logits, dtype=torch.bool)
    possible.scatter_(-1, logits.topk(KEPT).indices, True)
    q = logits.masked_fill(~possible, -math.inf).softmax(-1)
    return logits, torch.multinomial(q, 1).squeeze(-1), possible


def test_top_k_shifts_the_log_ratio_by_the_mass_that_it_kept(backend: Backend) -> None:
    logits, tokens, possible = truncated_sampling(backend.device)
    mass = (logits.softmax(-1) * possible).sum(-1)
    p, _ = token_logprobs(logits, tokens)
    q, _ = token_logprobs(logits.masked_fill(~possible, -math.inf), tokens)
    torch.testing.assert_close(p - q, mass.log())


def test_logits_of_minus_infinity_take_both_over_the_same_tokens(backend: Backend) -> None:
    logits, tokens, possible = truncated_sampling(backend.device)
    kept = logits.masked_fill(~possible, -math.inf)
    sampled = kept.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    out = ipo_loss_from_logits(
        kept.requires_grad_(), tokens, sampled, torch.randn_like(sampled), everything
    )
    out.loss.backward()
    for name in ("log_ratio_min", "log_ratio_max"):
        torch.testing.assert_close(out.metrics[name], torch.zeros_like(out.loss))
    assert not kept.grad[~possible].any()
    assert kept.grad.isfinite().all()


def test_a_ranks_share_of_the_normalizer_survives_the_average(backend: Backend) -> None:
    ranks = 4
    trainer = torch.randn(TOKENS, device=backend.device).requires_grad_()
    constants = [torch.randn(TOKENS, device=backend.device) for _ in range(2)]
    active = torch.arange(TOKENS, device=backend.device) % 3 != 1

    def gradient(part: slice, normalizer: torch.Tensor) -> torch.Tensor:
        inputs = (tensor[part] for tensor in (trainer, *constants, active))
        out = ipo_loss(*inputs, normalizer=normalizer, config=NO_BAND)
        return torch.autograd.grad(out.loss, trainer)[0]

    count = active.sum()
    parts = [slice(rank, None, ranks) for rank in range(ranks)]
    averaged = sum(gradient(part, count / ranks) for part in parts) / ranks
    torch.testing.assert_close(averaged, gradient(slice(None), count))
