"""`ipo_ext.loggers`: what TensorBoard's reader and JSON find, and how often a device is read."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from ipo_ext import HISTOGRAM_EDGES, IPOMetrics, ipo_loss, loggers


def metrics_of(seed: int, segments: bool = False, histogram: bool = False) -> IPOMetrics:
    generator = torch.Generator().manual_seed(seed)
    trainer, inference, advantages = torch.randn(3, 16, generator=generator)
    ends = torch.tensor([0, 5, 16], dtype=torch.int32) if segments else None
    every = torch.ones(16, dtype=torch.bool)
    return ipo_loss(
        trainer, inference, advantages, every, cu_seqlens=ends, histogram=histogram
    ).metrics


class Reads(TorchFunctionMode):
    """The calls that wait for a device, by name."""

    WAIT = ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "to")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if getattr(function, "__name__", "") in self.WAIT:
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Memory:
    """A writer, a run and an active MLflow run, which keep what they are given."""

    def __init__(self) -> None:
        self.kept: dict[int, dict[str, float]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.kept.setdefault(step, {})[name] = value

    def log(self, values: dict[str, float], step: int) -> None:
        self.kept[step] = values

    log_metrics = log


def write(logger: str, metrics: IPOMetrics, step: int, tmp_path: Path) -> None:
    target = tmp_path / "run.jsonl" if logger == "to_jsonl" else Memory()
    getattr(loggers, logger)(metrics, target, step)


LOGGERS = ("to_jsonl", "to_mlflow", "to_tensorboard", "to_wandb")


@pytest.mark.parametrize("logger", LOGGERS)
def test_a_step_is_read_from_the_device_in_one_transfer(logger: str, tmp_path: Path) -> None:
    metrics = metrics_of(0, segments=True)
    with Reads() as reads:
        write(logger, metrics, 3, tmp_path)
    assert reads.names == ["tolist"]


@pytest.mark.parametrize("logger", ["to_mlflow", "to_tensorboard", "to_wandb"])
def test_every_metric_arrives_under_its_name_and_step(logger: str) -> None:
    memory, metrics = Memory(), metrics_of(0) + metrics_of(1)
    getattr(loggers, logger)(metrics, memory, 7, prefix="policy/")
    assert memory.kept == {7: {f"policy/{name}": value for name, value in metrics.tolist().items()}}


@pytest.mark.parametrize("histogram", [False, True])
def test_groups_cost_one_transfer_more(histogram: bool, tmp_path: Path) -> None:
    metrics = with_groups(histogram)
    with Reads() as reads:
        write("to_jsonl", metrics, 3, tmp_path)
    assert reads.names == ["tolist"] * (3 if histogram else 2)


def with_groups(histogram: bool) -> IPOMetrics:
    trainer, inference = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(16, dtype=torch.int32) % 2 * 2  # groups 0 and 2
    named = {"groups": ids, "num_groups": 4, "histogram": histogram}
    every = torch.ones(16, dtype=torch.bool)
    return ipo_loss(trainer, inference, trainer, every, **named).metrics


def test_a_group_has_names_of_its_own_if_it_has_tokens() -> None:
    metrics = with_groups(histogram=False)
    values = loggers.scalars(metrics, prefix="policy/")
    by_group = metrics.by_group.tolist()
    expected = {f"policy/{name}": value for name, value in metrics.tolist().items()}
    for group in (0, 2):
        expected |= {f"policy/group_{group}/{name}": by_group[name][group] for name in by_group}
    assert values == expected


def test_segments_are_totalled() -> None:
    packed = metrics_of(0, segments=True)
    assert loggers.scalars(packed) == loggers.scalars(packed.total())
    assert loggers.scalars(packed)["ipo/is_masked"] == pytest.approx(
        float(metrics_of(0)["is_masked"])
    )


def test_tensorboards_reader_finds_every_metric(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    steps = {3: metrics_of(0), 4: metrics_of(1)}
    with SummaryWriter(str(tmp_path)) as writer:
        for step, metrics in steps.items():
            loggers.to_tensorboard(metrics, writer, step)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {f"ipo/{name}" for name in metrics_of(0).tolist()}
    for name in metrics_of(0).tolist():
        found = {event.step: event.value for event in events.Scalars(f"ipo/{name}")}
        assert found == {step: float(metrics[name]) for step, metrics in steps.items()}


def test_tensorboards_reader_finds_the_histogram(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    metrics = metrics_of(0, segments=True, histogram=True)
    with SummaryWriter(str(tmp_path)) as writer:
        loggers.to_tensorboard(metrics, writer, 3)
    (event,) = EventAccumulator(str(tmp_path)).Reload().Histograms("ipo/log_ratio")
    found, counts = event.histogram_value, metrics.total().histogram
    assert counts is not None
    assert event.step == 3
    assert found.bucket == counts.tolist()
    assert found.bucket_limit == [*HISTOGRAM_EDGES[1:-1], 64.0]
    assert found.num == 16
    expected = float(metrics.total()["log_ratio_min"]), float(metrics.total()["log_ratio_max"])
    assert (found.min, found.max) == expected
    x = torch.stack([*torch.randn(3, 16, generator=torch.Generator().manual_seed(0))])
    x = (x[0] - x[1]).double()
    # A bin is at most half as wide as its inner end is far from 0.
    assert abs(found.sum - float(x.sum())) < 0.25 * float(x.abs().sum())
    assert 0.5 < found.sum_squares / float(x.square().sum()) < 2


def test_a_line_of_json_has_the_counts(tmp_path: Path) -> None:
    path, metrics = tmp_path / "run.jsonl", metrics_of(0, segments=True, histogram=True)
    loggers.to_jsonl(metrics, path, 3)
    counts = metrics.total().histogram
    assert counts is not None
    assert json.loads(path.read_text())["ipo/log_ratio"] == counts.tolist()


def test_a_histogram_is_one_transfer_more(tmp_path: Path) -> None:
    metrics = metrics_of(0, segments=True, histogram=True)
    with Reads() as reads:
        loggers.to_jsonl(metrics, tmp_path / "run.jsonl", 3)
    assert reads.names == ["tolist", "tolist"]


def test_lines_of_json_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    before = datetime.datetime.now(datetime.timezone.utc)
    loggers.to_jsonl(metrics_of(0), path, 3, reward=np.float32(0.5), policy="a", done=False)
    loggers.to_jsonl(metrics_of(1), path, 4, reward=None)
    first, second = map(json.loads, path.read_text().splitlines())
    assert list(first)[:5] == ["step", "timestamp", "reward", "policy", "done"]
    assert (first["step"], first["reward"], first["policy"], first["done"]) == (3, 0.5, "a", False)
    assert (second["step"], second["reward"]) == (4, None)
    assert second["ipo/mismatch_kl"] == float(metrics_of(1)["mismatch_kl"])
    since = datetime.datetime.fromisoformat(first["timestamp"]) - before
    assert abs(since) < datetime.timedelta(minutes=1)


def test_what_json_lacks_is_null(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    metrics = metrics_of(0)
    metrics.means[0] = math.inf
    loggers.to_jsonl(metrics, path, 0, reward=math.nan)
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"found {name}"))
    assert (line["ipo/mismatch_kl"], line["reward"]) == (None, None)
    assert line["ipo/is_masked"] == float(metrics["is_masked"])


@pytest.mark.parametrize("logger", LOGGERS)
def test_what_are_no_metrics_is_named(logger: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"metrics: expected IPOMetrics, .*, got dict"):
        write(logger, {}, 0, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("to_mlflow", "run: expected mlflow, with the method log_metrics, got str"),
        ("to_tensorboard", "writer: expected a SummaryWriter, with the method add_scalar, got str"),
        ("to_wandb", "run: expected what wandb.init returned, with the method log, got str"),
    ],
)
def test_what_cannot_be_written_to_is_named(logger: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        getattr(loggers, logger)(metrics_of(0), "runs", 0)


def test_a_tensor_is_no_fact(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="reward: expected a number, a text, a boolean or None, go"):
        loggers.to_jsonl(metrics_of(0), tmp_path / "run.jsonl", 0, reward=torch.tensor(0.5))
    assert list(tmp_path.iterdir()) == []
