"""What the loss from log-probabilities is compared with, and what each must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import ipo_ext
from benchmarks.harness.correctness import Expected
from benchmarks.harness.provider import Provider
from benchmarks.harness.step import Bind, Work, by_autograd
from benchmarks.logprobs import baselines
from benchmarks.logprobs.batch import Batch
from benchmarks.logprobs.cases import BYTES_PER_TOKEN

MOST_SEQUENCES = 512  # whose metrics are compared: the reference takes one after the other
LIMITS = {"loss": 1e-5, "gradient": 1e-5, "metrics": 1e-4}  # largest relative errors


def expected(batch: Batch) -> Expected:
    """By the reference, in float64."""
    packed = len(batch.lengths) <= MOST_SEQUENCES
    output = ipo_ext.reference.ipo_loss(
        *batch[:4],
        teacher_logprobs=batch.teacher_logprobs,
        cu_seqlens=batch.cu_seqlens if packed else None,
        normalizer=batch.loss_scale,
        config=batch.config,
        dtype=torch.float64,
    )
    (gradient,) = torch.autograd.grad(output.loss, batch.leaves)
    return Expected(
        loss=output.loss.item(),
        loss_scale=gradient.abs().sum().item(),  # the terms, not what is left of their sum
        gradients={"gradient": gradient},
        limits=LIMITS,
        metrics=output.metrics if packed else None,
        drops_tokens=True,
    )


def ours(batch: Batch) -> tuple[torch.Tensor, ipo_ext.IPOMetrics]:
    loss, metrics, *_ = ipo_ext.ipo_loss(
        batch.trainer_logprobs,
        batch.inference_logprobs,
        batch.advantages,
        batch.loss_mask,
        teacher_logprobs=batch.teacher_logprobs,
        cu_seqlens=batch.cu_seqlens,
        normalizer=batch.loss_scale,
        config=batch.config,
    )
    assert isinstance(metrics, ipo_ext.IPOMetrics)
    return loss, metrics


def read(outcome: tuple[torch.Tensor, Any]) -> Any:
    """Every metric in host memory, as each form gets there fastest."""
    _, metrics = outcome
    if metrics is None:
        return None
    if isinstance(metrics, ipo_ext.IPOMetrics):
        return metrics.tolist()
    return torch.stack(list(metrics.values())).tolist()


def copy(batch: Batch) -> Work:
    """A plain copy that moves as many bytes as the loss must, half of them read, half written."""
    count = len(batch.trainer_logprobs) * BYTES_PER_TOKEN // 8
    source = torch.rand(count, device=batch.trainer_logprobs.device)
    target = torch.empty_like(source)
    return Work(lambda: (None, None, target.copy_(source)))


def _provider(label: str, note: str, make: Callable[[], baselines.Call]) -> Provider:
    def bind() -> Bind:
        return by_autograd(make(), read)

    return Provider(label, f"forward, backward, {note}", bind, expected)


PROVIDERS = {
    "ipo_ext": _provider("ipo_ext", "all 14 metrics read", lambda: ours),
    "upstream_loop": _provider(
        "upstream's loop", "its 6 metrics read", lambda: baselines.upstream_loop
    ),
    "packed_eager": _provider("eager, packed", "no metrics", lambda: baselines.packed),
    "packed_compiled": _provider(
        "torch.compile, packed", "no metrics", lambda: baselines.compiled(baselines.packed)
    ),
    "packed_compiled_metrics": _provider(
        "torch.compile with metrics",
        "upstream's 6 metrics read",
        lambda: baselines.compiled(baselines.packed_with_metrics),
    ),
    "copy": Provider("copy", f"{BYTES_PER_TOKEN} bytes a token", lambda: copy, always=True),
}
