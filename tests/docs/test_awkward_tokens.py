"""docs/awkward-tokens.md: what it says of our loss holds, and its script sees what it names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "awkward_hosts")]

import awkward_tokens  # noqa: E402
import measure  # noqa: E402

CASES = {**measure.ACTIVE, **measure.OUTSIDE, **measure.EMPTY}


def ratio(batch: measure.Batch) -> torch.Tensor:
    return (batch.trainer - batch.sampled).exp()


def multiplied(batch: measure.Batch) -> torch.Tensor:
    return -(ratio(batch) * batch.advantages * batch.mask).sum() / batch.mask.sum()


def selected(batch: measure.Batch) -> torch.Tensor:
    kept = batch.mask & (ratio(batch) < 5)
    x = torch.where(kept, batch.trainer - batch.sampled, 0)
    return -torch.where(kept, x.exp() * batch.advantages, 0).sum() / 5


def whole_responses(batch: measure.Batch) -> torch.Tensor:
    kept = (ratio(batch).detach() < 5) | ~batch.mask
    kept = kept.all(1, keepdim=True) & batch.mask
    return -(batch.trainer * batch.advantages)[kept].sum() / 5


def pays_padding(batch: measure.Batch) -> torch.Tensor:
    return -(ratio(batch) * batch.advantages).mean()


def counts_padding(batch: measure.Batch) -> torch.Tensor:
    return torch.where(batch.mask, -batch.trainer * batch.advantages, 0).mean()


def test_what_the_page_says_of_ours_holds() -> None:
    answers = {"ipo_ext": measure.answers_of("host_ipo_ext")}
    ours = [line for line in awkward_tokens.tables(answers).splitlines() if "ipo_ext" in line]
    shown = [line for line in awkward_tokens.PAGE.read_text().splitlines() if "| ipo_ext" in line]
    assert len(ours) == 4
    assert ours == shown


def test_the_page_has_every_package_in_the_version_that_is_pinned() -> None:
    shown = awkward_tokens.PAGE.read_text()
    for package in awkward_tokens.PACKAGES.values():
        assert f"| {package.label}, " in shown


@pytest.mark.parametrize(
    ("loss", "case", "words"),
    [
        (multiplied, "-inf", "loss infinite, gradient infinite"),
        (multiplied, "NaN", "loss NaN, gradient NaN"),
        (multiplied, "0", "weight 0.05"),
        (multiplied, "a ratio of 50", "weight 50"),
        (multiplied, "masked NaN", "loss NaN, gradient NaN"),
        (multiplied, "more padding", "none"),
        (multiplied, "everything masked", "loss NaN, gradient NaN"),
        (multiplied, "no rows", "loss NaN"),
        (selected, "-inf", "dropped"),
        (selected, "NaN", "dropped"),
        (selected, "masked NaN", "none"),
        (selected, "everything masked", "0"),
        (whole_responses, "a ratio of 50", "response dropped"),
        (pays_padding, "more padding", "masked tokens train"),
        (counts_padding, "more padding", "gradient times 0.5"),
    ],
)
def test_the_words_are_those_of_what_a_loss_does(loss: measure.Loss, case: str, words: str) -> None:
    of = (
        measure.of_active
        if case in measure.ACTIVE
        else measure.of_masked
        if case in measure.OUTSIDE
        else measure.of_empty
    )
    assert of(loss, CASES[case]) == words


def clipped(batch: measure.Batch) -> torch.Tensor:
    bounded = ratio(batch).clamp(0.8, 1.2) * batch.advantages
    return -torch.min(ratio(batch) * batch.advantages, bounded)[batch.mask].sum() / 5


def raising(batch: measure.Batch) -> torch.Tensor:
    raise RuntimeError


def test_a_loss_that_asks_for_the_sign_or_raises_is_named() -> None:
    words = measure.of_active(clipped, measure.ACTIVE["a ratio of 50"])
    assert words == "A > 0: dropped; A < 0: weight 50"
    assert measure.of_empty(raising, measure.EMPTY["no rows"]) == "raises RuntimeError"
    assert measure.of_masked(raising, measure.OUTSIDE["more padding"]) == "raises RuntimeError"


def gathered(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def clamped(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    extended = torch.nn.functional.pad(logits, (0, 1), value=0.0)
    return extended.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


@pytest.mark.parametrize(
    ("logprobs", "words"),
    [(gathered, "raises RuntimeError"), (clamped, "taken for a logit of 0")],
)
def test_a_token_id_beyond_the_vocabulary_is_seen(logprobs: Callable, words: str) -> None:
    assert measure.of_token_id(logprobs) == words


def test_the_tables_stand_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{awkward_tokens.BEGIN} -->\nold\n{awkward_tokens.END}\nafter\n")
    awkward_tokens.write(page, "new")
    assert page.read_text() == (
        f"before\n{awkward_tokens.BEGIN} -->\n\nnew\n\n{awkward_tokens.END}\nafter\n"
    )
