"""The loss, the packed micro-batch and the LM head of prime-rl, without importing prime-rl.

``loss_fn`` is what ``[trainer.loss] type = "custom"`` names and is called once for each packed
sequence. ``compute_loss`` replaces upstream's loop over them with one launch, ``FusedOutputLinear``
its LM head (docs/integrations.md).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import nn

from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss, linear_token_logprobs
from ipo_ext.integrations._batches import cu_seqlens_of
from ipo_ext.integrations._refusals import Sequences, refuse_unequal_lengths
from ipo_ext.output import IPOOutput


class LossInputs(Protocol):
    """What upstream's dataclass of this name holds for one packed sequence, each ``[tokens]``.

    ``teacher_logprobs`` (later versions: ``ref_logprobs``) and ``loss_weights`` may be absent or
    None.
    """

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor


@dataclasses.dataclass(frozen=True)
class SequenceLoss:
    """The loss of one packed sequence, as upstream calls it: the sum over its tokens."""

    config: IPOConfig

    def __call__(self, inputs: LossInputs) -> IPOOutput:
        _refuse_unknown_inputs(inputs)
        return ipo_loss(
            inputs.trainer_logprobs,
            inputs.inference_logprobs,
            inputs.advantages,
            inputs.loss_mask,
            teacher_logprobs=_first_present(inputs, _TEACHER),
            loss_weights=getattr(inputs, "loss_weights", None),
            config=self.config,
        )


def loss_fn(inputs: LossInputs, **settings: Any) -> IPOOutput:
    """The custom loss of a ``trainer.loss`` section, whose ``kwargs`` are ``IPOConfig``'s fields.

    Returns:
        An object with ``.loss``, a sum that upstream divides by its ``loss_scale``, and
        ``.metrics``, 0-dim, under upstream's names and ours.

    Raises:
        ValueError: an unknown or invalid setting, or an input of a later version of prime-rl that
            would change the loss and is not known here.
    """
    return SequenceLoss(IPOConfig.from_mapping(settings))(inputs)


def setup_loss_fn(loss_config: Any) -> SequenceLoss:
    """Upstream's ``setup_loss_fn`` (later ``setup_rl_loss_fn``) for a custom section naming ours.

    Args:
        loss_config: ``trainer.loss``, with ``type = "custom"`` and an ``import_path`` of
            ``ipo_ext.integrations.prime_rl.loss_fn``.
    """
    expected = f"{__name__}.{loss_fn.__name__}"
    found = getattr(loss_config, "import_path", None)
    if found != expected:
        raise ValueError(
            f'trainer.loss: expected type = "custom" with import_path = "{expected}", got '
            f"type = {getattr(loss_config, 'type', None)!r} with import_path = {found!r}"
        )
    return SequenceLoss(IPOConfig.from_mapping(loss_config.kwargs))


def compute_loss(
    trainer_logprobs: Sequences,
    inference_logprobs: Sequences,
    teacher_logprobs: Sequences | None,
    advantages: Sequences,
    loss_mask: Sequences,
    loss_fn: SequenceLoss,
    loss_scale: float | torch.Tensor,
    sft_loss: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Upstream's ``compute_loss``, with one launch for all sequences of the micro-batch.

    Args:
        trainer_logprobs, inference_logprobs, teacher_logprobs, advantages, loss_mask: one tensor
            for each packed sequence.
        loss_fn: what ``setup_loss_fn`` of this module returned.
        loss_scale: the global number of loss tokens.
        sft_loss: to be False: a batch of supervised tokens is upstream's own loss.

    Returns:
        The loss divided by ``loss_scale``, and each metric as ``[sequences]``.
    """
    if sft_loss:
        raise ValueError(
            "sft_loss: expected False, got True: supervised batches are not this loss; hand them "
            "to prime_rl.trainer.rl.loss.compute_loss"
        )
    refuse_unequal_lengths(
        "trainer_logprobs",
        trainer_logprobs,
        inference_logprobs=inference_logprobs,
        teacher_logprobs=teacher_logprobs,
        advantages=advantages,
        loss_mask=loss_mask,
    )
    return _packed_loss(
        trainer_logprobs,
        inference_logprobs,
        teacher_logprobs,
        advantages,
        loss_mask,
        None,
        loss_fn,
        loss_scale,
    )


def compute_component_loss(
    trainer_logprobs: Sequences,
    inference_logprobs: Sequences,
    ref_logprobs: Sequences | None,
    advantages: Sequences,
    loss_mask: Sequences,
    rl_weights: Sequences | None,
    ce_weights: Sequences | None,
    ref_kl_weights: Sequences | None,
    rl_loss_fn: SequenceLoss,
    rl_scale: float | torch.Tensor,
    ce_scale: float | torch.Tensor,
    ref_kl_scale: float | torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``compute_loss`` under the signature of the versions whose loss has three components.

    A token whose ``rl_weights`` is 0 takes no part. A sequence without such tokens has metrics of
    0, where upstream leaves it out: to know that would synchronise.

    Raises:
        ValueError: ``ce_weights`` or ``ref_kl_weights`` are given. Their losses are upstream's.
    """
    for name, weights in (("ce_weights", ce_weights), ("ref_kl_weights", ref_kl_weights)):
        if weights is not None:
            raise ValueError(
                f"{name}: expected None, got {len(weights)} sequences: that component is not this "
                'loss; use upstream\'s compute_loss with trainer.loss type = "custom" instead'
            )
    refuse_unequal_lengths(
        "trainer_logprobs",
        trainer_logprobs,
        inference_logprobs=inference_logprobs,
        ref_logprobs=ref_logprobs,
        advantages=advantages,
        loss_mask=loss_mask,
        rl_weights=rl_weights,
    )
    return _packed_loss(
        trainer_logprobs,
        inference_logprobs,
        ref_logprobs,
        advantages,
        loss_mask,
        rl_weights,
        rl_loss_fn,
        rl_scale,
    )


class FusedOutputLinear(nn.Linear):
    """Upstream's LM head of this name: log-probabilities and entropies, the logits never stored.

    Constructed, called and answering as upstream's, so that it can stand in its module's place:
    ``prime_rl.trainer.models.layers.lm_head.FusedOutputLinear = FusedOutputLinear``. Both outputs
    are differentiable; the backward pass takes only the rows whose gradient is not 0, so neither
    prompts nor tokens that the loss dropped. A label of -100 marks a row that takes no part.

    Args:
        chunk_size: rows whose logits exist at a time, over the whole vocabulary. (Upstream cuts the
            vocabulary as well: of the same number, this head needs more memory.) Default: as
            ``linear_token_logprobs``.
        softcap: ``c`` of ``c * tanh(logits / c)``, as upstream's ``GemmaFusedOutputLinear``, in
            whose place it can stand as well.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        chunk_size: int | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size
        self.softcap = softcap

    def forward(  # type: ignore[override]  # upstream's call
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
        sampling_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """``hidden_states [B, T, H]``, ``labels [B, T]``, ``temperature [B, T]``.

        Returns:
            ``{"logprobs": [B, T], "entropy": [B, T]}``, a pytree for FSDP's hooks, as upstream's.
        """
        if labels is None or temperature is None:
            missing = "labels" if labels is None else "temperature"
            raise ValueError(f"{missing}: expected a tensor [B, T], got None")
        if sampling_mask is not None:
            raise ValueError(
                "sampling_mask: expected None: log-probabilities over a part of the vocabulary are "
                "not supported; sample without top-p and top-k, or keep upstream's head"
            )
        logprobs, entropy = linear_token_logprobs(
            hidden_states,
            self.weight,
            labels,
            temperature=temperature,
            softcap=self.softcap,
            chunk_size=self.chunk_size,
        )
        return {"logprobs": logprobs, "entropy": entropy}


_TEACHER = ("teacher_logprobs", "ref_logprobs")  # upstream renamed it
_KNOWN_INPUTS = {*LossInputs.__annotations__, *_TEACHER, "loss_weights"}


def _refuse_unknown_inputs(inputs: LossInputs) -> None:
    for name, value in vars(inputs).items():
        if name not in _KNOWN_INPUTS and value is not None:
            raise ValueError(
                f"{name}: expected one of {', '.join(sorted(_KNOWN_INPUTS))}: this input of a "
                "later prime-rl would change the loss and is not supported"
            )


def _first_present(inputs: LossInputs, names: tuple[str, ...]) -> torch.Tensor | None:
    values = (getattr(inputs, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def _packed_loss(
    trainer_logprobs: Sequences,
    inference_logprobs: Sequences,
    teacher_logprobs: Sequences | None,
    advantages: Sequences,
    loss_mask: Sequences,
    loss_weights: Sequences | None,
    loss_fn: SequenceLoss,
    loss_scale: float | torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    if not isinstance(loss_fn, SequenceLoss):
        raise TypeError(
            f"loss_fn: expected what {__name__}.{setup_loss_fn.__name__} returns, got "
            f"{type(loss_fn).__name__}; replace upstream's setup_loss_fn as well"
        )
    mask = torch.cat(list(loss_mask))
    weights = _packed(loss_weights)
    out = ipo_loss(
        torch.cat(list(trainer_logprobs)),
        torch.cat(list(inference_logprobs)),
        torch.cat(list(advantages)),
        mask if weights is None else torch.where(weights != 0, mask, False),
        teacher_logprobs=_packed(teacher_logprobs),
        loss_weights=weights,
        cu_seqlens=cu_seqlens_of(trainer_logprobs),
        normalizer=loss_scale,
        config=loss_fn.config,
    )
    return out.loss, dict(out.metrics.items())


def _packed(sequences: Sequences | None) -> torch.Tensor | None:
    return None if sequences is None else torch.cat(list(sequences))
