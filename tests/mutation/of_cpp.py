"""The standard mutation operators on C++ as clang-format writes it: a space on both sides of every
binary operator and of nothing else. Comments, strings and preprocessor lines are not mutated."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.mutation.mutant import Mutant, mutant

BINARY = {
    "bound": {"<": "<=", "<=": "<", ">": ">=", ">=": ">"},
    "negated comparison": {"==": "!=", "!=": "=="},
    "sign": {"+": "-", "-": "+", "*": "/", "/": "*", "%": "+", "+=": "-=", "-=": "+="},
    "and for or": {"&&": "||", "||": "&&", "&": "|", "|": "&"},
}
NAMES = {"min": "max", "max": "min", "larger": "smaller", "smaller": "larger"}
DROPPED = ("+", "-", "*", "&&", "||", "&", "|")
OPENING, CLOSING = "([{", ")]}"


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    code = _blanked(source)

    def change(begin: int, end: int, replacement: str, operator: str) -> Mutant:
        line = source.count("\n", 0, begin) + 1
        return mutant(file, source, (begin, end), replacement, operator, line)

    for operator, others in BINARY.items():
        for match in re.finditer(r"(?<=\S) ([-+*/%<>=!&|]{1,2})(?= \S|\n)", code):
            if match[1] in others:
                yield change(match.start(1), match.end(1), others[match[1]], operator)
    for match in re.finditer(r"(?<=\S) ([-+*&|]{1,2})(?= |\n)", code):
        end = _operand_end(code, match.end())
        if match[1] in DROPPED and end is not None:
            yield change(match.start(), end, "", "dropped term")
    for match in re.finditer(r"(?:(?<=[(,?:{] )|(?<=[(\[{])|(?<=return ))-(?=[\w(])", code):
        yield change(match.start(), match.end(), "", "sign")
    for match in re.finditer(r"(?<=[(\s])!(?=[\w(:])", code):
        yield change(match.start(), match.end(), "", "sign")
    for match in re.finditer(r"(?<![\w.])\d+(?![\w.'])", code):
        yield change(*match.span(), str(int(match[0]) + 1), "off by one")
    for match in re.finditer(r"\b(?:if|while) \(", code):
        end = _closing(code, match.end() - 1)
        inside = source[match.end() : end]
        yield change(match.end(), end, f"!({inside})", "negated condition")
    for match in re.finditer(rf"\b({'|'.join(NAMES)})(?=\(|<int64_t>\()", code):
        yield change(*match.span(), NAMES[match[1]], "bound")
    for match in re.finditer(r"\b(true|false)\b", code):
        other = "false" if match[1] == "true" else "true"
        yield change(*match.span(), other, "negated constant")
    for match in re.finditer(r"[\w>]\(", code):
        yield from _swapped(code, source, match.end() - 1, change)
    for match in re.finditer(r"\n +((?:[\w.]|->|::|<\w+>)+\([^;{}]*\));", code):
        if not match[1].startswith("return"):
            yield change(match.start(1), match.end(1), "", "dropped call")


def _swapped(code: str, source: str, opening: int, change: object) -> Iterator[Mutant]:
    end = _closing(code, opening)
    if end is None:
        return
    commas = list(_top_level_commas(code, opening + 1, end))
    if not commas:
        return
    second_end = commas[1] if len(commas) > 1 else end
    first, second = source[opening + 1 : commas[0]], source[commas[0] + 1 : second_end].strip()
    declares = re.compile(r"(const )?[\w:<>, ]+[&*]?\s[&*]?\w+( = .*)?")
    if first == second or declares.fullmatch(first) or declares.fullmatch(second):
        return
    if '"' in first + second or "[&]" in first + second or "[=]" in first + second:
        return
    yield change(opening + 1, second_end, f"{second}, {first}", "swapped arguments")


def _blanked(source: str) -> str:
    """The source, as long, with spaces for comments, strings and preprocessor lines."""
    pattern = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:\\\n|[^\n])*', re.MULTILINE)

    def blank(match: re.Match[str]) -> str:
        filler = "\x01" if match[0].startswith('"') else " "  # a string is an operand, no space
        return "".join(c if c == "\n" else filler for c in match[0])

    return pattern.sub(blank, source)


def _closing(code: str, opening: int) -> int | None:
    depth = 0
    for place in range(opening, len(code)):
        if code[place] in OPENING:
            depth += 1
        elif code[place] in CLOSING:
            depth -= 1
            if depth == 0:
                return place
    return None


def _top_level_commas(code: str, begin: int, end: int) -> Iterator[int]:
    depth = 0
    for place in range(begin, end):
        if code[place] in OPENING:
            depth += 1
        elif code[place] in CLOSING:
            depth -= 1
        elif code[place] == "," and depth == 0:
            yield place


def _operand_end(code: str, begin: int) -> int | None:
    """Where the operand that starts behind ``begin`` ends: a name or number, and its calls."""
    start = re.compile(r"\s+[-!*]?").match(code, begin)
    if start is None:
        return None
    place = start.end()
    if code[place] == "(":
        closing = _closing(code, place)
        place = closing + 1 if closing is not None else place
    else:
        name = re.compile(r"(?:\w|::|(?<=\w)\.(?=\w)|(?<=\w)<[\w:<>]+>(?=\())+").match(code, place)
        if name is None:
            return None
        place = name.end()
    while place < len(code):
        if code[place] in "([":
            closing = _closing(code, place)
            if closing is None:
                return None
            place = closing + 1
        elif member := re.compile(r"(?:\.|->|::)\w+").match(code, place):
            place = member.end()
        else:
            return place
    return None
