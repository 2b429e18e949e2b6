"""Draws docs/rules.png: loss and gradient of mask rules and policy terms, both signs of A."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

import ipo_ext
from ipo_ext import IPOConfig

PROBABILITY = 0.3  # the token's, under the policy that sampled it
KL_TAU = 0.05  # larger than the default, to be seen
RULES = {
    "ratio band (default)": IPOConfig(kl_tau=KL_TAU),
    "icepop(0.5, 2)": IPOConfig.icepop(0.5, 2),
    "dppo(0.2, 0.2)": IPOConfig.dppo(kl_tau=KL_TAU),
    "prob_diff(0.1)": IPOConfig.prob_diff(kl_tau=KL_TAU),
    "kpop(0.1)": IPOConfig.kpop(0.1, kl_tau=KL_TAU),
    "ipo(0.3)": IPOConfig.ipo(0.3),
    "ppo(0.8, 1.2)": IPOConfig.ppo(0.8, 1.2),
    "cispo(0.5, 2)": IPOConfig.cispo(0.5, 2),
}
COLUMNS = 4
LOSS, GRADIENT, GREY = "#0072B2", "#D55E00", "#6b6b6b"  # Okabe and Ito's palette


def curves(config: IPOConfig, advantage: float) -> tuple[torch.Tensor, ...]:
    """Log-ratio, loss and gradient of single tokens; NaN where either jumps."""
    x = torch.linspace(-2.5, -math.log(PROBABILITY) - 1e-3, 2001)
    inference = torch.full_like(x, math.log(PROBABILITY))
    trainer = (inference + x).requires_grad_()
    constants = (inference, torch.full_like(x, advantage), torch.ones_like(x, dtype=torch.bool))
    every_token = torch.arange(len(x) + 1, dtype=torch.int32)
    output = ipo_ext.ipo_loss(trainer, *constants, cu_seqlens=every_token, config=config)
    (gradient,) = torch.autograd.grad(output.loss, trainer)
    loss = output.metrics["pg_loss"] + output.metrics["kl_loss"]
    return x, _with_gaps(loss), _with_gaps(gradient)


def _with_gaps(values: torch.Tensor) -> torch.Tensor:
    jumps = values.diff().abs() > 0.05
    return torch.where(torch.cat([jumps, jumps.new_zeros(1)]), math.nan, values)


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = 2 * len(RULES) // COLUMNS  # a pair for each row of rules
    size = (13, 2.5 * rows)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=size, dpi=110, sharex=True, sharey=True)
    for place, (name, config) in enumerate(RULES.items()):
        row, column = 2 * (place // COLUMNS), place % COLUMNS
        for below, advantage in enumerate((1.0, -1.0)):
            _panel(grid[row + below][column], *curves(config, advantage))
            if column == 0:
                grid[row + below][0].set_ylabel(f"A = {advantage:+g}")
        grid[row][column].set_title(name, fontsize=11)
        grid[-1][column].set_xlabel("log-ratio x")
    grid[0][0].legend(loc="upper left", frameon=False, fontsize=9)
    figure.suptitle(
        f"One token that was sampled with probability {PROBABILITY:g}: its loss, and the gradient "
        f"by its log-probability (kl_tau = {KL_TAU:g}; icepop, ipo, ppo and cispo have no KL)",
        fontsize=12,
    )
    figure.tight_layout()
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def _panel(axes: Any, x: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor) -> None:
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.axvline(0, color=GREY, linewidth=0.6, linestyle=":")
    axes.plot(x, loss, color=LOSS, linewidth=1.8, label="loss")
    axes.plot(x, gradient, color=GRADIENT, linewidth=1.8, linestyle="--", label="gradient")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw(Path(__file__).parent / "rules.png")
