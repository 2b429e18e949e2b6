"""The gradient where the logits were: in their dtype, or narrower at each row's start."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from typing import Any

import pytest
import torch

from tests.support.backends import Backend
from tests.support.cases import LogitsCase, bits, same_bits
from tests.support.layouts import LAYOUTS, at_row_starts
from tests.support.logits import DTYPES, MANY_ROWS, NARROWER, random_case
from tests.support.operators import call_operator, chunk_of_loss, find_faults, operator

COLUMNS = (1, 2, 7, 33, 130, 511, 512, 1031)


@dataclasses.dataclass(frozen=True)
class Result:
    gradient: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    loss: tuple[torch.Tensor, ...] = ()  # and what is made with it


def apart(case: LogitsCase) -> Result:
    """The gradient in memory of its own."""
    loss, gradient, logprobs, entropy, *metrics, _ = call_operator("ipo_loss_from_logits", case)
    return Result(gradient, logprobs, entropy, (loss, *metrics))


def over_logits(case: LogitsCase) -> Result:
    loss, logprobs, entropy, *metrics, _ = call_operator("ipo_loss_from_logits_", case)
    return Result(case.logits, logprobs, entropy, (loss, *metrics))


def into(
    case: LogitsCase, gradient: torch.Tensor | None, fault: torch.Tensor | None = None
) -> Result:
    return Result(gradient, *chunk_of_loss(case, gradient, fault))


def loss_and_metrics(case: LogitsCase, rows: Result) -> tuple[torch.Tensor, ...]:
    """Loss and metrics of log-probabilities and entropies that are there."""
    made = {"logprobs": rows.logprobs, "entropy": rows.entropy, "fault": find_faults(case)}
    made["replayed"] = None
    loss, _, *metrics = call_operator("loss_and_metrics", case, **made, with_gradient=False)
    return loss, *metrics


def copy_of(case: LogitsCase, layout: str = "contiguous") -> LogitsCase:
    return case.with_(logits=LAYOUTS[layout](case.logits.clone()))


def assert_same(ours: Result, expected: Result) -> None:
    for name in ("gradient", "logprobs", "entropy"):
        assert same_bits(getattr(ours, name), getattr(expected, name)), name


# -------------------------------------------------------------------------------------------------
# The same bits as in memory of its own


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "unaligned"])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_over_the_logits(
    backend: Backend, dtype: torch.dtype, columns: int, layout: str, softcap: float | None
) -> None:
    case = random_case(9, columns, dtype, temperature=0.8, softcap=softcap).to(backend.device)
    ours = over_logits(copy_of(case, layout))
    assert_same(ours, into(copy_of(case, layout), copy_of(case, layout).logits))
    for mine, theirs in zip(ours.loss, loss_and_metrics(case, ours), strict=True):
        assert same_bits(mine, theirs)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "unaligned"])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", NARROWER, ids=str)
def test_narrower_over_fp32_logits(
    backend: Backend, dtype: torch.dtype, columns: int, layout: str, softcap: float | None
) -> None:
    """Rounded once, and nothing of a row is lost before it is needed."""
    rows = MANY_ROWS if columns > 1024 else 9
    case = random_case(rows, columns, temperature=0.8, softcap=softcap).to(backend.device)
    case, copy = copy_of(case, layout), copy_of(case, layout)
    expected = into(copy, copy_of(case, layout).logits)
    ours = into(case, at_row_starts(case.logits, dtype))
    rounded = dataclasses.replace(expected, gradient=expected.gradient.to(dtype))
    assert_same(ours, rounded)


@pytest.mark.parametrize("dtype", [*NARROWER, torch.float32], ids=str)
def test_narrower_apart_from_the_logits(backend: Backend, dtype: torch.dtype) -> None:
    case = random_case(9, 130).to(backend.device)
    expected = apart(case)
    before = case.logits.clone()
    gradient = torch.full((9, 133), math.nan, dtype=dtype, device=backend.device)
    ours = into(case, gradient[:, :130])
    assert_same(ours, dataclasses.replace(expected, gradient=expected.gradient.to(dtype)))
    assert gradient[:, 130:].isnan().all()
    assert torch.equal(case.logits, before)
    without = into(case, None)
    assert torch.equal(without.logprobs, expected.logprobs)


def test_slices_of_a_batch(backend: Backend) -> None:
    flat = random_case(6, 40).to(backend.device)
    expected = apart(copy_of(flat))
    batch = torch.full((2, 4, 40), 7.0, device=backend.device)
    view = batch[:, :-1]
    view.copy_(flat.logits.view(2, 3, 40))
    ours = into(flat.with_(logits=view), at_row_starts(view, torch.bfloat16))
    rounded = expected.gradient.bfloat16().view(2, 3, 40)
    assert same_bits(ours.gradient, rounded)
    assert (batch[:, -1] == 7).all()


# -------------------------------------------------------------------------------------------------
# What is written, and what is not


@pytest.mark.parametrize("columns", [33, 130, 1031])
@pytest.mark.parametrize("dtype", NARROWER, ids=str)
def test_only_the_gradient_is_written(backend: Backend, dtype: torch.dtype, columns: int) -> None:
    case = random_case(9, columns, masked=0.5).to(backend.device)
    assert case.loss_mask.any()
    case.logits[~case.loss_mask] = math.nan
    before = case.logits.clone()
    ours = into(case, at_row_starts(case.logits, dtype))
    assert not bits(ours.gradient[~case.loss_mask]).any()
    assert torch.equal(
        bits(case.logits.view(dtype)[:, columns:]), bits(before.view(dtype)[:, columns:])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_without_a_gradient_are_zeros(backend: Backend, dtype: torch.dtype) -> None:
    """Dropped by the band, or not finite."""
    case = random_case(40, 37, masked=0).to(backend.device)
    case.logits[0, 5] = math.nan
    case.logits[1] = -math.inf
    expected = apart(copy_of(case))
    dropped = ~expected.gradient.any(-1)
    assert 2 < dropped.sum() < 40
    ours = into(case, at_row_starts(case.logits, dtype))
    assert not bits(ours.gradient[dropped]).any()
    assert same_bits(ours.gradient, expected.gradient.to(dtype))


def test_rows_in_chunks_make_the_whole(backend: Backend) -> None:
    """Faults once, rows chunk by chunk over one buffer, the loss at the end."""
    rows, chunk = 10, 4
    normalizer = torch.tensor(3.0, device=backend.device)
    case = random_case(rows, 65, normalizer=normalizer).to(backend.device)
    expected = apart(copy_of(case))
    fault = find_faults(case)
    buffer = torch.empty(chunk, 65, device=backend.device)
    results = []
    for begin in range(0, rows, chunk):
        rows_of_chunk = case.map_tokens(lambda tensor, begin=begin: tensor[begin : begin + chunk])
        logits = buffer[: rows_of_chunk.tokens].copy_(rows_of_chunk.logits)
        gradient = at_row_starts(logits, torch.bfloat16)
        result = into(rows_of_chunk.with_(logits=logits), gradient, fault)
        results.append(dataclasses.replace(result, gradient=gradient.clone()))
    whole = Result(
        *(
            torch.cat([getattr(result, name) for result in results])
            for name in ("gradient", "logprobs", "entropy")
        )
    )
    rounded = expected.gradient.bfloat16()
    assert_same(whole, dataclasses.replace(expected, gradient=rounded))
    for mine, theirs in zip(loss_and_metrics(case, whole), expected.loss, strict=True):
        assert same_bits(mine, theirs)


# -------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("logits_dtype", "gradient_dtype"),
    [
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(
    backend: Backend, logits_dtype: torch.dtype, gradient_dtype: torch.dtype
) -> None:
    case = random_case(3, 8, logits_dtype).to(backend.device)
    gradient = torch.empty(3, 8, dtype=gradient_dtype, device=backend.device)
    with pytest.raises(RuntimeError, match="gradient: expected the dtype of logits"):
        into(case, gradient)


def test_rows_that_share_memory_are_refused(backend: Backend) -> None:
    case = random_case(3, 8).to(backend.device)
    room = torch.empty(64, device=backend.device)
    with pytest.raises(RuntimeError, match=r"gradient: expected .* its rows apart"):
        into(case, room.as_strided((3, 8), (4, 1)))
    with pytest.raises(RuntimeError, match="logits: expected rows"):
        over_logits(case.with_(logits=room[:8].expand(3, 8)))
    with pytest.raises(RuntimeError, match="gradient: expected the shape"):
        into(case, torch.empty(3, 9, device=backend.device))


def lie_in_order(places: torch.Tensor) -> bool:
    """Whether groups follow groups and, in each, rows follow rows: then none share an element."""
    return follow_each_other(places) and follow_each_other(places[0])


def follow_each_other(groups: torch.Tensor) -> bool:
    """Whether every element of a group lies before those of the next."""
    groups = groups.flatten(1)
    return bool((groups.amax(1)[:-1] < groups.amin(1)[1:]).all())


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("block_rows", [1, 2, 3])
def test_rows_at_any_two_strides(
    backend: Backend, block_rows: int, blocks: int, columns: int
) -> None:
    """Those that share an element are refused; those of which blocks follow blocks, or first rows
    second rows, are changed, each once."""
    shape = blocks, block_rows, columns
    factor = torch.tensor(2.0, device=backend.device)
    before = torch.arange(1.0, 50.0)
    for strides in itertools.product(range(3 * columns + 2), repeat=2):
        room = before.to(backend.device, copy=True)
        places = torch.arange(len(before)).as_strided(shape, (*strides, 1))
        rows = room.as_strided(shape, (*strides, 1))
        scale = functools.partial(operator("scale_"), rows, factor)
        expected = before.clone()
        if any(map(lie_in_order, (places, places.transpose(0, 1)))):
            scale()
            expected[places] *= 2
        else:
            with pytest.raises(RuntimeError, match="gradient: expected rows of adjacent elements"):
                scale()
        assert torch.equal(room.cpu(), expected), strides


# -------------------------------------------------------------------------------------------------
# inplace=True, through autograd

PRODUCERS = {
    "softmax": lambda z: z.softmax(-1),
    "tanh": torch.tanh,
    "exp": torch.exp,
}


def step(
    case: LogitsCase, leaf: torch.Tensor, *, inplace: bool, producer: Any = None
) -> torch.Tensor:
    """The loss of logits that a matrix product, or ``producer``, has made from ``leaf``."""
    logits = leaf @ torch.ones_like(leaf[:1]).t().expand(-1, 33) + case.logits
    logits = logits if producer is None else producer(logits)
    return case.with_(logits=logits).call(inplace=inplace).loss


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_inplace_equals_apart(
    backend: Backend, dtype: torch.dtype, factor: float, compiled: bool
) -> None:
    case = random_case(dtype=dtype, normalizer=3.0).to(backend.device)
    run = torch.compile(step, fullgraph=True) if compiled else step
    gradients = []
    for inplace in (False, True):
        leaf = torch.zeros(9, 4, dtype=dtype, device=backend.device, requires_grad=True)
        (run(case, leaf, inplace=inplace) * factor).backward()
        gradients.append(leaf.grad)
    assert gradients[0].any()
    assert same_bits(*gradients)


def test_inplace_needs_no_second_matrix(backend: Backend) -> None:
    case = random_case().to(backend.device)
    logits = case.logits.clone().requires_grad_() * 1
    case.with_(logits=logits).call(inplace=True).loss.backward()
    expected = case.logits.clone().requires_grad_()
    case.with_(logits=expected).call().loss.backward()
    assert same_bits(logits, expected.grad)  # the logits hold their gradient


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", list(PRODUCERS))
def test_a_producer_that_saved_its_output_raises(
    backend: Backend, name: str, compiled: bool
) -> None:
    case = random_case().to(backend.device)
    run = torch.compile(step, fullgraph=True) if compiled else step
    leaf = torch.zeros(9, 4, device=backend.device, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(case, leaf, inplace=True, producer=PRODUCERS[name]).backward()
    run(case, leaf, inplace=False, producer=PRODUCERS[name]).backward()
    assert leaf.grad is not None


def test_logits_changed_before_backward_raise(backend: Backend) -> None:
    case = random_case().to(backend.device)
    logits = case.logits.requires_grad_() * 1
    loss = case.with_(logits=logits).call(inplace=True).loss
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_without_a_gradient_leaves_the_logits(backend: Backend) -> None:
    case = random_case().to(backend.device)
    before = case.logits.clone()
    case.call(inplace=True)
    with torch.no_grad():
        case.with_(logits=case.logits.requires_grad_()).call(inplace=True)
    assert torch.equal(case.logits, before)


def test_inplace_refusals(backend: Backend) -> None:
    case = random_case().to(backend.device)
    leaf = case.logits.requires_grad_()
    with pytest.raises(ValueError, match="logits: expected the result of an operation"):
        case.call(inplace=True)
    shared = (leaf[:1] * 1).expand(9, -1)
    for logits in (shared, (leaf * 1).t().contiguous().t()):
        with pytest.raises(RuntimeError, match="logits: expected rows of adjacent elements"):
            case.with_(logits=logits).call(inplace=True)


def test_inplace_copies_nothing_when_compiled(backend: Backend) -> None:
    """No tensor as large as the logits is made besides the logits."""
    case = random_case(64, 33).to(backend.device)
    code = torch._inductor.utils.run_and_get_code
    compiled = torch.compile(step, fullgraph=True)
    leaf = torch.zeros(64, 4, device=backend.device, requires_grad=True)
    _, sources = code(lambda: compiled(case, leaf, inplace=True))
    forward = sources[0]
    operator = f"{backend.namespace}.ipo_loss_from_logits_.default"
    assert operator in forward
    assert len(re.findall(r"empty_strided_\w+\(\(64, 33\)", forward)) == 1, forward


def test_second_derivative_is_refused(backend: Backend) -> None:
    case = random_case().to(backend.device)
    leaf = case.logits.requires_grad_()
    for inplace in (False, True):
        loss = case.with_(logits=leaf * 1).call(inplace=inplace).loss + (leaf**2).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
            torch.autograd.grad(gradient.sum(), leaf)
