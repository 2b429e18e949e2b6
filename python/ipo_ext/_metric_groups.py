"""Groups of sequences or of tokens over which metrics are wanted besides: checked, and made.

Of sequences they are made of the segments' own sums. Tokens of a group lie anywhere, so they are
put in order, group by group, and measured once more, as packed segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

from ipo_ext._ops import library, torch_internals
from ipo_ext._ops.arguments import (
    LogitScaling,
    LossAndMetricsArguments,
    LossInputs,
    MetricRows,
    flatten,
)
from ipo_ext._ops.changing_numbers import as_operands, operator
from ipo_ext._ops.checks import Like, check_device, check_tensor
from ipo_ext._ops.errors import with_torch_errors
from ipo_ext._optional_tensors import OptionalTensors
from ipo_ext._shared_sequences import poisoned
from ipo_ext.config import IPOConfig, LossSettings

MOST_GROUPS = 1024


class MetricGroups(NamedTuple):
    ids: torch.Tensor  # int32, [segments], [...] of rows, or [...] of tokens
    num_groups: int
    of_tokens: bool


class Policy(NamedTuple):
    """What a call was given of the policy, or has made of it; the last three if from logits."""

    logprobs: torch.Tensor  # [...]
    entropy: torch.Tensor | None = None  # [...]
    scaling: LogitScaling | None = None
    labels: torch.Tensor | None = None  # [...]
    columns: int = 0


# -------------------------------------------------------------------------------------------------
# What is given


def metric_groups(
    tensors: OptionalTensors, loss_mask: torch.Tensor, config: IPOConfig
) -> MetricGroups | None:
    """The groups that are asked for; ``cu_seqlens`` and ``loss_mask`` are checked."""
    ids, count = tensors.get("groups"), tensors.get("num_groups")
    if ids is None:
        if count is not None:
            raise ValueError(
                "groups: expected a tensor with num_groups, got None; it says in which group each "
                "sequence or each token is"
            )
        return None
    check_tensor("groups", ids, (torch.int32,))
    check_device("groups", ids, Like("loss_mask", loss_mask))
    _check_count(count)
    of_tokens = _are_of_tokens(ids, loss_mask, tensors.get("cu_seqlens"))
    if of_tokens:
        _refuse_of_tokens(config)
    return MetricGroups(ids, cast(int, count), of_tokens)


def _check_count(count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"num_groups: expected an int with groups, got {type(count).__name__}")
    if not 1 <= count <= MOST_GROUPS:
        raise ValueError(f"num_groups: expected a number from 1 to {MOST_GROUPS}, got {count!r}")


def _are_of_tokens(
    ids: torch.Tensor, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> bool:
    """Which their shape says: else each is that of a segment, or of a row of ``[..., T]``."""
    tokens = list(loss_mask.shape)
    sequences, each = tokens[:-1], "row of tokens"
    if cu_seqlens is not None:
        sequences, each = [cu_seqlens.shape[0] - 1], "segment of cu_seqlens"
    shape = list(ids.shape)
    has_sequences = cu_seqlens is not None or len(tokens) > 1
    if has_sequences and shape == sequences:
        if shape == tokens and shape != [0]:
            raise ValueError(
                f"groups: expected a shape that says what each is the group of, got {shape}, one "
                "for each segment of cu_seqlens and one for each token too; give every tensor of "
                "tokens a dimension more, [1, tokens], and ids of tokens likewise"
            )
        return False
    if shape == tokens:
        return True
    of_sequences = f"{sequences}, one for each {each}, or " if has_sequences else ""
    raise ValueError(
        f"groups: expected shape {of_sequences}{tokens}, one for each token, got {shape}"
    )


def _refuse_of_tokens(config: IPOConfig) -> None:
    for is_set, what in (
        (config.judges_sequences, "judges whole sequences, which groups of tokens would part"),
        (config.score_centering, "has score centering, whose terms are summed by sequence"),
    ):
        if is_set:
            raise ValueError(
                f"groups: expected one for each sequence, because config {what}; got one for each "
                "token; leave them out, or call once more without a gradient under another config"
            )


def poisoned_by_groups(inputs: LossInputs, groups: MetricGroups) -> LossInputs:
    """On a GPU an id beyond the groups makes loss and gradients NaN; ``valid_groups`` raises on the
    CPU."""
    if _is_on_cpu(groups.ids):
        return inputs
    return poisoned(inputs, _is_wrong(_ids_read(groups, inputs), groups.num_groups))


def valid_groups(groups: MetricGroups, inputs: LossInputs) -> MetricGroups:
    """What is computed with: ids within the groups. An id beyond them raises on the CPU: behind
    the loss, since ranks that share sequences exchange before it, and wait for each other."""
    ids, count = _ids_read(groups, inputs), groups.num_groups
    if _is_on_cpu(ids):
        is_wrong = _is_wrong(ids, count)
        if torch_internals.is_eager():
            _raise_for_first(ids, is_wrong, count)
        else:
            words = "groups: expected ids from 0 to num_groups - 1, got others"
            torch_internals.assert_on_cpu(~is_wrong.any(), words)
    return groups._replace(ids=ids.clamp(0, count - 1))


def _ids_read(groups: MetricGroups, inputs: LossInputs) -> torch.Tensor:
    """None of tokens that do not train."""
    return torch.where(inputs.loss_mask, groups.ids, 0) if groups.of_tokens else groups.ids


def _is_wrong(ids: torch.Tensor, count: int) -> torch.Tensor:
    return (ids < 0) | (ids >= count)


def _is_on_cpu(ids: torch.Tensor) -> bool:
    return ids.device.type == "cpu"


def _raise_for_first(ids: torch.Tensor, is_wrong: torch.Tensor, count: int) -> None:
    if is_wrong.any():
        place = is_wrong.nonzero()[0].tolist()
        raise IndexError(
            f"groups: expected ids in [0, {count}), num_groups, got {int(ids[tuple(place)])} at "
            f"index {place}"
        )


# -------------------------------------------------------------------------------------------------
# Groups of tokens


def in_order(
    groups: MetricGroups, inputs: LossInputs, policy: Policy
) -> tuple[LossInputs, Policy, torch.Tensor]:
    """Tokens group by group, each group a segment; and their order.

    Within a group they keep theirs, so sums are added in the same order in every run.
    """
    ids, order = torch.sort(groups.ids.flatten(), stable=True)
    firsts = torch.arange(groups.num_groups + 1, dtype=torch.int32, device=ids.device)
    ends = torch.searchsorted(ids, firsts, out_int32=True)

    def ordered(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach().flatten().index_select(0, order)

    inputs = inputs.map_tokens(ordered)
    inputs = inputs._replace(cu_seqlens=ends, normalizer=None, sequence_totals=None)
    logprobs = cast(torch.Tensor, ordered(policy.logprobs))
    entropy = ordered(policy.entropy)
    return inputs, policy._replace(logprobs=logprobs, entropy=entropy), order


def metrics_of_tokens(
    inputs: LossInputs,
    settings: LossSettings,
    policy: Policy,
    replayed: torch.Tensor | None,
) -> MetricRows:
    """Of tokens in order, by the operator that makes them of log-probabilities."""
    name = "loss_and_metrics"
    no_fault = torch.zeros(1, dtype=torch.int32, device=policy.logprobs.device)
    arguments = LossAndMetricsArguments(
        policy.logprobs, policy.entropy, replayed, inputs, settings, no_fault, False
    )
    values = as_operands(name, flatten(arguments))
    _, _, *rows = with_torch_errors(operator(name, values), *values)
    return MetricRows(*rows)


def replayed_of(policy: Policy, inputs: LossInputs) -> torch.Tensor | None:
    """Which tokens replay their ids, ``[tokens]``; the operators that know do not say."""
    if policy.scaling is None or policy.scaling.sampling_mask is None or policy.labels is None:
        return None
    _, replayed = library.operators().find_faults(
        policy.labels,
        None,
        None,
        policy.scaling.sampling_mask,
        inputs.loss_mask,
        None,
        None,
        policy.columns,
        policy.labels.numel(),
    )
    return cast(torch.Tensor, replayed)
