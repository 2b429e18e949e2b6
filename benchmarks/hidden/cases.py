"""The sizes at which the loss from hidden states is timed."""

from __future__ import annotations

from typing import NamedTuple

TARGET_TOKENS = {"cpu": 2048, "cuda": 8192}


class Head(NamedTuple):
    """What turns a token's state into logits."""

    width: int
    vocabulary: int
    dtype: str  # torch's name


HEADS = {"cpu": Head(1024, 32_000, "float32"), "cuda": Head(4096, 151_936, "bfloat16")}
QUICK_HEAD = Head(64, 1000, "float32")


class Case(NamedTuple):
    tokens: int
    active: int  # percent of the tokens

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.active}% active"


def default_tokens(device: str, quick: bool) -> list[int]:
    """The targets' size first: what a run that is cut short should not miss."""
    if quick:
        return [256, 128]
    if device == "cuda":
        return [8192, 32_768, 16_384, 4096, 2048]
    return [2048, 1024, 512]
