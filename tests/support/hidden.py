"""Inputs of the loss from hidden states, and the judgement whether a result is accurate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ipo_ext
from ipo_ext import IPOConfig, reference
from ipo_ext._ops import chunks
from tests.support.backends import Backend
from tests.support.cases import HiddenCase, evaluate
from tests.support.closeness import assert_close
from tests.support.logits import OF_LOGPROBS, distinct_log_ratios
from tests.support.logprobs import random_case as logprobs_case
from tests.support.replay import random_ids

TOKENS, WIDTH, VOCABULARY = 37, 16, 53


def random_case(
    tokens: int = TOKENS,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    masked: float = 0.4,
    inference_dtype: torch.dtype = torch.float32,
    token_temperature: bool = False,
    has_bias: bool = False,
    ids: int | None = None,
    **options: Any,
) -> HiddenCase:
    """No token is near the band's ends. ``ids``: how many a sampling mask has of each token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype) / width**0.5
    mask = torch.rand(tokens, generator=generator) >= masked
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    if ids is not None:
        options["sampling_mask"] = random_ids(labels, vocabulary, ids, generator)
    labels = labels.masked_fill(~mask, -100)
    if token_temperature:
        options["temperature"] = torch.rand(tokens, generator=generator) + 0.5
    if has_bias:
        options["bias"] = torch.randn(vocabulary, generator=generator).to(dtype)
    how = {name: options.get(name) for name in (*OF_LOGPROBS, "bias")}
    exact, _ = reference.linear_token_logprobs(hidden, weight, labels, **how, dtype=torch.float64)
    return HiddenCase(
        hidden=hidden,
        weight=weight,
        labels=labels,
        inference_logprobs=(exact - distinct_log_ratios(tokens, generator)).to(inference_dtype),
        advantages=torch.randn(tokens, generator=generator),
        loss_mask=mask,
        **options,
    )


def leaves_of(case: HiddenCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and weight, each a new leaf."""
    return case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()


class CountsRows:
    """Counts the rows of logits that matrix products make, by standing in for ``Head.logits``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        logits = chunks.Head.logits

        def counted(head: Any, hidden: torch.Tensor) -> torch.Tensor:
            self.rows.append(hidden.shape[0])
            return logits(head, hidden)

        monkeypatch.setattr(chunks.Head, "logits", counted)


# ---------------------------------------------------------------------------------------------
# Accuracy


class WideLinear(torch.autograd.Function):
    """F.linear with results in float32 from operands of any precision, forward and back.

    What eager torch has as ``mm(..., out_dtype=float32)``: the naive peer of the same products.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(wide) @ weight.to(wide).t()
        return logits if bias is None else logits + bias.to(wide)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        rounded = gradient.to(weight.dtype).to(gradient.dtype)
        grad_hidden = rounded @ weight.to(gradient.dtype)
        grad_weight = rounded.t() @ hidden.to(gradient.dtype)
        grad_bias = rounded.sum(0).to(weight.dtype) if any(ctx.needs_input_grad[2:]) else None
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias


def naive_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *constants: Any,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> ipo_ext.IPOOutput:
    logits: Any = WideLinear.apply(hidden, weight, bias)
    return reference.ipo_loss_from_logits(logits, *constants, **options)


def assert_accurate(case: HiddenCase, backend: Backend, grad_loss: float = 1.0, **how: Any) -> None:
    """Ours is about as close to float64 as eager torch over all of the fp32 logits is."""
    ours = evaluate(case.to(backend.device), grad_loss=grad_loss, **how)
    naive = evaluate(case, naive_loss, grad_loss=grad_loss)
    wide = case.with_(**{name: getattr(case, name).double() for name in case.leaves})
    sizes = {}

    def exact_loss(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        *constants: Any,
        bias: torch.Tensor | None = None,
        **options: Any,
    ) -> ipo_ext.IPOOutput:
        logits = F.linear(hidden, weight, bias)
        logits.register_hook(lambda gradient: sizes.update(grad_logits=gradient.abs()))
        return reference.ipo_loss_from_logits(logits, *constants, **options, dtype=torch.float64)

    exact = evaluate(wide, exact_loss, grad_loss=grad_loss)
    temperature = torch.as_tensor(1.0 if case.temperature is None else case.temperature).double()
    scale = case.logit_scale or 1.0
    terms = wide.hidden.abs() @ wide.weight.abs().t()
    terms = terms if wide.bias is None else terms + wide.bias.abs()
    arguments = scale * terms.amax(-1) / temperature
    in_float64 = case.hidden.dtype == torch.float64  # naive is exact then, and ours alone
    for name in ("logprobs", "entropy")[: 1 if case.entropy is False else 2]:
        mine, theirs, truth = (getattr(e.output, name) for e in (ours, naive, exact))
        size = truth.abs() + case.loss_mask * (1 + arguments)
        assert_close(mine, theirs, truth, scale=size, floor=8, name=name)
    assert ours.loss.item() == pytest.approx(
        exact.loss.item(), rel=1e-5, abs=1e-5 * len(case.labels)
    )
    for name, value in exact.metrics.items():
        assert ours.metrics[name].item() == pytest.approx(value.item(), rel=3e-5, abs=3e-5)
    grad_logits = sizes["grad_logits"]
    relative = 1 if case.hidden.dtype.itemsize == 2 else 8 + arguments.max().item()
    tiny = 1e-30
    scales = {
        "grad_hidden": grad_logits @ wide.weight.abs()
        + (grad_logits.amax(-1, keepdim=True) > 0) * tiny,
        "grad_weight": grad_logits.t() @ wide.hidden.abs() + tiny,
        **({} if case.bias is None else {"grad_bias": grad_logits.sum(0) + tiny}),
    }
    for name, scale in scales.items():
        mine, theirs, truth = (getattr(e, name) for e in (ours, naive, exact))
        floor = relative * (8 if in_float64 else 1)
        assert_close(mine, theirs, truth, scale=scale, floor=floor, name=name)


def assert_as_from_logits(config: IPOConfig, backend: Backend) -> None:
    """Loss and gradient from hidden states are those from the logits that they make."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 8, generator=generator).to(backend.device).requires_grad_()
    weight = torch.randn(16, 8, generator=generator).to(backend.device)
    labels = torch.randint(16, (40,), generator=generator).to(backend.device)
    case = logprobs_case(40).to(backend.device)
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, labels[:, None])[:, 0].detach()
    rest = (logprobs + case.advantages * 0.3, case.advantages, case.loss_mask)
    ours = ipo_ext.ipo_loss_from_hidden(hidden, weight, labels, *rest, config=config)
    theirs = ipo_ext.ipo_loss_from_logits(hidden @ weight.T, labels, *rest, config=config)
    (gradient,) = torch.autograd.grad(ours.loss, hidden)
    (expected,) = torch.autograd.grad(theirs.loss, hidden)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)
