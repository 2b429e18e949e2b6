"""The loss as functions: checks the arguments, then makes one operator call."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from ipo_ext._groups import Group
from ipo_ext._metric_groups import (
    MetricGroups,
    Policy,
    in_order,
    metric_groups,
    metrics_of_tokens,
    poisoned_by_groups,
    replayed_of,
    valid_groups,
)
from ipo_ext._number_arguments import count, logit_scaling, scalar
from ipo_ext._ops import checks, library, torch_internals
from ipo_ext._ops.arguments import (
    ComponentLossArguments,
    Components,
    HeadInputs,
    IPOLossArguments,
    IPOLossFromHiddenArguments,
    IPOLossFromHiddenShardedArguments,
    IPOLossFromLogitsArguments,
    IPOLossFromLogitsShardedArguments,
    LinearTokenLogprobsArguments,
    LinearTokenLogprobsShardedArguments,
    LogitScaling,
    LossInputs,
    MetricRows,
    NeedsGrad,
    ScoreCenteringArguments,
    SequenceTotalsArguments,
    SequenceTotalsFromHiddenArguments,
    SequenceTotalsFromLogitsArguments,
    SharedSequences,
    TokenLogprobsArguments,
    TokenLogprobsShardedArguments,
)
from ipo_ext._ops.centering import with_centering
from ipo_ext._ops.changing_numbers import settings_of
from ipo_ext._ops.chunks import default_chunk_size
from ipo_ext._ops.errors import with_torch_errors
from ipo_ext._ops.from_hidden import (
    run_ipo_loss_from_hidden,
    run_ipo_loss_from_hidden_sharded,
    run_linear_token_logprobs,
    run_linear_token_logprobs_sharded,
)
from ipo_ext._ops.from_logits import (
    run_ipo_loss_from_logits,
    run_ipo_loss_from_logits_sharded,
    run_token_logprobs,
    run_token_logprobs_sharded,
)
from ipo_ext._ops.from_logprobs import run_component_loss, run_ipo_loss, run_score_centering
from ipo_ext._ops.shared_sequences import with_totals
from ipo_ext._optional_tensors import (
    NAMES,
    OptionalTensors,
    refuse_unknown_names,
    spells_out_tensors,
)
from ipo_ext._shards import (
    OwnColumns,
    own_columns,
    own_copy,
    own_part,
    problem_of_states,
    wants_parts,
)
from ipo_ext._shared_sequences import poisoned_by_ids, shared_sequences
from ipo_ext.config import IPOConfig, LossSettings
from ipo_ext.metrics import IPOMetrics
from ipo_ext.output import IPOOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DEFAULT = IPOConfig()
_OPERATORS_OWN = tuple(name for name in NAMES if name in LossInputs._fields)


@spells_out_tensors
def ipo_loss(
    trainer_logprobs: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    normalizer: float | torch.Tensor | None = None,
    config: IPOConfig = _DEFAULT,
    trainer_mask_logprobs: torch.Tensor | None = None,
    histogram: bool = False,
    **tensors: Unpack[OptionalTensors],
) -> IPOOutput:
    r"""The IPO+KL loss from per-token log-probabilities.

    Per active token, with ``x = trainer_logprob - inference_logprob`` and ``r = exp(x)``: kept
    where x and r are finite and ``log(dppo_mask_low) <= x <= log(dppo_mask_high)``; a kept token
    pays ``w * (-A' * r + kl_tau * x**2)``, every other token exactly 0, whatever it holds. Source:
    PrimeIntellect-ai/prime-rl pull request 2423; docs/math.md derives it. Other rules of
    ``config`` keep other tokens; those on whole sequences take two more launches, and a few small
    ones where they take the rows of ``[..., T]`` for sequences.

    Everything is computed in float64 if either log-probability is float64, else in float32.

    Args:
        trainer_logprobs: ``[...]``, natural logarithms, any floating dtype; with
            ``trainer_mask_logprobs`` the only input that receives a gradient.
        inference_logprobs: same shape, any floating dtype: what the tokens were sampled with.
        advantages: same shape, any floating dtype. A constant, like every input below.
        loss_mask: same shape, bool: the tokens that train.
        teacher_logprobs: same shape; needed for ``config.teacher_tau > 0``, otherwise only
            measured (metric ``teacher_kl``).
        loss_weights: same shape, a factor of each token's loss; default 1.
        cu_seqlens: int32 ``[segments + 1]``, first token of each packed sequence, then the number
            of tokens (flash-attention's convention, tokens counted row by row); every metric then
            has shape ``[segments]``.
        inference_mask_logprobs: ``[..., K]``, any floating dtype, with ``config.score_centering``:
            the sampler's log-probabilities of the ids that it drew a token from, -inf where there
            are fewer.
        sequence_ids: int32 ``[segments]``, where ranks share sequences (context parallelism): of
            which sequence each segment of ``cu_seqlens`` is a piece, in any order. Every metric
            then has shape ``[num_sequences]``, of this rank until
            ``metrics.all_reduce(cp_group, by_sequence=True)``; docs/distributed.md.
        num_sequences: how many sequences the ranks have together; ids are below it. With
            ``sequence_ids``.
        cp_group: the ranks that share the sequences, a process group or a device mesh of one
            dimension. Needed with ``sequence_ids`` where ``config`` judges whole sequences: before
            the loss the ranks then exchange what the rules look at, so all of them must call.
        groups: int32, over which ``metrics.by_group`` is wanted: ``[segments]`` with
            ``cu_seqlens``, or one for each row of ``[..., T]`` without, the group of each sequence
            (its environment, its policy version); or the tokens' shape, the group of each token
            (its position), for one more pass over the log-probabilities, not where ``config``
            judges whole sequences or has score centering. Not read of tokens that the loss mask
            leaves out. ``metrics`` themselves stay as without.
        num_groups: how many groups there are, 1 to 1,024; ids are below it. With ``groups``.
        normalizer: what the sum is divided by, usually the global number of loss tokens: a float
            > 0, or a 0-dim tensor (on the inputs' device or on the CPU; 0 gives loss 0 and zero
            gradients). Default 1.
        config: which tokens and sequences count, and what they pay.
        trainer_mask_logprobs: ``[..., K]``, any floating dtype, with ``config.score_centering``:
            the trainer's log-probabilities of the same ids, over these alone; receives a gradient,
            0 where the sampler's is not finite. (0 in rows that take no part in it.)
        histogram: whether the log-ratios of active tokens are counted as well, one more pass over
            the log-probabilities: ``metrics.histogram``, ``quantile`` and ``what_if``. Default
            False.

    Returns:
        An ``IPOOutput`` of the 0-dim loss and its metrics; nothing is synchronised.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, a device or a float is not as above, or a constant requires grad.
        RuntimeError: on CPU, ``cu_seqlens`` is no partition of the tokens, or a tensor normalizer
            is negative or NaN. On CUDA these make the loss and every gradient NaN instead.
        IndexError: on CPU, an id of ``sequence_ids`` is not below ``num_sequences``, or one of
            ``groups`` not below ``num_groups`` (a RuntimeError in a compiled graph); on CUDA as
            above. What values show before an exchange, all CPU ranks of ``cp_group`` raise; not an
            id of ``groups``, which is looked at behind the loss.

    Example:
        >>> out = ipo_loss(trainer, inference, advantages, mask, normalizer=mask.sum())
        >>> out.loss.backward()
        >>> out.metrics["is_masked"]
    """
    refuse_unknown_names(ipo_loss, tensors)
    arguments, shared, groups = _loss_arguments(
        trainer_logprobs,
        inference_logprobs,
        advantages,
        loss_mask,
        normalizer,
        config,
        tensors,
        trainer_mask_logprobs,
    )
    loss, *rows = with_torch_errors(run_ipo_loss, arguments)
    of_ids = (trainer_mask_logprobs, tensors.get("inference_mask_logprobs"))
    loss, metrics = _centered(loss, MetricRows(*rows), arguments, *of_ids)
    call = _Call(tensors, arguments.inputs, config, arguments.settings, shared, groups)
    counted = _is_wanted(histogram)
    return IPOOutput(loss, _metrics(metrics, call, Policy(trainer_logprobs), counted))


def component_loss(
    trainer_logprobs: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    components: Components,
    normalizer: float | torch.Tensor | None = None,
    config: IPOConfig = _DEFAULT,
    trainer_mask_logprobs: torch.Tensor | None = None,
    **tensors: Unpack[OptionalTensors],
) -> tuple[IPOOutput, torch.Tensor]:
    """``ipo_loss`` and what stands beside it, in the same launches.

    Returns:
        The output, whose loss is the sum of all components, and the means of those beside the
        loss, ``[len(_C.COMPONENT_MEAN_ROWS)]``.
    """
    arguments, shared, groups = _loss_arguments(
        trainer_logprobs,
        inference_logprobs,
        advantages,
        loss_mask,
        normalizer,
        config,
        tensors,
        trainer_mask_logprobs,
    )
    checks.check_components(trainer_logprobs, components)
    checks.check_no_gradient(components)
    loss, *rows, means = with_torch_errors(
        run_component_loss,
        ComponentLossArguments(*arguments[:-1], components, arguments.with_gradient),
    )
    of_ids = (trainer_mask_logprobs, tensors.get("inference_mask_logprobs"))
    loss, metrics = _centered(loss, MetricRows(*rows), arguments, *of_ids)
    call = _Call(tensors, arguments.inputs, config, arguments.settings, shared, groups)
    return IPOOutput(loss, _metrics(metrics, call, Policy(trainer_logprobs), False)), means


@spells_out_tensors
def ipo_loss_from_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    normalizer: float | torch.Tensor | None = None,
    inplace: bool = False,
    config: IPOConfig = _DEFAULT,
    logit_scale: float | None = None,
    sampling_mask: torch.Tensor | None = None,
    entropy: bool = True,
    histogram: bool = False,
    tp_group: Group | None = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    **tensors: Unpack[OptionalTensors],
) -> IPOOutput:
    r"""The IPO+KL loss straight from the logits: the formula of ``ipo_loss``.

    The gradient by the logits is made in the same pass over them; backward only scales it, in
    place, and in most dtypes not even that for ``loss.backward()``. (With ``retain_graph=True`` it
    scales a copy, as large as the logits.) Rows that the loss mask leaves out are never read.
    Log-probabilities and the loss are computed in float64 for float64 logits, else in float32 (the
    loss also in float64 for float64 ``inference_logprobs``). Where ``config``
    judges whole sequences the gradient takes a pass of its own, after the log-probabilities of all
    rows.

    Args:
        logits: ``[..., V]``, any floating dtype; the only input that receives a gradient. Slices
            such as ``logits[:, :-1]`` are read where they lie; a last dimension whose elements are
            not adjacent is copied.
        labels: ``[...]``, int32 or int64: ``labels[t]`` is the token that ``logits[t]`` predicts.
            Nothing is shifted here. Not read where the loss mask is false.
        inference_logprobs: ``[...]``, any floating dtype: what the tokens were sampled with, at
            the same temperature.
        advantages: ``[...]``, any floating dtype. A constant, like every input below.
        loss_mask: ``[...]``, bool: the tokens that train.
        temperature: what the logits are divided by: a float > 0, a 0-dim tensor, or a tensor
            ``[...]`` of one for each token. Default 1.
        softcap: ``c`` of ``c * tanh(logits / c)``, applied before the temperature. Default none.
        logit_scale: what the logits are multiplied by before softcap and temperature (Cohere's
            field of this name; 1 over Granite's ``logits_scaling``): a finite float > 0. Default 1.
        teacher_logprobs, loss_weights, cu_seqlens, normalizer, config: as for ``ipo_loss``.
        inference_mask_logprobs: ``[..., K]``, any floating dtype, with ``config.score_centering``:
            the sampler's log-probabilities of the ids in ``sampling_mask``. Rows that do not replay
            these are not centered.
        sequence_ids, num_sequences, cp_group, groups, num_groups: as for ``ipo_loss``.
        inplace: writes the gradient over the logits, which saves as much memory as they take. They
            hold no logits afterwards, so they must come from an operation whose backward pass does
            not need them: a matrix product, not a softmax or tanh, whose backward pass then raises.
            Slices such as ``logits[:, :-1]`` are written where they lie, compiled too; what lies
            beside them stays. Without a gradient to write nothing is overwritten. Default False.
        sampling_mask: int32 ``[..., K]``, K up to 512: the ids that the sampler drew a token from
            (top-p, top-k), in any order, -1 where there are fewer. A token whose ids contain its
            label has its log-probability, and so its gradient, over these alone; every other one
            over the whole vocabulary, as without a mask. Not read where the loss mask is false.
            The gradient then takes a pass of its own.
        entropy: whether entropies are wanted, which are the whole row's. Without them a token that
            replays its ids costs K + 1 logits, not V. Default True.
        histogram: as for ``ipo_loss``.
        tp_group: the ranks that share the vocabulary, a ``ProcessGroup`` or a ``DeviceMesh`` of one
            dimension; they are given the same tokens. ``logits`` is then ``[..., V_r]``, this
            rank's columns, perhaps none; labels stay tokens of the whole vocabulary. All results
            are the same on all ranks, bit by bit. Not with ``inplace`` or ``sampling_mask``.
            Default: the logits are whole.
        vocab_size: tokens of the whole vocabulary, with ``tp_group``. Alone: rank r has what
            ``torch.chunk`` gives it of these. Default: all ranks have as many columns.
        vocab_start: the first token of this rank, with ``vocab_size``, whose columns at or above
            ``vocab_size`` are padding. The ranks' ranges make up the vocabulary in any way.

    Returns:
        An ``IPOOutput``; ``logprobs`` and ``entropy`` are ``[...]``, detached, 0 on tokens that the
        loss mask leaves out; ``entropy`` is None where it is not wanted. Nothing is synchronised.

    Raises:
        TypeError, ValueError: as for ``ipo_loss``; ValueError also where ``inplace`` may not be:
            logits that are a leaf or a view of one, or a part of ``unbind``, ``split``, ``chunk``.
        IndexError: on CPU, a label of an active token is not in ``[0, V)``. (A RuntimeError in a
            compiled graph; on CUDA the loss and every gradient are NaN instead.)
        RuntimeError: on CPU, as for ``ipo_loss``, or a temperature of an active token is not finite
            and > 0, or its ids in ``sampling_mask`` are not distinct tokens (on CUDA: NaN);
            anywhere, where ``inplace`` cannot be: rows that share memory or whose elements are not
            adjacent.

    Example:
        >>> out = ipo_loss_from_logits(
        ...     logits[:, :-1], tokens[:, 1:], inference, advantages, mask, normalizer=mask.sum()
        ... )
        >>> out.loss.backward()
    """
    refuse_unknown_names(ipo_loss_from_logits, tensors)
    _check_config(config)
    logits, own = _own_logits(logits, tp_group, vocab_size, vocab_start)
    inputs = _inputs(inference_logprobs, advantages, loss_mask, normalizer, logits, tensors)
    of_ids = _of_ids(tensors, config)
    scaling = _scaling(temperature, sampling_mask, entropy, logits)
    is_sharded = own.shard is not None
    checks.check_logits_loss(
        logits, labels, scaling, inputs, config.teacher_tau, is_sharded=is_sharded
    )
    checks.check_inference_mask_logprobs(of_ids, sampling_mask)
    _check_no_gradient(inputs, scaling, of_ids)
    compute = checks.compute_dtype(logits, inference_logprobs)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    if inplace and with_gradient:
        _check_may_be_overwritten(logits)
    scaling = logit_scaling(scaling, softcap, logit_scale, logits)
    settings = settings_of(config, compute)
    inputs, shared, groups = _with_sequences(inputs, tensors, config)
    counted = _is_wanted(histogram)
    if own.shard is not None:
        _refuse_with_shard(sampling_mask=sampling_mask, inplace=inplace or None)
        _refuse_verdicts_with_shard(shared, config)
        arguments = IPOLossFromLogitsShardedArguments(
            logits, labels, scaling, inputs, settings, with_gradient, own.shard
        )
        results = with_torch_errors(run_ipo_loss_from_logits_sharded, arguments)
    else:
        if shared is not None and config.judges_sequences:
            rows_of = (logits.detach(), labels, scaling)
            inputs = with_totals(
                inputs, SequenceTotalsFromLogitsArguments(*rows_of, inputs, settings, shared)
            )
        results = with_torch_errors(
            functools.partial(run_ipo_loss_from_logits, inplace=inplace),
            IPOLossFromLogitsArguments(
                logits, labels, scaling, inputs, settings, of_ids, with_gradient
            ),
        )
    loss, logprobs, entropies, *rows = results
    call = _Call(tensors, inputs, config, settings, shared, groups)
    policy = Policy(logprobs, entropies if entropy else None, scaling, labels, logits.shape[-1])
    metrics = _metrics(MetricRows(*rows), call, policy, counted)
    return IPOOutput(loss, metrics, logprobs, entropies if entropy else None)


def token_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    sampling_mask: torch.Tensor | None = None,
    entropy: bool = True,
    candidates: torch.Tensor | None = None,
    tp_group: Group | None = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
) -> tuple[Any, ...]:
    """Log-probabilities of the labels and entropies of the rows, both differentiable.

    A label of -100 marks a row that takes no part: it is not read, its outputs and its gradient are
    0. Rows into which no gradient flows are not read by the backward pass.

    Args:
        logits, labels, temperature, softcap, logit_scale, sampling_mask, entropy: as for
            ``ipo_loss_from_logits``, except that labels are read everywhere.
        candidates: int32 ``[..., K]``, K up to 512: ids whose log-probabilities are wanted beside
            the label's, in any order, also more than once, -1 where there are fewer.
        tp_group, vocab_size, vocab_start: as for ``ipo_loss_from_logits``; not with ``candidates``.
            The gradients that flow into the results must be the same on all ranks.

    Returns:
        ``(logprobs, entropy)``, each ``[...]``, float64 for float64 logits, else float32; the
        latter None where it is not wanted. With ``candidates`` also their log-probabilities,
        ``[..., K]``, differentiable too: over the row's ids where it replays them, and then -inf
        for others; 0 for an id of -1 and in a row that takes no part.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as for ``ipo_loss_from_logits``; on CUDA
            what would raise an IndexError or a RuntimeError makes everything NaN.
    """
    logits, own = _own_logits(logits, tp_group, vocab_size, vocab_start)
    scaling = _scaling(temperature, sampling_mask, entropy, logits)
    candidates = _apart(candidates, sampling_mask)
    is_sharded = own.shard is not None
    checks.check_logits(logits, labels, scaling, candidates, is_sharded=is_sharded)
    checks.check_no_gradient(None, temperature=scaling.temperature)
    scaling = logit_scaling(scaling, softcap, logit_scale, logits)
    if own.shard is not None:
        _refuse_with_shard(sampling_mask=sampling_mask, candidates=candidates)
        logprobs, entropies, *_ = with_torch_errors(
            run_token_logprobs_sharded,
            TokenLogprobsShardedArguments(logits, labels, scaling, own.shard),
        )
        return logprobs, entropies if entropy else None
    results = with_torch_errors(
        run_token_logprobs, TokenLogprobsArguments(logits, labels, scaling, candidates)
    )
    return _wanted(results, entropy, candidates)


@spells_out_tensors
def ipo_loss_from_hidden(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    normalizer: float | torch.Tensor | None = None,
    chunk_size: int | None = None,
    num_active: int | None = None,
    config: IPOConfig = _DEFAULT,
    logit_scale: float | None = None,
    bias: torch.Tensor | None = None,
    sampling_mask: torch.Tensor | None = None,
    entropy: bool = True,
    histogram: bool = False,
    tp_group: Group | None = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    reduce_hidden_grad: bool = True,
    sequence_parallel: bool = False,
    **tensors: Unpack[OptionalTensors],
) -> IPOOutput:
    r"""The IPO+KL loss from hidden states and the LM head's weight: the formula of ``ipo_loss``.

    The logits ``hidden @ weight.T + bias`` never exist as a whole. Tokens that the loss mask leaves
    out are gathered away; of the others a chunk of rows at a time becomes logits,
    log-probabilities, the gradient over the logits, and what that adds to the gradients of hidden
    states, weight and bias: three matrix products and none for tokens that do not train. The
    gradients are made in forward, only those that are needed, and handed over in backward (with
    ``retain_graph=True`` copies). Where ``config`` judges whole sequences it must see all
    log-probabilities first: a fourth product, and without ``num_active`` a second count, so that
    only tokens that pay take part in the others.

    Logits are float32 (float64 for float64 inputs) whatever the dtype of ``hidden``; the gradients
    of weight and bias are summed in float32 and rounded once, in backward. Under
    ``torch.autocast`` hidden states and weight are cast as ``torch.nn.functional.linear`` would;
    the gradient of a float32 weight is not rounded on its way.

    Args:
        hidden: ``[..., H]``, any floating dtype.
        weight: ``[V, H]``, the LM head's weight, dtype and device of ``hidden``.
        labels: ``[...]``, int32 or int64: ``labels[t]`` is the token that ``hidden[t]`` predicts.
            Nothing is shifted here. Not read where the loss mask is false.
        inference_logprobs, advantages, loss_mask, temperature, softcap, logit_scale: as for
            ``ipo_loss_from_logits``.
        sampling_mask, entropy: as for ``ipo_loss_from_logits``, except that all logits are made
            anyway.
        teacher_logprobs, loss_weights, cu_seqlens, normalizer, config: as for ``ipo_loss``.
        inference_mask_logprobs: ``[..., K]``, any floating dtype, with ``config.score_centering``:
            the sampler's log-probabilities of the ids in ``sampling_mask``. Rows that do not replay
            these are not centered.
        sequence_ids, num_sequences, cp_group, groups, num_groups: as for ``ipo_loss``.
        chunk_size: rows of a chunk, at least 1. Default: the largest multiple of 128 whose logits
            take no more than 1.25 GB on a GPU (2048 rows of 151,936), 48 MiB on a CPU; at
            least 128.
        num_active: an upper bound of the number of true elements in ``loss_mask``, which a data
            loader knows. With it nothing is synchronised; without it one count is read back from a
            GPU (under CUDA graph capture all tokens are worked on instead). The closer, the less
            work.
        bias: ``[V]``, the LM head's bias, dtype and device of ``hidden``; receives a gradient too.
            It is added to float32 logits, under autocast as well. Default none.
        histogram: as for ``ipo_loss``.
        tp_group, vocab_size, vocab_start: as for ``ipo_loss_from_logits``; ``weight`` is then
            ``[V_r, H]``, ``bias`` ``[V_r]``, perhaps without a row. The ranks are given the same
            ``hidden``, ``chunk_size`` and ``num_active``, and need the same gradients.
        reduce_hidden_grad: with ``tp_group``, whether the gradient of ``hidden`` is summed over its
            ranks, in float32, so that all have the same. False: each rank has its own part, for
            hosts that add these up themselves. Default True.
        sequence_parallel: with ``tp_group`` of W ranks, whether each has the hidden states of a
            part of the tokens: ``hidden`` is ``[N / W, H]``, or as ``labels`` with a first
            dimension of a W-th, rank r's the r-th run; its gradient likewise. All else that belongs
            to tokens stays whole. A chunk of hidden states is gathered at a time, beside the work
            on the last one; ``num_active`` then bounds each rank's rows too. Default False.

    Returns:
        An ``IPOOutput``; ``logprobs`` and ``entropy`` are ``[...]``, detached, 0 on tokens that the
        loss mask leaves out; ``entropy`` is None where it is not wanted.

    Raises:
        TypeError, ValueError: as for ``ipo_loss``.
        IndexError: on CPU, a label of an active token is not in ``[0, V)``. (A RuntimeError in a
            compiled graph; on CUDA the loss and every gradient are NaN instead.)
        RuntimeError: on CPU, as for ``ipo_loss``, a temperature of an active token is not finite
            and > 0, its ids in ``sampling_mask`` are not distinct tokens, or ``num_active`` is
            below the truth (on CUDA: NaN).

    Example:
        >>> out = ipo_loss_from_hidden(
        ...     hidden[:, :-1], lm_head.weight, tokens[:, 1:], inference, advantages, mask
        ... )
        >>> out.loss.backward()
    """
    refuse_unknown_names(ipo_loss_from_hidden, tensors)
    _check_config(config)
    weight, bias, own = _own_rows(weight, bias, tp_group, vocab_size, vocab_start)
    _check_reduces(reduce_hidden_grad, tp_group)
    hidden, own, in_parts = _own_states(
        hidden, labels, own, tp_group, reduce_hidden_grad, sequence_parallel
    )
    inputs = _inputs(inference_logprobs, advantages, loss_mask, normalizer, hidden, tensors)
    of_ids = _of_ids(tensors, config)
    scaling = _scaling(temperature, sampling_mask, entropy, hidden)
    head = HeadInputs(hidden, weight, bias, labels, scaling)
    is_sharded = own.shard is not None
    checks.check_hidden_loss(
        head, inputs, config.teacher_tau, is_sharded=is_sharded, sequence_parallel=in_parts
    )
    checks.check_inference_mask_logprobs(of_ids, sampling_mask)
    _check_no_gradient(inputs, scaling, of_ids)
    head = head._replace(scaling=logit_scaling(scaling, softcap, logit_scale, hidden))
    compute = checks.compute_dtype(hidden, inference_logprobs)
    with_gradient = torch.is_grad_enabled()
    needs_grad = [leaf is not None and leaf.requires_grad and with_gradient for leaf in head.leaves]
    settings = settings_of(config, compute)
    product = checks.product_dtype(hidden, weight, bias)
    work = _chunk_size(chunk_size, hidden, own), count("num_active", num_active, 0)
    inputs, shared, groups = _with_sequences(inputs, tensors, config)
    counted = _is_wanted(histogram)
    grads = NeedsGrad(*needs_grad)
    if own.shard is not None:
        _refuse_with_shard(sampling_mask=sampling_mask)
        _refuse_verdicts_with_shard(shared, config)
        arguments = IPOLossFromHiddenShardedArguments(
            head, inputs, settings, *work, grads, own.shard, reduce_hidden_grad, in_parts
        )
        results = with_torch_errors(run_ipo_loss_from_hidden_sharded, product, arguments)
    else:
        if shared is not None and config.judges_sequences:
            of_head = head.detached(product)
            inputs = with_totals(
                inputs, SequenceTotalsFromHiddenArguments(of_head, inputs, settings, *work, shared)
            )
        results = with_torch_errors(
            run_ipo_loss_from_hidden,
            product,
            IPOLossFromHiddenArguments(head, inputs, settings, of_ids, *work, grads),
        )
    loss, logprobs, entropies, *rows = results
    call = _Call(tensors, inputs, config, settings, shared, groups)
    policy = Policy(logprobs, entropies if entropy else None, scaling, labels, weight.shape[0])
    metrics = _metrics(MetricRows(*rows), call, policy, counted)
    return IPOOutput(loss, metrics, logprobs, entropies if entropy else None)


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
    logit_scale: float | None = None,
    bias: torch.Tensor | None = None,
    sampling_mask: torch.Tensor | None = None,
    entropy: bool = True,
    candidates: torch.Tensor | None = None,
    tp_group: Group | None = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    reduce_hidden_grad: bool = True,
    sequence_parallel: bool = False,
) -> tuple[Any, ...]:
    """``token_logprobs`` of ``hidden @ weight.T + bias``, whose logits never exist as a whole.

    Both results are differentiable; the backward pass makes the logits again, a chunk at a time
    (four matrix products in all), and only for rows into which a gradient flows that is not exactly
    0. A label of -100 marks a row that takes no part: no product, outputs 0, gradient 0. On a GPU
    each pass reads one count back (under CUDA graph capture it works on all rows instead).

    Args:
        hidden, weight, chunk_size, bias: as for ``ipo_loss_from_hidden``.
        labels, temperature, softcap, logit_scale, sampling_mask, entropy, candidates: as for
            ``token_logprobs``.
        tp_group, vocab_size, vocab_start, reduce_hidden_grad, sequence_parallel: as for
            ``ipo_loss_from_hidden``; not with ``candidates``. The gradients that flow into the
            results must be the same on all ranks; all labelled rows then take part in the backward
            pass.

    Returns:
        As ``token_logprobs``; float64 for float64 inputs, else float32.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as for ``token_logprobs``.
    """
    weight, bias, own = _own_rows(weight, bias, tp_group, vocab_size, vocab_start)
    _check_reduces(reduce_hidden_grad, tp_group)
    hidden, own, in_parts = _own_states(
        hidden, labels, own, tp_group, reduce_hidden_grad, sequence_parallel
    )
    scaling = _scaling(temperature, sampling_mask, entropy, hidden)
    head = HeadInputs(hidden, weight, bias, labels, scaling)
    candidates = _apart(candidates, sampling_mask)
    is_sharded = own.shard is not None
    checks.check_hidden(head, candidates, is_sharded=is_sharded, sequence_parallel=in_parts)
    checks.check_no_gradient(None, temperature=scaling.temperature)
    head = head._replace(scaling=logit_scaling(scaling, softcap, logit_scale, hidden))
    dtype, chunk = checks.product_dtype(hidden, weight, bias), _chunk_size(chunk_size, hidden, own)
    if own.shard is not None:
        _refuse_with_shard(sampling_mask=sampling_mask, candidates=candidates)
        logprobs, entropies, *_ = with_torch_errors(
            run_linear_token_logprobs_sharded,
            dtype,
            LinearTokenLogprobsShardedArguments(
                head, chunk, own.shard, reduce_hidden_grad, in_parts
            ),
        )
        return logprobs, entropies if entropy else None
    results = with_torch_errors(
        run_linear_token_logprobs, dtype, LinearTokenLogprobsArguments(head, candidates, chunk)
    )
    return _wanted(results, entropy, candidates)


def _own_logits(
    logits: torch.Tensor, tp_group: Group | None, vocab_size: int | None, vocab_start: int | None
) -> tuple[torch.Tensor, OwnColumns]:
    """Without padding; whether they are logits at all is looked at later."""
    logits, vocabulary = own_part("logits", logits, -1, tp_group)
    vocab_size = vocabulary if vocab_size is None else vocab_size
    columns = _length(logits, -1)
    own = own_columns("logits", columns, tp_group, vocab_size, vocab_start)
    return (logits[..., : own.width] if own.width < columns else logits), own


def _own_rows(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tp_group: Group | None,
    vocab_size: int | None,
    vocab_start: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None, OwnColumns]:
    """The same of a head's weight and bias."""
    weight, vocabulary = own_part("weight", weight, 0, tp_group)
    if bias is not None:
        bias, _ = own_part("bias", bias, 0, tp_group)
    vocab_size = vocabulary if vocab_size is None else vocab_size
    rows = _length(weight, 0)
    own = own_columns("weight", rows, tp_group, vocab_size, vocab_start)
    if own.width < rows:
        weight, bias = weight[: own.width], None if bias is None else bias[: own.width]
    return weight, bias, own


def _own_states(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    own: OwnColumns,
    tp_group: Group | None,
    reduces: bool,
    sequence_parallel: bool,
) -> tuple[torch.Tensor, OwnColumns, bool]:
    """This rank's hidden states, and whether other ranks have those of other tokens."""
    in_parts = wants_parts(hidden, tp_group, reduces, sequence_parallel)
    if not in_parts:
        return own_copy("hidden", hidden, tp_group, reduces), own, False
    hidden, _ = own_part("hidden", hidden, 0, tp_group)
    if own.shard is None or tp_group is None:  # a group of one rank
        return hidden, own, False
    if not isinstance(hidden, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return hidden, own, True  # which is refused later
    problem = problem_of_states(hidden, labels, tp_group)
    shard = own.shard._replace(problem=own.shard.problem or problem)
    return hidden, own._replace(shard=shard), True


def _length(tensor: torch.Tensor, dim: int) -> int:
    """0 of what has none, which is refused later."""
    has_shape = isinstance(tensor, torch.Tensor) and not tensor.is_nested and tensor.dim() > 0
    return tensor.shape[dim] if has_shape else 0


def _refuse_with_shard(**given: object) -> None:
    """Raises for what needs a whole row of logits in one place."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}: expected it left out with tp_group, whose ranks have a part of each row, "
                f"got {value if value is True else type(value).__name__}; leave it out, or gather "
                "the vocabulary and leave out tp_group"
            )


def _refuse_verdicts_with_shard(shared: SharedSequences | None, config: IPOConfig) -> None:
    if shared is not None and config.judges_sequences:
        raise ValueError(
            "sequence_ids: expected it left out with tp_group where the config judges whole "
            "sequences, got both; take ipo_loss of the log-probabilities of token_logprobs or "
            "linear_token_logprobs, which have a tp_group"
        )


def _check_reduces(reduce_hidden_grad: bool, tp_group: Group | None) -> None:
    if not isinstance(reduce_hidden_grad, bool):
        raise TypeError(
            f"reduce_hidden_grad: expected True or False, got {type(reduce_hidden_grad).__name__}"
        )
    if not reduce_hidden_grad and tp_group is None:
        raise ValueError(
            "reduce_hidden_grad: expected True without tp_group, got False: one rank's gradient is "
            "all of it; pass the group of ranks that share the vocabulary as tp_group"
        )


def _scaling(
    temperature: float | torch.Tensor | None,
    sampling_mask: torch.Tensor | None,
    entropy: bool,
    like: torch.Tensor,
) -> LogitScaling:
    """What a function over logits was given, but for scale and softcap, which come once checked."""
    if not isinstance(entropy, bool):
        raise TypeError(f"entropy: expected True or False, got {type(entropy).__name__}")
    return LogitScaling(scalar("temperature", temperature, like), 0.0, sampling_mask, entropy)


def _apart(
    candidates: torch.Tensor | None, sampling_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """torch.compile (2.14) takes no Function that is given the same tensor twice."""
    if candidates is sampling_mask and candidates is not None and torch.compiler.is_compiling():
        return candidates.view(candidates.shape)
    return candidates


def _wanted(
    results: tuple[torch.Tensor, ...], entropy: bool, candidates: torch.Tensor | None
) -> tuple[Any, ...]:
    """What the caller of a block has asked for."""
    logprobs, entropies, _, candidate_logprobs = results
    wanted = (logprobs, entropies if entropy else None)
    return wanted if candidates is None else (*wanted, candidate_logprobs)


def _check_may_be_overwritten(logits: torch.Tensor) -> None:
    base = torch_internals.base_of_view(logits)
    if logits.is_leaf or (base is not None and base.is_leaf):
        raise ValueError(
            "logits: expected the result of an operation because inplace is True, got a leaf or a "
            "view of one, whose value belongs to the caller; pass inplace=False"
        )
    if base is None or torch.compiler.is_compiling():  # the compiler refuses it while it traces
        return
    if logits.is_neg():
        raise ValueError(
            "logits: expected no negated view because inplace is True, got one (the imaginary part "
            "of a conjugate is one), which torch would write to through a copy; pass inplace=False "
            "or logits.resolve_neg()"
        )
    if not torch_internals.view_may_change(logits):
        raise ValueError(
            "logits: expected no part of unbind, split or chunk and no view made in a custom "
            "Function because inplace is True: autograd lets no one change them; pass "
            "inplace=False or a slice, such as logits[:, :-1]"
        )


def _loss_arguments(
    trainer_logprobs: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    normalizer: float | torch.Tensor | None,
    config: IPOConfig,
    tensors: OptionalTensors,
    trainer_mask_logprobs: torch.Tensor | None,
) -> tuple[IPOLossArguments, SharedSequences | None, MetricGroups | None]:
    """Of a call of the loss from log-probabilities, checked."""
    _check_config(config)
    inference_mask_logprobs = _of_ids(tensors, config)
    inputs = _inputs(
        inference_logprobs, advantages, loss_mask, normalizer, trainer_logprobs, tensors
    )
    checks.check_per_token_loss(trainer_logprobs, inputs, config.teacher_tau)
    _check_given("trainer_mask_logprobs", trainer_mask_logprobs, config)
    if trainer_mask_logprobs is not None and inference_mask_logprobs is not None:
        checks.check_centering(trainer_logprobs, trainer_mask_logprobs, inference_mask_logprobs)
    checks.check_no_gradient(inputs, inference_mask_logprobs=inference_mask_logprobs)
    with_gradient = trainer_logprobs.requires_grad and torch.is_grad_enabled()
    compute = checks.compute_dtype(trainer_logprobs, inference_logprobs)
    settings = settings_of(config, compute)
    inputs, shared, groups = _with_sequences(inputs, tensors, config)
    if shared is not None and config.judges_sequences:
        policy = trainer_logprobs.detach()
        inputs = with_totals(inputs, SequenceTotalsArguments(policy, inputs, settings, shared))
    return IPOLossArguments(trainer_logprobs, inputs, settings, with_gradient), shared, groups


def _of_ids(tensors: OptionalTensors, config: IPOConfig) -> torch.Tensor | None:
    """The sampler's log-probabilities of ids, which not every operator takes."""
    of_ids = tensors.get("inference_mask_logprobs")
    _check_given("inference_mask_logprobs", of_ids, config)
    return of_ids


def _check_given(name: str, of_ids: torch.Tensor | None, config: IPOConfig) -> None:
    """Raises unless log-probabilities of ids are there just where something reads them."""
    if config.score_centering and of_ids is None:
        raise ValueError(
            f"{name}: expected a tensor because config.score_centering is True, got None"
        )
    if of_ids is not None and not config.score_centering:
        raise ValueError(
            f"{name}: expected None because config.score_centering is False, got a tensor that "
            "nothing would read; leave it out, or use IPOConfig.ipo(score_centering=True)"
        )


def _check_no_gradient(
    inputs: LossInputs, scaling: LogitScaling, of_ids: torch.Tensor | None
) -> None:
    checks.check_no_gradient(
        inputs, temperature=scaling.temperature, inference_mask_logprobs=of_ids
    )


def _centered(
    loss: torch.Tensor,
    metrics: MetricRows,
    arguments: IPOLossArguments,
    trainer_mask_logprobs: torch.Tensor | None,
    inference_mask_logprobs: torch.Tensor | None,
) -> tuple[torch.Tensor, MetricRows]:
    """Loss and metrics of a call with score centering, if it has any, added to them."""
    if trainer_mask_logprobs is None or inference_mask_logprobs is None:
        return loss, metrics
    with_gradient = trainer_mask_logprobs.requires_grad and torch.is_grad_enabled()
    added, sums = with_torch_errors(
        run_score_centering,
        ScoreCenteringArguments(
            trainer_mask_logprobs,
            arguments.trainer_logprobs.detach(),
            arguments.inputs,
            arguments.settings,
            inference_mask_logprobs,
            None,
            with_gradient,
        ),
    )
    return loss + added, with_centering(library.operators(), metrics, sums)


def _is_wanted(histogram: object) -> bool:
    if not isinstance(histogram, bool):
        raise TypeError(f"histogram: expected True or False, got {type(histogram).__name__}")
    return histogram


def _check_config(config: object) -> None:
    if not isinstance(config, IPOConfig):
        raise TypeError(
            f"config: expected an IPOConfig, got {type(config).__name__}; "
            "use IPOConfig.from_mapping"
        )


def _inputs(
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    normalizer: float | torch.Tensor | None,
    like: torch.Tensor,
    tensors: OptionalTensors,
) -> LossInputs:
    """Not yet checked."""
    given: dict[str, Any] = {name: tensors.get(name) for name in _OPERATORS_OWN}
    number = scalar("normalizer", normalizer, like)
    return LossInputs(inference_logprobs, advantages, loss_mask, normalizer=number, **given)


def _with_sequences(
    inputs: LossInputs, tensors: OptionalTensors, config: IPOConfig
) -> tuple[LossInputs, SharedSequences | None, MetricGroups | None]:
    """What the segments are: sequences, or pieces of those that ranks share; and the groups."""
    shared = shared_sequences(tensors, config)
    groups = metric_groups(tensors, inputs.loss_mask, config)
    if groups is not None:
        inputs = poisoned_by_groups(inputs, groups)
    if shared is not None:
        return poisoned_by_ids(inputs, shared), shared, groups
    by_row = config.judges_sequences or (groups is not None and not groups.of_tokens)
    return _with_rows(inputs) if by_row else inputs, None, groups


def _with_rows(inputs: LossInputs) -> LossInputs:
    """What counts as sequences without ``cu_seqlens``: the rows of ``[..., T]``."""
    mask = inputs.loss_mask
    if inputs.cu_seqlens is not None or mask.dim() < 2:
        return inputs
    rows = torch.arange(math.prod(mask.shape[:-1]) + 1, dtype=torch.int32, device=mask.device)
    return inputs._replace(cu_seqlens=rows * mask.shape[-1])


class _Call(NamedTuple):
    """What of a call's arguments its metrics are made with."""

    tensors: OptionalTensors
    inputs: LossInputs
    config: IPOConfig
    settings: LossSettings
    shared: SharedSequences | None
    groups: MetricGroups | None


def _metrics(rows: MetricRows, call: _Call, policy: Policy, counted: bool) -> IPOMetrics:
    """Of the operator's means, sums and extremes, for what the caller has named: the segments, or
    the sequences that they are pieces of; and by groups. ``counted``: with a histogram."""
    tensors, inputs, _, _, shared, groups = call
    metrics = _named(rows, call, policy, _histogram(inputs, policy) if counted else None)
    by_group = None
    if groups is not None:
        groups = valid_groups(groups, inputs)
        if groups.of_tokens:
            by_group = _metrics_of_tokens(groups, call, policy, counted)
        else:
            by_group = metrics._folded(groups.ids.flatten(), groups.num_groups)
    if shared is not None:
        metrics = metrics._folded(shared.sequence_ids, shared.num_sequences)
    elif inputs.cu_seqlens is not tensors.get("cu_seqlens"):
        metrics = metrics.total()
    metrics.by_group = by_group
    return metrics


def _metrics_of_tokens(
    groups: MetricGroups, call: _Call, policy: Policy, counted: bool
) -> IPOMetrics:
    replayed = replayed_of(policy, call.inputs)
    inputs, policy, order = in_order(groups, call.inputs, policy)
    if replayed is not None:
        replayed = replayed.index_select(0, order)
    rows = metrics_of_tokens(inputs, call.settings, policy, replayed)
    return _named(rows, call, policy, _histogram(inputs, policy) if counted else None)


def _histogram(inputs: LossInputs, policy: Policy) -> torch.Tensor:
    of_loss = (inputs.inference_logprobs, inputs.loss_mask, inputs.cu_seqlens)
    counts = library.operators().log_ratio_histogram(policy.logprobs.detach(), *of_loss)
    return cast(torch.Tensor, counts)


def _named(
    rows: MetricRows, call: _Call, policy: Policy, histogram: torch.Tensor | None
) -> IPOMetrics:
    config, scaling = call.config, policy.scaling
    return IPOMetrics(
        *rows,
        histogram,
        has_teacher=call.inputs.teacher_logprobs is not None,
        has_entropy=scaling is not None and scaling.with_entropy,
        has_rollout_rule=config.has_rollout_rule,
        has_sequence_rule=config.has_sequence_rule,
        has_clip=config.clip_high is not None,
        has_cap=config.ratio_cap is not None,
        has_replay=scaling is not None and scaling.sampling_mask is not None,
        has_centering=config.score_centering,
    )


def _chunk_size(chunk_size: int | None, hidden: torch.Tensor, own: OwnColumns) -> int:
    """Of numbers that are the same on all ranks."""
    given = count("chunk_size", chunk_size, 1)
    if given is None:
        return default_chunk_size(own.per_rank, hidden.dtype, hidden.device)
    return given
