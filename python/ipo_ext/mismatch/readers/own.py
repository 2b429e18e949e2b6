"""The format that ``ipo_ext.mismatch.dump`` writes: an object, or a row of parquet, an answer.

Keys: ``prompt_token_ids``, ``token_ids`` and ``logprobs`` (one for each of ``token_ids``); and if
known ``trainer_logprobs`` (likewise), ``temperature`` (a number, or one a token), ``version`` of
the weights (a name, or one a token), ``environment``. Others are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..rollouts import Rollout, rollout_of_completion

NAME = "ipo_ext's own format"
KEYS = ("prompt_token_ids", "token_ids", "logprobs")


def matches(record: Any) -> bool:
    return isinstance(record, dict) and all(key in record for key in KEYS)


def rollouts_in(record: dict[str, Any], where: str) -> Iterator[Rollout]:
    yield rollout_of_completion(
        where,
        record["prompt_token_ids"],
        record["token_ids"],
        record["logprobs"],
        trainer_logprobs=record.get("trainer_logprobs"),
        temperature=record.get("temperature"),
        version=record.get("version"),
        environment=record.get("environment"),
    )
