"""The loss's settings: validated once, so that no operator has to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypedDict, cast, get_args

import torch
from typing_extensions import Unpack  # which torch requires

from ipo_ext._numbers import LOG_RANGE, MOST, is_number, log_bound, to_float, without_infinities
from ipo_ext._prime_rl_sections import constructor_and_arguments
from ipo_ext._sequence_rules import STATISTICS, SequenceRule, checked_rules, statistic_bound

# In the order of csrc/math/mask_rules.h.
MaskRule = Literal["ratio", "dppo", "prob_diff", "kpop", "none"]
# In the order of csrc/math/policy_terms.h.
PolicyForm = Literal["ratio", "capped", "ppo_clip", "cispo", "reinforce"]
KLScope = Literal["kept", "active"]
SequenceRuleWhen = Literal["always", "negative_advantage"]
SequenceWeight = Literal[None, "sum", "mean"]
LogBound = Callable[[float, torch.dtype], float]


class _AdvantageTaus(TypedDict, total=False):
    adv_tau: float
    teacher_tau: float


class _Taus(_AdvantageTaus, total=False):
    kl_tau: float


@dataclasses.dataclass(frozen=True)
class IPOConfig:
    """Settings of the IPO+KL loss, under the field names of prime-rl's ``trainer.loss`` section.

    A token is kept where ``dppo_mask_low <= r <= dppo_mask_high``, decided on ``log r``, both ends
    inclusive; a kept token pays ``-A' * r + kl_tau * log(r)**2`` with
    ``A' = adv_tau * A + teacher_tau * (teacher_logprob - trainer_logprob)``
    (PrimeIntellect-ai/prime-rl pull request 2423; docs/math.md).

    Other losses of the family keep other tokens, ``IPOConfig.dppo``, ``icepop``, ``prob_diff`` and
    ``kpop``, pay another policy term, ``ipo``, ``ppo``, ``cispo`` and ``tis``, or judge whole
    sequences, ``geometric`` and ``sequence_tis``.

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
        sequence_rules: ``(statistic, low, high)`` for each rule that a sequence must pass, both
            ends inclusive: its sum, mean, largest or smallest k1 = log r, k2 = k1**2 / 2 or
            k3 = r - 1 - log r, such as ``("mean_k1", 0.99, 1.01)``. Bounds of k1 are those of the
            ratio. A call must hold whole sequences.
        sequence_rule_when: whether a sequence that breaks a rule loses all of its tokens or those
            of negative advantage.
        sequence_weight: what the loss of a sequence's tokens is multiplied by, a constant: the
            exponential of the "sum" or "mean" of its log-ratios; ``pg_form="reinforce"`` alone.
        sequence_weight_cap: the largest such weight.
        score_centering: whether each token's update is centered on what the sampler expects of
            it, over the ids that it drew from (arXiv 2609.20807; docs/math.md, "Score centering").
            For ``mask_rule="prob_diff"`` of equal bounds with ``pg_form="capped"``, without rules
            on sequences. The loss then needs ``inference_mask_logprobs``.

    Raises:
        ValueError: a field breaks ``0 <= dppo_mask_low``, ``dppo_mask_low <= dppo_mask_high`` (a
            band on the ratio) or "finite and >= 0", a tau or a cap is more than float32 holds, a
            field is not one of its words, the policy form lacks a bound or does not read one that
            is given, its bounds are in the wrong order, or rules on sequences make no sense.
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
    sequence_rules: tuple[SequenceRule, ...] = ()
    sequence_rule_when: SequenceRuleWhen = "always"
    sequence_weight: SequenceWeight = None
    sequence_weight_cap: float = math.inf
    score_centering: bool = False

    # Of an instance; no fields. Bounds are made once, but for a config made in a compiled graph.
    _made_bounds: ClassVar[dict[torch.dtype, dict[str, Any]]] = {}
    _has_rollout_rule: ClassVar[bool]
    _judges_sequences: ClassVar[bool]

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            if (value := getattr(self, name)) not in words:
                expected = ", ".join(map(str, words))
                raise ValueError(f"{name}: expected one of {expected}, got {value!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in (*_WORDS, "sequence_rules"):
                continue
            if field.name in _SWITCHES:
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name}: expected True or False, got {value!r}")
                continue
            if value is None and field.name in _RATIO_BOUNDS:
                continue
            if not is_number(value):
                raise ValueError(f"{field.name}: expected a number, got {value!r}")
            value = to_float(field.name, value)
            object.__setattr__(self, field.name, value)
            if field.name in _MAY_BE_INFINITE and value == math.inf:
                continue
            if field.name not in _BOUNDS and not 0 <= value < math.inf:
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
        object.__setattr__(self, "sequence_rules", checked_rules(self.sequence_rules))
        self._check_sequence_weight()
        self._check_score_centering()
        has_rollout_rule = bool(self.rollout_min_ratio > 0)
        object.__setattr__(self, "_has_rollout_rule", has_rollout_rule)
        judges_sequences = has_rollout_rule or self.has_sequence_rule
        object.__setattr__(self, "_judges_sequences", judges_sequences)
        if not torch.compiler.is_compiling():
            bounds = {dtype: self._bounds(dtype, log_bound) for dtype in LOG_RANGE}
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
        low: float = 0.2,
        high: float = 5.0,
        rollout_min_ratio: float = 0.0,
        *,
        kl_tau: float = 0.0,
        **taus: Unpack[_AdvantageTaus],
    ) -> IPOConfig:
        """IcePop as prime-rl has it since 2026-09: a band on the ratio, no KL.

        With ``rollout_min_ratio`` a sequence contributes nothing when the ratio of any of its
        active tokens is below it. ``taus`` are adv_tau and teacher_tau.
        """
        return cls(low, high, rollout_min_ratio=rollout_min_ratio, kl_tau=kl_tau, **taus)

    @classmethod
    def icepop_2401(cls, **taus: Unpack[_AdvantageTaus]) -> IPOConfig:
        """IcePop as prime-rl #2401 proposed it: a narrower band, no token of a broken rollout.

        A ratio below 1e-5 drops its sequence. ``taus`` are adv_tau and teacher_tau.
        """
        return cls.icepop(0.5, 5.0, 1e-5, **taus)

    @classmethod
    def prob_diff(cls, threshold: float = 0.1, **taus: Unpack[_Taus]) -> IPOConfig:
        """prime-rl's IPO until 2026-08: drops where ``|d| > threshold``; all active pay the KL.

        ``d`` as for ``dppo``; since then it is ``ipo``. ``taus`` are adv_tau, kl_tau and
        teacher_tau.
        """
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
        score_centering: bool = False,
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
            score_centering=score_centering,
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
    def geometric(
        cls, low: float, high: float, *, kl_tau: float = 0.0, **taus: Unpack[_AdvantageTaus]
    ) -> IPOConfig:
        """Whole sequences kept by the geometric mean of their ratios, from ``low`` to ``high``.

        Every token of a kept sequence pays ``-A r``; no KL. ``taus`` are adv_tau and teacher_tau.
        """
        rules: tuple[SequenceRule, ...] = (("mean_k1", low, high),)
        return cls(mask_rule="none", sequence_rules=rules, kl_tau=kl_tau, **taus)

    @classmethod
    def sequence_tis(
        cls, cap: float = 2.0, *, kl_tau: float = 0.0, **taus: Unpack[_AdvantageTaus]
    ) -> IPOConfig:
        """Truncated importance sampling of each sequence: ``-min(prod r, cap) A log pi``.

        The product of a sequence's ratios, capped, is a constant weight of its tokens, verl's
        default in bypass mode; no KL. ``taus`` are adv_tau and teacher_tau.
        """
        return cls(
            mask_rule="none",
            pg_form="reinforce",
            sequence_weight="sum",
            sequence_weight_cap=cap,
            kl_tau=kl_tau,
            **taus,
        )

    @classmethod
    def from_prime_rl(cls, section: Mapping[str, Any], version: str | None = None) -> IPOConfig:
        """The config of prime-rl's ``trainer.loss`` section.

        Args:
            section: its fields, such as ``{"type": "icepop", "ratio_high": 4.0}``.
            version: whose fields they are: "2026-05" (the branch of pull request 2423), "2026-08",
                or by default "2026-10", where the losses of September 2026 and later are.

        Raises:
            ValueError: a type or a field that the version does not have, such as ``custom``, or a
                value that the constructor refuses.
        """
        constructor, arguments = constructor_and_arguments(_as_mapping("section", section), version)
        make = getattr(cls, constructor) if constructor else cls
        return cast(IPOConfig, make(**arguments))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> IPOConfig:
        """The config with these fields; an unknown one is a ValueError."""
        mapping = _as_mapping("mapping", mapping)
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

    @property
    def has_sequence_rule(self) -> bool:
        """Whether statistics of a sequence can drop it or weigh it."""
        return bool(self.sequence_rules) or self.sequence_weight is not None

    @property
    def judges_sequences(self) -> bool:
        """Whether a token's loss depends on the others of its sequence."""
        return self._judges_sequences

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
            judges_sequences=self.judges_sequences,
            pg_form=get_args(PolicyForm).index(self.pg_form),
            only_negative=self.sequence_rule_when == "negative_advantage",
            sequence_weight=_WORDS["sequence_weight"].index(self.sequence_weight),
            sequence_weight_cap=without_infinities(float(self.sequence_weight_cap)),
            **{name: float(getattr(self, name)) for name in _NUMBERS},
            **(self._bounds(dtype, log or log_bound) if made is None else made),
        )

    def _bounds(self, dtype: torch.dtype, log: LogBound) -> dict[str, Any]:
        """What rules and policy forms compare with, where a rule has no use for it anything."""
        low, high = self.dppo_mask_low, self.dppo_mask_high
        smallest = LOG_RANGE[dtype][0]
        if self.mask_rule == "ratio":
            low, high = log(low, dtype), log(high, dtype)
        else:
            # No min(): torch.compile (2.11) would make constants of bounds that change.
            low, high = (bound if bound < -smallest else -smallest for bound in (low, high))
        rollout_low = log(self.rollout_min_ratio, dtype) if self.has_rollout_rule else -MOST
        bounds = {"low": low, "high": high, "rollout_low": rollout_low}
        return {**bounds, **self._policy_bounds(dtype, log), "sequence_rules": self._rules(dtype)}

    def _rules(self, dtype: torch.dtype) -> list[float] | None:
        """Statistic, low and high of each sequence rule; of k1, logarithms of the ratios."""
        numbers: list[float] = []
        for name, low, high in self.sequence_rules:
            bounds = (statistic_bound(name, bound, dtype) for bound in (low, high))
            numbers += [float(STATISTICS.index(name)), *bounds]
        return numbers or None

    def _policy_bounds(self, dtype: torch.dtype, log: LogBound) -> dict[str, float]:
        """Those of the policy form, as wide as ``dtype`` goes where it has none."""
        smallest, largest_log = LOG_RANGE[dtype]
        largest = -smallest
        clip_high = self.clip_high if self.clip_high != math.inf else None
        is_bounded = self.pg_form == "reinforce" or (
            self.ratio_cap is not None or (self.pg_form == "cispo" and clip_high is not None)
        )
        return {
            "ratio_cap": largest if self.ratio_cap is None else self.ratio_cap,
            "clip_low": 0.0 if self.clip_low is None else self.clip_low,
            "clip_high": largest if clip_high is None else clip_high,
            "log_ratio_cap": largest if self.ratio_cap is None else log(self.ratio_cap, dtype),
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
        if not 1 <= high < math.inf:
            raise ValueError(f"clip_high: expected a finite number >= 1 for {form!r}, got {high!r}")
        if cap is not None and not high <= cap:
            raise ValueError(f"clip_high: expected at most ratio_cap ({cap!r}), got {high!r}")

    def _check_sequence_weight(self) -> None:
        weight, cap = self.sequence_weight, self.sequence_weight_cap
        if weight is not None and self.pg_form != "reinforce":
            raise ValueError(
                f"sequence_weight: expected None for pg_form={self.pg_form!r}, whose ratio would "
                f"count twice, got {weight!r}; use pg_form='reinforce'"
            )
        if not cap > 0:
            raise ValueError(f"sequence_weight_cap: expected a number > 0, got {cap!r}")
        if weight is None and cap != math.inf:
            raise ValueError(
                f"sequence_weight_cap: expected inf without a sequence_weight, got {cap!r}"
            )
        if not self.sequence_rules and self.sequence_rule_when != "always":
            raise ValueError(
                "sequence_rule_when: expected 'always' without sequence_rules, got "
                f"{self.sequence_rule_when!r}"
            )

    def _check_score_centering(self) -> None:
        if not self.score_centering:
            return
        low, high = self.dppo_mask_low, self.dppo_mask_high
        if (self.mask_rule, self.pg_form) != ("prob_diff", "capped") or low != high:
            raise ValueError(
                "score_centering: expected mask_rule='prob_diff' of equal bounds and "
                f"pg_form='capped' with it, got {self.mask_rule!r} of {low!r} and {high!r} and "
                f"{self.pg_form!r}; IPOConfig.ipo(score_centering=True) has them"
            )
        if self.has_sequence_rule or self.rollout_min_ratio > 0:
            raise ValueError(
                "score_centering: expected no rule on sequences and no sequence_weight beside it, "
                "which would not apply to it"
            )

    def log_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """The band's bounds on ``log r``: ``log_bound`` of both."""
        return log_bound(self.dppo_mask_low, dtype), log_bound(self.dppo_mask_high, dtype)


def _as_mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) and not hasattr(value, "keys"):
        raise TypeError(
            f"{name}: expected a mapping of fields such as a dict, got "
            f"{type(value).__name__}; pass for instance {{'kl_tau': 0.001}}"
        )
    return cast(Mapping[str, Any], value)


_WORDS: dict[str, tuple[Any, ...]] = {
    "mask_rule": get_args(MaskRule),
    "kl_scope": get_args(KLScope),
    "pg_form": get_args(PolicyForm),
    "sequence_rule_when": get_args(SequenceRuleWhen),
    "sequence_weight": get_args(SequenceWeight),
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
_MAY_BE_INFINITE = ("clip_high", "sequence_weight_cap")
_SWITCHES = ("score_centering",)
_SEQUENCES = ("rollout_min_ratio", "sequence_rules", "sequence_weight_cap")

# The fields that the operators take as they are.
_NUMBERS = [
    field.name
    for field in dataclasses.fields(IPOConfig)
    if field.name not in (*_BOUNDS, *_WORDS, *_RATIO_BOUNDS, *_SEQUENCES, *_SWITCHES)
]

# What every operator of the loss takes of a config: the list of csrc/math/settings.h.
if TYPE_CHECKING:  # a type checker is told what is read by name: it cannot follow _NUMBERS

    class LossSettings(tuple[float, ...]):
        teacher_tau: float
        judges_sequences: bool

        def __new__(cls, **settings: Any) -> LossSettings: ...

else:
    LossSettings = NamedTuple(
        "LossSettings",
        [
            ("low", float),  # in the compute dtype, what the rule compares with
            ("high", float),
            *((name, float) for name in _NUMBERS),
            ("mask_rule", int),  # index in MaskRule
            ("kl_active", bool),
            ("judges_sequences", bool),
            ("rollout_low", float),  # a logarithm, as bounds of the ratio are
            ("pg_form", int),  # index in PolicyForm
            *((name, float) for name in _RATIO_BOUNDS),
            ("log_ratio_cap", float),
            ("log_clip_low", float),
            ("log_clip_high", float),
            ("largest_log_ratio", float),
            # Of each rule the index in SequenceStatistic, low and high, one after the other.
            ("sequence_rules", list[float] | None),
            ("only_negative", bool),
            ("sequence_weight", int),  # index in SequenceWeight
            ("sequence_weight_cap", float),
        ],
    )
