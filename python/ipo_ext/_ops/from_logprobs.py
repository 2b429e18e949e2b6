"""From log-probabilities: how a call for the loss, alone or with others, differentiates."""

from __future__ import annotations

from typing import Any, cast

import torch

from ipo_ext._ops import library
from ipo_ext._ops.arguments import (
    ComponentLossArguments,
    IPOLossArguments,
    ScoreCenteringArguments,
    flatten,
)
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
    return _run("ipo_loss", arguments)


def run_component_loss(arguments: ComponentLossArguments) -> tuple[torch.Tensor, ...]:
    """The same of all components, and the means of those beside the loss."""
    return _run("component_loss", arguments)


def run_score_centering(arguments: ScoreCenteringArguments) -> tuple[torch.Tensor, ...]:
    """What it adds to the loss, differentiable by the ids' log-probabilities, and its sums."""
    return _run("score_centering", arguments)


def _run(
    name: str, arguments: IPOLossArguments | ComponentLossArguments | ScoreCenteringArguments
) -> tuple[torch.Tensor, ...]:
    values = as_operands(name, flatten(arguments))
    if in_forward_mode():
        loss, _, *metrics = _IN_FORWARD_MODE[name].apply(*values)
    elif not is_eager():
        function: Any = _FUNCTIONS[name].apply
        run = function if arguments.with_gradient else operator(name, values)
        loss, _, *metrics = run(*values)
    elif arguments.with_gradient:
        metrics = []
        attach: Any = EagerLoss.apply
        loss = attach(arguments[0], name, values, metrics)
    else:
        loss, _, *metrics = _below_autograd(name, values)
    return loss, *metrics


def _below_autograd(name: str, values: tuple[Any, ...]) -> Any:
    with below_autograd():
        return getattr(library.operators(), name)(*values)


# -------------------------------------------------------------------------------------------------
# The general form


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logprobs, *_, with_gradient = inputs
    _, gradient, *metrics = output
    ctx.mark_non_differentiable(gradient, *metrics)
    ctx.with_gradient = with_gradient
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(gradient, logprobs)
    ctx.set_materialize_grads(False)  # else backward makes zeros for the four other outputs


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if not ctx.with_gradient:
        raise RuntimeError("ipo_ext: expected with_gradient=True to run backward, got False")
    others = (None,) * (ctx.num_inputs - 1)
    if grad_loss is None:
        return (None, *others)
    gradient, logprobs = ctx.saved_tensors
    return (_scaled(gradient, logprobs, grad_loss), *others)


@with_signature
class IPOLossFunction(torch.autograd.Function):
    """``ipo_loss`` for torch.func too, which ``register_autograd`` alone does not reach."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(operator("ipo_loss", inputs)(*inputs))

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)
    vmap = staticmethod(refuse_vmap)


@with_signature
class ComponentLossFunction(IPOLossFunction):
    """``component_loss`` likewise."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(operator("component_loss", inputs)(*inputs))


@with_signature
class ScoreCenteringFunction(IPOLossFunction):
    """``score_centering`` likewise, by the log-probabilities of the ids."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(operator("score_centering", inputs)(*inputs))


_FUNCTIONS = {
    "ipo_loss": IPOLossFunction,
    "component_loss": ComponentLossFunction,
    "score_centering": ScoreCenteringFunction,
}
_IN_FORWARD_MODE = {name: refusing_tangents(function) for name, function in _FUNCTIONS.items()}

# Operator to its formula for whoever calls it through torch.ops: backward, setup_context.
AUTOGRAD: dict[str, Formula] = dict.fromkeys(_FUNCTIONS, (_backward, _setup_context))


# -------------------------------------------------------------------------------------------------
# The eager form


class EagerLoss(torch.autograd.Function):
    """The operator where nothing traces or transforms it, at half the cost of the general form.

    Autograd sees one input, the first, and one output; ``metrics`` receives the rest of what the
    operator ``name`` returns for ``values``, its arguments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: torch.Tensor,
        name: str,
        values: tuple[Any, ...],
        metrics: list[torch.Tensor],
    ) -> torch.Tensor:
        loss, gradient, *metrics[:] = _below_autograd(name, values)
        ctx.save_for_backward(gradient)
        # Not saved: of its values none is needed, so it may change before backward.
        ctx.logprobs = logprobs
        return cast(torch.Tensor, loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, ctx.logprobs, *grad_outputs), None, None, None


# -------------------------------------------------------------------------------------------------
# Scaling


@with_signature
class ScaleGradient(NoSecondDerivative):
    """``gradient * factor``, refusing to be differentiated: the loss has no second derivative.

    ``logprobs`` only gives the result its dtype and a place in the graph, so that a second
    derivative arrives at ``backward`` instead of being silently 0.
    """

    generate_vmap_rule = True  # torch.func.jacrev maps over the factor

    @staticmethod
    def forward(
        gradient: torch.Tensor, factor: torch.Tensor, logprobs: torch.Tensor
    ) -> torch.Tensor:
        return (gradient * factor).to(logprobs.dtype)


def _scaled(gradient: torch.Tensor, logprobs: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    # Only where a graph of the backward pass is built can a second derivative be asked for.
    differentiable = torch.is_grad_enabled()
    if _may_be_handed_over(gradient, logprobs) and not differentiable and _is_one(factor):
        return gradient
    scale: Any = ScaleGradient.apply if differentiable else ScaleGradient.forward
    return cast(torch.Tensor, scale(gradient, factor, logprobs))


def _may_be_handed_over(gradient: torch.Tensor, logprobs: torch.Tensor) -> bool:
    """Whether it may become the caller's own: not where another backward pass needs it."""
    return gradient.dtype == logprobs.dtype and is_eager() and not graph_is_kept()


def _is_one(factor: torch.Tensor) -> bool:
    """Whether it is known to be 1 without waiting for a device."""
    if not is_eager() or is_batched_by_autograd(factor):
        return False
    return type(factor) is torch.Tensor and factor.is_cpu and factor.item() == 1
