"""The recipes of docs/dev/recipes.md hold: their patches apply and touch the files that they list,
and what is built of them computes what it should, on the CPU and emulated."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.support import scratch

PAGE = scratch.ROOT / "docs" / "dev" / "recipes.md"

RECIPES = ("a setting", "a metric", "a mask rule", "an input of each token")  # with a patch

# What runs in the copy: the toys, and the tests that each recipe says to run, as far as they are
# quick.
TESTS = (
    "tests/builds/recipe_toys.py",
    "tests/api/test_config.py",
    "tests/api/test_diagnostics.py::test_every_rule_and_every_shape_of_rows_is_verified",
    "tests/pytorch/test_schemas.py",
    "tests/api/test_signatures.py",
    "tests/loss/test_properties.py::test_any_case_matches_the_reference",
    "tests/loss/test_from_logprobs.py::test_matches_the_reference_per_segment",
    "tests/loss/test_metrics.py::test_names_are_the_references",
    "tests/loss/test_metrics.py::test_total_of_segments_is_the_unpacked",
    "tests/loss/test_mask_rules.py::test_equals_the_reference",
    "tests/loss/test_mask_rules.py::test_any_tokens_equal_the_reference",
    "tests/loss/test_mask_rules.py::test_from_logits_the_same",
    "tests/loss/test_mask_rules.py::test_a_config_that_makes_no_sense_is_refused",
)


def recipe(name: str) -> str:
    """The section of the page."""
    return re.search(rf"^## Add {name}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)[1]


def patches(text: str) -> list[str]:
    return re.findall(r"^```diff\n(.*?)^```$", text, re.M | re.S)


def files_listed(text: str) -> set[str]:
    """Those that begin an item of a list, or a sentence of one."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    items = re.findall(r"^(?:\d\.|-) (.*?)(?=\n\n|^\d\.|^- )", prose, re.M | re.S)
    return {path for item in items for path in re.findall(r"`([\w/.]+/[\w.]+\.\w+)`", item)}


def files_changed(patch: str) -> list[str]:
    return re.findall(r"^\+\+\+ (\S+)$", patch, re.M)


def places(patch: str) -> int:
    return len(re.findall(r"^@@ ", patch, re.M))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_lists_the_files_that_it_changes(name: str) -> None:
    text = recipe(name)
    assert {file for patch in patches(text) for file in files_changed(patch)} == files_listed(text)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_costs_what_it_says(name: str) -> None:
    text = recipe(name)
    price = re.search(r"Price: (\d+) places in (\d+) files?\b", text)
    code, beside = patches(text)
    assert (places(code), len(files_changed(code))) == (int(price[1]), int(price[2]))
    assert all(file.startswith(("csrc/", "python/")) for file in files_changed(code))
    beside_code = ("docs/", "scripts/", "tests/", "python/ipo_ext/")  # of these, see the next test
    assert all(file.startswith(beside_code) for file in files_changed(beside))


def test_what_stands_beside_the_code_changes_docstrings_alone(tmp_path: Path) -> None:
    scratch.copy_to(tmp_path)
    for name in RECIPES:
        code, beside = patches(recipe(name))
        apply(code, tmp_path)
        before = statements(tmp_path)
        apply(beside, tmp_path)
        assert statements(tmp_path) == before


def statements(root: Path) -> dict[str, str]:
    """The package's code by file, without its docstrings; the reference is no part of it."""
    files = sorted((root / "python" / "ipo_ext").rglob("*.py"))
    return {str(file): code_in(file.read_text()) for file in files if file.stem != "reference"}


def code_in(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        first = node.body[0] if getattr(node, "body", None) and hasattr(node, "name") else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            del node.body[0]
    return ast.dump(tree)


def test_the_recipes_build_and_run(tmp_path: Path) -> None:
    scratch.copy_to(tmp_path)
    for name in RECIPES:
        for patch in patches(recipe(name)):
            apply(patch, tmp_path)
    scratch.build_package(tmp_path)
    library = scratch.build_emulated(tmp_path)
    done = scratch.run_tests(tmp_path, library, TESTS)
    assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-2000:]}"


def apply(patch: str, root: Path) -> None:
    command = ["git", "apply", "-p0", "--whitespace=error", "-"]
    done = subprocess.run(command, cwd=root, input=patch, capture_output=True, text=True)
    assert done.returncode == 0, f"{PAGE.name}: {done.stderr}{patch}"


def test_a_file_that_is_not_listed_is_seen() -> None:
    text = "1. `csrc/math/a.h`: words.\n\n```diff\n--- csrc/b.h\n+++ csrc/b.h\n@@ -1 +1 @@\n```\n"
    assert files_listed(text) == {"csrc/math/a.h"}
    assert files_changed(patches(text)[0]) == ["csrc/b.h"]
    assert places(patches(text)[0]) == 1


def test_what_is_no_docstring_is_seen() -> None:
    source = 'def f(a: int) -> int:\n    """Words."""\n    return a\n'
    assert code_in(source) == code_in(source.replace("Words", "Others"))
    assert code_in(source) != code_in(source.replace("return a", "return -a"))
    assert code_in(source) != code_in(source.replace("a: int", "a: int = 0"))
