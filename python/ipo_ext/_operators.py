"""The Python half of the operators: shapes for tracing (fakes) and the autograd formulas."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd import forward_ad

from ipo_ext import _C, _checks
from ipo_ext._ops.arguments import (
    OPERATORS,
    ChunkLogprobsArguments,
    ChunkLossArguments,
    FindFaultsArguments,
    IPOLossArguments,
    IPOLossFromLogitsArguments,
    IPOLossFromLogitsInplaceArguments,
    LogprobsBackward,
    LossAndMetricsArguments,
    MetricMeansArguments,
    Metrics,
    TokenLogprobsArguments,
    TokenLogprobsBackwardArguments,
    flatten,
    unflatten,
)

_namespace = "ipo_ext"


# -------------------------------------------------------------------------------------------------
# The operators of this build


def library() -> Any:
    """The operators that the API calls: ``torch.ops.ipo_ext``; tests point it at other backends."""
    return getattr(torch.ops, _namespace)


def register(namespace: str) -> None:
    """Registers fakes and autograd formulas for the operators of ``namespace``."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", by_name(name, fake))
    for name, (backward, setup_context) in _AUTOGRAD.items():
        torch.library.register_autograd(
            f"{namespace}::{name}", backward, setup_context=setup_context
        )
        torch.library.register_vmap(f"{namespace}::{name}", refuse_vmap)


def by_name(operator: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of the operator's named arguments as a function of their values in a row."""
    kind = OPERATORS[operator]

    def call(*values: Any) -> Any:
        return function(unflatten(kind, values))

    return call


# -------------------------------------------------------------------------------------------------
# From log-probabilities


def _ipo_loss_fake(arguments: IPOLossArguments) -> tuple[torch.Tensor, ...]:
    like, inputs = arguments.trainer_logprobs, arguments.inputs
    _checks.check_per_token_loss(like, inputs, arguments.settings.teacher_tau)
    compute = _checks.compute_dtype(like, inputs.inference_logprobs)
    return (
        like.new_empty((), dtype=compute),
        like.new_empty(like.shape if arguments.with_gradient else (0,), dtype=compute),
        *metrics_fake(like, inputs.cu_seqlens, compute),
    )


def metrics_fake(
    like: torch.Tensor, cu_seqlens: torch.Tensor | None, compute: torch.dtype
) -> Metrics:
    segments = () if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    return Metrics(
        like.new_empty((len(_C.MEAN_ROWS), *segments), dtype=compute),
        like.new_empty((len(_C.SUM_ROWS), *segments), dtype=torch.float64),
        like.new_empty((len(_C.EXTREME_ROWS), *segments), dtype=torch.float64),
    )


def _metric_means_fake(arguments: MetricMeansArguments) -> torch.Tensor:
    dtype = torch.float64 if arguments.float64 else torch.float32
    sums = arguments.sums
    return sums.new_empty((len(_C.MEAN_ROWS), *sums.shape[1:]), dtype=dtype)


NO_SECOND_DERIVATIVE = (
    "ipo_ext: the loss cannot be differentiated twice. Its gradient is made in the forward "
    "pass and is a constant from then on; use ipo_ext.reference for higher derivatives"
)
_NO_FORWARD_MODE = (
    "ipo_ext: the loss has no forward-mode derivative (jvp, jacfwd, hessian). Use reverse mode, "
    "backward() or torch.func.grad, or ipo_ext.reference, which supports both"
)


class ScaleGradient(torch.autograd.Function):
    """``gradient * factor``, refusing to be differentiated: the loss has no second derivative.

    ``trainer_logprobs`` only gives the result its dtype and a place in the graph, so that a second
    derivative arrives at ``backward`` instead of being silently 0.
    """

    generate_vmap_rule = True  # torch.func.jacrev maps over the factor

    @staticmethod
    def forward(
        gradient: torch.Tensor, factor: torch.Tensor, trainer_logprobs: torch.Tensor
    ) -> torch.Tensor:
        return (gradient * factor).to(trainer_logprobs.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError(NO_SECOND_DERIVATIVE)


def _ipo_loss_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    arguments = unflatten(IPOLossArguments, inputs)
    _, gradient, *metrics = output
    ctx.mark_non_differentiable(gradient, *metrics)
    ctx.with_gradient = arguments.with_gradient
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(gradient, arguments.trainer_logprobs)
    ctx.set_materialize_grads(False)  # else backward makes zeros for the four other outputs


def _ipo_loss_backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if not ctx.with_gradient:
        raise RuntimeError(
            "ipo_ext::ipo_loss: expected with_gradient=True to run backward, got False"
        )
    others = (None,) * (ctx.num_inputs - 1)
    if grad_loss is None:
        return (None, *others)
    gradient, trainer_logprobs = ctx.saved_tensors
    return (_scaled(gradient, trainer_logprobs, grad_loss), *others)


def _scaled(
    gradient: torch.Tensor, trainer_logprobs: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    # Only where a graph of the backward pass is built can a second derivative be asked for.
    differentiable = torch.is_grad_enabled()
    if not differentiable and gradient.dtype == trainer_logprobs.dtype and _is_one(factor):
        return gradient
    scale: Any = ScaleGradient.apply if differentiable else ScaleGradient.forward
    return cast(torch.Tensor, scale(gradient, factor, trainer_logprobs))


def _is_one(factor: torch.Tensor) -> bool:
    """Whether it is known to be 1 without waiting for a device."""
    if not _is_eager() or torch._C._functorch.is_legacy_batchedtensor(factor):
        return False  # the latter: is_grads_batched=True
    return type(factor) is torch.Tensor and factor.is_cpu and factor.item() == 1


def _is_eager() -> bool:
    """Whether nothing traces, transforms or fakes what is called: tensors are what they seem."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def refuse_vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
    raise NotImplementedError(
        "ipo_ext: vmap over the loss is not supported. Sequences of a batch need none: pass them "
        "packed, with cu_seqlens for metrics of each"
    )


class IPOLossFunction(torch.autograd.Function):
    """``ipo_loss`` for torch.func too, which ``register_autograd`` alone does not reach."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(library().ipo_loss(*inputs))

    setup_context = staticmethod(_ipo_loss_setup_context)
    backward = staticmethod(_ipo_loss_backward)
    vmap = staticmethod(refuse_vmap)


# Function.apply asks for the signature on every call; made once, it costs nothing there.
IPOLossFunction.forward.__signature__ = inspect.signature(IPOLossFunction.forward)  # type: ignore[attr-defined]


class RefusesTangents:
    """For a class of its own: torch.compile traces no Function that has a ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)


class IPOLossUnderForwardMode(RefusesTangents, IPOLossFunction):
    pass


class EagerIPOLoss(torch.autograd.Function):
    """``ipo_loss`` where nothing traces or transforms it, at half the cost of the general form.

    Autograd sees one input and one output; ``metrics`` receives the rest of what the operator
    returns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        trainer_logprobs: torch.Tensor,
        constants: list[Any],
        metrics: list[torch.Tensor],
    ) -> torch.Tensor:
        loss, gradient, *metrics[:] = _below_autograd(
            library().ipo_loss, trainer_logprobs, *constants
        )
        ctx.save_for_backward(gradient, trainer_logprobs)
        return cast(torch.Tensor, loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        return _scaled(*ctx.saved_tensors, *grad_outputs), None, None


def _below_autograd(operator: Any, *inputs: Any) -> Any:
    """Calls ``operator`` without its autograd formula, which is a detour through Python."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


def run_ipo_loss(arguments: IPOLossArguments) -> tuple[torch.Tensor, ...]:
    """Loss, means, sums and extremes, differentiable as the inputs ask, or refusing to be."""
    trainer_logprobs, *constants = flatten(arguments)
    if forward_ad._current_level >= 0 or not _is_eager():
        loss, _, *metrics = run(
            library().ipo_loss,
            IPOLossFunction,
            IPOLossUnderForwardMode,
            (trainer_logprobs, *constants),
            arguments.with_gradient,
        )
    elif arguments.with_gradient:
        metrics = []
        attach: Any = EagerIPOLoss.apply
        loss = attach(trainer_logprobs, constants, metrics)
    else:
        loss, _, *metrics = _below_autograd(library().ipo_loss, trainer_logprobs, *constants)
    return loss, *metrics


def run(
    operator: Any, function: Any, under_forward_mode: Any, inputs: Any, with_gradient: bool
) -> tuple[torch.Tensor, ...]:
    """Calls the operator in the way that differentiates, or refuses to, as the inputs ask."""
    if forward_ad._current_level >= 0:  # on its own, the operator would say that nothing flows
        return cast("tuple[torch.Tensor, ...]", under_forward_mode.apply(*inputs))
    call = function.apply if with_gradient else operator
    return cast("tuple[torch.Tensor, ...]", call(*inputs))


# -------------------------------------------------------------------------------------------------
# From logits


def _ipo_loss_from_logits_fake(arguments: IPOLossFromLogitsArguments) -> tuple[torch.Tensor, ...]:
    logits, labels, inputs = arguments.logits, arguments.labels, arguments.inputs
    teacher_tau = arguments.settings.teacher_tau
    _checks.check_logits_loss(logits, labels, arguments.scaling.temperature, inputs, teacher_tau)
    compute = _checks.compute_dtype(logits, inputs.inference_logprobs)
    per_token = _checks.widened(logits.dtype)
    return (
        logits.new_empty((), dtype=compute),
        logits.new_empty(logits.shape if arguments.with_gradient else (0,)),
        logits.new_empty(labels.shape, dtype=per_token),
        logits.new_empty(labels.shape, dtype=per_token),
        *metrics_fake(logits, inputs.cu_seqlens, compute),
    )


def _ipo_loss_from_logits_inplace_fake(
    arguments: IPOLossFromLogitsInplaceArguments,
) -> tuple[torch.Tensor, ...]:
    loss, _, *others = _ipo_loss_from_logits_fake(IPOLossFromLogitsArguments(*arguments, False))
    return (loss, *others)


def _find_faults_fake(arguments: FindFaultsArguments) -> torch.Tensor:
    return arguments.labels.new_empty((1,), dtype=torch.int32)


def _chunk_loss_fake(arguments: ChunkLossArguments) -> tuple[torch.Tensor, ...]:
    logits, labels = arguments.logits, arguments.labels
    compute = _checks.widened(logits.dtype)
    return tuple(logits.new_empty(labels.shape, dtype=compute) for _ in range(2))


def _chunk_logprobs_fake(arguments: ChunkLogprobsArguments) -> tuple[torch.Tensor, ...]:
    logits, labels, scaling, _ = arguments
    return _token_logprobs_fake(TokenLogprobsArguments(logits, labels, scaling))


def _nothing_fake(*_: Any) -> None:
    return None


def _loss_and_metrics_fake(arguments: LossAndMetricsArguments) -> tuple[torch.Tensor, ...]:
    logprobs, inputs = arguments.logprobs, arguments.inputs
    compute = _checks.compute_dtype(logprobs, inputs.inference_logprobs)
    return (
        logprobs.new_empty((), dtype=compute),
        logprobs.new_empty(logprobs.shape if arguments.with_gradient else (0,), dtype=compute),
        *metrics_fake(logprobs, inputs.cu_seqlens, compute),
    )


def _token_logprobs_fake(arguments: TokenLogprobsArguments) -> tuple[torch.Tensor, ...]:
    logits, labels, scaling = arguments
    _checks.check_logits(logits, labels, scaling.temperature)
    compute = _checks.widened(logits.dtype)
    return (
        logits.new_empty(labels.shape, dtype=compute),
        logits.new_empty(labels.shape, dtype=compute),
        logits.new_empty((2, labels.numel()), dtype=compute),
    )


def _token_logprobs_backward_fake(arguments: TokenLogprobsBackwardArguments) -> torch.Tensor:
    return arguments.logits.new_empty(arguments.logits.shape)


_ONE_BACKWARD = (
    "ipo_ext: this loss can run backward once. Its gradient, made in the forward pass, is scaled "
    "in place and handed over; call the function again for another backward"
)


class Anchor(torch.autograd.Function):
    """A scalar without a value that depends on ``tensors``, whose memory it does not keep.

    Through it a second derivative arrives at ``ScaleOnce.backward`` instead of being silently 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        return tensors[0].new_empty(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.inputs = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if not _in_compiled_autograd():
            return (None,) * len(ctx.inputs)
        # Its graph adds gradients without asking whether there are any.
        return tuple(
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in ctx.inputs
        )


def _in_compiled_autograd() -> bool:
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and bool(getattr(module, "in_compiled_autograd_region", False))


def anchor(*tensors: torch.Tensor) -> torch.Tensor | None:
    """None while compiling, which makes no second derivative, or in forward mode, to be refused."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return None
    run: Any = Anchor.apply
    return cast(torch.Tensor, run(*tensors))


class ScaleOnce(torch.autograd.Function):
    """``gradient * factor`` in ``dtype``, over the gradient if that is its own; no derivative.

    A compiled graph multiplies instead: it may not change what it has saved.
    """

    @staticmethod
    def forward(
        gradient: torch.Tensor,
        factor: torch.Tensor,
        dtype: torch.dtype,
        anchor: torch.Tensor | None,
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return (gradient.to(factor.dtype) * factor).to(dtype)
        if gradient.dtype == dtype:
            library().scale_(gradient, factor)
            return gradient
        out = gradient.new_empty(gradient.shape, dtype=dtype)
        if gradient.dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16):
            library().scale_into(gradient, factor, out)
            return out
        return torch.mul(gradient, factor, out=out)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError(NO_SECOND_DERIVATIVE)

    vmap = staticmethod(refuse_vmap)


def gradient_is_normalized(dtype: torch.dtype) -> bool:
    """Whether a gradient made in forward holds 1 / normalizer, which would underflow in fp16."""
    return dtype != torch.float16


def normalizer_to_keep(dtype: torch.dtype, normalizer: torch.Tensor | None) -> torch.Tensor | None:
    """The normalizer where ``gradient_factor`` will need it."""
    return None if gradient_is_normalized(dtype) else normalizer


def gradient_factor(grad_loss: torch.Tensor, normalizer: torch.Tensor | None) -> torch.Tensor:
    """What a gradient made in forward lacks; ``normalizer`` as ``normalizer_to_keep`` gave it."""
    if normalizer is None:
        return grad_loss
    nothing = normalizer == 0
    inverse = torch.where(nothing, 0.0, 1 / torch.where(nothing, 1, normalizer.double()))
    return grad_loss * inverse.to(grad_loss.dtype)  # a scalar on the CPU needs no copy to a device


def hand_over_once(ctx: Any) -> None:
    """Raises when the gradients of ``ctx`` are asked for again."""
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "handed_over", False):
        raise RuntimeError(_ONE_BACKWARD)
    ctx.handed_over = True


def _keep_gradient(
    ctx: Any,
    arguments: IPOLossFromLogitsArguments,
    gradient: torch.Tensor,
    anchor: torch.Tensor | None,
) -> None:
    normalizer = normalizer_to_keep(gradient.dtype, arguments.inputs.normalizer)
    ctx.save_for_backward(gradient, normalizer, anchor)  # not the logits: they may be freed
    ctx.set_materialize_grads(False)  # else backward makes zeros as large as the logits


def _ipo_loss_from_logits_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]
) -> None:
    arguments = unflatten(IPOLossFromLogitsArguments, inputs)
    _, gradient, *_ = output
    ctx.mark_non_differentiable(*output[1:])
    _keep_gradient(ctx, arguments, gradient, None)
    ctx.with_gradient = arguments.with_gradient
    ctx.num_inputs = len(inputs)


def _ipo_loss_from_logits_backward(
    ctx: Any, grad_loss: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor | None, ...]:
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
    gradient, normalizer, _ = ctx.saved_tensors
    factor = gradient_factor(grad_loss, normalizer)
    return ((gradient * factor).to(gradient.dtype), *others)


class IPOLossFromLogitsFunction(torch.autograd.Function):
    """``ipo_loss_from_logits``, whose gradient is scaled where it lies: one backward only."""

    @staticmethod
    def forward(anchor: torch.Tensor | None, *inputs: Any) -> tuple[torch.Tensor, ...]:
        loss, gradient, *others = library().ipo_loss_from_logits(*inputs)
        return (loss, *others, gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        anchor, *values = inputs
        arguments = unflatten(IPOLossFromLogitsArguments, values)
        ctx.mark_non_differentiable(*output[1:])
        ctx.num_inputs = len(inputs)
        _keep_gradient(ctx, arguments, output[-1], anchor)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: torch.Tensor | None, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        others = (None,) * (ctx.num_inputs - 2)
        if grad_loss is None:
            return (None, None, *others)
        hand_over_once(ctx)
        gradient, normalizer, anchor = ctx.saved_tensors
        factor = gradient_factor(grad_loss, normalizer)
        scale: Any = ScaleOnce.apply
        return (None, scale(gradient.detach(), factor, gradient.dtype, anchor), *others)

    vmap = staticmethod(refuse_vmap)


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
        outputs = library().ipo_loss_from_logits_(written, *others)
        torch.autograd.graph.increment_version(logits)
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        anchor, *values = inputs
        arguments = unflatten(IPOLossFromLogitsArguments, values)
        ctx.mark_non_differentiable(*output[1:])
        ctx.num_inputs = len(inputs)
        _keep_gradient(ctx, arguments, arguments.logits, anchor)


class IPOLossFromLogitsUnderForwardMode(RefusesTangents, IPOLossFromLogitsFunction):
    pass


def run_ipo_loss_from_logits(
    arguments: IPOLossFromLogitsArguments, *, inplace: bool = False
) -> tuple[torch.Tensor, ...]:
    """Loss, log-probabilities, entropy, means, sums and extremes; as ``run_ipo_loss``."""
    function: Any
    if forward_ad._current_level >= 0:
        function = IPOLossFromLogitsUnderForwardMode
    elif not arguments.with_gradient:
        loss, _, *others = library().ipo_loss_from_logits(*flatten(arguments))
        return (loss, *others)
    elif inplace:
        function, arguments = IPOLossFromLogitsInplace, _with_kept_normalizer(arguments)
    else:
        function = IPOLossFromLogitsFunction
    outputs = function.apply(anchor(arguments.logits), *flatten(arguments))
    return cast("tuple[torch.Tensor, ...]", outputs)[:6]


def _with_kept_normalizer(arguments: IPOLossFromLogitsArguments) -> IPOLossFromLogitsArguments:
    """The arguments, a normalizer that backward needs apart from logits that it may be one of."""
    inputs = arguments.inputs
    kept = normalizer_to_keep(arguments.logits.dtype, inputs.normalizer)
    if kept is None:
        return arguments
    return arguments._replace(inputs=inputs._replace(normalizer=kept.clone()))


class TokenLogprobsGradient(torch.autograd.Function):
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
        entropy: torch.Tensor,
        softmax_stats: torch.Tensor,
        grad_logprobs: torch.Tensor,
        grad_entropy: torch.Tensor,
    ) -> torch.Tensor:
        gradient = library().token_logprobs_backward(
            logits,
            labels,
            temperature,
            softcap,
            entropy,
            softmax_stats,
            grad_logprobs,
            grad_entropy,
        )
        return cast(torch.Tensor, gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError(NO_SECOND_DERIVATIVE)


def _token_logprobs_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]
) -> None:
    logits, labels, (temperature, ctx.softcap) = unflatten(TokenLogprobsArguments, inputs)
    _, entropy, softmax_stats = output
    ctx.mark_non_differentiable(softmax_stats)
    ctx.save_for_backward(logits, labels, temperature, entropy, softmax_stats)
    ctx.set_materialize_grads(False)  # not for the statistics


def _token_logprobs_backward(
    ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    logits, labels, temperature, entropy, softmax_stats = ctx.saved_tensors
    if grad_logprobs is None and grad_entropy is None:
        return None, None, None, None
    backward = logprobs_backward(entropy, softmax_stats, grad_logprobs, grad_entropy)
    run: Any = TokenLogprobsGradient.apply
    return run(logits, labels, temperature, ctx.softcap, *backward), None, None, None


def logprobs_backward(
    entropy: torch.Tensor,
    softmax_stats: torch.Tensor,
    grad_logprobs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
) -> LogprobsBackward:
    """Of what autograd hands over: None where nothing flows in."""
    nothing = torch.zeros_like(entropy)
    return LogprobsBackward(
        entropy.detach(),
        softmax_stats,
        nothing if grad_logprobs is None else grad_logprobs,
        nothing if grad_entropy is None else grad_entropy,
    )


class TokenLogprobsFunction(torch.autograd.Function):
    """``token_logprobs`` as a function that torch.func understands."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(library().token_logprobs(*inputs))

    setup_context = staticmethod(_token_logprobs_setup_context)
    backward = staticmethod(_token_logprobs_backward)
    vmap = staticmethod(refuse_vmap)


class TokenLogprobsUnderForwardMode(RefusesTangents, TokenLogprobsFunction):
    pass


def run_token_logprobs(arguments: TokenLogprobsArguments) -> tuple[torch.Tensor, ...]:
    """As ``run_ipo_loss``."""
    return run(
        library().token_logprobs,
        TokenLogprobsFunction,
        TokenLogprobsUnderForwardMode,
        flatten(arguments),
        arguments.logits.requires_grad and torch.is_grad_enabled(),
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "ipo_loss": _ipo_loss_fake,
    "metric_means": _metric_means_fake,
    "ipo_loss_from_logits": _ipo_loss_from_logits_fake,
    "ipo_loss_from_logits_": _ipo_loss_from_logits_inplace_fake,
    "find_faults": _find_faults_fake,
    "chunk_logprobs_and_gradient": _chunk_loss_fake,
    "loss_and_metrics": _loss_and_metrics_fake,
    "token_logprobs": _token_logprobs_fake,
    "token_logprobs_backward": _token_logprobs_backward_fake,
    "chunk_logprobs": _chunk_logprobs_fake,
    "chunk_logprobs_backward": _nothing_fake,
    "scale_": _nothing_fake,
    "scale_into": _nothing_fake,
}
_AUTOGRAD: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "ipo_loss": (_ipo_loss_backward, _ipo_loss_setup_context),
    "ipo_loss_from_logits": (
        _ipo_loss_from_logits_backward,
        _ipo_loss_from_logits_setup_context,
    ),
    "token_logprobs": (_token_logprobs_backward, _token_logprobs_setup_context),
}

register(_namespace)
