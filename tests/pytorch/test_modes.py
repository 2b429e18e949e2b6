"""Every public function under torch's modes: autocast, determinism, streams, CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from tests.support.backends import Backend
from tests.support.cases import same_bits
from tests.support.subjects import Subject


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_for_products_alone(
    backend: Backend, subject: Subject, dtype: torch.dtype
) -> None:
    first, constants = subject.inputs(backend.device)
    first = first.to(dtype)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        inside = subject.gradient(first, *constants)
    if subject.multiplies:
        weight, *others = constants
        constants = weight.bfloat16(), *others
        first = first.bfloat16()
    assert inside.dtype == dtype
    assert same_bits(inside, subject.gradient(first, *constants).to(dtype))


def test_deterministic_mode_is_accepted(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(backend.device)
    torch.use_deterministic_algorithms(True)
    try:
        inside = subject.gradient(first, *constants)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(inside, subject.gradient(first, *constants))


# -------------------------------------------------------------------------------------------------
# Streams and graphs, where there is a GPU


@pytest.mark.cuda_only
def test_a_side_stream(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(backend.device)
    expected = subject.gradient(first, *constants)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradient = subject.gradient(first, *constants)
    torch.cuda.current_stream().wait_stream(stream)
    assert same_bits(gradient, expected)


@pytest.mark.cuda_only
def test_a_captured_graph_follows_its_inputs(backend: Backend, subject: Subject) -> None:
    first, constants = subject.inputs(backend.device)
    leaf = first.clone().requires_grad_()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # warm-up, as torch asks for before a capture
        subject.gradient(leaf, *constants)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = subject.gradient(leaf, *constants)
    other = first.flip(0)
    leaf.data.copy_(other)
    graph.replay()
    assert same_bits(gradient, subject.gradient(other, *constants))
