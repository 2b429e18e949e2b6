"""Numbers of any number of tokens in constant memory: sums that ``ipo_loss`` makes, and counts.

Every mean is read from ``IPOMetrics``, so what the report says of a band is what the loss does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from ipo_ext import IPOConfig, IPOMetrics, ipo_loss

from .rollouts import Rollout

_TOKENS_AT_ONCE = 1 << 16
_NAMES = 256  # versions or environments that are told apart; what comes after them is one more
OTHERS = "others"
EXTREMES = 20  # tokens that are kept to be shown
_CONTEXT = (16, 6)  # tokens before and after an extreme one

# Log-ratios without a mask: `kl_loss` is then the mean of x^2, and `teacher_kl`, with the engine in
# the teacher's place, the mean of -x.
_EVERY_TOKEN = IPOConfig(mask_rule="none", adv_tau=0.0, kl_tau=1.0)

BANDS = {
    "the default, ratio in [0.2, 5]": IPOConfig(),
    "ratio in [0.5, 2]": IPOConfig.icepop(0.5, 2.0),
    "ratio in [0.8, 1.25]": IPOConfig.icepop(0.8, 1.25),
    "prob_diff(0.1)": IPOConfig.prob_diff(0.1),
    "kpop(0.1)": IPOConfig.kpop(0.1),
}

# A truncated sampler may be certain of a token that the trainer gives 80%; of one below this it is
# not.
UNLIKELY = 0.05
FAR = 20.0  # nats: no engine samples what its trainer gives a probability of 2e-9 beside its own

# Half open: [edge, next edge). Positions count sampled tokens; log-probabilities are the engine's.
POSITIONS = (0, 1, 4, 16, 64, 256, 1024, 4096, 16384)
LOGPROBS = (-math.inf, -10.0, -6.0, -3.0, -1.0, -0.1)

# Of |x|: 2^k and 1.5 * 2^k, so that a bin is a third to a half as wide as it is far from 0.
HISTOGRAM_EDGES = (
    *(factor * 2.0**power for power in range(-10, 5) for factor in (1.0, 1.5)),
    2.0**5,
)


@dataclasses.dataclass(frozen=True)
class Extreme:
    """A token on which trainer and engine are far apart, and the tokens around it."""

    where: str
    position: int
    token_id: int
    before: list[int]
    after: list[int]
    log_ratio: float
    inference_logprob: float
    trainer_logprob: float


class Measured:
    """Names for the rows of ``IPOMetrics`` of a set of tokens, as Python numbers."""

    def __init__(self, metrics: IPOMetrics) -> None:
        values = metrics.tolist()
        self.k1: float = values["teacher_kl"]
        self.k2: float = values["kl_loss"] / 2
        self.k3: float = values["mismatch_kl"]
        self.ess: float = values["ess"]
        self.nonfinite: float = values["nonfinite"]
        self.smallest: float = values["log_ratio_min"]
        self.largest: float = values["log_ratio_max"]

    @property
    def mean(self) -> float:
        """Of the log-ratio x."""
        return -self.k1

    @property
    def deviation(self) -> float:
        """The standard deviation of x."""
        return math.sqrt(max(0.0, 2 * self.k2 - self.k1**2))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a set of tokens and what was measured of it."""

    name: str
    tokens: int
    measured: Measured


@dataclasses.dataclass(frozen=True)
class Band:
    """What a configuration drops, as shares of the tokens."""

    name: str
    dropped: float
    low: float
    high: float


class Statistics:
    """Of every token that was added. Read it after ``finish()``."""

    def __init__(self, bands: dict[str, IPOConfig] | None = None) -> None:
        self.configs = {**BANDS, **(bands or {})}
        self.rollouts = self.tokens = 0
        self.missing = 0  # sampled tokens without a log-probability of the engine or of the trainer
        self.zeros = 0  # tokens whose log-probability is exactly 0
        self.impossible_zeros = 0  # of those, tokens that the trainer finds unlikely
        self.infinite_inference = self.infinite_trainer = 0  # tokens with such a log-probability
        self.far = 0  # tokens with finite ones that are more than FAR apart, zeros aside
        self.extremes: list[Extreme] = []
        self.histogram = torch.zeros(2 * (len(HISTOGRAM_EDGES) + 1), dtype=torch.int64)
        self._sums: dict[tuple[str, str], IPOMetrics] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._waiting: list[Rollout] = []
        self._waiting_tokens = 0

    def add(self, rollout: Rollout) -> None:
        self.rollouts += 1
        self._waiting.append(rollout)
        self._waiting_tokens += len(rollout)
        if self._waiting_tokens >= _TOKENS_AT_ONCE:
            self.finish()

    def finish(self) -> None:
        """Measures the rollouts that wait for others, to be measured with them."""
        if self._waiting:
            self._measure(_Tokens(self._waiting))
        self._waiting, self._waiting_tokens = [], 0

    # What was measured ----------------------------------------------------------------------

    @property
    def overall(self) -> Measured:
        return Measured(self._sums["all", ""])

    def rows(self, kind: str) -> list[Row]:
        """``position``, ``logprob``, ``version`` or ``environment``; in the order of the names."""
        names = [name for found, name in self._sums if found == kind]
        order = {label: place for place, (label, _, _) in enumerate(_INTERVALS.get(kind, ()))}
        names.sort(key=lambda name: (order.get(name, 0), _natural(name)))
        return [
            Row(name, self._counts[kind, name], Measured(self._sums[kind, name])) for name in names
        ]

    def bands(self) -> list[Band]:
        return [
            Band(
                name,
                *(
                    float(self._sums["band", name][metric])
                    for metric in ("is_masked", "is_masked_low", "is_masked_high")
                ),
            )
            for name in self.configs
        ]

    def quantile(self, share: float) -> float:
        """The upper edge of the bin of |x| in which ``share`` of the tokens is reached, or NaN."""
        if not self.histogram.any():
            return math.nan
        side = len(HISTOGRAM_EDGES) + 1
        sizes = self.histogram[side:] + self.histogram[:side].flip(0)
        reached = (sizes.cumsum(0) >= share * sizes.sum()).nonzero()[0]
        return (*HISTOGRAM_EDGES, math.inf)[int(reached)]

    # Measuring ------------------------------------------------------------------------------

    def _measure(self, tokens: _Tokens) -> None:
        self.tokens += len(tokens)
        self.missing += tokens.missing
        if not len(tokens):
            return
        zero = tokens.inference == 0
        self.zeros += int(zero.sum())
        self.impossible_zeros += int((zero & (tokens.trainer < math.log(UNLIKELY))).sum())
        self.infinite_inference += int(tokens.inference.isinf().sum())
        self.infinite_trainer += int(tokens.trainer.isinf().sum())
        self.far += int((is_far(tokens.trainer - tokens.inference) & ~zero).sum())
        everything = torch.ones(len(tokens), dtype=torch.bool)
        self._count("all", "", tokens, everything)
        for kind, values in (("position", tokens.position), ("logprob", tokens.inference)):
            for name, low, high in _INTERVALS[kind]:
                self._count(kind, name, tokens, (values >= low) & (values < high))
        for kind, names in (("version", tokens.versions), ("environment", tokens.environments)):
            for name, chosen in _by_name(names):
                known = sum(found == kind for found, _ in self._sums)
                if (kind, name) not in self._sums and known >= _NAMES:
                    name = OTHERS
                self._count(kind, name, tokens, chosen)
        for name, config in self.configs.items():
            self._add("band", name, _metrics(tokens.trainer, tokens.inference, config))
        self.histogram += _histogram(tokens.trainer - tokens.inference)
        self.extremes = sorted(
            [*self.extremes, *tokens.extremes(EXTREMES)], key=lambda each: -abs(each.log_ratio)
        )[:EXTREMES]

    def _count(self, kind: str, name: str, tokens: _Tokens, chosen: torch.Tensor) -> None:
        count = int(chosen.sum())
        if count:
            metrics = _metrics(tokens.trainer[chosen], tokens.inference[chosen], _EVERY_TOKEN)
            self._add(kind, name, metrics)
            self._counts[kind, name] = self._counts.get((kind, name), 0) + count

    def _add(self, kind: str, name: str, metrics: IPOMetrics) -> None:
        before = self._sums.get((kind, name))
        self._sums[kind, name] = metrics if before is None else before + metrics


class _Tokens:
    """Sampled tokens of some rollouts, side by side, of which both log-probabilities are known."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self.rollouts = rollouts
        places, known, ordinals = [], [], []
        for rollout in rollouts:
            assert rollout.trainer_logprobs is not None, "recomputed before it is measured"
            both = ~(rollout.inference_logprobs.isnan() | rollout.trainer_logprobs.isnan())
            places.append((rollout.sampled & both).nonzero()[:, 0])
            ordinals.append((rollout.sampled.cumsum(0) - 1)[places[-1]])
            known.append(int(rollout.sampled.sum()) - len(places[-1]))
        self.missing = sum(known)
        self.place = torch.cat(places)
        self.position = torch.cat(ordinals)
        counts = torch.tensor([len(each) for each in places])
        self.rollout = torch.repeat_interleave(torch.arange(len(rollouts)), counts)
        self.trainer = self._gathered(places, "trainer_logprobs")
        self.inference = self._gathered(places, "inference_logprobs")
        self.versions = self._names(
            [each.versions[place] for place in which.tolist()] if each.versions else None
            for each, which in zip(rollouts, places, strict=True)
        )
        self.environments = self._names(
            [each.environment] * len(which) if each.environment is not None else None
            for each, which in zip(rollouts, places, strict=True)
        )

    def __len__(self) -> int:
        return len(self.place)

    def _gathered(self, places: list[torch.Tensor], name: str) -> torch.Tensor:
        pairs = zip(self.rollouts, places, strict=True)
        return torch.cat([getattr(each, name)[which] for each, which in pairs])

    def _names(self, names: Iterator[list[str] | None]) -> list[str] | None:
        """One for each token; None where no rollout of these knows any."""
        of_rollouts = list(names)
        if not any(of_rollouts):
            return None
        counts = torch.bincount(self.rollout, minlength=len(self.rollouts)).tolist()
        return [
            name
            for known, count in zip(of_rollouts, counts, strict=True)
            for name in known or ["not known"] * count
        ]

    def extremes(self, most: int) -> list[Extreme]:
        sizes = (self.trainer - self.inference).abs().nan_to_num(nan=math.inf)
        _, chosen = sizes.topk(min(most, len(sizes)))
        return [self._extreme(index) for index in chosen.tolist()]

    def _extreme(self, index: int) -> Extreme:
        rollout, place = self.rollouts[int(self.rollout[index])], int(self.place[index])
        before, after = _CONTEXT
        trainer, inference = float(self.trainer[index]), float(self.inference[index])
        return Extreme(
            rollout.where,
            int(self.position[index]),
            int(rollout.token_ids[place]),
            rollout.token_ids[max(0, place - before) : place].tolist(),
            rollout.token_ids[place + 1 : place + 1 + after].tolist(),
            trainer - inference,
            inference,
            trainer,
        )


def measure(trainer: torch.Tensor, inference: torch.Tensor) -> Measured:
    """Of float64 log-probabilities ``[n]``."""
    return Measured(_metrics(trainer, inference, _EVERY_TOKEN))


def is_far(x: torch.Tensor) -> torch.Tensor:
    """bool, of log-ratios: finite, and too large to be a difference of arithmetic or weights."""
    return x.isfinite() & (x.abs() > FAR)


def _metrics(trainer: torch.Tensor, inference: torch.Tensor, config: IPOConfig) -> IPOMetrics:
    nothing = torch.zeros_like(trainer)
    every = torch.ones_like(trainer, dtype=torch.bool)
    out = ipo_loss(trainer, inference, nothing, every, teacher_logprobs=inference, config=config)
    assert isinstance(out.metrics, IPOMetrics)
    return out.metrics


def _histogram(x: torch.Tensor) -> torch.Tensor:
    """int64 ``[2 * bins a side]``, from the most negative bin to the most positive; without NaN."""
    x = x[~x.isnan()]
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
    side = len(HISTOGRAM_EDGES) + 1
    size = torch.bucketize(x.abs(), edges, right=True)
    return torch.bincount(torch.where(x < 0, side - 1 - size, side + size), minlength=2 * side)


def _by_name(names: list[str] | None) -> Iterator[tuple[str, torch.Tensor]]:
    if names is None:
        return
    index = {name: number for number, name in enumerate(dict.fromkeys(names))}
    numbers = torch.tensor([index[name] for name in names])
    for name, number in index.items():
        yield name, numbers == number


def _intervals(edges: Sequence[float], unit: str) -> tuple[tuple[str, float, float], ...]:
    """A name and both ends of each interval between edges; the last has no end."""
    ends = (*edges[1:], math.inf)
    return tuple(
        (_interval_name(low, high, unit), low, high) for low, high in zip(edges, ends, strict=True)
    )


def _interval_name(low: float, high: float, unit: str) -> str:
    if unit == "position":
        last = "" if high == math.inf else f" to {high - 1:g}"
        return f"{low:g}{last}" if high - low > 1 and last else f"{low:g}{' on' * (not last)}"
    if low == -math.inf:
        return f"below {high:g}"
    return f"{low:g} to {0 if high == math.inf else high:g}"


_INTERVALS = {
    "position": _intervals(POSITIONS, "position"),
    "logprob": _intervals(LOGPROBS, "logprob"),
}


def _natural(name: str) -> tuple[int, float, str]:
    """Numbers in their order, before other names."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name
