"""The running trainer, slime or miles, whose own function makes the log-probabilities."""

from __future__ import annotations

import inspect
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from ipo_ext.integrations._refusals import Sequences


def response_logprobs(args: Namespace, batch: Mapping[str, Any], logits: torch.Tensor) -> Sequences:
    """By the function of the trainer that is running, with all of the batch that it takes."""
    module = _running_trainer()
    if module is None:
        raise RuntimeError(
            f"custom_loss: expected a trainer that has imported one of {', '.join(_TRAINERS)}, for "
            "its get_log_probs_and_entropy, got none of them"
        )
    compute = module.get_log_probs_and_entropy
    options = {name: batch[name] for name in inspect.signature(compute).parameters if name in batch}
    if replays_top_p():
        options |= module.get_rollout_top_p_logprob_kwargs(args, batch)
    computed = compute(logits, args=args, **options)
    return (computed[1] if isinstance(computed, tuple) else computed)["log_probs"]


def _running_trainer() -> Any:
    return next((sys.modules[name] for name in _TRAINERS if name in sys.modules), None)


def replays_top_p() -> bool:
    return hasattr(_running_trainer(), "get_rollout_top_p_logprob_kwargs")


_TRAINERS = (  # the modules that hold get_log_probs_and_entropy
    "slime.backends.megatron_utils.loss",
    "miles.backends.training_utils.loss_hub.logit_processors",
    "miles.backends.training_utils.loss.hub.logit_processors",  # since 2026-09
)
