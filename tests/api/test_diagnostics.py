"""``python -m ipo_ext info`` and ``verify``: what they say, and what verify notices."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

import ipo_ext
from ipo_ext import _C
from ipo_ext.__main__ import main
from ipo_ext._ops import library
from ipo_ext.config import MaskRule, PolicyForm
from ipo_ext.diagnostics import info, verify
from tests.support.backends import Backend

# ---------------------------------------------------------------------------------------------
# info


@pytest.mark.parametrize(
    ("capability", "architectures", "code"),
    [
        ((9, 0), ("80-real", "90"), "sm_90"),
        ((8, 9), ("80-real", "90"), "sm_80"),
        ((8, 9), ("80-real", "86-real"), "sm_86"),
        ((8, 0), ("86-real",), None),
        ((7, 5), ("80-real", "90"), None),
        ((12, 1), ("100-real", "120"), "sm_120"),
        ((10, 3), ("90", "100-real"), "sm_100"),
        ((11, 0), ("90", "100-real"), "compute_90 (PTX)"),
        ((11, 0), ("90-virtual", "100-virtual"), "compute_100 (PTX)"),
        ((9, 0), ("90a-real",), "sm_90a"),
        ((9, 2), ("90a",), None),
        ((10, 3), ("100f-real",), "sm_100f"),
        ((12, 0), ("100f", "90a"), None),
        ((9, 0), ("native",), None),
        ((9, 0), (), None),
    ],
)
def test_the_code_that_a_gpu_runs(
    capability: tuple[int, int], architectures: tuple[str, ...], code: str | None
) -> None:
    assert info.code_for(capability, architectures) == code


def test_info_prints_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for fact in (_C.VERSION, _C.COMMIT, _C.TORCH_AT_BUILD, torch.__version__, "ipo_ext::ipo_loss "):
        assert fact in text


def test_info_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == ipo_ext.__version__
    expected = {"CPU", "Meta", *(["CUDA"] if _C.CUDA_ARCHITECTURES else [])}
    for name, keys in facts["operators"].items():
        assert expected <= set(keys), name


def test_an_uncovered_gpu_is_told_what_to_do() -> None:
    facts = info.facts()
    facts["gpus"] = [
        {"name": "Old", "capability": [6, 1], "code": None},
        {"name": "New", "capability": [9, 0], "code": "sm_90"},
    ]
    text = "\n".join(info.lines(facts))
    assert "Old, compute capability 6.1: NOT covered; rebuild with CUDAARCHS=61" in text
    assert "New, compute capability 9.0: covered by sm_90" in text


@pytest.mark.parametrize(
    ("compiler", "architectures", "expected"),
    [
        ("12.9", ["80-real", "90"], ["CUDA compiler  nvcc 12.9", "architectures  80-real 90"]),
        ("", [], ["CUDA compiler  none: a build without CUDA", "architectures  none"]),
    ],
)
def test_what_was_built_for_gpus(
    compiler: str, architectures: list[str], expected: list[str]
) -> None:
    facts = {**info.facts(), "cuda_compiler": compiler, "cuda_architectures": architectures}
    lines = [" ".join(line.split()) for line in info.lines(facts)]
    for line in expected:
        assert " ".join(line.split()) in lines


# ---------------------------------------------------------------------------------------------
# verify


def test_every_public_operator_is_verified() -> None:
    functions = {name for name in ipo_ext.__all__ if "loss" in name or "logprobs" in name}
    assert set(verify.OPERATORS) == functions


def test_all_is_well(backend: Backend) -> None:
    # The widest rows, a minute of float64, are test_logits_paths.py's.
    checks = [c for c in verify.checks_on(str(backend.device)) if not c.kind.only_gpus]
    assert [f"{check}: {wrong}" for check in checks if (wrong := check.run())] == []


def test_every_rule_and_every_shape_of_rows_is_verified() -> None:
    assert {kind.config.mask_rule for kind in verify.INPUTS} == set(get_args(MaskRule))
    assert {kind.config.pg_form for kind in verify.INPUTS} == set(get_args(PolicyForm))
    assert any(kind.config.has_rollout_rule for kind in verify.INPUTS)
    assert any(kind.config.sequence_weight for kind in verify.INPUTS)
    assert any(kind.inplace for kind in verify.INPUTS)
    ends = (16_384, 32_768, 65_536, 163_840, 2**18)  # kClusterShapes
    for begin, end in zip((0, *ends), ends, strict=False):
        assert any(begin < kind.columns <= end and kind.only_gpus for kind in verify.INPUTS)


def test_rules_drop_the_last_sequence_that_is_verified() -> None:
    rules = {"rollout rule": "rollout_dropped", "sequence rule": "sequence_dropped"}
    kinds = [kind for kind in verify.INPUTS if kind.name in rules]
    assert len(kinds) == len(rules)
    for kind in kinds:
        logprobs = -torch.rand(kind.rows)
        constants = verify.constants_of_loss(kind, logprobs, torch.Generator().manual_seed(0))
        dropped = ipo_ext.ipo_loss(logprobs, **constants).metrics[rules[kind.name]]
        assert dropped.tolist() == [0, 0, 1]


Break = Callable[[list[torch.Tensor]], None]


def broken(operator: str, damage: Break) -> Any:
    """The operators, one of them with damaged outputs."""
    sound = library.operators()

    def call(*inputs: Any) -> list[torch.Tensor]:
        outputs = [tensor.clone() for tensor in getattr(sound, operator)(*inputs)]
        damage(outputs)
        return outputs

    names = [name.removeprefix("ipo_ext::") for name in info.operators()]
    kept = {name: getattr(sound, name) for name in names}
    return SimpleNamespace(**{**kept, operator: call})


def scaled(index: int, factor: float) -> Break:
    def damage(outputs: list[torch.Tensor]) -> None:
        outputs[index] *= factor

    return damage


def nonzero_for_dropped(outputs: list[torch.Tensor]) -> None:
    outputs[1][outputs[1] == 0] = 1e-30


def nan(outputs: list[torch.Tensor]) -> None:
    outputs[0].fill_(torch.nan)


def other_bits_at_times(outputs: list[torch.Tensor]) -> None:
    outputs[0].view(torch.int32).add_(torch.randint(2, ()).int())


@pytest.mark.parametrize(
    ("operator", "damage", "complaint"),
    [
        ("ipo_loss", scaled(0, 1 + 1e-4), "loss: error"),
        ("ipo_loss", scaled(1, 1 + 1e-4), "gradient by trainer_logprobs: error"),
        ("ipo_loss", nonzero_for_dropped, "trainer_logprobs: not 0 where float64 is exactly 0"),
        ("ipo_loss", nan, "loss: NaN or infinite where float64 is not"),
        ("ipo_loss", other_bits_at_times, "loss: a second call gave other bits"),
        ("ipo_loss_from_logits", scaled(1, 1 + 1e-4), "gradient by logits: error"),
        ("ipo_loss_from_logits", scaled(3, 1 + 1e-4), "entropy: error"),
        ("token_logprobs", scaled(0, 1 + 1e-5), "output 0: error"),
    ],
)
def test_a_broken_operator_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    operator: str,
    damage: Break,
    complaint: str,
) -> None:
    unsound = broken(operator, damage)
    monkeypatch.setattr(library, "operators", lambda: unsound)
    monkeypatch.setattr(verify, "DTYPES", (torch.float32,))
    monkeypatch.setattr(verify, "OPERATORS", {operator: verify.OPERATORS[operator]})
    assert main(["verify"]) == 1
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert [line for line in lines if f" {operator} float32 " in line and complaint in line]
    assert f"verifying {operator} on cpu" in lines
    assert verdict.startswith("FAILED: ")


def test_an_operator_that_raises_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(outputs: list[torch.Tensor]) -> None:
        raise RuntimeError("no kernel image is available")

    unsound = broken("ipo_loss", damage)
    monkeypatch.setattr(library, "operators", lambda: unsound)
    check = verify.Check("cpu", "ipo_loss", torch.float32, verify.INPUTS[0])
    assert check.run() == "RuntimeError: no kernel image is available"


def test_a_gpu_without_operators_for_it_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "_gpus", lambda: 1)
    monkeypatch.setattr(_C, "CUDA_ARCHITECTURES", ())
    assert main(["verify"]) == 1
    assert "this build of ipo_ext has no CUDA operators" in capsys.readouterr().out
