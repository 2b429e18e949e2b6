"""The loss as ``nn.Module``: the settings held once, the call that of the function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from ipo_ext._groups import Group
from ipo_ext._optional_tensors import OptionalTensors, refuse_unknown_names, spells_out_tensors
from ipo_ext._plain_linear import PARAMETERS, check_plain_linear
from ipo_ext.batch import LossBatch, inputs_of_loss
from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss, ipo_loss_from_hidden
from ipo_ext.output import IPOOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class IPOLoss(nn.Module):
    """``ipo_loss`` with its config; without parameters or state.

    Args:
        config: which tokens and sequences count, and what they pay; default ``IPOConfig()``.
    """

    def __init__(self, config: IPOConfig | None = None) -> None:
        super().__init__()
        self.config = config if config is not None else IPOConfig()

    @spells_out_tensors
    def forward(
        self,
        trainer_logprobs: torch.Tensor,
        inference_logprobs: torch.Tensor | LossBatch,
        advantages: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        *,
        normalizer: float | torch.Tensor | None = None,
        trainer_mask_logprobs: torch.Tensor | None = None,
        histogram: bool = False,
        **tensors: Unpack[OptionalTensors],
    ) -> IPOOutput:
        """As ``ipo_loss``.

        A ``LossBatch`` may stand for ``inference_logprobs`` and all that it holds.
        """
        refuse_unknown_names(IPOLoss.forward, tensors)
        inputs = inputs_of_loss(
            inference_logprobs,
            advantages,
            loss_mask,
            normalizer=normalizer,
            **tensors,
        )
        return ipo_loss(
            trainer_logprobs,
            config=self.config,
            trainer_mask_logprobs=trainer_mask_logprobs,
            histogram=histogram,
            **inputs,
        )

    def extra_repr(self) -> str:
        return repr(self.config)


class LinearIPOLoss(nn.Module):
    """``ipo_loss_from_hidden`` with its settings; without parameters: the head's are arguments.

    Args:
        config: which tokens and sequences count, and what they pay; default ``IPOConfig()``.
        softcap, chunk_size, logit_scale: as for ``ipo_loss_from_hidden``.
        tp_group, vocab_size, vocab_start, reduce_hidden_grad, sequence_parallel: likewise.
    """

    def __init__(
        self,
        config: IPOConfig | None = None,
        *,
        softcap: float | None = None,
        chunk_size: int | None = None,
        logit_scale: float | None = None,
        tp_group: Group | None = None,
        vocab_size: int | None = None,
        vocab_start: int | None = None,
        reduce_hidden_grad: bool = True,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.config = config if config is not None else IPOConfig()
        self.softcap = softcap
        self.chunk_size = chunk_size
        self.logit_scale = logit_scale
        self.tp_group = tp_group
        self.vocab_size = vocab_size
        self.vocab_start = vocab_start
        self.reduce_hidden_grad = reduce_hidden_grad
        self.sequence_parallel = sequence_parallel

    @spells_out_tensors
    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        inference_logprobs: torch.Tensor | LossBatch,
        advantages: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        *,
        temperature: float | torch.Tensor | None = None,
        softcap: float | None = None,
        normalizer: float | torch.Tensor | None = None,
        chunk_size: int | None = None,
        num_active: int | None = None,
        logit_scale: float | None = None,
        bias: torch.Tensor | None = None,
        sampling_mask: torch.Tensor | None = None,
        entropy: bool = True,
        histogram: bool = False,
        **tensors: Unpack[OptionalTensors],
    ) -> IPOOutput:
        """As ``ipo_loss_from_hidden``, with the module's own for settings that are left out.

        A ``LossBatch`` may stand for ``inference_logprobs`` and all that it holds.
        """
        refuse_unknown_names(LinearIPOLoss.forward, tensors)
        inputs = inputs_of_loss(
            inference_logprobs,
            advantages,
            loss_mask,
            temperature=temperature,
            normalizer=normalizer,
            **tensors,
        )
        return ipo_loss_from_hidden(
            hidden,
            weight,
            labels,
            config=self.config,
            softcap=self.softcap if softcap is None else softcap,
            chunk_size=self.chunk_size if chunk_size is None else chunk_size,
            num_active=num_active,
            logit_scale=self.logit_scale if logit_scale is None else logit_scale,
            bias=bias,
            sampling_mask=sampling_mask,
            entropy=entropy,
            histogram=histogram,
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
            vocab_start=self.vocab_start,
            reduce_hidden_grad=self.reduce_hidden_grad,
            sequence_parallel=self.sequence_parallel,
            **inputs,
        )

    def extra_repr(self) -> str:
        text = (
            f"{self.config}, softcap={self.softcap}, chunk_size={self.chunk_size}, "
            f"logit_scale={self.logit_scale}"
        )
        if self.tp_group is None:
            return text
        return (
            f"{text}, vocab_size={self.vocab_size}, vocab_start={self.vocab_start}, "
            f"reduce_hidden_grad={self.reduce_hidden_grad}, "
            f"sequence_parallel={self.sequence_parallel}"
        )


class IPOLMHead(LinearIPOLoss):
    """An LM head that gives the loss: takes the place, the weight and the parameter name of one.

    Weight and bias are the very parameters of ``linear``, so a head tied to the embedding stays
    tied and a state dict keeps its keys. One that is parametrized (``torch.nn.utils.parametrize``)
    keeps its parametrization and the keys of that: it is computed anew in each call, as the linear
    does it. Without labels the head is that linear still, and gives its logits.

    Only weight and bias are taken over. Whatever else shapes the linear's output is refused (a
    forward of its own, hooks, a tensor subclass for a weight), and what is done to ``linear``
    afterwards is not seen: set a weight, register hooks or parametrize on the head instead, which
    runs them as any module does.

    Under mixed precision that casts what ``forward`` is called with, as FSDP2 does by default under
    a ``MixedPrecisionPolicy``, give the loss's inputs in a ``LossBatch``: as plain arguments they
    are rounded to bfloat16 before the loss sees them, temperature and normalizer included.

    Args:
        linear: the head, an ``nn.Linear``.
        config, chunk_size: as for ``LinearIPOLoss``.
        tp_group, vocab_size, vocab_start, reduce_hidden_grad, sequence_parallel: as for
            ``LinearIPOLoss``, of a linear that has this rank's rows of the weight. Without labels
            the logits are this rank's, of the hidden states that it is given.
        softcap, logit_scale: as for ``LinearIPOLoss``, for the loss alone: logits without labels
            are neither scaled nor capped, because a model does that itself, after its head.
            docs/models.md says which models of transformers need which.

    Raises:
        TypeError: ``linear`` is no ``nn.Linear``, runs another forward than torch's (an adapter, a
            quantized linear, a function put in its place), or its weight or bias is no plain
            parameter (a DTensor, a quantized or a lazy one).
        ValueError: it has hooks of its own (``weight_norm``, ``spectral_norm`` and ``prune`` of
            ``torch.nn.utils`` among them), or a weight or bias that is no parameter.

    Example:
        >>> model.lm_head = IPOLMHead(model.lm_head)
        >>> out = model.lm_head(hidden[:, :-1], tokens[:, 1:], inference, advantages, mask)
        >>> out.loss.backward()
        >>> batch = LossBatch(inference, advantages, mask)  # the same, and no host casts it
        >>> out = model.lm_head(hidden[:, :-1], tokens[:, 1:], batch)
    """

    def __init__(
        self,
        linear: nn.Linear,
        config: IPOConfig | None = None,
        *,
        softcap: float | None = None,
        chunk_size: int | None = None,
        logit_scale: float | None = None,
        tp_group: Group | None = None,
        vocab_size: int | None = None,
        vocab_start: int | None = None,
        reduce_hidden_grad: bool = True,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__(
            config,
            softcap=softcap,
            chunk_size=chunk_size,
            logit_scale=logit_scale,
            tp_group=tp_group,
            vocab_size=vocab_size,
            vocab_start=vocab_start,
            reduce_hidden_grad=reduce_hidden_grad,
            sequence_parallel=sequence_parallel,
        )
        check_plain_linear(linear)
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        for name in PARAMETERS:
            if parametrize.is_parametrized(linear, name):
                _share_parametrization(linear, self, name)
            else:
                self.register_parameter(name, getattr(linear, name))

    @spells_out_tensors
    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        inference_logprobs: torch.Tensor | LossBatch | None = None,
        advantages: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        *,
        temperature: float | torch.Tensor | None = None,
        softcap: float | None = None,
        normalizer: float | torch.Tensor | None = None,
        chunk_size: int | None = None,
        num_active: int | None = None,
        logit_scale: float | None = None,
        sampling_mask: torch.Tensor | None = None,
        entropy: bool = True,
        histogram: bool = False,
        **tensors: Unpack[OptionalTensors],
    ) -> IPOOutput | torch.Tensor:
        """``LinearIPOLoss`` over the head's own weight and bias.

        Without labels: the linear's ``[..., V]`` logits of ``hidden``, neither scaled nor capped.
        """
        refuse_unknown_names(IPOLMHead.forward, tensors)
        inputs: dict[str, Any] = {
            "inference_logprobs": inference_logprobs,
            "advantages": advantages,
            "loss_mask": loss_mask,
            "temperature": temperature,
            "softcap": softcap,
            "normalizer": normalizer,
            "chunk_size": chunk_size,
            "num_active": num_active,
            "logit_scale": logit_scale,
            "sampling_mask": sampling_mask,
            **tensors,
        }
        if labels is not None:
            inputs |= {"bias": self.bias, "entropy": entropy, "histogram": histogram}
            return super().forward(hidden, self.weight, labels, **inputs)
        is_plain = entropy is True and histogram is False
        if not is_plain or any(value is not None for value in inputs.values()):
            raise TypeError(
                "labels: expected a tensor beside the loss's other arguments, got None; "
                "without labels the head gives logits, of the hidden states alone"
            )
        return F.linear(hidden, self.weight, self.bias)


def _share_parametrization(source: nn.Module, target: nn.Module, name: str) -> None:
    """Makes the tensor ``name`` of ``target`` what the parametrization of that of ``source`` is.

    A placeholder is parametrized first, which makes ``name`` a computed property of ``target``.
    """
    target.register_parameter(name, nn.Parameter(torch.empty(0)))
    parametrize.register_parametrization(target, name, nn.Identity())
    parametrizations = target.get_submodule("parametrizations")
    setattr(parametrizations, name, source.get_submodule(f"parametrizations.{name}"))
