"""The Python half of the operators: shapes for tracing (fakes) and the autograd formulas."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd import forward_ad

from ipo_ext import _C, _checks

_namespace = "ipo_ext"


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
    segments = () if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    new = trainer_logprobs.new_empty
    return (
        new((), dtype=compute),
        new(trainer_logprobs.shape if with_gradient else (0,), dtype=compute),
        new((len(_C.MEAN_ROWS), *segments), dtype=compute),
        new((len(_C.SUM_ROWS), *segments), dtype=torch.float64),
        new((len(_C.EXTREME_ROWS), *segments), dtype=torch.float64),
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


class IPOLossUnderForwardMode(IPOLossFunction):
    """Refuses tangents. A class of its own: torch.compile traces no Function that has a ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)


def run_ipo_loss(*inputs: Any) -> tuple[torch.Tensor, ...]:
    """Calls the operator by the way that differentiates, or refuses to, as inputs ask for it."""
    function: Callable[..., Any]
    if forward_ad._current_level >= 0:  # on its own, the operator would say that nothing flows
        function = IPOLossUnderForwardMode.apply
    else:
        function = IPOLossFunction.apply if inputs[-1] else library().ipo_loss
    return cast("tuple[torch.Tensor, ...]", function(*inputs))


register(_namespace)
