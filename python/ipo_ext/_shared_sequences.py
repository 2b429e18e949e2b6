"""Sequences that ranks share, of which a call has pieces: checked, and what a call makes of it."""

from __future__ import annotations

from typing import Any, cast

import torch

from ipo_ext._groups import process_group
from ipo_ext._ops.arguments import LossInputs, SharedSequences
from ipo_ext._ops.checks import Like, check_device, check_tensor
from ipo_ext._optional_tensors import OptionalTensors
from ipo_ext.config import IPOConfig


def shared_sequences(tensors: OptionalTensors, config: IPOConfig) -> SharedSequences | None:
    """Whose pieces the segments are; None where each is a sequence. ``cu_seqlens`` is checked."""
    ids, count = tensors.get("sequence_ids"), tensors.get("num_sequences")
    group = tensors.get("cp_group")
    if ids is None:
        for name, value in (("num_sequences", count), ("cp_group", group)):
            if value is not None:
                raise ValueError(
                    f"sequence_ids: expected a tensor with {name}, got None; it says of which "
                    "sequence each segment of cu_seqlens is a piece"
                )
        return None
    _check_ids(ids, tensors.get("cu_seqlens"))
    _check_count(count, ids)
    if group is None and config.judges_sequences:
        raise ValueError(
            "cp_group: expected the ranks that share the sequences, got None: config judges or "
            "weighs whole sequences, of which sequence_ids says that this call has pieces; pass "
            "the context-parallel process group"
        )
    return SharedSequences(ids, cast(int, count), _name_of(group))


def _name_of(cp_group: Any) -> str:
    """By which operators know it; none is needed where nothing is exchanged."""
    return "" if cp_group is None else process_group("cp_group", cp_group).group_name


def _check_ids(ids: Any, cu_seqlens: torch.Tensor | None) -> None:
    check_tensor("sequence_ids", ids, (torch.int32,))
    if cu_seqlens is None:
        raise ValueError(
            "cu_seqlens: expected a tensor with sequence_ids, got None; it says where the pieces "
            "begin"
        )
    if ids.dim() != 1 or ids.shape[0] != cu_seqlens.shape[0] - 1:
        raise ValueError(
            f"sequence_ids: expected shape [{cu_seqlens.shape[0] - 1}], one for each segment of "
            f"cu_seqlens, got {list(ids.shape)}"
        )
    check_device("sequence_ids", ids, Like("cu_seqlens", cu_seqlens))


def _check_count(count: Any, ids: torch.Tensor) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(
            f"num_sequences: expected an int with sequence_ids, got {type(count).__name__}"
        )
    if not 0 <= count < 2**31:
        raise ValueError(f"num_sequences: expected a number in [0, 2**31), got {count!r}")
    if count == 0 and ids.shape[0] > 0:
        raise ValueError(
            f"num_sequences: expected at least 1, as sequence_ids has {ids.shape[0]} pieces, got 0"
        )


def poisoned_by_ids(inputs: LossInputs, shared: SharedSequences) -> LossInputs:
    """On a GPU a wrong id makes loss and gradients NaN, by a normalizer that is none; on the CPU
    the operators that read ids raise."""
    ids, count, _ = shared
    if ids.device.type == "cpu":
        return inputs
    return poisoned(inputs, (ids < 0) | (ids >= count))


def poisoned(inputs: LossInputs, is_wrong: torch.Tensor) -> LossInputs:
    """With a normalizer that is none where anything is wrong."""
    factor = torch.where(is_wrong.any(), torch.nan, 1.0)
    normalizer = factor if inputs.normalizer is None else inputs.normalizer * factor
    return inputs._replace(normalizer=normalizer)
