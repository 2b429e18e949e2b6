"""What several adapters refuse, in the same words: a host's options, its shapes, a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ipo_ext.config import IPOConfig

Sequences = Sequence[torch.Tensor]  # one [tokens] of each sequence

BOUNDS = "this loss takes its bounds from ipo_config alone: dppo_mask_*, clip_*, ratio_cap"
ENTROPY = "this loss has no entropy term"
OTHER_LOSS = "it belongs to another loss"
NO_REFERENCE = "this loss has no reference model; its KL is to the sampling policy, kl_tau"


def refuse_changed(name: str, value: Any, default: Any, why: str) -> None:
    if value != default:
        raise ValueError(f"{name}: expected the default {default!r}, got {value!r}: {why}")


def refuse_changed_fields(options: Any, reasons: Mapping[str, str], section: str = "") -> None:
    """Raises ``ValueError`` for a field of a dataclass that has a reason and is not its default."""
    for field in dataclasses.fields(options):
        if field.name in reasons:
            name, value = f"{section}{field.name}", getattr(options, field.name)
            refuse_changed(name, value, default_of(field), reasons[field.name])


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def refuse_a_teacher(config: IPOConfig, host: str) -> None:
    if config.teacher_tau > 0:
        raise ValueError(
            f"ipo_config.teacher_tau: expected 0, got {config.teacher_tau!r}: {host} hands no "
            "teacher's log-probabilities to a loss"
        )


def refuse_rules_on_sequences(config: IPOConfig, why: str) -> None:
    for name in ("rollout_min_ratio", "sequence_rules", "sequence_weight"):
        if value := getattr(config, name):
            raise ValueError(
                f"ipo_config.{name}: expected {getattr(IPOConfig(), name)!r}, got {value!r}: {why}"
            )


def refuse_other_shapes(like: str, expected: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.shape != expected.shape:
            raise ValueError(
                f"{name}: expected shape {list(expected.shape)} like {like}, got "
                f"{list(tensor.shape)}"
            )


def refuse_other_kinds(policy: str, mask: str, **given: torch.Tensor) -> None:
    """By the host's names, not those of ``ipo_loss``; a mask may be of any dtype."""
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if name != mask and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if name != policy and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that does not require grad, because no gradient flows "
                f"to it; pass {name}.detach()"
            )


def refuse_unequal_lengths(like: str, expected: Sequences, **others: Sequences | None) -> None:
    """Packed one after another, fields of unequal lengths would be read at each other's tokens."""
    lengths = _lengths(like, expected)
    if not lengths:
        raise ValueError(f"{like}: expected at least one sequence, got none")
    for name, sequences in others.items():
        found = lengths if sequences is None else _lengths(name, sequences)
        if found != lengths:
            raise ValueError(
                f"{name}: expected sequences of the lengths of {like}, {lengths}, got {found}"
            )


def refuse_unequal_ids(like: str, expected: Sequences, **others: Sequences | None) -> None:
    """The same of what each token has for so many ids, as many in all sequences."""
    lengths = [len(tokens) for tokens in expected]
    for name, sequences in others.items():
        if sequences is None:
            continue
        for i, each in enumerate(sequences):
            if not isinstance(each, torch.Tensor):
                kind = type(each).__name__
                raise TypeError(f"{name}[{i}]: expected a tensor [tokens, ids], got {kind}")
        found = [list(each.shape) for each in sequences]
        width = found[0][-1] if found and found[0] else 0
        if found != [[length, width] for length in lengths]:
            raise ValueError(
                f"{name}: expected shapes [tokens, ids] of one number of ids and of the lengths of "
                f"{like}, {lengths}, got {found}"
            )


def _lengths(name: str, sequences: Sequences) -> list[int]:
    for i, tokens in enumerate(sequences):
        if not isinstance(tokens, torch.Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor [tokens], got {type(tokens).__name__}")
        if tokens.dim() != 1:
            raise ValueError(f"{name}[{i}]: expected shape [tokens], got {list(tokens.shape)}")
    return [len(tokens) for tokens in sequences]
