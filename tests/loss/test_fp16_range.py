"""fp16: gradients made in forward neither underflow nor overflow before a loss scale is applied."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import ipo_ext
from ipo_ext import IPOConfig, reference
from tests.support import hidden, logits
from tests.support.backends import Backend
from tests.support.cases import Case, HiddenCase, LogitsCase, evaluate
from tests.support.operators import call_operator, find_faults

WEIGHTS = [1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4]
LOSS_SCALES = [1.0, 2.0**8, 2.0**16]
LARGEST = 65504.0
CONFIGS = {
    "one pass": IPOConfig(dppo_mask_low=0, dppo_mask_high=math.inf, teacher_tau=0.3),
    "rollout rule": IPOConfig(
        dppo_mask_low=0, dppo_mask_high=math.inf, teacher_tau=0.3, rollout_min_ratio=1e-9
    ),
}

every_config = pytest.mark.parametrize("config", CONFIGS)
every_weight = pytest.mark.parametrize("weight", [*WEIGHTS, None], ids=str)


def error_and_allowed(ours: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Norm of the difference over the norm; 1e-3 and twice what rounding to fp16 once costs.

    Where fp16 does not hold all of a gradient, only what it does hold must be finite: up to the
    error of its row, since an element may be a sum whose terms it does not hold.
    """
    ours, sizes = ours.cpu().double(), exact.abs()
    if sizes.max() >= LARGEST:
        fits = sizes + 1e-3 * sizes.amax(-1, keepdim=True) < LARGEST
        assert ours[fits].isfinite().all()
        return 0.0, 0.0
    size = exact.norm().item()
    if size == 0:
        return ours.norm().item(), 0.0
    rounding = (exact.half().double() - exact).norm().item()
    return (ours - exact).norm().item() / size, 1e-3 + 2 * rounding / size


def assert_within_range(ours: torch.Tensor, exact: torch.Tensor) -> None:
    error, allowed = error_and_allowed(ours, exact)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def with_wide_range(case: Any, config: str, weight: float | None) -> Any:
    """Ratios from 1e-4 to 1e4 and a teacher; ``weight`` None: of all sizes in one batch."""
    tokens = case.tokens
    generator = torch.Generator().manual_seed(5)
    if isinstance(case, HiddenCase):
        exact, _ = reference.linear_token_logprobs(
            case.hidden, case.weight, case.labels, bias=case.bias, dtype=torch.float64
        )
    else:
        exact, _ = reference.token_logprobs(case.logits, case.labels, dtype=torch.float64)
    x = (torch.rand(tokens, generator=generator, dtype=torch.float64) * 2 - 1) * math.log(1e4)
    x[::7] = 0.01
    exponents = torch.rand(tokens, generator=generator) * 12 - 8
    weights = torch.full((tokens,), weight) if weight is not None else 10.0**exponents
    return case.with_(
        inference_logprobs=(exact - x).float(),
        teacher_logprobs=(exact + torch.randn(tokens, generator=generator)).float(),
        loss_weights=weights,
        config=CONFIGS[config],
        normalizer=torch.tensor(float(tokens)),
    )


def exact_gradients(case: Case) -> tuple[torch.Tensor, ...]:
    wide = case.with_(**{name: getattr(case, name).double() for name in case.leaves})
    function = getattr(reference, type(case).function.__name__)
    return evaluate(wide, function, dtype=torch.float64).gradients


def logits_case(config: str, weight: float | None) -> LogitsCase:
    case = logits.random_case(24, 131, torch.float16, masked=0.2)
    return with_wide_range(case, config, weight)


def hidden_case(config: str, weight: float | None) -> HiddenCase:
    case = hidden.random_case(40, dtype=torch.float16, masked=0.2, has_bias=True)
    return with_wide_range(case, config, weight)


@every_config
@every_weight
@pytest.mark.parametrize("inplace", [False, True])
def test_from_logits(backend: Backend, config: str, weight: float | None, *, inplace: bool) -> None:
    case = logits_case(config, weight)
    (exact,) = exact_gradients(case)
    case = case.to(backend.device)
    for scale in LOSS_SCALES:
        leaf = case.logits.detach().requires_grad_()
        out = case.with_(logits=leaf * 1).call(inplace=inplace)
        (gradient,) = torch.autograd.grad(out.loss * scale, leaf)
        assert gradient.dtype == torch.float16
        assert_within_range(gradient, exact * scale)


@every_config
@every_weight
@pytest.mark.parametrize("chunk_size", [7, 64])
def test_from_hidden(backend: Backend, config: str, weight: float | None, chunk_size: int) -> None:
    case = hidden_case(config, weight)
    exact = exact_gradients(case)
    case = case.to(backend.device)
    for scale in LOSS_SCALES:
        ours = evaluate(case, grad_loss=scale, chunk_size=chunk_size)
        for gradient, truth in zip(ours.gradients, exact, strict=True):
            assert gradient.dtype == torch.float16
            assert_within_range(gradient, truth * scale)


@every_weight
@pytest.mark.parametrize("width_of_states", [1e-3, 1.0, 1e3])
def test_hidden_states_of_any_size(
    backend: Backend, weight: float | None, width_of_states: float
) -> None:
    """Which the weight's gradient is a product of: theirs and the rows' exponents together."""
    case = hidden.random_case(40, dtype=torch.float16, masked=0.2, has_bias=True)
    case = case.with_(
        hidden=(case.hidden.float() * width_of_states).half(),
        weight=(case.weight.float() / width_of_states).half(),
    )
    case = with_wide_range(case, "one pass", weight)
    exact = exact_gradients(case)
    ours = evaluate(case.to(backend.device), grad_loss=2.0**10, chunk_size=16)
    for gradient, truth in zip(ours.gradients, exact, strict=True):
        assert_within_range(gradient, truth * 2.0**10)


@pytest.mark.parametrize("size", WEIGHTS)
@pytest.mark.parametrize("form", ["token_logprobs", "linear_token_logprobs"])
def test_log_probabilities(backend: Backend, form: str, size: float) -> None:
    """Gradients that flow in are of any size, a row's own; those of float32 weights keep it."""
    case = hidden.random_case(40, dtype=torch.float16, masked=0)
    names = ("hidden", "weight") if form == "linear_token_logprobs" else ("logits",)
    tensors = [case.hidden, case.weight] if len(names) == 2 else [case.from_logits().logits]
    flows = torch.randn(2, 40, generator=torch.Generator().manual_seed(2)) * size
    more = {"chunk_size": 16} if len(names) == 2 else {}

    def gradients(function: Any, operands: list[torch.Tensor], **how: Any) -> Any:
        leaves = [operand.detach().requires_grad_() for operand in operands]
        device = leaves[0].device
        outputs = function(*leaves, case.labels.to(device), **how)
        return torch.autograd.grad(
            outputs, leaves, [f.to(device, o.dtype) for f, o in zip(flows, outputs, strict=True)]
        )

    exact = gradients(getattr(reference, form), [t.double() for t in tensors], dtype=torch.float64)
    ours = gradients(getattr(ipo_ext, form), [t.to(backend.device) for t in tensors], **more)
    for gradient, truth in zip(ours, exact, strict=True):
        assert_within_range(gradient, truth)


def test_the_gradient_of_a_float32_weight_under_autocast_has_no_range(backend: Backend) -> None:
    """fp16 is the dtype of products alone: float32 gradients of 1e-12 keep their digits."""
    case = hidden_case("one pass", 1e-8)
    wide = case.with_(**{name: getattr(case, name).float() for name in case.leaves})
    exact = exact_gradients(case)
    with torch.autocast(backend.device.type, torch.float16):
        ours = evaluate(wide.to(backend.device), chunk_size=16)
    for gradient, truth in zip(ours.gradients, exact, strict=True):
        assert gradient.dtype == torch.float32
        error = (gradient.cpu().double() - truth).norm() / truth.norm()
        assert error < 1e-3


def test_an_advantage_of_any_size_and_its_normalizer(backend: Backend) -> None:
    """Which GradScaler would have halved its scale for, for ever."""
    case = logits.random_case(30, 65, torch.float16).to(backend.device)
    plain = evaluate(case.with_(normalizer=30.0))
    kl_free = IPOConfig(kl_tau=0)
    plain = evaluate(case.with_(normalizer=30.0, config=kl_free), grad_loss=1024.0)
    large = case.with_(advantages=case.advantages * 2.0**40, normalizer=30.0 * 2.0**40)
    ours = evaluate(large.with_(config=kl_free), grad_loss=1024.0)
    torch.testing.assert_close(ours.gradient, plain.gradient, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("wrong", ["dtype", "count", "layout", "float32 gradient"])
def test_an_operator_refuses_row_scales_that_are_none(backend: Backend, wrong: str) -> None:
    dtype = torch.float32 if wrong == "float32 gradient" else torch.float16
    case = logits.random_case(30, 65, dtype).to(backend.device)
    scales = {
        "dtype": torch.zeros(30, dtype=torch.float64),
        "count": torch.zeros(29),
        "layout": torch.zeros(60)[::2],
        "float32 gradient": torch.zeros(30),
    }[wrong].to(backend.device)
    others = {"fault": find_faults(case), "gradient": torch.empty_like(case.logits)}
    with pytest.raises(RuntimeError, match="row_scales: expected None, or for a float16 gradient"):
        call_operator("chunk_logprobs_and_gradient", case, row_scales=scales, **others)


def test_compiled(backend: Backend) -> None:
    case = logits_case("one pass", 1e-6)
    (exact,) = exact_gradients(case)
    case = case.to(backend.device)
    leaf = case.logits.detach().requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(scores: torch.Tensor) -> torch.Tensor:
        return case.with_(logits=scores * 1).call().loss

    (gradient,) = torch.autograd.grad(loss(leaf) * 2.0**16, leaf)
    assert_within_range(gradient, exact * 2.0**16)
