"""Calls over sequences that ranks share, and the same calls over the whole batch: what a rank of a
group runs in tests/pytorch/test_context_parallel.py."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from typing import Any, get_args

import torch
import torch.distributed as dist

from ipo_ext import IPOConfig, IPOMetrics
from ipo_ext._sequence_rules import SequenceStatistic
from ipo_ext.distributed import Layout, LocalSequences, local_sequences
from tests.support import hidden, logits
from tests.support.backends import Backend
from tests.support.cases import Case, Evaluation, evaluate, same_bits
from tests.support.logprobs import DTYPES, cu_seqlens, random_case

LENGTHS = (24, 0, 7, 1, 33, 16, 0, 5)
FEW = (0, 2, 1)  # so few tokens that ranks have none
FORMS = ("logprobs", "logits", "logits-inplace", "hidden")
LAYOUTS = get_args(Layout)
EVERYTHING = {
    "dppo_mask_low": 0.0,
    "dppo_mask_high": math.inf,
    "kl_tau": 0.1,
}
RULES: dict[str, IPOConfig | str] = {
    "none": IPOConfig(kl_tau=0.1),
    "rollout": "min_k1",
    **{name: name for name in get_args(SequenceStatistic)},
    "negative-mean_k1": "mean_k1",
    "weight-sum": IPOConfig.sequence_tis(2.0),
    "weight-mean": IPOConfig(
        mask_rule="none", pg_form="reinforce", sequence_weight="mean", kl_tau=0.1
    ),
    "weight-and-rule": "sum_k1",
}


@dataclasses.dataclass(frozen=True)
class Shared:
    """One call in a table of them."""

    form: str
    rule: str
    dtype: str
    few: bool

    def __str__(self) -> str:
        return "-".join(map(str, dataclasses.astuple(self)))


TABLE = tuple(
    Shared(*row) for row in itertools.product(FORMS, RULES, ("fp32", "fp64"), (False, True))
)


def drawn(seed: int, count: int) -> list[Shared]:
    return random.Random(seed).sample(TABLE, count)


# -------------------------------------------------------------------------------------------------
# The whole batch


@functools.cache
def whole_batch(form: str, dtype: str, few: bool) -> Case:
    lengths = FEW if few else LENGTHS
    cuts, tokens = cu_seqlens(lengths), sum(lengths)
    number = torch.float64 if dtype == "fp64" else torch.float32
    if form == "logprobs":
        case = random_case(tokens, dtypes=DTYPES[dtype], spread=0.4, weights=True, masked=0.3)
        return case.with_(cu_seqlens=cuts, normalizer=7.0)
    if form == "hidden":
        how = {"chunk_size": 16, "has_bias": True, "token_temperature": True}
        rows: Case = hidden.random_case(tokens, 8, 33, number, **how)
    else:
        rows = logits.random_case(tokens, 33, number, token_temperature=True)
    return rows.with_(cu_seqlens=cuts, normalizer=7.0)


def with_rule(case: Case, rule: str) -> Case:
    """With bounds that about half of the sequences break, none of them near one."""
    config = RULES[rule]
    if isinstance(config, str):
        bounds = _splitting(case, config)
        config = IPOConfig(**EVERYTHING, sequence_rules=((config, *bounds),))
        if rule == "rollout":
            config = IPOConfig(**EVERYTHING, rollout_min_ratio=bounds[1])
        if rule.startswith("negative"):
            config = dataclasses.replace(config, sequence_rule_when="negative_advantage")
        if rule.startswith("weight"):
            weighed = IPOConfig.sequence_tis(math.inf)
            config = dataclasses.replace(weighed, sequence_rules=config.sequence_rules)
    return case.with_(config=config)


def _splitting(case: Case, name: str) -> tuple[float, float]:
    trainer = getattr(case, "trainer_logprobs", None)
    if trainer is None:
        trainer = case.call().logprobs
    x = trainer.double() - case.inference_logprobs.double()
    reduction, estimator = name.split("_")
    values = {"k1": x, "k2": x**2 / 2, "k3": torch.expm1(x) - x}[estimator]
    lengths = case.cu_seqlens.diff().tolist()
    parts = zip(values.split(lengths), case.loss_mask.split(lengths), strict=True)
    active = [part[mask] for part, mask in parts]
    sorted_ = sorted(float(getattr(torch, reduction)(part)) for part in active if len(part))
    half = len(sorted_) // 2
    high = sum(sorted_[half - 1 : half + 1]) / 2 if len(sorted_) > 1 else 0.0
    return (0.0, math.exp(high) if name.endswith("k1") else high)


@functools.cache
def of_the_whole(shared: Shared) -> tuple[Case, Evaluation]:
    case = with_rule(whole_batch(shared.form, shared.dtype, shared.few), shared.rule)
    return case, _evaluate(case, shared.form)


def _evaluate(case: Case, form: str, **options: Any) -> Evaluation:
    if form != "logits-inplace":
        return evaluate(case, **options)
    leaf = case.logits.detach().requires_grad_()
    output = case.with_(logits=leaf * 1).call(inplace=True, **options)
    return Evaluation(output, torch.autograd.grad(output.loss, leaf))


# -------------------------------------------------------------------------------------------------
# A rank's part of it


def local_part(case: Case, layout: Layout) -> tuple[Case, dict[str, Any], LocalSequences]:
    here = local_sequences(case.cu_seqlens, dist.get_rank(), dist.get_world_size(), layout)
    local = case.map_tokens(lambda tensor: tensor[here.token_index])
    shared = {
        "sequence_ids": here.sequence_ids,
        "num_sequences": len(case.cu_seqlens) - 1,
        "cp_group": dist.group.WORLD,
    }
    return local.with_(cu_seqlens=here.cu_seqlens), shared, here


def assert_as_the_whole(shared: Shared, layout: Layout, exact: bool, **options: Any) -> None:
    """Decisions, counts, extremes and, where ``exact``, gradients of tokens are the very bits of
    the unsharded call; sums add up."""
    case, expected = of_the_whole(shared)
    local, arguments, here = local_part(case, layout)
    found = _evaluate(local, shared.form, **arguments, **options)
    metrics = found.metrics
    assert isinstance(metrics, IPOMetrics)
    assert metrics.sums.shape[1] == arguments["num_sequences"]
    over_ranks = metrics.all_reduce(dist.group.WORLD, by_sequence=True)
    assert_metrics(over_ranks, expected.metrics, shared.dtype, exact)

    of_tokens, *of_parameters = found.gradients
    expected_here = expected.gradients[0][here.token_index]
    # A weight is the exponential of a sum, which ranks add in another order.
    weighed = case.config.sequence_weight is not None
    assert torch.equal(of_tokens == 0, expected_here == 0)
    if exact and not weighed:
        assert same_bits(of_tokens, expected_here)
    else:
        assert_near(of_tokens, expected_here, shared.dtype)
    partial = (found.loss, *of_parameters)
    for ours, theirs in zip(partial, (expected.loss, *expected.gradients[1:]), strict=True):
        total = ours.double()
        dist.all_reduce(total)
        assert_near(total.to(theirs.dtype), theirs, shared.dtype)


def assert_metrics(ours: IPOMetrics, theirs: IPOMetrics, dtype: str, exact: bool) -> None:
    counts = IPOMetrics.SUM_ROWS.index("masked_advantage_negative") + 1
    assert torch.equal(ours.sums[:counts], theirs.sums[:counts])
    segments = IPOMetrics.SUM_ROWS.index("rollout_dropped")
    assert torch.equal(ours.sums[segments:], theirs.sums[segments:])
    if not exact:
        tolerance = 1e-12 if dtype == "fp64" else 1e-5
        torch.testing.assert_close(ours.sums, theirs.sums, rtol=tolerance, atol=tolerance)
        return
    assert torch.equal(ours.extremes, theirs.extremes)
    torch.testing.assert_close(ours.sums, theirs.sums, rtol=1e-12, atol=1e-12)
    ulp = torch.finfo(theirs.means.dtype).eps if dtype == "fp32" else 1e-12
    torch.testing.assert_close(ours.means, theirs.means, rtol=ulp, atol=1e-12)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, dtype: str) -> None:
    tolerance = 1e-11 if dtype == "fp64" else 2e-5
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def run_table(backend_name: str, table: list[Shared]) -> None:
    """On a rank: every layout of every row. On the CPU rows of logits know nothing of each other;
    a GPU may split them otherwise where there are fewer, and so may a matrix product."""
    with Backend(backend_name).active():
        for shared, layout in itertools.product(table, LAYOUTS):
            is_logprobs = shared.form == "logprobs"
            rows_apart = backend_name == "cpu" and shared.form.startswith("logits")
            try:
                assert_as_the_whole(shared, layout, is_logprobs or rows_apart)
            except AssertionError as error:
                raise AssertionError(
                    f"{shared}, {layout}, {dist.get_world_size()} ranks"
                ) from error
