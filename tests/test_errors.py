"""Bad input: an error that names the argument, what was expected and what came; or poison."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from backends import Backend
from cases import FLOAT_FIELDS, HOSTILE_CU_SEQLENS, Case, evaluate, random_case
from ipo_ext import _C, IPOConfig, _operators, ipo_loss

TOKENS = 100
FLOATING = "torch.float16 or torch.bfloat16 or torch.float32 or torch.float64"
TAKES = f"expected dtype {FLOATING}"


@dataclasses.dataclass(frozen=True)
class Bad:
    """A call that breaks one rule, and the whole message that says so ("{device}": the batch's)."""

    field: str
    change: Callable[[Case], Any]
    error: type[Exception]
    message: str

    def case(self, backend: Backend) -> Case:
        return good_case(backend).with_(**{self.field: self.change(good_case(backend))})


def good_case(backend: Backend) -> Case:
    case = random_case(TOKENS, teacher=True, weights=True, segments="sevens")
    return case.with_(normalizer=torch.tensor(70)).to(backend.device)


def cu(*values: Any, dtype: torch.dtype = torch.int32) -> Callable[[Case], torch.Tensor]:
    return lambda case: torch.tensor(values, dtype=dtype, device=case.loss_mask.device)


def requiring_grad(field: str) -> Callable[[Case], torch.Tensor]:
    return lambda case: getattr(case, field).float().requires_grad_()


def _bad_inputs() -> dict[str, Bad]:
    bad: dict[str, Bad] = {}

    def add(name: str, field: str, change: Any, error: type[Exception], message: str) -> None:
        bad[name] = Bad(field, change, error, f"{field}: {message}")

    for field in FLOAT_FIELDS:
        add(f"{field}-dtype", field, lambda case, field=field: getattr(case, field).long(),
            TypeError, f"{TAKES}, got torch.int64")  # fmt: skip
    add("trainer_logprobs-missing", "trainer_logprobs", lambda _: None,
        TypeError, "expected a tensor, got NoneType")  # fmt: skip
    add("advantages-list", "advantages", lambda case: case.advantages.tolist(),
        TypeError, "expected a tensor, got list")  # fmt: skip
    add("loss_mask-float", "loss_mask", lambda case: case.loss_mask.float(),
        TypeError,
        "expected dtype torch.bool, got torch.float32; convert it: loss_mask.bool()")  # fmt: skip
    for field in (*FLOAT_FIELDS[1:], "loss_mask"):
        add(f"{field}-shape", field, lambda case, field=field: getattr(case, field)[1:],
            ValueError, "expected shape [100] like trainer_logprobs, got [99]")  # fmt: skip
        add(f"{field}-rank", field, lambda case, field=field: getattr(case, field).view(10, 10),
            ValueError, "expected shape [100] like trainer_logprobs, got [10, 10]")  # fmt: skip
        add(f"{field}-device", field, lambda case, field=field: getattr(case, field).to("meta"),
            ValueError, "expected device {device} like trainer_logprobs, got meta")  # fmt: skip
    for field in (*FLOAT_FIELDS[1:], "normalizer"):
        add(f"{field}-requires-grad", field, requiring_grad(field), ValueError,
            "expected a tensor that does not require grad, because no gradient flows to it; "
            f"pass {field}.detach()")  # fmt: skip

    add("cu_seqlens-dtype", "cu_seqlens", cu(0, TOKENS, dtype=torch.int64),
        TypeError, "expected dtype torch.int32, got torch.int64")  # fmt: skip
    add("cu_seqlens-device", "cu_seqlens", lambda case: case.cu_seqlens.to("meta"),
        ValueError, "expected device {device} like trainer_logprobs, got meta")  # fmt: skip
    says = "it holds the first token of each packed sequence, then the number of tokens"
    for name, change, shape in (
        ("rank", cu([0, TOKENS]), "[1, 2]"),
        ("scalar", lambda case: cu(TOKENS)(case)[0], "[]"),
        ("empty", cu(), "[0]"),
    ):
        add(f"cu_seqlens-{name}", "cu_seqlens", change,
            ValueError, f"expected shape [segments + 1], got {shape}; {says}")  # fmt: skip

    for value in (0.0, -1.0, math.nan, math.inf, -math.inf, 0):
        add(f"normalizer-{value}", "normalizer", lambda _, value=value: value,
            ValueError, f"expected a finite number > 0 or a tensor, got {value!r}")  # fmt: skip
    add("normalizer-text", "normalizer", lambda _: "70",
        TypeError, "expected a float or a 0-dim tensor, got str")  # fmt: skip
    add("normalizer-bool", "normalizer", lambda _: True,
        TypeError, "expected a float or a 0-dim tensor, got bool")  # fmt: skip
    add("normalizer-rank", "normalizer", cu(70),
        ValueError, "expected a 0-dim tensor, got shape [1]")  # fmt: skip
    add("normalizer-dtype", "normalizer", lambda case: case.loss_mask[0], TypeError,
        f"{TAKES} or torch.int32 or torch.int64, got torch.bool")  # fmt: skip
    add("normalizer-device", "normalizer", lambda case: case.normalizer.to("meta"),
        ValueError, "expected device {device} like trainer_logprobs, got meta")  # fmt: skip
    add("teacher_logprobs-missing", "teacher_logprobs", lambda _: None, ValueError,
        "expected a tensor because config.teacher_tau is 0.3, got None; pass the teacher's "
        "log-probabilities or set teacher_tau to 0")  # fmt: skip
    add("config-mapping", "config", lambda _: {"kl_tau": 0.1}, TypeError,
        "expected an IPOConfig, got dict; use IPOConfig.from_mapping")  # fmt: skip
    return bad


BAD = _bad_inputs()
bad_inputs = pytest.mark.parametrize("name", BAD)


def message_of(bad: Bad, call: Callable[[], Any]) -> str:
    with pytest.raises(bad.error) as caught:
        call()
    return str(caught.value)


@bad_inputs
def test_bad_input_is_refused_in_words(backend: Backend, name: str) -> None:
    bad = BAD[name]
    case = bad.case(backend)
    device = good_case(backend).trainer_logprobs.device
    message = message_of(bad, lambda: case.call(ipo_loss))
    assert message == bad.message.replace("{device}", str(device))


@bad_inputs
def test_tracing_says_the_same(backend: Backend, name: str) -> None:
    bad = BAD[name]
    case = bad.case(backend)
    with FakeTensorMode() as mode:
        fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
        tensors = {k: v for k, v in fields.items() if isinstance(v, torch.Tensor)}
        fake = case.with_(**{k: mode.from_tensor(v) for k, v in tensors.items()})
        traced = message_of(bad, lambda: fake.call(ipo_loss))
    assert traced == message_of(bad, lambda: case.call(ipo_loss))


@pytest.mark.parametrize("name", ["loss_mask-float", "advantages-shape", "normalizer--1.0"])
def test_compiling_says_the_same(backend: Backend, name: str) -> None:
    bad = BAD[name]
    case = bad.case(backend)
    function = torch.compile(ipo_loss, dynamic=True, backend="eager")
    traced = message_of(bad, lambda: case.call(function))
    assert traced == message_of(bad, lambda: case.call(ipo_loss))


def test_an_unknown_argument_is_refused(backend: Backend) -> None:
    case = good_case(backend)
    with pytest.raises(TypeError, match="unexpected keyword argument 'kl_tau'"):
        case.call(ipo_loss, kl_tau=0.1)
    with pytest.raises(TypeError, match="positional argument"):
        ipo_loss(*(getattr(case, name) for name in FLOAT_FIELDS))


# ---------------------------------------------------------------------------------------------
# Devices


@pytest.fixture
def fakes() -> Iterator[FakeTensorMode]:
    """Tensors of any device, on a machine that has none."""
    with FakeTensorMode() as mode:
        yield mode


def on(device: str) -> tuple[torch.Tensor, ...]:
    floats = (torch.empty(3, device=device) for _ in range(3))
    return *floats, torch.empty(3, device=device, dtype=torch.bool)


def test_a_build_without_cuda_says_how_to_get_it(
    fakes: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_C, "CUDA_ARCHITECTURES", ())
    with pytest.raises(
        ValueError, match=r"trainer_logprobs: expected a CPU tensor, got device"
    ) as e:
        ipo_loss(*on("cuda:0"))
    assert "no CUDA operators" in str(e.value)
    assert "IPO_EXT_CUDA=ON" in str(e.value)


def test_a_build_with_cuda_takes_a_cuda_tensor(
    fakes: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_C, "CUDA_ARCHITECTURES", ("90",))
    assert ipo_loss(*on("cuda:0")).loss.device == torch.device("cuda:0")


def test_other_devices_are_refused(fakes: FakeTensorMode) -> None:
    with pytest.raises(ValueError, match="expected a CPU or CUDA tensor, got device mps:0"):
        ipo_loss(*on("mps:0"))


# ---------------------------------------------------------------------------------------------
# Values that only the kernel sees: raise on the CPU, poison on CUDA


def poisons_or_raises(backend: Backend, case: Case, message: str) -> None:
    if backend.faults_raise:
        with pytest.raises(RuntimeError) as caught:
            case.call(ipo_loss)
        assert str(caught.value).startswith(message)
    else:
        poisoned = evaluate(case)
        assert math.isnan(poisoned.loss)
        assert poisoned.gradient.isnan().all()


@pytest.mark.parametrize("name", HOSTILE_CU_SEQLENS)
@pytest.mark.parametrize("masked", [0.2, 1.0])
def test_a_cu_seqlens_that_is_no_partition(backend: Backend, name: str, masked: float) -> None:
    values = HOSTILE_CU_SEQLENS[name]
    case = random_case(TOKENS, masked=masked).with_(cu_seqlens=torch.tensor(values).int())
    message = f"cu_seqlens: expected a partition of the tokens, [0, ..., {TOKENS}] without a "
    poisons_or_raises(backend, case.to(backend.device), f"{message}decrease, got ")


def test_the_first_wrong_entry_is_named() -> None:
    case = random_case(TOKENS).with_(cu_seqlens=torch.tensor([0, 60, 40, 100]).int())
    with pytest.raises(RuntimeError, match=r"got 40 at index 2 of 4$"):
        case.call(ipo_loss)


@pytest.mark.parametrize("value", [-1.0, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [0.2, 1.0])
def test_a_normalizer_that_is_no_count(
    backend: Backend, value: float, dtype: torch.dtype, masked: float
) -> None:
    case = random_case(TOKENS, masked=masked).to(backend.device)
    case = case.with_(normalizer=torch.tensor(value, dtype=dtype, device=backend.device))
    poisons_or_raises(backend, case, "normalizer: expected a count of tokens, at least 0, got ")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_negative_count(backend: Backend, dtype: torch.dtype) -> None:
    case = random_case(TOKENS).to(backend.device)
    case = case.with_(normalizer=torch.tensor(-7, dtype=dtype))  # on the CPU, whatever the batch
    poisons_or_raises(backend, case, "normalizer: expected a count of tokens, at least 0, got -7")


# ---------------------------------------------------------------------------------------------
# The operators themselves: without Python's checks, memory safe still


def operator_arguments(case: Case) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(case) if field.name != "config"]
    settings = IPOConfig(kl_tau=0.1, teacher_tau=0.5).settings(torch.float32)
    arguments = {name: getattr(case, name) for name in names}
    return {**arguments, **settings._asdict(), "with_gradient": True}


@pytest.mark.parametrize("field", [*FLOAT_FIELDS, "loss_mask"])
@pytest.mark.parametrize("shape", [(0,), (1,), (TOKENS + 1,), (TOKENS, TOKENS)])
def test_the_operator_checks_sizes(backend: Backend, field: str, shape: tuple[int, ...]) -> None:
    case = good_case(backend)
    arguments = operator_arguments(case)
    arguments[field] = getattr(case, field).new_empty(shape)
    with pytest.raises(RuntimeError, match=r"\w+: expected \d+ tokens, got \d+"):
        _operators.library().ipo_loss(**arguments)


@pytest.mark.parametrize("field", [*FLOAT_FIELDS, "loss_mask"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.complex64])
def test_the_operator_checks_dtypes(backend: Backend, field: str, dtype: torch.dtype) -> None:
    case = good_case(backend)
    arguments = operator_arguments(case)
    arguments[field] = getattr(case, field).to(dtype)
    with pytest.raises(RuntimeError, match=f"{field}: (expected|unsupported)"):
        _operators.library().ipo_loss(**arguments)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("cu_seqlens", cu(0, TOKENS, dtype=torch.int64)),
        ("cu_seqlens", cu([0, TOKENS])),
        ("cu_seqlens", cu()),
        ("cu_seqlens", lambda case: cu(TOKENS)(case)[0]),
        ("normalizer", cu(1, 2)),
        ("normalizer", cu()),
        ("normalizer", cu(1, dtype=torch.int8)),
        ("normalizer", cu(1, dtype=torch.complex64)),
    ],
)
def test_the_operator_checks_the_rest(backend: Backend, field: str, change: Any) -> None:
    case = good_case(backend)
    arguments = {**operator_arguments(case), field: change(case)}
    with pytest.raises(RuntimeError, match=f"{field}: (expected|unsupported)"):
        _operators.library().ipo_loss(**arguments)


@pytest.mark.parametrize(
    ("field", "shape", "dtype"),
    [
        ("sums", (len(_C.SUM_ROWS), 4), torch.float32),
        ("sums", (len(_C.SUM_ROWS) - 1, 3), torch.float64),
        ("sums", (len(_C.SUM_ROWS) + 1,), torch.float64),
        ("sums", (), torch.float64),
        ("sums", (0,), torch.float64),
        ("extremes", (2, 3), torch.float32),
        ("extremes", (2, 2), torch.float64),
        ("extremes", (0, 3), torch.float64),
    ],
)
def test_the_means_check_their_rows(
    backend: Backend, field: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    rows = {"sums": (len(_C.SUM_ROWS), 3), "extremes": (2, 3)}
    arguments = {
        name: torch.zeros(size, dtype=torch.float64, device=backend.device)
        for name, size in rows.items()
    }
    arguments[field] = torch.zeros(shape, dtype=dtype, device=backend.device)
    with pytest.raises(RuntimeError, match=f"{field}: expected float64"):
        _operators.library().metric_means(**arguments, float64=False)


def test_a_default_config_needs_no_teacher(backend: Backend) -> None:
    case = good_case(backend).with_(teacher_logprobs=None, config=IPOConfig())
    assert case.call(ipo_loss).loss.isfinite()
