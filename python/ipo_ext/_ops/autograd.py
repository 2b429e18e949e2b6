"""What the operators' autograd Functions share: gradients made in forward, and scaled once.

The forward operator makes the gradient, so a backward pass only scales it, and cannot be
differentiated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from ipo_ext._ops import library
from ipo_ext._ops.arguments import LogprobsBackward
from ipo_ext._ops.torch_internals import (
    graph_is_kept,
    in_compiled_autograd,
    in_forward_mode,
)

Formula = tuple[Callable[..., Any], Callable[..., Any]]  # backward, setup_context
_Function = TypeVar("_Function", bound=type[torch.autograd.Function])


def with_signature(function: _Function) -> _Function:
    """Makes the signature of ``forward`` once: ``Function.apply`` asks for it on every call."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function


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


# -------------------------------------------------------------------------------------------------
# Gradients that backward scales in place


@with_signature
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


@with_signature
class ScaleOnce(NoSecondDerivative):
    """``gradient * factor`` in ``dtype``, over the gradient if that is its own; no derivative.

    Each row also times its scale, where there are ``row_scales``. A graph that is kept for another
    backward pass, and a compiled one, may not change what it has saved.
    """

    @staticmethod
    def forward(
        gradient: torch.Tensor,
        factor: torch.Tensor,
        dtype: torch.dtype,
        anchor: torch.Tensor | None,
        row_scales: torch.Tensor | None,
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return multiplied(gradient, factor, row_scales).to(dtype)
        if gradient.dtype == dtype:
            gradient = gradient.clone() if graph_is_kept() else gradient
            if row_scales is None:
                library.operators().scale_(gradient, factor)
            else:
                library.operators().scale_rows_(gradient, factor, row_scales)
            return gradient
        out = gradient.new_empty(gradient.shape, dtype=dtype)
        if gradient.dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16):
            library.operators().scale_into(gradient, factor, out)
            return out
        return torch.mul(gradient, factor, out=out)

    vmap = staticmethod(refuse_vmap)


def scale_once(
    gradient: torch.Tensor,
    factor: torch.Tensor,
    dtype: torch.dtype,
    anchor: torch.Tensor | None,
    row_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    run: Any = ScaleOnce.apply
    return cast(torch.Tensor, run(gradient, factor, dtype, anchor, row_scales))


def multiplied(
    gradient: torch.Tensor, factor: torch.Tensor, row_scales: torch.Tensor | None
) -> torch.Tensor:
    """``gradient * factor``, each row also times its scale, in the factor's dtype."""
    if row_scales is not None:
        factor = factor * row_scales.view(*gradient.shape[:-1], 1)
    return gradient.to(factor.dtype) * factor


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
    candidates: torch.Tensor | None,
    grads: Sequence[torch.Tensor | None],
) -> LogprobsBackward:
    """Of what autograd hands over: None where nothing flows in.

    ``grads`` are those by log-probabilities, entropies and candidates' log-probabilities.
    """
    grad_logprobs, grad_entropy, grad_candidates = grads
    nothing = torch.zeros_like(entropy)
    if candidates is None:
        grad_candidates = None
    elif grad_candidates is None:
        grad_candidates = torch.zeros_like(candidates, dtype=entropy.dtype)
    return LogprobsBackward(
        entropy.detach(),
        softmax_stats,
        nothing if grad_logprobs is None else grad_logprobs,
        nothing if grad_entropy is None else grad_entropy,
        grad_candidates,
    )
