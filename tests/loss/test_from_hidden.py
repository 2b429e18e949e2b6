"""The loss from hidden states, on every backend."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import ipo_ext
from ipo_ext import IPOConfig, reference
from tests.support.backends import Backend
from tests.support.cases import assert_same_bits, evaluate
from tests.support.closeness import assert_flips_proven
from tests.support.hidden import TOKENS, VOCABULARY, WIDTH, assert_accurate, random_case
from tests.support.logits import DTYPES, WIDE_BAND

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
    case = random_case(dtype=dtype, temperature=0.8, normalizer=5.0, has_bias=True)
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
    logit_scale=st.sampled_from([None, 0.0625, 1.7]),
    has_bias=st.booleans(),
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
    assert not ours.grad_hidden.any()
    assert not ours.grad_weight.any()
    hidden, weight, labels = (t.to(backend.device) for t in (case.hidden, case.weight, case.labels))
    logprobs, entropy = ipo_ext.linear_token_logprobs(
        hidden.requires_grad_(), weight, labels, temperature=temperature, softcap=softcap
    )
    (gradient,) = torch.autograd.grad((logprobs * 0.7 + entropy * 0.3).sum(), hidden)
    assert not gradient.any()


def test_agrees_with_the_loss_from_logits(backend: Backend) -> None:
    """Log-ratios all around the band's ends: a flip must be a log-ratio within rounding of one."""
    case = random_case(400, masked=0.2, config=IPOConfig(kl_tau=0.5)).to(backend.device)
    exact, _ = reference.linear_token_logprobs(
        case.hidden, case.weight, case.labels, dtype=torch.float64
    )
    ends = torch.tensor([0.2, 5.0], dtype=torch.float64, device=backend.device).log()
    x = ends[torch.arange(400) % 2] + torch.randn(400).to(backend.device) * 1e-6
    case = case.with_(inference_logprobs=(exact - x).float())
    ours = evaluate(case, chunk_size=64)
    from_logits = case.from_logits()
    theirs = evaluate(from_logits)
    rounding = 1e-6 * (1 + from_logits.logits.abs().amax(-1).double())
    assert_flips_proven(
        ours.grad_hidden.any(-1),
        theirs.gradient.any(-1),
        exact - case.inference_logprobs.double(),
        rounding,
        case.config.log_bounds(torch.float32),
    )
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours.output.logprobs, theirs.output.logprobs, **close)


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
    torch.testing.assert_close(ours.grad_hidden.cpu(), exact.grad_hidden)
    torch.testing.assert_close(ours.grad_weight.cpu(), exact.grad_weight)
    assert ours.metrics.keys() == exact.metrics.keys()
    for name, value in exact.metrics.items():
        torch.testing.assert_close(ours.metrics[name].cpu(), value)


# -------------------------------------------------------------------------------------------------
# What must not matter, and what is dropped


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_garbage_in_inactive_tokens_is_neutral(backend: Backend, garbage: float) -> None:
    case = random_case(60, token_temperature=True, has_bias=True).to(backend.device)
    off = ~case.loss_mask
    spoiled = case.with_(
        hidden=case.hidden.masked_fill(off[:, None], garbage),
        labels=case.labels.masked_fill(off, 2**40),
        inference_logprobs=case.inference_logprobs.masked_fill(off, garbage),
        advantages=case.advantages.masked_fill(off, garbage),
        temperature=case.temperature.masked_fill(off, -garbage),
    )
    active = int(case.loss_mask.sum())
    for num_active in (None, active, active + 1, active + 9, 60, 1000):
        how = {"num_active": num_active, "chunk_size": 16}
        clean = evaluate(case, **how)
        assert_same_bits(evaluate(spoiled, **how), clean)
        assert not clean.grad_hidden[off].any()
        assert not clean.output.logprobs[off].any()


def test_garbage_in_an_active_token_is_dropped_and_counted(backend: Backend) -> None:
    case = random_case(20, masked=0, has_bias=True).to(backend.device)
    hidden = case.hidden.clone()
    hidden[3, 1], hidden[7, 0] = math.nan, math.inf
    ours = evaluate(case.with_(hidden=hidden))
    assert ours.metrics["nonfinite"].item() == pytest.approx(0.1)
    others = torch.ones(20, dtype=torch.bool, device=backend.device)
    others[[3, 7]] = False
    expected = evaluate(case.with_(loss_mask=others))
    torch.testing.assert_close(ours.grad_weight, expected.grad_weight)
    torch.testing.assert_close(ours.grad_bias, expected.grad_bias)
    torch.testing.assert_close(ours.loss, expected.loss)
    assert not ours.grad_hidden[~others].any()


@pytest.mark.parametrize("rollout_min_ratio", [0.0, 1e-30], ids=["any", "rollouts"])
def test_an_infinite_state_under_a_softcap_spoils_no_weight(
    backend: Backend, rollout_min_ratio: float
) -> None:
    """Its logits are the cap's ends, whose derivatives are 0: it pays, and has no gradient."""
    config = dataclasses.replace(WIDE_BAND, rollout_min_ratio=rollout_min_ratio)
    case = random_case(softcap=3.0, masked=0.0, config=config, has_bias=True)
    hidden = case.hidden.clone()
    hidden[5, 2] = math.inf
    ours = evaluate(case.with_(hidden=hidden).to(backend.device))
    inactive = case.loss_mask.clone()
    inactive[5] = False
    without = evaluate(case.with_(loss_mask=inactive).to(backend.device))
    assert ours.output.logprobs.isfinite().all()
    assert ours.metrics["nonfinite"] == 0
    torch.testing.assert_close(ours.grad_weight, without.grad_weight)
    torch.testing.assert_close(ours.grad_bias, without.grad_bias)
    assert not ours.grad_hidden[5].any()


def test_dropped_tokens_get_exact_zeros(backend: Backend) -> None:
    case = random_case(60, masked=0).to(backend.device)
    ours = evaluate(case)
    dropped = (ours.output.logprobs - case.inference_logprobs).abs() > math.log(5)
    assert 0 < dropped.sum() < 60
    assert not ours.grad_hidden[dropped].any()
    assert ours.grad_hidden[~dropped].any(-1).all()


@pytest.mark.parametrize("how", [{}, {"num_active": 0}, {"num_active": 5}], ids=str)
@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_active(backend: Backend, tokens: int, how: dict[str, Any]) -> None:
    case = random_case(tokens, masked=1.0, has_bias=True).to(backend.device)
    ours = evaluate(case, **how)
    assert ours.loss.item() == 0
    leaves = [getattr(case, name).requires_grad_() for name in case.leaves]
    hidden, weight, bias = leaves
    logprobs, entropy = ipo_ext.linear_token_logprobs(hidden, weight, case.labels, bias=bias)
    (logprobs.sum() + entropy.sum()).backward()
    for leaf, gradient in zip(leaves, ours.gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()
        assert not leaf.grad.any()


# -------------------------------------------------------------------------------------------------
# Shapes, layouts, precisions


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64])
def test_shapes_and_layouts(backend: Backend, labels_dtype: torch.dtype) -> None:
    case = random_case(24, token_temperature=True, has_bias=True).to(backend.device)
    expected = evaluate(case)
    room = torch.full((4, 7, 2 * WIDTH), math.nan, device=backend.device)
    hidden = room[:, :6, ::2]
    hidden.copy_(case.hidden.view(4, 6, WIDTH))
    batch = case.with_(
        hidden=hidden,
        weight=case.weight.t().contiguous().t(),
        bias=torch.stack([case.bias, case.bias], 1)[:, 0],
        labels=case.labels.view(4, 6).to(labels_dtype),
        inference_logprobs=case.inference_logprobs.view(4, 6).t().contiguous().t(),
        advantages=case.advantages.view(4, 6),
        loss_mask=case.loss_mask.view(4, 6),
        temperature=case.temperature.view(4, 6),
    )
    ours = evaluate(batch)
    assert ours.output.logprobs.shape == (4, 6)
    assert ours.grad_hidden.shape == (4, 6, WIDTH)
    torch.testing.assert_close(ours.output.logprobs.view(-1), expected.output.logprobs)
    torch.testing.assert_close(ours.grad_hidden.view(24, WIDTH), expected.grad_hidden)
    torch.testing.assert_close(ours.grad_weight, expected.grad_weight)
    torch.testing.assert_close(ours.grad_bias, expected.grad_bias)


def test_one_token_without_dimensions(backend: Backend) -> None:
    hidden = torch.randn(WIDTH, device=backend.device)
    weight = torch.randn(VOCABULARY, WIDTH, device=backend.device)
    logprob, entropy = ipo_ext.linear_token_logprobs(
        hidden, weight, torch.tensor(4, device=backend.device)
    )
    assert logprob.shape == entropy.shape == ()
    expected = (weight @ hidden).log_softmax(-1)[4]
    assert logprob.item() == pytest.approx(expected.item(), abs=1e-5)
    one = random_case(1, masked=0, config=WIDE_BAND).to(backend.device)
    scalar = one.map_tokens(lambda tensor: tensor[0])
    for num_active in (None, 0, 1):
        mask = scalar.loss_mask if num_active != 0 else ~scalar.loss_mask
        ours = evaluate(scalar.with_(loss_mask=mask), num_active=num_active)
        assert ours.grad_hidden.shape == (WIDTH,)
        assert torch.equal(ours.grad_hidden.any(), mask)
        if num_active != 0:
            assert torch.equal(ours.loss, evaluate(one).loss)


def test_results_are_no_views(backend: Backend) -> None:
    case = random_case().to(backend.device)
    hidden = case.hidden.requires_grad_()
    logprobs, entropy = ipo_ext.linear_token_logprobs(hidden, case.weight, case.labels)
    logprobs.masked_fill_(~case.loss_mask, 0).mul_(2)
    (logprobs + entropy).sum().backward()
    case.call().logprobs.mul_(2)


def test_autocast_casts_as_linear_does(backend: Backend) -> None:
    case = random_case().to(backend.device)
    expected = evaluate(case.with_(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16()))
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        ours = evaluate(case)
        mixed = evaluate(case.with_(hidden=case.hidden.bfloat16()))
    for result in (ours, mixed):
        assert result.grad_weight.dtype == torch.float32
        assert torch.equal(result.loss, expected.loss)
        assert torch.equal(result.grad_hidden.float(), expected.grad_hidden.float())
        # Rounded once in the former; the sum in float32 handed over in the latter.
        assert torch.equal(result.grad_weight.bfloat16(), expected.grad_weight)
        assert not torch.equal(result.grad_weight, expected.grad_weight.float())
    weight, low = case.weight.requires_grad_(), case.weight.detach().bfloat16().requires_grad_()
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        ours = ipo_ext.linear_token_logprobs(case.hidden, weight, case.labels)[0].sum()
    truth = ipo_ext.linear_token_logprobs(case.hidden.bfloat16(), low, case.labels)[0].sum()
    assert torch.equal(ours, truth)
    (ours,) = torch.autograd.grad(ours, weight)
    assert torch.equal(ours.bfloat16(), torch.autograd.grad(truth, low)[0])


def test_autocast_leaves_a_bias_in_its_dtype(backend: Backend) -> None:
    """It is added to float32 logits, so that rounding it would gain nothing."""
    case = random_case(has_bias=True).to(backend.device)
    rounded = {"hidden": case.hidden.bfloat16().float(), "weight": case.weight.bfloat16().float()}
    expected = evaluate(case.with_(**rounded))
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        ours = evaluate(case)
        narrow = evaluate(case.with_(bias=case.bias.bfloat16().float()))
        mixed = evaluate(case.with_(bias=case.bias.bfloat16()))
        with pytest.raises(TypeError, match=r"bias: expected dtype .*32 like hidden, .* one$"):
            case.with_(bias=case.bias.double()).call()
    torch.testing.assert_close(ours.output.logprobs, expected.output.logprobs)
    assert torch.equal(mixed.loss, narrow.loss)
    assert torch.equal(mixed.grad_bias, narrow.grad_bias.bfloat16())
    assert ours.grad_bias.dtype == torch.float32
    torch.testing.assert_close(ours.grad_bias, expected.grad_bias, rtol=1e-2, atol=1e-2)


def test_autocast_leaves_float64_alone_as_linear_does(backend: Backend) -> None:
    case = random_case(dtype=torch.float64).to(backend.device)
    expected = evaluate(case)
    narrow = case.with_(weight=case.weight.float())
    other_way = case.with_(hidden=case.hidden.float())
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        assert_same_bits(evaluate(case), expected)
        assert expected.loss.dtype == torch.float64
        for mixed in (narrow, other_way):
            with pytest.raises(TypeError, match=r"weight: expected dtype .*; convert one$"):
                mixed.call()
            with pytest.raises(RuntimeError):
                torch.nn.functional.linear(mixed.hidden, mixed.weight)


def test_scalars_do_not_follow_the_default_device(backend: Backend) -> None:
    case = random_case(normalizer=3.0, temperature=0.9).to(backend.device)
    expected = case.call()
    with torch.device("meta"):
        ours = case.call()
    assert torch.equal(ours.loss, expected.loss)


def test_gradients_of_the_head_are_summed_in_float32(backend: Backend) -> None:
    """A sum over many chunks in bf16 would stop growing at 256 times its terms."""
    tokens = 1200
    how = {"masked": 0, "config": WIDE_BAND, "has_bias": True}
    case = random_case(tokens, 4, 8, torch.bfloat16, **how)
    same = {"hidden": case.hidden[:1].expand(tokens, 4), "labels": case.labels[:1].expand(tokens)}
    case = case.with_(
        **same,
        inference_logprobs=case.inference_logprobs[:1].expand(tokens),
        advantages=torch.ones(tokens),
    ).to(backend.device)
    ours = evaluate(case, chunk_size=2)
    wide = case.with_(**{name: getattr(case, name).double() for name in case.leaves})
    exact = evaluate(wide, reference.ipo_loss_from_hidden)
    for name in ("grad_weight", "grad_bias"):
        mine, truth = getattr(ours, name).double(), getattr(exact, name)
        torch.testing.assert_close(mine, truth, rtol=0.01, atol=0.01)


def test_fp16_gradients_do_not_underflow(backend: Backend) -> None:
    case = random_case(dtype=torch.float16).to(backend.device)
    plain = evaluate(case)
    scaled = evaluate(case.with_(normalizer=2.0**20), grad_loss=2.0**20)  # G has the same digits
    torch.testing.assert_close(scaled.grad_hidden, plain.grad_hidden, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scaled.grad_weight, plain.grad_weight, rtol=1e-3, atol=1e-6)
    zero = evaluate(case.with_(normalizer=torch.zeros((), device=backend.device)))
    assert zero.loss.item() == 0
    assert not zero.grad_hidden.any()
    assert not zero.grad_weight.any()


# -------------------------------------------------------------------------------------------------
# Sums and repetitions


def test_micro_batches_add_up(backend: Backend) -> None:
    case = random_case(60, normalizer=11.0).to(backend.device)
    whole = evaluate(case)
    cut = 23
    weight = case.weight.detach().requires_grad_()
    metrics = None
    for part in (slice(0, cut), slice(cut, None)):
        tokens = case.map_tokens(lambda tensor, part=part: tensor[part])
        output = tokens.with_(weight=weight).call()
        output.loss.backward()
        metrics = output.metrics if metrics is None else metrics + output.metrics
    torch.testing.assert_close(weight.grad, whole.grad_weight, rtol=1e-4, atol=1e-6)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-6)


def test_runs_are_the_same_bits(backend: Backend) -> None:
    case = random_case(300, dtype=torch.bfloat16).to(backend.device)
    first = evaluate(case, chunk_size=128, grad_loss=0.3)
    for _ in range(2):
        assert_same_bits(evaluate(case, chunk_size=128, grad_loss=0.3), first)
