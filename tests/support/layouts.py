"""Tensors that lie in memory as callers' may: misaligned, strided, over one another."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def misaligned(tensor: torch.Tensor, elements: int = 1) -> torch.Tensor:
    """A copy that begins ``elements`` elements past an aligned address."""
    room = tensor.new_empty(tensor.numel() + elements)
    return room[elements:].view(tensor.shape).copy_(tensor)


def strided(matrix: torch.Tensor) -> torch.Tensor:
    """A copy whose rows are the first columns of a wider matrix's, NaN between."""
    rows, columns = matrix.shape
    room = matrix.new_full((rows, columns + 3), math.nan)
    room[:, :columns] = matrix
    return room[:, :columns]


def strided_within(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    """``[rows, columns]`` of a flat tensor as rows inside a wider matrix, NaN (or True) around."""
    rows = tensor.numel() // columns
    filler = True if tensor.dtype == torch.bool else math.nan
    room = tensor.new_full((rows, columns + 3), filler)
    room[:, 1:-2] = tensor[: rows * columns].view(rows, columns)
    return room[:, 1:-2]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda matrix: matrix,
    "strided": strided,
    "unaligned": misaligned,
    "transposed": lambda matrix: matrix.t().contiguous().t(),
}


def at_row_starts(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same shape in a narrower dtype, or the same, each row at the address of that row."""
    return matrix.view(dtype)[..., : matrix.shape[-1]]
