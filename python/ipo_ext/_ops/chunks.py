"""The rows of the loss from hidden states, a chunk at a time, and the matrix products made of them.

Nothing here waits for a device unless it must count, and nothing as large as all logits exists.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from ipo_ext._ops import checks, torch_internals
from ipo_ext._ops.arguments import NeedsGrad

IGNORED_LABEL = -100  # of a row that takes no part in log-probabilities
NO_ID = -1  # in the place of an id of a token that has fewer

# Bytes of a chunk's logits: enough rows to keep the matrix products at full speed, which on a GPU
# takes thousands and on a CPU hundreds.
_LOGITS_BYTES = {"cuda": 1_250_000_000, "cpu": 48 * 2**20}
_ROWS_MULTIPLE = 128
_COLUMNS_MULTIPLE = 64  # what a GPU's matrix products want a row of logits to be a multiple of


# -------------------------------------------------------------------------------------------------
# Which rows, and in what chunks


def default_chunk_size(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """The largest multiple of 128 rows whose logits fit the budget, at least 128."""
    budget = _LOGITS_BYTES["cuda" if device.type == "cuda" else "cpu"]
    row_bytes = vocabulary * checks.widened(dtype).itemsize
    return max(budget // row_bytes // _ROWS_MULTIPLE, 1) * _ROWS_MULTIPLE


def chunks_of(rows: int, chunk_size: int) -> list[slice]:
    """Cuts rows into chunks of about one size, none longer than ``chunk_size``."""
    if rows == 0:
        return []
    size = math.ceil(rows / math.ceil(rows / chunk_size))
    size = min(chunk_size, math.ceil(size / _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The tokens that a call works on: those that take part, and perhaps some that do not.

    Where the host does not know how many take part, the index is as long as was promised, and what
    is left of it points at a token that does not: its row is worked on as an inactive one.
    """

    active: torch.Tensor  # [tokens] bool
    index: torch.Tensor | None  # [rows] int64; None: every token, in order

    @classmethod
    def of(cls, active: torch.Tensor, num_active: int | None) -> Rows:
        tokens = active.numel()
        if num_active is None and not is_capturing(active):
            index = active.nonzero().squeeze(1)  # on CUDA, waits for the count
        elif num_active is None or num_active >= tokens:
            return cls(active, None)
        else:
            inactive = active.to(torch.int8).argmin()
            index = torch.nonzero_static(active, size=num_active, fill_value=-1).squeeze(1)
            index = torch.where(index < 0, inactive, index)
        return cls(active, None if len(index) == tokens else index)

    @property
    def tokens(self) -> int:
        return self.active.numel()

    def chunks(self, chunk_size: int) -> list[slice]:
        return chunks_of(self.tokens if self.index is None else len(self.index), chunk_size)

    def longest(self, chunks: list[slice]) -> int:
        """Rows of the longest chunk."""
        return max((chunk.stop - chunk.start for chunk in chunks), default=0)

    def _tokens_of(self, chunk: slice) -> slice | torch.Tensor:
        return chunk if self.index is None else self.index[chunk]

    def take(self, tensor: Any, chunk: slice) -> Any:
        """[tokens, ...] -> the chunk's [rows, ...]; a scalar or None as it is."""
        if tensor is None or tensor.dim() == 0:
            return tensor
        tokens = self._tokens_of(chunk)
        return tensor[tokens] if isinstance(tokens, slice) else tensor.index_select(0, tokens)

    def with_states(
        self, hidden: torch.Tensor, chunks: list[slice]
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Each chunk and its [rows, width] of hidden states."""
        for chunk in chunks:
            yield chunk, self._take_states(hidden, chunk)

    def _take_states(self, hidden: torch.Tensor, chunk: slice) -> torch.Tensor:
        """[..., width] -> the chunk's [rows, width], without a copy of all of ``hidden``."""
        shape = hidden.shape[:-1]
        if hidden.is_contiguous() or len(shape) < 2:
            flat = hidden.reshape(-1, hidden.shape[-1])
            return cast(torch.Tensor, self.take(flat, chunk))
        index = self.index
        if index is None:
            index = torch.arange(self.tokens, device=hidden.device)
        return hidden[torch.unravel_index(index[chunk], shape)]

    def new_output(self, shape: tuple[int, ...], fill: torch.Tensor) -> torch.Tensor:
        """Holds ``fill`` wherever ``put`` will put nothing."""
        output = fill.new_empty(shape)
        return output if self.index is None else output.copy_(fill)

    def put(self, output: torch.Tensor, chunk: slice, values: torch.Tensor) -> None:
        """The chunk's [rows, ...] -> their places in [tokens, ...]."""
        tokens = self._tokens_of(chunk)
        if isinstance(tokens, slice):
            output[tokens] = values
        else:
            output.index_copy_(0, tokens, values.to(output.dtype))

    @property
    def own_tokens(self) -> int:
        """Whose hidden states this rank has."""
        return self.tokens

    def put_gradient(
        self, output: torch.Tensor, chunk: slice, gradient: torch.Tensor
    ) -> Callable[[], None]:
        """The chunk's gradient by hidden states -> [own tokens, width], by the time that what it
        returns is called."""
        self.put(output, chunk, gradient)
        return _nothing


def _nothing() -> None:
    """Of what is already done."""


@dataclasses.dataclass(frozen=True)
class ReplicatedRows(Rows):
    """Rows that all ranks of a group have, each a part of their gradient."""

    group: str = ""

    @classmethod
    def of_all(cls, active: torch.Tensor, num_active: int | None, group: str) -> Rows:
        return cls(active, Rows.of(active, num_active).index, group)

    def put_gradient(
        self, output: torch.Tensor, chunk: slice, gradient: torch.Tensor
    ) -> Callable[[], None]:
        self.put(output, chunk, torch_internals.sum_of_ranks(gradient, self.group))
        return _nothing


@dataclasses.dataclass(frozen=True)
class SequenceParallelRows(Rows):
    """Rows of which each rank has the hidden states of as many: rank r the r-th run of them.

    A chunk is a slice of every rank's active rows, so that each gives as much to it: where one has
    fewer, tokens of its own that do not take part stand in. While a chunk is worked on the next one
    is gathered, and the gradient of the last one added up.
    """

    index: torch.Tensor  # [ranks, rows of one]
    group: str = ""
    rank: int = 0

    @classmethod
    def of_ranks(cls, active: torch.Tensor, num_active: int | None, group: str) -> Rows:
        rank, ranks = torch_internals.member_of(group)
        each = active.numel() // ranks
        of_ranks = active.view(ranks, each)
        if num_active is not None or is_capturing(active):
            rows = each if num_active is None else min(num_active, each)
        else:
            rows = max(active_of_ranks(active, ranks))
        # A stable sort: the active ones first, in their order, then those that stand in.
        own = of_ranks.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, :rows]
        begins = each * torch.arange(ranks, device=active.device)
        return cls(active, own + begins[:, None], group, rank)

    @property
    def own_tokens(self) -> int:
        return self.tokens // len(self.index)

    def chunks(self, chunk_size: int) -> list[slice]:
        """Of each rank's rows."""
        return chunks_of(self.index.shape[1], max(chunk_size // len(self.index), 1))

    def longest(self, chunks: list[slice]) -> int:
        return super().longest(chunks) * len(self.index)

    def _tokens_of(self, chunk: slice) -> torch.Tensor:
        return self.index[:, chunk].reshape(-1)

    def _own_of(self, chunk: slice) -> torch.Tensor:
        return self.index[self.rank, chunk] - self.rank * self.own_tokens

    def with_states(
        self, hidden: torch.Tensor, chunks: list[slice]
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        gathers = (self._gather(hidden, chunk) for chunk in chunks)
        ahead = list(itertools.islice(gathers, 1))
        try:
            for chunk in chunks:
                states = [torch_internals.waited(ahead.pop())]
                ahead += itertools.islice(gathers, 1)
                yield chunk, states.pop()  # which the caller alone keeps
        finally:  # a chunk at fault may be the last
            for states_ahead in ahead:
                torch_internals.waited(states_ahead)

    def _gather(self, hidden: torch.Tensor, chunk: slice) -> torch.Tensor:
        own = hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._own_of(chunk))
        return torch_internals.gathered_later(own, self.group, len(self.index))

    def put_gradient(
        self, output: torch.Tensor, chunk: slice, gradient: torch.Tensor
    ) -> Callable[[], None]:
        own = torch_internals.scattered_later(gradient, self.group, len(self.index))

        def put() -> None:
            values = torch_internals.waited(own).to(output.dtype)
            output.index_copy_(0, self._own_of(chunk), values)

        return put


def active_of_ranks(active: torch.Tensor, ranks: int) -> list[int]:
    """Active tokens of each rank's run; on CUDA, waits for the numbers."""
    return cast(list[int], active.reshape(ranks, active.numel() // ranks).sum(1).tolist())


def is_capturing(tensor: torch.Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    with torch.cuda.device(tensor.device):
        return torch.cuda.is_current_stream_capturing()


# -------------------------------------------------------------------------------------------------
# Matrix products


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
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


class Head:
    """The LM head at work on one chunk after the other, in one buffer."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> None:
        self.dtype = weight.dtype
        self.compute = checks.widened(weight.dtype)
        self.weight = _as_operand(weight, self.compute)
        self._bias = bias
        self._buffer = weight.new_empty((rows, _row_length(weight)), dtype=self.compute)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] in the compute dtype, gone with the next call."""
        logits = self._buffer[: states.shape[0], : self.weight.shape[0]]
        product(states, self.weight.t(), logits)
        if self._bias is not None:
            logits += self._bias
        return logits

    def gradient_over(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] in the weight's dtype, each row in the first bytes of its logits."""
        narrow = self._buffer.view(self.dtype)
        return narrow[: logits.shape[0], : logits.shape[1]]


def _as_operand(weight: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """The weight as products take it, converted or copied once and not for each chunk."""
    weight = weight if 1 in weight.stride() else weight.contiguous()
    return weight if weight.is_cuda else weight.to(compute)


def _row_length(weight: torch.Tensor) -> int:
    multiple = _COLUMNS_MULTIPLE if weight.is_cuda else 1
    return math.ceil(weight.shape[0] / multiple) * multiple


class Gradients:
    """By hidden states, weight and bias, as far as they are needed, a chunk at a time."""

    def __init__(
        self,
        ops: Any,
        head: Head,
        hidden: torch.Tensor,
        rows: Rows,
        fill: torch.Tensor,
        needs_grad: NeedsGrad,
    ) -> None:
        self._head, self._rows, self._fill = head, rows, fill
        self._needs_grad = needs_grad
        self._put_last: Callable[[], None] = _nothing  # of the chunks' gradients by hidden states
        vocabulary, width = head.weight.shape
        self._grad_hidden = (
            rows.new_output((rows.own_tokens, width), fill.to(checks.kept_dtype(hidden.dtype)))
            if needs_grad.needs_grad_hidden
            else hidden.new_empty((0, width), dtype=checks.kept_dtype(hidden.dtype))
        )
        is_half = head.dtype == torch.float16
        self._has_scales = is_half
        size = vocabulary if needs_grad.needs_grad_weight else 0
        self._grad_weight = _SumOfProducts(ops, fill, (size, width), is_half)
        size = vocabulary if needs_grad.needs_grad_bias else 0
        self._grad_bias = _SumOfProducts(ops, fill, (size, 1), is_half)

    def over(self, logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Where the gradient by the logits and its rows' scales go; None where none are needed."""
        if not any(self._needs_grad):
            return None, None
        # 1 where there are no columns, and nothing is stored.
        row_scales = logits.new_ones(len(logits)) if self._has_scales else None
        return self._head.gradient_over(logits), row_scales

    def add(
        self,
        chunk: slice,
        gradient: torch.Tensor | None,  # [rows, vocabulary], by the logits
        row_scales: torch.Tensor | None,  # [rows], over which an fp16 gradient is stored
        states: torch.Tensor,  # [rows, width]
        pays: torch.Tensor,  # [rows] bool; another row's gradient is 0, its state may be anything
    ) -> None:
        if gradient is None:
            return
        gradient = gradient.to(self._head.weight.dtype)
        if self._needs_grad.needs_grad_hidden:
            grad_states = self._fill.new_empty(states.shape)
            product(gradient, self._head.weight, grad_states)
            if row_scales is not None:
                grad_states *= row_scales[:, None]
            self._put_last()
            self._put_last = self._rows.put_gradient(self._grad_hidden, chunk, grad_states)
        pays = pays[:, None]
        if self._needs_grad.needs_grad_weight:
            # 0 * NaN would be NaN. A row that pays may be infinite too, where a softcap makes its
            # logits finite and their derivatives 0.
            states = torch.where(pays & states.isfinite(), states, 0)
            self._grad_weight.add(gradient, states, row_scales)
        if self._needs_grad.needs_grad_bias:
            # A bias is the weight of a state that is always 1.
            self._grad_bias.add(gradient, pays.to(states.dtype), row_scales)

    def finished(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[own tokens, width] in the dtype that it is kept in, [vocabulary, width] and [vocabulary]
        in the compute dtype; without a row where not needed."""
        self._put_last()
        grad_bias = self._grad_bias.finished().squeeze(1)
        return self._grad_hidden, self._grad_weight.finished(), grad_bias


class _SumOfProducts:
    """The sum of ``gradient.T @ states`` over chunks, in the compute dtype.

    In fp16, whose gradients have a scale for each row, the sum is kept over a power of two.
    """

    def __init__(
        self, ops: Any, fill: torch.Tensor, shape: tuple[int, int], has_scale: bool
    ) -> None:
        self._ops, self._fill = ops, fill  # the latter is the sum of no chunks
        self._sum = fill.new_empty(shape)
        self._scale = fill.new_full((), _LOWEST_SCALE) if has_scale else None
        self._is_first = True

    def add(
        self,
        gradient: torch.Tensor,  # [rows, vocabulary]
        states: torch.Tensor,  # [rows, width]
        row_scales: torch.Tensor | None,  # [rows], where the gradient is stored over them
    ) -> None:
        if row_scales is not None:
            states = self._over_scale(states, row_scales)
        product(gradient.t(), states, self._sum, add=not self._is_first)
        self._is_first = False

    def _over_scale(self, states: torch.Tensor, row_scales: torch.Tensor) -> torch.Tensor:
        """``states * row_scales`` in fp16, over the scale of the sum, raised where it must be.

        The scale leaves the largest of all rows so far just below 2^13, and those down to 2^-27 of
        it without a loss. No value is waited for; rows that need no higher scale cost nothing.
        """
        scale = cast(torch.Tensor, self._scale)
        wide = states.float() * row_scales[:, None]
        needed = _power_of_two_below(wide.abs().amax()) * 2.0**-12
        raised = torch.maximum(scale, needed.clamp(_LOWEST_SCALE, 1 / _LOWEST_SCALE))
        if not self._is_first:
            self._ops.scale_(self._sum, scale / raised)
        self._scale = raised
        return (wide / raised).to(states.dtype)

    def finished(self) -> torch.Tensor:
        if self._is_first:
            self._sum.copy_(self._fill)
        elif self._scale is not None:
            self._ops.scale_(self._sum, self._scale)
        return self._sum


_LOWEST_SCALE = 2.0**-120  # whose inverse float32 holds too


def _power_of_two_below(number: torch.Tensor) -> torch.Tensor:
    """Of a float32 >= 0, exactly: its exponent without the mantissa."""
    return (number.view(torch.int32) & 0x7F800000).view(torch.float32)
