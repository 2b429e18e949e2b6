"""Numbers that change from call to call of a compiled function: 0-dim tensors in their place.

To torch's compilers a number that an operator takes is a constant, so each new value of a setting
would compile anew, up to the limit. Where a compiler does not know a number, a twin of the operator
is called, which takes a tensor on the CPU for each number and reads it as it runs. Nothing else
calls a twin: eager calls, and compiled ones whose numbers stay as they are, pass plain numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from ipo_ext._numbers import log_bound
from ipo_ext._ops import library
from ipo_ext._ops.arguments import OPERATORS, by_name, schema_fields
from ipo_ext._ops.torch_internals import below_autograd, compiler_knows, schema_of
from ipo_ext.config import IPOConfig, LossSettings

_SUFFIX = "_with_number_tensors"

# Operator to the places of its numbers, for those that a compiled function may call.
NUMBERS = {
    name: tuple(
        place for place, (_, kind) in enumerate(schema_fields(OPERATORS[name])) if kind == "float"
    )
    for name in (
        "ipo_loss",
        "component_loss",
        "score_centering",
        "loss_and_metrics",
        "ipo_loss_from_logits",
        "ipo_loss_from_logits_",
        "token_logprobs",
        "token_logprobs_backward",
        "ipo_loss_from_hidden",
        "linear_token_logprobs",
        "linear_token_logprobs_backward",
        "sequence_totals",
        "sequence_totals_from_logits",
        "sequence_totals_from_hidden",
        "ipo_loss_from_logits_sharded",
        "token_logprobs_sharded",
        "token_logprobs_sharded_backward",
        "ipo_loss_from_hidden_sharded",
        "linear_token_logprobs_sharded",
        "linear_token_logprobs_sharded_backward",
    )
}


def twin(name: str) -> str:
    """The name of the operator that takes a tensor for each number of ``name``."""
    return name + _SUFFIX


# -------------------------------------------------------------------------------------------------
# Calls


def as_operands(name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values, each number a tensor if a compiler does not know all of them."""
    if not torch.compiler.is_compiling():
        return values
    places = NUMBERS[name]
    if all(_is_known(values[place]) for place in places):
        return values
    return tuple(
        _as_tensor(value) if place in places else value for place, value in enumerate(values)
    )


def _is_known(number: Any) -> bool:
    """A logarithm of a changing number is a tensor already."""
    return not isinstance(number, torch.Tensor) and compiler_knows(number)


def _as_tensor(number: Any) -> torch.Tensor:
    """A product, which compilers know to make of a number that changes."""
    if isinstance(number, torch.Tensor):
        return number
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return one * cast(float, number)


def operator(name: str, values: tuple[Any, ...]) -> Any:
    """What to call with ``values``, which ``as_operands`` has seen: the operator or its twin."""
    takes_tensors = torch.compiler.is_compiling() and isinstance(
        values[NUMBERS[name][0]], torch.Tensor
    )
    return getattr(library.operators(), twin(name) if takes_tensors else name)


# -------------------------------------------------------------------------------------------------
# Twins


def twin_schema(namespace: str, name: str) -> str:
    """Name and arguments: those of the operator, ``Tensor`` for ``float``."""
    _, arguments = schema_of(namespace, name).split("(", 1)
    return f"{twin(name)}({arguments}".replace("float ", "Tensor ")


def twin_kernel(namespace: str, name: str) -> Callable[..., Any]:
    """Reads the numbers, which are on the CPU, and calls the operator."""
    run = getattr(getattr(torch.ops, namespace), name).default

    def kernel(*values: Any) -> Any:
        with torch.no_grad(), below_autograd():
            return run(*_with_numbers(name, values, torch.Tensor.item))

    return kernel


def twin_fake(name: str, fake: Callable[[Any], Any]) -> Callable[..., Any]:
    """The operator's, of numbers that no shape depends on."""
    run = by_name(name, fake)
    return lambda *values: run(*_with_numbers(name, values, lambda _: 0.0))


# -------------------------------------------------------------------------------------------------
# Logarithms of bounds, of a config made within a graph: no compiler takes them as Python does

LOG_BOUND = "log_bound(Tensor ratio, bool float64) -> Tensor"


def settings_of(config: IPOConfig, dtype: torch.dtype) -> LossSettings:
    """The config's, in which a bound that changes within a graph is a tensor."""
    return config.settings(dtype, _log_bound)


def _log_bound(ratio: float, dtype: torch.dtype) -> Any:
    if compiler_knows(ratio):
        return log_bound(ratio, dtype)
    return library.operators().log_bound(_as_tensor(ratio), dtype == torch.float64)


def log_bound_kernel(ratio: torch.Tensor, float64: bool) -> torch.Tensor:
    dtype = torch.float64 if float64 else torch.float32
    return torch.full_like(ratio, log_bound(ratio.item(), dtype))


def log_bound_fake(ratio: torch.Tensor, float64: bool) -> torch.Tensor:
    return torch.empty_like(ratio)


def _with_numbers(
    name: str, values: tuple[Any, ...], read: Callable[[torch.Tensor], Any]
) -> list[Any]:
    numbers = NUMBERS[name]
    return [read(value) if place in numbers else value for place, value in enumerate(values)]
