"""Calls that break one rule, and the error that the documentation promises for it."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fuzzing.calls import FUNCTIONS, Call, Fault
from tests.support.logprobs import HOSTILE_CU_SEQLENS

SHARE = 0.06  # of all calls

_PER_TOKEN = ("inference_logprobs", "advantages", "loss_mask", "teacher_logprobs", "loss_weights")
_CONSTANT = ("inference_logprobs", "advantages", "teacher_logprobs", "loss_weights")


class _Breaker(NamedTuple):
    """A rule, and how to break it: the argument to change, and what it becomes."""

    name: str
    arguments: tuple[str, ...]  # of which the call must give one, unless the change needs none
    change: Callable[[Call, str, random.Random], Any]  # None: this call cannot break it
    error: type[Exception]
    is_given: bool = True
    of_data: bool = False


def break_a_rule(call: Call, choose: random.Random) -> Call:
    """The call with one argument that must be refused; itself if nothing in it can be broken."""
    breakers = [*_BREAKERS]
    choose.shuffle(breakers)
    for breaker in breakers:
        names = [name for name in breaker.arguments if _takes(call, name)]
        names = [n for n in names if not breaker.is_given or n in call.arguments]
        if not names:
            continue
        name = choose.choice(names)
        value = breaker.change(call, name, choose)
        if value is None:
            continue
        fault = Fault(f"{name} {breaker.name}", name, breaker.error, breaker.of_data)
        broken = call.with_(**{name: None if value is _ABSENT else value})
        # What may not require grad is no leaf.
        leaves = () if name in call.leaves else call.leaves
        return dataclasses.replace(broken, leaves=leaves, fault=fault)
    return call


def _takes(call: Call, name: str) -> bool:
    operands = FUNCTIONS[call.function].operands
    if name in operands:
        return True
    of_loss = ("teacher_logprobs", "loss_weights", "cu_seqlens", "normalizer", "config")
    if name in of_loss:
        return call.is_loss
    if name == "num_active":
        return call.function == "ipo_loss_from_hidden"
    return "hidden" in operands if name == "chunk_size" else "labels" in operands


# -------------------------------------------------------------------------------------------------
# The changes


def _set(*values: Any) -> Callable[..., Any]:
    return lambda call, name, choose: choose.choice(values)


def _of_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda call, name, choose: change(call.arguments[name])


def _another_shape(call: Call, name: str, choose: random.Random) -> torch.Tensor:
    tensor = call.arguments[name]
    longer = torch.cat([tensor.reshape(-1), tensor.new_zeros(1)])
    return choose.choice((longer, tensor[None], tensor[..., None]))


def _requiring_grad(call: Call, name: str, choose: random.Random) -> torch.Tensor | None:
    tensor = call.arguments[name]
    is_floating = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    return tensor.detach().clone().requires_grad_() if is_floating else None


def _active(call: Call) -> torch.Tensor:
    mask = call.arguments.get("loss_mask")
    return call.arguments["labels"] != -100 if mask is None else mask


def _in_an_active_place(*values: float) -> Callable[..., Any]:
    """One element of an active token, as a new tensor; None where no token is active."""

    def change(call: Call, name: str, choose: random.Random) -> torch.Tensor | None:
        places = _active(call).nonzero().tolist()
        tensor = call.arguments[name]
        if not places or not isinstance(tensor, torch.Tensor):
            return None
        tensor = tensor.clone()
        tensor[tuple(choose.choice(places)) if tensor.dim() else ()] = choose.choice(values)
        return tensor

    return change


def _label_out_of_range(call: Call, name: str, choose: random.Random) -> torch.Tensor | None:
    rows = "logits" if "logits" in call.arguments else "weight"
    columns = call.arguments[rows].shape[-1 if rows == "logits" else 0]
    values = (columns, columns + 1, -1, -99, -101, 2**31 - 1, -(2**31))
    return _in_an_active_place(*values)(call, name, choose)


def _no_partition(call: Call, name: str, choose: random.Random) -> torch.Tensor | None:
    tokens = call.arguments["loss_mask"].numel()
    values = [
        value if value != 100 else tokens
        for value in choose.choice(tuple(HOSTILE_CU_SEQLENS.values()))
    ]
    is_partition = values[0] == 0 and values[-1] == tokens and values == sorted(values)
    return None if is_partition else torch.tensor(values, dtype=torch.int32)


def _too_few_active(call: Call, name: str, choose: random.Random) -> int | None:
    active = int(call.arguments["loss_mask"].sum())
    return choose.randrange(active) if active else None


def _on_meta(call: Call, name: str, choose: random.Random) -> torch.Tensor | None:
    tensor = call.arguments[name]
    return tensor.to("meta") if isinstance(tensor, torch.Tensor) and tensor.dim() else None


def _as_list(call: Call, name: str, choose: random.Random) -> list[Any]:
    return list(call.arguments[name].reshape(-1)[:3].tolist())


def _taken_away(call: Call, name: str, choose: random.Random) -> Any:
    return _ABSENT if call.config.teacher_tau > 0 else None


_ABSENT = object()  # what an argument becomes that is left out
_FLOATS = (*_CONSTANT, "trainer_logprobs", "logits", "hidden", "weight", "bias")
_NUMBERS = ("normalizer", "temperature", "softcap", "logit_scale")
_BREAKERS = (
    _Breaker("of integers", _FLOATS, _of_tensor(torch.Tensor.long), TypeError),
    _Breaker("of complex numbers", _FLOATS, _of_tensor(lambda t: t.to(torch.complex64)), TypeError),
    _Breaker("of floats", ("loss_mask", "labels"), _of_tensor(torch.Tensor.float), TypeError),
    _Breaker("of bytes", ("loss_mask",), _of_tensor(torch.Tensor.byte), TypeError),
    _Breaker("a list", (*_FLOATS, "labels", "loss_mask"), _as_list, TypeError),
    _Breaker("another shape", (*_PER_TOKEN, "labels"), _another_shape, ValueError),
    _Breaker("elsewhere", (*_PER_TOKEN, "labels", "weight", "bias", "cu_seqlens"), _on_meta,
             ValueError),
    _Breaker("to differentiate", (*_CONSTANT, "normalizer", "temperature"), _requiring_grad,
             ValueError),
    _Breaker("no number", _NUMBERS, _set("1", True, [1.0], 1j), TypeError, False),
    _Breaker("not above 0", _NUMBERS, _set(0.0, -1.0, math.nan, math.inf, 0, 10**400),
             ValueError, False),
    _Breaker("a tensor that is no count", ("normalizer",),
             _set(*(torch.tensor(v) for v in (-1.0, math.nan, -3))), RuntimeError, False, True),
    _Breaker("not above 0 in a tensor", ("temperature",),
             _in_an_active_place(0.0, -1.0, math.nan, math.inf), RuntimeError, True, True),
    _Breaker("of one element", ("normalizer",), _set(torch.ones(1), torch.ones(1, 1)), ValueError,
             False),
    _Breaker("no partition", ("cu_seqlens",), _no_partition, RuntimeError, False, True),
    _Breaker("of long integers", ("cu_seqlens",), _of_tensor(torch.Tensor.long), TypeError),
    _Breaker("in two dimensions", ("cu_seqlens",), _of_tensor(lambda t: t[None]), ValueError),
    _Breaker("out of range", ("labels",), _label_out_of_range, IndexError, True, True),
    _Breaker("of another width", ("weight",), _of_tensor(lambda t: torch.cat([t, t], 1)),
             ValueError),
    _Breaker("one too many", ("bias",), _of_tensor(lambda t: torch.cat([t, t[:1]])), ValueError),
    _Breaker("of another dtype", ("weight", "bias"),
             _of_tensor(lambda t: t.half() if t.dtype != torch.float16 else t.float()),
             TypeError),
    _Breaker("no count", ("chunk_size",), _set(0, -1, -(2**62), 2**63), ValueError, False),
    _Breaker("below 0, or too large", ("num_active",), _set(-1, -(2**62), 2**63, 10**30),
             ValueError, False),
    _Breaker("below the truth", ("num_active",), _too_few_active, RuntimeError, False, True),
    _Breaker("missing", ("teacher_logprobs",), _taken_away, ValueError),
    _Breaker("no integer", ("chunk_size", "num_active"), _set(1.0, "1", True, torch.tensor(1)),
             TypeError, False),
    _Breaker("no IPOConfig", ("config",), _set({}, 0.2, "ratio"), TypeError, False),
)  # fmt: skip
