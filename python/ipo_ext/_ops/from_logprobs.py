"""From log-probabilities: how a call for the loss differentiates."""

from __future__ import annotations

from typing import Any, cast

import torch

from ipo_ext._ops import library
from ipo_ext._ops.arguments import IPOLossArguments, flatten, unflatten
from ipo_ext._ops.autograd import (
    Formula,
    NoSecondDerivative,
    refuse_vmap,
    refusing_tangents,
    with_signature,
)
from ipo_ext._ops.changing_numbers import as_operands, operator
from ipo_ext._ops.torch_internals import (
    below_autograd,
    graph_is_kept,
    in_forward_mode,
    is_batched_by_autograd,
    is_eager,
)


def run_ipo_loss(arguments: IPOLossArguments) -> tuple[torch.Tensor, ...]:
    """Loss, means, sums and extremes, differentiable as the inputs ask, or refusing to be."""
    values = as_operands("ipo_loss", flatten(arguments))
    if in_forward_mode():
        loss, _, *metrics = IPOLossInForwardMode.apply(*values)
    elif not is_eager():
        function: Any = IPOLossFunction.apply
        run = function if arguments.with_gradient else operator("ipo_loss", values)
        loss, _, *metrics = run(*values)
    elif arguments.with_gradient:
        metrics = []
        attach: Any = EagerIPOLoss.apply
        loss = attach(arguments.trainer_logprobs, values, metrics)
    else:
        loss, _, *metrics = _below_autograd(values)
    return loss, *metrics


def _below_autograd(values: tuple[Any, ...]) -> Any:
    with below_autograd():
        return library.operators().ipo_loss(*values)


# -------------------------------------------------------------------------------------------------
# The general form


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    arguments = unflatten(IPOLossArguments, inputs)
    _, gradient, *metrics = output
    ctx.mark_non_differentiable(gradient, *metrics)
    ctx.with_gradient = arguments.with_gradient
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(gradient, arguments.trainer_logprobs)
    ctx.set_materialize_grads(False)  # else backward makes zeros for the four other outputs


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if not ctx.with_gradient:
        raise RuntimeError(
            "ipo_ext::ipo_loss: expected with_gradient=True to run backward, got False"
        )
    others = (None,) * (ctx.num_inputs - 1)
    if grad_loss is None:
        return (None, *others)
    gradient, trainer_logprobs = ctx.saved_tensors
    return (_scaled(gradient, trainer_logprobs, grad_loss), *others)


@with_signature
class IPOLossFunction(torch.autograd.Function):
    """``ipo_loss`` for torch.func too, which ``register_autograd`` alone does not reach."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(operator("ipo_loss", inputs)(*inputs))

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)
    vmap = staticmethod(refuse_vmap)


IPOLossInForwardMode = refusing_tangents(IPOLossFunction)

# Operator to its formula for whoever calls it through torch.ops: backward, setup_context.
AUTOGRAD: dict[str, Formula] = {"ipo_loss": (_backward, _setup_context)}


# -------------------------------------------------------------------------------------------------
# The eager form


class EagerIPOLoss(torch.autograd.Function):
    """``ipo_loss`` where nothing traces or transforms it, at half the cost of the general form.

    Autograd sees one input and one output; ``metrics`` receives the rest of what the operator
    returns for ``values``, its arguments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        trainer_logprobs: torch.Tensor,
        values: tuple[Any, ...],
        metrics: list[torch.Tensor],
    ) -> torch.Tensor:
        loss, gradient, *metrics[:] = _below_autograd(values)
        ctx.save_for_backward(gradient)
        # Not saved: of its values none is needed, so it may change before backward.
        ctx.trainer_logprobs = trainer_logprobs
        return cast(torch.Tensor, loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, ctx.trainer_logprobs, *grad_outputs), None, None


# -------------------------------------------------------------------------------------------------
# Scaling


@with_signature
class ScaleGradient(NoSecondDerivative):
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


def _scaled(
    gradient: torch.Tensor, trainer_logprobs: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    # Only where a graph of the backward pass is built can a second derivative be asked for.
    differentiable = torch.is_grad_enabled()
    if _may_be_handed_over(gradient, trainer_logprobs) and not differentiable and _is_one(factor):
        return gradient
    scale: Any = ScaleGradient.apply if differentiable else ScaleGradient.forward
    return cast(torch.Tensor, scale(gradient, factor, trainer_logprobs))


def _may_be_handed_over(gradient: torch.Tensor, trainer_logprobs: torch.Tensor) -> bool:
    """Whether it may become the caller's own: not where another backward pass needs it."""
    return gradient.dtype == trainer_logprobs.dtype and is_eager() and not graph_is_kept()


def _is_one(factor: torch.Tensor) -> bool:
    """Whether it is known to be 1 without waiting for a device."""
    if not is_eager() or is_batched_by_autograd(factor):
        return False
    return type(factor) is torch.Tensor and factor.is_cpu and factor.item() == 1
