"""A vocabulary shared by ranks: every call over a part of it against float64 over all of it.

The whole table runs with ``--run-slow``; else a small part, another one each day.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import ipo_ext
from ipo_ext import functional
from ipo_ext._ops import arguments
from ipo_ext._shards import OwnColumns, own_columns
from tests.support import hidden, logits, shards
from tests.support.backends import Backend
from tests.support.cases import evaluate, same_bits
from tests.support.ranks import alone, on_ranks

TODAY = 3 + datetime.date.today().toordinal() % 2


@pytest.fixture
def one_rank() -> Iterator[dist.ProcessGroup]:
    with alone() as group:
        yield group


def some_rows(backend: Backend) -> list[shards.Row]:
    return shards.one_in(10 if backend.name == "cpu" else 40)


def test_one_rank(backend: Backend, one_rank: dist.ProcessGroup) -> None:
    shards.check_rows(backend.name, some_rows(backend))


def test_two_ranks(backend: Backend) -> None:
    on_ranks(2, shards.check_rows, backend.name, some_rows(backend))


def test_more_ranks() -> None:
    on_ranks(TODAY, shards.check_rows, "cpu", shards.one_in(40))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_whole_table(backend: Backend, ranks: int) -> None:
    on_ranks(ranks, shards.check_rows, backend.name, shards.table(), seconds=3600)


@pytest.fixture
def exchanging(one_rank: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group of one rank that exchanges with itself, which a call else spares itself."""

    def own(_: str, columns: int, *__: Any) -> OwnColumns:
        return OwnColumns(columns, columns, arguments.Shard(0, columns, one_rank.group_name, ""))

    monkeypatch.setattr(functional, "own_columns", own)
    return one_rank


@pytest.mark.parametrize("dtype", logits.DTYPES)
def test_bits_of_a_call_that_exchanges_with_itself(
    backend: Backend, exchanging: dist.ProcessGroup, dtype: torch.dtype
) -> None:
    """They are those of whole rows, on CUDA too where a block has all of a row."""
    case = logits.random_case(dtype=dtype, token_temperature=True, softcap=5.0).to(backend.device)
    ours = case.call(tp_group=exchanging)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "own_columns", own_columns)
        theirs = case.call()
    assert same_bits(ours.loss, theirs.loss)
    assert same_bits(ours.logprobs, theirs.logprobs)
    assert same_bits(ours.entropy, theirs.entropy)
    assert same_bits(ours.metrics.sums, theirs.metrics.sums)
    assert same_bits(ours.metrics.means, theirs.metrics.means)


# -------------------------------------------------------------------------------------------------
# Faults: all ranks learn of each, or none does


def outcome(call: Callable[[], Any]) -> str:
    try:
        result = call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    results = (result.loss,) if isinstance(result, ipo_ext.IPOOutput) else result
    return "all NaN" if all(bool(each.isnan().all()) for each in results) else "fine"


def expect(on_cpu: tuple[str, ...], call: Callable[[], Any], backend: Backend) -> None:
    """On each rank the text at its place, or the last of them; on CUDA NaN from all."""
    if not backend.faults_raise:
        assert outcome(call) == "all NaN"
        return
    text = on_cpu[min(dist.get_rank(), len(on_cpu) - 1)]
    found = outcome(call)
    assert text in found, f"{text!r} is not in {found!r}"


def faults_of_two_ranks(backend_name: str) -> None:
    with Backend(backend_name).active() as backend:
        _faults_from_logits(backend)
        _faults_from_hidden(backend)


def _faults_from_logits(backend: Backend) -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    z = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 9, 3, 4, 5, -100])
    half = slice(5 * rank, 5 * rank + 5)

    def block(y: torch.Tensor = y, z: torch.Tensor = z[:, half], **how: Any) -> Any:
        return ipo_ext.token_logprobs(z, y, tp_group=group, **how)

    def changed(place: int, label: int) -> torch.Tensor:
        return y.index_fill(0, torch.tensor(place), label)

    assert outcome(block) == "fine"
    outside = changed(1, 10)
    expect(("IndexError: labels: expected a token in [0, 10)",), lambda: block(outside), backend)
    of_one = ("IndexError: labels: rank 1 of tp_group has been given a token outside", "IndexError")
    expect(of_one, lambda: block(outside if rank else y), backend)
    # Each rank believes that the label of row 2 is the other's, or its own.
    expect(
        ("IndexError: labels: expected a token in the shard of one rank",),
        lambda: block(changed(2, 7) if rank else y),
        backend,
    )
    expect(
        ("IndexError: labels", "IndexError: labels"),
        lambda: block(changed(2, 2 if rank else 7)),
        backend,
    )
    # Row 5 takes part on one rank alone, which has its label; then on the one that has not.
    for label in (7, 1):
        mine = changed(5, label) if rank else y
        expect(("Error: ",), lambda mine=mine: block(mine), backend)
    overlapping = z[:, :5] if rank == 0 else z[:, 4:]
    expect(("IndexError: labels: expected",), lambda: block(z=overlapping), backend)
    cold = torch.tensor(-1.0 if rank else 1.0)
    of_one = ("RuntimeError: tp_group: rank 1 has found a fault", "RuntimeError: temperature: ")
    expect(of_one, lambda: block(temperature=cold), backend)
    sizes = ("ValueError: logits: expected 6 of 11 tokens on rank 0 of 2", "tp_group: rank 0")
    if backend.faults_raise or rank > 0:
        expect(sizes, lambda: block(vocab_size=11), backend)
    else:
        assert sizes[0] in outcome(lambda: block(vocab_size=11))
    _values(backend, block, z, y, half)


def _values(
    backend: Backend, block: Callable[..., Any], z: torch.Tensor, y: torch.Tensor, half: slice
) -> None:
    """NaN and infinities in one shard are as in the whole row, and no fault."""
    z = z.clone()
    z[0, 7] = torch.nan
    z[1, 2], z[1, 9] = torch.inf, 3
    z[2] = -torch.inf
    z[3, :5] = -torch.inf
    z[4, 5] = torch.inf  # the label's own
    ours, theirs = block(z=z[:, half]), ipo_ext.token_logprobs(z, y)
    for mine, whole in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, whole, equal_nan=True)
    assert ours[0][:3].isnan().all()
    assert ours[1][3].isfinite()


def _faults_from_hidden(backend: Backend) -> None:
    rank = dist.get_rank()
    case = hidden.random_case(chunk_size=4, num_active=None)
    vocabulary = case.weight.shape[0]
    part = shards.uneven(vocabulary, rank, 2)
    whole = {"tp_group": dist.group.WORLD, "vocab_size": vocabulary}
    case = case.with_(weight=part.of(case.weight))

    def loss(case: Any = case, **how: Any) -> Any:
        return case.call(**{**whole, **how})

    assert outcome(loss) == "fine"
    disagree = "ValueError: tp_group: expected ranks that are given the same tokens and settings"
    for numbers, other in (
        ("active tokens", case.with_(loss_mask=torch.ones_like(case.loss_mask) == 1)),
        ("chunk_size", case.with_(chunk_size=5)),
        ("num_active", case.with_(num_active=36)),
        ("needs_grad_hidden", case.with_(hidden=case.hidden.clone().requires_grad_())),
    ):
        other = other.with_(labels=case.labels.clamp(min=0))
        found = outcome(lambda other=other: loss(other if rank else case))
        assert f"{disagree}, got {numbers}" in found, found
    found = outcome(lambda: loss(vocab_size=vocabulary + 5))
    assert f"ValueError: weight: expected 29 of 58 tokens on rank {rank} of 2" in found
    # Uneven shards without vocab_size, of which each rank makes another chunk size.
    uneven = {"vocab_size": None, "chunk_size": None}
    assert disagree in outcome(lambda: loss(case.with_(chunk_size=None), **uneven))
    # A label of the last chunk that differs: nothing of an earlier one may be used.
    last = int(case.loss_mask.nonzero()[-1])
    labels = case.labels.clone()
    labels[last] = (labels[last] + 27) % vocabulary
    late = case.with_(labels=labels if rank else case.labels)
    expect(
        ("IndexError: labels: expected a token in the shard of one",), lambda: loss(late), backend
    )
    if not backend.faults_raise:
        weight = late.weight.clone().requires_grad_()
        output = loss(late.with_(weight=weight))
        assert output.logprobs.isnan().all()
        assert torch.autograd.grad(output.loss, weight)[0].isnan().all()


def test_faults(backend: Backend) -> None:
    on_ranks(2, faults_of_two_ranks, backend.name)


# -------------------------------------------------------------------------------------------------
# DTensors


def dtensors_of_two_ranks() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    case = hidden.random_case(dtype=torch.float64, has_bias=True, chunk_size=16)
    whole = evaluate(case)
    for reduces in (True, False):
        hidden_, weight, bias = (
            distribute_tensor(leaf.clone(), mesh, [placement]).requires_grad_()
            for leaf, placement in zip(
                (case.hidden, case.weight, case.bias),
                (Replicate(), Shard(0), Shard(0)),
                strict=True,
            )
        )
        tensors = {"hidden": hidden_, "weight": weight, "bias": bias}
        how = {"tp_group": mesh["tp"], "reduce_hidden_grad": reduces}
        output = case.with_(**tensors).call(**how)
        assert type(output.loss) is torch.Tensor
        gradients = torch.autograd.grad(output.loss, list(tensors.values()))
        for ours, theirs, leaf in zip(gradients, whole.gradients, tensors.values(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs)
            assert ours.placements == leaf.placements or leaf is hidden_
    logits = case.from_logits().logits
    columns = distribute_tensor(logits.clone(), mesh, [Shard(1)]).requires_grad_()
    logprobs, entropy = ipo_ext.token_logprobs(columns, case.labels, tp_group=mesh)
    of_logits = torch.autograd.grad((logprobs + entropy).sum(), columns)[0]
    assert of_logits.placements == (Shard(1),)
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = ipo_ext.token_logprobs(leaf, case.labels)
    expected = torch.autograd.grad((logprobs + entropy).sum(), leaf)[0]
    torch.testing.assert_close(of_logits.full_tensor(), expected)
    _refused_dtensors(case, mesh)


def _refused_dtensors(case: Any, mesh: Any) -> None:
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    other = dist.new_group([0, 1])
    shard = distribute_tensor(case.weight, mesh, [Shard(0)])
    texts = {
        "weight: expected .* of placement Shard(0) on the mesh of tp_group, got one of Shard(1)": (
            {"weight": distribute_tensor(case.weight, mesh, [Shard(1)])},
            mesh,
        ),
        "got one of Replicate() on the mesh ('tp',)": (
            {"weight": distribute_tensor(case.weight, mesh, [Replicate()])},
            mesh,
        ),
        "got one of Shard(0), Replicate() on the mesh ('dp', 'tp')": (
            {"weight": distribute_tensor(case.weight, square, [Shard(0), Replicate()])},
            mesh,
        ),
        "weight: expected .* on the mesh of tp_group, got one of Shard(0)": (
            {"weight": shard},
            other,
        ),
        "hidden: expected .* of placement Replicate() on the mesh of tp_group, got one of Shard": (
            {"weight": shard, "hidden": distribute_tensor(case.hidden, mesh, [Shard(1)])},
            mesh,
        ),
        "weight: expected a plain tensor, got a DTensor.* as tp_group": ({"weight": shard}, None),
    }
    for text, (tensors, group) in texts.items():
        pattern = ".*".join(map(re.escape, text.split(".*")))
        with pytest.raises(TypeError, match=pattern):
            case.with_(**tensors).call(tp_group=group)


def test_dtensors() -> None:
    on_ranks(2, dtensors_of_two_ranks)


# -------------------------------------------------------------------------------------------------
# In words


def call_with(**how: Any) -> Any:
    case = logits.random_case()
    return ipo_ext.token_logprobs(case.logits, case.labels, **how)


def loss_with(**how: Any) -> Any:
    return logits.random_case().call(ipo_ext.ipo_loss_from_logits, **how)


def hidden_with(**how: Any) -> Any:
    return hidden.random_case().call(ipo_ext.ipo_loss_from_hidden, **how)


WITHOUT_A_GROUP = [
    (
        call_with,
        {"vocab_size": 33},
        ValueError,
        "vocab_size: expected None without tp_group, got 33",
    ),
    (loss_with, {"vocab_start": 0}, ValueError, "vocab_start: expected None without tp_group, got"),
    (hidden_with, {"vocab_size": 9}, ValueError, "vocab_size: expected None without tp_group"),
    (hidden_with, {"reduce_hidden_grad": False}, ValueError, "reduce_hidden_grad: expected True"),
    (
        hidden_with,
        {"reduce_hidden_grad": 1},
        TypeError,
        "reduce_hidden_grad: expected True or False",
    ),
    (call_with, {"tp_group": 3}, TypeError, "tp_group: expected a process group or a device mesh"),
]


@pytest.mark.parametrize(("call", "how", "error", "text"), WITHOUT_A_GROUP)
def test_refused(call: Callable[..., Any], how: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(**how)


def test_refused_of_a_group(one_rank: dist.ProcessGroup) -> None:
    def refused(call: Callable[..., Any], text: str, **how: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=text):
            call(tp_group=one_rank, **how)

    refused(call_with, "vocab_size: expected a number because vocab_start is 3, got", vocab_start=3)
    refused(call_with, "vocab_size: expected a number >= 1 or None, got 0", vocab_size=0)
    refused(call_with, "vocab_start: expected an int or None", vocab_size=33, vocab_start=0.5)
    refused(call_with, "logits: expected 40 of 40 tokens on rank 0 of 1", vocab_size=40)


def test_refused_of_parts_of_rows(exchanging: dist.ProcessGroup) -> None:
    def refused(call: Callable[..., Any], name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"{name}: expected it left out with tp_group"):
            call(tp_group=exchanging, **{name: value})

    ids = torch.zeros(9, 2, dtype=torch.int32)
    refused(call_with, "candidates", ids)
    refused(call_with, "sampling_mask", ids)
    refused(loss_with, "sampling_mask", ids)
    refused(loss_with, "inplace", True)
    refused(hidden_with, "sampling_mask", torch.zeros(hidden.TOKENS, 2, dtype=torch.int32))
