"""The Python half of the operators: shapes for tracing (fakes) and the autograd formulas."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch.autograd import forward_ad

from ipo_ext import _C, _checks

_namespace = "ipo_ext"


# -------------------------------------------------------------------------------------------------
# The operators of this build


def library() -> Any:
    """The operators that the API calls: ``torch.ops.ipo_ext``; tests point it at other backends."""
    return getattr(torch.ops, _namespace)


def register(namespace: str) -> None:
    """Registers fakes and autograd formulas for the operators of ``namespace``."""
    torch.library.register_fake(f"{namespace}::ipo_loss", _ipo_loss_fake)
    torch.library.register_fake(f"{namespace}::metric_means", _metric_means_fake)
    torch.library.register_autograd(
        f"{namespace}::ipo_loss", _ipo_loss_backward, setup_context=_ipo_loss_setup_context
    )
    torch.library.register_vmap(f"{namespace}::ipo_loss", _refuse_vmap)
    torch.library.register_fake(f"{namespace}::ipo_loss_from_logits", _ipo_loss_from_logits_fake)
    torch.library.register_fake(f"{namespace}::token_logprobs", _token_logprobs_fake)
    torch.library.register_fake(
        f"{namespace}::token_logprobs_backward", _token_logprobs_backward_fake
    )
    torch.library.register_fake(f"{namespace}::scale_", _scale_fake)
    torch.library.register_autograd(
        f"{namespace}::ipo_loss_from_logits",
        _ipo_loss_from_logits_backward,
        setup_context=_ipo_loss_from_logits_setup_context,
    )
    torch.library.register_autograd(
        f"{namespace}::token_logprobs",
        _token_logprobs_backward,
        setup_context=_token_logprobs_setup_context,
    )


# -------------------------------------------------------------------------------------------------
# Tier 1


def _ipo_loss_fake(
    trainer_logprobs: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    teacher_logprobs: torch.Tensor | None,
    loss_weights: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    log_low: float,
    log_high: float,
    adv_tau: float,
    kl_tau: float,
    teacher_tau: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    _checks.check_per_token_loss(
        trainer_logprobs,
        inference_logprobs,
        advantages,
        loss_mask,
        teacher_logprobs,
        loss_weights,
        cu_seqlens,
        normalizer,
        teacher_tau,
    )
    compute = _checks.compute_dtype(trainer_logprobs, inference_logprobs)
    new = trainer_logprobs.new_empty
    return (
        new((), dtype=compute),
        new(trainer_logprobs.shape if with_gradient else (0,), dtype=compute),
        *_metrics_fake(trainer_logprobs, cu_seqlens, compute),
    )


def _metrics_fake(
    like: torch.Tensor, cu_seqlens: torch.Tensor | None, compute: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Means, sums and extremes."""
    segments = () if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    return (
        like.new_empty((len(_C.MEAN_ROWS), *segments), dtype=compute),
        like.new_empty((len(_C.SUM_ROWS), *segments), dtype=torch.float64),
        like.new_empty((len(_C.EXTREME_ROWS), *segments), dtype=torch.float64),
    )


def _metric_means_fake(sums: torch.Tensor, extremes: torch.Tensor, float64: bool) -> torch.Tensor:
    dtype = torch.float64 if float64 else torch.float32
    return sums.new_empty((len(_C.MEAN_ROWS), *sums.shape[1:]), dtype=dtype)


_NO_SECOND_DERIVATIVE = (
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
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)


def _ipo_loss_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    trainer_logprobs, with_gradient = inputs[0], inputs[-1]
    _, gradient, *metrics = output
    ctx.mark_non_differentiable(gradient, *metrics)
    ctx.with_gradient = with_gradient
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(gradient, trainer_logprobs)
    ctx.set_materialize_grads(False)  # else backward makes zeros for the four other outputs


def _ipo_loss_backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if not ctx.with_gradient:
        raise RuntimeError(
            "ipo_ext::ipo_loss: expected with_gradient=True to run backward, got False"
        )
    others = (None,) * (ctx.num_inputs - 1)
    if grad_loss is None:
        return (None, *others)
    # Only where a graph of the backward pass is built can a second derivative be asked for.
    scale = ScaleGradient.apply if torch.is_grad_enabled() else ScaleGradient.forward
    gradient, trainer_logprobs = ctx.saved_tensors
    return (scale(gradient, grad_loss, trainer_logprobs), *others)


def _refuse_vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
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
    vmap = staticmethod(_refuse_vmap)


# Function.apply asks for the signature on every call; made once, it costs nothing there.
IPOLossFunction.forward.__signature__ = inspect.signature(IPOLossFunction.forward)  # type: ignore[attr-defined]


class _RefusesTangents:
    """For a class of its own: torch.compile traces no Function that has a ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)


class IPOLossUnderForwardMode(_RefusesTangents, IPOLossFunction):
    pass


def run_ipo_loss(*inputs: Any) -> tuple[torch.Tensor, ...]:
    """Calls the operator in the way that differentiates, or refuses to, as the inputs ask."""
    return _run(library().ipo_loss, IPOLossFunction, IPOLossUnderForwardMode, inputs, inputs[-1])


def _run(
    operator: Any, function: Any, under_forward_mode: Any, inputs: Any, with_gradient: bool
) -> tuple[torch.Tensor, ...]:
    if forward_ad._current_level >= 0:  # on its own, the operator would say that nothing flows
        return cast("tuple[torch.Tensor, ...]", under_forward_mode.apply(*inputs))
    call = function.apply if with_gradient else operator
    return cast("tuple[torch.Tensor, ...]", call(*inputs))


# -------------------------------------------------------------------------------------------------
# Tier 2


def _ipo_loss_from_logits_fake(
    logits: torch.Tensor,
    labels: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    temperature: torch.Tensor | None,
    softcap: float,
    teacher_logprobs: torch.Tensor | None,
    loss_weights: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    log_low: float,
    log_high: float,
    adv_tau: float,
    kl_tau: float,
    teacher_tau: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    _checks.check_logits_loss(
        logits,
        labels,
        inference_logprobs,
        advantages,
        loss_mask,
        temperature,
        teacher_logprobs,
        loss_weights,
        cu_seqlens,
        normalizer,
        teacher_tau,
    )
    compute = _checks.compute_dtype(logits, inference_logprobs)
    per_token = _checks.compute_dtype(logits, logits)
    return (
        logits.new_empty((), dtype=compute),
        logits.new_empty(logits.shape if with_gradient else (0,)),
        logits.new_empty(labels.shape, dtype=per_token),
        logits.new_empty(labels.shape, dtype=per_token),
        *_metrics_fake(logits, cu_seqlens, compute),
    )


def _token_logprobs_fake(
    logits: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor | None, softcap: float
) -> tuple[torch.Tensor, ...]:
    _checks.check_logits(logits, labels, temperature)
    compute = _checks.compute_dtype(logits, logits)
    return (
        logits.new_empty(labels.shape, dtype=compute),
        logits.new_empty(labels.shape, dtype=compute),
        logits.new_empty((2, labels.numel()), dtype=compute),
    )


def _token_logprobs_backward_fake(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _scale_fake(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    return None


_ONE_BACKWARD = (
    "ipo_ext: the loss from logits can run backward once. Its gradient, as large as the logits, is "
    "scaled in place and handed over; call the function again for another backward"
)


def _gradient_factor(
    gradient: torch.Tensor, grad_loss: torch.Tensor, normalizer: torch.Tensor | None
) -> torch.Tensor:
    """What the gradient made in forward lacks: in fp16 also 1 / normalizer (0 for 0)."""
    if gradient.dtype != torch.float16 or normalizer is None:
        return grad_loss
    nothing = normalizer == 0
    inverse = torch.where(nothing, 0.0, 1 / torch.where(nothing, 1, normalizer.double()))
    return grad_loss * inverse.to(grad_loss.dtype)


class ScaleOnce(torch.autograd.Function):
    """``gradient * factor``, over the gradient itself; it too refuses to be differentiated.

    A compiled graph multiplies instead: it may not change what it has saved.
    """

    @staticmethod
    def forward(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return (gradient.to(factor.dtype) * factor).to(gradient.dtype)
        library().scale_(gradient, factor)
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)


def _ipo_loss_from_logits_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]
) -> None:
    normalizer, with_gradient = inputs[10], inputs[-1]
    _, gradient, *rest = output
    ctx.mark_non_differentiable(gradient, *rest)
    ctx.with_gradient = with_gradient
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(gradient, normalizer)  # not the logits: they may be freed
    ctx.set_materialize_grads(False)  # else backward makes zeros as large as the logits


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
    gradient, normalizer = ctx.saved_tensors
    factor = _gradient_factor(gradient, grad_loss, normalizer)
    scale: Any = ScaleGradient.apply
    return (scale(gradient, factor, gradient), *others)


class IPOLossFromLogitsFunction(torch.autograd.Function):
    """``ipo_loss_from_logits``, whose gradient is scaled where it lies: one backward only."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(library().ipo_loss_from_logits(*inputs))

    setup_context = staticmethod(_ipo_loss_from_logits_setup_context)
    vmap = staticmethod(_refuse_vmap)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: torch.Tensor | None, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        others = (None,) * (ctx.num_inputs - 1)
        if grad_loss is None:
            return (None, *others)
        gradient, normalizer = ctx.saved_tensors
        if not torch.compiler.is_compiling():
            if getattr(ctx, "handed_over", False):
                raise RuntimeError(_ONE_BACKWARD)
            ctx.handed_over = True
        factor = _gradient_factor(gradient, grad_loss, normalizer)
        scale: Any = ScaleOnce.apply
        return (scale(gradient, factor), *others)


class IPOLossFromLogitsUnderForwardMode(_RefusesTangents, IPOLossFromLogitsFunction):
    pass


def run_ipo_loss_from_logits(*inputs: Any) -> tuple[torch.Tensor, ...]:
    """As ``run_ipo_loss``."""
    return _run(
        library().ipo_loss_from_logits,
        IPOLossFromLogitsFunction,
        IPOLossFromLogitsUnderForwardMode,
        inputs,
        inputs[-1],
    )


class TokenLogprobsGradient(torch.autograd.Function):
    """The backward pass of ``token_logprobs``, refusing to be differentiated in turn."""

    @staticmethod
    def forward(
        logits: torch.Tensor,
        labels: torch.Tensor,
        temperature: torch.Tensor | None,
        softcap: float,
        entropy: torch.Tensor,
        softmax: torch.Tensor,
        grad_logprobs: torch.Tensor,
        grad_entropy: torch.Tensor,
    ) -> torch.Tensor:
        gradient = library().token_logprobs_backward(
            logits, labels, temperature, softcap, entropy, softmax, grad_logprobs, grad_entropy
        )
        return cast(torch.Tensor, gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)


def _token_logprobs_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]
) -> None:
    logits, labels, temperature, ctx.softcap = inputs
    _, entropy, softmax = output
    ctx.mark_non_differentiable(softmax)
    ctx.save_for_backward(logits, labels, temperature, entropy, softmax)
    ctx.set_materialize_grads(False)  # not for the softmax


def _token_logprobs_backward(
    ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    logits, labels, temperature, entropy, softmax = ctx.saved_tensors
    if grad_logprobs is None and grad_entropy is None:
        return None, None, None, None
    nothing = torch.zeros_like(entropy)
    run: Any = TokenLogprobsGradient.apply
    gradient = run(
        logits,
        labels,
        temperature,
        ctx.softcap,
        entropy.detach(),
        softmax,
        nothing if grad_logprobs is None else grad_logprobs,
        nothing if grad_entropy is None else grad_entropy,
    )
    return gradient, None, None, None


class TokenLogprobsFunction(torch.autograd.Function):
    """``token_logprobs`` as a function that torch.func understands."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(library().token_logprobs(*inputs))

    setup_context = staticmethod(_token_logprobs_setup_context)
    backward = staticmethod(_token_logprobs_backward)
    vmap = staticmethod(_refuse_vmap)


class TokenLogprobsUnderForwardMode(_RefusesTangents, TokenLogprobsFunction):
    pass


def run_token_logprobs(*inputs: Any) -> tuple[torch.Tensor, ...]:
    """As ``run_ipo_loss``."""
    return _run(
        library().token_logprobs,
        TokenLogprobsFunction,
        TokenLogprobsUnderForwardMode,
        inputs,
        inputs[0].requires_grad and torch.is_grad_enabled(),
    )


register(_namespace)
