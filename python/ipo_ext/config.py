"""The loss's settings: validated once, so that no operator has to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import torch

# In the order of csrc/math/mask_rules.h.
MaskRule = Literal["ratio", "dppo", "prob_diff", "kpop"]
KLScope = Literal["kept", "active"]
LogBound = Callable[[float, torch.dtype], float]


def is_number(value: object) -> bool:
    """Whether a setting is a real number, NumPy's included; True and False are slips."""
    # Real last: it is slow to ask, and nothing that torch.compile traces comes so far.
    return isinstance(value, (float, int, Real)) and not isinstance(value, bool)


def to_float(name: str, value: Any) -> float:
    """The number as a float; of an int beyond all floats a sentence instead of an OverflowError."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name}: expected a number that float64 holds, got one beyond 1.8e308"
        ) from None


@dataclasses.dataclass(frozen=True)
class IPOConfig:
    """Settings of the IPO+KL loss, under the field names of prime-rl's ``trainer.loss`` section.

    A token is kept where ``dppo_mask_low <= r <= dppo_mask_high``, decided on ``log r``, both ends
    inclusive; a kept token pays ``-A' * r + kl_tau * log(r)**2`` with
    ``A' = adv_tau * A + teacher_tau * (teacher_logprob - trainer_logprob)``
    (PrimeIntellect-ai/prime-rl pull request 2423; docs/math.md).

    Other losses of the family keep other tokens: ``IPOConfig.dppo``, ``icepop``, ``prob_diff``,
    ``kpop``.

    Args:
        dppo_mask_low: alpha, the smallest importance ratio kept; 0 keeps every small ratio. Under
            another rule: by how much the probability may fall.
        dppo_mask_high: beta, the largest importance ratio kept; ``inf`` keeps every finite ratio.
            Under another rule: by how much the probability may rise, or the largest Bernoulli KL.
        adv_tau: weight of the advantage.
        kl_tau: weight of the squared log-ratio.
        teacher_tau: weight of the teacher's log-ratio in the advantage; above 0 it needs
            ``teacher_logprobs``.
        mask_rule: what the bounds are compared with; docs/math.md, "The rules".
        kl_scope: whether the KL is paid by kept tokens alone or by every active one whose ratio
            is finite.
        rollout_min_ratio: a sequence with an active token whose ratio is below it is dropped whole,
            under any mask rule; 0 drops none. A sequence is a segment of ``cu_seqlens``, without
            them a row ``[T]`` of tokens ``[..., T]``.

    Raises:
        ValueError: a field breaks ``0 <= dppo_mask_low``, ``dppo_mask_low <= dppo_mask_high`` (a
            band on the ratio) or "finite and >= 0", a tau is more than float32 holds, or a
            field is not one of its words.
    """

    dppo_mask_low: float = 0.2
    dppo_mask_high: float = 5.0
    adv_tau: float = 1.0
    kl_tau: float = 1e-3
    teacher_tau: float = 0.0
    mask_rule: MaskRule = "ratio"
    kl_scope: KLScope = "kept"
    rollout_min_ratio: float = 0.0

    # Of an instance; no fields. Bounds are made once, but for a config made in a compiled graph.
    _made_bounds: ClassVar[dict[torch.dtype, tuple[float, float, float]]] = {}
    _has_rollout_rule: ClassVar[bool]

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            if (value := getattr(self, name)) not in words:
                raise ValueError(f"{name}: expected one of {', '.join(words)}, got {value!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _WORDS:
                continue
            if not is_number(value):
                raise ValueError(f"{field.name}: expected a number, got {value!r}")
            value = to_float(field.name, value)
            object.__setattr__(self, field.name, value)
            if field.name not in _BOUNDS and not 0 <= value < math.inf:
                raise ValueError(f"{field.name}: expected a finite number >= 0, got {value!r}")
            if field.name in _NUMBERS and value > _LARGEST_NUMBER:
                raise ValueError(
                    f"{field.name}: expected a number of at most {_LARGEST_NUMBER:.3g}, the "
                    f"largest of float32, got {value!r}"
                )
        low, high = self.dppo_mask_low, self.dppo_mask_high
        if not 0 <= low < math.inf:
            raise ValueError(f"dppo_mask_low: expected a finite number >= 0, got {low!r}")
        if self.mask_rule != "ratio" and not high >= 0:
            raise ValueError(f"dppo_mask_high: expected a number >= 0, got {high!r}")
        if self.mask_rule == "ratio" and not low <= high:
            raise ValueError(
                f"dppo_mask_high: expected a number >= dppo_mask_low ({low!r}), got {high!r}"
            )
        object.__setattr__(self, "_has_rollout_rule", bool(self.rollout_min_ratio > 0))
        if not torch.compiler.is_compiling():
            bounds = {dtype: self._bounds(dtype, log_bound) for dtype in _LOG_RANGE}
            object.__setattr__(self, "_made_bounds", bounds)

    @classmethod
    def dppo(cls, low: float = 0.2, high: float = 0.2, **taus: float) -> IPOConfig:
        """DPPO+KL, prime-rl's default before: a bound on the probability's change, by sign of A.

        With ``d = exp(trainer_logprob) - exp(inference_logprob)`` a token is dropped where
        ``A > 0`` and ``d > high``, or ``A <= 0`` and ``d < -low``; every active token pays the KL.
        ``taus`` are adv_tau, kl_tau and teacher_tau.
        """
        return cls(low, high, mask_rule="dppo", kl_scope="active", **taus)

    @classmethod
    def icepop(
        cls,
        low: float = 0.5,
        high: float = 5.0,
        rollout_min_ratio: float = 1e-5,
        *,
        kl_tau: float = 0.0,
        **taus: float,
    ) -> IPOConfig:
        """IcePop (prime-rl #2401): a band on the ratio, no KL, and no token of a broken rollout.

        A sequence contributes nothing when the ratio of any of its active tokens is below
        ``rollout_min_ratio``. ``taus`` are adv_tau and teacher_tau.
        """
        return cls(
            low,
            high,
            mask_rule="ratio",
            kl_tau=kl_tau,
            kl_scope="kept",
            rollout_min_ratio=rollout_min_ratio,
            **taus,
        )

    @classmethod
    def prob_diff(cls, threshold: float = 0.1, **taus: float) -> IPOConfig:
        """The IPO that prime-rl merged: drops where ``|d| > threshold``; all active pay the KL."""
        return cls(threshold, threshold, mask_rule="prob_diff", kl_scope="active", **taus)

    @classmethod
    def kpop(cls, threshold: float, **taus: float) -> IPOConfig:
        """KPop: dropped where the Bernoulli KL, in either direction, exceeds ``threshold``.

        Between the token's two probabilities, clamped to ``[1e-6, 1 - 1e-6]``; every active token
        pays the KL penalty.
        """
        return cls(0.0, threshold, mask_rule="kpop", kl_scope="active", **taus)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> IPOConfig:
        """The config of a ``trainer.loss`` section; an unknown field is a ValueError."""
        if not isinstance(mapping, Mapping) and not hasattr(mapping, "keys"):
            raise TypeError(
                f"mapping: expected a mapping of fields such as a dict, got "
                f"{type(mapping).__name__}; pass for instance {{'kl_tau': 0.001}}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in mapping.items():
            if name not in known:
                raise ValueError(
                    f"{name}: expected one of the fields {', '.join(known)}, got {name}={value!r}"
                )
        return cls(**mapping)

    @property
    def has_rollout_rule(self) -> bool:
        """Whether a token can drop its whole sequence."""
        return self._has_rollout_rule

    def settings(self, dtype: torch.dtype, log: LogBound | None = None) -> LossSettings:
        """The settings as every operator takes them, in the compute dtype ``dtype``.

        ``log`` takes the logarithms of a config that was made in a compiled graph; default
        ``log_bound``, which makes constants of bounds there.
        """
        made = self._made_bounds.get(dtype)
        low, high, rollout_low = self._bounds(dtype, log or log_bound) if made is None else made
        # float(): read here, or torch.compile (2.13) reads them inside the first of two calls of
        # the loss in a graph, and fails at the second.
        return LossSettings(
            low=low,
            high=high,
            mask_rule=get_args(MaskRule).index(self.mask_rule),
            kl_active=self.kl_scope == "active",
            has_rollout_rule=self.has_rollout_rule,
            rollout_low=rollout_low,
            **{name: float(getattr(self, name)) for name in _NUMBERS},
        )

    def _bounds(self, dtype: torch.dtype, log: LogBound) -> tuple[float, float, float]:
        """What the rules compare with; the last of rollouts. Those of ratios are logarithms."""
        low, high = self.dppo_mask_low, self.dppo_mask_high
        smallest = _LOG_RANGE[dtype][0]
        rollout_low = log(self.rollout_min_ratio, dtype) if self.has_rollout_rule else smallest
        if self.mask_rule == "ratio":
            return log(low, dtype), log(high, dtype), rollout_low
        # No min(): torch.compile (2.11) would make constants of bounds that change.
        low, high = (bound if bound < -smallest else -smallest for bound in (low, high))
        return low, high, rollout_low

    def log_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """The band's bounds on ``log r``: ``log_bound`` of both."""
        return log_bound(self.dppo_mask_low, dtype), log_bound(self.dppo_mask_high, dtype)


_WORDS: dict[str, tuple[str, ...]] = {
    "mask_rule": get_args(MaskRule),
    "kl_scope": get_args(KLScope),
}

_LARGEST_NUMBER = torch.finfo(torch.float32).max  # the loss may be computed in float32

_BOUNDS = ("dppo_mask_low", "dppo_mask_high")  # of which the rule says what they may be

# The fields that the operators take as they are.
_NUMBERS = [
    field.name
    for field in dataclasses.fields(IPOConfig)
    if field.name not in (*_BOUNDS, *_WORDS, "rollout_min_ratio")
]

# What every operator of the loss takes of a config: the list of csrc/math/settings.h.
if TYPE_CHECKING:  # a type checker is told what is read by name: it cannot follow _NUMBERS

    class LossSettings(tuple[float, ...]):
        teacher_tau: float
        has_rollout_rule: bool

        def __new__(cls, **settings: float) -> LossSettings: ...

else:
    LossSettings = NamedTuple(
        "LossSettings",
        [
            ("low", float),  # in the compute dtype, what the rule compares with
            ("high", float),
            *((name, float) for name in _NUMBERS),
            ("mask_rule", int),  # index in MaskRule
            ("kl_active", bool),
            ("has_rollout_rule", bool),
            ("rollout_low", float),  # a logarithm, as bounds of the ratio are
        ],
    )

# -max, and the largest number whose exp is finite. (The float32 nearest to log(max) overflows.)
_LOG_RANGE = {
    torch.float32: (-torch.finfo(torch.float32).max, 88.72283172607422),
    torch.float64: (-torch.finfo(torch.float64).max, 709.782712893384),
}


def log_bound(ratio: float, dtype: torch.dtype) -> float:
    """A bound on ``log r``, exactly representable in ``dtype`` (float32 or float64).

    The logarithm is taken in fp64, rounded once to nearest and clamped so that no bound is
    infinite and ``exp`` of none overflows (docs/math.md, "The band").
    """
    return _round_to(math.log(ratio) if ratio > 0 else -math.inf, dtype)


def _round_to(value: float, dtype: torch.dtype) -> float:
    smallest, largest = _LOG_RANGE[dtype]
    value = min(max(value, smallest), largest)
    if dtype == torch.float64:
        return value
    # To 24 bits, ties to even; plain arithmetic, which torch.compile can trace.
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)
