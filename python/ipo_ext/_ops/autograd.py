"""What the operators' autograd Functions share: gradients made in forward, and scaled once.

The forward operator makes the gradient, so a backward pass only scales it, and can neither be
differentiated nor, where it scales in place, run again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from ipo_ext._ops import library
from ipo_ext._ops.arguments import LogprobsBackward
from ipo_ext._ops.torch_internals import in_compiled_autograd, in_forward_mode

Formula = tuple[Callable[..., Any], Callable[..., Any]]  # backward, setup_context

# -------------------------------------------------------------------------------------------------
# Refusals

NO_SECOND_DERIVATIVE = (
    "ipo_ext: the loss cannot be differentiated twice. Its gradient is made in the forward "
    "pass and is a constant from then on; use ipo_ext.reference for higher derivatives"
)
_NO_FORWARD_MODE = (
    "ipo_ext: the loss has no forward-mode derivative (jvp, jacfwd, hessian). Use reverse mode, "
    "backward() or torch.func.grad, or ipo_ext.reference, which supports both"
)
_ONE_BACKWARD = (
    "ipo_ext: this loss can run backward once. Its gradient, made in the forward pass, is scaled "
    "in place and handed over; call the function again for another backward"
)


class NoSecondDerivative(torch.autograd.Function):
    """Of a backward pass: refuses to be differentiated in turn."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError(NO_SECOND_DERIVATIVE)


class _RefusesTangents:
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)


def refusing_tangents(function: type[torch.autograd.Function]) -> Any:
    """``function`` for use in forward mode, where an operator would say that nothing flows.

    A class of its own, because torch.compile traces no Function that has a ``jvp``.
    """
    return type(f"{function.__name__}InForwardMode", (_RefusesTangents, function), {})


def refuse_vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
    raise NotImplementedError(
        "ipo_ext: vmap over the loss is not supported. Sequences of a batch need none: pass them "
        "packed, with cu_seqlens for metrics of each"
    )


def hand_over_once(ctx: Any) -> None:
    """Raises when the gradients of ``ctx`` are asked for again."""
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "handed_over", False):
        raise RuntimeError(_ONE_BACKWARD)
    ctx.handed_over = True


# -------------------------------------------------------------------------------------------------
# The factor of a gradient that forward has made


def gradient_is_normalized(dtype: torch.dtype) -> bool:
    """Whether a gradient made in forward holds 1 / normalizer, which would underflow in fp16."""
    return dtype != torch.float16


def inverse_to_keep(dtype: torch.dtype, normalizer: torch.Tensor | None) -> torch.Tensor | None:
    """1 / normalizer where ``gradient_factor`` will need it.

    A tensor of our own: the caller's may have changed by then, or come from ``inference_mode``.
    """
    if normalizer is None or gradient_is_normalized(dtype):
        return None
    nothing = normalizer == 0
    inverse = torch.where(nothing, 0.0, 1 / torch.where(nothing, 1, normalizer.double()))
    return inverse.clamp(max=2.0**64)  # a larger one would make NaN of 0


def gradient_factor(grad_loss: torch.Tensor, inverse: torch.Tensor | None) -> torch.Tensor:
    """What a gradient made in forward lacks; ``inverse`` as ``inverse_to_keep`` gave it."""
    if inverse is None:
        return grad_loss
    return grad_loss * inverse.to(grad_loss.dtype)  # a scalar on the CPU needs no copy to a device


# -------------------------------------------------------------------------------------------------
# Gradients that backward scales in place


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
        if not in_compiled_autograd():
            return (None,) * len(ctx.inputs)
        # Its graph adds gradients without asking whether there are any.
        return tuple(
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in ctx.inputs
        )


def anchor(*tensors: torch.Tensor) -> torch.Tensor | None:
    """None while compiling, which makes no second derivative, or in forward mode, to be refused."""
    if torch.compiler.is_compiling() or in_forward_mode():
        return None
    run: Any = Anchor.apply
    return cast(torch.Tensor, run(*tensors))


class ScaleOnce(NoSecondDerivative):
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
            library.operators().scale_(gradient, factor)
            return gradient
        out = gradient.new_empty(gradient.shape, dtype=dtype)
        if gradient.dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16):
            library.operators().scale_into(gradient, factor, out)
            return out
        return torch.mul(gradient, factor, out=out)

    vmap = staticmethod(refuse_vmap)


def scale_once(
    gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, anchor: torch.Tensor | None
) -> torch.Tensor:
    run: Any = ScaleOnce.apply
    return cast(torch.Tensor, run(gradient, factor, dtype, anchor))


# -------------------------------------------------------------------------------------------------
# Log-probabilities, whose gradient is made in backward


def savable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A small constant as autograd saves it: it refuses what was made under ``inference_mode``."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


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
