"""What ranks need to know of each other: which tokens of packed sequences each has under context
parallelism, and what their losses are divided by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist

from ipo_ext._groups import Group, process_group
from ipo_ext._ops.torch_internals import summed_later

Layout = Literal["contiguous", "zigzag", "zigzag_per_sequence"]


class LocalSequences(NamedTuple):
    """A rank's tokens of packed sequences; its runs of one sequence each are pieces.

    Attributes:
        cu_seqlens: int32 ``[pieces + 1]``, the first token of each piece in the rank's own order,
            then the number of its tokens.
        sequence_ids: int32 ``[pieces]``, of which sequence each is a piece.
        token_index: int64 ``[tokens]``, the rank's tokens as indices into the whole batch.
    """

    cu_seqlens: torch.Tensor
    sequence_ids: torch.Tensor
    token_index: torch.Tensor


def local_sequences(
    cu_seqlens: torch.Tensor | Sequence[int],
    rank: int,
    world: int,
    layout: Layout = "contiguous",
) -> LocalSequences:
    """Which tokens a rank of a context-parallel group has, and what they are pieces of.

    Labels, log-probabilities and all else that belongs to tokens is sharded as the logits are, so
    shift labels before: ``labels[t]`` is the token that ``logits[t]`` predicts, and the rank that
    has the one need not have the other's neighbour.

    Args:
        cu_seqlens: int32 ``[sequences + 1]``, the first token of each packed sequence of the whole
            batch, then the number of its tokens. Read on the host: call it where batches are made.
        rank: of the group, from 0.
        world: the group's size.
        layout: how tokens are spread. "contiguous": chunk r of ``world`` of the whole batch
            (prime-rl). "zigzag": chunks r and 2 * world - 1 - r of 2 * world (torch's
            ``context_parallel``). "zigzag_per_sequence": those two of each sequence (Megatron,
            Transformer Engine). Chunks have the length rounded up, the last ones what is left;
            hosts pad until all are equal.

    Returns:
        ``LocalSequences``, on the device of ``cu_seqlens``: what the losses take as ``cu_seqlens``
        and ``sequence_ids``, and which tokens to take of everything that belongs to tokens.

    Raises:
        TypeError: ``rank`` or ``world`` is no int.
        ValueError: an argument is not as above, or ``cu_seqlens`` does not ascend from 0.

    Example:
        >>> ends, ids, index = local_sequences(cu_seqlens, rank, world, "zigzag")
        >>> out = ipo_loss(
        ...     trainer_of_rank, inference[index], advantages[index], mask[index], cu_seqlens=ends,
        ...     sequence_ids=ids, num_sequences=len(cu_seqlens) - 1, cp_group=cp_group,
        ... )
    """
    ends = torch.as_tensor(cu_seqlens)
    _check(ends, rank, world, layout)
    begins = ends.tolist()
    if layout == "contiguous":
        spans = [_chunk(0, begins[-1], rank, world)]
    elif layout == "zigzag":
        spans = _zigzag(0, begins[-1], rank, world)
    else:
        cuts = itertools.pairwise(begins)
        spans = [span for cut in cuts for span in _zigzag(*cut, rank, world)]
    index = torch.cat([torch.arange(0), *(torch.arange(*span) for span in spans)])
    sequences = torch.searchsorted(torch.tensor(begins[1:]), index, right=True)
    is_first = sequences.diff(prepend=torch.tensor([-1])) != 0
    first = is_first.nonzero().flatten()
    local_ends = torch.cat([first, torch.tensor([len(index)])]).int()
    made = LocalSequences(local_ends, sequences[first].int(), index)
    return LocalSequences(*(tensor.to(ends.device) for tensor in made))


def _chunk(begin: int, end: int, part: int, parts: int) -> tuple[int, int]:
    """Where one of so many chunks lies: of the length rounded up, the last ones shorter."""
    size = -((begin - end) // parts)
    return min(begin + part * size, end), min(begin + (part + 1) * size, end)


def _zigzag(begin: int, end: int, rank: int, world: int) -> list[tuple[int, int]]:
    """A chunk from the front and its like from the back, so that causal attention costs alike."""
    parts = 2 * world
    return [_chunk(begin, end, part, parts) for part in (rank, parts - 1 - rank)]


_INTEGERS = (torch.int32, torch.int64)


def _check(ends: torch.Tensor, rank: int, world: int, layout: str) -> None:
    if layout not in get_args(Layout):
        raise ValueError(f"layout: expected one of {list(get_args(Layout))}, got {layout!r}")
    for name, value in (("rank", rank), ("world", world)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected one of [0, {world}), world, got {rank!r}")
    if ends.dim() != 1 or len(ends) == 0 or ends.dtype not in _INTEGERS:
        raise ValueError(
            f"cu_seqlens: expected integers [sequences + 1], got {ends.dtype}{list(ends.shape)}"
        )
    if ends[0] != 0 or (ends.diff() < 0).any():
        raise ValueError(f"cu_seqlens: expected numbers that ascend from 0, got {ends.tolist()}")


# -------------------------------------------------------------------------------------------------
# What a loss is divided by


def normalizer(
    num_tokens: int | torch.Tensor,
    group: Group | None = None,
    *,
    average_over: Group | int | None = None,
) -> torch.Tensor:
    """The losses' ``normalizer`` that makes a trainer's gradient that of the global token mean.

    The global number of tokens, divided by the number of ranks over which the trainer averages
    gradients, as FSDP and DDP do. Each token must be counted once: ``group`` holds the ranks with
    different tokens (data parallel and context parallel), never the tensor-parallel ones.

    The count is summed by one asynchronous all-reduce, which is waited for where the result is
    used first. Call it before the model's forward pass, which it then runs beside; nothing is
    synchronised with the host.

    Args:
        num_tokens: of this rank that train, ``loss_mask.sum()``: a 0-dim tensor on a device that
            the group's backend takes, or an int, for one that takes CPU tensors. With several
            micro-batches a step, those of all of them.
        group: a process group or a device mesh of one dimension; default all ranks.
        average_over: the ranks over which the trainer averages, a group or their number; default
            those of ``group``. The data-parallel ones where it adds over context-parallel ones; 1
            where it adds over all (FSDP2's ``set_gradient_divide_factor(1.0)``).

    Returns:
        A 0-dim float64 tensor on the device of ``num_tokens``, 0 where no rank has a token: the
        loss is then 0.

    Raises:
        TypeError, ValueError: an argument is not as above, or there is no process group yet.

    Example:
        >>> count = normalizer(batch.loss_mask.sum(), mesh["dp_cp"].get_group())
        >>> logits = model(batch.tokens)
        >>> out = ipo_loss_from_logits(logits, ..., normalizer=count)
    """
    count = torch.as_tensor(num_tokens)
    if count.dim() != 0 or count.is_floating_point() or count.dtype == torch.bool:
        raise ValueError(
            f"num_tokens: expected an int or a 0-dim tensor of integers, got "
            f"{count.dtype}{list(count.shape)}"
        )
    if group is None and not dist.is_initialized():
        raise ValueError(
            "group: expected a process group, got None where there is none to default to; call "
            "torch.distributed.init_process_group first, or, in a process without others, pass "
            "num_tokens itself as the loss's normalizer"
        )
    ranks = process_group("group", dist.group.WORLD if group is None else group)
    averaged = _number_of("average_over", ranks if average_over is None else average_over)
    return summed_later(count.double() / averaged, ranks)


def _number_of(name: str, ranks: Group | int) -> int:
    if isinstance(ranks, bool) or not isinstance(ranks, int):
        return process_group(name, ranks).size()
    if ranks < 1:
        raise ValueError(f"{name}: expected at least 1 rank, got {ranks}")
    return ranks
