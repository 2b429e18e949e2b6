"""torchrl's GRPOLoss on a distribution whose log-probabilities are the batch's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from measure import Batch
from tensordict import TensorDict
from torchrl.modules.llm.policies.common import LLMMaskedCategorical
from torchrl.objectives.llm import GRPOLoss


class Given(GRPOLoss):
    """``GRPOLoss`` that takes log-probabilities and mask from where it would run a model."""

    def _get_cur_log_prob(self, tensordict: TensorDict) -> tuple[torch.Tensor, Any, bool]:
        return tensordict["given"], SimpleNamespace(mask=tensordict["given_mask"]), False


def of_term(name: str, **options: Any) -> Any:
    def loss(batch: Batch) -> torch.Tensor:
        module = Given(None, entropy_bonus=False, device="cpu", **options)
        out = module(
            TensorDict(
                {
                    "given": batch.trainer,
                    "given_mask": batch.mask,
                    ("log_probs", "full"): batch.sampled,
                    ("tokens", "full"): torch.zeros(batch.mask.shape, dtype=torch.long),
                    "advantage": batch.advantages[..., None],
                },
                batch_size=[len(batch.mask)],
            )
        )
        return getattr(out, name).sum()

    return loss


def logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    everything = torch.ones_like(ids, dtype=torch.bool)
    return LLMMaskedCategorical(logits=logits, mask=everything).log_prob(ids)


LOSSES = {
    "`GRPOLoss`": of_term("loss_objective"),
    "`GRPOLoss`, KL to inference alone": of_term("loss_kl_to_inference", kl_to_inference_coeff=1.0),
}
LOGPROBS = {"`LLMMaskedCategorical`": logprobs}
