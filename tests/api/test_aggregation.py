"""Each aggregation mode against plain loops: packed, padded, in micro-batches, over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st

import ipo_ext
from ipo_ext.aggregation import aggregate, aggregation_counts
from tests.support.host_casts import join_group

LENGTH = 7.0  # of the mode "constant"


class Sequence(NamedTuple):
    """One sequence: a loss and a mask for each token, and its prompt group."""

    losses: list[float]
    mask: list[bool]
    group: int

    @property
    def trained(self) -> list[float]:
        return [loss for loss, trains in zip(self.losses, self.mask, strict=True) if trains]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def token_mean(sequences: list[Sequence]) -> float:
    return mean([loss for sequence in sequences for loss in sequence.trained])


def sequence_mean_token_mean(sequences: list[Sequence]) -> float:
    return mean([mean(sequence.trained) for sequence in sequences if sequence.trained])


def sequence_mean_token_sum(sequences: list[Sequence]) -> float:
    return mean([math.fsum(sequence.trained) for sequence in sequences if sequence.trained])


def group_mean_token_mean(sequences: list[Sequence]) -> float:
    groups: dict[int, list[float]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.group, []).extend(sequence.trained)
    return mean([mean(losses) for losses in groups.values() if losses])


def constant(sequences: list[Sequence]) -> float:
    return sequence_mean_token_sum(sequences) / LENGTH


EXPECTED: dict[str, Callable[[list[Sequence]], float]] = {
    function.__name__: function
    for function in (
        token_mean,
        sequence_mean_token_mean,
        sequence_mean_token_sum,
        group_mean_token_mean,
        constant,
    )
}
MODES = tuple(EXPECTED)
GROUPS = 4

sequences_of_any_length = st.lists(
    st.builds(
        lambda tokens, group: Sequence([t[0] for t in tokens], [t[1] for t in tokens], group),
        st.lists(st.tuples(st.floats(-8, 8, width=32), st.booleans()), max_size=6),
        st.integers(0, GROUPS - 1),
    ),
    min_size=1,
    max_size=7,
)


def packed(sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Losses, mask and the keywords that say where sequences lie."""
    losses = torch.tensor([loss for s in sequences for loss in s.losses], dtype=torch.float64)
    mask = torch.tensor([trains for s in sequences for trains in s.mask], dtype=torch.bool)
    ends = torch.tensor([len(s.losses) for s in sequences]).cumsum(0)
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int()
    return losses, mask, {"cu_seqlens": cu_seqlens}


def padded(sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The same as rows; what pads them is infinite and does not train."""
    width = max(len(s.losses) for s in sequences)
    losses = torch.full((len(sequences), width), torch.inf, dtype=torch.float64)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        losses[row, : len(sequence.losses)] = torch.tensor(sequence.losses, dtype=torch.float64)
        mask[row, : len(sequence.mask)] = torch.tensor(sequence.mask, dtype=torch.bool)
    return losses, mask, {}


LAYOUTS = (packed, padded)


def optional(mode: str, sequences: list[Sequence]) -> dict[str, Any]:
    groups = torch.tensor([sequence.group for sequence in sequences])
    return {"groups": groups} if mode == "group_mean_token_mean" else {}


def counts_of(mode: str, sequences: list[Sequence], layout: Callable[..., Any]) -> torch.Tensor:
    _, mask, where = layout(sequences)
    extra = optional(mode, sequences)
    if extra:
        extra["num_groups"] = GROUPS
    return aggregation_counts(mode, mask, **where, **extra)


def total(mode: str, sequences: list[Sequence], layout: Callable[..., Any], **counts: Any) -> float:
    """The sum that every loss of the package is, of given token losses."""
    losses, mask, where = layout(sequences)
    extra = {**optional(mode, sequences), **counts}
    if mode == "constant":
        extra["length"] = LENGTH
    weights, normalizer = aggregate(mode, mask, **where, **extra)
    assert (weights is None) == (mode not in ("sequence_mean_token_mean", "group_mean_token_mean"))
    kept = losses[mask] if weights is None else losses[mask] * weights[mask]
    return 0.0 if normalizer == 0 else (kept.sum() / normalizer).item()


def close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-6)  # weights are fp32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@given(sequences=sequences_of_any_length)
def test_a_mode_is_what_its_name_says(mode, layout, sequences):
    counts = {"step_counts": counts_of(mode, sequences, layout)}
    if mode == "group_mean_token_mean":
        assert close(total(mode, sequences, layout, **counts), EXPECTED[mode](sequences))
    else:
        for given_counts in ({}, counts):
            assert close(total(mode, sequences, layout, **given_counts), EXPECTED[mode](sequences))


@pytest.mark.parametrize("mode", MODES)
@given(sequences=sequences_of_any_length, cut=st.integers(0, 7))
def test_micro_batches_add_up_to_the_step(mode, sequences, cut):
    micro_batches = [part for part in (sequences[:cut], sequences[cut:]) if part]
    counts = sum(counts_of(mode, part, packed) for part in micro_batches)
    losses = [total(mode, part, packed, step_counts=counts) for part in micro_batches]
    assert close(math.fsum(losses), EXPECTED[mode](sequences))


def test_groups_of_one_call_need_no_counts():
    sequences = [
        Sequence([1.0, 2.0], [True, True], 1),
        Sequence([4.0], [True], 0),
        Sequence([8.0], [True], 1),
    ]
    assert close(
        total("group_mean_token_mean", sequences, padded), mean([4.0, mean([1.0, 2.0, 8.0])])
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_losss_policy_metric_is_the_aggregated_loss(mode):
    """Weights average 1, so the metric, a mean over tokens, is the loss for means of means."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    extra = {"length": LENGTH} if mode == "constant" else {}
    if mode == "group_mean_token_mean":
        extra = {"groups": torch.tensor([0, 1])}
    weights, normalizer = aggregate(mode, mask, **extra)
    logprobs = torch.tensor([[-1.0, -1.25, -9.0], [-0.5, -9.0, -9.0]])
    advantages = torch.tensor([[1.0, -2.0, torch.nan], [3.0, torch.nan, torch.nan]])
    out = ipo_ext.ipo_loss(
        logprobs, logprobs, advantages, mask, loss_weights=weights, normalizer=normalizer
    )
    rows = [Sequence((-advantages[i]).tolist(), mask[i].tolist(), i) for i in range(2)]
    assert close(out.loss.item(), EXPECTED[mode](rows))
    if mode.endswith("token_mean"):
        assert close(out.metrics["pg_loss"].item(), out.loss.item())


@pytest.mark.parametrize("mode", MODES)
def test_nothing_that_trains_is_a_loss_of_zero(mode):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    extra = {"length": LENGTH} if mode == "constant" else {}
    if mode == "group_mean_token_mean":
        extra = {"groups": torch.tensor([0, 1])}
    weights, normalizer = aggregate(mode, mask, **extra)
    assert weights is None or weights.isfinite().all()
    trainer = torch.full((2, 3), -1.0, requires_grad=True)
    out = ipo_ext.ipo_loss(
        trainer,
        torch.full((2, 3), torch.nan),
        torch.ones(2, 3),
        mask,
        loss_weights=weights,
        normalizer=normalizer,
    )
    out.loss.backward()
    assert (out.loss, normalizer) == (0, 0)
    assert torch.equal(trainer.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("mode", MODES)
def test_it_compiles_without_a_break_to_the_same_numbers(mode):
    sequences = [Sequence([1.0, 2.0], [True, True], 1), Sequence([4.0, 8.0], [True, False], 0)]
    _, mask, where = packed(sequences)
    extra = {**optional(mode, sequences), **({"length": LENGTH} if mode == "constant" else {})}
    run = torch.compile(aggregate, fullgraph=True, backend="aot_eager")
    for eager, compiled in zip(
        aggregate(mode, mask, **where, **extra), run(mode, mask, **where, **extra), strict=True
    ):
        assert (eager is None and compiled is None) or torch.equal(eager, compiled)


# -------------------------------------------------------------------------------------------------
# Ranks

STEP = [
    [Sequence([1.0, 2.0, 3.0], [True, True, False], 0), Sequence([5.0], [True], 1)],
    [Sequence([7.0, 11.0], [True, True], 1)],
]


def on_rank(rank: int, meeting: str) -> None:
    join_group(rank, meeting)
    world = dist.group.WORLD
    for mode in MODES:
        _, mask, where = packed(STEP[rank])
        extra = optional(mode, STEP[rank])
        more = {"num_groups": 2} if extra else {}
        counts = aggregation_counts(mode, mask, **where, **extra, **more, group=world)
        shares = [total(mode, STEP[rank], packed, step_counts=counts)]
        if not extra:
            shares.append(total(mode, STEP[rank], packed, group=world))
        for share in shares:
            loss = torch.tensor(share)
            dist.all_reduce(loss)
            assert close(loss.item(), EXPECTED[mode](STEP[0] + STEP[1])), mode

    # A partition that one rank breaks is known to all of them, and none waits.
    broken = torch.tensor([0, 2 if rank == 1 else 4], dtype=torch.int32)
    mask = torch.ones(4, dtype=torch.bool)
    _, normalizer = aggregate("token_mean", mask, broken, group=world)
    assert normalizer.isnan()
    dist.destroy_process_group()


def test_two_ranks_add_up_to_the_step(tmp_path):
    torch.multiprocessing.spawn(on_rank, (str(tmp_path / "meeting"),), nprocs=2)


# -------------------------------------------------------------------------------------------------
# What is refused

MASK = torch.ones(2, 3, dtype=torch.bool)
PACKED = torch.ones(6, dtype=torch.bool)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "words", "arguments", "keywords"),
    [
        (ValueError, "mode: expected one of", ("mean", MASK), {}),
        (TypeError, "loss_mask: expected dtype torch.bool", ("token_mean", MASK.float()), {}),
        (TypeError, "loss_mask: expected a tensor", ("token_mean", [True]), {}),
        (ValueError, "loss_mask: expected at least one", ("token_mean", MASK[0, 0]), {}),
        (ValueError, "length: expected a finite number > 0", ("constant", MASK), {}),
        (ValueError, "length: expected a finite number > 0", ("constant", MASK), {"length": 0}),
        (ValueError, "length: expected None", ("token_mean", MASK), {"length": 3}),
        (ValueError, "groups: expected None", ("token_mean", MASK), {"groups": int32(0, 1)}),
        (ValueError, "groups: expected the prompt group", ("group_mean_token_mean", MASK), {}),
        (
            ValueError,
            r"groups: expected shape \[2\]",
            ("group_mean_token_mean", MASK),
            {"groups": int32(0)},
        ),
        (
            IndexError,
            r"groups: expected ids in \[0, 2\)",
            ("group_mean_token_mean", MASK),
            {"groups": int32(0, 2)},
        ),
        (TypeError, "cu_seqlens: expected dtype torch.int32", ("token_mean", PACKED, MASK), {}),
        (RuntimeError, "cu_seqlens: expected a partition", ("token_mean", PACKED, int32(0, 5)), {}),
        (
            RuntimeError,
            "cu_seqlens: expected a partition",
            ("token_mean", PACKED, int32(0, 4, 3, 6)),
            {},
        ),
        (RuntimeError, "cu_seqlens: expected a partition", ("token_mean", PACKED, int32(1, 6)), {}),
        (
            ValueError,
            r"step_counts: expected shape \[2\]",
            ("token_mean", MASK),
            {"step_counts": torch.tensor([1, 2, 3])},
        ),
        (
            TypeError,
            "step_counts: expected dtype torch.int64",
            ("token_mean", MASK),
            {"step_counts": torch.tensor([1.0, 2.0])},
        ),
    ],
)
def test_refusals_say_what_was_expected(error, words, arguments, keywords):
    with pytest.raises(error, match=words):
        aggregate(*arguments, **keywords)


@pytest.mark.parametrize("mode", ["token_mean", "group_mean_token_mean"])
def test_a_process_group_goes_with_the_counts(mode):
    beside = {} if mode.startswith("group") else {"step_counts": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match="group: expected None beside step_counts"):
        aggregate(mode, MASK, group=object(), **beside)


def test_counts_of_groups_ask_for_their_number():
    with pytest.raises(ValueError, match="num_groups: expected the number of prompt groups"):
        aggregation_counts("group_mean_token_mean", MASK, groups=int32(0, 1))
    with pytest.raises(ValueError, match="num_groups: expected None"):
        aggregation_counts("token_mean", MASK, num_groups=2)


def test_a_fault_that_cannot_be_seen_poisons_the_normalizer():
    """Traced, as on CUDA, nobody may look at the numbers: the loss must not be a plausible one."""
    run = torch.compile(aggregate, fullgraph=True, backend="aot_eager")
    _, normalizer = run("token_mean", PACKED, int32(0, 5))
    assert normalizer.isnan()
    _, normalizer = run("group_mean_token_mean", MASK, groups=int32(0, 9))
    assert normalizer.isnan()
