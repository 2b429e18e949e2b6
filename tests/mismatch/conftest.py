"""A tiny model in a directory, rollouts of it, and the command as a user runs it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made here, none is downloaded

from ipo_ext.__main__ import main
from tests.mismatch import planted


@dataclasses.dataclass(frozen=True)
class Output:
    status: int
    text: str
    errors: str

    def findings(self, mark: str) -> list[str]:
        """The titles of the causes that were marked so."""
        lines = (line.strip() for line in self.text.splitlines())
        return [line.removeprefix(f"[{mark}] ") for line in lines if line.startswith(f"[{mark}] ")]

    @property
    def certain(self) -> list[str]:
        return self.findings("certain")

    @property
    def clean(self) -> list[str]:
        return self.findings("clean")


Run = Callable[..., Output]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_it(*arguments: object) -> Output:
        capsys.readouterr()
        status = main(["mismatch", *map(str, arguments)])
        captured = capsys.readouterr()
        return Output(status, captured.out, captured.err)

    return run_it


@pytest.fixture(scope="session")
def model() -> planted.LlamaForCausalLM:
    return planted.policy()


@pytest.fixture(scope="session")
def directory(model: planted.LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sampled(model: planted.LlamaForCausalLM) -> planted.Sampled:
    return planted.sample(model)
