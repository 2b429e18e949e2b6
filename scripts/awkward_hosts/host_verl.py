"""verl's clipped loss with its aggregations, and the loss of its bypass mode."""

from __future__ import annotations

import functools
from typing import Any

import torch
from measure import Batch
from verl.trainer.config import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.torch_functional import logprobs_from_logits
from verl.workers.config import ActorConfig, PolicyLossConfig

OF_THE_STEP = {"dp_size": 1, "batch_num_tokens": 5, "global_batch_size": 2}
OF_THE_MICRO_BATCH = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}


def loss(
    batch: Batch, mode: str, counts: dict[str, int | None], name: str = "vanilla", **correction: Any
) -> torch.Tensor:
    options = PolicyLossConfig(
        loss_mode=name,
        rollout_correction=RolloutCorrectionConfig(bypass_mode=True, **correction),
    )
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2, policy_loss=options
    )
    config.global_batch_info.update(counts)
    return get_policy_loss_fn(name)(
        old_log_prob=batch.sampled,
        log_prob=batch.trainer,
        advantages=batch.advantages,
        response_mask=batch.mask.long(),
        loss_agg_mode=mode,
        config=config,
    )[0]


def variant(mode: str, counts: dict[str, int | None], **options: Any) -> Any:
    return functools.partial(loss, mode=mode, counts=counts, **options)


MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
LOSSES = {
    **{f"`vanilla`, {mode}": variant(mode, OF_THE_STEP) for mode in MODES},
    "`vanilla`, token-mean, without the step's counts": variant("token-mean", OF_THE_MICRO_BATCH),
    "`bypass_mode`, `reinforce`": variant(
        "token-mean", OF_THE_STEP, name="bypass_mode", loss_type="reinforce"
    ),
}
LOGPROBS = {"`logprobs_from_logits`": logprobs_from_logits}
