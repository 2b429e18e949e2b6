"""The closeness checker itself: it accepts rounding and fails on every planted error."""

import pytest
import torch

from tests.support.closeness import assert_close, assert_flips_proven

BAND = (-1.5, 1.5)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def values(request):
    """Eager results in the dtype, and the same in float64; neither is anywhere zero."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, generator=generator).to(request.param)
    return (x.exp() * x), (x.double().exp() * x.double())


def biased(values, ulps):
    return values * (1 + ulps * torch.finfo(values.dtype).eps)


def with_element(values, index, value):
    values = values.clone()
    values[index] = value
    return values


def test_accepts_naive_arithmetic_and_the_correctly_rounded_result(values):
    naive, exact = values
    assert_close(naive, naive, exact)
    assert_close(exact.to(naive.dtype), naive, exact)


@pytest.mark.parametrize("ulps", [-4, 4])
def test_fails_on_a_bias_of_a_few_ulp(values, ulps):
    naive, exact = values
    with pytest.raises(AssertionError, match=r"maximum error"):
        assert_close(biased(naive, ulps), naive, exact)


def test_an_outlier_of_the_naive_result_excuses_no_bias(values):
    naive, exact = values
    outlier = with_element(naive, 7, biased(naive, 100)[7])
    assert_close(outlier, outlier, exact)
    with pytest.raises(AssertionError, match=r"rms error"):
        assert_close(biased(naive, 8), outlier, exact)


@pytest.mark.parametrize("index", [0, 999, -1])
def test_fails_on_a_single_wrong_element(values, index):
    naive, exact = values
    wrong = with_element(naive, index, naive[index] * (1 + 16 * torch.finfo(naive.dtype).eps))
    with pytest.raises(AssertionError, match="maximum error"):
        assert_close(wrong, naive, exact)


def test_fails_on_two_elements_exchanged(values):
    naive, exact = values
    wrong = naive.clone()
    wrong[3], wrong[4] = naive[4], naive[3]
    with pytest.raises(AssertionError, match="maximum error"):
        assert_close(wrong, naive, exact)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_fails_where_only_one_side_is_finite(values, value):
    naive, exact = values
    with pytest.raises(AssertionError, match=r"differ in being finite: first at \[7\]"):
        assert_close(with_element(naive, 7, value), naive, exact)
    with pytest.raises(AssertionError, match=r"differ in being finite: first at \[7\]"):
        assert_close(naive, naive, with_element(exact, 7, value))


def test_accepts_equal_nonfinite_values_and_fails_on_opposite_infinities(values):
    naive, exact = values
    for value in (torch.nan, torch.inf, -torch.inf):
        ours = with_element(naive, 7, value)
        assert_close(ours, ours, with_element(exact, 7, value))
    with pytest.raises(AssertionError, match="differ in being finite"):
        assert_close(with_element(naive, 7, -torch.inf), naive, with_element(exact, 7, torch.inf))


def test_nan_in_the_naive_result_excuses_nothing(values):
    naive, exact = values
    broken = with_element(naive, 7, torch.nan)
    assert_close(naive, broken, exact)
    with pytest.raises(AssertionError, match="maximum error"):
        assert_close(with_element(naive, 7, 2 * naive[7]), broken, exact)


def test_fails_where_an_exact_zero_is_expected(values):
    naive, exact = values
    exact = with_element(exact, 5, 0.0)
    assert_close(with_element(naive, 5, 0.0), naive, exact)
    smallest = torch.finfo(naive.dtype).smallest_normal
    with pytest.raises(AssertionError, match="maximum error inf"):
        assert_close(with_element(naive, 5, smallest), naive, exact)


def test_the_scale_allows_cancellation_and_no_more(values):
    naive, exact = values
    big = 1000.0
    cancelled = (naive.double() + big).to(naive.dtype) - big
    with pytest.raises(AssertionError):
        assert_close(cancelled, naive, exact)
    assert_close(cancelled, naive, exact, scale=exact.abs() + big)
    with pytest.raises(AssertionError):
        assert_close(cancelled, naive, exact, scale=exact.abs() + big / 1000)


def test_a_proven_crossing_may_flip():
    x = torch.tensor([-1.5, 1.5 + 1e-7, 1.5 - 1e-7, 0.0], dtype=torch.float64)
    ours = torch.tensor([True, True, False, True])
    exact = torch.tensor([False, False, True, True])
    assert_flips_proven(ours, exact, x, torch.full((4,), 2e-7), BAND)


@pytest.mark.parametrize("x", [0.0, 1.4999, -1.5001, torch.nan, torch.inf])
def test_fails_on_an_unproven_flip(x):
    log_ratio = torch.tensor([1.5, x, 1.5], dtype=torch.float64)
    kept = torch.tensor([True, True, True])
    flipped = torch.tensor([False, False, True])
    with pytest.raises(AssertionError, match=r"1 of 2 flips .* first at \[1\]"):
        assert_flips_proven(flipped, kept, log_ratio, torch.full((3,), 2e-7), BAND)
