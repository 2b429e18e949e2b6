"""Where tier 2 keeps a row and where its gradient goes: each variant of the CUDA kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from backends import Backend, available
from ipo_ext import IPOConfig, _operators
from simt import operators as simt
from test_logits import Case, bits, random_case

NARROWER = (torch.float16, torch.bfloat16)


@pytest.fixture(params=[name for name in available() if name != "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with Backend(request.param).active() as chosen:
        yield chosen


@pytest.fixture(params=[0, 1, 2, 3], ids="seed{}".format)
def schedule(request: pytest.FixtureRequest) -> Iterator[int]:
    """The order in which emulated threads run; a GPU has its own."""
    harness = simt.load()
    harness.simt_set_schedule(request.param)
    yield request.param
    harness.simt_set_schedule(0)


def loss_rows(case: Case, gradient: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies; the gradient goes where the caller wants it."""
    operators = _operators.library()
    temperature, softcap = case.options.get("temperature"), case.options.get("softcap")
    if isinstance(temperature, float):
        temperature = torch.tensor(temperature)
    fault = operators.find_faults(
        *(case.labels, case.loss_mask, temperature, case.logits.shape[-1]),
        *(len(case.labels), None, None),
    )
    return operators.ipo_loss_rows(
        *(case.logits, case.labels, case.inference_logprobs, case.advantages, case.loss_mask),
        *(temperature, softcap or 0.0, None, None, None),
        *IPOConfig().settings(torch.float32),
        *(fault, gradient),
    )


def lying_over(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A gradient each of whose rows starts where that row of the logits does."""
    step = logits.element_size() // dtype.itemsize
    return logits.view(dtype).as_strided(logits.shape, (logits.stride(0) * step, 1))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("columns", [1, 3, 130, 1031, 5000])
@pytest.mark.parametrize("dtype", [*NARROWER, torch.float32], ids=str)
def test_gradient_over_fp32_logits(
    backend: Backend, schedule: int, dtype: torch.dtype, columns: int, softcap: float | None
) -> None:
    case = random_case(4, columns, temperature=0.8, softcap=softcap, spread=1.0)
    for stride in {columns, columns + 4 - columns % 4}:
        room = torch.full((4, stride), math.nan, device=backend.device)
        room[:, :columns] = case.logits.to(backend.device)
        over = case.to(backend.device).with_(logits=room[:, :columns])
        apart = torch.full_like(room, math.nan)[:, :columns]
        expected = loss_rows(over, apart)
        gradient = lying_over(over.logits, dtype)
        results = loss_rows(over, gradient)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results, expected, strict=True))
        assert torch.equal(bits(gradient), bits(apart.to(dtype)))


@pytest.mark.parametrize("columns", [7, 1031, 5000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gradient_over_logits(
    backend: Backend, schedule: int, dtype: torch.dtype, columns: int
) -> None:
    case = random_case(4, columns, dtype, spread=1.0).to(backend.device)
    apart = torch.full_like(case.logits, math.nan)
    expected = loss_rows(case, apart)
    results = loss_rows(case, case.logits)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results, expected, strict=True))
    assert torch.equal(bits(case.logits), bits(apart))
