"""What makes an engine draw from another distribution than the one that is trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

_DRAWS_FROM_THE_POLICY: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "min_tokens": (0,),
    "do_sample": (True,),
    "num_beams": (1,),
    "typical_p": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "bad_words": ([],),
}
_CHANGES_NO_DISTRIBUTION = {  # where a completion ends, what comes with it
    *("temperature", "logprobs", "prompt_logprobs"),  # the first two are refused where they do
    *("max_tokens", "max_new_tokens", "max_time", "stop", "stop_strings", "stop_token_ids"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "ignore_eos", "include_stop_str_in_output"),
    *("detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
    *("seed", "use_cache", "cache_implementation"),
    *("n", "num_return_sequences", "output_kind", "return_token_ids", "truncate_prompt_tokens"),
    *("priority",),
}


def warn_of_another_distribution(options: Mapping[str, Any], stacklevel: int = 4) -> None:
    """Names those of the sampling options by which the ratio is not 1 where nothing is stale.

    Args:
        options: by the names that vLLM, SGLang and transformers share; None is not set.
        stacklevel: as of ``warnings.warn``; by default the line that called the caller's caller.
    """
    bent = [
        f"{name}={value!r}"
        for name, value in options.items()
        if name not in _CHANGES_NO_DISTRIBUTION
        and value is not None
        and value not in _DRAWS_FROM_THE_POLICY.get(name, ())
    ]
    if bent:
        warnings.warn(
            f"{', '.join(bent)}: completions are drawn from another distribution than the trained "
            "one, so the ratio is off where nothing is stale: more tokens are masked and "
            "ipo/mismatch_kl reports it; without an engine's log-probabilities nothing does. Leave "
            "them at their defaults, or widen the bounds of ipo_config (docs/integrations.md)",
            stacklevel=stacklevel,
        )
