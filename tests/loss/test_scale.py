"""The operators that scale a gradient: rounded once, in place or into a narrower dtype."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.backends import Backend
from tests.support.layouts import misaligned
from tests.support.operators import operator
from tests.support.schedules import MULTIPROCESSORS, imagined_device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1 / 3, 1e-3, 3e4, 2.0**-14])
def test_scale_rounds_every_number_as_torch(
    backend: Backend, dtype: torch.dtype, factor: float
) -> None:
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    everything = everything.to(backend.device)
    scale = torch.tensor(factor, device=backend.device)
    expected = (everything.float() * scale).to(dtype)
    for part in (everything, everything[1:]):
        ours = part.clone() if part.data_ptr() % 16 == 0 else misaligned(part[None])[0]
        operator("scale_")(ours, scale)
        torch.testing.assert_close(
            ours, expected[-len(ours) :], rtol=0, atol=0, equal_nan=True, check_device=False
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, -1 / 3, 0.0, math.nan])
def test_scale_into_a_narrower_dtype_rounds_once(
    backend: Backend, dtype: torch.dtype, factor: float
) -> None:
    """Around whole groups of 4, starting on 16 bytes or not."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    between = (halves.float() * (1 + 2.0**-12)).to(backend.device)  # and no number of the dtype
    scale = torch.tensor(factor, device=backend.device)
    for count in (0, 1, 3, 4, 5, 1023, 1030, 2**16):
        for gradient in (between[:count], misaligned(between[None, :count])[0]):
            expected = (gradient * scale).to(dtype)
            for out in (torch.empty_like(expected), misaligned(expected[None])[0].fill_(7)):
                operator("scale_into")(gradient, scale, out)
                torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.tempts_kernels_out_of_bounds
@pytest.mark.parametrize("width", [1, 7, 8, 600, 1031])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scale_of_rows_that_lie_apart(backend: Backend, dtype: torch.dtype, width: int) -> None:
    """Rounded once; for 1 nothing is touched; rows aligned for vectors or not."""
    generator = torch.Generator().manual_seed(0)
    for begin, row in ((0, width + 8 - width % 8), (0, width + 1), (3, width + 8)):
        room = torch.randn(3, 8, row, generator=generator).to(backend.device, dtype)
        before, factor = room.clone(), torch.tensor(0.3, device=backend.device)
        cut = (slice(None), slice(None, -1), slice(begin, begin + width))
        operator("scale_")(room[cut], torch.ones_like(factor))
        assert torch.equal(room, before)
        operator("scale_")(room[cut], factor)
        wide = torch.promote_types(dtype, torch.float32)
        expected = before.clone()
        expected[cut] = (before[cut].to(wide) * factor.to(wide)).to(dtype)
        assert torch.equal(room, expected)


def test_scale_by_a_factor_in_the_memory_of_the_gradient(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    for gradient in (torch.randn(70_000, generator=generator), torch.randn(90, 800)[:, :700]):
        gradient = gradient.to(backend.device).detach()
        expected = gradient * gradient.flatten()[0].clone()
        operator("scale_")(gradient, gradient[0] if gradient.dim() == 1 else gradient[0, 0])
        assert torch.equal(gradient, expected)


@pytest.mark.emulated
def test_scale_goes_round_on_a_small_device() -> None:
    """More elements than one round of the grid takes on one multiprocessor."""
    gradient = torch.randn(2**17 + 3)
    expected = gradient * 3
    with imagined_device({MULTIPROCESSORS: 1}), Backend("emulated").active():
        operator("scale_")(gradient, torch.tensor(3.0))
    assert torch.equal(gradient, expected)


@pytest.mark.emulated
def test_scale_of_rows_goes_round_on_a_small_device() -> None:
    """More rows than one multiprocessor has blocks, each longer than a block's threads reach."""
    gradient = torch.randn(11, 1500)[:, :1203]
    expected = gradient * 3
    with imagined_device({MULTIPROCESSORS: 1}), Backend("emulated").active():
        operator("scale_")(gradient, torch.tensor(3.0))
    assert torch.equal(gradient, expected)


def test_scale_refuses_what_it_cannot_write(backend: Backend) -> None:
    scale = torch.tensor(2.0, device=backend.device)
    gradient = torch.ones(4, device=backend.device)
    for out in (gradient[:3], gradient.double(), gradient.int(), gradient.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match=r"^out: expected "):
            operator("scale_into")(gradient, scale, out)
    with pytest.raises(RuntimeError, match=r"^gradient: expected a floating dtype"):
        operator("scale_")(gradient.int(), scale)
