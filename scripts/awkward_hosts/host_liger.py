"""Liger's fused GRPO from hidden states whose logits are the batch's log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from measure import Batch


def with_average(loss_type: str) -> Any:
    def loss(batch: Batch) -> torch.Tensor:
        module = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=False, use_ref_model=False, loss_type=loss_type
        )
        # Of two tokens; the first has the batch's log-probability, so the logits are normalised.
        p = batch.trainer.exp().clamp(max=1 - 1e-6)
        hidden = torch.stack([batch.trainer, torch.log1p(-p)], dim=-1)
        return module(
            hidden,
            torch.eye(2),
            torch.zeros(batch.mask.shape, dtype=torch.long),
            batch.mask.float(),
            batch.advantages[:, 0],
            old_per_token_logps=batch.sampled,
        )[0]

    return loss


def logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return LigerFusedLinearPPOBase.chunk_forward(logits, torch.eye(logits.shape[-1]), ids)


LOSSES = {
    f"fused GRPO, `{loss_type}`": with_average(loss_type) for loss_type in ("dapo", "grpo", "luspo")
}
LOGPROBS = {"fused GRPO": logprobs}
