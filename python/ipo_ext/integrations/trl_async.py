"""TRL's asynchronous GRPO trainer with this loss: packed rows, completions of older policies."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker

from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss
from ipo_ext.integrations._refusals import refuse_a_teacher, refuse_changed_fields
from ipo_ext.integrations._trl_options import (
    NOT_HONOURED,
    refuse_raw_logprobs,
    warn_of_what_bends_the_ratio,
)
from ipo_ext.metrics import IPOMetrics

_TREE = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")


class AsyncIPOTrainer(AsyncGRPOTrainer):
    """``AsyncGRPOTrainer`` whose loss is ``ipo_loss``, logged as ``ipo/<metric>``.

    The ratio is the trained policy's over that of the engine's policy when it sampled, of whichever
    version. A rollout sample, one row of a conversation, is a sequence, as far as a mask rule asks.
    Tokens are averaged as TRL does: over all of a micro-batch, on all ranks. Its own ``ratio``,
    ``kl`` and ``clip_ratio/*`` are of the loss that this one replaces, and are not logged.

    Args:
        ipo_config: the loss; default ``IPOConfig()``. All others are ``AsyncGRPOTrainer``'s.

    Raises:
        ValueError: an option of ``AsyncGRPOConfig`` that this loss does not honour is set, or the
            server reports log-probabilities from before temperature. What bends the ratio is
            warned of.
    """

    def __init__(self, *args: Any, ipo_config: IPOConfig | None = None, **kwargs: Any) -> None:
        self.ipo_config = ipo_config if ipo_config is not None else IPOConfig()
        self._ipo_metrics: Any = 0  # IPOMetrics since the last log
        refuse_a_teacher(self.ipo_config, "TRL")
        given = inspect.signature(AsyncGRPOTrainer).bind_partial(*args, **kwargs)
        if (options := given.arguments.get("args")) is not None:
            refuse_changed_fields(options, NOT_HONOURED)
            warn_of_what_bends_the_ratio(options)
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """As TRL's, once its server is known to report the log-probabilities that it sampled by."""
        is_main = self.accelerator.is_main_process
        if is_main and isinstance(self.rollout_worker, AsyncRolloutWorker):
            self.vllm_client.wait_for_server_ready()
            refuse_raw_logprobs(self.vllm_client.get_server_info())
        return super().get_train_dataloader()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Of this rank's row, in which each trained token is a term of its own."""
        outputs = self._forward(model, inputs)
        trained = inputs["token_index"] >= 0
        terms = inputs["token_index"][trained]  # positions; one can serve several samples
        logprobs = outputs.log_probs.flatten()[terms]
        accumulated = self.current_gradient_accumulation_steps
        share = inputs["global_n_tokens"][0] / self.accelerator.num_processes
        out = ipo_loss(
            logprobs,
            inputs["old_log_probs"][trained],
            inputs["advantages"][trained],
            torch.ones_like(terms, dtype=torch.bool),
            cu_seqlens=self._cu_seqlens(inputs["segment_id"][trained]),
            normalizer=share.clamp(min=1) * accumulated,
            config=self.ipo_config,
        )
        self._record(out.metrics, outputs.entropy.flatten()[terms], inputs)
        if not self.aux_loss_enabled:
            return out.loss
        self._record_balance(outputs.aux_loss)
        return out.loss + self.router_aux_loss_coef * outputs.aux_loss / accumulated

    def _forward(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
        """Log-probabilities and entropies of the row, without the padding to other ranks' rows."""
        present = inputs["attention_mask"].bool()
        row = {
            name: inputs[name][present].unsqueeze(0)
            for name in ("input_ids", "position_ids", "shift_labels")
        }
        tree: dict[str, Any] = {name: inputs[name][inputs[name] >= 0] for name in _TREE}
        longest_segment, longest_path = inputs["tree_max_seqlens"][0].tolist()
        tree |= {"tree_max_seqlen_q": longest_segment, "tree_max_seqlen_k": longest_path}
        if self.aux_loss_enabled:
            tree["output_router_logits"] = True
        start = time.time()
        outputs = model(**row, **tree, fused_lm_head=True)
        self._last_forward_time_s = time.time() - start
        return outputs

    def _cu_seqlens(self, samples: torch.Tensor) -> torch.Tensor | None:
        """Where each sample's terms end, for rules that ask; to know it synchronises."""
        if not self.ipo_config.judges_sequences:
            return None
        _, counts = samples.unique_consecutive(return_counts=True)
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()

    def _record(self, metrics: Any, entropy: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """Metrics, the entropy, and the counts that TRL's throughput is made of."""
        self._ipo_metrics = self._ipo_metrics + metrics.total()
        totals = torch.stack([entropy.detach().sum(), entropy.new_tensor(len(entropy))])
        total, tokens = self.accelerator.reduce(totals, reduction="sum").tolist()
        self._metrics["train"]["entropy"].append(total / max(tokens, 1))
        forwarded = float(inputs["global_n_forward_tokens"][0])
        length = float(inputs["mean_seq_len"][0])
        self._step_forward_tokens += forwarded
        self._step_trained_tokens += float(inputs["global_n_tokens"][0])
        self._step_seq_len_weighted += length * forwarded
        self._step_samples += forwarded / length
        self._step_forward_s += self._last_forward_time_s

    def _record_balance(self, aux_loss: torch.Tensor) -> None:
        mean = self.accelerator.reduce(aux_loss.detach().float(), reduction="mean")
        self._metrics["train"]["aux_loss"].append(mean.item())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As TRL's, with the loss's metrics over all micro-batches and ranks since the last log."""
        metrics, self._ipo_metrics = self._ipo_metrics, 0
        if isinstance(metrics, IPOMetrics):
            if self.accelerator.num_processes > 1:
                metrics = metrics.all_reduce()
            for name, value in metrics.tolist().items():
                self._metrics["train"][f"ipo/{name}"] = [value]
        super().log(logs, *args, **kwargs)
