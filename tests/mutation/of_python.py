"""The standard mutation operators on Python, by its syntax tree; what is not mutated is text that
users read, annotations and docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.mutation.mutant import Mutant, mutant

BOUNDS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
}
NEGATIONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
SIGNS: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "+",
    ast.Pow: "*",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    yield from _Mutator(file, source).run()


class _Mutator:
    def __init__(self, file: str, source: str) -> None:
        self.file, self.source = file, source
        self.line_starts = [0]
        for line in source.encode().splitlines(keepends=True):
            self.line_starts.append(self.line_starts[-1] + len(line))
        self.statement = 1

    def run(self) -> Iterator[Mutant]:
        yield from self.visit(ast.parse(self.source))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """In characters; the syntax tree counts bytes."""
        encoded = self.source.encode()
        begin = self.line_starts[node.lineno - 1] + node.col_offset
        end = self.line_starts[node.end_lineno - 1] + node.end_col_offset
        return len(encoded[:begin].decode()), len(encoded[:end].decode())

    def text(self, node: ast.AST) -> str:
        begin, end = self.span(node)
        return self.source[begin:end]

    def replace(self, node: ast.AST, replacement: str, operator: str) -> Mutant:
        span = self.span(node)
        return mutant(self.file, self.source, span, replacement, operator, self.statement)

    def visit(self, node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.stmt):
            self.statement = node.lineno
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            return
        yield from self.mutations(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "type_comment"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.visit(child)

    def mutations(self, node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.Compare):
            yield from self.of_comparison(node)
        elif isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
            yield from self.of_arithmetic(node)
        elif isinstance(node, ast.BoolOp):
            yield from self.of_boolean(node)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
            yield self.replace(node, self.text(node.operand), "sign")
        elif isinstance(node, ast.Constant):
            yield from self.of_constant(node)
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield self.replace(node.test, f"(not ({self.text(node.test)}))", "negated condition")
        elif isinstance(node, ast.Call):
            yield from self.of_call(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield self.replace(node, "pass", "dropped call")

    def of_comparison(self, node: ast.Compare) -> Iterator[Mutant]:
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            names = BOUNDS if type(operator) in BOUNDS else NEGATIONS
            kind = "bound" if names is BOUNDS else "negated comparison"
            pair = _Between(left, right)
            replacement = f"{self.text(left)} {names[type(operator)]} {self.text(right)}"
            yield self.replace(pair, replacement, kind)
            left = right

    def of_arithmetic(self, node: ast.BinOp) -> Iterator[Mutant]:
        left, right = self.text(node.left), self.text(node.right)
        yield self.replace(node, f"{left} {SIGNS[type(node.op)]} {right}", "sign")
        yield self.replace(node, left, "dropped term")

    def of_boolean(self, node: ast.BoolOp) -> Iterator[Mutant]:
        word = " and " if isinstance(node.op, ast.And) else " or "
        other = " or " if isinstance(node.op, ast.And) else " and "
        terms = [self.text(value) for value in node.values]
        for index in range(len(terms)):
            rest = word.join(terms[:index] + terms[index + 1 :])
            yield self.replace(node, f"({rest})", "dropped term")
        yield self.replace(node, f"({other.join(terms)})", "and for or")

    def of_constant(self, node: ast.Constant) -> Iterator[Mutant]:
        if isinstance(node.value, bool):
            yield self.replace(node, str(not node.value), "negated constant")
        elif isinstance(node.value, int):
            yield self.replace(node, str(node.value + 1), "off by one")
        elif isinstance(node.value, float):
            yield self.replace(node, repr(node.value + 1), "off by one")

    def of_call(self, node: ast.Call) -> Iterator[Mutant]:
        if self.text(node.func) in ("isinstance", "getattr", "hasattr"):  # no test could miss it
            return
        if len(node.args) < 2 or any(isinstance(a, ast.Starred) for a in node.args[:2]):
            return
        first, second = self.text(node.args[0]), self.text(node.args[1])
        if first != second:
            pair = _Between(*node.args[:2])
            yield self.replace(pair, f"{second}, {first}", "swapped arguments")


class _Between(ast.AST):
    """From one node's start to another's end."""

    def __init__(self, first: ast.expr, last: ast.expr) -> None:
        self.lineno, self.col_offset = first.lineno, first.col_offset
        self.end_lineno, self.end_col_offset = last.end_lineno, last.end_col_offset
