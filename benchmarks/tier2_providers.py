"""The loss from logits by ipo_ext and by others, and cross entropy by kernels that know no IPO.

What is not ours computes the loss alone: no entropy, no metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import ipo_ext
from ipo_ext import IPOConfig, reference

CONFIG = IPOConfig()
SLAB = 2**22  # logits whose expected gradient is made at once, in float64


class Batch(NamedTuple):
    logits: torch.Tensor  # [rows, columns], requires grad
    labels: torch.Tensor  # [rows], like the rest
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor


def make_batch(rows: int, columns: int, dtype: torch.dtype, device: str) -> Batch:
    """Every row active, none dropped: what is left out would only flatter us."""
    random = torch.Generator(device).manual_seed(0)
    like = {"generator": random, "device": device}
    logits = torch.randn(rows, columns, **like).mul_(3).to(dtype)
    labels = torch.randint(columns, (rows,), **like)
    logprobs, _ = ipo_ext.token_logprobs(logits, labels)
    inference = logprobs + 0.3 * torch.randn(rows, **like)
    advantages = torch.randn(rows, **like)
    mask = torch.ones(rows, dtype=torch.bool, device=device)
    return Batch(logits.requires_grad_(), labels, inference, advantages, mask)


def elsewhere(batch: Batch) -> Batch:
    """A copy in other memory."""
    logits, *rest = (tensor.detach().clone() for tensor in batch)
    return Batch(logits.requires_grad_(), *rest)


# ---- Losses ----

Loss = Callable[[Batch], torch.Tensor]


def ours(batch: Batch) -> torch.Tensor:
    return ipo_ext.ipo_loss_from_logits(*batch, config=CONFIG).loss


def plain(batch: Batch) -> torch.Tensor:
    logits, labels, inference_logprobs, advantages, loss_mask = batch
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    x = log_p.gather(-1, labels[:, None]).squeeze(-1) - inference_logprobs
    low, high = CONFIG.log_bounds(torch.float32)
    keep = loss_mask & (x >= low) & (x <= high)
    x = torch.where(keep, x, 0)
    return torch.where(keep, -advantages * x.exp() + CONFIG.kl_tau * x**2, 0).sum()


def exact(batch: Batch) -> torch.Tensor:
    return reference.ipo_loss_from_logits(*batch, config=CONFIG, dtype=torch.float64).loss


def exact_cross_entropy(batch: Batch) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(batch.logits, batch.labels, reduction="sum")


def expected(loss: Loss, batch: Batch) -> tuple[float, torch.Tensor]:
    """Loss and gradient (rounded to fp32) by a loss of float64 logits, a slab of rows at a time."""
    rows, columns = batch.logits.shape
    step = max(1, SLAB // columns)
    total, gradients = 0.0, []
    for begin in range(0, rows, step):
        part = Batch(*(tensor[begin : begin + step] for tensor in batch))
        part = part._replace(logits=part.logits.detach().double().requires_grad_())
        value = loss(part)
        total += value.item()
        gradients.append(torch.autograd.grad(value, part.logits)[0].float())
    return total, torch.cat(gradients)


# ---- Providers ----

Backward = Callable[[torch.Tensor | None], torch.Tensor]  # grad_out -> the gradient by the logits
Forward = Callable[[Batch], tuple[torch.Tensor, Backward]]


class Provider(NamedTuple):
    label: str
    note: str
    make: Callable[[], Forward]  # raises where it cannot run
    expected: Loss = exact
    overwrites: bool = False  # its own logits, so that it needs a copy of them


def by_autograd(loss_of: Loss) -> Forward:
    def forward(batch: Batch) -> tuple[torch.Tensor, Backward]:
        loss = loss_of(batch)
        return loss, lambda grad_out: torch.autograd.grad(loss, batch.logits, grad_out)[0]

    return forward


def _liger() -> Forward:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return by_autograd(
        lambda batch: liger_cross_entropy(batch.logits, batch.labels, reduction="sum")
    )


def _quack() -> Forward:
    from quack.cross_entropy import cross_entropy_fwd

    def forward(batch: Batch) -> tuple[torch.Tensor, Backward]:
        losses, gradient = cross_entropy_fwd(batch.logits.detach(), batch.labels, return_dx=True)
        return losses.sum(), lambda grad_out: gradient if grad_out is None else gradient * grad_out

    return forward


PROVIDERS = {
    "ipo_ext": Provider("ipo_ext", "loss, entropy and all metrics", lambda: by_autograd(ours)),
    "eager": Provider("eager", "the loss alone", lambda: by_autograd(plain)),
    "compiled": Provider(
        "torch.compile",
        "the loss alone, for the exact shape, warm",
        lambda: by_autograd(torch.compile(plain, dynamic=False, fullgraph=True)),
    ),
    "liger": Provider(
        "Liger-Kernel",
        "cross entropy, its gradient over the logits; needs a GPU",
        _liger,
        exact_cross_entropy,
        overwrites=True,
    ),
    "quack": Provider(
        "QuACK",
        "cross entropy, its gradient in the same pass; needs a GPU",
        _quack,
        exact_cross_entropy,
    ),
}
