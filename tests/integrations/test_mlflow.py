"""`ipo_ext.loggers.to_mlflow` in a run of MLflow, whose store is a folder."""

from __future__ import annotations

import math
from pathlib import Path

import mlflow
import pytest
import torch

from ipo_ext import IPOMetrics, ipo_loss, loggers


def metrics() -> IPOMetrics:
    return ipo_loss(*torch.randn(3, 16), torch.ones(16, dtype=torch.bool)).metrics


def test_every_metric_is_in_the_runs_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its databases need more packages
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    steps = {3: metrics(), 4: metrics()}
    steps[4].means[0] = math.nan  # which a logger of a run that breaks is asked for, too
    with mlflow.start_run() as run:
        for step, measured in steps.items():
            loggers.to_mlflow(measured, mlflow, step)
    client = mlflow.MlflowClient()
    for name in steps[3].tolist():
        history = client.get_metric_history(run.info.run_id, f"ipo/{name}")
        found = {each.step: each.value for each in history}
        expected = {step: float(measured[name]) for step, measured in steps.items()}
        assert found == pytest.approx(expected, nan_ok=True)
    assert math.isnan(client.get_run(run.info.run_id).data.metrics["ipo/mismatch_kl"])
