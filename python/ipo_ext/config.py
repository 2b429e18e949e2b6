"""The loss's settings: validated once, so that no operator has to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypedDict, get_args

import torch
from typing_extensions import Unpack  # which torch requires

# In the order of csrc/math/mask_rules.h.
MaskRule = Literal["ratio", "dppo", "prob_diff", "kpop", "none"]
# In the order of csrc/math/policy_terms.h.
PolicyForm = Literal["ratio", "capped", "ppo_clip", "cispo", "reinforce"]
KLScope = Literal["kept", "active"]
LogBound = Callable[[float, torch.dtype], float]


class _AdvantageTaus(TypedDict, total=False):
    adv_tau: float
    teacher_tau: float


class _Taus(_AdvantageTaus, total=False):
    kl_tau: float


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

    Other losses of the family keep other tokens, ``IPOConfig.dppo``, ``icepop``, ``prob_diff`` and
    ``kpop``, or pay another policy term: ``ipo``, ``ppo``, ``cispo`` and ``tis``.

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
        pg_form: what a kept token pays for its policy; docs/math.md, "The policy term".
        ratio_cap: the largest ratio that ``capped`` and, unless it is None, ``ppo_clip`` count.
        clip_low, clip_high: the ratios between which ``ppo_clip`` and ``cispo`` clip.

    Raises:
        ValueError: a field breaks ``0 <= dppo_mask_low``, ``dppo_mask_low <= dppo_mask_high`` (a
            band on the ratio) or "finite and >= 0", a tau or a cap is more than float32 holds, a
            field is not one of its words, the policy form lacks a bound or does not read one that
            is given, or its bounds are in the wrong order.
    """

    dppo_mask_low: float = 0.2
    dppo_mask_high: float = 5.0
    adv_tau: float = 1.0
    kl_tau: float = 1e-3
    teacher_tau: float = 0.0
    mask_rule: MaskRule = "ratio"
    kl_scope: KLScope = "kept"
    rollout_min_ratio: float = 0.0
    pg_form: PolicyForm = "ratio"
    ratio_cap: float | None = None
    clip_low: float | None = None
    clip_high: float | None = None

    # Of an instance; no fields. Bounds are made once, but for a config made in a compiled graph.
    _made_bounds: ClassVar[dict[torch.dtype, dict[str, float]]] = {}
    _has_rollout_rule: ClassVar[bool]

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            if (value := getattr(self, name)) not in words:
                raise ValueError(f"{name}: expected one of {', '.join(words)}, got {value!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _WORDS or (value is None and field.name in _RATIO_BOUNDS):
                continue
            if not is_number(value):
                raise ValueError(f"{field.name}: expected a number, got {value!r}")
            value = to_float(field.name, value)
            object.__setattr__(self, field.name, value)
            if field.name not in _BOUNDS and not 0 <= value < math.inf:
                if field.name == "clip_high" and value == math.inf:
                    continue
                raise ValueError(f"{field.name}: expected a finite number >= 0, got {value!r}")
            if field.name in (*_NUMBERS, *_RATIO_BOUNDS) and value > _LARGEST_NUMBER:
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
        self._check_policy_form()
        object.__setattr__(self, "_has_rollout_rule", bool(self.rollout_min_ratio > 0))
        if not torch.compiler.is_compiling():
            bounds = {dtype: self._bounds(dtype, log_bound) for dtype in _LOG_RANGE}
            object.__setattr__(self, "_made_bounds", bounds)

    @classmethod
    def dppo(cls, low: float = 0.2, high: float = 0.2, **taus: Unpack[_Taus]) -> IPOConfig:
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
        **taus: Unpack[_AdvantageTaus],
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
    def prob_diff(cls, threshold: float = 0.1, **taus: Unpack[_Taus]) -> IPOConfig:
        """The IPO that prime-rl merged: drops where ``|d| > threshold``; all active pay the KL."""
        return cls(threshold, threshold, mask_rule="prob_diff", kl_scope="active", **taus)

    @classmethod
    def kpop(cls, threshold: float, **taus: Unpack[_Taus]) -> IPOConfig:
        """KPop: dropped where the Bernoulli KL, in either direction, exceeds ``threshold``.

        Between the token's two probabilities, clamped to ``[1e-6, 1 - 1e-6]``; every active token
        pays the KL penalty.
        """
        return cls(0.0, threshold, mask_rule="kpop", kl_scope="active", **taus)

    @classmethod
    def ipo(
        cls,
        eps: float = 0.3,
        max_importance_ratio: float = 1e4,
        *,
        kl_tau: float = 0.0,
        **taus: Unpack[_AdvantageTaus],
    ) -> IPOConfig:
        """The IPO of prime-rl since 2026-09: drops where ``|d| > eps``, caps the ratio, no KL.

        ``d`` as for ``dppo``. ``taus`` are adv_tau and teacher_tau.
        """
        return cls(
            eps,
            eps,
            mask_rule="prob_diff",
            pg_form="capped",
            ratio_cap=max_importance_ratio,
            kl_tau=kl_tau,
            **taus,
        )

    @classmethod
    def ppo(
        cls,
        low: float = 0.8,
        high: float = 1.2,
        max_importance_ratio: float | None = 1e4,
        *,
        kl_tau: float = 0.0,
        **taus: Unpack[_AdvantageTaus],
    ) -> IPOConfig:
        """PPO's clipped objective (arXiv 1707.06347) on every active token, as GRPO has it; no KL.

        ``-min(A r, A clip(r, low, high))`` with r capped at ``max_importance_ratio``, prime-rl's
        ``ppo``. ``taus`` are adv_tau and teacher_tau.
        """
        return cls(
            mask_rule="none",
            pg_form="ppo_clip",
            clip_low=low,
            clip_high=high,
            ratio_cap=max_importance_ratio,
            kl_tau=kl_tau,
            **taus,
        )

    @classmethod
    def cispo(
        cls,
        low: float = 0.0,
        high: float = 5.0,
        *,
        kl_tau: float = 0.0,
        **taus: Unpack[_AdvantageTaus],
    ) -> IPOConfig:
        """CISPO (arXiv 2506.13585) on every active token, prime-rl's ``cispo``; no KL.

        ``-clip(r, low, high) A log pi`` with the clipped ratio a constant. ``taus`` are adv_tau and
        teacher_tau.
        """
        return cls(
            mask_rule="none",
            pg_form="cispo",
            clip_low=low,
            clip_high=high,
            kl_tau=kl_tau,
            **taus,
        )

    @classmethod
    def tis(
        cls, cap: float = 2.0, *, kl_tau: float = 0.0, **taus: Unpack[_AdvantageTaus]
    ) -> IPOConfig:
        """Truncated importance sampling of each token: ``cispo`` from 0 to ``cap``."""
        return cls.cispo(0.0, cap, kl_tau=kl_tau, **taus)

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
        # float(): read here, or torch.compile (2.13) reads them inside the first of two calls of
        # the loss in a graph, and fails at the second.
        return LossSettings(
            mask_rule=get_args(MaskRule).index(self.mask_rule),
            kl_active=self.kl_scope == "active",
            has_rollout_rule=self.has_rollout_rule,
            pg_form=get_args(PolicyForm).index(self.pg_form),
            **{name: float(getattr(self, name)) for name in _NUMBERS},
            **(self._bounds(dtype, log or log_bound) if made is None else made),
        )

    def _bounds(self, dtype: torch.dtype, log: LogBound) -> dict[str, float]:
        """What rules and policy forms compare with, where a rule has no use for it anything."""
        low, high = self.dppo_mask_low, self.dppo_mask_high
        smallest = _LOG_RANGE[dtype][0]
        if self.mask_rule == "ratio":
            low, high = log(low, dtype), log(high, dtype)
        else:
            # No min(): torch.compile (2.11) would make constants of bounds that change.
            low, high = (bound if bound < -smallest else -smallest for bound in (low, high))
        rollout_low = log(self.rollout_min_ratio, dtype) if self.has_rollout_rule else smallest
        bounds = {"low": low, "high": high, "rollout_low": rollout_low}
        return {**bounds, **self._policy_bounds(dtype, log)}

    def _policy_bounds(self, dtype: torch.dtype, log: LogBound) -> dict[str, float]:
        """Those of the policy form, as wide as ``dtype`` goes where it has none."""
        smallest, largest_log = _LOG_RANGE[dtype]
        largest = -smallest
        clip_high = self.clip_high if self.clip_high != math.inf else None
        is_bounded = self.pg_form == "reinforce" or (
            self.ratio_cap is not None or (self.pg_form == "cispo" and clip_high is not None)
        )
        return {
            "ratio_cap": largest if self.ratio_cap is None else self.ratio_cap,
            "clip_low": 0.0 if self.clip_low is None else self.clip_low,
            "clip_high": largest if clip_high is None else clip_high,
            "log_clip_low": smallest if self.clip_low is None else log(self.clip_low, dtype),
            "log_clip_high": largest_log if clip_high is None else log(clip_high, dtype),
            "largest_log_ratio": largest if is_bounded else largest_log,
        }

    def _check_policy_form(self) -> None:
        form = self.pg_form
        reads, needs = _READ_BY[form], _NEEDED_BY[form]
        for name in _RATIO_BOUNDS:
            value = getattr(self, name)
            if name not in reads and value is not None:
                raise ValueError(f"{name}: expected None for pg_form={form!r}, got {value!r}")
            if name in needs and value is None:
                raise ValueError(f"{name}: expected a number for pg_form={form!r}, got None")
        low, high, cap = self.clip_low, self.clip_high, self.ratio_cap
        if cap is not None and not cap > 0:
            raise ValueError(f"ratio_cap: expected a finite number > 0, got {cap!r}")
        if low is None or high is None:
            return
        if not low <= high:
            raise ValueError(f"clip_high: expected a number >= clip_low ({low!r}), got {high!r}")
        if form == "cispo":
            if not high > 0:
                raise ValueError(f"clip_high: expected a number > 0, got {high!r}")
            return
        if not 0 < low <= 1:
            raise ValueError(f"clip_low: expected 0 < clip_low <= 1 for {form!r}, got {low!r}")
        most = math.inf if cap is None else cap
        if not (1 <= high <= most and high < math.inf):
            bound = "a finite number" if cap is None else f"ratio_cap ({cap!r})"
            raise ValueError(
                f"clip_high: expected at least 1 and at most {bound} for {form!r}, got {high!r}"
            )

    def log_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """The band's bounds on ``log r``: ``log_bound`` of both."""
        return log_bound(self.dppo_mask_low, dtype), log_bound(self.dppo_mask_high, dtype)


_WORDS: dict[str, tuple[str, ...]] = {
    "mask_rule": get_args(MaskRule),
    "kl_scope": get_args(KLScope),
    "pg_form": get_args(PolicyForm),
}

_RATIO_BOUNDS = ("ratio_cap", "clip_low", "clip_high")
_CLIP = ("clip_low", "clip_high")
_NEEDED_BY: dict[str, tuple[str, ...]] = {
    "ratio": (),
    "capped": ("ratio_cap",),
    "ppo_clip": _CLIP,
    "cispo": _CLIP,
    "reinforce": (),
}
_READ_BY = {**_NEEDED_BY, "ppo_clip": _RATIO_BOUNDS}

_LARGEST_NUMBER = torch.finfo(torch.float32).max  # the loss may be computed in float32

_BOUNDS = ("dppo_mask_low", "dppo_mask_high")  # of which the rule says what they may be

# The fields that the operators take as they are.
_NUMBERS = [
    field.name
    for field in dataclasses.fields(IPOConfig)
    if field.name not in (*_BOUNDS, *_WORDS, *_RATIO_BOUNDS, "rollout_min_ratio")
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
            ("pg_form", int),  # index in PolicyForm
            *((name, float) for name in _RATIO_BOUNDS),
            ("log_clip_low", float),
            ("log_clip_high", float),
            ("largest_log_ratio", float),
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
