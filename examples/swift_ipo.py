"""ms-swift 4.6 with this loss: `swift rlhf --rlhf_type grpo --external_plugins swift_ipo.py`.

The ratio is to vLLM's log-probabilities where the batch has them, else to the policy before the
step. ms-swift averages by `loss_type`: grpo, bnpo, dr_grpo or dapo.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from swift.trainers.trainer_factory import TrainerFactory

from ipo_ext import IPOConfig, ipo_loss

CONFIG = IPOConfig(kl_tau=1e-3)
AVERAGES = ("grpo", "bnpo", "dr_grpo", "dapo")
OF_OTHER_LOSSES = (
    *("epsilon", "epsilon_high", "delta", "importance_sampling_level", "top_entropy_quantile"),
    *("rollout_importance_sampling_mode", "off_policy_sequence_mask_delta", "sdar_loss_coef"),
)


class IPOSwiftTrainer(GRPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_other_losses(kwargs["args"])
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._trained = outputs[0]  # the last is the one that is trained
        return outputs

    def _compute_loss_and_metrics(self, model: Any, inputs: Any, batch: Any) -> tuple:
        _, metrics = super()._compute_loss_and_metrics(model, inputs, batch)
        mask = metrics["completion_mask"].bool()  # without what ms-swift filters
        sampled = (batch.rollout_per_token_logps, batch.old_per_token_logps, self._trained.detach())
        weights, normalizer = self._average(mask, batch)
        out = ipo_loss(
            self._trained,
            next(logprobs for logprobs in sampled if logprobs is not None),
            batch.advantages,
            mask,
            loss_weights=weights,
            normalizer=normalizer,
            config=CONFIG,
        )
        for name, value in out.metrics.tolist().items():
            self._metrics[metrics["mode"]][f"ipo/{name}"].append(value)
        return self._undo_gradient_accumulation_scaling(out.loss), metrics

    def _average(self, mask: torch.Tensor, batch: Any) -> tuple[torch.Tensor | None, Any]:
        if self.loss_type == "dapo":
            return None, batch.num_items_in_batch / self.accelerator.num_processes
        if self.loss_type == "bnpo":
            return None, mask.sum().clamp(min=1)
        if self.loss_type == "dr_grpo":
            return None, len(mask) * self.max_completion_length
        return (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand(mask.shape), len(mask)


def refuse_other_losses(args: Any) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name in OF_OTHER_LOSSES:
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"{name}: expected {defaults[name]!r}, got {getattr(args, name)!r}")
    if args.beta != 0 and not args.kl_in_reward:
        raise ValueError(f"beta: expected 0 or kl_in_reward, got {args.beta!r}")
    if args.chord_sft_dataset:
        raise ValueError(f"chord_sft_dataset: expected none, got {args.chord_sft_dataset!r}")
    if args.loss_type not in AVERAGES or args.use_liger_kernel:
        raise ValueError(f"loss_type: expected one of {AVERAGES}, without Liger's kernels")


TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.{IPOSwiftTrainer.__name__}"
