"""The soak script: a leak is seen, and what leaks nothing is flat."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.subjects import SUBJECTS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import soak


def test_a_leak_of_a_hundred_bytes_a_call_is_seen() -> None:
    leaked: list[bytes] = []
    soaked = soak.soak(lambda: leaked.append(bytes(100)), 40_000, readings=12)
    assert soaked.span > soak.LIMIT
    assert not soaked.is_flat


def test_what_is_held_for_a_while_is_none() -> None:
    soaked = soak.soak(lambda: bytearray(4_000_000), 800, readings=12)
    assert soaked.is_flat


@pytest.mark.parametrize("kind", ["eager", "refused"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_kind_of_call_runs(name: str, kind: str) -> None:
    call = soak.kinds("aot_eager")[kind](SUBJECTS[name])
    for _ in range(20):
        call()
