"""Rules and weights of whole sequences on every backend: each statistic against the reference, at
its bounds, with numbers that are not finite; from log-probabilities, logits and hidden states."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipo_ext import IPOConfig, ipo_loss, reference
from ipo_ext._sequence_rules import SequenceStatistic
from tests.support.backends import Backend
from tests.support.cases import LogprobsCase, assert_same_bits, evaluate, same_bits
from tests.support.hidden import assert_as_from_logits
from tests.support.logits import assert_accurate
from tests.support.logits import random_case as random_rows
from tests.support.logprobs import DTYPES, cu_seqlens, nasty_case, random_case, with_garbage
from tests.support.operators import opcheck

STATISTICS = get_args(SequenceStatistic)
WEIGHTS = {
    "sum": IPOConfig.sequence_tis(2.0),
    "mean": IPOConfig(mask_rule="none", pg_form="reinforce", sequence_weight="mean", kl_tau=0.1),
    "sum-and-rule": dataclasses.replace(
        IPOConfig.sequence_tis(math.inf), sequence_rules=(("sum_k1", 0.5, 2.0),)
    ),
}
fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def sequences_of(case: LogprobsCase) -> list[torch.Tensor]:
    """The log-ratios of each sequence's active tokens, in float64 as the compute dtype has them."""
    dtype = case.compute_dtype
    x = (case.trainer_logprobs.to(dtype) - case.inference_logprobs.to(dtype)).double()
    assert case.cu_seqlens is not None
    lengths = case.cu_seqlens.diff().tolist()
    masks = case.loss_mask.split(lengths)
    return [part[mask] for part, mask in zip(x.split(lengths), masks, strict=True)]


def statistic_of(name: str, x: torch.Tensor) -> float:
    reduction, estimator = name.split("_")
    value = {"k1": x, "k2": x**2 / 2, "k3": torch.expm1(x) - x}[estimator]
    return float(getattr(torch, reduction)(value))


def splitting(name: str, case: LogprobsCase) -> tuple[str, float, float]:
    """A rule that some sequences break at either end, and none comes near a bound."""
    values = sorted(statistic_of(name, x) for x in sequences_of(case) if x.numel())
    low, high = len(values) // 4, 3 * len(values) // 4
    bounds = [(values[place - 1] + values[place]) / 2 for place in (low, high)]
    return name, *(math.exp(bound) if name.endswith("k1") else bound for bound in bounds)


def assert_equals_reference(case: LogprobsCase, backend: Backend) -> None:
    ours = evaluate(case.to(backend.device))
    theirs = evaluate(case, reference.ipo_loss, dtype=torch.float64)
    gradient = theirs.gradient.to(ours.gradient.dtype)
    assert torch.equal(ours.gradient.cpu() == 0, gradient == 0)
    narrow = ours.gradient.dtype.itemsize == 2
    torch.testing.assert_close(
        ours.gradient.cpu(), gradient, rtol=2e-2 if narrow else 5e-5, atol=1e-30
    )
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, value in theirs.metrics.items():
        found = ours.metrics[name].cpu().double()
        torch.testing.assert_close(found, value.double(), rtol=1e-4, atol=1e-5, msg=name)
    scale = 1 + float(theirs.gradient.double().abs().sum())
    assert abs(float(ours.loss) - float(theirs.loss)) <= 1e-4 * scale


# -------------------------------------------------------------------------------------------------
# Against the reference


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("when", ["always", "negative_advantage"])
@pytest.mark.parametrize("dtypes", ["fp32", "fp64"])
def test_equals_the_reference(backend: Backend, name: str, when: str, dtypes: str) -> None:
    case = random_case(
        4000, dtypes=DTYPES[dtypes], segments="sevens", spread=0.3, weights=True, teacher=True
    )
    config = IPOConfig(
        0.7,
        1.5,
        kl_tau=0.1,
        kl_scope="active",
        sequence_rules=(splitting(name, case),),  # type: ignore[arg-type]
        sequence_rule_when=when,  # type: ignore[arg-type]
    )
    assert_equals_reference(case.with_(config=config), backend)
    dropped = evaluate(case.with_(config=config).to(backend.device)).metrics["sequence_dropped"]
    assert 0 < float((dropped > 0).double().mean()) < 1


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtypes", ["fp32", "fp64"])
def test_weights_equal_the_reference(backend: Backend, weight: str, dtypes: str) -> None:
    case = random_case(4000, dtypes=DTYPES[dtypes], segments="sevens", spread=0.3, weights=True)
    assert_equals_reference(case.with_(config=WEIGHTS[weight]), backend)


def test_long_sequences(backend: Backend) -> None:
    lengths = [70_000, 0, 1, 3, 40_000]
    case = random_case(sum(lengths), spread=0.01).with_(cu_seqlens=cu_seqlens(lengths))
    means = [statistic_of("mean_k1", x) if x.numel() else 0.0 for x in sequences_of(case)]
    between = math.exp((means[0] + means[4]) / 2)
    rule = ("mean_k1", 0.0, between) if means[0] > means[4] else ("mean_k1", between, 10.0)
    config = IPOConfig.geometric(*rule[1:])
    assert_equals_reference(case.with_(config=config), backend)
    dropped = evaluate(case.with_(config=config).to(backend.device)).metrics["sequence_dropped"]
    assert [float(dropped[0]), float(dropped[4])] == [1, 0]


@st.composite
def sequences_at_their_bounds(draw: st.DrawFn) -> LogprobsCase:
    """Short sequences of few distinct log-ratios, and rules whose bounds they reach exactly."""
    values = [-1.0, -0.5, 0.0, 0.5, 1.0, 2**-20, -(2**-20), 3.0]
    odd = [math.nan, math.inf, -math.inf, 100.0]
    token = st.tuples(
        st.one_of(st.sampled_from(values), st.sampled_from(odd)) if draw(st.booleans())
        else st.sampled_from(values),
        st.sampled_from([-1.0, -0.0, 0.0, 2.0]),
        st.booleans(),
    )  # fmt: skip
    sequences = draw(st.lists(st.lists(token, max_size=5), min_size=1, max_size=6))
    # Of k1, bounds whose logarithms no sum of the values comes near but for 0 at a ratio of 1; of
    # k2 sums and means that float64 has exactly; k3 is rounded, so between what it can be.
    k1, k2 = (
        st.sampled_from([0.0, 0.3, 1.0, 1.7, math.inf]),
        st.sampled_from([0.0, 0.125, 0.5, 0.625, 4.5, math.inf]),
    )
    k3 = st.sampled_from([0.0, 0.123, 0.4567, 1.234, math.inf])
    rules = []
    for name in draw(st.lists(st.sampled_from(STATISTICS), max_size=3, unique=True)):
        low, high = sorted(draw(st.tuples(*[{"k1": k1, "k2": k2, "k3": k3}[name[-2:]]] * 2)))
        rules.append((name, 0.0 if low == math.inf else low, high))
    weight = draw(st.sampled_from([None, "sum", "mean"]))
    config = IPOConfig(
        mask_rule="none",
        kl_tau=0.25,
        kl_scope=draw(st.sampled_from(["kept", "active"])),
        pg_form="reinforce"
        if weight is not None
        else draw(st.sampled_from(["ratio", "reinforce"])),
        sequence_rules=tuple(rules),
        sequence_rule_when=draw(st.sampled_from(["always", "negative_advantage"]))
        if rules
        else "always",
        sequence_weight=weight,
        sequence_weight_cap=math.inf if weight is None else draw(st.sampled_from([1.0, math.inf])),
    )
    tokens = [token for sequence in sequences for token in sequence]
    x, advantages, mask = zip(*tokens, strict=True) if tokens else ((), (), ())
    x = torch.tensor(x, dtype=torch.float32)
    return LogprobsCase(
        trainer_logprobs=x,
        inference_logprobs=torch.zeros_like(x),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        loss_mask=torch.tensor(mask, dtype=torch.bool),
        cu_seqlens=cu_seqlens([len(sequence) for sequence in sequences]),
        config=config,
    )


@fuzzed
@given(case=sequences_at_their_bounds())
def test_any_sequences_at_their_bounds(backend: Backend, case: LogprobsCase) -> None:
    assert_equals_reference(case, backend)


# -------------------------------------------------------------------------------------------------
# Bounds


def verdicts(
    backend: Backend, x: list[list[float]], *rules: Any, dtype: torch.dtype = torch.float32
) -> list[bool]:
    """Of each sequence of log-ratios, whether it is kept."""
    trainer = torch.tensor([value for sequence in x for value in sequence], dtype=dtype)
    case = LogprobsCase(
        trainer_logprobs=trainer,
        inference_logprobs=torch.zeros_like(trainer),
        advantages=torch.ones_like(trainer),
        loss_mask=torch.ones_like(trainer, dtype=torch.bool),
        cu_seqlens=cu_seqlens([len(sequence) for sequence in x]),
        config=IPOConfig(mask_rule="none", pg_form="reinforce", sequence_rules=rules),
    )
    dropped = evaluate(case.to(backend.device)).metrics["sequence_dropped"]
    return [value == 0 for value in dropped.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["min_k1", "max_k1"])
def test_bounds_of_the_extremes_are_exact(backend: Backend, name: str, dtype: torch.dtype) -> None:
    at = torch.tensor(math.log(0.7), dtype=torch.float64).to(dtype)
    far = torch.tensor(math.inf, dtype=dtype)
    x = [[float(value)] for value in (at.nextafter(-far), at, at.nextafter(far))]
    assert verdicts(backend, x, (name, 0.7, 10.0), dtype=dtype) == [False, True, True]
    assert verdicts(backend, x, (name, 0.0, 0.7), dtype=dtype) == [True, True, False]


@pytest.mark.parametrize("reduction", ["sum", "mean", "min", "max"])
def test_bounds_of_k2_are_exact(backend: Backend, reduction: str) -> None:
    at = 0.75  # whose square float64 has exactly
    below, above = math.nextafter(at**2 / 2, 0), math.nextafter(at**2 / 2, 1)
    for bounds, kept in [((0, below), False), ((0, at**2 / 2), True), ((above, 9), False)]:
        assert verdicts(backend, [[at], [-at]], (f"{reduction}_k2", *bounds)) == [kept, kept]


def test_what_is_not_finite(backend: Backend) -> None:
    sequences = [[0.1, value] for value in (math.nan, math.inf, -math.inf, 0.1)]
    wide = {"k1": (0.0, math.inf), "k2": (0.0, math.inf), "k3": (0.0, math.inf)}
    for reduction in ("sum", "mean"):  # broken by what is not finite, whatever the bounds
        for estimator, bounds in wide.items():
            rule = (f"{reduction}_{estimator}", *bounds)
            assert verdicts(backend, sequences, rule) == [False, False, False, True]
    assert verdicts(backend, sequences, ("max_k1", 0.0, 5.0)) == [True, False, True, True]
    assert verdicts(backend, sequences, ("min_k1", 0.1, 5.0)) == [True, True, False, True]
    assert verdicts(backend, sequences, ("max_k2", 0.0, 5.0)) == [True, False, False, True]
    assert verdicts(backend, sequences, ("max_k3", 0.0, 5.0)) == [True, False, False, True]
    # Of NaN alone there is no extreme, and nothing to drop.
    assert verdicts(backend, [[math.nan]], ("max_k1", 0.9, 1.1)) == [True]
    # Near the largest ratio k3 is about as large, and finite.
    for x in (80.5, 88.3, 88.4, 88.7):
        assert verdicts(backend, [[0.1, x]], ("max_k3", 0.0, 5.0)) == [False]
        assert verdicts(backend, [[0.1, x]], ("sum_k3", 0.0, 1e300)) == [True]
    # k3 is infinite where the ratio overflows.
    assert verdicts(backend, [[100.0]], ("sum_k3", 0.0, math.inf)) == [False]
    assert verdicts(backend, [[100.0]], ("sum_k1", 0.0, math.inf)) == [True]


def test_a_weight_that_overflows_drops_its_sequence(backend: Backend) -> None:
    trainer = torch.tensor([50.0, 50.0, 0.5, 0.25, -math.inf, 0.1])
    case = LogprobsCase(
        trainer_logprobs=trainer,
        inference_logprobs=torch.zeros_like(trainer),
        advantages=torch.ones_like(trainer),
        loss_mask=torch.ones_like(trainer, dtype=torch.bool),
        cu_seqlens=cu_seqlens([2, 2, 2]),
        config=IPOConfig.sequence_tis(math.inf),
    )
    result = evaluate(case.to(backend.device))
    weight = pytest.approx(math.exp(0.75))
    assert (-result.gradient).tolist() == [0, 0, weight, weight, 0, 0]
    assert result.loss.isfinite()
    assert result.metrics["sequence_dropped"].tolist() == [1, 0, 1]
    capped = evaluate(case.with_(config=IPOConfig.sequence_tis(2.0)).to(backend.device))
    assert (-capped.gradient).tolist() == [2, 2, 2, 2, 0, 0]


# -------------------------------------------------------------------------------------------------
# What a sequence is


@pytest.mark.parametrize("ends", [None, [0], [0, 0, 0]])
def test_no_tokens(backend: Backend, ends: list[int] | None) -> None:
    # What was in memory before must not show in the sums, which later sums are added to.
    dirt = [torch.full((64,), 7.25, dtype=torch.float64, device=backend.device) for _ in range(500)]
    del dirt
    nothing = torch.zeros(0, device=backend.device)
    config = IPOConfig.geometric(0.9, 1.1)
    cu = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=backend.device)
    leaf = nothing.clone().requires_grad_()
    out = ipo_loss(leaf, nothing, nothing, nothing > 0, cu_seqlens=cu, config=config)
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert not out.metrics.sums.any()


def test_tokens_of_no_sequence(backend: Backend) -> None:
    two = torch.zeros(2, device=backend.device)
    cu = torch.tensor([0], dtype=torch.int32, device=backend.device)
    call = functools.partial(
        ipo_loss, two, two, two, two == 0, cu_seqlens=cu, config=IPOConfig.geometric(0.9, 1.1)
    )
    if backend.faults_raise:
        with pytest.raises(Exception, match="cu_seqlens: expected a partition"):
            call()
    else:
        assert call().loss.isnan()


def geometric(case: LogprobsCase) -> IPOConfig:
    _, low, high = splitting("mean_k1", case)
    return IPOConfig.geometric(low, high)


def test_rows_are_sequences_without_cu_seqlens(backend: Backend) -> None:
    packed = random_case(6 * 50, masked=0.2).with_(cu_seqlens=cu_seqlens([50] * 6))
    packed = packed.with_(config=geometric(packed))
    rows = packed.with_(cu_seqlens=None).map_tokens(lambda tensor: tensor.view(2, 3, 50))
    ours, theirs = evaluate(rows.to(backend.device)), evaluate(packed.to(backend.device))
    assert same_bits(ours.gradient.flatten(), theirs.gradient)
    assert 0 < float(ours.metrics["sequence_dropped"]) < 1


def test_packed_sequences_equal_separate_ones(backend: Backend) -> None:
    case = random_case(3000, segments="sevens", spread=0.3)
    for config in (geometric(case), *WEIGHTS.values()):
        whole = evaluate(case.with_(config=config).to(backend.device)).gradient
        ends = case.cu_seqlens.tolist()
        for first, last in list(itertools.pairwise(ends))[:40]:
            alone = case.with_(cu_seqlens=None, config=config).map_tokens(
                lambda tensor, part=slice(first, last): tensor[part]
            )
            assert same_bits(evaluate(alone.to(backend.device)).gradient, whole[first:last])


def test_what_dropped_sequences_hold_is_harmless(backend: Backend) -> None:
    case = nasty_case(2000, segments="sevens", weights=True)
    config = IPOConfig(kl_tau=0.1, kl_scope="active", sequence_rules=(("mean_k1", 0.5, 2.0),))
    case = case.with_(config=config)
    result = evaluate(case.to(backend.device))
    assert result.gradient.isfinite().all() or not case.advantages.isfinite().all()
    spoiled = with_garbage(case, ~case.loss_mask, seed=3)
    assert_same_bits(evaluate(spoiled.to(backend.device)), result)


def test_a_rollout_rule_is_the_smallest_ratio(backend: Backend) -> None:
    case = nasty_case(3000, segments="sevens").map_tokens(lambda tensor: tensor)
    rollout = IPOConfig(rollout_min_ratio=0.3)
    rule = IPOConfig(sequence_rules=(("min_k1", 0.3, math.inf),))
    ours = evaluate(case.with_(config=rollout).to(backend.device))
    theirs = evaluate(case.with_(config=rule).to(backend.device))
    assert same_bits(ours.gradient, theirs.gradient)
    assert same_bits(ours.metrics["rollout_dropped"], theirs.metrics["sequence_dropped"])


# -------------------------------------------------------------------------------------------------
# From logits and from hidden states, compilers, operators

RULES = {
    "geometric": IPOConfig.geometric(0.9, 1.1),
    "opsm": IPOConfig(
        sequence_rules=(("mean_k1", 0.999, math.inf),), sequence_rule_when="negative_advantage"
    ),
    "sequence-tis": IPOConfig.sequence_tis(1.5),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_logits(backend: Backend, rule: str, dtype: torch.dtype) -> None:
    case = random_rows(columns=70, dtype=dtype, config=RULES[rule])
    assert_accurate(case, backend)


@pytest.mark.parametrize("rule", RULES)
def test_from_hidden_as_from_logits(backend: Backend, rule: str) -> None:
    assert_as_from_logits(RULES[rule], backend)


def test_compiles_as_one_graph(backend: Backend) -> None:
    function = torch.compile(ipo_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for config in RULES.values():
        case = random_case(50, segments="sevens").with_(config=config).to(backend.device)
        assert_same_bits(evaluate(case, function), evaluate(case))


def test_opcheck(backend: Backend) -> None:
    case = random_case(40, segments="sevens").with_(config=RULES["opsm"]).to(backend.device)
    opcheck("ipo_loss", case, trainer_logprobs=case.trainer_logprobs.requires_grad_())


# -------------------------------------------------------------------------------------------------
# Configurations


def test_constructors_are_what_they_reproduce() -> None:
    assert IPOConfig.geometric(0.9, 1.1) == IPOConfig(
        kl_tau=0.0, mask_rule="none", sequence_rules=(("mean_k1", 0.9, 1.1),)
    )
    assert IPOConfig.sequence_tis(3.0) == IPOConfig(
        kl_tau=0.0,
        mask_rule="none",
        pg_form="reinforce",
        sequence_weight="sum",
        sequence_weight_cap=3.0,
    )
    given_twice = IPOConfig(sequence_rules=[["max_k2", 0, 3], ["max_k2", 1, 9]])  # type: ignore[list-item, arg-type]
    assert given_twice.sequence_rules == (("max_k2", 1.0, 3.0),)
    assert hash(given_twice) == hash(IPOConfig(sequence_rules=(("max_k2", 1.0, 3.0),)))
    assert IPOConfig.from_mapping({"sequence_rules": [["mean_k1", 0.9, 1.1]]}).has_sequence_rule


NAMES = ", ".join(STATISTICS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence_rules": "mean_k1"},
         "sequence_rules: expected rules (name, low, high), got 'mean_k1'"),
        ({"sequence_rules": ("mean_k1", 0.9, 1.1)},
         "sequence_rules: expected rules (name, low, high), got 'mean_k1'"),
        ({"sequence_rules": [("mean_k1", 0.9)]},
         "sequence_rules: expected rules (name, low, high), got ('mean_k1', 0.9)"),
        ({"sequence_rules": [("mean_k4", 0.9, 1.1)]},
         f"sequence_rules: expected one of {NAMES}, got 'mean_k4'"),
        ({"sequence_rules": [("mean_k1", None, 1.1)]},
         "sequence_rules: expected numbers for mean_k1, got (None, 1.1)"),
        ({"sequence_rules": [("mean_k1", 1.1, 0.9)]},
         "sequence_rules: expected 0 <= low <= high, low finite, for mean_k1, got (1.1, 0.9)"),
        ({"sequence_rules": [("sum_k2", -1, 0.9)]},
         "sequence_rules: expected 0 <= low <= high, low finite, for sum_k2, got (-1.0, 0.9)"),
        ({"sequence_rules": [("mean_k1", math.nan, 0.9)]},
         "sequence_rules: expected 0 <= low <= high, low finite, for mean_k1, got (nan, 0.9)"),
        ({"sequence_rules": [("max_k1", 0, 1), ("max_k1", 2, 3)]},
         "sequence_rules: expected bounds of max_k1 that overlap, got "
         "[('max_k1', 0, 1), ('max_k1', 2, 3)]"),
        ({"sequence_rule_when": "negative_advantage"},
         "sequence_rule_when: expected 'always' without sequence_rules, got 'negative_advantage'"),
        ({"sequence_weight": "sum"},
         "sequence_weight: expected None for pg_form='ratio', whose ratio would count twice, got "
         "'sum'; use pg_form='reinforce'"),
        ({"sequence_weight": "product"},
         "sequence_weight: expected one of None, sum, mean, got 'product'"),
        ({"sequence_weight_cap": 2.0},
         "sequence_weight_cap: expected inf without a sequence_weight, got 2.0"),
        ({"pg_form": "reinforce", "sequence_weight": "sum", "sequence_weight_cap": 0.0},
         "sequence_weight_cap: expected a number > 0, got 0.0"),
    ],
)  # fmt: skip
def test_a_rule_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        IPOConfig(**fields)
    assert str(caught.value) == message
