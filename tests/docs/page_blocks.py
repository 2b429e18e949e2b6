"""The Python blocks of a Markdown page, what each prints, and where each is run.

A block runs in its page's namespace, after those before it. An HTML comment in the line above the
fence says otherwise: ``<!-- host: trl -->`` for a block that needs a package which conflicts with
others, and which ``scripts/test_integrations.py`` runs in that package's environment. A fence
``text`` that follows a block is what it prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
MARKER = re.compile(r"<!-- (\w+): (\S+) -->\n\Z")


@dataclasses.dataclass(frozen=True)
class Block:
    page: str  # relative to the root of the tree
    line: int  # of its first statement
    source: str
    host: str | None = None
    prints: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def run(self, namespace: dict[str, Any]) -> None:
        """Executes the block, and compares what it prints; a traceback shows the page's line."""
        code = compile("\n" * (self.line - 1) + self.source, str(ROOT / self.page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if self.prints is not None:
            assert printed.getvalue() == self.prints, f"{self}: it prints something else"


def pages() -> list[str]:
    """Every page whose blocks are run."""
    return ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]


def blocks_of_page(page: str) -> list[Block]:
    return list(blocks_in(page, (ROOT / page).read_text()))


def blocks_of_host(host: str) -> list[Block]:
    found = (block for page in pages() for block in blocks_of_page(page))
    return [block for block in found if block.host == host]


def blocks_in(page: str, text: str) -> Iterator[Block]:
    block: Block | None = None
    end = 0
    for fence in FENCE.finditer(text):
        follows = block is not None and not text[end : fence.start()].strip()
        if fence["language"] == "text" and follows:
            block = dataclasses.replace(block, prints=fence["body"])
        if block is not None:
            yield block
            block = None
        if fence["language"] == "python":
            line = text.count("\n", 0, fence.start("body")) + 1
            block = Block(page, line, fence["body"], _host(page, line, text[: fence.start()]))
            end = fence.end()
    if block is not None:
        yield block


def _host(page: str, line: int, before: str) -> str | None:
    marker = MARKER.search(before)
    if marker is None:
        return None
    if marker[1] != "host":
        raise ValueError(f"{page}:{line}: expected the marker host, got {marker[1]}")
    return marker[2]
