"""The loss, and log-probabilities, as an ``output_processor`` of Megatron-Core's ``GPTModel``: from
the hidden states and the vocabulary-parallel output layer, with no logits beyond a chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ipo_ext.batch import LossBatch
from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss_from_hidden, linear_token_logprobs
from ipo_ext.integrations._refusals import refuse_other_shapes, refuse_rules_on_sequences
from ipo_ext.output import IPOOutput

_SEQUENCES = ("cu_seqlens", "sequence_ids")


class IPOLossProcessor:
    """``ipo_loss_from_hidden`` in place of ``GPTModel``'s output layer and cross-entropy.

    The model's output is then an ``IPOOutput``. Where the vocabulary is split over tensor-parallel
    ranks, each works on its own columns, and loss, metrics and log-probabilities are the same bits
    on all of them; the hidden states' gradient is what Megatron's own output layer would give.

    Args:
        config: which tokens and sequences count, and what they pay; default ``IPOConfig()``.
        vocab_size: tokens that there are; the columns behind them, with which Megatron pads the
            vocabulary, then take no part. Default: all columns do, as in Megatron's own loss.
        softcap, chunk_size, histogram: as for ``ipo_loss_from_hidden``.

    Example:
        >>> processor = IPOLossProcessor(IPOConfig(kl_tau=0.0))
        >>> batch = LossBatch(inference_logprobs, advantages, loss_mask, normalizer=num_tokens)
        >>> out = model(tokens, positions, None, labels=labels, output_processor=processor,
        ...             output_processor_context=batch)
        >>> out.loss.backward()
    """

    def __init__(
        self,
        config: IPOConfig | None = None,
        *,
        vocab_size: int | None = None,
        softcap: float | None = None,
        chunk_size: int | None = None,
        histogram: bool = False,
    ) -> None:
        self.config = config if config is not None else IPOConfig()
        self.vocab_size = vocab_size
        self.options: dict[str, Any] = {
            "softcap": softcap,
            "chunk_size": chunk_size,
            "histogram": histogram,
        }

    def __call__(self, *, context: LossBatch, **given: Any) -> IPOOutput:
        """As ``GPTModel`` calls it.

        Args:
            context: the ``output_processor_context``: a ``LossBatch`` of ``[B, S]``. Its
                ``cu_seqlens`` are by default those of ``packed_seq_params``, the padded ones where
                there are any; without either rules on whole sequences take each of the B rows for
                one, and metrics are of the whole batch.
            given: what ``GPTModel`` hands over; ``labels``: ``[B, S]``, where ``labels[b, s]`` is
                the token that position ``s`` predicts, as for Megatron's own loss.

        Raises:
            TypeError: ``context`` is no ``LossBatch``.
            ValueError: tensors of other shapes, the model is in inference, or an option of the
                model that the loss would ignore.
        """
        if not isinstance(context, LossBatch):
            raise TypeError(
                "output_processor_context: expected a LossBatch, got "
                f"{type(context).__name__}; pass ipo_ext.LossBatch(inference_logprobs, advantages, "
                "loss_mask)"
            )
        layer = _OutputLayer.of(given, self.vocab_size)
        labels = _labels(given)
        refuse_other_shapes(
            "labels",
            labels,
            inference_logprobs=context.inference_logprobs,
            advantages=context.advantages,
            loss_mask=context.loss_mask,
        )
        _refuse_another_mask(given["loss_mask"], context.loss_mask)
        inputs = context.arguments()
        if not any(name in inputs for name in _SEQUENCES):
            if given["config"].context_parallel_size > 1:
                refuse_rules_on_sequences(
                    self.config,
                    "under context parallelism a rank has parts of sequences; give LossBatch their "
                    "sequence_ids, num_sequences and cp_group",
                )
            elif (packed := given["packed_seq_params"]) is not None:
                inputs["cu_seqlens"] = _ends_of_sequences(packed)
        return ipo_loss_from_hidden(
            layer.hidden,
            labels=labels,
            config=self.config,
            **layer.arguments,
            **self.options,
            **inputs,
        )


class TokenLogprobsProcessor:
    """``linear_token_logprobs`` likewise: the model's output is log-probabilities and entropies.

    Args:
        vocab_size: as for ``IPOLossProcessor``.
        softcap, chunk_size: as for ``linear_token_logprobs``.
    """

    def __init__(
        self,
        *,
        vocab_size: int | None = None,
        softcap: float | None = None,
        chunk_size: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.options: dict[str, Any] = {"softcap": softcap, "chunk_size": chunk_size}

    def __call__(
        self, *, context: float | torch.Tensor | None, **given: Any
    ) -> tuple[torch.Tensor, ...]:
        """As ``GPTModel`` calls it.

        Args:
            context: the temperature: a number, or a tensor ``[B, S]``; ``None`` for 1.
            given: as for ``IPOLossProcessor``; a label of -100 takes no part.

        Returns:
            Log-probabilities and entropies, each float32 ``[B, S]``, both differentiable.

        Raises:
            ValueError: as for ``IPOLossProcessor``.
        """
        layer = _OutputLayer.of(given, self.vocab_size)
        labels = _labels(given)
        if given["loss_mask"] is not None:
            labels = labels.masked_fill(given["loss_mask"] == 0, -100)
        return linear_token_logprobs(
            layer.hidden, labels=labels, temperature=context, **layer.arguments, **self.options
        )


@dataclasses.dataclass(frozen=True)
class _OutputLayer:
    """The hidden states in the order of the labels, and what makes logits of them."""

    hidden: torch.Tensor  # [B, S, H], or [S/tp, H] of a batch of one under sequence parallelism
    arguments: dict[str, Any]

    @staticmethod
    def of(given: dict[str, Any], vocab_size: int | None) -> _OutputLayer:
        output_layer, config = given["output_layer"], given["config"]
        _refuse_what_is_not_honoured(given)
        weight = given["output_weight"]  # of tied embeddings
        if weight is None:
            weight = output_layer.weight
        group = output_layer.tp_group
        arguments: dict[str, Any] = {"weight": weight, "bias": output_layer.bias}
        hidden = given["hidden_states"]
        if config.use_mup:
            arguments["logit_scale"] = given["scale_logits"](torch.ones(())).item()
        if group is None or group.size() == 1:
            _refuse_too_few_columns(vocab_size, len(weight))
            arguments.update(_without_padding(weight, output_layer.bias, vocab_size))
            return _OutputLayer(hidden.transpose(0, 1), arguments)
        arguments["tp_group"] = group
        if vocab_size is not None:
            arguments.update(vocab_size=vocab_size, vocab_start=group.rank() * len(weight))
        if output_layer.sequence_parallel:
            if hidden.shape[1] == 1:  # then each rank has a run of the tokens
                arguments["sequence_parallel"] = True
                return _OutputLayer(hidden.flatten(0, 1), arguments)
            # Its backward pass sums over ranks what each has of the gradient.
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )
            arguments["reduce_hidden_grad"] = False
        return _OutputLayer(hidden.transpose(0, 1), arguments)


def _without_padding(
    weight: torch.Tensor, bias: torch.Tensor | None, vocab_size: int | None
) -> dict[str, torch.Tensor | None]:
    return {
        "weight": weight[:vocab_size],
        "bias": None if bias is None else bias[:vocab_size],
    }


def _refuse_too_few_columns(vocab_size: int | None, columns: int) -> None:
    if vocab_size is not None and vocab_size > columns:
        raise ValueError(
            f"vocab_size: expected at most the output layer's {columns} columns, got {vocab_size}"
        )


def _labels(given: dict[str, Any]) -> torch.Tensor:
    labels = given["labels"]
    if labels is None:
        raise ValueError(
            "labels: expected [B, S], got None; call the model with labels, the tokens that "
            "positions predict"
        )
    return labels


def _refuse_another_mask(of_model: torch.Tensor | None, of_batch: torch.Tensor) -> None:
    if of_model is not None and of_model is not of_batch:
        raise ValueError(
            "loss_mask: expected None or the LossBatch's own tensor, got another one: the loss "
            "takes its mask from the LossBatch"
        )


def _refuse_what_is_not_honoured(given: dict[str, Any]) -> None:
    if given["inference_context"] is not None or given["runtime_gather_output"]:
        raise ValueError(
            "inference_context, runtime_gather_output: expected None, got what asks for logits; "
            "call the model without output_processor where it generates"
        )
    if given["config"].defer_embedding_wgrad_compute:
        raise ValueError(
            "config.defer_embedding_wgrad_compute: expected False, got True: the loss makes the "
            "output layer's gradient in its own pass and leaves nothing for later"
        )


def _ends_of_sequences(packed: Any) -> torch.Tensor:
    """Of a packed row; with what pads each of them, where something does."""
    padded = packed.cu_seqlens_q_padded
    return packed.cu_seqlens_q if padded is None else padded
