"""Score centering among the metrics of the loss that it is added to."""

from __future__ import annotations

from typing import Any

import torch

from ipo_ext import _C
from ipo_ext._ops.arguments import MetricRows

_ROW = _C.REPLAY_ROWS.index("centering_loss")


def with_centering(ops: Any, metrics: MetricRows, sums: torch.Tensor) -> MetricRows:
    """The metrics with the sums of the terms, ``[1]`` or ``[1, segments]``, in their row.

    It stands behind those of replay, which are 0 where nothing is replayed.
    """
    count = len(_C.SUM_ROWS)
    replay = metrics.sums[count : count + _ROW]
    if not len(replay):
        replay = metrics.sums.new_zeros((_ROW, *metrics.sums.shape[1:]))
    rows = torch.cat([metrics.sums[:count], replay, sums])
    float64 = metrics.means.dtype == torch.float64
    means = ops.metric_means(rows, metrics.extremes, float64)
    return MetricRows(means, rows, metrics.extremes)
