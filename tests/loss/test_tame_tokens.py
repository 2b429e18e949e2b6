"""The CUDA kernels take tame tokens a round of 128 at a time, and a round that holds another token
one by one, as they take everything where an input is not aligned: the same bits either way."""

import dataclasses
import math

import pytest
import torch

from ipo_ext import IPOConfig
from tests.support.against_reference import (
    COUNTS,
    assert_matches_reference,
    assert_sums_close,
)
from tests.support.cases import evaluate, same_bits
from tests.support.layouts import misaligned
from tests.support.logprobs import random_case

TOKENS = 1100  # eight whole rounds, and a part of one
PLACES = (0, 5 * 128 + 77, TOKENS - 1)

CONFIGS = {
    "default": IPOConfig(kl_tau=0.05),
    "no-band": IPOConfig(0.0, math.inf, kl_tau=0.05),
    "icepop": IPOConfig.icepop(rollout_min_ratio=1e-30),
    "ipo": IPOConfig.ipo(kl_tau=0.05),
    "ppo": IPOConfig.ppo(kl_tau=0.05),
    "cispo": IPOConfig.cispo(kl_tau=0.05),
    "dppo": IPOConfig.dppo(),
    "kpop": IPOConfig.kpop(0.01),
    "sequence-tis": IPOConfig.sequence_tis(2.0),
}

BANDS = ("default", "no-band")  # whose reference is the band's; others have tests of their own

# Log-ratios of a token that is not tame, and two that just are.
LOG_RATIOS = (64.0, -64.0, 64.00001, 79.0, 81.0, -90.0, 200.0, -1e10, math.inf, math.nan)


def case_of(name, **options):
    return random_case(TOKENS, config=CONFIGS[name], segments="empty-between", **options)


def planted(case, log_ratio):
    """The case with a log-ratio at some places, active and, next to them, not."""
    trainer, mask = case.trainer_logprobs.clone(), case.loss_mask.clone()
    for place in PLACES:
        near = max(place - 1, 0)
        trainer[[near, place]] = case.inference_logprobs[[near, place]] + log_ratio
        mask[near], mask[place] = False, True
    return case.with_(trainer_logprobs=trainer, loss_mask=mask)


def assert_same_one_by_one(case):
    result = evaluate(case)
    one_by_one = evaluate(case.map_tokens(misaligned))
    assert same_bits(result.gradient, one_by_one.gradient)
    assert torch.equal(result.metrics.sums[:COUNTS], one_by_one.metrics.sums[:COUNTS])
    assert_sums_close(result.metrics, one_by_one.metrics, case)


@pytest.mark.parametrize("log_ratio", LOG_RATIOS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_with_another_token_is_what_its_tokens_are(backend, name, log_ratio):
    case = planted(case_of(name, spread=0.3), log_ratio)
    if name in BANDS:
        assert_matches_reference(case, backend.device)
    assert_same_one_by_one(case.to(backend.device))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("extras", ["plain", "teacher-and-weights", "bf16"])
def test_tame_tokens_have_the_bits_of_one_by_one(backend, name, extras):
    case = case_of(name, weights=extras != "plain", masked=0.5)
    if extras == "teacher-and-weights":
        config = dataclasses.replace(CONFIGS[name], teacher_tau=0.3)
        case = case_of(name, weights=True, teacher=True).with_(config=config)
    if extras == "bf16":
        case = case.with_(inference_logprobs=case.inference_logprobs.bfloat16())
    if name in BANDS:
        assert_matches_reference(case, backend.device)
    assert_same_one_by_one(case.to(backend.device))


@pytest.mark.parametrize("name", ["default", "ppo", "cispo"])
def test_an_infinite_advantage_is_harmless_where_its_tau_is_zero(backend, name):
    config = dataclasses.replace(CONFIGS[name], adv_tau=0.0)
    case = case_of(name, spread=0.3).with_(config=config)
    infinite = case.with_(advantages=torch.full_like(case.advantages, math.inf))
    result = evaluate(infinite.to(backend.device))
    assert same_bits(result.gradient, evaluate(case.to(backend.device)).gradient)
    assert result.loss.isfinite()


@pytest.mark.parametrize("name", ["default", "ppo", "cispo"])
def test_an_infinite_advantage_is_harmless_where_the_normalizer_is_zero(backend, name):
    case = case_of(name, spread=0.3, normalizer=torch.zeros(()))
    case = case.with_(advantages=torch.full_like(case.advantages, math.inf))
    result = evaluate(case.to(backend.device))
    assert torch.equal(result.gradient, torch.zeros_like(result.gradient))
    assert result.loss == 0
