"""FlopCounterMode counts the products of the functions from hidden states: of active rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ipo_ext import IPOConfig, ipo_loss_from_hidden, linear_token_logprobs
from tests.support.backends import Backend

TOKENS, WIDTH, VOCABULARY, ACTIVE = 300, 16, 40, 170


def inputs(backend: Backend, hidden_grad: bool = True, weight_grad: bool = True) -> tuple[Any, ...]:
    torch.manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, device=backend.device, requires_grad=hidden_grad)
    weight = torch.randn(VOCABULARY, WIDTH, device=backend.device, requires_grad=weight_grad)
    labels = torch.randint(VOCABULARY, (TOKENS,), device=backend.device)
    mask = torch.randperm(TOKENS, device=backend.device) < ACTIVE
    return hidden, weight, labels, mask


def constants(labels: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logprobs = torch.full(labels.shape, -3.0, device=labels.device)
    return labels, logprobs, torch.ones_like(logprobs), mask


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def eager(rows: int, hidden_grad: bool, weight_grad: bool) -> int:
    """What the same counter sees of plain products of the rows."""
    hidden = torch.randn(rows, WIDTH, requires_grad=hidden_grad)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=weight_grad)

    def run() -> None:
        logits = F.linear(hidden, weight)
        if logits.requires_grad:
            logits.sum().backward()

    return counted(run)


@pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True), (False, False)])
def test_the_loss(backend: Backend, grads: tuple[bool, bool]) -> None:
    hidden, weight, labels, mask = inputs(backend, *grads)

    def run() -> None:
        loss = ipo_loss_from_hidden(hidden, weight, *constants(labels, mask), chunk_size=64).loss
        if any(grads):
            loss.backward()

    expected = 2 * ACTIVE * WIDTH * VOCABULARY * (1 + sum(grads))
    assert counted(run) == expected == eager(ACTIVE, *grads)


@pytest.mark.parametrize(("num_active", "rows"), [(ACTIVE, ACTIVE), (200, 200), (10**6, TOKENS)])
def test_rows_that_are_worked_on_in_vain_count(
    backend: Backend, num_active: int, rows: int
) -> None:
    hidden, weight, labels, mask = inputs(backend)
    arguments = (hidden, weight, *constants(labels, mask))
    found = counted(lambda: ipo_loss_from_hidden(*arguments, num_active=num_active))
    assert found == 3 * 2 * rows * WIDTH * VOCABULARY


def test_a_rollout_rule_makes_logits_twice(backend: Backend) -> None:
    hidden, weight, labels, mask = inputs(backend)
    config = IPOConfig(0.0, 1e30, rollout_min_ratio=1e-30)  # drops no rollout
    arguments = (hidden, weight, *constants(labels, mask))
    found = counted(lambda: ipo_loss_from_hidden(*arguments, config=config))
    assert found == 4 * 2 * ACTIVE * WIDTH * VOCABULARY


def test_log_probabilities(backend: Backend) -> None:
    hidden, weight, labels, mask = inputs(backend)
    labels = labels.masked_fill(~mask, -100)
    flows = torch.arange(TOKENS, device=backend.device) < 90
    pays = int((mask & flows).sum())
    one = 2 * WIDTH * VOCABULARY

    def run() -> None:
        logprobs, _ = linear_token_logprobs(hidden, weight, labels)
        (logprobs * flows).sum().backward()

    assert counted(run) == one * (ACTIVE + 3 * pays)


def test_shapes_alone_count_every_token(backend: Backend) -> None:
    hidden, weight, labels, mask = (tensor.to("meta") for tensor in inputs(backend))
    hidden.requires_grad_()
    found = counted(lambda: ipo_loss_from_hidden(hidden, weight, *constants(labels, mask)))
    assert found % (2 * TOKENS * WIDTH * VOCABULARY) == 0
    assert found > 0
