"""Files as rollouts: which format a record has is decided by what it holds, never by names.

A format is a module with ``NAME``, ``matches(record)`` and ``rollouts_in(record, where)``, which
raises ``BadRecord`` in words. A new one is a module and a line of ``FORMATS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..rollouts import BadRecord, Rollout, label
from . import (
    llama_cpp,
    own,
    prime_rl_batches,
    prime_rl_exports,
    sglang,
    text_only,
    verifiers,
    vllm,
)
from .records import Record, Refused, records_of

FORMATS: tuple[ModuleType, ...] = (
    own,
    prime_rl_exports,
    prime_rl_batches,
    verifiers,
    vllm,
    sglang,
    llama_cpp,
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A record that was left out, and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


@dataclasses.dataclass
class Found:
    """What a file turned out to be; counts grow while it is read."""

    path: Path
    format: str = ""
    records: int = 0
    rollouts: int = 0
    problems: int = 0

    def __str__(self) -> str:
        parts = [self.format, f"{self.records:,} records", f"{self.rollouts:,} rollouts"]
        if self.problems:
            parts.append(f"{self.problems:,} left out")
        return f"{self.path}: {', '.join(parts)}"


def read(path: Path, found: Found, on_problem: Callable[[Problem], None]) -> Iterator[Rollout]:
    """The rollouts of a file, one at a time. What cannot be read is handed over, and left out.

    Raises:
        Refused: the file is of no format that is read, before anything of it was.
    """
    container, records = records_of(path)
    for record in records:
        found.records += 1
        if record.error is None and not found.format:
            format_of(record.value)  # the first that can be read decides whether the file is
        try:
            if record.error is not None:
                raise BadRecord(record.error)
            reader = format_of(record.value)
            found.format = f"{reader.NAME} ({container})"
            for rollout in _rollouts_in(reader, record):
                found.rollouts += 1
                yield rollout
        except (BadRecord, Refused) as error:
            found.problems += 1
            on_problem(Problem(record.where, str(error)))
    if not found.format:
        raise Refused("holds no record that can be read" if found.records else "holds no records")


def _rollouts_in(reader: ModuleType, record: Record) -> Iterator[Rollout]:
    """A record that is not laid out as its format says is a bad one, whatever its reader raises."""
    try:
        yield from reader.rollouts_in(record.value, record.where)
    except BadRecord:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise BadRecord(f"is not laid out as {reader.NAME} are ({kind}: {error})") from error


def format_of(record: Any) -> ModuleType:
    """The module that reads a record; ``Refused`` says what was found and what is read."""
    for reader in FORMATS:
        if reader.matches(record):
            return reader
    if refusal := text_only.refusal(record):
        raise Refused(refusal)
    names = ", ".join(reader.NAME for reader in FORMATS)
    raise Refused(f"expected one of {names}; found {_described(record)}")


def _described(record: Any) -> str:
    if isinstance(record, dict):
        keys = ", ".join(map(label, list(record)[:12])) or "none"
        return f"an object with the keys {keys}"
    if isinstance(record, list):
        return f"a list of {len(record)} elements"
    return f"{type(record).__name__} {str(record)[:40]!r}"


__all__ = ["FORMATS", "Found", "Problem", "Record", "Refused", "format_of", "read"]
