"""Properties that hold for any input: the band and its edges, garbage that must not matter, values
that are dropped and counted, and memory safety whatever cu_seqlens holds."""

import ctypes
import dataclasses
import math

import hypothesis
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ipo_ext import _C, IPOConfig, reference
from tests.emulator import operators as emulated
from tests.support.against_reference import assert_near_reference
from tests.support.cases import Evaluation, LogprobsCase, assert_same_bits, evaluate, same_bits
from tests.support.logprobs import (
    HOSTILE_CU_SEQLENS,
    MEMORY_CASES,
    cases,
    cu_seqlens,
    kept,
    nasty_case,
    random_case,
    with_garbage,
)

COMPUTE_DTYPES = (torch.float32, torch.float64)
SUM_ROW = {name: row for row, name in enumerate(_C.SUM_ROWS)}

# The fixture `backend` only says which operators run: nothing in it is used up by an example.
fuzzed = hypothesis.settings(
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ]
)


@fuzzed
@given(case=cases(tokens=st.integers(0, 2100)))
def test_any_case_matches_the_reference(backend, case):
    assert_near_reference(case, backend.device)


# ---------------------------------------------------------------------------------------------
# The band


def of_log_ratios(x, config, advantage=-1.0):
    """A case with these log-ratios exactly, each token a segment of its own."""
    return LogprobsCase(
        trainer_logprobs=x,
        inference_logprobs=torch.zeros_like(x),
        advantages=torch.full_like(x, advantage),
        loss_mask=torch.ones(len(x), dtype=torch.bool),
        cu_seqlens=cu_seqlens([1] * len(x)),
        config=config,
    )


def neighbours(value, dtype):
    """The two numbers of ``dtype`` below ``value``, itself, and the two above."""
    middle = torch.tensor([value], dtype=dtype)
    down, up = torch.full_like(middle, -math.inf), torch.full_like(middle, math.inf)
    below, above = torch.nextafter(middle, down), torch.nextafter(middle, up)
    return torch.cat(
        [torch.nextafter(below, down), below, middle, above, torch.nextafter(above, up)]
    )


bounds = st.one_of(
    st.floats(0.0, 10.0),
    st.sampled_from([0.0, 1.0, 0.2, 5.0, 1e-300, 5e-324, 1e-45, 1.0 - 2**-53, 1.0 + 2**-52]),
    st.sampled_from([math.inf, 1e30, 1e300, 3.4028234663852886e38, 1.7976931348623157e308]),
)


@fuzzed
@given(ends=st.tuples(bounds, bounds), dtype=st.sampled_from(COMPUTE_DTYPES))
@example(ends=(0.0, math.inf), dtype=torch.float32)
@example(ends=(0.0, math.inf), dtype=torch.float64)
@example(ends=(1.0, 1.0), dtype=torch.float32)
@example(ends=(0.2, 0.2), dtype=torch.float64)
@example(ends=(1e-45, 1e-45), dtype=torch.float32)
def test_the_band_includes_its_ends_and_not_one_ulp_more(backend, ends, dtype):
    low, high = sorted(ends)
    hypothesis.assume(low < math.inf and high > 0)
    config = IPOConfig(dppo_mask_low=low, dppo_mask_high=high, kl_tau=0.0)
    log_low, log_high = config.log_bounds(dtype)
    x = torch.cat([neighbours(log_low, dtype), neighbours(log_high, dtype)])
    case = of_log_ratios(x, config, advantage=-0.01)
    result = evaluate(case.to(backend.device))
    expected = case.call(reference.ipo_loss).metrics
    for name in ("is_masked", "is_masked_low", "is_masked_high", "nonfinite"):
        assert same_bits(result.metrics[name], expected[name]), name

    inside = (x >= log_low) & (x <= log_high)
    assert inside[2], "the lower end itself is kept"
    assert inside[7], "the upper end itself is kept"
    assert torch.equal(result.metrics["is_masked"].cpu() == 0, inside)
    assert result.loss.isfinite()
    assert same_bits(result.gradient[~inside], torch.zeros_like(result.gradient[~inside]))


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.2, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0, 1e-30, 1e30])
def test_a_bound_is_the_logarithm_rounded_once(backend, value, dtype):
    """Kept up to the number of the compute dtype that is nearest to the float64 logarithm."""
    nearest = torch.tensor(math.log(value), dtype=torch.float64).to(dtype)
    x = neighbours(nearest.item(), dtype)
    at_or_above = evaluate(
        of_log_ratios(x, IPOConfig(dppo_mask_low=value, dppo_mask_high=1e35)).to(backend.device)
    )
    assert at_or_above.metrics["is_masked_low"].tolist() == [1, 1, 0, 0, 0]
    at_or_below = evaluate(
        of_log_ratios(x, IPOConfig(dppo_mask_low=0, dppo_mask_high=value)).to(backend.device)
    )
    assert at_or_below.metrics["is_masked_high"].tolist() == [0, 0, 0, 1, 1]


@fuzzed
@given(
    case=cases(tokens=st.integers(1, 1100), dtypes=("fp32", "fp64", "every-dtype"), packed=False),
    alpha=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    beta=st.tuples(st.floats(1, 9), st.floats(1, 9)),
)
def test_widening_the_band_never_drops_more(backend, case, alpha, beta):
    # With an advantage of -1 and no KL a kept token's gradient is its ratio, which is above 0.
    case = case.with_(
        advantages=torch.full_like(case.advantages, -1.0), loss_weights=None, normalizer=None
    )
    plain = {"kl_tau": 0.0}
    narrow = IPOConfig(dppo_mask_low=max(alpha), dppo_mask_high=min(beta), **plain)
    wide = IPOConfig(dppo_mask_low=min(alpha), dppo_mask_high=max(beta), **plain)
    kept_by = [
        evaluate(case.with_(config=config).to(backend.device)).gradient != 0
        for config in (narrow, wide)
    ]
    assert not (kept_by[0] & ~kept_by[1]).any()
    assert torch.equal(kept_by[0].cpu(), kept(case.with_(config=narrow)))


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES, ids=str)
def test_no_band_drops_only_what_overflows(backend, dtype):
    config = IPOConfig(dppo_mask_low=0.0, dppo_mask_high=math.inf)
    largest = config.log_bounds(dtype)[1]
    x = torch.linspace(-200, largest, 1501, dtype=dtype)
    inside = evaluate(of_log_ratios(x, config).with_(cu_seqlens=None).to(backend.device))
    assert inside.metrics["is_masked"] == 0
    assert inside.gradient.isfinite().all()
    beyond = evaluate(
        of_log_ratios(neighbours(largest, dtype)[3:], config)
        .with_(cu_seqlens=None)
        .to(backend.device)
    )
    assert beyond.metrics["nonfinite"] == beyond.metrics["is_masked_high"] == 1
    assert not beyond.gradient.any()


@fuzzed
@given(case=cases(make=nasty_case, tokens=st.integers(1, 2100)))
def test_a_dropped_token_pays_an_exact_positive_zero(backend, case):
    result = evaluate(case.to(backend.device), grad_loss=-3.0)
    unscaled = evaluate(case.to(backend.device))
    dropped = ~kept(case).to(backend.device)
    assert same_bits(unscaled.gradient[dropped], torch.zeros_like(unscaled.gradient[dropped]))
    assert not result.gradient[dropped].any()


# ---------------------------------------------------------------------------------------------
# What must not matter, and what is dropped and counted


@fuzzed
@given(case=cases(tokens=st.integers(1, 2100)), seed=st.integers(0, 2**32))
def test_garbage_in_masked_positions_changes_no_bit(backend, case, seed):
    spoiled = with_garbage(case, ~case.loss_mask, seed)
    assert_same_bits(evaluate(spoiled.to(backend.device)), evaluate(case.to(backend.device)))


@fuzzed
@given(case=cases(tokens=st.integers(1, 1100)), seed=st.integers(0, 2**32))
def test_garbage_in_a_term_whose_tau_is_zero_changes_no_gradient(backend, case, seed):
    config = dataclasses.replace(case.config, adv_tau=0.0, teacher_tau=0.0)
    case = case.with_(config=config)
    spoiled = with_garbage(case, torch.ones_like(case.loss_mask), seed)
    spoiled = case.with_(advantages=spoiled.advantages, teacher_logprobs=spoiled.teacher_logprobs)
    result, expected = evaluate(spoiled.to(backend.device)), evaluate(case.to(backend.device))
    assert same_bits(result.loss, expected.loss)
    assert same_bits(result.gradient, expected.gradient)


# A trainer and an inference log-probability whose ratio is not finite, and how it counts.
NONFINITE = {
    "nan": (math.nan, -1.0, None),
    "nan-inference": (-1.0, math.nan, None),
    "inf": (math.inf, -1.0, "masked_high"),
    "minus-inf": (-math.inf, -1.0, "masked_low"),
    "minus-inf-inference": (-1.0, -math.inf, "masked_high"),
    "inf-inference": (-1.0, math.inf, "masked_low"),
    "both-minus-inf": (-math.inf, -math.inf, None),
    "ratio-overflows": (60_000.0, -1000.0, "masked_high"),
}


@fuzzed
@given(
    case=cases(tokens=st.integers(1, 2100)),
    faults=st.lists(st.tuples(st.integers(0, 2100), st.sampled_from(sorted(NONFINITE)))),
)
@example(case=random_case(9), faults=[(i, name) for i, name in enumerate(sorted(NONFINITE))])
@example(case=random_case(1), faults=[(0, "nan")])
def test_a_nonfinite_ratio_is_dropped_and_counted(backend, case, faults):
    """Exactly as if the token were masked, except in the counts that make it visible."""
    placed = {position % case.tokens: name for position, name in faults}
    spoiled, without = with_faults(case, placed)
    result = evaluate(spoiled.to(backend.device))
    expected = evaluate(without.to(backend.device))
    assert result.loss.isfinite()
    assert same_bits(result.loss, expected.loss)
    assert same_bits(result.gradient, expected.gradient)
    sums = expected.metrics.sums.cpu() + counts_of(spoiled, placed)
    assert same_bits(result.metrics.sums, sums)
    assert same_bits(result.metrics["nonfinite"], mean_row(sums, "nonfinite", case))
    assert_extremes(result, spoiled)


def with_faults(case: LogprobsCase, placed: dict[int, str]) -> tuple[LogprobsCase, LogprobsCase]:
    """The case with active faults, and with those positions masked."""
    trainer, inference = case.trainer_logprobs.clone(), case.inference_logprobs.clone()
    active, without = case.loss_mask.clone(), case.loss_mask.clone()
    for position, name in placed.items():
        trainer[position], inference[position], _ = NONFINITE[name]
        active[position], without[position] = True, False
    spoiled = case.with_(trainer_logprobs=trainer, inference_logprobs=inference, loss_mask=active)
    return spoiled, spoiled.with_(loss_mask=without)


def counts_of(case: LogprobsCase, placed: dict[int, str]) -> torch.Tensor:
    """What the faults add to `sums`."""
    ends = [0, case.tokens] if case.cu_seqlens is None else case.cu_seqlens.tolist()
    counts = torch.zeros(len(_C.SUM_ROWS), len(ends) - 1, dtype=torch.float64)
    for position, name in placed.items():
        segment = max(s for s in range(len(ends) - 1) if ends[s] <= position < ends[s + 1])
        for row in ("active", "nonfinite", NONFINITE[name][2]):
            if row is not None:
                counts[SUM_ROW[row], segment] += 1
    return counts if case.cu_seqlens is not None else counts[:, 0]


def mean_row(sums: torch.Tensor, name: str, case: LogprobsCase) -> torch.Tensor:
    share = sums[SUM_ROW[name]] / sums[SUM_ROW["active"]].clamp(min=1)
    return share.to(case.compute_dtype)


def assert_extremes(result: Evaluation, case: LogprobsCase) -> None:
    """Those of the finite log-ratios, to which an overflowing ratio's belongs."""
    exact = case.call(reference.ipo_loss, dtype=torch.float64).metrics
    for name in ("log_ratio_min", "log_ratio_max"):
        assert torch.equal(result.metrics[name].cpu(), exact[name].to(case.compute_dtype)), name


@pytest.mark.parametrize("name", NONFINITE)
def test_a_batch_of_one_nonfinite_ratio_is_finite(backend, name):
    spoiled, _ = with_faults(random_case(1, teacher=True, weights=True), {0: name})
    result = evaluate(spoiled.to(backend.device))
    side = NONFINITE[name][2]
    assert result.metrics["nonfinite"] == result.metrics["is_masked"] == 1
    assert result.metrics["is_masked_low"] == (side == "masked_low")
    assert result.metrics["is_masked_high"] == (side == "masked_high")
    assert result.metrics.means.isfinite().all()
    zeroes = ("mismatch_kl", "masked_mismatch_kl", "teacher_kl", "pg_loss", "kl_loss", "ess")
    assert all(result.metrics[metric] == 0 for metric in zeroes)
    assert not result.gradient.any()
    assert result.loss == 0


@pytest.mark.parametrize("field", ["advantages", "loss_weights"])
def test_a_nan_that_a_kept_token_pays_with_propagates(backend, field):
    case = random_case(1030, weights=True, masked=0.0)
    position = kept(case).nonzero()[-1].item()
    getattr(case, field)[position] = math.nan
    result = evaluate(case.to(backend.device))
    assert result.loss.isnan()
    assert result.gradient.isnan().nonzero().flatten().tolist() == [position]


# ---------------------------------------------------------------------------------------------
# cu_seqlens, and the buffers' ends


class GuardedMemory:
    """Copies of tensors that end at an inaccessible page; checks on exit that none was overrun."""

    def __init__(self, alignment: int) -> None:
        self._alignment = alignment
        self._pointers: list[int] = []

    def __enter__(self):
        return self

    def __exit__(self, failure: type | None, *_: object) -> None:
        if failure is not None:
            return  # the report of a failing test prints its tensors: they must stay readable
        intact = [emulated.load().emulator_guarded_free(pointer) for pointer in self._pointers]
        assert all(intact), "bytes behind a buffer were overwritten"

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with its strides, the last byte of its storage before the page."""
        if tensor.numel() == 0:
            return tensor
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size = span * tensor.element_size()
        pointer = emulated.load().emulator_guarded_alloc(size, self._alignment)
        self._pointers.append(pointer)
        memory = (ctypes.c_char * size).from_address(pointer)
        flat = torch.frombuffer(memory, dtype=tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def copy_case(self, case: LogprobsCase) -> LogprobsCase:
        copied = case.map_tokens(self.copy)
        if case.cu_seqlens is not None:
            copied = copied.with_(cu_seqlens=self.copy(case.cu_seqlens))
        return copied


def is_partition(values, tokens):
    return values[0] == 0 and values[-1] == tokens and values == sorted(values)


def assert_contract_fault(case, backend):
    if backend.faults_raise:
        with pytest.raises(RuntimeError, match=r"^cu_seqlens: expected a partition of the tokens"):
            evaluate(case)
        return
    result = evaluate(case)
    assert result.loss.isnan()
    assert result.gradient.isnan().all()


@pytest.mark.tempts_kernels_out_of_bounds
@pytest.mark.parametrize("name", HOSTILE_CU_SEQLENS)
def test_a_cu_seqlens_that_is_no_partition_raises_or_poisons(backend, name):
    case = MEMORY_CASES[f"hostile-{name}"]().to(backend.device)
    assert_contract_fault(case, backend)
    masked = case.with_(loss_mask=torch.zeros_like(case.loss_mask))
    assert_contract_fault(masked, backend)
    # The next call is none the worse for it.
    assert_near_reference(random_case(100, segments="sevens"), backend.device)


int32 = st.integers(-(2**31), 2**31 - 1)


@st.composite
def any_cu_seqlens(draw, tokens):
    """A partition with some entries replaced, or nothing like one."""
    if draw(st.booleans()):
        return draw(st.lists(int32, min_size=1, max_size=300))
    ends = sorted(draw(st.lists(st.integers(0, tokens), max_size=12)))
    ends = [0, *ends, tokens]
    for position in draw(st.lists(st.integers(0, len(ends) - 1), max_size=2)):
        ends[position] = draw(st.one_of(int32, st.integers(-1, tokens + 1)))
    return ends


@fuzzed
@given(data=st.data(), tokens=st.sampled_from([0, 1, 5, 64, 1024, 1030]))
def test_any_cu_seqlens_is_memory_safe(backend, data, tokens):
    values = data.draw(any_cu_seqlens(tokens))
    case = random_case(tokens, teacher=True, seed=1)
    case = case.with_(cu_seqlens=torch.tensor(values, dtype=torch.int32))

    def check(case):
        if is_partition(values, tokens):
            assert evaluate(case).loss.isfinite()
        else:
            assert_contract_fault(case, backend)

    run_guarded(check, case, backend)


def run_guarded(check, case, backend, alignments=(1, 16)):
    """Calls check on the case in guarded buffers; on a GPU, whose memory has none, as it is."""
    if backend.name == "cuda":
        check(case.to(backend.device))
        return
    for alignment in alignments:
        with GuardedMemory(alignment) as memory:
            check(memory.copy_case(case))


@fuzzed
@given(case=cases(tokens=st.integers(0, 2100), packed=True))
def test_a_partition_never_poisons(backend, case):
    result = evaluate(case.to(backend.device))
    unpacked = evaluate(case.with_(cu_seqlens=None).to(backend.device))
    assert result.loss.isfinite()
    assert same_bits(result.gradient, unpacked.gradient)


@pytest.mark.parametrize("alignment", [1, 16], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("name", MEMORY_CASES)
def test_no_access_leaves_the_buffers(backend, name, alignment):
    def check(case):
        if name.startswith("hostile"):
            assert_contract_fault(case, backend)
        else:
            assert evaluate(case).loss.isfinite()

    run_guarded(check, MEMORY_CASES[name](), backend, [alignment])
