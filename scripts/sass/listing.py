"""Reads what nvdisasm prints of a cubin: kernels as instructions, with labels and source lines."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

FUNCTION = re.compile(r"^\.text\.(\S+):")
LABEL = re.compile(r"^(\.L_\w+):")
SOURCE = re.compile(r'//## File "([^"]+)", line (\d+)')
WORDS = r"\s*/\* (0x[0-9a-f]{16}) \*/"
INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;" + WORDS
)
SECOND_WORD = re.compile("^" + WORDS)
TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclasses.dataclass(frozen=True)
class Control:
    """What the compiler tells the scheduler with an instruction (sm_70 and newer)."""

    stall: int  # cycles until the warp's next instruction
    write_barrier: int  # set until the result is there; 7 for none
    read_barrier: int  # set until the operands have been read; 7 for none
    waits_for: int  # a bit for each barrier

    @classmethod
    def of(cls, word: int) -> Control:
        bits = word >> 41
        return cls(bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0", or empty
    opcode: str  # with its modifiers
    operands: str
    source: tuple[tuple[str, int], ...]  # file and line, innermost first, then where it was inlined
    control: Control

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def text(self) -> str:
        return f"{self.predicate} {self.opcode} {self.operands}".strip()

    @property
    def target(self) -> str | None:
        """The label that it branches to."""
        found = TARGET.search(self.operands)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Kernel:
    symbol: str
    instructions: list[Instruction]
    labels: dict[str, int]  # to the address of what follows


def kernels_of(cubin: Path, disassembler: str) -> dict[str, Kernel]:
    """The kernels of a cubin by their mangled names."""
    command = [disassembler, "-c", "-gi", "-hex", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {kernel.symbol: kernel for kernel in parsed(text)}


def parsed(text: str) -> Iterator[Kernel]:
    pieces = re.split(r"(?m)^\.text\.(\S+):", text)
    for symbol, code in zip(pieces[1::2], pieces[2::2], strict=True):
        yield _kernel(symbol, code)


def _kernel(symbol: str, code: str) -> Kernel:
    kernel = Kernel(symbol, [], {})
    waiting: list[str] = []  # labels of the next instruction
    source: tuple[tuple[str, int], ...] = ()
    lines: list[tuple[str, int]] = []  # that nvdisasm has named since the last instruction
    first: re.Match[str] | None = None
    for line in code.splitlines():
        if first and (second := SECOND_WORD.match(line)):
            address, predicate, opcode, operands, _ = first.groups()
            control = Control.of(int(second[1], 16))
            kernel.instructions.append(
                Instruction(int(address, 16), predicate or "", opcode, operands, source, control)
            )
            first = None
        elif label := LABEL.match(line):
            waiting.append(label[1])
        elif named := SOURCE.search(line):
            lines.append((Path(named[1]).name, int(named[2])))
        elif first := INSTRUCTION.match(line):
            if lines:
                source, lines = tuple(lines), []
            kernel.labels.update(dict.fromkeys(waiting, int(first[1], 16)))
            waiting = []
    return kernel
