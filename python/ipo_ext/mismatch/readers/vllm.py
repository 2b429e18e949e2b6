"""Responses of vLLM's servers: completions, chat completions, and generate by token ids.

They hold token ids only when asked: ``"return_token_ids": true``. A generate response has no
prompt: write ``{"request": ..., "response": ...}`` in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..rollouts import BadRecord, Rollout, rollout_of_completion
from .requests import Exchange, exchange_of

NAME = "vLLM responses"
ASK = 'ask vLLM with "return_token_ids": true and "logprobs": 0 (in chat: true)'
_SPELLED_ID = "token_id:"  # with return_tokens_as_token_ids


def matches(record: Any) -> bool:
    choices = exchange_of(record).response.get("choices")
    return isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices)


def rollouts_in(record: dict[str, Any], where: str) -> Iterator[Rollout]:
    exchange = exchange_of(record)
    for choice in exchange.response["choices"]:
        yield _rollout(exchange, choice, where)


def _rollout(exchange: Exchange, choice: dict[str, Any], where: str) -> Rollout:
    tokens, logprobs = _tokens_and_logprobs(choice.get("logprobs"))
    token_ids = choice.get("token_ids") or _spelled_ids(tokens)
    if token_ids is None:
        raise BadRecord(
            "token_ids: the response has text alone, and tokenising text again changes ids; " + ASK
        )
    prompt = (
        choice.get("prompt_token_ids")
        or exchange.response.get("prompt_token_ids")
        or exchange.prompt_token_ids
    )
    if prompt is None:
        raise BadRecord(
            'prompt_token_ids: the response has none; ask with "return_token_ids": true, or write '
            '{"request": ..., "response": ...} with the token ids of the request'
        )
    if len(logprobs) == len(prompt) + len(token_ids):  # "echo": true: the prompt's come first
        logprobs = logprobs[len(prompt) :]
    return rollout_of_completion(
        where,
        prompt,
        token_ids,
        logprobs,
        temperature=exchange.temperature,
        version=_versions(choice.get("weight_versions"), len(token_ids)),
    )


def _tokens_and_logprobs(logprobs: Any) -> tuple[list[Any], list[Any]]:
    """The tokens' text (or spelled ids) and log-probabilities, of either shape of response."""
    if not isinstance(logprobs, dict):
        raise BadRecord(f"logprobs: the response has none; {ASK}")
    if isinstance(logprobs.get("content"), list):
        content = [each if isinstance(each, dict) else {} for each in logprobs["content"]]
        tokens = [_spelled(each) for each in content]
        return tokens, [each.get("logprob") for each in content]
    if isinstance(logprobs.get("token_logprobs"), list):
        return list(logprobs.get("tokens") or []), logprobs["token_logprobs"]
    raise BadRecord(f"logprobs: expected `content` or `token_logprobs` in it; {ASK}")


def _spelled(entry: dict[str, Any]) -> Any:
    return f"{_SPELLED_ID}{entry['token_id']}" if "token_id" in entry else entry.get("token")


def _spelled_ids(tokens: list[Any]) -> list[int] | None:
    """Of "token_id:123"; None where the tokens are text."""
    if not tokens or not all(
        isinstance(token, str) and token.startswith(_SPELLED_ID) for token in tokens
    ):
        return None
    return [int(token.removeprefix(_SPELLED_ID)) for token in tokens]


def _versions(spans: Any, tokens: int) -> list[str] | None:
    """A name for each token, of ``[{"version": ..., "start": ..., "end": ...}]``."""
    if not isinstance(spans, list) or not spans:
        return None
    names = [""] * tokens
    for span in spans:
        start, end = int(span["start"]), min(int(span["end"]), tokens)
        names[start:end] = [str(span["version"])] * max(0, end - start)
    return names
