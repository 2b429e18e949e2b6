"""A minute's proof that an installed package works: what check_wheel.py runs under every torch."""

from __future__ import annotations

import pytest
import torch

from backends import Backend
from cases import DTYPES, assert_same_bits, evaluate, random_case
from ipo_ext import _operators, ipo_loss, reference


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("segments", [None, "sevens"])
def test_loss_gradient_and_metrics(backend: Backend, dtypes: str, segments: str | None) -> None:
    case = random_case(
        2049, dtypes=DTYPES[dtypes], teacher=True, weights=True, segments=segments
    ).to(backend.device)
    ours = evaluate(case)
    exact = evaluate(case, reference.ipo_loss, dtype=torch.float64)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.gradient, exact.gradient)
    assert set(ours.metrics) == set(exact.metrics)
    for name in exact.metrics:
        torch.testing.assert_close(
            ours.metrics[name].double(), exact.metrics[name].double(), rtol=1e-5, atol=1e-6
        )


def test_compiled_equals_eager(backend: Backend) -> None:
    case = random_case(500, segments="empty-between", normalizer=7.5).to(backend.device)
    torch._dynamo.reset()
    function = torch.compile(ipo_loss, fullgraph=True, dynamic=True)
    assert_same_bits(evaluate(case, function), evaluate(case))


def test_opcheck(backend: Backend) -> None:
    case = random_case(100).to(backend.device)
    arguments = [case.trainer_logprobs.requires_grad_(), case.inference_logprobs]
    arguments += [case.advantages, case.loss_mask, None, None, None, None]
    arguments += [*case.config.log_bounds(torch.float32), 1.0, 1e-3, 0.0, True]
    torch.library.opcheck(_operators.library().ipo_loss, arguments)
