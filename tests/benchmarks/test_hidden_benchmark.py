"""The benchmark from hidden states: right baselines, a true scale; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import command, correctness, memory
from benchmarks.harness.runner import Runner
from benchmarks.harness.step import loss_by_autograd
from benchmarks.harness.summary import Summary
from benchmarks.harness.terminal import Terminal
from benchmarks.hidden import baselines, providers
from benchmarks.hidden.batch import CONFIG, Batch, make_batch
from benchmarks.hidden.benchmark import FromHidden
from benchmarks.hidden.cases import QUICK_HEAD, TARGET_TOKENS, Case
from benchmarks.hidden.providers import PROVIDERS
from benchmarks.hidden.report import targets
from ipo_ext import reference

ROOT = Path(__file__).resolve().parents[2]
has_high_water_mark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux sets a high-water mark back"
)


@pytest.fixture
def batch() -> Batch:
    return make_batch(200, 24, 301, active=0.75)


def expected_of(batch: Batch) -> list[torch.Tensor]:
    loss = reference.ipo_loss_from_hidden(*batch[:6], config=CONFIG, dtype=torch.float64).loss
    return [loss.detach().float(), *torch.autograd.grad(loss, batch.leaves)]


@pytest.mark.parametrize("name", ["ipo_ext", "eager", "blockwise"])
def test_a_provider_equals_the_reference(
    batch: Batch, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "TOKEN_CHUNK", 64)
    monkeypatch.setattr(baselines, "VOCABULARY_CHUNK", 100)
    forward, backward, _ = PROVIDERS[name].make()(batch)
    outcome = forward()
    found = [outcome[0].detach(), *backward(outcome, None)]
    for ours, theirs in zip(found, expected_of(batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_cross_entropy_passes_its_own_check(batch: Batch) -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked F.linear_cross_entropy")
    provider = PROVIDERS["torch_lce"]
    found = correctness.errors(provider.make()(batch), provider.expected(batch))
    assert set(found) == {"loss", "grad_hidden", "grad_weight"}


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_wrong_provider_is_refused(batch: Batch, wrong: str) -> None:
    def call(batch: Batch) -> torch.Tensor:
        loss = baselines.full_logits(batch)
        return loss * 1.001 if wrong == "loss" else loss + (loss - loss.detach()) * 1e-3

    with pytest.raises(ValueError, match="loss" if wrong == "loss" else "grad_hidden"):
        correctness.errors(loss_by_autograd(call)(batch), providers.of_the_loss(batch))


def test_a_batch_is_as_described(batch: Batch) -> None:
    assert batch.num_active == 150 == int(batch.loss_mask.sum())
    many = make_batch(4000, 8, 50)
    metrics = reference.ipo_loss_from_hidden(*many[:6], config=CONFIG).metrics
    assert 0.005 < metrics["is_masked"] < 0.05
    assert metrics["is_masked_low"] > 0
    assert metrics["is_masked_high"] > 0


@has_high_water_mark
def test_memory_is_what_a_step_holds_at_its_peak() -> None:
    def step() -> torch.Tensor:
        torch.ones(12_000_000)  # 48 MB, gone before
        return torch.ones(16_000_000).sum()  # 64 MB

    for peak in memory.peaks_of_process(step, "cpu", repeats=2):
        assert 63e6 < peak < 70e6


def test_targets_are_met_by_medians_and_only_where_measured() -> None:
    def row(name: str, active: int, seconds: float, extra: list[int]) -> dict:
        total = Summary(seconds, seconds * 0.9, seconds * 1.1, seconds * 0.8, 5)._asdict()
        case = Case(TARGET_TOKENS["cpu"], active)._asdict()
        labels = {"provider": name, "grad_out": 1.0, "clock": "wall"}
        return {**case, **labels, "seconds": {"total": total}, "extra_bytes": extra}

    labels = {"eager": "eager"}
    eager = row("eager", 100, 2.0, [600, 700])
    assert targets([eager], "cpu", labels) == []
    rows = [eager, row("ipo_ext", 100, 2.0, [50, 54]), row("ipo_ext", 50, 1.4, [70])]
    full, memory_of_full, half, memory_of_half = targets(rows, "cpu", labels)
    assert full["met"]
    assert full["value"] == pytest.approx(1.0)
    assert full["low"] == pytest.approx(0.9 / 1.1)
    assert memory_of_full["met"]
    assert memory_of_full["value"] == pytest.approx(52 / 650)
    assert memory_of_full["high"] == pytest.approx(54 / 600)
    assert not half["met"]
    assert not memory_of_half["met"]


@has_high_water_mark
def test_a_quick_run_writes_json_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    json_path, png_path = tmp_path / "hidden.json", tmp_path / "hidden.png"
    arguments = [sys.executable, "-m", "benchmarks.hidden", "--quick", "--threads", "1"]
    arguments += ["--providers", "ipo_ext,products", "--tokens", "128", "--active", "100,50"]
    arguments += ["--rounds", "3", "--weighings", "1"]
    arguments += ["--json", str(json_path), "--picture", str(png_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(json_path.read_text())
    assert content["settings"]["vocabulary"] == QUICK_HEAD.vocabulary
    assert len(content["results"]) == 4
    assert content["left_out"] == []
    for row in content["results"]:
        assert row["seconds"]["total"]["count"] == 3
        assert len(row["extra_bytes"]) == 1
    assert png_path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("library", ["liger", "quack", "cce"])
def test_a_library_that_is_missing_is_recorded(library: str) -> None:
    arguments = command.parse(FromHidden, ["--providers", library, "--quick"])
    runner = Runner(FromHidden(arguments), Terminal())
    runner.run([Case(200, 100)])
    assert not runner.wrong
    assert runner.rows == []
    (left,) = runner.left_out
    assert left["reason"].startswith("unavailable")


@pytest.mark.parametrize("argv", [["--providers", "ipo_ext,apex"], ["--quick", "--device", "cuda"]])
def test_bad_options_are_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(FromHidden, argv)
    assert argv[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_no_gpu_figure(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert command.main(FromHidden, ["--device", "cuda"]) == 2
    finally:
        torch.set_num_threads(threads)
    assert "no GPU" in capsys.readouterr().out
