"""Builds one wheel and runs the smoke tests with that same file under several versions of torch.

`python scripts/check_wheel.py` makes a fresh environment for each version. `--venv` (repeatable)
takes torch and the test tools from an existing environment instead, which it leaves as it is: the
fresh environment only reads its packages.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("2.11", "2.13", "newest")
SMOKE = ("tests/test_abi.py", "tests/test_smoke.py")
FACTS = (
    "import torch, ipo_ext; from ipo_ext import _C; print('FACTS', torch.__version__, "
    "_C.TORCH_AT_BUILD, ','.join(_C.CUDA_ARCHITECTURES) or 'none', ipo_ext.__file__)"
)


class Row(NamedTuple):
    asked: str
    torch: str
    built_with: str
    cuda: str
    result: str
    passed: bool


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, **options
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build_wheel(folder: Path, isolated: bool) -> Path:
    flags = [] if isolated else ["--no-build-isolation"]
    run(sys.executable, "-m", "pip", "wheel", *flags, "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.glob("ipo_ext-*.whl")
    return wheel


def site_packages(python: Path) -> Path:
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def fresh_environment(folder: Path, wheel: Path) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    return python


def with_version(folder: Path, wheel: Path, version: str) -> Path:
    """A fresh environment with that torch, the test extra and the wheel."""
    python = fresh_environment(folder, wheel)
    torch = "torch" if version == "newest" else f"torch=={version}.*"
    run(python, "-m", "pip", "install", "--quiet", torch, f"ipo_ext[test] @ {wheel.as_uri()}")
    return python


def over_existing(folder: Path, wheel: Path, existing: Path) -> Path:
    """A fresh environment with the wheel that reads all else from an existing one."""
    python = fresh_environment(folder, wheel)
    path = site_packages(existing / "bin" / "python")
    (site_packages(python) / "existing.pth").write_text(f"{path}\n")
    return python


def smoke(python: Path, asked: str, log: Path) -> Row:
    facts = run(python, "-c", FACTS).split("FACTS ")[1].split()
    torch, built_with, cuda, where = facts
    if not Path(where).is_relative_to(python.parents[1]):
        raise SystemExit(f"{asked}: expected the wheel's package, imported {where}")
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *SMOKE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    log.write_text(done.stdout + done.stderr)
    summary = re.findall(r"^.*(?:passed|failed|error).*$", done.stdout, re.MULTILINE)
    result = summary[-1].strip("= ") if summary else f"no result, see {log}"
    return Row(asked, torch, built_with, cuda, result, done.returncode == 0)


def print_table(rows: list[Row]) -> None:
    table = [
        ("asked for", "torch", "built with", "CUDA", "smoke tests"),
        *(row[:5] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", help=f"of torch; default {' '.join(VERSIONS)}")
    parser.add_argument("--venv", type=Path, action="append", default=[], help="use its torch")
    parser.add_argument("--wheel", type=Path, help="check this file instead of building one")
    parser.add_argument("--no-build-isolation", action="store_true", help="build with this Python")
    parser.add_argument("--folder", type=Path, help="keep environments and logs here")
    options = parser.parse_args()
    versions = options.versions or ([] if options.venv else VERSIONS)

    folder = (options.folder or Path(tempfile.mkdtemp(prefix="check_wheel_"))).resolve()
    wheel = options.wheel or build_wheel(folder, isolated=not options.no_build_isolation)
    print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB; logs in {folder}", flush=True)
    environments = [(version, with_version, version) for version in versions]
    environments += [(path.name, over_existing, path.resolve()) for path in options.venv]
    rows = []
    for name, make, source in environments:
        python = make(folder / name, wheel.resolve(), source)
        rows.append(smoke(python, name, folder / f"{name}.log"))
        print(f"{name}: {rows[-1].result}", flush=True)
    print_table(rows)
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
