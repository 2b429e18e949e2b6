"""Shapes and dtypes of every operator's results, for whatever traces: fakes, as torch calls them.

The public functions' checks run here too, so that a traced call says what an eager one says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ipo_ext import _C
from ipo_ext._ops import checks
from ipo_ext._ops.arguments import (
    ChunkLogprobsArguments,
    ChunkLossArguments,
    ChunkPacketsArguments,
    ComponentLossArguments,
    FindFaultsArguments,
    FoldSegmentsArguments,
    GatherPacketsArguments,
    HeadInputs,
    IPOLossArguments,
    IPOLossFromHiddenArguments,
    IPOLossFromHiddenResults,
    IPOLossFromHiddenShardedArguments,
    IPOLossFromLogitsArguments,
    IPOLossFromLogitsInplaceArguments,
    IPOLossFromLogitsShardedArguments,
    LinearTokenLogprobsArguments,
    LinearTokenLogprobsBackwardArguments,
    LinearTokenLogprobsBackwardResults,
    LinearTokenLogprobsResults,
    LinearTokenLogprobsShardedArguments,
    LinearTokenLogprobsShardedBackwardArguments,
    LogitScaling,
    LogRatioHistogramArguments,
    LossAndMetricsArguments,
    LossInputs,
    MetricMeansArguments,
    MetricRows,
    NeedsGrad,
    ScoreCenteringArguments,
    SequenceStatisticsArguments,
    TokenLogprobsArguments,
    TokenLogprobsBackwardArguments,
    TokenLogprobsShardedArguments,
    TokenLogprobsShardedBackwardArguments,
)

Tensors = tuple[Any, ...]


def _metrics(
    like: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    compute: torch.dtype,
    replay: torch.Tensor | None = None,
) -> MetricRows:
    segments = () if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    more = 0 if replay is None else len(_C.REPLAY_ROWS)
    return MetricRows(
        like.new_empty((len(_C.MEAN_ROWS) + more, *segments), dtype=compute),
        like.new_empty((len(_C.SUM_ROWS) + more, *segments), dtype=torch.float64),
        like.new_empty((len(_C.EXTREME_ROWS), *segments), dtype=torch.float64),
    )


def _logprobs_and_entropy(
    like: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = checks.widened(like.dtype)
    return like.new_empty(labels.shape, dtype=dtype), like.new_empty(labels.shape, dtype=dtype)


def _candidate_logprobs(like: torch.Tensor, candidates: torch.Tensor | None) -> torch.Tensor:
    shape = (0,) if candidates is None else candidates.shape
    return like.new_empty(shape, dtype=checks.widened(like.dtype))


def _softmax_stats(like: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return like.new_empty((2, labels.numel()), dtype=checks.widened(like.dtype))


# -------------------------------------------------------------------------------------------------
# From log-probabilities


def _ipo_loss(arguments: IPOLossArguments) -> Tensors:
    like, inputs = arguments.trainer_logprobs, arguments.inputs
    checks.check_per_token_loss(like, inputs, arguments.settings.teacher_tau)
    compute = checks.compute_dtype(like, inputs.inference_logprobs)
    return (
        like.new_empty((), dtype=compute),
        like.new_empty(like.shape if arguments.with_gradient else (0,), dtype=compute),
        _metrics(like, inputs.cu_seqlens, compute),
    )


def _component_loss(arguments: ComponentLossArguments) -> Tensors:
    trainer_logprobs, inputs, settings, components, with_gradient = arguments
    checks.check_components(trainer_logprobs, components)
    loss = _ipo_loss(IPOLossArguments(trainer_logprobs, inputs, settings, with_gradient))
    return (*loss, loss[0].new_empty((len(_C.COMPONENT_MEAN_ROWS),)))


def _score_centering(arguments: ScoreCenteringArguments) -> Tensors:
    of_ids, like, inputs = arguments[:3]
    checks.check_centering(like, of_ids, arguments.inference_mask_logprobs)
    segments = () if inputs.cu_seqlens is None else (inputs.cu_seqlens.shape[0] - 1,)
    return (
        like.new_empty((), dtype=checks.compute_dtype(like, inputs.inference_logprobs)),
        of_ids.new_empty(
            of_ids.shape if arguments.with_gradient else (0,), dtype=checks.widened(of_ids.dtype)
        ),
        like.new_empty((1, *segments), dtype=torch.float64),
    )


def _sequence_statistics(arguments: SequenceStatisticsArguments) -> Tensors:
    like, cu_seqlens = arguments.trainer_logprobs, arguments.inputs.cu_seqlens
    segments = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        like.new_empty((_C.STATISTIC_SUMS, segments), dtype=torch.float64),
        like.new_empty((_C.STATISTIC_EXTREMES, segments), dtype=torch.float64),
    )


def _fold_segments(arguments: FoldSegmentsArguments) -> Tensors:
    sums, extremes, _, num_sequences = arguments
    return (
        sums.new_empty((sums.shape[0], num_sequences)),
        extremes.new_empty((extremes.shape[0], num_sequences)),
    )


def _sequence_totals(arguments: Any) -> torch.Tensor:
    """Whatever they are made from."""
    ids: torch.Tensor = arguments.shared.sequence_ids
    return ids.new_empty((_C.SEQUENCE_TOTALS, ids.shape[0]), dtype=torch.float64)


def _log_ratio_histogram(arguments: LogRatioHistogramArguments) -> torch.Tensor:
    like, _, _, cu_seqlens = arguments
    segments = () if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    return like.new_empty((_C.HISTOGRAM_BINS, *segments), dtype=torch.int64)


def _metric_means(arguments: MetricMeansArguments) -> torch.Tensor:
    dtype = torch.float64 if arguments.float64 else torch.float32
    sums = arguments.sums
    rows = len(_C.MEAN_ROWS) + sums.shape[0] - len(_C.SUM_ROWS)
    return sums.new_empty((rows, *sums.shape[1:]), dtype=dtype)


# -------------------------------------------------------------------------------------------------
# From logits


def _ipo_loss_from_logits(arguments: IPOLossFromLogitsArguments) -> Tensors:
    logits, labels, scaling, inputs, settings, of_ids, with_gradient = arguments
    checks.check_logits_loss(logits, labels, scaling, inputs, settings.teacher_tau)
    checks.check_inference_mask_logprobs(of_ids, scaling.sampling_mask)
    return _of_loss_from_logits(logits, labels, scaling, inputs, with_gradient)


def _of_loss_from_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scaling: LogitScaling,
    inputs: LossInputs,
    with_gradient: bool,
) -> Tensors:
    compute = checks.compute_dtype(logits, inputs.inference_logprobs)
    return (
        logits.new_empty((), dtype=compute),
        logits.new_empty(logits.shape if with_gradient else (0,)),
        *_logprobs_and_entropy(logits, labels),
        _metrics(logits, inputs.cu_seqlens, compute, scaling.sampling_mask),
        _row_scales(logits, labels, with_gradient),
    )


def _row_scales(logits: torch.Tensor, labels: torch.Tensor, with_gradient: bool) -> torch.Tensor:
    has_scales = with_gradient and logits.dtype == torch.float16
    return logits.new_empty((labels.numel() if has_scales else 0,), dtype=torch.float32)


def _ipo_loss_from_logits_inplace(arguments: IPOLossFromLogitsInplaceArguments) -> Tensors:
    loss, _, *others, _ = _ipo_loss_from_logits(IPOLossFromLogitsArguments(*arguments, False))
    return (loss, *others, _row_scales(arguments.logits, arguments.labels, True))


def _token_logprobs(arguments: TokenLogprobsArguments) -> Tensors:
    logits, labels, scaling, candidates = arguments
    checks.check_logits(logits, labels, scaling, candidates)
    return (
        *_logprobs_and_entropy(logits, labels),
        _softmax_stats(logits, labels),
        _candidate_logprobs(logits, candidates),
    )


def _token_logprobs_backward(arguments: TokenLogprobsBackwardArguments) -> torch.Tensor:
    return arguments.logits.new_empty(arguments.logits.shape)


# -------------------------------------------------------------------------------------------------
# From hidden states


def _ipo_loss_from_hidden(arguments: IPOLossFromHiddenArguments) -> IPOLossFromHiddenResults:
    head, inputs = arguments.head, arguments.inputs
    checks.check_hidden_loss(head, inputs, arguments.settings.teacher_tau)
    checks.check_inference_mask_logprobs(
        arguments.inference_mask_logprobs, head.scaling.sampling_mask
    )
    return _of_loss_from_hidden(head, inputs, arguments.needs_grad)


def _of_loss_from_hidden(
    head: HeadInputs, inputs: LossInputs, needs_grad: NeedsGrad
) -> IPOLossFromHiddenResults:
    compute = checks.compute_dtype(head.hidden, inputs.inference_logprobs)
    return IPOLossFromHiddenResults(
        head.hidden.new_empty((), dtype=compute),
        *_logprobs_and_entropy(head.hidden, head.labels),
        _metrics(head.hidden, inputs.cu_seqlens, compute, head.scaling.sampling_mask),
        *_gradients(head, needs_grad),
    )


def _gradients(head: HeadInputs, needs_grad: NeedsGrad) -> LinearTokenLogprobsBackwardResults:
    vocabulary, width = head.weight.shape
    tokens, compute = math.prod(head.hidden.shape[:-1]), checks.widened(head.weight.dtype)
    return LinearTokenLogprobsBackwardResults(
        head.hidden.new_empty(
            (tokens if needs_grad.needs_grad_hidden else 0, width),
            dtype=checks.kept_dtype(head.hidden.dtype),
        ),
        head.weight.new_empty(
            (vocabulary if needs_grad.needs_grad_weight else 0, width),
            dtype=compute,
        ),
        head.weight.new_empty((vocabulary if needs_grad.needs_grad_bias else 0,), dtype=compute),
    )


def _linear_token_logprobs(arguments: LinearTokenLogprobsArguments) -> LinearTokenLogprobsResults:
    hidden, labels = arguments.head.hidden, arguments.head.labels
    checks.check_hidden(arguments.head, arguments.candidates)
    return LinearTokenLogprobsResults(
        *_logprobs_and_entropy(hidden, labels),
        _softmax_stats(hidden, labels),
        _candidate_logprobs(hidden, arguments.candidates),
    )


def _linear_token_logprobs_backward(
    arguments: LinearTokenLogprobsBackwardArguments,
) -> LinearTokenLogprobsBackwardResults:
    return _gradients(arguments.head, arguments.needs_grad)


# -------------------------------------------------------------------------------------------------
# Vocabulary parallel


def _ipo_loss_from_logits_sharded(arguments: IPOLossFromLogitsShardedArguments) -> Tensors:
    logits, labels, scaling, inputs, settings, with_gradient, _ = arguments
    checks.check_logits_loss(logits, labels, scaling, inputs, settings.teacher_tau, is_sharded=True)
    return _of_loss_from_logits(logits, labels, scaling, inputs, with_gradient)


def _token_logprobs_sharded(arguments: TokenLogprobsShardedArguments) -> Tensors:
    logits, labels, scaling, _ = arguments
    checks.check_logits(logits, labels, scaling, is_sharded=True)
    return _sharded_logprobs(logits, labels)


def _sharded_logprobs(like: torch.Tensor, labels: torch.Tensor) -> Tensors:
    return (
        *_logprobs_and_entropy(like, labels),
        _softmax_stats(like, labels),
        labels.new_empty((1,), dtype=torch.int32),
    )


def _token_logprobs_sharded_backward(
    arguments: TokenLogprobsShardedBackwardArguments,
) -> torch.Tensor:
    return arguments.logits.new_empty(arguments.logits.shape)


def _ipo_loss_from_hidden_sharded(
    arguments: IPOLossFromHiddenShardedArguments,
) -> IPOLossFromHiddenResults:
    head, inputs = arguments.head, arguments.inputs
    checks.check_hidden_loss(
        head,
        inputs,
        arguments.settings.teacher_tau,
        is_sharded=True,
        sequence_parallel=arguments.sequence_parallel,
    )
    return _of_loss_from_hidden(head, inputs, arguments.needs_grad)


def _linear_token_logprobs_sharded(arguments: LinearTokenLogprobsShardedArguments) -> Tensors:
    checks.check_hidden(
        arguments.head, is_sharded=True, sequence_parallel=arguments.sequence_parallel
    )
    return _sharded_logprobs(arguments.head.hidden, arguments.head.labels)


def _linear_token_logprobs_sharded_backward(
    arguments: LinearTokenLogprobsShardedBackwardArguments,
) -> LinearTokenLogprobsBackwardResults:
    return _gradients(arguments.head, arguments.needs_grad)


def _chunk_packets(arguments: ChunkPacketsArguments) -> torch.Tensor:
    labels = arguments.labels
    return labels.new_empty((labels.numel(), 4), dtype=torch.float64)


def _gather_packets(arguments: GatherPacketsArguments) -> Tensors:
    labels = arguments.labels
    dtype = torch.float64 if arguments.float64 else torch.float32
    like = labels.new_empty((), dtype=dtype)
    return (*_logprobs_and_entropy(like, labels), _softmax_stats(like, labels))


# -------------------------------------------------------------------------------------------------
# Steps of the loss from hidden states


def _find_faults(arguments: FindFaultsArguments) -> Tensors:
    labels = arguments.labels
    replayed = 0 if arguments.sampling_mask is None else labels.numel()
    return (
        labels.new_empty((1,), dtype=torch.int32),
        labels.new_empty((replayed,), dtype=torch.bool),
    )


def _chunk_loss(arguments: ChunkLossArguments) -> Tensors:
    return _logprobs_and_entropy(arguments.logits, arguments.labels)


def _loss_and_metrics(arguments: LossAndMetricsArguments) -> Tensors:
    logprobs, inputs = arguments.logprobs, arguments.inputs
    compute = checks.compute_dtype(logprobs, inputs.inference_logprobs)
    return (
        logprobs.new_empty((), dtype=compute),
        logprobs.new_empty(logprobs.shape if arguments.with_gradient else (0,), dtype=compute),
        _metrics(logprobs, inputs.cu_seqlens, compute, arguments.replayed),
    )


def _chunk_logprobs(arguments: ChunkLogprobsArguments) -> Tensors:
    logits, labels, scaling, candidates, _ = arguments
    return _token_logprobs(TokenLogprobsArguments(logits, labels, scaling, candidates))


def _nothing(_: Any) -> None:
    """Of an operator that writes to an argument."""


FAKES: dict[str, Callable[[Any], Any]] = {
    "ipo_loss": _ipo_loss,
    "component_loss": _component_loss,
    "score_centering": _score_centering,
    "sequence_statistics": _sequence_statistics,
    "fold_segments": _fold_segments,
    "log_ratio_histogram": _log_ratio_histogram,
    "metric_means": _metric_means,
    "ipo_loss_from_logits": _ipo_loss_from_logits,
    "ipo_loss_from_logits_": _ipo_loss_from_logits_inplace,
    "token_logprobs": _token_logprobs,
    "token_logprobs_backward": _token_logprobs_backward,
    "ipo_loss_from_hidden": _ipo_loss_from_hidden,
    "linear_token_logprobs": _linear_token_logprobs,
    "linear_token_logprobs_backward": _linear_token_logprobs_backward,
    "find_faults": _find_faults,
    "chunk_logprobs_and_gradient": _chunk_loss,
    "loss_and_metrics": _loss_and_metrics,
    "chunk_logprobs": _chunk_logprobs,
    "chunk_logprobs_backward": _nothing,
    "sequence_totals": _sequence_totals,
    "sequence_totals_from_logits": _sequence_totals,
    "sequence_totals_from_hidden": _sequence_totals,
    "ipo_loss_from_logits_sharded": _ipo_loss_from_logits_sharded,
    "token_logprobs_sharded": _token_logprobs_sharded,
    "token_logprobs_sharded_backward": _token_logprobs_sharded_backward,
    "ipo_loss_from_hidden_sharded": _ipo_loss_from_hidden_sharded,
    "linear_token_logprobs_sharded": _linear_token_logprobs_sharded,
    "linear_token_logprobs_sharded_backward": _linear_token_logprobs_sharded_backward,
    "chunk_packets": _chunk_packets,
    "gather_packets": _gather_packets,
    "chunk_shard_backward": _nothing,
    "scale_": _nothing,
    "scale_rows_": _nothing,
    "scale_into": _nothing,
}
