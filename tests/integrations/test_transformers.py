"""transformers' Trainer in bf16, with a model that gives an ``IPOOutput``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import nested_concat, nested_detach

from ipo_ext import IPOMetrics, IPOOutput, LossBatch
from tests.support.host_casts import Policy, inputs


class NamedInputs(Policy):
    """With arguments by name, by which the Trainer picks from an example."""

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        inference_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        loss_mask: torch.Tensor,
        teacher_logprobs: torch.Tensor,
    ) -> IPOOutput:
        batch = LossBatch(
            inference_logprobs, advantages, loss_mask, teacher_logprobs=teacher_logprobs
        )
        return super().forward(hidden, labels, batch)


def example(seed: int) -> dict[str, torch.Tensor]:
    hidden, labels, others = inputs(seed)
    names = ("inference_logprobs", "advantages", "loss_mask", "teacher_logprobs")
    return {"hidden": hidden, "labels": labels, **{name: others[name] for name in names}}


class Recording(Trainer):
    def __init__(self, **options: Any) -> None:
        args = TrainingArguments(
            bf16=True,
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            learning_rate=0.1,
            logging_steps=1,
            report_to=[],
        )
        data = [example(seed) for seed in range(4)]
        super().__init__(NamedInputs(), args, train_dataset=data, eval_dataset=data, **options)
        self.kept: list[IPOMetrics] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        self.kept.append(outputs.metrics)
        return (loss, outputs) if return_outputs else loss


def assert_whole(metrics: Any) -> None:
    assert type(metrics) is IPOMetrics
    assert metrics.sums.dtype == torch.float64


def test_it_trains() -> None:
    trainer = Recording()
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert not any(map(torch.equal, before, trainer.model.parameters()))
    assert len(trainer.kept) == 2
    for metrics in (*trainer.kept, sum(trainer.kept)):
        assert_whole(metrics)
    assert sum(trainer.kept)["is_masked"].isfinite()


def test_it_evaluates() -> None:
    trainer = Recording()
    loss = trainer.evaluate()["eval_loss"]
    expected = [NamedInputs()(**batch).loss for batch in trainer.get_eval_dataloader()]
    assert loss == pytest.approx(torch.stack(expected).mean().item(), rel=2e-2)  # autocast
    assert len(trainer.kept) == 2
    assert_whole(sum(trainer.kept))


def test_predictions_with_metrics_are_refused() -> None:
    """It gathers and concatenates all that follows the loss, where ``compute_metrics`` asks."""
    trainer = Recording(compute_metrics=lambda predictions: {})
    with pytest.raises(TypeError, match=r"Unsupported types .*IPOMetrics"):
        trainer.evaluate()


def test_nested_functions() -> None:
    hidden, labels, others = inputs(0)
    output = Policy()(hidden, labels, **others)
    metrics, *_ = nested_detach(output[1:])
    assert metrics is output.metrics
    with pytest.raises(TypeError, match=r"Unsupported type for concatenation: .*IPOMetrics"):
        nested_concat(metrics, metrics)
