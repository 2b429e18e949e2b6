"""Tables on stdout and live progress on stderr, by rich where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence


class Terminal:
    """Writes what a benchmark says; without rich, the same in plain text."""

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

    def line(self, text: str) -> None:
        """A line that stays."""
        self._end_progress()
        print(text, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """The first column left, the others right."""
        self._end_progress()
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

    def _end_progress(self) -> None:
        if self._rich is not None:
            self._status.stop()


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
