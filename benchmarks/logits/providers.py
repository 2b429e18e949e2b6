"""What the loss from logits is compared with, and what each must give.

Some are cross entropies by kernels that know no IPO: another loss, which moves the same bytes.
What is not ours computes the loss alone: no entropy, no metrics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

import ipo_ext
from benchmarks.harness.correctness import Expected
from benchmarks.harness.provider import Provider
from benchmarks.harness.step import Bind, Gradients, Outcome, Work, loss_by_autograd, on_a_copy
from benchmarks.logits.batch import CONFIG, Batch
from ipo_ext import reference

SLAB = 2**22  # logits whose expected gradient is made at once, in float64

Loss = Callable[[Batch], torch.Tensor]


# ---- What must come out ----


def exact(batch: Batch) -> torch.Tensor:
    return reference.ipo_loss_from_logits(*batch, config=CONFIG, dtype=torch.float64).loss


def exact_cross_entropy(batch: Batch) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(batch.logits, batch.labels, reduction="sum")


def expected(loss: Loss, batch: Batch) -> Expected:
    """By a loss of float64 logits, a slab of rows at a time."""
    rows, columns = batch.logits.shape
    step = max(1, SLAB // columns)
    total, gradients = 0.0, []
    for begin in range(0, rows, step):
        part = Batch(*(tensor[begin : begin + step] for tensor in batch))
        part = part._replace(logits=part.logits.detach().double().requires_grad_())
        value = loss(part)
        total += value.item()
        gradients.append(torch.autograd.grad(value, part.leaves)[0].float())
    is_bf16 = batch.logits.dtype == torch.bfloat16
    return Expected(
        loss=total,
        loss_scale=rows,  # terms of about 1
        gradients={"gradient": torch.cat(gradients)},
        limits={"loss": 1e-5, "gradient": 5e-3 if is_bf16 else 1e-5},  # bf16 rounds by 1e-3
    )


of_the_loss = functools.partial(expected, exact)
of_cross_entropy = functools.partial(expected, exact_cross_entropy)


# ---- What makes it ----


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


def liger() -> Bind:
    from liger_kernel.transformers.functional import liger_cross_entropy

    bind = loss_by_autograd(
        lambda batch: liger_cross_entropy(batch.logits, batch.labels, reduction="sum")
    )
    return on_a_copy(bind)  # its gradient is written over the logits


def quack() -> Bind:
    from quack.cross_entropy import cross_entropy_fwd

    def bind(batch: Batch) -> Work:
        logits = batch.logits.detach()

        def forward() -> Outcome:
            losses, gradient = cross_entropy_fwd(logits, batch.labels, return_dx=True)
            return losses.sum(), None, gradient

        def backward(outcome: Outcome, grad_out: torch.Tensor | None) -> Gradients:
            gradient = outcome[2]
            return (gradient if grad_out is None else gradient * grad_out,)

        return Work(forward, backward)

    return bind


def copy(batch: Batch) -> Work:
    """The logits read once, as much written, to new memory as a gradient is."""
    source = batch.logits.detach()
    return Work(lambda: (None, None, source.clone()))


PROVIDERS = {
    "ipo_ext": Provider(
        "ipo_ext", "loss, entropy and all metrics", lambda: loss_by_autograd(ours), of_the_loss
    ),
    "eager": Provider("eager", "the loss alone", lambda: loss_by_autograd(plain), of_the_loss),
    "compiled": Provider(
        "torch.compile",
        "the loss alone, for the exact shape, warm",
        lambda: loss_by_autograd(torch.compile(plain, dynamic=False, fullgraph=True)),
        of_the_loss,
    ),
    "liger": Provider(
        "Liger-Kernel",
        "cross entropy, its gradient over the logits; needs a GPU",
        liger,
        of_cross_entropy,
        needs_gpu=True,
    ),
    "quack": Provider(
        "QuACK",
        "cross entropy, its gradient in the same pass; needs a GPU",
        quack,
        of_cross_entropy,
        needs_gpu=True,
    ),
    "copy": Provider("copy", "one read and one write of the logits", lambda: copy, always=True),
}
