"""Every rule of the trust-region family against the reference, on every backend: what is kept, what
it pays, who pays the KL. Rules that decide on exp may flip at an edge, and only there."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipo_ext import IPOConfig, ipo_loss, ipo_loss_from_logits, reference
from tests.support.backends import Backend
from tests.support.cases import LogprobsCase, assert_same_bits, evaluate, same_bits
from tests.support.hidden import assert_as_from_logits
from tests.support.logprobs import DTYPES, nasty_case, random_case, with_garbage
from tests.support.rules import RULES, rounding, score

rules = pytest.mark.parametrize("rule", RULES)
fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def case_of(
    trainer: torch.Tensor,
    inference: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    config: IPOConfig,
) -> LogprobsCase:
    return LogprobsCase(
        trainer_logprobs=trainer,
        inference_logprobs=inference,
        advantages=advantages,
        loss_mask=mask,
        config=config,
    )


def score_of(case: LogprobsCase, dtype: torch.dtype) -> torch.Tensor:
    return score(case.config, case.trainer_logprobs.to(dtype), case.inference_logprobs.to(dtype))


def rounding_of(case: LogprobsCase) -> torch.Tensor:
    logprobs = case.trainer_logprobs, case.inference_logprobs
    return rounding(case.config, *logprobs, case.compute_dtype)


def decidable(case: LogprobsCase) -> LogprobsCase:
    """Without the tokens that rounding may drop or keep: those at a rule's edge."""
    if case.config.mask_rule == "ratio":
        return case
    exact = score_of(case, torch.float64)
    bounds = (case.config.dppo_mask_high, -case.config.dppo_mask_low)
    near = [(exact - bound).abs() <= rounding_of(case) for bound in bounds]
    return case.with_(loss_mask=case.loss_mask & ~(near[0] | near[1]))


def assert_equals_reference(case: LogprobsCase, backend: Backend) -> None:
    """Loss, gradient and metrics; a token keeps its exact zero."""
    ours = evaluate(case.to(backend.device))
    wide = case.map_tokens(lambda t: t.double() if t.is_floating_point() else t)
    exact = evaluate(wide if case.config.mask_rule != "ratio" else case, reference.ipo_loss)
    # What one rounding of the inputs' differences and of exp does to a token's terms.
    tolerance = {"rtol": 2e-5, "atol": 1e-6}
    if case.trainer_logprobs.dtype in (torch.float16, torch.bfloat16):
        tolerance = {"rtol": 1e-2, "atol": 1e-2}
    expected = exact.gradient.to(ours.gradient.dtype)
    assert torch.equal(ours.gradient.cpu() == 0, expected == 0)
    torch.testing.assert_close(ours.gradient.cpu(), expected, **tolerance)
    magnitude = float(1 + exact.gradient.double().abs().sum())
    assert abs(float(ours.loss) - float(exact.loss)) <= 1e-5 * magnitude
    for name, value in exact.metrics.items():
        found = ours.metrics[name].cpu().double()
        torch.testing.assert_close(found, value.double(), rtol=1e-4, atol=1e-5, msg=name)


@rules
@pytest.mark.parametrize("dtypes", ["fp32", "fp64", "bf16-and-fp32"])
def test_equals_the_reference(backend: Backend, rule: str, dtypes: str) -> None:
    case = random_case(1500, dtypes=DTYPES[dtypes], teacher=True, weights=True).with_(
        config=dataclasses.replace(RULES[rule], teacher_tau=0.3)
    )
    assert_equals_reference(decidable(case), backend)


@rules
def test_equals_the_reference_per_segment(backend: Backend, rule: str) -> None:
    case = random_case(1030, segments="at-tiles").with_(config=RULES[rule])
    assert_equals_reference(decidable(case), backend)


@rules
def test_what_a_dropped_token_holds_is_harmless(backend: Backend, rule: str) -> None:
    case = nasty_case(600, weights=True).with_(config=RULES[rule])
    result = evaluate(case.to(backend.device))
    x = case.trainer_logprobs - case.inference_logprobs
    finite = case.loss_mask & x.isfinite() & x.exp().isfinite()
    assert not result.gradient.cpu()[~finite].any()
    clean = with_garbage(case, ~case.loss_mask, seed=5)
    assert_same_bits(evaluate(clean.to(backend.device)), result)


@st.composite
def at_the_edge(draw: st.DrawFn) -> LogprobsCase:
    """Tokens whose score lies within a few roundings of a bound."""
    name = draw(st.sampled_from(["dppo", "prob-diff", "kpop"]))
    count = 64
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    q = torch.rand(count, generator=generator, dtype=torch.float64) * 0.6 + 0.05
    config = RULES[name]
    low, p = q.clone(), torch.full_like(q, 0.999)  # the score rises from one to the other
    for _ in range(50):
        middle = (low + p) / 2
        drift = case_of(middle.log(), q.log(), q, q > 0, config)
        beyond = score_of(drift, torch.float64) > config.dppo_mask_high
        low, p = torch.where(beyond, low, middle), torch.where(beyond, middle, p)
    advantages = torch.randn(count, generator=generator)
    mask = torch.ones(count, dtype=torch.bool)
    return case_of(p.log().float(), q.log().float(), advantages, mask, config)


@fuzzed
@given(case=at_the_edge())
def test_a_flip_is_a_proven_crossing(backend: Backend, case: LogprobsCase) -> None:
    ours = evaluate(case.with_(config=taxed(case.config, 0.0)).to(backend.device)).gradient.cpu()
    dropped, *_ = reference.mask_rule(
        case.config,
        case.trainer_logprobs.double(),
        case.inference_logprobs.double(),
        case.advantages,
    )
    flipped = (ours != 0) != ~dropped
    exact = score_of(case, torch.float64)
    edges = [(exact - b).abs() for b in (case.config.dppo_mask_high, -case.config.dppo_mask_low)]
    assert (torch.minimum(*edges) <= rounding_of(case))[flipped].all()


def taxed(config: IPOConfig, kl_tau: float) -> IPOConfig:
    return dataclasses.replace(config, kl_tau=kl_tau)


@fuzzed
@given(
    logprobs=st.lists(
        st.tuples(
            st.sampled_from([0.0, -1e-7, -0.01, -0.7, -3.0, -14.0, -80.0, -math.inf, math.nan]),
            st.sampled_from([0.0, -1e-7, -0.01, -0.7, -3.0, -14.0, -80.0, -math.inf, math.nan]),
            st.sampled_from([-1.0, -0.0, 0.0, 1.0]),
            st.booleans(),
        ),
        min_size=1,
        max_size=40,
    ),
    rule=st.sampled_from(sorted(RULES)),
)
def test_any_tokens_equal_the_reference(backend: Backend, logprobs: list, rule: str) -> None:
    trainer, inference, advantages, mask = zip(*logprobs, strict=True)
    floats = (torch.tensor(values) for values in (trainer, inference, advantages))
    case = decidable(case_of(*floats, torch.tensor(mask), RULES[rule]))
    assert_equals_reference(case, backend)


def test_the_sides_of_dppo_are_those_of_the_advantage(backend: Backend) -> None:
    p = torch.tensor([0.9, 0.9, 0.9, 0.1, 0.1, 0.1])
    advantages = torch.tensor([1.0, 0.0, -1.0] * 2)
    active = torch.ones(6, dtype=torch.bool)
    case = case_of(p.log(), torch.full((6,), 0.5).log(), advantages, active, IPOConfig.dppo())
    result = evaluate(case.with_(config=taxed(case.config, 0.0)).to(backend.device))
    assert (result.gradient != 0).tolist() == [False, False, True, True, False, False]
    counts = {name: float(result.metrics[name]) * 6 for name in ("is_masked_high", "is_masked_low")}
    assert counts == pytest.approx({"is_masked_high": 1, "is_masked_low": 1})
    assert float(result.metrics["is_masked"]) * 6 == pytest.approx(3)  # A = 0 is on neither side


@rules
def test_a_dropped_token_pays_the_kl_where_the_scope_says_so(backend: Backend, rule: str) -> None:
    config = dataclasses.replace(RULES[rule], adv_tau=0.0, kl_tau=0.5)
    case = random_case(300, weights=True).with_(config=config).to(backend.device)
    x = case.trainer_logprobs - case.inference_logprobs
    everyone = torch.where(case.loss_mask, case.loss_weights * x, 0)  # 2 * kl_tau * x
    gradient = evaluate(case).gradient
    if config.kl_scope == "active":
        torch.testing.assert_close(gradient, everyone)
    else:
        assert (gradient == 0).sum() > (everyone == 0).sum()


@rules
def test_from_logits_the_same(backend: Backend, rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(60, 9, generator=generator) * 2).to(backend.device).requires_grad_()
    labels = torch.randint(9, (60,), generator=generator).to(backend.device)
    logprobs = logits.detach().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    case = random_case(60).with_(config=RULES[rule])
    inference = logprobs.cpu() + torch.randn(60, generator=generator) * 0.5
    case = decidable(case.with_(trainer_logprobs=logprobs.cpu(), inference_logprobs=inference))
    rest = (case.inference_logprobs, case.advantages, case.loss_mask)
    rest = tuple(tensor.to(backend.device) for tensor in rest)
    ours = ipo_loss_from_logits(logits, labels, *rest, config=case.config)
    theirs = reference.ipo_loss_from_logits(logits, labels, *rest, config=case.config)
    (gradient,) = torch.autograd.grad(ours.loss, logits)
    (expected,) = torch.autograd.grad(theirs.loss, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["dppo", "ratio-kl-active"])
def test_from_hidden_as_from_logits(backend: Backend, rule: str) -> None:
    assert_as_from_logits(RULES[rule], backend)


def test_the_default_is_the_ratio_band_alone() -> None:
    settings = IPOConfig().settings(torch.float32)
    assert (settings.mask_rule, settings.kl_active) == (0, False)


def test_every_rule_compiles(backend: Backend) -> None:
    function = torch.compile(ipo_loss, fullgraph=True, backend="aot_eager")
    for name, segments in itertools.product(("dppo", "kpop"), (None, "sevens")):
        case = random_case(50, segments=segments).with_(config=RULES[name]).to(backend.device)
        compiled, eager = evaluate(case, function), evaluate(case)
        assert same_bits(compiled.loss, eager.loss)
        assert same_bits(compiled.gradient, eager.gradient)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IPOConfig(mask_rule="clip"),
         "mask_rule: expected one of ratio, dppo, prob_diff, kpop, none, got 'clip'"),
        (lambda: IPOConfig(kl_scope="all"), "kl_scope: expected one of kept, active, got 'all'"),
        (lambda: IPOConfig.dppo(low=-0.1),
         "dppo_mask_low: expected a finite number >= 0, got -0.1"),
        (lambda: IPOConfig.kpop(-1.0), "dppo_mask_high: expected a number >= 0, got -1.0"),
        (lambda: IPOConfig.kpop(math.nan), "dppo_mask_high: expected a number >= 0, got nan"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert str(caught.value) == message
