"""SkyRL's losses that take the ratio to the engine, and its clipped one with token weights."""

from __future__ import annotations

from typing import Any

import torch
from measure import Batch, import_parents_empty

import_parents_empty("skyrl.backends.skyrl_train.utils.ppo_utils")  # asks for Python 3.12

from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry  # noqa: E402
from skyrl.backends.skyrl_train.utils.torch_utils import logprobs_from_logits  # noqa: E402
from skyrl.train.config.config import AlgorithmConfig, OffPolicyCorrectionConfig  # noqa: E402


def with_correction(name: str, **options: Any) -> Any:
    config = AlgorithmConfig(
        policy_loss_type=name, off_policy_correction=OffPolicyCorrectionConfig(**options)
    )

    def loss(batch: Batch) -> torch.Tensor:
        return PolicyLossRegistry.get(name)(
            batch.trainer,
            batch.trainer.detach(),
            batch.advantages,
            config,
            loss_mask=batch.mask.float(),
            rollout_logprobs=batch.sampled,
        )[0]

    return loss


LOSSES = {
    "`regular`, token weights": with_correction("regular", tis_ratio_type="token"),
    "`rollout_is`": with_correction("rollout_is"),
}
LOGPROBS = {"`logprobs_from_logits`": logprobs_from_logits}
