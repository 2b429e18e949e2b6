"""Index arithmetic is 64-bit: the kernels run tokens past 2^31 in memory that is only reserved."""

import subprocess

import pytest

from tests.emulator import build


@pytest.mark.emulated
def test_cpu_and_emulated_kernels_reach_tokens_past_2_to_the_31():
    program = build.build("large_index", ["tests/loss/large_index.cpp"], include=["csrc"])
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
