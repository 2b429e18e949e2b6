"""One sequence with what the engine said of its sampled tokens: what every reader makes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

_ROUNDING = 1e-3  # an engine's rounding may lift a certain token's log-probability above 0 by less

_LONGEST_NAME = 60


class BadRecord(ValueError):
    """A part of a file that cannot be read: what was expected of it and what came, in words."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A sequence of ``T`` tokens, some of which an engine has sampled.

    Attributes:
        where: file and line (or element), for messages.
        token_ids: int64 ``[T]``, prompts and answers.
        sampled: bool ``[T]``, the tokens that the engine chose.
        inference_logprobs: float64 ``[T]``, the engine's; NaN where a sampled token has none.
        trainer_logprobs: float64 ``[T]``, the trainer's, or None: to be recomputed.
        temperature: float64 ``[T]``, what the trainer divides logits by, or None: not known.
        versions: the weights that sampled each token, ``T`` names, or None: not known.
        environment: the task's name, or None.
        recomputed: whether ``trainer_logprobs`` are a model's, and not the file's.
    """

    where: str
    token_ids: torch.Tensor
    sampled: torch.Tensor
    inference_logprobs: torch.Tensor
    trainer_logprobs: torch.Tensor | None = None
    temperature: torch.Tensor | None = None
    versions: Sequence[str] | None = None
    environment: str | None = None
    recomputed: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)


def rollout_of_completion(
    where: str,
    prompt_token_ids: Any,
    token_ids: Any,
    logprobs: Any,
    *,
    trainer_logprobs: Any = None,
    temperature: Any = None,
    version: Any = None,
    environment: Any = None,
) -> Rollout:
    """Of a prompt and one answer to it, all of whose tokens were sampled.

    ``trainer_logprobs`` and lists of ``temperature`` and ``version`` have an element for each token
    of the answer.
    """
    prompt = integers("prompt_token_ids", prompt_token_ids)
    answer = integers("token_ids", token_ids)
    before = len(prompt)

    def padded(name: str, values: Any) -> torch.Tensor:
        check_length(name, values, len(answer), "token_ids")
        return torch.cat([torch.full((before,), math.nan, dtype=torch.float64), values])

    if isinstance(version, (list, tuple)):
        check_length("version", version, len(answer), "token_ids")
        version = [""] * before + [label(name) for name in version]
    elif version is not None:
        version = [label(version)] * (before + len(answer))
    if isinstance(temperature, (list, tuple)):
        temperature = padded("temperature", numbers("temperature", temperature))
    return checked(
        Rollout(
            where,
            torch.cat([prompt, answer]),
            torch.arange(before + len(answer)) >= before,
            padded("logprobs", numbers("logprobs", logprobs)),
            None
            if trainer_logprobs is None
            else padded("trainer_logprobs", numbers("trainer_logprobs", trainer_logprobs)),
            temperatures(temperature, before + len(answer)),
            version,
            None if environment is None else label(environment),
        )
    )


def checked(rollout: Rollout) -> Rollout:
    """The rollout, or a ``BadRecord`` that says what is wrong with it."""
    if not rollout.sampled.any():
        raise BadRecord("expected at least one sampled token, got none")
    if int(rollout.token_ids.min()) < 0:
        raise BadRecord(f"token ids: expected none below 0, got {int(rollout.token_ids.min())}")
    _check_logprobs("logprobs", rollout.inference_logprobs[rollout.sampled])
    if rollout.trainer_logprobs is not None:
        _check_logprobs("trainer_logprobs", rollout.trainer_logprobs[rollout.sampled])
    if rollout.temperature is not None:
        of_sampled = rollout.temperature[rollout.sampled]
        if not bool((of_sampled.isfinite() & (of_sampled > 0)).all()):
            raise BadRecord("temperature: expected finite numbers above 0")
    return rollout


def integers(name: str, values: Any) -> torch.Tensor:
    """int64 ``[n]`` of a list of token ids."""
    if not isinstance(values, (list, tuple)):
        raise BadRecord(f"{name}: expected a list of token ids, got {_kind(values)}")
    _check_types(name, values, (int,), "a token id")
    try:
        return torch.tensor(values, dtype=torch.int64)
    except (OverflowError, RuntimeError, ValueError) as error:  # by torch's version
        raise BadRecord(f"{name}: expected token ids below 2**63") from error


def numbers(name: str, values: Any) -> torch.Tensor:
    """float64 ``[n]`` of a list of numbers, null among them as NaN: a value that is missing."""
    if not isinstance(values, (list, tuple)):
        raise BadRecord(f"{name}: expected a list of numbers, got {_kind(values)}")
    _check_types(name, values, (float, int, type(None)), "a number")
    if None in values:
        values = [math.nan if value is None else value for value in values]
    return torch.tensor(values, dtype=torch.float64)


def booleans(name: str, values: Any) -> torch.Tensor:
    """bool ``[n]`` of a list of true and false, or 1 and 0."""
    if not isinstance(values, (list, tuple)):
        raise BadRecord(f"{name}: expected a list of booleans, got {_kind(values)}")
    _check_types(name, values, (bool, int), "true or false")
    return torch.tensor(values, dtype=torch.bool)


def temperatures(value: Any, tokens: int) -> torch.Tensor | None:
    """float64 ``[tokens]`` of one number or of a tensor; None of None and of 0, which is greedy."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRecord(f"temperature: expected a number, got {value!r}")
    return None if value == 0 else torch.full((tokens,), float(value), dtype=torch.float64)


def _check_types(name: str, values: Sequence[Any], types: Sequence[type], expected: str) -> None:
    if set(map(type, values)) <= set(types):  # a loop in C: files have many millions of tokens
        return
    place, value = next(pair for pair in enumerate(values) if type(pair[1]) not in types)
    raise BadRecord(f"{name}[{place}]: expected {expected}, got {value!r}")


def label(value: Any) -> str:
    """A name as it may be shown: nothing in it moves a cursor, and it is no longer than a line."""
    text = str(value)[:_LONGEST_NAME]
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def check_length(name: str, values: Any, expected: int, like: str) -> None:
    """Raises ``BadRecord`` unless a column has as many values as another one."""
    if len(values) != expected:
        raise BadRecord(f"{name}: expected as many as {like} has, {expected}, got {len(values)}")


def _check_logprobs(name: str, values: torch.Tensor) -> None:
    above = values > _ROUNDING
    if bool(above.any()):
        place = int(above.nonzero()[0])
        raise BadRecord(
            f"{name}[{place}]: expected a natural logarithm of a probability, at most 0, got "
            f"{float(values[place]):g}"
        )


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__}"
