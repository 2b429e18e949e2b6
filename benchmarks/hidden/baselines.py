"""Other implementations of the loss from hidden states, and cross-entropies of the same shape.

None of them makes metrics, and only cut-cross-entropy skips tokens that do not train; where a
dropped token's ratio overflows, the gradient of most is NaN.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.hidden.batch import CONFIG, Batch

IGNORED_LABEL = -100

Loss = Callable[[Batch], torch.Tensor]


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

    Forward keeps a running row maximum and sum of exponentials; backward makes each block of logits
    again: four matrix products, elementwise work in fp32 and unfused.
    """
    blockwise: Any = _BlockwiseLogprobs.apply
    return _loss(blockwise(*batch[:3]), *batch[3:6])


class _BlockwiseLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        chunks = [
            _logprobs_and_log_sum(states, weight, targets)
            for states, targets in zip(
                hidden.split(TOKEN_CHUNK), labels.split(TOKEN_CHUNK), strict=True
            )
        ]
        logprobs, log_sum = (torch.cat(of_chunks) for of_chunks in zip(*chunks, strict=True))
        ctx.save_for_backward(hidden, weight, labels, log_sum)
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad_logprobs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, log_sum = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for begin in range(0, len(hidden), TOKEN_CHUNK):
            rows = slice(begin, begin + TOKEN_CHUNK)
            states, grad_logprob = hidden[rows], grad_logprobs[rows, None]
            for first in range(0, len(weight), VOCABULARY_CHUNK):
                columns = slice(first, first + VOCABULARY_CHUNK)
                logits = (states @ weight[columns].t()).float()
                gradient = -grad_logprob * torch.exp(logits - log_sum[rows, None])
                inside, column = _columns_of(labels[rows], first, len(weight[columns]))
                gradient[inside, column] += grad_logprob[inside, 0]
                gradient = gradient.to(hidden.dtype)
                grad_hidden[rows].add_(gradient @ weight[columns])
                grad_weight[columns].add_(gradient.t() @ states)
        return grad_hidden, grad_weight, None


def _logprobs_and_log_sum(
    states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    row_max = states.new_full((len(states),), -torch.inf, dtype=torch.float32)
    sum_exp, target = torch.zeros_like(row_max), torch.zeros_like(row_max)
    for first in range(0, len(weight), VOCABULARY_CHUNK):
        block = weight[first : first + VOCABULARY_CHUNK]
        logits = (states @ block.t()).float()
        new_max = torch.maximum(row_max, logits.amax(-1))
        of_block = torch.exp(logits - new_max[:, None]).sum(-1)
        sum_exp = sum_exp * torch.exp(row_max - new_max) + of_block
        row_max = new_max
        inside, column = _columns_of(labels, first, len(block))
        target[inside] = logits[inside, column]
    log_sum = row_max + sum_exp.log()
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


def liger() -> Loss:
    library: Any = importlib.import_module("liger_kernel.transformers")
    loss = library.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED_LABEL, reduction="sum")
    return lambda batch: loss(batch.weight, batch.hidden, _labels(batch))


def quack() -> Loss:
    library: Any = importlib.import_module("quack.linear_cross_entropy")
    loss = functools.partial(library.chunked_linear_cross_entropy, reduction="sum")
    return lambda batch: loss(*batch.leaves, _labels(batch), ignore_index=IGNORED_LABEL)


def cut_cross_entropy() -> Loss:
    library: Any = importlib.import_module("cut_cross_entropy")
    loss = functools.partial(library.linear_cross_entropy, reduction="sum")
    return lambda batch: loss(*batch.leaves, _labels(batch), ignore_index=IGNORED_LABEL)


def _labels(batch: Batch) -> torch.Tensor:
    return torch.where(batch.loss_mask, batch.labels, IGNORED_LABEL)


# ---- Compiled ----


def compiled() -> Loss:
    """`full_logits` by torch.compile, for the shapes of the batches it gets."""
    function = torch.compile(_from_full_logits, dynamic=False, fullgraph=True)
    return lambda batch: function(*batch[:6])
