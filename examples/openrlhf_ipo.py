"""OpenRLHF 0.11 with this loss: a launcher that takes the arguments of openrlhf.cli.train_ppo_ray.

`--algo.advantage.is_correction_level token` makes OpenRLHF ask vLLM for processed log-probabilities
and hand them over; the ratio is to these. Without it the ratio is to the policy before the step.
"""

from __future__ import annotations

import inspect
import runpy
from typing import Any

import torch
from openrlhf.models.loss import PolicyLoss, aggregate_loss

from ipo_ext import IPOConfig, ipo_loss

CONFIG = IPOConfig(kl_tau=1e-3)
HONOURED = ("token_level_loss", "is_correction_level")


class IPOPolicyLoss(PolicyLoss):
    """Constructed and called as OpenRLHF's, and averaged as it averages."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, value in options.items():
            default = inspect.signature(PolicyLoss).parameters[name].default
            given = tuple(value) if isinstance(value, list) else value
            if name not in HONOURED and given != default:
                raise ValueError(f"{name}: expected the default {default!r}, got {value!r}")

    def forward(
        self,
        log_probs: torch.Tensor,  # [responses, tokens], as all below
        old_log_probs: torch.Tensor,
        advantages: torch.Tensor,
        action_mask: torch.Tensor,
        rollout_log_probs: torch.Tensor | None = None,
        **counts: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        with torch.enable_grad():  # the average is linear: its gradient is each token's weight
            losses = torch.zeros_like(log_probs, dtype=torch.float32, requires_grad=True)
            average = aggregate_loss(losses, action_mask, self.token_level_loss, **counts)
        (weights,) = torch.autograd.grad(average, losses)
        out = ipo_loss(
            log_probs,
            old_log_probs if rollout_log_probs is None else rollout_log_probs,
            advantages,
            action_mask.bool(),
            loss_weights=weights,
            config=CONFIG,
        )
        return out.loss, out.metrics["is_masked"], out.metrics["mismatch_kl"], None, None


def use_ipo() -> None:
    """In each of Ray's workers, before one of them makes its loss."""
    from openrlhf.trainer.ray import ppo_actor

    ppo_actor.PolicyLoss = IPOPolicyLoss


if __name__ == "__main__":
    import ray

    ray.init(runtime_env={"worker_process_setup_hook": use_ipo})
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
