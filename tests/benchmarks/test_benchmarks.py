"""The benchmarks compare equal work, count right, write what they say; no time is asserted."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import command, correctness, cuda, timing, words
from benchmarks.harness.step import Work, by_autograd, loss_by_autograd
from benchmarks.harness.summary import Ratio, Summary, ratio, summarise
from benchmarks.logits import kernel
from benchmarks.logits import providers as logits_providers
from benchmarks.logits.batch import make_batch as make_logits
from benchmarks.logits.benchmark import FromLogits
from benchmarks.logprobs import baselines, overhead, providers
from benchmarks.logprobs.batch import Batch, make_batch
from benchmarks.logprobs.benchmark import FromLogprobs
from benchmarks.logprobs.cases import TARGET_CASE
from benchmarks.logprobs.report import targets
from ipo_ext import reference
from tests.support.cases import UPSTREAM_METRICS

ROOT = Path(__file__).resolve().parents[2]


# ---- Equal work ----


def expected_of(batch: Batch) -> reference.IPOOutput:
    return reference.ipo_loss(
        *batch[:4],
        teacher_logprobs=batch.teacher_logprobs,
        cu_seqlens=batch.cu_seqlens,
        normalizer=batch.loss_scale,
        config=batch.config,
        dtype=torch.float64,
    )


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize(
    "call", [baselines.upstream_loop, baselines.packed, baselines.packed_with_metrics]
)
def test_a_baseline_equals_the_reference(call: baselines.Call, teacher: bool) -> None:
    batch = make_batch(3000, 7, teacher=teacher)
    expected = expected_of(batch)
    loss, metrics = call(batch)
    (gradient,) = torch.autograd.grad(loss, batch.trainer_logprobs)
    (expected_gradient,) = torch.autograd.grad(expected.loss, batch.trainer_logprobs)
    torch.testing.assert_close(loss, expected.loss.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-9)
    if metrics is not None:
        assert set(metrics) == UPSTREAM_METRICS - (set() if teacher else {"teacher_kl"})
        for name, value in metrics.items():
            wanted = expected.metrics[name].float()
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("tokens", "sequences"), [(1024, 1), (5000, 9), (65_536, 64)])
def test_a_batch_is_as_described(tokens: int, sequences: int) -> None:
    batch = make_batch(tokens, sequences)
    assert sum(batch.lengths) == tokens
    assert len(batch.lengths) == sequences
    assert batch.cu_seqlens.tolist() == [0, *torch.tensor(batch.lengths).cumsum(0).tolist()]
    assert batch.loss_scale == batch.loss_mask.sum()
    log_ratio = (batch.trainer_logprobs - batch.inference_logprobs).detach()
    low, high = batch.config.log_bounds(torch.float32)
    active = log_ratio[batch.loss_mask]
    assert 0.005 < (active < low).float().mean() < 0.03
    assert 0.005 < (active > high).float().mean() < 0.03
    for bound in (low, high):
        assert (log_ratio - bound).abs().min() > 5e-4


@pytest.mark.parametrize("name", ["ipo_ext", "upstream_loop", "packed_eager"])
def test_a_provider_passes_the_check_before_timing(name: str) -> None:
    batch = make_batch(2048, 3)
    provider = providers.PROVIDERS[name]
    found = correctness.errors(provider.make()(batch), provider.expected(batch))
    assert {"loss", "gradient"} <= set(found)
    assert ("metrics" in found) == (name != "packed_eager")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda loss, metrics: (loss * 1.001, metrics), "loss"),
        (lambda loss, metrics: (loss + (loss - loss.detach()) * 1e-3, metrics), "gradient"),
        (lambda loss, metrics: (loss, {**metrics, "is_masked": metrics["is_masked"] + 1}), "metr"),
    ],
)
def test_a_wrong_provider_is_refused(wrong, complaint) -> None:
    def call(batch: Batch):
        return wrong(*baselines.upstream_loop(batch))

    batch = make_batch(2048, 3)
    with pytest.raises(ValueError, match=complaint):
        correctness.errors(by_autograd(call)(batch), providers.expected(batch))


@pytest.mark.parametrize("scale", [1.0, 1.01])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_gradient_from_logits_is_refused(dtype: str, scale: float) -> None:
    batch = make_logits(3, 50, dtype, "cpu")
    expected = logits_providers.of_the_loss(batch)
    forward, backward, _ = loss_by_autograd(logits_providers.ours)(batch)
    scaled = Work(forward, lambda *arguments: (backward(*arguments)[0] * scale,))
    if scale == 1:
        assert correctness.errors(scaled, expected)["gradient"] > 0
    else:
        with pytest.raises(ValueError, match="gradient: relative error"):
            correctness.errors(scaled, expected)


def test_expected_gradients_are_made_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_logits(7, 11, "fp32", "cpu")
    at_once = logits_providers.of_the_loss(batch)
    monkeypatch.setattr(logits_providers, "SLAB", 2 * 11)
    in_slabs = logits_providers.of_the_loss(batch)
    assert in_slabs.loss == pytest.approx(at_once.loss)
    assert torch.equal(in_slabs.gradients["gradient"], at_once.gradients["gradient"])
    plain = logits_providers.plain(batch)
    assert plain.item() == pytest.approx(at_once.loss, rel=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernel_alone_makes_the_gradient_of_the_loss(dtype: str) -> None:
    gradient = kernel.calls(kernel.Case(6, 50, dtype, dtype, 100), "cpu")["with_gradient"]()
    batch = make_logits(6, 50, dtype, "cpu")
    (expected,) = torch.autograd.grad(logits_providers.ours(batch), batch.leaves)
    assert torch.equal(gradient, expected)


def test_every_layer_of_a_call_computes_the_same_loss() -> None:
    results = {name: call() for name, call in overhead.subjects("cpu").items()}
    loss = results["ipo_loss"].loss
    for name in ("bare operator", "bare operator, with gradient", "ipo_loss, with gradient"):
        assert torch.equal(results[name][0], loss), name
    assert torch.equal(
        results["bare operator, forward + backward"][0], results["ipo_loss, forward + backward"][0]
    )


# ---- Counting ----


def test_summaries_of_known_numbers() -> None:
    summary = summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert summary == Summary(3.0, 2.0, 4.0, 1.0, 5)
    assert summarise([7.0]) == Summary(7.0, 7.0, 7.0, 7.0, 1)


def test_a_ratio_is_of_medians_and_its_range_of_opposite_quartiles() -> None:
    theirs = Summary(median=10, lower=8, upper=12, minimum=7, count=9)
    ours = Summary(median=2, lower=1, upper=4, minimum=1, count=9)
    assert ratio(theirs, ours) == Ratio(5, 2, 12)


class _CountingClock:
    """Time advances by what a step says it takes."""

    name = "counting"

    def time(self, step: timing.Step) -> timing.Durations:
        return (step(lambda: None),)


def test_subjects_take_turns_and_a_slow_one_sits_out_rounds() -> None:
    order: list[str] = []

    def subject(name: str, seconds: float) -> list[timing.Step]:
        def step(mark: timing.Mark) -> float:
            order.append(name)
            return seconds

        return [step, step]

    plan = timing.Plan(seconds=2.0, warmup=1, least=5, most=100, settle=0)
    subjects = {"fast": subject("fast", 0.02), "slow": subject("slow", 0.1)}
    timings = timing.interleave(subjects, _CountingClock(), plan)
    assert {name: len(values) for name, values in timings.items()} == {"fast": 50, "slow": 10}
    measured = order[-60:]
    slow = [index for index, name in enumerate(measured) if name == "slow"]
    assert all(4 <= b - a <= 8 for a, b in itertools.pairwise(slow))


def test_a_step_is_timed_phase_by_phase() -> None:
    def step(mark: timing.Mark) -> None:
        mark()
        sum(range(20_000))
        mark()

    first, second = timing.WallClock().time(step)
    assert 0 <= first < second


def test_sets_are_rotated_until_they_exceed_the_cache() -> None:
    assert cuda.sets_beyond_cache(17 * 2**17, 60 * 2**20) == 57
    assert cuda.sets_beyond_cache(17 * 2**24, 60 * 2**20) == 1
    assert cuda.sets_beyond_cache(17 * 2**10, 60 * 2**20) == 64


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5e-7, "250 ns"),
        (9.996e-7, "1.00 us"),
        (2.356e-4, "236 us"),
        (0.014, "14.0 ms"),
        (3, "3.00 s"),
    ],
)
def test_durations_have_three_digits(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def test_labels_are_moved_apart_in_order() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.harness import drawing

    moved = drawing.spread([0.0, 0.01, 0.02, 5.0], gap=1.0)
    assert moved == sorted(moved)
    assert all(b - a > 0.99 for a, b in itertools.pairwise(moved))


def test_targets_are_met_by_medians_and_only_where_measured() -> None:
    def row(name: str, median: float) -> dict:
        total = Summary(median, median * 0.9, median * 1.1, median * 0.8, 9)._asdict()
        case = TARGET_CASE._asdict()
        return {**case, "provider": name, "grad_out": 1.0, "clock": "wall"} | {
            "seconds": {"total": total}
        }

    assert targets([row("ipo_ext", 1.0)]) == []
    rows = [row("ipo_ext", 1.0), row("upstream_loop", 60.0), row("packed_eager", 3.0)]
    (loop,) = targets(rows)
    assert loop["met"]
    assert loop["value"] == pytest.approx(60)
    assert loop["low"] == pytest.approx(60 * 0.9 / 1.1)
    _, fastest = targets([*rows, row("packed_compiled", 1.5)])
    assert not fastest["met"]
    assert fastest["value"] == pytest.approx(1.5)


# ---- What is written ----


def test_a_quick_run_writes_json_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    json_path, png_path = tmp_path / "logprobs.json", tmp_path / "logprobs.png"
    arguments = [sys.executable, "-m", "benchmarks.logprobs", "--quick", "--threads", "1"]
    arguments += ["--providers", "ipo_ext,upstream_loop,packed_eager"]
    arguments += ["--json", str(json_path), "--picture", str(png_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "16,384" in done.stdout

    content = json.loads(json_path.read_text())
    assert content["machine"]["threads"] == 1
    assert content["versions"]["torch"] == torch.__version__
    assert re.match(r"[0-9a-f]{40}(-dirty)?$|unknown$", content["commit"])
    assert "--quick" in content["command"]
    names = {row["provider"] for row in content["results"]}
    assert names == {"ipo_ext", "upstream_loop", "packed_eager", "copy"}
    for row in content["results"]:
        total = row["seconds"]["total"]
        assert 0 < total["minimum"] <= total["lower"] <= total["median"] <= total["upper"]
        assert total["count"] >= 5
        if row["provider"] != "copy":
            assert set(row["seconds"]) == {"forward", "backward", "read", "total"}
            assert row["relative_errors"]["gradient"] < 1e-5
    assert png_path.read_bytes().startswith(b"\x89PNG")
    assert png_path.stat().st_size > 20_000


def test_a_quick_run_from_logits_writes_json_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    json_path, png_path = tmp_path / "logits.json", tmp_path / "logits.png"
    arguments = [sys.executable, "-m", "benchmarks.logits", "--quick", "--threads", "1"]
    arguments += ["--providers", "ipo_ext,eager,quack"]
    arguments += ["--json", str(json_path), "--picture", str(png_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    content = json.loads(json_path.read_text())
    (missing,) = content["left_out"]
    assert missing["provider"] == "quack"
    assert missing["reason"].startswith("unavailable")
    assert {row["provider"] for row in content["results"]} == {"ipo_ext", "eager", "copy"}
    assert len(content["results"]) == 4 * 3 * len(FromLogits.grad_outs)
    for row in content["results"]:
        total = row["seconds"]["total"]
        assert 0 < total["minimum"] <= total["lower"] <= total["median"] <= total["upper"]
        logits = row["rows"] * row["columns"] * {"fp32": 4, "bf16": 2}[row["dtype"]]
        least = {"ipo_ext": 1, "eager": 3, "copy": 1}[row["provider"]]
        assert least * logits <= row["peak_bytes"] < (least + 4) * logits
        if row["provider"] != "copy":
            assert set(row["seconds"]) == {"forward", "backward", "total"}
            assert row["relative_errors"]["loss"] < 1e-5
    assert png_path.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_provider_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(FromLogprobs, ["--providers", "ipo_ext,apex"])
    assert "apex" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("name", ["logprobs", "logits", "logprobs.overhead", "logits.kernel"])
def test_without_a_gpu_no_gpu_figure(name: str) -> None:
    arguments = [sys.executable, "-m", f"benchmarks.{name}", "--device", "cuda"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no GPU" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_gpu_check_passes_nothing(tmp_path: Path) -> None:
    arguments = ["bash", "scripts/gpu_check.sh", str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {stage["name"]: stage["state"] for stage in summary["stages"]}
    assert {"build", "tests", "logprobs", "logits", "hidden", "memcheck", "racecheck"} <= set(
        states
    )
    assert set(states.values()) == {"unavailable"}
    assert len(list(tmp_path.iterdir())) <= 8
