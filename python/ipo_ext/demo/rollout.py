"""Rollouts from a separate inference copy: frozen, rounded to low precision, computing in bf16.

Nothing is injected. The copy reports the log-probabilities that it sampled from, and they differ
from the trainer's because its weights are older, coarser, and multiplied in another precision.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from . import task
from .model import Policy

ROUNDINGS = ("none", "bf16", "fp8", "int8", "int4")
"""Storage of the copy's weight matrices. All but "none" (fp32 throughout) compute in bf16."""

LARGEST_VALUE = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
"""The magnitude that a group's largest weight is scaled to; fp8 is e4m3."""

SCALE_GROUP = 16
"""Consecutive weights of a row that share a scale."""


@dataclass(frozen=True)
class Rollouts:
    """B sampled sequences of T tokens; column t of the [B, T - 1] fields is about token t + 1."""

    tokens: Tensor
    """int64 [B, T], prompt and response."""
    loss_mask: Tensor
    """bool [B, T - 1], true on sampled tokens up to and including the first END."""
    inference_logprobs: Tensor
    """fp32 [B, T - 1], the sampler's own; 0 on the prompt."""
    rewards: Tensor
    """fp32 [B], 0 or 1."""


def round_weight(weight: Tensor, rounding: str) -> Tensor:
    """What `weight`, fp32 [out, in], reads back as from storage with a scale for each group."""
    if rounding == "bf16":
        return weight.bfloat16().float()
    groups = weight.reshape(weight.shape[0], -1, SCALE_GROUP)
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / LARGEST_VALUE[rounding]
    scaled = groups / scale
    stored = scaled.to(torch.float8_e4m3fn).float() if rounding == "fp8" else scaled.round()
    return (stored * scale).reshape_as(weight)


@torch.no_grad()
def inference_copy(policy: Policy, rounding: str) -> Policy:
    """A frozen copy of `policy` as an inference engine would hold it; see ROUNDINGS."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}; got {rounding!r}")
    sampler = copy.deepcopy(policy).requires_grad_(False)
    if rounding == "none":
        return sampler
    for parameter in sampler.parameters():
        if parameter.dim() == 2:  # norms and biases are kept in bf16, as is usual
            parameter.copy_(round_weight(parameter, rounding))
    return sampler.bfloat16()


@torch.no_grad()
def sample_rollouts(sampler: Policy, operands: Tensor, generator: torch.Generator) -> Rollouts:
    """One response at temperature 1 for every row of `operands`, int64 [B, 2]."""
    tokens = task.prompts(operands)
    sampled_logprobs = []
    # Always RESPONSE_LENGTH draws: what an arm samples never shifts the prompts it will see later.
    for _ in range(task.RESPONSE_LENGTH):
        logprobs = sampler.lm_head(sampler(tokens)[:, -1]).float().log_softmax(dim=-1)
        token = torch.multinomial(logprobs.exp(), num_samples=1, generator=generator)
        sampled_logprobs.append(logprobs.gather(1, token))
        tokens = torch.cat((tokens, token), dim=1)
    responses = tokens[:, task.PROMPT_LENGTH :]
    return Rollouts(
        tokens=tokens,
        loss_mask=_after_prompt(task.response_mask(responses)),
        inference_logprobs=_after_prompt(torch.cat(sampled_logprobs, dim=1)),
        rewards=task.verify(responses, operands),
    )


def _after_prompt(response_values: Tensor) -> Tensor:
    """[B, R] -> [B, T - 1] of the same dtype: zeros where a prompt token is predicted."""
    prompt_columns = task.PROMPT_LENGTH - 1
    return torch.nn.functional.pad(response_values, (prompt_columns, 0))
