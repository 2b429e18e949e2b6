"""Calls every public function many times, eager, compiled and refused, and watches the memory.

`python scripts/soak.py` makes 100,000 calls of each, forward and backward, and exits 1 where the
resident memory of the last three quarters of them spans more than 1 MiB. Before each reading Python
collects its garbage and malloc gives freed pages back (malloc_trim), so what counts is memory that
something still holds, or that fragmentation keeps; the first quarter fills caches and pools and
does not count. Steps are compiled once, by aot_eager unless told otherwise. Linux and glibc.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.subjects import SUBJECTS, Subject  # noqa: E402

CALLS = 100_000
READINGS = 80
MIB = 2**20
LIMIT = 1.0  # MiB
SIZES = (7, 8, 9)  # tokens of calls that follow one another


class Soaked(NamedTuple):
    """Resident memory in MiB, each time it was read, and how long all took in seconds."""

    readings: list[float]
    seconds: float

    @property
    def span(self) -> float:
        """Of the last three quarters, from the smallest reading to the largest."""
        counted = self.readings[len(self.readings) // 4 :]
        return max(counted) - min(counted)

    @property
    def is_flat(self) -> bool:
        return self.span <= LIMIT


def soak(
    call: Callable[[], Any],
    calls: int,
    *,
    readings: int = READINGS,
    progress: Callable[[int], None] | None = None,
) -> Soaked:
    """Runs ``call`` so many times."""
    each = max(calls // readings, 1)
    read: list[float] = []
    started = time.monotonic()
    while len(read) * each < calls:
        for _ in range(each):
            call()
        read.append(resident_mib())
        if progress is not None:
            progress(len(read) * each)
    return Soaked(read, time.monotonic() - started)


_LIBC = ctypes.CDLL(None)


def resident_mib() -> float:
    """What the process holds, without what Python or malloc would give back."""
    gc.collect()
    _LIBC.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


# -------------------------------------------------------------------------------------------------
# What is called


def eager(subject: Subject) -> Callable[[], Any]:
    return _over(_inputs(subject), subject.gradient)


def compiled(subject: Subject, backend: str) -> Callable[[], Any]:
    objective = torch.compile(subject.objective, fullgraph=True, dynamic=True, backend=backend)

    def gradient(first: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        leaf = first.detach().requires_grad_()
        return torch.autograd.grad(objective(leaf, *constants), leaf)[0]

    return _over(_inputs(subject), gradient)


def refused(subject: Subject) -> Callable[[], Any]:
    """One error after the other: of types, shapes and options, of data, of a second backward."""
    bad = itertools.cycle(_bad_calls(subject))

    def call() -> None:
        run = next(bad)
        try:
            run()
        except (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError):
            return
        raise SystemExit("a call that must be refused was not")

    return call


def _inputs(subject: Subject) -> list[tuple[torch.Tensor, ...]]:
    return [
        (first, *constants)
        for first, constants in (subject.inputs("cpu", tokens) for tokens in SIZES)
    ]


def _over(
    inputs: list[tuple[torch.Tensor, ...]], function: Callable[..., Any]
) -> Callable[[], Any]:
    """``function`` of one after the other."""
    rounds = itertools.cycle(inputs)
    return lambda: function(*next(rounds))


def _bad_calls(subject: Subject) -> Iterator[Callable[[], Any]]:
    first, constants = subject.inputs("cpu")
    leaf = first.detach().requires_grad_()
    yield lambda: subject.function(first.long(), *constants)
    yield lambda: subject.function(first[:-1], *constants)
    yield lambda: subject.function(first, *constants, no_such_option=1)
    if "token_logprobs" not in subject.operator:
        cuts = torch.tensor([0, 5, 3], dtype=torch.int32)
        yield lambda: subject.function(leaf, *constants, cu_seqlens=cuts)
        yield lambda: subject.function(first, *constants, normalizer=-1.0)
    if subject.operator != "ipo_loss":
        at = 1 if subject.multiplies else 0
        labels = torch.full_like(constants[at], 10**6)
        others = constants[:at], constants[at + 1 :]
        yield lambda: subject.function(leaf, *others[0], labels, *others[1])

    def twice() -> None:
        leaf = first.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            subject.objective(leaf, *constants), leaf, create_graph=True
        )
        torch.autograd.grad(gradient.sum(), leaf)

    yield twice


# -------------------------------------------------------------------------------------------------
# The table


def kinds(backend: str) -> dict[str, Callable[[Subject], Callable[[], Any]]]:
    return {
        "eager": eager,
        "compiled": lambda subject: compiled(subject, backend),
        "refused": refused,
    }


def row(name: str, kind: str, soaked: Soaked, calls: int) -> str:
    first, last = soaked.readings[0], soaked.readings[-1]
    verdict = "flat" if soaked.is_flat else "GROWS"
    return (
        f"{name:24}{kind:10}{calls:9,}{calls / soaked.seconds:9.0f}"
        f"{first:10.1f}{last:10.1f}{soaked.span:8.2f}  {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=CALLS, help="of each function and kind")
    parser.add_argument("--functions", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--kinds", nargs="*", choices=kinds(""), default=list(kinds("")))
    parser.add_argument("--backend", default="aot_eager", help="what steps are compiled by")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'function':24}{'kind':10}{'calls':>9}{'calls/s':>9}{'MiB first':>10}{'last':>10}"
          f"{'span':>8}", flush=True)  # fmt: skip
    all_flat = True
    for name, kind in itertools.product(options.functions, options.kinds):
        call = kinds(options.backend)[kind](SUBJECTS[name])

        def progress(done: int, name: str = name, kind: str = kind) -> None:
            if sys.stderr.isatty():
                print(f"{name} {kind}: {done:,}", end="\r", file=sys.stderr, flush=True)

        soaked = soak(call, options.calls, progress=progress)
        all_flat &= soaked.is_flat
        print(row(name, kind, soaked, options.calls), flush=True)
    sys.exit(not all_flat)


if __name__ == "__main__":
    main()
