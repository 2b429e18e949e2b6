"""Ids that a sampler may have drawn a token from: what a sampling mask holds."""

from __future__ import annotations

import torch

PADDING = -1


def random_ids(
    labels: torch.Tensor,
    columns: int,
    width: int,
    generator: torch.Generator,
    *,
    replayed: float = 0.7,
    padding: float = 0.3,
) -> torch.Tensor:
    """``[rows, width]`` int32, each row's distinct and in no order, with its label or without.

    Of the rows about ``replayed`` contain it; of the other ids about ``padding`` are left out, so
    that some rows have few or none.
    """
    rows = len(labels)
    ids = torch.rand(rows, columns, generator=generator).argsort(-1)
    ids = ids[ids != labels[:, None]].view(rows, columns - 1)
    room = torch.full((rows, max(width - columns + 1, 0)), PADDING)
    ids = torch.cat([ids, room], 1)[:, :width]
    left_out = torch.rand(rows, width, generator=generator) < padding
    ids = ids.masked_fill(left_out, PADDING)
    contains = torch.rand(rows, generator=generator) < replayed
    place = torch.randint(width, (rows,), generator=generator)
    chosen = torch.where(contains, labels, ids[torch.arange(rows), place])
    ids[torch.arange(rows), place] = chosen
    return ids.to(torch.int32)


def outside(sampling_mask: torch.Tensor, labels: torch.Tensor, columns: int) -> torch.Tensor:
    """``[rows, columns]``: what a row that replays its ids does not contain."""
    rows = len(labels)
    inside = torch.zeros(rows, columns + 1, dtype=torch.bool)
    inside[torch.arange(rows)[:, None], sampling_mask.long()] = True  # -1: the last column
    replays = (sampling_mask == labels[:, None]).any(-1) & (labels >= 0)
    return ~inside[:, :columns] & replays[:, None]
