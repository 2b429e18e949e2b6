"""OpenRLHF's PolicyLoss: its correction takes the ratio to the engine; that of PPO is 1 here."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from measure import Batch, import_parents_empty

import_parents_empty("openrlhf.models.loss")  # its models import flash_attn
sys.modules["deepspeed"] = types.ModuleType("deepspeed")  # imported beside it, not called

from openrlhf.models.loss import PolicyLoss  # noqa: E402
from openrlhf.models.utils import log_probs_from_logits  # noqa: E402


def with_correction(counts: float | None = 5.0, **options: Any) -> Any:
    def loss(batch: Batch) -> torch.Tensor:
        return PolicyLoss(**options)(
            batch.trainer,
            batch.trainer.detach(),
            batch.advantages,
            action_mask=batch.mask,
            rollout_log_probs=batch.sampled,
            batch_num_tokens=counts,
        )[0]

    return loss


LOSSES = {
    "`PolicyLoss`, no correction": with_correction(),
    "`PolicyLoss`, without the step's counts": with_correction(counts=None),
    "correction by token, `mask`": with_correction(is_correction_level="token"),
    "correction by token, `clip`": with_correction(
        is_correction_level="token", is_correction_mode="clip"
    ),
    "correction by sequence, `mask`": with_correction(is_correction_level="seq"),
}
LOGPROBS = {"`log_probs_from_logits`": log_probs_from_logits}
