"""Vocabulary parallel: the operators over rows of logits of which each rank has some columns.

A rank reduces its columns of a chunk's rows to 32 bytes each; all ranks gather these, once a chunk,
and put every row together in the same order, to the same bits. What is wrong on one rank travels
with them: nobody raises before an exchange that others would then wait for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ipo_ext._ops import torch_internals
from ipo_ext._ops.arguments import (
    ChunkLogprobsArguments,
    ChunkLogprobsBackwardArguments,
    ChunkLossArguments,
    GradientResult,
    IPOLossFromLogitsResults,
    IPOLossFromLogitsShardedArguments,
    MetricRows,
    Shard,
    ShardedLogprobsResults,
    TokenLogprobsShardedArguments,
    TokenLogprobsShardedBackwardArguments,
    unflatten,
)
from ipo_ext._ops.chunks import IGNORED_LABEL, active_of_ranks, is_capturing

_FAULT, _LABEL_FAULT = 1, 2  # what chunk_packets tells apart, for the errors of other ranks


class ShardedRows:
    """Stands in for the C++ operators over a chunk's rows, which serve whole rows: the same calls,
    of this rank's columns of them."""

    def __init__(self, ops: Any, shard: Shard) -> None:
        self._ops, self._shard = ops, shard
        # What this rank knows to be wrong, until all ranks know that something is.
        self._held: Exception | None = ValueError(shard.problem) if shard.problem else None
        self._fault = torch.zeros(1, dtype=torch.int32)  # until faults have been looked for
        self.loss_and_metrics = ops.loss_and_metrics
        self.scale_ = ops.scale_

    # ---------------------------------------------------------------------------------------------
    # Faults

    def check_agreement(
        self, active: torch.Tensor, can_wait: bool, sequence_parallel: bool, **numbers: int
    ) -> None:
        """Raises, on all ranks, unless the numbers that decide about exchanges are the same on all.

        Ranks that exchange different sizes, or a different number of times, hang or are aborted.
        ``active`` is counted as well, also by rank where each has some of the hidden states. Not
        where the host may not wait for a device.
        """
        if active.is_cuda and (not can_wait or is_capturing(active)):
            return
        known = {"faults": 1 if self._held else 0, "sequence_parallel": sequence_parallel}
        known |= {"active tokens": 0, "active tokens of a rank": 0, **numbers}
        if not (self._held and sequence_parallel):  # else they may not be countable
            _, ranks = torch_internals.member_of(self._shard.group)
            counts = active_of_ranks(active, ranks if sequence_parallel else 1)
            known |= {"active tokens": sum(counts), "active tokens of a rank": max(counts)}
        mine = torch.tensor(list(known.values()), dtype=torch.int64, device=active.device)
        of_ranks = torch_internals.gathered(mine, self._shard.group).tolist()
        if self._held:
            raise self._held
        for name, *values in zip(known, *of_ranks, strict=True):
            if name == "faults" and any(values):
                raise RuntimeError(
                    f"tp_group: rank {values.index(1)} of the group has found a fault in its "
                    "arguments, which its own error names"
                )
            if len(set(values)) > 1:
                raise ValueError(
                    f"tp_group: expected ranks that are given the same tokens and settings, got "
                    f"{name} {', '.join(map(str, values))}"
                )

    def find_faults(self, labels: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As the operator, of labels in the whole vocabulary; raises nothing yet."""
        *inputs, _, max_active = others
        try:
            fault, replayed = self._ops.find_faults(
                labels, *inputs, self._shard.vocabulary, max_active
            )
        except RuntimeError as error:
            self._held = self._held or error
            fault, replayed = labels.new_zeros(1, dtype=torch.int32), labels.new_empty(0)
        if self._held:
            fault.fill_(_LABEL_FAULT if str(self._held).startswith("labels:") else _FAULT)
        self._fault = fault
        return fault, replayed

    def finish(self, *results: torch.Tensor) -> None:
        """Raises what is still held, and makes results NaN of which a later chunk had a fault."""
        if self._held:
            raise self._held
        fault = self._fault
        factor = torch.where(fault[0] != 0, math.nan, torch.ones((), device=fault.device))
        for result in results:
            if result.numel() > 0:
                self._ops.scale_(result, factor)

    # ---------------------------------------------------------------------------------------------
    # Rows

    def chunk_logprobs(self, *values: Any) -> tuple[torch.Tensor, ...]:
        """One exchange; where there are no rows none."""
        logits, labels, scaling, _, fault = unflatten(ChunkLogprobsArguments, values)
        packets = self._ops.chunk_packets(logits, labels, *scaling, fault, self._shard.first_column)
        if len(packets) > 0:
            packets = torch_internals.gathered(packets, self._shard.group)
        float64 = logits.dtype == torch.float64
        try:
            results = self._ops.gather_packets(packets, labels, scaling.temperature, fault, float64)
        except RuntimeError:
            if self._held:
                raise self._held from None
            raise
        return (*results, logits.new_empty(0))

    def chunk_logprobs_and_gradient(self, *values: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, then the loss's derivatives by them, then the gradient."""
        arguments = unflatten(ChunkLossArguments, values)
        logits, labels, scaling, inputs, settings, fault, gradient, row_scales = arguments
        labels = labels.masked_fill(~inputs.loss_mask, IGNORED_LABEL)
        logprobs, entropy, softmax_stats, _ = self.chunk_logprobs(
            logits, labels, *scaling, None, fault
        )
        if gradient is not None:
            _, grad_logprobs, *_ = self._ops.loss_and_metrics(
                logprobs, None, None, *inputs, *settings, fault, True
            )
            self._backward(
                logits,
                labels,
                *scaling,
                entropy,
                softmax_stats,
                grad_logprobs.to(logprobs.dtype),
                torch.zeros_like(entropy),
                fault,
                gradient,
                row_scales,
            )
        return logprobs, entropy

    def chunk_logprobs_backward(self, *values: Any) -> None:
        """Without an exchange: what all ranks have gathered says enough."""
        arguments = unflatten(ChunkLogprobsBackwardArguments, values)
        logits, labels, scaling, _, backward, fault, gradient, row_scales = arguments
        *saved, _ = backward
        self._backward(logits, labels, *scaling, *saved, fault, gradient, row_scales)

    def _backward(self, *values: Any) -> None:
        *before, gradient, row_scales = values
        self._ops.chunk_shard_backward(*before, self._shard.first_column, gradient, row_scales)


# -------------------------------------------------------------------------------------------------
# From logits


def _ipo_loss_from_logits_sharded(
    ops: Any, arguments: IPOLossFromLogitsShardedArguments
) -> IPOLossFromLogitsResults:
    logits, labels, scaling, inputs, settings, with_gradient, shard = arguments
    rows = ShardedRows(ops, shard)
    fault, _ = rows.find_faults(
        labels,
        None,
        scaling.temperature,
        None,
        inputs.loss_mask,
        inputs.cu_seqlens,
        inputs.normalizer,
        logits.shape[-1],
        labels.numel(),
    )
    labels = labels.masked_fill(~inputs.loss_mask, IGNORED_LABEL)
    logprobs, entropy, softmax_stats, _ = rows.chunk_logprobs(logits, labels, *scaling, None, fault)
    measured = entropy if scaling.with_entropy else None
    loss, grad_logprobs, *metrics = ops.loss_and_metrics(
        logprobs, measured, None, *inputs, *settings, fault, with_gradient
    )
    gradient = logits.new_empty(logits.shape if with_gradient else (0,))
    has_scales = with_gradient and logits.dtype == torch.float16
    row_scales = logits.new_empty(labels.numel() if has_scales else 0, dtype=torch.float32)
    if with_gradient:
        rows.chunk_logprobs_backward(
            logits,
            labels,
            *scaling,
            None,
            entropy,
            softmax_stats,
            grad_logprobs.to(logprobs.dtype),
            torch.zeros_like(entropy),
            None,
            fault,
            gradient,
            row_scales if has_scales else None,
        )
    rows.finish()
    return IPOLossFromLogitsResults(
        loss, gradient, logprobs, entropy, MetricRows(*metrics), row_scales
    )


def _token_logprobs_sharded(
    ops: Any, arguments: TokenLogprobsShardedArguments
) -> ShardedLogprobsResults:
    logits, labels, scaling, shard = arguments
    rows = ShardedRows(ops, shard)
    fault, _ = rows.find_faults(
        labels, None, scaling.temperature, None, None, None, None, 0, labels.numel()
    )
    logprobs, entropy, softmax_stats, _ = rows.chunk_logprobs(logits, labels, *scaling, None, fault)
    rows.finish()
    return ShardedLogprobsResults(logprobs, entropy, softmax_stats, fault)


def _token_logprobs_sharded_backward(
    ops: Any, arguments: TokenLogprobsShardedBackwardArguments
) -> torch.Tensor:
    logits, labels, scaling, backward, fault, shard = arguments
    gradient = logits.new_empty(logits.shape)
    *saved, _ = backward
    ops.chunk_shard_backward(
        logits, labels, *scaling, *saved, fault, shard.first_column, gradient, None
    )
    return gradient


# Operator to what it returns and its kernel, a function of the C++ operators and its arguments.
KERNELS: dict[str, tuple[type[Any], Callable[[Any, Any], Any]]] = {
    "ipo_loss_from_logits_sharded": (IPOLossFromLogitsResults, _ipo_loss_from_logits_sharded),
    "token_logprobs_sharded": (ShardedLogprobsResults, _token_logprobs_sharded),
    "token_logprobs_sharded_backward": (GradientResult, _token_logprobs_sharded_backward),
}
