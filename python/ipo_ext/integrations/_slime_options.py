"""What the functions for slime and miles refuse of the trainers' arguments and of their lists."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ipo_ext.config import IPOConfig
from ipo_ext.integrations._refusals import (
    BOUNDS,
    ENTROPY,
    NO_REFERENCE,
    OTHER_LOSS,
    Sequences,
    refuse_changed,
)
from ipo_ext.integrations._sampling import warn_of_another_distribution

SPLIT = "under context parallelism a rank sees a part of each sequence and cannot drop the whole"
_COUNTED_TWICE = "the ratio of this loss is already taken to rollout_log_probs"
NOT_HONOURED = {  # what both trainers have by default, and why another value is refused
    "eps_clip": (0.2, BOUNDS),
    "eps_clip_c": (None, BOUNDS),
    "use_tis": (False, _COUNTED_TWICE),
    "get_mismatch_metrics": (False, _COUNTED_TWICE),
    "use_opsm": (False, "set sequence_rules of ipo_config instead"),
    "custom_tis_function_path": (None, OTHER_LOSS),
    "custom_pg_loss_reducer_function_path": (None, OTHER_LOSS),
    "entropy_coef": (0.0, ENTROPY),
    "observe_training_entropy": (False, ENTROPY),
    "use_kl_loss": (False, NO_REFERENCE),
}


def refuse_what_the_loss_ignores(args: Namespace) -> None:
    _refuse_changed_options(args, NOT_HONOURED)
    _refuse_other_losses(args)


def refuse_what_the_weight_ignores(args: Namespace) -> None:
    _refuse_changed_options(args, {"tis_clip": (2.0, BOUNDS), "tis_clip_low": (0, BOUNDS)})


def _refuse_changed_options(args: Namespace, options: Mapping[str, tuple[Any, str]]) -> None:
    for name, (default, why) in options.items():
        refuse_changed(name, getattr(args, name, default), default, why)


def _refuse_other_losses(args: Namespace) -> None:
    if args.eps_clip_high not in (None, args.eps_clip):  # the trainers fill in the latter
        refuse_changed("eps_clip_high", args.eps_clip_high, None, BOUNDS)
    if args.advantage_estimator in ("gspo", "cispo"):
        raise ValueError(
            "advantage_estimator: expected one that says how advantages are made, got "
            f"{args.advantage_estimator!r}, which is a loss of its own"
        )


def warn_of_what_bends_the_ratio(args: Namespace, replays_top_p: bool) -> None:
    """Once for what the engine samples by; slime takes the logits over what top-p kept."""
    top_p = None if replays_top_p else getattr(args, "rollout_top_p", None)
    _warn_once(top_p, getattr(args, "rollout_top_k", None))


@functools.cache
def _warn_once(top_p: float | None, top_k: int | None) -> None:
    warn_of_another_distribution({"top_p": top_p, "top_k": top_k}, stacklevel=5)


def refuse_what_a_weight_cannot_have(config: IPOConfig) -> None:
    for name, refused in (
        ("kl_tau", config.kl_tau > 0),
        ("mask_rule", config.mask_rule == "dppo"),
        ("pg_form", config.pg_form == "ppo_clip"),
        ("sequence_rule_when", config.sequence_rule_when != "always"),
    ):
        if refused:
            raise ValueError(
                f"ipo_config.{name}: got {getattr(config, name)!r}, which a weight of the "
                "trainer's own loss cannot have: neither advantages nor log-probabilities with a "
                "gradient are handed over for it; use custom_loss instead"
            )


def sampled_of(rollout_log_probs: Sequences | None) -> Sequences:
    if not rollout_log_probs:
        raise ValueError(
            "rollout_log_probs: expected the log-probabilities that the engine sampled with, got "
            f"{rollout_log_probs!r}: the rollout function must fill in Sample.rollout_log_probs"
        )
    return rollout_log_probs


def refuse_other_masks(loss_masks: Sequences, response_lengths: list[int]) -> None:
    lengths = [len(loss_mask) for loss_mask in loss_masks]
    if lengths != list(response_lengths):
        raise ValueError(
            f"loss_masks: expected the lengths of response_lengths, {list(response_lengths)}, got "
            f"{lengths}"
        )
