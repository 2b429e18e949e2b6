"""What a benchmark says besides timings: machine and versions, live progress, tables, JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import ipo_ext
from ipo_ext import _C

ROOT = Path(__file__).resolve().parent.parent


# ---- Facts ----


def facts(device: str) -> dict[str, Any]:
    """Where, with what and from which source the figures beside this were taken."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": _machine(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "ipo_ext": ipo_ext.__version__,
            "ipo_ext_built_with": {
                "torch": _C.TORCH_AT_BUILD,
                "nvcc": _C.CUDA_COMPILER or None,
                "architectures": list(_C.CUDA_ARCHITECTURES),
            },
        },
    }


def commit() -> str:
    """The commit's hash, "-dirty" with changes; IPO_EXT_COMMIT where there is no repository."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not head:
        return os.environ.get("IPO_EXT_COMMIT", "unknown")
    changes = _output("git", "--no-optional-locks", "-C", str(ROOT), "status", "--porcelain")
    return head + ("-dirty" if changes else "")


def _machine(device: str) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": _load(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        machine["gpu"] = {
            "name": properties.name,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return machine


def busy(machine: dict[str, Any]) -> str:
    """A warning where others are using the cores that are to be measured."""
    load, cores = machine["load_before"], machine["cores"] or 1
    if load is None or load < 0.5 * cores:
        return ""
    return f"warning: load {load} on {cores} cores before the start; do not quote these figures"


def device_name(machine: dict[str, Any]) -> str:
    """The machine in a few words, for titles."""
    if "gpu" in machine:
        return str(machine["gpu"]["name"])
    threads = machine["threads"]
    return f"{machine['cpu']}, {threads} thread{'s' if threads != 1 else ''}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _load() -> float | None:
    """Average number of runnable processes of the last minute, this one included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# ---- Words ----


def duration(seconds: float) -> str:
    """Three significant digits with a unit: 0.000236 is "236 us"."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor * 0.9995:
            return f"{_three_digits(seconds / factor)} {unit}"
    return f"{_three_digits(seconds / 1e-9)} ns"


def times(value: float) -> str:
    """A ratio: "61.2x"."""
    return f"{_three_digits(value)}x"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


# ---- Terminal ----


class Terminal:
    """Tables on stdout and one line of live progress on stderr; by rich if it is installed."""

    def __init__(self) -> None:
        try:
            import rich.console
            import rich.table
        except ImportError:
            self._rich = None
            return
        self._rich = rich
        self._out = rich.console.Console(width=None if sys.stdout.isatty() else 120)
        self._status = rich.console.Console(stderr=True).status("")

    def progress(self, text: str) -> None:
        """What is being done now; replaces the words before it where the terminal can."""
        if self._rich is not None and sys.stderr.isatty():
            self._status.update(text)
            self._status.start()
        else:
            print(text, file=sys.stderr, flush=True)

    def done(self) -> None:
        if self._rich is not None:
            self._status.stop()

    def line(self, text: str) -> None:
        self.done()
        print(text, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """The first column left, the others right."""
        self.done()
        if self._rich is None:
            print(_plain_table(title, columns, [list(row) for row in rows]), flush=True)
            return
        table = self._rich.table.Table(title=title, title_justify="left", box=None, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._out.print(table)
        self._out.print()


def _plain_table(title: str, columns: Sequence[str], rows: list[list[str]]) -> str:
    cells = [list(columns), *rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([title, *lines, ""])


# ---- Files ----


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file at once, so that a run that is cut short leaves the last whole one."""
    content["machine"]["load_after"] = _load()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    part.replace(path)
