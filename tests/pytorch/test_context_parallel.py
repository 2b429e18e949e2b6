"""Sequences that ranks share: the bits of the unsharded call whatever the layout, errors on all
ranks or none, and never a hang."""

from __future__ import annotations

import datetime
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import ipo_ext
from ipo_ext import IPOConfig, IPOMetrics, LossBatch
from ipo_ext._ops import library
from ipo_ext.distributed import LocalSequences, local_sequences
from tests.support.backends import Backend
from tests.support.cases import LogprobsCase, evaluate, same_bits
from tests.support.logprobs import cu_seqlens, random_case
from tests.support.ranks import alone, on_ranks
from tests.support.shared_sequences import (
    FORMS,
    LAYOUTS,
    RULES,
    TABLE,
    Shared,
    assert_as_the_whole,
    drawn,
    local_part,
    of_the_whole,
    run_table,
    whole_batch,
    with_rule,
)

# -------------------------------------------------------------------------------------------------
# Which tokens a rank has

packed = st.lists(st.integers(0, 9), max_size=6)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
@given(lengths=packed, world=st.integers(1, 5))
def test_every_token_is_one_ranks(layout: str, lengths: list[int], world: int) -> None:
    cuts = cu_seqlens(lengths)
    parts = [local_sequences(cuts, rank, world, layout) for rank in range(world)]
    tokens = torch.cat([part.token_index for part in parts])
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    for part in parts:
        assert_pieces(part, cuts)


def assert_pieces(part: LocalSequences, cuts: torch.Tensor) -> None:
    """Each is a run of the tokens of the sequence that its id says, and its neighbours are not."""
    ends, ids, tokens = part
    assert [tensor.dtype for tensor in part] == [torch.int32, torch.int32, torch.int64]
    assert (int(ends[0]), int(ends[-1])) == (0, len(tokens))
    assert (ends.diff() > 0).all()
    assert (ids.diff() != 0).all()
    of_token = ids.long().repeat_interleave(ends.diff().long())
    assert (tokens >= cuts[of_token]).all()
    assert (tokens < cuts[of_token + 1]).all()


def test_the_layouts_are_those_of_the_hosts() -> None:
    cuts = cu_seqlens([8, 16])
    tokens = {
        layout: [local_sequences(cuts, rank, 2, layout).token_index.tolist() for rank in (0, 1)]
        for layout in LAYOUTS
    }

    def spans(*ends: tuple[int, int]) -> list[int]:
        return [token for span in ends for token in range(*span)]

    assert tokens == {
        "contiguous": [spans((0, 12)), spans((12, 24))],
        "zigzag": [spans((0, 6), (18, 24)), spans((6, 18))],
        "zigzag_per_sequence": [
            spans((0, 2), (6, 8), (8, 12), (20, 24)),
            spans((2, 6), (12, 20)),
        ],
    }


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("layout: expected one of", ([0, 4], 0, 2, "striped")),
        (r"rank: expected one of \[0, 2\)", ([0, 4], 2, 2)),
        ("rank: expected one of", ([0, 4], 0, 0)),
        ("cu_seqlens: expected integers", ([0.0, 4.0], 0, 2)),
        ("cu_seqlens: expected integers", ([], 0, 2)),
        ("cu_seqlens: expected numbers that ascend from 0", ([0, 4, 3], 0, 2)),
        ("cu_seqlens: expected numbers that ascend from 0", ([1, 4], 0, 2)),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(words: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=words):
        local_sequences(*arguments)


# -------------------------------------------------------------------------------------------------
# Pieces in one call

LENGTHS = [5, 0, 700, 1, 40, 3]


def in_pieces(case: LogprobsCase) -> tuple[LogprobsCase, dict[str, Any]]:
    """Three pieces of each sequence of LENGTHS, of which some are empty, in any order."""
    assert case.cu_seqlens is not None
    starts = case.cu_seqlens.tolist()
    pieces = [
        (sequence, begin + (end - begin) * part // 3, begin + (end - begin) * (part + 1) // 3)
        for sequence, (begin, end) in enumerate(itertools.pairwise(starts))
        for part in range(3)
    ]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(1)).tolist()
    pieces = [pieces[place] for place in order]
    pieces.sort(key=lambda piece: piece[2] - piece[1] > 233)  # the last one holds tokens
    tokens = torch.cat([torch.arange(begin, end) for _, begin, end in pieces])
    ids = torch.tensor([sequence for sequence, *_ in pieces], dtype=torch.int32)
    device = case.loss_mask.device
    ends = cu_seqlens([end - begin for _, begin, end in pieces]).to(device)
    cut = case.map_tokens(lambda tensor: tensor[tokens.to(device)]).with_(cu_seqlens=ends)
    return cut, {"sequence_ids": ids.to(device), "num_sequences": len(starts) - 1}


def assert_same_metrics(ours: IPOMetrics, theirs: IPOMetrics) -> None:
    assert torch.equal(ours.extremes, theirs.extremes)
    torch.testing.assert_close(ours.sums, theirs.sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.means, theirs.means, rtol=2e-7, atol=1e-12)


def test_metrics_of_pieces_are_their_sequences(backend: Backend) -> None:
    cuts = cu_seqlens(LENGTHS)
    case = random_case(sum(LENGTHS), teacher=True, weights=True).with_(cu_seqlens=cuts)
    case = case.to(backend.device)
    cut, ids = in_pieces(case)
    assert_same_metrics(evaluate(cut, **ids).metrics, evaluate(case).metrics)


@pytest.mark.parametrize("when", ["always", "negative_advantage"])
def test_a_group_of_one_rank_judges_its_pieces_together(backend: Backend, when: Any) -> None:
    rules = (("max_k2", 0.0, 4.0),)
    config = IPOConfig(rollout_min_ratio=0.1, sequence_rules=rules, sequence_rule_when=when)
    cuts = cu_seqlens(LENGTHS)
    case = random_case(sum(LENGTHS), config=config).with_(cu_seqlens=cuts).to(backend.device)
    cut, ids = in_pieces(case)
    with alone() as group:
        ours = evaluate(cut, cp_group=group, **ids)
        assert_same_metrics(ours.metrics, evaluate(case).metrics)
        shares = ours.metrics["sequence_dropped"] + 2 * ours.metrics["rollout_dropped"]
        assert len(shares.unique()) > 2  # both rules drop some and keep others
        mesh = dist.init_device_mesh("cpu", (1,))
        assert same_bits(evaluate(cut, cp_group=mesh, **ids).gradient, ours.gradient)


def test_a_piece_that_is_no_sequences_is_read_nowhere(backend: Backend) -> None:
    """On CUDA, where nobody looks at ids, none leaves the memory of the sums."""
    rows = torch.ones(3, 4, dtype=torch.float64, device=backend.device)
    ids = torch.tensor([1, -1, 2, 1], dtype=torch.int32, device=backend.device)
    fold = library.operators().fold_segments
    if backend.faults_raise:
        with pytest.raises(RuntimeError, match=r"^sequence_ids: expected ids in \[0, 2\), .* -1"):
            fold(rows, rows[:2], ids, 2)
        return
    sums, extremes = fold(rows, rows[:2], ids, 2)
    assert sums.tolist() == [[0, 2]] * 3
    assert extremes.tolist() == [[math.inf, 1], [-math.inf, 1]]


# -------------------------------------------------------------------------------------------------
# Among ranks

TODAY = datetime.date.today().toordinal()


def test_ranks_make_what_one_call_does(backend_name: str) -> None:
    """A tenth of the table, another each day, on two ranks or three."""
    on_ranks(2 + TODAY % 2, run_table, backend_name, drawn(TODAY, len(TABLE) // 10))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_make_what_one_call_does_in_all_cases(backend_name: str, ranks: int) -> None:
    on_ranks(ranks, run_table, backend_name, list(TABLE), seconds=1800)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"none", "weight-sum", "weight-mean"}))
def test_the_rules_of_the_table_drop_some_sequences(form: str, rule: str) -> None:
    """Else nothing above would say anything."""
    metrics = of_the_whole(Shared(form, rule, "fp32", few=False))[1].metrics
    name = "rollout_dropped" if rule == "rollout" else "sequence_dropped"
    dropped = metrics[name] > 0
    assert dropped.any()
    assert not dropped[[0, 2, 3, 4, 5, 7]].all()


def others() -> None:
    """What else holds on a rank, in one start of processes."""
    rank = dist.get_rank()
    matches_the_order_of_torch()
    is_told_of_an_error_elsewhere(rank)
    is_told_of_other_numbers(rank)
    compiles_to_the_same("aot_eager", ("logits-inplace",))
    is_called_by_all_where_one_drops_its_results(rank)
    refuses_metrics_without_sequences()
    takes_a_batch()


def test_two_ranks_agree() -> None:
    on_ranks(2, others)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_all_functions_compile_to_the_same(compiler: str) -> None:
    on_ranks(2, compiles_to_the_same, compiler, FORMS, seconds=1200)


def matches_the_order_of_torch() -> None:
    from torch.distributed.tensor.experimental import context_parallel

    ranks, tokens = dist.get_world_size(), torch.arange(24)
    mesh = dist.init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
    buffer = tokens.clone()
    with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0]):
        theirs = buffer.tolist()
    ours = local_sequences([0, 5, 24], dist.get_rank(), ranks, "zigzag")
    assert ours.token_index.tolist() == theirs


def is_told_of_an_error_elsewhere(rank: int) -> None:
    """The rank whose call breaks a rule says what; the other that there was one; and all go on."""
    for form, error, words, broken in (
        ("logits", IndexError, r"^labels: expected a token in", {"labels": 99}),
        ("hidden", IndexError, r"^labels: expected a token in", {"labels": -5}),
        ("hidden", RuntimeError, r"^num_active: expected at least", {"num_active": 1}),
        ("logprobs", IndexError, r"^sequence_ids: expected ids in \[0, 8\)", {"ids": 8}),
        ("logprobs", RuntimeError, r"^cu_seqlens: expected a partition", {"cuts": 1}),
    ):
        case = with_rule(whole_batch(form, "fp32", False), "rollout")
        local, shared, _ = local_part(case, "contiguous")
        if rank == 1:
            (name, value), *_ = broken.items()
            if name == "labels":
                local = local.with_(labels=torch.full_like(local.labels, value))
            elif name == "num_active":
                local = local.with_(num_active=value)
            elif name == "ids":
                shared["sequence_ids"] = torch.full_like(shared["sequence_ids"], value)
            else:
                local = local.with_(cu_seqlens=local.cu_seqlens + value)
        else:
            error, words = RuntimeError, "cp_group: .* got one on rank 1 of the group"
        with pytest.raises(error, match=words):
            local.call(**shared)


def is_told_of_other_numbers(rank: int) -> None:
    """Tensors of other sizes would end both processes."""
    case = with_rule(whole_batch("logprobs", "fp32", False), "rollout")
    local, shared, _ = local_part(case, "zigzag")
    shared["num_sequences"] += rank
    with pytest.raises(ValueError, match=r"num_sequences: expected the same .* got \[8, 9\]"):
        local.call(**shared)


def compiles_to_the_same(compiler: str, forms: tuple[str, ...]) -> None:
    """One graph, with the exchange in it; another number of sequences and pieces is no reason for
    wrong bits."""
    for form in forms:
        torch._dynamo.reset()
        function = type(whole_batch(form, "fp32", False)).function
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        for few in (False, True):
            shared = Shared(form, "rollout", "fp32", few)
            assert_as_the_whole(shared, "zigzag", form != "hidden", function=compiled)


def is_called_by_all_where_one_drops_its_results(rank: int) -> None:
    """Else a compiler would drop the exchange too, and leave the other rank waiting."""
    case = with_rule(whole_batch("logprobs", "fp32", False), "rollout")
    local, shared, _ = local_part(case, "zigzag")

    def step(trainer: torch.Tensor) -> torch.Tensor:
        loss = local.with_(trainer_logprobs=trainer).call(**shared).loss
        return trainer.sum() if rank == 0 else loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaf = local.trainer_logprobs.clone().requires_grad_()
    compiled(leaf).backward()
    dist.barrier()  # where a collective too few would be met


def refuses_metrics_without_sequences() -> None:
    metrics = whole_batch("logprobs", "fp32", False).with_(cu_seqlens=None).call().metrics
    with pytest.raises(ValueError, match="by_sequence: expected metrics of sequences"):
        metrics.all_reduce(by_sequence=True)


def takes_a_batch() -> None:
    """A module's call, with all of it in a LossBatch."""
    case = with_rule(whole_batch("logprobs", "fp32", False), "rollout")
    local, shared, _ = local_part(case, "zigzag")
    named = {name: value for name, value in local.arguments.items() if value is not None}
    trainer, config = named.pop("trainer_logprobs"), named.pop("config")
    batch = LossBatch(**named, **shared).to("cpu")
    ours = ipo_ext.IPOLoss(config)(trainer, batch)
    assert same_bits(ours.metrics.sums, local.call(**shared).metrics.sums)


# -------------------------------------------------------------------------------------------------
# What is refused

PIECES: dict[str, Any] = {
    "cu_seqlens": cu_seqlens([2, 1]),
    "sequence_ids": torch.zeros(2, dtype=torch.int32),
    "num_sequences": 1,
}


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (ValueError, "cu_seqlens: expected a tensor with sequence_ids", {"cu_seqlens": None}),
        (TypeError, "num_sequences: expected an int with", {"num_sequences": None}),
        (TypeError, "num_sequences: expected an int", {"num_sequences": torch.tensor(1)}),
        (TypeError, "num_sequences: expected an int", {"num_sequences": True}),
        (ValueError, r"num_sequences: expected a number in \[0", {"num_sequences": -1}),
        (ValueError, "num_sequences: expected at least 1, as .* 2 pieces", {"num_sequences": 0}),
        (ValueError, "expected a tensor with num_sequences", {"sequence_ids": None}),
        (
            ValueError,
            "sequence_ids: expected a tensor with cp_group",
            {"sequence_ids": None, "num_sequences": None, "cp_group": object()},
        ),
        (TypeError, "sequence_ids: expected dtype", {"sequence_ids": torch.zeros(2)}),
        (
            ValueError,
            r"sequence_ids: expected shape \[2\]",
            {"sequence_ids": torch.zeros(3, dtype=torch.int32)},
        ),
        (TypeError, "cp_group: expected a process group or a device", {"cp_group": "cp"}),
        (IndexError, r"sequence_ids: .* in \[0, 1\)", {"sequence_ids": PIECES["sequence_ids"] + 1}),
    ],
)
def test_refusals_say_what_was_expected(
    error: type[Exception], words: str, changes: dict[str, Any]
) -> None:
    tokens = torch.full((3,), -1.0)
    with pytest.raises(error, match=words):
        ipo_ext.ipo_loss(tokens, tokens, tokens, tokens < 0, **{**PIECES, **changes})


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
def test_a_rule_on_sequences_needs_all_of_them(rule: str) -> None:
    config = with_rule(whole_batch("logprobs", "fp32", False), rule).config
    tokens = torch.full((3,), -1.0)
    with pytest.raises(ValueError, match="cp_group: expected the ranks that share the sequences"):
        ipo_ext.ipo_loss(tokens, tokens, tokens, tokens < 0, config=config, **PIECES)
