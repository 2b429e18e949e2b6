"""Which of an engine's sampling options are named as drawing from another distribution."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from ipo_ext.integrations._sampling import warn_of_another_distribution

NEUTRAL = {
    "n": 8,
    "num_return_sequences": 4,
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "logit_bias": {},
    "bad_words": [],
    "output_kind": 2,
    "return_token_ids": True,
    "truncate_prompt_tokens": 100,
    "priority": 0,
    "max_tokens": 100,
    "seed": 1,
    "not_set": None,
}


def test_what_changes_no_distribution_is_not_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_another_distribution(NEUTRAL)


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0.9), ("top_k", 20), ("min_p", 0.1), ("typical_p", 0.9), ("logit_bias", {5: 1.0})],
)
def test_what_bends_it_is_named(name: str, value: Any) -> None:
    with pytest.warns(UserWarning, match=f"^{name}="):
        warn_of_another_distribution({**NEUTRAL, name: value})
