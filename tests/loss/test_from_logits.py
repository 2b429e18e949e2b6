"""The loss from logits, on every backend."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
from collections.abc import Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from ipo_ext import IPOConfig, reference
from tests.support.backends import Backend
from tests.support.cases import assert_same_bits, bits, evaluate, same_bits
from tests.support.logits import (
    DTYPES,
    WIDE_BAND,
    assert_accurate,
    assert_drawn_accurate,
    random_case,
)
from tests.support.schedules import thread_order, torch_threads

# -------------------------------------------------------------------------------------------------
# Against float64


COLUMNS = (1, 2, 7, 33, 130, 1031)


@pytest.mark.tempts_kernels_out_of_bounds
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend: Backend, dtype: torch.dtype, columns: int) -> None:
    assert_accurate(random_case(columns=columns, dtype=dtype, temperature=0.8), backend)


@pytest.mark.parametrize("logit_scale", [None, 0.3])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_softcap_and_token_temperature(
    backend: Backend, dtype: torch.dtype, softcap: float | None, logit_scale: float | None
) -> None:
    how = {"softcap": softcap, "logit_scale": logit_scale}
    case = random_case(dtype=dtype, columns=130, token_temperature=True, **how)
    assert_accurate(case, backend, grad_loss=0.75)


@pytest.mark.tempts_kernels_out_of_bounds
def test_long_rows_use_the_large_block(backend: Backend) -> None:
    assert_accurate(random_case(rows=2, columns=4097, masked=0), backend)
    assert_accurate(random_case(rows=2, columns=8192, dtype=torch.bfloat16, masked=0), backend)


@hypothesis.given(
    rows=st.integers(1, 6),
    columns=st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 1025])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    temperature=st.sampled_from([None, 0.5, 1.0, 2.5, "token"]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    logit_scale=st.sampled_from([None, 0.0625, 1.7]),
    normalizer=st.sampled_from([None, 4.0]),
    grad_loss=st.sampled_from([1.0, -2.5]),
    spread=st.sampled_from([0.1, 2.0, 8.0]),
    layout=st.sampled_from(["contiguous", "strided", "unaligned", "transposed"]),
)
def test_any_case(backend_name: str, **drawn: Any) -> None:
    assert_drawn_accurate(backend_name, **drawn)


def test_gradient_is_that_of_finite_differences(backend: Backend) -> None:
    # Not gradcheck, which runs backward twice.
    scaling = {"temperature": 0.8, "softcap": 5.0, "logit_scale": 1.3}
    options = {"config": WIDE_BAND, "normalizer": 3.0, **scaling}
    case = random_case(4, 9, torch.float64, inference_dtype=torch.float64, **options)
    case = case.to(backend.device)
    step = 1e-6
    differences = torch.empty_like(case.logits)
    for row, column in itertools.product(range(4), range(9)):
        shift = torch.zeros_like(case.logits)
        shift[row, column] = step
        ahead = case.with_(logits=case.logits + shift).call().loss
        behind = case.with_(logits=case.logits - shift).call().loss
        differences[row, column] = (ahead - behind) / (2 * step)
    torch.testing.assert_close(evaluate(case).gradient, differences, rtol=1e-7, atol=1e-8)


# -------------------------------------------------------------------------------------------------
# Agreement with the loss from log-probabilities


@pytest.mark.parametrize("inference_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_agrees_with_the_loss_from_logprobs(backend: Backend, inference_dtype: torch.dtype) -> None:
    rows = 200
    case = random_case(rows, 40, inference_dtype=inference_dtype).to(backend.device)
    new = torch.Generator().manual_seed(1)
    inference = case.inference_logprobs + torch.randn(rows, generator=new).to(backend.device)
    case = case.with_(
        inference_logprobs=inference.to(inference_dtype),
        cu_seqlens=torch.tensor([0, 50, 50, 200], dtype=torch.int32, device=backend.device),
        teacher_logprobs=torch.randn(rows, generator=new).to(backend.device),
        loss_weights=torch.rand(rows, generator=new).to(backend.device),
        normalizer=7.0,
        config=IPOConfig(teacher_tau=0.3),
    )
    ours = evaluate(case)
    expected = evaluate(case.from_logprobs(ours.output.logprobs))
    assert same_bits(ours.loss, expected.loss)
    for name, value in expected.metrics.items():
        assert same_bits(ours.metrics[name], value), name
    assert torch.equal(ours.gradient.any(-1), expected.gradient != 0), "mask decisions"
    assert ours.metrics.keys() - expected.metrics.keys() == {"entropy"}


def test_entropy_metric_combines(backend: Backend) -> None:
    case = random_case(20, 11, cu_seqlens=torch.tensor([0, 8, 20], dtype=torch.int32))
    metrics = case.to(backend.device).call().metrics
    whole = case.with_(cu_seqlens=None).to(backend.device).call()
    active = case.loss_mask.to(backend.device)
    mean = whole.entropy[active].double().mean().item()
    assert metrics.total()["entropy"].item() == pytest.approx(mean, rel=1e-6)
    assert whole.metrics["entropy"].item() == pytest.approx(mean, rel=1e-6)


# -------------------------------------------------------------------------------------------------
# What must not be read, and what must not matter


def protected_rows(values: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """A copy on pages of its own, one a row, of which the hidden ones cannot be read."""
    page = mmap.PAGESIZE
    rows, columns = values.shape
    assert columns * values.element_size() == page
    memory = mmap.mmap(-1, rows * page)
    copy = torch.frombuffer(memory, dtype=values.dtype).view(rows, columns).copy_(values)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for row in hidden.nonzero().flatten().tolist():
        address = ctypes.c_void_p(copy.data_ptr() + row * page)
        assert protect(address, ctypes.c_size_t(page), 0) == 0
    return copy


def test_inactive_rows_are_not_read(backend: Backend) -> None:
    if backend.name == "cuda":
        return  # host memory: cpu and emulated run the same loads
    case = random_case(rows=7, columns=mmap.PAGESIZE // 4, masked=0.5)
    whole = evaluate(case)
    case = case.with_(labels=case.labels.masked_fill(~case.loss_mask, 2**40))
    hidden = case.with_(logits=protected_rows(case.logits, ~case.loss_mask))
    assert_same_bits(evaluate(hidden), whole)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_garbage_in_inactive_rows_is_neutral(backend: Backend, garbage: float) -> None:
    case = random_case(rows=20, token_temperature=True).to(backend.device)
    off = ~case.loss_mask
    spoiled = case.with_(
        logits=case.logits.masked_fill(off[:, None], garbage),
        labels=case.labels.masked_fill(off, 2**40),
        inference_logprobs=case.inference_logprobs.masked_fill(off, garbage),
        advantages=case.advantages.masked_fill(off, garbage),
        temperature=case.temperature.masked_fill(off, -garbage),
    )
    clean = evaluate(case)
    assert_same_bits(evaluate(spoiled), clean)
    assert not bits(clean.gradient[off]).any()
    assert not clean.output.logprobs[off].any()
    assert not clean.output.entropy[off].any()


def test_dropped_rows_get_exact_zeros(backend: Backend) -> None:
    case = random_case(rows=40, masked=0).to(backend.device)
    ours = evaluate(case)
    x = ours.output.logprobs - case.inference_logprobs
    dropped = x.abs() > math.log(5)
    assert 0 < dropped.sum() < 40
    assert not bits(ours.gradient[dropped]).any()
    assert ours.gradient[~dropped].all()


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_active(backend: Backend, rows: int) -> None:
    case = random_case(rows=rows, masked=1.0, columns=5).to(backend.device)
    ours = evaluate(case)
    assert ours.loss.item() == 0
    assert ours.gradient.shape == (rows, 5)
    assert not ours.gradient.any()
    assert all(value.item() == 0 for value in ours.metrics.values())


@pytest.mark.tempts_kernels_out_of_bounds
@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2)])
def test_slices_and_shapes(
    backend: Backend, shape: Sequence[int], labels_dtype: torch.dtype
) -> None:
    rows, columns = math.prod(shape), 24
    case = random_case(rows, columns).to(backend.device)
    batch = torch.full((*shape, columns), math.nan, device=backend.device)
    batch = torch.cat([batch, batch], dim=len(shape) - 1)  # as logits[:, :-1] of a longer batch
    view = batch[..., : shape[-1], :]
    view.copy_(case.logits.view(*shape, columns))
    tokens = {
        name: getattr(case, name).view(shape)
        for name in ("inference_logprobs", "advantages", "loss_mask")
    }
    labels = case.labels.view(shape).to(labels_dtype)
    ours, flat = evaluate(case.with_(logits=view, labels=labels, **tokens)), evaluate(case)
    assert ours.gradient.shape == view.shape
    assert ours.output.logprobs.shape == labels.shape
    assert same_bits(ours.gradient.view(rows, columns), flat.gradient)
    assert same_bits(ours.loss, flat.loss)


# -------------------------------------------------------------------------------------------------
# Values at the edge


@pytest.mark.tempts_kernels_out_of_bounds
def test_nonfinite_rows_are_dropped_and_counted(backend: Backend) -> None:
    case = random_case(rows=8, columns=37, masked=0)
    logits = case.logits.clone()
    logits[0, 5] = math.nan
    logits[1] = -math.inf
    logits[2, 7] = math.inf
    logits[3, case.labels[3]] = -math.inf
    case = case.with_(logits=logits)
    ours = evaluate(case.to(backend.device))
    assert ours.output.logprobs[:3].isnan().all()
    assert ours.output.logprobs[3].item() == -math.inf
    assert not bits(ours.gradient[:4]).any()
    assert ours.gradient.isfinite().all()
    assert ours.metrics["nonfinite"].item() == 0.5
    rest = evaluate(case.with_(loss_mask=torch.arange(8) > 3).to(backend.device))
    assert torch.equal(ours.gradient, rest.gradient)
    assert torch.equal(ours.loss, rest.loss)


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_a_softcap_makes_infinite_logits_finite(backend: Backend, infinity: float) -> None:
    case = random_case(rows=5, columns=37, masked=0, softcap=3.0)
    logits = case.logits.clone()
    logits[0, 5] = infinity
    logits[1] = infinity
    assert_accurate(case.with_(logits=logits), backend)
    assert case.with_(logits=logits).call().logprobs.isfinite().all()


def test_infinite_logits_of_other_tokens(backend: Backend) -> None:
    case = random_case(rows=9, columns=65, masked=0)
    blocked = torch.rand(9, 65) < 0.5
    blocked[torch.arange(9), case.labels] = False
    logits = case.logits.masked_fill(blocked, -math.inf)
    how = {"dtype": torch.float64}
    exact, _ = reference.token_logprobs(logits, case.labels, **how)
    case = case.with_(logits=logits, inference_logprobs=exact.float() - 0.5)
    assert_accurate(case, backend)
    assert not evaluate(case.to(backend.device)).gradient[blocked.to(backend.device)].any()


def test_fp16_gradients_do_not_underflow(backend: Backend) -> None:
    case = random_case(columns=300, dtype=torch.float16, masked=0).to(backend.device)
    plain = evaluate(case)
    scaled = evaluate(case.with_(normalizer=2.0**20), grad_loss=2.0**20)  # G has the same digits
    torch.testing.assert_close(scaled.gradient, plain.gradient, rtol=1e-3, atol=1e-7)
    nothing = torch.zeros((), device=backend.device)
    zero = evaluate(case.with_(normalizer=nothing))
    assert zero.loss.item() == 0
    assert not zero.gradient.any()


# -------------------------------------------------------------------------------------------------
# The same bits


def test_threads_do_not_matter() -> None:
    case = random_case(rows=67, columns=3000, dtype=torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            results.append(evaluate(case, grad_loss=0.5))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.emulated
def test_schedule_does_not_matter() -> None:
    case = random_case(rows=3, columns=260, dtype=torch.bfloat16)
    with Backend("emulated").active():
        expected = evaluate(case, grad_loss=0.5)
        for seed in range(1, 5):
            with thread_order(seed):
                assert_same_bits(evaluate(case, grad_loss=0.5), expected)
