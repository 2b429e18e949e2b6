"""Responses of SGLang's ``/generate``: ``meta_info.output_token_logprobs`` has ids and values.

The prompt's ids are the request's, or stand in ``input_token_logprobs`` with
``logprob_start_len=0``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..rollouts import BadRecord, Rollout, rollout_of_completion
from .requests import Exchange, exchange_of

NAME = "SGLang responses"
ASK = 'ask SGLang with "return_logprob": true and "logprob_start_len": 0'


def matches(record: Any) -> bool:
    return isinstance(exchange_of(record).response.get("meta_info"), dict)


def rollouts_in(record: dict[str, Any], where: str) -> Iterator[Rollout]:
    exchange = exchange_of(record)
    facts = exchange.response["meta_info"]
    if not isinstance(facts.get("output_token_logprobs"), list):
        raise BadRecord(f"output_token_logprobs: the response has none; {ASK}")
    logprobs, token_ids = _columns(facts["output_token_logprobs"])
    yield rollout_of_completion(
        where,
        _prompt(exchange, facts),
        token_ids,
        logprobs,
        temperature=exchange.temperature,
        version=facts.get("weight_version"),
    )


def _columns(entries: list[Any]) -> tuple[list[Any], list[Any]]:
    """Log-probabilities and ids of ``[[logprob, id, text or null], ...]``."""
    return [entry[0] for entry in entries], [entry[1] for entry in entries]


def _prompt(exchange: Exchange, facts: dict[str, Any]) -> Any:
    given = exchange.prompt_token_ids or exchange.response.get("prompt_token_ids")
    if given is not None:
        return given
    entries = facts.get("input_token_logprobs")
    if not isinstance(entries, list) or len(entries) != facts.get("prompt_tokens"):
        raise BadRecord(
            f"prompt: its token ids are not in the response; {ASK}, or write "
            '{"request": ..., "response": ...} with the request\'s input_ids'
        )
    return _columns(entries)[1]
