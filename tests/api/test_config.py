"""IPOConfig: every rule in words, and bounds on the log-ratio that are rounded once."""

from __future__ import annotations

import dataclasses
import decimal
import functools
import math
import pickle
import typing

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ipo_ext import IPOConfig, reference

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
dtypes = pytest.mark.parametrize("dtype", DTYPES)
TAUS = ("adv_tau", "kl_tau", "teacher_tau")
FIELDS = ("dppo_mask_low", "dppo_mask_high", *TAUS)
POLICY = ("pg_form", "ratio_cap", "clip_low", "clip_high")
SEQUENCES = ("sequence_rules", "sequence_rule_when", "sequence_weight", "sequence_weight_cap")

# ---------------------------------------------------------------------------------------------
# Validation


def test_constructors_of_mask_rules_are_what_they_reproduce() -> None:
    everyone = {"kl_scope": "active"}
    assert IPOConfig.dppo(0.1, 0.4) == IPOConfig(0.1, 0.4, mask_rule="dppo", **everyone)
    assert IPOConfig.prob_diff(0.3) == IPOConfig(0.3, 0.3, mask_rule="prob_diff", **everyone)
    assert IPOConfig.kpop(0.3) == IPOConfig(0.0, 0.3, mask_rule="kpop", **everyone)
    band = {"kl_tau": 0.0, "rollout_min_ratio": 1e-3}
    assert IPOConfig.icepop(0.4, 4.0, 1e-3) == IPOConfig(0.4, 4.0, **band)


def test_defaults_are_upstreams() -> None:
    assert dataclasses.asdict(IPOConfig()) == {
        "dppo_mask_low": 0.2,
        "dppo_mask_high": 5.0,
        "adv_tau": 1.0,
        "kl_tau": 1e-3,
        "teacher_tau": 0.0,
        "mask_rule": "ratio",
        "kl_scope": "kept",
        "rollout_min_ratio": 0.0,
        "pg_form": "ratio",
        "ratio_cap": None,
        "clip_low": None,
        "clip_high": None,
        "sequence_rules": (),
        "sequence_rule_when": "always",
        "sequence_weight": None,
        "sequence_weight_cap": math.inf,
        "score_centering": False,
    }


def refusal(**fields: object) -> str:
    """The whole message of the ValueError."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        IPOConfig(**fields)
    return str(caught.value)


@pytest.mark.parametrize("name", TAUS)
@pytest.mark.parametrize("value", [-1.0, -1e-300, math.nan, math.inf, -math.inf])
def test_a_tau_is_finite_and_not_negative(name: str, value: float) -> None:
    assert refusal(**{name: value}) == f"{name}: expected a finite number >= 0, got {value!r}"


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf])
def test_alpha_is_finite_and_not_negative(value: float) -> None:
    message = refusal(dppo_mask_low=value, dppo_mask_high=math.inf)
    assert message == f"dppo_mask_low: expected a finite number >= 0, got {value!r}"


@pytest.mark.parametrize(
    ("low", "high"), [(0.2, 0.1), (0.2, -1.0), (0.2, math.nan), (0.0, -0.5), (5.5, 5.0)]
)
def test_beta_is_not_below_alpha(low: float, high: float) -> None:
    message = refusal(dppo_mask_low=low, dppo_mask_high=high)
    rule = f"expected a number >= dppo_mask_low ({low!r})"
    assert message == f"dppo_mask_high: {rule}, got {high!r}"


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", ["0.2", None, True, [1.0], 1j])
def test_a_field_is_a_number(name: str, value: object) -> None:
    assert refusal(**{name: value}) == f"{name}: expected a number, got {value!r}"


@pytest.mark.parametrize(
    "fields",
    [
        {"dppo_mask_low": 0, "dppo_mask_high": math.inf},
        {"dppo_mask_low": 1, "dppo_mask_high": 1},
        {"dppo_mask_low": 0.0, "dppo_mask_high": 0.0},
        {"adv_tau": 0, "kl_tau": 0, "teacher_tau": 0},
        {"kl_tau": 3.4e38, "teacher_tau": np.float64(2)},
        {"adv_tau": np.float32(0.5), "kl_tau": np.int64(1)},
    ],
)
def test_the_ends_of_each_range_are_allowed(fields: dict[str, float]) -> None:
    config = IPOConfig(**fields)
    for name, value in fields.items():
        assert getattr(config, name) == value
        assert type(getattr(config, name)) is float


def test_it_is_frozen_hashable_and_copies() -> None:
    config = IPOConfig(kl_tau=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kl_tau = 1.0
    assert config == IPOConfig(kl_tau=0.5)
    assert hash(config) == hash(IPOConfig(kl_tau=0.5))
    assert config != IPOConfig()
    changed = dataclasses.replace(config, dppo_mask_high=2.0)
    assert changed.log_bounds(torch.float64)[1] == math.log(2.0)
    assert pickle.loads(pickle.dumps(changed)).log_bounds(torch.float64) == changed.log_bounds(
        torch.float64
    )


@pytest.mark.parametrize("config", [IPOConfig(0.5, 2, 1.5, 0.5, 0.25), IPOConfig.icepop()])
def test_the_operators_are_given_the_taus_and_what_is_made_of_the_rest(config: IPOConfig) -> None:
    settings = config.settings(torch.float32)
    kinds = {name: type(value) for name, value in settings._asdict().items()}
    hints = typing.get_type_hints(type(settings))
    assert hints.pop("sequence_rules") == list[float] | None
    assert kinds.pop("sequence_rules") is type(None)  # the type of no rules
    assert kinds == hints
    for tau in TAUS:
        assert getattr(settings, tau) == getattr(config, tau)
    assert (settings.low, settings.high) == config.log_bounds(torch.float32)


def test_from_mapping_takes_a_section() -> None:
    section = {"dppo_mask_low": 0.5, "dppo_mask_high": 2, "adv_tau": 0.9, "kl_tau": 0}
    assert IPOConfig.from_mapping(section) == IPOConfig(**section)
    assert IPOConfig.from_mapping({}) == IPOConfig()


def test_from_mapping_refuses_an_unknown_field() -> None:
    with pytest.raises(ValueError, match="ipo_threshold") as caught:
        IPOConfig.from_mapping({"kl_tau": 0.1, "ipo_threshold": 0.3})
    rules = ("mask_rule", "kl_scope", "rollout_min_ratio")
    expected = ", ".join([*FIELDS, *rules, *POLICY, *SEQUENCES, "score_centering"])
    assert str(caught.value) == (
        f"ipo_threshold: expected one of the fields {expected}, got ipo_threshold=0.3"
    )


def test_from_mapping_validates() -> None:
    with pytest.raises(ValueError, match="kl_tau: expected a finite number >= 0, got -1"):
        IPOConfig.from_mapping({"kl_tau": -1})


# ---------------------------------------------------------------------------------------------
# Bounds


@functools.cache
def largest_log(dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` whose exponential, exactly rounded, is finite."""
    scalar = DTYPES[dtype]
    bound = scalar(math.log(np.finfo(scalar).max))
    limit = decimal.Decimal(float(np.finfo(scalar).max))
    with decimal.localcontext(prec=60):
        while decimal.Decimal(float(bound)).exp() > limit:
            bound = np.nextafter(bound, scalar(0))
    return float(bound)


def expected_bound(ratio: float, dtype: torch.dtype) -> float:
    """log(ratio) to 60 digits, then to float64, then to ``dtype``, kept in its finite range."""
    smallest, largest = -float(np.finfo(DTYPES[dtype]).max), largest_log(dtype)
    if ratio == 0:
        return smallest
    if ratio == math.inf:
        return largest
    with decimal.localcontext(prec=60):
        logarithm = float(decimal.Decimal(ratio).ln())
    return max(smallest, min(largest, float(DTYPES[dtype](logarithm))))


def near(value: float, expected: float, dtype: torch.dtype) -> bool:
    """Equal; in float64 to an ulp, by which the C library's logarithm may be off."""
    return abs(value - expected) <= (math.ulp(expected) if dtype == torch.float64 else 0)


positive = st.floats(min_value=0.0, allow_nan=False)


@dtypes
@given(ratios=st.tuples(positive, positive.filter(lambda ratio: ratio > 0)))
@example(ratios=(0.0, math.inf))
@example(ratios=(5e-324, 1.7976931348623157e308))
@example(ratios=(1.0, 1.0))
@example(ratios=(0.2, 5.0))
@example(ratios=(math.nextafter(1, 0), math.nextafter(1, 2)))
def test_bounds_are_the_nearest(dtype: torch.dtype, ratios: tuple[float, float]) -> None:
    low, high = min(ratios), max(ratios)
    if low == math.inf:
        return
    bounds = IPOConfig(dppo_mask_low=low, dppo_mask_high=high).log_bounds(dtype)
    for bound, ratio in zip(bounds, (low, high), strict=True):
        assert near(bound, expected_bound(ratio, dtype), dtype)
        assert bound == float(DTYPES[dtype](bound)), "not a number of the dtype"
        assert math.isfinite(bound)


@dtypes
@given(ratios=st.tuples(positive, positive))
def test_bounds_agree_with_the_references(dtype: torch.dtype, ratios: tuple[float, float]) -> None:
    low, high = min(ratios), max(ratios)
    if low == math.inf:
        return
    config = IPOConfig(dppo_mask_low=low, dppo_mask_high=high)
    assert config.log_bounds(dtype) == reference._log_bounds(
        config.dppo_mask_low, config.dppo_mask_high, dtype
    )


@dtypes
def test_open_ends_admit_no_overflow(dtype: torch.dtype) -> None:
    low, high = IPOConfig(dppo_mask_low=0.0, dppo_mask_high=math.inf).log_bounds(dtype)
    assert low == torch.finfo(dtype).min
    assert high == largest_log(dtype)
    edge = torch.tensor(high, dtype=dtype)
    assert edge.exp().isfinite()
    assert torch.nextafter(edge, torch.tensor(math.inf, dtype=dtype)).double().exp() > (
        torch.finfo(dtype).max if dtype == torch.float32 else 1.7e308
    )


@dtypes
def test_a_wider_band_has_wider_bounds(dtype: torch.dtype) -> None:
    ratios = [0.0, 1e-320, 1e-30, 0.5, math.nextafter(0.5, 1), 1.0, 2.0, 1e30, 1e39, math.inf]
    highs = [IPOConfig(0.0, ratio).log_bounds(dtype)[1] for ratio in ratios]
    assert highs == sorted(highs)


# ---------------------------------------------------------------------------------------------
# prime-rl's sections


@pytest.mark.parametrize(
    ("section", "version", "config"),
    [
        ({}, None, IPOConfig.ipo()),
        ({"type": "ipo", "eps": 0.2, "max_importance_ratio": 9, "score_centering": False}, None,
         IPOConfig.ipo(0.2, 9.0)),
        ({"score_centering": True}, None, IPOConfig.ipo(score_centering=True)),
        ({"type": "cispo", "score_centering": False}, None, IPOConfig.cispo()),
        ({"type": "ppo", "adv_tau": 2}, None, IPOConfig.ppo(adv_tau=2.0)),
        ({"type": "icepop", "ratio_high": 4}, "2026-10", IPOConfig(0.2, 4.0, kl_tau=0.0)),
        ({"type": "ppo", "ratio_low": 0.7}, None, IPOConfig.ppo(0.7)),
        ({"type": "cispo"}, None, IPOConfig.cispo(0.0, 5.0)),
        ({"type": "default"}, "2026-08", IPOConfig.dppo(0.2, 0.2)),
        ({"type": "ipo", "ipo_threshold": 0.3, "kl_tau": 0}, "2026-08",
         IPOConfig.prob_diff(0.3, kl_tau=0.0)),
        ({"dppo_mask_high": 3.0, "teacher_tau": 0.5}, "2026-05",
         IPOConfig(dppo_mask_high=3.0, teacher_tau=0.5)),
    ],
)  # fmt: skip
def test_a_section_of_prime_rl_carries_over(
    section: dict[str, object], version: str | None, config: IPOConfig
) -> None:
    assert IPOConfig.from_prime_rl(section, version) == config


@pytest.mark.parametrize(
    ("section", "version", "message"),
    [
        ({"type": "custom"}, None,
         "type: expected one of ipo, icepop, ppo, cispo in a section of 2026-10, got 'custom'"),
        ({"type": "default"}, None,
         "type: expected one of ipo, icepop, ppo, cispo in a section of 2026-10, got 'default'; "
         "sections of version '2026-05', '2026-08' have it"),
        ({"ipo_threshold": 0.1}, None,
         "ipo_threshold: expected one of eps, adv_tau, max_importance_ratio, score_centering for "
         "type='ipo' in a section of 2026-10, got ipo_threshold=0.1; sections of version '2026-08' "
         "have it"),
        ({"beta": 1}, "2026-05",
         "beta: expected one of dppo_mask_low, dppo_mask_high, adv_tau, kl_tau, teacher_tau for "
         "type='default' in a section of 2026-05, got beta=1"),
        ({"type": "ppo", "score_centering": True}, None,
         "score_centering: expected one of ratio_low, ratio_high, adv_tau, max_importance_ratio "
         "for type='ppo' in a section of 2026-10, got score_centering=True; sections of version "
         "'2026-10' have it"),
        ({}, "2025-01", "version: expected one of 2026-05, 2026-08, 2026-10, got '2025-01'"),
    ],
)  # fmt: skip
def test_what_a_section_may_not_hold_is_named(
    section: dict[str, object], version: str | None, message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        IPOConfig.from_prime_rl(section, version)
    assert str(caught.value) == message


def test_a_section_is_a_mapping() -> None:
    with pytest.raises(TypeError, match="section: expected a mapping of fields such as a dict"):
        IPOConfig.from_prime_rl("ipo")


# ---------------------------------------------------------------------------------------------
# Score centering


def test_score_centering_asks_for_the_loss_that_it_centers() -> None:
    assert IPOConfig.ipo(score_centering=True) == dataclasses.replace(
        IPOConfig.ipo(), score_centering=True
    )
    start = "score_centering: expected mask_rule='prob_diff' of equal bounds and pg_form='capped'"
    for fields in (
        {},
        {"mask_rule": "prob_diff", "dppo_mask_low": 0.3, "dppo_mask_high": 0.3},
        {"mask_rule": "dppo", "dppo_mask_high": 0.2, "pg_form": "capped", "ratio_cap": 2.0},
        {"mask_rule": "prob_diff", "pg_form": "capped", "ratio_cap": 2.0},
    ):
        assert refusal(score_centering=True, **fields).startswith(start)


@pytest.mark.parametrize(
    "rule", [{"rollout_min_ratio": 1e-3}, {"sequence_rules": (("mean_k1", 0.9, 1.1),)}]
)
def test_score_centering_has_no_rule_on_sequences_beside_it(rule: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="score_centering: expected no rule on sequences"):
        dataclasses.replace(IPOConfig.ipo(score_centering=True), **rule)


@pytest.mark.parametrize("wrong", [1, None, "yes"])
def test_score_centering_is_a_bool(wrong: object) -> None:
    assert refusal(score_centering=wrong) == (
        f"score_centering: expected True or False, got {wrong!r}"
    )
