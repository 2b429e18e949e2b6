"""What ranks exchange of their columns of a row, and the rows put together of it: the operators,
called for every rank in one process."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import ipo_ext
from ipo_ext._ops import library
from tests.support.backends import Backend
from tests.support.cases import same_bits

IGNORED = -100
INACTIVE, FAULT, LABEL_FAULT = -1.0, -2.0, -3.0  # in the place of a sum of exponentials


def packets_of(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first_column: int = 0,
    *,
    temperature: torch.Tensor | None = None,
    softcap: float = 0.0,
    fault: int = 0,
) -> torch.Tensor:
    """[rows, 4]: row_max, sum_exp, sum_exp_x, label."""
    flag = torch.full((1,), fault, dtype=torch.int32, device=logits.device)
    scaling = (temperature, softcap, None, True)
    return library.operators().chunk_packets(logits, labels, *scaling, flag, first_column)


def put_together(
    packets: list[torch.Tensor],
    labels: torch.Tensor,
    temperature: torch.Tensor | None = None,
    float64: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropies, softmax_stats, and what it says of faults."""
    fault = torch.zeros(1, dtype=torch.int32, device=labels.device)
    run = library.operators().gather_packets
    return (*run(torch.cat(packets), labels, temperature, fault, float64), fault)


def case(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, spread: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    logits = (torch.randn(rows, columns, generator=generator) * spread).to(dtype)
    labels = torch.randint(columns, (rows,), generator=generator)
    labels[1::4] = IGNORED
    return logits, labels


ENDS = {"two": (0, 17, 40), "empty": (0, 0, 29, 29, 40), "single columns": (0, 1, 2, 39, 40)}


@pytest.mark.parametrize("shards", ENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_row_in_parts_is_the_row(
    backend: Backend, shards: str, dtype: torch.dtype, softcap: float
) -> None:
    logits, labels = (tensor.to(backend.device) for tensor in case(9, 40, dtype))
    temperature = torch.linspace(0.5, 2, 9, device=backend.device)
    how = {"temperature": temperature, "softcap": softcap}
    ends = ENDS[shards]
    parts = itertools.pairwise(ends)
    packets = [packets_of(logits[:, a:b], labels, a, **how) for a, b in parts]
    float64 = dtype == torch.float64
    logprobs, entropy, stats, fault = put_together(packets, labels, temperature, float64)
    whole = ipo_ext.token_logprobs(logits, labels, temperature=temperature, softcap=softcap or None)
    tolerance = {"rtol": 1e-13, "atol": 1e-13} if float64 else {"rtol": 2e-6, "atol": 1e-6}
    torch.testing.assert_close(logprobs, whole[0], **tolerance)
    torch.testing.assert_close(entropy, whole[1], **tolerance)
    capped = logits.double() if softcap == 0 else softcap * (logits.double() / softcap).tanh()
    active = labels != IGNORED
    row_max = torch.where(active, capped.amax(-1), 0)
    sums = ((capped - row_max[:, None]) / temperature[:, None]).exp().sum(-1)
    torch.testing.assert_close(stats[0].double(), row_max, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats[1][active].double(), sums[active], rtol=1e-5, atol=0.0)
    assert fault.item() == 0


def test_a_packet_says_what_it_says(backend: Backend) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 4, device=backend.device)
    labels = torch.tensor([5, 7, IGNORED, 8], device=backend.device)
    packets = packets_of(logits, labels, 5).cpu()
    sum_exp, sum_exp_x = (math.exp(-2) + math.exp(-1) + 1, -2 * math.exp(-2) - math.exp(-1))
    expected = torch.tensor(
        [
            [3.0, sum_exp, sum_exp_x, 1.0],
            [3.0, sum_exp, sum_exp_x, 2.0],
            [0.0, INACTIVE, 0.0, math.inf],
            [3.0, sum_exp, sum_exp_x, math.inf],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(packets, expected, rtol=1e-6, atol=1e-6)
    nothing = packets_of(logits[:, :0], labels, 5).cpu()
    assert nothing[0].tolist() == [-math.inf, 0, 0, math.inf]
    assert nothing[2].tolist() == [0, INACTIVE, 0, math.inf]
    for fault, code in ((1, FAULT), (2, LABEL_FAULT)):
        assert packets_of(logits, labels, 5, fault=fault)[:, 1].tolist() == [code] * 4


@pytest.mark.parametrize(("rows", "columns"), [(2, 40_000), (5, 60_000)])
def test_long_rows(backend: Backend, rows: int, columns: int) -> None:
    """On CUDA several blocks reduce each of few rows, and of rows that one block cannot keep."""
    logits, labels = (tensor.to(backend.device) for tensor in case(rows, columns, torch.bfloat16))
    half, cold = columns // 2 - 5, torch.tensor(0.5, device=backend.device)
    labels[-1] = 7
    logits[-1, half - 100] = 900  # a later block's maximum, far above the first one's
    packets = [
        packets_of(logits[:, :half], labels, temperature=cold),
        packets_of(logits[:, half:], labels, half, temperature=cold),
    ]
    logprobs, entropy, *_ = put_together(packets, labels, cold)
    wide = ipo_ext.token_logprobs(logits.double(), labels, temperature=cold)
    torch.testing.assert_close(logprobs.double(), wide[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), wide[1], rtol=2e-6, atol=2e-6)


def test_a_part_that_vanishes_adds_nothing(backend: Backend) -> None:
    """Its sums are finite, its distance to the row's maximum is not."""
    logits = torch.tensor([[1.0, 2.0], [-math.inf, -math.inf]], dtype=torch.float64)
    far = torch.tensor([[-1e308, -1.5e308], [1.0, 2.0]], dtype=torch.float64) * 1.1
    logits, far = logits.to(backend.device), far.to(backend.device)
    labels = torch.tensor([1, 3], device=backend.device)
    cold = torch.tensor(1e-3, device=backend.device)
    packets = [
        packets_of(logits, labels, temperature=cold),
        packets_of(far, labels, 2, temperature=cold),
    ]
    logprobs, entropy, *_ = put_together(packets, labels, cold, True)
    assert logprobs.tolist() == [0.0, 0.0]
    assert entropy.abs().max().item() < 1e-12


def test_rows_are_put_together_in_the_order_of_the_ranks(backend: Backend) -> None:
    """The sums of ranks with one maximum, which no order of addition but one gives."""
    sums = (1.0, 2.0**-53, 2.0**-53)
    packets = [
        torch.tensor([[0.0, each, 0.0, 0.0 if rank == 0 else math.inf]], dtype=torch.float64)
        for rank, each in enumerate(sums)
    ]
    labels = torch.zeros(1, dtype=torch.int64, device=backend.device)
    packets = [packet.to(backend.device) for packet in packets]
    one_way, *_ = put_together(packets, labels, float64=True)
    other_way, *_ = put_together(packets[::-1], labels, float64=True)
    assert one_way.item() == -math.log(1.0)
    assert other_way.item() == -math.log(1.0 + 2.0**-52)


# -------------------------------------------------------------------------------------------------
# Faults


def faulty(backend: Backend, packets: list[torch.Tensor], labels: torch.Tensor, text: str) -> None:
    if backend.faults_raise:
        with pytest.raises(RuntimeError, match=text):
            put_together(packets, labels)
        return
    *results, fault = put_together(packets, labels)
    assert fault.item() == 1
    assert all(result.isnan().all() for result in results)


def test_the_label_has_one_owner(backend: Backend) -> None:
    logits, labels = (tensor.to(backend.device) for tensor in case(9, 40))
    a, b = packets_of(logits[:, :20], labels), packets_of(logits[:, 20:], labels, 20)
    beyond = packets_of(logits[:, 20:], labels, 21)
    twice = packets_of(logits[:, :20], labels)
    assert put_together([a, b], labels)[-1].item() == 0
    faulty(backend, [a, twice], labels, "^labels: expected a token in the shard of one rank")
    faulty(backend, [a, beyond], labels, "0 of 2 ranks have, at row")
    faulty(backend, [a, b, twice], labels, "2 of 3 ranks have, at row")
    # A logit of +inf looks like another rank's label. The row is NaN, and nothing else.
    logits[2, labels[2]] = torch.inf
    a, b = packets_of(logits[:, :20], labels), packets_of(logits[:, 20:], labels, 20)
    logprobs, entropy, _, fault = put_together([a, b], labels)
    assert fault.item() == 0
    assert logprobs.isnan().nonzero().tolist() == [[2]]
    assert entropy.isnan().nonzero().tolist() == [[2]]


def test_ranks_agree_on_the_rows_that_take_part(backend: Backend) -> None:
    logits, labels = (tensor.to(backend.device) for tensor in case(9, 40))
    b = packets_of(logits[:, 20:], labels, 20)
    other = labels.clone()
    other[1] = 3  # of the first rank; the second takes no part in it
    more = packets_of(logits[:, :20], other)
    for own in (labels, other):
        faulty(backend, [more, b], own, "^tp_group: expected ranks that are given the same tokens")
    fewer = labels.clone()
    fewer[:] = IGNORED
    nothing = packets_of(logits[:, :20], fewer)
    faulty(backend, [nothing, b], labels, "expected")
    assert put_together([nothing, packets_of(logits[:, 20:], fewer, 20)], fewer)[-1].item() == 0


@pytest.mark.parametrize(
    ("flag", "text"), [(1, "^tp_group: rank 1 has found"), (2, "^labels: rank 1")]
)
def test_a_fault_of_one_rank_is_all_ranks(backend: Backend, flag: int, text: str) -> None:
    logits, labels = (tensor.to(backend.device) for tensor in case(9, 40))
    a = packets_of(logits[:, :20], labels)
    b = packets_of(logits[:, 20:], labels, 20, fault=flag)
    faulty(backend, [a, b], labels, text)
    none = torch.full_like(labels, IGNORED)
    a, b = packets_of(logits[:, :20], none), packets_of(logits[:, 20:], none, 20, fault=flag)
    faulty(backend, [a, b], none, text)
    logits[0, 0] = torch.inf  # of a row that is NaN it does not matter who has the label
    a = packets_of(logits[:1, :20], labels[:1])
    b = packets_of(logits[:1, 20:], labels[:1], 20, fault=flag)
    faulty(backend, [a, b], labels[:1], text)


# -------------------------------------------------------------------------------------------------
# The backward pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_gradient_of_a_part(backend: Backend, dtype: torch.dtype, softcap: float) -> None:
    """Also where it lies beside other columns, which stay."""
    logits, labels = (tensor.to(backend.device) for tensor in case(9, 40, dtype))
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = ipo_ext.token_logprobs(leaf, labels, softcap=softcap or None)
    grads = [torch.linspace(a, 1, 9, dtype=logprobs.dtype, device=leaf.device) for a in (-1, 0)]
    (whole,) = torch.autograd.grad([logprobs, entropy], leaf, grads)
    ends = (0, 11, 11, 40)
    parts = list(itertools.pairwise(ends))
    packets = [packets_of(logits[:, a:b], labels, a, softcap=softcap) for a, b in parts]
    _, entropy, stats, fault = put_together(packets, labels, float64=dtype == torch.float64)
    made = torch.full_like(logits, 7)
    for a, b in parts:
        library.operators().chunk_shard_backward(
            logits[:, a:b],
            labels,
            *(None, softcap, None, True),
            entropy,
            stats,
            *grads,
            fault,
            a,
            made[:, a:b],
            None,
        )
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {}
    torch.testing.assert_close(made, whole, **tolerance)


def test_a_packet_of_all_columns_gives_the_row_s_bits(backend: Backend) -> None:
    logits, labels = (tensor.to(backend.device) for tensor in case(9, 40))
    logprobs, entropy, *_ = put_together([packets_of(logits, labels)], labels)
    whole = ipo_ext.token_logprobs(logits, labels)
    assert same_bits(logprobs, whole[0])
    assert same_bits(entropy, whole[1])


def test_sizes_are_checked(backend: Backend) -> None:
    labels = torch.zeros(3, dtype=torch.int64, device=backend.device)
    wrong = (torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 4), torch.zeros(0, 4).double())
    for packets in wrong:
        with pytest.raises(RuntimeError, match="packets: expected contiguous float64"):
            put_together([packets.to(backend.device)], labels)
