"""Logits of 16 bits far from 0, at any temperature: one fused multiply-add makes a term of each,
and neither its offset's rounding nor an infinity may show, on every path that a row can take."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from ipo_ext import reference
from tests.support.backends import Backend, parameters
from tests.support.cases import Evaluation, LogitsCase, evaluate
from tests.support.logits import NARROWER, WIDE_BAND
from tests.support.schedules import MULTIPROCESSORS, imagined_device

PATHS = {  # by the columns of a row and the multiprocessors that wait for one
    "resident": (300, 1),
    "pipelined": (82_001, 1),
    "splits": (9_000, 60),
}
LEAST = {dtype: torch.finfo(dtype).min for dtype in NARROWER}
LEAST_ROWS = 6  # so that a cluster has more than one
OFFSETS = (0.0, 3.0, 100.0, -1000.0, 30_000.0, -65_000.0, 1e6, -1e9, 1e30)


@pytest.fixture(params=parameters("cpu"))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with Backend(request.param).active() as chosen:
        yield chosen


@pytest.fixture(params=PATHS)
def columns(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of rows that take each path; a GPU is the device that it is."""
    count, multiprocessors = PATHS[request.param]
    with imagined_device({MULTIPROCESSORS: multiprocessors}):
        yield count


def case_of(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> LogitsCase:
    """Sampled by the policy itself, so that the gradient is that of minus a log-probability. The
    rows come again until they are enough."""
    times = -(-LEAST_ROWS // len(labels))
    logits, labels = logits.repeat(times, 1), labels.repeat(times)
    exact, _ = reference.token_logprobs(
        logits, labels, temperature=temperature, dtype=torch.float64
    )
    rows = len(labels)
    return LogitsCase(
        logits=logits,
        labels=labels,
        inference_logprobs=exact.nan_to_num(0, 0, 0).float(),
        advantages=torch.ones(rows),
        loss_mask=torch.ones(rows, dtype=torch.bool),
        temperature=temperature,
        config=WIDE_BAND,
    )


def assert_exact(case: LogitsCase, backend: Backend) -> Evaluation:
    """Within what fp32 can hold of each result; the gradient within a rounding to 16 bits."""
    ours = evaluate(case.to(backend.device))
    wide = case.with_(logits=case.logits.double())
    exact = evaluate(wide, reference.ipo_loss_from_logits, dtype=torch.float64)
    for name in ("logprobs", "entropy"):
        mine, truth = (getattr(of.output, name).detach().cpu().double() for of in (ours, exact))
        torch.testing.assert_close(mine, truth, rtol=3e-7, atol=5e-7)
    resolution = torch.finfo(case.logits.dtype).eps
    torch.testing.assert_close(
        ours.gradient.cpu().double(), exact.gradient.double(), rtol=resolution, atol=2e-7
    )
    return ours


@pytest.mark.parametrize("temperature", [1.0, 0.6, 30.0])
@pytest.mark.parametrize("dtype", NARROWER, ids=str)
def test_an_offset_costs_no_digits(
    backend: Backend, columns: int, dtype: torch.dtype, temperature: float
) -> None:
    """A row at each offset: the rounding of 1,000 times a scale alone would move it by 1.4e-5."""
    generator = torch.Generator().manual_seed(columns)
    offsets = torch.tensor([offset for offset in OFFSETS if abs(offset) < -LEAST[dtype]])
    logits = torch.randn(len(offsets), columns, generator=generator, dtype=torch.float64) * 4
    logits = (logits + offsets[:, None]).to(dtype)
    logits[:, 5::7] = -math.inf
    labels = logits.float().topk(3, -1).indices[:, 2]  # a likely one, seldom the maximum
    assert_exact(case_of(logits, labels, temperature), backend)


@pytest.mark.parametrize("dtype", NARROWER, ids=str)
def test_the_largest_alone_has_all(backend: Backend, columns: int, dtype: torch.dtype) -> None:
    logits = torch.full((4, columns), -math.inf).to(dtype)
    top = torch.tensor([3.3, 150.0, -4000.0, 60_000.0]).to(dtype)
    labels = torch.tensor([0, 17, columns - 1, columns // 2])
    logits[torch.arange(4), labels] = top
    logits[:, 1:9:2] = (top - (top.abs() * 0.5 + 400))[:, None]  # each vanishes beside it
    ours = assert_exact(case_of(logits, labels, 1.0), backend)
    assert not ours.output.logprobs.any()
    assert not ours.output.entropy.any()
    assert not ours.gradient.any()


@pytest.mark.parametrize("temperature", [1.0, 1e3, 1e-3, 1e29])
@pytest.mark.parametrize("dtype", NARROWER, ids=str)
def test_nothing_lies_below_the_least_number(
    backend: Backend, columns: int, dtype: torch.dtype, temperature: float
) -> None:
    """A row that a host has filled with its dtype's least number, beside some -inf."""
    logits = torch.full((2, columns), LEAST[dtype]).to(dtype)
    logits[0, ::3] = -math.inf
    ours = assert_exact(case_of(logits, torch.tensor([1, 2]), temperature), backend)
    count = logits.isfinite().sum(-1)
    entropy = ours.output.entropy[:2].detach().cpu()
    torch.testing.assert_close(entropy, count.log(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("temperature", [1e-4, 0.3, 700.0, 1e4, 1e29])
@pytest.mark.parametrize("dtype", NARROWER, ids=str)
def test_at_any_temperature(
    backend: Backend, columns: int, dtype: torch.dtype, temperature: float
) -> None:
    """Where all logits that are finite count alike, -inf still does not."""
    logits = (torch.arange(columns) % 5 * 0.25 - 1).expand(2, -1).to(dtype).clone()
    logits[1, 1::2] = -math.inf
    assert_exact(case_of(logits, torch.tensor([4, 4]), temperature), backend)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", NARROWER, ids=str)
def test_what_is_not_a_number_shows(
    backend: Backend, columns: int, dtype: torch.dtype, bad: float
) -> None:
    logits = torch.zeros(2, columns, dtype=dtype)
    logits[0, columns - 2] = bad
    case = case_of(logits, torch.tensor([0, 0]), 1.0).to(backend.device)
    ours = evaluate(case)
    assert ours.output.logprobs[0].isnan()
    assert ours.output.entropy[0].isnan()
    assert not ours.gradient[0].any(), "a token that is not finite is dropped"
    assert ours.output.logprobs[1].isfinite()
