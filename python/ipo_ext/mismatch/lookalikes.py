"""Levels of mismatch and the causes that share each: what the size of a mismatch alone can say.

Measured on SmolLM2-135M (docs/mismatch.md); other models move the bounds, not the order.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Level:
    """Mismatches of k3 below ``k3``, and what makes them.

    Attributes:
        title: causes that look alike.
        measured: where the level comes from.
        advice: what tells these causes apart.
    """

    k3: float
    title: str
    measured: str
    advice: str = ""

    @property
    def is_clean(self) -> bool:
        return not self.advice


LEVELS = (
    Level(
        1e-6,
        "nothing: float32 on both sides",
        "engines in float32 were measured at 0.000000",
    ),
    Level(
        3.5e-3,
        "low precision as usual: bfloat16 arithmetic in engine, trainer or both",
        "these look alike; they were measured at 0.0011 to 0.0021, with no token outside [0.5, 2]: "
        "no mask has anything to do",
    ),
    Level(
        1.2e-2,
        "int8 weights, or weights one small step old (or 4-bit weights in small groups)",
        "int8 weights were measured at 0.0050, a step of a third of the layers at 0.0049, Q4_1 "
        "weights at 0.0045, with next to no token outside [0.5, 2]",
        "compare rollouts made right after the weights were handed over: staleness is gone there, "
        "quantisation is not",
    ),
    Level(
        6e-2,
        "an fp8 KV cache, fp8 weights, or weights two to three steps old",
        "an fp8 cache was measured at 0.043, fp8 weights at 0.035, with activations at 0.042, two "
        "and three steps of a third of the layers at 0.016 and 0.045",
        "compare rollouts made right after the weights were handed over, or run the engine once "
        "with a bfloat16 cache",
    ),
    Level(
        0.3,
        "int8 weights and activations, or weights several steps old (or the head's alone)",
        "int8 activations were measured at 0.059, a first step of AdamW on all weights at 0.14, "
        "four to nine steps of a third of the layers at 0.13 to 0.26",
        "look whether the mismatch grows with each step: that of weights that never arrive does",
    ),
    Level(
        math.inf,
        "weights rounded to 4 bits, or weights of another model (or many steps old)",
        "int4 weights without calibration were measured at 0.60, two steps of AdamW on all "
        "weights at 0.40",
        "compare engine and trainer on fixed tokens before training: nothing here will train well",
    ),
)


def level_of(k3: float) -> Level:
    """The first level above ``k3``."""
    return next((level for level in LEVELS if k3 < level.k3), LEVELS[-1])
