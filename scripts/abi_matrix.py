"""The ABI matrix: one wheel, under every torch from the oldest that we support to the newest.

For each version a fresh environment with that torch as pip offers it and that one wheel; in it, the
smoke tests on the CPU and the emulated CUDA operators, which are likewise compiled once, by the
first environment. `--table docs/installing.md` writes the outcome where its markers are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from environments import ROOT, build_wheel, fresh_environment, run

VERSIONS = ("2.11", "2.12", "2.13", "2.14", "newest")
SMOKE = ("tests/builds/test_abi.py", "tests/api/test_smoke.py", "tests/api/test_diagnostics.py")
TEST_TOOLS = ("pytest", "hypothesis", "numpy")
BUILD_EMULATED = "from tests.emulator.operators import build_operators; print(build_operators())"
MARKERS = ("<!-- abi matrix -->", "<!-- end of abi matrix -->")


@dataclasses.dataclass(frozen=True)
class Row:
    """What was seen under one torch."""

    torch: str
    built_with: str
    python: str
    passed: int
    tests: int
    fakes: bool  # shapes of every operator on meta and fake CUDA tensors
    cuda_operators: int
    operators: int
    seconds: float

    @property
    def good(self) -> bool:
        return self.passed == self.tests and self.fakes and self.cuda_operators == self.operators


def environment(folder: Path, version: str, wheel: Path) -> Path:
    """The Python of a fresh environment with that torch and the wheel; one found there is kept."""
    python = folder / "bin" / "python"
    if not python.exists():
        fresh_environment(folder)
        torch = "torch" if version == "newest" else f"torch=={version}.*"
        run(python, "-m", "pip", "install", "--quiet", torch, *TEST_TOOLS)
    # Over a wheel of the same version too, whose dependencies, torch, are there.
    run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    return python


def check(python: Path, emulated: str, report: Path) -> Row:
    """Runs the smoke tests in an environment; their report stays in ``report``."""
    facts = json.loads(run(python, "-m", "ipo_ext", "info", "--json"))
    if not Path(facts["module"]).is_relative_to(python.parents[1]):
        raise SystemExit(f"expected the wheel's package, imported {facts['module']}")
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    variables = {"PYTHONDONTWRITEBYTECODE": "1", "IPO_EXT_EMULATED_LIBRARY": emulated}
    done = subprocess.run(
        [*map(str, command), *SMOKE],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    report.with_suffix(".log").write_text(done.stdout + done.stderr)
    suite = next(ElementTree.parse(report).iter("testsuite"))
    cases = {case.get("name", ""): len(case) == 0 for case in suite.iter("testcase")}
    fakes = [passed for name, passed in cases.items() if name.startswith("test_fakes")]
    return Row(
        torch=facts["torch"],
        built_with=facts["torch_at_build"],
        python=facts["python"],
        passed=sum(cases.values()),
        tests=len(cases),
        fakes=bool(fakes) and all(fakes),
        cuda_operators=sum("CUDA" in keys for keys in facts["operators"].values()),
        operators=len(facts["operators"]),
        seconds=float(suite.get("time", "nan")),
    )


def table(wheel: Path, rows: Sequence[Row]) -> str:
    """The outcome as Markdown."""
    head = (
        "torch that ran",
        "Python",
        "tests passed, CPU and emulated CUDA",
        "CUDA operators registered",
        "fakes trace",
    )
    cells = [
        (
            row.torch,
            row.python,
            f"{row.passed} of {row.tests}",
            f"{row.cuda_operators} of {row.operators}",
            "yes" if row.fakes else "**no**",
        )
        for row in rows
    ]
    lines = ["| " + " | ".join(line) + " |" for line in [head, ("---",) * len(head), *cells]]
    size = wheel.stat().st_size / 1e6
    made = f"`{wheel.name}`, {size:.1f} MB, compiled against torch {rows[0].built_with}:"
    return "\n".join([made, "", *lines])


def write_between_markers(file: Path, text: str) -> None:
    before, begin, rest = file.read_text().partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not begin or not end:
        raise SystemExit(f"{file}: expected the lines {MARKERS[0]} and {MARKERS[1]}")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="of torch (%(default)s)")
    parser.add_argument("--wheel", type=Path, help="check this file instead of building one")
    parser.add_argument("--folder", type=Path, help="keep environments (5 GB each) and logs here")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--table", type=Path, help="write the table here, between its markers")
    options = parser.parse_args()

    folder = (options.folder or Path(tempfile.mkdtemp(prefix="abi_matrix_"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = (options.wheel or build_wheel(folder)).resolve()
    rows: list[Row] = []
    emulated = ""
    for version in options.versions:
        python = environment(folder / version, version, wheel)
        emulated = emulated or run(python, "-c", BUILD_EMULATED).strip()
        rows.append(check(python, emulated, folder / f"{version}.xml"))
        print(rows[-1], flush=True)
        if not options.folder:
            shutil.rmtree(folder / version)
    print(table(wheel, rows))
    if options.json:
        content = {"wheel": wheel.name, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.table:
        write_between_markers(options.table, table(wheel, rows))
    sys.exit(not all(row.good for row in rows))


if __name__ == "__main__":
    main()
