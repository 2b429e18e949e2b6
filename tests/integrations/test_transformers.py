"""transformers: its Trainer in bf16, heads in the place of its models' own, and what they mean."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
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

from ipo_ext import IPOLMHead, IPOMetrics, IPOOutput, LossBatch, reference
from tests.support.host_casts import Policy, inputs

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from models import heads, tiny

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
# A head in the place of a model's own


def model_with_our_head(*, tied: bool) -> LlamaForCausalLM:
    model: Any = tiny.tiny_model(LlamaForCausalLM, tie_word_embeddings=tied)
    model.lm_head = IPOLMHead(model.lm_head)
    return model


def shares_its_embedding(model: Any) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def constants_of(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Labels, inference log-probabilities of which some are far off, advantages, mask."""
    tokens = tiny.tokens()
    numbers = torch.linspace(-3, 3, tokens.numel()).view(tokens.shape)
    logprobs = logits.detach().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    return tokens, logprobs + numbers, numbers, torch.ones_like(tokens, dtype=torch.bool)


def loss_of(model: Any) -> torch.Tensor:
    hidden = model.model(tiny.tokens()).last_hidden_state
    loss: torch.Tensor = model.lm_head(hidden, *constants_of(model(tiny.tokens()).logits)).loss
    return loss


def assert_its_loss_is_that_of_its_logits(model: Any) -> None:
    logits = model(tiny.tokens()).logits
    constants = constants_of(logits)
    ours = loss_of(model)
    expected = reference.ipo_loss_from_logits(logits, *constants).loss
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_our_head_is_saved_and_loaded(tmp_path: Path, *, tied: bool) -> None:
    model = model_with_our_head(tied=tied)
    assert shares_its_embedding(model) == tied
    assert_its_loss_is_that_of_its_logits(model)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded.lm_head) is nn.Linear
    assert shares_its_embedding(loaded) == tied
    assert torch.equal(loaded(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_a_tied_head_follows_its_embedding_when_that_is_resized() -> None:
    model = model_with_our_head(tied=True)
    model.resize_token_embeddings(tiny.VOCABULARY + 8)
    assert type(model.lm_head) is IPOLMHead
    assert model.lm_head.weight.shape[0] == tiny.VOCABULARY + 8
    assert shares_its_embedding(model)
    assert_its_loss_is_that_of_its_logits(model)


def test_a_head_of_its_own_is_resized_before_ours_takes_its_place() -> None:
    model = model_with_our_head(tied=False)
    with pytest.raises(TypeError, match=r"language model head is of type .*IPOLMHead.*not an inst"):
        model.resize_token_embeddings(tiny.VOCABULARY + 8)
    model = tiny.tiny_model(LlamaForCausalLM, tie_word_embeddings=False)
    model.resize_token_embeddings(tiny.VOCABULARY + 8)
    model.lm_head = IPOLMHead(model.lm_head)
    assert model.lm_head.weight.shape[0] == tiny.VOCABULARY + 8
    assert_its_loss_is_that_of_its_logits(model)


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_other_layers_train_beside_our_head(*, tied: bool) -> None:
    model = model_with_our_head(tied=tied)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert type(model.lm_head) is IPOLMHead
    assert not model.lm_head.weight.requires_grad
    loss_of(model).backward()
    assert model.lm_head.weight.grad is None
    trained = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert trained
    assert all(p.grad.any() for p in trained)


def test_a_head_that_peft_trains_as_a_whole_stays_ours() -> None:
    model = model_with_our_head(tied=False)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
    peft.get_peft_model(model, config)
    loss_of(model).backward()
    assert model.lm_head.modules_to_save["default"].weight.grad.any()
    assert model.lm_head.original_module.weight.grad is None


def test_an_adapter_on_our_head_is_refused() -> None:
    config = peft.LoraConfig(target_modules=["lm_head"], r=2)
    with pytest.raises(ValueError, match=r"Target module IPOLMHead\(.*is not supported"):
        peft.get_peft_model(model_with_our_head(tied=False), config)


@pytest.mark.parametrize(
    "how", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_our_head_on_an_adapted_one_is_refused(how: dict[str, Any]) -> None:
    model = tiny.tiny_model(LlamaForCausalLM, tie_word_embeddings=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"], **how}))
    with pytest.raises(TypeError, match=r"linear: .* got peft\..*merge its adapter"):
        IPOLMHead(model.lm_head)
    merged: Any = adapted.merge_and_unload()
    merged.lm_head = IPOLMHead(merged.lm_head)
    assert_its_loss_is_that_of_its_logits(merged)


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
