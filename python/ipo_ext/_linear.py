"""Tier 3's operators: loss and log-probabilities from hidden states and the LM head's weight.

The [tokens, vocabulary] logits never exist: a chunk of the tokens that take part becomes logits,
and these become their own gradient. The chunk loop is hidden from whatever traces: a graph holds
one node.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from ipo_ext import _checks, _operators
from ipo_ext._chunks import Gradients, Head, Rows, Wanted

_IGNORED_LABEL = -100


# -------------------------------------------------------------------------------------------------
# Arguments, in the order of the schemas


class LossInputs(NamedTuple):
    hidden: torch.Tensor  # [..., width]
    weight: torch.Tensor  # [vocabulary, width]
    labels: torch.Tensor  # [...], like the per-token tensors below
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    temperature: torch.Tensor | None
    softcap: float
    teacher_logprobs: torch.Tensor | None
    loss_weights: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    normalizer: torch.Tensor | None
    mask_rule: int
    kl_active: bool
    low: float
    high: float
    adv_tau: float
    kl_tau: float
    teacher_tau: float
    chunk_size: int
    num_active: int | None
    hidden_gradient: bool
    weight_gradient: bool

    @property
    def settings(self) -> tuple[Any, ...]:
        """What the config says: from ``mask_rule`` to ``teacher_tau``."""
        first, last = map(self._fields.index, ("mask_rule", "teacher_tau"))
        return self[first : last + 1]

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.hidden_gradient, self.weight_gradient)


class LossOutputs(NamedTuple):
    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    means: torch.Tensor
    sums: torch.Tensor
    extremes: torch.Tensor
    grad_hidden: torch.Tensor  # [tokens, width]; without a row where not wanted
    grad_weight: torch.Tensor  # [vocabulary, width] in the compute dtype; likewise


_LOSS_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor inference_logprobs, Tensor advantages, "
    "Tensor loss_mask, Tensor? temperature, float softcap, Tensor? teacher_logprobs, "
    "Tensor? loss_weights, Tensor? cu_seqlens, Tensor? normalizer, int mask_rule, bool kl_active, "
    "float low, float high, float adv_tau, float kl_tau, float teacher_tau, "
    "SymInt chunk_size, SymInt? num_active, bool hidden_gradient, bool weight_gradient) -> "
    "(Tensor loss, Tensor logprobs, Tensor entropy, Tensor means, Tensor sums, Tensor extremes, "
    "Tensor grad_hidden, Tensor grad_weight)"
)
_LOGPROBS_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? temperature, float softcap, "
    "SymInt chunk_size) -> (Tensor logprobs, Tensor entropy, Tensor softmax)"
)
_LOGPROBS_BACKWARD_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? temperature, float softcap, "
    "SymInt chunk_size, Tensor entropy, Tensor softmax, Tensor grad_logprobs, Tensor grad_entropy, "
    "bool hidden_gradient, bool weight_gradient) -> (Tensor grad_hidden, Tensor grad_weight)"
)


# -------------------------------------------------------------------------------------------------
# Kernels


def _ipo_loss_from_hidden(ops: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
    inputs = LossInputs(*arguments)
    hidden, weight = inputs.hidden, inputs.weight
    labels, inference, advantages, mask, temperature, teacher, weights = _flat(
        inputs.labels,
        inputs.inference_logprobs,
        inputs.advantages,
        inputs.loss_mask,
        inputs.temperature,
        inputs.teacher_logprobs,
        inputs.loss_weights,
    )
    tokens, vocabulary = labels.numel(), weight.shape[0]
    promised = tokens if inputs.num_active is None else inputs.num_active
    fault = ops.find_faults(
        labels, mask, temperature, vocabulary, promised, inputs.cu_seqlens, inputs.normalizer
    )
    rows = Rows.of(mask, inputs.num_active)
    chunks = rows.chunks(inputs.chunk_size)
    head = Head(weight, _longest(chunks))
    fill = _value_of_no_row(fault, head.compute)
    logprobs = rows.new_output((tokens,), fill)
    entropy = rows.new_output((tokens,), fill)
    gradients = Gradients(head, hidden, rows, fill, inputs.wanted)
    for chunk in chunks:
        take = functools.partial(rows.take, chunk=chunk)
        states = rows.take_states(hidden, chunk)
        active = take(mask)
        logits = head.logits(states)
        gradient = gradients.over(logits)
        logprobs_here, entropy_here = ops.ipo_loss_rows(
            logits,
            take(labels),
            take(inference),
            take(advantages),
            active,
            take(temperature),
            inputs.softcap,
            take(teacher),
            take(weights),
            inputs.normalizer,
            *inputs.settings,
            fault,
            gradient,
        )
        rows.put(logprobs, chunk, logprobs_here)
        rows.put(entropy, chunk, entropy_here)
        gradients.add(chunk, gradient, states, active & logprobs_here.isfinite())

    loss, *metrics = ops.ipo_loss_of_rows(
        logprobs,
        entropy,
        inference,
        advantages,
        mask,
        teacher,
        weights,
        inputs.cu_seqlens,
        inputs.normalizer,
        *inputs.settings,
        fault,
    )
    shape = inputs.labels.shape
    return loss, logprobs.view(shape), entropy.view(shape), *metrics, *gradients.finished()


def _linear_token_logprobs(
    ops: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor | None,
    softcap: float,
    chunk_size: int,
) -> tuple[torch.Tensor, ...]:
    shape = labels.shape
    labels, temperature = _flat(labels, temperature)
    tokens = labels.numel()
    fault = ops.find_faults(labels, None, temperature, weight.shape[0], tokens, None, None)
    rows = Rows.of(labels != _IGNORED_LABEL, None)
    chunks = rows.chunks(chunk_size)
    head = Head(weight, _longest(chunks))
    fill = _value_of_no_row(fault, head.compute)
    logprobs = rows.new_output((tokens,), fill)
    entropy = rows.new_output((tokens,), fill)
    softmax = rows.new_output((tokens, 2), fill)
    for chunk in chunks:
        take = functools.partial(rows.take, chunk=chunk)
        logits = head.logits(rows.take_states(hidden, chunk))
        logprobs_here, entropy_here, softmax_here = ops.token_logprobs_rows(
            logits, take(labels), take(temperature), softcap, fault
        )
        rows.put(logprobs, chunk, logprobs_here)
        rows.put(entropy, chunk, entropy_here)
        rows.put(softmax, chunk, softmax_here.t())
    return logprobs.view(shape), entropy.view(shape), softmax


def _linear_token_logprobs_backward(
    ops: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor | None,
    softcap: float,
    chunk_size: int,
    entropy: torch.Tensor,
    softmax: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    labels, temperature, entropy, grad_logprobs, grad_entropy = _flat(
        labels, temperature, entropy, grad_logprobs, grad_entropy
    )
    tokens = labels.numel()
    fault = ops.find_faults(labels, None, temperature, weight.shape[0], tokens, None, None)
    flows = (labels != _IGNORED_LABEL) & ((grad_logprobs != 0) | (grad_entropy != 0))
    rows = Rows.of(flows, None)
    chunks = rows.chunks(chunk_size)
    head = Head(weight, _longest(chunks))
    fill = _value_of_no_row(fault, head.compute)
    wanted = Wanted(hidden_gradient, weight_gradient)
    gradients = Gradients(head, hidden, rows, fill, wanted)
    for chunk in chunks:
        take = functools.partial(rows.take, chunk=chunk)
        states = rows.take_states(hidden, chunk)
        logits = head.logits(states)
        gradient = gradients.over(logits)
        ops.token_logprobs_rows_backward(
            logits,
            take(labels),
            take(temperature),
            softcap,
            take(entropy),
            take(softmax).t(),
            take(grad_logprobs),
            take(grad_entropy),
            fault,
            gradient,
        )
        gradients.add(chunk, gradient, states, take(flows))
    return gradients.finished()


def _flat(*tensors: torch.Tensor | None) -> list[Any]:
    """[...] -> [tokens]; a temperature for all, a scalar beside tokens, and None as they are."""
    of_tokens = tensors[0]
    assert of_tokens is not None
    return [t if t is None or t.dim() != of_tokens.dim() else t.reshape(-1) for t in tensors]


def _longest(chunks: list[slice]) -> int:
    return max((chunk.stop - chunk.start for chunk in chunks), default=0)


def _value_of_no_row(fault: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What tokens hold that take no part, a scalar: 0, or NaN under a contract fault."""
    return torch.where(fault[0] != 0, math.nan, torch.zeros((), dtype=dtype, device=fault.device))


# -------------------------------------------------------------------------------------------------
# Fakes


def _ipo_loss_from_hidden_fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
    inputs = LossInputs(*arguments)
    hidden, labels = inputs.hidden, inputs.labels
    _checks.check_hidden_loss(
        hidden,
        inputs.weight,
        labels,
        inputs.temperature,
        _checks.LossConstants.of(inputs),
        inputs.teacher_tau,
    )
    per_token = _checks.widened(hidden.dtype)
    compute = _checks.compute_dtype(hidden, inputs.inference_logprobs)
    return (
        hidden.new_empty((), dtype=compute),
        hidden.new_empty(labels.shape, dtype=per_token),
        hidden.new_empty(labels.shape, dtype=per_token),
        *_operators.metrics_fake(hidden, inputs.cu_seqlens, compute),
        *_gradients_fake(hidden, inputs.weight, labels, inputs.wanted),
    )


def _gradients_fake(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, wanted: Wanted
) -> tuple[torch.Tensor, torch.Tensor]:
    width = hidden.shape[-1]
    vocabulary = weight.shape[0] if wanted.by_weight else 0
    return (
        hidden.new_empty((labels.numel() if wanted.by_hidden else 0, width)),
        weight.new_empty((vocabulary, width), dtype=_checks.widened(weight.dtype)),
    )


def _linear_token_logprobs_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    _checks.check_hidden(hidden, weight, labels, temperature)
    dtype = _checks.widened(hidden.dtype)
    return (
        hidden.new_empty(labels.shape, dtype=dtype),
        hidden.new_empty(labels.shape, dtype=dtype),
        hidden.new_empty((labels.numel(), 2), dtype=dtype),
    )


def _linear_token_logprobs_backward_fake(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *inputs: Any
) -> tuple[torch.Tensor, ...]:
    return _gradients_fake(hidden, weight, labels, Wanted(*inputs[-2:]))


# -------------------------------------------------------------------------------------------------
# Autograd of the loss


def _loss_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    operands = LossInputs(*inputs)
    _keep_gradients(ctx, operands, LossOutputs(*output), operands.weight.dtype, None)
    ctx.num_inputs = len(inputs)


def _keep_gradients(
    ctx: Any,
    inputs: LossInputs,
    outputs: LossOutputs,
    dtype: torch.dtype,
    anchor: torch.Tensor | None,
) -> None:
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.wanted = inputs.hidden.shape, inputs.wanted
    ctx.dtypes = inputs.hidden.dtype, inputs.weight.dtype
    normalizer = _operators.normalizer_to_keep(dtype, inputs.normalizer)
    ctx.save_for_backward(outputs.grad_hidden, outputs.grad_weight, normalizer, anchor)


def _loss_backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    """For those who call the operator: leaves the gradients, two of its outputs, as they are."""
    others = (None,) * (ctx.num_inputs - 2)
    if grad_loss is None:
        return (None, None, *others)
    if torch.is_grad_enabled():
        raise NotImplementedError(_operators.NO_SECOND_DERIVATIVE)
    for name, wanted, needed in zip(
        ("hidden", "weight"), ctx.wanted, ctx.needs_input_grad, strict=False
    ):
        if needed and not wanted:
            raise RuntimeError(
                f"ipo_ext::ipo_loss_from_hidden: expected {name}_gradient=True to run backward, "
                "got False"
            )
    by_hidden, by_weight, normalizer, _ = ctx.saved_tensors
    factor = _operators.gradient_factor(grad_loss, normalizer)
    hidden_dtype, weight_dtype = ctx.dtypes
    return (
        (by_hidden * factor).to(hidden_dtype).view(ctx.shape) if ctx.wanted.by_hidden else None,
        (by_weight * factor).to(weight_dtype) if ctx.wanted.by_weight else None,
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
        anchor, dtype, *operands = inputs
        _keep_gradients(ctx, LossInputs(*operands), LossOutputs(*output), dtype, anchor)
        ctx.num_inputs = len(inputs)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        others = (None,) * (ctx.num_inputs - 4)
        if grad_loss is None:
            return (None, None, None, None, *others)
        _operators.hand_over_once(ctx)
        by_hidden, by_weight, normalizer, anchor = ctx.saved_tensors
        factor = _operators.gradient_factor(grad_loss, normalizer)
        hidden_dtype, weight_dtype = ctx.dtypes
        scale: Any = _operators.ScaleOnce.apply
        of_hidden = of_weight = None
        if ctx.wanted.by_hidden:
            of_hidden = scale(by_hidden, factor, hidden_dtype, anchor).view(ctx.shape)
        if ctx.wanted.by_weight:
            of_weight = scale(by_weight, factor, weight_dtype, anchor)
        return (None, None, of_hidden, of_weight, *others)

    vmap = staticmethod(_operators.refuse_vmap)


class IPOLossFromHiddenUnderForwardMode(_operators.RefusesTangents, IPOLossFromHiddenFunction):
    pass


def run_ipo_loss_from_hidden(dtype: torch.dtype, *inputs: Any) -> tuple[torch.Tensor, ...]:
    """Loss, log-probabilities, entropy, means, sums, extremes; differentiates as the inputs ask."""
    operands = LossInputs(*inputs)
    function: Any
    if forward_ad._current_level >= 0:
        function = IPOLossFromHiddenUnderForwardMode
    elif not any(operands.wanted):
        return tuple(_operators.library().ipo_loss_from_hidden(*_cast(dtype, inputs)))[:6]
    else:
        function = IPOLossFromHiddenFunction
    anchor = _operators.anchor(operands.hidden, operands.weight)
    return tuple(function.apply(anchor, dtype, *inputs))[:6]


def _cast(dtype: torch.dtype, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hidden states and weight, which come first, in ``dtype``."""
    hidden, weight, *others = inputs
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
        softmax: torch.Tensor,
        grad_logprobs: torch.Tensor,
        grad_entropy: torch.Tensor,
        hidden_gradient: bool,
        weight_gradient: bool,
    ) -> tuple[torch.Tensor, ...]:
        gradients = _operators.library().linear_token_logprobs_backward(
            hidden,
            weight,
            labels,
            temperature,
            softcap,
            chunk_size,
            entropy,
            softmax,
            grad_logprobs,
            grad_entropy,
            hidden_gradient,
            weight_gradient,
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
    hidden, weight, labels, temperature, ctx.softcap, ctx.chunk_size = inputs
    _keep_for_logprobs(ctx, (hidden, weight, labels, temperature), output, weight.dtype)


def _keep_for_logprobs(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...], dtype: torch.dtype
) -> None:
    _, entropy, softmax = output
    ctx.mark_non_differentiable(softmax)
    ctx.save_for_backward(*inputs, entropy, softmax)
    ctx.set_materialize_grads(False)  # not for the softmax
    ctx.dtype = dtype


def _logprobs_backward(
    ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    others = (None,) * 4
    if grad_logprobs is None and grad_entropy is None:
        return (None, None, *others)
    hidden, weight, labels, temperature, entropy, softmax = ctx.saved_tensors
    nothing = torch.zeros_like(entropy)
    wants_hidden, wants_weight, *_ = ctx.needs_input_grad[-6:]
    run: Any = LinearTokenLogprobsGradient.apply
    by_hidden, by_weight = run(
        hidden.to(ctx.dtype),
        weight.to(ctx.dtype),
        labels,
        temperature,
        ctx.softcap,
        ctx.chunk_size,
        entropy.detach(),
        softmax,
        nothing if grad_logprobs is None else grad_logprobs,
        nothing if grad_entropy is None else grad_entropy,
        wants_hidden,
        wants_weight,
    )
    of_hidden = by_hidden.to(hidden.dtype).view(hidden.shape) if wants_hidden else None
    of_weight = by_weight.to(weight.dtype) if wants_weight else None
    return (of_hidden, of_weight, *others)


class LinearTokenLogprobsFunction(torch.autograd.Function):
    """``linear_token_logprobs`` as a function that torch.func understands; casts as the loss."""

    @staticmethod
    def forward(dtype: torch.dtype, *inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(_operators.library().linear_token_logprobs(*_cast(dtype, inputs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        dtype, hidden, weight, labels, temperature, ctx.softcap, ctx.chunk_size = inputs
        _keep_for_logprobs(ctx, (hidden, weight, labels, temperature), output, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        gradients: tuple[Any, ...] = _logprobs_backward(ctx, *grad_outputs)
        return (None, *gradients)

    vmap = staticmethod(_operators.refuse_vmap)


class LinearTokenLogprobsUnderForwardMode(_operators.RefusesTangents, LinearTokenLogprobsFunction):
    pass


def run_linear_token_logprobs(dtype: torch.dtype, *inputs: Any) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropy and what the backward pass needs."""
    hidden, weight, *_ = inputs
    function: Any
    if forward_ad._current_level >= 0:
        function = LinearTokenLogprobsUnderForwardMode
    elif not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return tuple(_operators.library().linear_token_logprobs(*_cast(dtype, inputs)))
    else:
        function = LinearTokenLogprobsFunction
    return tuple(function.apply(dtype, *inputs))


# -------------------------------------------------------------------------------------------------
# Registration

_OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "ipo_loss_from_hidden": (_LOSS_SCHEMA, _ipo_loss_from_hidden, _ipo_loss_from_hidden_fake),
    "linear_token_logprobs": (
        _LOGPROBS_SCHEMA,
        _linear_token_logprobs,
        _linear_token_logprobs_fake,
    ),
    "linear_token_logprobs_backward": (
        _LOGPROBS_BACKWARD_SCHEMA,
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
    for name, (schema, kernel, fake) in _OPERATORS.items():
        # They read counts back, unless told.
        library.define(name + schema, tags=(torch.Tag.cudagraph_unsafe,))
        for key in ("CPU", "CUDA"):
            library.impl(name, _kernel(kernel, namespace), key)
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        torch.library.register_vmap(f"{namespace}::{name}", _operators.refuse_vmap, lib=library)
    for name, (backward, setup_context) in _AUTOGRAD.items():
        torch.library.register_autograd(
            f"{namespace}::{name}", backward, setup_context=setup_context, lib=library
        )


def _kernel(function: Any, namespace: str) -> Any:
    """``function`` over the C++ operators of ``namespace``, in the precision that it asks for."""
    no_views = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

    @functools.wraps(function)
    def kernel(hidden: torch.Tensor, *inputs: Any) -> Any:
        with (
            torch.no_grad(),
            torch.autocast(hidden.device.type, enabled=False),
            torch._C._ExcludeDispatchKeyGuard(no_views),  # what reshapes here is no view outside
        ):
            return tuple(function(getattr(torch.ops, namespace), hidden, *inputs))

    return kernel


register("ipo_ext")
