"""What ``IPOTrainer`` refuses, or warns of, among the options of TRL's ``GRPOConfig``."""

from __future__ import annotations

from typing import Any

from trl import GRPOConfig

from ipo_ext.integrations._refusals import (
    BOUNDS,
    ENTROPY,
    NO_REFERENCE,
    OTHER_LOSS,
    refuse_changed_fields,
)
from ipo_ext.integrations._sampling import warn_of_another_distribution

_AVERAGES = ("dapo", "bnpo", "dr_grpo", "grpo")

NOT_HONOURED = {
    "beta": NO_REFERENCE,
    "sync_ref_model": NO_REFERENCE,
    "epsilon": BOUNDS,
    "epsilon_high": BOUNDS,
    "delta": BOUNDS,
    "importance_sampling_level": "the ratio of this loss is that of a token",
    "off_policy_mask_threshold": "set sequence_rules of ipo_config instead",
    "top_entropy_quantile": "this loss takes every token that is not masked",
    "entropy_coef": ENTROPY,
    "use_adaptive_entropy": ENTROPY,
    "sapo_temperature_neg": OTHER_LOSS,
    "sapo_temperature_pos": OTHER_LOSS,
    "vespo_k_pos": OTHER_LOSS,
    "vespo_lambda_pos": OTHER_LOSS,
    "vespo_k_neg": OTHER_LOSS,
    "vespo_lambda_neg": OTHER_LOSS,
}


def refuse_what_is_not_honoured(args: GRPOConfig) -> None:
    """Raises ``ValueError`` for an option that this loss would ignore or contradict."""
    refuse_changed_fields(args, NOT_HONOURED)
    if args.loss_type not in _AVERAGES:
        raise ValueError(
            f"loss_type: expected how to average, one of {', '.join(_AVERAGES)}, got "
            f"{args.loss_type!r}, which is a loss of its own"
        )
    if args.use_vllm and args.vllm_importance_sampling_correction:
        raise ValueError(
            "vllm_importance_sampling_correction: expected False with use_vllm, got True: the "
            "ratio of this loss is already taken to vLLM's log-probabilities"
        )
    _refuse_wrong_logprobs(args)


def _refuse_wrong_logprobs(args: GRPOConfig) -> None:
    """What makes TRL take log-probabilities that belong to no token or to another policy."""
    given = args.generation_kwargs or {}
    temperature = given.get("temperature", args.temperature)
    if temperature != args.temperature:
        raise ValueError(
            f"generation_kwargs['temperature']: expected temperature, {args.temperature!r}, by "
            f"which TRL divides the trained logits, got {temperature!r}; set temperature instead"
        )
    if given.get("logprobs", 0) != 0:
        raise ValueError(
            f"generation_kwargs['logprobs']: expected 0, got {given['logprobs']!r}: TRL then takes "
            "the most probable token's log-probability for that of the sampled one"
        )


_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "vllm_structured_outputs_regex")


def warn_of_what_bends_the_ratio(args: Any) -> None:
    """Of the sampling options of ``GRPOConfig`` or ``AsyncGRPOConfig``."""
    given = {name: getattr(args, name, None) for name in _SAMPLING}
    warn_of_another_distribution(given | (getattr(args, "generation_kwargs", None) or {}))


def refuse_raw_logprobs(server_info: dict[str, Any]) -> None:
    """Of vLLM's server, which reports them from before temperature unless it is told."""
    mode = server_info["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ValueError(
            f"logprobs_mode of vLLM's server: expected processed_logprobs, got {mode}, from before "
            "temperature: restart it with --logprobs-mode processed_logprobs"
        )
