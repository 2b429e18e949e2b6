"""What ``IPOTrainer`` refuses among the options of TRL's ``GRPOConfig``."""

from __future__ import annotations

import dataclasses

from trl import GRPOConfig

from ipo_ext.config import IPOConfig

_AVERAGES = ("dapo", "bnpo", "dr_grpo", "grpo")

_BOUNDS = "this loss drops tokens by a mask and clips nothing; set the bounds of ipo_config"
_ENTROPY = "this loss has no entropy term"
_OTHER_LOSS = "it belongs to another loss"
NOT_HONOURED = {
    "beta": "this loss has no reference model; its KL is to the sampling policy, kl_tau",
    "sync_ref_model": "this loss has no reference model",
    "epsilon": _BOUNDS,
    "epsilon_high": _BOUNDS,
    "delta": _BOUNDS,
    "importance_sampling_level": "the ratio of this loss is that of a token",
    "off_policy_mask_threshold": "set a mask rule of ipo_config instead",
    "top_entropy_quantile": "this loss takes every token that is not masked",
    "entropy_coef": _ENTROPY,
    "use_adaptive_entropy": _ENTROPY,
    "sapo_temperature_neg": _OTHER_LOSS,
    "sapo_temperature_pos": _OTHER_LOSS,
    "vespo_k_pos": _OTHER_LOSS,
    "vespo_lambda_pos": _OTHER_LOSS,
    "vespo_k_neg": _OTHER_LOSS,
    "vespo_lambda_neg": _OTHER_LOSS,
}


def refuse_what_is_not_honoured(args: GRPOConfig) -> None:
    """Raises ``ValueError`` for an option that this loss would ignore or contradict."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name, why in NOT_HONOURED.items():
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(
                f"{name}: expected the default {defaults[name]!r}, got {value!r}: {why}"
            )
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


def refuse_a_teacher(config: IPOConfig) -> None:
    if config.teacher_tau > 0:
        raise ValueError(
            f"ipo_config.teacher_tau: expected 0, got {config.teacher_tau!r}: TRL's batches have "
            "no teacher's log-probabilities"
        )
