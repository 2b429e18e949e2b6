"""prime-rl's micro-batches (``rollouts/step_N/rank_R.bin``): msgpack arrays, fields by position.

The first five fields are the same in all versions; temperatures and environments, which have moved,
are found by what they hold. Packed sequences are told apart by positions that start again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..rollouts import Rollout, booleans, check_length, checked, integers, label, numbers

NAME = "prime-rl batches"
_IDS, _MASK, _LOGPROBS, _POSITIONS = 0, 1, 3, 4
_TEMPERATURES = (5, 6)  # where they were and where they are, behind sequence_lengths


def matches(record: Any) -> bool:
    return (
        isinstance(record, list)
        and len(record) > _POSITIONS
        and all(isinstance(record[field], list) for field in range(_POSITIONS + 1))
        and len(record[_IDS]) > 0
        and isinstance(record[_IDS][0], int)
        and len(record[_MASK]) == len(record[_IDS])
    )


def rollouts_in(record: list[Any], where: str) -> Iterator[Rollout]:
    token_ids = integers("input_ids", record[_IDS])
    tokens = len(token_ids)
    sampled = booleans("loss_mask", record[_MASK])
    logprobs = numbers("inference_logprobs", record[_LOGPROBS])
    positions = integers("position_ids", record[_POSITIONS])
    for name, column in (("inference_logprobs", logprobs), ("position_ids", positions)):
        check_length(name, column, tokens, "input_ids")
    temperature, environments = _temperatures(record, tokens), _environments(record, tokens)
    starts = (positions == 0).nonzero()[:, 0].tolist()
    for start, stop in zip(starts, [*starts[1:], tokens], strict=True):
        part = slice(start, stop)
        if sampled[part].any():
            yield checked(
                Rollout(
                    where,
                    token_ids[part],
                    sampled[part],
                    logprobs[part],
                    temperature=None if temperature is None else temperature[part],
                    environment=label(environments[start]) if environments else None,
                )
            )


def _temperatures(record: list[Any], tokens: int) -> torch.Tensor | None:
    for field in _TEMPERATURES:
        column = record[field] if len(record) > field else None
        if isinstance(column, list) and len(column) == tokens and isinstance(column[0], float):
            return numbers("temperatures", column)
    return None


def _environments(record: list[Any], tokens: int) -> list[str] | None:
    for column in record[_POSITIONS + 1 :]:
        if isinstance(column, list) and len(column) == tokens and isinstance(column[0], str):
            return column
    return None
