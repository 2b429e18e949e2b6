"""Score centering: what it adds to loss and gradient, in which launches, and to whom not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import ipo_ext
from ipo_ext import IPOConfig, IPOOutput, reference
from tests.support import hidden, logits, logprobs
from tests.support.backends import Backend
from tests.support.cases import Case, Evaluation, LogprobsCase, bits, evaluate, same_bits
from tests.support.centering import CONFIG, centered, with_sampler
from tests.support.closeness import assert_close
from tests.support.layouts import misaligned
from tests.support.operators import call_operator, opcheck
from tests.support.replay import PADDING

UNCENTERED = dataclasses.replace(CONFIG, score_centering=False)
MASKED = "trainer_mask_logprobs"
SAMPLERS = "inference_mask_logprobs"


def case_of(tokens: int = 61, *, width: int = 5, **options: Any) -> LogprobsCase:
    case = logprobs.random_case(tokens, config=CONFIG, weights=True, **options)
    return centered(case, width)


def term(case: LogprobsCase, token: int) -> float:
    """Of one token, in Python, as the formula is written."""
    assert case.trainer_mask_logprobs is not None
    assert case.inference_mask_logprobs is not None
    total = 0.0
    trainer, sampler = case.trainer_mask_logprobs[token], case.inference_mask_logprobs[token]
    for log_p, log_q in zip(trainer.tolist(), sampler.tolist(), strict=True):
        p, q = math.exp(log_p), math.exp(log_q)
        if q > 0 and abs(p - q) <= case.config.dppo_mask_high:
            total += q * min(p / q, case.config.ratio_cap) * log_p
    weight = 1.0 if case.loss_weights is None else case.loss_weights[token].item()
    return case.config.adv_tau * case.advantages[token].item() * weight * total


# -------------------------------------------------------------------------------------------------
# The formula


@pytest.mark.parametrize("width", [1, 2, 31, 33, 512])
def test_adds_the_formula_of_each_active_token(backend: Backend, width: int) -> None:
    """Kept or not: of the tokens here the trust region drops many."""
    case = case_of(23, width=width, dtypes=logprobs.DTYPES["fp64"], normalizer=7.0)
    ours = evaluate(case.to(backend.device))
    plain = evaluate(without(case).to(backend.device))
    terms = [term(case, token) for token in range(23) if case.loss_mask[token]]
    assert ours.metrics["is_masked"] > 0
    assert ours.loss - plain.loss == pytest.approx(math.fsum(terms) / 7, rel=1e-12)
    mean = math.fsum(terms) / len(terms)
    assert ours.metrics["centering_loss"].item() == pytest.approx(mean, rel=1e-12)
    assert same_bits(ours.gradients[0], plain.gradients[0])
    for name, value in plain.metrics.items():
        assert same_bits(ours.metrics[name], value), name


def without(case: LogprobsCase) -> LogprobsCase:
    """The same call without score centering."""
    nothing = {"trainer_mask_logprobs": None, SAMPLERS: None}
    return case.with_(config=UNCENTERED, **nothing)


def assert_accurate(case: LogprobsCase, backend: Backend) -> None:
    ours = evaluate(case.to(backend.device), grad_loss=-1.5)
    naive = evaluate(case, reference.ipo_loss, grad_loss=-1.5)
    wide = case.map_tokens(lambda t: t.double() if t.is_floating_point() else t)
    exact = evaluate(wide, reference.ipo_loss, grad_loss=-1.5)
    mine, theirs, truth = (result.gradients[1] for result in (ours, naive, exact))
    assert_close(mine, theirs, truth, floor=6.0, name="gradient")
    expected = exact.metrics["centering_loss"]
    sizes = wide.with_(advantages=wide.advantages.abs())
    of_size = evaluate(sizes, reference.ipo_loss).metrics["centering_loss"].abs()
    error = (ours.metrics["centering_loss"].cpu().double() - expected).abs()
    assert (error <= 16 * torch.finfo(case.compute_dtype).eps * of_size).all(), error
    torch.testing.assert_close(ours.loss.cpu(), exact.loss.to(ours.loss.dtype))


@pytest.mark.tempts_kernels_out_of_bounds
@pytest.mark.parametrize("segments", [None, "empty-between", "sevens"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "fp64", "fp64-inference"])
def test_matches_float64(backend: Backend, kind: str, segments: str | None) -> None:
    assert_accurate(case_of(dtypes=logprobs.DTYPES[kind], segments=segments), backend)


def test_rows_of_any_layout(backend: Backend) -> None:
    case = case_of(60).map_tokens(lambda t: t.view(4, 15, *t.shape[1:]))
    assert_accurate(case.map_tokens(misaligned), backend)
    turned = case.map_tokens(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1))
    ours, expected = (evaluate(each.to(backend.device)) for each in (turned, case))
    assert same_bits(ours.loss, expected.loss)
    assert same_bits(ours.gradients[1], expected.gradients[1])


@hypothesis.given(
    tokens=st.integers(0, 80),
    width=st.integers(1, 70),
    kind=st.sampled_from(["fp32", "bf16", "fp64"]),
    segments=st.sampled_from([None, "one", "empty-between"]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    normalizer=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 2**32),
)
def test_any_case(
    backend_name: str, tokens: int, width: int, kind: str, seed: int, **options: Any
) -> None:
    case = logprobs.random_case(
        tokens, dtypes=logprobs.DTYPES[kind], seed=seed, weights=seed % 2 == 0, **options
    )
    with Backend(backend_name).active() as backend:
        assert_accurate(centered(case.with_(config=CONFIG), width, seed=seed), backend)


@pytest.mark.parametrize("beyond", [1e-12, -1e-12])
def test_an_id_counts_up_to_the_trust_regions_end(backend: Backend, beyond: float) -> None:
    case = case_of(1, width=1, dtypes=logprobs.DTYPES["fp64"], masked=0.0)
    p, q = 0.5, 0.375
    config = IPOConfig.ipo(eps=p - q + beyond, score_centering=True)
    case = case.with_(
        trainer_mask_logprobs=torch.tensor([[p]], dtype=torch.float64).log(),
        inference_mask_logprobs=torch.tensor([[q]], dtype=torch.float64).log(),
        config=config,
    )
    gradient = evaluate(case.to(backend.device)).gradients[1]
    assert (gradient != 0).item() == (beyond > 0)


@pytest.mark.parametrize("beyond", [1e-9, -1e-9])
def test_the_ratio_of_an_id_is_capped(backend: Backend, beyond: float) -> None:
    case = case_of(1, width=1, dtypes=logprobs.DTYPES["fp64"], masked=0.0)
    q = 0.1
    case = case.with_(
        trainer_mask_logprobs=torch.tensor([[q * (1.5 + beyond)]], dtype=torch.float64).log(),
        inference_mask_logprobs=torch.tensor([[q]], dtype=torch.float64).log(),
    )
    (gradient,) = evaluate(case.to(backend.device)).gradients[1].flatten().tolist()
    factor = CONFIG.adv_tau * (case.advantages * case.loss_weights).item()
    assert gradient == pytest.approx(factor * q * min(1.5 + beyond, 1.5), rel=1e-13)


# -------------------------------------------------------------------------------------------------
# What takes no part


def test_nothing_is_read_of_a_token_that_takes_no_part(backend: Backend) -> None:
    """Inactive, of weight 0, of a log-ratio that is not finite."""
    case = case_of(40, masked=0.0)
    away = torch.arange(40) % 4
    garbage = torch.tensor([math.nan, math.inf, -math.inf, 1e30, 0.0])
    of_ids = {
        name: torch.where((away > 0)[:, None], garbage, getattr(case, name))
        for name in (MASKED, SAMPLERS)
    }
    worse = case.with_(
        loss_mask=away != 1,
        loss_weights=torch.where(away == 2, 0.0, case.loss_weights),
        inference_logprobs=torch.where(away == 3, -math.inf, case.inference_logprobs),
        **of_ids,
    )
    better = case.with_(loss_mask=away == 0)
    ours, expected = (evaluate(each.to(backend.device)) for each in (worse, better))
    assert same_bits(ours.loss, expected.loss)
    assert (bits(ours.gradients[1])[away > 0] == 0).all()
    assert same_bits(ours.gradients[1], expected.gradients[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("names", [[MASKED], [SAMPLERS], [MASKED, SAMPLERS]])
def test_an_id_without_a_finite_logprob_takes_no_part(
    backend: Backend, names: list[str], value: float
) -> None:
    """Upstream multiplies 0 by it."""
    case = case_of(20, masked=0.0)
    broken = {name: getattr(case, name).clone() for name in (MASKED, SAMPLERS)}
    for name in names:
        broken[name][:, 1] = value
    gone = case.with_(inference_mask_logprobs=case.inference_mask_logprobs.clone())
    gone.inference_mask_logprobs[:, 1] = -math.inf
    ours = evaluate(case.with_(**broken).to(backend.device))
    expected = evaluate(gone.to(backend.device))
    assert same_bits(ours.loss, expected.loss)
    assert (ours.gradients[1][:, 1] == 0).all()
    assert same_bits(ours.gradients[1], expected.gradients[1])


def test_a_normalizer_of_0_leaves_nothing(backend: Backend) -> None:
    ours = evaluate(case_of(normalizer=torch.tensor(0)).to(backend.device))
    assert ours.loss == 0
    assert all((gradient == 0).all() for gradient in ours.gradients)


@pytest.mark.parametrize(
    "broken",
    [
        {"normalizer": torch.tensor(-1.0)},
        {"cu_seqlens": torch.tensor([0, 30, 20, 61], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 2**30], dtype=torch.int32)},
    ],
)
def test_a_broken_contract_raises_or_poisons_every_gradient(
    backend: Backend, broken: dict[str, Any]
) -> None:
    case = case_of(61).with_(**broken).to(backend.device)
    if backend.faults_raise:
        with pytest.raises(RuntimeError, match=r"normalizer|cu_seqlens"):
            evaluate(case)
        return
    ours = evaluate(case)
    assert ours.loss.isnan()
    assert all(gradient.isnan().all() for gradient in ours.gradients)


# -------------------------------------------------------------------------------------------------
# From logits and from hidden states


def composed(case: Any, backend: Backend) -> Evaluation:
    """The same of the blocks and the loss from log-probabilities, put together."""
    case = case.to(backend.device)
    leaves = [getattr(case, name).detach().requires_grad_() for name in case.leaves]
    given = case.with_(**dict(zip(case.leaves, leaves, strict=True)))
    block = ipo_ext.token_logprobs
    operands: tuple[Any, ...] = (leaves[0],)
    more = {name: getattr(case, name) for name in logits.OF_LOGPROBS}
    if isinstance(case, hidden.HiddenCase):
        block, operands = ipo_ext.linear_token_logprobs, (given.hidden, given.weight)
        more["bias"] = given.bias
    labels = case.labels.masked_fill(~case.loss_mask, -100)
    replays = (case.sampling_mask == labels[:, None]).any(-1, keepdim=True)
    made, _, of_ids = block(*operands, labels, candidates=case.sampling_mask, **more)
    of_loss = case.from_logprobs(made).with_(
        trainer_mask_logprobs=torch.where(replays, of_ids, 0.0),
        inference_mask_logprobs=case.inference_mask_logprobs.masked_fill(~replays, -math.inf),
    )
    output = of_loss.call()
    return Evaluation(output, torch.autograd.grad(output.loss, leaves))


def assert_as_composed(case: Any, backend: Backend) -> None:
    ours, expected = evaluate(case.to(backend.device)), composed(case, backend)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.metrics["centering_loss"], expected.metrics["centering_loss"])
    assert (ours.metrics["centering_loss"] != 0).any()
    for mine, theirs in zip(ours.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"softcap": 4.0, "logit_scale": 1.3, "token_temperature": True},
    "without an entropy": {"entropy": False},
    "packed": {"cu_seqlens": torch.tensor([0, 5, 5, 19, 37], dtype=torch.int32)},
    "weights in float64": {
        "inference_dtype": torch.float64,
        "loss_weights": torch.linspace(0, 2, 37),
    },
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_from_logits(backend: Backend, dtype: torch.dtype, option: str) -> None:
    case = logits.random_case(37, 130, dtype, ids=9, config=CONFIG, **OPTIONS[option])
    assert_as_composed(with_sampler(case), backend)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_from_hidden(backend: Backend, dtype: torch.dtype, option: str) -> None:
    options = {"chunk_size": 8, "has_bias": True, **OPTIONS[option]}
    case = hidden.random_case(dtype=dtype, ids=9, config=CONFIG, **options)
    case = with_sampler(case)
    assert_as_composed(case, backend)
    promised = evaluate(case.with_(num_active=33).to(backend.device))
    torch.testing.assert_close(promised.loss, evaluate(case.to(backend.device)).loss)


def test_over_the_logits(backend: Backend) -> None:
    case = with_sampler(logits.random_case(19, 33, ids=5, config=CONFIG)).to(backend.device)
    expected = evaluate(case)
    leaf = case.logits.clone().requires_grad_()
    out = case.with_(logits=leaf * 1.0).call(inplace=True)
    out.loss.backward()
    assert same_bits(out.loss, expected.loss)
    assert same_bits(leaf.grad, expected.gradient)


@pytest.mark.parametrize("kind", [logits, hidden])
def test_rows_that_do_not_replay_are_not_centered(backend: Backend, kind: Any) -> None:
    case = with_sampler(kind.random_case(37, ids=5, config=CONFIG, masked=0.0))
    gone = case.with_(
        sampling_mask=torch.where(
            case.sampling_mask == case.labels[:, None], PADDING, case.sampling_mask
        )
    )
    ours = evaluate(gone.to(backend.device))
    plain = gone.with_(config=UNCENTERED, inference_mask_logprobs=None)
    expected = evaluate(plain.to(backend.device))
    assert ours.metrics["centering_loss"] == 0
    torch.testing.assert_close(ours.loss, expected.loss)
    for mine, theirs in zip(ours.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", [logits, hidden])
def test_a_fault_poisons_or_raises(backend: Backend, kind: Any) -> None:
    case = with_sampler(kind.random_case(20, ids=5, config=CONFIG, masked=0.0))
    labels = case.labels.clone()
    labels[3] = 1000
    case = case.with_(labels=labels).to(backend.device)
    if backend.faults_raise:
        with pytest.raises(IndexError, match="labels"):
            evaluate(case)
        return
    ours = evaluate(case)
    assert ours.loss.isnan()
    assert all(gradient.isnan().all() for gradient in ours.gradients)


# -------------------------------------------------------------------------------------------------
# Metrics, compilers, errors


def test_the_metric_adds_up(backend: Backend) -> None:
    packed = case_of(segments="empty-between").to(backend.device)
    whole = packed.with_(cu_seqlens=None)
    of_segments, of_all = (evaluate(each).metrics for each in (packed, whole))
    names = set(of_all.keys())
    assert "centering_loss" in names
    assert "replayed" not in names
    total = of_segments.total()["centering_loss"]
    torch.testing.assert_close(total, of_all["centering_loss"])
    twice = (of_segments + of_segments)["centering_loss"]
    torch.testing.assert_close(twice, of_segments["centering_loss"])
    assert "centering_loss" not in evaluate(without(packed)).metrics
    with pytest.raises(ValueError, match="expected both or neither"):
        of_all + evaluate(without(whole)).metrics


def test_compiled(backend: Backend) -> None:
    packed = case_of(37, segments="empty-between")
    cases: list[Case] = [
        packed,
        with_sampler(logits.random_case(19, 33, ids=5, config=CONFIG)),
        with_sampler(hidden.random_case(19, ids=5, config=CONFIG)),
    ]
    for case in cases:
        there = case.to(backend.device)
        torch.compiler.reset()
        function = torch.compile(type(case).function, backend="aot_eager", fullgraph=True)
        ours, expected = evaluate(there, function), evaluate(there)
        assert same_bits(ours.loss, expected.loss)
        for mine, theirs in zip(ours.gradients, expected.gradients, strict=True):
            assert same_bits(mine, theirs)


def test_the_operators_are_sound(backend: Backend) -> None:
    case = case_of(12, segments="empty-between").to(backend.device)
    replayed = torch.arange(12, device=backend.device) % 2 == 0
    opcheck("score_centering", case, replayed=replayed)
    opcheck("score_centering", case, replayed=None)
    rows = with_sampler(logits.random_case(6, 11, ids=4, config=CONFIG)).to(backend.device)
    opcheck("ipo_loss_from_logits", rows)
    states = with_sampler(hidden.random_case(6, ids=4, config=CONFIG)).to(backend.device)
    opcheck("ipo_loss_from_hidden", states, chunk_size=4, num_active=None)


def test_only_replayed_tokens_have_a_term(backend: Backend) -> None:
    case = case_of(30, masked=0.0).to(backend.device)
    replayed = torch.arange(30, device=backend.device) % 3 == 0

    def call(mask: torch.Tensor | None) -> Any:
        return call_operator("score_centering", case, replayed=mask)

    loss, gradient, sums = call(replayed)
    every, everywhere, _ = call(None)
    assert (gradient[~replayed] == 0).all()
    assert same_bits(gradient[replayed], everywhere[replayed])
    assert loss != every
    torch.testing.assert_close(loss, sums.sum().to(loss.dtype))


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({MASKED: None}, ValueError, f"{MASKED}: expected a tensor because"),
    (
        {SAMPLERS: None},
        ValueError,
        "inference_mask_logprobs: expected a tensor because",
    ),
    ({"config": UNCENTERED}, ValueError, "inference_mask_logprobs: expected None because"),
    ({MASKED: torch.zeros(61, 4)}, ValueError, "inference_mask_logprobs: expected shape"),
    ({MASKED: torch.zeros(61)}, ValueError, f"{MASKED}: expected shape"),
    ({MASKED: torch.zeros(61, 5).int()}, TypeError, f"{MASKED}: expected dtype"),
    (
        {SAMPLERS: torch.zeros(61, 5, requires_grad=True)},
        ValueError,
        "inference_mask_logprobs: expected a tensor that does not require grad",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        case_of().with_(**change).call()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("kind", [logits, hidden])
def test_errors_of_labelled_calls(kind: Any) -> None:
    case = with_sampler(kind.random_case(ids=5, config=CONFIG))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sampling_mask": None}, "sampling_mask: expected a tensor beside"),
        ({SAMPLERS: None}, "inference_mask_logprobs: expected a tensor because"),
        ({SAMPLERS: case.inference_mask_logprobs[:, 1:]}, "inference_mask_log"),
        ({"config": UNCENTERED}, "inference_mask_logprobs: expected None because"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            case.with_(**change).call()


def test_of_no_tokens_and_of_no_ids(backend: Backend) -> None:
    empty = evaluate(case_of(0).to(backend.device))
    assert empty.loss == 0
    case = case_of(9)
    no_ids = {MASKED: torch.zeros(9, 0), SAMPLERS: torch.zeros(9, 0)}
    ours = evaluate(case.with_(**no_ids).to(backend.device))
    assert same_bits(ours.loss, evaluate(without(case).to(backend.device)).loss)


def test_modules_hand_it_on() -> None:
    case = case_of()
    module = ipo_ext.IPOLoss(case.config)
    rest = {"loss_weights": case.loss_weights, MASKED: case.trainer_mask_logprobs}
    tokens = (case.inference_logprobs, case.advantages, case.loss_mask)
    out: IPOOutput = module(
        case.trainer_logprobs, *tokens, inference_mask_logprobs=case.inference_mask_logprobs, **rest
    )
    assert same_bits(out.loss, case.call().loss)
    batch = ipo_ext.LossBatch(
        *tokens,
        loss_weights=case.loss_weights,
        inference_mask_logprobs=case.inference_mask_logprobs,
    )
    again = module(case.trainer_logprobs, batch, trainer_mask_logprobs=case.trainer_mask_logprobs)
    assert same_bits(again.loss, out.loss)
