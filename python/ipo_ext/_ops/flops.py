"""Floating point operations of the operators from hidden states, for torch's ``FlopCounterMode``.

A counter sees no product within an operator. Counted is what is multiplied: rows that take part,
not tokens, so that a utilisation made of it is the hardware's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ipo_ext._ops.arguments import (
    OPERATORS,
    HeadInputs,
    IPOLossFromHiddenArguments,
    LinearTokenLogprobsArguments,
    LinearTokenLogprobsBackwardArguments,
    NeedsGrad,
    SequenceTotalsFromHiddenArguments,
    schema_fields,
    unflatten,
)
from ipo_ext._ops.changing_numbers import twin
from ipo_ext._ops.chunks import IGNORED_LABEL, is_capturing
from ipo_ext._ops.torch_internals import is_fake


def _product(rows: int, head: HeadInputs) -> int:
    """Of ``rows`` hidden states and the weight, in either direction."""
    vocabulary, width = head.weight.shape
    return 2 * rows * vocabulary * width


def _count(active: torch.Tensor) -> int:
    """Of the true elements, which the host waits for, as the operator itself has done; all of them
    where there is nothing to look at, and where the operator does not look."""
    if active.is_meta or is_fake(active) or is_capturing(active):
        return active.numel()
    return int(active.sum())


def _rows(arguments: IPOLossFromHiddenArguments | SequenceTotalsFromHiddenArguments) -> int:
    mask, num_active = arguments.inputs.loss_mask, arguments.num_active
    return _count(mask) if num_active is None else min(num_active, mask.numel())


def _of_loss(arguments: IPOLossFromHiddenArguments) -> int:
    """Logits, and the gradients that were asked for; that of a bias is a sum.

    Where sequences are judged, or scores centered, logits are made twice. The second time and for
    the gradients all active rows are counted, an upper bound where ``num_active`` is None: dropped
    rows take no part.
    """
    rows = _rows(arguments)
    is_centered = arguments.inference_mask_logprobs is not None
    in_two_passes = arguments.settings.judges_sequences or is_centered
    again = in_two_passes and any(arguments.needs_grad)
    return (1 + again + _products(arguments.needs_grad)) * _product(rows, arguments.head)


def _of_totals(arguments: SequenceTotalsFromHiddenArguments) -> int:
    return _product(_rows(arguments), arguments.head)


def _of_logprobs(arguments: LinearTokenLogprobsArguments) -> int:
    head = arguments.head
    return _product(_count(head.labels != IGNORED_LABEL), head)


def _of_logprobs_backward(arguments: LinearTokenLogprobsBackwardArguments) -> int:
    """The logits once more, and the gradients, for rows into which a gradient flows."""
    head, backward = arguments.head, arguments.backward
    flows = (backward.grad_logprobs != 0) | (backward.grad_entropy != 0)
    if backward.grad_candidates is not None:
        flows = flows | (backward.grad_candidates != 0).any(-1)
    rows = _count((head.labels != IGNORED_LABEL) & flows) if any(arguments.needs_grad) else 0
    return (1 + _products(arguments.needs_grad)) * _product(rows, head)


def _products(needs_grad: NeedsGrad) -> int:
    return needs_grad.needs_grad_hidden + needs_grad.needs_grad_weight


_FORMULAS: dict[str, Callable[[Any], int]] = {
    "ipo_loss_from_hidden": _of_loss,
    "linear_token_logprobs": _of_logprobs,
    "linear_token_logprobs_backward": _of_logprobs_backward,
    "sequence_totals_from_hidden": _of_totals,
}


def register_formulas(namespace: str) -> None:
    """For the operators and their twins."""
    operators = getattr(torch.ops, namespace)
    for name, formula in _FORMULAS.items():
        targets = [getattr(operators, name), getattr(operators, twin(name))]
        register_flop_formula(targets, get_raw=True)(_by_name(name, formula))


def _by_name(name: str, formula: Callable[[Any], int]) -> Callable[..., int]:
    names = [field for field, _ in schema_fields(OPERATORS[name])]

    def count(*values: Any, out_val: Any, **named: Any) -> int:
        given = [*values, *(named[field] for field in names[len(values) :])]
        with torch.no_grad():
            return formula(unflatten(OPERATORS[name], given))

    return count
