"""A fair sample of the rollouts, of a size that does not grow: what causes are looked for in."""

from __future__ import annotations

import random

from .rollouts import Rollout

ROLLOUTS = 64


class Sample:
    """Each rollout that was offered is in it with the same probability (reservoir sampling)."""

    def __init__(self, size: int = ROLLOUTS, seed: int = 0) -> None:
        self.rollouts: list[Rollout] = []
        self._size = size
        self._offered = 0
        self._random = random.Random(seed)

    def offer(self, rollout: Rollout) -> None:
        self._offered += 1
        if len(self.rollouts) < self._size:
            self.rollouts.append(rollout)
            return
        place = self._random.randrange(self._offered)
        if place < self._size:
            self.rollouts[place] = rollout
