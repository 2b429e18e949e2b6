"""The directives `operators` and `metrics`: lines `name: meaning`, checked against the package.

A registered operator or a metric without a line, or a line without one of these, is a warning, and
so an error of the build. Schemas are read from the registered operators.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import ipo_ext
from ipo_ext._ops.changing_numbers import NUMBERS, twin

NAMESPACE = "ipo_ext"


class Table(SphinxDirective):
    """A definition list: each name as the term, what is known of it and its meaning below."""

    has_content = True
    kind: str

    def known(self) -> dict[str, str]:
        """Every name that must have a line, with a text to show in monospace, or none."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        known = self.known()
        meanings = dict(re.split(r":\s+", line, maxsplit=1) for line in self.content if line)
        messages = [
            self.state.document.reporter.warning(f"{self.kind} {name}: {trouble}", line=self.lineno)
            for names, trouble in (
                (known.keys() - meanings.keys(), "expected a line with its meaning"),
                (meanings.keys() - known.keys(), "is not there"),
            )
            for name in sorted(names)
        ]
        items = (
            self.item(name, text, known[name]) for name, text in meanings.items() if name in known
        )
        return [nodes.definition_list("", *items), *messages]

    def item(self, name: str, meaning: str, monospace: str) -> nodes.definition_list_item:
        term = nodes.term("", "", nodes.literal("", name), ids=[f"{self.kind}-{name}"])
        inline, messages = self.parse_inline(meaning)
        definition = nodes.definition("", nodes.paragraph("", "", *inline), *messages)
        if monospace:
            definition += nodes.literal_block(monospace, monospace, language="text")
        return nodes.definition_list_item("", term, definition)


class Operators(Table):
    kind = "operator"

    def known(self) -> dict[str, str]:
        schemas = (
            schema
            for schema in torch._C._jit_get_all_schemas()
            if schema.name.startswith(f"{NAMESPACE}::")
        )
        known = {schema.name.partition("::")[2]: on_lines(str(schema)) for schema in schemas}
        twins = map(twin, NUMBERS)  # the page names them in one sentence
        return {name: known[name] for name in known.keys() - set(twins)}


class Metrics(Table):
    kind = "metric"

    def known(self) -> dict[str, str]:
        metrics = ipo_ext.IPOMetrics
        return dict.fromkeys((*metrics.MEAN_ROWS, *metrics.REPLAY_ROWS), "")


def on_lines(schema: str, width: int = 88) -> str:
    """A schema without its namespace, broken between arguments."""
    words = schema.partition("::")[2].split(" ")
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append("   ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("operators", Operators)
    app.add_directive("metrics", Metrics)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
