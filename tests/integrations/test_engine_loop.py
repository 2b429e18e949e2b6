"""A real engine, a real model and a real trainer: examples/engine_loop.py, and vLLM as an oracle.

Runs in the environment of `scripts/engine_environment.py`, whose folder holds the model.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "engine_loop.py"
SAMPLE = ROOT / "tests" / "mismatch" / "rollouts" / "vllm_fp32.jsonl"
MODEL = Path(sys.prefix) / "smollm2"


def imported(path: Path) -> ModuleType:
    sys.path.insert(0, str(path.parent))  # where what it imports lies, too
    return importlib.import_module(path.stem)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return imported(EXAMPLE)


@pytest.fixture(scope="module")
def pair(example: ModuleType) -> tuple[Any, Any]:
    return example.Engine(MODEL, "bfloat16", 0), example.Trainer(MODEL, 4e-5)


def test_weights_arrive_and_the_trainer_keeps_its_own(example: ModuleType, pair: Any) -> None:
    engine, trainer = pair
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert example.check_that_weights_arrive(engine, trainer) < 0.2
    after = trainer.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_an_engine_that_keeps_its_old_head_is_refused(
    example: ModuleType, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trainer = pair
    untied = [(name, value.detach()) for name, value in trainer.model.named_parameters()]
    monkeypatch.setattr(trainer, "weights", lambda: untied)
    with pytest.raises(example.NotInSync, match="not all weights have arrived"):
        example.check_that_weights_arrive(engine, trainer)
    monkeypatch.undo()
    assert example.check_that_weights_arrive(engine, trainer) < 0.2  # with all of the names


def test_an_engine_that_takes_nothing_is_refused(
    example: ModuleType, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trainer = pair
    monkeypatch.setattr(engine, "take", lambda weights: None)
    with pytest.raises(example.NotInSync, match="not all weights have arrived"):
        example.check_that_weights_arrive(engine, trainer)


def test_functions_of_hidden_states_agree_with_vllm_in_float32() -> None:
    oracle = imported(ROOT / "scripts" / "engine_oracle.py")
    ratios, metrics = oracle.log_ratios(MODEL, oracle.rollouts_in(SAMPLE))
    assert set(ratios) == {"linear_token_logprobs", "ipo_loss_from_hidden"}
    for x in ratios.values():
        assert len(x) > 2000
        assert float(x.abs().max()) < oracle.WITHIN
    assert float(metrics["mismatch_kl"]) < 1e-8
    assert float(metrics["is_masked"]) == 0


def test_reward_rises_and_engine_and_trainer_stay_one_policy(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLE, MODEL, "--output", tmp_path], check=True)
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert len(steps) == 7
    rewards = [step["reward"] for step in steps]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.3
    assert all(step["behind"] == 0 and step["ipo/mismatch_kl"] < 0.01 for step in steps)
    reports = {path.name for path in tmp_path.glob("step_*.txt")}
    assert reports == {"step_000.txt", "step_003.txt", "step_006.txt"}
    assert (tmp_path / "engine_loop.png").stat().st_size > 10_000
