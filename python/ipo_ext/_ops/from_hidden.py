"""From hidden states: how a call for the loss or for log-probabilities differentiates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ipo_ext._ops.arguments import (
    IPOLossFromHiddenArguments,
    IPOLossFromHiddenResults,
    IPOLossFromHiddenShardedArguments,
    LinearTokenLogprobsArguments,
    LinearTokenLogprobsShardedArguments,
    NeedsGrad,
    flatten,
    unflatten,
)
from ipo_ext._ops.autograd import (
    NO_SECOND_DERIVATIVE,
    Formula,
    NoSecondDerivative,
    anchor,
    logprobs_backward,
    refuse_vmap,
    refusing_tangents,
    savable,
    scale_once,
    with_signature,
)
from ipo_ext._ops.changing_numbers import as_operands, operator
from ipo_ext._ops.torch_internals import in_forward_mode

# -------------------------------------------------------------------------------------------------
# The loss


def _loss_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    arguments = unflatten(IPOLossFromHiddenArguments, inputs)
    _keep_gradients(ctx, arguments, output, None)
    ctx.num_inputs = len(inputs)


def _keep_gradients(
    ctx: Any,
    arguments: IPOLossFromHiddenArguments | IPOLossFromHiddenShardedArguments,
    output: tuple[Any, ...],
    anchor: torch.Tensor | None,
) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.needs_grad = arguments.head.hidden.shape, arguments.needs_grad
    ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in arguments.head.leaves]
    ctx.save_for_backward(*unflatten(IPOLossFromHiddenResults, output).gradients, anchor)


def _loss_backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    """For those who call the operator: leaves the gradients, three of its outputs, as they are."""
    if grad_loss is None:
        return _for_inputs(ctx)
    if torch.is_grad_enabled():
        raise NotImplementedError(NO_SECOND_DERIVATIVE)
    for name, made, needed in zip(
        NeedsGrad._fields, ctx.needs_grad, ctx.needs_input_grad, strict=False
    ):
        if needed and not made:
            raise RuntimeError(
                f"ipo_ext::ipo_loss_from_hidden: expected {name}=True to run backward, got False"
            )
    *made, _ = ctx.saved_tensors
    gradients = _gradients(ctx, made, lambda gradient, dtype: (gradient * grad_loss).to(dtype))
    return _for_inputs(ctx, *gradients)


def _for_inputs(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Those of the first inputs, and None for all others."""
    return (*gradients, *[None] * (ctx.num_inputs - len(gradients)))


def _gradients(
    ctx: Any,
    made: Sequence[torch.Tensor],
    scale: Callable[[torch.Tensor, torch.dtype], torch.Tensor],
) -> tuple[Any, ...]:
    """By hidden states, weight and bias: those that were made, scaled; None for the others."""
    of_hidden, *others = [
        scale(gradient, dtype) if needed else None
        for gradient, dtype, needed in zip(made, ctx.dtypes, ctx.needs_grad, strict=True)
    ]
    return (None if of_hidden is None else of_hidden.view(ctx.shape), *others)


@with_signature
class IPOLossFromHiddenFunction(torch.autograd.Function):
    """``ipo_loss_from_hidden``, whose gradients are scaled where they lie and handed over.

    Hidden states and weight are cast to ``dtype`` here, so that under autocast the gradient of a
    float32 weight is never rounded to less.
    """

    @staticmethod
    def forward(
        anchor: torch.Tensor | None, dtype: torch.dtype, *inputs: Any
    ) -> tuple[torch.Tensor, ...]:
        return tuple(operator("ipo_loss_from_hidden", inputs)(*_cast(dtype, inputs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        anchor, _, *values = inputs
        arguments = unflatten(IPOLossFromHiddenArguments, values)
        _keep_gradients(ctx, arguments, output, anchor)
        ctx.num_inputs = len(inputs)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_loss is None:
            return _for_inputs(ctx)
        *made, anchor = ctx.saved_tensors

        def scale(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return scale_once(gradient, grad_loss, dtype, anchor)

        return _for_inputs(ctx, None, None, *_gradients(ctx, made, scale))

    vmap = staticmethod(refuse_vmap)


IPOLossFromHiddenInForwardMode = refusing_tangents(IPOLossFromHiddenFunction)


def run_ipo_loss_from_hidden(
    dtype: torch.dtype, arguments: IPOLossFromHiddenArguments
) -> tuple[torch.Tensor, ...]:
    """Loss, log-probabilities, entropy, means, sums, extremes; differentiates as the inputs ask."""
    functions = (IPOLossFromHiddenFunction, IPOLossFromHiddenInForwardMode)
    return _run_loss("ipo_loss_from_hidden", dtype, arguments, *functions)


def _run_loss(
    name: str,
    dtype: torch.dtype,
    arguments: IPOLossFromHiddenArguments | IPOLossFromHiddenShardedArguments,
    function: Any,
    in_forward_mode_function: Any,
) -> tuple[torch.Tensor, ...]:
    values = as_operands(name, flatten(arguments))
    if in_forward_mode():
        function = in_forward_mode_function
    elif not any(arguments.needs_grad):
        return tuple(operator(name, values)(*_cast(dtype, values)))[:6]
    leaves = [leaf for leaf in arguments.head.leaves if leaf is not None]
    return tuple(function.apply(anchor(*leaves), dtype, *values))[:6]


def _cast(dtype: torch.dtype, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hidden states and weight, which come first, in ``dtype``; a bias is added to wide logits."""
    hidden, weight, *others = values
    return hidden.to(dtype), weight.to(dtype), *others


# -------------------------------------------------------------------------------------------------
# Log-probabilities


@with_signature
class LinearTokenLogprobsGradient(NoSecondDerivative):
    """The backward pass of ``linear_token_logprobs``, refusing to be differentiated in turn.

    Its arguments are named one by one: torch.compile traces no ``*inputs`` of a Function within a
    Function.
    """

    @staticmethod
    def forward(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        temperature: torch.Tensor | None,
        softcap: float,
        sampling_mask: torch.Tensor | None,
        with_entropy: bool,
        candidates: torch.Tensor | None,
        chunk_size: int,
        entropy: torch.Tensor,
        softmax_stats: torch.Tensor,
        grad_logprobs: torch.Tensor,
        grad_entropy: torch.Tensor,
        grad_candidates: torch.Tensor | None,
        needs_grad_hidden: bool,
        needs_grad_weight: bool,
        needs_grad_bias: bool,
    ) -> tuple[torch.Tensor, ...]:
        values = (
            hidden,
            weight,
            bias,
            labels,
            temperature,
            softcap,
            sampling_mask,
            with_entropy,
            candidates,
            chunk_size,
            entropy,
            softmax_stats,
            grad_logprobs,
            grad_entropy,
            grad_candidates,
            needs_grad_hidden,
            needs_grad_weight,
            needs_grad_bias,
        )
        return tuple(operator("linear_token_logprobs_backward", values)(*values))

    vmap = staticmethod(refuse_vmap)


def _logprobs_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    arguments = unflatten(LinearTokenLogprobsArguments, inputs)
    _keep_for_logprobs(ctx, arguments, output, arguments.head.weight.dtype)


def _keep_for_logprobs(
    ctx: Any,
    arguments: LinearTokenLogprobsArguments,
    output: tuple[Any, ...],
    dtype: torch.dtype,
) -> None:
    hidden, weight, bias, labels, scaling = arguments.head
    _, entropy, softmax_stats, _ = output
    ctx.mark_non_differentiable(softmax_stats)
    of_tokens = (labels, scaling.temperature, scaling.sampling_mask, arguments.candidates)
    constants = map(savable, of_tokens)
    ctx.save_for_backward(hidden, weight, bias, *constants, entropy.clone(), softmax_stats)
    ctx.softcap, ctx.with_entropy = scaling.softcap, scaling.with_entropy
    ctx.set_materialize_grads(False)  # not for the statistics
    ctx.chunk_size, ctx.dtype = arguments.chunk_size, dtype


def _logprobs_backward(
    ctx: Any,
    grad_logprobs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    _: torch.Tensor | None,
    grad_candidates: torch.Tensor | None,
) -> tuple[Any, ...]:
    others = (None,) * 7
    grads = (grad_logprobs, grad_entropy, grad_candidates)
    if all(grad is None for grad in grads):
        return (None, None, None, *others)
    hidden, weight, bias, labels, *constants, entropy, softmax_stats = ctx.saved_tensors
    temperature, sampling_mask, candidates = constants
    backward = logprobs_backward(entropy, softmax_stats, candidates, grads)
    needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad[-3 - len(others) :]
    run: Any = LinearTokenLogprobsGradient.apply
    grad_hidden, grad_weight, grad_bias = run(
        hidden.to(ctx.dtype),
        weight.to(ctx.dtype),
        bias,
        labels,
        temperature,
        ctx.softcap,
        sampling_mask,
        ctx.with_entropy,
        candidates,
        ctx.chunk_size,
        *backward,
        needs_hidden,
        needs_weight,
        needs_bias,
    )
    of_hidden = grad_hidden.to(hidden.dtype).view(hidden.shape) if needs_hidden else None
    of_weight = grad_weight.to(weight.dtype) if needs_weight else None
    of_bias = grad_bias.to(bias.dtype) if needs_bias else None
    return (of_hidden, of_weight, of_bias, *others)


@with_signature
class LinearTokenLogprobsFunction(torch.autograd.Function):
    """``linear_token_logprobs`` as a function that torch.func understands; casts as the loss."""

    @staticmethod
    def forward(dtype: torch.dtype, *inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(operator("linear_token_logprobs", inputs)(*_cast(dtype, inputs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        dtype, *values = inputs
        _keep_for_logprobs(ctx, unflatten(LinearTokenLogprobsArguments, values), output, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        gradients: tuple[Any, ...] = _logprobs_backward(ctx, *grad_outputs)
        return (None, *gradients)

    vmap = staticmethod(refuse_vmap)


LinearTokenLogprobsInForwardMode = refusing_tangents(LinearTokenLogprobsFunction)


def run_linear_token_logprobs(
    dtype: torch.dtype, arguments: LinearTokenLogprobsArguments
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropy and what the backward pass needs."""
    functions = (LinearTokenLogprobsFunction, LinearTokenLogprobsInForwardMode)
    return _run_logprobs("linear_token_logprobs", dtype, arguments, *functions)


def _run_logprobs(
    name: str,
    dtype: torch.dtype,
    arguments: LinearTokenLogprobsArguments | LinearTokenLogprobsShardedArguments,
    function: Any,
    in_forward_mode_function: Any,
) -> tuple[torch.Tensor, ...]:
    needs_grad = any(leaf is not None and leaf.requires_grad for leaf in arguments.head.leaves)
    values = as_operands(name, flatten(arguments))
    if in_forward_mode():
        function = in_forward_mode_function
    elif not (torch.is_grad_enabled() and needs_grad):
        return tuple(operator(name, values)(*_cast(dtype, values)))
    return tuple(function.apply(dtype, *values))


# -------------------------------------------------------------------------------------------------
# Vocabulary parallel


@with_signature
class IPOLossFromHiddenShardedFunction(IPOLossFromHiddenFunction):
    """``ipo_loss_from_hidden_sharded`` likewise."""

    @staticmethod
    def forward(
        anchor: torch.Tensor | None, dtype: torch.dtype, *inputs: Any
    ) -> tuple[torch.Tensor, ...]:
        return tuple(operator("ipo_loss_from_hidden_sharded", inputs)(*_cast(dtype, inputs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        anchor, _, *values = inputs
        arguments = unflatten(IPOLossFromHiddenShardedArguments, values)
        _keep_gradients(ctx, arguments, output, anchor)
        ctx.num_inputs = len(inputs)


IPOLossFromHiddenShardedInForwardMode = refusing_tangents(IPOLossFromHiddenShardedFunction)


def run_ipo_loss_from_hidden_sharded(
    dtype: torch.dtype, arguments: IPOLossFromHiddenShardedArguments
) -> tuple[torch.Tensor, ...]:
    """As ``run_ipo_loss_from_hidden``."""
    functions = (IPOLossFromHiddenShardedFunction, IPOLossFromHiddenShardedInForwardMode)
    return _run_loss("ipo_loss_from_hidden_sharded", dtype, arguments, *functions)


@with_signature
class LinearTokenLogprobsShardedGradient(NoSecondDerivative):
    """The backward pass of ``linear_token_logprobs_sharded``, as that of whole rows."""

    @staticmethod
    def forward(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
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
        needs_grad_bias: bool,
        fault: torch.Tensor,
        first_column: int,
        vocabulary: int,
        group: str,
        reduce_hidden_grad: bool,
        sequence_parallel: bool,
    ) -> tuple[torch.Tensor, ...]:
        scaling = (temperature, softcap, None, True)
        backward = (entropy, softmax_stats, grad_logprobs, grad_entropy, None)
        needs_grad = (needs_grad_hidden, needs_grad_weight, needs_grad_bias)
        shard = (first_column, vocabulary, group, "")
        head = (hidden, weight, bias, labels, *scaling)
        how = (reduce_hidden_grad, sequence_parallel)
        values = (*head, chunk_size, *backward, *needs_grad, fault, *shard, *how)
        return tuple(operator("linear_token_logprobs_sharded_backward", values)(*values))

    vmap = staticmethod(refuse_vmap)


@with_signature
class LinearTokenLogprobsShardedFunction(torch.autograd.Function):
    """``linear_token_logprobs_sharded`` as ``LinearTokenLogprobsFunction`` that of whole rows."""

    @staticmethod
    def forward(dtype: torch.dtype, *inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(operator("linear_token_logprobs_sharded", inputs)(*_cast(dtype, inputs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.dtype, *values = inputs
        arguments = unflatten(LinearTokenLogprobsShardedArguments, values)
        hidden, weight, bias, labels, scaling = arguments.head
        _, entropy, *constants = output
        ctx.mark_non_differentiable(*constants)
        of_tokens = map(savable, (labels, scaling.temperature))
        ctx.save_for_backward(hidden, weight, bias, *of_tokens, entropy.clone(), *constants)
        ctx.softcap, ctx.chunk_size = scaling.softcap, arguments.chunk_size
        ctx.shard = arguments.shard
        ctx.of_hidden = (arguments.reduce_hidden_grad, arguments.sequence_parallel)
        ctx.set_materialize_grads(False)  # not for the statistics
        ctx.num_inputs = len(inputs)

    @staticmethod
    def backward(
        ctx: Any,
        grad_logprobs: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
        *_: Any,
    ) -> tuple[Any, ...]:
        others = (None,) * (ctx.num_inputs - 4)
        if grad_logprobs is None and grad_entropy is None:
            return (None, None, None, None, *others)
        *leaves, labels, temperature, entropy, softmax_stats, fault = ctx.saved_tensors
        hidden, weight, bias = leaves
        grads = (grad_logprobs, grad_entropy, None)
        backward = logprobs_backward(entropy, softmax_stats, None, grads)[:-1]
        needed = ctx.needs_input_grad[1:4]
        first_column, vocabulary, group, _ = ctx.shard
        run: Any = LinearTokenLogprobsShardedGradient.apply
        made = run(
            hidden.to(ctx.dtype),
            weight.to(ctx.dtype),
            bias,
            labels,
            temperature,
            ctx.softcap,
            ctx.chunk_size,
            *backward,
            *needed,
            fault,
            first_column,
            vocabulary,
            group,
            *ctx.of_hidden,
        )
        gradients = [
            gradient.to(leaf.dtype).view(leaf.shape) if needs else None
            for gradient, leaf, needs in zip(made, leaves, needed, strict=True)
        ]
        return (None, *gradients, *others)

    vmap = staticmethod(refuse_vmap)


LinearTokenLogprobsShardedInForwardMode = refusing_tangents(LinearTokenLogprobsShardedFunction)


def run_linear_token_logprobs_sharded(
    dtype: torch.dtype, arguments: LinearTokenLogprobsShardedArguments
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropy and what the backward pass needs."""
    functions = (LinearTokenLogprobsShardedFunction, LinearTokenLogprobsShardedInForwardMode)
    return _run_logprobs("linear_token_logprobs_sharded", dtype, arguments, *functions)


# Operator to its formula for whoever calls it through torch.ops: backward, setup_context.
AUTOGRAD: dict[str, Formula] = {
    "ipo_loss_from_hidden": (_loss_backward, _loss_setup_context),
    "linear_token_logprobs": (_logprobs_backward, _logprobs_setup_context),
}
