"""`ipo_ext.loggers.to_wandb` in a run of Weights & Biases, offline."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import wandb

from ipo_ext import HISTOGRAM_EDGES, ipo_loss, loggers


def test_every_metric_is_in_the_runs_summary(tmp_path: Path) -> None:
    metrics = ipo_loss(
        *torch.randn(3, 16), torch.ones(16, dtype=torch.bool), histogram=True
    ).metrics
    metrics.means[0] = math.nan  # which a logger of a run that breaks is asked for, too
    run = wandb.init(mode="offline", dir=tmp_path, project="loggers")
    loggers.to_wandb(metrics, run, 3)
    run.log({"reward": 0.5}, step=3)  # joins the same row
    run.log({"reward": 1.0}, step=4)  # ends the row before it
    summary = dict(run.summary)
    run.finish()
    found = {name: value for name, value in summary.items() if name.startswith("ipo/")}
    expected = metrics.tolist()
    assert metrics.histogram is not None
    histogram = dict(found.pop("ipo/log_ratio"))
    assert list(histogram["values"]) == metrics.histogram.tolist()
    assert list(histogram["bins"])[1:-1] == list(HISTOGRAM_EDGES[1:-1])
    assert set(found) == {f"ipo/{name}" for name in expected}
    assert math.isnan(found.pop("ipo/mismatch_kl"))
    assert found == {f"ipo/{name}": expected[name] for name in list(expected)[1:]}
    assert (summary["_step"], summary["reward"]) == (3, 0.5)
