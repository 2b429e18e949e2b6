"""Replay of the sampler's support: log-probabilities over a part of the vocabulary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import ipo_ext
from ipo_ext import IPOConfig, reference
from tests.support import hidden, logits
from tests.support.backends import Backend
from tests.support.cases import Evaluation, LogitsCase, assert_same_bits, bits, evaluate, same_bits
from tests.support.closeness import assert_close
from tests.support.logits import DTYPES, WIDE_BAND, random_case
from tests.support.operators import call_operator, opcheck
from tests.support.replay import PADDING, outside, random_ids
from tests.support.schedules import schedules

# -------------------------------------------------------------------------------------------------
# Against float64


@pytest.mark.tempts_kernels_out_of_bounds
@pytest.mark.parametrize(("columns", "ids"), [(2, 1), (7, 9), (33, 5), (130, 64), (1031, 40)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend: Backend, dtype: torch.dtype, columns: int, ids: int) -> None:
    case = random_case(19, columns, dtype, ids=ids, temperature=0.8)
    logits.assert_accurate(case, backend)
    logits.assert_accurate(case.with_(entropy=False), backend, grad_loss=-0.5)


@pytest.mark.parametrize("ids", [1, 512])
def test_the_fewest_and_the_most_ids(backend: Backend, ids: int) -> None:
    case = random_case(6, 1031, ids=ids, masked=0.0)
    logits.assert_accurate(case, backend)


@hypothesis.given(
    rows=st.integers(1, 20),
    columns=st.one_of(st.integers(2, 70), st.sampled_from([511, 512, 513, 1025])),
    ids=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    temperature=st.sampled_from([None, 0.5, 2.5, "token"]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    logit_scale=st.sampled_from([None, 0.0625, 1.7]),
    grad_loss=st.sampled_from([1.0, -2.5]),
    spread=st.sampled_from([0.1, 2.0, 8.0]),
    layout=st.sampled_from(["contiguous", "strided", "unaligned", "transposed"]),
    entropy=st.booleans(),
)
def test_any_case(backend_name: str, **drawn: Any) -> None:
    logits.assert_drawn_accurate(backend_name, **drawn)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_hidden(backend: Backend, dtype: torch.dtype, entropy: bool) -> None:
    case = hidden.random_case(dtype=dtype, ids=9, has_bias=True, token_temperature=True)
    hidden.assert_accurate(case.with_(entropy=entropy), backend, chunk_size=5)


def test_from_hidden_with_a_promised_count(backend: Backend) -> None:
    case = hidden.random_case(ids=9, softcap=4.0)
    ours = evaluate(case.with_(chunk_size=4, num_active=33).to(backend.device))
    expected = evaluate(case.with_(chunk_size=37).to(backend.device))
    torch.testing.assert_close(ours.loss, expected.loss)
    for mine, theirs in zip(ours.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert ours.metrics["replayed"].item() == expected.metrics["replayed"].item() > 0


@pytest.mark.parametrize("config", [IPOConfig.geometric(0.9, 1.2), IPOConfig.sequence_tis(3.0)])
@pytest.mark.parametrize("kind", [logits, hidden])
def test_whole_sequences_are_judged_by_what_replays(
    backend: Backend, kind: Any, config: IPOConfig
) -> None:
    cu_seqlens = torch.tensor([0, 9, 9, 20, 37], dtype=torch.int32)
    case = kind.random_case(37, ids=9, config=config, cu_seqlens=cu_seqlens, dtype=torch.float64)
    names = {"ipo_loss_from_logits": reference.ipo_loss_from_logits}
    function = names.get(type(case).function.__name__, reference.ipo_loss_from_hidden)
    ours, expected = evaluate(case.to(backend.device)), evaluate(case, function)
    torch.testing.assert_close(ours.loss.cpu(), expected.loss)
    for mine, theirs in zip(ours.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs)
    assert ours.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        torch.testing.assert_close(ours.metrics[name].cpu(), value, msg=name)


# -------------------------------------------------------------------------------------------------
# Which rows replay


def ids_case(backend: Backend, ids: torch.Tensor, **options: Any) -> LogitsCase:
    """Of eight active rows, whose labels are 3."""
    case = random_case(8, 17, masked=0.0, config=WIDE_BAND, **options)
    labels = torch.full((8,), 3)
    case = case.with_(labels=labels, sampling_mask=ids.expand(8, -1).int())
    return case.to(backend.device)


@pytest.mark.parametrize("ids", [[-1, -1], [5, 0], [-1, 16]])
def test_a_row_that_does_not_contain_its_label_uses_the_whole_vocabulary(
    backend: Backend, ids: list[int]
) -> None:
    case = ids_case(backend, torch.tensor(ids))
    ours, expected = evaluate(case), evaluate(case.with_(sampling_mask=None))
    assert same_bits(ours.output.logprobs, expected.output.logprobs)
    assert same_bits(ours.output.entropy, expected.output.entropy)
    torch.testing.assert_close(ours.gradient, expected.gradient, rtol=1e-5, atol=1e-7)
    assert ours.metrics["replayed"].item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_label_that_is_alone_is_certain(backend: Backend, dtype: torch.dtype) -> None:
    case = ids_case(backend, torch.tensor([-1, 3, -1]), dtype=dtype)
    ours = evaluate(case)
    assert not ours.output.logprobs.any()
    assert not ours.gradient.any()
    assert ours.metrics["replayed"].item() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_of_the_vocabulary_is_no_restriction(backend: Backend, dtype: torch.dtype) -> None:
    plain = random_case(11, 70, dtype, softcap=6.0, temperature=0.7)
    case = plain.with_(sampling_mask=torch.randperm(70).int().expand(11, -1))
    logits.assert_accurate(case, backend)
    ours, expected = (evaluate(each.to(backend.device)) for each in (case, plain))
    exact = evaluate(
        plain.with_(logits=plain.logits.double()),
        reference.ipo_loss_from_logits,
        dtype=torch.float64,
    )
    size = logits.gradient_scale(plain, exact.gradient)
    floor = logits.rounding_of_p(plain)
    for each in (ours, expected):
        assert_close(each.gradient, expected.gradient, exact.gradient, scale=size, floor=floor)
    assert ours.metrics["replayed"].item() == 1


def test_the_order_of_ids_is_none(backend: Backend) -> None:
    case = ids_case(backend, torch.tensor([5, 3, 9, -1, 12]))
    ours = evaluate(case)
    other = evaluate(case.with_(sampling_mask=case.sampling_mask.flip(-1)))
    torch.testing.assert_close(ours.output.logprobs, other.output.logprobs)
    torch.testing.assert_close(ours.gradient, other.gradient)


def test_no_ids_at_all(backend: Backend) -> None:
    case = ids_case(backend, torch.empty(0))
    assert evaluate(case).metrics["replayed"].item() == 0


# -------------------------------------------------------------------------------------------------
# What lies outside


ANYTHING = [math.nan, math.inf, -math.inf, 6e4]


@pytest.mark.parametrize("anything", ANYTHING)
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_logit_outside_may_be_anything(
    backend: Backend, dtype: torch.dtype, entropy: bool, anything: float
) -> None:
    case = random_case(20, 40, dtype, ids=7, entropy=entropy)
    beyond = outside(case.sampling_mask, case.labels, 40)
    assert beyond.any(-1).sum() > 5
    spoilt = case.with_(logits=case.logits.masked_fill(beyond, anything))
    ours, expected = (evaluate(each.to(backend.device)) for each in (spoilt, case))
    assert same_bits(ours.output.logprobs, expected.output.logprobs)
    assert same_bits(ours.gradient, expected.gradient)
    assert same_bits(ours.loss, expected.loss)
    assert not ours.gradient.cpu()[beyond].any()
    if not entropy:
        assert ours.output.entropy is None
        assert not {"entropy", "nonfinite_entropy"} & ours.metrics.keys()
        return
    entropies = ours.output.entropy.cpu()
    active = case.loss_mask.sum()
    share = (~entropies.isfinite() & case.loss_mask).sum() / active
    assert ours.metrics["nonfinite_entropy"].item() == pytest.approx(share.item())
    mean = entropies.nan_to_num(0, 0, 0)[case.loss_mask].double().sum() / active
    assert ours.metrics["entropy"].item() == pytest.approx(mean.item(), rel=1e-6)
    assert (share > 0) == (math.isnan(anything) or anything == math.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_gradient_of_the_entropy_selects_zero(backend: Backend, dtype: torch.dtype) -> None:
    case = random_case(20, 40, dtype, ids=7).to(backend.device)
    beyond = outside(case.sampling_mask.cpu(), case.labels.cpu(), 40).to(backend.device)
    given = case.logits.masked_fill(beyond, math.nan).requires_grad_()
    logprobs, entropy = ipo_ext.token_logprobs(given, case.labels, sampling_mask=case.sampling_mask)
    (gradient,) = torch.autograd.grad((logprobs + 0 * entropy.detach()).sum(), given)
    (again,) = torch.autograd.grad(
        ipo_ext.token_logprobs(given, case.labels, sampling_mask=case.sampling_mask),
        given,
        (torch.ones_like(logprobs), torch.zeros_like(entropy)),
    )
    assert same_bits(gradient, again)
    assert gradient.isfinite().all()
    assert not gradient[beyond].any()
    assert gradient.any()


@pytest.mark.parametrize("anything", [math.nan, math.inf])
def test_what_is_not_finite_inside_is_dropped(backend: Backend, anything: float) -> None:
    case = ids_case(backend, torch.tensor([5, 3, 9]))
    case.logits[2, 9] = anything
    ours = evaluate(case)
    assert ours.output.logprobs[2].isnan()
    assert ours.output.logprobs.isnan().sum() == 1
    assert not ours.gradient[2].any()
    assert ours.loss.isfinite()
    assert ours.metrics["nonfinite"].item() == pytest.approx(1 / 8)


# -------------------------------------------------------------------------------------------------
# Log-probabilities and entropies


Block = Callable[..., Any]


def block_of(kind: str) -> tuple[Block, Block]:
    """Ours and the reference's: of logits, or of hidden states with the logits for a weight."""
    if kind == "logits":
        return ipo_ext.token_logprobs, reference.token_logprobs

    def ours(z: torch.Tensor, labels: torch.Tensor, **how: Any) -> Any:
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        return ipo_ext.linear_token_logprobs(z, eye, labels, chunk_size=3, **how)

    return ours, reference.token_logprobs


@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_match_float64(
    backend: Backend, dtype: torch.dtype, softcap: float | None, kind: str
) -> None:
    rows, columns = 17, 45
    case = random_case(rows, columns, dtype, ids=8, masked=0.2)
    upstream = torch.randn(2, rows, dtype=torch.float64)
    ours, expected = block_of(kind)

    def run(function: Block, z: torch.Tensor, device: Any = "cpu", **more: Any) -> Any:
        z = z.detach().to(device).requires_grad_()
        how = {"softcap": softcap, "temperature": 0.9, **more}
        ids = case.sampling_mask.to(device)
        outputs = function(z, case.labels.to(device), sampling_mask=ids, **how)
        values = torch.stack(outputs)
        return values, torch.autograd.grad((values * upstream.to(values)).sum(), z)[0]

    mine, my_gradient = run(ours, case.logits, backend.device)
    naive, naive_gradient = run(expected, case.logits)
    exact, exact_gradient = run(expected, case.logits.double(), dtype=torch.float64)
    assert_close(mine, naive, exact, scale=exact.abs() + 9, floor=8, name="values")
    p = case.logits.double().softmax(-1)
    size = exact_gradient.abs() + (exact_gradient != 0) * upstream.abs().sum(0)[:, None] * p
    inside = ~outside(case.sampling_mask, case.labels, columns) & (case.labels >= 0)[:, None]
    size = size + inside * (exact_gradient != 0) * upstream[0].abs()[:, None]
    floor = 64 if dtype == torch.float64 else 12
    assert_close(my_gradient, naive_gradient, exact_gradient, scale=size, floor=floor)


@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(backend: Backend, softcap: float | None, kind: str) -> None:
    case = random_case(9, 11, torch.float64, ids=4, seed=3).to(backend.device)
    temperature = torch.linspace(0.5, 2, 9, dtype=torch.float64, device=backend.device)
    function, _ = block_of(kind)

    def both(z: torch.Tensor) -> Any:
        how = {"softcap": softcap, "temperature": temperature}
        return function(z, case.labels, sampling_mask=case.sampling_mask, **how)

    assert torch.autograd.gradcheck(both, case.logits.detach().requires_grad_())


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_without_entropies(backend: Backend, kind: str) -> None:
    case = random_case(20, 40, ids=7).to(backend.device)
    function, _ = block_of(kind)
    results = []
    for entropy in (True, False):
        z = case.logits.detach().requires_grad_()
        logprobs, entropies = function(
            z, case.labels, sampling_mask=case.sampling_mask, entropy=entropy
        )
        assert (entropies is not None) == entropy
        results.append((logprobs, *torch.autograd.grad(logprobs.square().sum(), z)))
    for first, second in zip(*results, strict=True):
        assert same_bits(first, second)


def test_entropies_may_be_left_out_without_a_mask(backend: Backend) -> None:
    case = random_case(20, 40).to(backend.device)
    ours, expected = evaluate(case.with_(entropy=False)), evaluate(case)
    assert ours.output.entropy is None
    assert same_bits(ours.output.logprobs, expected.output.logprobs)
    assert same_bits(ours.gradient, expected.gradient)
    assert expected.metrics.keys() - ours.metrics.keys() == {"entropy"}


@pytest.mark.parametrize("weights", [(3e4, 1.0), (1.0, 1e-4), (1e-4, 1.0), (-2.0, 2.0)])
def test_a_fp16_gradient_beside_the_entropys(
    backend: Backend, weights: tuple[float, float]
) -> None:
    """A row is stored over one scale, whichever of the two parts is the larger."""
    case = random_case(6, 40, torch.float16, ids=7, masked=0.0)
    ids = case.sampling_mask

    def gradient(function: Block, device: Any, kept: torch.dtype, **more: Any) -> torch.Tensor:
        states = case.logits.to(device, kept).requires_grad_()
        head = torch.eye(40, dtype=kept, device=device)
        labels = case.labels.to(device)
        outputs = function(states, head, labels, sampling_mask=ids.to(device), **more)
        loss = sum(weight * output.sum() for weight, output in zip(weights, outputs, strict=True))
        return torch.autograd.grad(loss, states)[0].cpu().double()

    ours = gradient(ipo_ext.linear_token_logprobs, backend.device, torch.float16)
    exact = gradient(reference.linear_token_logprobs, "cpu", torch.float64, dtype=torch.float64)
    error = (ours - exact).abs() / exact.abs().amax(-1, keepdim=True)
    assert error.max() < 1.5e-3


# -------------------------------------------------------------------------------------------------
# Where the gradient goes, and what runs again


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_over_the_logits(backend: Backend, dtype: torch.dtype, entropy: bool) -> None:
    case = random_case(20, 40, dtype, ids=9, softcap=5.0, entropy=entropy).to(backend.device)
    loss, gradient, *apart = call_operator("ipo_loss_from_logits", case)
    written = case.with_(logits=case.logits.clone())
    loss_here, *there = call_operator("ipo_loss_from_logits_", written)
    for first, second in zip((loss, *apart), (loss_here, *there), strict=True):
        assert torch.equal(bits(first), bits(second))
    assert same_bits(gradient, written.logits)


def test_same_bits_whatever_the_schedule(backend: Backend) -> None:
    case = random_case(40, 70, ids=40).to(backend.device)
    results: list[Evaluation] = []
    for schedule in schedules(backend):
        with schedule:
            results.append(evaluate(case))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_a_batch_of_rows(backend: Backend) -> None:
    """[batch, tokens, ids], of which a slice is taken."""
    flat = random_case(20, 40, ids=7).to(backend.device)
    case = flat.map_tokens(lambda tensor: tensor.unflatten(0, (4, 5)))
    wide = torch.cat([case.sampling_mask, case.sampling_mask], -1)
    case = case.with_(sampling_mask=wide[..., :7])
    ours, expected = evaluate(case), evaluate(flat)
    assert same_bits(ours.output.logprobs.flatten(), expected.output.logprobs)
    assert same_bits(ours.gradient.flatten(0, 1), expected.gradient)


def test_no_tokens(backend: Backend) -> None:
    case = random_case(1, 40, ids=7).map_tokens(lambda tensor: tensor[:0]).to(backend.device)
    ours = evaluate(case)
    assert ours.loss.item() == 0
    assert ours.metrics["replayed"].item() == 0


def test_the_counts_of_no_tokens_are_0(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever memory held before: torch fills what is not written with NaN."""
    case = random_case(0, ids=5).to(backend.device)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        sums = case.call().metrics.sums
    finally:
        torch.use_deterministic_algorithms(False)
    assert not sums.any()


def test_the_operators_are_sound(backend: Backend) -> None:
    case = random_case(6, 11, ids=4).to(backend.device)
    opcheck("ipo_loss_from_logits", case)
    opcheck("token_logprobs", case)
    opcheck("linear_token_logprobs", hidden.random_case(ids=4).to(backend.device), chunk_size=9)


@pytest.mark.parametrize("entropy", [True, False])
def test_compiled(backend: Backend, entropy: bool) -> None:
    case = random_case(20, 40, ids=7, normalizer=3.0).to(backend.device)

    def loss(z: torch.Tensor) -> torch.Tensor:
        out = case.with_(logits=z * 1.0, entropy=entropy).call()
        return out.loss + out.metrics["replayed"] + 0 * len(out.metrics)

    def block(z: torch.Tensor) -> torch.Tensor:
        outputs = ipo_ext.token_logprobs(
            z, case.labels, sampling_mask=case.sampling_mask, entropy=entropy
        )
        return sum(output.square().sum() for output in outputs if output is not None)

    for function in (loss, block):
        results = []
        for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
            z = case.logits.detach().requires_grad_()
            value = run(z)
            results.append((value, torch.autograd.grad(value, z)[0]))
        torch.testing.assert_close(*results)


def test_a_function_transform(backend: Backend) -> None:
    case = random_case(20, 40, ids=7).to(backend.device)
    gradient = torch.func.grad(lambda z: case.with_(logits=z).call().loss)(case.logits)
    assert same_bits(gradient, evaluate(case).gradient)


# -------------------------------------------------------------------------------------------------
# Metrics


def test_metrics_combine(backend: Backend) -> None:
    cu_seqlens = torch.tensor([0, 8, 8, 20], dtype=torch.int32)
    case = random_case(20, 40, ids=7).to(backend.device)
    beyond = outside(case.sampling_mask.cpu(), case.labels.cpu(), 40).to(backend.device)
    beyond[:10] = False
    case = case.with_(logits=case.logits.masked_fill(beyond, math.inf))
    whole = case.call().metrics
    packed = case.with_(cu_seqlens=cu_seqlens.to(backend.device)).call().metrics
    halves = [case.map_tokens(lambda t, part=part: t[part]).call().metrics
              for part in (slice(0, 8), slice(8, 20))]  # fmt: skip
    for name in ("replayed", "nonfinite_entropy", "entropy"):
        assert whole[name].item() > 0
        for other in (packed.total(), halves[0] + halves[1]):
            assert other[name].item() == pytest.approx(whole[name].item(), rel=1e-6)
        expected = [halves[0][name].item(), 0, halves[1][name].item()]
        assert packed[name].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="expected both or neither to have each of"):
        whole + case.with_(sampling_mask=None).call().metrics


# -------------------------------------------------------------------------------------------------
# Faults


@dataclasses.dataclass(frozen=True)
class Fault:
    ids: list[int]
    message: str


FAULTS = {
    "beyond": Fault([3, 17], "got 17 at row 2, place 1"),
    "negative": Fault([-2, 3], "got -2 at row 2, place 0"),
    "ignored": Fault([3, -100], "got -100 at row 2, place 1"),
    "twice": Fault([5, 5], "got 5 at row 2, place 1"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("kind", ["loss", "block"])
def test_ids_that_break_the_contract(backend: Backend, name: str, kind: str) -> None:
    case = ids_case(backend, torch.tensor([5, 3]))
    fault = FAULTS[name]
    ids = case.sampling_mask.clone()
    ids[2] = torch.tensor(fault.ids)
    case = case.with_(sampling_mask=ids, logits=case.logits.requires_grad_())

    def run() -> torch.Tensor:
        if kind == "loss":
            return case.call().loss
        return ipo_ext.token_logprobs(case.logits, case.labels, sampling_mask=ids)[0].sum()

    if backend.faults_raise:
        with pytest.raises(RuntimeError, match=r"sampling_mask: expected tokens in \[0, 17\)") as e:
            run()
        assert fault.message in str(e.value)
        return
    loss = run()
    (gradient,) = torch.autograd.grad(loss, case.logits)
    assert loss.isnan()
    assert gradient.isnan().all()


def test_a_fault_in_the_last_chunk_poisons_all(backend: Backend) -> None:
    case = hidden.random_case(ids=9, masked=0.0).to(backend.device)
    ids = case.sampling_mask.clone()
    ids[-1, :2] = 7
    case = case.with_(sampling_mask=ids, chunk_size=5)
    if backend.faults_raise:
        with pytest.raises(RuntimeError, match="got 7 at row 36, place 1"):
            evaluate(case)
        return
    ours = evaluate(case)
    assert ours.loss.isnan()
    assert all(gradient.isnan().all() for gradient in ours.gradients)


def test_ids_of_an_inactive_row_are_not_read(backend: Backend) -> None:
    case = random_case(20, 40, ids=7, masked=0.5).to(backend.device)
    ids = torch.where(case.loss_mask[:, None], case.sampling_mask, 1 << 30)
    ours, expected = evaluate(case.with_(sampling_mask=ids)), evaluate(case)
    assert_same_bits(ours, expected)


def test_padding_may_stand_anywhere(backend: Backend) -> None:
    case = ids_case(backend, torch.tensor([PADDING, 5, PADDING, 3, PADDING]))
    ours = evaluate(case)
    expected = evaluate(ids_case(backend, torch.tensor([5, 3])))
    torch.testing.assert_close(ours.output.logprobs, expected.output.logprobs)
    torch.testing.assert_close(ours.gradient, expected.gradient)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda ids: ids.long(), TypeError, "expected dtype torch.int32, got torch.int64"),
        (lambda ids: ids[1:], ValueError, "expected shape [8, 'K'], K ids for each of labels [8]"),
        (lambda ids: ids[:, 0], ValueError, "expected shape [8, 'K']"),
        (lambda ids: ids.to("meta"), ValueError, "expected device"),
        (lambda ids: ids[:, :1].expand(-1, 513), ValueError,
         "expected at most 512 ids a token, got shape [8, 513]"),
    ],
)  # fmt: skip
def test_a_mask_of_another_kind(
    backend: Backend, change: Any, error: type[Exception], message: str
) -> None:
    case = ids_case(backend, torch.tensor([5, 3]))
    with pytest.raises(error) as caught:
        case.with_(sampling_mask=change(case.sampling_mask)).call()
    assert str(caught.value).startswith("sampling_mask: " + message)


def test_random_ids_are_what_they_are_said_to_be() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(40, (200,), generator=generator)
    ids = random_ids(labels, 40, 7, generator)
    contains = (ids == labels[:, None]).any(-1)
    assert 0.6 < contains.float().mean() < 0.8
    for row in ids.tolist():
        real = [each for each in row if each != PADDING]
        assert len(set(real)) == len(real)
