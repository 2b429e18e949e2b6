"""The arguments of every operator, composed of the groups that several of them share.

A group is listed once here and once in C++ (csrc/ops/arguments.h, csrc/math/settings.h), the
settings in ``ipo_ext.config``; tests/pytorch/test_schemas.py compares both with ``torch.ops``. An
operator takes the fields one after the other, those of a group in its place: see ``flatten``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

import torch

from ipo_ext.config import LossSettings

SymInt = Annotated[int, "SymInt"]  # which torch.compile may leave without a value

# -------------------------------------------------------------------------------------------------
# Groups


class LogitScaling(NamedTuple):
    """What becomes of logits before the softmax, and what of it is wanted."""

    temperature: torch.Tensor | None  # [] or [...]; what they are divided by, default 1
    softcap: float  # 0 for none
    sampling_mask: torch.Tensor | None = None  # [..., ids] int32; the sampler's support
    with_entropy: bool = True  # else rows that replay their support are not read as a whole


class LossInputs(NamedTuple):
    """What every loss takes besides the policy. No gradient flows to any of it."""

    inference_logprobs: torch.Tensor  # [...]
    advantages: torch.Tensor  # [...]
    loss_mask: torch.Tensor  # [...] bool
    teacher_logprobs: torch.Tensor | None = None  # [...]
    loss_weights: torch.Tensor | None = None  # [...]
    cu_seqlens: torch.Tensor | None = None  # [segments + 1] int32
    normalizer: torch.Tensor | None = None  # []
    # [rows, segments] float64; what the rules on sequences look at, of pieces that ranks share
    sequence_totals: torch.Tensor | None = None

    def map_tokens(self, function: Callable[[Any], Any]) -> LossInputs:
        """With what ``function`` makes of every input that has a value for each token."""
        return self._replace(**{name: function(getattr(self, name)) for name in TOKEN_INPUTS})


# The inputs of which each token has a value.
TOKEN_INPUTS = tuple(
    name
    for name in LossInputs._fields
    if name not in ("cu_seqlens", "normalizer", "sequence_totals")
)


class SharedSequences(NamedTuple):
    """Whose pieces the segments of ``cu_seqlens`` are, and which ranks have the others."""

    sequence_ids: torch.Tensor  # [segments] int32
    num_sequences: SymInt
    group_name: str


class Components(NamedTuple):
    """What stands beside a loss: cross-entropy and distillation, on tokens of their own weights.

    Source: prime-rl's ``compute_component_loss``; docs/math.md, "Components".
    """

    ce_weights: torch.Tensor | None  # [...]; 0: takes no part
    ref_kl_weights: torch.Tensor | None  # [...]; likewise
    ref_logprobs: torch.Tensor | None  # [...]; needed with ref_kl_weights
    ce_scale: torch.Tensor | None  # [], what the sum of the terms is divided by; default 1
    ref_kl_scale: torch.Tensor | None  # []; likewise
    ref_kl_cap: float  # of the ratio; the largest number for none
    ref_kl_tau: float  # of the squared log-ratio


class HeadInputs(NamedTuple):
    """What logits are made of that never exist as a whole."""

    hidden: torch.Tensor  # [..., width]
    weight: torch.Tensor  # [vocabulary, width]
    bias: torch.Tensor | None  # [vocabulary]
    labels: torch.Tensor  # [...]
    scaling: LogitScaling

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What gradients flow to, in the order of ``NeedsGrad`` and of the results."""
        return self.hidden, self.weight, self.bias

    def detached(self, dtype: torch.dtype) -> HeadInputs:
        """Without a gradient, hidden states and weight in ``dtype``."""
        bias = None if self.bias is None else self.bias.detach()
        hidden, weight = self.hidden.detach().to(dtype), self.weight.detach().to(dtype)
        return self._replace(hidden=hidden, weight=weight, bias=bias)


class LogprobsBackward(NamedTuple):
    """What a backward pass of log-probabilities starts from."""

    entropy: torch.Tensor  # [...], as the forward pass has made it
    softmax_stats: torch.Tensor  # [2, rows], likewise: row maximum and sum of exponentials
    grad_logprobs: torch.Tensor  # [...]
    grad_entropy: torch.Tensor  # [...]
    grad_candidates: torch.Tensor | None = None  # [..., candidates]


class NeedsGrad(NamedTuple):
    """Which gradients a call makes."""

    needs_grad_hidden: bool
    needs_grad_weight: bool
    needs_grad_bias: bool


class Shard(NamedTuple):
    """The columns of one rank, of a vocabulary that the ranks of a process group share."""

    first_column: SymInt  # the token of column 0
    vocabulary: SymInt  # tokens of all ranks
    group: str  # the group's name; its ranks are given the same tokens
    problem: str  # what is wrong with this rank's columns, said where all ranks learn of it; or ""


class MetricRows(NamedTuple):
    """What every loss measures; the rows are named in ``_C``."""

    means: torch.Tensor  # [rows] or [rows, segments]
    sums: torch.Tensor
    extremes: torch.Tensor


# -------------------------------------------------------------------------------------------------
# Operators from log-probabilities and from logits, which are C++


class IPOLossArguments(NamedTuple):
    trainer_logprobs: torch.Tensor  # [...]
    inputs: LossInputs
    settings: LossSettings
    with_gradient: bool


class ComponentLossArguments(NamedTuple):
    trainer_logprobs: torch.Tensor  # [...]
    inputs: LossInputs
    settings: LossSettings
    components: Components
    with_gradient: bool


class ScoreCenteringArguments(NamedTuple):
    trainer_mask_logprobs: torch.Tensor  # [..., ids]
    trainer_logprobs: torch.Tensor  # [...]; a constant here
    inputs: LossInputs
    settings: LossSettings
    inference_mask_logprobs: torch.Tensor  # [..., ids]
    replayed: torch.Tensor | None  # [...] bool; which tokens have a term, None for all
    with_gradient: bool


class SequenceStatisticsArguments(NamedTuple):
    trainer_logprobs: torch.Tensor  # [...]
    inputs: LossInputs
    settings: LossSettings


class FoldSegmentsArguments(NamedTuple):
    sums: torch.Tensor  # [rows, segments]
    extremes: torch.Tensor  # [rows, segments]; the first half smallest values, then largest
    sequence_ids: torch.Tensor  # [segments] int32
    num_sequences: SymInt


class LogRatioHistogramArguments(NamedTuple):
    trainer_logprobs: torch.Tensor  # [...]
    inference_logprobs: torch.Tensor  # [...]
    loss_mask: torch.Tensor  # [...] bool
    cu_seqlens: torch.Tensor | None  # [segments + 1] int32


class MetricMeansArguments(NamedTuple):
    sums: torch.Tensor
    extremes: torch.Tensor
    float64: bool


class IPOLossFromLogitsArguments(NamedTuple):
    logits: torch.Tensor  # [..., vocabulary]
    labels: torch.Tensor  # [...]
    scaling: LogitScaling
    inputs: LossInputs
    settings: LossSettings
    inference_mask_logprobs: torch.Tensor | None  # [..., ids], of the sampling mask
    with_gradient: bool


class IPOLossFromLogitsInplaceArguments(NamedTuple):
    logits: torch.Tensor
    labels: torch.Tensor
    scaling: LogitScaling
    inputs: LossInputs
    settings: LossSettings
    inference_mask_logprobs: torch.Tensor | None


class TokenLogprobsArguments(NamedTuple):
    logits: torch.Tensor
    labels: torch.Tensor
    scaling: LogitScaling
    candidates: torch.Tensor | None  # [..., candidates] int32; ids whose own are wanted too


class TokenLogprobsBackwardArguments(NamedTuple):
    logits: torch.Tensor
    labels: torch.Tensor
    scaling: LogitScaling
    candidates: torch.Tensor | None
    backward: LogprobsBackward


class ChunkPacketsArguments(NamedTuple):
    logits: torch.Tensor  # [rows, columns], those of one rank
    labels: torch.Tensor  # [rows], tokens of the whole vocabulary
    scaling: LogitScaling
    fault: torch.Tensor  # [1] int32
    first_column: SymInt


class GatherPacketsArguments(NamedTuple):
    packets: torch.Tensor  # [ranks * rows, 4] float64
    labels: torch.Tensor  # [rows]
    temperature: torch.Tensor | None
    fault: torch.Tensor  # [1] int32, to which what is found is added
    float64: bool


class ChunkShardBackwardArguments(NamedTuple):
    logits: torch.Tensor
    labels: torch.Tensor
    scaling: LogitScaling
    entropy: torch.Tensor
    softmax_stats: torch.Tensor
    grad_logprobs: torch.Tensor
    grad_entropy: torch.Tensor
    fault: torch.Tensor
    first_column: SymInt
    gradient: torch.Tensor
    row_scales: torch.Tensor | None


class ScaleArguments(NamedTuple):
    gradient: torch.Tensor
    factor: torch.Tensor  # []


class ScaleRowsArguments(NamedTuple):
    gradient: torch.Tensor  # [..., vocabulary] float16
    factor: torch.Tensor  # []
    row_scales: torch.Tensor  # [rows] float32


class ScaleIntoArguments(NamedTuple):
    gradient: torch.Tensor
    factor: torch.Tensor  # []
    out: torch.Tensor


# -------------------------------------------------------------------------------------------------
# Operators from hidden states, which are Python, and their steps, which are C++


class IPOLossFromHiddenArguments(NamedTuple):
    head: HeadInputs
    inputs: LossInputs
    settings: LossSettings
    inference_mask_logprobs: torch.Tensor | None
    chunk_size: SymInt
    num_active: SymInt | None
    needs_grad: NeedsGrad


class IPOLossFromHiddenResults(NamedTuple):
    loss: torch.Tensor  # []
    logprobs: torch.Tensor  # [...]
    entropy: torch.Tensor  # [...]
    metrics: MetricRows
    # [tokens, width], float32 for float16; without a row where not needed
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor  # [vocabulary, width] in the compute dtype; likewise
    grad_bias: torch.Tensor  # [vocabulary]; likewise

    @property
    def gradients(self) -> tuple[torch.Tensor, ...]:
        return self.grad_hidden, self.grad_weight, self.grad_bias


class LinearTokenLogprobsArguments(NamedTuple):
    head: HeadInputs
    candidates: torch.Tensor | None
    chunk_size: SymInt


class LinearTokenLogprobsResults(NamedTuple):
    logprobs: torch.Tensor  # [...]
    entropy: torch.Tensor  # [...]
    softmax_stats: torch.Tensor  # [2, tokens]
    candidate_logprobs: torch.Tensor  # [..., candidates]; without an element where there are none


class LinearTokenLogprobsBackwardArguments(NamedTuple):
    head: HeadInputs
    candidates: torch.Tensor | None
    chunk_size: SymInt
    backward: LogprobsBackward
    needs_grad: NeedsGrad


class LinearTokenLogprobsBackwardResults(NamedTuple):
    grad_hidden: torch.Tensor  # as of the loss
    grad_weight: torch.Tensor
    grad_bias: torch.Tensor


class FindFaultsArguments(NamedTuple):
    labels: torch.Tensor  # [...]
    candidates: torch.Tensor | None
    temperature: torch.Tensor | None
    sampling_mask: torch.Tensor | None
    loss_mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    normalizer: torch.Tensor | None
    columns: SymInt
    max_active: SymInt


class ChunkLossArguments(NamedTuple):
    logits: torch.Tensor  # [rows, vocabulary]
    labels: torch.Tensor  # [rows]
    scaling: LogitScaling
    inputs: LossInputs
    settings: LossSettings
    fault: torch.Tensor  # [1], as find_faults has returned it
    gradient: torch.Tensor | None  # where it goes
    row_scales: torch.Tensor | None  # [rows]; where an fp16 gradient's go


class LossAndMetricsArguments(NamedTuple):
    logprobs: torch.Tensor  # [tokens]
    entropy: torch.Tensor | None  # [tokens]
    replayed: torch.Tensor | None  # [tokens] bool, as find_faults has returned it
    inputs: LossInputs
    settings: LossSettings
    fault: torch.Tensor
    with_gradient: bool


class ChunkLogprobsArguments(NamedTuple):
    logits: torch.Tensor
    labels: torch.Tensor
    scaling: LogitScaling
    candidates: torch.Tensor | None
    fault: torch.Tensor


class ChunkLogprobsBackwardArguments(NamedTuple):
    logits: torch.Tensor
    labels: torch.Tensor
    scaling: LogitScaling
    candidates: torch.Tensor | None
    backward: LogprobsBackward
    fault: torch.Tensor
    gradient: torch.Tensor
    row_scales: torch.Tensor | None


# -------------------------------------------------------------------------------------------------
# Operators that exchange what rules on sequences look at, which are Python


class SequenceTotalsArguments(NamedTuple):
    trainer_logprobs: torch.Tensor  # [...]
    inputs: LossInputs
    settings: LossSettings
    shared: SharedSequences


class SequenceTotalsFromLogitsArguments(NamedTuple):
    logits: torch.Tensor  # [..., vocabulary]
    labels: torch.Tensor  # [...]
    scaling: LogitScaling
    inputs: LossInputs
    settings: LossSettings
    shared: SharedSequences


class SequenceTotalsFromHiddenArguments(NamedTuple):
    head: HeadInputs
    inputs: LossInputs
    settings: LossSettings
    chunk_size: SymInt
    num_active: SymInt | None
    shared: SharedSequences


class SequenceTotalsResults(NamedTuple):
    sequence_totals: torch.Tensor  # as LossInputs has them


# -------------------------------------------------------------------------------------------------
# Vocabulary parallel: operators over one rank's columns, which exchange with other ranks; Python


class IPOLossFromLogitsShardedArguments(NamedTuple):
    logits: torch.Tensor  # [..., columns]
    labels: torch.Tensor  # [...], tokens of the whole vocabulary
    scaling: LogitScaling
    inputs: LossInputs
    settings: LossSettings
    with_gradient: bool
    shard: Shard


class IPOLossFromLogitsResults(NamedTuple):
    loss: torch.Tensor  # []
    gradient: torch.Tensor  # [..., columns]; without an element where not wanted
    logprobs: torch.Tensor  # [...]
    entropy: torch.Tensor  # [...]
    metrics: MetricRows
    row_scales: torch.Tensor  # [rows] of a float16 gradient; else without an element


class TokenLogprobsShardedArguments(NamedTuple):
    logits: torch.Tensor
    labels: torch.Tensor
    scaling: LogitScaling
    shard: Shard


class ShardedLogprobsResults(NamedTuple):
    logprobs: torch.Tensor  # [...]
    entropy: torch.Tensor  # [...]
    softmax_stats: torch.Tensor  # [2, tokens]
    fault: torch.Tensor  # [1] int32


class TokenLogprobsShardedBackwardArguments(NamedTuple):
    logits: torch.Tensor
    labels: torch.Tensor
    scaling: LogitScaling
    backward: LogprobsBackward
    fault: torch.Tensor  # as the forward pass has left it
    shard: Shard


class GradientResult(NamedTuple):
    gradient: torch.Tensor


class IPOLossFromHiddenShardedArguments(NamedTuple):
    head: HeadInputs  # of which weight and bias have the rows of this rank
    inputs: LossInputs
    settings: LossSettings
    chunk_size: SymInt
    num_active: SymInt | None
    needs_grad: NeedsGrad
    shard: Shard
    reduce_hidden_grad: bool  # else the gradient by hidden states is this rank's part of a sum
    sequence_parallel: bool  # else all ranks have the hidden states of all tokens


class LinearTokenLogprobsShardedArguments(NamedTuple):
    head: HeadInputs
    chunk_size: SymInt
    shard: Shard
    reduce_hidden_grad: bool
    sequence_parallel: bool


class LinearTokenLogprobsShardedBackwardArguments(NamedTuple):
    head: HeadInputs
    chunk_size: SymInt
    backward: LogprobsBackward
    needs_grad: NeedsGrad
    fault: torch.Tensor
    shard: Shard
    reduce_hidden_grad: bool
    sequence_parallel: bool


# What exchanges with other ranks: no compiler may drop a call of it, or change the order of two.
EXCHANGING = (
    "ipo_loss_from_logits_sharded",
    "token_logprobs_sharded",
    "ipo_loss_from_hidden_sharded",
    "linear_token_logprobs_sharded",
    "linear_token_logprobs_sharded_backward",
)

OPERATORS: dict[str, type[tuple[Any, ...]]] = {
    "ipo_loss": IPOLossArguments,
    "component_loss": ComponentLossArguments,
    "score_centering": ScoreCenteringArguments,
    "sequence_statistics": SequenceStatisticsArguments,
    "fold_segments": FoldSegmentsArguments,
    "log_ratio_histogram": LogRatioHistogramArguments,
    "metric_means": MetricMeansArguments,
    "ipo_loss_from_logits": IPOLossFromLogitsArguments,
    "ipo_loss_from_logits_": IPOLossFromLogitsInplaceArguments,
    "token_logprobs": TokenLogprobsArguments,
    "token_logprobs_backward": TokenLogprobsBackwardArguments,
    "find_faults": FindFaultsArguments,
    "chunk_logprobs_and_gradient": ChunkLossArguments,
    "loss_and_metrics": LossAndMetricsArguments,
    "chunk_logprobs": ChunkLogprobsArguments,
    "chunk_logprobs_backward": ChunkLogprobsBackwardArguments,
    "chunk_packets": ChunkPacketsArguments,
    "gather_packets": GatherPacketsArguments,
    "chunk_shard_backward": ChunkShardBackwardArguments,
    "scale_": ScaleArguments,
    "scale_rows_": ScaleRowsArguments,
    "scale_into": ScaleIntoArguments,
    "ipo_loss_from_hidden": IPOLossFromHiddenArguments,
    "linear_token_logprobs": LinearTokenLogprobsArguments,
    "linear_token_logprobs_backward": LinearTokenLogprobsBackwardArguments,
    "sequence_totals": SequenceTotalsArguments,
    "sequence_totals_from_logits": SequenceTotalsFromLogitsArguments,
    "sequence_totals_from_hidden": SequenceTotalsFromHiddenArguments,
    "ipo_loss_from_logits_sharded": IPOLossFromLogitsShardedArguments,
    "token_logprobs_sharded": TokenLogprobsShardedArguments,
    "token_logprobs_sharded_backward": TokenLogprobsShardedBackwardArguments,
    "ipo_loss_from_hidden_sharded": IPOLossFromHiddenShardedArguments,
    "linear_token_logprobs_sharded": LinearTokenLogprobsShardedArguments,
    "linear_token_logprobs_sharded_backward": LinearTokenLogprobsShardedBackwardArguments,
}


# -------------------------------------------------------------------------------------------------
# Between named tuples and an operator's own list

Arguments = TypeVar("Arguments", bound="tuple[Any, ...]")


def flatten(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A value for each argument of the schema, in its order."""
    flat: list[Any] = []
    for value in arguments:
        if isinstance(value, tuple):
            flat.extend(flatten(value))
        else:
            flat.append(value)
    return tuple(flat)


def unflatten(kind: type[Arguments], flat: Sequence[Any]) -> Arguments:
    """The inverse of ``flatten``."""
    values: list[Any] = []
    begin = 0
    for group, width in _LAYOUTS[kind]:
        part = flat[begin : begin + width]
        values.append(part[0] if group is None else unflatten(group, part))
        begin += width
    return kind(*values)


def by_name(operator: str, function: Callable[[Any], Any]) -> Callable[..., Any]:
    """``function`` of the operator's named arguments as a function of their values in a row."""
    kind = OPERATORS[operator]

    def run(*values: Any) -> Any:
        results = function(unflatten(kind, values))
        return flatten(results) if isinstance(results, tuple) else results

    return run


def _layout(kind: type[Any]) -> list[tuple[type[Any] | None, int]]:
    """Of each field of ``kind``: its group, if it is one, and how many arguments it stands for."""
    layout: list[tuple[type[Any] | None, int]] = []
    for hint in get_type_hints(kind, include_extras=True).values():
        is_group = isinstance(hint, type) and issubclass(hint, tuple)
        layout.append((hint, len(schema_fields(hint))) if is_group else (None, 1))
    return layout


_SCHEMA_TYPES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    list[float] | None: "float[]?",
    SymInt: "SymInt",
    SymInt | None: "SymInt?",
}


def schema_fields(kind: type[Any]) -> list[tuple[str, str]]:
    """Name and schema type of each argument (or result) that ``kind`` stands for."""
    fields: list[tuple[str, str]] = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        fields += [(name, _SCHEMA_TYPES[hint])] if hint in _SCHEMA_TYPES else schema_fields(hint)
    return fields


def schema(arguments: type[Any], results: type[Any]) -> str:
    """``(Tensor hidden, ...) -> (Tensor loss, ...)`` for an operator that Python defines."""
    sides = (
        ", ".join(f"{type_} {name}" for name, type_ in schema_fields(kind))
        for kind in (arguments, results)
    )
    return "({}) -> ({})".format(*sides)


_GROUPS = (
    LogitScaling,
    LossInputs,
    LossSettings,
    Components,
    HeadInputs,
    LogprobsBackward,
    NeedsGrad,
    Shard,
    MetricRows,
    SharedSequences,
)
_LAYOUTS = {
    kind: _layout(kind) for kind in (*_GROUPS, *OPERATORS.values(), IPOLossFromHiddenResults)
}
