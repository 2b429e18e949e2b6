"""Tier 3's benchmark: baselines that are right, a scale that is true; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ipo_ext import reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import baselines_hidden as baselines  # noqa: E402
import memory  # noqa: E402
import report  # noqa: E402
import tier3  # noqa: E402
import timing  # noqa: E402

has_high_water_mark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux sets a high-water mark back"
)


@pytest.fixture
def batch() -> baselines.Batch:
    return baselines.make_batch(200, 24, 301, active=0.75)


def expected_of(batch: baselines.Batch) -> list[torch.Tensor]:
    loss = reference.ipo_loss_from_hidden(
        *batch[:6], config=baselines.CONFIG, dtype=torch.float64
    ).loss
    return [loss.detach().float(), *torch.autograd.grad(loss, batch.leaves)]


@pytest.mark.parametrize("name", ["ipo_ext", "eager", "blockwise"])
def test_a_provider_equals_the_reference(
    batch: baselines.Batch, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "TOKEN_CHUNK", 64)
    monkeypatch.setattr(baselines, "VOCABULARY_CHUNK", 100)
    loss = tier3.provider(name, "cpu")(batch)
    found = [loss.detach(), *torch.autograd.grad(loss, batch.leaves)]
    for ours, theirs in zip(found, expected_of(batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_cross_entropy_passes_its_own_check(batch: baselines.Batch) -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked F.linear_cross_entropy")
    call = tier3.provider("torch_lce", "cpu")
    found = tier3.errors("torch_lce", call, batch, tier3.Expected(batch))
    assert set(found) == {"loss", "grad_hidden", "grad_weight"}


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_wrong_provider_is_refused(batch: baselines.Batch, wrong: str) -> None:
    def call(batch: baselines.Batch) -> torch.Tensor:
        loss = baselines.full_logits(batch)
        return loss * 1.001 if wrong == "loss" else loss + (loss - loss.detach()) * 1e-3

    with pytest.raises(ValueError, match="loss" if wrong == "loss" else "grad_hidden"):
        tier3.errors("eager", call, batch, tier3.Expected(batch))


def test_a_batch_is_as_described(batch: baselines.Batch) -> None:
    assert batch.num_active == 150 == int(batch.loss_mask.sum())
    many = baselines.make_batch(4000, 8, 50)
    metrics = reference.ipo_loss_from_hidden(*many[:6], config=baselines.CONFIG).metrics
    assert 0.005 < metrics["is_masked"] < 0.05
    assert metrics["is_masked_low"] > 0
    assert metrics["is_masked_high"] > 0


@has_high_water_mark
def test_memory_is_what_a_step_holds_at_its_peak() -> None:
    def step() -> torch.Tensor:
        torch.ones(12_000_000)  # 48 MB, gone before
        return torch.ones(16_000_000).sum()  # 64 MB

    for peak in memory.peaks(step, "cpu", repeats=2):
        assert 63e6 < peak < 70e6


def test_targets_are_met_by_medians_and_only_where_measured() -> None:
    def row(name: str, active: int, seconds: float, extra: list[int]) -> dict:
        total = timing.Summary(seconds, seconds * 0.9, seconds * 1.1, seconds * 0.8, 5)._asdict()
        case = {"tokens": tier3.TARGET_TOKENS["cpu"], "active": active, "provider": name}
        return {**case, "seconds": {"total": total}, "extra_bytes": extra}

    eager = row("eager", 100, 2.0, [600, 700])
    assert tier3.targets([eager], "cpu") == []
    rows = [eager, row("ipo_ext", 100, 2.0, [50, 54]), row("ipo_ext", 50, 1.4, [70])]
    full, memory_of_full, half, memory_of_half = tier3.targets(rows, "cpu")
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
    json_path, png_path = tmp_path / "tier3.json", tmp_path / "tier3.png"
    command = [sys.executable, "benchmarks/tier3.py", "--quick", "--threads", "1"]
    command += ["--providers", "ipo_ext,products", "--tokens", "128", "--active", "100,50"]
    command += ["--rounds", "3", "--weighings", "1"]
    command += ["--json", str(json_path), "--picture", str(png_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(json_path.read_text())
    assert content["settings"]["vocabulary"] == tier3.QUICK_SHAPE.vocabulary
    assert len(content["results"]) == 4
    assert content["left_out"] == []
    for row in content["results"]:
        assert row["seconds"]["total"]["count"] == 3
        assert len(row["extra_bytes"]) == 1
    assert png_path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("library", tier3.ON_GPU)
def test_a_library_that_is_missing_is_recorded(library: str, batch: baselines.Batch) -> None:
    arguments = tier3.parse(["--providers", library, "--quick"])
    runner = tier3.Runner(arguments, tier3.QUICK_SHAPE, report.Terminal())
    case = tier3.Case(200, 75)
    assert runner._prepared(library, case, batch, tier3.Expected(batch)) is None
    assert not runner.wrong
    (left,) = runner.left_out
    assert left["reason"].startswith("unavailable")


@pytest.mark.parametrize("argv", [["--providers", "ipo_ext,apex"], ["--quick", "--device", "cuda"]])
def test_bad_options_are_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tier3.parse(argv)
    assert argv[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_no_gpu_figure(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert tier3.main(["--device", "cuda"]) == 2
    finally:
        torch.set_num_threads(threads)
    assert "no GPU" in capsys.readouterr().out
