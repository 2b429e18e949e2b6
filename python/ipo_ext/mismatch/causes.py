"""Why trainer and engine are apart: each cause is one function, which looks for its evidence.

Causes that can be told for sure are hypotheses under which the log-ratios of a sample become
smaller: the best is taken, and the others are looked for in what it leaves. What no hypothesis
explains is compared with measured levels, which are shared by causes that look alike
(``lookalikes``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from .counterfactuals import (
    PREVIOUS,
    PREVIOUS_HEAD,
    Hypothesis,
    Laboratory,
    Truncation,
)
from .lookalikes import LEVELS, level_of
from .statistics import FAR, UNLIKELY, Statistics, is_far, measure

SURE, ALIKE, CLEAN, OPEN = "sure", "alike", "clean", "open"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A cause.

    Attributes:
        certainty: ``SURE``; ``ALIKE``, where others look the same; ``CLEAN``, nothing to mend;
            ``OPEN``, what could not be looked for.
        title: the cause in a few words, with its twin where it has one.
        evidence: what was measured.
        advice: what to do.
    """

    certainty: str
    title: str
    evidence: str
    advice: str = ""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A hypothesis that explains more of a sample than the one before it, as a finding."""

    hypothesis: Hypothesis
    left: float
    finding: Finding


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Log-ratios ``[n]`` of the same tokens under two hypotheses."""

    before: torch.Tensor
    after: torch.Tensor

    @property
    def left(self) -> float:
        """The share of the squared log-ratios that is left; each square counts as at most 1."""
        return _squares(self.after).mean().item() / max(_squares(self.before).mean().item(), 1e-30)

    @property
    def is_no_chance(self) -> bool:
        gains = _squares(self.before) - _squares(self.after)
        error = gains.std() / math.sqrt(len(gains))
        return len(gains) >= _FEWEST and bool(gains.mean() > _STANDARD_ERRORS * error)

    def __str__(self) -> str:
        return f"the mean of |x| falls from {_size(self.before)} to {_size(self.after)} nats"


_FEW_ZEROS = 10  # impossible ones, which a grammar may make
_FEWEST = 30  # tokens, for a cause to be named
_STANDARD_ERRORS = 4
_NOTHING = 1e-9  # a mean square that is float32's rounding: no cause is looked for in it

# The share of the squares that a cause may leave, to be named. A shift leaves next to nothing; old
# weights and a truncation stand beside the noise of low precision.
_LEFT = {"shift": 0.1, "weights": 0.75, "temperature": 0.5, "truncation": 0.75}

# The mean square has one valley: it is looked for coarsely, then around the best, twice.
_TEMPERATURES = (0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
_FINER = ((-0.1, -0.05, 0.05, 0.1), (-0.03, -0.02, -0.01, 0.01, 0.02, 0.03))
_TRUNCATIONS = (
    *(Truncation("top_p", step / 100) for step in range(50, 100)),
    *(Truncation("top_k", k) for k in (2, 5, 10, 20, 30, 40, 50, 64, 100)),
    *(Truncation("min_p", share) for share in (0.01, 0.02, 0.05, 0.1, 0.2)),
)


def causes(laboratory: Laboratory, statistics: Statistics) -> list[Finding]:
    """Everything that could be found, the surest first."""
    found_at_once = (files_and_model(laboratory), zeros(statistics), rounded(laboratory))
    findings = [each for each in found_at_once if each]
    hypothesis = Hypothesis()
    for _ in range(len(_LOOKED_FOR)):
        if _mean_square(laboratory, hypothesis) < _NOTHING:
            break
        found = [look(laboratory, hypothesis) for look in _LOOKED_FOR]
        candidates = [each for each in found if each is not None]
        if not candidates:
            break
        best = min(candidates, key=lambda each: each.left)
        findings.append(best.finding)
        hypothesis = best.hypothesis
    if spoiled := broken(laboratory, hypothesis, statistics):
        findings.append(spoiled)
    findings.append(what_is_left(laboratory, hypothesis, statistics, spoiled is not None))
    if laboratory.policy is None:
        findings.append(without_a_model())
    return findings


# ---------------------------------------------------------------------------------------------
# Values that say by themselves what they are


def files_and_model(laboratory: Laboratory) -> Finding | None:
    """Whether the trainer's values in the files are the model's, which the causes are told by."""
    policy, chosen = laboratory.policy, laboratory.from_files
    if policy is None or not chosen.any():
        return None
    files, model = laboratory.trainer[chosen], laboratory.trainer_of(Hypothesis())[chosen]
    apart = measure(files, model)
    level = level_of(apart.k3)
    if level is LEVELS[0]:
        return None  # as float32's rounding leaves them
    figures = (
        f"k3 between them is {apart.k3:.2g} nats a token, and their difference has a standard "
        f"deviation of {apart.deviation:.2g}; causes below compare the engine with the model, "
        "numbers and tables with the files' values"
    )
    if level.is_clean:
        title = f"the files' trainer log-probabilities are those of {policy.name} in low precision"
        return Finding(CLEAN, title, figures)
    return Finding(
        SURE,
        f"the files' trainer log-probabilities are not those of {policy.name}",
        figures,
        "give the weights that the trainer had, and --temperature if it divides logits by another "
        "number than the files say; or leave --model out, to compare the files' values alone",
    )


def zeros(statistics: Statistics) -> Finding | None:
    """Zeros where a value is missing: no engine is certain of what the trainer finds unlikely."""
    if not statistics.impossible_zeros or statistics.zeros == statistics.tokens:
        return None
    evidence = (
        f"{statistics.zeros:,} of {statistics.tokens:,} tokens have a log-probability of exactly "
        f"0, a probability of 1; the trainer's is below {UNLIKELY:g} for "
        f"{statistics.impossible_zeros:,} of them"
    )
    title = "missing log-probabilities, written as 0"
    advice = "leave these tokens out of the loss mask; they were inserted by a tool or a template"
    if statistics.impossible_zeros < _FEW_ZEROS:
        title += ", or tokens to which a grammar or a truncated sampler left no other"
        return Finding(ALIKE, title, evidence, f"{advice}, or were not the policy's choice")
    return Finding(
        SURE,
        title,
        evidence,
        f"{advice}, or the engine was not asked for log-probabilities",
    )


def rounded(laboratory: Laboratory) -> Finding | None:
    """Values that were stored in bfloat16: none needs more than its 8 bits of a mantissa."""
    values = laboratory.engine[(laboratory.engine != 0) & laboratory.engine.isfinite()]
    if len(values) < _FEWEST or not torch.equal(values.bfloat16().double(), values):
        return None
    return Finding(
        SURE,
        "log-probabilities that were stored in bfloat16",
        f"each of {len(values):,} of the engine's values is a number of bfloat16",
        "keep them in float32: rounding alone makes log-ratios of 0.2% of the log-probability",
    )


# ---------------------------------------------------------------------------------------------
# Hypotheses


def shift(laboratory: Laboratory, so_far: Hypothesis) -> Candidate | None:
    """The engine's values stand one place too early or too late."""
    if so_far.shift:
        return None
    tried = [_tried(laboratory, so_far, "shift", shift=places) for places in (-1, 1)]
    best = _best(tried)
    if best is None:
        return None
    hypothesis, comparison = best
    late = hypothesis.shift > 0
    return Candidate(
        hypothesis,
        comparison.left,
        Finding(
            SURE,
            f"a shift by one token ({hypothesis.shift:+d})",
            f"compared with the engine's value one place {'later' if late else 'earlier'}, "
            f"{comparison}",
            "the list of log-probabilities starts "
            + ("with one that belongs to no sampled token" if late else "one token late")
            + "; the log-probability of a token belongs in its own place",
        ),
    )


def weights(laboratory: Laboratory, so_far: Hypothesis) -> Candidate | None:
    """The engine had the weights of before, all of them or those of the head."""
    if PREVIOUS not in laboratory.weights or so_far.weights in (PREVIOUS, PREVIOUS_HEAD):
        return None
    tried = [
        _tried(laboratory, so_far, "weights", weights=old) for old in (PREVIOUS, PREVIOUS_HEAD)
    ]
    best = _best(tried)
    if best is None:
        return None
    hypothesis, comparison = best
    head_alone = hypothesis.weights == PREVIOUS_HEAD
    assert laboratory.previous is not None
    return Candidate(
        hypothesis,
        comparison.left,
        Finding(
            SURE,
            "an old head over new weights" if head_alone else "old weights",
            f"with {'the head' if head_alone else 'the weights'} of {laboratory.previous.name}, "
            f"{comparison}",
            "the engine did not take the new head: reload it by all of state_dict(), "
            "lm_head.weight among it, even if it is tied to the embeddings"
            if head_alone
            else "these rollouts are stale by design, or the engine's weights were not replaced",
        ),
    )


def temperature(laboratory: Laboratory, so_far: Hypothesis) -> Candidate | None:
    """The engine's logits were divided by another number than the trainer's, or by none."""
    if laboratory.policy is None or so_far.temperature is not None:
        return None
    nearest = _nearest_temperature(laboratory, so_far, _TEMPERATURES)
    for steps in _FINER:
        around = [round(nearest + step, 2) for step in (0.0, *steps) if nearest + step > 0]
        nearest = _nearest_temperature(laboratory, so_far, around)
    best = _best([_tried(laboratory, so_far, "temperature", temperature=nearest)])
    if best is None:
        return None
    hypothesis, comparison = best
    found = hypothesis.temperature
    assert found is not None
    divided_by = laboratory.temperatures.unique().tolist()
    trainer = ", ".join(f"{each:g}" for each in divided_by[:3])
    evidence = f"at temperature {found:g} instead of {trainer}, {comparison}"
    raw = abs(found - 1) < 0.015
    unless = ""
    if laboratory.from_files.any():
        unless = f"; give --temperature {found:g} if the trainer divides by it already"
    return Candidate(
        hypothesis,
        comparison.left,
        Finding(
            SURE,
            "raw log-probabilities of the engine, before its temperature"
            if raw
            else f"another temperature: the engine's log-probabilities are at {found:g}",
            evidence,
            'ask for processed ones (vLLM: logprobs_mode="processed_logprobs")'
            if raw
            else f"divide the trainer's logits by {found:g} too, or sample at {trainer}{unless}",
        ),
    )


def truncation(laboratory: Laboratory, so_far: Hypothesis) -> Candidate | None:
    """The engine renormalised over the tokens that top_p, top_k or min_p left."""
    if laboratory.policy is None or so_far.truncation is not None:
        return None
    engine = laboratory.engine_of(so_far)
    columns = engine[:, None] - laboratory.truncated(so_far, _TRUNCATIONS)
    known = ~engine.isnan()
    nearest = int(_squares(columns[known]).mean(0).argmin())
    best = _best([_tried(laboratory, so_far, "truncation", truncation=_TRUNCATIONS[nearest])])
    if best is None:
        return None
    hypothesis, comparison = best
    return Candidate(
        hypothesis,
        comparison.left,
        Finding(
            SURE,
            f"renormalised by a truncated sampler: about {hypothesis.truncation}",
            f"renormalised over what {hypothesis.truncation} keeps, {comparison}",
            "sample with top_p=1, top_k=0 and min_p=0, or take raw log-probabilities: the "
            "trainer's softmax is over the whole vocabulary, so every ratio is below 1",
        ),
    )


_LOOKED_FOR = (shift, weights, temperature, truncation)


def _nearest_temperature(
    laboratory: Laboratory, so_far: Hypothesis, temperatures: Sequence[float]
) -> float:
    engine = laboratory.engine_of(so_far)
    columns = laboratory.at_temperatures(so_far, temperatures) - engine[:, None]
    known = ~engine.isnan()
    return temperatures[int(_squares(columns[known]).mean(0).argmin())]


def _tried(
    laboratory: Laboratory, so_far: Hypothesis, what: str, **changed: object
) -> tuple[Hypothesis, Comparison] | None:
    """A changed hypothesis and what it changes; None if that is too little, or may be chance."""
    hypothesis = dataclasses.replace(so_far, **changed)  # type: ignore[arg-type]
    comparison = _compared(laboratory, so_far, hypothesis)
    named = comparison.left <= _LEFT[what] and comparison.is_no_chance
    return (hypothesis, comparison) if named else None


def _best(
    tried: Sequence[tuple[Hypothesis, Comparison] | None],
) -> tuple[Hypothesis, Comparison] | None:
    found = [each for each in tried if each is not None]
    return min(found, key=lambda each: each[1].left) if found else None


def _compared(laboratory: Laboratory, before: Hypothesis, after: Hypothesis) -> Comparison:
    pair = [_log_ratios(laboratory, hypothesis) for hypothesis in (before, after)]
    known = ~(pair[0].isnan() | pair[1].isnan()) & (laboratory.engine != 0)
    return Comparison(pair[0][known], pair[1][known])


def _log_ratios(laboratory: Laboratory, hypothesis: Hypothesis) -> torch.Tensor:
    return laboratory.trainer_of(hypothesis) - laboratory.engine_of(hypothesis)


def _mean_square(laboratory: Laboratory, hypothesis: Hypothesis) -> float:
    x = _log_ratios(laboratory, hypothesis)
    x = x[~x.isnan()]
    return _squares(x).mean().item() if len(x) else 0.0


def _squares(x: torch.Tensor) -> torch.Tensor:
    """At most 1 each: a few broken tokens decide nothing."""
    return (x * x).clamp(max=1.0)


def _size(x: torch.Tensor) -> str:
    return f"{x.abs().clamp(max=100).mean():.2g}"


# ---------------------------------------------------------------------------------------------
# What is left


def broken(
    laboratory: Laboratory, hypothesis: Hypothesis, statistics: Statistics
) -> Finding | None:
    """Values that no arithmetic and no weights make: infinite ones, and what stands in for them."""
    x = _log_ratios(laboratory, hypothesis)[laboratory.engine != 0]
    left = int(is_far(x).sum())
    far = 0 if hypothesis.shift else statistics.far  # a shift explains what is far without it
    counts = [
        f"{count:,} {what}"
        for count, what in (
            (statistics.infinite_inference, "of the engine's values are infinite"),
            (statistics.infinite_trainer, "of the trainer's values are infinite"),
            (far, f"tokens have |x| above {FAR:g}"),
            (0 if far else left, f"of the {len(x):,} that were looked at have |x| above {FAR:g}"),
        )
        if count
    ]
    if not counts:
        return None
    return Finding(
        ALIKE,
        "log-probabilities that are infinite, or too far apart to be compared: missing values, "
        "numbers that stand in for them, or tokens that one side could not have sampled",
        f"of {statistics.tokens:,} tokens: {', '.join(counts)}",
        "look at the farthest tokens, below; leave tokens without a log-probability out of the "
        "loss mask, and write null for what is missing",
    )


def what_is_left(
    laboratory: Laboratory, hypothesis: Hypothesis, statistics: Statistics, is_broken: bool
) -> Finding:
    """The level of the mismatch that no hypothesis explains, and the causes of that level."""
    if statistics.zeros == statistics.tokens:
        return all_zero(statistics)
    trainer, engine = laboratory.trainer_of(hypothesis), laboratory.engine_of(hypothesis)
    x = trainer - engine
    known = ~x.isnan() & ~is_far(x) & (laboratory.engine != 0)
    if not known.any():
        return Finding(
            OPEN,
            "nothing is left to be explained",
            "no other token has two log-probabilities that can be compared",
        )
    left = measure(trainer[known], engine[known])
    of_all = _is_of_all_tokens(laboratory, hypothesis) and not is_broken
    k3 = statistics.overall.k3 if of_all and not statistics.impossible_zeros else left.k3
    level = level_of(k3)
    evidence = (
        f"{_compared_with(laboratory, hypothesis)}k3 is {k3:.2g} nats a token and x has a "
        f"standard deviation of {left.deviation:.2g}; {level.measured}"
    )
    if not level.is_clean:
        return Finding(ALIKE, level.title, evidence, _advice(level.advice, laboratory))
    if is_broken:
        return Finding(OPEN, f"of the other tokens, {level.title}", evidence)
    return Finding(CLEAN, level.title, evidence)


def all_zero(statistics: Statistics) -> Finding:
    """Nothing can be said of an engine that is certain of every token."""
    return Finding(
        ALIKE,
        "processed log-probabilities of a sampler that left one token (temperature 0, top_k=1), "
        "or none at all, written as 0",
        f"all {statistics.tokens:,} tokens have a log-probability of exactly 0, a probability of "
        f"1; the trainer's is below {UNLIKELY:g} for {statistics.impossible_zeros:,} of them",
        "sample at the trainer's temperature from all tokens, and ask for log-probabilities",
    )


def _is_of_all_tokens(laboratory: Laboratory, hypothesis: Hypothesis) -> bool:
    """Whether what was measured of every token is what the sample is compared by."""
    of_model = laboratory.policy is not None and bool(laboratory.from_files.any())
    return hypothesis == Hypothesis() and not of_model


def _compared_with(laboratory: Laboratory, hypothesis: Hypothesis) -> str:
    after = "after that, " if hypothesis != Hypothesis() else ""
    if laboratory.policy is None or not laboratory.from_files.any():
        return after
    return f"{after}{laboratory.policy.name} and the engine: "


def _advice(advice: str, laboratory: Laboratory) -> str:
    if laboratory.previous is not None:
        return f"{advice}; the weights of {laboratory.previous.name} do not explain it"
    return f"{advice}; --previous DIR tells stale weights, and a stale head, from the rest"


def without_a_model() -> Finding:
    return Finding(
        OPEN,
        "temperature, raw values, truncation and old weights were not looked for",
        "they need a model: the file's own log-probabilities were compared",
        "--model DIR",
    )
