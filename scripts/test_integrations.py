"""Tests the integrations inside the real trainers, each in an environment of its own.

`python scripts/test_integrations.py` builds a CPU wheel, installs it with each trainer into a fresh
environment, since their requirements conflict, and runs that trainer's tests there. `--venv` takes
torch from an existing environment, which is only read; otherwise the newest torch is installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import ROOT, build_wheel, fresh_environment, over_existing, run

# Extras of the package, each with tests/integrations/test_<host>.py.
HOSTS = ("skyrl", "torchtitan", "trl", "verl")
NIGHTLY_HOSTS = ("deepspeed", "lightning", "transformers")  # hosts without an adapter, where named
TESTS = "tests/integrations"


def environment_of(host: str, folder: Path, wheel: Path, existing: Path | None) -> Path:
    python = over_existing(folder, existing) if existing else fresh_environment(folder)
    run(python, "-m", "pip", "install", "--quiet", f"ipo_ext[{host}] @ {wheel.as_uri()}", "pytest")
    return python


def passes(host: str, python: Path) -> bool:
    # Without the fixtures of tests/conftest.py, which need the test extra.
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={TESTS}"]
    print(f"--- {host}", flush=True)
    return subprocess.run([*command, f"{TESTS}/test_{host}.py"], cwd=ROOT).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", nargs="*", help=f"default {' '.join(HOSTS)}")
    parser.add_argument("--venv", type=Path, help="take torch from this environment")
    parser.add_argument("--wheel", type=Path, help="test this file instead of building one")
    options = parser.parse_args()
    known = (*HOSTS, *NIGHTLY_HOSTS)
    if unknown := set(options.hosts) - set(known):
        parser.error(f"hosts: expected {', '.join(known)}, got {', '.join(sorted(unknown))}")
    existing = options.venv and options.venv.resolve()

    os.environ["IPO_EXT_CUDA"] = "OFF"
    with tempfile.TemporaryDirectory(prefix="test_integrations_") as temporary:
        folder = Path(temporary)
        wheel = (options.wheel or build_wheel(folder)).resolve()
        passed = [
            passes(host, environment_of(host, folder / host, wheel, existing))
            for host in options.hosts or HOSTS
        ]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
