"""The version, by git's tags: v1.2.3 is 1.2.3, five commits later 1.2.3.post0.dev5+g1a2b3c4d5.

scikit-build-core asks for it. In a source distribution it is the one written there. A module of our
own, so that building without a network needs no further package.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEFORE_THE_FIRST_TAG = "0.1.0"
UNKNOWN = "0+unknown"  # an archive made by neither git nor pip


def dynamic_metadata(field: str, settings: Mapping[str, object] | None = None) -> str:
    """What scikit-build-core calls for `dynamic = ["version"]`."""
    assert field == "version", f"expected version, got {field}"
    return from_git(ROOT) or from_sdist(ROOT) or UNKNOWN


def from_git(root: Path) -> str | None:
    if not (root / ".git").exists():  # not the repository that an archive was unpacked in
        return None
    described = git(root, "describe", "--tags", "--long", "--abbrev=9", "--match=v[0-9]*")
    if described:
        tag, commits, commit = described.rsplit("-", 2)
        return tag[1:] if commits == "0" else f"{tag[1:]}.post0.dev{commits}+{commit}"
    commits, commit = (
        git(root, *command)
        for command in (("rev-list", "--count", "HEAD"), ("rev-parse", "--short=9", "HEAD"))
    )
    return f"{BEFORE_THE_FIRST_TAG}.dev{commits}+g{commit}" if commit else None


def from_sdist(root: Path) -> str | None:
    info = root / "PKG-INFO"
    found = info.exists() and re.search(r"^Version: (\S+)$", info.read_text(), re.MULTILINE)
    return found[1] if found else None


def git(root: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
