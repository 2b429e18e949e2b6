"""Wheels of this checkout, and fresh environments to try them in: what the other scripts share."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path) -> str:
    """What the command prints; ends the script with it, and with the errors, where it fails."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build_wheel(folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.glob("ipo_ext-*.whl")
    return wheel


def fresh_environment(folder: Path) -> Path:
    """The Python of a new environment with nothing but pip."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def over_existing(folder: Path, existing: Path) -> Path:
    """The same, which reads all that it lacks from an environment that it leaves as it is."""
    python = fresh_environment(folder)
    packages = site_packages(existing / "bin" / "python")
    # addsitedir also follows the paths that the environment itself reads others by.
    line = f"import site; site.addsitedir({str(packages)!r})\n"
    (site_packages(python) / "existing.pth").write_text(line)
    return python


def site_packages(python: Path) -> Path:
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
