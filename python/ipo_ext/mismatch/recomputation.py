"""The trainer's log-probabilities of rollouts that lack them, a window of rollouts at a time.

Hidden states come from transformers and log-probabilities from ``linear_token_logprobs``, so no
logits of a whole sequence exist. A window is sorted by length, so that little is padded.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from .policy import Policy
from .rollouts import BadRecord, Rollout

_WINDOW = 64  # rollouts that are sorted by length
_TOKENS_AT_ONCE = 4096  # of a forward pass, padding included, unless one sequence alone is longer


def with_trainer_logprobs(
    rollouts: Iterable[Rollout], policy: Policy | None, temperature: float | None
) -> Iterator[Rollout]:
    """The same rollouts, in their order, each with the trainer's log-probabilities.

    Those that have them already keep them. ``temperature`` is used for all rollouts instead of the
    files'; where neither says one it is 1.
    """
    for window in _windows(rollouts):
        missing = [each for each in window if each.trainer_logprobs is None]
        if not missing:
            yield from window
            continue
        assert policy is not None, "the command asks for a model before it comes here"
        made = iter(_recomputed(missing, policy, temperature))
        yield from (next(made) if each.trainer_logprobs is None else each for each in window)


def _windows(rollouts: Iterable[Rollout]) -> Iterator[list[Rollout]]:
    iterator = iter(rollouts)
    while window := list(itertools.islice(iterator, _WINDOW)):
        yield window


def _recomputed(
    rollouts: Sequence[Rollout], policy: Policy, temperature: float | None
) -> list[Rollout]:
    made: list[Rollout] = list(rollouts)
    order = sorted(range(len(rollouts)), key=lambda place: len(rollouts[place]))
    for batch in _batches(order, [len(each) for each in rollouts]):
        of_batch = [rollouts[place] for place in batch]
        hidden = policy.hidden([each.token_ids for each in of_batch])
        for place, rollout, states in zip(batch, of_batch, hidden, strict=True):
            made[place] = dataclasses.replace(
                rollout,
                trainer_logprobs=_logprobs(rollout, states, policy, temperature),
                recomputed=True,
            )
    return made


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places in ascending length, as many as fit once they are padded to the last of them."""
    batch: list[int] = []
    for place in order:
        if batch and (len(batch) + 1) * lengths[place] > _TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _logprobs(
    rollout: Rollout, hidden: torch.Tensor, policy: Policy, temperature: float | None
) -> torch.Tensor:
    """float64 ``[T]``: of each sampled token under the state before it; NaN for the others."""
    states, labels, scale = predictions(rollout, hidden, temperature)
    logprobs = policy.head.logprobs(states, labels, scale)
    made = torch.full((len(rollout),), math.nan, dtype=torch.float64)
    made[predicted(rollout)] = logprobs.double().cpu()
    return made


def predicted(rollout: Rollout) -> torch.Tensor:
    """int64 ``[n]``: the sampled tokens that a state predicts: all but one in the first place."""
    places = rollout.sampled.nonzero()[:, 0]
    return places[places > 0]


def predictions(
    rollout: Rollout, hidden: torch.Tensor, temperature: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """States ``[n, H]`` that predict the sampled tokens, these ``[n]``, temperatures ``[n]``."""
    places = predicted(rollout)
    on_device = places.to(hidden.device)
    scale = temperature_of(rollout, temperature)
    return (
        hidden[on_device - 1],
        rollout.token_ids.to(hidden.device)[on_device],
        None if scale is None else scale[places].float().to(hidden.device),
    )


def temperature_of(rollout: Rollout, temperature: float | None) -> torch.Tensor | None:
    """float64 ``[T]``: the command line's, else the file's, else None, which is 1."""
    if temperature is None:
        return rollout.temperature
    return torch.full((len(rollout),), temperature, dtype=torch.float64)


def check_vocabulary(rollout: Rollout, vocabulary: int) -> None:
    """Raises ``BadRecord`` if a token is none of the model's."""
    largest = int(rollout.token_ids.max())
    if largest >= vocabulary:
        place = int((rollout.token_ids >= vocabulary).nonzero()[0])
        raise BadRecord(
            f"token ids: expected ids below {vocabulary}, the size of the model's vocabulary, got "
            f"{int(rollout.token_ids[place])} at position {place}; another model's tokenizer made "
            "them"
        )
