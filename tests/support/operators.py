"""The operators behind the public functions, called by the names of their schemas."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist

from ipo_ext import _C, IPOConfig
from ipo_ext._ops import library
from ipo_ext._ops.arguments import NeedsGrad
from tests.support.cases import Case, LogitsCase, LogprobsCase
from tests.support.ranks import alone
from tests.support.subjects import TOKENS, VOCABULARY


def operator(name: str) -> Any:
    return getattr(library.operators(), name).default


def names_of(name: str) -> list[str]:
    """An operator's arguments."""
    return [argument.name for argument in operator(name)._schema.arguments]


def settings_of(config: IPOConfig, dtype: torch.dtype) -> dict[str, Any]:
    """A config as operators take it."""
    return config.settings(dtype)._asdict()


def operator_arguments(name: str, case: Case, **others: Any) -> dict[str, Any]:
    """What the public function passes to an operator, by name; ``others`` go before the case's."""
    known = {
        **case.arguments,
        "temperature": as_scalar(getattr(case, "temperature", None)),
        "softcap": getattr(case, "softcap", None) or 0.0,
        "sampling_mask": getattr(case, "sampling_mask", None),
        "candidates": None,
        "grad_candidates": None,
        "with_entropy": getattr(case, "entropy", None) is not False,
        "normalizer": as_scalar(case.normalizer),
        "sequence_totals": None,
        **settings_of(case.config, case.compute_dtype),
        **dict.fromkeys(("with_gradient", "needs_grad_hidden", "needs_grad_weight"), True),
        "needs_grad_bias": getattr(case, "bias", None) is not None,
        **others,
    }
    return {argument: known[argument] for argument in names_of(name)}


def as_scalar(number: float | torch.Tensor | None) -> torch.Tensor | None:
    if number is None or isinstance(number, torch.Tensor):
        return number
    return torch.tensor(number, dtype=torch.float64)


def call_operator(name: str, case: Case, **others: Any) -> Any:
    return operator(name)(**operator_arguments(name, case, **others))


def opcheck(name: str, case: Case, **others: Any) -> None:
    torch.library.opcheck(operator(name), tuple(operator_arguments(name, case, **others).values()))


def find_faults(case: LogitsCase) -> torch.Tensor:
    sizes = {"columns": case.logits.shape[-1], "max_active": len(case.labels)}
    fault, _ = call_operator("find_faults", case, **sizes)
    return fault


def chunk_of_loss(
    case: LogitsCase, gradient: torch.Tensor | None, fault: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies; the gradient goes where the caller wants it.

    That of fp16 logits over its rows' scales, as where all rows are one chunk.
    """
    fault = find_faults(case) if fault is None else fault
    row_scales = None
    if gradient is not None and case.logits.dtype == torch.float16:
        row_scales = torch.full((case.tokens,), torch.nan, device=gradient.device)
    where = {"fault": fault, "gradient": gradient, "row_scales": row_scales}
    return call_operator("chunk_logprobs_and_gradient", case, **where)


def operator_gradient(case: LogprobsCase) -> torch.Tensor:
    """The gradient from log-probabilities as the operator makes it, in the compute dtype."""
    return call_operator("ipo_loss", case)[1]


# -------------------------------------------------------------------------------------------------
# Every operator


def group_for(name: str) -> contextlib.AbstractContextManager[Any]:
    """A process group for an operator that exchanges with other ranks; else nothing."""
    exchanges = "sharded" in name or name.startswith("sequence_totals")
    return alone() if exchanges else contextlib.nullcontext()


def example_arguments(name: str, device: torch.device) -> list[Any]:
    """A value for every argument of any operator, by its name in the schemas.

    Within ``group_for(name)``.
    """
    rows = TOKENS, VOCABULARY
    per_token = torch.rand(TOKENS)
    tensors = {
        "trainer_logprobs": -per_token,
        "logits": torch.randn(rows),
        "hidden": torch.randn(rows),
        "weight": torch.randn(VOCABULARY, VOCABULARY),
        "bias": torch.randn(VOCABULARY),
        "labels": torch.randint(VOCABULARY, (TOKENS,)),
        "inference_logprobs": -torch.rand(TOKENS),
        "advantages": torch.randn(TOKENS),
        "loss_mask": per_token < 0.8,
        "temperature": per_token + 0.5,
        "sampling_mask": torch.arange(3, dtype=torch.int32).expand(TOKENS, 3),
        "candidates": torch.arange(4, dtype=torch.int32).expand(TOKENS, 4),
        "grad_candidates": torch.randn(TOKENS, 4),
        "replayed": per_token < 0.5,
        "trainer_mask_logprobs": torch.randn(TOKENS, 3).log_softmax(-1),
        "inference_mask_logprobs": torch.randn(TOKENS, 3).log_softmax(-1),
        "teacher_logprobs": -per_token,
        "loss_weights": per_token,
        "cu_seqlens": torch.tensor([0, 5, 5, TOKENS], dtype=torch.int32),
        "normalizer": torch.tensor(7.0),
        "ce_weights": torch.relu(torch.randn(TOKENS)),
        "ref_kl_weights": torch.relu(torch.randn(TOKENS)),
        "ref_logprobs": -torch.rand(TOKENS),
        "ce_scale": torch.tensor(5.0),
        "ref_kl_scale": torch.tensor(3.0),
        "logprobs": -per_token,
        "entropy": per_token,
        "softmax_stats": torch.rand(2, TOKENS),
        "grad_logprobs": torch.randn(TOKENS),
        "grad_entropy": torch.randn(TOKENS),
        "fault": torch.zeros(1, dtype=torch.int32),
        "gradient": torch.randn(rows),
        "out": torch.empty(rows, dtype=torch.bfloat16),
        "factor": torch.tensor(0.3),
        "row_scales": torch.rand(TOKENS),
        "packets": torch.rand(TOKENS, 4, dtype=torch.float64),
        "sums": torch.rand(len(_C.SUM_ROWS), 3, dtype=torch.float64),
        "extremes": torch.rand(len(_C.EXTREME_ROWS), 3, dtype=torch.float64),
        "sequence_ids": torch.tensor([1, 0, 1], dtype=torch.int32),
        "sequence_totals": torch.ones(_C.SEQUENCE_TOTALS, 3, dtype=torch.float64),
    }
    config = IPOConfig.dppo(kl_tau=1e-3, teacher_tau=0.3)
    numbers = {
        **settings_of(config, torch.float32),
        **dict.fromkeys(("num_active", "max_active"), TOKENS),
        **dict.fromkeys(("with_gradient", "with_entropy", *NeedsGrad._fields), True),
        "softcap": 4.0,
        "ref_kl_cap": 1e4,
        "ref_kl_tau": 1e-3,
        "chunk_size": 8,
        "columns": VOCABULARY,
        "num_sequences": 2,
        "group_name": dist.group.WORLD.group_name if dist.is_initialized() else "",
        "float64": False,
        "first_column": 0,
        "vocabulary": VOCABULARY,
        "group": dist.group.WORLD.group_name if dist.is_initialized() else "",
        "problem": "",
        "reduce_hidden_grad": True,
        "sequence_parallel": False,
        "ratio": 0.3,
    }
    known = {key: tensor.to(device) for key, tensor in tensors.items()} | numbers
    if "sharded" in name:
        known |= dict.fromkeys(("sampling_mask", "grad_candidates"))
    if name.startswith("chunk"):
        known["cu_seqlens"] = None  # a chunk of rows is not packed
        known["sequence_totals"] = None
        known["row_scales"] = None  # of fp16 gradients alone
    if name == "scale_rows_":
        known["gradient"] = known["gradient"].half()
    if name.startswith("sequence_"):  # which is for rules on sequences alone
        known |= settings_of(IPOConfig.geometric(0.5, 2.0), torch.float32)
    return [_as(argument, known[argument.name]) for argument in operator(name)._schema.arguments]


def _as(argument: Any, value: Any) -> Any:
    """A number as the tensor that a twin takes for it."""
    is_number = isinstance(value, float) and str(argument.type) == "Tensor"
    return torch.tensor(value, dtype=torch.float64) if is_number else value
