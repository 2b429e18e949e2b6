"""Responses of llama.cpp's server: ``completion_probabilities`` has ids and values.

The response has the prompt as text alone, so the request has to stand beside it, made of token ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..rollouts import BadRecord, Rollout, rollout_of_completion
from .requests import exchange_of

NAME = "llama.cpp responses"


def matches(record: Any) -> bool:
    return isinstance(exchange_of(record).response.get("completion_probabilities"), list)


def rollouts_in(record: dict[str, Any], where: str) -> Iterator[Rollout]:
    exchange = exchange_of(record)
    if exchange.prompt_token_ids is None:
        raise BadRecord(
            "prompt: its token ids are not in the response; send ids as the prompt (its /tokenize "
            'makes them) and write {"request": ..., "response": ...}'
        )
    entries = exchange.response["completion_probabilities"]
    if not all("id" in entry for entry in entries):
        raise BadRecord('completion_probabilities: expected an "id" in each; ask with "n_probs": 1')
    yield rollout_of_completion(
        where,
        exchange.prompt_token_ids,
        [entry["id"] for entry in entries],
        [_logprob(entry) for entry in entries],
        temperature=exchange.temperature,
    )


def _logprob(entry: dict[str, Any]) -> float | None:
    """Probabilities come instead with "post_sampling_probs": after temperature and truncation."""
    if "prob" in entry:
        return math.log(entry["prob"]) if entry["prob"] > 0 else -math.inf
    return entry.get("logprob")
