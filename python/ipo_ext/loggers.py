"""Metrics written where runs are watched: TensorBoard, Weights & Biases, MLflow, lines of JSON.

Each function is one call at the end of a step, and reads the device once, with one transfer; with
one more where the metrics have a histogram, and one more where they have groups. What is written to
is the caller's.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
from typing import Any

import torch

from ipo_ext._histogram import HISTOGRAM_EDGES
from ipo_ext._numbers import is_number
from ipo_ext.metrics import IPOMetrics

PREFIX = "ipo/"
HISTOGRAM = "log_ratio"

# Loggers want ends of the outermost bins: 64, twice the edge before. Log-ratios beyond are in them.
_EDGES = (2 * HISTOGRAM_EDGES[1], *HISTOGRAM_EDGES[1:-1], 2 * HISTOGRAM_EDGES[-2])


def scalars(metrics: IPOMetrics, *, prefix: str = PREFIX) -> dict[str, float]:
    """Every metric as a Python number under the name that it is logged by, for any other logger.

    Waits for the device, once: call it when a step has ended, not between its micro-batches, whose
    metrics are added before (``a + b``), as those of ranks are (``metrics.all_reduce()``). Packed
    segments are totalled.

    Of metrics with groups, those of a group follow as ``<prefix>group_<id>/<name>``, of each group
    that has active tokens.

    Args:
        metrics: ``out.metrics`` or a sum of them.
        prefix: what stands before each metric's name.

    Raises:
        TypeError: ``metrics`` are no ``IPOMetrics``.
    """
    if not isinstance(metrics, IPOMetrics):
        kind = type(metrics).__name__
        raise TypeError(f"metrics: expected IPOMetrics, as out.metrics are, got {kind}")
    values = {prefix + name: value for name, value in metrics.total().tolist().items()}
    return values | _by_group(metrics, prefix)


def _by_group(metrics: IPOMetrics, prefix: str) -> dict[str, float]:
    """Without the groups that have no active tokens, whose means of nothing would look like 0."""
    groups = metrics.by_group
    if groups is None:
        return {}
    active = groups.sums[IPOMetrics.SUM_ROWS.index("active")]
    counts, *rows = torch.stack([active, *map(torch.Tensor.double, groups.values())]).tolist()
    return {
        f"{prefix}group_{group}/{name}": row[group]
        for group, count in enumerate(counts)
        if count > 0
        for name, row in zip(groups.keys(), rows, strict=True)
    }


def _counts(metrics: IPOMetrics) -> list[int] | None:
    histogram = metrics.total().histogram
    return None if histogram is None else histogram.tolist()


def to_tensorboard(metrics: IPOMetrics, writer: Any, step: int, *, prefix: str = PREFIX) -> None:
    """Adds every metric as a scalar, and a histogram, if there is one, as ``<prefix>log_ratio``.

    Of the histogram, sum and sum of squares are those of the middles of its bins.

    Args:
        metrics: as ``scalars`` takes them.
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or another with its ``add_scalar``.
        step: the step's number.
        prefix: what stands before each metric's name.

    Raises:
        TypeError: ``metrics`` are no ``IPOMetrics``, or ``writer`` has no ``add_scalar``.
    """
    add_scalar = _method(writer, "writer", "add_scalar", "a SummaryWriter")
    values = scalars(metrics, prefix=prefix)
    for name, value in values.items():
        add_scalar(name, value, step)
    if (counts := _counts(metrics)) is not None:
        middles = [(low + high) / 2 for low, high in itertools.pairwise(_EDGES)]
        writer.add_histogram_raw(
            prefix + HISTOGRAM,
            min=values[f"{prefix}log_ratio_min"],
            max=values[f"{prefix}log_ratio_max"],
            num=sum(counts),
            sum=sum(count * x for count, x in zip(counts, middles, strict=True)),
            sum_squares=sum(count * x * x for count, x in zip(counts, middles, strict=True)),
            bucket_limits=_EDGES[1:],
            bucket_counts=counts,
            global_step=step,
        )


def to_wandb(metrics: IPOMetrics, run: Any, step: int, *, prefix: str = PREFIX) -> None:
    """Logs every metric to Weights & Biases, and a histogram, if there is one, as ``log_ratio``.

    Args:
        metrics: as ``scalars`` takes them.
        run: what ``wandb.init`` returned, or ``wandb`` itself.
        step: the step's number. Weights & Biases drops a step lower than the last one, and adds
            what else is logged under the same number to the same row.
        prefix: what stands before each metric's name.

    Raises:
        TypeError: ``metrics`` are no ``IPOMetrics``, or ``run`` has no ``log``.
    """
    log = _method(run, "run", "log", "what wandb.init returned")
    values: dict[str, Any] = dict(scalars(metrics, prefix=prefix))
    if (counts := _counts(metrics)) is not None:
        import wandb

        values[prefix + HISTOGRAM] = wandb.Histogram(np_histogram=(counts, list(_EDGES)))
    log(values, step=step)


def to_mlflow(metrics: IPOMetrics, run: Any, step: int, *, prefix: str = PREFIX) -> None:
    """Logs every metric to an MLflow run, in one request. MLflow's metrics have no histograms.

    Args:
        metrics: as ``scalars`` takes them.
        run: ``mlflow`` itself, for the run that is active in this thread, or another with its
            ``log_metrics``.
        step: the step's number.
        prefix: what stands before each metric's name.

    Raises:
        TypeError: ``metrics`` are no ``IPOMetrics``, or ``run`` has no ``log_metrics``.
    """
    log_metrics = _method(run, "run", "log_metrics", "mlflow")
    log_metrics(scalars(metrics, prefix=prefix), step=step)


def to_jsonl(
    metrics: IPOMetrics,
    path: str | os.PathLike[str],
    step: int,
    *,
    prefix: str = PREFIX,
    **facts: float | str | bool | None,
) -> None:
    """Appends a line of JSON: ``step``, ``timestamp`` (UTC), the facts, every metric.

    A histogram, if there is one, is the list ``log_ratio`` of counts between ``HISTOGRAM_EDGES``.

    The file is opened and closed again, so that each line is there when the call returns; pandas'
    ``read_json(path, lines=True)`` reads it, dates included. A number that JSON lacks, infinite or
    NaN, is null.

    Args:
        metrics: as ``scalars`` takes them.
        path: a file, made where it is not there; its folder must be.
        step: the step's number.
        prefix: what stands before each metric's name.
        **facts: more of the line, for instance ``reward=0.5``: numbers, texts, booleans, None.

    Raises:
        TypeError: ``metrics`` are no ``IPOMetrics``, or a fact is of another type, a tensor for
            instance, whose reading would be one more wait for the device.
    """
    for name, value in facts.items():
        if not (is_number(value) or isinstance(value, (str, bool, type(None)))):
            kind = type(value).__name__
            raise TypeError(f"{name}: expected a number, a text, a boolean or None, got {kind}")
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    line: dict[str, Any] = {"step": step, "timestamp": now, **facts}
    line |= scalars(metrics, prefix=prefix)
    if (counts := _counts(metrics)) is not None:
        line[prefix + HISTOGRAM] = counts
    text = json.dumps({name: _in_json(value) for name, value in line.items()}, allow_nan=False)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")


def _in_json(value: Any) -> Any:
    """Numbers of other types, NumPy's, as Python's; null for what JSON cannot hold."""
    if not is_number(value) or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _method(of: Any, argument: str, name: str, expected: str) -> Any:
    method = getattr(of, name, None)
    if not callable(method):
        kind = type(of).__name__
        raise TypeError(f"{argument}: expected {expected}, with the method {name}, got {kind}")
    return method
