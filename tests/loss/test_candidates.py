"""Log-probabilities of given ids beside the label's, and their gradient, on every backend."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ipo_ext
from ipo_ext import reference
from tests.support import hidden
from tests.support.backends import Backend
from tests.support.cases import LogitsCase, same_bits
from tests.support.closeness import assert_close
from tests.support.logits import DTYPES, random_case
from tests.support.operators import opcheck

ROWS, COLUMNS, IDS = 17, 45, 8
Block = Callable[..., Any]


def linear(z: torch.Tensor, labels: torch.Tensor, **how: Any) -> Any:
    """Of hidden states that are the logits."""
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return ipo_ext.linear_token_logprobs(z, eye, labels, chunk_size=3, **how)


BLOCKS = {"logits": ipo_ext.token_logprobs, "hidden": linear}
blocks = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


def case_with(dtype: torch.dtype, *, ids: int | None = IDS, seed: int = 0) -> LogitsCase:
    return random_case(ROWS, COLUMNS, dtype, ids=ids, masked=0.2, seed=seed)


def random_candidates(case: LogitsCase, seed: int = 0) -> torch.Tensor:
    """Any ids: the label, those of S and others, some twice, some places empty."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randint(-1, COLUMNS, (ROWS, 11), generator=generator)
    candidates[::2, 3] = case.labels[::2].clamp(min=-1)
    candidates[:, 5] = candidates[:, 4]
    if case.sampling_mask is not None:
        candidates[:, 6:10] = case.sampling_mask[:, :4]
    return candidates.int()


def upstream_of(outputs: Any, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        for output in outputs
    ]


def run(block: Block, case: LogitsCase, logits: torch.Tensor, **how: Any) -> tuple[Any, ...]:
    """The outputs, and the gradient of all of them weighed."""
    z = logits.detach().requires_grad_()
    ids = None if case.sampling_mask is None else case.sampling_mask.to(z.device)
    named = {name: value.to(z.device) if isinstance(value, torch.Tensor) else value
             for name, value in how.items()}  # fmt: skip
    outputs = block(z, case.labels.to(z.device), sampling_mask=ids, **named)
    (gradient,) = torch.autograd.grad(outputs, z, upstream_of(outputs))
    return (*outputs, gradient)


@blocks
@pytest.mark.tempts_kernels_out_of_bounds
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_match_float64(
    backend: Backend, block: Block, dtype: torch.dtype, ids: int | None, softcap: float | None
) -> None:
    case = case_with(dtype, ids=ids)
    how = {"candidates": random_candidates(case), "softcap": softcap, "temperature": 0.9}
    ours = run(block, case, case.logits.to(backend.device), **how)
    naive = run(reference.token_logprobs, case, case.logits, **how)
    exact = run(reference.token_logprobs, case, case.logits.double(), **how, dtype=torch.float64)
    for name, mine, theirs, truth in zip(
        ("logprobs", "entropy", "candidates"), ours, naive, exact, strict=False
    ):
        assert_close(mine, theirs, truth, scale=truth.abs() + 9, floor=8, name=name)
    assert exact[2].isinf().any() == (ids is not None)
    gradient = exact[3]
    flows = sum(
        grad.abs().sum(-1) if grad.dim() > 1 else grad.abs() for grad in upstream_of(exact[:3])
    )
    size = gradient.abs() + (gradient != 0) * flows[:, None]
    floor = 64 if dtype == torch.float64 else 12
    assert_close(ours[3], naive[3], gradient, scale=size, floor=floor, name="gradient")


@blocks
@pytest.mark.parametrize("ids", [None, 4])
def test_gradcheck(backend: Backend, block: Block, ids: int | None) -> None:
    case = random_case(5, 9, torch.float64, ids=ids, masked=0.2, seed=5).to(backend.device)
    candidates = torch.tensor([[0, 3, 3, -1, 8]], dtype=torch.int32, device=backend.device)
    candidates = candidates.repeat(5, 1)
    candidates[1:3, 4] = case.labels[1:3].int()

    def all_of_them(z: torch.Tensor) -> Any:
        outputs = block(
            z,
            case.labels,
            sampling_mask=case.sampling_mask,
            candidates=candidates,
            softcap=5.0,
            temperature=0.8,
        )
        return (*outputs[:2], outputs[2].clamp(min=-1e3))  # differences of infinities are none

    assert torch.autograd.gradcheck(all_of_them, case.logits.detach().requires_grad_())


@blocks
def test_the_label_as_a_candidate(backend: Backend, block: Block) -> None:
    case = case_with(torch.float32).to(backend.device)
    twice = case.labels.clamp(min=0)[:, None].expand(ROWS, 2).int()
    z = case.logits.detach().requires_grad_()
    how = {"sampling_mask": case.sampling_mask, "candidates": twice}
    logprobs, _, of_candidates = block(z, case.labels, **how)
    torch.testing.assert_close(of_candidates, logprobs[:, None].expand(ROWS, 2))
    (expected,) = torch.autograd.grad(logprobs.sum(), z, retain_graph=True)
    (gradient,) = torch.autograd.grad(of_candidates.sum(), z)
    torch.testing.assert_close(gradient, 2 * expected)


@blocks
def test_the_support_as_candidates_is_a_distribution(backend: Backend, block: Block) -> None:
    case = case_with(torch.float32).to(backend.device)
    ids = case.sampling_mask
    _, _, of_candidates = block(case.logits, case.labels, sampling_mask=ids, candidates=ids)
    replays = (ids == case.labels[:, None]).any(-1)
    assert replays.sum() > 3
    total = torch.where(ids >= 0, of_candidates.exp(), 0).sum(-1)
    torch.testing.assert_close(total[replays], torch.ones_like(total[replays]))


def test_gradients_that_cancel_leave_the_others_exactly_zero(backend: Backend) -> None:
    case = case_with(torch.float32, ids=None).to(backend.device)
    other = ((case.labels.clamp(min=0) + 1) % COLUMNS).int()
    z = case.logits.detach().requires_grad_()
    logprobs, _, of_other = ipo_ext.token_logprobs(z, case.labels, candidates=other[:, None])
    (gradient,) = torch.autograd.grad((logprobs - of_other[:, 0]).sum(), z)
    active = case.labels >= 0
    expected = torch.zeros_like(gradient)
    rows = torch.arange(ROWS, device=backend.device)[active]
    expected[rows, case.labels[active]] = 1
    expected[rows, other[active].long()] = -1
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(gradient != 0, expected != 0)


@blocks
def test_what_takes_no_part(backend: Backend, block: Block) -> None:
    case = case_with(torch.float32).to(backend.device)
    candidates = random_candidates(case.to("cpu")).to(backend.device)
    inactive = case.labels < 0
    candidates[inactive] = 1 << 30  # not read
    how = {"sampling_mask": case.sampling_mask, "candidates": candidates}
    z = case.logits.masked_fill(inactive[:, None], math.nan).requires_grad_()
    _, _, of_candidates = block(z, case.labels, **how)
    assert not of_candidates[inactive].any()
    assert not of_candidates[candidates < 0].any()
    grads = torch.ones_like(of_candidates).masked_fill(candidates < 0, math.nan)
    if block is ipo_ext.token_logprobs:
        (gradient,) = torch.autograd.grad(of_candidates, z, grads)
        assert gradient.isfinite().all()
        assert not gradient[inactive].any()


@blocks
def test_without_entropies(backend: Backend, block: Block) -> None:
    case = case_with(torch.float32).to(backend.device)
    how = {"sampling_mask": case.sampling_mask, "candidates": random_candidates(case.to("cpu"))}
    how["candidates"] = how["candidates"].to(backend.device)
    with_them, without = (block(case.logits, case.labels, **how, entropy=e) for e in (True, False))
    assert without[1] is None
    assert same_bits(with_them[0], without[0])
    assert same_bits(with_them[2], without[2])


@pytest.mark.parametrize("weights", [(3e4, -3e4), (1.0, 1e-4), (1e-4, -1.0)])
@pytest.mark.parametrize("ids", [None, IDS])
def test_a_fp16_row_has_one_scale(
    backend: Backend, ids: int | None, weights: tuple[float, float]
) -> None:
    """Also where the gradients by label and candidates nearly cancel in their sum."""
    case = random_case(ROWS, COLUMNS, torch.float16, ids=ids, masked=0.0)
    candidates = random_candidates(case)[:, :2]

    def gradient(block: Block, device: Any, kept: torch.dtype, **more: Any) -> torch.Tensor:
        states = case.logits.to(device, kept).requires_grad_()
        head = torch.eye(COLUMNS, dtype=kept, device=device)
        mask = None if ids is None else case.sampling_mask.to(device)
        how = {"sampling_mask": mask, "candidates": candidates.to(device), **more}
        logprobs, entropy, of_candidates = block(states, head, case.labels.to(device), **how)
        finite = torch.where(of_candidates.isfinite(), of_candidates, 0)
        loss = weights[0] * logprobs.sum() + weights[1] * finite.sum() + entropy.sum()
        return torch.autograd.grad(loss, states)[0].cpu().double()

    ours = gradient(ipo_ext.linear_token_logprobs, backend.device, torch.float16)
    exact = gradient(reference.linear_token_logprobs, "cpu", torch.float64, dtype=torch.float64)
    largest = exact.abs().amax(-1, keepdim=True).clamp(min=max(map(abs, weights)) * 1e-2)
    assert ((ours - exact).abs() / largest).max() < 3e-3


@blocks
@pytest.mark.parametrize("bad", [COLUMNS, -2])
def test_an_id_that_is_no_token(backend: Backend, block: Block, bad: int) -> None:
    case = case_with(torch.float32, ids=None).to(backend.device)
    row = int((case.labels >= 0).nonzero()[-1])
    candidates = torch.zeros(ROWS, 3, dtype=torch.int32, device=backend.device)
    candidates[row, 1] = bad
    z = case.logits.detach().requires_grad_()
    if backend.faults_raise:
        message = (
            rf"candidates: expected tokens in \[0, {COLUMNS}\) or -1 .* got {bad} at row {row}"
        )
        with pytest.raises(RuntimeError, match=message):
            block(z, case.labels, candidates=candidates)
        return
    outputs = block(z, case.labels, candidates=candidates)
    assert all(output.isnan().all() for output in outputs)
    (gradient,) = torch.autograd.grad(outputs[2].sum(), z)
    assert gradient.isnan().all()


def test_more_dimensions_and_none(backend: Backend) -> None:
    case = case_with(torch.float32).to(backend.device)
    candidates = random_candidates(case.to("cpu")).to(backend.device)
    for block in BLOCKS.values():
        whole = block(case.logits, case.labels, candidates=candidates)
        part = block(
            case.logits[:16].view(4, 4, COLUMNS),
            case.labels[:16].view(4, 4),
            candidates=candidates[:16].view(4, 4, -1),
        )
        assert same_bits(part[2].flatten(0, 1), whole[2][:16])
        empty = block(case.logits[:0], case.labels[:0], candidates=candidates[:0])
        assert empty[2].shape == (0, candidates.shape[1])
        nothing = block(case.logits, case.labels, candidates=candidates[:, :0])
        assert nothing[2].shape == (ROWS, 0)


def test_compiled(backend: Backend) -> None:
    case = case_with(torch.float32).to(backend.device)
    candidates = random_candidates(case.to("cpu")).to(backend.device)

    def objective(block: Block, z: torch.Tensor) -> torch.Tensor:
        how = {"sampling_mask": case.sampling_mask, "candidates": candidates}
        outputs = block(z, case.labels, **how)
        return sum(output.clamp(min=-50).square().sum() for output in outputs)

    for block in BLOCKS.values():
        function = functools.partial(objective, block)
        results = []
        for run_it in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
            z = case.logits.detach().requires_grad_()
            value = run_it(z)
            results.append((value, torch.autograd.grad(value, z)[0]))
        torch.testing.assert_close(*results)
        transformed = torch.func.grad(function)(case.logits)
        assert same_bits(transformed, results[0][1])


def test_the_operators_are_sound(backend: Backend) -> None:
    case = random_case(6, 11, ids=4).to(backend.device)
    candidates = torch.randint(-1, 11, (6, 3), dtype=torch.int32, device=backend.device)
    opcheck("token_logprobs", case, candidates=candidates)
    states = hidden.random_case(6, ids=4).to(backend.device)
    opcheck("linear_token_logprobs", states, chunk_size=9, candidates=candidates)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda ids: ids.long(), TypeError, "expected dtype torch.int32, got torch.int64"),
        (lambda ids: ids[1:], ValueError, f"expected shape [{ROWS}, 'K'], K ids for each of"),
        (lambda ids: ids[:, :1].expand(-1, 513), ValueError, "expected at most 512 ids a token"),
    ],
)
def test_candidates_of_another_kind(
    backend: Backend, change: Any, error: type[Exception], message: str
) -> None:
    case = case_with(torch.float32).to(backend.device)
    candidates = change(random_candidates(case.to("cpu")).to(backend.device))
    for block in BLOCKS.values():
        with pytest.raises(error) as caught:
            block(case.logits, case.labels, candidates=candidates)
        assert str(caught.value).startswith("candidates: " + message)


@blocks
def test_compiled_for_the_ids_of_the_sampling_mask_itself(backend: Backend, block: Block) -> None:
    """What score centering asks for: the same tensor as both."""
    case = case_with(torch.float32).to(backend.device)
    torch.compiler.reset()

    def log_probabilities(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return block(logits, case.labels, sampling_mask=ids, candidates=ids)[2]

    logits = case.logits.clone().requires_grad_()
    compiled = torch.compile(log_probabilities, backend="aot_eager", fullgraph=True)
    results = [each(logits, case.sampling_mask) for each in (log_probabilities, compiled)]
    assert same_bits(*results)
    assert same_bits(*[torch.autograd.grad(each.sum(), logits)[0] for each in results])


@blocks
@pytest.mark.parametrize("wrong", [None, "no", 1, torch.tensor(True)])
def test_entropy_is_a_bool(block: Block, wrong: Any) -> None:
    case = case_with(torch.float32)
    with pytest.raises(TypeError, match="entropy: expected True or False, got "):
        block(case.logits, case.labels, entropy=wrong)
