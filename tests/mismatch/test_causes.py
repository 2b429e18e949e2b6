"""Each cause is planted into rollouts of a tiny model, and named; nothing else is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ipo_ext.mismatch import counterfactuals
from ipo_ext.mismatch.counterfactuals import Truncation
from tests.mismatch import planted
from tests.mismatch.conftest import Run
from tests.mismatch.planted import Sampled, rounded, written

LOW_PRECISION = 0.05  # the standard deviation of x that a bfloat16 engine has


@pytest.mark.parametrize("deviation", [0.0, LOW_PRECISION])
def test_a_clean_rollout_is_accused_of_nothing(
    run: Run, directory: Path, sampled: Sampled, tmp_path: Path, deviation: float
) -> None:
    logprobs = sampled.logprobs()
    logprobs = rounded(logprobs, deviation)
    output = run(written(tmp_path / "f", sampled.rows(logprobs)), "--model", directory)
    assert output.status == 0
    assert output.certain == []
    (clean,) = output.clean
    assert clean.startswith("low precision as usual" if deviation else "nothing: float32")


@pytest.mark.parametrize("deviation", [0.0, LOW_PRECISION])
@pytest.mark.parametrize(("moved_by", "sign"), [(1, "+1"), (-1, "-1")])
def test_a_shift_is_named_with_its_direction(
    run: Run,
    sampled: Sampled,
    directory: Path,
    tmp_path: Path,
    moved_by: int,
    sign: str,
    deviation: float,
) -> None:
    logprobs = sampled.logprobs()
    engine = rounded(logprobs, deviation).roll(moved_by, 1)
    output = run(written(tmp_path / "f", sampled.rows(engine)), "--model", directory)
    assert output.certain == [f"a shift by one token ({sign})"]
    assert len(output.clean) == 1


@pytest.mark.parametrize("deviation", [0.0, LOW_PRECISION])
@pytest.mark.parametrize("temperature", [0.7, 0.9, 1.2])
def test_a_temperature_that_the_trainer_ignores(
    run: Run,
    model: planted.LlamaForCausalLM,
    directory: Path,
    tmp_path: Path,
    deviation: float,
    temperature: float,
) -> None:
    def scaled(logits: torch.Tensor) -> torch.Tensor:
        return logits / temperature

    sampled = planted.sample(model, scaled)
    logprobs = sampled.logprobs(scaled)
    logprobs = rounded(logprobs, deviation)
    output = run(written(tmp_path / "f", sampled.rows(logprobs)), "--model", directory)
    (found,) = output.certain
    assert found.startswith("another temperature: the engine's log-probabilities are at ")
    assert float(found.split()[-1]) == pytest.approx(temperature, abs=0.02)
    assert len(output.clean) == 1


def test_a_temperature_that_explains_little_is_not_named(
    run: Run, model: planted.LlamaForCausalLM, directory: Path, tmp_path: Path
) -> None:
    """As that of a sharper policy is, a few steps on: it is no chance, and not the cause."""
    sampled = planted.sample(model)
    logprobs = rounded(sampled.logprobs(lambda logits: logits / 0.9), 0.35)
    output = run(written(tmp_path / "f", sampled.rows(logprobs)), "--model", directory)
    assert output.certain == []


@pytest.mark.parametrize("temperature", [0.7, 1.2])
def test_raw_values_where_the_file_says_a_temperature(
    run: Run, model: planted.LlamaForCausalLM, directory: Path, tmp_path: Path, temperature: float
) -> None:
    sampled = planted.sample(model, lambda logits: logits / temperature)
    rows = sampled.rows(sampled.logprobs(), temperature=temperature)
    output = run(written(tmp_path / "raw", rows), "--model", directory)
    assert output.certain == ["raw log-probabilities of the engine, before its temperature"]
    processed = sampled.logprobs(lambda logits: logits / temperature)
    rows = sampled.rows(processed, temperature=temperature)
    output = run(written(tmp_path / "processed", rows), "--model", directory)
    assert output.certain == []


@pytest.mark.parametrize("deviation", [0.0, LOW_PRECISION])
@pytest.mark.parametrize(
    ("processed", "name"),
    [
        (planted.top_p(0.9), "top_p 0.9"),
        (planted.top_p(0.8), "top_p 0.8"),
        (planted.top_k(20), "top_k 20"),
        (planted.min_p(0.1), "min_p 0.1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_truncated_sampler_is_named(
    run: Run,
    model: planted.LlamaForCausalLM,
    directory: Path,
    tmp_path: Path,
    deviation: float,
    processed: Callable[[torch.Tensor], torch.Tensor],
    name: str,
) -> None:
    sampled = planted.sample(model, processed)
    logprobs = sampled.logprobs(processed)
    logprobs = rounded(logprobs, deviation)
    output = run(written(tmp_path / "f", sampled.rows(logprobs)), "--model", directory)
    (found,) = output.certain
    kind, value = name.split()
    assert f"about {kind}" in found
    assert float(found.split()[-1]) == pytest.approx(float(value), rel=0.03)


@pytest.mark.parametrize(
    ("processed", "truncation"),
    [
        (planted.top_p(0.9), Truncation("top_p", 0.9)),
        (planted.top_p(0.3), Truncation("top_p", 0.3)),
        (planted.top_k(20), Truncation("top_k", 20)),
        (planted.top_k(1), Truncation("top_k", 1)),
        (planted.min_p(0.1), Truncation("min_p", 0.1)),
    ],
    ids=lambda value: str(value) if isinstance(value, Truncation) else "",
)
def test_renormalised_values_are_those_of_the_sampler(
    model: planted.LlamaForCausalLM,
    processed: Callable[[torch.Tensor], torch.Tensor],
    truncation: Truncation,
) -> None:
    sampled = planted.sample(model, processed)
    log_p = sampled.logits.double().log_softmax(-1).flatten(0, 1)
    found = counterfactuals._renormalised(log_p, sampled.answers.flatten(), [truncation])
    expected = sampled.logprobs(processed).double().flatten()
    torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=0)


def test_a_token_far_beyond_what_a_sampler_keeps_could_not_be_sampled() -> None:
    log_p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4, 1)
    truncations = [Truncation("top_p", 0.6), Truncation("top_k", 1), Truncation("min_p", 0.5)]
    found = counterfactuals._renormalised(log_p, torch.arange(4), truncations)
    assert found.isinf().tolist() == [[False] * 3, [False] * 3, [True] * 3, [True] * 3]


def test_zeros_for_missing_values_are_counted_and_hide_no_other_cause(
    run: Run, sampled: Sampled, directory: Path, tmp_path: Path
) -> None:
    logprobs = sampled.logprobs(lambda logits: logits / 0.7)
    logprobs[:10] = 0.0
    output = run(written(tmp_path / "f", sampled.rows(logprobs)), "--model", directory)
    zeros, temperature = output.certain
    assert zeros == "missing log-probabilities, written as 0"
    assert temperature == "another temperature: the engine's log-probabilities are at 0.7"


def test_values_that_were_stored_in_bfloat16(
    run: Run, sampled: Sampled, directory: Path, tmp_path: Path
) -> None:
    rows = sampled.rows(sampled.logprobs().bfloat16().float())
    output = run(written(tmp_path / "f", rows), "--model", directory)
    assert output.certain == ["log-probabilities that were stored in bfloat16"]


@pytest.mark.parametrize("deviation", [0.0, LOW_PRECISION])
@pytest.mark.parametrize(
    ("old", "name"),
    [("", "old weights"), ("lm_head", "an old head over new weights")],
)
def test_old_weights_are_named_with_previous_and_open_without(
    run: Run,
    model: planted.LlamaForCausalLM,
    directory: Path,
    tmp_path: Path,
    old: str,
    name: str,
    deviation: float,
) -> None:
    everything = planted.moved(model, 0.06)
    everything.save_pretrained(tmp_path / "previous")
    engine = everything
    if old:
        engine = planted.moved(model, 0.0)
        engine.lm_head.weight.data.copy_(everything.lm_head.weight)
    sampled = planted.sample(engine)
    logprobs = sampled.logprobs()
    logprobs = rounded(logprobs, deviation)
    rollouts = written(tmp_path / "f", sampled.rows(logprobs))
    without = run(rollouts, "--model", directory)
    assert without.certain == []
    (twins,) = without.findings("one of several that look alike")
    assert " or " in twins
    output = run(rollouts, "--model", directory, "--previous", tmp_path / "previous")
    assert output.certain == [name]
    assert len(output.clean) == 1


def test_previous_weights_that_the_engine_did_not_have(
    run: Run, model: planted.LlamaForCausalLM, sampled: Sampled, directory: Path, tmp_path: Path
) -> None:
    planted.moved(model, 0.06).save_pretrained(tmp_path / "previous")
    logprobs = sampled.logprobs()
    logprobs = rounded(logprobs, 0.15)
    rollouts = written(tmp_path / "f", sampled.rows(logprobs))
    output = run(rollouts, "--model", directory, "--previous", tmp_path / "previous")
    assert output.certain == []
    assert f"the weights of {tmp_path / 'previous'} do not explain it" in output.text


@pytest.mark.parametrize(
    ("deviation", "title"),
    [
        (0.13, "int8 weights, or weights one small step old"),
        (0.25, "an fp8 KV cache"),
        (0.50, "int8 weights and activations, or weights several steps old"),
        (1.20, "weights rounded to 4 bits, or weights of another model"),
    ],
)
def test_what_looks_alike_is_named_with_its_twin(
    run: Run, sampled: Sampled, directory: Path, tmp_path: Path, deviation: float, title: str
) -> None:
    logprobs = sampled.logprobs()
    logprobs = rounded(logprobs, deviation)
    output = run(written(tmp_path / "f", sampled.rows(logprobs)), "--model", directory)
    assert output.certain == []
    (found,) = output.findings("one of several that look alike")
    assert found.startswith(title)


def test_without_a_model_a_shift_is_still_named_and_the_rest_is_open(
    run: Run, sampled: Sampled, tmp_path: Path
) -> None:
    logprobs = sampled.logprobs()
    rows = sampled.rows(logprobs.roll(1, 1))
    for row, trainer in zip(rows, logprobs.tolist(), strict=True):
        row["trainer_logprobs"] = trainer
    output = run(written(tmp_path / "f", rows))
    assert output.certain == ["a shift by one token (+1)"]
    assert len(output.findings("open")) == 1


def test_an_infinite_log_probability_decides_nothing(
    run: Run, sampled: Sampled, directory: Path, tmp_path: Path
) -> None:
    logprobs = sampled.logprobs()
    logprobs[0, 3] = -math.inf
    output = run(written(tmp_path / "f", sampled.rows(logprobs)), "--model", directory)
    assert output.certain == []
    assert "infinite" in output.text


def with_trainer(rows: list[dict[str, Any]], trainer: torch.Tensor) -> list[dict[str, Any]]:
    return [
        {**row, "trainer_logprobs": values}
        for row, values in zip(rows, trainer.tolist(), strict=True)
    ]


BROKEN = "log-probabilities that are infinite, or too far apart to be compared"


@pytest.mark.parametrize("has_model", [False, True])
@pytest.mark.parametrize(
    ("whose", "value", "every", "counted"),
    [
        ("engine", -math.inf, 1, "960 of the engine's values are infinite"),
        ("engine", -math.inf, 3, "320 of the engine's values are infinite"),
        ("engine", -9999.0, 3, "320 tokens have |x| above 20"),
        ("trainer", -math.inf, 1, "960 of the trainer's values are infinite"),
        ("trainer", -9999.0, 3, "320 tokens have |x| above 20"),
    ],
)
def test_infinite_values_and_their_stand_ins_are_counted_and_never_clean(
    run: Run,
    sampled: Sampled,
    directory: Path,
    tmp_path: Path,
    whose: str,
    value: float,
    every: int,
    counted: str,
    has_model: bool,
) -> None:
    values = {"engine": sampled.logprobs(), "trainer": sampled.logprobs()}
    values[whose].view(-1)[::every] = value
    path = written(tmp_path / "f", with_trainer(sampled.rows(values["engine"]), values["trainer"]))
    output = run(path, *(["--model", directory] if has_model else []))
    assert output.status == 0
    assert output.clean == []
    found = output.findings("one of several that look alike")
    assert any(each.startswith(BROKEN) for each in found)
    assert counted in output.text


def test_a_model_explains_no_infinite_value_of_a_truncated_engine(
    run: Run, model: planted.LlamaForCausalLM, directory: Path, tmp_path: Path
) -> None:
    """Infinite values beside infinite values are NaN, which hid every truncation."""
    sampled = planted.sample(model, planted.top_p(0.9))
    logprobs = sampled.logprobs(planted.top_p(0.9))
    logprobs[:, ::3] = -math.inf
    output = run(written(tmp_path / "f", sampled.rows(logprobs)), "--model", directory)
    assert output.certain == ["renormalised by a truncated sampler: about top_p 0.9"]
    assert output.clean == []


def test_a_shift_apart_by_more_than_20_nats_leaves_nothing_broken(
    run: Run, sampled: Sampled, tmp_path: Path
) -> None:
    trainer = sampled.logprobs() * 5
    trainer[:, ::2] = -0.01
    output = run(written(tmp_path / "f", with_trainer(sampled.rows(trainer.roll(1, 1)), trainer)))
    assert output.certain == ["a shift by one token (+1)"]
    assert BROKEN not in output.text
    assert len(output.clean) == 1


def test_engine_values_that_are_all_zero_are_named_as_those_of_a_greedy_sampler(
    run: Run, sampled: Sampled, directory: Path, tmp_path: Path
) -> None:
    rows = sampled.rows(torch.zeros_like(sampled.logprobs()))
    output = run(written(tmp_path / "f", rows), "--model", directory)
    assert output.certain == output.clean == []
    (found,) = output.findings("one of several that look alike")
    assert found.startswith("processed log-probabilities of a sampler that left one token")
    assert "all 960 tokens have a log-probability of exactly 0" in output.text
    assert "no token has both log-probabilities" not in output.text


def test_a_few_impossible_zeros_may_be_a_grammars(
    run: Run, sampled: Sampled, tmp_path: Path
) -> None:
    trainer = sampled.logprobs()
    trainer[3, 5] = -6.0
    engine = trainer.clone()
    engine[3, 5] = 0.0
    output = run(written(tmp_path / "f", with_trainer(sampled.rows(engine), trainer)))
    assert output.certain == []
    (found,) = output.findings("one of several that look alike")
    assert found.startswith("missing log-probabilities, written as 0, or tokens to which a grammar")


# ---------------------------------------------------------------------------------------------
# Real rollouts: twelve answers of SmolLM2-135M-Instruct in vLLM 0.32 on a CPU, bfloat16, with the
# float32 log-probabilities of transformers beside the engine's.

REAL = Path(__file__).parent / "rollouts" / "vllm_bf16.jsonl"


def real_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in REAL.read_text().splitlines()]


def test_real_rollouts_in_bfloat16_are_clean(run: Run) -> None:
    output = run(REAL)
    assert output.status == 0
    assert output.certain == []
    (clean,) = output.clean
    assert clean.startswith("low precision as usual: bfloat16 arithmetic")
    assert "  the default, ratio in [0.2, 5]    0.00%  0.00%  0.00%" in output.text


@pytest.mark.parametrize(("cut", "sign"), [(1, "-1"), (-1, "+1")])
def test_real_rollouts_whose_values_moved(run: Run, tmp_path: Path, cut: int, sign: str) -> None:
    rows = real_rows()
    for row in rows:  # as a list that begins one token late, or with one value too many
        values = row["logprobs"]
        row["logprobs"] = [*values[1:], values[0]] if cut == 1 else [-0.7, *values[:-1]]
    output = run(written(tmp_path / "f", rows))
    assert output.certain == [f"a shift by one token ({sign})"]
    assert len(output.clean) == 1


def test_real_rollouts_with_zeros(run: Run, tmp_path: Path) -> None:
    rows = real_rows()
    rows[3]["logprobs"] = [0] * len(rows[3]["logprobs"])
    output = run(written(tmp_path / "f", rows))
    assert output.certain == ["missing log-probabilities, written as 0"]
    assert len(output.clean) == 1


# ---------------------------------------------------------------------------------------------
# Files with the trainer's log-probabilities, and a model beside them


def test_a_model_that_fits_better_than_the_files_trainer_is_no_temperature(
    run: Run, sampled: Sampled, directory: Path, tmp_path: Path
) -> None:
    logprobs = sampled.logprobs()
    rows = with_trainer(sampled.rows(logprobs), rounded(logprobs, 0.3))
    output = run(written(tmp_path / "f", rows), "--model", directory)
    assert output.certain == [f"the files' trainer log-probabilities are not those of {directory}"]
    (clean,) = output.clean
    assert clean == "nothing: float32 on both sides"
    assert f"{directory} and the engine: k3 is" in output.text


def test_a_trainer_in_low_precision_beside_a_model_is_said_and_is_clean(
    run: Run, sampled: Sampled, directory: Path, tmp_path: Path
) -> None:
    logprobs = sampled.logprobs()
    rows = with_trainer(sampled.rows(logprobs), rounded(logprobs, LOW_PRECISION))
    output = run(written(tmp_path / "f", rows), "--model", directory)
    assert output.certain == []
    files, engine = output.clean
    assert files.startswith("the files' trainer log-probabilities are those of ")
    assert engine == "nothing: float32 on both sides"


def test_a_temperature_that_the_file_does_not_say_may_be_the_trainers_too(
    run: Run, model: planted.LlamaForCausalLM, directory: Path, tmp_path: Path
) -> None:
    def scaled(logits: torch.Tensor) -> torch.Tensor:
        return logits / 0.7

    sampled = planted.sample(model, scaled)
    logprobs = sampled.logprobs(scaled)
    rows = with_trainer(sampled.rows(logprobs), rounded(logprobs, LOW_PRECISION))
    path = written(tmp_path / "f", rows)
    output = run(path, "--model", directory)
    files, temperature = output.certain
    assert files == f"the files' trainer log-probabilities are not those of {directory}"
    assert temperature == "another temperature: the engine's log-probabilities are at 0.7"
    assert "--temperature 0.7 if the trainer divides by it already" in output.text
    output = run(path, "--model", directory, "--temperature", 0.7)
    assert output.certain == []
