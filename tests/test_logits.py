"""Tier 2: the loss and the log-probabilities straight from the logits, on every backend."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import ipo_ext
from backends import Backend
from closeness import assert_close
from emulator import operators as emulated
from ipo_ext import IPOConfig, _operators, reference
from ipo_ext._ops.arguments import LossInputs

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COLUMNS = (1, 2, 7, 33, 130, 1031)
# Enough to keep any GPU busy. Of fewer rows, those longer than 1024 columns are each summed by
# several blocks, in another order, unless the gradient is narrower than the logits.
MANY_ROWS = 200
WIDE_BAND = IPOConfig(dppo_mask_low=0.0, dppo_mask_high=math.inf)


@dataclasses.dataclass(frozen=True)
class Case:
    logits: torch.Tensor
    labels: torch.Tensor
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    options: dict[str, Any]

    def with_(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device) -> Case:
        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["options"] = {name: move(value) for name, value in self.options.items()}
        return Case(**{name: move(value) for name, value in fields.items()})

    def call(self, function: Callable[..., Any] | None = None, **more: Any) -> ipo_ext.IPOOutput:
        constants = (self.labels, self.inference_logprobs, self.advantages, self.loss_mask)
        function = function or ipo_ext.ipo_loss_from_logits
        return function(self.logits, *constants, **self.options, **more)


def random_case(
    rows: int = 9,
    columns: int = 33,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    masked: float = 0.3,
    inference_dtype: torch.dtype = torch.float32,
    token_temperature: bool = False,
    spread: float = 2.0,
    likely: bool = False,
    **options: Any,
) -> Case:
    """Log-ratios at -3, -0.5, 0.5 or 3, give or take a little: no token is near the band's ends.
    ``likely``: labels have a probability of about a third, however many columns there are."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns, generator=generator) * spread).to(dtype)
    mask = torch.rand(rows, generator=generator) >= masked
    labels = torch.randint(columns, (rows,), generator=generator)
    if likely:
        logits[torch.arange(rows), labels] += math.log(columns)
    if token_temperature:
        options["temperature"] = torch.rand(rows, generator=generator) + 0.5
    how = {name: options.get(name) for name in ("temperature", "softcap")}
    exact, _ = reference.token_logprobs(logits, labels, **how, dtype=torch.float64)
    ratios = torch.tensor([-3.0, -0.5, 0.5, 3.0])
    x = ratios[torch.randint(4, (rows,), generator=generator)]
    x = x + 0.1 * torch.randn(rows, generator=generator)
    return Case(
        logits,
        labels.masked_fill(~mask, -100),
        (exact - x).to(inference_dtype),
        torch.randn(rows, generator=generator),
        mask,
        options,
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    output: ipo_ext.IPOOutput
    gradient: torch.Tensor


def evaluate(
    case: Case, function: Any = None, *, grad_loss: float = 1.0, **more: Any
) -> Evaluation:
    case = case.with_(logits=case.logits.detach().requires_grad_())
    output = case.call(function, **more)
    weight = torch.tensor(grad_loss, dtype=output.loss.dtype, device=output.loss.device)
    (gradient,) = torch.autograd.grad(output.loss, case.logits, weight)
    return Evaluation(output, gradient)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(integers[tensor.element_size()])


def assert_same_bits(a: Evaluation, b: Evaluation) -> None:
    for name in ("loss", "logprobs", "entropy"):
        left, right = getattr(a.output, name), getattr(b.output, name)
        assert torch.equal(bits(left), bits(right)), f"{name}: {left} and {right}"
    assert torch.equal(bits(a.gradient), bits(b.gradient)), "gradients differ"
    left, right = a.output.metrics, b.output.metrics
    for name in ("means", "sums", "extremes"):
        assert torch.equal(bits(getattr(left, name)), bits(getattr(right, name))), name


def gradient_scale(case: Case, exact: torch.Tensor) -> torch.Tensor:
    """Sizes of the terms of each derivative: at the label, 1 and p are subtracted."""
    how = {name: case.options.get(name) for name in ("temperature", "softcap")}
    log_p, _ = reference.token_logprobs(case.logits, case.labels, **how, dtype=torch.float64)
    p = log_p.exp()[:, None]
    label = torch.where(case.loss_mask, case.labels, 0)[:, None].long()
    at_label = exact.gather(-1, label).abs() * (1 + p) / (1 - p)
    size = exact.abs().scatter(-1, label, at_label.nan_to_num(0, 0, 0))
    return torch.where(size > 0, size.clamp(min=1e-30), 0)  # subnormal exponentials count as 0


def rounding_of_p(case: Case) -> float:
    """Ulp of a probability that rounding the largest argument can move: exp(s) moves by s."""
    if case.logits.dtype.itemsize == 2:
        return 1.0
    in_float64 = case.logits.dtype == torch.float64  # then naive is exact, and ours would be alone
    return (4 if in_float64 else 1) * (8.0 + largest_argument(case))


def largest_argument(case: Case) -> float:
    """Bounds the softmax's arguments, whose rounding every log-probability inherits."""
    temperature = case.options.get("temperature")
    coldest = 1.0 if temperature is None else torch.as_tensor(temperature).min().item()
    softcap = case.options.get("softcap") or math.inf
    finite = case.logits[case.logits.isfinite()]
    return 1.0 + min(finite.abs().max().item(), softcap) / coldest


def in_long_double(case: Case) -> dict[str, torch.Tensor]:
    """For float64 logits, of which eager torch knows no more than we do: its sums lose bits."""
    scaled = case.logits.cpu().numpy().astype(np.longdouble)
    if softcap := case.options.get("softcap"):
        scaled = softcap * np.tanh(scaled / softcap)
    temperature = case.options.get("temperature")
    temperature = 1.0 if temperature is None else temperature
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.cpu().numpy()[..., None]
    active = case.loss_mask.cpu().numpy()
    with np.errstate(all="ignore"):  # of rows that are not finite
        scaled = scaled / np.asarray(temperature, dtype=np.longdouble)
        below = scaled - scaled.max(-1, keepdims=True)
        log_p = below - np.log(np.exp(below).sum(-1, keepdims=True))
        p = np.exp(log_p)
        entropy = -np.where(p == 0, 0, p * log_p).sum(-1)
    labels = np.where(active, case.labels.cpu().numpy(), 0)
    logprobs = np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return {
        name: torch.from_numpy(np.where(active, values, 0).astype(np.float64))
        for name, values in (("logprobs", logprobs), ("entropy", entropy))
    }


def assert_accurate(case: Case, backend: Backend, grad_loss: float = 1.0) -> None:
    """Ours is about as close to float64 as eager torch in the compute dtype is."""
    ours = evaluate(case.to(backend.device), grad_loss=grad_loss)
    naive = evaluate(case, reference.ipo_loss_from_logits, grad_loss=grad_loss)
    wide = case.with_(logits=case.logits.double())
    more = {"dtype": torch.float64}
    exact = evaluate(wide, reference.ipo_loss_from_logits, grad_loss=grad_loss, **more)
    truths = {name: getattr(exact.output, name) for name in ("logprobs", "entropy")}
    if case.logits.dtype == torch.float64:
        truths = in_long_double(case)
    for name, truth in truths.items():
        mine, theirs = (getattr(e.output, name) for e in (ours, naive))
        log_size = truth.abs() + case.loss_mask * largest_argument(case)
        assert_close(mine, theirs, truth, scale=log_size, floor=6, name=name)
    assert ours.output.loss.item() == pytest.approx(
        exact.output.loss.item(), rel=1e-5, abs=1e-5 * len(case.labels)
    )
    assert_close(
        ours.gradient,
        naive.gradient,
        exact.gradient,
        scale=gradient_scale(case, exact.gradient),
        floor=rounding_of_p(case),
        name="gradient",
    )
    for name, value in exact.output.metrics.items():
        assert ours.output.metrics[name].item() == pytest.approx(value.item(), rel=2e-5, abs=2e-5)


# -------------------------------------------------------------------------------------------------
# Against float64


@pytest.mark.tempts_kernels_out_of_bounds
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend: Backend, dtype: torch.dtype, columns: int) -> None:
    assert_accurate(random_case(columns=columns, dtype=dtype, temperature=0.8), backend)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_and_token_temperature(
    backend: Backend, dtype: torch.dtype, softcap: float | None
) -> None:
    case = random_case(dtype=dtype, columns=130, token_temperature=True, softcap=softcap)
    assert_accurate(case, backend, grad_loss=0.75)


@pytest.mark.tempts_kernels_out_of_bounds
def test_long_rows_use_the_large_block(backend: Backend) -> None:
    assert_accurate(random_case(rows=2, columns=4097, masked=0), backend)
    assert_accurate(random_case(rows=2, columns=8192, dtype=torch.bfloat16, masked=0), backend)


@hypothesis.given(
    rows=st.integers(1, 6),
    columns=st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 1025])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    temperature=st.sampled_from([None, 0.5, 1.0, 2.5, "token"]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    normalizer=st.sampled_from([None, 4.0]),
    grad_loss=st.sampled_from([1.0, -2.5]),
    spread=st.sampled_from([0.1, 2.0, 8.0]),
    layout=st.sampled_from(["contiguous", "strided", "unaligned", "transposed"]),
)
def test_any_case(
    backend_name: str,
    rows: int,
    columns: int,
    temperature: float | str | None,
    grad_loss: float,
    layout: str,
    **options: Any,
) -> None:
    of_token = temperature == "token"
    options["temperature"] = None if of_token else temperature
    case = random_case(rows, columns, token_temperature=of_token, **options)
    case = case.with_(logits=LAYOUTS[layout](case.logits))
    with Backend(backend_name).active() as backend:
        assert_accurate(case, backend, grad_loss)


# -------------------------------------------------------------------------------------------------
# Agreement with tier 1


@pytest.mark.parametrize("inference_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_agrees_with_tier_1(backend: Backend, inference_dtype: torch.dtype) -> None:
    rows = 200
    case = random_case(rows, 40, inference_dtype=inference_dtype).to(backend.device)
    new = torch.Generator().manual_seed(1)
    inference = case.inference_logprobs + torch.randn(rows, generator=new).to(backend.device)
    case = case.with_(
        inference_logprobs=inference.to(inference_dtype),
        options={
            "cu_seqlens": torch.tensor([0, 50, 50, 200], dtype=torch.int32, device=backend.device),
            "teacher_logprobs": torch.randn(rows, generator=new).to(backend.device),
            "loss_weights": torch.rand(rows, generator=new).to(backend.device),
            "normalizer": 7.0,
            "config": IPOConfig(teacher_tau=0.3),
        },
    )
    ours = evaluate(case)
    logprobs = ours.output.logprobs.requires_grad_()
    constants = (case.inference_logprobs, case.advantages, case.loss_mask)
    tier_1 = ipo_ext.ipo_loss(logprobs, *constants, **case.options)
    (slope,) = torch.autograd.grad(tier_1.loss, logprobs)
    assert torch.equal(bits(ours.output.loss), bits(tier_1.loss))
    for name, value in tier_1.metrics.items():
        assert torch.equal(bits(ours.output.metrics[name]), bits(value)), name
    assert torch.equal(ours.gradient.any(-1), slope != 0), "mask decisions"
    assert set(ours.output.metrics) - set(tier_1.metrics) == {"entropy"}


def test_entropy_metric_combines(backend: Backend) -> None:
    case = random_case(20, 11, cu_seqlens=torch.tensor([0, 8, 20], dtype=torch.int32))
    metrics = case.to(backend.device).call().metrics
    whole = case.with_(options={}).to(backend.device).call()
    active = case.loss_mask.to(backend.device)
    mean = whole.entropy[active].double().mean().item()
    assert metrics.total()["entropy"].item() == pytest.approx(mean, rel=1e-6)
    assert whole.metrics["entropy"].item() == pytest.approx(mean, rel=1e-6)


# -------------------------------------------------------------------------------------------------
# What must not be read, and what must not matter


def protected_rows(values: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """A copy on pages of its own, one a row, of which the hidden ones cannot be read."""
    page = mmap.PAGESIZE
    rows, columns = values.shape
    assert columns * values.element_size() == page
    memory = mmap.mmap(-1, rows * page)
    copy = torch.frombuffer(memory, dtype=values.dtype).view(rows, columns).copy_(values)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for row in hidden.nonzero().flatten().tolist():
        address = ctypes.c_void_p(copy.data_ptr() + row * page)
        assert protect(address, ctypes.c_size_t(page), 0) == 0
    return copy


def test_inactive_rows_are_not_read(backend: Backend) -> None:
    if backend.name == "cuda":
        return  # host memory: cpu and emulated run the same loads
    case = random_case(rows=7, columns=mmap.PAGESIZE // 4, masked=0.5)
    whole = evaluate(case)
    case = case.with_(labels=case.labels.masked_fill(~case.loss_mask, 2**40))
    hidden = case.with_(logits=protected_rows(case.logits, ~case.loss_mask))
    assert_same_bits(evaluate(hidden), whole)


def test_rows_without_upstream_are_not_read(backend: Backend) -> None:
    rows, columns = 6, 40
    logits = torch.randn(rows, columns, device=backend.device, requires_grad=True)
    labels = torch.arange(rows, device=backend.device)
    labels[5] = -100
    logprobs, entropy = ipo_ext.token_logprobs(logits, labels)
    weights = torch.tensor([1.0, 0, 0, 2, 0, 3], device=backend.device)
    loss = (logprobs * weights).sum() + entropy[1] * 0.5
    untouched = torch.tensor([False, False, True, False, True, True], device=backend.device)
    (expected,) = torch.autograd.grad(loss, logits, retain_graph=True)
    with torch.no_grad():
        logits.data[untouched] = math.nan
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, expected)
    assert not gradient[untouched].any()
    assert gradient[~untouched].all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_garbage_in_inactive_rows_is_neutral(backend: Backend, garbage: float) -> None:
    case = random_case(rows=20, token_temperature=True).to(backend.device)
    off = ~case.loss_mask
    spoiled = case.with_(
        logits=case.logits.masked_fill(off[:, None], garbage),
        labels=case.labels.masked_fill(off, 2**40),
        inference_logprobs=case.inference_logprobs.masked_fill(off, garbage),
        advantages=case.advantages.masked_fill(off, garbage),
        options={"temperature": case.options["temperature"].masked_fill(off, -garbage)},
    )
    clean = evaluate(case)
    assert_same_bits(evaluate(spoiled), clean)
    assert not bits(clean.gradient[off]).any()
    assert not clean.output.logprobs[off].any()
    assert not clean.output.entropy[off].any()


def test_dropped_rows_get_exact_zeros(backend: Backend) -> None:
    case = random_case(rows=40, masked=0).to(backend.device)
    ours = evaluate(case)
    x = ours.output.logprobs - case.inference_logprobs
    dropped = x.abs() > math.log(5)
    assert 0 < dropped.sum() < 40
    assert not bits(ours.gradient[dropped]).any()
    assert ours.gradient[~dropped].all()


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_active(backend: Backend, rows: int) -> None:
    case = random_case(rows=rows, masked=1.0, columns=5).to(backend.device)
    ours = evaluate(case)
    assert ours.output.loss.item() == 0
    assert ours.gradient.shape == (rows, 5)
    assert not ours.gradient.any()
    assert all(value.item() == 0 for value in ours.output.metrics.values())


# -------------------------------------------------------------------------------------------------
# Values at the edge


@pytest.mark.tempts_kernels_out_of_bounds
def test_nonfinite_rows_are_dropped_and_counted(backend: Backend) -> None:
    case = random_case(rows=8, columns=37, masked=0)
    logits = case.logits.clone()
    logits[0, 5] = math.nan
    logits[1] = -math.inf
    logits[2, 7] = math.inf
    logits[3, case.labels[3]] = -math.inf
    case = case.with_(logits=logits)
    ours = evaluate(case.to(backend.device))
    assert ours.output.logprobs[:3].isnan().all()
    assert ours.output.logprobs[3].item() == -math.inf
    assert not bits(ours.gradient[:4]).any()
    assert ours.gradient.isfinite().all()
    assert ours.output.metrics["nonfinite"].item() == 0.5
    rest = evaluate(case.with_(loss_mask=torch.arange(8) > 3).to(backend.device))
    assert torch.equal(ours.gradient, rest.gradient)
    assert torch.equal(ours.output.loss, rest.output.loss)


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_a_softcap_makes_infinite_logits_finite(backend: Backend, infinity: float) -> None:
    case = random_case(rows=5, columns=37, masked=0, softcap=3.0)
    logits = case.logits.clone()
    logits[0, 5] = infinity
    logits[1] = infinity
    assert_accurate(case.with_(logits=logits), backend)
    assert case.with_(logits=logits).call().logprobs.isfinite().all()


def test_infinite_logits_of_other_tokens(backend: Backend) -> None:
    case = random_case(rows=9, columns=65, masked=0)
    blocked = torch.rand(9, 65) < 0.5
    blocked[torch.arange(9), case.labels] = False
    logits = case.logits.masked_fill(blocked, -math.inf)
    how = {"dtype": torch.float64}
    exact, _ = reference.token_logprobs(logits, case.labels, **how)
    case = case.with_(logits=logits, inference_logprobs=exact.float() - 0.5)
    assert_accurate(case, backend)
    assert not evaluate(case.to(backend.device)).gradient[blocked.to(backend.device)].any()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_offset_costs_no_digits(backend: Backend, offset: float) -> None:
    logits = (torch.randn(5, 300) * 2 + offset).to(backend.device)
    labels = torch.arange(5, device=backend.device)
    ours = ipo_ext.token_logprobs(logits, labels, temperature=0.7)
    exact = reference.token_logprobs(logits, labels, temperature=0.7, dtype=torch.float64)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1 / 3, 1e-3, 3e4, 2.0**-14])
def test_scale_rounds_every_number_as_torch(
    backend: Backend, dtype: torch.dtype, factor: float
) -> None:
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    everything = everything.to(backend.device)
    scale = torch.tensor(factor, device=backend.device)
    expected = (everything.float() * scale).to(dtype)
    for part in (everything, everything[1:]):
        ours = part.clone() if part.data_ptr() % 16 == 0 else unaligned(part[None])[0]
        _operators.library().scale_(ours, scale)
        torch.testing.assert_close(
            ours, expected[-len(ours) :], rtol=0, atol=0, equal_nan=True, check_device=False
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, -1 / 3, 0.0, math.nan])
def test_scale_into_a_narrower_dtype_rounds_once(
    backend: Backend, dtype: torch.dtype, factor: float
) -> None:
    """Around whole groups of 4, starting on 16 bytes or not."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    between = (halves.float() * (1 + 2.0**-12)).to(backend.device)  # and no number of the dtype
    scale = torch.tensor(factor, device=backend.device)
    for count in (0, 1, 3, 4, 5, 1023, 1030, 2**16):
        for gradient in (between[:count], unaligned(between[None, :count])[0]):
            expected = (gradient * scale).to(dtype)
            for out in (torch.empty_like(expected), unaligned(expected[None])[0].fill_(7)):
                _operators.library().scale_into(gradient, scale, out)
                torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.emulated
def test_scale_goes_round_on_a_small_device() -> None:
    """More elements than one round of the grid takes on one multiprocessor."""
    multiprocessors = 16  # cudaDevAttrMultiProcessorCount
    harness = emulated.load()
    gradient = torch.randn(2**17 + 3)
    expected = gradient * 3
    harness.emulator_set_device_attribute(multiprocessors, 1)
    try:
        with Backend("emulated").active():
            _operators.library().scale_(gradient, torch.tensor(3.0))
    finally:
        harness.emulator_set_device_attribute(multiprocessors, -1)
    assert torch.equal(gradient, expected)


def test_scale_refuses_what_it_cannot_write(backend: Backend) -> None:
    scale = torch.tensor(2.0, device=backend.device)
    gradient = torch.ones(4, device=backend.device)
    for out in (gradient[:3], gradient.double(), gradient.int(), gradient.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match=r"^out: expected "):
            _operators.library().scale_into(gradient, scale, out)
    with pytest.raises(RuntimeError, match=r"^gradient: expected a floating dtype"):
        _operators.library().scale_(gradient.int(), scale)


def test_fp16_gradients_do_not_underflow(backend: Backend) -> None:
    case = random_case(columns=300, dtype=torch.float16, masked=0).to(backend.device)
    plain = evaluate(case)
    scaled = evaluate(case.with_(options={"normalizer": 1e6}), grad_loss=1e6)
    torch.testing.assert_close(scaled.gradient, plain.gradient, rtol=1e-3, atol=1e-7)
    nothing = torch.zeros((), device=backend.device)
    zero = evaluate(case.with_(options={"normalizer": nothing}))
    assert zero.output.loss.item() == 0
    assert not zero.gradient.any()


# -------------------------------------------------------------------------------------------------
# Memory layouts


def strided(logits: torch.Tensor) -> torch.Tensor:
    room = logits.new_full((logits.shape[0], logits.shape[1] + 3), math.nan)
    room[:, : logits.shape[1]] = logits
    return room[:, : logits.shape[1]]


def unaligned(logits: torch.Tensor) -> torch.Tensor:
    room = logits.new_empty(logits.numel() + 1)
    return room[1:].view(logits.shape).copy_(logits)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda logits: logits,
    "strided": strided,
    "unaligned": unaligned,
    "transposed": lambda logits: logits.t().contiguous().t(),
}


@pytest.mark.parametrize("columns", [33, 37, 47, 5001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_rows_with_a_ragged_end(backend: Backend, dtype: torch.dtype, columns: int) -> None:
    """Vector loads for the most of a row, and what is left of it one by one."""
    rows = 3
    room = torch.full((rows, columns // 16 * 16 + 16), math.nan, dtype=dtype)
    room[:, :columns] = torch.randn(rows, columns)
    room[:, columns - 1] = 9.0  # the last column decides the sums
    logits = room.to(backend.device)[:, :columns]
    labels = torch.randint(0, columns, (rows,), device=backend.device)
    ours, entropy = ipo_ext.token_logprobs(logits, labels)

    def expected(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        every = values.log_softmax(-1)
        return every.gather(-1, labels.long()[:, None])[:, 0], -(every.exp() * every).sum(-1)

    exact, exact_entropy = expected(logits.double())
    naive, naive_entropy = expected(logits.to(ours.dtype))
    assert_close(ours, naive, exact, scale=exact.abs() + 9, name="logprobs")
    assert_close(entropy, naive_entropy, exact_entropy, scale=exact_entropy + 9, name="entropy")


@pytest.mark.tempts_kernels_out_of_bounds
@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2)])
def test_slices_and_shapes(
    backend: Backend, shape: Sequence[int], labels_dtype: torch.dtype
) -> None:
    rows, columns = math.prod(shape), 24
    case = random_case(rows, columns).to(backend.device)
    batch = torch.full((*shape, columns), math.nan, device=backend.device)
    batch = torch.cat([batch, batch], dim=len(shape) - 1)  # as logits[:, :-1] of a longer batch
    view = batch[..., : shape[-1], :]
    view.copy_(case.logits.view(*shape, columns))
    tokens = {
        name: getattr(case, name).view(shape)
        for name in ("inference_logprobs", "advantages", "loss_mask")
    }
    labels = case.labels.view(shape).to(labels_dtype)
    ours, flat = evaluate(case.with_(logits=view, labels=labels, **tokens)), evaluate(case)
    assert ours.gradient.shape == view.shape
    assert ours.output.logprobs.shape == labels.shape
    assert torch.equal(bits(ours.gradient.view(rows, columns)), bits(flat.gradient))
    assert torch.equal(bits(ours.output.loss), bits(flat.output.loss))


def test_one_token_without_dimensions(backend: Backend) -> None:
    logits = torch.randn(13, device=backend.device)
    logprob, entropy = ipo_ext.token_logprobs(logits, torch.tensor(4, device=backend.device))
    assert logprob.shape == entropy.shape == ()
    assert logprob.item() == pytest.approx(logits.log_softmax(-1)[4].item(), abs=1e-6)


def test_indices_beyond_32_bits(backend: Backend) -> None:
    if backend.name == "cuda":
        return  # lazily committed host memory: cpu and emulated run the same index arithmetic
    room = torch.empty(2**32 + 64, dtype=torch.float16)  # only the rows' pages are ever touched
    logits = room.as_strided((3, 40), (2**31, 1))
    logits.copy_(torch.randn(3, 40))
    labels = torch.tensor([1, 39, 0])
    ours = ipo_ext.token_logprobs(logits, labels)
    expected = ipo_ext.token_logprobs(logits.contiguous(), labels)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


# -------------------------------------------------------------------------------------------------
# The building block


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_token_logprobs(backend: Backend, softcap: float | None) -> None:
    logits = torch.randn(5, 9, dtype=torch.float64, device=backend.device, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 3, 3], device=backend.device)
    temperature = torch.tensor([0.5, 1, 1, 2, 0.9], dtype=torch.float64, device=backend.device)

    def both(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ipo_ext.token_logprobs(z, labels, temperature=temperature, softcap=softcap)

    assert torch.autograd.gradcheck(both, logits)


def test_gradient_is_that_of_finite_differences(backend: Backend) -> None:
    # Not gradcheck, which runs backward twice.
    options = {"config": WIDE_BAND, "temperature": 0.8, "softcap": 5.0, "normalizer": 3.0}
    case = random_case(4, 9, torch.float64, inference_dtype=torch.float64, **options)
    case = case.to(backend.device)
    step = 1e-6
    differences = torch.empty_like(case.logits)
    for row, column in itertools.product(range(4), range(9)):
        shift = torch.zeros_like(case.logits)
        shift[row, column] = step
        ahead = case.with_(logits=case.logits + shift).call().loss
        behind = case.with_(logits=case.logits - shift).call().loss
        differences[row, column] = (ahead - behind) / (2 * step)
    torch.testing.assert_close(evaluate(case).gradient, differences, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_token_logprobs_gradient(
    backend: Backend, dtype: torch.dtype, softcap: float | None
) -> None:
    logits = (torch.randn(6, 70) * 2).to(dtype)
    labels = torch.tensor([0, 69, -100, 7, 8, 33], dtype=torch.int32)
    weights = torch.randn(2, 6, dtype=torch.float64)

    def gradient(function: Any, z: torch.Tensor, **more: Any) -> torch.Tensor:
        z = z.detach().requires_grad_()
        outputs = function(z, labels.to(z.device), temperature=0.9, softcap=softcap, **more)
        values = torch.stack(outputs)
        return torch.autograd.grad((values * weights.to(values)).sum(), z)[0]

    ours = gradient(ipo_ext.token_logprobs, logits.to(backend.device))
    naive = gradient(reference.token_logprobs, logits)
    exact = gradient(reference.token_logprobs, logits.double(), dtype=torch.float64)
    size = exact.abs() + (exact != 0) * weights.abs().sum(0)[:, None] * logits.double().softmax(-1)
    size[torch.arange(6), labels.long().clamp(min=0)] += (labels >= 0) * weights[0].abs()
    floor = (
        64 if dtype == torch.float64 else 8
    )  # naive is exact in float64; gradcheck does the rest
    assert_close(ours, naive, exact, scale=size, floor=floor, name="gradient")


def test_one_output_alone(backend: Backend) -> None:
    logits = torch.randn(3, 9, device=backend.device, requires_grad=True)
    labels = torch.tensor([1, 2, 3], device=backend.device)
    for part in (0, 1):
        (ours,) = torch.autograd.grad(ipo_ext.token_logprobs(logits, labels)[part].sum(), logits)
        expected = reference.token_logprobs(logits, labels)[part].sum()
        torch.testing.assert_close(ours, torch.autograd.grad(expected, logits)[0])


# -------------------------------------------------------------------------------------------------
# Faults


def fault_cases() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    def label(row: int, value: int) -> tuple[dict[str, Any], type[Exception], str]:
        labels = torch.zeros(9, dtype=torch.int64)
        labels[row] = value
        everything = torch.ones(9, dtype=torch.bool)
        fields = {"labels": labels, "loss_mask": everything}
        return fields, IndexError, "labels: expected a token in [0, 33)"

    temperature = "temperature: expected a finite number > 0"
    short = torch.tensor([0, 5], dtype=torch.int32)
    return {
        "label-high": label(8, 33),
        "label-low": label(0, -100),
        "label-far": label(0, 2**40),
        "temperature": ({"temperature": torch.zeros(9)}, RuntimeError, temperature),
        "temperature-nan": ({"temperature": torch.tensor(math.nan)}, RuntimeError, temperature),
        "cu_seqlens": ({"cu_seqlens": short}, RuntimeError, "cu_seqlens"),
        "normalizer": ({"normalizer": torch.tensor(-1.0)}, RuntimeError, "normalizer"),
    }


@pytest.mark.tempts_kernels_out_of_bounds
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(fault_cases()))
def test_contract_faults(backend: Backend, name: str, dtype: torch.dtype) -> None:
    changes, error, text = fault_cases()[name]
    fields = {key: changes[key] for key in changes if key in ("labels", "loss_mask")}
    options = {key: changes[key] for key in changes if key not in fields}
    case = random_case(9, 33, dtype).with_(**fields, options=options).to(backend.device)
    if backend.faults_raise:
        with pytest.raises(error) as raised:
            evaluate(case)
        assert type(raised.value) is error
        assert str(raised.value).startswith(text)
    else:
        ours = evaluate(case)
        assert ours.output.loss.isnan()
        assert ours.gradient.isnan().all()


@pytest.mark.tempts_kernels_out_of_bounds
def test_contract_faults_of_token_logprobs(backend: Backend) -> None:
    logits = torch.randn(3, 7, device=backend.device, requires_grad=True)
    labels = torch.tensor([0, 7, 1], device=backend.device)
    if backend.faults_raise:
        with pytest.raises(IndexError, match="got 7 at row 1"):
            ipo_ext.token_logprobs(logits, labels)
    else:
        logprobs, entropy = ipo_ext.token_logprobs(logits, labels)
        (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
        assert logprobs.isnan().all()
        assert entropy.isnan().all()
        assert gradient.isnan().all()


def test_refusals(backend: Backend) -> None:
    case = random_case().to(backend.device)
    with pytest.raises(ValueError, match="logits: expected the result of an operation"):
        case.with_(logits=case.logits.requires_grad_()).call(inplace=True)
    case.logits.requires_grad_(False)
    with pytest.raises(ValueError, match=r"labels: expected shape \[9\]"):
        case.with_(labels=case.labels[:-1]).call()
    with pytest.raises(TypeError, match=r"labels: expected dtype torch\.int32"):
        case.with_(labels=case.labels.float()).call()
    with pytest.raises(ValueError, match=r"advantages: expected shape \[9\] like labels"):
        case.with_(advantages=case.advantages[:-1]).call()
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
        case.call(temperature=0.0)
    with pytest.raises(ValueError, match="softcap: expected a finite number > 0"):
        case.call(softcap=-1.0)
    for softcap in ("30", True, torch.tensor(30.0)):
        with pytest.raises(TypeError, match="softcap: expected a float or None, got "):
            case.call(softcap=softcap)
    with pytest.raises(ValueError, match="temperature: expected a tensor that does not require"):
        case.call(temperature=torch.ones(9, device=backend.device, requires_grad=True))
    with pytest.raises(ValueError, match=r"logits: expected shape \[\.\.\., vocabulary\]"):
        ipo_ext.token_logprobs(case.logits[:, :0], case.labels)


def test_one_backward(backend: Backend) -> None:
    case = random_case().to(backend.device)
    leaf = case.logits.requires_grad_()
    loss = case.call().loss
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="can run backward once"):
        torch.autograd.grad(loss, leaf)
    (gradient,) = torch.autograd.grad(case.call().loss ** 2, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        gradient.sum().backward()
    logprobs, _ = ipo_ext.token_logprobs(leaf, case.labels)
    (gradient,) = torch.autograd.grad(logprobs.sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        gradient.sum().backward()


# -------------------------------------------------------------------------------------------------
# torch: compile, opcheck, torch.func


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("grad_loss", [1.0, 0.3])
def test_compiled_equals_eager(backend: Backend, dtype: torch.dtype, grad_loss: float) -> None:
    compiled = torch.compile(ipo_ext.ipo_loss_from_logits, fullgraph=True, dynamic=True)
    for rows in (5, 8):
        options = {"temperature": 0.8, "softcap": 9.0, "normalizer": 3.0 + rows}
        case = random_case(rows, 3 * rows, dtype, **options).to(backend.device)
        eager = evaluate(case, grad_loss=grad_loss)
        assert_same_bits(evaluate(case, compiled, grad_loss=grad_loss), eager)


def test_compiled_token_logprobs(backend: Backend) -> None:
    def gradient(function: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logprobs, entropy = function(logits, labels, temperature=0.7)
        return torch.autograd.grad((logprobs * 2 + entropy).sum(), logits)[0]

    compiled = torch.compile(ipo_ext.token_logprobs, fullgraph=True, dynamic=True)
    for rows in (4, 6):
        logits = torch.randn(rows, 21, device=backend.device, requires_grad=True)
        labels = torch.arange(rows, device=backend.device)
        ours = gradient(compiled, logits, labels)
        assert torch.equal(ours, gradient(ipo_ext.token_logprobs, logits, labels))


def test_opcheck(backend: Backend) -> None:
    case = random_case(token_temperature=True).to(backend.device)
    leaf = case.logits.requires_grad_()
    temperature = case.options["temperature"]
    settings = IPOConfig().settings(torch.float32)
    operators = _operators.library()
    normalizer = torch.tensor(3.0, device=backend.device)
    inputs = LossInputs(case.inference_logprobs, case.advantages, case.loss_mask)
    inputs = inputs._replace(normalizer=normalizer)
    torch.library.opcheck(
        operators.ipo_loss_from_logits.default,
        (leaf, case.labels, temperature, 0.0, *inputs, *settings, True),
    )
    torch.library.opcheck(operators.token_logprobs.default, (leaf, case.labels, temperature, 3.0))
    gradient, factor = torch.randn(5, device=backend.device), normalizer
    torch.library.opcheck(operators.scale_.default, (gradient, factor))
    narrower = torch.empty(5, dtype=torch.float16, device=backend.device)
    torch.library.opcheck(operators.scale_into.default, (gradient, factor, narrower))


def test_func_grad(backend: Backend) -> None:
    case = random_case().to(backend.device)
    ours = torch.func.grad(lambda z: 2 * case.with_(logits=z).call().loss)(case.logits)
    assert torch.equal(ours, evaluate(case, grad_loss=2.0).gradient)


# -------------------------------------------------------------------------------------------------
# The same bits


def test_threads_do_not_matter() -> None:
    case = random_case(rows=67, columns=3000, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(case, grad_loss=0.5))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.emulated
def test_schedule_does_not_matter() -> None:
    harness = emulated.load()
    case = random_case(rows=3, columns=260, dtype=torch.bfloat16)
    with Backend("emulated").active():
        expected = evaluate(case, grad_loss=0.5)
        try:
            for seed in range(1, 5):
                harness.emulator_set_schedule(seed)
                assert_same_bits(evaluate(case, grad_loss=0.5), expected)
        finally:
            harness.emulator_set_schedule(0)
