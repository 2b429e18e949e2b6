"""Log-probabilities and entropies from logits, and their gradient, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import ipo_ext
from ipo_ext import reference
from tests.support.backends import Backend
from tests.support.closeness import assert_close
from tests.support.logits import DTYPES

# -------------------------------------------------------------------------------------------------
# Accuracy


@pytest.mark.parametrize("columns", [33, 37, 47, 5001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_rows_with_a_ragged_end(backend: Backend, dtype: torch.dtype, columns: int) -> None:
    """Vector loads for the most of a row, and what is left of it one by one."""
    rows = 3
    room = torch.full((rows, columns // 16 * 16 + 16), math.nan, dtype=dtype)
    room[:, :columns] = torch.randn(rows, columns)
    room[:, columns - 1] = 9.0  # the last column decides the sums
    logits = room.to(backend.device)[:, :columns]
    labels = torch.randint(0, columns, (rows,), device=backend.device)
    ours, entropy = ipo_ext.token_logprobs(logits, labels)

    def expected(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        every = values.log_softmax(-1)
        return every.gather(-1, labels.long()[:, None])[:, 0], -(every.exp() * every).sum(-1)

    exact, exact_entropy = expected(logits.double())
    naive, naive_entropy = expected(logits.to(ours.dtype))
    assert_close(ours, naive, exact, scale=exact.abs() + 9, name="logprobs")
    assert_close(entropy, naive_entropy, exact_entropy, scale=exact_entropy + 9, name="entropy")


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_offset_costs_no_digits(backend: Backend, offset: float) -> None:
    logits = (torch.randn(5, 300) * 2 + offset).to(backend.device)
    labels = torch.arange(5, device=backend.device)
    ours = ipo_ext.token_logprobs(logits, labels, temperature=0.7)
    exact = reference.token_logprobs(logits, labels, temperature=0.7, dtype=torch.float64)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_token_logprobs_gradient(
    backend: Backend, dtype: torch.dtype, softcap: float | None
) -> None:
    logits = (torch.randn(6, 70) * 2).to(dtype)
    labels = torch.tensor([0, 69, -100, 7, 8, 33], dtype=torch.int32)
    weights = torch.randn(2, 6, dtype=torch.float64)

    def gradient(function: Any, z: torch.Tensor, **more: Any) -> torch.Tensor:
        z = z.detach().requires_grad_()
        outputs = function(z, labels.to(z.device), temperature=0.9, softcap=softcap, **more)
        values = torch.stack(outputs)
        return torch.autograd.grad((values * weights.to(values)).sum(), z)[0]

    ours = gradient(ipo_ext.token_logprobs, logits.to(backend.device))
    naive = gradient(reference.token_logprobs, logits)
    exact = gradient(reference.token_logprobs, logits.double(), dtype=torch.float64)
    size = exact.abs() + (exact != 0) * weights.abs().sum(0)[:, None] * logits.double().softmax(-1)
    size[torch.arange(6), labels.long().clamp(min=0)] += (labels >= 0) * weights[0].abs()
    # In float64 naive is exact, and gradcheck does the rest.
    floor = 64 if dtype == torch.float64 else 8
    assert_close(ours, naive, exact, scale=size, floor=floor, name="gradient")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("logit_scale", [None, 0.6])
def test_gradcheck(backend: Backend, logit_scale: float | None, softcap: float | None) -> None:
    logits = torch.randn(5, 9, dtype=torch.float64, device=backend.device, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 3, 3], device=backend.device)
    temperature = torch.tensor([0.5, 1, 1, 2, 0.9], dtype=torch.float64, device=backend.device)

    def both(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        how = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
        return ipo_ext.token_logprobs(z, labels, **how)

    assert torch.autograd.gradcheck(both, logits)


def test_one_output_alone(backend: Backend) -> None:
    logits = torch.randn(3, 9, device=backend.device, requires_grad=True)
    labels = torch.tensor([1, 2, 3], device=backend.device)
    for part in (0, 1):
        (ours,) = torch.autograd.grad(ipo_ext.token_logprobs(logits, labels)[part].sum(), logits)
        expected = reference.token_logprobs(logits, labels)[part].sum()
        torch.testing.assert_close(ours, torch.autograd.grad(expected, logits)[0])


# -------------------------------------------------------------------------------------------------
# Shapes, and what is not read


def test_one_token_without_dimensions(backend: Backend) -> None:
    logits = torch.randn(13, device=backend.device)
    logprob, entropy = ipo_ext.token_logprobs(logits, torch.tensor(4, device=backend.device))
    assert logprob.shape == entropy.shape == ()
    assert logprob.item() == pytest.approx(logits.log_softmax(-1)[4].item(), abs=1e-6)


def test_indices_beyond_32_bits(backend: Backend) -> None:
    if backend.name == "cuda":
        return  # lazily committed host memory: cpu and emulated run the same index arithmetic
    room = torch.empty(2**32 + 64, dtype=torch.float16)  # only the rows' pages are ever touched
    logits = room.as_strided((3, 40), (2**31, 1))
    logits.copy_(torch.randn(3, 40))
    labels = torch.tensor([1, 39, 0])
    ours = ipo_ext.token_logprobs(logits, labels)
    expected = ipo_ext.token_logprobs(logits.contiguous(), labels)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_rows_without_upstream_are_not_read(backend: Backend) -> None:
    rows, columns = 6, 40
    logits = torch.randn(rows, columns, device=backend.device, requires_grad=True)
    labels = torch.arange(rows, device=backend.device)
    labels[5] = -100
    logprobs, entropy = ipo_ext.token_logprobs(logits, labels)
    weights = torch.tensor([1.0, 0, 0, 2, 0, 3], device=backend.device)
    loss = (logprobs * weights).sum() + entropy[1] * 0.5
    untouched = torch.tensor([False, False, True, False, True, True], device=backend.device)
    (expected,) = torch.autograd.grad(loss, logits, retain_graph=True)
    with torch.no_grad():
        logits.data[untouched] = math.nan
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, expected)
    assert not gradient[untouched].any()
    assert gradient[~untouched].all()
