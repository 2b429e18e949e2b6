"""AReaL's actor loss with the ratio to the engine, and decoupled from it, with its rejection."""

from __future__ import annotations

from typing import Any

import torch
from areal.api.cli_args import RejectionSamplingConfig
from areal.utils.functional import gather_logprobs, ppo_actor_loss_fn
from measure import Batch


def decoupled(**options: Any) -> Any:
    """The ratio to the policy before the step is 1; the engine's is the rejection's."""

    def loss(batch: Batch) -> torch.Tensor:
        return ppo_actor_loss_fn(
            logprobs=batch.trainer,
            proximal_logprobs=batch.trainer.detach(),
            old_logprobs=batch.sampled,
            advantages=batch.advantages,
            eps_clip=0.2,
            loss_mask=batch.mask,
            rejection_sampling=RejectionSamplingConfig(**options),
        )[0]

    return loss


def of_the_engines_ratio(batch: Batch) -> torch.Tensor:
    return ppo_actor_loss_fn(
        logprobs=batch.trainer,
        proximal_logprobs=batch.sampled,
        old_logprobs=batch.sampled,
        advantages=batch.advantages,
        eps_clip=0.2,
        loss_mask=batch.mask,
    )[0]


LOSSES = {
    "`ppo_actor_loss_fn`": of_the_engines_ratio,
    "decoupled, rejection by `ratio`, its default": decoupled(),
    "decoupled, rejection by `kl_k2`": decoupled(metric="kl_k2"),
}
LOGPROBS = {"`gather_logprobs`": gather_logprobs}
