"""The histogram of log-ratios: counts by the bits of x, and what can be read from them."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import ipo_ext
from ipo_ext import HISTOGRAM_EDGES, IPOMetrics
from tests.support import hidden, logits, logprobs
from tests.support.backends import Backend
from tests.support.cases import LogprobsCase, same_bits
from tests.support.layouts import misaligned
from tests.support.operators import call_operator, opcheck

INNER = HISTOGRAM_EDGES[1:-1]


def expected(x: torch.Tensor, mask: torch.Tensor) -> list[int]:
    """Token by token, in Python."""
    counts = [0] * 64
    for value, counted in zip(x.tolist(), mask.tolist(), strict=True):
        if not counted or math.isnan(value):
            continue
        passed = sum(edge <= value if edge >= 0 else edge < value for edge in INNER)
        counts[passed] += 1
    return counts


def histogram(case: LogprobsCase, backend: Backend) -> torch.Tensor:
    counts = call_operator("log_ratio_histogram", case.to(backend.device))
    assert counts.dtype == torch.int64
    return counts.cpu()


def with_log_ratios(x: torch.Tensor, **options: Any) -> LogprobsCase:
    zeros = torch.zeros_like(x)
    mask = torch.ones(len(x), dtype=torch.bool)
    return LogprobsCase(
        trainer_logprobs=x, inference_logprobs=zeros, advantages=zeros, loss_mask=mask, **options
    )


def assert_counted(case: LogprobsCase, backend: Backend) -> None:
    dtype = case.compute_dtype
    x = case.trainer_logprobs.to(dtype) - case.inference_logprobs.to(dtype)
    counts = histogram(case, backend)
    if case.cu_seqlens is None:
        assert counts.tolist() == expected(x, case.loss_mask)
        return
    ends = case.cu_seqlens.tolist()
    assert counts.shape == (64, len(ends) - 1)
    for s in range(len(ends) - 1):
        part = slice(ends[s], ends[s + 1])
        assert counts[:, s].tolist() == expected(x[part], case.loss_mask[part])


def test_edges() -> None:
    assert len(HISTOGRAM_EDGES) == 65
    assert list(HISTOGRAM_EDGES) == sorted(HISTOGRAM_EDGES)
    assert [-edge for edge in HISTOGRAM_EDGES] == list(reversed(HISTOGRAM_EDGES))
    positive = [edge for edge in HISTOGRAM_EDGES if 0 < edge < math.inf]
    powers = [2.0**k * m for k in range(-10, 5) for m in (1, 1.5)]
    assert positive == [*powers, 32.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_edge_belongs_to_the_bin_farther_from_0(backend: Backend, dtype: torch.dtype) -> None:
    edges = torch.tensor(INNER, dtype=dtype)
    around = [edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)]
    for value in around:
        assert_counted(with_log_ratios(value), backend)


def test_zeros_infinities_and_nan(backend: Backend) -> None:
    tiny = torch.finfo(torch.float32).smallest_normal / 4
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, tiny, -tiny, 3e38, -3e38]
    counts = histogram(with_log_ratios(torch.tensor(values)), backend)
    assert counts[32] == 3  # both zeros and the tiny one
    assert counts[31] == 1
    assert counts[63] == counts[0] == 2
    assert counts.sum() == 8


@pytest.mark.tempts_kernels_out_of_bounds
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 5, 257, 4095, 4096, 4097, 8192, 8193])
def test_any_number_of_tokens(backend: Backend, tokens: int) -> None:
    assert_counted(logprobs.random_case(tokens, spread=3.0), backend)


@pytest.mark.parametrize("segments", sorted(logprobs.SEGMENTS))
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "fp64", "fp64-inference"])
def test_each_segment_has_its_own(backend: Backend, kind: str, segments: str) -> None:
    tokens = min(300, logprobs.MOST_TOKENS[segments])
    case = logprobs.random_case(tokens, dtypes=logprobs.DTYPES[kind], segments=segments)
    assert_counted(case, backend)


def test_spans_of_several_tiles(backend: Backend) -> None:
    ends = [0, 101, 101, 4097, 4099, 9000, 9001]  # none where vectors begin
    case = logprobs.random_case(9001)
    assert_counted(case.with_(cu_seqlens=torch.tensor(ends, dtype=torch.int32)), backend)


@pytest.mark.tempts_kernels_out_of_bounds
def test_unaligned(backend: Backend) -> None:
    assert_counted(logprobs.random_case(5000, spread=4.0).map_tokens(misaligned), backend)


@hypothesis.given(
    x=st.lists(st.floats(width=32), max_size=90),
    cuts=st.lists(st.integers(0, 90), max_size=4),
    seed=st.integers(0, 2**32),
)
def test_any_case(backend_name: str, x: list[float], cuts: list[int], seed: int) -> None:
    values = torch.tensor(x, dtype=torch.float32)
    ends = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
    case = with_log_ratios(values, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    drawn = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) < 0.7
    with Backend(backend_name).active() as backend:
        assert_counted(case.with_(loss_mask=drawn), backend)


def test_a_broken_partition_raises_or_stays_within_its_tensors(backend: Backend) -> None:
    case = logprobs.random_case(5000)
    for broken in ([0, 4000, 3000, 5000], [0, 2**30], [-5, 5000], [0, 0]):
        wrong = case.with_(cu_seqlens=torch.tensor(broken, dtype=torch.int32))
        if backend.faults_raise:
            with pytest.raises(RuntimeError, match="cu_seqlens"):
                histogram(wrong, backend)
        else:
            histogram(wrong, backend)


# -------------------------------------------------------------------------------------------------
# From the functions


def metrics_of(case: Any, backend: Backend) -> IPOMetrics:
    metrics = case.to(backend.device).call(histogram=True).metrics
    assert isinstance(metrics, IPOMetrics)
    return metrics


CASES: dict[str, Any] = {
    "log-probabilities": lambda **o: logprobs.random_case(37, segments="empty-between", **o),
    "logits": lambda **o: logits.random_case(37, ids=5, cu_seqlens=CU_SEQLENS, **o),
    "hidden": lambda **o: hidden.random_case(cu_seqlens=CU_SEQLENS, chunk_size=9, **o),
}
CU_SEQLENS = torch.tensor([0, 9, 9, 20, 37], dtype=torch.int32)


@pytest.mark.parametrize("kind", CASES)
def test_every_loss_has_one(backend: Backend, kind: str) -> None:
    case = CASES[kind]()
    there = case.to(backend.device)
    plain, counted = there.call(), there.call(histogram=True)
    assert same_bits(plain.loss, counted.loss)
    assert plain.metrics.histogram is None
    assert counted.metrics.keys() == plain.metrics.keys()
    trainer = getattr(case, "trainer_logprobs", counted.logprobs).cpu()
    x = trainer.float() - case.inference_logprobs
    ends = case.cu_seqlens.tolist()
    for s in range(len(ends) - 1):
        part = slice(ends[s], ends[s + 1])
        counts = counted.metrics.histogram[:, s].tolist()
        assert counts == expected(x[part], case.loss_mask[part])


@pytest.mark.parametrize("config", [ipo_ext.IPOConfig(), ipo_ext.IPOConfig.geometric(0.9, 1.1)])
def test_rows_of_tokens_are_one(backend: Backend, config: ipo_ext.IPOConfig) -> None:
    """Also where a rule takes the rows for sequences."""
    case = logprobs.random_case(40, config=config).map_tokens(lambda t: t.view(4, 10))
    flat = case.map_tokens(torch.flatten)
    counts = metrics_of(case, backend).histogram
    assert counts.tolist() == metrics_of(flat, backend).histogram.tolist()


def test_adds_up_as_the_sums_do(backend: Backend) -> None:
    metrics = metrics_of(CASES["log-probabilities"](), backend)
    whole = metrics_of(CASES["log-probabilities"]().with_(cu_seqlens=None), backend)
    assert torch.equal(metrics.total().histogram, whole.histogram)
    assert torch.equal((metrics + metrics).histogram, 2 * metrics.histogram)
    assert torch.equal(sum([whole, whole, whole]).histogram, 3 * whole.histogram)
    empty = metrics_of(logprobs.random_case(0, segments="one"), backend)
    assert empty.total().histogram.sum() == 0
    plain = CASES["log-probabilities"]().to(backend.device).call().metrics
    with pytest.raises(ValueError, match="both or neither to have a histogram"):
        metrics + plain


def test_travels_as_a_pytree() -> None:
    metrics = CASES["log-probabilities"]().call(histogram=True).metrics
    leaves, spec = torch.utils._pytree.tree_flatten(metrics)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.histogram, metrics.histogram)
    assert metrics.to("meta").histogram.device.type == "meta"


def test_compiled(backend: Backend) -> None:
    case = CASES["log-probabilities"]().to(backend.device)
    torch.compiler.reset()
    function = torch.compile(ipo_ext.ipo_loss, backend="aot_eager", fullgraph=True)
    ours = case.call(function, histogram=True).metrics.histogram
    assert torch.equal(ours, case.call(histogram=True).metrics.histogram)


def test_the_operator_is_sound(backend: Backend) -> None:
    opcheck("log_ratio_histogram", CASES["log-probabilities"]().to(backend.device))


def test_is_a_bool() -> None:
    with pytest.raises(TypeError, match="histogram: expected True or False, got int"):
        CASES["log-probabilities"]().call(histogram=1)


# -------------------------------------------------------------------------------------------------
# What is read from it


@pytest.mark.parametrize("p", [0.0, 0.01, 0.5, 0.9, 1.0])
def test_a_quantile_lies_in_its_bin(backend: Backend, p: float) -> None:
    case = logprobs.random_case(500, spread=2.0, masked=0.3)
    low, high = metrics_of(case, backend).quantile(p)
    x = (case.trainer_logprobs - case.inference_logprobs)[case.loss_mask].sort().values
    value = x[max(math.ceil(p * len(x)), 1) - 1].double()
    assert low.dtype == torch.float64
    assert low <= value <= high
    assert HISTOGRAM_EDGES.index(high.item()) == HISTOGRAM_EDGES.index(low.item()) + 1


def test_a_quantile_of_each_segment(backend: Backend) -> None:
    low, high = metrics_of(CASES["log-probabilities"](), backend).quantile(0.5)
    assert low.shape == high.shape == (5,)
    assert low.isnan().tolist() == high.isnan().tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("band", [(0.5, 2.0), (0.2, 5.0), (0.0, math.inf), (1.0, 1.0), (0.0, 0.9)])
def test_what_a_band_would_drop(backend: Backend, band: tuple[float, float]) -> None:
    case = logprobs.random_case(500, spread=2.0)
    x = case.inference_logprobs.clone()
    x[3], x[4], x[5] = math.nan, math.inf, -math.inf
    case = case.with_(inference_logprobs=x, loss_mask=torch.ones(500, dtype=torch.bool))
    at_least, at_most = metrics_of(case, backend).what_if(*band)
    banded = case.with_(config=ipo_ext.IPOConfig(*band))
    dropped = banded.to(backend.device).call().metrics["is_masked"].item()
    assert at_least.item() <= dropped + 1e-6
    assert dropped <= at_most.item() + 1e-6
    assert at_most - at_least < 0.25


def test_at_an_edge_it_is_known_what_a_band_would_drop(backend: Backend) -> None:
    """But for an infinite log-ratio."""
    x = torch.tensor([-0.75, -0.5, 0.1, 0.3, 0.5, 0.8])
    metrics = metrics_of(with_log_ratios(x), backend)
    low, high = math.exp(-0.5), math.exp(0.5)
    at_least, at_most = metrics.what_if(low, high)
    assert at_least.item() == pytest.approx(2 / 6)
    assert at_most.item() == pytest.approx(4 / 6)  # those on the edges lie in the bins behind them


@pytest.mark.parametrize("edge", INNER)
def test_a_band_that_ends_on_an_edge_keeps_it_as_the_mask_does(edge: float) -> None:
    """Its logarithm rounds."""
    metrics = with_log_ratios(torch.full((3,), edge)).call(histogram=True).metrics
    for band in ((math.exp(edge), 1e30), (0.0, math.exp(edge))):
        if band[0] > band[1]:
            continue
        dropped = with_log_ratios(torch.full((3,), edge), config=ipo_ext.IPOConfig(*band))
        share = dropped.call().metrics["is_masked"].item()
        at_least, at_most = metrics.what_if(*band)
        assert at_least.item() <= share <= at_most.item()


def test_errors() -> None:
    metrics = CASES["log-probabilities"]().call().metrics
    for read in (lambda m: m.quantile(0.5), lambda m: m.what_if(0.5, 2.0)):
        with pytest.raises(ValueError, match="expected those of a call with histogram=True"):
            read(metrics)
    counted = CASES["log-probabilities"]().call(histogram=True).metrics
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="p: expected a share between 0 and 1"):
            counted.quantile(p)
    with pytest.raises(TypeError, match="low, high: expected two numbers"):
        counted.what_if("a", 2.0)
    for band in ((2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="low, high: expected 0 <= low <= high"):
            counted.what_if(*band)
