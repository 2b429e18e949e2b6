"""What ipo_loss_from_hidden is compared with: full logits, eager and compiled; chunked schemes.

None of them makes metrics or skips a token that does not train; where a dropped token's ratio
overflows, the gradient of most is NaN.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import ipo_ext
from ipo_ext import IPOConfig

CONFIG = IPOConfig()
IGNORED_LABEL = -100


# ---- A batch ----


class Batch(NamedTuple):
    hidden: torch.Tensor  # [N, H], requires grad
    weight: torch.Tensor  # [V, H], requires grad
    labels: torch.Tensor  # [N], as all that follow
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    num_active: int  # known to the data loader

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden, self.weight


def make_batch(
    tokens: int,
    width: int,
    vocabulary: int,
    *,
    active: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Batch:
    """Random tokens, a share of them active; about 2% of the active ones are dropped.

    No log-ratio lies near the band's ends, where logits rounded to bf16 could decide otherwise:
    every provider has to keep the same tokens.
    """
    random = torch.Generator(device).manual_seed(seed)
    like: dict[str, Any] = {"generator": random, "device": device}
    hidden = torch.randn(tokens, width, **like).to(dtype)
    weight = torch.randn(vocabulary, width, **like).div_(width**0.5).to(dtype)
    labels = torch.randint(vocabulary, (tokens,), **like)
    log_ratio = torch.randn(tokens, **like) * 0.7
    for bound in CONFIG.log_bounds(torch.float32):
        near = (log_ratio - bound).abs() < 0.25
        log_ratio = torch.where(near, torch.full_like(log_ratio, bound * 0.8), log_ratio)
    num_active = round(tokens * active)
    loss_mask = torch.zeros(tokens, dtype=torch.bool, device=device)
    loss_mask[torch.randperm(tokens, **like)[:num_active]] = True
    advantages = torch.randn(tokens, **like)
    trainer, _ = ipo_ext.linear_token_logprobs(hidden, weight, labels)
    return Batch(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        labels=labels,
        inference_logprobs=trainer - log_ratio,
        advantages=advantages,
        loss_mask=loss_mask,
        num_active=num_active,
    )


# ---- The loss over all of the logits ----


def full_logits(batch: Batch) -> torch.Tensor:
    """The whole logits in fp32, their log-softmax, the loss of every row; unwanted rows give 0."""
    return _from_full_logits(*batch[:6])


def _from_full_logits(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *constants: torch.Tensor
) -> torch.Tensor:
    logprobs = torch.log_softmax(F.linear(hidden, weight), -1, dtype=torch.float32)
    return _loss(logprobs.gather(-1, labels[:, None]).squeeze(-1), *constants)


def _loss(
    trainer_logprobs: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
) -> torch.Tensor:
    log_ratio = trainer_logprobs - inference_logprobs
    low, high = CONFIG.log_bounds(torch.float32)
    keep = loss_mask & (log_ratio >= low) & (log_ratio <= high)
    per_token = CONFIG.kl_tau * log_ratio**2 - advantages * log_ratio.exp()
    return torch.where(keep, per_token, 0.0).sum()


# ---- prime-rl's scheme ----

TOKEN_CHUNK = 8192  # what it chooses for reinforcement learning
VOCABULARY_CHUNK = 8192


def sequence_by_vocabulary(batch: Batch) -> torch.Tensor:
    """prime-rl's scheme, rendered anew: chunks of tokens by chunks of the vocabulary, twice.

    Forward keeps a running maximum and sum of exponentials; backward makes each block of logits
    again: four matrix products, elementwise work in fp32 and unfused.
    """
    blockwise: Any = _BlockwiseLogprobs.apply
    return _loss(blockwise(*batch[:3]), *batch[3:6])


class _BlockwiseLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        pieces = [
            _logprobs_and_log_sum(states, weight, targets)
            for states, targets in zip(
                hidden.split(TOKEN_CHUNK), labels.split(TOKEN_CHUNK), strict=True
            )
        ]
        logprobs, log_sum = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        ctx.save_for_backward(hidden, weight, labels, log_sum)
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad_logprobs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, log_sum = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for begin in range(0, len(hidden), TOKEN_CHUNK):
            rows = slice(begin, begin + TOKEN_CHUNK)
            states, upstream = hidden[rows], grad_logprobs[rows, None]
            for first in range(0, len(weight), VOCABULARY_CHUNK):
                columns = slice(first, first + VOCABULARY_CHUNK)
                logits = (states @ weight[columns].t()).float()
                gradient = -upstream * torch.exp(logits - log_sum[rows, None])
                inside, column = _columns_of(labels[rows], first, len(weight[columns]))
                gradient[inside, column] += upstream[inside, 0]
                gradient = gradient.to(hidden.dtype)
                grad_hidden[rows].add_(gradient @ weight[columns])
                grad_weight[columns].add_(gradient.t() @ states)
        return grad_hidden, grad_weight, None


def _logprobs_and_log_sum(
    states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    maximum = states.new_full((len(states),), -torch.inf, dtype=torch.float32)
    total, target = torch.zeros_like(maximum), torch.zeros_like(maximum)
    for first in range(0, len(weight), VOCABULARY_CHUNK):
        block = weight[first : first + VOCABULARY_CHUNK]
        logits = (states @ block.t()).float()
        largest = torch.maximum(maximum, logits.amax(-1))
        total = total * torch.exp(maximum - largest) + torch.exp(logits - largest[:, None]).sum(-1)
        maximum = largest
        inside, column = _columns_of(labels, first, len(block))
        target[inside] = logits[inside, column]
    log_sum = maximum + total.log()
    return target - log_sum, log_sum


def _columns_of(labels: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels lie in a block of the vocabulary, and where."""
    inside = ((labels >= first) & (labels < first + count)).nonzero().squeeze(-1)
    return inside, labels[inside] - first


# ---- Cross-entropies of the same shape ----


def cross_entropy(batch: Batch) -> torch.Tensor:
    """What the libraries below compute; never timed."""
    logits = F.linear(*batch.leaves).float()
    return F.cross_entropy(logits, _labels(batch), reduction="sum")


def torch_linear_cross_entropy(batch: Batch) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        *batch.leaves,
        _labels(batch),
        reduction="sum",
        ignore_index=IGNORED_LABEL,
        options=options,
    )


def liger() -> Callable[[Batch], torch.Tensor]:
    library: Any = importlib.import_module("liger_kernel.transformers")
    loss = library.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED_LABEL, reduction="sum")
    return lambda batch: loss(batch.weight, batch.hidden, _labels(batch))


def quack() -> Callable[[Batch], torch.Tensor]:
    library: Any = importlib.import_module("quack.linear_cross_entropy")
    loss = functools.partial(library.chunked_linear_cross_entropy, reduction="sum")
    return lambda batch: loss(*batch.leaves, _labels(batch), ignore_index=IGNORED_LABEL)


def cut_cross_entropy() -> Callable[[Batch], torch.Tensor]:
    library: Any = importlib.import_module("cut_cross_entropy")
    loss = functools.partial(library.linear_cross_entropy, reduction="sum")
    return lambda batch: loss(*batch.leaves, _labels(batch), ignore_index=IGNORED_LABEL)


def _labels(batch: Batch) -> torch.Tensor:
    return torch.where(batch.loss_mask, batch.labels, IGNORED_LABEL)


# ---- Compiled ----


def compiled() -> Callable[[Batch], torch.Tensor]:
    """`full_logits` by torch.compile, for the shapes of the batches it gets."""
    function = torch.compile(_from_full_logits, dynamic=False, fullgraph=True)
    return lambda batch: function(*batch[:6])
