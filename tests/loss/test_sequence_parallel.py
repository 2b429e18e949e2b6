"""Hidden states of which each rank has some; the table of tests/support/shards.py has them too."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import ipo_ext
from ipo_ext import IPOConfig
from ipo_ext._ops import torch_internals
from tests.loss.test_vocabulary_parallel import outcome
from tests.support import hidden, shards
from tests.support.backends import Backend
from tests.support.cases import evaluate, same_bits
from tests.support.ranks import alone, on_ranks

TOKENS, CHUNK = 48, 16


def lopsided(**how: Any) -> Any:
    """The first rank of two has one token that takes part, the other all but one of its own."""
    case = hidden.random_case(TOKENS, chunk_size=CHUNK, normalizer=7.0, **how)
    mask = torch.zeros(TOKENS, dtype=torch.bool)
    mask[3], mask[TOKENS // 2 + 1 :] = True, True
    labels = torch.where(mask, case.labels.clamp(min=0), -100)
    return case.with_(loss_mask=mask, labels=labels, hidden=case.hidden.nan_to_num())


def part_of(case: Any, *, in_parts: bool = True) -> tuple[Any, dict[str, Any]]:
    """The rank's case, and the keywords of its call."""
    rank, ranks, vocabulary = dist.get_rank(), dist.get_world_size(), len(case.weight)
    how = {"tp_group": dist.group.WORLD, "vocab_size": vocabulary, "sequence_parallel": in_parts}
    weight = shards.uneven(vocabulary, rank, ranks).of(case.weight)
    states = case.hidden.chunk(ranks)[rank] if in_parts else case.hidden
    leaves = {"hidden": states, "weight": weight}
    return case.with_(**{k: v.clone().requires_grad_() for k, v in leaves.items()}), how


# -------------------------------------------------------------------------------------------------
# What exists of the gathered states, and what is sent


class Counts:
    """Calls of the collectives, and rows of hidden states that exist gathered at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.gathers = self.scatters = self.alive = self.peak = 0
        gather, scatter = torch_internals.gathered_later, torch_internals.scattered_later

        def gathered(tensor: torch.Tensor, *how: Any) -> torch.Tensor:
            result = gather(tensor, *how)
            storage = result.untyped_storage()
            self._live(len(result))
            weakref.finalize(storage, self._live, -len(result))
            weakref.finalize(result, storage.size)  # the storage's object lives as long
            self.gathers += 1
            return result

        def scattered(tensor: torch.Tensor, *how: Any) -> torch.Tensor:
            self.scatters += 1
            assert tensor.dtype in (torch.float32, torch.float64)
            return scatter(tensor, *how)

        patch.setattr(torch_internals, "gathered_later", gathered)
        patch.setattr(torch_internals, "scattered_later", scattered)

    def _live(self, rows: int) -> None:
        self.alive += rows
        self.peak = max(self.peak, self.alive)


def peak_of_two_ranks() -> None:
    mine, how = part_of(lopsided())
    with pytest.MonkeyPatch.context() as patch:
        counts = Counts(patch)
        mine.call(**how).loss.backward()
    # 23 rows of the second rank, 8 a chunk, and as many of the first, most of which stand in.
    assert (counts.gathers, counts.scatters) == (3, 3)
    assert counts.peak == 2 * CHUNK
    assert counts.alive == 0


def test_a_chunk_and_the_next_are_gathered() -> None:
    on_ranks(2, peak_of_two_ranks)


def lopsided_on_two_ranks() -> None:
    for config in (IPOConfig(kl_tau=0.05), IPOConfig.geometric(0.5, 2.0)):
        case = lopsided(dtype=torch.float64, config=config, cu_seqlens=shards.CU_SEQLENS)
        whole = evaluate(case)
        mine, how = part_of(case)
        for num_active in (None, 24, TOKENS):
            mine = mine.with_(num_active=num_active)
            output = mine.call(**how)
            of_hidden, of_weight = torch.autograd.grad(output.loss, [mine.hidden, mine.weight])
            torch.testing.assert_close(output.loss, whole.loss)
            own = whole.grad_hidden.chunk(2)[dist.get_rank()]
            torch.testing.assert_close(of_hidden, own)
            part = shards.uneven(len(case.weight), dist.get_rank(), 2)
            torch.testing.assert_close(of_weight, part.of(whole.grad_weight))
            again = mine.call(**how)
            twice = torch.autograd.grad(again.loss, [mine.hidden, mine.weight])
            assert same_bits(twice[0], of_hidden)
            assert same_bits(twice[1], of_weight)


def test_ranks_with_few_active_tokens() -> None:
    on_ranks(2, lopsided_on_two_ranks)


def shapes_on_two_ranks() -> None:
    """[N / W, H], and a first dimension that is cut; tokens of no rank."""
    case = lopsided()
    mine, how = part_of(case)
    flat = mine.call(**how)
    names = ("labels", "inference_logprobs", "advantages", "loss_mask")
    square = mine.with_(**{name: getattr(case, name).view(8, 6) for name in names})
    for states in (mine.hidden, mine.hidden.view(4, 6, -1)):
        output = square.with_(hidden=states).call(**how)
        assert same_bits(output.loss, flat.loss)
        assert output.logprobs.shape == (8, 6)
    none = mine.with_(**{name: getattr(case, name)[:0] for name in names}, hidden=mine.hidden[:0])
    assert none.call(**how).loss == 0


def test_shapes() -> None:
    on_ranks(2, shapes_on_two_ranks)


# -------------------------------------------------------------------------------------------------
# Faults


def faults_of_two_ranks(backend_name: str) -> None:
    with Backend(backend_name).active():
        rank = dist.get_rank()
        case = lopsided()
        mine, how = part_of(case)
        whole, as_whole = part_of(case, in_parts=False)

        def found(case: Any, **other: Any) -> str:
            return outcome(lambda: case.call(**{**how, **other}))

        assert found(mine) == "fine"
        short = mine.with_(hidden=mine.hidden[1:])
        expected = ("tp_group: rank 1 of the group has found a fault", "ValueError: hidden: exp")
        assert expected[rank] in found(short if rank else mine)
        assert "ValueError: hidden: expected shape [24, width]" in found(whole, **how)
        other = (whole, as_whole) if rank else (mine, how)
        assert "got sequence_parallel 1, 0" in found(other[0], **other[1])
        total = int(case.loss_mask.sum())
        for token in (case.loss_mask.nonzero()[0], -1):  # of the run with fewer, and of the other
            fewer = case.loss_mask.clone()
            fewer[token] = False
            text = found(mine.with_(loss_mask=fewer if rank else case.loss_mask))
            assert f"got active tokens {total}, {total - 1}" in text
        # A label of the last chunk that differs; the next call finds its ranks in order.
        labels = case.labels.clone()
        labels[-1] = (labels[-1] + 27) % len(case.weight)
        late = found(mine.with_(labels=labels if rank else case.labels))
        assert late == "all NaN" or "IndexError: labels: expected a token in the shard" in late
        assert found(mine) == "fine"
        odd = mine.with_(
            **{
                name: getattr(case, name)[1:]
                for name in ("labels", "inference_logprobs", "advantages", "loss_mask")
            }
        )
        assert "labels: expected as many tokens for each of the 2 ranks" in found(odd)


def test_faults(backend: Backend) -> None:
    on_ranks(2, faults_of_two_ranks, backend.name)


def test_refused() -> None:
    case = hidden.random_case()
    with pytest.raises(ValueError, match="sequence_parallel: expected False without tp_group, got"):
        case.call(sequence_parallel=True)
    with pytest.raises(TypeError, match="sequence_parallel: expected True or False, got int"):
        case.call(sequence_parallel=1)
    with alone() as group:
        with pytest.raises(ValueError, match="reduce_hidden_grad: expected True with sequence_pa"):
            case.call(sequence_parallel=True, reduce_hidden_grad=False, tp_group=group)
        alike = case.call(sequence_parallel=True, tp_group=group)
        assert same_bits(alike.loss, case.call().loss)


# -------------------------------------------------------------------------------------------------
# DTensors and compiled graphs


def dtensors_of_two_ranks() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    case = lopsided(dtype=torch.float64)
    whole = evaluate(case)
    states = distribute_tensor(case.hidden.clone(), mesh, [Shard(0)]).requires_grad_()
    weight = distribute_tensor(case.weight.clone(), mesh, [Shard(0)]).requires_grad_()
    output = case.with_(hidden=states, weight=weight).call(tp_group=mesh)
    gradients = torch.autograd.grad(output.loss, [states, weight])
    for ours, theirs in zip(gradients, (whole.grad_hidden, whole.grad_weight), strict=True):
        assert ours.placements == (Shard(0),)
        torch.testing.assert_close(ours.full_tensor(), theirs)
    replicated = distribute_tensor(case.hidden, mesh, [Replicate()])
    with pytest.raises(TypeError, match=r"hidden: expected .* Shard\(0\) on .* one of Replicate"):
        case.with_(hidden=replicated, weight=weight).call(tp_group=mesh, sequence_parallel=True)


def test_dtensors() -> None:
    on_ranks(2, dtensors_of_two_ranks)


def compiled_on_two_ranks() -> None:
    mine, how = part_of(lopsided())

    def loss(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return mine.with_(hidden=states, weight=weight).call(**how).loss

    def block(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logprobs, entropy = ipo_ext.linear_token_logprobs(
            states, weight, mine.labels, chunk_size=CHUNK, **how
        )
        return (2 * logprobs + entropy)[0:40].sum()

    leaves = [mine.hidden, mine.weight]
    for function in (loss, block):
        eager = torch.autograd.grad(function(*leaves), leaves)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for ours, theirs in zip(torch.autograd.grad(compiled(*leaves), leaves), eager, strict=True):
            assert same_bits(ours, theirs)


@pytest.mark.slow
def test_compiled() -> None:
    on_ranks(2, compiled_on_two_ranks)
