"""What autograd saves: inputs of which backward needs no value may change, or be inference's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ipo_ext
from ipo_ext import IPOConfig
from tests.support import hidden, logits, logprobs
from tests.support.backends import Backend
from tests.support.cases import Case, HiddenCase, LogitsCase, bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOKENS = 20

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def with_every_input(case: Case) -> Case:
    tokens = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1))
    more: dict[str, Any] = {} if not hasattr(case, "labels") else {"temperature": tokens + 0.5}
    return case.with_(
        teacher_logprobs=-tokens,
        loss_weights=tokens + 0.5,
        cu_seqlens=torch.tensor([0, 7, TOKENS], dtype=torch.int32),
        normalizer=torch.tensor(13.0),
        config=IPOConfig(teacher_tau=0.3),
        **more,
    )


def from_logprobs(dtype: torch.dtype) -> Case:
    case = with_every_input(logprobs.random_case(TOKENS))
    return case.with_(trainer_logprobs=case.trainer_logprobs.to(dtype))


def from_logits(dtype: torch.dtype) -> Case:
    return with_every_input(logits.random_case(TOKENS, 33, dtype))


def from_hidden(dtype: torch.dtype) -> Case:
    return with_every_input(hidden.random_case(TOKENS, dtype=dtype, has_bias=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogprobsCase(LogitsCase):
    function = staticmethod(ipo_ext.token_logprobs)
    operands = ("logits", "labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearTokenLogprobsCase(HiddenCase):
    function = staticmethod(ipo_ext.linear_token_logprobs)
    operands = ("hidden", "weight", "labels")


def of_logprobs(case: Case, kind: type[Case]) -> Case:
    """A call for log-probabilities of the same inputs."""
    names = ("labels", "temperature", *case.leaves)
    others = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return kind(**{name: others[name] for name in others if name in names or name in REQUIRED})


REQUIRED = ("inference_logprobs", "advantages", "loss_mask")


def gradients_of(case: Case, spoil: Callable[[Case, Any], None] | None = None) -> list[Any]:
    """By all leaves at once; ``spoil`` may do as it likes between forward and backward."""
    leaves = [getattr(case, name).detach().requires_grad_() for name in case.leaves]
    case = case.with_(**{n: leaf * 1 for n, leaf in zip(case.leaves, leaves, strict=True)})
    if isinstance(case, (TokenLogprobsCase, LinearTokenLogprobsCase)):
        operands = [getattr(case, name) for name in case.operands]
        more = {"bias": case.bias} if "bias" in case.leaves else {}
        output = type(case).function(*operands, temperature=case.temperature, **more)
        target = (output[0] * 2 + output[1]).sum()
    else:
        output = case.call()
        target = output.loss * 0.3
    if spoil is not None:
        spoil(case, output)
    return [bits(gradient) for gradient in torch.autograd.grad(target, leaves)]


LOSSES = {"ipo_loss": from_logprobs, "from_logits": from_logits, "from_hidden": from_hidden}
LOGPROBS: dict[str, Callable[[torch.dtype], Case]] = {
    "token_logprobs": lambda dtype: of_logprobs(from_logits(dtype), TokenLogprobsCase),
    "linear_token_logprobs": lambda dtype: of_logprobs(from_hidden(dtype), LinearTokenLogprobsCase),
}


def constants_of(case: Case) -> list[str]:
    names = [name for name in case.tensors if name not in case.leaves]
    is_loss = not isinstance(case, (TokenLogprobsCase, LinearTokenLogprobsCase))
    return names if is_loss else [name for name in names if name not in REQUIRED]


@dtypes
@pytest.mark.parametrize("form", [*LOSSES, *LOGPROBS])
def test_inputs_made_under_inference_mode(backend: Backend, form: str, dtype: torch.dtype) -> None:
    case = {**LOSSES, **LOGPROBS}[form](dtype).to(backend.device)
    expected = gradients_of(case)
    for name in constants_of(case):
        with torch.inference_mode():
            made = case.tensors[name].clone()
        for ours, other in zip(gradients_of(case.with_(**{name: made})), expected, strict=True):
            assert torch.equal(ours, other), name


def zero(name: str, called: Case, _: Any) -> None:
    called.tensors[name].detach().zero_()


@dtypes
@pytest.mark.parametrize("form", LOSSES)
def test_inputs_of_a_loss_may_change_before_backward(
    backend: Backend, form: str, dtype: torch.dtype
) -> None:
    case = LOSSES[form](dtype).to(backend.device)
    expected = gradients_of(case)
    for name in (*constants_of(case), *case.leaves):
        copy = case.with_(**{k: v.clone() for k, v in case.tensors.items()})
        change = functools.partial(zero, name)
        for ours, other in zip(gradients_of(copy, change), expected, strict=True):
            assert torch.equal(ours, other), name


@dtypes
@pytest.mark.parametrize("form", LOGPROBS)
def test_what_log_probabilities_were_made_of_may_not_change(
    backend: Backend, form: str, dtype: torch.dtype
) -> None:
    """Backward reads it again: as of every function of torch, a change raises."""
    case = LOGPROBS[form](dtype).to(backend.device)
    for name in (*constants_of(case), *case.leaves):
        copy = case.with_(**{k: v.clone() for k, v in case.tensors.items()})
        change = functools.partial(zero, name)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients_of(copy, change)


@dtypes
@pytest.mark.parametrize("form", [*LOSSES, *LOGPROBS])
def test_outputs_may_change_before_backward(
    backend: Backend, form: str, dtype: torch.dtype
) -> None:
    """Entropies of tokens that do not train are often masked where they lie."""
    case = {**LOSSES, **LOGPROBS}[form](dtype).to(backend.device)
    expected = gradients_of(case)

    def change(_: Case, output: Any) -> None:
        is_loss = isinstance(output, ipo_ext.IPOOutput)
        outputs = (output.logprobs, output.entropy) if is_loss else output
        for tensor in outputs:
            if tensor is not None:
                tensor.detach().zero_()

    for ours, other in zip(gradients_of(case, change), expected, strict=True):
        assert torch.equal(ours, other)
