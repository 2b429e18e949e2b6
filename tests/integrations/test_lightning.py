"""Lightning in bf16, with a module that gives an ``IPOOutput``: metrics come through whole."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import DataLoader

from ipo_ext import IPOMetrics, IPOOutput, LossBatch
from tests.support.host_casts import Policy, inputs


def output_of(model: Any, seed: int) -> IPOOutput:
    hidden, labels, others = inputs(seed)
    return model(hidden.to(model.head.weight.dtype), labels, LossBatch(**others))


def assert_whole(metrics: Any) -> None:
    assert type(metrics) is IPOMetrics
    assert metrics.sums.dtype == torch.float64


class Recording(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy()
        self.kept: list[IPOMetrics] = []

    def training_step(self, batch: torch.Tensor, index: int) -> dict[str, Any]:
        output = output_of(self.policy, seed=index)
        self.log_dict(output.metrics)
        return {"loss": output.loss, "metrics": output.metrics}

    def on_train_batch_end(self, outputs: dict[str, Any], batch: Any, index: int) -> None:
        self.kept.append(outputs["metrics"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_trainer(precision: str) -> None:
    module = Recording()
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.arange(2.0)))
    assert len(module.kept) == 2
    for metrics in (*module.kept, sum(module.kept)):
        assert_whole(metrics)
    last = module.kept[-1]
    assert trainer.callback_metrics.keys() == last.keys()
    assert trainer.callback_metrics["ess"].item() == pytest.approx(last["ess"].item(), rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_fabric(precision: str) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    output = output_of(fabric.setup(Policy()), seed=0)
    assert type(output) is IPOOutput
    assert_whole(output.metrics)
    fabric.backward(output.loss)


def test_collections() -> None:
    output = output_of(Policy(), seed=0)
    rounded = apply_to_collection(output, torch.Tensor, torch.Tensor.bfloat16)
    assert rounded.loss.dtype == torch.bfloat16
    assert rounded.metrics is output.metrics
    moved = move_data_to_device(output, torch.device("meta")).metrics
    assert_whole(moved)
    assert moved.sums.is_meta
