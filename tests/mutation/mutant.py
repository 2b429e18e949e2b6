"""One small change of one place in a source file, and how it is named and put in."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Mutant:
    """The text ``[begin, end)`` of ``file``, which starts on ``line``, replaced."""

    file: str  # below the root
    begin: int
    end: int
    replacement: str
    operator: str
    line: int  # where the change starts
    statement: int  # the line on which its statement starts
    text: str  # of the lines that the change touches
    original: str  # what the replacement replaces

    @property
    def key(self) -> str:
        """The same after changes elsewhere in the file."""
        column = self.text.find(self.original)
        parts = self.file, self.text, str(column), self.original, self.replacement
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]

    def apply(self, root: Path) -> None:
        path = root / self.file
        source = path.read_text()
        path.write_text(source[: self.begin] + self.replacement + source[self.end :])

    def __str__(self) -> str:
        original, replacement = (" ".join(t.split()) for t in (self.original, self.replacement))
        return f"{self.file}:{self.line}: {self.operator}: {original} -> {replacement}"


def mutant(
    file: str, source: str, span: tuple[int, int], replacement: str, operator: str, statement: int
) -> Mutant:
    begin, end = span
    line = source.count("\n", 0, begin) + 1
    first = source.rfind("\n", 0, begin) + 1
    last = source.find("\n", end)
    return Mutant(
        file,
        begin,
        end,
        replacement,
        operator,
        line,
        statement,
        source[first : last if last >= 0 else len(source)],
        source[begin:end],
    )
