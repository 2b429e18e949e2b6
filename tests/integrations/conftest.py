"""Tests inside the real trainers: each file needs its host and runs where the host is installed.

``scripts/test_integrations.py`` makes an environment for each, since their requirements conflict.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import typing
from pathlib import Path

import pytest
import torch
import typing_extensions

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made here, none is downloaded
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func is, and stands for an engine here

torch.set_num_threads(1)  # models this small are slower with more

if sys.version_info < (3, 12) and importlib.util.find_spec("skyrl"):
    # SkyRL asks for Python 3.12, of which its worker needs this alone: pydantic refuses the older.
    typing.TypedDict = typing_extensions.TypedDict

HOSTS = (
    "deepspeed",
    "engine_loop",
    "lightning",
    "megatron",
    "mlflow",
    "openrlhf",
    "skyrl",
    "swift",
    "torchtitan",
    "transformers",
    "trl",
    "verl",
    "wandb",
)
# transformers is also where the tests of `mismatch` run; its own tests need what brings it in.
BROUGHT_IN_BY = {"transformers": "peft", "engine_loop": "vllm"}
collect_ignore = [
    f"test_{host}.py"
    for host in HOSTS
    if importlib.util.find_spec(BROUGHT_IN_BY.get(host, host)) is None
]


@pytest.fixture(autouse=True)
def _same_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)  # trainers write where they run
