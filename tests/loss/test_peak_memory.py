"""Peak memory from hidden states: no tensor of the size of all logits is ever alive."""

from __future__ import annotations

import subprocess
import sys

import pytest

TOKENS, WIDTH, VOCABULARY = 2048, 64, 16384
LOGITS_MIB = TOKENS * VOCABULARY * 4 / 2**20  # 128

PROGRAM = f"""
import sys, torch, ipo_ext
from ipo_ext import reference

def peak_kib():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

def run(function, tokens, **how):
    hidden = torch.randn(tokens, {WIDTH}, requires_grad=True)
    weight = torch.randn({VOCABULARY}, {WIDTH}).div(8).requires_grad_()
    labels = torch.randint({VOCABULARY}, (tokens,))
    mask = torch.rand(tokens) < 0.9
    inference, advantages = torch.full((tokens,), -9.0), torch.randn(tokens)
    function(hidden, weight, labels, inference, advantages, mask, **how).loss.backward()

def run_logprobs(function, tokens, **how):
    hidden = torch.randn(tokens, {WIDTH}, requires_grad=True)
    weight = torch.randn({VOCABULARY}, {WIDTH}).div(8).requires_grad_()
    logprobs, entropy = function(hidden, weight, torch.randint({VOCABULARY}, (tokens,)), **how)
    (logprobs.sum() + entropy.sum()).backward()

what, package = sys.argv[1:]
body = run if what == "loss" else run_logprobs
names = {{"loss": "ipo_loss_from_hidden", "logprobs": "linear_token_logprobs"}}
function = getattr(ipo_ext if package == "ipo_ext" else reference, names[what])
how = {{"chunk_size": 128}} if package == "ipo_ext" else {{}}
body(function, 8, **how)  # libraries and thread pools
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = peak_kib()
body(function, {TOKENS}, **how)
print((peak_kib() - before) / 1024)
"""


def peak_mib(what: str, package: str) -> float:
    """How far one forward and backward raises the peak of a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, what, package]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("what", ["loss", "logprobs"])
def test_all_logits_are_never_alive(what: str) -> None:
    assert peak_mib(what, "reference") > LOGITS_MIB, "the measure does not see the logits"
    assert peak_mib(what, "ipo_ext") < LOGITS_MIB / 3
