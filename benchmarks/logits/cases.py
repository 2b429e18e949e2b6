"""The sizes at which the loss from logits is timed."""

from __future__ import annotations

from typing import NamedTuple

BYTES = {"fp32": 4, "bf16": 2}  # of a logit


class Case(NamedTuple):
    rows: int
    columns: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.columns:,} {self.dtype}"

    @property
    def logits(self) -> int:
        return self.rows * self.columns

    @property
    def bytes(self) -> int:
        return self.logits * BYTES[self.dtype]


TARGET_CASES = (Case(256, 32_000, "fp32"), Case(256, 32_000, "bf16"))
CUDA_TARGET_CASE = Case(8192, 151_936, "bf16")


def with_each_dtype(sizes: list[tuple[int, int]]) -> list[Case]:
    """The sizes, rows and columns, in each dtype."""
    return [Case(*size, dtype) for dtype in BYTES for size in sizes]


def default_cases(device: str, quick: bool) -> list[Case]:
    """The cases of the targets first: what a run that is cut short should not miss."""
    sizes = [(rows, columns) for columns in (4096, 32_000, 128_256) for rows in (16, 256)]
    first = list(TARGET_CASES)
    if quick:
        sizes, first = [(4, 1000), (16, 1000)], []
    elif device == "cuda":
        sizes = [(r, c) for c in (32_000, 128_256, 151_936, 262_144) for r in (16, 1024, 8192)]
        first = [CUDA_TARGET_CASE]
    return first + [case for case in with_each_dtype(sizes) if case not in first]
