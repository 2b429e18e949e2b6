"""The command as a user runs it: what it prints, what it refuses in a sentence, what it holds."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from ipo_ext.mismatch import main, progress
from ipo_ext.mismatch.rollouts import rollout_of_completion
from ipo_ext.mismatch.sample import Sample
from tests.mismatch import planted
from tests.mismatch.conftest import Run
from tests.mismatch.planted import Sampled, written


@pytest.fixture
def rollouts(sampled: Sampled, tmp_path: Path) -> Path:
    return written(tmp_path / "rollouts", sampled.rows(sampled.logprobs()))


def test_a_report_says_what_was_read_compared_and_found(
    run: Run, rollouts: Path, directory: Path
) -> None:
    output = run(rollouts, "--model", directory)
    assert output.status == 0
    first, _, setting, *_ = output.text.splitlines()
    assert first == f"{rollouts}: ipo_ext's own format (JSON), 40 records, 40 rollouts"
    assert f"{directory} in float32 on cpu" in setting
    for heading in (
        "WHAT IT LOOKS LIKE",
        "ALL TOKENS",
        "WHAT A MASK WOULD DROP",
        "BY POSITION IN THE ANSWER",
        "BY THE ENGINE'S LOG-PROBABILITY",
        "THE FARTHEST TOKENS",
    ):
        assert heading in output.text
    assert "  tokens     960                 of 40 rollouts" in output.text


def test_versions_and_environments_have_tables_where_the_file_knows_them(
    run: Run, sampled: Sampled, directory: Path, tmp_path: Path
) -> None:
    rows = sampled.rows(sampled.logprobs())
    for number, row in enumerate(rows):
        row["version"], row["environment"] = str(number // 20), f"env {number % 2}"
    output = run(written(tmp_path / "f", rows), "--model", directory)
    assert "BY VERSION OF THE WEIGHTS" in output.text
    assert "BY ENVIRONMENT" in output.text


def test_several_files_a_band_and_a_limit(run: Run, rollouts: Path, directory: Path) -> None:
    output = run(rollouts, rollouts, "--model", directory, "--band", "0.9,1.1")
    assert "  tokens     1,920               of 80 rollouts" in output.text
    assert "ratio in [0.9, 1.1]" in output.text
    output = run(rollouts, rollouts, "--model", directory, "--limit", "120")
    assert "  tokens     120                 of 5 rollouts" in output.text


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--band", "5"], "expected LOW,HIGH, for instance 0.1,10, got 5"),
        (["--band", "5,2"], "dppo_mask_high: expected a number >= dppo_mask_low"),
        (["--temperature", "0"], "expected a number above 0, got 0"),
        (["--limit", "0"], "expected at least 1, got 0"),
        (["--limit", "many"], "invalid"),
    ],
)
def test_arguments_that_make_no_sense(
    rollouts: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    with pytest.raises(SystemExit):
        main([str(rollouts), *arguments])
    assert why in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Bad input


def test_a_file_of_engine_values_alone_asks_for_a_model(run: Run, rollouts: Path) -> None:
    output = run(rollouts)
    assert (output.status, output.text) == (1, "")
    assert output.errors.startswith(
        f"error: {rollouts}:1: has the engine's log-probabilities alone; the trainer's are "
        "recomputed with --model DIR, a directory that transformers reads\n"
    )


def test_a_record_of_engine_values_alone_is_left_out_and_named(
    run: Run, sampled: Sampled, tmp_path: Path
) -> None:
    logprobs = sampled.logprobs()
    rows = sampled.rows(logprobs)
    for row, values in zip(rows, logprobs.tolist(), strict=True):
        row["trainer_logprobs"] = values
    del rows[3]["trainer_logprobs"]
    path = written(tmp_path / "f", rows)
    output = run(path)
    assert output.status == 0
    assert "of 39 rollouts" in output.text
    assert f"left out: {path}:4: has the engine's log-probabilities alone" in output.text


@pytest.mark.parametrize(
    ("changed", "shape"), [({"vocab_size": 50}, "[50, 32]"), ({"hidden_size": 16}, "[96, 16]")]
)
def test_previous_weights_of_another_shape_are_refused(
    run: Run,
    rollouts: Path,
    model: planted.LlamaForCausalLM,
    directory: Path,
    tmp_path: Path,
    changed: dict[str, int],
    shape: str,
) -> None:
    config = type(model.config)(**{**model.config.to_dict(), **changed, "head_dim": 8})
    previous = tmp_path / "previous"
    planted.LlamaForCausalLM(config).save_pretrained(previous)
    output = run(rollouts, "--model", directory, "--previous", previous)
    assert (output.status, output.text) == (1, "")
    assert (
        f"error: --previous {previous}: expected a head of the shape of {directory}'s, [96, 32], "
        f"got {shape}; give earlier weights of the same model\n" in output.errors
    )


def test_previous_weights_need_a_model(run: Run, rollouts: Path, directory: Path) -> None:
    output = run(rollouts, "--previous", directory)
    assert (output.status, output.text) == (1, "")
    assert output.errors.endswith("error: --previous: expected --model DIR beside it, got none\n")


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_what_cannot_be_written_is_refused_before_anything_is_read(
    run: Run, tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "out.png", tmp_path / "folder.png"):
        output = run(tmp_path / "absent", option, path)
        assert (output.status, output.text) == (1, "")
        assert output.errors.startswith(f"error: {option} {path}: cannot be written: ")
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_a_full_disk_is_named_and_the_report_is_printed(
    run: Run, rollouts: Path, directory: Path, tmp_path: Path, option: str
) -> None:
    full = tmp_path / "full.png"
    full.symlink_to("/dev/full")
    output = run(rollouts, "--model", directory, option, full)
    assert output.status == 1
    assert "ALL TOKENS" in output.text
    message = f"error: {option} {full}: cannot be written: No space left on device"
    assert message in output.errors.splitlines()


def test_a_path_that_can_be_written_is_not_made_or_emptied_before_the_report(
    run: Run, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.html"
    kept.write_text("kept")
    run(tmp_path / "absent", "--html", kept, "--png", tmp_path / "new.png")
    assert kept.read_text() == "kept"
    assert not (tmp_path / "new.png").exists()


def test_a_picture_of_another_kind_is_refused(run: Run, tmp_path: Path) -> None:
    output = run(tmp_path / "absent", "--png", tmp_path / "x.out")
    assert (output.status, output.text) == (1, "")
    assert output.errors == (
        f"error: --png {tmp_path / 'x.out'}: expected a name that ends with .png\n"
    )


@pytest.mark.parametrize("device", ["nope", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(
    run: Run, rollouts: Path, directory: Path, device: str
) -> None:
    output = run(rollouts, "--model", directory, "--device", device)
    assert (output.status, output.text) == (1, "")
    assert (
        f"error: --device {device}: expected a device that is there, for instance cpu"
        in output.errors
    )


def test_a_picture_where_no_log_ratio_is_finite(run: Run, sampled: Sampled, tmp_path: Path) -> None:
    infinite = torch.full_like(sampled.logprobs(), -math.inf)
    rows = sampled.rows(infinite, trainer_logprobs=infinite[0].tolist())
    output = run(
        written(tmp_path / "f", rows), "--html", tmp_path / "f.html", "--png", tmp_path / "f.png"
    )
    assert output.status == 0
    assert "|x| of 99% nan at most" in output.text
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "f.html").read_text()


def test_ids_beyond_the_models_vocabulary(
    run: Run, sampled: Sampled, directory: Path, tmp_path: Path
) -> None:
    rows = sampled.rows(sampled.logprobs())
    rows[1]["token_ids"][2] = planted.VOCABULARY
    path = written(tmp_path / "f", rows)
    output = run(path, "--model", directory)
    assert output.status == 0
    assert (
        f"left out: {path}:2: token ids: expected ids below 96, the size of the model's "
        "vocabulary, got 96 at position 7" in output.text
    )
    assert "of 39 rollouts" in output.text


def test_a_refused_file_is_named_and_the_others_are_read(
    run: Run, rollouts: Path, directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    output = run(tmp_path / "empty", rollouts, "--model", directory)
    assert output.status == 1
    assert f"error: {tmp_path / 'empty'}: is empty" in output.errors
    assert "of 40 rollouts" in output.text


def test_nothing_that_can_be_compared_is_no_report(
    run: Run, directory: Path, sampled: Sampled, tmp_path: Path
) -> None:
    rows = sampled.rows(sampled.logprobs())
    for row in rows:
        row["logprobs"][0] = 3.0
    path = written(tmp_path / "f", rows)
    output = run(path, "--model", directory)
    assert (output.status, output.text) == (1, "")
    assert f"error: {path}:1: logprobs[0]: expected a natural logarithm" in output.errors
    assert "no token of these files could be compared" in output.errors


def test_problems_are_counted_and_the_first_are_shown(
    run: Run, sampled: Sampled, directory: Path, tmp_path: Path
) -> None:
    rows = sampled.rows(sampled.logprobs())
    for row in rows[:9]:
        row["logprobs"] = row["logprobs"][:-1]
    output = run(written(tmp_path / "f", rows), "--model", directory)
    assert output.text.count("left out: ") == 5
    assert "  and 4 more" in output.text


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (None, "expected a directory of a model, found none"),
        ({}, "expected config.json or one .gguf file in it, found neither"),
        ({"config.json": "{}"}, "no model could be loaded from it: "),
        ({"config.json": "not JSON"}, "no model could be loaded from it: "),
        ({"config.json": '{"model_type": "llama"}'}, "no model could be loaded from it: "),
    ],
)
def test_a_directory_without_a_model(
    run: Run, rollouts: Path, tmp_path: Path, files: dict[str, str] | None, why: str
) -> None:
    path = tmp_path / "model"
    if files is not None:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_text(content)
    output = run(rollouts, "--model", path)
    assert output.status == 1
    assert f"error: {path}: {why}" in output.errors


def test_a_model_without_a_tokenizer_is_used_and_tokens_are_shown_by_their_ids(
    run: Run, rollouts: Path, directory: Path
) -> None:
    output = run(rollouts, "--model", directory)
    assert f"{directory}: no tokenizer in it; tokens are shown by their ids" in output.errors
    shown = output.text.partition("THE FARTHEST TOKENS")[2]
    assert "[<" in shown


def test_a_tokenizer_shows_the_farthest_tokens_as_text(
    run: Run, rollouts: Path, model: planted.LlamaForCausalLM, tmp_path: Path
) -> None:
    words = {f"w{number}": number for number in range(planted.VOCABULARY)}
    words_alone = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    path = tmp_path / "with a tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=words_alone).save_pretrained(path)
    model.save_pretrained(path)
    output = run(rollouts, "--model", path)
    shown = output.text.partition("THE FARTHEST TOKENS")[2]
    rows = [json.loads(line) for line in rollouts.read_text().splitlines()]
    where, place = re.findall(r"token (\d+), .*:(\d+)", shown)[0][::-1]
    token = rows[int(where) - 1]["token_ids"][int(place)]
    assert f"[w{token}]" in shown.splitlines()[2]


@pytest.mark.parametrize("package", ["transformers", "pyarrow"])
def test_a_package_that_is_missing_is_named(
    run: Run,
    rollouts: Path,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.parquet", raising=False)
    if package == "pyarrow":
        rollouts = tmp_path / "table"
        rollouts.write_bytes(b"PAR1")
    output = run(rollouts, "--model", directory)
    assert output.status == 1
    assert f"{package}: " in output.errors
    assert 'pip install "ipo_ext[mismatch]"' in output.errors


# ---------------------------------------------------------------------------------------------
# What happens on the way


def test_every_rollout_is_in_a_sample_with_the_same_probability() -> None:
    rollouts = [rollout_of_completion(f"{place}", [1], [2], [-1.0]) for place in range(20)]
    counts = torch.zeros(20)
    for seed in range(2000):
        sample = Sample(size=5, seed=seed)
        for rollout in rollouts:
            sample.offer(rollout)
        assert len(sample.rollouts) == 5
        counts[[int(each.where) for each in sample.rollouts]] += 1
    expected = 2000 * 5 / 20
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected * 0.75)


def test_progress_is_said_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    stream = io.StringIO()
    rollouts = [rollout_of_completion("f", [1], [2, 3], [-1.0, -1.0])] * 6
    assert list(progress.Progress(stream).watch(rollouts)) == rollouts
    said = stream.getvalue().splitlines()
    assert said[0] == "2 rollouts, 6 tokens, 0 tokens/s"
    assert len(said) == 3


# ---------------------------------------------------------------------------------------------
# Memory

READ = """
import resource, sys
from ipo_ext.mismatch import main
status = main(sys.argv[1:])
print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def peak_of(path: Path) -> int:
    """In KiB, of a process that reports on a file that has both log-probabilities."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], check=True, capture_output=True, text=True
    )
    status, peak = done.stderr.split()[-2:]
    assert status == "0", done.stderr
    return int(peak)


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    tokens = 4096
    logprobs = [-(number % 97) / 10 for number in range(tokens)]
    row: dict[str, Any] = {
        "prompt_token_ids": [1],
        "token_ids": list(range(tokens)),
        "logprobs": logprobs,
        "trainer_logprobs": [value - 0.01 * (number % 3) for number, value in enumerate(logprobs)],
    }
    line = json.dumps(row) + "\n"
    assert len(line) > 60_000
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_text(line * 100)  # more than waits to be measured or is kept as a sample
    large.write_text(line * 500)
    grown = (peak_of(large) - peak_of(small)) * 1024
    added = large.stat().st_size - small.stat().st_size
    assert added > 30_000_000
    assert grown < added / 3
