"""transformers: its Trainer in bf16, and what its models do around their heads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Cohere2ForCausalLM,
    Gemma2ForCausalLM,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import nested_concat, nested_detach

from ipo_ext import IPOMetrics, IPOOutput, LossBatch
from tests.support.host_casts import Policy, inputs

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from models import heads

# -------------------------------------------------------------------------------------------------
# The Trainer


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


# -------------------------------------------------------------------------------------------------
# What models do around their heads: a sample; scripts/model_matrix.py runs all


class Unnamed(LlamaForCausalLM):
    """Multiplies its logits by a number that no setting holds."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = 0.7 * output.logits
        return output


class Clamps(LlamaForCausalLM):
    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits.clamp(-1, 1)
        return output


class ScaledConfig(LlamaConfig):
    output_multiplier: float | None = 1.0


class ScaledByASetting(LlamaForCausalLM):
    """Whose default is 1, and shows nothing."""

    config_class = ScaledConfig

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = self.config.output_multiplier * output.logits
        return output


SAMPLE: dict[type[PreTrainedModel], tuple[str, str, bool]] = {
    LlamaForCausalLM: (heads.WORKS, "", False),
    PhiForCausalLM: (heads.WORKS, "", True),
    Cohere2ForCausalLM: (heads.WITH_ARGUMENT, "logit_scale=config.logit_scale", False),
    GraniteForCausalLM: (heads.WITH_ARGUMENT, "logit_scale=1 / config.logits_scaling", False),
    Gemma2ForCausalLM: (heads.WITH_ARGUMENT, "softcap=config.final_logit_softcapping", False),
    ScaledByASetting: (heads.WITH_ARGUMENT, "logit_scale=config.output_multiplier", False),
}


@pytest.mark.parametrize("kind", SAMPLE, ids=lambda kind: kind.__name__)
def test_a_head_is_read_as_its_model_means_it(kind: type[PreTrainedModel]) -> None:
    outcome = heads.examine(kind)
    assert (outcome.verdict, outcome.arguments, outcome.has_bias) == SAMPLE[kind], outcome.note
    assert outcome.hidden == heads.AS_THEY_ARE


@pytest.mark.parametrize(
    ("kind", "why"), [(Unnamed, "a number that is no setting"), (Clamps, "no scaled or capped")]
)
def test_what_no_argument_says_is_refused(kind: type[PreTrainedModel], why: str) -> None:
    outcome = heads.examine(kind)
    assert outcome.verdict == heads.REFUSED
    assert why in outcome.note
