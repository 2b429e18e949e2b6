"""What ``IPOTrainer`` refuses of what a ``rollout_func`` returns: what TRL would pad or misread."""

from __future__ import annotations

import functools
import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

Rollouts = dict[str, Any]
Rows = Sequence[Sequence[Any]]  # of each completion, a value for each token


def checked(rollout_func: Callable[..., Rollouts]) -> Callable[..., Rollouts]:
    """The same function, whose rollouts are refused by name where they are malformed."""

    @functools.wraps(rollout_func)
    def checked_rollout_func(*args: Any, **kwargs: Any) -> Rollouts:
        rollouts = rollout_func(*args, **kwargs)
        if "completion_ids" in rollouts:  # else TRL itself says what is missing
            _refuse_malformed(rollouts)
        if rollouts.get("logprobs") is not None:
            rows = enumerate(rollouts["logprobs"])
            rollouts = {**rollouts, "logprobs": [_as_floats(row, values) for row, values in rows]}
        return rollouts

    return checked_rollout_func


def _refuse_malformed(rollouts: Rollouts) -> None:
    completions = rollouts["completion_ids"]
    for row, ids in enumerate(completions):
        if len(ids) == 0:
            raise ValueError(
                f"rollout_func's completion_ids[{row}]: expected at least one token, got none; end "
                "a completion with the end-of-sequence token"
            )
    for name, padding in (("logprobs", "0"), ("env_mask", "1, which trains")):
        if rollouts.get(name) is not None:
            _refuse_unequal_lengths(name, rollouts[name], completions, padding)
    masks = rollouts.get("env_mask")
    for row, mask in enumerate(() if masks is None else masks):
        for value in mask:
            if value not in (0, 1):
                raise ValueError(
                    f"rollout_func's env_mask[{row}]: expected 0 or 1 for each token, got "
                    f"{value!r}: a mask is no weight"
                )


def _as_floats(row: int, values: Sequence[Any]) -> Sequence[Any]:
    """The same values; of whole numbers alone, which JSON may make of 0.0, TRL takes the dtype."""
    for value in values:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError(
                f"rollout_func's logprobs[{row}]: expected a number for each token, or None where "
                f"it is not known, got {value!r}"
            )
    whole = all(isinstance(value, numbers.Integral) for value in values)
    return [float(value) for value in values] if whole else values


def _refuse_unequal_lengths(name: str, rows: Rows, completions: Rows, padding: str) -> None:
    for row, (values, ids) in enumerate(itertools.zip_longest(rows, completions, fillvalue=())):
        if len(values) != len(ids):
            raise ValueError(
                f"rollout_func's {name}[{row}]: expected the length of completion_ids[{row}], "
                f"{len(ids)}, got {len(values)}: TRL would pad with {padding}"
            )
