"""The operators from hidden states and the LM head, over the C++ operators of a chunk.

The [tokens, vocabulary] logits never exist: a chunk of the tokens that take part becomes logits,
and these become their own gradient. Whatever traces does not see the loop over chunks: a graph
holds one node.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch

from ipo_ext._ops.arguments import (
    HeadInputs,
    IPOLossFromHiddenArguments,
    IPOLossFromHiddenResults,
    IPOLossFromHiddenShardedArguments,
    LinearTokenLogprobsArguments,
    LinearTokenLogprobsBackwardArguments,
    LinearTokenLogprobsBackwardResults,
    LinearTokenLogprobsResults,
    LinearTokenLogprobsShardedArguments,
    LinearTokenLogprobsShardedBackwardArguments,
    LogitScaling,
    LogprobsBackward,
    MetricRows,
    NeedsGrad,
    SequenceTotalsFromHiddenArguments,
    ShardedLogprobsResults,
)
from ipo_ext._ops.centering import with_centering
from ipo_ext._ops.chunks import (
    IGNORED_LABEL,
    NO_ID,
    Gradients,
    Head,
    ReplicatedRows,
    Rows,
    SequenceParallelRows,
)
from ipo_ext._ops.shards import ShardedRows

# Of which tokens take part, and how many may; ``Rows.of`` where one rank has all of them.
MakesRows = Callable[[torch.Tensor, "int | None"], Rows]

# -------------------------------------------------------------------------------------------------
# The loss


def _ipo_loss_from_hidden(
    ops: Any, arguments: IPOLossFromHiddenArguments, rows_of: MakesRows = Rows.of
) -> IPOLossFromHiddenResults:
    shape = arguments.head.labels.shape
    arguments = arguments._replace(
        head=_flat_head(arguments.head),
        inputs=arguments.inputs.map_tokens(_flat),
        inference_mask_logprobs=_flat_ids(arguments.inference_mask_logprobs),
    )
    fault, replayed = _faults_of_loss(ops, arguments)
    is_centered = arguments.inference_mask_logprobs is not None
    in_two_passes = arguments.settings.judges_sequences or is_centered
    make = _loss_in_two_passes if in_two_passes else _loss_in_one_pass
    results = make(ops, arguments, fault, replayed, rows_of)
    return results._replace(
        logprobs=results.logprobs.view(shape), entropy=results.entropy.view(shape)
    )


def _faults_of_loss(
    ops: Any, arguments: IPOLossFromHiddenArguments | SequenceTotalsFromHiddenArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """And which tokens replay the sampler's support."""
    head, inputs, num_active = arguments.head, arguments.inputs, arguments.num_active
    fault, replayed = ops.find_faults(
        head.labels,
        None,
        head.scaling.temperature,
        head.scaling.sampling_mask,
        inputs.loss_mask,
        inputs.cu_seqlens,
        inputs.normalizer,
        head.weight.shape[0],
        head.labels.numel() if num_active is None else num_active,
    )
    return fault, replayed


def _loss_in_one_pass(
    ops: Any,
    arguments: IPOLossFromHiddenArguments,
    fault: torch.Tensor,
    replayed: torch.Tensor,
    rows_of: MakesRows,
) -> IPOLossFromHiddenResults:
    """What tokens pay, and the gradients, as soon as a chunk's logits are there."""
    (hidden, weight, bias, labels, scaling), inputs = arguments.head, arguments.inputs
    rows = rows_of(inputs.loss_mask, arguments.num_active)
    chunks = rows.chunks(arguments.chunk_size)
    head = Head(weight, bias, rows.longest(chunks))
    fill = _value_of_no_row(fault, head.compute)
    logprobs = rows.new_output((rows.tokens,), fill)
    entropy = rows.new_output((rows.tokens,), fill)
    gradients = Gradients(ops, head, hidden, rows, fill, arguments.needs_grad)
    for chunk, states in rows.with_states(hidden, chunks):
        take = functools.partial(rows.take, chunk=chunk)
        inputs_here = inputs.map_tokens(take)._replace(cu_seqlens=None, sequence_totals=None)
        logits = head.logits(states)
        gradient, row_scales = gradients.over(logits)
        logprobs_here, entropy_here = ops.chunk_logprobs_and_gradient(
            logits,
            take(labels),
            *_scaling_of(scaling, take),
            *inputs_here,
            *arguments.settings,
            fault,
            gradient,
            row_scales,
        )
        rows.put(logprobs, chunk, logprobs_here)
        rows.put(entropy, chunk, entropy_here)
        pays = inputs_here.loss_mask & logprobs_here.isfinite()
        gradients.add(chunk, gradient, row_scales, states, pays)
        del states  # before the next ones come

    loss, _, metrics = _loss_and_metrics(ops, arguments, fault, logprobs, entropy, replayed, False)
    return IPOLossFromHiddenResults(loss, logprobs, entropy, metrics, *gradients.finished())


def _loss_in_two_passes(
    ops: Any,
    arguments: IPOLossFromHiddenArguments,
    fault: torch.Tensor,
    replayed: torch.Tensor,
    rows_of: MakesRows,
) -> IPOLossFromHiddenResults:
    """A verdict needs all log-probabilities of a sequence before any gradient.

    And score centering those of all ids of a token. So the logits are made twice, the second time
    for tokens that pay; without ``num_active`` each time reads a count back.
    """
    loss_mask, num_active = arguments.inputs.loss_mask, arguments.num_active
    head, chunk_size = _with_active_labels(arguments.head, loss_mask), arguments.chunk_size
    candidates, of_sampler = None, arguments.inference_mask_logprobs
    if head.scaling.sampling_mask is not None and of_sampler is not None:
        candidates = head.scaling.sampling_mask.masked_fill(~replayed[:, None], NO_ID)
    rows = rows_of(loss_mask, num_active)
    logprobs, entropy, softmax_stats, of_ids = _logprobs_of(
        ops, rows, fault, head, candidates, chunk_size
    )
    needs_grad_logprobs = any(arguments.needs_grad)
    loss, grad_logprobs, metrics = _loss_and_metrics(
        ops, arguments, fault, logprobs, entropy, replayed, needs_grad_logprobs
    )
    grad_logprobs = grad_logprobs.to(logprobs.dtype)
    grad_candidates = None
    if candidates is not None:
        added, grad_candidates, sums = ops.score_centering(
            of_ids,
            logprobs,
            *arguments.inputs,
            *arguments.settings,
            of_sampler,
            replayed,
            needs_grad_logprobs,
        )
        loss, metrics = loss + added, with_centering(ops, metrics, sums)
    if needs_grad_logprobs:
        pays = grad_logprobs != 0
        if grad_candidates is not None:
            pays |= (grad_candidates != 0).any(-1)
        rows = rows_of(loss_mask & pays, num_active)
    backward = LogprobsBackward(
        entropy, softmax_stats, grad_logprobs, torch.zeros_like(entropy), grad_candidates
    )
    gradients = _gradients_of(
        ops,
        rows,
        fault,
        head,
        candidates,
        chunk_size,
        backward,
        arguments.needs_grad,
    )
    return IPOLossFromHiddenResults(loss, logprobs, entropy, metrics, *gradients)


def logprobs_before_the_loss(
    ops: Any, arguments: SequenceTotalsFromHiddenArguments
) -> torch.Tensor:
    """``[tokens]``, of the loss that is then made of the same arguments: in every bit its own."""
    inputs = arguments.inputs.map_tokens(_flat)
    arguments = arguments._replace(head=_flat_head(arguments.head), inputs=inputs)
    fault, _ = _faults_of_loss(ops, arguments)
    head = _with_active_labels(arguments.head, inputs.loss_mask)
    rows = Rows.of(inputs.loss_mask, arguments.num_active)
    return _logprobs_of(ops, rows, fault, head, None, arguments.chunk_size).logprobs


def _with_active_labels(head: HeadInputs, loss_mask: torch.Tensor) -> HeadInputs:
    return head._replace(labels=head.labels.masked_fill(~loss_mask, IGNORED_LABEL))


def _loss_and_metrics(
    ops: Any,
    arguments: IPOLossFromHiddenArguments,
    fault: torch.Tensor,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    replayed: torch.Tensor,
    needs_grad_logprobs: bool,
) -> tuple[torch.Tensor, torch.Tensor, MetricRows]:
    """Loss, its derivatives by the log-probabilities, metrics."""
    scaling = arguments.head.scaling
    loss, grad_logprobs, *metrics = ops.loss_and_metrics(
        logprobs,
        entropy if scaling.with_entropy else None,
        None if scaling.sampling_mask is None else replayed,
        *arguments.inputs,
        *arguments.settings,
        fault,
        needs_grad_logprobs,
    )
    return loss, grad_logprobs, MetricRows(*metrics)


# -------------------------------------------------------------------------------------------------
# Log-probabilities


def _linear_token_logprobs(
    ops: Any, arguments: LinearTokenLogprobsArguments
) -> LinearTokenLogprobsResults:
    head, shape = _flat_head(arguments.head), arguments.head.labels.shape
    candidates = _flat_ids(arguments.candidates)
    fault = _faults_of_head(ops, head, candidates)
    rows = _labelled(head)
    made = _logprobs_of(ops, rows, fault, head, candidates, arguments.chunk_size)
    of_candidates = made.candidate_logprobs
    if arguments.candidates is not None:
        of_candidates = of_candidates.view(arguments.candidates.shape)
    return LinearTokenLogprobsResults(
        made.logprobs.view(shape), made.entropy.view(shape), made.softmax_stats, of_candidates
    )


def _logprobs_of(
    ops: Any,
    rows: Rows,
    fault: torch.Tensor,
    inputs: HeadInputs,
    candidates: torch.Tensor | None,
    chunk_size: int,
) -> LinearTokenLogprobsResults:
    """All of them as ``[tokens]`` and ``[tokens, candidates]``."""
    chunks = rows.chunks(chunk_size)
    head = Head(inputs.weight, inputs.bias, rows.longest(chunks))
    fill = _value_of_no_row(fault, head.compute)
    logprobs = rows.new_output((rows.tokens,), fill)
    entropy = rows.new_output((rows.tokens,), fill)
    softmax_stats = rows.new_output((2, rows.tokens), fill)
    shape = (0,) if candidates is None else tuple(candidates.shape)
    of_candidates = rows.new_output(shape, fill)
    for chunk, states in rows.with_states(inputs.hidden, chunks):
        take = functools.partial(rows.take, chunk=chunk)
        logits = head.logits(states)
        del states  # before the next ones come
        logprobs_here, entropy_here, stats_here, candidates_here = ops.chunk_logprobs(
            logits,
            take(inputs.labels),
            *_scaling_of(inputs.scaling, take),
            take(candidates),
            fault,
        )
        rows.put(logprobs, chunk, logprobs_here)
        rows.put(entropy, chunk, entropy_here)
        rows.put(softmax_stats.t(), chunk, stats_here.t())
        if candidates is not None:
            rows.put(of_candidates, chunk, candidates_here)
    return LinearTokenLogprobsResults(logprobs, entropy, softmax_stats, of_candidates)


def _linear_token_logprobs_backward(
    ops: Any, arguments: LinearTokenLogprobsBackwardArguments
) -> LinearTokenLogprobsBackwardResults:
    head, candidates = _flat_head(arguments.head), _flat_ids(arguments.candidates)
    entropy, softmax_stats, grad_logprobs, grad_entropy, grad_candidates = arguments.backward
    backward = LogprobsBackward(
        _flat(entropy),
        softmax_stats,
        _flat(grad_logprobs),
        _flat(grad_entropy),
        _flat_ids(grad_candidates),
    )
    fault = _faults_of_head(ops, head, candidates)
    flows = (backward.grad_logprobs != 0) | (backward.grad_entropy != 0)
    if backward.grad_candidates is not None:
        flows |= (backward.grad_candidates != 0).any(-1)
    rows = Rows.of((head.labels != IGNORED_LABEL) & flows, None)
    return _gradients_of(
        ops, rows, fault, head, candidates, arguments.chunk_size, backward, arguments.needs_grad
    )


def _gradients_of(
    ops: Any,
    rows: Rows,
    fault: torch.Tensor,
    inputs: HeadInputs,
    candidates: torch.Tensor | None,
    chunk_size: int,
    backward: LogprobsBackward,
    needs_grad: NeedsGrad,
) -> LinearTokenLogprobsBackwardResults:
    """By the head's inputs, of the active rows, whose logits are made again."""
    chunks = rows.chunks(chunk_size) if any(needs_grad) else []
    head = Head(inputs.weight, inputs.bias, rows.longest(chunks))
    fill = _value_of_no_row(fault, head.compute)
    gradients = Gradients(ops, head, inputs.hidden, rows, fill, needs_grad)
    for chunk, states in rows.with_states(inputs.hidden, chunks):
        take = functools.partial(rows.take, chunk=chunk)
        logits = head.logits(states)
        gradient, row_scales = gradients.over(logits)
        ops.chunk_logprobs_backward(
            logits,
            take(inputs.labels),
            *_scaling_of(inputs.scaling, take),
            take(candidates),
            take(backward.entropy),
            take(backward.softmax_stats.t()).t(),
            take(backward.grad_logprobs),
            take(backward.grad_entropy),
            take(backward.grad_candidates),
            fault,
            gradient,
            row_scales,
        )
        gradients.add(chunk, gradient, row_scales, states, take(rows.active))
        del states  # before the next ones come
    return LinearTokenLogprobsBackwardResults(*gradients.finished())


# -------------------------------------------------------------------------------------------------
# Vocabulary parallel: the same loops over one rank's columns


def _ipo_loss_from_hidden_sharded(
    ops: Any, arguments: IPOLossFromHiddenShardedArguments
) -> IPOLossFromHiddenResults:
    shard = arguments.shard
    rows = ShardedRows(ops, shard)
    num_active, needs_grad = arguments.num_active, arguments.needs_grad
    rows.check_agreement(
        arguments.inputs.loss_mask,
        can_wait=num_active is None,
        sequence_parallel=arguments.sequence_parallel,
        chunk_size=arguments.chunk_size,
        num_active=-1 if num_active is None else num_active,
        needs_grad_hidden=needs_grad.needs_grad_hidden,
        needs_a_gradient=any(needs_grad),
        reduce_hidden_grad=arguments.reduce_hidden_grad,
        vocabulary=shard.vocabulary,
    )
    of_rows = IPOLossFromHiddenArguments(
        arguments.head,
        arguments.inputs,
        arguments.settings,
        None,
        arguments.chunk_size,
        num_active,
        needs_grad,
    )
    results = _ipo_loss_from_hidden(rows, of_rows, _rows_of(arguments))
    rows.finish(results.logprobs, results.entropy, *results.gradients)
    return results


def _linear_token_logprobs_sharded(
    ops: Any, arguments: LinearTokenLogprobsShardedArguments
) -> ShardedLogprobsResults:
    head, shape = _flat_head(arguments.head), arguments.head.labels.shape
    rows = ShardedRows(ops, arguments.shard)
    labelled = head.labels != IGNORED_LABEL
    rows.check_agreement(
        labelled,
        can_wait=True,
        sequence_parallel=arguments.sequence_parallel,
        chunk_size=arguments.chunk_size,
        vocabulary=arguments.shard.vocabulary,
    )
    fault = _faults_of_head(rows, head, None)
    chosen = _rows_of(arguments)(labelled, None)
    made = _logprobs_of(rows, chosen, fault, head, None, arguments.chunk_size)
    logprobs, entropy, softmax_stats, _ = made
    rows.finish(logprobs, entropy, softmax_stats)
    return ShardedLogprobsResults(logprobs.view(shape), entropy.view(shape), softmax_stats, fault)


def _linear_token_logprobs_sharded_backward(
    ops: Any, arguments: LinearTokenLogprobsShardedBackwardArguments
) -> LinearTokenLogprobsBackwardResults:
    """Of every labelled row, whatever flows into it: ranks reduce as many chunks."""
    head, needs_grad = _flat_head(arguments.head), arguments.needs_grad
    rows, labelled = ShardedRows(ops, arguments.shard), head.labels != IGNORED_LABEL
    if arguments.reduce_hidden_grad:
        rows.check_agreement(
            labelled,
            can_wait=True,
            sequence_parallel=arguments.sequence_parallel,
            needs_grad_hidden=needs_grad.needs_grad_hidden,
            # With none of them a rank would gather no hidden states.
            needs_a_gradient=any(needs_grad),
        )
    entropy, softmax_stats, grad_logprobs, grad_entropy, _ = arguments.backward
    backward = LogprobsBackward(
        _flat(entropy), softmax_stats, _flat(grad_logprobs), _flat(grad_entropy)
    )
    return _gradients_of(
        rows,
        _rows_of(arguments)(labelled, None),
        arguments.fault,
        head,
        None,
        arguments.chunk_size,
        backward,
        needs_grad,
    )


def _rows_of(
    arguments: IPOLossFromHiddenShardedArguments
    | LinearTokenLogprobsShardedArguments
    | LinearTokenLogprobsShardedBackwardArguments,
) -> MakesRows:
    """Where their hidden states are, and the gradient by these goes."""
    group = arguments.shard.group
    if arguments.sequence_parallel:
        return functools.partial(SequenceParallelRows.of_ranks, group=group)
    if not arguments.reduce_hidden_grad:
        return Rows.of
    return functools.partial(ReplicatedRows.of_all, group=group)


# -------------------------------------------------------------------------------------------------
# What both need


def _labelled(head: HeadInputs) -> Rows:
    """The rows that log-probabilities are wanted of."""
    return Rows.of(head.labels != IGNORED_LABEL, None)


def _scaling_of(scaling: LogitScaling, take: Callable[[Any], Any]) -> LogitScaling:
    """Of a chunk's rows, which ``take`` gives of what each token has."""
    return scaling._replace(
        temperature=take(scaling.temperature), sampling_mask=take(scaling.sampling_mask)
    )


def _faults_of_head(ops: Any, head: HeadInputs, candidates: torch.Tensor | None) -> torch.Tensor:
    fault, _ = ops.find_faults(
        head.labels,
        candidates,
        head.scaling.temperature,
        head.scaling.sampling_mask,
        None,
        None,
        None,
        head.weight.shape[0],
        head.labels.numel(),
    )
    return cast(torch.Tensor, fault)


def _flat_head(head: HeadInputs) -> HeadInputs:
    """With what belongs to tokens as ``[tokens]``."""
    temperature, _, sampling_mask, _ = head.scaling
    if temperature is not None and temperature.dim() > 0:
        temperature = _flat(temperature)
    scaling = head.scaling._replace(temperature=temperature, sampling_mask=_flat_ids(sampling_mask))
    return head._replace(labels=_flat(head.labels), scaling=scaling)


def _flat(tensor: Any) -> Any:
    """[...] -> [tokens]; None as it is."""
    return None if tensor is None else tensor.reshape(-1)


def _flat_ids(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """[..., ids] -> [tokens, ids]; None as it is."""
    if tensor is None:
        return None
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _value_of_no_row(fault: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What tokens hold that take no part, a scalar: 0, or NaN under a contract fault."""
    return torch.where(fault[0] != 0, math.nan, torch.zeros((), dtype=dtype, device=fault.device))


# Operator to what it returns and its kernel, a function of the C++ operators and its arguments.
KERNELS: dict[str, tuple[type[Any], Callable[[Any, Any], tuple[Any, ...]]]] = {
    "ipo_loss_from_hidden": (IPOLossFromHiddenResults, _ipo_loss_from_hidden),
    "linear_token_logprobs": (LinearTokenLogprobsResults, _linear_token_logprobs),
    "linear_token_logprobs_backward": (
        LinearTokenLogprobsBackwardResults,
        _linear_token_logprobs_backward,
    ),
    "ipo_loss_from_hidden_sharded": (IPOLossFromHiddenResults, _ipo_loss_from_hidden_sharded),
    "linear_token_logprobs_sharded": (ShardedLogprobsResults, _linear_token_logprobs_sharded),
    "linear_token_logprobs_sharded_backward": (
        LinearTokenLogprobsBackwardResults,
        _linear_token_logprobs_sharded_backward,
    ),
}
