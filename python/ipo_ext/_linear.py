"""Tier 3's operators: loss and log-probabilities from hidden states and the LM head's weight.

The [tokens, vocabulary] logits never exist: a chunk of the tokens that take part becomes logits,
and these become their own gradient. The chunk loop is hidden from whatever traces: a graph holds
one node.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

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
    rollout_low: float | None
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


class HeadInputs(NamedTuple):
    """What log-probabilities are made of."""

    hidden: torch.Tensor  # [..., width]
    weight: torch.Tensor  # [vocabulary, width]
    labels: torch.Tensor  # [...]
    temperature: torch.Tensor | None
    softcap: float
    chunk_size: int

    @classmethod
    def of(cls, inputs: LossInputs) -> HeadInputs:
        return cls(*(getattr(inputs, name) for name in cls._fields))

    def flat(self) -> HeadInputs:
        """With per-token tensors as ``[tokens]``."""
        labels, temperature = _flat(self.labels, self.temperature)
        return self._replace(labels=labels, temperature=temperature)


class LossOutputs(NamedTuple):
    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    means: torch.Tensor
    sums: torch.Tensor
    extremes: torch.Tensor
    grad_hidden: torch.Tensor  # [tokens, width]; without a row where not wanted
    grad_weight: torch.Tensor  # [vocabulary, width] in the compute dtype; likewise


# The tensors that the loss takes for each token besides its label.
_TOKENS = (
    "inference_logprobs",
    "advantages",
    "loss_mask",
    "teacher_logprobs",
    "loss_weights",
)

_LOSS_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor inference_logprobs, Tensor advantages, "
    "Tensor loss_mask, Tensor? temperature, float softcap, Tensor? teacher_logprobs, "
    "Tensor? loss_weights, Tensor? cu_seqlens, Tensor? normalizer, int mask_rule, bool kl_active, "
    "float? rollout_low, float low, float high, float adv_tau, float kl_tau, float teacher_tau, "
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
    names = ("labels", *_TOKENS, "temperature")
    flat = dict(zip(names, _flat(*(getattr(inputs, name) for name in names)), strict=True))
    shape, inputs = inputs.labels.shape, inputs._replace(**flat)
    tokens = inputs.labels.numel()
    fault = ops.find_faults(
        inputs.labels,
        inputs.loss_mask,
        inputs.temperature,
        inputs.weight.shape[0],
        tokens if inputs.num_active is None else inputs.num_active,
        inputs.cu_seqlens,
        inputs.normalizer,
    )
    make = _loss_in_one_pass if inputs.rollout_low is None else _loss_of_whole_rollouts
    loss, logprobs, entropy, *others = make(ops, inputs, fault)
    return loss, logprobs.view(shape), entropy.view(shape), *others


def _loss_in_one_pass(
    ops: Any, inputs: LossInputs, fault: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What tokens pay, and the gradients, as soon as a chunk's logits are there."""
    hidden, weight = inputs.hidden, inputs.weight
    rows = Rows.of(inputs.loss_mask, inputs.num_active)
    chunks = rows.chunks(inputs.chunk_size)
    head = Head(weight, _longest(chunks))
    fill = _value_of_no_row(fault, head.compute)
    logprobs = rows.new_output((rows.tokens,), fill)
    entropy = rows.new_output((rows.tokens,), fill)
    gradients = Gradients(head, hidden, rows, fill, inputs.wanted)
    for chunk in chunks:
        take = functools.partial(rows.take, chunk=chunk)
        states = rows.take_states(hidden, chunk)
        active = take(inputs.loss_mask)
        logits = head.logits(states)
        gradient = gradients.over(logits)
        logprobs_here, entropy_here = ops.ipo_loss_rows(
            logits,
            take(inputs.labels),
            take(inputs.inference_logprobs),
            take(inputs.advantages),
            active,
            take(inputs.temperature),
            inputs.softcap,
            take(inputs.teacher_logprobs),
            take(inputs.loss_weights),
            inputs.normalizer,
            *inputs.settings,
            fault,
            gradient,
        )
        rows.put(logprobs, chunk, logprobs_here)
        rows.put(entropy, chunk, entropy_here)
        gradients.add(chunk, gradient, states, active & logprobs_here.isfinite())

    loss, _, *metrics = _loss_of_rows(ops, inputs, fault, logprobs, entropy, False)
    return loss, logprobs, entropy, *metrics, *gradients.finished()


def _loss_of_whole_rollouts(
    ops: Any, inputs: LossInputs, fault: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """A rollout rule needs all log-probabilities of a sequence before any gradient.

    So the logits are made twice, the second time for tokens that pay; without ``num_active`` each
    time reads a count back.
    """
    labels = inputs.labels.masked_fill(~inputs.loss_mask, _IGNORED_LABEL)
    head = HeadInputs.of(inputs)._replace(labels=labels)
    rows = Rows.of(inputs.loss_mask, inputs.num_active)
    logprobs, entropy, softmax = _logprobs_of(ops, rows, fault, head)
    with_slopes = any(inputs.wanted)
    loss, slopes, *metrics = _loss_of_rows(ops, inputs, fault, logprobs, entropy, with_slopes)
    slopes = slopes.to(logprobs.dtype)
    if with_slopes:
        rows = Rows.of(inputs.loss_mask & (slopes != 0), inputs.num_active)
    flowing = (entropy, softmax, slopes, torch.zeros_like(entropy))
    gradients = _gradients_of(ops, rows, fault, head, *flowing, inputs.wanted)
    return loss, logprobs, entropy, *metrics, *gradients


def _loss_of_rows(
    ops: Any,
    inputs: LossInputs,
    fault: torch.Tensor,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    with_slopes: bool,
) -> tuple[torch.Tensor, ...]:
    """Loss, its derivatives by the log-probabilities, means, sums and extremes."""
    return tuple(
        ops.ipo_loss_of_rows(
            logprobs,
            entropy,
            inputs.inference_logprobs,
            inputs.advantages,
            inputs.loss_mask,
            inputs.teacher_logprobs,
            inputs.loss_weights,
            inputs.cu_seqlens,
            inputs.normalizer,
            *inputs.settings,
            fault,
            with_slopes,
            not with_slopes or _operators.gradient_is_normalized(inputs.weight.dtype),
        )
    )


def _linear_token_logprobs(ops: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
    inputs = HeadInputs(*arguments)
    shape, inputs = inputs.labels.shape, inputs.flat()
    fault = _faults_of_head(ops, inputs)
    rows = Rows.of(inputs.labels != _IGNORED_LABEL, None)
    logprobs, entropy, softmax = _logprobs_of(ops, rows, fault, inputs)
    return logprobs.view(shape), entropy.view(shape), softmax


def _logprobs_of(
    ops: Any, rows: Rows, fault: torch.Tensor, inputs: HeadInputs
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities and entropies ``[tokens]``, the softmax's numbers ``[tokens, 2]``."""
    chunks = rows.chunks(inputs.chunk_size)
    head = Head(inputs.weight, _longest(chunks))
    fill = _value_of_no_row(fault, head.compute)
    logprobs = rows.new_output((rows.tokens,), fill)
    entropy = rows.new_output((rows.tokens,), fill)
    softmax = rows.new_output((rows.tokens, 2), fill)
    for chunk in chunks:
        take = functools.partial(rows.take, chunk=chunk)
        logits = head.logits(rows.take_states(inputs.hidden, chunk))
        logprobs_here, entropy_here, softmax_here = ops.token_logprobs_rows(
            logits, take(inputs.labels), take(inputs.temperature), inputs.softcap, fault
        )
        rows.put(logprobs, chunk, logprobs_here)
        rows.put(entropy, chunk, entropy_here)
        rows.put(softmax, chunk, softmax_here.t())
    return logprobs, entropy, softmax


def _linear_token_logprobs_backward(ops: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
    count = len(HeadInputs._fields)
    inputs = HeadInputs(*arguments[:count]).flat()
    entropy, softmax, grad_logprobs, grad_entropy, *wanted = arguments[count:]
    entropy, grad_logprobs, grad_entropy = _flat(entropy, grad_logprobs, grad_entropy)
    fault = _faults_of_head(ops, inputs)
    flows = (inputs.labels != _IGNORED_LABEL) & ((grad_logprobs != 0) | (grad_entropy != 0))
    flowing = (entropy, softmax, grad_logprobs, grad_entropy)
    return _gradients_of(ops, Rows.of(flows, None), fault, inputs, *flowing, Wanted(*wanted))


def _gradients_of(
    ops: Any,
    rows: Rows,
    fault: torch.Tensor,
    inputs: HeadInputs,
    entropy: torch.Tensor,
    softmax: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor,
    wanted: Wanted,
) -> tuple[torch.Tensor, ...]:
    """By hidden states and weight, of the active rows, whose logits are made again."""
    chunks = rows.chunks(inputs.chunk_size) if any(wanted) else []
    head = Head(inputs.weight, _longest(chunks))
    fill = _value_of_no_row(fault, head.compute)
    gradients = Gradients(head, inputs.hidden, rows, fill, wanted)
    for chunk in chunks:
        take = functools.partial(rows.take, chunk=chunk)
        states = rows.take_states(inputs.hidden, chunk)
        logits = head.logits(states)
        gradient = gradients.over(logits)
        ops.token_logprobs_rows_backward(
            logits,
            take(inputs.labels),
            take(inputs.temperature),
            inputs.softcap,
            take(entropy),
            take(softmax).t(),
            take(grad_logprobs),
            take(grad_entropy),
            fault,
            gradient,
        )
        gradients.add(chunk, gradient, states, take(rows.active))
    return gradients.finished()


def _faults_of_head(ops: Any, inputs: HeadInputs) -> torch.Tensor:
    labels, vocabulary = inputs.labels, inputs.weight.shape[0]
    return cast(
        torch.Tensor,
        ops.find_faults(labels, None, inputs.temperature, vocabulary, labels.numel(), None, None),
    )


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
