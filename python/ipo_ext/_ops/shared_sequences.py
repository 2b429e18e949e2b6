"""What rules on sequences look at where ranks share sequences: one exchange before any gradient.

Each rank sums up its pieces, and all add the ranks' sums in the order of the ranks, so that a
verdict is the same everywhere. An operator holds all of it: compilers keep it, and a rank on which
it fails tells the others instead of leaving them waiting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from ipo_ext import _C
from ipo_ext._ops.arguments import (
    LossInputs,
    SequenceTotalsArguments,
    SequenceTotalsFromHiddenArguments,
    SequenceTotalsFromLogitsArguments,
    SequenceTotalsResults,
    SharedSequences,
    flatten,
)
from ipo_ext._ops.changing_numbers import as_operands, operator
from ipo_ext._ops.chunk_loop import logprobs_before_the_loss
from ipo_ext._ops.chunks import IGNORED_LABEL
from ipo_ext._ops.errors import with_torch_errors
from ipo_ext._ops.torch_internals import gathered

Arguments = (
    SequenceTotalsArguments | SequenceTotalsFromLogitsArguments | SequenceTotalsFromHiddenArguments
)
_OPERATOR_OF = {
    SequenceTotalsArguments: "sequence_totals",
    SequenceTotalsFromLogitsArguments: "sequence_totals_from_logits",
    SequenceTotalsFromHiddenArguments: "sequence_totals_from_hidden",
}


def with_totals(inputs: LossInputs, arguments: Arguments) -> LossInputs:
    """The inputs with what all ranks together have of each sequence: every rank must call it."""
    name = _OPERATOR_OF[type(arguments)]
    values = as_operands(name, flatten(arguments))
    totals = with_torch_errors(operator(name, values), *values)
    return inputs._replace(sequence_totals=totals)


# -------------------------------------------------------------------------------------------------
# Log-probabilities, of which the loss makes the same again


def _of_logprobs(ops: Any, arguments: SequenceTotalsArguments) -> torch.Tensor:
    return arguments.trainer_logprobs


def _of_logits(ops: Any, arguments: SequenceTotalsFromLogitsArguments) -> torch.Tensor:
    logits, labels, scaling, inputs, *_ = arguments
    fault, _ = ops.find_faults(
        labels,
        None,
        scaling.temperature,
        scaling.sampling_mask,
        inputs.loss_mask,
        inputs.cu_seqlens,
        inputs.normalizer,
        logits.shape[-1],
        labels.numel(),
    )
    labels = labels.masked_fill(~inputs.loss_mask, IGNORED_LABEL)
    logprobs, *_ = ops.chunk_logprobs(logits, labels, *scaling, None, fault)
    return cast(torch.Tensor, logprobs)


# -------------------------------------------------------------------------------------------------
# The exchange


def _totals(make_logprobs: Callable[[Any, Any], torch.Tensor], ops: Any, arguments: Any) -> Any:
    shared: SharedSequences = arguments.shared
    ids, num_sequences, group_name = shared
    statistics, failure = None, None
    try:
        logprobs = make_logprobs(ops, arguments)
        sums, extremes = ops.sequence_statistics(logprobs, *arguments.inputs, *arguments.settings)
        statistics = torch.cat(ops.fold_segments(sums, extremes, ids, num_sequences))
    except Exception as error:
        # On a GPU the others could not know of it without waiting: they run into their timeout.
        if ids.device.type != "cpu":
            raise
        failure = error
    if ids.device.type == "cpu":
        _agree(failure, num_sequences, group_name)
    totals = _added(gathered(cast(torch.Tensor, statistics), group_name))
    # No index leaves its tensor: an id that is none has made this rank's loss NaN.
    whole = totals[:, ids.clamp(0, max(num_sequences - 1, 0))]
    return torch.cat([whole, sums[_C.STATISTIC_SUMS - 2 :]])


def _added(statistics: torch.Tensor) -> torch.Tensor:
    """``[ranks, rows, sequences] -> [rows, sequences]``, in an order of additions that is fixed."""
    extremes = _C.STATISTIC_EXTREMES // 2
    sums, smallest, largest = statistics.split([_C.STATISTIC_SUMS, extremes, extremes], dim=1)
    added = functools.reduce(torch.add, sums.unbind(0))
    return torch.cat([added, smallest.amin(0), largest.amax(0)])


def _agree(failure: Exception | None, num_sequences: int, group_name: str) -> None:
    """Raises on all ranks or on none; tensors whose sizes differ would end the processes."""
    told = gathered(torch.tensor([failure is not None, num_sequences]), group_name)
    failed = [rank for rank, (has_failed, _) in enumerate(told.tolist()) if has_failed]
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(
            f"cp_group: expected a call without an error on every rank, got one on rank "
            f"{', '.join(map(str, failed))} of the group, which says why"
        )
    counts = told[:, 1].tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"num_sequences: expected the same on all ranks of cp_group, got {counts} in their "
            "order: a sequence must have the same id everywhere"
        )


# Operator to what it returns and its kernel, as in chunk_loop.
KERNELS: dict[str, tuple[type[Any], Callable[[Any, Any], Any]]] = {
    "sequence_totals": (SequenceTotalsResults, functools.partial(_totals, _of_logprobs)),
    "sequence_totals_from_logits": (SequenceTotalsResults, functools.partial(_totals, _of_logits)),
    "sequence_totals_from_hidden": (
        SequenceTotalsResults,
        functools.partial(_totals, logprobs_before_the_loss),
    ),
}
