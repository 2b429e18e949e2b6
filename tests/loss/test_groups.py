"""Metrics by group, of sequences and of tokens: against one group's tokens alone, in float64."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import ipo_ext
from ipo_ext import IPOConfig, IPOMetrics, _metric_groups
from tests.support import hidden, logits, logprobs
from tests.support.against_reference import EXACT_METRICS, assert_sums_close, metric_scales
from tests.support.backends import Backend
from tests.support.cases import LogprobsCase, evaluate, same_bits
from tests.support.logprobs import random_case
from tests.support.ranks import on_ranks

GROUPS = 4


def drawn_ids(shape: Any, seed: int = 0, groups: int = GROUPS - 1) -> torch.Tensor:
    """Of all groups but the last."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(groups, shape, generator=generator, dtype=torch.int32)


def by_group(case: Any, backend: Backend, ids: torch.Tensor, **more: Any) -> IPOMetrics:
    more = {"groups": ids.to(backend.device), "num_groups": GROUPS, **more}
    metrics = case.to(backend.device).call(**more).metrics.by_group
    assert isinstance(metrics, IPOMetrics)
    assert metrics.sums.shape[1] == more["num_groups"]
    return metrics


def of_tokens(case: Any, ids: torch.Tensor) -> torch.Tensor:
    """The group of each token, of groups of segments."""
    if case.cu_seqlens is None or ids.shape == case.loss_mask.shape:
        return ids
    return ids.repeat_interleave(case.cu_seqlens.diff().long())


def alone(case: Any, token_ids: torch.Tensor, group: int) -> Any:
    """The call in which no other token trains."""
    return case.with_(loss_mask=case.loss_mask & (token_ids == group), cu_seqlens=None)


def assert_as_alone(case: Any, backend: Backend, ids: torch.Tensor, **more: Any) -> IPOMetrics:
    """Each group's sums and counts are those of the call for its tokens."""
    ours = by_group(case, backend, ids, **more)
    for group in range(GROUPS):
        theirs = alone(case, of_tokens(case, ids), group).to(backend.device).call(**more).metrics
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours.extremes[:, group], theirs.extremes)
        torch.testing.assert_close(ours.sums[:, group], theirs.sums, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(ours.means[:, group], theirs.means, rtol=2e-7, atol=1e-12)
        if theirs.histogram is not None:
            assert torch.equal(ours.histogram[:, group], theirs.histogram)
    return ours


def assert_near_float64(case: LogprobsCase, backend: Backend, ids: torch.Tensor) -> None:
    """Each group's metrics are the reference's of its tokens in float64, within 8 ulp."""
    ours = by_group(case, backend, ids)
    resolution = torch.finfo(case.compute_dtype)
    for group in range(GROUPS):
        exact, scales = metric_scales(alone(case, of_tokens(case, ids), group))
        for name in EXACT_METRICS:
            assert same_bits(ours[name][group].cpu(), exact[name].to(case.compute_dtype)), name
        for name, scale in scales.items():
            error = (ours[name][group].cpu().double() - exact[name]).abs()
            limit = 8 * resolution.eps * scale.clamp(min=resolution.smallest_normal)
            assert error <= (limit if scale > 0 else 0), f"{name}: {error} over {limit}"


# -------------------------------------------------------------------------------------------------
# What they are


@hypothesis.given(data=st.data())
def test_any_case_is_the_float64_of_its_groups(backend_name: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    tokens, seed = sum(lengths), data.draw(st.integers(0, 2**32))
    case = random_case(
        tokens,
        seed=seed,
        teacher=data.draw(st.booleans()),
        weights=data.draw(st.booleans()),
        dtypes=logprobs.DTYPES[data.draw(st.sampled_from(sorted(logprobs.DTYPES)))],
    ).with_(cu_seqlens=logprobs.cu_seqlens(lengths))
    apart = data.draw(st.sampled_from(["tokens", "segments"]))
    if len(lengths) == tokens:
        case, apart = case.with_(cu_seqlens=None), "tokens"
    ids = drawn_ids((tokens if apart == "tokens" else len(lengths),), seed)
    with Backend(backend_name).active() as backend:
        assert_near_float64(case, backend, ids)
        assert_as_alone(case, backend, ids, histogram=True)


@pytest.mark.parametrize("segments", ["empty-around", "empty-many", "at-tiles", "sevens"])
def test_of_segments(backend: Backend, segments: str) -> None:
    tokens = min(2100, logprobs.MOST_TOKENS[segments])
    case = random_case(tokens, segments=segments, teacher=True, weights=True)
    ids = drawn_ids((case.cu_seqlens.numel() - 1,))
    assert_as_alone(case, backend, ids, histogram=True)


@pytest.mark.parametrize("segments", [None, "empty-around"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 257, 2049])
def test_of_tokens(backend: Backend, tokens: int, segments: str | None) -> None:
    case = random_case(tokens, segments=segments, teacher=True, weights=True)
    assert_as_alone(case, backend, drawn_ids((tokens,)), histogram=True)


@pytest.mark.parametrize("of_rows", [True, False])
def test_of_rows_and_of_their_tokens(backend: Backend, of_rows: bool) -> None:
    flat = random_case(60, teacher=True)
    case = flat.map_tokens(lambda tensor: tensor.view(6, 10))
    ids = drawn_ids((6,) if of_rows else (6, 10))
    ours = by_group(case, backend, ids)
    token_ids = ids[:, None].expand(6, 10) if of_rows else ids
    theirs = by_group(flat, backend, token_ids.flatten())
    torch.testing.assert_close(ours.sums, theirs.sums, rtol=1e-12, atol=1e-13)
    assert torch.equal(ours.extremes, theirs.extremes)
    whole = case.to(backend.device).call(groups=ids.to(backend.device), num_groups=GROUPS).metrics
    assert_sums_close(whole, flat.to(backend.device).call().metrics, flat)


CU_SEQLENS = torch.tensor([0, 9, 9, 20, 37], dtype=torch.int32)
CASES: dict[str, Any] = {
    "logits": functools.partial(logits.random_case, 37),
    "logits-replayed": functools.partial(logits.random_case, 37, ids=5),
    # A row alone: its product does not depend on which others train.
    "hidden": functools.partial(hidden.random_case, chunk_size=1),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("of_segments", [True, False])
def test_every_loss_has_them(backend: Backend, kind: str, entropy: bool, of_segments: bool) -> None:
    case = CASES[kind](cu_seqlens=CU_SEQLENS)
    ids = drawn_ids((4,) if of_segments else (37,))
    ours = assert_as_alone(case, backend, ids, entropy=entropy, histogram=True)
    assert ("entropy" in ours) == entropy
    assert ("replayed" in ours) == (kind == "logits-replayed")


@pytest.mark.parametrize(
    "config", [IPOConfig.geometric(0.9, 1.1), IPOConfig.icepop_2401(), IPOConfig.ppo()]
)
def test_a_verdict_counts_in_its_sequences_group(backend: Backend, config: IPOConfig) -> None:
    case = random_case(200, segments="sevens", config=config).to(backend.device)
    ids = drawn_ids((case.cu_seqlens.numel() - 1,)).to(backend.device)
    whole = case.call(groups=ids, num_groups=GROUPS).metrics
    segments = case.call().metrics
    for group in range(GROUPS):
        sums = segments.sums[:, ids == group].sum(1)
        torch.testing.assert_close(whole.by_group.sums[:, group], sums, rtol=1e-12, atol=1e-13)


def test_pieces_of_sequences_have_groups_of_their_own(backend: Backend) -> None:
    """Under context parallelism ids are of segments, which are pieces there."""
    case = random_case(70, segments="sevens").to(backend.device)
    pieces = torch.arange(case.cu_seqlens.numel() - 1, dtype=torch.int32)
    shared = {"sequence_ids": (pieces // 3).to(backend.device), "num_sequences": 4}
    ours = by_group(case, backend, pieces // 3)
    out = case.call(**shared, groups=shared["sequence_ids"], num_groups=GROUPS)
    assert torch.equal(out.metrics.by_group.sums, ours.sums)
    assert torch.equal(out.metrics.sums, ours.sums)


# -------------------------------------------------------------------------------------------------
# What they leave alone


@pytest.mark.parametrize("of_segments", [True, False])
def test_nothing_else_changes(backend: Backend, of_segments: bool) -> None:
    case = random_case(90, segments="empty-between", teacher=True).to(backend.device)
    ids = drawn_ids((5,) if of_segments else (90,)).to(backend.device)
    plain, grouped = evaluate(case), evaluate(case, groups=ids, num_groups=GROUPS)
    assert same_bits(plain.loss, grouped.loss)
    assert same_bits(plain.gradient, grouped.gradient)
    assert same_bits(plain.metrics.sums, grouped.metrics.sums)
    assert same_bits(plain.metrics.means, grouped.metrics.means)
    assert plain.metrics.by_group is None


def test_a_token_that_does_not_train_may_have_any_id(backend: Backend) -> None:
    case = random_case(300)
    ids = drawn_ids((300,))
    garbage = torch.where(case.loss_mask, ids, -7)
    ours, theirs = by_group(case, backend, garbage), by_group(case, backend, ids)
    assert same_bits(ours.sums, theirs.sums)


def test_the_same_bits_in_every_run(backend: Backend) -> None:
    case, ids = random_case(3000, spread=3.0), drawn_ids((3000,))
    first, second = (by_group(case, backend, ids) for _ in range(2))
    assert same_bits(first.sums, second.sums)


def test_as_many_groups_as_may_be(backend: Backend) -> None:
    case = random_case(1500)
    ids = torch.arange(1500, dtype=torch.int32) % 1024
    ours = by_group(case, backend, ids, num_groups=1024)
    active = [case.loss_mask[group::1024].sum() for group in range(1024)]
    assert ours.sums[0].tolist() == [float(count) for count in active]


# -------------------------------------------------------------------------------------------------
# They combine


def assert_same(ours: IPOMetrics, theirs: IPOMetrics) -> None:
    assert torch.equal(ours.extremes, theirs.extremes)
    assert torch.equal(ours.histogram, theirs.histogram)
    torch.testing.assert_close(ours.sums, theirs.sums, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.means, theirs.means, rtol=2e-7, atol=1e-12)


def halves(case: LogprobsCase, ids: torch.Tensor) -> list[tuple[LogprobsCase, torch.Tensor]]:
    """Of unequal lengths, each packed."""
    parts = []
    for part in (slice(0, 90), slice(90, 250)):
        half = case.map_tokens(lambda tensor, part=part: tensor[part])
        length = len(half.loss_mask)
        ends = torch.tensor([0, length // 3, length], dtype=torch.int32)
        parts.append((half.with_(cu_seqlens=ends), ids[part]))
    return parts


def wanted(ids: torch.Tensor) -> dict[str, Any]:
    return {"groups": ids, "num_groups": GROUPS, "histogram": True}


def test_merged(backend: Backend) -> None:
    case, ids = random_case(250, teacher=True).to(backend.device), drawn_ids((250,))
    ids = ids.to(backend.device)
    whole = case.call(**wanted(ids)).metrics
    parts = [half.call(**wanted(part)).metrics.total() for half, part in halves(case, ids)]
    merged = sum(parts)
    assert_same(merged, whole)
    assert_same(merged.by_group, whole.by_group)
    assert_same(whole.by_group.total(), whole)
    assert merged.total() is merged
    low, high = merged.by_group.quantile(0.5)
    assert low.shape == high.shape == (GROUPS,)


def reduce_on_a_rank() -> None:
    case, ids = random_case(250, teacher=True), drawn_ids((250,))
    whole = case.call(**wanted(ids)).metrics
    half, part = halves(case, ids)[dist.get_rank()]
    reduced = half.call(**wanted(part)).metrics.all_reduce()
    assert_same(reduced, whole)
    assert_same(reduced.by_group, whole.by_group)
    plain = half.call(histogram=True).metrics.all_reduce()
    assert_same(plain, whole)
    assert plain.by_group is None
    assert plain.quantile(0.9) == whole.quantile(0.9)


def test_reduced_over_two_processes_they_are_one_processs_whole() -> None:
    """And the histogram, with groups and without."""
    on_ranks(2, reduce_on_a_rank)


def share_a_vocabulary() -> None:
    case, ids = logits.random_case(37), drawn_ids((37,))
    whole = case.call(**wanted(ids)).metrics.by_group
    shard = case.with_(logits=case.logits.chunk(2, -1)[dist.get_rank()])
    of_rank = {"tp_group": dist.group.WORLD, "vocab_size": case.logits.shape[-1]}
    ours = shard.call(**wanted(ids), **of_rank).metrics.by_group
    assert torch.equal(ours.histogram, whole.histogram)
    torch.testing.assert_close(ours.means, whole.means, rtol=1e-5, atol=1e-6)


def test_of_a_vocabulary_that_ranks_share() -> None:
    on_ranks(2, share_a_vocabulary)


def test_what_cannot_be_added() -> None:
    case, ids = random_case(30), drawn_ids((30,))
    plain = case.call().metrics
    grouped = case.call(groups=ids, num_groups=GROUPS).metrics
    more = case.call(groups=ids, num_groups=GROUPS + 1).metrics
    with pytest.raises(ValueError, match="both or neither to have groups, got them in the second"):
        plain + grouped
    with pytest.raises(ValueError, match="equally many groups to add, got 4 and 5"):
        grouped + more


def test_travels_as_a_pytree() -> None:
    case, ids = random_case(30), drawn_ids((30,))
    for counted in (False, True):
        metrics = case.call(groups=ids, num_groups=GROUPS, histogram=counted).metrics
        leaves, spec = pytree.tree_flatten(metrics)
        again = pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec)))
        assert torch.equal(again.by_group.sums, metrics.by_group.sums)
        assert (again.histogram is None) == (again.by_group.histogram is None) == (not counted)
        assert metrics.to("meta").by_group.sums.device.type == "meta"


@pytest.mark.parametrize("of_segments", [True, False])
def test_compiled(backend: Backend, of_segments: bool) -> None:
    case = random_case(40, segments="empty-between").to(backend.device)
    ids = drawn_ids((5,) if of_segments else (40,)).to(backend.device)
    torch.compiler.reset()
    function = torch.compile(ipo_ext.ipo_loss, backend="aot_eager", fullgraph=True)
    ours = case.call(function, **wanted(ids)).metrics.by_group
    theirs = case.call(**wanted(ids)).metrics.by_group
    assert torch.equal(ours.sums, theirs.sums)
    assert torch.equal(ours.histogram, theirs.histogram)


def test_compiled_with_a_setting_that_changes(backend: Backend) -> None:
    case = random_case(40).to(backend.device)
    ids = drawn_ids((40,)).to(backend.device)

    def step(kl_tau: float) -> torch.Tensor:
        config = IPOConfig(kl_tau=kl_tau)
        metrics = case.with_(config=config).call(groups=ids, num_groups=GROUPS).metrics
        return metrics.by_group["kl_loss"]

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for kl_tau in (0.1, 0.2, 0.3):
        assert torch.equal(compiled(kl_tau), step(kl_tau))


# -------------------------------------------------------------------------------------------------
# What is wrong


@pytest.mark.parametrize("wrong", [-1, GROUPS, 2**31 - 1])
@pytest.mark.parametrize("of_segments", [True, False])
def test_an_id_beyond_the_groups(
    backend: Backend, wrong: int, of_segments: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raises on the CPU, eager or compiled; on a GPU loss and gradient are NaN."""
    case = random_case(40, masked=0.0, segments="empty-between").to(backend.device)
    ids = drawn_ids((5,) if of_segments else (40,))
    ids[3] = wrong
    named = {"groups": ids.to(backend.device), "num_groups": GROUPS}
    if backend.name == "cuda":
        out = evaluate(case, **named)
        assert out.loss.isnan()
        assert out.gradient.isnan().all()
        return
    with pytest.raises(IndexError, match=rf"groups: expected ids in \[0, 4\).*got {wrong} at"):
        case.call(**named)
    torch.compiler.reset()
    compiled = torch.compile(ipo_ext.ipo_loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="groups: expected ids from 0 to num_groups - 1"):
        case.call(compiled, **named)
    if backend.name == "emulated":
        monkeypatch.setattr(_metric_groups, "_is_on_cpu", lambda _: False)
        out = evaluate(case, **named)
        assert out.loss.isnan()
        assert out.gradient.isnan().all()


def call_with_a_wrong_id() -> None:
    """On the first of two ranks that share the sequences, and judge them."""
    rank = dist.get_rank()
    case = random_case(20, seed=rank, config=IPOConfig.geometric(0.5, 2.0))
    case = case.with_(cu_seqlens=torch.tensor([0, 12, 20], dtype=torch.int32))
    ids = torch.tensor([0, 1], dtype=torch.int32)
    shared = {"sequence_ids": ids, "num_sequences": 2, "cp_group": dist.group.WORLD}
    wrong = {"groups": ids + 3 * (rank == 0), "num_groups": 3}
    if rank == 0:
        with pytest.raises(IndexError, match=r"groups: .*got 3 at index \[0\]"):
            case.call(**shared, **wrong)
    else:
        assert case.call(**shared, **wrong).metrics.by_group.sums.shape[1] == 3
    reduced = case.call(**shared, groups=ids, num_groups=2).metrics
    reduced = reduced.all_reduce(by_sequence=True)
    assert torch.equal(reduced.by_group.sums, reduced.sums)


def test_ranks_that_share_sequences_do_not_wait_for_one_that_raises() -> None:
    on_ranks(2, call_with_a_wrong_id)


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (TypeError, "groups: expected a tensor, got list", {"groups": [0, 1]}),
        (TypeError, "groups: expected dtype torch.int32", {"groups": torch.zeros(30).long()}),
        (ValueError, "groups: expected device cpu", {"groups": drawn_ids((30,)).to("meta")}),
        (ValueError, r"shape \[2\], one for each segment of .*, got \[3\]", {"groups": (3,)}),
        (TypeError, "num_groups: expected an int with groups, got NoneType", {"num_groups": None}),
        (TypeError, "num_groups: expected an int with groups, got bool", {"num_groups": True}),
        (ValueError, "num_groups: expected a number from 1 to 1024, got 0", {"num_groups": 0}),
        (ValueError, "num_groups: .* got 1025", {"num_groups": 1025}),
        (ValueError, "groups: expected a tensor with num_groups, got None", {"groups": None}),
        (
            ValueError,
            "groups: expected one for each sequence, because config judges whole sequences",
            {"config": IPOConfig.geometric(0.9, 1.1)},
        ),
    ],
)
def test_errors(error: type[Exception], words: str, change: dict[str, Any]) -> None:
    case = random_case(30).with_(cu_seqlens=torch.tensor([0, 9, 30], dtype=torch.int32))
    named: dict[str, Any] = {"groups": drawn_ids((30,)), "num_groups": GROUPS, **change}
    if isinstance(named["groups"], tuple):
        named["groups"] = drawn_ids(named["groups"])
    with pytest.raises(error, match=words):
        case.call(**named)


def test_ids_of_tokens_do_not_go_with_score_centering() -> None:
    config = IPOConfig.ipo(score_centering=True)
    of_ids = torch.randn(6, 3).log_softmax(-1)
    case = random_case(6, config=config, inference_mask_logprobs=of_ids)
    named = {"trainer_mask_logprobs": of_ids, "num_groups": GROUPS}
    with pytest.raises(ValueError, match=r"groups: .* config has score centering"):
        case.call(groups=drawn_ids((6,)), **named)


def test_score_centering_counts_in_its_sequences_group(backend: Backend) -> None:
    config = IPOConfig.ipo(score_centering=True)
    of_ids = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    ends = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    case = random_case(6, config=config, inference_mask_logprobs=of_ids)
    case = case.with_(trainer_mask_logprobs=of_ids + 0.1, cu_seqlens=ends).to(backend.device)
    segments = case.call().metrics
    ids = torch.tensor([1, 0, 1], dtype=torch.int32)
    ours = by_group(case, backend, ids, num_groups=2)
    expected = torch.stack([segments.sums[:, 1], segments.sums[:, [0, 2]].sum(1)], 1)
    assert "centering_loss" in ours
    torch.testing.assert_close(ours.sums, expected, rtol=1e-12, atol=1e-13)


def test_a_shape_that_may_be_of_either_is_refused() -> None:
    case = random_case(3).with_(cu_seqlens=torch.tensor([0, 1, 2, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"a shape that says what .*got \[3\].*\[1, tokens\]"):
        case.call(groups=drawn_ids((3,)), num_groups=GROUPS)
    apart = case.map_tokens(lambda tensor: tensor.view(1, 3))
    for shape in ((3,), (1, 3)):
        metrics = apart.call(groups=drawn_ids(shape), num_groups=GROUPS).metrics
        assert metrics.by_group.sums[0].sum() == case.loss_mask.sum()
