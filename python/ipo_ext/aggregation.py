"""How the losses of tokens become one number: weights and normalizer of each aggregation mode.

    loss = sum over tokens of loss_weights * token loss / normalizer

Every mode is one pair of them, made of counts alone: nothing is synchronised, and a sequence, or a
rank, without a token that trains weighs nothing.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch

from ipo_ext._groups import Group, process_group
from ipo_ext._numbers import is_number
from ipo_ext._ops.checks import Like, check_device, check_tensor
from ipo_ext._ops.torch_internals import is_eager, summed_later

Mode = Literal[
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "group_mean_token_mean",
    "constant",
]


_OF_GROUPS = ("group_mean_token_mean",)
_MEANS_OF_MEANS = ("sequence_mean_token_mean", "group_mean_token_mean")

# Counts of a call that breaks its contract: negative in whatever sum they go into.
_FAULTY = -(2**43)


class _Sequences(NamedTuple):
    """Where each token belongs."""

    of_token: torch.Tensor  # int64 [tokens]
    lengths: torch.Tensor  # int64 [sequences]: tokens that train
    groups: torch.Tensor | None  # int64 [sequences]
    faulty: torch.Tensor  # bool, 0-dim


def aggregation_counts(
    mode: Mode,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    groups: torch.Tensor | None = None,
    num_groups: int | None = None,
    group: Group | None = None,
) -> torch.Tensor:
    """What ``aggregate`` must know of a whole step; counts of micro-batches may be added.

    Args:
        mode, loss_mask, cu_seqlens, groups: as for ``aggregate``.
        num_groups: prompt groups of the step, over all ranks; needed for "group_mean_token_mean",
            where ``groups`` holds ids below it.
        group: the ranks over which the counts are summed, one small all-reduce that is waited for
            where they are used first: a process group or a device mesh of one dimension; default
            none. As for ``ipo_ext.distributed.normalizer``, no two with the same tokens.

    Returns:
        Counts in int64 on the mask's device, ``[2]``: tokens that train and sequences that have
        one. For "group_mean_token_mean" ``[num_groups]``, the tokens of each group. A contract that
        CUDA cannot check without synchronising makes them negative.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as for ``aggregate``.

    Example:
        >>> micro_batches = mask.split(1)
        >>> counts = sum(aggregation_counts("token_mean", part) for part in micro_batches)
        >>> weights, normalizer = aggregate("token_mean", micro_batches[0], step_counts=counts)
    """
    _check_mode(mode)
    by_group = mode in _OF_GROUPS
    if by_group and num_groups is None:
        raise ValueError(
            f"num_groups: expected the number of prompt groups of the step, as mode is {mode!r}, "
            "got None"
        )
    _refuse("num_groups", num_groups, unless=by_group, mode=mode)
    # A rank that raised would leave the others waiting: among ranks the counts tell all of them.
    may_raise = group is None
    sequences = _sequences(mode, loss_mask, cu_seqlens, groups, num_groups, may_raise)
    lengths = sequences.lengths
    if sequences.groups is None or num_groups is None:
        counts = torch.stack([lengths.sum(), (lengths > 0).sum()])
    else:
        counts = lengths.new_zeros(num_groups).scatter_add_(0, sequences.groups, lengths)
    counts = torch.where(sequences.faulty, _FAULTY, counts)
    return counts if group is None else summed_later(counts, process_group("group", group))


def aggregate(
    mode: Mode,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    groups: torch.Tensor | None = None,
    length: float | None = None,
    step_counts: torch.Tensor | None = None,
    group: Group | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """``loss_weights`` and ``normalizer`` with which any loss of this package means ``mode``.

    With n tokens that train in S sequences that have one, n_s in a sequence, n_g in each of G
    prompt groups:

    ========================== ================= ============ ===================================
    mode                       weight of a token normalizer   the loss
    ========================== ================= ============ ===================================
    "token_mean"               1                 n            mean over tokens
    "sequence_mean_token_mean" n / (S n_s)       n            mean over sequences of token means
    "sequence_mean_token_sum"  1                 S            mean over sequences of token sums
    "group_mean_token_mean"    n / (G n_g)       n            mean over groups of token means
    "constant"                 1                 S * length   token sums over a fixed length
    ========================== ================= ============ ===================================

    Weights average 1 over the step's tokens, so that ``pg_loss`` and ``kl_loss`` of the metrics,
    means over tokens, are the aggregated ones. docs/integrations.md says which trainer means which.

    Args:
        mode: one of the above.
        loss_mask: ``[...]``, bool: the tokens that train. Without ``cu_seqlens`` the last dimension
            is a sequence.
        cu_seqlens: int32 ``[sequences + 1]``, the first token of each packed sequence, then the
            number of tokens. A sequence must lie whole in one call.
        groups: int32 or int64, the prompt group of each sequence, from 0: ``[sequences]`` with
            ``cu_seqlens``, else the mask's shape without its last dimension. A group may be spread
            over micro-batches and ranks.
        length: what "constant" divides each sequence's sum by (Dr. GRPO: the longest completion).
        step_counts: ``aggregation_counts`` of the whole step, of the same mode; default those of
            this call (for groups: as many as it has sequences).
        group: the ranks over which this call's counts are summed; not beside ``step_counts`` and
            not for groups: ``aggregation_counts(..., group=group)`` sums those. Trainers that then
            average the gradient over ranks want the normalizer divided by their number. A contract
            that one rank's call breaks makes the normalizer of every rank NaN.

    Returns:
        The weights, fp32 like the mask (None where all are 1), and the normalizer, an fp64 0-dim
        tensor. It is 0 where nothing trains, which gives loss 0 and zero gradients. On CUDA, where
        looking would synchronise, a ``cu_seqlens`` that is no partition or a group out of range
        makes it NaN, and with it the loss and every gradient.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a mode, shape or number is not as above, or an argument is given that the mode
            does not read.
        RuntimeError: on CPU, ``cu_seqlens`` is no partition of the tokens.
        IndexError: on CPU, a group is out of range.

    Example:
        >>> weights, normalizer = aggregate("sequence_mean_token_mean", mask)
        >>> out = ipo_loss(
        ...     trainer, inference, advantages, mask, loss_weights=weights, normalizer=normalizer
        ... )
    """
    _check_mode(mode)
    _check_length(mode, length)
    by_group = mode in _OF_GROUPS
    if group is not None and (by_group or step_counts is not None):
        raise ValueError(
            f"group: expected None beside step_counts and in mode {_OF_GROUPS[0]!r}, got a process "
            "group; pass it to aggregation_counts, and its result as step_counts"
        )
    if step_counts is None:
        num_groups = _num_sequences(loss_mask, cu_seqlens) if by_group else None
        step_counts = aggregation_counts(
            mode, loss_mask, cu_seqlens, groups=groups, num_groups=num_groups, group=group
        )
    _check_counts(step_counts, by_group, loss_mask)
    num_groups = len(step_counts) if by_group else None
    sequences = _sequences(mode, loss_mask, cu_seqlens, groups, num_groups, group is None)
    if sequences.groups is None:
        num_tokens, num_parts = step_counts
        tokens_of_part = sequences.lengths
    else:
        num_tokens, num_parts = step_counts.sum(), (step_counts > 0).sum()
        tokens_of_part = step_counts[sequences.groups]

    weights, normalizer = None, num_tokens.double()
    if mode in _MEANS_OF_MEANS:
        # The clamps keep 0 / 0 away from parts of which no token trains.
        weight = num_tokens / (num_parts.clamp(min=1).double() * tokens_of_part.clamp(min=1))
        weights = weight.float()[sequences.of_token].view(loss_mask.shape)
    elif mode != "token_mean":
        normalizer = num_parts.double() * (1.0 if length is None else length)
    faulty = sequences.faulty | (step_counts < 0).any()
    return weights, torch.where(faulty, torch.nan, normalizer)


# -------------------------------------------------------------------------------------------------
# Sequences and their groups


def _sequences(
    mode: Mode,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    groups: torch.Tensor | None,
    num_groups: int | None,
    may_raise: bool,
) -> _Sequences:
    check_tensor("loss_mask", loss_mask, (torch.bool,))
    if loss_mask.dim() == 0:
        raise ValueError("loss_mask: expected at least one dimension, got shape []")
    sequences = (
        _rows(loss_mask) if cu_seqlens is None else _packed(loss_mask, cu_seqlens, may_raise)
    )
    if num_groups is None:
        _refuse("groups", groups, unless=mode in _OF_GROUPS, mode=mode)
        return sequences
    shape = loss_mask.shape[:-1] if cu_seqlens is None else sequences.lengths.shape
    return _with_groups(sequences, groups, num_groups, shape, may_raise)


def _rows(loss_mask: torch.Tensor) -> _Sequences:
    """The last dimension is a sequence."""
    tokens = torch.arange(loss_mask.numel(), device=loss_mask.device)
    of_token = tokens // max(loss_mask.shape[-1], 1)
    faulty = torch.zeros((), dtype=torch.bool, device=loss_mask.device)
    return _Sequences(of_token, loss_mask.sum(-1).flatten(), None, faulty)


def _packed(loss_mask: torch.Tensor, cu_seqlens: torch.Tensor, may_raise: bool) -> _Sequences:
    check_tensor("cu_seqlens", cu_seqlens, (torch.int32,))
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"cu_seqlens: expected shape [sequences + 1], got {list(cu_seqlens.shape)}"
        )
    check_device("cu_seqlens", cu_seqlens, Like("loss_mask", loss_mask))
    tokens = torch.arange(loss_mask.numel(), device=loss_mask.device)
    starts = cu_seqlens.long()
    faulty = (starts[0] != 0) | (starts[-1] != len(tokens)) | (starts.diff() < 0).any()
    if may_raise and _may_look(faulty) and faulty:
        raise RuntimeError(
            "cu_seqlens: expected a partition of the tokens, ascending from 0 to "
            f"{len(tokens)}, got {cu_seqlens.tolist()}"
        )
    starts = starts.clamp(0, len(tokens))  # no index below leaves its tensor, whatever came
    trained_before = torch.nn.functional.pad(loss_mask.flatten().cumsum(0), (1, 0))
    last = max(len(starts) - 2, 0)
    of_token = torch.searchsorted(starts, tokens, right=True).sub(1).clamp(0, last)
    return _Sequences(of_token, trained_before[starts].diff(), None, faulty)


def _with_groups(
    sequences: _Sequences,
    groups: torch.Tensor | None,
    num_groups: int,
    shape: torch.Size,
    may_raise: bool,
) -> _Sequences:
    if groups is None:
        raise ValueError("groups: expected the prompt group of each sequence, got None")
    check_tensor("groups", groups, (torch.int32, torch.int64))
    if groups.shape != shape:
        raise ValueError(
            f"groups: expected shape {list(shape)}, one for each sequence, got {list(groups.shape)}"
        )
    check_device("groups", groups, Like("loss_mask", sequences.lengths))
    outside = ((groups < 0) | (groups >= num_groups)).any()
    if may_raise and _may_look(outside) and outside:
        raise IndexError(
            f"groups: expected ids in [0, {num_groups}), got {int(groups.min())} to "
            f"{int(groups.max())}; ids that count over the step need its aggregation_counts(..., "
            "num_groups=...) as step_counts"
        )
    inside = groups.flatten().long().clamp(0, max(num_groups - 1, 0))
    return sequences._replace(groups=inside, faulty=sequences.faulty | outside)


def _num_sequences(loss_mask: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    return loss_mask.shape[:-1].numel() if cu_seqlens is None else max(len(cu_seqlens) - 1, 0)


def _may_look(value: torch.Tensor) -> bool:
    """Whether the host may read ``value``: on CUDA it would synchronise, traced it has none."""
    return value.device.type == "cpu" and is_eager()


# -------------------------------------------------------------------------------------------------
# Checks


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {list(get_args(Mode))}, got {mode!r}")


def _check_length(mode: Mode, length: float | None) -> None:
    _refuse("length", length, unless=mode == "constant", mode=mode)
    if mode != "constant":
        return
    if length is None or not is_number(length) or not 0 < length < math.inf:
        raise ValueError(
            f"length: expected a finite number > 0, as mode is {mode!r}, got {length!r}"
        )


def _check_counts(counts: torch.Tensor, by_group: bool, loss_mask: torch.Tensor) -> None:
    check_tensor("step_counts", counts, (torch.int64,))
    if counts.dim() != 1 or (not by_group and len(counts) != 2):
        expected = "[num_groups]" if by_group else "[2]"
        raise ValueError(
            f"step_counts: expected shape {expected}, as aggregation_counts of the same mode makes "
            f"them, got {list(counts.shape)}"
        )
    check_device("step_counts", counts, Like("loss_mask", loss_mask))


def _refuse(name: str, value: object, *, unless: bool, mode: Mode) -> None:
    if value is not None and not unless:
        raise ValueError(f"{name}: expected None, as mode {mode!r} does not read it, got a value")
