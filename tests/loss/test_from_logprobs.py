"""The loss from log-probabilities on every backend: value, gradient and metrics against the
reference in float64, and the equalities that hold in every bit."""

import dataclasses

import numpy as np
import pytest
import torch

from ipo_ext import _C, IPOConfig, reference
from tests.emulator import operators as emulated
from tests.support.against_reference import (
    COUNTS,
    assert_matches_reference,
    assert_near_reference,
    assert_sums_close,
)
from tests.support.backends import Backend
from tests.support.cases import assert_same_bits, evaluate, same_bits
from tests.support.layouts import misaligned, strided_within
from tests.support.logprobs import (
    DTYPES,
    EDGE_SIZES,
    MEMORY_CASES,
    MOST_TOKENS,
    SEGMENTS,
    SMALL_SIZES,
    TILES,
    cu_seqlens,
    kept,
    nasty_case,
    random_case,
)
from tests.support.operators import operator_gradient
from tests.support.schedules import schedules

CONFIG = IPOConfig(kl_tau=0.05)


# ---------------------------------------------------------------------------------------------
# Against the reference in float64


@pytest.mark.parametrize("weights", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("teacher", [False, True], ids=["alone", "teacher"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_matches_the_reference(backend, dtypes, teacher, weights):
    options = {} if teacher else {"config": CONFIG}
    case = random_case(
        5000, dtypes=DTYPES[dtypes], teacher=teacher, weights=weights, normalizer=731.0, **options
    )
    assert_matches_reference(case, backend.device)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("make", [random_case, nasty_case])
def test_matches_the_reference_per_segment(backend, dtypes, make):
    case = make(4097, dtypes=DTYPES[dtypes], segments="at-tiles", teacher=True, weights=True)
    assert_matches_reference(case, backend.device)


@pytest.mark.parametrize(
    "config",
    [
        IPOConfig(dppo_mask_low=0.0, dppo_mask_high=float("inf")),
        IPOConfig(dppo_mask_low=1.0, dppo_mask_high=1.0, kl_tau=3.0),
        IPOConfig(dppo_mask_low=0.0, dppo_mask_high=1e-3),
        IPOConfig(adv_tau=0.0, kl_tau=1.0),
        IPOConfig(kl_tau=0.0),
        IPOConfig(adv_tau=0.0, kl_tau=0.0),
    ],
    ids=["everything-kept", "only-equal", "only-low", "only-kl", "only-pg", "nothing"],
)
@pytest.mark.parametrize("spread", [1.5, 40.0])
def test_matches_the_reference_for_every_setting(backend, config, spread):
    case = random_case(3000, config=config, spread=spread, weights=True)
    case.inference_logprobs[::5] = case.trainer_logprobs[::5]
    assert_matches_reference(case, backend.device)


@pytest.mark.parametrize("dtypes", ["fp32", "every-dtype", "fp64"])
def test_matches_the_reference_at_small_sizes(backend, dtypes):
    """Gradients of few tokens are the first of many's; sums are the reference's."""
    options = {"dtypes": DTYPES[dtypes], "teacher": True, "weights": True}
    many = random_case(max(SMALL_SIZES), **options)
    expected = operator_gradient(many.to(backend.device))
    for tokens in SMALL_SIZES:
        few = many.map_tokens(lambda tensor, n=tokens: tensor[:n])
        assert same_bits(operator_gradient(few.to(backend.device)), expected[:tokens]), tokens
        assert_near_reference(few, backend.device)
    assert_matches_reference(many, backend.device)


@pytest.mark.parametrize("tokens", [*EDGE_SIZES, 70_001, 270_001])
def test_matches_the_reference_around_tiles(backend, tokens):
    assert_matches_reference(random_case(tokens, teacher=True), backend.device)


@pytest.mark.parametrize("segments", [None, "at-tiles", "sevens"])
def test_fp64_matches_the_reference_around_tiles(backend, segments):
    """The CUDA kernels take a tile by a block there, not by a warp."""
    for tokens in (1, 2, 3, 257, 300) if segments == "sevens" else EDGE_SIZES:
        options = {"dtypes": DTYPES["fp64"], "segments": segments, "teacher": True}
        case = random_case(tokens, **options)
        assert_matches_reference(case, backend.device)
        same = case.to(backend.device).with_(cu_seqlens=None)
        packed = case.to(backend.device)
        assert same_bits(operator_gradient(packed), operator_gradient(same))


@pytest.mark.parametrize("short_ones", [3, 1035])
def test_long_and_short_segments_matches_the_reference_around_tiles(backend, short_ones):
    """A warp of the CUDA kernels finishes a short segment, a block one of more than 64 tiles: two
    of them one after the other, where there are many segments."""
    tile = TILES[0]
    lengths = [5] * short_ones + [64 * tile + 1, 0, 63 * tile, 1, 700 * tile, 7]
    case = random_case(sum(lengths), teacher=True).with_(cu_seqlens=cu_seqlens(lengths))
    for schedule in schedules(backend)[:3]:
        with schedule:
            assert_matches_reference(case, backend.device)


CPU_GROUP = 4 * TILES[-1]  # tokens that one thread of the CPU takes together


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("beyond", [-1, 0, 1, 2])
def test_a_segment_that_ends_around_a_group_of_tiles(backend, before, beyond):
    """It is finished once all its tiles are summed: a call before leaves other sums in memory."""
    lengths = [before, CPU_GROUP - before + beyond, 0, 3000, CPU_GROUP - 3000 - beyond, 0]
    case = random_case(2 * CPU_GROUP, masked=0).with_(cu_seqlens=cu_seqlens(lengths))
    case = case.to(backend.device)
    for schedule in schedules(backend)[:3]:
        with schedule:
            evaluate(case.with_(loss_mask=torch.zeros_like(case.loss_mask)))
            result = evaluate(case)
            counts = result.metrics.sums[_C.SUM_ROWS.index("active")]
            assert counts.tolist() == lengths
            assert_near_reference(case, backend.device)


# ---------------------------------------------------------------------------------------------
# Shapes and layouts


@pytest.mark.parametrize(
    "shape", [(), (1,), (60,), (6, 10), (6, 10, 1), (1, 60), (3, 4, 5), (0,), (4, 0)], ids=str
)
def test_any_shape_is_its_flat_tokens(backend, shape):
    count = torch.Size(shape).numel()
    flat = random_case(count, teacher=True, weights=True, normalizer=7.0).to(backend.device)
    shaped = evaluate(flat.map_tokens(lambda tensor: tensor.view(shape)))
    assert shaped.gradient.shape == shape
    result = evaluate(flat)
    assert_same_bits(dataclasses.replace(shaped, gradients=(shaped.gradient.flatten(),)), result)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "every-dtype"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda tensor: strided_within(tensor, 23),
        lambda tensor: tensor.view(45, 23).t(),
        lambda tensor: tensor[::3],
        lambda tensor: tensor[:45].view(45, 1).expand(45, 23),
        lambda tensor: tensor[7],
    ],
    ids=["strided-rows", "transposed", "every-third", "expanded", "0-dim-of-many"],
)
def test_layout_in_memory_changes_no_bit(backend, dtypes, layout):
    case = random_case(1035, dtypes=DTYPES[dtypes], teacher=True, weights=True)
    viewed = case.to(backend.device).map_tokens(layout)
    assert_same_bits(evaluate(viewed), evaluate(viewed.map_tokens(torch.Tensor.contiguous)))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("elements", [1, 2, 3])
def test_alignment_changes_no_gradient(backend, dtypes, elements):
    case = random_case(2050, dtypes=DTYPES[dtypes], teacher=True, weights=True).to(backend.device)
    moved = evaluate(case.map_tokens(lambda tensor: misaligned(tensor, elements)))
    result = evaluate(case)
    assert same_bits(moved.gradient, result.gradient)
    assert_sums_close(moved.metrics, result.metrics, case)


@pytest.mark.parametrize("field", ["inference_logprobs", "loss_mask", "teacher_logprobs"])
def test_one_misaligned_input_changes_no_gradient(backend, field):
    case = random_case(2050, teacher=True).to(backend.device)
    moved = case.with_(**{field: misaligned(getattr(case, field))})
    assert same_bits(evaluate(moved).gradient, evaluate(case).gradient)


@pytest.mark.reaches_every_kernel
@pytest.mark.parametrize("name", [n for n in MEMORY_CASES if not n.startswith("hostile")])
def test_every_memory_case_matches_the_reference(backend, name):
    assert_near_reference(MEMORY_CASES[name](), backend.device)


# ---------------------------------------------------------------------------------------------
# Normalizers, and batches that train nothing

NORMALIZERS = {
    "none": None,
    "float": 12.5,
    "int": 7,
    "small": 1e-30,
    "fp64": torch.tensor(12.5, dtype=torch.float64),
    "fp32": torch.tensor(12.5),
    "bf16": torch.tensor(12.5, dtype=torch.bfloat16),
    "fp16": torch.tensor(12.5, dtype=torch.float16),
    "int64": torch.tensor(731),
    "int32": torch.tensor(731, dtype=torch.int32),
}


@pytest.mark.parametrize("place", ["own-device", "on-cpu"])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_matches_the_reference_under_every_normalizer(backend, name, place):
    case = random_case(1500, config=CONFIG, normalizer=NORMALIZERS[name])
    if place == "own-device":
        assert_matches_reference(case, backend.device)
        return
    moved = case.to(backend.device).with_(normalizer=case.normalizer)
    assert_same_bits(evaluate(moved), evaluate(case.to(backend.device)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("make", [random_case, nasty_case])
def test_a_normalizer_of_zero_gives_zero(backend, dtype, make):
    normalizer = torch.zeros((), dtype=dtype)
    result = evaluate(make(1100, normalizer=normalizer, teacher=True).to(backend.device))
    assert_exact_zeros(result)
    unnormalized = evaluate(make(1100, teacher=True).to(backend.device))
    assert same_bits(result.metrics.means, unnormalized.metrics.means)


# What a term overflows on, or is NaN of: log-ratio and advantage.
OVERFLOWING = {"product": (80.0, -1e30), "square": (-1e30, 1.0), "nan": (0.5, float("nan"))}


@pytest.mark.parametrize("terms", OVERFLOWING)
@pytest.mark.parametrize("scope", ["kept", "active"])
def test_a_token_of_weight_zero_pays_nothing_whatever_it_holds(backend, terms, scope):
    log_ratio, advantage = OVERFLOWING[terms]
    config = IPOConfig(0.0, float("inf"), kl_tau=0.05, teacher_tau=0.3, kl_scope=scope)
    harmless = random_case(1100, config=config, teacher=True, weights=True)
    weightless = torch.arange(1100) % 3 == 0
    harmless.loss_weights[weightless] = 0
    spoiled = harmless.map_tokens(torch.clone)
    spoiled.trainer_logprobs[weightless] = log_ratio
    spoiled.inference_logprobs[weightless] = 0
    spoiled.advantages[weightless] = advantage
    for function in (None, reference.ipo_loss):
        ours, expected = (
            evaluate(case.to(backend.device), function) for case in (spoiled, harmless)
        )
        assert same_bits(ours.loss, expected.loss)
        assert torch.equal(ours.gradient, expected.gradient)
        for name in ("pg_loss", "kl_loss"):
            assert same_bits(ours.metrics[name], expected.metrics[name])


@pytest.mark.parametrize("normalizer", [0.0, -1.0, float("nan"), float("inf"), 0])
def test_a_float_normalizer_must_be_above_zero(backend, normalizer):
    with pytest.raises(ValueError, match=r"normalizer: expected a finite number > 0"):
        evaluate(random_case(3, normalizer=normalizer).to(backend.device))


@pytest.mark.parametrize("number", [np.float32(70), np.float64(70), np.int64(70), 70])
def test_a_normalizer_may_be_any_number(backend, number):
    assert_same_bits(
        evaluate(random_case(100, normalizer=number).to(backend.device)),
        evaluate(random_case(100, normalizer=70.0).to(backend.device)),
    )


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_tensor_normalizer_that_is_no_count_is_a_contract_fault(backend, value):
    case = random_case(1100, normalizer=torch.tensor(value)).to(backend.device)
    if backend.faults_raise:
        with pytest.raises(RuntimeError, match=r"^normalizer: expected a count of tokens"):
            evaluate(case)
        return
    result = evaluate(case)
    assert result.loss.isnan()
    assert result.gradient.isnan().all()


def assert_exact_zeros(result):
    """+0.0 in every bit."""
    assert same_bits(result.loss, torch.zeros_like(result.loss))
    assert same_bits(result.gradient, torch.zeros_like(result.gradient))


def all_masked(tokens):
    case = nasty_case(tokens, teacher=True, weights=True)
    return case.with_(loss_mask=torch.zeros(tokens, dtype=torch.bool))


def all_dropped(tokens):
    case = random_case(tokens, teacher=True, weights=True)
    return case.with_(inference_logprobs=case.trainer_logprobs + 7)


@pytest.mark.parametrize("normalizer", [None, 5.0, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 1025])
@pytest.mark.parametrize("make", [all_masked, all_dropped])
def test_a_batch_that_trains_nothing_runs_backward_to_zeros(backend, make, tokens, normalizer):
    case = make(tokens).with_(normalizer=normalizer)
    assert not kept(case).any()
    result = evaluate(case.to(backend.device), grad_loss=3.0)
    assert_exact_zeros(result)
    assert result.gradient.shape == (tokens,)
    active = case.loss_mask.any()
    assert result.metrics["is_masked"].item() == float(active)
    if not active:
        assert not result.metrics.means.any()


@pytest.mark.reaches_every_kernel
@pytest.mark.parametrize("ends", [[0], [0, 0], [0, 0, 0, 0]], ids=str)
def test_no_tokens_in_any_number_of_segments(backend, ends):
    case = random_case(0).with_(cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    result = evaluate(case.to(backend.device))
    assert_exact_zeros(result)
    assert result.metrics.means.shape == (len(_C.MEAN_ROWS), len(ends) - 1)
    assert not result.metrics.means.any()


def test_without_grad_the_forward_pass_is_the_same(backend):
    case = random_case(2100, teacher=True, weights=True, segments="at-tiles").to(backend.device)
    expected = evaluate(case)
    out = case.call()
    assert not out.loss.requires_grad
    leaf = case.trainer_logprobs.detach().requires_grad_()
    with torch.no_grad():
        ungraded = case.with_(trainer_logprobs=leaf).call()
    assert ungraded.loss.grad_fn is None
    for loss, metrics, *_ in (out, ungraded):
        assert same_bits(loss, expected.loss)
        assert same_bits(metrics.means, expected.metrics.means)
        assert same_bits(metrics.sums, expected.metrics.sums)


# ---------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("factor", [3.0, 1 / 7, -1.0, 0.0])
def test_gradient_scales_with_the_loss(backend, dtypes, factor):
    case = random_case(1030, dtypes=DTYPES[dtypes], normalizer=17.0).to(backend.device)
    scaled = evaluate(case, grad_loss=factor)
    expected = (operator_gradient(case) * factor).to(case.trainer_logprobs.dtype)
    assert same_bits(scaled.gradient, expected)


def test_gradient_is_the_derivative_of_the_loss(backend):
    """By finite differences in float64, each token well inside or outside the band."""
    case = random_case(12, dtypes=DTYPES["fp64"], config=CONFIG, weights=True, normalizer=3.0)
    x = torch.linspace(-1.4, 1.4, 12, dtype=torch.float64)
    x[::4] = 3.0
    case = case.with_(inference_logprobs=case.trainer_logprobs - x).to(backend.device)
    assert 0 < kept(case).sum() < 12

    def loss(trainer_logprobs):
        return case.with_(trainer_logprobs=trainer_logprobs).call().loss

    assert torch.autograd.gradcheck(loss, case.trainer_logprobs.requires_grad_(), nondet_tol=0.0)


# ---------------------------------------------------------------------------------------------
# Equal bits


@pytest.mark.parametrize("layout", SEGMENTS)
@pytest.mark.parametrize("tokens", [37, 3333])
def test_packed_equals_separate(backend, layout, tokens):
    packed = random_case(
        min(tokens, MOST_TOKENS[layout]), segments=layout, teacher=True, weights=True
    )
    packed = packed.to(backend.device)
    ends = packed.cu_seqlens.tolist()
    result = evaluate(packed)
    unpacked = evaluate(packed.with_(cu_seqlens=None))
    assert same_bits(result.gradient, unpacked.gradient)
    assert_sums_close(result.metrics.total(), unpacked.metrics, packed)
    for s in sample_of(range(len(ends) - 1)):
        part = slice(ends[s], ends[s + 1])
        alone = packed.with_(cu_seqlens=None).map_tokens(lambda tensor, part=part: tensor[part])
        separate = evaluate(alone)
        assert same_bits(result.gradient[part], separate.gradient), s
        assert_sums_close(segment_of(result.metrics, s), separate.metrics, alone)


def sample_of(numbers, most=15):
    return numbers[:: max(1, len(numbers) // most)]


def segment_of(metrics, s):
    return dataclasses.make_dataclass("Segment", ["sums", "extremes"])(
        metrics.sums[:, s], metrics.extremes[:, s]
    )


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp64"])
def test_permuting_tokens_permutes_gradients(backend, dtypes):
    case = nasty_case(3001, dtypes=DTYPES[dtypes], teacher=True, weights=True)
    order = torch.randperm(3001)
    case, order = case.to(backend.device), order.to(backend.device)
    permuted = evaluate(case.map_tokens(lambda tensor: tensor[order]))
    result = evaluate(case)
    assert same_bits(permuted.gradient, result.gradient[order])
    assert_sums_close(permuted.metrics, result.metrics, case)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("padding", [1, 2000])
def test_more_padding_changes_no_gradient_and_no_sum(backend, dtypes, padding):
    case = nasty_case(1001, dtypes=DTYPES[dtypes], teacher=True, weights=True).to(backend.device)
    padded = evaluate(
        case.map_tokens(lambda tensor: torch.cat([tensor, tensor.new_zeros(padding)]))
    )
    result = evaluate(case)
    assert same_bits(padded.gradient[:1001], result.gradient)
    assert not padded.gradient[1001:].any()
    assert_sums_close(padded.metrics, result.metrics, case)


@pytest.mark.parametrize("segments", [None, "at-tiles"])
@pytest.mark.parametrize("dtypes", ["fp32", "fp64"])
def test_same_bits_whatever_the_schedule(backend, dtypes, segments):
    # For the CPU enough tiles to be worth a second thread.
    tokens = 2051 if backend.name == "emulated" else 100_003
    case = random_case(tokens, dtypes=DTYPES[dtypes], segments=segments, teacher=True, weights=True)
    case = case.to(backend.device)
    first = evaluate(case)
    for schedule in schedules(backend):
        with schedule:
            assert_same_bits(evaluate(case), first)


def test_same_bits_run_to_run(backend):
    case = nasty_case(20_011, segments="at-tiles", teacher=True, weights=True).to(backend.device)
    first = evaluate(case)
    for _ in range(5):
        assert_same_bits(evaluate(case), first)


@pytest.mark.parametrize("make", [random_case, nasty_case])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_mask_and_counts_are_the_same_bits_as_on_the_cpu(backend, dtypes, make):
    case = make(4099, dtypes=DTYPES[dtypes], segments="at-tiles", weights=True, config=CONFIG)
    result = evaluate(case.to(backend.device))
    with Backend("cpu").active():
        on_cpu = evaluate(case)
    assert torch.equal(result.gradient.cpu() != 0, on_cpu.gradient != 0)
    assert same_bits(result.metrics.sums[:COUNTS], on_cpu.metrics.sums[:COUNTS])
    assert torch.equal(result.metrics.extremes.cpu(), on_cpu.metrics.extremes)


@pytest.mark.emulated
@pytest.mark.parametrize("tokens", [0, 1, 5000])
@pytest.mark.parametrize("segments", [None, "empty-around"])
def test_at_most_two_launches_are_needed(tokens, segments):
    with Backend("emulated").active():
        emulator = emulated.load()
        emulator.emulator_reset_statistics()
        evaluate(random_case(tokens, segments=segments, teacher=True))
        assert emulator.emulator_launches() <= 2
