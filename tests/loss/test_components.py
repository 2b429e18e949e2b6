"""Cross-entropy and distillation beside the loss, in its launches, on every backend: each alone is
its own function, all together their sum, and nothing of one reaches another."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipo_ext import _C, IPOConfig, IPOOutput, reference
from ipo_ext._ops.arguments import Components
from ipo_ext.functional import component_loss
from tests.support.backends import Backend
from tests.support.cases import LogprobsCase, same_bits
from tests.support.closeness import assert_close
from tests.support.layouts import misaligned
from tests.support.logprobs import DTYPES, EDGE_SIZES, SEGMENTS, random_case
from tests.support.schedules import schedules

NONE = sys.float_info.max  # the cap of a distillation without one
CE = IPOConfig(mask_rule="none", pg_form="reinforce", kl_tau=0.0)
REF_KL = IPOConfig(
    0.2,
    math.inf,
    mask_rule="prob_diff",
    pg_form="capped",
    ratio_cap=1e4,
    adv_tau=0.0,
    teacher_tau=1.0,
    kl_tau=0.0,
)
RL = {
    "default": IPOConfig(),
    "ipo": IPOConfig.ipo(),
    "geometric": IPOConfig.geometric(0.9, 1.1),
}
fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclasses.dataclass(frozen=True)
class Beside:
    """What stands beside a case's loss."""

    ce_weights: torch.Tensor | None
    ref_kl_weights: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    ce_scale: torch.Tensor | None = dataclasses.field(default_factory=lambda: torch.tensor(5.0))
    ref_kl_scale: torch.Tensor | None = dataclasses.field(default_factory=lambda: torch.tensor(7))
    cap: float = 1e4
    tau: float = 0.0

    def to(self, device: torch.device) -> Components:
        def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Components(
            there(self.ce_weights),
            there(self.ref_kl_weights),
            there(self.ref_logprobs),
            self.ce_scale,
            there(self.ref_kl_scale),
            self.cap,
            self.tau,
        )


def random_components(case: LogprobsCase, seed: int = 0, **fields: Any) -> Beside:
    """Each on about half of the tokens, garbage on the others wherever it may be."""
    generator = torch.Generator().manual_seed(seed)
    dtype = case.trainer_logprobs.dtype

    def stream() -> torch.Tensor:
        drawn = torch.rand(2, case.tokens, generator=generator)
        return torch.where(drawn[0] < 0.5, drawn[1] + 0.1, 0.0).to(dtype)

    ref_kl_weights = stream()
    ref = -3 * torch.rand(case.tokens, generator=generator)
    return Beside(
        stream(),
        ref_kl_weights,
        torch.where(ref_kl_weights != 0, ref, torch.nan).to(dtype),
        **fields,
    )


def ours(
    case: LogprobsCase, beside: Beside, backend: Backend
) -> tuple[IPOOutput, torch.Tensor, torch.Tensor]:
    """Output, gradient and the components' means."""
    case = case.to(backend.device)
    trainer = case.trainer_logprobs.detach().requires_grad_()
    components = beside.to(backend.device)
    output, means = case.with_(trainer_logprobs=trainer).call(component_loss, components=components)
    (gradient,) = torch.autograd.grad(output.loss, trainer)
    return output, gradient, means


def expected(
    case: LogprobsCase, beside: Beside, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """By three calls of the reference: loss, gradient, means, and the gradient's magnitude."""
    trainer = case.trainer_logprobs.detach().requires_grad_()
    case = case.with_(trainer_logprobs=trainer)
    zeros = torch.zeros_like(case.inference_logprobs)
    outputs = [case.call(reference.ipo_loss, dtype=dtype)]
    means = {}
    if beside.ce_weights is not None:
        ce = LogprobsCase(
            trainer_logprobs=trainer,
            inference_logprobs=trainer.detach(),
            advantages=zeros + 1,
            loss_mask=beside.ce_weights != 0,
            teacher_logprobs=zeros,
            loss_weights=beside.ce_weights,
            normalizer=beside.ce_scale,
            config=CE,
        ).call(reference.ipo_loss, dtype=dtype)
        outputs.append(ce)
        means["nll"] = ce.metrics["teacher_kl"] / (1 - ce.metrics["nonfinite"])
        means["ce_nonfinite"] = ce.metrics["nonfinite"]
    if beside.ref_kl_weights is not None:
        config = REF_KL
        if beside.cap == NONE:
            config = dataclasses.replace(config, pg_form="ratio", ratio_cap=None)
        if beside.tau:
            config = dataclasses.replace(config, kl_tau=beside.tau, kl_scope="active")
        ref_kl = LogprobsCase(
            trainer_logprobs=trainer,
            inference_logprobs=case.inference_logprobs,
            advantages=zeros,
            loss_mask=beside.ref_kl_weights != 0,
            teacher_logprobs=beside.ref_logprobs,
            loss_weights=beside.ref_kl_weights,
            normalizer=beside.ref_kl_scale,
            config=config,
        ).call(reference.ipo_loss, dtype=dtype)
        outputs.append(ref_kl)
        means["ref_kl"] = ref_kl.metrics["teacher_kl"] / (1 - ref_kl.metrics["nonfinite"])
        for name in ("is_masked", "masked_mismatch_kl", "unmasked_mismatch_kl", "nonfinite"):
            means[f"ref_kl_{name}"] = ref_kl.metrics[name]
    gradients = [torch.autograd.grad(output.loss, trainer)[0].double() for output in outputs]
    loss = sum(output.loss.double() for output in outputs)
    return loss, sum(gradients), means, sum(gradient.abs() for gradient in gradients)


def assert_is_the_sum(case: LogprobsCase, beside: Beside, backend: Backend) -> None:
    output, gradient, means = ours(case, beside, backend)
    loss, exact, exact_means, magnitude = expected(case, beside, torch.float64)
    _, naive, _, _ = expected(case, beside, case.compute_dtype)
    assert_close(
        gradient, naive.to(gradient.dtype), exact, scale=magnitude, floor=16, name="gradient"
    )
    rows = dict(zip(_C.COMPONENT_MEAN_ROWS, means.cpu(), strict=True))
    for name, value in exact_means.items():
        torch.testing.assert_close(rows[name].double(), value.double(), rtol=1e-4, atol=1e-6)
    bound = 1e-5 * (1 + float(magnitude.sum()))
    assert abs(float(output.loss.detach()) - float(loss.detach())) <= bound
    # What the loss measures is its own alone; the kernels add in another order.
    alone = case.to(backend.device).call().metrics
    torch.testing.assert_close(output.metrics.sums, alone.sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.metrics.means, alone.means, rtol=2e-6, atol=1e-6)
    assert same_bits(output.metrics.extremes, alone.extremes)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("config", RL)
def test_all_together_are_the_sum_of_each(backend: Backend, dtypes: str, config: str) -> None:
    case = random_case(
        3000, dtypes=DTYPES[dtypes], weights=True, segments="at-tiles", config=RL[config]
    )
    assert_is_the_sum(case, random_components(case), backend)


def test_same_bits_whatever_the_schedule(backend: Backend) -> None:
    case = random_case(2100, segments="at-tiles")
    beside = random_components(case)
    results = []
    for schedule in schedules(backend):
        with schedule:
            results.append(ours(case, beside, backend))
    first, first_gradient, first_means = results[0]
    for output, gradient, means in results[1:]:
        assert same_bits(output.loss, first.loss)
        assert same_bits(output.metrics.sums, first.metrics.sums)
        assert same_bits(gradient, first_gradient)
        assert same_bits(means, first_means)


@pytest.mark.parametrize("present", ["ce", "ref_kl"])
def test_one_alone_beside_the_loss(backend: Backend, present: str) -> None:
    case = random_case(1500, segments="sevens" if present == "ce" else None)
    both = random_components(case)
    absent = dict.fromkeys(
        ("ref_kl_weights", "ref_logprobs") if present == "ce" else ("ce_weights",)
    )
    assert_is_the_sum(case, dataclasses.replace(both, **absent), backend)


@pytest.mark.parametrize("cap", [1.0, 1e4, NONE])
@pytest.mark.parametrize("tau", [0.0, 1e-3])
def test_caps_and_the_squared_log_ratio(backend: Backend, cap: float, tau: float) -> None:
    """A cap of 1 binds on half of the tokens; a ratio beyond 1e38 is dropped without a cap."""
    case = random_case(700, spread=2.0)
    inference = case.inference_logprobs.clone()
    inference[::50] = -80.0
    inference[1::50] = -140.0
    case = case.with_(inference_logprobs=inference)
    beside = random_components(case, cap=cap, tau=tau)
    if cap == 1.0:
        output, gradient, _ = ours(case, beside, backend)
        looser, _, _ = ours(case, dataclasses.replace(beside, cap=2.0), backend)
        assert float(output.loss.detach()) != float(looser.loss.detach())
        assert gradient.isfinite().all()
        return  # the reference is asked for the two caps that prime-rl has
    assert_is_the_sum(case, beside, backend)


@fuzzed
@given(data=st.data())
def test_sizes_alignments_and_segments(backend: Backend, data: st.DataObject) -> None:
    tokens = data.draw(st.one_of(st.integers(1, 70), st.sampled_from(EDGE_SIZES)))
    short = [name for name in SEGMENTS if name not in ("singles", "sevens")]
    segments = data.draw(st.sampled_from([None, *short]))
    dtypes = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    case = random_case(tokens, dtypes=dtypes, seed=data.draw(st.integers(0, 99)), segments=segments)
    beside = random_components(case, seed=data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        case = case.map_tokens(misaligned)
        streams = ("ce_weights", "ref_kl_weights", "ref_logprobs")
        beside = dataclasses.replace(
            beside, **{name: misaligned(getattr(beside, name)) for name in streams}
        )
    assert_is_the_sum(case, beside, backend)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["trainer_logprobs", "inference_logprobs", "ref_logprobs"])
def test_a_number_that_is_not_finite_stays_where_it_is(
    backend: Backend, name: str, bad: float
) -> None:
    """A token of each component alone holds it: only what that token pays changes."""
    case = random_case(64, weights=True)
    at = torch.tensor([3, 20, 41])  # rl alone, cross-entropy alone, distillation alone
    mask = case.loss_mask.clone()
    mask[at] = torch.tensor([True, False, False])
    case = case.with_(loss_mask=mask)
    beside = random_components(case)
    beside.ce_weights[at] = torch.tensor([0.0, 1.0, 0.0])
    beside.ref_kl_weights[at] = torch.tensor([0.0, 0.0, 1.0])
    beside.ref_logprobs[at] = torch.tensor([math.nan, math.nan, -1.0])
    _, clean, clean_means = ours(case, beside, backend)
    if name == "ref_logprobs":
        beside.ref_logprobs[at[:2]] = bad
    else:
        spoiled = getattr(case, name).clone()
        spoiled[at] = bad
        case = case.with_(**{name: spoiled})
    output, gradient, means = ours(case, beside, backend)
    others = torch.ones(64, dtype=torch.bool)
    others[at] = False
    assert same_bits(gradient.cpu()[others], clean.cpu()[others])
    assert gradient.isfinite().all()
    assert output.loss.isfinite()
    assert means.isfinite().all()
    if name == "ref_logprobs":
        assert same_bits(means, clean_means)


def test_what_is_not_finite_is_counted_and_left_out(backend: Backend) -> None:
    trainer = torch.tensor([-1.0, -2.0, math.nan, -math.inf, -3.0])
    zeros = torch.zeros(5)
    case = LogprobsCase(
        trainer_logprobs=trainer,
        inference_logprobs=torch.tensor([-1.0, -2.0, -1.0, -1.0, -math.inf]),
        advantages=zeros,
        loss_mask=zeros.bool(),
    )
    beside = Beside(torch.tensor([1.0, 1, 1, 1, 0]), zeros + 1, zeros, ce_scale=torch.tensor(4))
    output, gradient, means = ours(case, beside, backend)
    rows = dict(zip(_C.COMPONENT_MEAN_ROWS, means.tolist(), strict=True))
    assert rows["nll"] == 1.5
    assert rows["ce_nonfinite"] == 0.5
    assert rows["ref_kl"] == 1.5
    assert rows["ref_kl_nonfinite"] == pytest.approx(0.6)
    assert float(output.loss.detach()) == pytest.approx(3 / 4 - 3 / 7)
    assert gradient.isfinite().all()


def test_a_scale_of_0_and_weights_of_0_are_nothing(backend: Backend) -> None:
    case = random_case(300)
    beside = random_components(case)
    nothing = torch.zeros(300)
    alone = case.to(backend.device).call()
    for without in (
        dataclasses.replace(beside, ce_weights=nothing, ref_kl_weights=nothing),
        dataclasses.replace(beside, ce_scale=torch.tensor(0.0), ref_kl_scale=torch.tensor(0)),
    ):
        output, _, _ = ours(case, without, backend)
        torch.testing.assert_close(output.loss, alone.loss, rtol=1e-6, atol=1e-6)


def test_no_tokens(backend: Backend) -> None:
    case = random_case(0)
    output, gradient, means = ours(case, random_components(case), backend)
    assert float(output.loss.detach()) == 0
    assert gradient.numel() == 0
    assert not means.any()


def test_without_a_gradient_the_same_loss(backend: Backend) -> None:
    case = random_case(2100, segments="sevens")
    beside = random_components(case)
    output, _, means = ours(case, beside, backend)
    with torch.no_grad():
        again, same = case.to(backend.device).call(
            component_loss, components=beside.to(backend.device)
        )
    assert same_bits(again.loss, output.loss)
    assert same_bits(same, means)


def test_a_negative_scale_is_a_fault(backend: Backend) -> None:
    case = random_case(40)
    beside = random_components(case, ce_scale=torch.tensor(-1.0))
    if backend.faults_raise:
        with pytest.raises(RuntimeError, match="ce_scale: expected a count of tokens, at least 0"):
            ours(case, beside, backend)
    else:
        output, gradient, _ = ours(case, beside, backend)
        assert output.loss.isnan()
        assert gradient.isnan().all()


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("ce_weights", torch.ones(3), ValueError, r"ce_weights: expected shape \[40\]"),
        ("ref_logprobs", torch.ones(40).int(), TypeError, "ref_logprobs: expected dtype"),
        ("ce_scale", torch.ones(2), ValueError, "ce_scale: expected a 0-dim tensor"),
        (
            "ref_kl_weights",
            torch.ones(40, requires_grad=True),
            ValueError,
            "ref_kl_weights: expected a tensor that does not require grad",
        ),
        ("ref_logprobs", None, RuntimeError, "ref_logprobs: expected a tensor with ref_kl_weights"),
    ],
)
def test_what_does_not_fit_is_refused(field: str, value: Any, error: Any, message: str) -> None:
    case = random_case(40)
    components = random_components(case).to(torch.device("cpu"))._replace(**{field: value})
    with pytest.raises(error, match=message):
        case.call(component_loss, components=components)


def test_compiled_without_a_break() -> None:
    case = random_case(500, segments="sevens")
    components = random_components(case).to(torch.device("cpu"))

    def run(trainer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, means = case.with_(trainer_logprobs=trainer).call(
            component_loss, components=components
        )
        return output.loss, means

    trainer = case.trainer_logprobs.clone().requires_grad_()
    eager = run(trainer)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(trainer)
    for found, value in zip(compiled, eager, strict=True):
        assert same_bits(found, value)
    gradients = [torch.autograd.grad(loss, trainer)[0] for loss in (compiled[0], eager[0])]
    assert same_bits(*gradients)
