"""Which pipe of a multiprocessor executes an instruction, for how long, and what follows for a
kernel: counts, the floor that each pipe sets, and the latency of one warp alone."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence

from sass.listing import Instruction

# The first that matches; sm_90.
_PIPES = {
    "fp64": r"DADD|DMUL|DFMA|DSETP|DMNMX",
    "xu": r"MUFU|F2F(?!P)|F2I|I2F(?!P)|POPC|FLO|BREV|FRND",
    "fma": r"FADD|FMUL|FFMA",
    "imad": r"IMAD|IDP|IMUL",
    "half": r"HADD2|HMUL2|HFMA2|HSETP?2",
    "uniform": r"U[A-Z]|R2UR|S2UR|VOTEU|REDUX",
    "const": r"LDC",
    "lsu": r"LDG|STG|LDS|STS|LDL|STL|LD$|ST$|ATOM|RED|SHFL|STAS|SYNCS|DEPBAR|MEMBAR|CCTL|MAPA",
    "ctrl": r"BRA|BRX|BSSY|BSYNC|BREAK|EXIT|WARPSYNC|CALL|RET|NOP|YIELD|BMOV|BAR|PREEXIT|ACQBULK"
    r"|UCGABAR",
    "alu": r".",
}
PIPES = {name: re.compile(pattern) for name, pattern in _PIPES.items()}

# Cycles for which a warp's instruction occupies its pipe in a quarter of a multiprocessor (sm_90:
# CUDA C++ Programming Guide, "Arithmetic Instructions"; IMAD on one half of the FMA pipe).
OCCUPIES = {"fp64": 2, "xu": 8, "fma": 1, "imad": 2, "half": 2, "lsu": 4, "alu": 2, "issue": 1}

# Cycles until a result is there that an instruction waits for by a barrier, nominal.
_LATENCIES = {"xu": 24, "lsu": 30, "const": 30, "uniform": 14, "fp64": 16, "half": 12}
_OTHER_LATENCY = 20
_READ_LATENCY = 8
LOAD_LATENCY = 600  # of global memory


@dataclasses.dataclass(frozen=True)
class Device:
    """What turns cycles of a quarter of a multiprocessor into time."""

    multiprocessors: int
    gigahertz: float

    def microseconds(self, cycles: float, items: float) -> float:
        """Of ``items``, each of which a thread does in ``cycles`` of its warp."""
        warps = items / 32 / (4 * self.multiprocessors)
        return warps * cycles / self.gigahertz / 1e3


DEVICES = {"H200": Device(132, 1.98), "A100": Device(108, 1.41)}


def pipe_of(instruction: Instruction) -> str:
    return next(name for name, pattern in PIPES.items() if pattern.match(instruction.opcode))


def counts_of(instructions: Sequence[Instruction]) -> dict[str, int]:
    """Instructions of each pipe, and of "issue", all of them."""
    counts = collections.Counter(pipe_of(instruction) for instruction in instructions)
    return {"issue": len(instructions), **{name: counts[name] for name in PIPES}}


def floors(counts: dict[str, float]) -> dict[str, float]:
    """Cycles that each pipe takes at least."""
    return {name: counts[name] * cycles for name, cycles in OCCUPIES.items()}


def latency(path: Sequence[Instruction]) -> int:
    """Cycles that one warp alone takes at least: its stalls, and nominal latencies where it waits.

    Instruction misses and conflicts are not counted.
    """
    now, free = 0, dict.fromkeys(range(6), 0)
    for instruction in path:
        control = instruction.control
        now = max([now, *(free[b] for b in free if control.waits_for >> b & 1)])
        if control.write_barrier in free:
            free[control.write_barrier] = now + _latency_of(instruction)
        if control.read_barrier in free:
            free[control.read_barrier] = max(free[control.read_barrier], now + _READ_LATENCY)
        now += max(control.stall, 1)
    return now


def _latency_of(instruction: Instruction) -> int:
    if instruction.base == "LDG":
        return LOAD_LATENCY
    return _LATENCIES.get(pipe_of(instruction), _OTHER_LATENCY)
