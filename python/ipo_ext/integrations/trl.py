"""TRL's GRPOTrainer with this loss; an option of its config that the loss cannot honour raises."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from trl import GRPOTrainer

from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss
from ipo_ext.integrations._refusals import refuse_a_teacher
from ipo_ext.integrations._trl_options import (
    refuse_raw_logprobs,
    refuse_what_is_not_honoured,
    warn_of_what_bends_the_ratio,
)
from ipo_ext.integrations._trl_rollouts import checked


class IPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` whose loss is ``ipo_loss``, logged as ``ipo/<metric>``.

    The ratio is the trained policy's over what sampled: the log-probabilities that vLLM or a
    ``rollout_func`` returned where the batch has them, otherwise those of the policy at the time
    of generation. Where TRL leaves those out too, since no step lies between, the ratio is 1: that
    is warned of once, and metrics that compare the two policies are not logged.

    A completion is a sequence, as far as a mask rule asks. Of ``loss_type`` only the average
    counts: ``"dapo"``, ``"bnpo"``, ``"dr_grpo"`` or ``"grpo"``.

    Args:
        ipo_config: the loss; default ``IPOConfig()``. All others are ``GRPOTrainer``'s.

    Raises:
        ValueError: an option of ``GRPOConfig`` that this loss does not honour is set, or one that
            gives it wrong log-probabilities. What bends the ratio is warned of.
    """

    def __init__(self, *args: Any, ipo_config: IPOConfig | None = None, **kwargs: Any) -> None:
        self.ipo_config = ipo_config if ipo_config is not None else IPOConfig()
        self._ipo_metrics: dict[str, Any] = {}  # IPOMetrics by mode, since the last log
        self._modes_without_sampler: set[str] = set()
        self._has_warned = False
        refuse_a_teacher(self.ipo_config, "TRL")
        given = inspect.signature(GRPOTrainer).bind_partial(*args, **kwargs)
        if (options := given.arguments.get("args")) is not None:
            refuse_what_is_not_honoured(options)  # before model and engine are up
            warn_of_what_bends_the_ratio(options)
        if (rollout_func := given.arguments.get("rollout_func")) is not None:
            given.arguments["rollout_func"] = checked(rollout_func)
        super().__init__(*given.args, **given.kwargs)
        if self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process:
            refuse_raw_logprobs(self.vllm_generation.vllm_client.get_server_info())

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        logprobs, entropies, aux_loss = self._forward(model, inputs)
        weights, normalizer = self._average(mask, inputs)
        advantages = inputs["advantages"]
        out = ipo_loss(
            logprobs,
            self._sampling_logprobs(inputs, logprobs),
            advantages.reshape(len(mask), -1).expand(mask.shape),
            mask,
            loss_weights=weights,
            normalizer=normalizer,
            config=self.ipo_config,
        )
        self._record(out.metrics, entropies, mask)
        return out.loss if aux_loss is None else out.loss + self._balance(aux_loss)

    def _forward(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Log-probabilities and entropies of the completions; the experts' balance, or None."""
        compute = self._get_per_token_logps_and_entropies
        passed_on = inspect.signature(compute).parameters.keys() & inputs.keys()  # images and such
        return compute(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs[name] for name in passed_on},
        )

    def _sampling_logprobs(self, inputs: dict[str, Any], logprobs: torch.Tensor) -> torch.Tensor:
        for name in ("sampling_per_token_logps", "old_per_token_logps"):
            if inputs.get(name) is not None:
                return inputs[name]
        if not self._has_warned:
            warnings.warn(_NOTHING_MEASURED, stacklevel=2)
        self._has_warned = True
        self._modes_without_sampler.add(self._mode)
        return logprobs.detach()

    def _average(
        self, mask: torch.Tensor, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor | None, torch.Tensor | float]:
        """Token weights and normalizer that average as ``loss_type`` does, per rank and step."""
        steps = self._accumulation_steps
        if self.loss_type == "dapo":  # the tokens of the whole generation batch, this rank's share
            share = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if self._mode == "train":
                share = share * steps / self.args.steps_per_generation
            return None, share
        if self.loss_type == "bnpo":
            return None, mask.sum().clamp(min=1) * steps
        if self.loss_type == "dr_grpo":
            return None, len(mask) * self.max_completion_length * steps
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        return (1 / lengths).expand(mask.shape), len(mask) * steps

    def _balance(self, aux_loss: torch.Tensor) -> torch.Tensor:
        """The loss that keeps a mixture's experts in use, as TRL adds it."""
        mean = self.accelerator.gather_for_metrics(aux_loss.detach()).mean()
        self._metrics[self._mode]["aux_loss"].append(mean.item())
        return self.router_aux_loss_coef * aux_loss / self._accumulation_steps

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _accumulation_steps(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _record(self, metrics: Any, entropies: torch.Tensor, mask: torch.Tensor) -> None:
        mode = self._mode
        self._ipo_metrics[mode] = self._ipo_metrics.get(mode, 0) + metrics
        entropy = torch.stack([torch.where(mask, entropies.detach(), 0).sum(), mask.sum()])
        total, tokens = self.accelerator.reduce(entropy, reduction="sum").tolist()
        self._metrics[mode]["entropy"].append(total / max(tokens, 1))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As TRL's, with the loss's metrics over all micro-batches and ranks since the last log."""
        metrics = self._ipo_metrics.pop(self._mode, None)
        if metrics is not None:
            if self.accelerator.num_processes > 1:
                metrics = metrics.all_reduce()
            measured = self._mode not in self._modes_without_sampler
            self._modes_without_sampler.discard(self._mode)
            for name, value in metrics.tolist().items():
                if measured or name in _WITHOUT_SAMPLER:
                    self._metrics[self._mode][f"ipo/{name}"] = [value]
        super().log(logs, *args, **kwargs)


_WITHOUT_SAMPLER = ("pg_loss", "nonfinite")  # the metrics that say something where the ratio is 1
_NOTHING_MEASURED = (
    "no log-probabilities of what sampled: neither vLLM nor a rollout_func returned any, and TRL "
    "takes the completions to be the trained policy's own. The ratio is then 1: nothing is masked, "
    "no mismatch is measured, and of the metrics only ipo/pg_loss and ipo/nonfinite are logged"
)
