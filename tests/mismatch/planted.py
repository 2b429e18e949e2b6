"""A tiny policy in the part of engine and trainer, and what an engine may do to log-probabilities.

The engine's values come from transformers' own logits, not from the operators that are tested.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 96
PROMPT, ANSWER, ROLLOUTS = 5, 24, 40


def policy(seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    """A random transformer whose logits have a standard deviation of about 2, as real ones have."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.35 / model.lm_head.weight.std())
    return model


def moved(model: LlamaForCausalLM, by: float, names: str = "") -> LlamaForCausalLM:
    """A copy whose weights differ by noise of a share ``by`` of their size; all, or one name's."""
    copy = policy()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in copy.named_parameters():
            if names in name:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(by * weight.std().nan_to_num(1.0) * noise)
    return copy


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Answers of an engine, with the logits ``[rollouts, answer, V]`` that it sampled from."""

    prompts: torch.Tensor
    answers: torch.Tensor
    logits: torch.Tensor

    def logprobs(self, processed: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Any:
        """float32 ``[rollouts, answer]``, of the logits or of what ``processed`` makes of them."""
        logits = self.logits if processed is None else processed(self.logits)
        return logits.log_softmax(-1).gather(-1, self.answers[..., None])[..., 0]

    def rows(self, logprobs: Any, **known: Any) -> list[dict[str, Any]]:
        """In the package's own format."""
        values = logprobs.tolist() if isinstance(logprobs, torch.Tensor) else logprobs
        return [
            {
                "prompt_token_ids": prompt.tolist(),
                "token_ids": answer.tolist(),
                "logprobs": of_answer,
                **known,
            }
            for prompt, answer, of_answer in zip(self.prompts, self.answers, values, strict=True)
        ]


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, processed: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Sampled:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(VOCABULARY, (ROLLOUTS, PROMPT), generator=generator)
    ids = prompts
    for _ in range(ANSWER):
        logits = model(input_ids=ids).logits[:, -1]
        p = (logits if processed is None else processed(logits)).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    logits = model(input_ids=ids).logits[:, PROMPT - 1 : -1]
    return Sampled(prompts, ids[:, PROMPT:], logits)


def top_p(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits of which the likeliest tokens stay, until they hold ``share``; at least one."""

    def processed(logits: torch.Tensor) -> torch.Tensor:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        dropped = ordered.cumsum(-1) - ordered >= share
        return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -math.inf)

    return processed


def top_k(k: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def processed(logits: torch.Tensor) -> torch.Tensor:
        least = logits.topk(k, -1).values[..., -1:]
        return logits.masked_fill(logits < least, -math.inf)

    return processed


def rounded(logprobs: torch.Tensor, deviation: float) -> torch.Tensor:
    """As low precision changes them: the more, the less certain a token is; still at most 0."""
    drawn = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(3))
    return (logprobs - deviation * logprobs.expm1() * drawn).clamp(max=-1e-6)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def min_p(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def processed(logits: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(-1)
        return logits.masked_fill(p < share * p.amax(-1, keepdim=True), -math.inf)

    return processed
