"""The loss in slime and miles: as their custom loss, and as a correction of their own loss.

Neither trainer is imported: each calls what a path names, and hands over lists of one tensor for
each sample, of this rank's part of the sample under context parallelism.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss
from ipo_ext.integrations._batches import (
    cu_seqlens_of,
    of_mean_one,
    per_token_shares,
    weights_of,
)
from ipo_ext.integrations._refusals import (
    Sequences,
    refuse_a_teacher,
    refuse_rules_on_sequences,
    refuse_unequal_lengths,
)
from ipo_ext.integrations._slime_options import (
    SPLIT,
    refuse_other_masks,
    refuse_what_a_weight_cannot_have,
    refuse_what_the_loss_ignores,
    refuse_what_the_weight_ignores,
    sampled_of,
    warn_of_what_bends_the_ratio,
)
from ipo_ext.integrations._slime_trainer import replays_top_p, response_logprobs

Metrics = dict[str, torch.Tensor]
LossFunction = Callable[..., tuple[torch.Tensor, Metrics]]
TISFunction = Callable[..., tuple[torch.Tensor, Sequences, Metrics]]

_DEFAULT = IPOConfig()
_WITHOUT_KL = IPOConfig(kl_tau=0.0)


def custom_loss(ipo_config: IPOConfig = _DEFAULT) -> LossFunction:
    """What ``--loss-type custom_loss --custom-loss-function-path`` names.

    The trainer's own function makes the log-probabilities, so tensor and context parallelism, the
    temperature and replay of top-p are its own, as is the average. The ratio is taken to
    ``rollout_log_probs``, with or without ``--use-rollout-logprobs``. A response is a sequence.

    The function returned raises ``ValueError`` for an option that the loss does not honour and for
    lists that do not fit together.
    """
    refuse_a_teacher(ipo_config, "slime")

    def loss_function(
        args: Namespace,
        batch: Mapping[str, Any],
        logits: torch.Tensor,
        sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, Metrics]:
        refuse_what_the_loss_ignores(args)
        warn_of_what_bends_the_ratio(args, replays_top_p())
        sampled = sampled_of(batch.get("rollout_log_probs"))
        refuse_other_masks(batch["loss_masks"], batch["response_lengths"])
        logprobs = response_logprobs(args, batch, logits)
        advantages = batch["advantages"]
        refuse_unequal_lengths(
            "log_probs", logprobs, rollout_log_probs=sampled, advantages=advantages
        )
        if _is_split(args, logprobs, batch["response_lengths"]):
            refuse_rules_on_sequences(ipo_config, SPLIT)
        trained = torch.cat(list(logprobs))
        weights = weights_of(sum_of_sample_mean, trained)
        mask, share = weights != 0, weights.sum()
        weights, normalizer = of_mean_one(weights, mask)
        out = ipo_loss(
            trained,
            torch.cat(list(sampled)),
            torch.cat(list(advantages)),
            mask,
            loss_weights=weights,
            cu_seqlens=cu_seqlens_of(logprobs) if ipo_config.judges_sequences else None,
            normalizer=normalizer,
            config=ipo_config,
        )
        loss = out.loss
        if len(trained) == 0:  # this rank takes part in the backward pass all the same
            loss = loss + logits[:0].sum()
        log = {f"ipo/{name}": value for name, value in per_token_shares(out.metrics, share)}
        return loss, {"loss": loss.detach(), **log}

    return loss_function


def custom_tis(ipo_config: IPOConfig = _WITHOUT_KL) -> TISFunction:
    """What ``--use-tis --custom-tis-function-path`` names: weights of the trainer's own loss.

    A token's loss is multiplied by what ``ipo_config`` makes of the ratio of ``train_log_probs`` to
    ``rollout_log_probs``, a constant: 0 where its mask rule drops the token, else the ratio, capped
    or clipped as ``pg_form`` says, or 1 for ``reinforce``. With ``--get-mismatch-metrics`` and
    without ``--use-tis`` the loss stays as it is and the metrics are reported.

    Raises:
        ValueError: the config asks for what the trainer does not hand over here: a KL term, a
            teacher, or advantages (the rule ``dppo``, the form ``ppo_clip``). The function
            returned raises it as that of ``custom_loss`` does.
    """
    refuse_a_teacher(ipo_config, "slime")
    refuse_what_a_weight_cannot_have(ipo_config)

    def tis_function(
        args: Namespace,
        *,
        pg_loss: torch.Tensor,
        train_log_probs: Sequences,
        rollout_log_probs: Sequences,
        loss_masks: Sequences,
        response_lengths: list[int],
        **_: Any,
    ) -> tuple[torch.Tensor, Sequences, Metrics]:
        refuse_what_the_weight_ignores(args)
        warn_of_what_bends_the_ratio(args, replays_top_p())
        sampled = sampled_of(rollout_log_probs)
        refuse_other_masks(loss_masks, response_lengths)
        refuse_unequal_lengths("train_log_probs", train_log_probs, rollout_log_probs=sampled)
        weights, x = _correction(args, train_log_probs, sampled, loss_masks, ipo_config)
        kept = weights != 0
        metrics = {
            "ipo/is_masked": ~kept,
            "ipo/is_masked_low": ~kept & (x < 0),
            "ipo/is_masked_high": ~kept & (x > 0),
            "ipo/nonfinite": ~x.isfinite(),
        }
        if args.use_tis:
            pg_loss = torch.where(kept, pg_loss, 0) * weights
        return pg_loss, loss_masks, {name: value.float() for name, value in metrics.items()}

    return tis_function


def _correction(
    args: Namespace,
    train_log_probs: Sequences,
    rollout_log_probs: Sequences,
    loss_masks: Sequences,
    config: IPOConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and log-ratios of the tokens: at advantages of -1 a weight is the loss's gradient."""
    trained = torch.cat(list(train_log_probs)).detach().requires_grad_()
    sampled = torch.cat(list(rollout_log_probs))
    mask = torch.ones_like(sampled, dtype=torch.bool)
    if _is_split(args, train_log_probs, [len(loss_mask) for loss_mask in loss_masks]):
        refuse_rules_on_sequences(config, SPLIT)
    else:
        mask = torch.cat(list(loss_masks)) != 0
    with torch.enable_grad():
        out = ipo_loss(
            trained,
            sampled,
            -torch.ones_like(sampled),
            mask,
            cu_seqlens=cu_seqlens_of(train_log_probs) if config.judges_sequences else None,
            config=config,
        )
    return torch.autograd.grad(out.loss, trained)[0], trained.detach() - sampled


def _is_split(args: Namespace, sequences: Sequences, lengths: list[int]) -> bool:
    """Whether ranks share sequences; one rank may all the same hold the whole of each."""
    is_parallel = getattr(args, "context_parallel_size", 1) > 1
    return is_parallel or [len(tokens) for tokens in sequences] != lengths
