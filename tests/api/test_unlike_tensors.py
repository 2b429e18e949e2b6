"""What is no plain tensor, no number that a machine holds, no mapping: refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ipo_ext
from ipo_ext import IPOConfig
from ipo_ext._ops import errors
from tests.support.backends import Backend

ROWS, WIDTH = 4, 3


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def dtensor(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(tensor, dist.init_device_mesh("cpu", (1,)), [Replicate()])


def masked(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MaskedTensors are a prototype
        return torch.masked.masked_tensor(tensor, torch.ones_like(tensor, dtype=torch.bool))


def nested(layout: torch.layout) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.nested.nested_tensor([tensor, tensor], layout=layout)


# What it is, as the message has it, and how to make it of a plain tensor.
KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a DTensor": dtensor,
    "a MaskedTensor": masked,
    "a nested one": nested(torch.jagged),
    "a nested one; ": nested(torch.strided),
    "one of layout torch.sparse_coo": torch.Tensor.to_sparse,
    "one of layout torch.sparse_csr": torch.Tensor.to_sparse_csr,
}


def calls() -> dict[str, Callable[[Callable[..., Any]], Any]]:
    """An argument of a public function to a call in which it is of another kind."""
    per_token = -torch.rand(ROWS, WIDTH)
    scores = torch.randn(ROWS, WIDTH)
    labels = torch.zeros(ROWS, dtype=torch.long)
    mask = torch.ones(ROWS, WIDTH, dtype=torch.bool)
    weight = torch.randn(5, WIDTH)

    def loss(**changed: Any) -> Any:
        names = ("trainer_logprobs", "inference_logprobs", "advantages")
        given = dict.fromkeys(names, per_token) | {"loss_mask": mask} | changed
        return ipo_ext.ipo_loss(**given)

    return {
        "trainer_logprobs": lambda kind: loss(trainer_logprobs=kind(per_token)),
        "inference_logprobs": lambda kind: loss(inference_logprobs=kind(per_token)),
        "advantages": lambda kind: loss(advantages=kind(per_token)),
        "loss_mask": lambda kind: loss(loss_mask=kind(mask)),
        "teacher_logprobs": lambda kind: loss(teacher_logprobs=kind(per_token)),
        "loss_weights": lambda kind: loss(loss_weights=kind(per_token)),
        "logits": lambda kind: ipo_ext.token_logprobs(kind(scores), labels),
        "temperature": lambda kind: ipo_ext.token_logprobs(
            torch.randn(ROWS, WIDTH, 5),
            labels.expand(WIDTH, ROWS).t(),
            temperature=kind(-per_token),
        ),
        "hidden": lambda kind: ipo_ext.linear_token_logprobs(kind(scores), weight, labels),
        "weight": lambda kind: ipo_ext.linear_token_logprobs(scores, kind(weight), labels),
    }


@pytest.mark.parametrize("argument", calls())
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_tensors(mesh: Any, kind: str, argument: str) -> None:
    with pytest.raises(TypeError) as caught:
        calls()[argument](KINDS[kind])
    message = str(caught.value)
    assert message.startswith(f"{argument}: expected a plain tensor, got {kind}")
    assert "\n" not in message


def test_a_subclass_that_is_a_plain_tensor_passes() -> None:
    class Named(torch.Tensor):
        pass

    for call in calls().values():
        call(lambda tensor: tensor.as_subclass(Named))


# -------------------------------------------------------------------------------------------------
# Numbers


BEYOND = {"int": 10**400, "long": 10**5000, "fraction": Fraction(10**400)}


@pytest.mark.parametrize("number", BEYOND)
def test_numbers_beyond_all_floats(number: str) -> None:
    value: Any = BEYOND[number]
    scores, labels = torch.randn(ROWS, 5), torch.zeros(ROWS, dtype=torch.long)
    loss = calls()["advantages"]
    assert loss(lambda tensor: tensor) is not None
    for field in ("dppo_mask_low", "dppo_mask_high", "kl_tau", "rollout_min_ratio"):
        with pytest.raises(ValueError, match=f"{field}: expected a number that float64 holds"):
            IPOConfig(**{field: value})
    for name in ("temperature", "softcap"):
        with pytest.raises(ValueError, match=f"{name}: expected a number that float64 holds"):
            ipo_ext.token_logprobs(scores, labels, **{name: value})


@pytest.mark.parametrize("name", ["chunk_size", "num_active"])
@pytest.mark.parametrize("count", [2**63, 2**64, 10**400])
def test_counts_beyond_an_operator(name: str, count: int) -> None:
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(5, WIDTH)
    labels, each = torch.zeros(ROWS, dtype=torch.long), torch.zeros(ROWS)
    arguments = (hidden, weight, labels, each, each, each == 0)
    expected = rf"{name}: expected a number below 2\*\*63 or None, got one of {count.bit_length()}"
    with pytest.raises(ValueError, match=expected):
        ipo_ext.ipo_loss_from_hidden(*arguments, **{name: count})
    largest = ipo_ext.ipo_loss_from_hidden(*arguments, **{name: 2**63 - 1})
    assert torch.equal(largest.loss, ipo_ext.ipo_loss_from_hidden(*arguments).loss)


@pytest.mark.parametrize("wrong", [[1], None, "kl_tau", [("kl_tau", 0.1)], IPOConfig()])
def test_a_config_of_no_mapping(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"mapping: .* such as a dict, got {type(wrong).__name__};"):
        IPOConfig.from_mapping(wrong)


# -------------------------------------------------------------------------------------------------
# Memory, negated views, a second import


def test_in_place_on_a_negated_view(backend: Backend) -> None:
    each, labels = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    constants = [tensor.to(backend.device) for tensor in (labels, each, each, each == 0)]
    numbers = torch.randn(2, 5, dtype=torch.complex64, device=backend.device, requires_grad=True)
    for logits in (torch._neg_view(numbers.real * 1), (numbers * 1).conj().imag):
        before = logits.detach().clone()
        with pytest.raises(ValueError, match=r"logits: expected no negated view"):
            ipo_ext.ipo_loss_from_logits(logits, *constants, inplace=True)
        assert torch.equal(logits, before)
        ipo_ext.ipo_loss_from_logits(logits.resolve_neg() * 1, *constants, inplace=True)


def test_no_memory_for_a_copy(backend: Backend) -> None:
    logits = torch.zeros(1, device=backend.device).expand(2**34, 2**14).t()
    with pytest.raises(RuntimeError, match=rf"^logits: no memory for a copy of {2**48} elements"):
        ipo_ext.token_logprobs(logits, torch.zeros(2**14, dtype=torch.long, device=backend.device))


def test_no_memory_for_a_gradient(backend: Backend) -> None:
    rows, columns = 2**20, 2**26
    logits = torch.empty(columns, device=backend.device).expand(rows, columns).requires_grad_()
    nothing = torch.zeros(rows, device=backend.device)
    with pytest.raises(RuntimeError, match=rf"no memory for a tensor of {rows * columns} elements"):
        ipo_ext.ipo_loss_from_logits(logits, nothing.long(), nothing, nothing, nothing.bool())


def test_memory_that_a_gpu_lacks_is_torch_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: an operator that says so, and tensors that say they are on one."""

    def run(*_: Any) -> Any:
        raise RuntimeError("logits: no memory for a copy of 8 elements")

    with pytest.raises(RuntimeError) as on_cpu:
        errors.with_torch_errors(run, torch.zeros(1))
    assert not isinstance(on_cpu.value, torch.OutOfMemoryError)
    monkeypatch.setattr(errors, "_is_on_gpu", lambda value: isinstance(value, torch.Tensor))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(torch.OutOfMemoryError, match="logits: no memory for a copy"):
        errors.with_torch_errors(run, torch.zeros(1))

    def synchronize() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="device-side assert"):
        errors.with_torch_errors(run, torch.zeros(1))


SECOND_IMPORT = """
import sys, torch
import ipo_ext
x = -torch.rand(5)
def step():
    leaf = x.clone().requires_grad_()
    out = ipo_ext.ipo_loss(leaf, x - 0.1, x, x < 0)
    out.loss.backward()
    hidden = torch.ones(5, 3, requires_grad=True)
    labels = torch.zeros(5, dtype=torch.long)
    other = ipo_ext.ipo_loss_from_hidden(hidden, torch.ones(4, 3), labels, x, x, x < 0)
    other.loss.backward()
    out.metrics.total()
    return [out.loss.detach(), leaf.grad, other.loss.detach(), hidden.grad]
first, config = step(), ipo_ext.IPOConfig
for name in [name for name in sys.modules if name.partition(".")[0] == "ipo_ext"]:
    del sys.modules[name]
del ipo_ext
import gc; gc.collect()
import ipo_ext
assert ipo_ext.IPOConfig is not config
assert all(torch.equal(a, b) for a, b in zip(first, step()))
"""


def test_a_second_import() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND_IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
