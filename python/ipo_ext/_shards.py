"""Which columns of the vocabulary a rank has, from ``tp_group`` and what is said beside it."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

from ipo_ext._groups import Group, process_group
from ipo_ext._number_arguments import count
from ipo_ext._ops.arguments import Shard


class OwnColumns(NamedTuple):
    """Those of a call's columns that belong to the vocabulary, and where."""

    width: int  # of the first ones; the others are padding
    per_rank: int  # on average, rounded up: the same number on every rank
    shard: Shard | None  # None where this rank has the whole vocabulary


def own_columns(
    name: str,
    columns: int,
    tp_group: Group | None,
    vocab_size: int | None,
    vocab_start: int | None,
) -> OwnColumns:
    """Of ``columns`` that the tensor ``name`` has on this rank.

    What contradicts itself on this rank alone is no error yet: see ``Shard.problem``.
    """
    size, start = count("vocab_size", vocab_size, 1), count("vocab_start", vocab_start, 0)
    if tp_group is None:
        _refuse("vocab_size", size)
        _refuse("vocab_start", start)
        return OwnColumns(columns, columns, None)
    if start is not None and size is None:
        raise ValueError(
            f"vocab_size: expected a number because vocab_start is {start}, got None; pass the "
            "number of tokens of the whole vocabulary"
        )
    group, rank, ranks = _member_of(tp_group)
    problem = ""
    if size is None:
        start, size = rank * columns, ranks * columns
    elif start is None:
        each = -(-size // ranks)
        start = min(rank * each, size)
        expected = min(each, size - start)
        if columns != expected:
            problem = (
                f"{name}: expected {expected} of {size} tokens on rank {rank} of {ranks}, as "
                f"torch.chunk shares them out, got {columns}; pass vocab_start too, the first "
                "token of this rank, if they are shared out otherwise"
            )
    own = max(0, min(columns, size - start))
    if ranks == 1 and problem:
        raise ValueError(problem)
    if ranks == 1 and own == size:
        return OwnColumns(own, own, None)
    return OwnColumns(own, max(1, -(-size // ranks)), Shard(start, size, group, problem))


def _refuse(name: str, value: int | None) -> None:
    if value is not None:
        raise ValueError(
            f"{name}: expected None without tp_group, got {value}; pass the group of ranks that "
            "share the vocabulary as tp_group"
        )


def _member_of(tp_group: Group) -> tuple[str, int, int]:
    """Name of the group, rank of this process in it, number of its ranks."""
    group = process_group("tp_group", tp_group)
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("tp_group: expected a group that this process belongs to, got another")
    return group.group_name, rank, dist.get_world_size(group)


# -------------------------------------------------------------------------------------------------
# Sequence parallel: which tokens' hidden states a rank has


def wants_parts(
    hidden: torch.Tensor, tp_group: Group | None, reduces: bool, sequence_parallel: bool
) -> bool:
    """Whether the call says that each rank has those of some tokens; a DTensor may say it too."""
    if not isinstance(sequence_parallel, bool):
        raise TypeError(
            f"sequence_parallel: expected True or False, got {type(sequence_parallel).__name__}"
        )
    if sequence_parallel and tp_group is None:
        raise ValueError(
            "sequence_parallel: expected False without tp_group, got True; pass the group of ranks "
            "that share vocabulary and hidden states as tp_group"
        )
    whole: Any = hidden
    is_cut = is_dtensor(hidden) and [_spelled_out(each) for each in whole.placements] == [
        "Shard(0)"
    ]
    in_parts = sequence_parallel or (tp_group is not None and is_cut)
    if in_parts and not reduces:
        raise ValueError(
            "reduce_hidden_grad: expected True with sequence_parallel, got False: a rank's "
            "gradient is of its own tokens, of which the others have parts; leave it out"
        )
    return in_parts


def problem_of_states(hidden: torch.Tensor, labels: torch.Tensor, tp_group: Group) -> str:
    """What is wrong with the shape of a rank's hidden states, for ``Shard.problem``; or ""."""
    ranks = _member_of(tp_group)[2]
    tokens = labels.numel()
    if tokens % ranks != 0:  # on all ranks
        raise ValueError(
            f"labels: expected as many tokens for each of the {ranks} ranks with "
            f"sequence_parallel, got {tokens}; pad them with tokens that the loss mask leaves out"
        )
    allowed = [[tokens // ranks]]
    if labels.dim() > 0 and labels.shape[0] % ranks == 0:
        allowed.append([labels.shape[0] // ranks, *labels.shape[1:]])
    if list(hidden.shape[:-1]) in allowed:
        return ""
    return (
        f"hidden: expected shape [{', '.join(map(str, allowed[-1]))}, width] with "
        f"sequence_parallel, for labels {list(labels.shape)} of {ranks} ranks, got "
        f"{list(hidden.shape)}; rank r has the r-th of as many runs of tokens"
    )


# -------------------------------------------------------------------------------------------------
# DTensors on the mesh of the group


def own_part(
    name: str, tensor: torch.Tensor, dim: int, tp_group: Group | None
) -> tuple[torch.Tensor, int | None]:
    """This rank's part of a DTensor that is cut along ``dim``, and how long all of it is there.

    What is no DTensor as it is. The gradient returns as a DTensor cut in the same way.
    """
    if tp_group is None or not is_dtensor(tensor):
        return tensor, None
    whole: Any = tensor
    _check_mesh(name, whole, tp_group, f"Shard({dim % whole.ndim})")
    return cast(torch.Tensor, whole.to_local()), whole.shape[dim]


def own_copy(
    name: str, tensor: torch.Tensor, tp_group: Group | None, reduces: bool
) -> torch.Tensor:
    """This rank's copy of a DTensor that all ranks have whole; likewise.

    Where the call does not add up the ranks' gradients, torch does, of what it knows to be parts.
    """
    if tp_group is None or not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    whole: Any = tensor
    _check_mesh(name, whole, tp_group, "Replicate()")
    return cast(torch.Tensor, whole.to_local(grad_placements=None if reduces else [Partial()]))


def is_dtensor(tensor: object) -> bool:
    return type(tensor).__name__ == "DTensor"


def _check_mesh(name: str, tensor: Any, tp_group: Group, expected: str) -> None:
    mesh, placements = tensor.device_mesh, tensor.placements
    on_group = mesh.ndim == 1 and mesh.get_group().group_name == _member_of(tp_group)[0]
    kinds = [_spelled_out(placement) for placement in placements]
    if not on_group or kinds != [expected]:
        raise TypeError(
            f"{name}: expected a plain tensor, or a DTensor of placement {expected} on the mesh of "
            f"tp_group, got one of {', '.join(kinds)} on the mesh {mesh.mesh_dim_names or mesh}; "
            f"redistribute it, or pass {name}.to_local() where that is this rank's part"
        )


def _spelled_out(placement: Any) -> str:
    """``Shard(0)``; torch's own texts differ between versions."""
    dim = getattr(placement, "dim", "")
    return f"{type(placement).__name__}({dim})"
