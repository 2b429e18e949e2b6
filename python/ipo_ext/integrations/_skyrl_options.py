"""What the loss in SkyRL refuses, or warns of, among the options of ``SkyRLTrainConfig``."""

from __future__ import annotations

from typing import Any

from ipo_ext.integrations._refusals import BOUNDS, OTHER_LOSS, refuse_changed_fields
from ipo_ext.integrations._sampling import warn_of_another_distribution

_LOSS_SECTIONS = ("sapo", "clip_cov", "kl_cov", "cispo", "dppo")
_COUNTED_TWICE = (
    "the ratio of this loss is already taken to the engine's log-probabilities, this one would "
    "count it twice"
)
NOT_HONOURED = {
    "eps_clip_low": BOUNDS,
    "eps_clip_high": BOUNDS,
    "clip_ratio_c": BOUNDS,
    "use_tis": _COUNTED_TWICE,
    **dict.fromkeys(_LOSS_SECTIONS, OTHER_LOSS),
}


def refuse_what_is_not_honoured(algorithm: Any) -> None:
    """Raises ``ValueError`` for an option of ``AlgorithmConfig`` that this loss would ignore."""
    refuse_changed_fields(algorithm, NOT_HONOURED, "algorithm.")
    correction = algorithm.off_policy_correction
    refuse_changed_fields(
        correction, {"tis_ratio_type": _COUNTED_TWICE}, "algorithm.off_policy_correction."
    )
    bounds = ("token_mask_is_threshold_low", "token_mask_is_threshold_high")
    missing = [name for name in bounds if getattr(correction, name) is None]
    if len(missing) == 1:
        raise ValueError(
            f"algorithm.off_policy_correction.{missing[0]}: expected a number beside the other "
            "threshold, got None: SkyRL ignores one without the other"
        )


def refuse_wrong_logprobs(config: Any) -> None:
    """What makes the engine's log-probabilities, or the trained ones, those of another policy."""
    sampling, engine = config.generator.sampling_params, config.generator.inference_engine
    if sampling.logprobs is None:
        raise ValueError(
            "generator.sampling_params.logprobs: expected 1, got None: the ratio of this loss is "
            "taken to the engine's log-probabilities"
        )
    mode = engine.engine_init_kwargs.get("logprobs_mode")
    processed = engine.enable_return_sample_support_set or mode == "processed_logprobs"
    if not processed and (sampling.temperature != 1 or mode not in (None, "raw_logprobs")):
        raise ValueError(
            "generator.inference_engine.engine_init_kwargs.logprobs_mode: expected "
            f"processed_logprobs, as sampling_params.temperature is {sampling.temperature!r}, got "
            f"{mode!r}: vLLM then reports no log-probabilities from after temperature"
        )
    trained = config.trainer.algorithm.temperature  # SkyRL fills in the sampler's where it is None
    if trained not in (None, sampling.temperature):
        raise ValueError(
            "trainer.algorithm.temperature: expected generator.sampling_params.temperature, "
            f"{sampling.temperature!r}, or None, got {trained!r}, by which SkyRL divides the "
            "trained logits"
        )


def warn_of_what_bends_the_ratio(config: Any) -> None:
    """Of what SkyRL hands to vLLM: ``repetition_penalty`` only among ``additional_kwargs``."""
    sampling = config.generator.sampling_params
    given = dict(sampling.additional_kwargs or {})
    if not config.trainer.algorithm.enable_sample_support_replay:
        given |= {name: getattr(sampling, name) for name in ("top_p", "top_k", "min_p")}
    warn_of_another_distribution(given)
