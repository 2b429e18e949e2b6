"""What is measured: against float64 by hand, whatever the size of the batches it came in."""

from __future__ import annotations

import math

import pytest
import torch

from ipo_ext import IPOConfig
from ipo_ext.mismatch import statistics
from ipo_ext.mismatch.rollouts import Rollout
from ipo_ext.mismatch.statistics import HISTOGRAM_EDGES, Statistics


def rollouts(count: int = 30, length: int = 40) -> list[Rollout]:
    generator = torch.Generator().manual_seed(2)

    def one(number: int) -> Rollout:
        inference = -3 * torch.rand(length, generator=generator, dtype=torch.float64)
        noise = torch.randn(length, generator=generator, dtype=torch.float64)
        sampled = torch.arange(length) >= number % 7 + 1
        return Rollout(
            f"f:{number}",
            torch.randint(90, (length,), generator=generator),
            sampled,
            torch.where(sampled, inference, math.nan),
            inference + 0.5 * noise,
            versions=["10" if number % 2 else "9"] * length,
            environment=f"env {number % 3}",
        )

    return [one(number) for number in range(count)]


def measured(given: list[Rollout]) -> Statistics:
    found = Statistics({"wide": IPOConfig(dppo_mask_low=0.01, dppo_mask_high=100)})
    for rollout in given:
        found.add(rollout)
    found.finish()
    return found


def log_ratios(given: list[Rollout]) -> torch.Tensor:
    parts = []
    for rollout in given:
        assert rollout.trainer_logprobs is not None
        x = rollout.trainer_logprobs - rollout.inference_logprobs
        parts.append(x[rollout.sampled & ~x.isnan()])
    return torch.cat(parts)


@pytest.fixture(params=[50, 1 << 16], ids=["many batches", "one batch"])
def batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_TOKENS_AT_ONCE", request.param)


@pytest.mark.usefixtures("batches")
def test_the_estimates_and_bands_of_all_tokens() -> None:
    given = rollouts()
    found, x = measured(given), log_ratios(given)
    r = x.exp()
    assert found.tokens == len(x)
    assert found.overall.k1 == pytest.approx((-x).mean().item(), rel=1e-9)
    assert found.overall.k2 == pytest.approx((x * x / 2).mean().item(), rel=1e-9)
    assert found.overall.k3 == pytest.approx((r - 1 - x).mean().item(), rel=1e-9)
    assert found.overall.ess == pytest.approx((r.sum() ** 2 / (r * r).sum() / len(x)).item())
    assert found.overall.deviation == pytest.approx(x.std(correction=0).item(), rel=1e-9)
    assert (found.overall.smallest, found.overall.largest) == (x.min().item(), x.max().item())
    shares = {band.name: (band.low, band.high, band.dropped) for band in found.bands()}
    for name, low, high in (
        ("the default, ratio in [0.2, 5]", 0.2, 5.0),
        ("ratio in [0.5, 2]", 0.5, 2.0),
        ("wide", 0.01, 100.0),
    ):
        below, above = (r < low).double().mean().item(), (r > high).double().mean().item()
        assert shares[name] == pytest.approx((below, above, below + above), abs=1e-12)
    assert shares["ratio in [0.5, 2]"][2] > 0.05


@pytest.mark.usefixtures("batches")
def test_tables_hold_each_token_once_and_in_its_row() -> None:
    given = rollouts()
    found = measured(given)
    for kind in ("position", "logprob", "version", "environment"):
        assert sum(row.tokens for row in found.rows(kind)) == found.tokens
    assert [row.name for row in found.rows("version")] == ["9", "10"]
    assert [row.name for row in found.rows("environment")] == ["env 0", "env 1", "env 2"]
    for row, odd in zip(found.rows("version"), (0, 1), strict=True):
        x = log_ratios([each for number, each in enumerate(given) if number % 2 == odd])
        assert (row.tokens, row.measured.k2) == (len(x), pytest.approx((x * x / 2).mean().item()))
    firsts = [r.trainer_logprobs - r.inference_logprobs for r in given]  # type: ignore[operator]
    x = torch.stack([each[r.sampled][0] for each, r in zip(firsts, given, strict=True)])
    (first, *_) = found.rows("position")
    assert (first.name, first.tokens) == ("0", len(given))
    assert first.measured.mean == pytest.approx(x.mean().item())
    inference = torch.cat([r.inference_logprobs[r.sampled] for r in given])
    x = log_ratios(given)[(inference >= -1) & (inference < -0.1)]
    (row,) = (row for row in found.rows("logprob") if row.name == "-1 to -0.1")
    assert (row.tokens, row.measured.mean) == (len(x), pytest.approx(x.mean().item()))


@pytest.mark.usefixtures("batches")
def test_the_histogram_counts_by_its_edges() -> None:
    given = rollouts()
    found, x = measured(given), log_ratios(given)
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
    for counts, values in (
        (found.histogram[32:], x[x >= 0]),
        (found.histogram[:32].flip(0), -x[x < 0]),
    ):
        expected = [int((values < edges[0]).sum())]
        for low, high in zip(edges, [*edges[1:], math.inf], strict=True):
            expected.append(int(((values >= low) & (values < high)).sum()))
        assert counts.tolist() == expected
    assert found.histogram[31] == ((x < 0) & (x > -edges[0])).sum()
    half = found.quantile(0.5)
    assert half / 2 <= x.abs().median().item() <= half


def test_an_edge_belongs_to_the_bin_farther_from_0_and_nan_to_none() -> None:
    x = torch.tensor([0.0, -0.0, 2**-10, -(2**-10), 32.0, -math.inf, math.nan])
    counts = statistics._histogram(x.double())
    assert counts.nonzero()[:, 0].tolist() == [0, 30, 32, 33, 63]
    assert counts[32] == 2


@pytest.mark.usefixtures("batches")
def test_the_farthest_tokens_come_with_what_stands_around_them() -> None:
    given = rollouts()
    found, x = measured(given), log_ratios(given)
    sizes = [abs(extreme.log_ratio) for extreme in found.extremes]
    assert sizes == pytest.approx(x.abs().sort(descending=True).values[: len(sizes)].tolist())
    first = found.extremes[0]
    rollout = given[int(first.where.partition(":")[2])]
    place = int(rollout.sampled.nonzero()[first.position])
    assert rollout.token_ids[place] == first.token_id
    ids = rollout.token_ids.tolist()
    assert ids[:place][-16:] == first.before
    assert ids[place + 1 : place + 7] == first.after


def test_tokens_without_a_value_are_counted_and_left_out() -> None:
    given = rollouts(2)
    given[0].inference_logprobs[10:13] = math.nan
    found = measured(given)
    assert found.missing == 3
    assert found.tokens == len(log_ratios(given))
    assert math.isfinite(found.overall.k3)


def test_names_beyond_a_number_of_them_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_NAMES", 2)
    found = measured(rollouts())
    names = [row.name for row in found.rows("environment")]
    assert names == ["env 0", "env 1", statistics.OTHERS]
    assert sum(row.tokens for row in found.rows("environment")) == found.tokens
