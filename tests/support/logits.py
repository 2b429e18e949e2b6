"""Inputs of the loss from logits, and the judgement whether a result is accurate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ipo_ext import IPOConfig, reference
from tests.support.backends import Backend
from tests.support.cases import LogitsCase, evaluate
from tests.support.closeness import assert_close
from tests.support.layouts import LAYOUTS
from tests.support.replay import random_ids

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NARROWER = (torch.float16, torch.bfloat16)
# Enough to keep any GPU busy. Of fewer rows, those longer than 1024 columns are each summed by
# several blocks, in another order, unless the gradient is narrower than the logits.
MANY_ROWS = 200
OF_LOGPROBS = ("temperature", "softcap", "logit_scale", "sampling_mask")
WIDE_BAND = IPOConfig(dppo_mask_low=0.0, dppo_mask_high=math.inf)


def random_case(
    rows: int = 9,
    columns: int = 33,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    masked: float = 0.3,
    inference_dtype: torch.dtype = torch.float32,
    token_temperature: bool = False,
    spread: float = 2.0,
    likely: bool = False,
    ids: int | None = None,
    **options: Any,
) -> LogitsCase:
    """No token is near the band's ends. ``likely``: labels have a probability of about a third,
    however many columns there are. ``ids``: how many a sampling mask has of each row."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns, generator=generator) * spread).to(dtype)
    mask = torch.rand(rows, generator=generator) >= masked
    labels = torch.randint(columns, (rows,), generator=generator)
    if likely:
        logits[torch.arange(rows), labels] += math.log(columns)
    if token_temperature:
        options["temperature"] = torch.rand(rows, generator=generator) + 0.5
    if ids is not None:
        options["sampling_mask"] = random_ids(labels, columns, ids, generator)
    how = {name: options.get(name) for name in OF_LOGPROBS}
    exact, _ = reference.token_logprobs(logits, labels, **how, dtype=torch.float64)
    return LogitsCase(
        logits=logits,
        labels=labels.masked_fill(~mask, -100),
        inference_logprobs=(exact - distinct_log_ratios(rows, generator)).to(inference_dtype),
        advantages=torch.randn(rows, generator=generator),
        loss_mask=mask,
        **options,
    )


def distinct_log_ratios(tokens: int, generator: torch.Generator) -> torch.Tensor:
    """About -3, -0.5, 0.5 or 3: none is near an end of the default band."""
    ratios = torch.tensor([-3.0, -0.5, 0.5, 3.0])
    x = ratios[torch.randint(4, (tokens,), generator=generator)]
    return x + 0.1 * torch.randn(tokens, generator=generator)


# ---------------------------------------------------------------------------------------------
# Accuracy


def assert_accurate(case: LogitsCase, backend: Backend, grad_loss: float = 1.0) -> None:
    """Ours is about as close to float64 as eager torch in the compute dtype is."""
    ours = evaluate(case.to(backend.device), grad_loss=grad_loss)
    naive = evaluate(case, reference.ipo_loss_from_logits, grad_loss=grad_loss)
    wide = case.with_(logits=case.logits.double())
    more = {"dtype": torch.float64}
    exact = evaluate(wide, reference.ipo_loss_from_logits, grad_loss=grad_loss, **more)
    names = ("logprobs", "entropy")[: 1 if case.entropy is False else 2]
    truths = {name: getattr(exact.output, name) for name in names}
    if case.logits.dtype == torch.float64:
        truths = {name: in_long_double(case)[name] for name in names}
    for name, truth in truths.items():
        mine, theirs = (getattr(e.output, name) for e in (ours, naive))
        log_size = truth.abs() + case.loss_mask * largest_argument(case)
        assert_close(mine, theirs, truth, scale=log_size, floor=6, name=name)
    assert ours.loss.item() == pytest.approx(
        exact.loss.item(), rel=1e-5, abs=1e-5 * len(case.labels)
    )
    assert_close(
        ours.gradient,
        naive.gradient,
        exact.gradient,
        scale=gradient_scale(case, exact.gradient),
        floor=rounding_of_p(case),
        name="gradient",
    )
    for name, value in exact.metrics.items():
        assert ours.metrics[name].item() == pytest.approx(value.item(), rel=2e-5, abs=2e-5)


def assert_drawn_accurate(
    backend_name: str,
    rows: int,
    columns: int,
    temperature: float | str | None,
    grad_loss: float,
    layout: str,
    **options: Any,
) -> None:
    """The same of a case that Hypothesis has drawn; a temperature of "token" is one for each."""
    of_token = temperature == "token"
    options["temperature"] = None if of_token else temperature
    case = random_case(rows, columns, token_temperature=of_token, **options)
    case = case.with_(logits=LAYOUTS[layout](case.logits))
    with Backend(backend_name).active() as backend:
        assert_accurate(case, backend, grad_loss)


def gradient_scale(case: LogitsCase, exact: torch.Tensor) -> torch.Tensor:
    """Sizes of the terms of each derivative: at the label, 1 and p are subtracted."""
    how = {name: getattr(case, name) for name in OF_LOGPROBS}
    log_p, _ = reference.token_logprobs(case.logits, case.labels, **how, dtype=torch.float64)
    p = log_p.exp()[:, None]
    label = torch.where(case.loss_mask, case.labels, 0)[:, None].long()
    at_label = exact.gather(-1, label).abs() * (1 + p) / (1 - p)
    size = exact.abs().scatter(-1, label, at_label.nan_to_num(0, 0, 0))
    return torch.where(size > 0, size.clamp(min=1e-30), 0)  # subnormal exponentials count as 0


def rounding_of_p(case: LogitsCase) -> float:
    """Ulp of a probability that rounding the largest argument can move: exp(s) moves by s."""
    if case.logits.dtype.itemsize == 2:
        return 1.0
    in_float64 = case.logits.dtype == torch.float64  # then naive is exact, and ours would be alone
    return (4 if in_float64 else 1) * (8.0 + largest_argument(case))


def largest_argument(case: LogitsCase) -> float:
    """Bounds the softmax's arguments, whose rounding every log-probability inherits."""
    coldest = 1.0 if case.temperature is None else torch.as_tensor(case.temperature).min().item()
    finite = case.logits[case.logits.isfinite()]
    largest = (case.logit_scale or 1.0) * finite.abs().max().item()
    return 1.0 + min(largest, case.softcap or math.inf) / coldest


def in_long_double(case: LogitsCase) -> dict[str, torch.Tensor]:
    """For float64 logits, of which eager torch knows no more than we do: its sums lose bits."""
    scaled = (case.logit_scale or 1) * case.logits.cpu().numpy().astype(np.longdouble)
    if case.softcap:
        scaled = case.softcap * np.tanh(scaled / case.softcap)
    temperature = 1.0 if case.temperature is None else case.temperature
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.cpu().numpy()[..., None]
    active = case.loss_mask.cpu().numpy()
    with np.errstate(all="ignore"):  # of rows that are not finite
        scaled = scaled / np.asarray(temperature, dtype=np.longdouble)
        below = scaled - scaled.max(-1, keepdims=True)
        log_p = below - np.log(np.exp(below).sum(-1, keepdims=True))
        p = np.exp(log_p)
        entropy = -np.where(p == 0, 0, p * log_p).sum(-1)
    labels = np.where(active, case.labels.cpu().numpy(), 0)
    logprobs = np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    if case.sampling_mask is not None:
        logprobs = _over_supports(scaled, labels, case.sampling_mask.cpu().numpy(), logprobs)
    return {
        name: torch.from_numpy(np.where(active, values, 0).astype(np.float64))
        for name, values in (("logprobs", logprobs), ("entropy", entropy))
    }


def _over_supports(
    scaled: np.ndarray, labels: np.ndarray, ids: np.ndarray, logprobs: np.ndarray
) -> np.ndarray:
    """``logprobs`` with those of rows that replay their ids over these alone."""
    replayed = logprobs.copy()
    for row, label in enumerate(labels):
        support = ids[row][ids[row] >= 0]
        if label in support:
            below = scaled[row, support] - scaled[row, label]
            replayed[row] = below.max() * -1 - np.log(np.exp(below - below.max()).sum())
    return replayed
