"""The page and the picture: they show what was measured, fetch nothing and run nothing."""

from __future__ import annotations

import html.parser
import re
import struct
import sys
from pathlib import Path

import pytest

from ipo_ext.mismatch import picture
from ipo_ext.mismatch.report import Report, speller
from tests.mismatch.conftest import Run
from tests.mismatch.planted import Sampled, rounded, written
from tests.mismatch.test_statistics import measured, rollouts


@pytest.fixture
def hostile(sampled: Sampled, tmp_path: Path) -> Path:
    """Rollouts that have all tables, and names that are markup."""
    logprobs = sampled.logprobs()
    rows = sampled.rows(rounded(logprobs, 0.3))
    for number, (row, trainer) in enumerate(zip(rows, logprobs.tolist(), strict=True)):
        row["trainer_logprobs"] = trainer
        row["version"] = str(number // 10)
        row["environment"] = f"<script>alert({number % 2})</script>"
    return written(tmp_path / "a <b> & c", rows)


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_a_page_stands_alone_and_shows_markup_as_text(
    run: Run, hostile: Path, tmp_path: Path
) -> None:
    output = run(hostile, "--html", tmp_path / "new" / "page.html")
    assert output.status == 0
    text = (tmp_path / "new" / "page.html").read_text()
    tags = Tags()
    tags.feed(text)
    names = {name for name, _ in tags.seen}
    assert {"svg", "table", "mark"} <= names
    assert not names & {"script", "link", "img", "iframe", "b>"}
    fetched = [
        value
        for _, attributes in tags.seen
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href") and not (value or "").startswith("#")
    ]
    assert fetched == []
    assert "&lt;script&gt;alert(0)&lt;/script&gt;" in text
    assert "a &lt;b&gt; &amp; c" in text


def test_a_page_has_what_the_text_has(run: Run, hostile: Path, tmp_path: Path) -> None:
    output = run(hostile, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    (alike,) = output.findings("one of several that look alike")
    assert alike[1:] in page
    for heading in ("By version of the weights", "By environment", "By position in the answer"):
        assert f"<h2>{heading}</h2>" in page
    k3 = re.search(r"^  k3 +(\S+)", output.text, re.MULTILINE)
    assert k3
    assert f"<strong>{k3[1]}</strong>" in page
    assert page.count("<mark>") == 20


def test_a_page_without_matplotlib_says_so(
    run: Run, hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = run(hostile, "--html", tmp_path / "page.html")
    assert output.status == 0
    assert "no picture: matplotlib: the picture needs it" in output.text
    assert "<svg" not in (tmp_path / "page.html").read_text()
    output = run(hostile, "--png", tmp_path / "picture.png")
    assert output.status == 1
    assert 'pip install "ipo_ext[mismatch]"' in output.errors


def test_a_picture_is_written(run: Run, hostile: Path, tmp_path: Path) -> None:
    run(hostile, "--png", tmp_path / "new" / "picture.png")
    content = (tmp_path / "new" / "picture.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1650, 1110)


def test_the_bars_are_the_tokens() -> None:
    statistics = measured(rollouts())
    report = Report("", [], [], 0, statistics, [], speller(None))
    distribution, *others = picture._figure(report).axes
    bars = distribution.patches
    assert sum(bar.get_width() * bar.get_height() for bar in bars) == pytest.approx(100)
    outside = [bar for bar in bars if bar.get_facecolor()[0] > 0.5 and bar.get_height()]
    assert outside, "some of these tokens lie outside the default band"
    logprobs, versions, bands = others
    expected = [row.measured.deviation for row in statistics.rows("logprob")]
    assert [bar.get_height() for bar in logprobs.patches] == pytest.approx(expected)
    assert versions.get_xlabel() == "version of the weights"
    shown = [text.get_text() for text in bands.texts][::-1]
    assert shown == [f"{band.dropped:.2%}" for band in statistics.bands()]
