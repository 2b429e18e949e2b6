"""The rollout rule on every backend: a token whose ratio is below the bound drops all of its
sequence, to the last bit, and nothing else; from log-probabilities, logits and hidden states."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ipo_ext
from ipo_ext import IPOConfig, ipo_loss, reference
from tests.support.backends import Backend
from tests.support.cases import HiddenCase, LogprobsCase, assert_same_bits, evaluate, same_bits
from tests.support.hidden import CountsRows
from tests.support.logprobs import (
    DTYPES,
    MOST_TOKENS,
    SEGMENTS,
    cases,
    cu_seqlens,
    nasty_case,
    random_case,
    with_garbage,
)
from tests.support.operators import call_operator, opcheck
from tests.support.schedules import torch_threads

ICEPOP = IPOConfig.icepop(0.5, rollout_min_ratio=1e-3)
CONFIGS = {
    "icepop": ICEPOP,
    "with-kl-and-teacher": dataclasses.replace(ICEPOP, kl_tau=0.1, teacher_tau=0.3),
    "kl-active": dataclasses.replace(ICEPOP, kl_tau=0.1, kl_scope="active"),
    "dppo": dataclasses.replace(IPOConfig.dppo(kl_tau=0.1), rollout_min_ratio=1e-3),
    "bound-within-the-band": IPOConfig.icepop(low=0.0, rollout_min_ratio=0.7),
}
fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def broken(case: LogprobsCase, *tokens: int, ratio: float = 1e-4) -> LogprobsCase:
    """The case with these tokens' ratios below the bound, and no other's."""
    inference = case.trainer_logprobs.clone()
    inference += torch.where(torch.arange(case.tokens) % 3 == 0, 0.3, -0.2).to(inference.dtype)
    inference[list(tokens)] = case.trainer_logprobs[list(tokens)] - math.log(ratio)
    return case.with_(inference_logprobs=inference)


def gradient_of_the_rest(case: LogprobsCase, dropped: torch.Tensor) -> torch.Tensor:
    """What the same loss without a rollout rule gives where the dropped tokens are not active."""
    config = dataclasses.replace(case.config, rollout_min_ratio=0.0)
    return evaluate(case.with_(config=config, loss_mask=case.loss_mask & ~dropped)).gradient


# -------------------------------------------------------------------------------------------------
# From log-probabilities


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtypes", ["fp32", "fp64", "bf16-and-fp32"])
def test_equals_the_reference(backend: Backend, name: str, dtypes: str) -> None:
    case = random_case(5000, dtypes=DTYPES[dtypes], segments="at-tiles", teacher=True, weights=True)
    case = broken(case.with_(config=CONFIGS[name], normalizer=17.0), 70, 3000)
    ours = evaluate(case.to(backend.device))
    theirs = evaluate(case, reference.ipo_loss)
    torch.testing.assert_close(ours.gradient.cpu(), theirs.gradient, rtol=2e-2, atol=1e-5)
    assert torch.equal(ours.gradient.cpu() == 0, theirs.gradient == 0)
    assert theirs.metrics.keys() == ours.metrics.keys()
    for metric, value in theirs.metrics.items():
        found = ours.metrics[metric].cpu()
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5, msg=metric)
    torch.testing.assert_close(ours.loss.cpu(), theirs.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", sorted(SEGMENTS))
def test_only_the_broken_sequences_are_dropped(backend: Backend, segments: str) -> None:
    tokens = min(2100, MOST_TOKENS[segments])
    case = random_case(tokens, segments=segments, masked=0.1).with_(config=ICEPOP)
    hit = (5, tokens // 2, tokens - 1)
    case = broken(case, *hit).with_(loss_mask=case.loss_mask.index_fill(0, torch.tensor(hit), True))
    ends = case.cu_seqlens.tolist()
    sequence = torch.bucketize(torch.arange(tokens), torch.tensor(ends[1:]), right=True)
    dropped = torch.isin(sequence, sequence[list(hit)])
    case = case.to(backend.device)
    ours = evaluate(case)
    assert same_bits(ours.gradient, gradient_of_the_rest(case, dropped.to(backend.device)))
    active = ipo_ext.IPOMetrics.SUM_ROWS.index("active")
    row = ipo_ext.IPOMetrics.SUM_ROWS.index("rollout_dropped")
    sums = case.call().metrics.sums
    whole = torch.zeros(len(ends) - 1, dtype=torch.bool).index_fill(0, sequence[list(hit)], True)
    assert torch.equal(sums[row].cpu(), torch.where(whole, sums[active].cpu(), 0))
    assert torch.equal(ours.metrics["rollout_dropped"].cpu() == 1, whole)
    assert (ours.metrics["is_masked"].cpu()[whole] == 1).all()


def test_a_long_sequence_is_dropped_whole(backend: Backend) -> None:
    tokens = 2**18 + 1025  # more tiles than a block of the kernel has threads
    case = broken(random_case(tokens).with_(config=ICEPOP), tokens - 1)
    case = case.with_(loss_mask=case.loss_mask.index_fill(0, torch.tensor([tokens - 1]), True))
    result = evaluate(case.to(backend.device))
    assert not result.gradient.any()
    assert float(result.metrics["rollout_dropped"]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_is_exact(backend: Backend, dtype: torch.dtype) -> None:
    bound = torch.tensor(math.log(1e-3), dtype=torch.float64).to(dtype)
    below = torch.nextafter(bound, torch.tensor(-math.inf, dtype=dtype))
    x = torch.stack([bound, below, bound * 2, -torch.full_like(bound, math.inf), bound * math.nan])
    trainer = torch.stack([x, torch.zeros_like(x)], 1)  # pairs: a suspect and a bystander
    inference, advantages = torch.zeros_like(trainer), torch.ones_like(trainer)
    config = IPOConfig(dppo_mask_low=0.0, rollout_min_ratio=1e-3)
    case = LogprobsCase(
        trainer_logprobs=trainer,
        inference_logprobs=inference,
        advantages=advantages,
        loss_mask=trainer != 5,
        config=config,
    )
    gradient = evaluate(case.to(backend.device)).gradient.cpu()
    assert (gradient[:, 1] != 0).tolist() == [True, False, False, False, True]
    assert (gradient[:, 0] != 0).tolist() == [True, False, False, False, False]


def test_an_inactive_token_drops_nothing(backend: Backend) -> None:
    case = broken(random_case(300, masked=0).with_(config=ICEPOP), 20)
    spared = case.with_(loss_mask=case.loss_mask.index_fill(0, torch.tensor([20]), False))
    assert not evaluate(case.to(backend.device)).gradient.any()
    result = evaluate(spared.to(backend.device))
    assert result.gradient.any()
    assert float(result.metrics["rollout_dropped"]) == 0


def test_rows_are_sequences_without_cu_seqlens(backend: Backend) -> None:
    flat = broken(random_case(6 * 50, masked=0).with_(config=ICEPOP), 70, 299)
    rows = flat.map_tokens(lambda tensor: tensor.view(2, 3, 50)).to(backend.device)
    packed = flat.with_(cu_seqlens=cu_seqlens([50] * 6)).to(backend.device)
    ours, theirs = evaluate(rows), evaluate(packed)
    assert same_bits(ours.gradient.flatten(), theirs.gradient)
    assert (ours.gradient != 0).any(-1).flatten().tolist() == [True, False, True, True, True, False]
    assert ours.metrics["rollout_dropped"].shape == ()
    assert float(ours.metrics["rollout_dropped"]) == pytest.approx(1 / 3)
    total = packed.call().metrics.total()
    for name, value in total.items():
        assert same_bits(ours.metrics[name], value)


@pytest.mark.reaches_every_kernel
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_no_tokens(backend: Backend, shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape, device=backend.device)
    out = ipo_loss(empty.clone().requires_grad_(), empty, empty, empty > 0, config=ICEPOP)
    out.loss.backward()
    assert out.loss.item() == 0
    assert set(out.metrics.tolist().values()) == {0.0}


def test_what_dropped_sequences_hold_is_harmless(backend: Backend) -> None:
    case = nasty_case(2000, segments="sevens", teacher=True, weights=True)
    case = case.with_(config=CONFIGS["with-kl-and-teacher"])
    result = evaluate(case.to(backend.device))
    assert result.gradient.isfinite().all() or not case.advantages.isfinite().all()
    spoiled = with_garbage(case, ~case.loss_mask, seed=3)
    assert_same_bits(evaluate(spoiled.to(backend.device)), result)


@fuzzed
@given(case=cases(make=random_case), log_bound=st.sampled_from([-6.0, -1.0, -0.3, -0.01, 0.0, 0.5]))
def test_any_case(backend: Backend, case: LogprobsCase, log_bound: float) -> None:
    """Dropping a sequence is taking its tokens out of the loss, in any batch."""
    config = dataclasses.replace(case.config, rollout_min_ratio=math.exp(log_bound))
    case = case.with_(config=config)
    dtype = case.compute_dtype
    x = case.trainer_logprobs.to(dtype) - case.inference_logprobs.to(dtype)
    dropped = reference.rollout_rule(config, x, case.loss_mask, case.cu_seqlens)
    case, dropped = case.to(backend.device), dropped.to(backend.device)
    ours = evaluate(case)
    assert same_bits(ours.gradient, gradient_of_the_rest(case, dropped))
    share = (case.loss_mask & dropped).sum() / case.loss_mask.sum().clamp(min=1)
    found = case.call().metrics.total()["rollout_dropped"]
    torch.testing.assert_close(found.double(), share.double(), rtol=1e-6, atol=0)


def test_threads_and_runs_change_no_bit(backend: Backend) -> None:
    case = broken(random_case(20_000, segments="at-tiles").with_(config=ICEPOP), 5, 9_000)
    case = case.to(backend.device)
    results = []
    for threads in (1, 2, 2):
        with torch_threads(threads):
            results.append(evaluate(case))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[1], results[2])


# -------------------------------------------------------------------------------------------------
# From logits and from hidden states


def head_case(dtype: torch.dtype, device: torch.device, vocabulary: int = 37) -> HiddenCase:
    """Four sequences of 12 tokens, the second and the fourth with a token below the bound."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 12, 16, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, 16, generator=generator) / 4).to(dtype)
    labels = torch.randint(vocabulary, (4, 12), generator=generator)
    mask = torch.rand(4, 12, generator=generator) < 0.8
    mask[1, 3] = mask[3, 11] = True
    logprobs, _ = reference.linear_token_logprobs(hidden, weight, labels)
    inference = logprobs.detach() + torch.randn(4, 12, generator=generator) * 0.2
    inference[1, 3] += 9
    inference[3, 11] += 9
    inference[0, ~mask[0]] += 9
    return HiddenCase(
        hidden=hidden,
        weight=weight,
        labels=labels.masked_fill(~mask, -100),
        inference_logprobs=inference,
        advantages=torch.randn(4, 12, generator=generator),
        loss_mask=mask,
        config=ICEPOP,
    ).to(device)


# Error budgets: what the products and the gradient's dtype round.
BUDGET = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("vocabulary", [37, 4096])
def test_from_logits(backend: Backend, dtype: torch.dtype, inplace: bool, vocabulary: int) -> None:
    case = head_case(dtype, backend.device, vocabulary).from_logits()
    case = case.with_(normalizer=48.0, temperature=1.3)
    logits = case.logits.requires_grad_()
    ours = case.with_(logits=logits * 1).call(inplace=inplace)
    wide = case.with_(logits=logits.double())
    theirs = wide.call(reference.ipo_loss_from_logits, dtype=torch.float64)
    assert_same_gradients(ours, theirs, [logits], dtype)


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("num_active", [None, 40, 48])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_from_hidden(
    backend: Backend, dtype: torch.dtype, num_active: int | None, chunk_size: int | None
) -> None:
    case = head_case(dtype, backend.device).with_(normalizer=48.0, softcap=20.0)
    leaves = case.hidden.requires_grad_(), case.weight.requires_grad_()
    if num_active == 40:
        num_active = int(case.loss_mask.sum())
    ours = case.call(num_active=num_active, chunk_size=chunk_size)
    theirs = case.call(reference.ipo_loss_from_hidden, dtype=torch.float64)
    assert_same_gradients(ours, theirs, leaves, dtype)


def assert_same_gradients(
    ours: ipo_ext.IPOOutput,
    theirs: ipo_ext.IPOOutput,
    leaves: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> None:
    exact = torch.autograd.grad(theirs.loss, leaves)
    gradients = torch.autograd.grad(ours.loss, leaves)
    for gradient, expected in zip(gradients, exact, strict=True):
        scale = float(expected.abs().max())
        assert scale > 0
        assert float((gradient.double() - expected.double()).abs().max()) <= BUDGET[dtype] * scale
    pays = (gradients[0] != 0).any(-1)  # of hidden states or logits
    assert pays.any(-1).tolist() == [True, False, True, False]
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=BUDGET[dtype], abs=1e-3)
    for name in ("rollout_dropped", "is_masked"):
        assert float(ours.metrics[name]) == pytest.approx(float(theirs.metrics[name]), abs=1e-6)


def test_products_are_made_for_tokens_that_pay_alone(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = head_case(torch.float32, backend.device)
    case.hidden.requires_grad_()
    active = int(case.loss_mask.sum())
    counts = CountsRows(monkeypatch)
    paying = int((evaluate(case).grad_hidden != 0).any(-1).sum())
    assert counts.rows == [active, paying]
    counts.rows.clear()
    with torch.no_grad():
        case.call()
    assert counts.rows == [active]


def test_from_hidden_agrees_with_from_logprobs(backend: Backend) -> None:
    case = head_case(torch.float32, backend.device)
    from_hidden = case.call()
    from_logprobs = case.from_logprobs(from_hidden.logprobs).call()
    assert same_bits(from_hidden.loss, from_logprobs.loss)
    for name, value in from_logprobs.metrics.items():
        assert same_bits(from_hidden.metrics[name], value), name
    assert from_hidden.metrics.keys() - from_logprobs.metrics.keys() == {"entropy"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_contract_fault_poisons_or_raises(backend: Backend, dtype: torch.dtype) -> None:
    case = head_case(dtype, backend.device).with_(normalizer=2.0)
    case.labels[0, int(case.loss_mask[0].nonzero()[0])] = 1000
    for call in (case.from_logits(), case):
        if backend.faults_raise:
            with pytest.raises(IndexError, match="labels: expected a token in"):
                evaluate(call)
        else:
            result = evaluate(call)
            assert result.loss.isnan()
            assert result.gradients[0].isnan().all()


# -------------------------------------------------------------------------------------------------
# Compilers, operators, settings


def test_compiles_as_one_graph(backend: Backend) -> None:
    flat = broken(random_case(6 * 50, masked=0.1).with_(config=ICEPOP), 70, 299)
    rows = flat.map_tokens(lambda tensor: tensor.view(6, 50)).to(backend.device)
    function = torch.compile(ipo_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same_bits(evaluate(rows, function), evaluate(rows))
    head = head_case(torch.float32, backend.device)
    from_hidden = torch.compile(ipo_ext.ipo_loss_from_hidden, fullgraph=True, backend="aot_eager")
    assert_same_bits(evaluate(head, from_hidden), evaluate(head))


def test_opcheck(backend: Backend) -> None:
    head = head_case(torch.float32, backend.device)
    cases = {
        "ipo_loss": random_case(40, segments="sevens").with_(config=ICEPOP).to(backend.device),
        "ipo_loss_from_logits": head.from_logits(),
        "ipo_loss_from_hidden": head.with_(chunk_size=16),
    }
    for name, case in cases.items():
        leaves = {leaf: getattr(case, leaf).requires_grad_() for leaf in case.leaves}
        opcheck(name, case, **leaves)


def test_rows_of_a_chunk_know_no_rollouts(backend: Backend) -> None:
    case = head_case(torch.float32, backend.device).from_logits()
    case = case.map_tokens(lambda tensor: tensor.flatten(0, 1))
    fault = torch.zeros(1, dtype=torch.int32, device=backend.device)
    with pytest.raises(RuntimeError, match="judges_sequences: expected False, got True"):
        call_operator(
            "chunk_logprobs_and_gradient", case, fault=fault, gradient=None, row_scales=None
        )


def test_metrics_combine_only_with_their_like(backend: Backend) -> None:
    case = random_case(30).with_(config=ICEPOP).to(backend.device)
    with_rule = case.call().metrics
    without = case.with_(config=IPOConfig()).call().metrics
    assert "rollout_dropped" in with_rule
    assert "rollout_dropped" not in without
    assert "rollout_dropped" in with_rule + with_rule
    with pytest.raises(
        ValueError,
        match=r"have each of teacher_kl, entropy, rollout_dropped, .* got rollout_dropped and",
    ):
        with_rule + without


def test_icepop_is_a_band_without_a_kl() -> None:
    assert IPOConfig.icepop() == IPOConfig(0.2, 5.0, kl_tau=0.0)
    assert IPOConfig.icepop_2401() == IPOConfig(0.5, 5.0, kl_tau=0.0, rollout_min_ratio=1e-5)
    assert IPOConfig.icepop(0.1, 2.0, 1e-3, kl_tau=0.2, adv_tau=0.5) == IPOConfig(
        0.1, 2.0, adv_tau=0.5, kl_tau=0.2, rollout_min_ratio=1e-3
    )
    assert IPOConfig.from_mapping({"rollout_min_ratio": 0.1}).has_rollout_rule
    assert not IPOConfig().has_rollout_rule


@pytest.mark.parametrize("ratio", [-0.1, math.inf, math.nan])
def test_a_bound_that_makes_no_sense_is_refused(ratio: float) -> None:
    expected = f"rollout_min_ratio: expected a finite number >= 0, got {ratio!r}"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        IPOConfig.icepop(rollout_min_ratio=ratio)
    assert str(caught.value) == expected
