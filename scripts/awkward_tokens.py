"""Writes docs/awkward-tokens.md's tables: what trainers' losses do with awkward tokens, and ours.

`python scripts/awkward_tokens.py` makes an environment for each package below, runs its real losses
there (scripts/awkward_hosts) on a CPU, and ours in this environment. `--venv` takes torch from an
existing environment, which is only read; environments are kept in build/ and used again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

from environments import ROOT, fresh_environment, over_existing, run

PAGE = ROOT / "docs" / "awkward-tokens.md"
MEASURE = ROOT / "scripts" / "awkward_hosts" / "measure.py"
BEGIN, END = "<!-- scripts/awkward_tokens.py writes from here", "<!-- to here -->"
TORCH = "torch==2.13.0"


@dataclasses.dataclass(frozen=True)
class Package:
    """What is measured, and what its losses import.

    ``alone`` is installed without its requirements, which need a GPU, another Python or much time.
    """

    title: str
    version: str
    distribution: str
    requirements: tuple[str, ...] = ()
    alone: bool = True
    ignores_python: bool = False

    @property
    def label(self) -> str:
        return f"{self.title} {self.version}"


# The versions, in this place alone.
PACKAGES = {
    "trl": Package("TRL", "1.16.0", "trl", alone=False),
    "verl": Package("verl", "0.9.1", "verl[verl-core]", ("pillow==13.0.0",), alone=False),
    "areal": Package(
        "AReaL",
        "1.0.4",
        "areal",
        (
            *("aiofiles==25.1.0", "aiohttp==3.14.5", "colorlog==6.12.0", "einops==0.8.2"),
            *("flask==3.1.3", "httpx==0.28.1", "hydra-core==1.3.8", "lark==1.3.1", "numba==0.68.1"),
            *("openai==3.57.0", "orjson==3.13.0", "pillow==13.0.0", "pyyaml==6.0.4", "ray==2.60.0"),
            *("tenacity==9.2.1", "torchdata==0.11.0", "transformers==5.24.0", "uvloop==0.23.0"),
        ),
    ),
    "liger": Package("Liger", "0.8.5", "liger-kernel", ("transformers==5.10.4",)),
    "openrlhf": Package("OpenRLHF", "0.11.2", "openrlhf"),
    "skyrl": Package(
        "SkyRL",
        "0.4.0",
        "skyrl",
        (
            *("cloudpathlib==0.26.0", "jaxtyping==0.3.11", "loguru==0.7.3", "numpy"),
            *("omegaconf==2.4.0", "ray==2.60.0", "skyrl-gym==0.4.0"),
        ),
        ignores_python=True,
    ),
    "torchrl": Package(
        "torchrl",
        "0.14.1",
        "torchrl",
        ("cloudpickle==3.1.3", "pyvers==0.2.3", "tensordict==0.14.1"),
    ),
}

TABLES = {
    "An active token whose sampling log-probability is": ("-inf", "NaN", "0", "a ratio of 50"),
    "Outside of the mask": (
        "masked NaN",
        "masked -1e4",
        "more padding",
        "everything masked",
        "no rows",
    ),
}


def environment_of(name: str, folder: Path, existing: Path | None) -> Path:
    """The Python of the package's environment, made where it is not there yet."""
    package = PACKAGES[name]
    home = folder / f"{name}-{package.version}"
    ready = home / "ready"  # holds what was installed
    if not ready.exists() or ready.read_text() != str(package):
        print(f"{package.label}: making {home}", flush=True)
        python = over_existing(home, existing) if existing else fresh_environment(home)
        pip = (python, "-m", "pip", "install", "--quiet")
        run(*pip, TORCH, *package.requirements)
        how = ["--no-deps"] * package.alone + ["--ignore-requires-python"] * package.ignores_python
        run(*pip, *how, f"{package.distribution}=={package.version}")
        ready.write_text(str(package))
    return home / "bin" / "python"


def answers_of(name: str, python: str | Path) -> dict[str, dict]:
    print(f"{name}: measuring", flush=True)
    command = [python, MEASURE, f"host_{name}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def rows_of(label: str, losses: dict[str, dict[str, str]], cases: tuple[str, ...]) -> list[str]:
    return [
        row(f"{label}, {loss}", *(words[case] for case in cases)) for loss, words in losses.items()
    ]


def tables(answers: dict[str, dict[str, dict]]) -> str:
    """Of each package's label its answers, as the page shows them."""
    parts = []
    for title, cases in TABLES.items():
        lines = [row(title, *cases), row(*["---"] * (1 + len(cases)))]
        for label, answer in answers.items():
            lines += rows_of(label, answer["losses"], cases)
        parts.append("\n".join(lines))
    lines = [row("A token id beyond the vocabulary", ""), row("---", "---")]
    for label, answer in answers.items():
        lines += [row(f"{label}, {name}", words) for name, words in answer["logprobs"].items()]
    return "\n\n".join([*parts, "\n".join(lines)])


def write(page: Path, text: str) -> None:
    before, _, after = re.split(
        f"({re.escape(BEGIN)}.*?{re.escape(END)})", page.read_text(), flags=re.S
    )
    page.write_text(f"{before}{BEGIN} -->\n\n{text}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, help="take torch from this environment")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "awkward_tokens")
    options = parser.parse_args()
    existing = options.venv and options.venv.resolve()
    answers = {
        package.label: answers_of(name, environment_of(name, options.environments, existing))
        for name, package in PACKAGES.items()
    }
    answers["ipo_ext"] = answers_of("ipo_ext", sys.executable)
    torch = importlib.metadata.version("torch")
    when = f"Measured on {datetime.date.today()}, torch {torch}, on a CPU in float32."
    write(PAGE, f"{when}\n\n{tables(answers)}")


if __name__ == "__main__":
    main()
