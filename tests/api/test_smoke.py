"""A minute's proof that an installed package works: what abi_matrix.py runs under every torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

import ipo_ext
from ipo_ext import _C, _operators, ipo_loss, reference
from ipo_ext.diagnosis import info
from tests.support.backends import Backend
from tests.support.cases import DTYPES, assert_same_bits, evaluate, random_case


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("segments", [None, "sevens"])
def test_loss_gradient_and_metrics(backend: Backend, dtypes: str, segments: str | None) -> None:
    case = random_case(
        2049, dtypes=DTYPES[dtypes], teacher=True, weights=True, segments=segments
    ).to(backend.device)
    ours = evaluate(case)
    exact = evaluate(case, reference.ipo_loss, dtype=torch.float64)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.gradient, exact.gradient)
    assert set(ours.metrics) == set(exact.metrics)
    for name in exact.metrics:
        torch.testing.assert_close(
            ours.metrics[name].double(), exact.metrics[name].double(), rtol=1e-5, atol=1e-6
        )


def test_compiled_equals_eager(backend: Backend) -> None:
    case = random_case(500, segments="empty-between", normalizer=7.5).to(backend.device)
    torch._dynamo.reset()
    function = torch.compile(ipo_loss, fullgraph=True, dynamic=True)
    assert_same_bits(evaluate(case, function), evaluate(case))


def test_opcheck(backend: Backend) -> None:
    case = random_case(100).to(backend.device)
    arguments = [case.trainer_logprobs.requires_grad_(), case.inference_logprobs]
    arguments += [case.advantages, case.loss_mask, None, None, None, None]
    arguments += [*case.config.settings(torch.float32), True]
    torch.library.opcheck(_operators.library().ipo_loss, arguments)


# ---------------------------------------------------------------------------------------------
# What a machine without a GPU can know of CUDA

OPERATORS = info.operators()


@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_are_registered(name: str) -> None:
    assert "CPU" in OPERATORS[name]
    assert ("CUDA" in OPERATORS[name]) == bool(_C.CUDA_ARCHITECTURES)


def outputs(function: str, device: str, requires_grad: bool) -> list[torch.Tensor]:
    """What a public function gives for [5] tokens (and 7 logits each) on ``device``."""
    values = torch.empty(5, device=device)
    mask = torch.empty(5, dtype=torch.bool, device=device)
    labels = torch.empty(5, dtype=torch.int64, device=device)
    logits = torch.empty(5, 7, device=device, requires_grad=requires_grad)
    trainer = torch.empty(5, device=device, requires_grad=requires_grad)
    hidden = torch.empty(5, 3, device=device, requires_grad=requires_grad)
    weight = torch.empty(7, 3, device=device, requires_grad=requires_grad)
    arguments: dict[str, tuple[Any, ...]] = {
        "ipo_loss": (trainer, values, values, mask),
        "ipo_loss_from_logits": (logits, labels, values, values, mask),
        "ipo_loss_from_hidden": (hidden, weight, labels, values, values, mask),
        "token_logprobs": (logits, labels),
        "linear_token_logprobs": (hidden, weight, labels),
    }
    made = getattr(ipo_ext, function)(*arguments[function])
    tensors = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, torch.Tensor)]
    if requires_grad:
        leaf = arguments[function][0]
        (gradient,) = torch.autograd.grad(tensors[0].sum(), leaf)
        assert gradient.shape == leaf.shape
    return tensors


PUBLIC = [name for name in ipo_ext.__all__ if "loss" in name or "logprobs" in name]


@pytest.mark.parametrize("function", PUBLIC)
def test_fakes_trace_on_meta(function: str) -> None:
    assert {tensor.device.type for tensor in outputs(function, "meta", True)} == {"meta"}


@pytest.mark.skipif(not _C.CUDA_ARCHITECTURES, reason="a build without CUDA")
@pytest.mark.parametrize("function", PUBLIC)
def test_fakes_trace_for_cuda(function: str) -> None:
    with FakeTensorMode():  # its CUDA tensors need no GPU; a CPU build of torch has no autograd
        made = outputs(function, "cuda", requires_grad=False)
    assert {tensor.device.type for tensor in made} == {"cuda"}
