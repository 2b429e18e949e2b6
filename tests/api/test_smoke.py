"""A minute's proof that an installed package works: what abi_matrix.py runs under every torch."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from ipo_ext import _C, ipo_loss, reference
from ipo_ext.diagnostics import info
from tests.support.backends import Backend
from tests.support.cases import assert_same_bits, evaluate
from tests.support.logprobs import DTYPES, random_case
from tests.support.operators import opcheck
from tests.support.subjects import SUBJECTS, Subject


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
    assert ours.metrics.keys() == exact.metrics.keys()
    for name, value in exact.metrics.items():
        torch.testing.assert_close(
            ours.metrics[name].double(), value.double(), rtol=1e-5, atol=1e-6
        )


def test_compiled_equals_eager(backend: Backend) -> None:
    case = random_case(500, segments="empty-between", normalizer=7.5).to(backend.device)
    torch._dynamo.reset()
    function = torch.compile(ipo_loss, fullgraph=True, dynamic=True)
    assert_same_bits(evaluate(case, function), evaluate(case))


def test_opcheck(backend: Backend) -> None:
    case = random_case(100).to(backend.device)
    opcheck("ipo_loss", case, trainer_logprobs=case.trainer_logprobs.requires_grad_())


# ---------------------------------------------------------------------------------------------
# What a machine without a GPU can know of CUDA

OPERATORS = info.operators()


@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_are_registered(name: str) -> None:
    assert "CPU" in OPERATORS[name]
    assert ("CUDA" in OPERATORS[name]) == bool(_C.CUDA_ARCHITECTURES)


def outputs(subject: Subject, device: str, requires_grad: bool) -> list[torch.Tensor]:
    """What a public function gives on ``device``, whose tensors hold nothing."""
    first, constants = subject.inputs("cpu")
    leaf, *rest = (torch.empty_like(tensor, device=device) for tensor in (first, *constants))
    made = subject.function(leaf.requires_grad_(requires_grad), *rest)
    tensors = [tensor for tensor in pytree.tree_leaves(made) if isinstance(tensor, torch.Tensor)]
    if requires_grad:
        (gradient,) = torch.autograd.grad(tensors[0].sum(), leaf)
        assert gradient.shape == leaf.shape
    return tensors


@pytest.mark.parametrize("function", SUBJECTS)
def test_fakes_trace_on_meta(function: str) -> None:
    assert {tensor.device.type for tensor in outputs(SUBJECTS[function], "meta", True)} == {"meta"}


@pytest.mark.skipif(not _C.CUDA_ARCHITECTURES, reason="a build without CUDA")
@pytest.mark.parametrize("function", SUBJECTS)
def test_fakes_trace_for_cuda(function: str) -> None:
    with FakeTensorMode():  # its CUDA tensors need no GPU; a CPU build of torch has no autograd
        made = outputs(SUBJECTS[function], "cuda", requires_grad=False)
    assert {tensor.device.type for tensor in made} == {"cuda"}
