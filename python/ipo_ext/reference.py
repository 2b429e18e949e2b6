"""The loss written to be read, in eager torch: the oracle that the kernels are tested against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch

from ipo_ext._precision import warn_if_rounded
from ipo_ext._sequence_rules import SequenceRule
from ipo_ext.config import IPOConfig
from ipo_ext.output import IPOOutput

_DEFAULT = IPOConfig()
_IGNORED = -100  # the label of a row that takes no part
_MISMATCH_CLAMP = 80.0  # log-ratios beyond it count as it in the mismatch KL


def ipo_loss(
    trainer_logprobs: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    teacher_logprobs: torch.Tensor | None = None,
    loss_weights: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    inference_mask_logprobs: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    config: IPOConfig = _DEFAULT,
    trainer_mask_logprobs: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    replayed: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> IPOOutput:
    """As ``ipo_ext.ipo_loss``, in eager torch and differentiable any number of times.

    Args:
        entropy: per token, only measured: metric ``entropy``.
        replayed: per token, bool: which are centered, with ``config.score_centering``, else only
            measured: metrics ``replayed`` and, where there is an entropy, ``nonfinite_entropy``.
        dtype: what to compute in, default the kernels' compute dtype. The mask is decided in the
            kernels' compute dtype whatever ``dtype`` is, so that a float64 reference of float32
            inputs keeps the same tokens.
    """
    warn_if_rounded(inference_logprobs)
    band_dtype = torch.promote_types(
        torch.promote_types(trainer_logprobs.dtype, inference_logprobs.dtype), torch.float32
    )
    dtype = dtype or band_dtype
    band_x = trainer_logprobs.detach().to(band_dtype) - inference_logprobs.to(band_dtype)
    finite = band_x.isfinite() & (band_x <= _largest_log_ratio(config, band_dtype))
    active = loss_mask
    dropped, above, below = mask_rule(
        config,
        trainer_logprobs.detach().to(band_dtype),
        inference_logprobs.to(band_dtype),
        advantages,
    )
    rollout_dropped = rollout_rule(config, band_x, active, cu_seqlens)
    sequence_dropped, sequence_weight = sequence_rules(
        config, band_x, advantages, active, cu_seqlens
    )
    spared = active & finite & ~rollout_dropped & ~sequence_dropped
    keep = spared & ~dropped
    pays_kl = keep if config.kl_scope == "kept" else spared

    # Replace what a dropped token holds before any arithmetic: torch.where after it would still
    # differentiate the branch that was not taken, and 0 * inf is NaN.
    def only(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, values, torch.zeros_like(values)).to(dtype)

    x = only(pays_kl, trainer_logprobs) - only(pays_kl, inference_logprobs)
    weight = only(pays_kl, loss_weights) if loss_weights is not None else pays_kl.to(dtype)
    weight = weight * only(pays_kl, sequence_weight)
    pays_pg, pays_kl = keep & (weight != 0), pays_kl & (weight != 0)
    advantage = _advantage(
        config,
        only(pays_pg, trainer_logprobs),
        only(pays_pg, advantages),
        None if teacher_logprobs is None else only(pays_pg, teacher_logprobs),
    )

    policy, ratio = _policy_term(config, only(keep, x), only(keep, trainer_logprobs), advantage)
    if config.pg_form == "ppo_clip":
        policy = _clipped(config, policy, advantage, band_x)
    pg_loss = only(pays_pg, weight * policy)
    kl_loss = torch.zeros_like(pg_loss)
    if config.kl_tau != 0:
        kl_loss = only(pays_kl, weight * config.kl_tau * only(pays_kl, x) ** 2)
    centering_loss = torch.zeros_like(pg_loss)
    if config.score_centering:
        assert trainer_mask_logprobs is not None, "score_centering needs trainer_mask_logprobs"
        assert inference_mask_logprobs is not None, "score_centering needs inference_mask_logprobs"
        is_centered = active & band_x.isfinite()
        if loss_weights is not None:
            is_centered = is_centered & (loss_weights != 0)
        if replayed is not None:
            is_centered = is_centered & replayed
        scale = config.adv_tau * only(is_centered, advantages)
        if loss_weights is not None:
            scale = scale * only(is_centered, loss_weights)
        of_ids = (trainer_mask_logprobs, inference_mask_logprobs)
        centering_loss = scale * score_centering(config, *of_ids, is_centered, band_dtype, dtype)
    loss = (pg_loss + kl_loss + centering_loss).sum()
    if isinstance(normalizer, torch.Tensor):
        nothing = normalizer == 0
        loss = torch.where(nothing, loss * 0, loss / torch.where(nothing, 1, normalizer))
    elif normalizer is not None:
        loss = loss / normalizer

    # The metrics, each a numerator and a denominator per token.
    with torch.no_grad():
        counted = active & finite
        masked = active & ~keep
        counted_masked = masked & finite
        any_x = (only(counted, trainer_logprobs) - only(counted, inference_logprobs)).clamp(
            max=_MISMATCH_CLAMP
        )
        mismatch = torch.special.expm1(any_x) - any_x
        shares = {
            "mismatch_kl": (mismatch * counted, active),
            "masked_mismatch_kl": (mismatch * counted_masked, masked),
            "unmasked_mismatch_kl": (mismatch * keep, keep),
            "is_masked": (masked, active),
            "is_masked_low": (active & below, active),
            "is_masked_high": (active & above, active),
            "pg_loss": (pg_loss, active),
            "kl_loss": (kl_loss, active),
            "nonfinite": (active & ~finite, active),
            "masked_advantage_positive": (counted_masked & (advantages > 0), masked),
            "masked_advantage_negative": (counted_masked & (advantages < 0), masked),
        }
        if teacher_logprobs is not None:
            distance = only(counted, teacher_logprobs) - only(counted, trainer_logprobs)
            shares["teacher_kl"] = (distance, active)
        if config.rollout_min_ratio > 0:
            shares["rollout_dropped"] = (active & rollout_dropped, active)
        if config.has_sequence_rule:
            shares["sequence_dropped"] = (active & sequence_dropped, active)
        if config.clip_high is not None:
            too_high, too_low = _beyond_clip(
                config, _advantage(config, trainer_logprobs, advantages, teacher_logprobs), band_x
            )
            shares["is_clipped"] = (counted & (too_high | too_low), active)
        if config.ratio_cap is not None:
            _, log_cap = _log_bounds(0.0, config.ratio_cap, band_x.dtype)
            shares["ratio_capped"] = (counted & (band_x > log_cap), active)
        if config.score_centering:
            shares["centering_loss"] = (centering_loss, active)
        if entropy is not None:
            shares["entropy"] = (only(counted & entropy.isfinite(), entropy), active)
        if replayed is not None:
            shares["replayed"] = (active & replayed, active)
            if entropy is not None:
                shares["nonfinite_entropy"] = (active & ~entropy.isfinite(), active)
        measured = active & band_x.isfinite()
        parts = _segments(cu_seqlens, x.numel())

        def totals(values: Iterable[torch.Tensor]) -> torch.Tensor:
            """[rows, segments], summed in float64."""
            rows = torch.stack([value.flatten().double() for value in values])
            sums = [rows[:, part].sum(1) for part in parts]
            return torch.stack(sums, 1) if sums else rows.new_zeros(len(rows), 0)

        def extremes(kind: str, nothing: float) -> torch.Tensor:
            values = torch.where(measured, band_x, nothing).flatten().double()
            found = values.new_full((len(parts),), nothing)
            found = found.scatter_reduce(0, _segment_of_tokens(parts, values), values, kind)
            return torch.where(found == nothing, 0.0, found)

        numerators, denominators = map(totals, zip(*shares.values(), strict=True))
        metrics = dict(zip(shares, _mean(numerators, denominators), strict=True))
        kept_ratio = only(keep, ratio).double()
        ratio_sum, ratio_squares, kept = totals((kept_ratio, kept_ratio**2, keep))
        metrics["ess"] = _mean(ratio_sum**2, kept * ratio_squares)
        metrics["log_ratio_min"] = extremes("amin", math.inf)
        metrics["log_ratio_max"] = extremes("amax", -math.inf)
        if cu_seqlens is None:
            metrics = {name: value.squeeze(0) for name, value in metrics.items()}
        return IPOOutput(loss, {name: value.to(dtype) for name, value in metrics.items()})


def _segments(cu_seqlens: torch.Tensor | None, tokens: int) -> list[slice]:
    """The tokens of each segment; without ``cu_seqlens`` all of them are one."""
    if cu_seqlens is None:
        return [slice(0, tokens)]
    return list(itertools.starmap(slice, itertools.pairwise(cu_seqlens.tolist())))


def _segment_of_tokens(parts: list[slice], like: torch.Tensor) -> torch.Tensor:
    """``[tokens]``: the number of each token's segment."""
    lengths = torch.tensor([part.stop - part.start for part in parts], dtype=torch.int64)
    return torch.repeat_interleave(lengths).to(like.device)


def _largest_log_ratio(config: IPOConfig, dtype: torch.dtype) -> float:
    """Of a token that counts as finite: with a bound on the ratio any, else exp must be finite."""
    bounds = {"capped": config.ratio_cap, "ppo_clip": config.ratio_cap, "cispo": config.clip_high}
    bound = 0.0 if config.pg_form == "reinforce" else bounds.get(config.pg_form)
    unbounded = bound is None or bound == math.inf
    return _largest_log(dtype) if unbounded else torch.finfo(dtype).max


def _policy_term(
    config: IPOConfig, x: torch.Tensor, trainer_logprobs: torch.Tensor, advantage: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token what it pays, its weight aside and not clipped, and what its ratio counts as."""
    if config.pg_form == "reinforce":
        return -advantage * trainer_logprobs, x.detach().clamp(max=80).exp()
    if config.pg_form == "cispo":
        ratio = x.detach().exp().clamp(config.clip_low, config.clip_high)
        return -ratio * advantage * trainer_logprobs, ratio
    if config.ratio_cap is not None:  # beyond the cap the ratio is constant, its gradient is not 0
        cap = math.log(config.ratio_cap)
        x = x.clamp(max=cap) + torch.where(x > cap, x - x.detach(), 0.0)
    ratio = x.exp()
    return -advantage * ratio, ratio


def _clipped(
    config: IPOConfig, policy: torch.Tensor, advantage: torch.Tensor, band_x: torch.Tensor
) -> torch.Tensor:
    """PPO's objective: constant beyond a bound in the direction in which the advantage pushes."""
    assert config.clip_low is not None
    assert config.clip_high is not None
    too_high, too_low = _beyond_clip(config, advantage, band_x)
    policy = torch.where(too_high, -advantage * config.clip_high, policy)
    return torch.where(too_low, -advantage * config.clip_low, policy)


def _beyond_clip(
    config: IPOConfig, advantage: torch.Tensor, band_x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token, whether the policy form clips its ratio from above, and from below."""
    assert config.clip_low is not None
    assert config.clip_high is not None
    low, high = _log_bounds(config.clip_low, config.clip_high, band_x.dtype)
    too_high, too_low = band_x > high, band_x < low
    if config.pg_form == "cispo":
        return too_high, too_low
    return too_high & (advantage > 0), too_low & (advantage < 0)


def _advantage(
    config: IPOConfig,
    trainer_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    teacher_logprobs: torch.Tensor | None,
) -> torch.Tensor:
    """Per token ``A'``, a constant."""
    advantage = torch.zeros_like(advantages)
    if config.adv_tau != 0:
        advantage = advantage + config.adv_tau * advantages
    if config.teacher_tau != 0:
        assert teacher_logprobs is not None, "teacher_tau > 0 needs teacher_logprobs"
        distance = teacher_logprobs - trainer_logprobs.detach()
        advantage = advantage + config.teacher_tau * distance
    return advantage


def mask_rule(
    config: IPOConfig,
    trainer_logprobs: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token, whether the rule drops it, and on which side it counts: high or low."""
    x = trainer_logprobs - inference_logprobs
    if config.mask_rule == "ratio":
        low, high = _log_bounds(config.dppo_mask_low, config.dppo_mask_high, x.dtype)
        return ~((x >= low) & (x <= high)), x > high, x < low

    if config.mask_rule == "none":
        nothing = torch.zeros_like(x, dtype=torch.bool)
        return nothing, nothing, nothing
    largest = _largest_log(x.dtype)
    low, high = config.dppo_mask_low, config.dppo_mask_high
    if config.mask_rule == "kpop":
        p, q = (
            logprob.clamp(max=largest).exp() for logprob in (trainer_logprobs, inference_logprobs)
        )
        dropped = torch.maximum(_binary_kl(p, q), _binary_kl(q, p)) > high
        return dropped, dropped & (x > 0), dropped & (x < 0)
    larger = torch.maximum(trainer_logprobs, inference_logprobs).clamp(max=largest).exp()
    difference = x.sign() * larger * -torch.special.expm1(-x.abs())  # p - q without cancellation
    too_high, too_low = difference > high, difference < -low
    if config.mask_rule == "dppo":
        too_high, too_low = too_high & (advantages > 0), too_low & (advantages <= 0)
        return too_high | too_low, too_high, too_low & (advantages < 0)
    return too_high | too_low, too_high, too_low


def score_centering(
    config: IPOConfig,
    trainer_mask_logprobs: torch.Tensor,
    inference_mask_logprobs: torch.Tensor,
    rows: torch.Tensor,
    band_dtype: torch.dtype,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Per token of ``rows``, what score centering sums over its ids (arXiv 2609.20807).

    Which of them count is decided in ``band_dtype``.
    """
    assert config.ratio_cap is not None
    trainer = trainer_mask_logprobs.detach()
    difference = trainer.to(band_dtype).exp() - inference_mask_logprobs.to(band_dtype).exp()
    counts = rows[..., None] & trainer.isfinite() & inference_mask_logprobs.isfinite()
    counts = counts & (difference.abs() <= config.dppo_mask_high)
    zero = torch.zeros((), dtype=dtype, device=trainer.device)
    log_p = torch.where(counts, trainer_mask_logprobs.to(dtype), zero)
    log_q = torch.where(counts, inference_mask_logprobs.to(dtype), zero)
    ratio = (log_p.detach() - log_q).clamp(max=math.log(config.ratio_cap)).exp()
    return torch.where(counts, log_q.exp() * ratio * log_p, zero).sum(-1)


def rollout_rule(
    config: IPOConfig, x: torch.Tensor, active: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """Per token, whether an active token of its sequence has a ratio below the rollout's bound."""
    if config.rollout_min_ratio == 0 or x.numel() == 0:
        return torch.zeros_like(active)
    below = active & (x < torch.tensor(math.log(config.rollout_min_ratio), dtype=x.dtype))
    if cu_seqlens is None:  # the rows of [..., T]
        return below.any(-1, keepdim=True).expand(x.shape) if x.dim() else below
    flat, dropped = below.flatten(), torch.zeros_like(below.flatten())
    for part in _segments(cu_seqlens, x.numel()):
        dropped[part] = flat[part].any()
    return dropped.view(x.shape)


def sequence_rules(
    config: IPOConfig,
    x: torch.Tensor,
    advantages: torch.Tensor,
    active: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token, whether its sequence's verdict drops it, and the sequence's weight (float64)."""
    dropped, weights = torch.zeros_like(active), torch.ones_like(x, dtype=torch.float64)
    if not config.has_sequence_rule or not x.numel():
        return dropped, weights
    flat_x, flat_active = x.flatten(), active.flatten()
    may_drop = active
    if config.sequence_rule_when == "negative_advantage":
        may_drop = active & (advantages < 0)
    for part in _sequences(cu_seqlens, x):
        of_sequence = flat_x[part][flat_active[part]]
        if not of_sequence.numel():
            continue
        broken = any(_breaks(rule, of_sequence) for rule in config.sequence_rules)
        dropped.view(-1)[part] = may_drop.flatten()[part] & broken
        if config.sequence_weight is not None:
            weight = _sequence_weight(config, of_sequence)
            if weight is None:
                dropped.view(-1)[part] = flat_active[part]
            else:
                weights.view(-1)[part] = weight
    return dropped, weights


def _sequences(cu_seqlens: torch.Tensor | None, x: torch.Tensor) -> list[slice]:
    """The tokens of each sequence; without ``cu_seqlens`` the rows of ``[..., T]``."""
    if cu_seqlens is not None or x.dim() < 2:
        return _segments(cu_seqlens, x.numel())
    length = x.shape[-1]
    return [slice(begin, begin + length) for begin in range(0, x.numel(), length)]


def _breaks(rule: SequenceRule, x: torch.Tensor) -> bool:
    """Whether the log-ratios ``[tokens]`` of a sequence break a rule."""
    name, low, high = rule
    reduction, estimator = name.split("_")
    k3 = torch.where(x <= _largest_log(x.dtype), torch.special.expm1(x) - x, x * x * math.inf)
    values = {"k1": x.double(), "k2": x.double() ** 2 / 2, "k3": k3.double()}[estimator]
    if estimator == "k1":
        low, high = (math.log(bound) if bound > 0 else -math.inf for bound in (low, high))
        if reduction in ("min", "max"):
            low, high = (torch.tensor(bound, dtype=x.dtype).item() for bound in (low, high))
    if reduction in ("sum", "mean"):
        value = values.sum() if reduction == "sum" else values.mean()
        return not (value.isfinite() and low <= value <= high)
    values = values[~values.isnan()]
    if not values.numel():
        return False
    value = values.min() if reduction == "min" else values.max()
    return not low <= value <= high


def _sequence_weight(config: IPOConfig, x: torch.Tensor) -> float | None:
    """None where the statistic is not finite or the weight overflows the dtype of ``x``."""
    log_weight = (x.double().sum() if config.sequence_weight == "sum" else x.double().mean()).item()
    if not math.isfinite(log_weight):
        return None
    weight = torch.tensor(log_weight, dtype=torch.float64).exp().item()
    weight = min(weight, config.sequence_weight_cap)
    return weight if weight <= torch.finfo(x.dtype).max else None


def _binary_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Bernoulli KL of two probabilities, clamped away from 0 and 1."""
    p, q = p.clamp(1e-6, 1 - 1e-6), q.clamp(1e-6, 1 - 1e-6)
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def ipo_loss_from_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    teacher_logprobs: torch.Tensor | None = None,
    loss_weights: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    inference_mask_logprobs: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    config: IPOConfig = _DEFAULT,
    logit_scale: float | None = None,
    sampling_mask: torch.Tensor | None = None,
    entropy: bool = True,
    dtype: torch.dtype | None = None,
) -> IPOOutput:
    """As ``ipo_ext.ipo_loss_from_logits``, in eager torch, computed in ``dtype``."""
    labels = labels.masked_fill(~loss_mask, _IGNORED)
    replayed = None if sampling_mask is None else _replays(sampling_mask, labels)
    ids = None
    if config.score_centering:
        assert sampling_mask is not None, "score_centering needs a sampling_mask"
        assert replayed is not None
        ids = sampling_mask.masked_fill(~replayed[..., None], -1)
    logprobs, entropies, *of_ids = token_logprobs(
        logits,
        labels,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        sampling_mask=sampling_mask,
        entropy=entropy,
        candidates=ids,
        dtype=dtype,
    )
    entropies = None if entropies is None else entropies.detach()
    loss, metrics, *_ = ipo_loss(
        logprobs,
        inference_logprobs,
        advantages,
        loss_mask,
        teacher_logprobs=teacher_logprobs,
        loss_weights=loss_weights,
        cu_seqlens=cu_seqlens,
        inference_mask_logprobs=inference_mask_logprobs,
        normalizer=normalizer,
        config=config,
        trainer_mask_logprobs=of_ids[0] if of_ids else None,
        entropy=entropies,
        replayed=replayed,
        dtype=dtype,
    )
    return IPOOutput(loss, metrics, logprobs.detach(), entropies)


def ipo_loss_from_hidden(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    inference_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> IPOOutput:
    """As ``ipo_ext.ipo_loss_from_hidden``, in eager torch, with all of the logits."""
    logits = _logits(hidden, weight, bias, loss_mask, dtype)
    constants = (labels, inference_logprobs, advantages, loss_mask)
    return ipo_loss_from_logits(logits, *constants, dtype=dtype, **options)


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """As ``ipo_ext.linear_token_logprobs``, in eager torch, with all of the logits."""
    logits = _logits(hidden, weight, bias, labels != _IGNORED, dtype)
    return token_logprobs(logits, labels, dtype=dtype, **options)


def _logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    active: torch.Tensor,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """In at least float32; those of a hidden state of 0 where it must not matter."""
    dtype = dtype or torch.promote_types(hidden.dtype, torch.float32)
    hidden = torch.where(active[..., None], hidden, 0)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    return logits if bias is None else logits + bias.to(dtype)


def token_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    sampling_mask: torch.Tensor | None = None,
    entropy: bool = True,
    candidates: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """As ``ipo_ext.token_logprobs``, in eager torch and differentiable any number of times."""
    dtype = dtype or torch.promote_types(logits.dtype, torch.float32)
    active = labels != _IGNORED
    scaling = (temperature, softcap, logit_scale, dtype)
    absent = torch.where(active, math.nan, 0.0).to(dtype)
    everything = torch.ones_like(logits, dtype=torch.bool)
    support = everything
    if sampling_mask is not None:
        support = _support(sampling_mask, logits.shape[-1])
        support = support | ~_replays(sampling_mask, labels)[..., None]
    log_p, sound = _log_softmax(logits, support, active, *scaling)
    logprobs = log_p.gather(-1, torch.where(sound, labels, 0)[..., None].long()).squeeze(-1)
    logprobs = torch.where(sound, logprobs, absent)
    entropies = None
    if entropy:
        every_log_p, whole = _log_softmax(logits, everything, active, *scaling)
        possible = every_log_p.isfinite()  # p log p is 0 where p is, and so is its derivative
        finite_log_p = torch.where(possible, every_log_p, 0)
        entropies = -torch.where(possible, finite_log_p.exp() * finite_log_p, 0).sum(-1)
        entropies = torch.where(whole, entropies, absent)
    if candidates is None:
        return logprobs, entropies
    exists = active[..., None] & (candidates >= 0)
    place = torch.where(exists, candidates, 0).long()
    of_candidates = torch.where(sound[..., None], log_p.gather(-1, place), absent[..., None])
    of_candidates = torch.where(support.gather(-1, place), of_candidates, -math.inf)
    return logprobs, entropies, torch.where(exists, of_candidates, 0)


def _log_softmax(
    logits: torch.Tensor,
    support: torch.Tensor,
    active: torch.Tensor,
    temperature: float | torch.Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[..., V]`` over the ids in ``support``, -inf at others, and which rows are sound.

    A row that holds NaN or +inf, or nothing but -inf, is not; its gradient must stay its own.
    """
    whole = active & ~(support & logits.isnan()).any(-1)
    z = torch.where(whole[..., None] & support, logits, 0).to(dtype)
    if logit_scale is not None:
        z = logit_scale * z
    if softcap is not None:
        z = softcap * _tanh(z / softcap)
    z = torch.where(support, z, -math.inf)
    sound = whole & (z < math.inf).all(-1) & (z > -math.inf).any(-1)
    z = torch.where(sound[..., None], z, 0)
    if isinstance(temperature, torch.Tensor) and temperature.dim() > 0:
        z = z / torch.where(active, temperature, 1)[..., None].to(dtype)
    elif temperature is not None:
        z = z / temperature
    return z.log_softmax(-1), sound


def _support(sampling_mask: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """``[..., V]``: the ids that each row's sampler drew from."""
    beside = torch.where(sampling_mask < 0, vocabulary, sampling_mask).long()  # a column for -1
    shape = (*sampling_mask.shape[:-1], vocabulary + 1)
    support = torch.zeros(shape, dtype=torch.bool, device=sampling_mask.device)
    return support.scatter(-1, beside, True)[..., :vocabulary]


def _replays(sampling_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per token, whether it takes part and was drawn from its ids."""
    contains = ((sampling_mask == labels[..., None]) & (sampling_mask >= 0)).any(-1)
    return (labels != _IGNORED) & contains


def _tanh(u: torch.Tensor) -> torch.Tensor:
    """torch.tanh, whose derivative 1 - tanh^2 has no digits left far from 0, with one that has."""
    tail = u.sign() * (1 - 2 * torch.sigmoid(-2 * u.abs()))
    return torch.where(u.abs() < 1, torch.tanh(u), tail)


def _mean(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """numerator / denominator, 0 over nothing."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)


def _largest_log(dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` whose exp is finite in ``dtype``."""
    bound = torch.tensor(math.log(torch.finfo(dtype).max), dtype=dtype)
    if bound.exp().isinf():
        bound = torch.nextafter(bound, torch.zeros_like(bound))
    return bound.item()


def _log_bounds(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """Bounds of the ratio: fp64 logarithms, rounded to ``dtype`` within its finite range."""
    ends = torch.tensor([low, high], dtype=torch.float64).log()
    ends = ends.clamp(-torch.finfo(dtype).max, _largest_log(dtype)).to(dtype)
    return ends[0].item(), ends[1].item()
