"""What the trainer would have said of a sample under another hypothesis about the engine.

A hypothesis is a shift, weights, a temperature and a truncation. Hidden states of the sampled rows
are kept, and logits made for some rows at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from ipo_ext import token_logprobs

from .policy import Head, Policy
from .recomputation import predicted, temperature_of
from .rollouts import Rollout

TRAINER, PREVIOUS, PREVIOUS_HEAD = "the trainer's", "the previous ones", "the previous head's"
_ROWS = 768  # tokens of the sample of which whole rows of logits are made
_LOGITS_AT_ONCE = 1 << 24
_BOUNDARY = 0.02  # an engine in low precision may keep a token this much beyond its nucleus


@dataclasses.dataclass(frozen=True)
class Truncation:
    """A sampler that renormalises over a part of the vocabulary: top_p, top_k or min_p."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """What the engine may have done. ``temperature`` None is what the trainer divides by."""

    shift: int = 0
    weights: str = TRAINER
    temperature: float | None = None
    truncation: Truncation | None = None


class Laboratory:
    """A sample, and with a model what its tokens' log-probabilities would be under a hypothesis.

    Attributes:
        engine: float64 ``[n]``, the engine's log-probabilities of the sample's tokens.
        trainer: float64 ``[n]``, the trainer's as they are.
        from_files: bool ``[n]``, those of ``trainer`` that a file holds, and no model made.
        temperatures: float64 ``[n]``, what the trainer divides logits by.
    """

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        policy: Policy | None,
        previous: Policy | None,
        temperature: float | None,
    ) -> None:
        self.rollouts, self.policy, self.previous = rollouts, policy, previous
        places = [_usable(rollout) for rollout in rollouts]
        if policy is not None:
            places = _thinned(places, _ROWS)
        self._places = places
        self.trainer = self._values("trainer_logprobs", 0)
        self.engine = self._values("inference_logprobs", 0)
        self.from_files = torch.cat(
            [
                torch.full((len(at),), not rollout.recomputed)
                for rollout, at in zip(rollouts, places, strict=True)
            ]
        )
        scales = [temperature_of(rollout, temperature) for rollout in rollouts]
        self.temperatures = torch.cat(
            [
                torch.ones(len(at), dtype=torch.float64) if scale is None else scale[at]
                for scale, at in zip(scales, places, strict=True)
            ]
        )
        self._hidden: dict[str, torch.Tensor] = {}
        self._trainer: dict[Hypothesis, torch.Tensor] = {}

    @property
    def weights(self) -> tuple[str, ...]:
        """Weights of which it can be asked."""
        if self.policy is None:
            return ()
        return (TRAINER, PREVIOUS, PREVIOUS_HEAD) if self.previous else (TRAINER,)

    def engine_of(self, hypothesis: Hypothesis) -> torch.Tensor:
        """float64 ``[n]``: what the engine said one place off; NaN where that is nothing finite."""
        engine = self._values("inference_logprobs", hypothesis.shift)
        return engine.where(engine.isfinite(), math.nan)

    def trainer_of(self, hypothesis: Hypothesis) -> torch.Tensor:
        """float64 ``[n]``: the trainer's log-probabilities under a hypothesis.

        With a model they are the model's under every hypothesis, the first among them: a file's
        beside a model's would let the model explain what no hypothesis does.
        """
        if self.policy is None or not len(self.trainer):
            return self.trainer
        of_trainer = dataclasses.replace(hypothesis, shift=0)
        if of_trainer not in self._trainer:
            self._trainer[of_trainer] = self._made(of_trainer)
        return self._trainer[of_trainer]

    def _made(self, hypothesis: Hypothesis) -> torch.Tensor:
        if hypothesis.truncation is not None:
            return self.truncated(hypothesis, [hypothesis.truncation])[:, 0]
        return self.at_temperatures(hypothesis, [hypothesis.temperature])[:, 0]

    def at_temperatures(
        self, hypothesis: Hypothesis, temperatures: Sequence[float | None]
    ) -> torch.Tensor:
        """float64 ``[n, temperatures]``; None is what the trainer divides by."""
        made = []
        for rows, logits, labels in self._logits(hypothesis.weights):
            columns = [
                token_logprobs(logits, labels, temperature=self._scale(rows, each, logits))[0]
                for each in temperatures
            ]
            made.append(torch.stack(columns, 1).double().cpu())
        return torch.cat(made)

    def truncated(self, hypothesis: Hypothesis, truncations: Sequence[Truncation]) -> torch.Tensor:
        """float64 ``[n, truncations]``: renormalised; -inf where a token could not be sampled."""
        made = []
        for rows, logits, labels in self._logits(hypothesis.weights):
            scale = self._scale(rows, hypothesis.temperature, logits)
            log_p = (logits / scale[:, None]).log_softmax(-1)
            made.append(_renormalised(log_p, labels, truncations).double().cpu())
        return torch.cat(made)

    # ----------------------------------------------------------------------------------------

    def _scale(self, rows: slice, given: float | None, like: torch.Tensor) -> torch.Tensor:
        scale = self.temperatures[rows].float().to(like.device)
        return scale if given is None else torch.full_like(scale, given)

    def _logits(self, weights: str) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Some rows at a time: which, their logits ``[rows, V]``, and the tokens that followed."""
        hidden, head = self._states_and_head(weights)
        labels = self._labels().to(hidden.device)
        size = max(1, _LOGITS_AT_ONCE // len(head.weight))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            yield rows, head.logits(hidden[rows]), labels[rows]

    def _states_and_head(self, weights: str) -> tuple[torch.Tensor, Head]:
        assert self.policy is not None
        if weights == TRAINER:
            return self._states(self.policy), self.policy.head
        assert self.previous is not None
        body = self.previous if weights == PREVIOUS else self.policy
        return self._states(body), self.previous.head

    def _states(self, policy: Policy) -> torch.Tensor:
        """``[n, H]``: the states that predict the sample's tokens."""
        if policy.name not in self._hidden:
            states = [
                policy.hidden([rollout.token_ids])[0][places.to(policy.device) - 1]
                for rollout, places in zip(self.rollouts, self._places, strict=True)
                if len(places)
            ]
            self._hidden[policy.name] = torch.cat(states)
        return self._hidden[policy.name]

    def _labels(self) -> torch.Tensor:
        pairs = zip(self.rollouts, self._places, strict=True)
        return torch.cat([rollout.token_ids[places] for rollout, places in pairs])

    def _values(self, name: str, shift: int) -> torch.Tensor:
        pairs = zip(self.rollouts, self._places, strict=True)
        return torch.cat([_shifted(rollout, name, places, shift) for rollout, places in pairs])


def _usable(rollout: Rollout) -> torch.Tensor:
    """int64: the sampled tokens of which both log-probabilities are known, and finite."""
    assert rollout.trainer_logprobs is not None
    places = predicted(rollout)
    known = (rollout.inference_logprobs + rollout.trainer_logprobs)[places].isfinite()
    return places[known]


def _thinned(places: Sequence[torch.Tensor], most: int) -> list[torch.Tensor]:
    """Evenly, to about ``most`` in all."""
    every = max(1, math.ceil(sum(map(len, places)) / most))
    return [each[::every] for each in places]


def _shifted(rollout: Rollout, name: str, places: torch.Tensor, shift: int) -> torch.Tensor:
    values: torch.Tensor = getattr(rollout, name)
    there = places + shift
    inside = (there >= 0) & (there < len(rollout))
    there = there.clamp(0, len(rollout) - 1)
    return torch.where(inside & rollout.sampled[there], values[there], math.nan)


def _renormalised(
    log_p: torch.Tensor, labels: torch.Tensor, truncations: Sequence[Truncation]
) -> torch.Tensor:
    """``[rows, truncations]`` of log-probabilities ``[rows, V]``."""
    of_label = log_p.gather(-1, labels[:, None])
    p = log_p.exp()
    likelier = p > of_label.exp()
    before = (p * likelier).sum(-1)  # the mass of all likelier tokens
    rank = likelier.sum(-1)
    ordered = p.sort(-1, descending=True).values
    mass = ordered.cumsum(-1)
    columns = []
    for each in truncations:
        if each.kind == "top_p":
            kept = (mass < each.value).sum(-1)
            outside = before > each.value + _BOUNDARY
        elif each.kind == "top_k":
            kept = torch.full_like(rank, int(each.value) - 1)
            outside = rank > each.value
        else:
            least = each.value * ordered[:, 0]
            kept = (ordered >= least[:, None]).sum(-1) - 1
            outside = of_label.exp()[:, 0] < least * (1 - _BOUNDARY)
        kept = kept.clamp(0, p.shape[-1] - 1)
        total = mass.gather(-1, kept[:, None])[:, 0]
        columns.append(torch.where(outside, -math.inf, of_label[:, 0] - total.log()))
    return torch.stack(columns, -1)
