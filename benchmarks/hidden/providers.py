"""What the loss from hidden states is compared with, and what each must give."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

import ipo_ext
from benchmarks.harness.correctness import Expected
from benchmarks.harness.provider import Provider
from benchmarks.harness.step import Bind, Gradients, Outcome, Work, loss_by_autograd
from benchmarks.hidden import baselines
from benchmarks.hidden.baselines import Loss
from benchmarks.hidden.batch import CONFIG, Batch


def expected(loss_of: Loss, batch: Batch) -> Expected:
    """By full logits in fp32, which its tests hold against fp64."""
    hidden, weight, *rest = batch
    exact = Batch(*(leaf.detach().float().requires_grad_() for leaf in (hidden, weight)), *rest)
    loss = loss_of(exact)
    gradients = torch.autograd.grad(loss, exact.leaves)
    limit = 1e-4 if hidden.dtype == torch.float32 else 3e-2
    return Expected(
        loss=loss.item(),
        loss_scale=abs(loss.item()),
        gradients=dict(zip(("grad_hidden", "grad_weight"), gradients, strict=True)),
        limits=dict.fromkeys(("loss", "grad_hidden", "grad_weight"), limit),
    )


of_the_loss = functools.partial(expected, baselines.full_logits)
of_cross_entropy = functools.partial(expected, baselines.cross_entropy)


def ours(batch: Batch) -> torch.Tensor:
    *operands, num_active = batch
    return ipo_ext.ipo_loss_from_hidden(*operands, num_active=num_active, config=CONFIG).loss


def products(batch: Batch) -> Work:
    """Logits, then both gradients, by torch.mm on the active rows."""
    states = batch.hidden.detach()[: batch.num_active]
    weight = batch.weight.detach()

    def forward() -> Outcome:
        return None, None, states @ weight.t()

    def backward(outcome: Outcome, grad_out: torch.Tensor | None) -> Gradients:
        logits = outcome[2]
        return logits @ weight, logits.t() @ states

    return Work(forward, backward)


def _provider(label: str, note: str, make: Callable[[], Loss]) -> Provider:
    def bind() -> Bind:
        return loss_by_autograd(make())

    return Provider(label, note, bind, of_the_loss)


def _cross_entropy(
    label: str, note: str, make: Callable[[], Loss], *, needs_gpu: bool = True
) -> Provider:
    def bind() -> Bind:
        return loss_by_autograd(make())

    return Provider(label, f"a cross-entropy, {note}", bind, of_cross_entropy, needs_gpu)


CHUNKED = "chunked, gradients made in forward"
PROVIDERS = {
    "ipo_ext": _provider(
        "ipo_ext",
        "ipo_loss_from_hidden: the loss, all metrics, log-probabilities and entropy",
        lambda: ours,
    ),
    "eager": _provider(
        "eager, full logits",
        "the logits, their log-softmax in fp32, the loss alone",
        lambda: baselines.full_logits,
    ),
    "compiled": _provider(
        "torch.compile, full logits",
        "the same by torch.compile, for the exact shape, warm",
        baselines.compiled,
    ),
    "blockwise": _provider(
        "prime-rl's scheme",
        "8192 tokens by 8192 words at a time, fp32, logits made again in backward",
        lambda: baselines.sequence_by_vocabulary,
    ),
    "torch_lce": _cross_entropy(
        "F.linear_cross_entropy",
        CHUNKED,
        lambda: baselines.torch_linear_cross_entropy,
        needs_gpu=False,
    ),
    "liger": _cross_entropy("Liger-Kernel", CHUNKED, baselines.liger),
    "quack": _cross_entropy("QuACK", CHUNKED, baselines.quack),
    "cce": _cross_entropy(
        "cut-cross-entropy",
        "logits made again in backward, small gradients left out",
        baselines.cut_cross_entropy,
    ),
    "products": Provider(
        "three matrix products",
        "the floor: logits, then both gradients, by torch.mm on the active rows, no loss",
        lambda: products,
    ),
}
SKIP_INACTIVE = ("ipo_ext", "products", "cce")  # the others work on every row
