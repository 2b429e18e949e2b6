"""Times tier 2 on the CPU, forward and backward, against eager torch and torch.compile."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple

import timing
import torch

import ipo_ext
from ipo_ext import IPOConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG = IPOConfig()


class Batch(NamedTuple):
    logits: torch.Tensor  # [rows, columns], requires grad
    labels: torch.Tensor  # [rows], like the rest
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor


def make_batch(rows: int, columns: int, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, columns, generator=generator).mul(3).to(dtype)
    labels = torch.randint(columns, (rows,), generator=generator)
    logprobs, _ = ipo_ext.token_logprobs(logits, labels)
    inference = logprobs + 0.3 * torch.randn(rows, generator=generator)
    advantages = torch.randn(rows, generator=generator)
    mask = torch.ones(rows, dtype=torch.bool)  # what is left out would only flatter us
    return Batch(logits.requires_grad_(), labels, inference, advantages, mask)


def ours(batch: Batch) -> torch.Tensor:
    return ipo_ext.ipo_loss_from_logits(*batch, config=CONFIG).loss


def plain(batch: Batch) -> torch.Tensor:
    """The loss alone: no entropy, no metrics."""
    logits, labels, inference_logprobs, advantages, loss_mask = batch
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    x = log_p.gather(-1, labels[:, None]).squeeze(-1) - inference_logprobs
    low, high = CONFIG.log_bounds(torch.float32)
    keep = loss_mask & (x >= low) & (x <= high)
    x = torch.where(keep, x, 0)
    return torch.where(keep, -advantages * x.exp() + CONFIG.kl_tau * x**2, 0).sum()


def train_step(call: Callable[[Batch], torch.Tensor], batch: Batch) -> timing.Step:
    def step(mark: timing.Mark) -> object:
        loss = call(batch)
        mark()
        gradient = torch.autograd.grad(loss, batch.logits)
        mark()
        return gradient

    return step


def copy_step(batch: Batch) -> timing.Step:
    """The floor: the logits read once, as much written."""
    source = batch.logits.detach()

    def step(mark: timing.Mark) -> object:
        copy = source.clone()
        mark()
        return copy

    return step


def check(batch: Batch) -> None:
    """Both forms compute the same thing."""
    (mine,) = torch.autograd.grad(ours(batch), batch.logits)
    (theirs,) = torch.autograd.grad(plain(batch), batch.logits)
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10, help="for a dtype")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.rows} x {options.columns}, {options.threads} threads, forward and backward")
    for name, dtype in DTYPES.items():
        batch = make_batch(options.rows, options.columns, dtype)
        check(batch)
        compiled = torch.compile(functools.partial(plain))
        steps = {
            "ipo_ext": train_step(ours, batch),
            "eager": train_step(plain, batch),
            "torch.compile": train_step(compiled, batch),
            "copy": copy_step(batch),
        }
        plan = timing.Plan(seconds=options.seconds)
        subjects = {subject: [step] for subject, step in steps.items()}
        timings = timing.interleave(subjects, timing.WallClock(), plan)
        summaries = {
            subject: timing.summarise([sum(parts) for parts in durations])
            for subject, durations in timings.items()
        }
        for subject, summary in summaries.items():
            over = timing.ratio(summary, summaries["ipo_ext"])
            print(
                f"{name}  {subject:<14} {summary.median * 1e3:8.2f} ms "
                f"({summary.lower * 1e3:.2f} to {summary.upper * 1e3:.2f})  "
                f"{over.value:5.2f} x ipo_ext ({over.low:.2f} to {over.high:.2f})"
            )


if __name__ == "__main__":
    main()
