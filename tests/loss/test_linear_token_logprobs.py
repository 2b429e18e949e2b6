"""Log-probabilities and entropies from hidden states, and their gradients, on every backend."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import ipo_ext
from ipo_ext import reference
from tests.support.backends import Backend
from tests.support.closeness import assert_close
from tests.support.hidden import TOKENS, WideLinear, random_case
from tests.support.logits import DTYPES


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("logit_scale", [None, 0.6])
def test_gradcheck(backend: Backend, logit_scale: float | None, softcap: float | None) -> None:
    hidden = torch.randn(5, 3, dtype=torch.float64, device=backend.device, requires_grad=True)
    weight = torch.randn(9, 3, dtype=torch.float64, device=backend.device, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, device=backend.device, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 3, 3], device=backend.device)
    temperature = torch.tensor([0.5, 1, 1, 2, 0.9], dtype=torch.float64, device=backend.device)

    def both(
        h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        how = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
        return ipo_ext.linear_token_logprobs(h, w, labels, **how, chunk_size=2, bias=b)

    assert torch.autograd.gradcheck(both, (hidden, weight))
    assert torch.autograd.gradcheck(both, (hidden, weight, bias))
    alone = functools.partial(both, hidden.detach(), weight.detach())
    assert torch.autograd.gradcheck(alone, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend: Backend, dtype: torch.dtype) -> None:
    case = random_case(dtype=dtype, has_bias=True)
    upstream = torch.randn(2, TOKENS, dtype=torch.float64)

    def run(function: Any, dtype: torch.dtype, device: str | torch.device = "cpu", **how: Any):
        hidden, weight, bias = (
            getattr(case, name).to(device, dtype).requires_grad_() for name in case.leaves
        )
        values = torch.stack(function(hidden, weight, case.labels.to(device), bias=bias, **how))
        loss = (values * upstream.to(values)).sum()
        return values, *torch.autograd.grad(loss, (hidden, weight, bias))

    def naive(
        hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor
    ) -> Any:
        logits: Any = WideLinear.apply(hidden, weight, bias)
        return reference.token_logprobs(logits, labels)

    ours = run(ipo_ext.linear_token_logprobs, dtype, backend.device, chunk_size=5)
    near = run(naive, dtype)
    exact = run(reference.linear_token_logprobs, torch.float64)
    sizes = (10.0, 4.0, 10.0, 10.0)  # about the sums of the terms' magnitudes
    for mine, theirs, truth, size in zip(ours, near, exact, sizes, strict=True):
        scale = torch.where(truth != 0, size, 0)
        assert_close(mine, theirs, truth, scale=scale, floor=32, factor=3)


def test_one_output_alone(backend: Backend) -> None:
    case = random_case().to(backend.device)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    for part in (0, 1):
        ours = ipo_ext.linear_token_logprobs(hidden, weight, case.labels)[part].sum()
        exact = reference.linear_token_logprobs(hidden, weight, case.labels)[part].sum()
        for mine, truth in zip(
            torch.autograd.grad(ours, (hidden, weight)),
            torch.autograd.grad(exact, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=str)
def test_the_reference_multiplies_in_the_dtype_that_is_asked_for(
    dtype: torch.dtype | None,
) -> None:
    """By default in float32 at least."""
    case = random_case(dtype=torch.bfloat16)
    wide = [tensor.to(dtype or torch.float32) for tensor in (case.hidden, case.weight)]
    results = reference.linear_token_logprobs(case.hidden, case.weight, case.labels, dtype=dtype)
    expected = reference.linear_token_logprobs(*wide, case.labels, dtype=dtype)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.dtype == wide[0].dtype
        assert torch.equal(ours, theirs)
