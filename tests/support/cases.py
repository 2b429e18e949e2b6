"""The arguments of one call of the loss, whatever it is computed from; running it; equal bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F

import ipo_ext
from ipo_ext import IPOConfig

_DEFAULT = IPOConfig()
_Case = TypeVar("_Case", bound="Case")

# Upstream's seven, under its names; the teacher's only where there is one.
UPSTREAM_METRICS = {
    "mismatch_kl",
    "masked_mismatch_kl",
    "unmasked_mismatch_kl",
    "is_masked",
    "is_masked_low",
    "is_masked_high",
    "teacher_kl",
}


# ---------------------------------------------------------------------------------------------
# The arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What every loss takes; a subclass adds what its function computes it from."""

    function: ClassVar[Callable[..., ipo_ext.IPOOutput]]
    operands: ClassVar[tuple[str, ...]]  # the arguments that it takes by place
    differentiable: ClassVar[tuple[str, ...]]

    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    teacher_logprobs: torch.Tensor | None = None
    loss_weights: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    inference_mask_logprobs: torch.Tensor | None = None
    normalizer: float | torch.Tensor | None = None
    config: IPOConfig = _DEFAULT

    @property
    def arguments(self) -> dict[str, Any]:
        """All of them by name, the operands first."""
        others = (field.name for field in dataclasses.fields(self))
        names = dict.fromkeys((*self.operands, *others))
        return {name: getattr(self, name) for name in names}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {k: v for k, v in self.arguments.items() if isinstance(v, torch.Tensor)}

    @property
    def leaves(self) -> list[str]:
        """What it differentiates."""
        return [name for name in self.differentiable if getattr(self, name) is not None]

    @property
    def tokens(self) -> int:
        return self.loss_mask.numel()

    @property
    def compute_dtype(self) -> torch.dtype:
        dtypes = [self.tensors[name].dtype for name in (*self.leaves, "inference_logprobs")]
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def with_(self: _Case, **changes: Any) -> _Case:
        return dataclasses.replace(self, **changes)

    def map_tokens(self: _Case, function: Callable[[torch.Tensor], torch.Tensor]) -> _Case:
        """The case with ``function`` applied to every tensor that has a value for each token."""
        others = {"weight", "bias", "cu_seqlens", "normalizer"}
        tensors = {k: v for k, v in self.tensors.items() if k not in others}
        return self.with_(**{name: function(tensor) for name, tensor in tensors.items()})

    def to(self: _Case, device: torch.device | str) -> _Case:
        return self.with_(**{name: tensor.to(device) for name, tensor in self.tensors.items()})

    def call(self, function: Callable[..., Any] | None = None, **more: Any) -> ipo_ext.IPOOutput:
        """``function``, or the case's own, of all that is not left to its default."""
        named = self.arguments
        operands = [named.pop(name) for name in self.operands]
        given = {k: v for k, v in named.items() if v is not None and v is not _DEFAULT}
        return (function or type(self).function)(*operands, **{**given, **more})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogprobsCase(Case):
    function = staticmethod(ipo_ext.ipo_loss)
    operands = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")
    differentiable = ("trainer_logprobs", "trainer_mask_logprobs")

    trainer_logprobs: torch.Tensor
    trainer_mask_logprobs: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LabelledCase(Case):
    labels: torch.Tensor
    temperature: float | torch.Tensor | None = None
    softcap: float | None = None
    logit_scale: float | None = None
    sampling_mask: torch.Tensor | None = None
    entropy: bool | None = None

    def from_logprobs(self, trainer_logprobs: torch.Tensor) -> LogprobsCase:
        """The same call from the log-probabilities."""
        return LogprobsCase(trainer_logprobs=trainer_logprobs, **self._as(LogprobsCase))

    def _as(self, kind: type[Case]) -> dict[str, Any]:
        """What a case of another kind has in common with this one."""
        names = {field.name for field in dataclasses.fields(kind)}
        return {name: value for name, value in self.arguments.items() if name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsCase(_LabelledCase):
    function = staticmethod(ipo_ext.ipo_loss_from_logits)
    operands = ("logits", "labels", "inference_logprobs", "advantages", "loss_mask")
    differentiable = ("logits",)

    logits: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenCase(_LabelledCase):
    function = staticmethod(ipo_ext.ipo_loss_from_hidden)
    operands = ("hidden", "weight", "labels", "inference_logprobs", "advantages", "loss_mask")
    differentiable = ("hidden", "weight", "bias")

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    chunk_size: int | None = None
    num_active: int | None = None

    def from_logits(self) -> LogitsCase:
        """The same call from the logits, which do not require grad."""
        logits = F.linear(self.hidden, self.weight, self.bias).detach()
        return LogitsCase(logits=logits, **self._as(LogitsCase))


# ---------------------------------------------------------------------------------------------
# Running one


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a call gives, and the gradients by its leaves."""

    output: ipo_ext.IPOOutput
    gradients: tuple[torch.Tensor, ...]

    @property
    def loss(self) -> torch.Tensor:
        return self.output.loss.detach()

    @property
    def metrics(self) -> Mapping[str, torch.Tensor]:
        return self.output.metrics

    @property
    def gradient(self) -> torch.Tensor:
        """Of a loss that differentiates one tensor."""
        (gradient,) = self.gradients
        return gradient

    @property
    def grad_hidden(self) -> torch.Tensor:
        return self.gradients[0]

    @property
    def grad_weight(self) -> torch.Tensor:
        return self.gradients[1]

    @property
    def grad_bias(self) -> torch.Tensor:
        return self.gradients[2]


def evaluate(
    case: Case,
    function: Callable[..., ipo_ext.IPOOutput] | None = None,
    *,
    grad_loss: float = 1.0,
    **options: Any,
) -> Evaluation:
    """Runs a case forward, and backward from ``grad_loss``."""
    leaves = [getattr(case, name).detach().requires_grad_() for name in case.leaves]
    case = case.with_(**dict(zip(case.leaves, leaves, strict=True)))
    output = case.call(function, **options)
    gradients = torch.autograd.grad(output.loss, leaves, output.loss.new_tensor(grad_loss))
    return Evaluation(output, gradients)


# ---------------------------------------------------------------------------------------------
# Equal bits


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers: equal where every bit is."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(integers[tensor.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def assert_same_bits(a: Evaluation, b: Evaluation) -> None:
    """Fails unless all results agree in every bit: what is returned, the sums, the gradients."""
    for name in ("loss", "logprobs", "entropy"):
        left, right = getattr(a.output, name), getattr(b.output, name)
        assert (left is None) == (right is None), f"only one has {name}"
        assert left is None or same_bits(left, right), f"{name}: {left} and {right}"
    for name in ("sums", "extremes", "means"):
        left, right = getattr(a.metrics, name), getattr(b.metrics, name)
        assert same_bits(left, right), f"{name}: {left} and {right}"
    for left, right in zip(a.gradients, b.gradients, strict=True):
        assert same_bits(left, right), "gradients differ"
