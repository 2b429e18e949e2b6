"""The loss as a loss of torchtitan's RL trainer, from the logits, whole or by chunks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss
from torchtitan.distributed.spmd_types import spmd_mesh_size

from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss_from_logits
from ipo_ext.integrations._batches import per_token_shares
from ipo_ext.integrations._refusals import (
    refuse_a_teacher,
    refuse_other_shapes,
    refuse_rules_on_sequences,
)
from ipo_ext.integrations._sampling import warn_of_another_distribution


class IPOLoss(BaseLoss):
    """``ipo_loss_from_logits`` as a ``BaseLoss``, alone or inside a ``ChunkedLossWrapper``.

    A token whose generator log-probability is not finite takes no part, as in torchtitan's own
    losses; nor does one whose label is ``IGNORE_INDEX``.

    Args:
        config: its ``ipo_config`` is the loss.
        compile_config: changes nothing: the loss is one operator already.

    Raises:
        ValueError: the config drops whole rollouts, of which a row holds several and a chunk a
            part, or asks for a teacher.
    """

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        ipo_config: IPOConfig = dataclasses.field(default_factory=IPOConfig)

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        refuse_a_teacher(config.ipo_config, "torchtitan")
        refuse_rules_on_sequences(
            config.ipo_config,
            "torchtitan packs several samples into a row, cuts rows into chunks and hands over no "
            "ends of samples",
        )
        self.ipo_config = config.ipo_config

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: float | torch.Tensor | None = None,
        *,
        generator_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        loss_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and metrics which torchtitan adds up over chunks, micro-batches and ranks.

        Args:
            logits: ``[batch, tokens, V]`` or ``[tokens, V]``: the whole vocabulary.
            labels, generator_logprobs, advantages, loss_mask: like logits without V; the labels
                are shifted already.
            global_valid_tokens: tokens that train, of all micro-batches and ranks; default 1.

        Raises:
            ValueError: tensors of other shapes, or logits of a part of the vocabulary.
        """
        _refuse_a_part_of_the_vocabulary(logits)
        refuse_other_shapes(
            "labels",
            labels,
            generator_logprobs=generator_logprobs,
            advantages=advantages,
            loss_mask=loss_mask,
        )
        mask = (loss_mask != 0) & generator_logprobs.isfinite() & (labels != IGNORE_INDEX)
        normalizer = _at_least_one(global_valid_tokens)
        out = ipo_loss_from_logits(
            logits,
            labels,
            generator_logprobs,
            advantages,
            mask,
            normalizer=normalizer,
            config=self.ipo_config,
        )
        return out.loss, _named_as_in_torchtitan(out.loss, out.metrics, mask.sum() / normalizer)


def check_config(config: Any) -> None:
    """Checks the whole config of torchtitan's RL trainer before anything starts.

    The loss hears of none of it. What makes the generator's distribution another than the trained
    one is warned of.

    Args:
        config: a ``Controller.Config``, with ``trainer.parallelism`` and ``generator.sampling``.

    Raises:
        ValueError: the vocabulary is split, or the generator samples at another temperature than
            1, by which torchtitan divides neither its logits nor vLLM's log-probabilities.
    """
    degree = config.trainer.parallelism.tensor_parallel_degree
    if degree > 1:
        raise ValueError(
            f"trainer.parallelism.tensor_parallel_degree: expected 1, got {degree}: this loss "
            "knows no shards of the vocabulary"
        )
    sampling = config.generator.sampling
    if sampling.temperature != 1:
        raise ValueError(
            f"generator.sampling.temperature: expected 1, got {sampling.temperature!r}, by which "
            "torchtitan divides neither the trained logits nor the generator's log-probabilities"
        )
    warn_of_another_distribution({"top_p": sampling.top_p}, stacklevel=3)


def _refuse_a_part_of_the_vocabulary(logits: torch.Tensor) -> None:
    degree = spmd_mesh_size("tp")
    if isinstance(logits, DTensor) or degree > 1:
        got = f"a DTensor of {logits.placements}" if isinstance(logits, DTensor) else "a shard"
        raise ValueError(
            f"logits: expected a plain tensor of the whole vocabulary, got {got}: this loss knows "
            "no shards; set parallelism.tensor_parallel_degree=1 and "
            'parallelism.spmd_backend="spmd_types"'
        )


def _at_least_one(tokens: float | torch.Tensor | None) -> float | torch.Tensor:
    if isinstance(tokens, torch.Tensor):
        return tokens.clamp(min=1)
    return 1 if tokens is None else max(tokens, 1)


def _named_as_in_torchtitan(
    loss: torch.Tensor, metrics: Any, share: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Its suffixes say how to combine: ``/mean`` by adding up, ``/max`` by the largest."""
    named = {f"loss/ipo/{name}/mean": value for name, value in per_token_shares(metrics, share)}
    lowest, highest = metrics.extremes.unbind()
    return {
        "loss/mean": loss.detach(),
        "trainer/entropy/mean": named.pop("loss/ipo/entropy/mean"),
        "bit_wise/logprob_diff/max": torch.maximum(-lowest, highest).clamp(min=0),
        **named,
    }
