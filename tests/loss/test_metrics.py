"""Metrics: means by name, and sums that combine over segments, micro-batches and ranks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from ipo_ext import IPOMetrics, reference
from tests.support.backends import Backend
from tests.support.cases import UPSTREAM_METRICS, LogprobsCase, same_bits
from tests.support.logprobs import DTYPES, SEGMENTS, cu_seqlens, random_case

TOKENS = 1100


def metrics_of(case: LogprobsCase) -> IPOMetrics:
    metrics = case.call().metrics
    assert isinstance(metrics, IPOMetrics)
    return metrics


def make(backend: Backend, tokens: int = TOKENS, **options: object) -> LogprobsCase:
    return random_case(tokens, dtypes=DTYPES["fp64"], **options).to(backend.device)


def part(case: LogprobsCase, begin: int, end: int) -> LogprobsCase:
    return case.map_tokens(lambda tokens: tokens[begin:end])


def assert_equal_metrics(a: IPOMetrics, b: IPOMetrics) -> None:
    """The same metrics, up to the order in which float64 sums were added."""
    assert a.keys() == b.keys()
    for name in ("means", "sums", "extremes"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------
# Means by name


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("segments", [None, "sevens"])
def test_names_are_the_references(backend: Backend, teacher: bool, segments: str | None) -> None:
    case = make(backend, teacher=teacher, segments=segments)
    metrics, expected = metrics_of(case), case.call(reference.ipo_loss).metrics
    assert metrics.keys() == expected.keys()
    assert metrics.keys() >= UPSTREAM_METRICS - {"teacher_kl"}
    assert ("teacher_kl" in metrics) == teacher
    assert {name: value.shape for name, value in metrics.items()} == {
        name: value.shape for name, value in expected.items()
    }


def test_it_is_read_as_a_dict_is(backend: Backend) -> None:
    metrics = metrics_of(make(backend))
    assert not isinstance(metrics, (dict, Mapping))  # hosts rebuild those, and would lose the sums
    names = list(metrics.keys())
    assert names == [name for name in IPOMetrics.MEAN_ROWS if name in metrics]
    assert len(metrics) == len(names)
    for form in (dict(metrics), {**metrics}, dict(metrics.items())):
        assert list(form) == names
        assert all(same_bits(form[name], metrics[name]) for name in names)
    assert all(map(same_bits, metrics.values(), dict(metrics).values()))
    assert same_bits(metrics.get("ess"), metrics["ess"])
    assert metrics.get("entropy") is None
    assert metrics.get("entropy", 0.5) == 0.5
    assert "entropy" not in metrics
    assert metrics == metrics
    assert metrics != copy.copy(metrics)
    assert all(name in repr(metrics) for name in names)
    with pytest.raises(KeyError, match="'entropy': expected one of mismatch_kl, "):
        metrics["entropy"]


@pytest.mark.parametrize("segments", [None, "empty-between", "one"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
def test_tolist(backend: Backend, segments: str | None, dtype: str) -> None:
    case = random_case(TOKENS, dtypes=DTYPES[dtype], segments=segments).to(backend.device)
    metrics = metrics_of(case)
    assert metrics.tolist() == {name: value.tolist() for name, value in metrics.items()}
    assert all(value.dtype == case.compute_dtype for value in metrics.values())
    assert metrics.sums.dtype == metrics.extremes.dtype == torch.float64
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(metrics))


def test_what_needs_an_input_of_its_own_is_there_when_said_alone() -> None:
    metrics = metrics_of(random_case(TOKENS, teacher=True))
    rows = metrics.means, metrics.sums, metrics.extremes
    optional = {"teacher_kl", "entropy", "rollout_dropped"}
    assert optional.isdisjoint(IPOMetrics(*rows).keys())
    assert {*IPOMetrics(*rows, has_entropy=True).keys()} & optional == {"entropy"}


def test_means_of_float32_are_the_sums_rounded_once(backend: Backend) -> None:
    metrics = metrics_of(random_case(TOKENS, teacher=True).to(backend.device))
    wide = IPOMetrics(metrics.means.double(), metrics.sums, metrics.extremes, has_teacher=True)
    unrounded = wide + IPOMetrics(
        wide.means,
        torch.zeros_like(wide.sums),
        torch.tensor([torch.inf, -torch.inf], dtype=torch.float64, device=backend.device),
        has_teacher=True,
    )
    assert unrounded.means.dtype == torch.float64
    assert same_bits(unrounded.means.float(), metrics.means)


def test_it_is_a_pytree(backend: Backend) -> None:
    metrics = metrics_of(make(backend, teacher=True, segments="sevens"))
    leaves, spec = pytree.tree_flatten(metrics)
    stored = pytree.treespec_loads(pytree.treespec_dumps(spec))
    for form in (spec, stored):
        back = pytree.tree_unflatten(leaves, form)
        assert isinstance(back, IPOMetrics)
        assert list(back.keys()) == list(metrics.keys())
        assert all(same_bits(back[name], value) for name, value in metrics.items())
        assert_equal_metrics(back.total(), metrics.total())


# ---------------------------------------------------------------------------------------------
# Sums


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("masked", [0.2, 1.0])
def test_total_of_segments_is_the_unpacked(backend: Backend, name: str, masked: float) -> None:
    case = make(backend, 260, teacher=True, weights=True, segments=name, masked=masked)
    packed = metrics_of(case)
    assert packed.sums.shape[1] == case.cu_seqlens.numel() - 1
    assert_equal_metrics(packed.total(), metrics_of(case.with_(cu_seqlens=None)))


def test_total_without_segments_is_itself(backend: Backend) -> None:
    metrics = metrics_of(make(backend))
    assert metrics.total() is metrics


@pytest.mark.parametrize("cuts", [(1,), (TOKENS - 1,), (0,), (300, 300, 900)])
def test_micro_batches_add_to_the_batch(backend: Backend, cuts: tuple[int, ...]) -> None:
    case = make(backend, teacher=True, weights=True)
    ends = itertools.pairwise((0, *cuts, TOKENS))
    parts = [metrics_of(part(case, begin, end)) for begin, end in ends]
    assert_equal_metrics(sum(parts), metrics_of(case))
    assert_equal_metrics(sum(reversed(parts)), metrics_of(case))


def test_packed_micro_batches_add_segment_by_segment(backend: Backend) -> None:
    case = make(backend)
    ends = cu_seqlens([200, 0, 300]).to(backend.device)
    batches = [part(case, begin, begin + 500) for begin in (0, 500)]
    added = sum(metrics_of(batch.with_(cu_seqlens=ends)) for batch in batches)
    for segment, (begin, end) in enumerate(itertools.pairwise(ends.tolist())):
        alone = sum(metrics_of(part(batch, begin, end)) for batch in batches)
        for name, value in alone.items():
            torch.testing.assert_close(added[name][segment], value, rtol=1e-12, atol=1e-14)


def test_a_mean_of_means_would_be_biased(backend: Backend) -> None:
    case = make(backend)
    parts = [metrics_of(part(case, 0, 10)), metrics_of(part(case, 10, TOKENS))]
    whole = metrics_of(case)["is_masked"]
    assert sum(parts)["is_masked"].item() == pytest.approx(whole.item(), rel=1e-12)
    assert sum(p["is_masked"] for p in parts).item() / 2 != pytest.approx(whole.item(), rel=1e-3)


def test_what_cannot_be_added_is_refused(backend: Backend) -> None:
    case = make(backend, segments="sevens")
    packed, whole = metrics_of(case), metrics_of(case.with_(cu_seqlens=None))
    with pytest.raises(
        ValueError, match=r"expected equal segments to add, got shapes .* total\(\)"
    ):
        packed + whole
    with pytest.raises(ValueError, match="expected both or neither to have each of teacher_kl"):
        whole + metrics_of(make(backend, teacher=True))
    with pytest.raises(TypeError, match="unsupported operand"):
        whole + 1
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + whole


# ---------------------------------------------------------------------------------------------
# Nothing to measure


@pytest.mark.parametrize("segments", [None, [0], [0, 0, 0], []])
def test_metrics_of_nothing_are_zero(backend: Backend, segments: list[int] | None) -> None:
    case = random_case(0, dtypes=DTYPES["fp64"], teacher=True)
    if segments is not None:
        case = case.with_(cu_seqlens=cu_seqlens(segments))
    metrics = metrics_of(case.to(backend.device))
    shape = () if segments is None else (len(segments),)
    assert all(value.shape == shape and not value.any() for value in metrics.values())
    assert not any(metrics.total().tolist().values())


def test_nothing_changes_no_sum(backend: Backend) -> None:
    case = make(backend)
    whole, nothing = metrics_of(case), metrics_of(part(case, 0, 0))
    no_segments = metrics_of(part(case, 0, 0).with_(cu_seqlens=cu_seqlens([]).to(backend.device)))
    for added in (whole + nothing, nothing + whole, whole + no_segments.total()):
        assert all(same_bits(added[name], value) for name, value in whole.items())


# ---------------------------------------------------------------------------------------------
# Ranks


RANK_SEGMENTS = ([300, 0, 100], [40, 5, 50, 130, 10])  # rank 1 trains on no token


def rank_case(rank: int) -> LogprobsCase:
    lengths = RANK_SEGMENTS[rank]
    masked = (0.2, 1.0)[rank]
    case = random_case(sum(lengths), dtypes=DTYPES["fp64"], teacher=True, seed=rank, masked=masked)
    return case.with_(cu_seqlens=cu_seqlens(lengths))


def run_rank(rank: int, backend_name: str, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    with Backend(backend_name).active() as backend:
        metrics = metrics_of(rank_case(rank).to(backend.device))
        before = [leaf.clone() for leaf in pytree.tree_leaves(metrics)]
        reduced = metrics.all_reduce()
        assert all(map(same_bits, before, pytree.tree_leaves(metrics)))
    torch.save([reduced.means, reduced.sums, reduced.extremes], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_reduce_totals_the_union(backend: Backend, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, (backend.name, str(tmp_path)), nprocs=2)
    ranks = [
        IPOMetrics(*torch.load(tmp_path / f"{rank}.pt"), has_teacher=True) for rank in range(2)
    ]
    one, other = (rank_case(rank).to(backend.device) for rank in range(2))
    both = {
        name: torch.cat([tensor, other.tensors[name]])
        for name, tensor in one.tensors.items()
        if name != "cu_seqlens"
    }
    union = one.with_(**both, cu_seqlens=None)
    for reduced in ranks:
        assert_equal_metrics(reduced, metrics_of(union))
        assert same_bits(reduced.sums, ranks[0].sums)
