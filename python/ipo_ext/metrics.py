"""Metrics as sums, which combine without bias, and the means made of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ipo_ext import _C
from ipo_ext._ops import library, torch_internals


class IPOMetrics(Mapping[str, torch.Tensor]):
    """Name to mean, with the sums it was made of. Reading it never synchronises with the device.

    A mean of means is biased; to combine metrics, add them: ``a + b`` for micro-batches,
    ``total()`` for the segments of a packed batch, ``all_reduce()`` for ranks.

    Attributes:
        means: ``[rows]`` or ``[rows, segments]`` in the compute dtype; read by name.
        sums: ``[rows]`` or ``[rows, segments]``, float64: counts and sums, rows ``SUM_ROWS``.
        extremes: ``[2]`` or ``[2, segments]``, float64: the smallest and the largest log-ratio,
            +inf and -inf over nothing.
    """

    SUM_ROWS: tuple[str, ...] = _C.SUM_ROWS
    EXTREME_ROWS: tuple[str, ...] = _C.EXTREME_ROWS
    MEAN_ROWS: tuple[str, ...] = _C.MEAN_ROWS

    def __init__(
        self,
        means: torch.Tensor,
        sums: torch.Tensor,
        extremes: torch.Tensor,
        *,
        has_teacher: bool = False,
        has_entropy: bool = False,
        has_rollout_rule: bool = False,
    ) -> None:
        self.means = means
        self.sums = sums
        self.extremes = extremes
        self.has_teacher = has_teacher
        self.has_entropy = has_entropy
        self.has_rollout_rule = has_rollout_rule

    def _names(self) -> tuple[str, ...]:
        return _NAMES[_optional(self)]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names():
            raise KeyError(f"{name!r}: expected one of {', '.join(self._names())}")
        return self.means[_MEAN_ROW[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __repr__(self) -> str:
        return f"IPOMetrics({dict(self)})"

    def tolist(self) -> dict[str, Any]:
        """Every metric as a Python number, or as a list over segments, in one device transfer."""
        rows = self.means.tolist()
        return {name: rows[_MEAN_ROW[name]] for name in self._names()}

    def total(self) -> IPOMetrics:
        """The metrics of all segments together; of metrics without segments, themselves."""
        if self.sums.dim() == 1:
            return self
        if self.sums.shape[1] == 0:
            nothing = torch.tensor([torch.inf, -torch.inf], dtype=torch.float64)
            return self._made_of(self.sums.sum(1), nothing.to(self.sums.device))
        lowest, highest = self.extremes.unbind(0)
        return self._made_of(self.sums.sum(1), torch.stack([lowest.amin(), highest.amax()]))

    def __add__(self, other: IPOMetrics) -> IPOMetrics:
        if not isinstance(other, IPOMetrics):
            return NotImplemented
        if self.sums.shape != other.sums.shape:
            raise ValueError(
                f"metrics: expected equal segments to add, got shapes {tuple(self.sums.shape)} and "
                f"{tuple(other.sums.shape)}; add their total() instead"
            )
        if self._names() != other._names():
            raise ValueError(
                "metrics: expected both or neither to have a teacher, an entropy, a rollout rule"
            )
        (low, high), (other_low, other_high) = self.extremes.unbind(0), other.extremes.unbind(0)
        extremes = torch.stack([torch.minimum(low, other_low), torch.maximum(high, other_high)])
        return self._made_of(self.sums + other.sums, extremes)

    def __radd__(self, other: object) -> IPOMetrics:
        """So that ``sum(metrics_of_micro_batches)`` works."""
        return self if other == 0 else NotImplemented

    def all_reduce(self, group: Any = None) -> IPOMetrics:
        """The metrics over all ranks of ``group`` (default: the whole world).

        Segments are totalled first, since ranks hold different numbers of them. Two collectives;
        every rank of the group must call it.
        """
        total = self.total()
        sums = total.sums.clone()
        negated = torch.stack([total.extremes[0], -total.extremes[1]])  # max(x) is -min(-x)
        torch.distributed.all_reduce(sums, group=group)
        torch.distributed.all_reduce(negated, torch.distributed.ReduceOp.MIN, group=group)
        return self._made_of(sums, torch.stack([negated[0], -negated[1]]))

    def _made_of(self, sums: torch.Tensor, extremes: torch.Tensor) -> IPOMetrics:
        float64 = self.means.dtype == torch.float64
        means = library.operators().metric_means(sums, extremes, float64)
        return _unflatten((means, sums, extremes), _optional(self))


_MEAN_ROW = {name: row for row, name in enumerate(IPOMetrics.MEAN_ROWS)}

# Metrics that are there only where the loss has seen what they measure, in the order of _optional.
_OPTIONAL_ROWS = ("teacher_kl", "entropy", "rollout_dropped")
_NAMES = {
    present: tuple(
        name
        for name in IPOMetrics.MEAN_ROWS
        if name not in _OPTIONAL_ROWS or present[_OPTIONAL_ROWS.index(name)]
    )
    for present in itertools.product((False, True), repeat=len(_OPTIONAL_ROWS))
}


def _optional(metrics: IPOMetrics) -> tuple[bool, ...]:
    return metrics.has_teacher, metrics.has_entropy, metrics.has_rollout_rule


# A pytree node: metrics pass through torch.compile and torch.export as an output.
def _flatten(metrics: IPOMetrics) -> tuple[list[torch.Tensor], tuple[bool, ...]]:
    return [metrics.means, metrics.sums, metrics.extremes], _optional(metrics)


def _unflatten(leaves: Any, context: tuple[bool, ...]) -> IPOMetrics:
    has_teacher, has_entropy, has_rollout_rule = context
    return IPOMetrics(
        *leaves,
        has_teacher=has_teacher,
        has_entropy=has_entropy,
        has_rollout_rule=has_rollout_rule,
    )


torch_internals.register_pytree(IPOMetrics, _flatten, _unflatten, name="ipo_ext.IPOMetrics")
