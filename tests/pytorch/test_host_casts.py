"""The sampler's log-probabilities keep their digits in hosts that cast what forward is given."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch._dynamo.testing import CompileCounterWithBackend

import ipo_ext
from ipo_ext import IPOLoss, LinearIPOLoss, LossBatch, LowPrecisionWarning, _precision, reference
from tests.support import host_casts
from tests.support.cases import same_bits
from tests.support.host_casts import CONFIG
from tests.support.subjects import SUBJECTS, Subject

LOSSES = [name for name in SUBJECTS if "loss" in name]


@pytest.fixture(autouse=True)
def _warnings_of_a_new_process() -> None:
    _precision._warn_once.cache_clear()


@pytest.fixture
def warned() -> Iterator[Callable[[], list[str]]]:
    """The texts of the warnings so far."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught if w.category is LowPrecisionWarning]


def rounded(subject: Subject, dtype: torch.dtype) -> tuple[Any, ...]:
    first, constants = subject.inputs("cpu")
    *others, inference, advantages, mask = constants
    return (first, *others, inference.to(dtype), advantages, mask)


# -------------------------------------------------------------------------------------------------
# The warning


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("module", [ipo_ext, reference])
@pytest.mark.parametrize("name", LOSSES)
def test_logprobs_in_16_bits_warn_once(
    name: str, module: Any, dtype: torch.dtype, warned: Callable[[], list[str]]
) -> None:
    function = getattr(module, name)
    for _ in range(3):
        function(*rounded(SUBJECTS[name], dtype))
    (text,) = warned()
    assert text.startswith(f"inference_logprobs: expected float32 or float64, got {dtype}")
    step = {torch.float16: "0.008", torch.bfloat16: "0.06"}[dtype]
    assert f"{step} at -20" in text
    assert "LossBatch" in text
    assert "cast_forward_inputs=False" in text


@pytest.mark.parametrize("name", LOSSES)
def test_logprobs_in_full_precision_do_not_warn(name: str, warned: Callable[[], list[str]]) -> None:
    for dtype in (torch.float32, torch.float64):
        getattr(ipo_ext, name)(*rounded(SUBJECTS[name], dtype))
    assert warned() == []


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_warns_once_without_a_graph_break(
    name: str, warned: Callable[[], list[str]]
) -> None:
    compiled = torch.compile(getattr(ipo_ext, name), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        first, *constants = rounded(SUBJECTS[name], torch.bfloat16)
        compiled(first.requires_grad_(), *constants).loss.backward()
    assert len(warned()) == 1


def test_the_standard_filter_silences_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", LowPrecisionWarning)
        ipo_ext.ipo_loss(*rounded(SUBJECTS["ipo_loss"], torch.bfloat16))


# -------------------------------------------------------------------------------------------------
# The batch


def test_a_batch_gives_what_plain_arguments_give() -> None:
    hidden, labels, others = host_casts.inputs(rank=0)
    head = host_casts.head()
    plain = head(hidden, labels, **others, num_active=host_casts.ROWS)
    for output in (
        head(hidden, labels, LossBatch(**others), num_active=host_casts.ROWS),
        head(hidden, labels=labels, inference_logprobs=LossBatch(**others), normalizer=None),
        LinearIPOLoss(CONFIG)(hidden, head.weight, labels, LossBatch(**others)),
    ):
        leaves = pytree.tree_leaves(output), pytree.tree_leaves(plain)
        assert all(map(same_bits, *leaves))

    del others["temperature"]
    trainer = -torch.rand(host_casts.ROWS)
    expected = ipo_ext.ipo_loss(trainer, **others, config=CONFIG)
    assert same_bits(IPOLoss(CONFIG)(trainer, LossBatch(**others)).loss, expected.loss)


@pytest.mark.parametrize("name", ["advantages", "loss_mask", "normalizer", "temperature"])
def test_an_argument_beside_a_batch_is_refused(name: str) -> None:
    hidden, labels, others = host_casts.inputs(rank=0)
    with pytest.raises(TypeError, match=f"^{name}: expected it in the LossBatch, got it as an arg"):
        host_casts.head()(hidden, labels, LossBatch(**others), **{name: others[name]})


def test_a_batch_moves_and_keeps_its_dtypes() -> None:
    batch = LossBatch(**{**host_casts.inputs(rank=0)[2], "normalizer": 3.5})
    moved = batch.to("meta", non_blocking=True)
    assert moved.arguments().keys() == batch.arguments().keys()
    for name, value in batch.arguments().items():
        arrived = getattr(moved, name)
        if isinstance(value, torch.Tensor):
            assert (arrived.device.type, arrived.dtype) == ("meta", value.dtype), name
        else:
            assert arrived == value
    with pytest.raises(TypeError, match=r"device: expected a device, got torch\.bfloat16"):
        batch.to(torch.bfloat16)


def test_a_loader_pins_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    pinned = LossBatch(**{**host_casts.inputs(rank=0)[2], "normalizer": 3.5}).pin_memory()
    assert pinned.arguments().pop("normalizer") == 3.5
    tensors = [value for value in pinned.arguments().values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    assert all(tensor.is_meta for tensor in tensors)


def test_a_batch_crosses_processes() -> None:
    batch = LossBatch(**host_casts.inputs(rank=0)[2])
    arrived = pickle.loads(pickle.dumps(batch)).arguments()
    assert arrived.keys() == batch.arguments().keys()
    assert all(same_bits(arrived[name], value) for name, value in batch.arguments().items())


def test_numbers_in_a_batch_do_not_recompile() -> None:
    hidden, labels, others = host_casts.inputs(rank=0)
    head, counter = host_casts.head(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head, fullgraph=True, backend=counter)
    for normalizer in range(1, 21):
        batch = LossBatch(**{**others, "normalizer": normalizer + 0.5})
        assert same_bits(compiled(hidden, labels, batch).loss, head(hidden, labels, batch).loss)
    assert counter.frame_count <= 2


# -------------------------------------------------------------------------------------------------
# Hosts, each in two processes


@pytest.mark.parametrize("on_rank", host_casts.HOSTS)
def test_no_host_casts_a_batch(on_rank: Callable[[int, str], None], tmp_path: Path) -> None:
    host_casts.run_on_two_ranks(on_rank, tmp_path)
