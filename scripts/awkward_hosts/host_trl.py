"""TRL's two trainers: the real ones, but for the model's log-probabilities and for vLLM."""

from __future__ import annotations

import functools
import os
import tempfile
from types import SimpleNamespace
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from measure import Batch
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import selective_log_softmax

grpo_trainer.VLLMGeneration = lambda **_: SimpleNamespace(sync_weights=lambda: None)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


@functools.cache
def trainer_of(options: tuple[tuple[str, Any], ...]) -> GRPOTrainer:
    sizes = {"vocab_size": 3, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return GRPOTrainer(
        model=transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **heads)),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=2,
            num_generations=2,
            use_vllm=True,
            use_cpu=True,
            bf16=False,
            report_to=[],
            **dict(options),
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a", "a"]}),
        processing_class=tokenizer(),
    )


def with_correction(**options: Any) -> Any:
    """What the engine returned goes through the trainer's own correction, then its loss."""

    def loss(batch: Batch) -> torch.Tensor:
        trainer = trainer_of(tuple(options.items()))
        rows = [[2] * len(row) for row in batch.mask]
        trainer._generate = lambda prompts: (
            [[2] for _ in rows],
            rows,
            batch.mask.long().tolist(),  # as an environment's tokens are masked
            ["a" for _ in rows],
            batch.sampled.tolist(),
            {},
            None,
            None,
        )
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
            batch.trainer if torch.is_grad_enabled() else batch.trainer.detach(),
            torch.zeros_like(batch.trainer),
            None,
        )
        trainer.current_gradient_accumulation_steps = 1
        inputs = trainer._generate_and_score_completions([{"prompt": "a"} for _ in rows])
        inputs["advantages"] = batch.advantages[:, 0]
        return trainer._compute_loss(trainer.model, inputs)

    return loss


def asynchronous(batch: Batch) -> torch.Tensor:
    """The flat loss terms that its collator packs, in ``AsyncGRPOTrainer.compute_loss``."""
    terms = batch.mask.flatten().nonzero()[:, 0]
    segments = batch.mask.nonzero()[:, 0]
    width = batch.mask.numel()
    zeros = torch.zeros(1, width, dtype=torch.long)
    packed = dict.fromkeys(("input_ids", "position_ids", "shift_labels"), zeros)
    inputs = packed | {
        "attention_mask": zeros + 1,
        "token_index": terms[None],
        "old_log_probs": batch.sampled.flatten()[terms][None],
        "advantages": batch.advantages.flatten()[terms][None],
        "segment_id": segments[None],
        "tree_max_seqlens": torch.tensor([[1, 1]]),
        "global_n_tokens": torch.tensor([float(len(terms))]),
        "global_n_forward_tokens": torch.tensor([float(width)]),
        "mean_seq_len": torch.tensor([4.0]),
    }
    for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k"):
        inputs[name] = zeros
    output = SimpleNamespace(
        log_probs=batch.trainer[None], entropy=torch.zeros_like(batch.trainer)[None]
    )
    trainer = SimpleNamespace(
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        accelerator=Accelerator(cpu=True),
        current_gradient_accumulation_steps=1,
        _metrics=trainer_of(())._metrics,
        _step_forward_tokens=0.0,
        _step_trained_tokens=0.0,
        _step_seq_len_weighted=0.0,
        _step_samples=0.0,
        _step_forward_s=0.0,
    )
    return AsyncGRPOTrainer.compute_loss(trainer, lambda **_: output, inputs)


LOSSES = {
    "`GRPOTrainer`, `sequence_mask` (its default)": with_correction(),
    "`GRPOTrainer`, `token_mask`": with_correction(vllm_importance_sampling_mode="token_mask"),
    "`GRPOTrainer`, `token_truncate`": with_correction(
        vllm_importance_sampling_mode="token_truncate"
    ),
    "`AsyncGRPOTrainer`": asynchronous,
}
LOGPROBS = {"`selective_log_softmax`": selective_log_softmax}
