"""Tier 3: loss, log-probabilities and gradients from hidden states, on every backend."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import ipo_ext
from backends import Backend
from closeness import assert_close, assert_flips_proven
from ipo_ext import IPOConfig, _chunks, _operators, reference
from ipo_ext._ops.arguments import LossInputs

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TOKENS, WIDTH, VOCABULARY = 37, 16, 53


@dataclasses.dataclass(frozen=True)
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
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
        function = function or ipo_ext.ipo_loss_from_hidden
        return function(self.hidden, self.weight, *constants, **self.options, **more)


def random_case(
    tokens: int = TOKENS,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    masked: float = 0.4,
    inference_dtype: torch.dtype = torch.float32,
    token_temperature: bool = False,
    **options: Any,
) -> Case:
    """Log-ratios at -3, -0.5, 0.5 or 3, give or take a little: no token is near the band's ends."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype) / width**0.5
    mask = torch.rand(tokens, generator=generator) >= masked
    labels = torch.randint(vocabulary, (tokens,), generator=generator).masked_fill(~mask, -100)
    if token_temperature:
        options["temperature"] = torch.rand(tokens, generator=generator) + 0.5
    how = {name: options.get(name) for name in ("temperature", "softcap")}
    exact, _ = reference.linear_token_logprobs(hidden, weight, labels, **how, dtype=torch.float64)
    ratios = torch.tensor([-3.0, -0.5, 0.5, 3.0])
    x = ratios[torch.randint(4, (tokens,), generator=generator)]
    x = x + 0.1 * torch.randn(tokens, generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    return Case(hidden, weight, labels, (exact - x).to(inference_dtype), advantages, mask, options)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    output: ipo_ext.IPOOutput
    of_hidden: torch.Tensor
    of_weight: torch.Tensor


def evaluate(
    case: Case, function: Any = None, *, grad_loss: float = 1.0, **more: Any
) -> Evaluation:
    hidden, weight = (t.detach().requires_grad_() for t in (case.hidden, case.weight))
    output = case.with_(hidden=hidden, weight=weight).call(function, **more)
    scale = torch.tensor(grad_loss, dtype=output.loss.dtype, device=output.loss.device)
    return Evaluation(output, *torch.autograd.grad(output.loss, (hidden, weight), scale))


def assert_same_bits(a: Evaluation, b: Evaluation) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}

    def check(left: torch.Tensor, right: torch.Tensor, name: str) -> None:
        left, right = (
            t.detach().contiguous().view(integers[t.element_size()]) for t in (left, right)
        )
        assert torch.equal(left, right), name

    for name in ("loss", "logprobs", "entropy"):
        check(getattr(a.output, name), getattr(b.output, name), name)
    for name in ("means", "sums", "extremes"):
        check(getattr(a.output.metrics, name), getattr(b.output.metrics, name), name)
    check(a.of_hidden, b.of_hidden, "gradient by hidden")
    check(a.of_weight, b.of_weight, "gradient by weight")


class WideLinear(torch.autograd.Function):
    """hidden @ weight.T with results in float32 from operands of any precision, forward and back.

    What eager torch has as ``mm(..., out_dtype=float32)``: the naive peer of the same products.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(wide) @ weight.to(wide).t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        rounded = gradient.to(weight.dtype).to(gradient.dtype)
        of_hidden = rounded @ weight.to(gradient.dtype)
        of_weight = rounded.t() @ hidden.to(gradient.dtype)
        return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype)


def naive_loss(
    hidden: torch.Tensor, weight: torch.Tensor, *constants: Any, **options: Any
) -> ipo_ext.IPOOutput:
    logits: Any = WideLinear.apply(hidden, weight)
    return reference.ipo_loss_from_logits(logits, *constants, **options)


def assert_accurate(case: Case, backend: Backend, grad_loss: float = 1.0, **how: Any) -> None:
    """Ours is about as close to float64 as eager torch over all of the fp32 logits is."""
    ours = evaluate(case.to(backend.device), grad_loss=grad_loss, **how)
    naive = evaluate(case, naive_loss, grad_loss=grad_loss)
    wide = case.with_(hidden=case.hidden.double(), weight=case.weight.double())
    slopes = {}

    def exact_loss(hidden: torch.Tensor, weight: torch.Tensor, *constants: Any, **options: Any):
        logits = hidden @ weight.t()
        logits.register_hook(lambda gradient: slopes.update(logits=gradient.abs()))
        return reference.ipo_loss_from_logits(logits, *constants, **options, dtype=torch.float64)

    exact = evaluate(wide, exact_loss, grad_loss=grad_loss)
    temperature = case.options.get("temperature")
    temperature = torch.as_tensor(1.0 if temperature is None else temperature).double()
    arguments = (wide.hidden.abs() @ wide.weight.abs().t()).amax(-1) / temperature
    in_float64 = case.hidden.dtype == torch.float64  # naive is exact then, and ours alone
    for name in ("logprobs", "entropy"):
        mine, theirs, truth = (getattr(e.output, name) for e in (ours, naive, exact))
        size = truth.abs() + case.loss_mask * (1 + arguments)
        assert_close(mine, theirs, truth, scale=size, floor=8, name=name)
    assert ours.output.loss.item() == pytest.approx(
        exact.output.loss.item(), rel=1e-5, abs=1e-5 * len(case.labels)
    )
    for name, value in exact.output.metrics.items():
        assert ours.output.metrics[name].item() == pytest.approx(value.item(), rel=3e-5, abs=3e-5)
    slope = slopes["logits"]
    relative = 1 if case.hidden.dtype.itemsize == 2 else 8 + arguments.max().item()
    floor = relative * (8 if in_float64 else 1)
    tiny = 1e-30
    assert_close(
        ours.of_hidden,
        naive.of_hidden,
        exact.of_hidden,
        scale=slope @ wide.weight.abs() + (slope.amax(-1, keepdim=True) > 0) * tiny,
        floor=floor,
        name="gradient by hidden",
    )
    assert_close(
        ours.of_weight,
        naive.of_weight,
        exact.of_weight,
        scale=slope.t() @ wide.hidden.abs() + tiny,
        floor=floor,
        name="gradient by weight",
    )


# -------------------------------------------------------------------------------------------------
# Against float64

CHUNKS = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 7},
    {"chunk_size": 16, "num_active": 30},
    {"num_active": TOKENS},
    {"num_active": 10 * TOKENS},
]


@pytest.mark.parametrize("how", CHUNKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend: Backend, dtype: torch.dtype, how: dict[str, Any]) -> None:
    case = random_case(dtype=dtype, temperature=0.8, normalizer=5.0)
    assert_accurate(case, backend, grad_loss=0.75, **how)


@hypothesis.given(
    tokens=st.integers(1, 40),
    width=st.sampled_from([1, 3, 8, 17]),
    vocabulary=st.one_of(st.integers(1, 70), st.sampled_from([129, 1031])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    masked=st.sampled_from([0.0, 0.5, 0.95]),
    temperature=st.sampled_from([None, 0.5, 2.5, "token"]),
    softcap=st.sampled_from([None, 3.0, 30.0]),
    chunk_size=st.sampled_from([None, 1, 3, 16]),
    slack=st.sampled_from([None, 0, 1, 100]),
)
@hypothesis.settings(max_examples=25)
def test_any_case(
    backend_name: str,
    temperature: float | str | None,
    chunk_size: int | None,
    slack: int | None,
    **options: Any,
) -> None:
    of_token = temperature == "token"
    options["temperature"] = None if of_token else temperature
    case = random_case(token_temperature=of_token, normalizer=4.0, **options)
    num_active = None if slack is None else int(case.loss_mask.sum()) + slack
    with Backend(backend_name).active() as backend:
        assert_accurate(case, backend, 1.5, chunk_size=chunk_size, num_active=num_active)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [None, 2.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_certain_token_has_no_gradient(
    backend: Backend, dtype: torch.dtype, temperature: float | None, softcap: float | None
) -> None:
    """What cancels leaves no rounding error behind, on a device that fuses products with sums."""
    case = random_case(dtype=dtype, vocabulary=1, softcap=softcap, temperature=temperature)
    ours = evaluate(case.to(backend.device))
    for name in ("logprobs", "entropy"):
        assert not getattr(ours.output, name).any()
    assert not ours.of_hidden.any()
    assert not ours.of_weight.any()
    hidden, weight, labels = (t.to(backend.device) for t in (case.hidden, case.weight, case.labels))
    logprobs, entropy = ipo_ext.linear_token_logprobs(
        hidden.requires_grad_(), weight, labels, temperature=temperature, softcap=softcap
    )
    (gradient,) = torch.autograd.grad((logprobs * 0.7 + entropy * 0.3).sum(), hidden)
    assert not gradient.any()


def test_agrees_with_tier_2(backend: Backend) -> None:
    """Log-ratios all around the band's ends: a flip must be a log-ratio within rounding of one."""
    case = random_case(400, masked=0.2).to(backend.device)
    logits = case.hidden @ case.weight.t()
    exact, _ = reference.linear_token_logprobs(
        case.hidden, case.weight, case.labels, dtype=torch.float64
    )
    ends = torch.tensor([0.2, 5.0], dtype=torch.float64, device=backend.device).log()
    x = ends[torch.arange(400) % 2] + torch.randn(400).to(backend.device) * 1e-6
    case = case.with_(inference_logprobs=(exact - x).float())
    config = IPOConfig(kl_tau=0.5)
    ours = evaluate(case, chunk_size=64, config=config)
    leaf = logits.detach().requires_grad_()
    constants = (case.labels, case.inference_logprobs, case.advantages, case.loss_mask)
    tier_2 = ipo_ext.ipo_loss_from_logits(leaf, *constants, config=config)
    (gradient,) = torch.autograd.grad(tier_2.loss, leaf)
    rounding = 1e-6 * (1 + logits.abs().amax(-1).double())
    assert_flips_proven(
        ours.of_hidden.any(-1),
        gradient.any(-1),
        exact - case.inference_logprobs.double(),
        rounding,
        config.log_bounds(torch.float32),
    )
    torch.testing.assert_close(ours.output.logprobs, tier_2.logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_every_option_reaches_the_loss(backend: Backend, packed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    options = {
        "teacher_logprobs": torch.randn(TOKENS, generator=generator),
        "loss_weights": torch.rand(TOKENS, generator=generator),
        "config": IPOConfig(dppo_mask_high=3.0, adv_tau=0.5, kl_tau=0.1, teacher_tau=0.3),
    }
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 5, 5, TOKENS], dtype=torch.int32)
    case = random_case(dtype=torch.float64, inference_dtype=torch.float64, **options)
    ours = evaluate(case.to(backend.device), chunk_size=8)
    exact = evaluate(case, reference.ipo_loss_from_hidden)
    torch.testing.assert_close(ours.of_hidden.cpu(), exact.of_hidden)
    torch.testing.assert_close(ours.of_weight.cpu(), exact.of_weight)
    assert set(ours.output.metrics) == set(exact.output.metrics)
    for name, value in exact.output.metrics.items():
        torch.testing.assert_close(ours.output.metrics[name].cpu(), value)


# -------------------------------------------------------------------------------------------------
# Work follows the tokens that train


class CountsRows:
    """Counts the rows of logits that matrix products make, by standing in for ``Head.logits``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        logits = _chunks.Head.logits

        def counted(head: Any, hidden: torch.Tensor) -> torch.Tensor:
            self.rows.append(hidden.shape[0])
            return logits(head, hidden)

        monkeypatch.setattr(_chunks.Head, "logits", counted)


def test_products_are_made_for_active_tokens_alone(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(1000, masked=0.7).to(backend.device)
    active = int(case.loss_mask.sum())
    counts = CountsRows(monkeypatch)
    evaluate(case, chunk_size=256)
    assert sum(counts.rows) == active
    assert len(counts.rows) == math.ceil(active / 256)
    counts.rows.clear()
    evaluate(case, num_active=active + 3)
    assert sum(counts.rows) == active + 3


def test_backward_makes_products_only_where_a_gradient_flows(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(200).to(backend.device)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    counts = CountsRows(monkeypatch)
    logprobs, entropy = ipo_ext.linear_token_logprobs(hidden, weight, case.labels)
    assert sum(counts.rows) == int(case.loss_mask.sum())
    counts.rows.clear()
    wanted = case.loss_mask.nonzero().squeeze(1)[:10]
    (logprobs[wanted[:7]].sum() + 2 * entropy[wanted[5:]].sum()).backward()
    assert sum(counts.rows) == 10
    untouched = torch.ones(200, dtype=torch.bool, device=backend.device)
    untouched[wanted] = False
    assert not hidden.grad[untouched].any()
    assert hidden.grad[wanted].any(-1).all()


def test_num_active_changes_no_bit(backend: Backend) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = random_case(300, dtype=dtype).to(backend.device)
        active = int(case.loss_mask.sum())
        expected = evaluate(case, chunk_size=1000)
        assert_same_bits(evaluate(case, chunk_size=1000, num_active=active), expected)


def test_padded_rows_are_neutral(backend: Backend) -> None:
    case = random_case(50, normalizer=3.0)
    for slack in (1, 5):
        num_active = int(case.loss_mask.sum()) + slack
        assert_accurate(case, backend, num_active=num_active, chunk_size=16)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_garbage_in_inactive_tokens_is_neutral(backend: Backend, garbage: float) -> None:
    case = random_case(60, token_temperature=True).to(backend.device)
    off = ~case.loss_mask
    spoiled = case.with_(
        hidden=case.hidden.masked_fill(off[:, None], garbage),
        labels=case.labels.masked_fill(off, 2**40),
        inference_logprobs=case.inference_logprobs.masked_fill(off, garbage),
        advantages=case.advantages.masked_fill(off, garbage),
        options={"temperature": case.options["temperature"].masked_fill(off, -garbage)},
    )
    active = int(case.loss_mask.sum())
    for num_active in (None, active, active + 1, active + 9, 60, 1000):
        how = {"num_active": num_active, "chunk_size": 16}
        clean = evaluate(case, **how)
        assert_same_bits(evaluate(spoiled, **how), clean)
        assert not clean.of_hidden[off].any()
        assert not clean.output.logprobs[off].any()


def test_garbage_in_an_active_token_is_dropped_and_counted(backend: Backend) -> None:
    case = random_case(20, masked=0).to(backend.device)
    hidden = case.hidden.clone()
    hidden[3, 1], hidden[7, 0] = math.nan, math.inf
    ours = evaluate(case.with_(hidden=hidden))
    assert ours.output.metrics["nonfinite"].item() == pytest.approx(0.1)
    others = torch.ones(20, dtype=torch.bool, device=backend.device)
    others[[3, 7]] = False
    expected = evaluate(case.with_(loss_mask=others))
    torch.testing.assert_close(ours.of_weight, expected.of_weight)
    torch.testing.assert_close(ours.output.loss, expected.output.loss)
    assert not ours.of_hidden[~others].any()


def test_all_rows_are_worked_on_where_nothing_may_be_counted(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under CUDA graph capture."""
    case = random_case(50).to(backend.device)
    spoiled = case.with_(hidden=case.hidden.masked_fill(~case.loss_mask[:, None], math.nan))
    expected = evaluate(case)

    def gradients(case: Case) -> tuple[torch.Tensor, ...]:
        hidden, weight = (t.detach().requires_grad_() for t in (case.hidden, case.weight))
        logprobs, entropy = ipo_ext.linear_token_logprobs(hidden, weight, case.labels)
        return torch.autograd.grad((logprobs * 2 + entropy).sum(), (hidden, weight))

    expected_gradients = gradients(case)
    monkeypatch.setattr(_chunks, "is_capturing", lambda tensor: True)
    counts = CountsRows(monkeypatch)
    ours = evaluate(spoiled)
    assert sum(counts.rows) == 50
    torch.testing.assert_close(ours.of_weight, expected.of_weight)
    torch.testing.assert_close(ours.of_hidden, expected.of_hidden)
    for mine, truth in zip(gradients(spoiled), expected_gradients, strict=True):
        torch.testing.assert_close(mine, truth)


def test_rows_of_logits_may_be_padded(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's matrix products want them."""
    for dtype in (torch.bfloat16, torch.float32):
        case = random_case(dtype=dtype).to(backend.device)
        expected = evaluate(case)
        with monkeypatch.context() as patch:
            patch.setattr(_chunks, "_row_length", lambda weight: 64)
            ours = evaluate(case)
        torch.testing.assert_close(ours.of_weight, expected.of_weight)
        torch.testing.assert_close(ours.of_hidden, expected.of_hidden)


def test_dropped_tokens_get_exact_zeros(backend: Backend) -> None:
    case = random_case(60, masked=0).to(backend.device)
    ours = evaluate(case)
    dropped = (ours.output.logprobs - case.inference_logprobs).abs() > math.log(5)
    assert 0 < dropped.sum() < 60
    assert not ours.of_hidden[dropped].any()
    assert ours.of_hidden[~dropped].any(-1).all()


@pytest.mark.parametrize("how", [{}, {"num_active": 0}, {"num_active": 5}], ids=str)
@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_active(backend: Backend, tokens: int, how: dict[str, Any]) -> None:
    case = random_case(tokens, masked=1.0).to(backend.device)
    ours = evaluate(case, **how)
    assert ours.output.loss.item() == 0
    assert ours.of_hidden.shape == case.hidden.shape
    assert ours.of_weight.shape == case.weight.shape
    assert not ours.of_hidden.any()
    assert not ours.of_weight.any()
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    logprobs, entropy = ipo_ext.linear_token_logprobs(hidden, weight, case.labels)
    (logprobs.sum() + entropy.sum()).backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


# -------------------------------------------------------------------------------------------------
# Only what is needed


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_gradients_that_are_needed(
    backend: Backend, wanted: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case().to(backend.device)
    both = evaluate(case)
    seen = []
    finished = _chunks.Gradients.finished

    def spy(self: Any) -> tuple[torch.Tensor, ...]:
        gradients = finished(self)
        seen.append(tuple(gradient.numel() > 0 for gradient in gradients))
        return gradients

    monkeypatch.setattr(_chunks.Gradients, "finished", spy)
    hidden, weight = (
        t.detach().requires_grad_(on)
        for t, on in zip((case.hidden, case.weight), wanted, strict=True)
    )
    loss = case.with_(hidden=hidden, weight=weight).call().loss
    assert seen == [wanted]
    assert loss.requires_grad == any(wanted)
    assert torch.equal(loss, both.output.loss)
    if any(wanted):
        loss.backward()
    for tensor, on, expected in (
        (hidden, wanted[0], both.of_hidden),
        (weight, wanted[1], both.of_weight),
    ):
        assert (tensor.grad is not None) == on
        if on:
            assert torch.equal(tensor.grad, expected)


def test_no_gradient_under_no_grad(backend: Backend) -> None:
    case = random_case().to(backend.device)
    case.hidden.requires_grad_()
    with torch.no_grad():
        assert not case.call().loss.requires_grad


# -------------------------------------------------------------------------------------------------
# Shapes, layouts, precisions


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64])
def test_shapes_and_layouts(backend: Backend, labels_dtype: torch.dtype) -> None:
    case = random_case(24, token_temperature=True).to(backend.device)
    expected = evaluate(case)
    room = torch.full((4, 7, 2 * WIDTH), math.nan, device=backend.device)
    hidden = room[:, :6, ::2]
    hidden.copy_(case.hidden.view(4, 6, WIDTH))
    batch = case.with_(
        hidden=hidden,
        weight=case.weight.t().contiguous().t(),
        labels=case.labels.view(4, 6).to(labels_dtype),
        inference_logprobs=case.inference_logprobs.view(4, 6).t().contiguous().t(),
        advantages=case.advantages.view(4, 6),
        loss_mask=case.loss_mask.view(4, 6),
        options={"temperature": case.options["temperature"].view(4, 6)},
    )
    ours = evaluate(batch)
    assert ours.output.logprobs.shape == (4, 6)
    assert ours.of_hidden.shape == (4, 6, WIDTH)
    torch.testing.assert_close(ours.output.logprobs.view(-1), expected.output.logprobs)
    torch.testing.assert_close(ours.of_hidden.view(24, WIDTH), expected.of_hidden)
    torch.testing.assert_close(ours.of_weight, expected.of_weight)


def test_one_token_without_dimensions(backend: Backend) -> None:
    hidden = torch.randn(WIDTH, device=backend.device)
    weight = torch.randn(VOCABULARY, WIDTH, device=backend.device)
    logprob, entropy = ipo_ext.linear_token_logprobs(
        hidden, weight, torch.tensor(4, device=backend.device)
    )
    assert logprob.shape == entropy.shape == ()
    expected = (weight @ hidden).log_softmax(-1)[4]
    assert logprob.item() == pytest.approx(expected.item(), abs=1e-5)
    anything = IPOConfig(dppo_mask_low=0, dppo_mask_high=math.inf)
    one = random_case(1, masked=0, config=anything).to(backend.device)
    fields = ("labels", "inference_logprobs", "advantages", "loss_mask")
    scalar = one.with_(hidden=one.hidden[0], **{name: getattr(one, name)[0] for name in fields})
    for num_active in (None, 0, 1):
        mask = scalar.loss_mask if num_active != 0 else ~scalar.loss_mask
        ours = evaluate(scalar.with_(loss_mask=mask), num_active=num_active)
        assert ours.of_hidden.shape == (WIDTH,)
        assert torch.equal(ours.of_hidden.any(), mask)
        if num_active != 0:
            assert torch.equal(ours.output.loss, evaluate(one).output.loss)


def test_results_are_no_views(backend: Backend) -> None:
    case = random_case().to(backend.device)
    hidden = case.hidden.requires_grad_()
    logprobs, entropy = ipo_ext.linear_token_logprobs(hidden, case.weight, case.labels)
    logprobs.masked_fill_(~case.loss_mask, 0).mul_(2)
    (logprobs + entropy).sum().backward()
    case.call().logprobs.mul_(2)


@pytest.mark.parametrize("cut", [slice(None, -1), slice(1, None)])
def test_a_slice_of_the_batch_is_not_copied_whole(
    backend: Backend, cut: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(5 * 6).to(backend.device)
    room = torch.full((5, 7, WIDTH), math.nan, device=backend.device)
    room[:, cut] = case.hidden.view(5, 6, WIDTH)
    fields = ("labels", "inference_logprobs", "advantages", "loss_mask")
    view = case.with_(
        hidden=room[:, cut], **{name: getattr(case, name).view(5, 6) for name in fields}
    )
    reshape = torch.Tensor.reshape

    def watched(tensor: torch.Tensor, *shape: Any) -> torch.Tensor:
        assert tensor.shape != (5, 6, WIDTH), "a copy of all hidden states"
        return reshape(tensor, *shape)

    expected = evaluate(case)
    monkeypatch.setattr(torch.Tensor, "reshape", watched)
    for num_active in (None, 30, 1000):
        ours = evaluate(view, num_active=num_active)
        torch.testing.assert_close(ours.of_hidden.view(30, WIDTH), expected.of_hidden)
        torch.testing.assert_close(ours.of_weight, expected.of_weight)


def test_autocast_casts_as_linear_does(backend: Backend) -> None:
    case = random_case().to(backend.device)
    expected = evaluate(case.with_(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16()))
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        ours = evaluate(case)
        mixed = evaluate(case.with_(hidden=case.hidden.bfloat16()))
    for result in (ours, mixed):
        assert result.of_weight.dtype == torch.float32
        assert torch.equal(result.output.loss, expected.output.loss)
        assert torch.equal(result.of_hidden.float(), expected.of_hidden.float())
        # Rounded once in the former; the sum in float32 handed over in the latter.
        assert torch.equal(result.of_weight.bfloat16(), expected.of_weight)
        assert not torch.equal(result.of_weight, expected.of_weight.float())
    weight, low = case.weight.requires_grad_(), case.weight.detach().bfloat16().requires_grad_()
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        ours = ipo_ext.linear_token_logprobs(case.hidden, weight, case.labels)[0].sum()
    truth = ipo_ext.linear_token_logprobs(case.hidden.bfloat16(), low, case.labels)[0].sum()
    assert torch.equal(ours, truth)
    (ours,) = torch.autograd.grad(ours, weight)
    assert torch.equal(ours.bfloat16(), torch.autograd.grad(truth, low)[0])


def test_scalars_do_not_follow_the_default_device(backend: Backend) -> None:
    case = random_case(normalizer=3.0, temperature=0.9).to(backend.device)
    expected = case.call()
    with torch.device("meta"):
        ours = case.call()
    assert torch.equal(ours.loss, expected.loss)


def test_weight_gradient_is_summed_in_float32(backend: Backend) -> None:
    """A sum over many chunks in bf16 would stop growing at 256 times its terms."""
    tokens = 1200
    case = random_case(tokens, 4, 8, torch.bfloat16, masked=0)
    same = {"hidden": case.hidden[:1].expand(tokens, 4), "labels": case.labels[:1].expand(tokens)}
    case = case.with_(
        **same,
        inference_logprobs=case.inference_logprobs[:1].expand(tokens),
        advantages=torch.ones(tokens),
    ).to(backend.device)
    config = IPOConfig(dppo_mask_low=0, dppo_mask_high=math.inf)
    ours = evaluate(case, chunk_size=2, config=config)
    wide = case.with_(hidden=case.hidden.double(), weight=case.weight.double())
    exact = evaluate(wide, reference.ipo_loss_from_hidden, config=config)
    torch.testing.assert_close(ours.of_weight.double(), exact.of_weight, rtol=0.01, atol=0.01)


def test_fp16_gradients_do_not_underflow(backend: Backend) -> None:
    case = random_case(dtype=torch.float16).to(backend.device)
    plain = evaluate(case)
    scaled = evaluate(case.with_(options={"normalizer": 1e6}), grad_loss=1e6)
    torch.testing.assert_close(scaled.of_hidden, plain.of_hidden, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scaled.of_weight, plain.of_weight, rtol=1e-3, atol=1e-6)
    zero = evaluate(case.with_(options={"normalizer": torch.zeros((), device=backend.device)}))
    assert zero.output.loss.item() == 0
    assert not zero.of_hidden.any()
    assert not zero.of_weight.any()


def test_default_chunk_size() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert _chunks.default_chunk_size(151936, torch.bfloat16, gpu) == 2048
    assert _chunks.default_chunk_size(32000, torch.float32, cpu) % 128 == 0
    assert _chunks.default_chunk_size(10**9, torch.float32, cpu) == 128
    for rows, size in itertools.product((1, 127, 128, 300, 4097), (1, 100, 256, 10**6)):
        chunks = _chunks.chunks_of(rows, size)
        assert [i for c in chunks for i in range(c.start, c.stop)] == list(range(rows))
        assert max(c.stop - c.start for c in chunks) <= size


# -------------------------------------------------------------------------------------------------
# Log-probabilities


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_linear_token_logprobs(backend: Backend, softcap: float | None) -> None:
    hidden = torch.randn(5, 3, dtype=torch.float64, device=backend.device, requires_grad=True)
    weight = torch.randn(9, 3, dtype=torch.float64, device=backend.device, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 3, 3], device=backend.device)
    temperature = torch.tensor([0.5, 1, 1, 2, 0.9], dtype=torch.float64, device=backend.device)

    def both(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ipo_ext.linear_token_logprobs(
            h, w, labels, temperature=temperature, softcap=softcap, chunk_size=2
        )

    assert torch.autograd.gradcheck(both, (hidden, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_token_logprobs_matches_float64(backend: Backend, dtype: torch.dtype) -> None:
    case = random_case(dtype=dtype)
    upstream = torch.randn(2, TOKENS, dtype=torch.float64)

    def run(function: Any, dtype: torch.dtype, device: str | torch.device = "cpu", **how: Any):
        hidden, weight = (t.to(device, dtype).requires_grad_() for t in (case.hidden, case.weight))
        values = torch.stack(function(hidden, weight, case.labels.to(device), **how))
        loss = (values * upstream.to(values)).sum()
        return values, *torch.autograd.grad(loss, (hidden, weight))

    def naive(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Any:
        logits: Any = WideLinear.apply(hidden, weight)
        return reference.token_logprobs(logits, labels)

    ours = run(ipo_ext.linear_token_logprobs, dtype, backend.device, chunk_size=5)
    near = run(naive, dtype)
    exact = run(reference.linear_token_logprobs, torch.float64)
    sizes = (10.0, 4.0, 10.0)  # about the sums of the terms' magnitudes
    for mine, theirs, truth, size in zip(ours, near, exact, sizes, strict=True):
        scale = torch.where(truth != 0, size, 0)
        assert_close(mine, theirs, truth, scale=scale, floor=32, factor=3)


def test_one_output_alone(backend: Backend) -> None:
    case = random_case().to(backend.device)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    for part in (0, 1):
        ours = ipo_ext.linear_token_logprobs(hidden, weight, case.labels)[part].sum()
        exact = reference.linear_token_logprobs(hidden, weight, case.labels)[part].sum()
        for mine, truth in zip(
            torch.autograd.grad(ours, (hidden, weight)),
            torch.autograd.grad(exact, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------
# Faults and refusals


def faulty(name: str) -> tuple[Case, dict[str, Any], type[Exception], str]:
    case = random_case()
    label = case.labels.clone()
    label[case.loss_mask.nonzero()[-1]] = VOCABULARY
    return {
        "label": (case.with_(labels=label), {}, IndexError, "labels: expected a token in [0, 53)"),
        "temperature": (
            case.with_(options={"temperature": torch.tensor(math.nan)}),
            {},
            RuntimeError,
            "temperature",
        ),
        "cu_seqlens": (
            case.with_(options={"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}),
            {},
            RuntimeError,
            "cu_seqlens",
        ),
        "normalizer": (
            case.with_(options={"normalizer": torch.tensor(-1.0)}),
            {},
            RuntimeError,
            "normalizer",
        ),
        "num_active": (case, {"num_active": 3}, RuntimeError, "num_active: expected at least"),
        "none_active": (case, {"num_active": 0}, RuntimeError, "num_active: expected at least"),
    }[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name", ["label", "temperature", "cu_seqlens", "normalizer", "num_active", "none_active"]
)
def test_contract_faults(backend: Backend, name: str, dtype: torch.dtype) -> None:
    case, how, error, text = faulty(name)
    case = case.with_(hidden=case.hidden.to(dtype), weight=case.weight.to(dtype))
    case = case.to(backend.device)
    if backend.faults_raise:
        with pytest.raises(error) as raised:
            evaluate(case, **how)
        assert type(raised.value) is error
        assert str(raised.value).startswith(text)
    else:
        ours = evaluate(case, chunk_size=4, **how)
        assert ours.output.loss.isnan()
        assert ours.of_hidden.isnan().all()
        assert ours.of_weight.isnan().all()


def test_contract_faults_of_linear_token_logprobs(backend: Backend) -> None:
    case = faulty("label")[0].to(backend.device)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    if backend.faults_raise:
        with pytest.raises(IndexError, match="labels: expected a token"):
            ipo_ext.linear_token_logprobs(hidden, weight, case.labels)
        return
    logprobs, entropy = ipo_ext.linear_token_logprobs(hidden, weight, case.labels, chunk_size=4)
    assert logprobs.isnan().all()
    assert entropy.isnan().all()
    logprobs[0].backward()
    assert hidden.grad.isnan().all()
    assert weight.grad.isnan().all()


def test_refusals(backend: Backend) -> None:
    case = random_case().to(backend.device)
    with pytest.raises(ValueError, match=r"weight: expected shape \[vocabulary, 16\]"):
        case.with_(weight=case.weight.t()).call()
    with pytest.raises(TypeError, match=r"weight: expected dtype torch\.float32 like hidden"):
        case.with_(weight=case.weight.double()).call()
    with pytest.raises(ValueError, match=r"labels: expected shape \[37\], that of hidden"):
        case.with_(labels=case.labels[1:]).call()
    with pytest.raises(ValueError, match="num_active: expected a number >= 0"):
        case.call(num_active=-1)
    for wrong in (2.0, True, torch.tensor(3)):
        with pytest.raises(TypeError, match="num_active: expected an int or None, got"):
            case.call(num_active=wrong)
    case.call(num_active=numpy.int64(TOKENS))
    with pytest.raises(ValueError, match="chunk_size: expected a number >= 1"):
        case.call(chunk_size=0)
    with pytest.raises(ValueError, match="advantages: expected a tensor that does not require"):
        case.with_(advantages=case.advantages.requires_grad_()).call()
    dtensor = type("DTensor", (torch.Tensor,), {})
    with pytest.raises(
        TypeError, match=r"weight: expected a plain tensor, got a DTensor.*ipo_ext\.LossBatch"
    ):
        case.with_(weight=case.weight.as_subclass(dtensor)).call()


def test_one_backward(backend: Backend) -> None:
    case = random_case().to(backend.device)
    leaves = (case.hidden.requires_grad_(), case.weight.requires_grad_())
    loss = case.call().loss
    torch.autograd.grad(loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="can run backward once"):
        torch.autograd.grad(loss, leaves)


def test_the_operator_says_what_it_was_not_told_to_make(backend: Backend) -> None:
    case = random_case().to(backend.device)
    hidden = case.hidden.requires_grad_()
    settings = IPOConfig().settings(torch.float32)
    constants = LossInputs(case.inference_logprobs, case.advantages, case.loss_mask)
    run = _operators.library().ipo_loss_from_hidden
    inputs = (hidden, case.weight, case.labels, None, 0.0, *constants, *settings, 16)
    with pytest.raises(RuntimeError, match="expected needs_grad_hidden=True"):
        run(*inputs, None, False, True)[0].backward()
    loss = run(*inputs, None, True, False)[0]
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    (ours,) = torch.autograd.grad(2 * run(*inputs, None, True, False)[0], hidden)
    torch.testing.assert_close(ours, evaluate(case, grad_loss=2.0).of_hidden)


def test_compiled_autograd(backend: Backend) -> None:
    case = random_case().to(backend.device)
    expected = evaluate(case)
    hidden, weight = (t.detach().requires_grad_() for t in (case.hidden, case.weight))
    loss = case.with_(hidden=hidden * 1, weight=weight * 1).call().loss
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        loss.backward()
    assert torch.equal(hidden.grad, expected.of_hidden)
    assert torch.equal(weight.grad, expected.of_weight)


def test_second_derivative_is_refused(backend: Backend) -> None:
    case = random_case().to(backend.device)
    leaves = (case.hidden.requires_grad_(), case.weight.requires_grad_())
    linear = ipo_ext.linear_token_logprobs(*leaves, case.labels)[0].sum()
    for loss, leaf in itertools.product((lambda: case.call().loss, lambda: linear), leaves):
        (gradient,) = torch.autograd.grad(loss() + (leaf**2).sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
            torch.autograd.grad(gradient.sum(), leaf)


def test_forward_mode_and_vmap_are_refused(backend: Backend) -> None:
    case = random_case().to(backend.device)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return case.with_(hidden=hidden).call().loss

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (case.hidden,), (torch.ones_like(case.hidden),))
    with pytest.raises(NotImplementedError, match="vmap over the loss is not supported"):
        torch.func.vmap(torch.func.grad(loss))(case.hidden.expand(2, *case.hidden.shape))


# -------------------------------------------------------------------------------------------------
# Modules


def test_modules(backend: Backend) -> None:
    case = random_case().to(backend.device)
    config = IPOConfig(dppo_mask_high=2.0)
    expected = evaluate(case, config=config, softcap=4.0)
    module = ipo_ext.LinearIPOLoss(config, softcap=4.0, chunk_size=9)
    ours = evaluate(case, module)
    torch.testing.assert_close(ours.output.loss, expected.output.loss)
    torch.testing.assert_close(ours.of_weight, expected.of_weight)

    linear = nn.Linear(WIDTH, VOCABULARY, bias=False, device=backend.device)
    with torch.no_grad():
        linear.weight.copy_(case.weight)
    head = ipo_ext.IPOLMHead(linear, config, softcap=4.0)
    assert head.weight is linear.weight
    assert list(head.state_dict()) == list(linear.state_dict())
    constants = (case.labels, case.inference_logprobs, case.advantages, case.loss_mask)
    head(case.hidden, *constants).loss.backward()
    torch.testing.assert_close(linear.weight.grad, expected.of_weight)
    assert torch.equal(head(case.hidden), F.linear(case.hidden, linear.weight))
    with pytest.raises(TypeError, match="labels: expected a tensor beside the loss's other"):
        head(case.hidden, temperature=0.8)


def test_head_tied_to_the_embedding(backend: Backend) -> None:
    torch.manual_seed(3)
    embedding = nn.Embedding(VOCABULARY, WIDTH, device=backend.device)
    linear = nn.Linear(WIDTH, VOCABULARY, bias=False, device=backend.device)
    linear.weight = embedding.weight
    head = ipo_ext.IPOLMHead(linear)
    case = random_case(masked=0).to(backend.device)
    tokens = case.labels
    exact, _ = reference.linear_token_logprobs(embedding(tokens), embedding.weight, tokens)
    constants = (tokens, exact.detach(), case.advantages, case.loss_mask)
    ours = torch.autograd.grad(head(embedding(tokens), *constants).loss, embedding.weight)[0]
    truth = reference.ipo_loss_from_hidden(embedding(tokens), embedding.weight, *constants).loss
    torch.testing.assert_close(
        ours, torch.autograd.grad(truth, embedding.weight)[0], rtol=1e-4, atol=1e-4
    )


def test_micro_batches_add_up(backend: Backend) -> None:
    case = random_case(60, normalizer=11.0).to(backend.device)
    whole = evaluate(case)
    cut = 23
    weight = case.weight.detach().requires_grad_()
    metrics = None
    for part in (slice(0, cut), slice(cut, None)):
        fields = ("hidden", "labels", "inference_logprobs", "advantages", "loss_mask")
        output = case.with_(
            weight=weight, **{name: getattr(case, name)[part] for name in fields}
        ).call()
        output.loss.backward()
        metrics = output.metrics if metrics is None else metrics + output.metrics
    torch.testing.assert_close(weight.grad, whole.of_weight, rtol=1e-4, atol=1e-6)
    for name, value in whole.output.metrics.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------
# torch: compile, opcheck, torch.func, checkpointing


@pytest.mark.parametrize("grad_loss", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_compiled_equals_eager(backend: Backend, dtype: torch.dtype, grad_loss: float) -> None:
    compiled = torch.compile(ipo_ext.ipo_loss_from_hidden, fullgraph=True, dynamic=True)
    for tokens in (20, 31):
        case = random_case(tokens, dtype=dtype, normalizer=3.0 + tokens).to(backend.device)
        eager = evaluate(case, grad_loss=grad_loss)
        assert_same_bits(evaluate(case, compiled, grad_loss=grad_loss), eager)


def test_counts_do_not_recompile(backend: Backend) -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ipo_ext.ipo_loss_from_hidden, fullgraph=True, backend=graphs)
    case = random_case().to(backend.device)
    least = int(case.loss_mask.sum())
    for step in range(20):
        evaluate(case, compiled, num_active=least + step, normalizer=3.0 + step)
    assert graphs.frame_count <= 2


def test_the_graph_holds_one_node_and_no_logits(backend: Backend) -> None:
    nodes: list[torch.fx.Node] = []

    def inspect(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes.extend(graph.graph.nodes)
        return graph.forward

    compiler = aot_autograd(fw_compiler=inspect)
    compiled = torch.compile(ipo_ext.ipo_loss_from_hidden, fullgraph=True, backend=compiler)
    evaluate(random_case(64).to(backend.device), compiled)
    operator = _operators.library().ipo_loss_from_hidden.default
    assert sum(node.target is operator for node in nodes) == 1
    sizes = [
        value.numel()
        for node in nodes
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val"))
        if isinstance(value, torch.Tensor)
    ]
    assert max(sizes) < 64 * VOCABULARY


def test_compiled_linear_token_logprobs(backend: Backend) -> None:
    def gradients(function: Any, case: Case) -> tuple[torch.Tensor, ...]:
        hidden, weight = (t.detach().requires_grad_() for t in (case.hidden, case.weight))
        logprobs, entropy = function(hidden, weight, case.labels, temperature=0.7)
        return torch.autograd.grad((logprobs * 2 + entropy).sum(), (hidden, weight))

    compiled = torch.compile(ipo_ext.linear_token_logprobs, fullgraph=True, dynamic=True)
    for tokens in (20, 31):
        case = random_case(tokens).to(backend.device)
        for ours, eager in zip(
            gradients(compiled, case),
            gradients(ipo_ext.linear_token_logprobs, case),
            strict=True,
        ):
            assert torch.equal(ours, eager)


def test_opcheck(backend: Backend) -> None:
    case = random_case(token_temperature=True).to(backend.device)
    leaves = (case.hidden.requires_grad_(), case.weight.requires_grad_())
    temperature = case.options["temperature"]
    settings = IPOConfig().settings(torch.float32)
    constants = LossInputs(case.inference_logprobs, case.advantages, case.loss_mask)
    operators = _operators.library()
    for num_active in (None, TOKENS - 2):
        torch.library.opcheck(
            operators.ipo_loss_from_hidden.default,
            (
                *(*leaves, case.labels, temperature, 0.0, *constants),
                *(*settings, 16, num_active, True, True),
            ),
        )
    torch.library.opcheck(
        operators.linear_token_logprobs.default, (*leaves, case.labels, temperature, 3.0, 16)
    )


def test_func_grad(backend: Backend) -> None:
    case = random_case().to(backend.device)
    ours = torch.func.grad(lambda w: 2 * case.with_(weight=w).call().loss)(case.weight)
    assert torch.equal(ours, evaluate(case, grad_loss=2.0).of_weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(backend: Backend, reentrant: bool) -> None:
    case = random_case().to(backend.device)
    expected = evaluate(case)
    hidden, weight = (t.detach().requires_grad_() for t in (case.hidden, case.weight))

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return case.with_(hidden=hidden, weight=weight).call().loss

    checkpoint(loss, hidden, weight, use_reentrant=reentrant).backward()
    assert torch.equal(hidden.grad, expected.of_hidden)
    assert torch.equal(weight.grad, expected.of_weight)


def test_runs_are_the_same_bits(backend: Backend) -> None:
    case = random_case(300, dtype=torch.bfloat16).to(backend.device)
    first = evaluate(case, chunk_size=128, grad_loss=0.3)
    for _ in range(2):
        assert_same_bits(evaluate(case, chunk_size=128, grad_loss=0.3), first)
