"""Bad input from logits and from hidden states: refused in words, or, where only a kernel sees it,
an error on the CPU and poison on CUDA."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch

import ipo_ext
from tests.support import hidden, logits
from tests.support.backends import Backend
from tests.support.cases import HiddenCase, evaluate

# -------------------------------------------------------------------------------------------------
# From logits


def fault_cases() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    def label(row: int, value: int) -> tuple[dict[str, Any], type[Exception], str]:
        labels = torch.zeros(9, dtype=torch.int64)
        labels[row] = value
        everything = torch.ones(9, dtype=torch.bool)
        fields = {"labels": labels, "loss_mask": everything}
        return fields, IndexError, "labels: expected a token in [0, 33)"

    temperature = "temperature: expected a finite number > 0"
    short = torch.tensor([0, 5], dtype=torch.int32)
    return {
        "label-high": label(8, 33),
        "label-low": label(0, -100),
        "label-far": label(0, 2**40),
        "temperature": ({"temperature": torch.zeros(9)}, RuntimeError, temperature),
        "temperature-nan": ({"temperature": torch.tensor(math.nan)}, RuntimeError, temperature),
        "cu_seqlens": ({"cu_seqlens": short}, RuntimeError, "cu_seqlens"),
        "normalizer": ({"normalizer": torch.tensor(-1.0)}, RuntimeError, "normalizer"),
    }


@pytest.mark.tempts_kernels_out_of_bounds
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(fault_cases()))
def test_contract_faults_from_logits(backend: Backend, name: str, dtype: torch.dtype) -> None:
    changes, error, text = fault_cases()[name]
    case = logits.random_case(9, 33, dtype).with_(**changes).to(backend.device)
    if backend.faults_raise:
        with pytest.raises(error) as raised:
            evaluate(case)
        assert type(raised.value) is error
        assert str(raised.value).startswith(text)
    else:
        ours = evaluate(case)
        assert ours.loss.isnan()
        assert ours.gradient.isnan().all()


@pytest.mark.tempts_kernels_out_of_bounds
def test_contract_faults_of_token_logprobs(backend: Backend) -> None:
    scores = torch.randn(3, 7, device=backend.device, requires_grad=True)
    labels = torch.tensor([0, 7, 1], device=backend.device)
    if backend.faults_raise:
        with pytest.raises(IndexError, match="got 7 at row 1"):
            ipo_ext.token_logprobs(scores, labels)
    else:
        logprobs, entropy = ipo_ext.token_logprobs(scores, labels)
        (gradient,) = torch.autograd.grad(logprobs.sum(), scores)
        assert logprobs.isnan().all()
        assert entropy.isnan().all()
        assert gradient.isnan().all()


def test_refusals_from_logits(backend: Backend) -> None:
    case = logits.random_case().to(backend.device)
    with pytest.raises(ValueError, match="logits: expected the result of an operation"):
        case.with_(logits=case.logits.requires_grad_()).call(inplace=True)
    case.logits.requires_grad_(False)
    with pytest.raises(ValueError, match=r"labels: expected shape \[9\]"):
        case.with_(labels=case.labels[:-1]).call()
    with pytest.raises(TypeError, match=r"labels: expected dtype torch\.int32"):
        case.with_(labels=case.labels.float()).call()
    with pytest.raises(ValueError, match=r"advantages: expected shape \[9\] like labels"):
        case.with_(advantages=case.advantages[:-1]).call()
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
        case.call(temperature=0.0)
    for softcap in (-1.0, math.inf):
        with pytest.raises(ValueError, match="softcap: expected a finite number > 0"):
            case.call(softcap=softcap)
    for softcap in ("30", True, torch.tensor(30.0)):
        with pytest.raises(TypeError, match="softcap: expected a float or None, got "):
            case.call(softcap=softcap)
    for scale in (0.0, -0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="logit_scale: expected a finite number > 0 or None"):
            case.call(logit_scale=scale)
    for scale in ("2", True):
        with pytest.raises(TypeError, match="logit_scale: expected a float or None, got "):
            case.call(logit_scale=scale)
    with pytest.raises(TypeError, match=r"got Tensor; a scale that is .*: pass hidden \* logit"):
        case.call(logit_scale=torch.tensor(2.0))
    with pytest.raises(ValueError, match="temperature: expected a tensor that does not require"):
        case.call(temperature=torch.ones(9, device=backend.device, requires_grad=True))
    with pytest.raises(ValueError, match=r"logits: expected shape \[\.\.\., vocabulary\]"):
        ipo_ext.token_logprobs(case.logits[:, :0], case.labels)


# -------------------------------------------------------------------------------------------------
# From hidden states


def faulty(name: str) -> tuple[HiddenCase, dict[str, Any], type[Exception], str]:
    case = hidden.random_case()
    label = case.labels.clone()
    label[case.loss_mask.nonzero()[-1]] = hidden.VOCABULARY
    return {
        "label": (case.with_(labels=label), {}, IndexError, "labels: expected a token in [0, 53)"),
        "temperature": (
            case.with_(temperature=torch.tensor(math.nan)),
            {},
            RuntimeError,
            "temperature",
        ),
        "cu_seqlens": (
            case.with_(cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)),
            {},
            RuntimeError,
            "cu_seqlens",
        ),
        "normalizer": (
            case.with_(normalizer=torch.tensor(-1.0)),
            {},
            RuntimeError,
            "normalizer",
        ),
        "num_active": (case, {"num_active": 3}, RuntimeError, "num_active: expected at least"),
        "one_too_few": (
            case,
            {"num_active": int(case.loss_mask.sum()) - 1},
            RuntimeError,
            "num_active: expected at least",
        ),
        "none_active": (case, {"num_active": 0}, RuntimeError, "num_active: expected at least"),
    }[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *("label", "temperature", "cu_seqlens", "normalizer"),
        *("num_active", "one_too_few", "none_active"),
    ],
)
def test_contract_faults_from_hidden(backend: Backend, name: str, dtype: torch.dtype) -> None:
    case, how, error, text = faulty(name)
    case = case.with_(hidden=case.hidden.to(dtype), weight=case.weight.to(dtype))
    case = case.with_(bias=BIAS.to(dtype)).to(backend.device)
    if backend.faults_raise:
        with pytest.raises(error) as raised:
            evaluate(case, **how)
        assert type(raised.value) is error
        assert str(raised.value).startswith(text)
    else:
        ours = evaluate(case, chunk_size=4, **how)
        assert ours.loss.isnan()
        for gradient in ours.gradients:
            assert gradient.isnan().all()


def test_contract_faults_of_linear_token_logprobs(backend: Backend) -> None:
    case = faulty("label")[0].to(backend.device)
    states, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    bias = BIAS.to(backend.device).requires_grad_()
    if backend.faults_raise:
        with pytest.raises(IndexError, match="labels: expected a token"):
            ipo_ext.linear_token_logprobs(states, weight, case.labels)
        return
    how = {"chunk_size": 4, "bias": bias}
    logprobs, entropy = ipo_ext.linear_token_logprobs(states, weight, case.labels, **how)
    assert logprobs.isnan().all()
    assert entropy.isnan().all()
    logprobs[0].backward()
    for leaf in (states, weight, bias):
        assert leaf.grad.isnan().all()


BIAS = torch.zeros(hidden.VOCABULARY)
WRONG_BIASES: dict[str, tuple[Any, type[Exception], str]] = {
    "of half the dtype": (
        BIAS.half(),
        TypeError,
        r"dtype torch\.float32 like hidden, got .*16; con",
    ),
    "of integers": (BIAS.long(), TypeError, r"dtype torch\.float16 or .*, got torch\.int64"),
    "a number": (1.0, TypeError, "a tensor, got float"),
    "too short": (
        BIAS[1:],
        ValueError,
        r"shape \[53\], one for each row of weight \[53, 16\], got",
    ),
    "a column": (BIAS[:, None], ValueError, r"shape \[53\], .*, got \[53, 1\]"),
    "without a dimension": (BIAS[0], ValueError, r"shape \[53\], .*, got \[\]"),
    "elsewhere": (BIAS.to("meta"), ValueError, "device .* like weight, got meta"),
}


@pytest.mark.parametrize(("bias", "error", "words"), WRONG_BIASES.values(), ids=WRONG_BIASES)
def test_biases_that_are_refused(
    backend: Backend, bias: Any, error: type[Exception], words: str
) -> None:
    case = hidden.random_case().to(backend.device)
    if isinstance(bias, torch.Tensor) and not bias.is_meta:
        bias = bias.to(backend.device)
    with pytest.raises(error, match=f"^bias: expected {words}"):
        case.call(bias=bias)
    with pytest.raises(error, match=f"^bias: expected {words}"):
        ipo_ext.linear_token_logprobs(case.hidden, case.weight, case.labels, bias=bias)


def test_refusals_from_hidden(backend: Backend) -> None:
    case = hidden.random_case().to(backend.device)
    with pytest.raises(ValueError, match=r"weight: expected shape \[vocabulary, 16\]"):
        case.with_(weight=case.weight.t()).call()
    with pytest.raises(TypeError, match=r"weight: expected dtype torch\.float32 like hidden"):
        case.with_(weight=case.weight.double()).call()
    with pytest.raises(ValueError, match=r"labels: expected shape \[37\], that of hidden"):
        case.with_(labels=case.labels[1:]).call()
    with pytest.raises(ValueError, match="num_active: expected a number >= 0"):
        case.call(num_active=-1)
    for wrong in (2.0, True, torch.tensor(3)):
        with pytest.raises(TypeError, match="num_active: expected an int or None, got"):
            case.call(num_active=wrong)
    case.call(num_active=numpy.int64(hidden.TOKENS))
    with pytest.raises(ValueError, match="chunk_size: expected a number >= 1"):
        case.call(chunk_size=0)
    with pytest.raises(ValueError, match="advantages: expected a tensor that does not require"):
        case.with_(advantages=case.advantages.requires_grad_()).call()
    dtensor = type("DTensor", (torch.Tensor,), {})
    with pytest.raises(
        TypeError, match=r"weight: expected a plain tensor, got a DTensor.*ipo_ext\.LossBatch"
    ):
        case.with_(weight=case.weight.as_subclass(dtensor)).call()
