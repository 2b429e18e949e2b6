"""The version by tags, in a repository, in an archive and in a source distribution."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import ipo_ext

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "version.py"


@pytest.fixture(scope="module")
def version() -> ModuleType:
    spec = importlib.util.spec_from_file_location("version", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(folder: Path, *command: str) -> None:
    who = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    subprocess.run(["git", *who, *command], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "commit", "--quiet", "--allow-empty", "--message=work")


def test_before_the_first_tag(version: ModuleType, repository: Path) -> None:
    commit(repository)
    assert re.fullmatch(r"0\.1\.0\.dev2\+g[0-9a-f]{9}", version.from_git(repository))


@pytest.mark.parametrize("tag", ["v1.2.3", "v2.0.0rc1"])
def test_at_and_after_a_tag(version: ModuleType, repository: Path, tag: str) -> None:
    git(repository, "tag", tag)
    git(repository, "tag", "nightly")
    assert version.from_git(repository) == tag[1:]
    commit(repository)
    expected = re.escape(f"{tag[1:]}.post0.dev1+g") + "[0-9a-f]{9}"
    assert re.fullmatch(expected, version.from_git(repository))


def test_an_archive_inside_a_repository_is_not_it(version: ModuleType, repository: Path) -> None:
    archive = repository / "unpacked"
    archive.mkdir()
    assert version.from_git(archive) is None
    assert version.from_sdist(archive) is None
    (archive / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: ipo_ext\nVersion: 1.2.3\n")
    assert version.from_sdist(archive) == "1.2.3"


def test_the_installed_version_is_valid() -> None:
    assert re.fullmatch(r"\d+(\.\d+)*(rc\d+)?(\.post0)?(\.dev\d+)?(\+\w+)?", ipo_ext.__version__)
