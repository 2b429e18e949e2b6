"""The report as one HTML page that fetches nothing: its style and its picture stand in it.

Every text that comes from a file is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ipo_ext import __version__

from .causes import Finding
from .extras import Missing
from .picture import as_svg
from .report import COLUMNS, MARKS, Report, cells, context, numbers_of
from .statistics import Band, Row

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5c6670; --line: #dfe3e8; --paper: #fff;
  --card: #f6f8fa; --sure: #d55e00; --alike: #0072b2; --clean: #009e73; --open: #7a828a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4ae; --line: #343b43;
  --paper: #14181c; --card: #1d2329; --sure: #ff8f3f; --alike: #6cb8f0; --clean: #3fcf9f; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); } .small { font-size: .87rem; }
ul.files { padding-left: 1.1rem; margin: .5rem 0; overflow-wrap: anywhere; }
.finding { border-left: .35rem solid var(--kind); background: var(--card); padding: .75rem 1rem;
  border-radius: .3rem; margin: .75rem 0; }
.finding b { font-size: 1.08rem; } .mark { color: var(--kind); font-size: .8rem; font-weight: 600;
  text-transform: uppercase; letter-spacing: .04em; }
.sure { --kind: var(--sure); } .alike { --kind: var(--alike); } .clean { --kind: var(--clean); }
.open { --kind: var(--open); }
.numbers { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); }
.numbers div { background: var(--card); border-radius: .3rem; padding: .6rem .8rem; }
.numbers strong { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.picture { background: #fff; border-radius: .3rem; padding: .5rem; overflow-x: auto; }
.picture svg { width: 100%; height: auto; min-width: 44rem; font-family: system-ui, sans-serif; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
td.text { text-align: left; white-space: normal; font-family: ui-monospace, monospace;
  font-size: .85rem; overflow-wrap: anywhere; min-width: 22rem; }
mark { background: var(--sure); color: #fff; border-radius: .2rem; padding: 0 .2rem; }
"""


def write_page(report: Report, path: Path) -> str | None:
    """Writes the page; returns what to tell the user if it has no picture."""
    why = None
    try:
        picture = f'<h2>Picture</h2><div class="picture">{as_svg(report)}</div>'
    except Missing as missing:
        picture, why = "", f"no picture: {missing}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(report, picture), encoding="utf-8")
    return why


def _page(report: Report, picture: str) -> str:
    parts = [
        _head(report),
        "<h2>What it looks like</h2>",
        *map(_finding, report.findings),
        "<h2>All tokens</h2>",
        _numbers(report),
        picture,
        "<h2>What a mask would drop</h2>",
        _bands(report.statistics.bands()),
        *(f"<h2>{_capital(title)}</h2>{_rows(rows)}" for title, rows in report.tables()),
        "<h2>The farthest tokens</h2>",
        _extremes(report),
        f'<p class="soft small">Made by ipo_ext {escape(__version__)}, '
        "<code>python -m ipo_ext mismatch</code>.</p>",
    ]
    title = "Mismatch of engine and trainer"
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n<h1>{title}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</html>\n"
    )


def _head(report: Report) -> str:
    lines = [str(found) for found in report.files]
    lines += [f"left out: {problem}" for problem in report.problems]
    if report.problem_count > len(report.problems):
        lines.append(f"and {report.problem_count - len(report.problems):,} more")
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<p>{escape(_capital(report.setting))}.</p><ul class="files soft small">{items}</ul>'


def _finding(finding: Finding) -> str:
    advice = f"<p>&rarr; {escape(finding.advice)}</p>" if finding.advice else ""
    return (
        f'<div class="finding {finding.certainty}"><div class="mark">'
        f"{escape(MARKS[finding.certainty])}</div><b>{escape(_capital(finding.title))}</b>"
        f'<p class="soft">{escape(finding.evidence)}</p>{advice}</div>'
    )


def _numbers(report: Report) -> str:
    cards = (
        f'<div><span class="soft small">{escape(name)}</span><strong>{escape(value)}</strong>'
        f'<span class="soft small">{escape(meaning)}</span></div>'
        for name, value, meaning in numbers_of(report.statistics)
    )
    return f'<div class="numbers">{"".join(cards)}</div>'


def _bands(bands: Sequence[Band]) -> str:
    shares = ([f"{share:.2%}" for share in (each.dropped, each.low, each.high)] for each in bands)
    rows = ([each.name, *of] for each, of in zip(bands, shares, strict=True))
    return _table(("mask", "dropped", "ratio too low", "ratio too high"), rows)


def _rows(rows: Sequence[Row]) -> str:
    return _table(("", *COLUMNS), ([row.name, *cells(row)] for row in rows))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{titles}</tr>{body}</table></div>'


def _extremes(report: Report) -> str:
    lines = []
    for extreme in report.statistics.extremes:
        before, token, after = map(escape, context(report, extreme))
        values = (
            f"{extreme.log_ratio:+.3f}",
            f"{extreme.inference_logprob:.2f}",
            f"{extreme.trainer_logprob:.2f}",
            f"{extreme.position:,}",
        )
        numbers = "".join(f"<td>{value}</td>" for value in values)
        where = f'<br><span class="soft">{escape(extreme.where)}</span>'
        lines.append(
            f'<tr>{numbers}<td class="text">{before}<mark>{token}</mark>{after}{where}</td></tr>'
        )
    head = "".join(f"<th>{name}</th>" for name in ("x", "engine", "trainer", "position"))
    return (
        f'<div class="wide"><table><tr>{head}<th style="text-align:left">text</th></tr>'
        f"{''.join(lines)}</table></div>"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
