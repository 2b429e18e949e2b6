"""examples/train_distributed.py: four ranks have the losses of one process, also where one dies."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


def torchrun(ranks: int, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    script = ("examples/train_distributed.py", "--folder", str(folder), "--steps", str(STEPS))
    command = [sys.executable, *launcher, *script, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_four_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    done = torchrun(1, alone)
    assert done.returncode == 0, done.stderr

    began = time.monotonic()
    died = torchrun(4, together, "--save-every", "2", "--die-at", "5")
    assert died.returncode != 0
    assert time.monotonic() - began < 120  # and not when a process group gives up
    assert [row["step"] for row in rows(together)] == [1, 2, 3, 4, 5]
    done = torchrun(4, together, "--save-every", "2")
    assert done.returncode == 0, done.stderr
    steps = [row["step"] for row in rows(together)]
    assert steps == [1, 2, 3, 4, 5, 5, 6]  # goes on from the checkpoint of step 4

    by_step = {row["step"]: row for row in rows(together)}
    for expected in rows(alone):
        assert by_step[expected["step"]] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    dropped = [row["rollout_dropped"] for row in rows(alone)]
    assert 0 < max(dropped) < 1  # by a verdict on sequences that ranks share
