"""Dumps that hold text without token ids: recognised, to say what is missing and who can write it.

They cannot be repaired: tokenising text again changes the ids of one completion in five.
"""

from __future__ import annotations

from typing import Any

_WHY = "tokenising text again changes ids, so nothing could be compared"
_WRITE = "in the format of ipo_ext.mismatch.dump (docs/mismatch.md)"

# The host, what its dump is known by, and what it has inside.
_DUMPS = (
    (
        "TRL's logged completions",
        {"prompt", "completion", "advantage"},
        "prompt_ids, completion_ids and sampling_per_token_logps from what "
        "GRPOTrainer._generate_and_score_completions returns (with vLLM)",
    ),
    (
        "verl's rollout_data_dir",
        {"input", "output", "score"},
        "prompts, responses, response_mask and rollout_log_probs of its DataProto "
        "(actor_rollout_ref.rollout.calculate_log_probs=True)",
    ),
    (
        "a log of chat messages",
        {"messages"},
        "the token ids and log-probabilities that the engine returned with them",
    ),
)


def refusal(record: Any) -> str | None:
    """What to say of a record that is text alone; None of any other."""
    if not isinstance(record, dict):
        return None
    for name, keys, inside in _DUMPS:
        if keys <= record.keys():
            return (
                f"is {name}, which has text but no token ids and no log-probabilities: {_WHY}; "
                f"write {inside} {_WRITE}"
            )
    return None
