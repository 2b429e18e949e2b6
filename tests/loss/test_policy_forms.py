"""Every form of the policy term on every backend: against the reference, and PPO's against torch's
own derivative of its objective; at its bounds, and where the ratio overflows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipo_ext import IPOConfig, ipo_loss, reference
from ipo_ext._numbers import log_bound
from tests.support.backends import Backend
from tests.support.cases import LogprobsCase, assert_same_bits, evaluate, same_bits
from tests.support.hidden import assert_as_from_logits
from tests.support.logits import assert_accurate
from tests.support.logits import random_case as random_rows
from tests.support.logprobs import DTYPES, nasty_case, random_case, with_garbage

FORMS = {
    "ratio": IPOConfig(mask_rule="none", kl_tau=0.0),
    "ipo": IPOConfig.ipo(max_importance_ratio=2.0),
    "capped": IPOConfig(mask_rule="none", pg_form="capped", ratio_cap=1.5, kl_tau=0.05),
    "ppo": IPOConfig.ppo(),
    "ppo-capped": IPOConfig.ppo(0.5, 2.0, 3.0, kl_tau=0.05),
    "ppo-without-cap": IPOConfig.ppo(max_importance_ratio=None),
    "cispo": IPOConfig.cispo(0.5, 2.0),
    "cispo-without-cap": IPOConfig.cispo(0.5, math.inf),
    "tis": IPOConfig.tis(),
    "reinforce": IPOConfig(pg_form="reinforce", kl_tau=0.05),
}
forms = pytest.mark.parametrize("form", FORMS)
fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def tokens_of(
    log_ratios: Any, advantages: Any, config: IPOConfig, logprob: float = 0.0
) -> LogprobsCase:
    """Active tokens with exactly these log-ratios, in float32."""
    x = torch.as_tensor(log_ratios, dtype=torch.float32)
    return LogprobsCase(
        trainer_logprobs=x + logprob,
        inference_logprobs=torch.full_like(x, logprob),
        advantages=torch.as_tensor(advantages, dtype=torch.float32).expand(x.shape),
        loss_mask=torch.ones(x.shape, dtype=torch.bool),
        config=config,
    )


def assert_equals_reference(case: LogprobsCase, backend: Backend) -> None:
    """Token by token, within the rounding of its log-ratio."""
    ours = evaluate(case.to(backend.device))
    # Of a bfloat16 leaf autograd would round each term of the derivative before it adds them.
    wide = case.with_(trainer_logprobs=case.trainer_logprobs.to(case.compute_dtype))
    exact = evaluate(wide, reference.ipo_loss, dtype=torch.float64)
    narrow = case.trainer_logprobs.dtype.itemsize == 2
    expected = exact.gradient.to(ours.gradient.dtype)
    assert torch.equal(ours.gradient.cpu() == 0, expected == 0)
    tolerance = {"rtol": 1e-2 if narrow else 5e-5, "atol": 1e-30}
    torch.testing.assert_close(ours.gradient.cpu(), expected, **tolerance)
    magnitude = float(exact.gradient.double().abs().sum()) + float(exact.loss.abs())
    log_size = 1 + float(case.trainer_logprobs.double().nan_to_num(0, 0, 0).abs().max())
    assert abs(float(ours.loss) - float(exact.loss)) <= 2e-5 * magnitude * min(log_size, 100)
    for name, value in exact.metrics.items():
        found = ours.metrics[name].cpu().double()
        torch.testing.assert_close(found, value.double(), rtol=1e-4, atol=1e-5, msg=name)


# -------------------------------------------------------------------------------------------------
# Against the reference


@forms
@pytest.mark.parametrize("dtypes", ["fp32", "fp64", "bf16-and-fp32"])
def test_equals_the_reference(backend: Backend, form: str, dtypes: str) -> None:
    case = random_case(1030, dtypes=DTYPES[dtypes], teacher=True, weights=True, segments="sevens")
    config = dataclasses.replace(FORMS[form], teacher_tau=0.3)
    assert_equals_reference(away_from_the_mask(case.with_(config=config)), backend)


def away_from_the_mask(case: LogprobsCase) -> LogprobsCase:
    """Without the tokens that a rule on probabilities may keep or drop by rounding."""
    if case.config.mask_rule != "prob_diff":
        return case
    difference = case.trainer_logprobs.double().exp() - case.inference_logprobs.double().exp()
    near = (difference.abs() - case.config.dppo_mask_high).abs() < 1e-5
    return case.with_(loss_mask=case.loss_mask & ~near)


@st.composite
def around_the_bounds(draw: st.DrawFn) -> LogprobsCase:
    """Log-ratios at the form's bounds, an ulp beside them and anywhere; any sign of advantage."""
    config = FORMS[draw(st.sampled_from(sorted(FORMS)))]
    bounds = [config.ratio_cap, config.clip_low, config.clip_high]
    finite = [bound for bound in bounds if bound is not None and 0 < bound < math.inf]
    at = torch.tensor([0.0, *(log_bound(bound, torch.float32) for bound in finite)])
    far = torch.tensor(math.inf)
    edges = torch.cat([at, at.nextafter(far), at.nextafter(-far)]).tolist()
    log_ratio = st.one_of(st.sampled_from(edges), st.floats(-20, 20, width=32))
    rows = draw(
        st.lists(
            st.tuples(log_ratio, st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 3.0])),
            min_size=1,
            max_size=40,
        )
    )
    return tokens_of(*zip(*rows, strict=True), config)


@fuzzed
@given(case=around_the_bounds())
def test_any_tokens_around_the_bounds(backend: Backend, case: LogprobsCase) -> None:
    assert_equals_reference(away_from_the_mask(case), backend)


@forms
def test_what_a_dropped_token_holds_is_harmless(backend: Backend, form: str) -> None:
    case = nasty_case(600, weights=True).with_(config=taxed(FORMS[form], 0.0))
    result = evaluate(case.to(backend.device))
    x = case.trainer_logprobs - case.inference_logprobs
    assert not result.gradient.cpu()[~(case.loss_mask & x.isfinite())].any()
    assert result.gradient.isfinite().all()
    clean = with_garbage(case, ~case.loss_mask, seed=5)
    assert_same_bits(evaluate(clean.to(backend.device)), result)


def taxed(config: IPOConfig, kl_tau: float) -> IPOConfig:
    return dataclasses.replace(config, kl_tau=kl_tau)


# -------------------------------------------------------------------------------------------------
# PPO's objective, as torch differentiates it


@pytest.mark.parametrize("cap", [None, 1.5, 1e4])
def test_ppo_is_what_torch_makes_of_its_objective(backend: Backend, cap: float | None) -> None:
    low, high = 0.8, 1.2
    x = torch.linspace(-1, 1, 401, dtype=torch.float64)
    x = torch.cat([x, torch.tensor([0.0, log_bound(low, x.dtype), log_bound(high, x.dtype)])])
    for sign in (-1.0, 0.0, 1.0):
        leaf = x.clone().requires_grad_()
        ratio = leaf.exp()
        if cap is not None:  # its size alone is capped
            ratio = ratio * (ratio.clamp(max=cap) / ratio).detach()
        terms = -torch.minimum(sign * ratio, sign * ratio.clamp(low, high))
        (expected,) = torch.autograd.grad(terms.sum(), leaf)
        # Rounding may put exp(log(bound)) on either side: there only the term is compared.
        at_a_bound = ((x.exp() - low).abs() < 1e-12) | ((x.exp() - high).abs() < 1e-12)
        case = tokens_of(x, sign, IPOConfig.ppo(low, high, cap)).map_tokens(
            lambda tensor: tensor.double() if tensor.is_floating_point() else tensor
        )
        case = case.with_(trainer_logprobs=x)
        ours = evaluate(case.to(backend.device))
        sums_up = terms.detach().sum().item()
        assert float(ours.loss) == pytest.approx(sums_up, rel=1e-12, abs=1e-12)
        found = ours.gradient.cpu()
        torch.testing.assert_close(
            found[~at_a_bound], expected[~at_a_bound], rtol=1e-12, atol=1e-14
        )
        # At a bound the gradient is whole: the objective is constant only beyond it.
        torch.testing.assert_close(found[at_a_bound], -sign * x[at_a_bound].exp())


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_ppo_flips_exactly_beyond_its_bounds(backend: Backend, sign: float) -> None:
    config = IPOConfig.ppo()
    far = torch.tensor(math.inf)
    low, high = (torch.tensor(log_bound(r, torch.float32)) for r in (0.8, 1.2))
    x = torch.stack([low.nextafter(-far), low, high, high.nextafter(far)])
    gradient = evaluate(tokens_of(x, sign, config).to(backend.device)).gradient
    clipped = [sign < 0, False, False, sign > 0]
    assert (gradient == 0).tolist() == clipped


def test_a_nan_advantage_propagates(backend: Backend) -> None:
    for config in (IPOConfig.ppo(), IPOConfig.cispo(), IPOConfig.ipo()):
        result = evaluate(tokens_of([0.1, 0.1], [math.nan, 1.0], config).to(backend.device))
        assert result.gradient.isnan().tolist() == [True, False]


# -------------------------------------------------------------------------------------------------
# Ratios that overflow

OVERFLOWING = [100.0, 1e30]


@pytest.mark.parametrize(
    ("form", "gradient"),
    [("capped", -1.5), ("ppo-capped", 0.0), ("cispo", -2.0), ("tis", -2.0), ("reinforce", -1.0)],
)
def test_a_bounded_ratio_may_overflow(backend: Backend, form: str, gradient: float) -> None:
    config = dataclasses.replace(taxed(FORMS[form], 0.0), mask_rule="none")
    result = evaluate(tokens_of(OVERFLOWING, 1.0, config).to(backend.device))
    assert result.gradient.tolist() == [gradient] * 2
    assert result.loss.isfinite()
    assert [float(result.metrics[name]) for name in ("nonfinite", "is_masked")] == [0, 0]
    assert float(result.metrics["ess"]) == pytest.approx(1.0)


@pytest.mark.parametrize("form", ["ratio", "ppo-without-cap", "cispo-without-cap"])
def test_a_ratio_without_a_bound_may_not(backend: Backend, form: str) -> None:
    result = evaluate(tokens_of(OVERFLOWING, -1.0, FORMS[form]).to(backend.device))
    assert result.gradient.tolist() == [0, 0]
    assert [float(result.metrics[name]) for name in ("nonfinite", "is_masked")] == [1, 1]


@forms
def test_no_mask_rule_keeps_all_that_is_finite(backend: Backend, form: str) -> None:
    config = dataclasses.replace(FORMS[form], mask_rule="none")
    case = nasty_case(500).with_(config=config)
    metrics = evaluate(case.to(backend.device)).metrics
    assert same_bits(metrics["is_masked"], metrics["nonfinite"])
    assert float(metrics["is_masked_high"]) == float(metrics["is_masked_low"]) == 0


@pytest.mark.parametrize("form", ["ipo", "ppo-capped", "cispo"])
@pytest.mark.parametrize("segments", [None, "at-tiles"])
@pytest.mark.parametrize("dtypes", ["fp32", "fp64"])
def test_bounded_ratios_are_counted(
    backend: Backend, dtypes: str, form: str, segments: str | None
) -> None:
    config = dataclasses.replace(FORMS[form], mask_rule="none")
    case = random_case(9000, dtypes=DTYPES[dtypes], segments=segments, weights=True)
    case = case.with_(config=config)
    ours, exact = evaluate(case.to(backend.device)), evaluate(case, reference.ipo_loss)
    names = {"is_clipped", "ratio_capped"} & exact.metrics.keys()
    assert names == {"is_clipped", "ratio_capped"} & ours.metrics.keys()
    for name in names:
        torch.testing.assert_close(ours.metrics[name].cpu(), exact.metrics[name])
        assert (exact.metrics[name] > 0).any()


# -------------------------------------------------------------------------------------------------
# The other functions


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_logits(backend: Backend, form: str, dtype: torch.dtype) -> None:
    assert_accurate(random_rows(columns=70, dtype=dtype, config=FORMS[form]), backend)


@pytest.mark.parametrize("form", ["ipo", "ppo", "cispo", "reinforce"])
def test_from_hidden_as_from_logits(backend: Backend, form: str) -> None:
    assert_as_from_logits(FORMS[form], backend)


def test_every_form_compiles(backend: Backend) -> None:
    function = torch.compile(ipo_loss, fullgraph=True, backend="aot_eager", dynamic=False)
    for name in ("ipo", "ppo", "cispo", "reinforce"):
        case = random_case(50, segments="sevens").with_(config=FORMS[name]).to(backend.device)
        compiled, eager = evaluate(case, function), evaluate(case)
        assert same_bits(compiled.loss, eager.loss)
        assert same_bits(compiled.gradient, eager.gradient)


# -------------------------------------------------------------------------------------------------
# Configurations


def test_constructors_are_what_they_reproduce() -> None:
    assert IPOConfig.ipo() == IPOConfig(
        0.3, 0.3, kl_tau=0.0, mask_rule="prob_diff", pg_form="capped", ratio_cap=1e4
    )
    clip = {"clip_low": 0.8, "clip_high": 1.2, "ratio_cap": 1e4}
    assert IPOConfig.ppo() == IPOConfig(kl_tau=0.0, mask_rule="none", pg_form="ppo_clip", **clip)
    wide = {"clip_low": 0.0, "clip_high": 5.0}
    assert IPOConfig.cispo() == IPOConfig(kl_tau=0.0, mask_rule="none", pg_form="cispo", **wide)
    assert IPOConfig.tis(3.0) == IPOConfig.cispo(0.0, 3.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pg_form": "clip"},
         "pg_form: expected one of ratio, capped, ppo_clip, cispo, reinforce, got 'clip'"),
        ({"ratio_cap": 2.0}, "ratio_cap: expected None for pg_form='ratio', got 2.0"),
        ({"pg_form": "capped"}, "ratio_cap: expected a number for pg_form='capped', got None"),
        ({"pg_form": "capped", "ratio_cap": 0.0},
         "ratio_cap: expected a finite number > 0, got 0.0"),
        ({"pg_form": "capped", "ratio_cap": math.inf},
         "ratio_cap: expected a finite number >= 0, got inf"),
        ({"pg_form": "cispo", "clip_low": 0.0},
         "clip_high: expected a number for pg_form='cispo', got None"),
        ({"pg_form": "cispo", "clip_low": 2.0, "clip_high": 1.0},
         "clip_high: expected a number >= clip_low (2.0), got 1.0"),
        ({"pg_form": "cispo", "clip_low": 0.0, "clip_high": 1e39},
         "clip_high: expected a number of at most 3.4e+38, the largest of float32, got 1e+39"),
        ({"pg_form": "cispo", "clip_low": 0.0, "clip_high": 0.0},
         "clip_high: expected a number > 0, got 0.0"),
        ({"pg_form": "ppo_clip", "clip_low": 0.0, "clip_high": 1.2},
         "clip_low: expected 0 < clip_low <= 1 for 'ppo_clip', got 0.0"),
        ({"pg_form": "ppo_clip", "clip_low": 0.8, "clip_high": 0.9},
         "clip_high: expected a finite number >= 1 for 'ppo_clip', got 0.9"),
        ({"pg_form": "ppo_clip", "clip_low": 0.8, "clip_high": 3.0, "ratio_cap": 2.0},
         "clip_high: expected at most ratio_cap (2.0), got 3.0"),
        ({"pg_form": "reinforce", "clip_low": 0.5},
         "clip_low: expected None for pg_form='reinforce', got 0.5"),
        ({"pg_form": "capped", "ratio_cap": True}, "ratio_cap: expected a number, got True"),
    ],
)  # fmt: skip
def test_a_form_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        IPOConfig(**fields)
    assert str(caught.value) == message
