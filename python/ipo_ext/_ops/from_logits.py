"""From logits: how a call for the loss or for log-probabilities differentiates."""

from __future__ import annotations

from typing import Any, cast

import torch

from ipo_ext._ops.arguments import (
    IPOLossFromLogitsArguments,
    IPOLossFromLogitsShardedArguments,
    TokenLogprobsArguments,
    TokenLogprobsShardedArguments,
    flatten,
    unflatten,
)
from ipo_ext._ops.autograd import (
    NO_SECOND_DERIVATIVE,
    Formula,
    NoSecondDerivative,
    anchor,
    logprobs_backward,
    multiplied,
    refuse_vmap,
    refusing_tangents,
    savable,
    scale_once,
    with_signature,
)
from ipo_ext._ops.changing_numbers import as_operands, operator
from ipo_ext._ops.errors import with_torch_errors
from ipo_ext._ops.torch_internals import in_forward_mode

# -------------------------------------------------------------------------------------------------
# The loss


def run_ipo_loss_from_logits(
    arguments: IPOLossFromLogitsArguments, *, inplace: bool = False
) -> tuple[torch.Tensor, ...]:
    """Loss, log-probabilities, entropy, means, sums and extremes; as ``run_ipo_loss``."""
    function: Any
    if in_forward_mode():
        function = IPOLossFromLogitsInForwardMode
    elif not arguments.with_gradient:
        values = as_operands("ipo_loss_from_logits", flatten(arguments))
        loss, _, *others, _ = operator("ipo_loss_from_logits", values)(*values)
        return (loss, *others)
    elif inplace:
        function = IPOLossFromLogitsInplace
    else:
        function = IPOLossFromLogitsFunction
    values = as_operands("ipo_loss_from_logits", flatten(arguments))
    outputs = function.apply(anchor(arguments.logits), *values)
    return cast("tuple[torch.Tensor, ...]", outputs)[:6]


def _keep_gradient(
    ctx: Any, gradient: torch.Tensor, row_scales: torch.Tensor, anchor: torch.Tensor | None
) -> None:
    scales = row_scales if gradient.dtype == torch.float16 else None
    ctx.save_for_backward(gradient, scales, anchor)  # not the logits: they may be freed
    ctx.set_materialize_grads(False)  # else backward makes zeros as large as the logits


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    arguments = unflatten(IPOLossFromLogitsArguments, inputs)
    _, gradient, *_, row_scales = output
    ctx.mark_non_differentiable(*output[1:])
    _keep_gradient(ctx, gradient, row_scales, None)
    ctx.with_gradient = arguments.with_gradient
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    """For those who call the operator: leaves the gradient, one of its outputs, as it is."""
    if not ctx.with_gradient:
        raise RuntimeError(
            "ipo_ext::ipo_loss_from_logits: expected with_gradient=True to run backward, got False"
        )
    others = (None,) * (ctx.num_inputs - 1)
    if grad_loss is None:
        return (None, *others)
    if torch.is_grad_enabled():
        raise NotImplementedError(NO_SECOND_DERIVATIVE)
    gradient, row_scales, _ = ctx.saved_tensors
    return (multiplied(gradient, grad_loss, row_scales).to(gradient.dtype), *others)


def _set_up(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: tuple[Any, ...],
    gradient: torch.Tensor,
    row_scales: torch.Tensor,
) -> None:
    anchor, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.num_inputs = len(inputs)
    _keep_gradient(ctx, gradient, row_scales, anchor)


@with_signature
class IPOLossFromLogitsFunction(torch.autograd.Function):
    """``ipo_loss_from_logits``, whose gradient is scaled where it lies and handed over."""

    @staticmethod
    def forward(anchor: torch.Tensor | None, *inputs: Any) -> tuple[torch.Tensor, ...]:
        loss, gradient, *others = operator("ipo_loss_from_logits", inputs)(*inputs)
        return (loss, *others, gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *_, row_scales, gradient = output
        _set_up(ctx, inputs, output, gradient, row_scales)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: torch.Tensor | None, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        others = (None,) * (ctx.num_inputs - 2)
        if grad_loss is None:
            return (None, None, *others)
        gradient, row_scales, anchor = ctx.saved_tensors
        scaled = scale_once(gradient.detach(), grad_loss, gradient.dtype, anchor, row_scales)
        return (None, scaled, *others)

    vmap = staticmethod(refuse_vmap)


@with_signature
class IPOLossFromLogitsInplace(IPOLossFromLogitsFunction):
    """The same with the gradient written over the logits.

    The operator bumps no version. Done here, a producer that has saved its output, the logits, for
    its own backward pass finds them changed and raises, instead of using a gradient as if it were
    logits.

    A compiler must see the logits themselves: it makes the tensor that they are a slice of as a
    whole. Detached they hide it, and inductor hands over a buffer of its own, whose layout is not
    that of the slice.
    """

    @staticmethod
    def forward(anchor: torch.Tensor | None, *inputs: Any) -> tuple[torch.Tensor, ...]:
        logits, *others, _ = inputs
        written = logits if torch.compiler.is_compiling() else logits.detach()
        outputs = operator("ipo_loss_from_logits_", inputs)(written, *others)
        torch.autograd.graph.increment_version(logits)
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, logits, *_ = inputs
        _set_up(ctx, inputs, output, logits, row_scales=output[-1])


IPOLossFromLogitsInForwardMode = refusing_tangents(IPOLossFromLogitsFunction)


# -------------------------------------------------------------------------------------------------
# Log-probabilities


def run_token_logprobs(arguments: TokenLogprobsArguments) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropy and what the backward pass needs; as ``run_ipo_loss``."""
    functions = (TokenLogprobsFunction, TokenLogprobsInForwardMode)
    return _run_logprobs("token_logprobs", arguments, *functions)


def _run_logprobs(
    name: str,
    arguments: TokenLogprobsArguments | TokenLogprobsShardedArguments,
    function: Any,
    in_forward_mode_function: Any,
) -> tuple[torch.Tensor, ...]:
    run: Any
    values = as_operands(name, flatten(arguments))
    if in_forward_mode():
        run = in_forward_mode_function.apply
    elif arguments.logits.requires_grad and torch.is_grad_enabled():
        run = function.apply
    else:
        run = operator(name, values)
    return cast("tuple[torch.Tensor, ...]", run(*values))


@with_signature
class TokenLogprobsGradient(NoSecondDerivative):
    """The backward pass of ``token_logprobs``, refusing to be differentiated in turn.

    Its arguments are named one by one: torch.compile traces no ``*inputs`` of a Function within a
    Function.
    """

    @staticmethod
    def forward(
        logits: torch.Tensor,
        labels: torch.Tensor,
        temperature: torch.Tensor | None,
        softcap: float,
        sampling_mask: torch.Tensor | None,
        with_entropy: bool,
        candidates: torch.Tensor | None,
        entropy: torch.Tensor,
        softmax_stats: torch.Tensor,
        grad_logprobs: torch.Tensor,
        grad_entropy: torch.Tensor,
        grad_candidates: torch.Tensor | None,
    ) -> torch.Tensor:
        scaling = (temperature, softcap, sampling_mask, with_entropy)
        saved = (entropy, softmax_stats, grad_logprobs, grad_entropy, grad_candidates)
        values = (logits, labels, *scaling, candidates, *saved)
        run = operator("token_logprobs_backward", values)
        return cast(torch.Tensor, with_torch_errors(run, *values))


def _logprobs_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logits, labels, scaling, candidates = unflatten(TokenLogprobsArguments, inputs)
    _, entropy, softmax_stats, _ = output
    ctx.mark_non_differentiable(softmax_stats)
    constants = map(savable, (labels, scaling.temperature, scaling.sampling_mask, candidates))
    ctx.save_for_backward(logits, *constants, entropy.clone(), softmax_stats)
    ctx.softcap, ctx.with_entropy = scaling.softcap, scaling.with_entropy
    ctx.set_materialize_grads(False)  # not for the statistics


def _logprobs_backward(
    ctx: Any,
    grad_logprobs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    _: torch.Tensor | None,
    grad_candidates: torch.Tensor | None,
) -> tuple[Any, ...]:
    others = (None,) * 6
    grads = (grad_logprobs, grad_entropy, grad_candidates)
    if all(grad is None for grad in grads):
        return (None, *others)
    logits, labels, *constants, entropy, softmax_stats = ctx.saved_tensors
    temperature, sampling_mask, candidates = constants
    scaling = (temperature, ctx.softcap, sampling_mask, ctx.with_entropy)
    backward = logprobs_backward(entropy, softmax_stats, candidates, grads)
    run: Any = TokenLogprobsGradient.apply
    return (run(logits, labels, *scaling, candidates, *backward), *others)


@with_signature
class TokenLogprobsFunction(torch.autograd.Function):
    """``token_logprobs`` as a function that torch.func understands."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(operator("token_logprobs", inputs)(*inputs))

    setup_context = staticmethod(_logprobs_setup_context)
    backward = staticmethod(_logprobs_backward)
    vmap = staticmethod(refuse_vmap)


TokenLogprobsInForwardMode = refusing_tangents(TokenLogprobsFunction)

# -------------------------------------------------------------------------------------------------
# Vocabulary parallel


def run_ipo_loss_from_logits_sharded(
    arguments: IPOLossFromLogitsShardedArguments,
) -> tuple[torch.Tensor, ...]:
    """As ``run_ipo_loss_from_logits``."""
    values = as_operands("ipo_loss_from_logits_sharded", flatten(arguments))
    function: Any
    if in_forward_mode():
        function = IPOLossFromLogitsShardedInForwardMode
    elif not arguments.with_gradient:
        run = operator("ipo_loss_from_logits_sharded", values)
        loss, _, *others, _ = run(*values)
        return (loss, *others)
    else:
        function = IPOLossFromLogitsShardedFunction
    outputs = function.apply(anchor(arguments.logits), *values)
    return cast("tuple[torch.Tensor, ...]", outputs)[:6]


@with_signature
class IPOLossFromLogitsShardedFunction(IPOLossFromLogitsFunction):
    """``ipo_loss_from_logits_sharded`` likewise."""

    @staticmethod
    def forward(anchor: torch.Tensor | None, *inputs: Any) -> tuple[torch.Tensor, ...]:
        run = operator("ipo_loss_from_logits_sharded", inputs)
        loss, gradient, *others = run(*inputs)
        return (loss, *others, gradient)


IPOLossFromLogitsShardedInForwardMode = refusing_tangents(IPOLossFromLogitsShardedFunction)


def run_token_logprobs_sharded(
    arguments: TokenLogprobsShardedArguments,
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropy and what the backward pass needs."""
    functions = (TokenLogprobsShardedFunction, TokenLogprobsShardedInForwardMode)
    return _run_logprobs("token_logprobs_sharded", arguments, *functions)


@with_signature
class TokenLogprobsShardedGradient(NoSecondDerivative):
    """The backward pass of ``token_logprobs_sharded``, as ``TokenLogprobsGradient``."""

    @staticmethod
    def forward(
        logits: torch.Tensor,
        labels: torch.Tensor,
        temperature: torch.Tensor | None,
        softcap: float,
        entropy: torch.Tensor,
        softmax_stats: torch.Tensor,
        grad_logprobs: torch.Tensor,
        grad_entropy: torch.Tensor,
        fault: torch.Tensor,
        first_column: int,
        vocabulary: int,
        group: str,
    ) -> torch.Tensor:
        scaling = (temperature, softcap, None, True)
        saved = (entropy, softmax_stats, grad_logprobs, grad_entropy, None)
        shard = (first_column, vocabulary, group, "")
        values = (logits, labels, *scaling, *saved, fault, *shard)
        run = operator("token_logprobs_sharded_backward", values)
        return cast(torch.Tensor, with_torch_errors(run, *values))


@with_signature
class TokenLogprobsShardedFunction(torch.autograd.Function):
    """``token_logprobs_sharded`` as a function that torch.func understands."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(operator("token_logprobs_sharded", inputs)(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        arguments = unflatten(TokenLogprobsShardedArguments, inputs)
        _, entropy, *constants = output
        ctx.mark_non_differentiable(*constants)
        of_tokens = map(savable, (arguments.labels, arguments.scaling.temperature))
        ctx.save_for_backward(arguments.logits, *of_tokens, entropy.clone(), *constants)
        ctx.softcap, ctx.shard = arguments.scaling.softcap, arguments.shard
        ctx.set_materialize_grads(False)  # not for the statistics
        ctx.num_inputs = len(inputs)

    @staticmethod
    def backward(
        ctx: Any,
        grad_logprobs: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
        *_: Any,
    ) -> tuple[Any, ...]:
        others = (None,) * (ctx.num_inputs - 1)
        if grad_logprobs is None and grad_entropy is None:
            return (None, *others)
        logits, labels, temperature, entropy, softmax_stats, fault = ctx.saved_tensors
        grads = (grad_logprobs, grad_entropy, None)
        backward = logprobs_backward(entropy, softmax_stats, None, grads)[:-1]
        first_column, vocabulary, group, _ = ctx.shard
        shard = (first_column, vocabulary, group)
        run: Any = TokenLogprobsShardedGradient.apply
        gradient = run(logits, labels, temperature, ctx.softcap, *backward, fault, *shard)
        return (gradient, *others)

    vmap = staticmethod(refuse_vmap)


TokenLogprobsShardedInForwardMode = refusing_tangents(TokenLogprobsShardedFunction)

# Operator to its formula for whoever calls it through torch.ops: backward, setup_context.
AUTOGRAD: dict[str, Formula] = {
    "ipo_loss_from_logits": (_backward, _setup_context),
    "token_logprobs": (_logprobs_backward, _logprobs_setup_context),
}
