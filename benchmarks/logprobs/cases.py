"""The sizes at which the loss from log-probabilities is timed."""

from __future__ import annotations

from typing import NamedTuple

MEAN_LENGTH = 1024  # tokens of a packed sequence: 64 sequences at 65,536
BYTES_PER_TOKEN = 17  # read: three floats and a bool; written: the gradient


class Case(NamedTuple):
    tokens: int
    sequences: int

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens in {self.sequences:,} sequence{'s' * (self.sequences > 1)}"


TARGET_CASE = Case(65_536, 64)
CUDA_TARGET_CASE = Case(131_072, 64)
CUDA_LARGE_CASE = Case(2**24, 2**24 // MEAN_LENGTH)


def packed(tokens: int) -> Case:
    """So many tokens in packed sequences of the common mean length."""
    return Case(tokens, max(1, tokens // MEAN_LENGTH))


def default_cases(device: str, quick: bool) -> list[Case]:
    """The cases of the targets first: what a run that is cut short should not miss."""
    if quick:
        return [packed(2**exponent) for exponent in (10, 12, 14)]
    exponents = range(10, 25 if device == "cuda" else 23, 2)
    cases = [packed(2**exponent) for exponent in exponents]
    first = [TARGET_CASE]
    if device == "cuda":
        first += [CUDA_TARGET_CASE, CUDA_LARGE_CASE]
    return first + [case for case in cases if case not in first]
