"""The loss from hidden states works on the tokens that train, and makes what is needed alone."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ipo_ext
from ipo_ext._ops import chunks
from tests.support.backends import Backend
from tests.support.cases import HiddenCase, assert_same_bits, evaluate
from tests.support.hidden import WIDTH, CountsRows, assert_accurate, leaves_of, random_case

# -------------------------------------------------------------------------------------------------
# Products are made for the tokens that train


def test_products_are_made_for_active_tokens_alone(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(1000, masked=0.7).to(backend.device)
    active = int(case.loss_mask.sum())
    counts = CountsRows(monkeypatch)
    evaluate(case, chunk_size=256)
    assert sum(counts.rows) == active
    assert len(counts.rows) == math.ceil(active / 256)
    counts.rows.clear()
    evaluate(case, num_active=active + 3)
    assert sum(counts.rows) == active + 3


def test_backward_makes_products_only_where_a_gradient_flows(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(200).to(backend.device)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    counts = CountsRows(monkeypatch)
    logprobs, entropy = ipo_ext.linear_token_logprobs(hidden, weight, case.labels)
    assert sum(counts.rows) == int(case.loss_mask.sum())
    counts.rows.clear()
    wanted = case.loss_mask.nonzero().squeeze(1)[:10]
    (logprobs[wanted[:7]].sum() + 2 * entropy[wanted[5:]].sum()).backward()
    assert sum(counts.rows) == 10
    untouched = torch.ones(200, dtype=torch.bool, device=backend.device)
    untouched[wanted] = False
    assert not hidden.grad[untouched].any()
    assert hidden.grad[wanted].any(-1).all()


def test_num_active_changes_no_bit(backend: Backend) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = random_case(300, dtype=dtype).to(backend.device)
        active = int(case.loss_mask.sum())
        expected = evaluate(case, chunk_size=1000)
        assert_same_bits(evaluate(case, chunk_size=1000, num_active=active), expected)


def test_padded_rows_are_neutral(backend: Backend) -> None:
    case = random_case(50, normalizer=3.0)
    for slack in (1, 5):
        num_active = int(case.loss_mask.sum()) + slack
        assert_accurate(case, backend, num_active=num_active, chunk_size=16)


def test_all_rows_are_worked_on_where_nothing_may_be_counted(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under CUDA graph capture."""
    case = random_case(50).to(backend.device)
    spoiled = case.with_(hidden=case.hidden.masked_fill(~case.loss_mask[:, None], math.nan))
    expected = evaluate(case)

    def gradients(case: HiddenCase) -> tuple[torch.Tensor, ...]:
        hidden, weight = leaves_of(case)
        logprobs, entropy = ipo_ext.linear_token_logprobs(hidden, weight, case.labels)
        return torch.autograd.grad((logprobs * 2 + entropy).sum(), (hidden, weight))

    expected_gradients = gradients(case)
    monkeypatch.setattr(chunks, "is_capturing", lambda tensor: True)
    counts = CountsRows(monkeypatch)
    ours = evaluate(spoiled)
    assert sum(counts.rows) == 50
    torch.testing.assert_close(ours.grad_weight, expected.grad_weight)
    torch.testing.assert_close(ours.grad_hidden, expected.grad_hidden)
    for mine, truth in zip(gradients(spoiled), expected_gradients, strict=True):
        torch.testing.assert_close(mine, truth)


def test_rows_of_logits_may_be_padded(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's matrix products want them."""
    for dtype in (torch.bfloat16, torch.float32):
        case = random_case(dtype=dtype).to(backend.device)
        expected = evaluate(case)
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "_row_length", lambda weight: 64)
            ours = evaluate(case)
        torch.testing.assert_close(ours.grad_weight, expected.grad_weight)
        torch.testing.assert_close(ours.grad_hidden, expected.grad_hidden)


def test_a_weight_is_copied_only_if_no_dimension_is_dense() -> None:
    room = torch.randn(10, 12)
    for weight in (room, room.t(), room[::2], room[:, :7]):
        assert chunks._as_operand(weight, torch.float32).data_ptr() == weight.data_ptr()
    assert chunks._as_operand(room[::2, ::2], torch.float32).is_contiguous()


@pytest.mark.parametrize(
    ("vocabulary", "length"), [(1, 64), (64, 64), (65, 128), (151_936, 151_936)]
)
def test_rows_on_a_gpu_are_whole_vectors(vocabulary: int, length: int) -> None:
    weight = SimpleNamespace(is_cuda=True, shape=(vocabulary, WIDTH))
    assert chunks._row_length(weight) == length


def test_default_chunk_size() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert chunks.default_chunk_size(151936, torch.bfloat16, gpu) == 2048
    assert chunks.default_chunk_size(32000, torch.bfloat16, cpu) == 384  # 48 MiB of float32
    assert chunks.default_chunk_size(32000, torch.float64, cpu) == 128
    assert chunks.default_chunk_size(10**9, torch.float32, cpu) == 128
    for rows, size in itertools.product((1, 127, 128, 300, 4097), (1, 100, 256, 10**6)):
        parts = chunks.chunks_of(rows, size)
        assert [i for c in parts for i in range(c.start, c.stop)] == list(range(rows))
        assert max(c.stop - c.start for c in parts) <= size


# -------------------------------------------------------------------------------------------------
# Only what is needed


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=3)], ids=str)
def test_only_gradients_that_are_needed(
    backend: Backend,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = random_case(dtype=dtype, has_bias=True).to(backend.device)
    every = evaluate(case)
    seen = []
    finished = chunks.Gradients.finished

    def spy(self: Any) -> tuple[torch.Tensor, ...]:
        gradients = finished(self)
        seen.append(tuple(gradient.numel() > 0 for gradient in gradients))
        return gradients

    monkeypatch.setattr(chunks.Gradients, "finished", spy)
    leaves = [
        getattr(case, name).detach().requires_grad_(on)
        for name, on in zip(case.leaves, wanted, strict=True)
    ]
    loss = case.with_(**dict(zip(case.leaves, leaves, strict=True))).call().loss
    assert seen == [wanted]
    assert loss.requires_grad == any(wanted)
    assert torch.equal(loss, every.loss)
    if any(wanted):
        loss.backward()
    for leaf, on, expected in zip(leaves, wanted, every.gradients, strict=True):
        assert (leaf.grad is not None) == on
        if on:
            assert torch.equal(leaf.grad, expected)


def test_no_gradient_under_no_grad(backend: Backend) -> None:
    case = random_case().to(backend.device)
    case.hidden.requires_grad_()
    with torch.no_grad():
        assert not case.call().loss.requires_grad


@pytest.mark.parametrize("cut", [slice(None, -1), slice(1, None)])
def test_a_slice_of_the_batch_is_not_copied_whole(
    backend: Backend, cut: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(5 * 6).to(backend.device)
    room = torch.full((5, 7, WIDTH), math.nan, device=backend.device)
    room[:, cut] = case.hidden.view(5, 6, WIDTH)
    view = case.map_tokens(lambda tensor: tensor.unflatten(0, (5, 6))).with_(hidden=room[:, cut])
    reshape = torch.Tensor.reshape

    def watched(tensor: torch.Tensor, *shape: Any) -> torch.Tensor:
        assert tensor.shape != (5, 6, WIDTH), "a copy of all hidden states"
        return reshape(tensor, *shape)

    expected = evaluate(case)
    monkeypatch.setattr(torch.Tensor, "reshape", watched)
    for num_active in (None, 30, 1000):
        ours = evaluate(view, num_active=num_active)
        torch.testing.assert_close(ours.grad_hidden.view(30, WIDTH), expected.grad_hidden)
        torch.testing.assert_close(ours.grad_weight, expected.grad_weight)
