"""The histogram of log-ratios: its bins' edges, and what can be read from its counts.

Edges are made on the device where they are needed, so that no copy waits for it.
"""

from __future__ import annotations

import math

import torch

_SMALLEST, _LARGEST = -10, 5  # powers of 2 between which each side has two bins an octave

_SIDE = tuple(
    mantissa * 2.0**exponent for exponent in range(_SMALLEST, _LARGEST) for mantissa in (1.0, 1.5)
)
_ENDS = (*_SIDE, 2.0**_LARGEST)  # of a side's bins, but for 0 and infinity

# Bin i of 64 holds log-ratios between edges i and i + 1, the one farther from 0 left out.
HISTOGRAM_EDGES = (-math.inf, *(-end for end in reversed(_ENDS)), 0.0, *_ENDS, math.inf)


def quantile(histogram: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges of the bin in which the quantile lies, NaN over no tokens; ``[64, ...]`` counts."""
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a share between 0 and 1, got {p!r}")
    total = histogram.sum(0)
    rank = (p * total.double()).ceil().clamp(min=1)
    bins = (histogram.cumsum(0) < rank).sum(0).clamp(max=histogram.shape[0] - 1)
    edges = _edges(histogram.device)
    low, high = (torch.where(total > 0, edges[bins + end], math.nan) for end in (0, 1))
    return low, high


def outside(histogram: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tokens are certainly, and how many may be, outside a band of log-ratios.

    A token in an outermost bin may have an infinite log-ratio, which no band keeps.
    """
    edges = _edges(histogram.device)
    begins, ends = edges[:-1], edges[1:]
    beyond = (begins > high) | (ends < low)
    may_be = (begins < low) | (ends > high) | begins.isinf() | ends.isinf()
    shape = (-1, *[1] * (histogram.dim() - 1))
    certain, possible = (
        torch.where(bins.view(shape), histogram, 0).sum(0) for bins in (beyond, beyond | may_be)
    )
    return certain, possible


def _edges(device: torch.device) -> torch.Tensor:
    """``HISTOGRAM_EDGES``, float64."""
    steps = torch.arange(len(_ENDS), dtype=torch.float64, device=device)
    octave = (steps / 2).floor()
    ends = torch.ldexp(1 + (steps - 2 * octave) / 2, octave + _SMALLEST)
    zero, infinity = ends.new_zeros(1), ends.new_full((1,), math.inf)
    return torch.cat([-infinity, -ends.flip(0), zero, ends, infinity])
