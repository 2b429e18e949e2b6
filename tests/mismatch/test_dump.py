"""What is written of vLLM's offline outputs is what is read again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ipo_ext.mismatch import dump
from ipo_ext.mismatch.readers import Found, read


class FlatLogprobs:
    """As vLLM's: no list, but what an index gives is a dictionary of one position."""

    def __init__(self, positions: list[dict[int, Any]]) -> None:
        self.positions = positions

    def __getitem__(self, index: int) -> dict[int, Any]:
        return self.positions[index]


def outputs(flat: bool = False) -> list[Any]:
    """Two requests; the first with two answers, whose top log-probabilities come first."""

    def answer(token_ids: list[int]) -> Any:
        positions = [
            {1: SimpleNamespace(logprob=-0.1), token: SimpleNamespace(logprob=-token / 8)}
            for token in token_ids
        ]
        return SimpleNamespace(
            token_ids=tuple(token_ids), logprobs=FlatLogprobs(positions) if flat else positions
        )

    return [
        SimpleNamespace(
            request_id="0", prompt_token_ids=[5, 6], outputs=[answer([7, 8]), answer([9])]
        ),
        SimpleNamespace(request_id="1", prompt_token_ids=[5], outputs=[answer([2, 3, 4])]),
    ]


@pytest.mark.parametrize("name", ["rollouts.jsonl", "rollouts.parquet"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_dump_is_read_again(tmp_path: Path, name: str, flat: bool) -> None:
    path = tmp_path / name
    count = dump(outputs(flat), path, temperature=0.7, version=12, environment="sums")
    rollouts = list(read(path, Found(path), lambda problem: pytest.fail(str(problem))))
    assert count == len(rollouts) == 3
    answers = [(each.token_ids.tolist(), each.sampled.sum()) for each in rollouts]
    assert answers == [([5, 6, 7, 8], 2), ([5, 6, 9], 1), ([5, 2, 3, 4], 3)]
    for rollout in rollouts:
        expected = -rollout.token_ids[rollout.sampled].double() / 8
        assert rollout.inference_logprobs[rollout.sampled].tolist() == expected.tolist()
        assert rollout.temperature is not None
        assert rollout.temperature.tolist() == [0.7] * len(rollout)
        assert set(rollout.versions or ()) == {"12"}
        assert rollout.environment == "sums"


def test_outputs_without_log_probabilities_are_refused(tmp_path: Path) -> None:
    (first, *_) = outputs()
    first.outputs[0].logprobs = None
    with pytest.raises(ValueError, match=r"request 0 has no log-probabilities; .*logprobs=0"):
        dump([first], tmp_path / "f")
