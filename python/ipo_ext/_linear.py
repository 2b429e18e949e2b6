"""The operators from hidden states and the LM head's weight: the loss, and log-probabilities.

The [tokens, vocabulary] logits never exist: a chunk of the tokens that take part becomes logits,
and these become their own gradient. The chunk loop is hidden from whatever traces: a graph holds
one node.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd import forward_ad

from ipo_ext import _checks, _operators
from ipo_ext._chunks import Gradients, Head, Rows
from ipo_ext._ops.arguments import (
    OPERATORS,
    HeadInputs,
    IPOLossFromHiddenArguments,
    IPOLossFromHiddenResults,
    LinearTokenLogprobsArguments,
    LinearTokenLogprobsBackwardArguments,
    LinearTokenLogprobsBackwardResults,
    LinearTokenLogprobsResults,
    LogprobsBackward,
    Metrics,
    NeedsGrad,
    flatten,
    schema,
    unflatten,
)

_IGNORED_LABEL = -100


# -------------------------------------------------------------------------------------------------
# Kernels


def _ipo_loss_from_hidden(
    ops: Any, arguments: IPOLossFromHiddenArguments
) -> IPOLossFromHiddenResults:
    shape = arguments.head.labels.shape
    arguments = arguments._replace(
        head=_flat_head(arguments.head), inputs=arguments.inputs.map_tokens(_flat)
    )
    head, inputs, num_active = arguments.head, arguments.inputs, arguments.num_active
    fault = ops.find_faults(
        head.labels,
        head.scaling.temperature,
        inputs.loss_mask,
        inputs.cu_seqlens,
        inputs.normalizer,
        head.weight.shape[0],
        head.labels.numel() if num_active is None else num_active,
    )
    in_one_pass = arguments.settings.rollout_low is None
    make = _loss_in_one_pass if in_one_pass else _loss_of_whole_rollouts
    results = make(ops, arguments, fault)
    return results._replace(
        logprobs=results.logprobs.view(shape), entropy=results.entropy.view(shape)
    )


def _loss_in_one_pass(
    ops: Any, arguments: IPOLossFromHiddenArguments, fault: torch.Tensor
) -> IPOLossFromHiddenResults:
    """What tokens pay, and the gradients, as soon as a chunk's logits are there."""
    (hidden, weight, labels, scaling), inputs = arguments.head, arguments.inputs
    rows = Rows.of(inputs.loss_mask, arguments.num_active)
    chunks = rows.chunks(arguments.chunk_size)
    head = Head(weight, _longest(chunks))
    fill = _value_of_no_row(fault, head.compute)
    logprobs = rows.new_output((rows.tokens,), fill)
    entropy = rows.new_output((rows.tokens,), fill)
    gradients = Gradients(head, hidden, rows, fill, arguments.needs_grad)
    for chunk in chunks:
        take = functools.partial(rows.take, chunk=chunk)
        states = rows.take_states(hidden, chunk)
        inputs_here = inputs.map_tokens(take)._replace(cu_seqlens=None)
        logits = head.logits(states)
        gradient = gradients.over(logits)
        logprobs_here, entropy_here = ops.chunk_logprobs_and_gradient(
            logits,
            take(labels),
            take(scaling.temperature),
            scaling.softcap,
            *inputs_here,
            *arguments.settings,
            fault,
            gradient,
        )
        rows.put(logprobs, chunk, logprobs_here)
        rows.put(entropy, chunk, entropy_here)
        pays = inputs_here.loss_mask & logprobs_here.isfinite()
        gradients.add(chunk, gradient, states, pays)

    loss, _, metrics = _loss_and_metrics(ops, arguments, fault, logprobs, entropy, False)
    return IPOLossFromHiddenResults(loss, logprobs, entropy, metrics, *gradients.finished())


def _loss_of_whole_rollouts(
    ops: Any, arguments: IPOLossFromHiddenArguments, fault: torch.Tensor
) -> IPOLossFromHiddenResults:
    """A rollout rule needs all log-probabilities of a sequence before any gradient.

    So the logits are made twice, the second time for tokens that pay; without ``num_active`` each
    time reads a count back.
    """
    loss_mask, num_active = arguments.inputs.loss_mask, arguments.num_active
    labels = arguments.head.labels.masked_fill(~loss_mask, _IGNORED_LABEL)
    head, chunk_size = arguments.head._replace(labels=labels), arguments.chunk_size
    rows = Rows.of(loss_mask, num_active)
    logprobs, entropy, softmax_stats = _logprobs_of(ops, rows, fault, head, chunk_size)
    needs_grad_logprobs = any(arguments.needs_grad)
    loss, grad_logprobs, metrics = _loss_and_metrics(
        ops, arguments, fault, logprobs, entropy, needs_grad_logprobs
    )
    grad_logprobs = grad_logprobs.to(logprobs.dtype)
    if needs_grad_logprobs:
        rows = Rows.of(loss_mask & (grad_logprobs != 0), num_active)
    backward = LogprobsBackward(entropy, softmax_stats, grad_logprobs, torch.zeros_like(entropy))
    gradients = _gradients_of(ops, rows, fault, head, chunk_size, backward, arguments.needs_grad)
    return IPOLossFromHiddenResults(loss, logprobs, entropy, metrics, *gradients)


def _loss_and_metrics(
    ops: Any,
    arguments: IPOLossFromHiddenArguments,
    fault: torch.Tensor,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    needs_grad_logprobs: bool,
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """Loss, its derivatives by the log-probabilities, metrics."""
    dtype = arguments.head.weight.dtype
    loss, grad_logprobs, *metrics = ops.loss_and_metrics(
        logprobs,
        entropy,
        *arguments.inputs,
        *arguments.settings,
        fault,
        needs_grad_logprobs,
        not needs_grad_logprobs or _operators.gradient_is_normalized(dtype),
    )
    return loss, grad_logprobs, Metrics(*metrics)


def _linear_token_logprobs(
    ops: Any, arguments: LinearTokenLogprobsArguments
) -> LinearTokenLogprobsResults:
    head, shape = _flat_head(arguments.head), arguments.head.labels.shape
    fault = _faults_of_head(ops, head)
    rows = Rows.of(head.labels != _IGNORED_LABEL, None)
    logprobs, entropy, stats = _logprobs_of(ops, rows, fault, head, arguments.chunk_size)
    return LinearTokenLogprobsResults(logprobs.view(shape), entropy.view(shape), stats)


def _logprobs_of(
    ops: Any, rows: Rows, fault: torch.Tensor, inputs: HeadInputs, chunk_size: int
) -> LinearTokenLogprobsResults:
    """All of them as ``[tokens]``."""
    chunks = rows.chunks(chunk_size)
    head = Head(inputs.weight, _longest(chunks))
    fill = _value_of_no_row(fault, head.compute)
    logprobs = rows.new_output((rows.tokens,), fill)
    entropy = rows.new_output((rows.tokens,), fill)
    softmax_stats = rows.new_output((2, rows.tokens), fill)
    for chunk in chunks:
        take = functools.partial(rows.take, chunk=chunk)
        logits = head.logits(rows.take_states(inputs.hidden, chunk))
        logprobs_here, entropy_here, stats_here = ops.chunk_logprobs(
            logits,
            take(inputs.labels),
            take(inputs.scaling.temperature),
            inputs.scaling.softcap,
            fault,
        )
        rows.put(logprobs, chunk, logprobs_here)
        rows.put(entropy, chunk, entropy_here)
        rows.put(softmax_stats.t(), chunk, stats_here.t())
    return LinearTokenLogprobsResults(logprobs, entropy, softmax_stats)


def _linear_token_logprobs_backward(
    ops: Any, arguments: LinearTokenLogprobsBackwardArguments
) -> LinearTokenLogprobsBackwardResults:
    head, (entropy, softmax_stats, *grads) = _flat_head(arguments.head), arguments.backward
    backward = LogprobsBackward(_flat(entropy), softmax_stats, *map(_flat, grads))
    fault = _faults_of_head(ops, head)
    flows = (backward.grad_logprobs != 0) | (backward.grad_entropy != 0)
    rows = Rows.of((head.labels != _IGNORED_LABEL) & flows, None)
    return _gradients_of(
        ops, rows, fault, head, arguments.chunk_size, backward, arguments.needs_grad
    )


def _gradients_of(
    ops: Any,
    rows: Rows,
    fault: torch.Tensor,
    inputs: HeadInputs,
    chunk_size: int,
    backward: LogprobsBackward,
    needs_grad: NeedsGrad,
) -> LinearTokenLogprobsBackwardResults:
    """By hidden states and weight, of the active rows, whose logits are made again."""
    chunks = rows.chunks(chunk_size) if any(needs_grad) else []
    head = Head(inputs.weight, _longest(chunks))
    fill = _value_of_no_row(fault, head.compute)
    gradients = Gradients(head, inputs.hidden, rows, fill, needs_grad)
    for chunk in chunks:
        take = functools.partial(rows.take, chunk=chunk)
        states = rows.take_states(inputs.hidden, chunk)
        logits = head.logits(states)
        gradient = gradients.over(logits)
        ops.chunk_logprobs_backward(
            logits,
            take(inputs.labels),
            take(inputs.scaling.temperature),
            inputs.scaling.softcap,
            take(backward.entropy),
            take(backward.softmax_stats.t()).t(),
            take(backward.grad_logprobs),
            take(backward.grad_entropy),
            fault,
            gradient,
        )
        gradients.add(chunk, gradient, states, take(rows.active))
    return LinearTokenLogprobsBackwardResults(*gradients.finished())


def _faults_of_head(ops: Any, head: HeadInputs) -> torch.Tensor:
    fault = ops.find_faults(
        head.labels,
        head.scaling.temperature,
        None,
        None,
        None,
        head.weight.shape[0],
        head.labels.numel(),
    )
    return cast(torch.Tensor, fault)


def _flat_head(head: HeadInputs) -> HeadInputs:
    """With what belongs to tokens as ``[tokens]``."""
    temperature = head.scaling.temperature
    if temperature is not None and temperature.dim() > 0:
        temperature = _flat(temperature)
    scaling = head.scaling._replace(temperature=temperature)
    return head._replace(labels=_flat(head.labels), scaling=scaling)


def _flat(tensor: Any) -> Any:
    """[...] -> [tokens]; None as it is."""
    return None if tensor is None else tensor.reshape(-1)


def _longest(chunks: list[slice]) -> int:
    return max((chunk.stop - chunk.start for chunk in chunks), default=0)


def _value_of_no_row(fault: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What tokens hold that take no part, a scalar: 0, or NaN under a contract fault."""
    return torch.where(fault[0] != 0, math.nan, torch.zeros((), dtype=dtype, device=fault.device))


# -------------------------------------------------------------------------------------------------
# Fakes


def _ipo_loss_from_hidden_fake(arguments: IPOLossFromHiddenArguments) -> IPOLossFromHiddenResults:
    head, inputs = arguments.head, arguments.inputs
    _checks.check_hidden_loss(head, inputs, arguments.settings.teacher_tau)
    hidden, shape = head.hidden, head.labels.shape
    per_token = _checks.widened(hidden.dtype)
    compute = _checks.compute_dtype(hidden, inputs.inference_logprobs)
    return IPOLossFromHiddenResults(
        hidden.new_empty((), dtype=compute),
        hidden.new_empty(shape, dtype=per_token),
        hidden.new_empty(shape, dtype=per_token),
        _operators.metrics_fake(hidden, inputs.cu_seqlens, compute),
        *_gradients_fake(head, arguments.needs_grad),
    )


def _gradients_fake(head: HeadInputs, needs_grad: NeedsGrad) -> LinearTokenLogprobsBackwardResults:
    vocabulary, width = head.weight.shape
    tokens = head.labels.numel() if needs_grad.needs_grad_hidden else 0
    vocabulary = vocabulary if needs_grad.needs_grad_weight else 0
    return LinearTokenLogprobsBackwardResults(
        head.hidden.new_empty((tokens, width)),
        head.weight.new_empty((vocabulary, width), dtype=_checks.widened(head.weight.dtype)),
    )


def _linear_token_logprobs_fake(
    arguments: LinearTokenLogprobsArguments,
) -> LinearTokenLogprobsResults:
    head = arguments.head
    _checks.check_hidden(head)
    dtype = _checks.widened(head.hidden.dtype)
    return LinearTokenLogprobsResults(
        head.hidden.new_empty(head.labels.shape, dtype=dtype),
        head.hidden.new_empty(head.labels.shape, dtype=dtype),
        head.hidden.new_empty((2, head.labels.numel()), dtype=dtype),
    )


def _linear_token_logprobs_backward_fake(
    arguments: LinearTokenLogprobsBackwardArguments,
) -> LinearTokenLogprobsBackwardResults:
    return _gradients_fake(arguments.head, arguments.needs_grad)


# -------------------------------------------------------------------------------------------------
# Autograd of the loss


def _loss_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    arguments = unflatten(IPOLossFromHiddenArguments, inputs)
    _keep_gradients(ctx, arguments, output, arguments.head.weight.dtype, None)
    ctx.num_inputs = len(inputs)


def _keep_gradients(
    ctx: Any,
    arguments: IPOLossFromHiddenArguments,
    output: tuple[Any, ...],
    dtype: torch.dtype,
    anchor: torch.Tensor | None,
) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    hidden, weight, *_ = arguments.head
    ctx.shape, ctx.needs_grad = hidden.shape, arguments.needs_grad
    ctx.dtypes = hidden.dtype, weight.dtype
    normalizer = _operators.normalizer_to_keep(dtype, arguments.inputs.normalizer)
    results = unflatten(IPOLossFromHiddenResults, output)
    ctx.save_for_backward(results.grad_hidden, results.grad_weight, normalizer, anchor)


def _loss_backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    """For those who call the operator: leaves the gradients, two of its outputs, as they are."""
    others = (None,) * (ctx.num_inputs - 2)
    if grad_loss is None:
        return (None, None, *others)
    if torch.is_grad_enabled():
        raise NotImplementedError(_operators.NO_SECOND_DERIVATIVE)
    for name, made, needed in zip(
        NeedsGrad._fields, ctx.needs_grad, ctx.needs_input_grad, strict=False
    ):
        if needed and not made:
            raise RuntimeError(
                f"ipo_ext::ipo_loss_from_hidden: expected {name}=True to run backward, got False"
            )
    grad_hidden, grad_weight, normalizer, _ = ctx.saved_tensors
    factor = _operators.gradient_factor(grad_loss, normalizer)
    hidden_dtype, weight_dtype = ctx.dtypes
    needs_hidden, needs_weight = ctx.needs_grad
    return (
        (grad_hidden * factor).to(hidden_dtype).view(ctx.shape) if needs_hidden else None,
        (grad_weight * factor).to(weight_dtype) if needs_weight else None,
        *others,
    )


class IPOLossFromHiddenFunction(torch.autograd.Function):
    """``ipo_loss_from_hidden``, whose gradients are scaled where they lie: one backward only.

    Hidden states and weight are cast to ``dtype`` here, so that under autocast the gradient of a
    float32 weight is never rounded to less.
    """

    @staticmethod
    def forward(
        anchor: torch.Tensor | None, dtype: torch.dtype, *inputs: Any
    ) -> tuple[torch.Tensor, ...]:
        return tuple(_operators.library().ipo_loss_from_hidden(*_cast(dtype, inputs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        anchor, dtype, *values = inputs
        arguments = unflatten(IPOLossFromHiddenArguments, values)
        _keep_gradients(ctx, arguments, output, dtype, anchor)
        ctx.num_inputs = len(inputs)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        others = (None,) * (ctx.num_inputs - 4)
        if grad_loss is None:
            return (None, None, None, None, *others)
        _operators.hand_over_once(ctx)
        grad_hidden, grad_weight, normalizer, anchor = ctx.saved_tensors
        factor = _operators.gradient_factor(grad_loss, normalizer)
        hidden_dtype, weight_dtype = ctx.dtypes
        needs_hidden, needs_weight = ctx.needs_grad
        scale: Any = _operators.ScaleOnce.apply
        of_hidden = of_weight = None
        if needs_hidden:
            of_hidden = scale(grad_hidden, factor, hidden_dtype, anchor).view(ctx.shape)
        if needs_weight:
            of_weight = scale(grad_weight, factor, weight_dtype, anchor)
        return (None, None, of_hidden, of_weight, *others)

    vmap = staticmethod(_operators.refuse_vmap)


class IPOLossFromHiddenUnderForwardMode(_operators.RefusesTangents, IPOLossFromHiddenFunction):
    pass


def run_ipo_loss_from_hidden(
    dtype: torch.dtype, arguments: IPOLossFromHiddenArguments
) -> tuple[torch.Tensor, ...]:
    """Loss, log-probabilities, entropy, means, sums, extremes; differentiates as the inputs ask."""
    values = flatten(arguments)
    function: Any
    if forward_ad._current_level >= 0:
        function = IPOLossFromHiddenUnderForwardMode
    elif not any(arguments.needs_grad):
        return tuple(_operators.library().ipo_loss_from_hidden(*_cast(dtype, values)))[:6]
    else:
        function = IPOLossFromHiddenFunction
    anchor = _operators.anchor(arguments.head.hidden, arguments.head.weight)
    return tuple(function.apply(anchor, dtype, *values))[:6]


def _cast(dtype: torch.dtype, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hidden states and weight, which come first, in ``dtype``."""
    hidden, weight, *others = values
    return hidden.to(dtype), weight.to(dtype), *others


# -------------------------------------------------------------------------------------------------
# Autograd of the log-probabilities


class LinearTokenLogprobsGradient(torch.autograd.Function):
    """The backward pass of ``linear_token_logprobs``, refusing to be differentiated in turn.

    Its arguments are named one by one: torch.compile traces no ``*inputs`` of a Function within a
    Function.
    """

    @staticmethod
    def forward(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        temperature: torch.Tensor | None,
        softcap: float,
        chunk_size: int,
        entropy: torch.Tensor,
        softmax_stats: torch.Tensor,
        grad_logprobs: torch.Tensor,
        grad_entropy: torch.Tensor,
        needs_grad_hidden: bool,
        needs_grad_weight: bool,
    ) -> tuple[torch.Tensor, ...]:
        gradients = _operators.library().linear_token_logprobs_backward(
            hidden,
            weight,
            labels,
            temperature,
            softcap,
            chunk_size,
            entropy,
            softmax_stats,
            grad_logprobs,
            grad_entropy,
            needs_grad_hidden,
            needs_grad_weight,
        )
        return tuple(gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError(_operators.NO_SECOND_DERIVATIVE)

    vmap = staticmethod(_operators.refuse_vmap)


def _logprobs_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    arguments = unflatten(LinearTokenLogprobsArguments, inputs)
    _keep_for_logprobs(ctx, arguments, output, arguments.head.weight.dtype)


def _keep_for_logprobs(
    ctx: Any,
    arguments: LinearTokenLogprobsArguments,
    output: tuple[Any, ...],
    dtype: torch.dtype,
) -> None:
    hidden, weight, labels, (temperature, ctx.softcap) = arguments.head
    _, entropy, softmax_stats = output
    ctx.mark_non_differentiable(softmax_stats)
    ctx.save_for_backward(hidden, weight, labels, temperature, entropy, softmax_stats)
    ctx.set_materialize_grads(False)  # not for the statistics
    ctx.chunk_size, ctx.dtype = arguments.chunk_size, dtype


def _logprobs_backward(
    ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    others = (None,) * 4
    if grad_logprobs is None and grad_entropy is None:
        return (None, None, *others)
    hidden, weight, labels, temperature, entropy, softmax_stats = ctx.saved_tensors
    backward = _operators.logprobs_backward(entropy, softmax_stats, grad_logprobs, grad_entropy)
    needs_hidden, needs_weight, *_ = ctx.needs_input_grad[-6:]
    run: Any = LinearTokenLogprobsGradient.apply
    grad_hidden, grad_weight = run(
        hidden.to(ctx.dtype),
        weight.to(ctx.dtype),
        labels,
        temperature,
        ctx.softcap,
        ctx.chunk_size,
        *backward,
        needs_hidden,
        needs_weight,
    )
    of_hidden = grad_hidden.to(hidden.dtype).view(hidden.shape) if needs_hidden else None
    of_weight = grad_weight.to(weight.dtype) if needs_weight else None
    return (of_hidden, of_weight, *others)


class LinearTokenLogprobsFunction(torch.autograd.Function):
    """``linear_token_logprobs`` as a function that torch.func understands; casts as the loss."""

    @staticmethod
    def forward(dtype: torch.dtype, *inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(_operators.library().linear_token_logprobs(*_cast(dtype, inputs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        dtype, *values = inputs
        _keep_for_logprobs(ctx, unflatten(LinearTokenLogprobsArguments, values), output, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        gradients: tuple[Any, ...] = _logprobs_backward(ctx, *grad_outputs)
        return (None, *gradients)

    vmap = staticmethod(_operators.refuse_vmap)


class LinearTokenLogprobsUnderForwardMode(_operators.RefusesTangents, LinearTokenLogprobsFunction):
    pass


def run_linear_token_logprobs(
    dtype: torch.dtype, arguments: LinearTokenLogprobsArguments
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropy and what the backward pass needs."""
    hidden, weight, *_ = arguments.head
    values = flatten(arguments)
    function: Any
    if forward_ad._current_level >= 0:
        function = LinearTokenLogprobsUnderForwardMode
    elif not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return tuple(_operators.library().linear_token_logprobs(*_cast(dtype, values)))
    else:
        function = LinearTokenLogprobsFunction
    return tuple(function.apply(dtype, *values))


# -------------------------------------------------------------------------------------------------
# Registration

# Of each operator: what it returns, its kernel, its fake.
_OPERATORS: dict[str, tuple[type[Any], Callable[..., Any], Callable[..., Any]]] = {
    "ipo_loss_from_hidden": (
        IPOLossFromHiddenResults,
        _ipo_loss_from_hidden,
        _ipo_loss_from_hidden_fake,
    ),
    "linear_token_logprobs": (
        LinearTokenLogprobsResults,
        _linear_token_logprobs,
        _linear_token_logprobs_fake,
    ),
    "linear_token_logprobs_backward": (
        LinearTokenLogprobsBackwardResults,
        _linear_token_logprobs_backward,
        _linear_token_logprobs_backward_fake,
    ),
}
_AUTOGRAD: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "ipo_loss_from_hidden": (_loss_backward, _loss_setup_context),
    "linear_token_logprobs": (_logprobs_backward, _logprobs_setup_context),
}

# Libraries unregister what they hold when they are collected.
_libraries: list[torch.library.Library] = []


def register(namespace: str) -> None:
    """Defines the operators of ``namespace``, over its C++ operators, with fakes and autograd."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    for name, (results, kernel, fake) in _OPERATORS.items():
        # They read counts back, unless told.
        text = name + schema(OPERATORS[name], results)
        library.define(text, tags=(torch.Tag.cudagraph_unsafe,))
        for key in ("CPU", "CUDA"):
            library.impl(name, _kernel(name, kernel, namespace), key)
        by_name = _operators.by_name(name, lambda arguments, fake=fake: flatten(fake(arguments)))
        torch.library.register_fake(f"{namespace}::{name}", by_name, lib=library)
        torch.library.register_vmap(f"{namespace}::{name}", _operators.refuse_vmap, lib=library)
    for name, (backward, setup_context) in _AUTOGRAD.items():
        torch.library.register_autograd(
            f"{namespace}::{name}", backward, setup_context=setup_context, lib=library
        )


def _kernel(name: str, function: Any, namespace: str) -> Any:
    """``function`` over the C++ operators of ``namespace``, in the precision that it asks for."""
    no_views = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

    def kernel(hidden: torch.Tensor, *others: Any) -> Any:
        arguments = unflatten(OPERATORS[name], (hidden, *others))
        with (
            torch.no_grad(),
            torch.autocast(hidden.device.type, enabled=False),
            torch._C._ExcludeDispatchKeyGuard(no_views),  # what reshapes here is no view outside
        ):
            return flatten(function(getattr(torch.ops, namespace), arguments))

    return kernel


register("ipo_ext")
