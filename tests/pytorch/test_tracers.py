"""Other tracers: make_fx, export, packages of AOTInductor, fake tensors, pytrees."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ipo_ext import IPOLoss, IPOMetrics, IPOOutput, ipo_loss
from tests.support.backends import Backend
from tests.support.cases import LogprobsCase, same_bits
from tests.support.forms import FORMS, TOKENS, assert_same_tree, leaf, loss_of, token_arguments
from tests.support.logprobs import random_case
from tests.support.subjects import SUBJECTS, Subject, per_token

# -------------------------------------------------------------------------------------------------
# Every public function


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_traces_the_gradient(backend: Backend, subject: Subject, mode: str) -> None:
    first, constants = subject.inputs(backend.device)
    graph = make_fx(subject.gradient, tracing_mode=mode)(first, *constants)
    other, others = subject.inputs(backend.device)
    assert same_bits(graph(other, *others), subject.gradient(other, *others))


class Objective(nn.Module):
    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.subject.objective(*inputs)


def test_every_function_exports(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(backend.device)
    tokens = torch.export.Dim("tokens")
    shapes = tuple({0: tokens} if per_token(tensor) else None for tensor in (first, *constants))
    program = torch.export.export(
        Objective(subject), (first, *constants), dynamic_shapes={"inputs": shapes}
    )
    first, constants = subject.inputs(backend.device, 9)
    expected = subject.objective(first, *constants)
    assert same_bits(program.module()(first, *constants), expected)


class Everything(nn.Module):
    """Every public function in one graph: a package takes the C++ compiler seconds."""

    def forward(self, inputs: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: subject.objective(*inputs[name]) for name, subject in SUBJECTS.items()}


def everything(device: torch.device) -> dict[str, list[torch.Tensor]]:
    def inputs(subject: Subject) -> list[torch.Tensor]:
        first, constants = subject.inputs(device)
        return [first, *constants]

    return {name: inputs(subject) for name, subject in SUBJECTS.items()}


def test_aot_inductor_package(backend: Backend, tmp_path: Path) -> None:
    inputs = everything(backend.device)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(Everything(), (inputs,)), package_path=str(tmp_path / "loss.pt2")
    )
    results = torch._inductor.aoti_load_package(package)(inputs)
    torch.testing.assert_close(results, Everything()(inputs))


# -------------------------------------------------------------------------------------------------
# From log-probabilities


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_loss_and_gradient(backend: Backend, mode: str) -> None:
    case = random_case(TOKENS).to(backend.device)

    def both(*tokens: torch.Tensor) -> list[torch.Tensor]:
        loss = ipo_loss(*tokens).loss
        return [loss.detach(), *torch.autograd.grad(loss, tokens[0])]

    arguments = (leaf(case), *token_arguments(case)[1:])
    graph = make_fx(both, tracing_mode=mode)(*arguments)
    assert_same_tree(graph(*arguments), both(*arguments))


@pytest.mark.parametrize("strict", [False, True])
def test_export(backend: Backend, strict: bool) -> None:
    tokens = torch.export.Dim("tokens")
    names = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")
    arguments = token_arguments(random_case(TOKENS).to(backend.device))
    program = torch.export.export(
        IPOLoss(), arguments, dynamic_shapes={key: {0: tokens} for key in names}, strict=strict
    )
    other = token_arguments(random_case(37, seed=1).to(backend.device))
    assert_same_tree(program.module()(*other), ipo_loss(*other))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_can_be_saved(backend: Backend, strict: bool) -> None:
    case = FORMS["packed"]().to(backend.device)
    optional = {"cu_seqlens": case.cu_seqlens}
    arguments = token_arguments(case)
    program = torch.export.export(IPOLoss(), arguments, optional, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert_same_tree(loaded(*arguments, **optional), ipo_loss(*arguments, **optional))


def test_an_output_is_a_pytree(case: LogprobsCase) -> None:
    output = case.call()
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t * 2, output)
    assert isinstance(doubled, IPOOutput)
    assert isinstance(doubled.metrics, IPOMetrics)
    assert same_bits(doubled.loss, output.loss * 2)
    assert same_bits(doubled.metrics["is_masked"], output.metrics["is_masked"] * 2)
    assert list(doubled.metrics.keys()) == list(output.metrics.keys())


def test_fakes_run_a_whole_step(case: LogprobsCase) -> None:
    with FakeTensorMode() as mode:
        fake = case.with_(**{k: mode.from_tensor(v) for k, v in case.tensors.items()})
        trainer = leaf(fake)
        (gradient,) = torch.autograd.grad(loss_of(fake)(trainer), trainer)
    assert gradient.shape == trainer.shape
