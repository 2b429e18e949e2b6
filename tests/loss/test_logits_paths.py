"""Each path of the CUDA kernels from logits: where a row resides, where its gradient goes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from ipo_ext._ops.arguments import LogitScaling
from tests.support.backends import Backend, parameters
from tests.support.cases import assert_same_bits, bits, evaluate, same_bits
from tests.support.layouts import at_row_starts, misaligned, strided
from tests.support.logits import MANY_ROWS, NARROWER, assert_accurate, random_case
from tests.support.operators import chunk_of_loss, operator
from tests.support.rules import RULES
from tests.support.schedules import (
    CAPABILITY_MAJOR,
    MULTIPROCESSORS,
    SHARED_TOGETHER,
    imagined_device,
    thread_order,
)

ALL_BUSY = {MULTIPROCESSORS: 1}
DEVICES = {
    "clusters": ALL_BUSY,
    "blocks": {**ALL_BUSY, CAPABILITY_MAJOR: 8},
    "blocks-of-little-memory": {**ALL_BUSY, CAPABILITY_MAJOR: 7, SHARED_TOGETHER: 54 << 10},
    "splits": {MULTIPROCESSORS: 60},
}


@pytest.fixture(params=parameters("cpu"))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with Backend(request.param).active() as chosen:
        yield chosen


@pytest.fixture(params=[0, 1, 2, 3], ids="seed{}".format)
def schedule(request: pytest.FixtureRequest) -> Iterator[int]:
    """The order in which emulated threads run; a GPU has its own."""
    with thread_order(request.param):
        yield request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, backend: Backend) -> Iterator[str]:
    """A device on which the launcher chooses another variant; a GPU is the device that it is."""
    with imagined_device(DEVICES[request.param]):
        yield request.param


# -------------------------------------------------------------------------------------------------
# Where a row resides


# The rows of kClusterShapes, by columns: the last of one and the first of the next.
@pytest.mark.reaches_every_kernel
@pytest.mark.parametrize("columns", [16384, 16385, 32769, 65537, 163841])
def test_every_cluster(backend: Backend, columns: int) -> None:
    dtype = torch.bfloat16 if columns % 2 else torch.float32
    case = random_case(3, columns, dtype, masked=0, spread=1.0, temperature=0.8)
    assert_accurate(case, backend)


@pytest.mark.parametrize("device", ["clusters"], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "columns"),
    [(torch.float32, 41_001), (torch.bfloat16, 82_001), (torch.float16, 164_001)],
    ids=str,
)
def test_persistent_pipelined_rows(
    backend: Backend, schedule: int, device: str, dtype: torch.dtype, columns: int
) -> None:
    """A cluster works on some rows, each copied during the one before, inactive ones among them."""
    rows = 6 if backend.name == "emulated" else 1200
    of_rows = {"masked": 0.4, "spread": 1.0, "token_temperature": True}
    case = random_case(rows, columns, dtype, **of_rows)
    assert_accurate(case, backend, grad_loss=0.5)
    assert_accurate(random_case(rows, columns, dtype, masked=0, likely=True), backend)
    case = case.with_(logits=misaligned(case.logits)).to(backend.device)
    with_gradient = chunk_of_loss(case, torch.empty_like(case.logits))
    for ours, theirs in zip(chunk_of_loss(case, None), with_gradient, strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("columns", [4099, 20011])
@pytest.mark.parametrize("dtype", [*NARROWER, torch.float32, torch.float64], ids=str)
def test_every_device(
    backend: Backend, device: str, dtype: torch.dtype, columns: int, softcap: float | None
) -> None:
    case = random_case(3, columns, dtype, spread=1.0, token_temperature=True, softcap=softcap)
    assert_accurate(case, backend, grad_loss=0.5)
    for layout in (strided, misaligned):
        assert_accurate(case.with_(logits=layout(case.logits)), backend)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_on_every_device(backend: Backend, device: str, rule: str) -> None:
    likely = {"masked": 0.2, "spread": 1.0, "likely": True, "config": RULES[rule]}
    for softcap, dtypes in itertools.product(
        (None, 30.0),
        (
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float64),
            (torch.float64, torch.float64),
        ),
    ):
        dtype, of_loss = dtypes
        case = random_case(8, 17001, dtype, inference_dtype=of_loss, softcap=softcap, **likely)
        assert_accurate(case, backend)


@pytest.mark.reaches_every_kernel
def test_rows_of_every_length(backend: Backend, device: str) -> None:
    for columns in (1, 7, 8, 9, 15, 2047, 2048, 2056, 8193, 8200, 12345):
        assert_accurate(random_case(2, columns, torch.bfloat16, masked=0, spread=1.0), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_order_of_threads_does_not_matter(device: str, dtype: torch.dtype) -> None:
    case = random_case(3, 18001, dtype, masked=0, spread=1.0)
    with Backend("emulated").active():
        expected = evaluate(case)
        for seed in (1, 2):
            with thread_order(seed):
                assert_same_bits(evaluate(case), expected)


@pytest.mark.reaches_every_kernel
def test_rows_at_the_edge_on_every_device(backend: Backend, device: str) -> None:
    """NaN, +inf, nothing but -inf, half a row of it, an inactive row, a label at either end."""
    columns = 20011
    case = random_case(7, columns, masked=0, spread=1.0)
    logits, labels, mask = case.logits.clone(), case.labels.clone(), case.loss_mask.clone()
    logits[0, 9000] = math.nan
    logits[1, 9001] = math.inf
    logits[2] = -math.inf
    logits[3, : columns // 2] = -math.inf
    logits[4] = math.nan
    mask[4] = False
    labels[3], labels[5], labels[6] = columns - 1, 0, columns - 1
    exact = logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    case = case.with_(logits=logits, labels=labels, loss_mask=mask)
    case = case.with_(inference_logprobs=exact.float().nan_to_num(0) - 0.5)
    ours = evaluate(case.to(backend.device))
    assert ours.output.logprobs[:3].isnan().all()
    assert ours.output.entropy[:3].isnan().all()
    assert not bits(ours.gradient[:3]).any()
    assert not bits(ours.gradient[4]).any()
    assert not ours.gradient[3, : columns // 2].any()
    kept = torch.tensor([3, 5, 6])
    alone = case.map_tokens(lambda tensor: tensor[kept])
    assert_accurate(alone.with_(normalizer=6.0), backend)


# -------------------------------------------------------------------------------------------------
# Where the gradient goes


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [9000, 40011])
def test_gradient_over_logits_on_every_device(
    backend: Backend, device: str, dtype: torch.dtype, columns: int, softcap: float | None
) -> None:
    case = random_case(3, columns, softcap=softcap, spread=1.0).to(backend.device)
    apart = torch.full(case.logits.shape, math.nan, dtype=dtype, device=backend.device)
    expected = chunk_of_loss(case, apart)
    gradient = at_row_starts(case.logits, dtype)
    with thread_order(5):
        results = chunk_of_loss(case, gradient)
    assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
    assert same_bits(gradient, apart)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("columns", [1, 3, 130, 1031, 5000])
@pytest.mark.parametrize("dtype", [*NARROWER, torch.float32], ids=str)
def test_gradient_over_fp32_logits(
    backend: Backend, schedule: int, dtype: torch.dtype, columns: int, softcap: float | None
) -> None:
    rows = MANY_ROWS if backend.name == "cuda" else 4
    case = random_case(rows, columns, temperature=0.8, softcap=softcap, spread=1.0)
    for stride in {columns, columns + 4 - columns % 4}:
        room = torch.full((rows, stride), math.nan, device=backend.device)
        room[:, :columns] = case.logits.to(backend.device)
        over = case.to(backend.device).with_(logits=room[:, :columns])
        apart = torch.full_like(room, math.nan)[:, :columns]
        expected = chunk_of_loss(over, apart)
        gradient = at_row_starts(over.logits, dtype)
        results = chunk_of_loss(over, gradient)
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
        assert same_bits(gradient, apart.to(dtype))


@pytest.mark.parametrize("columns", [7, 1031, 5000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gradient_over_logits(
    backend: Backend, schedule: int, dtype: torch.dtype, columns: int
) -> None:
    case = random_case(4, columns, dtype, spread=1.0).to(backend.device)
    apart = torch.full_like(case.logits, math.nan)
    expected = chunk_of_loss(case, apart)
    results = chunk_of_loss(case, case.logits)
    assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
    assert same_bits(case.logits, apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_backward_over_logits(backend: Backend, dtype: torch.dtype) -> None:
    rows = {
        "logits": torch.randn(3, 40011, device=backend.device),
        "labels": torch.tensor([0, 40010, 20000], device=backend.device),
        **LogitScaling(None, softcap=2.0)._asdict(),
        "candidates": None,
        "fault": torch.zeros(1, dtype=torch.int32, device=backend.device),
    }
    _, entropy, softmax_stats, _ = operator("chunk_logprobs")(**rows)
    grad_logprobs, grad_entropy = torch.randn(2, 3, device=backend.device)
    backward = functools.partial(
        operator("chunk_logprobs_backward"),
        **rows,
        entropy=entropy,
        softmax_stats=softmax_stats,
        grad_logprobs=grad_logprobs,
        grad_entropy=grad_entropy,
        grad_candidates=None,
        row_scales=None,
    )
    apart = torch.full((3, 40011), math.nan, dtype=dtype, device=backend.device)
    backward(gradient=apart)
    gradient = at_row_starts(rows["logits"], dtype)
    with thread_order(5):
        backward(gradient=gradient)
    assert same_bits(gradient, apart)
