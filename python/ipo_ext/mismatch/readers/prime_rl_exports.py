"""prime-rl's token exports (``trainer.enable_token_export``): both log-probabilities, no model.

A line a sequence. A value stands in the place of its token, and null is one that is not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..rollouts import Rollout, booleans, check_length, checked, integers, label, numbers

NAME = "prime-rl token exports"
KEYS = ("token_ids", "loss_mask", "inference_logprobs", "trainer_logprobs")


def matches(record: Any) -> bool:
    return isinstance(record, dict) and all(key in record for key in KEYS)


def rollouts_in(record: dict[str, Any], where: str) -> Iterator[Rollout]:
    token_ids = integers("token_ids", record["token_ids"])
    sampled = booleans("loss_mask", record["loss_mask"])
    values = {name: numbers(name, record[name]) for name in KEYS[2:]}
    for name, column in (("loss_mask", sampled), *values.items()):
        check_length(name, column, len(token_ids), "token_ids")
    step, environment = record.get("step"), record.get("env_name")
    yield checked(
        Rollout(
            where,
            token_ids,
            sampled,
            values["inference_logprobs"],
            values["trainer_logprobs"],
            versions=None if step is None else [label(step)] * len(token_ids),
            environment=None if environment is None else label(environment),
        )
    )
