"""The loss, the packed micro-batch and the LM head of prime-rl, without importing prime-rl.

``loss_fn`` is what ``[trainer.loss] type = "custom"`` names and is called once for each packed
sequence. ``compute_loss`` replaces upstream's loop over them with one launch, ``FusedOutputLinear``
its LM head (docs/integrations.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from ipo_ext._ops.arguments import Components
from ipo_ext._ops.chunks import IGNORED_LABEL
from ipo_ext._prime_rl_sections import NEWEST
from ipo_ext.config import IPOConfig
from ipo_ext.functional import (
    component_loss,
    ipo_loss,
    ipo_loss_from_hidden,
    linear_token_logprobs,
)
from ipo_ext.integrations._batches import cu_seqlens_of
from ipo_ext.integrations._prime_rl_components import (
    check_scale,
    check_version,
    components_of,
    metrics_of,
)
from ipo_ext.integrations._refusals import (
    Sequences,
    refuse_unequal_ids,
    refuse_unequal_lengths,
)
from ipo_ext.output import IPOOutput


class LossInputs(Protocol):
    """What upstream's dataclass of this name holds for one packed sequence, each ``[tokens]``.

    ``teacher_logprobs`` (later versions: ``ref_logprobs``), ``loss_weights`` and, each
    ``[tokens, ids]`` and read with score centering alone, ``trainer_mask_logprobs`` and
    ``inference_mask_logprobs`` may be absent or None.
    """

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor


@dataclasses.dataclass(frozen=True)
class SequenceLoss:
    """The loss of one packed sequence, as upstream calls it: the sum over its tokens.

    Both ways: until 2026-08 the object itself is called, since then its ``loss``.
    """

    config: IPOConfig

    def __call__(self, inputs: LossInputs) -> IPOOutput:
        return self.loss(inputs)

    def loss(self, inputs: LossInputs) -> IPOOutput:
        _refuse_unknown_inputs(inputs)
        of_ids = {name: getattr(inputs, name, None) for name in _OF_IDS}
        config, centered = _with_what_is_centered(self.config, of_ids)
        return ipo_loss(
            inputs.trainer_logprobs,
            inputs.inference_logprobs,
            inputs.advantages,
            inputs.loss_mask,
            teacher_logprobs=_teacher(inputs),
            loss_weights=getattr(inputs, "loss_weights", None),
            config=config,
            **centered,
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
    """Upstream's ``setup_loss_fn``, until 2026-08, for a custom section naming ours.

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


def setup_rl_loss_fn(loss_config: Any, version: str = NEWEST) -> SequenceLoss:
    """Upstream's ``setup_rl_loss_fn``, since 2026-09: a custom section naming ours, or a built-in.

    Args:
        loss_config: ``trainer.loss``, a pydantic model. One of upstream's own losses becomes ours
            of the same formula, by ``IPOConfig.from_prime_rl``.
        version: of prime-rl, as there.
    """
    if getattr(loss_config, "type", None) == "custom":
        return setup_loss_fn(loss_config)
    return SequenceLoss(IPOConfig.from_prime_rl(loss_config.model_dump(), version))


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
    check_scale("loss_scale", loss_scale)
    return _packed_loss(
        trainer_logprobs,
        inference_logprobs,
        _packed(teacher_logprobs),
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
    trainer_mask_logprobs: Sequences | None = None,
    inference_mask_logprobs: Sequences | None = None,
    version: str = NEWEST,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``compute_loss`` of the versions whose loss has three components, all in one launch.

    rl is ``rl_loss_fn``'s on the loss mask, ce the cross-entropy and ref_kl the distillation from
    the reference model on the tokens of their own weights, whatever the loss mask says. Each is the
    sum over its tokens, times their weights, divided by its scale. A token whose weight is 0 takes
    no part, and what it holds reaches nothing.

    Args:
        trainer_mask_logprobs, inference_mask_logprobs: read where the section of ``rl_loss_fn``
            has ``score_centering``, which then takes all sequences, or where one is None none;
            ``[tokens, ids]`` each, as the head's ``mask_logprobs`` and the sampler's, -inf where
            there are fewer.
        version: "2026-08" for prime-rl until then, whose ref_kl also has the squared log-ratio and
            no cap; ``functools.partial(compute_component_loss, version="2026-08")``.

    Returns:
        The sum of the components, and the metrics. Those of rl are ``[sequences]``, 0 for a
        sequence without tokens, which upstream leaves out (to know that would synchronise). The
        others, ``nll``, ``ref_kl``, ``ref_kl/is_masked``, ``ref_kl/masked_mismatch_kl`` and
        ``ref_kl/unmasked_mismatch_kl``, are ``[1]``, means over the component's tokens; so are
        ``ce/nonfinite`` and ``ref_kl/nonfinite``, the share of them that pays nothing because a
        log-probability, or a ratio without a cap, is not finite.

    Raises:
        ValueError: ``ref_kl_weights`` without ``ref_logprobs``, or a scale that is no number of
            tokens (``rl_scale`` above 0, the others at least 0).
        TypeError: a scale that is neither a number nor a tensor of numbers.
    """
    check_version(version)
    if ref_kl_weights is not None and ref_logprobs is None:
        raise ValueError(
            "ref_logprobs: expected a tensor for each sequence, got None; ref_kl_weights need it"
        )
    refuse_unequal_lengths(
        "trainer_logprobs",
        trainer_logprobs,
        inference_logprobs=inference_logprobs,
        ref_logprobs=ref_logprobs,
        advantages=advantages,
        loss_mask=loss_mask,
        rl_weights=rl_weights,
        ce_weights=ce_weights,
        ref_kl_weights=ref_kl_weights,
    )
    of_ids = {
        "trainer_mask_logprobs": trainer_mask_logprobs,
        "inference_mask_logprobs": inference_mask_logprobs,
    }
    if isinstance(rl_loss_fn, SequenceLoss) and rl_loss_fn.config.score_centering:
        refuse_unequal_ids("trainer_logprobs", trainer_logprobs, **of_ids)
    else:
        of_ids = dict.fromkeys(of_ids)  # which nothing reads
    check_scale("rl_scale", rl_scale)
    check_scale("ce_scale", ce_scale, least=0)
    check_scale("ref_kl_scale", ref_kl_scale, least=0)
    reference = _packed(ref_logprobs)
    components = components_of(
        version, _packed(ce_weights), _packed(ref_kl_weights), reference, ce_scale, ref_kl_scale
    )
    return _packed_loss(
        trainer_logprobs,
        inference_logprobs,
        reference,
        advantages,
        loss_mask,
        rl_weights,
        rl_loss_fn,
        rl_scale,
        components,
        {name: _packed(of_sequences) for name, of_sequences in of_ids.items()},
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

    Attributes:
        return_mask_logprobs: whether a call with a ``sampling_mask`` also gives ``mask_logprobs``.
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
        self.return_mask_logprobs = False

    def forward(  # type: ignore[override]  # upstream's call
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
        sampling_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """``hidden_states [B, T, H]``, ``labels [B, T]``, ``temperature [B, T]``.

        ``sampling_mask [B, T, K]`` is that of ``linear_token_logprobs``: int32, -1 for none.

        Returns:
            ``{"logprobs": [B, T], "entropy": [B, T]}``, a pytree for FSDP's hooks, as upstream's.
            With ``return_mask_logprobs`` also ``mask_logprobs [B, T, K]``, the log-probability of
            each id of a row that replays them, 0 elsewhere.
            Without a temperature ``{"loss": []}``, the cross-entropy summed over all labels but
            -100, its gradients made in the same pass. It is NaN where a label's log-probability is
            not finite, while the gradients leave that row out.
        """
        if labels is None:
            raise ValueError("labels: expected a tensor [B, T], got None")
        if temperature is None:
            if sampling_mask is not None:
                raise ValueError(
                    "sampling_mask: expected None without a temperature, got a tensor: the summed "
                    "cross-entropy is over the whole vocabulary"
                )
            return {"loss": self._summed_cross_entropy(hidden_states, labels)}
        logprobs, entropy, *of_ids = linear_token_logprobs(
            hidden_states,
            self.weight,
            labels,
            temperature=temperature,
            softcap=self.softcap,
            chunk_size=self.chunk_size,
            sampling_mask=sampling_mask,
            candidates=sampling_mask if self.return_mask_logprobs else None,
        )
        output = {"logprobs": logprobs, "entropy": entropy}
        if sampling_mask is not None and of_ids:
            replays = (sampling_mask == labels[..., None]).any(-1, keepdim=True)
            output["mask_logprobs"] = torch.where(replays, of_ids[0], 0)
        return output

    def _summed_cross_entropy(
        self, hidden_states: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        constant = torch.ones(labels.shape, device=labels.device)
        out = ipo_loss_from_hidden(
            hidden_states,
            self.weight,
            labels,
            inference_logprobs=torch.zeros_like(constant),
            advantages=constant,
            loss_mask=labels != IGNORED_LABEL,
            softcap=self.softcap,
            chunk_size=self.chunk_size,
            config=_CROSS_ENTROPY,
        )
        # A policy's loss drops such a token and says so in its metrics; here nothing else would.
        return torch.where(out.metrics["nonfinite"] > 0, torch.nan, out.loss)


# -logprob of every token: REINFORCE of an advantage of 1.
_CROSS_ENTROPY = IPOConfig(mask_rule="none", pg_form="reinforce", kl_tau=0.0)
_TEACHER = ("teacher_logprobs", "ref_logprobs")  # upstream renamed it
_OF_IDS = ("trainer_mask_logprobs", "inference_mask_logprobs")
_KNOWN_INPUTS = {*LossInputs.__annotations__, *_TEACHER, "loss_weights", *_OF_IDS}


def _refuse_unknown_inputs(inputs: LossInputs) -> None:
    for name, value in vars(inputs).items():
        if name not in _KNOWN_INPUTS and value is not None:
            raise ValueError(
                f"{name}: expected one of {', '.join(sorted(_KNOWN_INPUTS))}: this input of a "
                "later prime-rl would change the loss and is not supported"
            )


def _teacher(inputs: LossInputs) -> torch.Tensor | None:
    for name in _TEACHER:
        teacher = getattr(inputs, name, None)
        if teacher is not None and teacher.shape != inputs.trainer_logprobs.shape:
            raise ValueError(
                f"{name}: expected shape {list(inputs.trainer_logprobs.shape)} like "
                f"trainer_logprobs, got {list(teacher.shape)}"
            )
        if teacher is not None:
            return teacher
    return None


def _packed_loss(
    trainer_logprobs: Sequences,
    inference_logprobs: Sequences,
    teacher_logprobs: torch.Tensor | None,
    advantages: Sequences,
    loss_mask: Sequences,
    loss_weights: Sequences | None,
    loss_fn: SequenceLoss,
    loss_scale: float | torch.Tensor,
    components: Components | None = None,
    of_ids: Mapping[str, torch.Tensor | None] = MappingProxyType({}),
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    if not isinstance(loss_fn, SequenceLoss):
        raise TypeError(
            f"loss_fn: expected what {__name__}.{setup_loss_fn.__name__} returns, got "
            f"{type(loss_fn).__name__}; replace upstream's setup_loss_fn as well"
        )
    has_ref_kl = components is not None and components.ref_kl_weights is not None
    if has_ref_kl and loss_fn.config.teacher_tau == 0:
        teacher_logprobs = None  # of another component: what they hold for rl's tokens is garbage
    mask = torch.cat(list(loss_mask))
    weights = _packed(loss_weights)
    tokens = (
        torch.cat(list(trainer_logprobs)),
        torch.cat(list(inference_logprobs)),
        torch.cat(list(advantages)),
        mask if weights is None else torch.where(weights != 0, mask, False),
    )
    config, centered = _with_what_is_centered(loss_fn.config, of_ids)
    others: dict[str, Any] = {
        "teacher_logprobs": teacher_logprobs,
        "loss_weights": weights,
        "cu_seqlens": cu_seqlens_of(trainer_logprobs),
        "normalizer": loss_scale,
        "config": config,
        **centered,
    }
    if components is None:
        out = ipo_loss(*tokens, **others)
        return out.loss, dict(out.metrics.items())
    out, means = component_loss(*tokens, components=components, **others)
    return out.loss, {**dict(out.metrics.items()), **metrics_of(means, components)}


def _with_what_is_centered(
    config: IPOConfig, of_ids: Mapping[str, torch.Tensor | None]
) -> tuple[IPOConfig, dict[str, Any]]:
    """As upstream: nothing where the ids' log-probabilities are missing, whatever the section says.

    Rollouts of a frozen source have none, nor have batches of padding. A section without score
    centering does not read them.
    """
    given = {name: logprobs for name, logprobs in of_ids.items() if logprobs is not None}
    if config.score_centering and len(given) == len(_OF_IDS):
        return config, given
    return dataclasses.replace(config, score_centering=False), {}


def _packed(sequences: Sequences | None) -> torch.Tensor | None:
    return None if sequences is None else torch.cat(list(sequences))
