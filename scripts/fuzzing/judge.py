"""Judges calls against the reference in float64, all those of a batch by one call of it.

The yardstick is what arithmetic in the compute dtype may lose: some units in the last place of the
magnitudes that a result is made of, first order in each rounding. What is exact must be: zeros,
counts, extremes. From logits and hidden states a call is judged in two steps: log-probabilities and
entropies against float64, then loss, metrics and gradient against float64 from these very
log-probabilities, on which the mask is decided. A rule that compares exponentials may decide
otherwise within rounding of a bound; then the reference must agree once its bound is moved by that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from fuzzing.calls import Call, Result
from ipo_ext import IPOConfig, IPOMetrics, reference
from tests.support.against_reference import EXACT_METRICS
from tests.support.rules import rounding, score

_IGNORED = -100
_MOST_MOVED = 16  # of a bound, which are tried one by one
_ULPS = 8.0  # of magnitudes, where only a few operations are between


def judge(calls: Sequence[Call], results: Sequence[Result]) -> list[str | None]:
    """What is wrong with each; the calls are of one batch: function, dtypes and settings agree."""
    verdicts: list[str | None] = [
        _wrong_at_once(*pair) for pair in zip(calls, results, strict=True)
    ]
    sound = [i for i, verdict in enumerate(verdicts) if verdict is None]
    valid = [i for i in sound if calls[i].fault is None]
    if valid:
        found = _judge_valid([calls[i] for i in valid], [results[i] for i in valid])
        for i, verdict in zip(valid, found, strict=True):
            verdicts[i] = verdict
    return verdicts


def _wrong_at_once(call: Call, result: Result) -> str | None:
    """What needs no reference: an error that should not be, or none where one should."""
    fault, error = call.fault, result.error
    if fault is None:
        return result.wrong if error is None else f"raised {type(error).__name__}: {error}"
    if error is None:
        return None if fault.of_data and _is_poisoned(call, result) else f"{fault.name}: no error"
    if type(error) is not fault.error:
        return f"{fault.name}: expected {fault.error.__name__}, raised {error!r}"
    if not str(error).startswith(fault.argument):
        return f"{fault.name}: expected a message of {fault.argument}, got {error}"
    return None


def _is_poisoned(call: Call, result: Result) -> bool:
    """What CUDA's operators do where the CPU's raise."""
    from ipo_ext._ops import library

    on_cpu = library._namespace == "ipo_ext"
    results = [*(result.outputs if call.is_loss else ()), *result.gradients.values()]
    return not on_cpu and all(bool(tensor.isnan().all()) for tensor in results)


# -------------------------------------------------------------------------------------------------
# Valid calls


class _Verdicts:
    """The first thing that is wrong with each call."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.found: list[str | None] = [None] * len(calls)

    def compare(
        self,
        name: str,
        owner: torch.Tensor,  # [n], whose each element is
        ours: torch.Tensor,  # [n, ...]
        exact: torch.Tensor,  # the same, float64
        budget: torch.Tensor,  # the same, float64; NaN where anything goes
    ) -> None:
        wrong = _differs(ours, exact, budget)
        if not wrong.any():
            return
        for place in wrong.nonzero().tolist()[::-1]:
            at = tuple(place)
            call = int(owner[place[0]])
            # The first to speak is the cause: what comes later follows from it.
            if self.found[call] is None or self.found[call].startswith(name):
                first = int((owner == call).nonzero()[0])
                where = [place[0] - first, *place[1:]]
                self.found[call] = (
                    f"{name}{where}: got {ours[at].item()!r}, expected {exact[at].item()!r} "
                    f"within {budget[at].item():.3g}"
                )


def _differs(ours: torch.Tensor, exact: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    ours64 = ours.double()
    close = (ours64 - exact).abs() <= budget
    same = (ours64 == exact) | (ours64.isnan() & exact.isnan())
    largest = torch.finfo(ours.dtype).max
    overflows = ours64.isinf() & (exact.abs() + budget >= largest) & (ours64.sign() == exact.sign())
    return ~(close | same | overflows | budget.isnan())


def _judge_valid(calls: Sequence[Call], results: Sequence[Result]) -> list[str | None]:
    found = _with_config(calls, results, calls[0].config)
    if calls[0].config.mask_rule == "ratio":
        return found
    return [
        verdict and _unless_at_a_bound(call, result, verdict)
        for call, result, verdict in zip(calls, results, found, strict=True)
    ]


def _unless_at_a_bound(call: Call, result: Result, verdict: str) -> str | None:
    """Nothing is wrong if the reference agrees once its bounds are moved by what rounding may."""
    moved = itertools.starmap(
        functools.partial(_bounded, call.config), itertools.product(*_moved_bounds(call, result))
    )
    with mock.patch.object(reference, "mask_rule", _mask_rule_in_float64):
        agrees = any(_with_config([call], [result], config) == [None] for config in moved)
    return None if agrees else verdict


_mask_rule = reference.mask_rule


def _mask_rule_in_float64(
    config: IPOConfig,
    trainer: torch.Tensor,
    inference: torch.Tensor,
    advantages: torch.Tensor,
) -> Any:
    """Where scores differ that float32 makes equal, so that a bound has room between them."""
    return _mask_rule(config, trainer.double(), inference.double(), advantages)


def _bounded(config: IPOConfig, low: float, high: float) -> IPOConfig:
    """With these bounds, which may lie below 0, where a configuration's may not."""
    config = dataclasses.replace(config)
    object.__setattr__(config, "dppo_mask_low", low)
    object.__setattr__(config, "dppo_mask_high", high)
    return config


def _moved_bounds(call: Call, result: Result) -> list[list[float]]:
    """Each bound, and just beside the score of each token that lies within rounding of it."""
    trainer = call.arguments["trainer_logprobs"] if result.logprobs is None else result.logprobs
    inference = call.arguments["inference_logprobs"]
    exact = score(call.config, trainer.double(), inference.double())
    within = rounding(call.config, trainer, inference, _widest(trainer, inference))
    bounds = []
    for bound, sign in ((call.config.dppo_mask_low, -1), (call.config.dppo_mask_high, 1)):
        near = call.arguments["loss_mask"] & within.isfinite()
        near = near & ((sign * exact - bound).abs() <= within)
        keeping = (sign * exact[near]).unique()[:_MOST_MOVED]
        dropping = keeping.nextafter(torch.full_like(keeping, -math.inf))
        bounds.append([bound, *keeping.tolist(), *dropping.tolist()])
    return bounds


def _with_config(
    calls: Sequence[Call], results: Sequence[Result], config: IPOConfig
) -> list[str | None]:
    verdicts = _Verdicts(calls)
    if calls[0].function == "ipo_loss":
        _judge_loss(calls, results, config, verdicts)
    else:
        _judge_rows(calls, results, config, verdicts)
    return verdicts.found


# -------------------------------------------------------------------------------------------------
# The loss of given log-probabilities


@dataclasses.dataclass(frozen=True)
class _Derivatives:
    """By each log-probability, of the loss before it is divided: ``[tokens]``, float64."""

    exact: torch.Tensor
    budget: torch.Tensor


def _judge_loss(
    calls: Sequence[Call], results: Sequence[Result], config: IPOConfig, verdicts: _Verdicts
) -> _Derivatives:
    """Loss, metrics and, from log-probabilities, the gradient."""
    tokens = _Tokens(calls, results, config)
    leaf = tokens.trainer.detach().requires_grad_()
    options = {"teacher_logprobs": tokens.teacher, "loss_weights": tokens.weights}
    exact = reference.ipo_loss(
        leaf,
        tokens.inference,
        tokens.advantages,
        tokens.mask,
        **options,
        cu_seqlens=tokens.cu_seqlens,
        config=config,
        entropy=tokens.entropy,
        dtype=torch.float64,
    )
    (gradient,) = torch.autograd.grad(exact.loss, leaf)
    scales = _Scales(tokens, config)
    rounded = 2 * tokens.eps * gradient.double().abs()
    derivatives = _Derivatives(gradient.double(), _ULPS * tokens.eps * scales.derivative + rounded)
    _judge_metrics(tokens, results, exact.metrics, scales, verdicts)
    _judge_loss_value(tokens, results, exact.metrics, scales, verdicts)
    if calls[0].function == "ipo_loss":
        _judge_gradient(tokens, results, derivatives, verdicts)
    return derivatives


class _Tokens:
    """The loss's inputs of all calls, end to end, and which segment and call each belongs to."""

    def __init__(self, calls: Sequence[Call], results: Sequence[Result], config: IPOConfig) -> None:
        def joined(name: str) -> torch.Tensor | None:
            tensors = [call.arguments.get(name) for call in calls]
            if any(tensor is None for tensor in tensors):
                return None
            return torch.cat([tensor.reshape(-1) for tensor in tensors])

        if calls[0].function == "ipo_loss":
            trainer, self.entropy = joined("trainer_logprobs"), None
        else:
            trainer = torch.cat([result.logprobs.reshape(-1) for result in results])
            self.entropy = torch.cat([result.entropy.reshape(-1) for result in results])
        self.calls, self.config = calls, config
        self.inference: Any = joined("inference_logprobs")
        self.advantages: Any = joined("advantages")
        self.mask: Any = joined("loss_mask")
        self.teacher, self.weights = joined("teacher_logprobs"), joined("loss_weights")
        self.compute = _widest(trainer, self.inference)
        self.trainer: Any = trainer.to(self.compute)
        # The reference's own roundings are of the same kind where it computes in no wider dtype.
        self.eps = torch.finfo(self.compute).eps * (2 if self.compute == torch.float64 else 1)
        self._cut()
        self.inverse = torch.tensor([_inverse(call) for call in calls], dtype=torch.float64)
        self.grad_loss = torch.tensor([call.grads[0] for call in calls], dtype=torch.float64)

    def _cut(self) -> None:
        """Segments of all calls; a call without cuts is one."""
        lengths: list[int] = []
        segment_owner: list[int] = []
        sizes = [call.arguments["loss_mask"].numel() for call in self.calls]
        for i, (call, size) in enumerate(zip(self.calls, sizes, strict=True)):
            cuts = call.arguments.get("cu_seqlens")
            of_call = [size] if cuts is None else cuts.diff().tolist()
            lengths += of_call
            segment_owner += [i] * len(of_call)
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        self.cu_seqlens, self.segments = ends, len(lengths)
        self.owner = _repeat(sizes)
        self.segment = _repeat(lengths)
        self.segment_owner = torch.tensor(segment_owner, dtype=torch.int64)

    def by_segment(self, values: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(self.segments, dtype=torch.float64)
        return total.index_add_(0, self.segment, values.double())

    def most_of_segment(self, values: torch.Tensor, least: float) -> torch.Tensor:
        most = torch.full((self.segments,), least, dtype=torch.float64)
        return most.scatter_reduce_(0, self.segment, values, "amax")

    def by_call(self, of_segments: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(self.calls), dtype=torch.float64)
        return total.index_add_(0, self.segment_owner, of_segments)


def _repeat(sizes: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))


def _widest(*tensors: torch.Tensor) -> torch.dtype:
    in_float64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if in_float64 else torch.float32


def _inverse(call: Call) -> float:
    normalizer = float(call.arguments.get("normalizer", 1.0))
    return 1 / normalizer if normalizer else 0.0


class _Scales:
    """Per token, float64: the magnitudes that its terms are made of, 0 for one that pays nothing.

    Each includes how far a rounding error of its log-ratio moves it.
    """

    def __init__(self, tokens: _Tokens, config: IPOConfig) -> None:
        trainer, inference = tokens.trainer, tokens.inference.to(tokens.compute)
        band_x = trainer - inference
        self.measured = tokens.mask & band_x.isfinite()
        counted = self.measured & (band_x <= math.log(torch.finfo(tokens.compute).max))
        dropped, _, _ = reference.mask_rule(config, trainer, inference, tokens.advantages)
        rollout = reference.rollout_rule(config, band_x, tokens.mask, tokens.cu_seqlens)
        self.keep = counted & ~dropped & ~rollout
        pays_kl = self.keep if config.kl_scope == "kept" else counted & ~rollout
        self.x = _only(counted, trainer) - _only(counted, inference)
        # A ratio below the smallest normal number has fewer digits.
        self.ratio = self.x.exp() + torch.finfo(tokens.compute).smallest_normal
        advantage = config.adv_tau * _only(self.keep, tokens.advantages).abs()
        self.teacher = None
        if tokens.teacher is not None:
            self.teacher = (_only(counted, tokens.teacher) - _only(counted, trainer)).abs()
            if tokens.teacher.dtype != tokens.compute:  # rounded before the difference is taken
                self.teacher = self.teacher + _only(counted, tokens.teacher).abs()
        if config.teacher_tau:
            advantage = advantage + config.teacher_tau * _only(self.keep, self.teacher)
        given = torch.ones_like(self.x) if tokens.weights is None else tokens.weights
        weight = _only(pays_kl, given).abs()
        steep = 1 + self.x.abs()
        # Each product may be subnormal, and lose digits that a later factor enlarges.
        normal = torch.finfo(tokens.compute).smallest_normal
        pg = weight * (advantage + normal) * self.ratio * steep + normal
        self.pg = _only(self.keep & (weight != 0), pg)
        # A product may overflow before a weight below 1 makes it small.
        product = _only(self.keep & (weight != 0), advantage * self.ratio)
        overflows = product > torch.finfo(tokens.compute).max / 64
        self.pg = torch.where(overflows, math.inf, self.pg)
        pays_kl = pays_kl & (weight != 0)
        self.kl = _only(pays_kl, weight * (config.kl_tau * self.x**2 + steep * normal) + normal)
        kl_derivative = weight * 2 * (config.kl_tau * self.x.abs() + normal) + normal
        self.derivative = self.pg + _only(pays_kl, kl_derivative)
        self.entropy = None if tokens.entropy is None else _only(counted, tokens.entropy).abs()


def _only(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values.double(), 0.0)


def _judge_loss_value(
    tokens: _Tokens,
    results: Sequence[Result],
    metrics: dict[str, torch.Tensor],
    scales: _Scales,
    verdicts: _Verdicts,
) -> None:
    """The reference has one loss for all calls: each call's own is that of its metrics."""
    active = tokens.by_segment(tokens.mask)
    exact = tokens.by_call((metrics["pg_loss"] + metrics["kl_loss"]) * active) * tokens.inverse
    terms = tokens.by_call(tokens.by_segment(scales.pg + scales.kl))
    budget = _ULPS * tokens.eps * (terms * tokens.inverse + exact.abs())
    budget = _unless_overflowing(budget, terms * tokens.inverse.clamp(min=1), tokens.compute)
    ours = torch.stack([result.outputs[0].detach() for result in results])
    # A normalizer of 0 gives 0 whatever the tokens hold.
    exact = torch.where(tokens.inverse == 0, 0.0, exact)
    budget = budget + torch.finfo(tokens.compute).smallest_normal * tokens.eps
    verdicts.compare("loss", torch.arange(len(results)), ours, exact, budget)


def _unless_overflowing(
    budget: torch.Tensor, magnitude: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """NaN where a term may leave the range of ``dtype``: there anything goes."""
    return torch.where(magnitude > torch.finfo(dtype).max / 64, math.nan, budget)


def _judge_metrics(
    tokens: _Tokens,
    results: Sequence[Result],
    exact: dict[str, torch.Tensor],
    scales: _Scales,
    verdicts: _Verdicts,
) -> None:
    means = [result.means.view(len(IPOMetrics.MEAN_ROWS), -1) for result in results]
    ours = dict(zip(IPOMetrics.MEAN_ROWS, torch.cat(means, 1), strict=True))
    magnitudes = _metric_magnitudes(tokens, exact, scales)
    normal = torch.finfo(tokens.compute).smallest_normal
    for name, value in exact.items():
        if name in EXACT_METRICS:
            rounded, budget = value.to(tokens.compute).double(), torch.zeros_like(value)
        else:
            rounded, magnitude = value, magnitudes[name]
            budget = _ULPS * tokens.eps * (magnitude + value.abs() / 4).clamp(min=normal)
            budget = _unless_overflowing(budget, magnitude, tokens.compute)
        verdicts.compare(name, tokens.segment_owner, ours[name], rounded, budget)


def _metric_magnitudes(
    tokens: _Tokens, exact: dict[str, torch.Tensor], scales: _Scales
) -> dict[str, torch.Tensor]:
    active = tokens.by_segment(tokens.mask).clamp(min=1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return tokens.by_segment(values) / active

    distance = scales.x.abs()
    steep = 1 + tokens.most_of_segment(distance.clamp(max=100), 0.0)
    of_reference = 2.0**-52 / tokens.eps  # of its exp(x) - 1 - x, in float64
    cancelled = tokens.most_of_segment(distance.clamp(max=1), 0.0) * of_reference
    magnitudes = {"pg_loss": mean(scales.pg), "kl_loss": mean(scales.kl)}
    for name in ("mismatch_kl", "masked_mismatch_kl", "unmasked_mismatch_kl"):
        magnitudes[name] = exact[name] * steep + cancelled
    magnitudes["ess"] = _magnitude_of_ess(tokens, exact["ess"] * steep, scales)
    if scales.teacher is not None:
        magnitudes["teacher_kl"] = mean(scales.teacher)
    if scales.entropy is not None:
        magnitudes["entropy"] = mean(scales.entropy)
    if "rollout_dropped" in exact:
        magnitudes["rollout_dropped"] = exact["rollout_dropped"]
    return magnitudes


def _magnitude_of_ess(tokens: _Tokens, magnitude: torch.Tensor, scales: _Scales) -> torch.Tensor:
    """Anything goes where ratios or their squares leave the range of numbers."""
    kept_x = torch.where(scales.keep, scales.x, -math.inf)
    largest = tokens.most_of_segment(kept_x, -math.inf)
    smallest = -80.0 if tokens.compute == torch.float32 else -340.0
    out_of_range = (largest > 340.0) | ((largest < smallest) & (largest > -math.inf))
    return torch.where(out_of_range, math.inf, magnitude)


def _judge_gradient(
    tokens: _Tokens, results: Sequence[Result], derivatives: _Derivatives, verdicts: _Verdicts
) -> None:
    """By log-probabilities: made in the compute dtype, scaled, then rounded to the inputs'."""
    leaf = "trainer_logprobs"
    have = [leaf in result.gradients for result in results]
    if not any(have):
        return
    nothing = [call.arguments[leaf] for call in tokens.calls]
    ours = torch.cat(
        [
            result.gradients[leaf].reshape(-1) if here else torch.zeros_like(like).reshape(-1)
            for result, here, like in zip(results, have, nothing, strict=True)
        ]
    )
    factor = (tokens.inverse * tokens.grad_loss)[tokens.owner]
    largest = factor.abs().maximum(tokens.inverse[tokens.owner]).clamp(min=1)
    exact = torch.where(factor == 0, 0.0, derivatives.exact * factor)
    steps = _smallest(tokens.compute) * (1 + tokens.grad_loss.abs())[tokens.owner]
    steps = torch.where((derivatives.exact == 0) & (derivatives.budget == 0), 0.0, steps)
    budget = derivatives.budget * factor.abs() + steps + _rounding_to(exact, ours.dtype)
    magnitude = (derivatives.exact.abs() + derivatives.budget) * largest
    budget = _unless_overflowing(budget, magnitude, tokens.compute)
    budget = torch.where(torch.tensor(have)[tokens.owner], budget, math.nan)
    verdicts.compare("gradient", tokens.owner, ours, exact, budget)


def _smallest(dtype: torch.dtype) -> float:
    """The smallest number above 0."""
    resolution = torch.finfo(dtype)
    return resolution.smallest_normal * resolution.eps


def _rounding_to(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of ``dtype``, or a whole subnormal one; 0 of 0."""
    half = (torch.finfo(dtype).eps / 2 * exact.abs()).clamp(min=_smallest(dtype))
    return torch.where(exact == 0, 0.0, half)


# -------------------------------------------------------------------------------------------------
# Rows of logits


class _Rows:
    """Logits, or the products that make them, of all calls: [rows, columns], float64."""

    def __init__(self, calls: Sequence[Call], results: Sequence[Result]) -> None:
        self.calls, self.results = calls, results
        arguments = [call.arguments for call in calls]
        self.labels = torch.cat([_active_labels(a).reshape(-1) for a in arguments])
        self.sizes = [a["labels"].numel() for a in arguments]
        self.owner = _repeat(self.sizes)
        self.temperature = torch.cat(
            [_temperature(a).expand(a["labels"].shape).reshape(-1) for a in arguments]
        )
        self.softcap = arguments[0].get("softcap")
        self.scale = arguments[0].get("logit_scale", 1.0)
        self.logprobs = torch.cat([r.logprobs.reshape(-1) for r in results])
        self.entropy = torch.cat([r.entropy.reshape(-1) for r in results])
        compute = self.logprobs.dtype
        self.eps = torch.finfo(compute).eps * (2 if compute == torch.float64 else 1)
        self.from_hidden = "hidden" in arguments[0]
        self._make_logits(arguments)

    def _make_logits(self, arguments: list[dict[str, Any]]) -> None:
        if not self.from_hidden:
            logits = [a["logits"].reshape(-1, a["logits"].shape[-1]) for a in arguments]
            self.logits = torch.cat(logits).double()
            self.product_error = torch.zeros(len(self.logits), dtype=torch.float64)
            return
        self.states = [a["hidden"].reshape(-1, a["hidden"].shape[-1]).double() for a in arguments]
        self.weights = [a["weight"].double() for a in arguments]
        pairs = list(zip(self.states, self.weights, strict=True))
        self.logits = torch.cat([h @ w.t() for h, w in pairs])
        magnitude = torch.cat([(h.abs() @ w.abs().t()).amax(-1) for h, w in pairs])
        if "bias" in arguments[0]:
            biases = torch.stack([a["bias"].double() for a in arguments])[self.owner]
            self.logits = self.logits + biases
            magnitude = magnitude + biases.abs().amax(-1)
        terms = self.weights[0].shape[1]
        self.product_error = (2 + terms / 2) * self.eps * magnitude


def _active_labels(arguments: dict[str, Any]) -> torch.Tensor:
    labels = arguments["labels"].long()
    mask = arguments.get("loss_mask")
    return labels if mask is None else labels.masked_fill(~mask, _IGNORED)


def _temperature(arguments: dict[str, Any]) -> torch.Tensor:
    return torch.as_tensor(arguments.get("temperature", 1.0), dtype=torch.float64)


def _judge_rows(
    calls: Sequence[Call], results: Sequence[Result], config: IPOConfig, verdicts: _Verdicts
) -> None:
    """Log-probabilities and entropies, then what is made of them, then the gradients."""
    rows = _Rows(calls, results)
    leaf = rows.logits.requires_grad_()
    logprobs, entropy = reference.token_logprobs(
        leaf,
        rows.labels,
        temperature=rows.temperature,
        softcap=rows.softcap,
        logit_scale=rows.scale,
        dtype=torch.float64,
    )
    errors = _SoftmaxErrors(rows, logprobs.detach(), entropy.detach())
    verdicts.compare("logprobs", rows.owner, rows.logprobs, logprobs.detach(), errors.logprobs)
    verdicts.compare("entropy", rows.owner, rows.entropy, entropy.detach(), errors.entropy)
    if calls[0].is_loss:
        derivatives = _judge_loss(calls, results, config, verdicts)
        into = derivatives.exact, torch.zeros_like(derivatives.exact)
        into_error = derivatives.budget
    else:
        into = tuple(_flowing(rows, i) for i in range(2))
        into_error = torch.zeros_like(into[0])
    objective = (logprobs * into[0] + entropy * into[1]).sum()
    (gradient,) = torch.autograd.grad(objective, leaf)
    # What flows into a NaN makes anything of its own row; the loss lets nothing flow there.
    flows = (into[0] != 0) | (into[1] != 0)
    unknown = (into[0].isnan() | ~into_error.isfinite() | (flows & ~errors.sound))[:, None]
    budget = errors.gradient(into[0].abs(), into[1].abs(), into_error)
    nothing = (into[0] == 0) & (into[1] == 0) & (into_error == 0) | ~errors.sound
    budget = torch.where(unknown, math.nan, torch.where(nothing[:, None], 0.0, budget))
    gradient = torch.where(nothing[:, None], 0.0, gradient)
    bound = into[0].abs() + into[1].abs() * errors.surprise.amax(-1)
    bound = bound * rows.scale / rows.temperature
    _judge_row_gradients(rows, gradient, budget, bound, errors.steps, verdicts)


def _flowing(rows: _Rows, output: int) -> torch.Tensor:
    """What flows into one output of each row; nothing into a row that takes no part."""
    grads = []
    for call in rows.calls:
        grad = call.grads[output]
        like = call.arguments["labels"]
        grad = torch.zeros(like.shape) if grad is None else grad
        grads.append(torch.where(like == _IGNORED, 0.0, grad.double()).reshape(-1))
    return torch.cat(grads)


class _SoftmaxErrors:
    """First-order bounds of what the compute dtype loses in each row's softmax."""

    def __init__(self, rows: _Rows, logprobs: torch.Tensor, entropy: torch.Tensor) -> None:
        eps, self.eps = rows.eps, rows.eps
        z, cap = rows.scale * rows.logits.detach(), rows.softcap
        inverse = (1 / rows.temperature)[:, None]
        active = rows.labels != _IGNORED
        self.sound = active & ~logprobs.isnan()
        z = torch.where(self.sound[:, None], z, 0.0)
        inverse = torch.where(self.sound[:, None], inverse, 1.0)
        capped = z if cap is None else cap * torch.tanh(z / cap)
        x = (capped - capped.amax(-1, keepdim=True)) * inverse
        p, self.label = x.softmax(-1), torch.where(self.sound, rows.labels, 0)[:, None]
        distance = x.abs().clamp(max=1e30)
        largest = torch.where(capped.isfinite(), capped, 0).abs().amax(-1, keepdim=True)
        # A logit's argument: its difference to the maximum and the temperature's reciprocal are
        # rounded; a capped one was rounded before; a product's has its own error.
        argument = 4 * eps * distance
        if cap is not None:
            argument = argument + 16 * eps * largest * inverse
        product_error = torch.where(self.sound, rows.product_error, 0.0)[:, None]
        product_error = rows.scale * product_error * inverse
        argument = argument + 2 * product_error
        # The reference divides by the temperature before it subtracts the maximum.
        argument = argument + 2.0**-51 * largest * inverse
        of_sum = (p * (argument + 4 * eps)).sum(-1, keepdim=True)
        log_sum = -p.amax(-1, keepdim=True).log()
        at_label = argument.gather(-1, self.label)
        tiny = torch.finfo(rows.logprobs.dtype).smallest_normal
        size = logprobs.nan_to_num(0.0, 0.0, -1e30).abs()[:, None]
        self.logprobs = self._of_active(at_label + of_sum + 4 * eps * (1 + size) + tiny)
        relative = argument + of_sum + 8 * eps
        spread = (p * distance).sum(-1, keepdim=True)
        of_entropy = of_sum + (p * (distance * relative + argument)).sum(-1, keepdim=True)
        of_entropy = of_entropy + 4 * eps * (1 + log_sum + spread)
        self.entropy = self._of_active(of_entropy + tiny)
        self._of_entropy, self._log_sum, self._argument = of_entropy, log_sum, argument
        self._p, self._relative, self._distance = p, relative, distance
        self.surprise = (distance + log_sum + entropy.nan_to_num().abs()[:, None]).clamp(max=1e30)
        steepness = torch.zeros_like(z) if cap is None else 2 * z.abs().clamp(max=1e30) / cap
        self._of_slope = eps * (4 + 4 * steepness.clamp(max=200))
        slope = torch.ones_like(z) if cap is None else 1 / torch.cosh(z / cap) ** 2
        self._slope = rows.scale * slope * inverse + tiny
        self._step = _smallest(rows.logprobs.dtype)
        self.steps = 4 * self._step * (1 + self._slope)
        self._vanishing = 2 * tiny  # an exponential below it counts as 0
        self._vanishing_slope = torch.zeros_like(inverse)
        if cap is not None:
            # A slope is 4 times an exponential.
            self._vanishing_slope = 4 * tiny * rows.scale * inverse
            # How far an error of the logit itself moves the slope.
            self._of_slope = self._of_slope + 2 * product_error / inverse / cap

    def _of_active(self, budget: torch.Tensor) -> torch.Tensor:
        return torch.where(self.sound, budget[:, 0], 0.0)

    def gradient(
        self, into_logprob: torch.Tensor, into_entropy: torch.Tensor, into_error: torch.Tensor
    ) -> torch.Tensor:
        """By every logit, of gradients that flow in; that by the log-probability is off itself."""
        p, relative = self._p, self._relative + self._of_slope
        is_label = torch.zeros_like(p).scatter_(-1, self.label, 1.0)
        into_logprob, into_entropy = into_logprob[:, None], into_entropy[:, None]
        of_logprob = p * relative + is_label * (self._of_slope + 8 * self.eps)
        moved = self.surprise * relative + self._argument + self._of_entropy
        of_entropy = p * (moved + 4 * self.eps * self.surprise)
        furthest = -math.log(self._step)
        vanishing = self._vanishing * (into_logprob + into_entropy * (1 + self._log_sum + furthest))
        budget = into_logprob * of_logprob + into_entropy * of_entropy + vanishing
        budget = budget + into_error[:, None] * (p + is_label)
        size = into_logprob * (p + is_label) + into_entropy * p * self.surprise
        budget = budget * self._slope + size * self._vanishing_slope
        return budget + self.steps


# -------------------------------------------------------------------------------------------------
# Gradients by logits, hidden states and weight


def _judge_row_gradients(
    rows: _Rows,
    gradient: torch.Tensor,  # [rows, columns]
    budget: torch.Tensor,  # the same
    bound: torch.Tensor,  # [rows], of each row's gradient
    steps: torch.Tensor,  # [rows, columns], what subnormal products on the way lose
    verdicts: _Verdicts,
) -> None:
    begin = 0
    for i, (call, size) in enumerate(zip(rows.calls, rows.sizes, strict=True)):
        of_call = slice(begin, begin + size)
        begin += size
        if verdicts.found[i] is not None or not rows.results[i].gradients:
            continue
        values = (gradient[of_call], budget[of_call], bound[of_call], steps[of_call])
        made = _Made(call, *values)
        if rows.from_hidden:
            _judge_products(rows, i, made, verdicts)
        else:
            ours = rows.results[i].gradients["logits"].reshape(gradient[of_call].shape)
            _compare_with(verdicts, i, "gradient", ours, *made.scaled(made.rounded))


class _Made:
    """A call's gradient by its logits as it is made: unscaled, and rounded to the leaf's dtype."""

    def __init__(
        self,
        call: Call,
        gradient: torch.Tensor,
        budget: torch.Tensor,
        bound: torch.Tensor,
        steps: torch.Tensor,
    ) -> None:
        self.dtype = call.arguments["weight" if "weight" in call.arguments else "logits"].dtype
        inverse = _inverse(call) if call.is_loss else 1.0
        factor = call.grads[0] if call.is_loss else 1.0
        self._is_capped = call.arguments.get("softcap") is not None
        self.factor, self.signed = abs(factor), factor
        self.exact, self.budget = gradient * inverse, budget * inverse
        self._bound = (bound * inverse)[:, None]
        self.rounded = (
            self.budget
            + _rounding_to(self.exact, self.dtype)
            + torch.where((gradient == 0) & (budget == 0), 0.0, steps + self._least_step())
        )
        self.overflows = not self._has_row_scales and self._leaves_range(self.exact)

    @property
    def _has_row_scales(self) -> bool:
        """In fp16 each row is stored over a power of two near the largest that it may hold."""
        return self.dtype == torch.float16

    def _least_step(self) -> torch.Tensor | float:
        if not self._has_row_scales:
            return _smallest(self.dtype)
        if self._is_capped:
            # EXCLUDED: the cap's slope comes after the row's scale, so that where it is tiny the
            # whole row may be subnormal over it.
            return math.inf
        # The scale is made from what bounds the row: a label of probability 1 leaves less.
        largest = self.exact.nan_to_num().abs().amax(-1, keepdim=True)
        return largest * 2.0**-20 + self._bound.nan_to_num() * 2.0**-36

    def _leaves_range(self, values: torch.Tensor) -> bool:
        finite = values[values.isfinite()].abs()
        return bool(finite.numel()) and float(finite.max()) > torch.finfo(self.dtype).max / 4

    def scaled(
        self, budget: torch.Tensor, exact: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What backward hands over, and how far it may be off but for the last rounding."""
        exact = self.exact if exact is None else exact
        result = torch.where(torch.tensor(self.signed == 0), 0.0, exact * self.signed)
        unknown = self.overflows or self._leaves_range(result if self._has_row_scales else exact)
        return result, torch.full_like(budget, math.nan) if unknown else budget * self.factor


def _compare_with(
    verdicts: _Verdicts,
    call: int,
    name: str,
    ours: torch.Tensor,
    exact: torch.Tensor,
    budget: torch.Tensor,
) -> None:
    owner = torch.full((len(ours),), call)
    verdicts.compare(name, owner, ours, exact, budget + _rounding_to(exact, ours.dtype))


def _judge_products(rows: _Rows, i: int, made: _Made, verdicts: _Verdicts) -> None:
    """By what the head is made of: products of the rounded gradient, in the compute dtype."""
    unknown = made.rounded.isnan().any(-1, keepdim=True)
    # What is not finite belongs to a row without a gradient, by its NaN or by its softcap.
    states, weight = rows.states[i].nan_to_num(0.0, 0.0, 0.0), rows.weights[i]
    results = rows.results[i].gradients
    exact, error = made.exact.nan_to_num(), made.rounded.nan_to_num()
    columns, tokens = weight.shape[0], len(states)
    if "hidden" in results:
        ours = results["hidden"].reshape(states.shape)
        size = exact.abs() @ weight.abs()
        budget = error @ weight.abs() + _of_product(rows, columns, size)
        product = exact @ weight
        budget = budget + _rounding_to(product, ours.dtype)
        budget = torch.where(unknown, math.nan, budget)
        _compare_with(verdicts, i, "grad_hidden", ours, *made.scaled(budget, product))
    if "weight" in results:
        size = exact.abs().t() @ states.abs()
        budget = error.t() @ states.abs() + _of_product(rows, tokens, size)
        budget = torch.full_like(budget, math.nan) if unknown.any() else budget
        scaled = made.scaled(budget, exact.t() @ states)
        _compare_with(verdicts, i, "grad_weight", results["weight"], *scaled)
    if "bias" in results:
        budget = error.sum(0) + _of_product(rows, tokens, exact.abs().sum(0))
        budget = torch.full_like(budget, math.nan) if unknown.any() else budget
        scaled = made.scaled(budget, exact.sum(0))
        _compare_with(verdicts, i, "grad_bias", results["bias"], *scaled)


def _of_product(rows: _Rows, terms: int, size: torch.Tensor) -> torch.Tensor:
    """What a product of so many terms loses in the compute dtype, subnormal ones included."""
    step = _smallest(rows.logprobs.dtype)
    return (terms / 2 + 4) * torch.where(size > 0, rows.eps * size + step, 0.0)
