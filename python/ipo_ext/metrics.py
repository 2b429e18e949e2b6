"""Metrics as sums, which combine without bias, and the means made of them."""

from __future__ import annotations

import itertools
from collections.abc import ItemsView, KeysView, ValuesView
from typing import Any, NoReturn

import torch

from ipo_ext import _C, _histogram
from ipo_ext._groups import process_group
from ipo_ext._numbers import is_number, log_bound
from ipo_ext._ops import library, torch_internals
from ipo_ext._ops.errors import with_torch_errors


class IPOMetrics:
    """Name to mean, with the sums it was made of. Reading it never synchronises with the device.

    A mean of means is biased; to combine metrics, add them: ``a + b`` for micro-batches,
    ``total()`` for the segments of a packed batch, ``all_reduce()`` for ranks.

    It is read as a dict is, but is not a ``Mapping`` and cannot be iterated over: hosts take those
    apart, and would lose the sums. Loop over ``metrics.items()``. ``==`` compares identity.

    Attributes:
        means: ``[rows]`` or ``[rows, segments]`` in the compute dtype; read by name.
        sums: ``[rows]`` or ``[rows, segments]``, float64: counts and sums, rows ``SUM_ROWS``, with
            a sampling mask or score centering ``REPLAY_ROWS`` too.
        extremes: ``[2]`` or ``[2, segments]``, float64: the smallest and the largest log-ratio,
            +inf and -inf over nothing.
        histogram: ``[64]`` or ``[64, segments]``, int64: how many active tokens have a log-ratio
            between two of ``ipo_ext.HISTOGRAM_EDGES``; of a call with ``histogram=True``, else
            None. One on an edge belongs to the bin farther from 0, an infinite one to an
            outermost bin, NaN to none.
        by_group: the same metrics of each group, ``[num_groups]``, of a call with ``groups``, else
            None. Added and reduced with the metrics.
    """

    SUM_ROWS: tuple[str, ...] = _C.SUM_ROWS
    EXTREME_ROWS: tuple[str, ...] = _C.EXTREME_ROWS
    MEAN_ROWS: tuple[str, ...] = _C.MEAN_ROWS
    REPLAY_ROWS: tuple[str, ...] = _C.REPLAY_ROWS

    def __init__(
        self,
        means: torch.Tensor,
        sums: torch.Tensor,
        extremes: torch.Tensor,
        histogram: torch.Tensor | None = None,
        by_group: IPOMetrics | None = None,
        *,
        has_teacher: bool = False,
        has_entropy: bool = False,
        has_rollout_rule: bool = False,
        has_sequence_rule: bool = False,
        has_clip: bool = False,
        has_cap: bool = False,
        has_replay: bool = False,
        has_centering: bool = False,
    ) -> None:
        self.means = means
        self.sums = sums
        self.extremes = extremes
        self.histogram = histogram
        self.by_group = by_group
        self.has_teacher = has_teacher
        self.has_entropy = has_entropy
        self.has_rollout_rule = has_rollout_rule
        self.has_sequence_rule = has_sequence_rule
        self.has_clip = has_clip
        self.has_cap = has_cap
        self.has_replay = has_replay
        self.has_centering = has_centering

    def keys(self) -> KeysView[str]:
        return _ROWS[_optional(self)].keys()

    def values(self) -> ValuesView[torch.Tensor]:
        return self._as_dict().values()

    def items(self) -> ItemsView[str, torch.Tensor]:
        return self._as_dict().items()

    def get(self, name: str, default: Any = None) -> Any:
        return self._as_dict().get(name, default)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise KeyError(f"{name!r}: expected one of {', '.join(self.keys())}")
        return self.means[_ROWS[_optional(self)][name]]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __len__(self) -> int:
        return len(self.keys())

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "metrics: cannot be iterated over, since a host that gathers so would lose the sums; "
            "read metrics.keys() or metrics.items(); combine ranks with metrics.all_reduce(), or "
            "gather [metrics] and add what comes"
        )

    def __repr__(self) -> str:
        return f"IPOMetrics({self._as_dict()})"

    def _as_dict(self) -> dict[str, torch.Tensor]:
        return {name: self.means[row] for name, row in _ROWS[_optional(self)].items()}

    def tolist(self) -> dict[str, Any]:
        """Every metric as a Python number, or as a list over segments, in one device transfer."""
        rows = self.means.tolist()
        return {name: rows[row] for name, row in _ROWS[_optional(self)].items()}

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> IPOMetrics:
        """On ``device``; dtypes stay as they are, since sums need float64."""
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"device: expected a device, got {device}: metrics keep their dtypes; convert what "
                "is read of them, metrics[name].to(dtype)"
            )
        leaves, context = _flatten(self)
        moved = [leaf.to(device, non_blocking=non_blocking) for leaf in leaves]
        return _unflatten(moved, context)

    def quantile(self, p: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Between which of ``HISTOGRAM_EDGES`` the quantile ``p`` of the log-ratios lies.

        Two of float64, ``[]`` or ``[segments]``; NaN over no tokens. Of a call with
        ``histogram=True``.
        """
        return _histogram.quantile(self._counts(), p)

    def what_if(self, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Which share of the active tokens a band ``low <= r <= high`` on the ratio would drop.

        At least, and at most: the histogram does not say where in a bin a token lies, and an
        outermost one may be infinite. float64, ``[]`` or ``[segments]``. Of a call with
        ``histogram=True``.
        """
        if not (is_number(low) and is_number(high)):
            raise TypeError(f"low, high: expected two numbers, got {low!r} and {high!r}")
        if not 0 <= low <= high:
            raise ValueError(f"low, high: expected 0 <= low <= high, got {low!r} and {high!r}")
        counts = self._counts()
        bounds = (log_bound(bound, self.means.dtype) for bound in (low, high))  # as the mask's are
        active = self.sums[self.SUM_ROWS.index("active")]
        is_nan = active - counts.sum(0)
        at_least, at_most = (
            torch.where(active > 0, (dropped + is_nan) / active, 0.0)
            for dropped in _histogram.outside(counts, *bounds)
        )
        return at_least, at_most

    def _counts(self) -> torch.Tensor:
        if self.histogram is None:
            raise ValueError(
                "metrics: expected those of a call with histogram=True, got some without; pass it "
                "to the loss"
            )
        return self.histogram

    def total(self) -> IPOMetrics:
        """The metrics of all segments together; of metrics without segments, themselves."""
        if self.sums.dim() == 1:
            return self
        self._check_sums()
        if self.sums.shape[1] == 0:
            largest = self.extremes.new_full((), torch.inf)
            extremes = torch.stack([largest, -largest])
        else:
            lowest, highest = self.extremes.unbind(0)
            extremes = torch.stack([lowest.amin(), highest.amax()])
        histogram = None if self.histogram is None else self.histogram.sum(1)
        return self._made_of(self.sums.sum(1), extremes, histogram, self.by_group)

    def __add__(self, other: IPOMetrics) -> IPOMetrics:
        if not isinstance(other, IPOMetrics):
            return NotImplemented
        if self.sums.shape[1:] != other.sums.shape[1:]:
            raise ValueError(
                f"metrics: expected equal segments to add, got shapes {tuple(self.sums.shape)} and "
                f"{tuple(other.sums.shape)}; add their total() instead"
            )
        if _optional(self) != _optional(other):
            raise ValueError(
                "metrics: expected both or neither to have each of "
                f"{', '.join(_OPTIONAL_ROWS)}, got {_present(self)} and {_present(other)}"
            )
        if (self.histogram is None) != (other.histogram is None):
            with_one = "the first" if self.histogram is not None else "the second"
            raise ValueError(
                f"metrics: expected both or neither to have a histogram, got one in {with_one} "
                "alone; pass histogram=True to all calls whose metrics are combined, or to none"
            )
        by_group = self._sum_by_group(other)
        self._check_sums()
        other._check_sums()
        (low, high), (other_low, other_high) = self.extremes.unbind(0), other.extremes.unbind(0)
        extremes = torch.stack([torch.minimum(low, other_low), torch.maximum(high, other_high)])
        histogram = None
        if self.histogram is not None and other.histogram is not None:
            histogram = self.histogram + other.histogram
        return self._made_of(self.sums + other.sums, extremes, histogram, by_group)

    def _sum_by_group(self, other: IPOMetrics) -> IPOMetrics | None:
        ours, theirs = self.by_group, other.by_group
        if ours is None and theirs is None:
            return None
        if ours is None or theirs is None:
            with_them = "the first" if ours is not None else "the second"
            raise ValueError(
                f"metrics: expected both or neither to have groups, got them in {with_them} alone; "
                "pass groups to all calls whose metrics are combined, or to none"
            )
        numbers = ours.sums.shape[1], theirs.sums.shape[1]
        if numbers[0] != numbers[1]:
            raise ValueError(
                f"metrics: expected equally many groups to add, got {numbers[0]} and {numbers[1]}; "
                "pass the same num_groups to all calls whose metrics are combined"
            )
        return ours + theirs

    def __radd__(self, other: object) -> IPOMetrics:
        """So that ``sum(metrics_of_micro_batches)`` works."""
        return self if other == 0 else NotImplemented

    def all_reduce(self, group: Any = None, *, by_sequence: bool = False) -> IPOMetrics:
        """The metrics over all ranks of ``group`` (default: the whole world).

        Segments are totalled first, since ranks hold different numbers of them. ``by_sequence``
        leaves them apart, for ranks that share sequences: ``[num_sequences]``, by the ids of
        ``sequence_ids``, the same number on every rank. ``group`` must hold ranks with different
        tokens alone: under tensor parallelism the data- and context-parallel ones. Two
        collectives, with a histogram three, with groups twice as many. All ranks or none must have
        a histogram, and groups, the same number of them; every rank of the group must call it.

        Raises:
            ValueError: ``by_sequence`` of metrics without segments.
        """
        self._check_sums()
        if by_sequence and self.sums.dim() == 1:
            raise ValueError(
                "by_sequence: expected metrics of sequences, [num_sequences], got those of all "
                "tokens together; pass sequence_ids and num_sequences to the loss"
            )
        group = None if group is None else process_group("group", group)
        total = self if by_sequence else self.total()
        sums = total.sums.clone()
        negated = torch.stack([total.extremes[0], -total.extremes[1]])  # max(x) is -min(-x)
        torch.distributed.all_reduce(sums, group=group)
        torch.distributed.all_reduce(negated, torch.distributed.ReduceOp.MIN, group=group)
        histogram = total.histogram
        if histogram is not None:
            histogram = histogram.clone()
            torch.distributed.all_reduce(histogram, group=group)
        by_group = self.by_group
        if by_group is not None:
            by_group = by_group.all_reduce(group, by_sequence=True)
        extremes = torch.stack([negated[0], -negated[1]])
        return self._made_of(sums, extremes, histogram, by_group)

    def _folded(self, sequence_ids: torch.Tensor, num_sequences: int) -> IPOMetrics:
        """Of the sequences that the segments are pieces of, by their ids; or of their groups."""
        fold = library.operators().fold_segments
        sums, extremes = with_torch_errors(
            fold, self.sums, self.extremes, sequence_ids, num_sequences
        )
        histogram = self.histogram
        if histogram is not None:
            ids = sequence_ids.long().clamp(0, max(num_sequences - 1, 0))  # others are faults
            folded = histogram.new_zeros((len(histogram), num_sequences))
            histogram = folded.index_add_(1, ids, histogram)
        return self._made_of(sums, extremes, histogram, self.by_group)

    def _check_sums(self) -> None:
        """A cast loses what sums are for: bfloat16 counts to 256."""
        for name in ("sums", "extremes"):
            dtype = getattr(self, name).dtype
            if dtype != torch.float64:
                raise TypeError(
                    f"metrics: expected {name} in float64, got {dtype}: a cast of their pytree "
                    "rounded them; combine metrics before it, or leave them out of it"
                )

    def _made_of(
        self,
        sums: torch.Tensor,
        extremes: torch.Tensor,
        histogram: torch.Tensor | None,
        by_group: IPOMetrics | None,
    ) -> IPOMetrics:
        float64 = self.means.dtype == torch.float64
        means = library.operators().metric_means(sums, extremes, float64)
        present = {name: getattr(self, name) for name in _ATTRIBUTES}
        return IPOMetrics(means, sums, extremes, histogram, by_group, **present)


# Metrics that are there only where the loss has what they measure, and the attributes that say so,
# all of which must.
_OPTIONAL_ROWS = {
    "teacher_kl": ("has_teacher",),
    "entropy": ("has_entropy",),
    "rollout_dropped": ("has_rollout_rule",),
    "sequence_dropped": ("has_sequence_rule",),
    "is_clipped": ("has_clip",),
    "ratio_capped": ("has_cap",),
    "replayed": ("has_replay",),
    "nonfinite_entropy": ("has_replay", "has_entropy"),
    "centering_loss": ("has_centering",),
}
_ATTRIBUTES = tuple(dict.fromkeys(itertools.chain(*_OPTIONAL_ROWS.values())))


def _rows_of(present: tuple[bool, ...]) -> dict[str, int]:
    """Name to row of the metrics that are there where ``present`` are the attributes."""
    has = dict(zip(_ATTRIBUTES, present, strict=True))
    return {
        name: row
        for row, name in enumerate((*IPOMetrics.MEAN_ROWS, *IPOMetrics.REPLAY_ROWS))
        if all(has[attribute] for attribute in _OPTIONAL_ROWS.get(name, ()))
    }


_ROWS = {
    present: _rows_of(present)
    for present in itertools.product((False, True), repeat=len(_ATTRIBUTES))
}


def _optional(metrics: IPOMetrics) -> tuple[bool, ...]:
    return tuple([getattr(metrics, name) for name in _ATTRIBUTES])


def _present(metrics: IPOMetrics) -> str:
    return ", ".join(name for name in _OPTIONAL_ROWS if name in metrics) or "none"


# A pytree node: metrics pass through torch.compile and torch.export as an output. Those by group
# are a node within.
def _flatten(metrics: IPOMetrics) -> tuple[list[Any], tuple[bool, ...]]:
    beside = metrics.histogram, metrics.by_group
    leaves: list[Any] = [metrics.means, metrics.sums, metrics.extremes]
    leaves += [part for part in beside if part is not None]
    return leaves, (*_optional(metrics), *[part is not None for part in beside])


def _unflatten(leaves: Any, context: tuple[bool, ...]) -> IPOMetrics:
    *optional, has_histogram, has_groups = context
    present: dict[str, Any] = dict(zip(_ATTRIBUTES, optional, strict=True))
    means, sums, extremes, *beside = leaves
    by_group = beside.pop() if has_groups else None
    histogram = beside.pop() if has_histogram else None
    return IPOMetrics(means, sums, extremes, histogram, by_group, **present)


torch_internals.register_pytree(IPOMetrics, _flatten, _unflatten, name="ipo_ext.IPOMetrics")
