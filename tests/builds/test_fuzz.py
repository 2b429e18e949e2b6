"""The fuzz script: what is right passes, a planted fault is found, minimised and printed whole."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import fuzz
from fuzzing import calls, minimise

pytestmark = pytest.mark.filterwarnings("ignore:inference_logprobs")

SEED = 20


def batch_of(function: str, dtype: torch.dtype) -> int:
    """The first batch of calls of it whose leaves are of ``dtype``."""
    leaf = calls.FUNCTIONS[function].leaves[0]
    for batch in range(500):
        first = fuzz.calls_of_batch(SEED, batch)[0]
        if first.function == function and first.arguments[leaf].dtype == dtype:
            return batch
    raise AssertionError("no such batch")


class Skewed(torch.autograd.Function):
    """The identity, with a gradient that is off by a part in 10,000."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 1.0001


def plant(monkeypatch: pytest.MonkeyPatch, function: str, spoil: Callable[..., Any]) -> None:
    """The function in the script's eyes, called by ``spoil``."""
    true = calls.FUNCTIONS[function]
    planted = true._replace(call=lambda **arguments: spoil(true.call, arguments))
    monkeypatch.setitem(calls.FUNCTIONS, function, planted)


def test_nothing_is_wrong_with_a_fixed_seed() -> None:
    for batch in range(6):
        assert not fuzz.run_batch(SEED, batch, set()).failures


def test_a_seed_makes_the_same_calls_again() -> None:
    for one, other in zip(fuzz.cases_of_batch(3, 4), fuzz.cases_of_batch(3, 4), strict=True):
        assert minimise.script_of(one, "") == minimise.script_of(other, "")


@pytest.mark.parametrize("function", ["ipo_loss", "ipo_loss_from_logits", "linear_token_logprobs"])
def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    leaf = calls.FUNCTIONS[function].leaves[0]

    def spoil(call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        value = arguments[leaf]
        if isinstance(value, torch.Tensor) and value.requires_grad:
            arguments[leaf] = Skewed.apply(value)
        return call(**arguments)

    batch = batch_of(function, torch.float32)
    assert not fuzz.run_batch(SEED, batch, set()).failures
    plant(monkeypatch, function, spoil)
    monkeypatch.setattr(fuzz, "minimised", lambda call: call)
    (first, *_) = fuzz.run_batch(SEED, batch, set()).failures
    assert "grad" in first.script.splitlines()[0]


def test_a_fault_is_minimised_and_printed_as_a_script_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def spoil(call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        output = call(**arguments)
        return output._replace(loss=output.loss * 1.001)

    plant(monkeypatch, "ipo_loss", spoil)
    batch = batch_of("ipo_loss", torch.float32)
    (first, *others) = fuzz.run_batch(SEED, batch, set()).failures
    assert first.script.startswith('"""Fails: loss[0]: got ')
    assert first.script.count("\n") < 30
    assert ".reshape((1,))" in first.script, "one token is enough"
    assert not any(failure.script for failure in others), "one script for each kind of failure"
    path = tmp_path / "failing.py"
    path.write_text(first.script)
    printed = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert printed.stdout.count("mismatch_kl") == 6, "ours, then the reference's"


def test_an_error_that_does_not_come_is_found() -> None:
    batch = batch_of("ipo_loss", torch.float32)
    refused = [call for call in fuzz.cases_of_batch(SEED, batch) if call.fault is not None]
    assert refused
    silent = calls.run(fuzz.calls_of_batch(SEED, batch)[0])
    for call in refused:
        assert fuzz.judge([call], [calls.run(call)]) == [None]
        (verdict,) = fuzz.judge([call], [silent])
        assert verdict == f"{call.fault.name}: no error"


def test_cases_add_up_over_runs_and_a_seed_goes_on(tmp_path: Path) -> None:
    options = argparse.Namespace(state=tmp_path / "state.json", seed=5, backend="cpu")
    failure = fuzz.Failure("ipo_loss", 70, "")
    for run, failures in enumerate(([], [failure])):
        tally = fuzz.Tally(options)
        assert tally.first == run
        tally.add(run, fuzz.Done("ipo_loss", 3, failures))
        tally.save()
        assert tally.failed_here == len(failures)
    table = fuzz.Tally(options).table().splitlines()
    assert table[1].split() == ["ipo_loss", "128", "100.0%", "1"]
    assert table[-2].split() == ["all", "128", "100.0%", "1"]
    assert fuzz.Tally(argparse.Namespace(**{**vars(options), "seed": 6})).first == 0
