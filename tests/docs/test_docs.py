"""README and docs are true: their Python runs, their paths exist, their links lead somewhere."""

from __future__ import annotations

import contextlib
import doctest
import fnmatch
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ipo_ext
from tests.docs.page_blocks import ROOT, Block, blocks_in, blocks_of_page, pages
from tests.docs.preludes import OF_PAGE, docstrings, namespace_of

sys.path.insert(0, str(ROOT / "scripts"))

from test_integrations import HOSTS

# ---------------------------------------------------------------------------------------------
# Python blocks


@pytest.mark.parametrize("page", pages())
def test_the_blocks_of_a_page_run_and_print_what_it_shows(page: str) -> None:
    with contextlib.ExitStack() as until_the_end:
        namespace = namespace_of(page, until_the_end)
        for block in blocks_of_page(page):
            if block.host is None:
                block.run(namespace)


def test_a_block_that_is_not_run_here_is_run_in_its_hosts_environment() -> None:
    hosts = {block.host for page in pages() for block in blocks_of_page(page)} - {None}
    assert hosts, "expected at least TRL's and verl's blocks in docs/integrations.md"
    for host in hosts:
        assert host in HOSTS, f"{host}: expected one of scripts/test_integrations.py's hosts"
        tests = (ROOT / "tests" / "integrations" / f"test_{host}.py").read_text()
        assert f'blocks_of_host("{host}")' in tests


def test_the_guides_table_has_a_row_for_each_host() -> None:
    guide = (ROOT / "docs" / "integrations.md").read_text()
    rows = re.findall(r"^\| ([\w.-]+) \| .* \| \d+ \| \S+ \| \S+ \|$", guide, re.MULTILINE)
    assert rows == list(HOSTS)


def test_every_page_with_a_prelude_is_there() -> None:
    assert set(OF_PAGE) <= set(pages())


@pytest.mark.parametrize("name", [name for name in ipo_ext.__all__ if name != "__version__"])
def test_the_examples_of_a_docstring_run(name: str) -> None:
    namespace = docstrings()
    text = inspect.getdoc(getattr(ipo_ext, name)) or ""
    for example in doctest.DocTestParser().get_examples(text):
        exec(compile(example.source, f"{name}'s docstring", "exec"), namespace)


def parsed(text: str) -> list[Block]:
    return list(blocks_in("page.md", text))


def test_blocks_outputs_and_hosts_are_found() -> None:
    text = (
        "```python\nprint(1)\n```\n\n```text\n1\n```\n"
        "words\n\n<!-- host: trl -->\n```python\nimport trl\n```\n"
        "```bash\nls\n```\n```text\nnot its output\n```\n"
    )
    first, second = parsed(text)
    assert (first.line, first.source, first.prints, first.host) == (2, "print(1)\n", "1\n", None)
    assert (second.line, second.host, second.prints) == (12, "trl", None)


def test_a_block_that_fails_or_prints_something_else_is_seen() -> None:
    (wrong,) = parsed("```python\nprint(2)\n```\n```text\n1\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:2: it prints something else"):
        wrong.run({})
    (undefined,) = parsed("```python\nundefined\n```\n")
    with pytest.raises(NameError):
        undefined.run({})


def test_a_marker_that_says_nothing_known_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"page\.md:3: expected the marker host, got hots"):
        parsed("<!-- hots: trl -->\n```python\n1\n```\n")


# ---------------------------------------------------------------------------------------------
# Names


def test_the_reference_has_every_public_name() -> None:
    directives = r"^\.\. auto(?:function|class|module|data):: (\S+)"
    page = (ROOT / "docs" / "api.md").read_text()
    documented = {name.removeprefix("ipo_ext.") for name in re.findall(directives, page, re.M)}
    public = set(ipo_ext.__all__) - {"__version__"}
    assert public <= documented, f"docs/api.md: expected {sorted(public - documented)} too"


def test_every_metric_is_defined() -> None:
    page = (ROOT / "docs" / "math.md").read_text()
    table = page[page.index("## Metrics") : page.index("## Numerics")]
    defined = set(
        re.findall(r"`(\w+)`", table.replace("`..._negative`", "`masked_advantage_negative`"))
    )
    assert set(ipo_ext.IPOMetrics.MEAN_ROWS) <= defined


# ---------------------------------------------------------------------------------------------
# Paths and links, in every page of the tree


def tracked() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


FILES = tracked()
FOLDERS = {str(parent) for name in FILES for parent in Path(name).parents} - {"."}
MARKDOWN = [name for name in FILES if name.endswith(".md")]

CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")
SOURCE = re.compile(r"\w\.(cff|cpp|cu|cuh|h|md|py|pyi|sh|toml|txt|yml)$")

# What a reader writes, or a command makes. JSON and pictures without a folder are not looked for.
MADE = {"build/docs", "build/", "my_loss.py"}


def is_there(path: str) -> bool:
    """Whether a path, a pattern, or the end of a path names something in the tree."""
    wanted = path.rstrip("/").replace("../", "")
    return any(
        fnmatch.fnmatchcase(name, pattern)
        for pattern in (wanted, f"*/{wanted}")
        for name in (*FILES, *FOLDERS)
    )


def paths_in(text: str) -> set[str]:
    """What reads as a path of this tree in the code of a page."""
    words = {word.rstrip(".") for code in CODE.findall(text) for word in PATH.findall(code)}
    folders = {folder for folder in FOLDERS if "/" not in folder}
    return {
        word
        for word in words
        if SOURCE.search(word) or ("/" in word and word.split("/")[0] in folders)
    }


@pytest.mark.parametrize("page", MARKDOWN)
def test_every_path_that_a_page_names_exists(page: str) -> None:
    missing = [path for path in paths_in((ROOT / page).read_text()) if not is_there(path)]
    assert sorted(set(missing) - MADE) == []


@pytest.mark.parametrize("page", MARKDOWN)
def test_every_benchmark_that_a_page_runs_exists(page: str) -> None:
    modules = re.findall(r"python -m (benchmarks[\w.]*)", (ROOT / page).read_text())
    paths = [module.replace(".", "/") for module in modules]
    assert [p for p in paths if not {f"{p}.py", f"{p}/__main__.py"} & set(FILES)] == []


def links_in(text: str) -> list[str]:
    prose = CODE.sub("", text)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]


def anchors_of(page: str) -> set[str]:
    """As GitHub makes them of headings: small letters and hyphens."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", MARKDOWN)
def test_every_link_leads_somewhere(page: str) -> None:
    for link in links_in((ROOT / page).read_text()):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors_of(str(target.resolve().relative_to(ROOT))), f"{page}: {link}"


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("in `csrc/math/nowhere.h`", True),
        ("`python benchmarks/nowhere.py --quick`", True),
        ("```\npython scripts/nowhere.py\n```", True),
        ("`csrc/nowhere/`", True),
        ("`csrc/math/`, `csrc/math/token_loss.h` and `token_loss.h`", False),
        ("`tests/integrations/test_*.py`, `a/b` and `1.5`", False),
    ],
)
def test_a_path_that_is_not_there_is_seen(text: str, missing: bool) -> None:
    assert any(not is_there(path) for path in paths_in(text)) == missing


def test_links_and_anchors_are_read_as_github_reads_them() -> None:
    assert links_in("[a](b.md#c) `[d](e)` [f](https://g.h)") == ["b.md#c"]
    assert {"under-torchs-machinery", "one-wheel-for-every-torch"} <= anchors_of(
        "docs/installing.md"
    )


def test_the_readme_is_short_and_has_the_command_that_ci_takes_from_it() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150
    assert any(re.fullmatch(r"pip install .*test.*pytest.*", line) for line in lines)


def glossary() -> list[tuple[str, list[str]]]:
    """Each code word that the glossary explains, with the files and folders that it names."""
    rows = re.findall(
        r"^\| (.+?) \| .+ \| (.+?) \|$", (ROOT / "docs/dev/glossary.md").read_text(), re.M
    )
    return [
        (word, re.findall(r"`([^`]+)`", places))
        for terms, places in rows
        for word in re.findall(r"`(\w+)`", terms)
    ]


@pytest.mark.parametrize(("word", "places"), glossary(), ids=lambda value: str(value))
def test_a_word_of_the_glossary_is_used_where_it_says(word: str, places: list[str]) -> None:
    assert any(word in (ROOT / place).read_text() for place in places if (ROOT / place).is_file())
