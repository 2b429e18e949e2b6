"""The loops that older processors run: compiled for each instruction set, tested under each that
this machine has, in a process of its own that the widest are forbidden to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.mutation.library import archs, chosen_arch
from tests.support.building import ROOT

TESTS = (
    *("tests/loss/test_from_logprobs.py", "tests/loss/test_from_logits.py"),
    *(
        "tests/loss/test_token_logprobs.py",
        "tests/loss/test_scale.py",
        "tests/loss/test_metrics.py",
    ),
    "tests/loss/test_policy_forms.py",
)


def run(arch: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "IPO_EXT_CPU_CAPABILITY": arch, "PYTEST_ADDOPTS": ""}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("arch", archs()[archs().index(chosen_arch()) + 1 :])
def test_the_loss_under(arch: str) -> None:
    assert (
        run(arch, "-c", "import ipo_ext._C as c; print(c.CPU_ARCHITECTURE)").stdout.strip() == arch
    )
    done = run(
        arch,
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS),
        *("-k", "cpu and (reference or float64)"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_a_name_of_none_is_refused() -> None:
    done = run("avx2", "-c", "import ipo_ext")
    expected = f"IPO_EXT_CPU_CAPABILITY: expected one of {', '.join(archs())}, got 'avx2'"
    assert f"ImportError: {expected}" in done.stderr
