"""The machine that a benchmark runs on: its processor, its load, its name in a few words."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def processor() -> str:
    """The model of the CPU, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def load_average() -> float | None:
    """Average number of runnable processes of the last minute, this one included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def output_of(*command: str) -> str:
    """What a command prints; nothing where it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def warning_if_busy(machine: Mapping[str, Any]) -> str:
    """A warning where others are using the cores that are to be measured, else nothing."""
    load, cores = machine["load_before"], machine["cores"] or 1
    if load is None or load < 0.5 * cores:
        return ""
    return f"warning: load {load} on {cores} cores before the start; do not quote these figures"


def name_of(machine: Mapping[str, Any]) -> str:
    """The machine of a results file in a few words, for titles."""
    if "gpu" in machine:
        return str(machine["gpu"]["name"])
    threads = machine["threads"]
    return f"{machine['cpu']}, {threads} thread{'s' if threads != 1 else ''}"
