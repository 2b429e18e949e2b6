"""Tier 3's operators: loss and log-probabilities from hidden states and the LM head's weight.

The [tokens, vocabulary] logits never exist: the tokens that take part are gathered and worked on a
chunk at a time, and a chunk's logits become their own gradient. Matrix products are torch's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from ipo_ext import _checks, _operators

# Bytes of a chunk's logits: enough rows to keep the matrix products at full speed, which on a GPU
# takes thousands and on a CPU hundreds.
_LOGITS_BYTES = {"cuda": 1_250_000_000, "cpu": 48 * 2**20}
_ROWS_MULTIPLE = 128
_ALIGNED_COLUMNS = 64  # what a GPU's matrix products want a row of logits to be a multiple of

_IGNORED_LABEL = -100


# -------------------------------------------------------------------------------------------------
# Which rows, and in what chunks


def default_chunk_size(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """The largest multiple of 128 rows whose logits fit the budget, at least 128."""
    budget = _LOGITS_BYTES["cuda" if device.type == "cuda" else "cpu"]
    row_bytes = vocabulary * _checks.widened(dtype).itemsize
    return max(budget // row_bytes // _ROWS_MULTIPLE, 1) * _ROWS_MULTIPLE


def _chunks(rows: int, chunk_size: int) -> Iterator[slice]:
    """Cuts rows into chunks of about one size, none longer than ``chunk_size``."""
    if rows == 0:
        return
    size = math.ceil(rows / math.ceil(rows / chunk_size))
    size = min(chunk_size, math.ceil(size / _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
    for begin in range(0, rows, size):
        yield slice(begin, min(begin + size, rows))


@dataclasses.dataclass(frozen=True)
class _ActiveRows:
    """The tokens that take part, in order; some of the last may be none (index ``tokens``)."""

    active: torch.Tensor  # [tokens] bool
    index: torch.Tensor | None  # [rows] int64; None: every token, active or not
    tokens: int

    @classmethod
    def of(cls, active: torch.Tensor, num_active: int | None) -> _ActiveRows:
        tokens = active.numel()
        if num_active is None and not _is_capturing(active):
            index = active.nonzero().squeeze(1)  # on CUDA, waits for the count
        elif num_active is None or num_active >= tokens:
            return cls(active, None, tokens)
        else:
            index = torch.nonzero_static(active, size=num_active, fill_value=tokens).squeeze(1)
        return cls(active, None if len(index) == tokens else index, tokens)

    def __len__(self) -> int:
        return self.tokens if self.index is None else len(self.index)

    def take(self, tensor: Any, chunk: slice) -> Any:
        """[tokens, ...] -> the chunk's [rows, ...]; scalars and None as they are."""
        if tensor is None or tensor.dim() == 0:
            return tensor
        if self.index is None:
            return tensor[chunk]
        return tensor.index_select(0, self.index[chunk].clamp(max=self.tokens - 1))

    def take_active(self, chunk: slice) -> torch.Tensor:
        return self.active[chunk] if self.index is None else self.index[chunk] < self.tokens

    def new_output(self, *shape: int, like: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        """[tokens, *shape], and one row more for what padded rows put; filled where they do not."""
        rows = self.tokens if self.index is None else self.tokens + 1
        output = like.new_empty((rows, *shape))
        return output if self.index is None else output.copy_(fill)

    def put(self, output: torch.Tensor, chunk: slice, values: torch.Tensor) -> None:
        if self.index is None:
            output[chunk] = values
        else:
            output.index_copy_(0, self.index[chunk], values.to(output.dtype))


def _is_capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


# -------------------------------------------------------------------------------------------------
# Matrix products


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
    """out = a @ b, or += it, in the precision of ``out`` whatever that of ``a`` and ``b``."""
    how: dict[str, Any] = {"out": out}
    if a.dtype != out.dtype and a.is_cuda:
        how["out_dtype"] = out.dtype
    else:  # the CPU has no such kernel
        a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        torch.addmm(out, a, b, **how)
    else:
        torch.mm(a, b, **how)


class _Head:
    """The LM head at work on one chunk after the other, in one buffer."""

    def __init__(self, weight: torch.Tensor, chunk_size: int) -> None:
        self.compute = _checks.widened(weight.dtype)
        self.dtype = weight.dtype
        self.weight = weight if weight.is_cuda else weight.to(self.compute)  # once, not per chunk
        multiple = _ALIGNED_COLUMNS if weight.is_cuda else 1
        columns = math.ceil(weight.shape[0] / multiple) * multiple
        self._buffer = weight.new_empty((chunk_size, columns), dtype=self.compute)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] in the compute dtype, gone with the next call."""
        logits = self._buffer[: hidden.shape[0], : self.weight.shape[0]]
        _product(hidden, self.weight.t(), logits)
        return logits

    def gradient_over(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] in the weight's dtype, each row in the first bytes of its logits."""
        narrow = self._buffer.view(self.dtype)
        return narrow[: logits.shape[0], : logits.shape[1]]


class _Gradients:
    """Derivatives by the hidden states and by the weight, as far as wanted, a chunk at a time."""

    def __init__(
        self,
        head: _Head,
        hidden: torch.Tensor,
        rows: _ActiveRows,
        *,
        of_hidden: bool,
        of_weight: bool,
        fill: torch.Tensor,
    ) -> None:
        self.head, self.rows, self.fill = head, rows, fill
        self.of_hidden, self.of_weight = of_hidden, of_weight
        width = hidden.shape[1]
        self.hidden = (
            rows.new_output(width, like=hidden, fill=fill)
            if of_hidden
            else hidden.new_empty((0, width))
        )
        shape = head.weight.shape if of_weight else (0, width)
        self.weight = head.weight.new_empty(shape, dtype=head.compute)
        self.has_none = True

    def wanted_over(self, logits: torch.Tensor) -> torch.Tensor | None:
        wanted = self.of_hidden or self.of_weight
        return self.head.gradient_over(logits) if wanted else None

    def add(self, chunk: slice, gradient: torch.Tensor | None, hidden: torch.Tensor) -> None:
        """``gradient``, by the chunk's logits, [rows, vocabulary]; ``hidden``, [rows, width]."""
        if gradient is None:
            return
        if self.of_hidden:
            head = self.head.weight
            self.rows.put(self.hidden, chunk, torch.mm(gradient.to(head.dtype), head))
        if self.of_weight:
            _product(gradient.t(), hidden, self.weight, add=not self.has_none)
        self.has_none = False

    def finished(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, width] and [vocabulary, width]; without a row where not wanted."""
        if self.has_none:
            self.weight.copy_(self.fill)
        return self.hidden[: self.rows.tokens], self.weight


def _fill(fault: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What tokens hold that take no part, a scalar: 0, or NaN under a contract fault."""
    return torch.where(fault[0] != 0, math.nan, torch.zeros((), dtype=dtype, device=fault.device))


# -------------------------------------------------------------------------------------------------
# Operators


def _ipo_loss_from_hidden(
    ops: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
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
    *settings_and_more: Any,
) -> tuple[torch.Tensor, ...]:
    *settings, chunk_size, num_active, hidden_gradient, weight_gradient = settings_and_more
    shape = labels.shape
    hidden = hidden.reshape(-1, hidden.shape[-1])
    tokens = hidden.shape[0]
    labels, inference, advantage, mask, temperatures, teacher, weights = _flat(
        labels,
        inference_logprobs,
        advantages,
        loss_mask,
        temperature,
        teacher_logprobs,
        loss_weights,
    )
    promised = tokens if num_active is None else num_active
    fault = ops.find_faults(
        labels, mask, temperatures, weight.shape[0], promised, cu_seqlens, normalizer
    )
    rows = _ActiveRows.of(mask, num_active)
    chunks = list(_chunks(len(rows), chunk_size))
    head = _Head(weight, _longest(chunks))
    fill = _fill(fault, head.compute)
    logprobs = rows.new_output(like=fill, fill=fill)
    entropy = rows.new_output(like=fill, fill=fill)
    gradients = _Gradients(
        head, hidden, rows, of_hidden=hidden_gradient, of_weight=weight_gradient, fill=fill
    )
    for chunk in chunks:
        take = functools.partial(rows.take, chunk=chunk)
        states = take(hidden)
        logits = head.logits(states)
        gradient = gradients.wanted_over(logits)
        logprobs_of_chunk, entropy_of_chunk = ops.ipo_loss_rows(
            logits,
            take(labels),
            take(inference),
            take(advantage),
            rows.take_active(chunk),
            take(temperatures),
            softcap,
            take(teacher),
            take(weights),
            normalizer,
            *settings,
            fault,
            gradient,
        )
        rows.put(logprobs, chunk, logprobs_of_chunk)
        rows.put(entropy, chunk, entropy_of_chunk)
        gradients.add(chunk, gradient, states)

    logprobs, entropy = logprobs[:tokens], entropy[:tokens]
    loss, *metrics = ops.ipo_loss_of_rows(
        logprobs,
        entropy,
        inference,
        advantage,
        mask,
        teacher,
        weights,
        cu_seqlens,
        normalizer,
        *settings,
        fault,
    )
    grad_hidden, grad_weight = gradients.finished()
    return loss, logprobs.view(shape), entropy.view(shape), *metrics, grad_hidden, grad_weight


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
    hidden = hidden.reshape(-1, hidden.shape[-1])
    labels, temperatures = _flat(labels, temperature)
    tokens = labels.numel()
    fault = ops.find_faults(labels, None, temperatures, weight.shape[0], tokens, None, None)
    rows = _ActiveRows.of(labels != _IGNORED_LABEL, None)
    chunks = list(_chunks(len(rows), chunk_size))
    head = _Head(weight, _longest(chunks))
    fill = _fill(fault, head.compute)
    logprobs = rows.new_output(like=fill, fill=fill)
    entropy = rows.new_output(like=fill, fill=fill)
    softmax = rows.new_output(2, like=fill, fill=fill)
    for chunk in chunks:
        logits = head.logits(rows.take(hidden, chunk))
        found = ops.token_logprobs_rows(
            logits, rows.take(labels, chunk), rows.take(temperatures, chunk), softcap, fault
        )
        rows.put(logprobs, chunk, found[0])
        rows.put(entropy, chunk, found[1])
        rows.put(softmax, chunk, found[2].t())
    return logprobs[:tokens].view(shape), entropy[:tokens].view(shape), softmax[:tokens]


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
    hidden = hidden.reshape(-1, hidden.shape[-1])
    labels, temperatures, entropy, grad_logprobs, grad_entropy = _flat(
        labels, temperature, entropy, grad_logprobs, grad_entropy
    )
    fault = ops.find_faults(labels, None, temperatures, weight.shape[0], labels.numel(), None, None)
    flows = (labels != _IGNORED_LABEL) & ((grad_logprobs != 0) | (grad_entropy != 0))
    rows = _ActiveRows.of(flows, None)
    chunks = list(_chunks(len(rows), chunk_size))
    head = _Head(weight, _longest(chunks))
    gradients = _Gradients(
        head,
        hidden,
        rows,
        of_hidden=hidden_gradient,
        of_weight=weight_gradient,
        fill=_fill(fault, head.compute),
    )
    for chunk in chunks:
        take = functools.partial(rows.take, chunk=chunk)
        states = take(hidden)
        logits = head.logits(states)
        gradient = gradients.wanted_over(logits)
        ops.token_logprobs_rows_backward(
            logits,
            take(labels),
            take(temperatures),
            softcap,
            take(entropy),
            take(softmax).t(),
            take(grad_logprobs),
            take(grad_entropy),
            fault,
            gradient,
        )
        gradients.add(chunk, gradient, states)
    grad_hidden, grad_weight = gradients.finished()
    return grad_hidden, grad_weight.to(weight.dtype)


def _flat(*tensors: torch.Tensor | None) -> list[Any]:
    """[...] -> [tokens]; scalars and None as they are."""
    return [t if t is None or t.dim() == 0 else t.reshape(-1) for t in tensors]


def _longest(chunks: list[slice]) -> int:
    return max((chunk.stop - chunk.start for chunk in chunks), default=0)


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
    for name, (backward, setup_context) in _AUTOGRAD.items():
        torch.library.register_autograd(
            f"{namespace}::{name}", backward, setup_context=setup_context, lib=library
        )
        torch.library.register_vmap(f"{namespace}::{name}", _operators.refuse_vmap, lib=library)


def _kernel(function: Any, namespace: str) -> Any:
    """``function`` over the C++ operators of ``namespace``, in the precision that it asks for."""

    @functools.wraps(function)
    def kernel(hidden: torch.Tensor, *inputs: Any) -> Any:
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return function(getattr(torch.ops, namespace), hidden, *inputs)

    return kernel


def _ipo_loss_from_hidden_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
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
    *settings_and_more: Any,
) -> tuple[torch.Tensor, ...]:
    *_, teacher_tau, _chunk_size, _num_active, hidden_gradient, weight_gradient = settings_and_more
    _checks.check_hidden_loss(
        hidden,
        weight,
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
    per_token = _checks.widened(hidden.dtype)
    compute = torch.promote_types(per_token, inference_logprobs.dtype)
    return (
        hidden.new_empty((), dtype=compute),
        hidden.new_empty(labels.shape, dtype=per_token),
        hidden.new_empty(labels.shape, dtype=per_token),
        *_operators.metrics_fake(hidden, cu_seqlens, compute),
        *_gradients_fake(hidden, weight, labels, hidden_gradient, weight_gradient, per_token),
    )


def _gradients_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    of_hidden: bool,
    of_weight: bool,
    weight_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    width = hidden.shape[-1]
    return (
        hidden.new_empty((labels.numel() if of_hidden else 0, width)),
        weight.new_empty((weight.shape[0] if of_weight else 0, width), dtype=weight_dtype),
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
    of_hidden, of_weight = inputs[-2:]
    return _gradients_fake(hidden, weight, labels, of_hidden, of_weight, weight.dtype)


# -------------------------------------------------------------------------------------------------
# Autograd


def _loss_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden, weight, normalizer = inputs[0], inputs[1], inputs[11]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-2:], normalizer)
    ctx.hidden_shape, ctx.dtype, ctx.num_inputs = hidden.shape, weight.dtype, len(inputs)
    ctx.has_gradients = inputs[-2:]
    ctx.set_materialize_grads(False)


def _loss_backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    """For those who call the operator: leaves the gradients, two of its outputs, as they are."""
    *gradients, normalizer = ctx.saved_tensors
    scaled = _scaled(ctx, gradients, grad_loss, normalizer, _scale_copy)
    return (*scaled, *(None,) * (ctx.num_inputs - 2))


def _scale_copy(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> Any:
    scale: Any = _operators.ScaleGradient.apply
    return scale(gradient, factor, gradient.new_empty((), dtype=dtype))


def _scaled(
    ctx: Any,
    gradients: Any,
    grad_loss: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    scale: Callable[[torch.Tensor, torch.Tensor, torch.dtype], Any],
) -> tuple[Any, Any]:
    """Derivatives by hidden states and weight; None for one that was not asked for."""
    if grad_loss is None:
        return None, None
    factor = _operators.gradient_factor(ctx.dtype, grad_loss, normalizer)
    of_hidden, of_weight = (
        scale(gradient, factor, ctx.dtype) if wanted else None
        for gradient, wanted in zip(gradients, ctx.has_gradients, strict=True)
    )
    return None if of_hidden is None else of_hidden.view(ctx.hidden_shape), of_weight


class IPOLossFromHiddenFunction(torch.autograd.Function):
    """``ipo_loss_from_hidden``, whose gradients are scaled where they lie: one backward only."""

    @staticmethod
    def forward(anchor: torch.Tensor | None, *inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(_operators.library().ipo_loss_from_hidden(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        anchor, *operands = inputs
        _loss_setup_context(ctx, tuple(operands), output)
        ctx.save_for_backward(*output[-2:], operands[11], anchor)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_loss is not None:
            _operators.hand_over_once(ctx)
        *gradients, normalizer, anchor = ctx.saved_tensors
        run: Any = _operators.ScaleOnce.apply
        scaled = _scaled(
            ctx,
            gradients,
            grad_loss,
            normalizer,
            lambda gradient, factor, dtype: run(gradient, factor, dtype, anchor),
        )
        return (None, *scaled, *(None,) * (ctx.num_inputs - 2))

    vmap = staticmethod(_operators.refuse_vmap)


class IPOLossFromHiddenUnderForwardMode(_operators.RefusesTangents, IPOLossFromHiddenFunction):
    pass


def run_ipo_loss_from_hidden(*inputs: Any) -> tuple[torch.Tensor, ...]:
    """Loss, log-probabilities, entropy, means, sums, extremes; differentiates as the inputs ask."""
    hidden, weight = inputs[:2]
    function: Any
    if forward_ad._current_level >= 0:
        function = IPOLossFromHiddenUnderForwardMode
    elif not any(inputs[-2:]):
        return tuple(_operators.library().ipo_loss_from_hidden(*inputs))[:6]
    else:
        function = IPOLossFromHiddenFunction
    return tuple(function.apply(_operators.anchor(hidden, weight), *inputs))[:6]


class LinearTokenLogprobsGradient(torch.autograd.Function):
    """The backward pass of ``linear_token_logprobs``, refusing to be differentiated in turn."""

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


def _logprobs_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden, weight, labels, temperature, ctx.softcap, ctx.chunk_size = inputs
    _, entropy, softmax = output
    ctx.mark_non_differentiable(softmax)
    ctx.save_for_backward(hidden, weight, labels, temperature, entropy, softmax)
    ctx.set_materialize_grads(False)  # not for the softmax


def _logprobs_backward(
    ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    others = (None,) * 4
    if grad_logprobs is None and grad_entropy is None:
        return (None, None, *others)
    hidden, weight, labels, temperature, entropy, softmax = ctx.saved_tensors
    nothing = torch.zeros_like(entropy)
    wants_hidden, wants_weight = ctx.needs_input_grad[:2]
    run: Any = LinearTokenLogprobsGradient.apply
    of_hidden, of_weight = run(
        hidden,
        weight,
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
    return (
        of_hidden.view(hidden.shape) if wants_hidden else None,
        of_weight if wants_weight else None,
        *others,
    )


class LinearTokenLogprobsFunction(torch.autograd.Function):
    """``linear_token_logprobs`` as a function that torch.func understands."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(_operators.library().linear_token_logprobs(*inputs))

    setup_context = staticmethod(_logprobs_setup_context)
    backward = staticmethod(_logprobs_backward)
    vmap = staticmethod(_operators.refuse_vmap)


class LinearTokenLogprobsUnderForwardMode(_operators.RefusesTangents, LinearTokenLogprobsFunction):
    pass


def run_linear_token_logprobs(*inputs: Any) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropy and what the backward pass needs."""
    hidden, weight = inputs[:2]
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _operators.run(
        _operators.library().linear_token_logprobs,
        LinearTokenLogprobsFunction,
        LinearTokenLogprobsUnderForwardMode,
        inputs,
        with_gradient,
    )


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

register("ipo_ext")
