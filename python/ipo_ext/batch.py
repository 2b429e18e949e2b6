"""What the loss takes besides the policy, in one argument that mixed precision does not cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ipo_ext._ops.arguments import LossInputs
from ipo_ext._optional_tensors import (
    NAMES,
    OptionalTensors,
    refuse_unknown_names,
    spells_out_tensors,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The loss's inputs in the order of the functions: those that it needs, then those that may be None.
_REQUIRED = tuple(name for name in LossInputs._fields if name not in LossInputs._field_defaults)
FIELDS = (*_REQUIRED, "temperature", *NAMES, "normalizer")


class LossBatch:
    """The loss's constants as one argument of a module's ``forward``, which no host casts.

    Mixed precision that casts what ``forward`` is called with (FSDP1 and FSDP2 with a
    ``param_dtype``, DDP's, DeepSpeed's ``auto_cast``) rounds every floating tensor that it finds
    there, also in a list, dict, NamedTuple or dataclass: log-probabilities in bfloat16 are off by
    0.06 at -20. A ``LossBatch`` is none of these, so its tensors arrive as they are. Nor do these
    hosts move it: call ``to`` where they moved plain tensors (Accelerate's loaders call it).

    Args:
        inference_logprobs, advantages, loss_mask: ``[...]``, as for ``ipo_loss``.
        temperature: as for ``ipo_loss_from_hidden``; not for ``IPOLoss``.
        teacher_logprobs, loss_weights, cu_seqlens, normalizer: as for ``ipo_loss``.
        inference_mask_logprobs, sequence_ids, num_sequences, cp_group: likewise.
        groups, num_groups: likewise.

    Example:
        >>> batch = LossBatch(inference, advantages, mask, normalizer=num_tokens).to(device)
        >>> head = IPOLMHead(model.lm_head)
        >>> out = head(hidden[:, :-1], tokens[:, 1:], batch)
    """

    # Neither a dataclass nor a pytree node: hosts walk the one, and may come to walk the other.
    __slots__ = FIELDS
    teacher_logprobs: torch.Tensor | None
    loss_weights: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    inference_mask_logprobs: torch.Tensor | None

    @spells_out_tensors
    def __init__(
        self,
        inference_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        loss_mask: torch.Tensor,
        *,
        temperature: float | torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
        **tensors: Unpack[OptionalTensors],
    ) -> None:
        refuse_unknown_names(LossBatch.__init__, tensors)
        self.inference_logprobs = inference_logprobs
        self.advantages = advantages
        self.loss_mask = loss_mask
        self.temperature = temperature
        self.normalizer = normalizer
        for name in NAMES:
            setattr(self, name, tensors.get(name))

    def arguments(self) -> dict[str, Any]:
        """What is set, by name: ``ipo_loss(trainer_logprobs, **batch.arguments())``."""
        named = {name: getattr(self, name) for name in FIELDS}
        return {name: value for name, value in named.items() if value is not None}

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> LossBatch:
        """With every tensor on ``device``; dtypes stay as they are."""
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"device: expected a device, got {device}: a LossBatch keeps the dtypes of its "
                "tensors; convert them before they go in"
            )
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> LossBatch:
        """With every tensor in pinned memory: what ``DataLoader(pin_memory=True)`` calls."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LossBatch:
        mapped: dict[str, Any] = {
            name: function(value) if isinstance(value, torch.Tensor) else value
            for name, value in self.arguments().items()
        }
        return LossBatch(**mapped)

    def __repr__(self) -> str:
        parts = (
            f"{name}={value.dtype}{list(value.shape)}"
            if isinstance(value, torch.Tensor)
            else f"{name}={value!r}"
            for name, value in self.arguments().items()
        )
        return f"LossBatch({', '.join(parts)})"


def inputs_of_loss(
    inference_logprobs: torch.Tensor | LossBatch,
    advantages: torch.Tensor | None,
    loss_mask: torch.Tensor | None,
    **optional: Any,
) -> dict[str, Any]:
    """By name, of a call that has them one by one, or a ``LossBatch`` in the first one's place."""
    beside = {"advantages": advantages, "loss_mask": loss_mask, **optional}
    if not isinstance(inference_logprobs, LossBatch):
        beside["inference_logprobs"] = inference_logprobs
        return beside
    for name, value in beside.items():
        if name in FIELDS and value is not None:
            raise TypeError(
                f"{name}: expected it in the LossBatch, got it as an argument beside one; pass "
                f"LossBatch(..., {name}={name})"
            )
    return {**beside, **inference_logprobs.arguments()}
