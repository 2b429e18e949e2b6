"""How far reading and recomputing are, on standard error: one line that is written over."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

from .rollouts import Rollout

_SECONDS = 1.0  # between two lines on a terminal
_SECONDS_IN_A_LOG = 30.0


class Progress:
    """Counts what passes through ``watch`` and says so now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.redraws = self.stream.isatty()
        self.started = self.said = time.monotonic()
        self.rollouts = self.tokens = 0

    def watch(self, rollouts: Iterable[Rollout]) -> Iterator[Rollout]:
        for rollout in rollouts:
            self.rollouts += 1
            self.tokens += len(rollout)
            self._say_if_it_is_time()
            yield rollout
        self.clear()

    def note(self, text: str) -> None:
        """One line that stays."""
        self.clear()
        print(text, file=self.stream, flush=True)

    def clear(self) -> None:
        if self.redraws:
            print("\r\033[K", end="", file=self.stream, flush=True)

    def _say_if_it_is_time(self) -> None:
        now = time.monotonic()
        if now - self.said < (_SECONDS if self.redraws else _SECONDS_IN_A_LOG):
            return
        self.said = now
        rate = self.tokens / (now - self.started)
        text = f"{self.rollouts:,} rollouts, {self.tokens:,} tokens, {rate:,.0f} tokens/s"
        start, end = ("\r\033[K", "") if self.redraws else ("", "\n")
        print(f"{start}{text}", end=end, file=self.stream, flush=True)
