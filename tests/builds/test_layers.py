"""The layers of the source tree: includes and imports point one way; no file names a registry."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "ipo_ext"

# A layer to those that it may include. A header in <> without a folder or extension is standard.
MAY_INCLUDE = {
    "math": {"math"},
    "kernels": {"kernels", "math"},
    "ops": {"ops", "kernels", "math"},
    "bindings.cpp": {"kernels", "math"},
}
# Other headers in <>, by the folder whose files alone may include them.
OTHERS = {
    "cuda_runtime.h": "kernels/cuda",
    "cuda_fp16.h": "kernels/cuda",
    "cuda_bf16.h": "kernels/cuda",
    "immintrin.h": "math/simd.h",  # the compiler's own, for x86-64
    "torch/csrc/stable/": "ops",
    "torch/csrc/inductor/aoti_torch/c/": "ops",
    "torch/headeronly/": "ops",
    "pybind11/": "bindings.cpp",
}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def objection(file: str, opening: str, header: str) -> str | None:
    """What is wrong with ``#include`` of ``header`` in ``csrc/<file>``, if anything is."""
    if opening == '"':
        layer = header.split("/")[0]
        allowed = layer in MAY_INCLUDE[file.split("/")[0]]
        if allowed and header.startswith("kernels/cuda/") and not file.startswith("kernels/cuda/"):
            return f"{file}: only kernels/cuda includes {header}"
        if allowed and header.startswith("kernels/cpu/") and not file.startswith("kernels/cpu/"):
            return f"{file}: only kernels/cpu includes {header}"
        return None if allowed else f"{file}: must not include {header}"
    if re.fullmatch(r"[a-z_0-9]+", header):
        return None
    owners = [folder for prefix, folder in OTHERS.items() if header.startswith(prefix)]
    if any(file == folder or file.startswith(f"{folder}/") for folder in owners):
        return None
    return f"{file}: must not include {header}"


def sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_point_one_way(path: Path) -> None:
    file = path.relative_to(CSRC).as_posix()
    found = [objection(file, *match) for match in INCLUDE.findall(path.read_text())]
    assert [text for text in found if text] == []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(CSRC)))
def test_an_include_names_a_file_of_the_tree(path: Path) -> None:
    quoted = [header for mark, header in INCLUDE.findall(path.read_text()) if mark == '"']
    assert [header for header in quoted if not (CSRC / header).is_file()] == []


@pytest.mark.parametrize(
    ("file", "opening", "header"),
    [
        ("math/token_loss.h", '"', "kernels/ipo_loss.h"),
        ("math/token_loss.h", "<", "torch/headeronly/core/ScalarType.h"),
        ("math/token_loss.h", "<", "cuda_runtime.h"),
        ("kernels/ipo_loss.h", '"', "ops/check.h"),
        ("kernels/ipo_loss.h", "<", "cuda_runtime.h"),
        ("kernels/cpu/ipo_loss.cpp", "<", "cuda_runtime.h"),
        ("kernels/cpu/ipo_loss.cpp", '"', "kernels/cuda/common/reduce.cuh"),
        ("kernels/cuda/ipo_loss/ipo_loss.cu", "<", "torch/csrc/stable/tensor.h"),
        ("ops/register.cpp", '"', "kernels/cuda/common/platform.cuh"),
        ("ops/register.cpp", "<", "torch/extension.h"),
        ("ops/register.cpp", "<", "ATen/ATen.h"),
        ("ops/register.cpp", "<", "pybind11/pybind11.h"),
        ("bindings.cpp", "<", "torch/csrc/stable/tensor.h"),
        ("bindings.cpp", '"', "ops/check.h"),
    ],
)
def test_a_wrong_include_is_seen(file: str, opening: str, header: str) -> None:
    assert objection(file, opening, header)


# ---------------------------------------------------------------------------------------------
# Python's layers


def imports_of(module: str) -> set[str]:
    """The modules of ipo_ext that a module of ipo_ext imports, wherever in its text.

    A module of a folder is named with it: ``_ops.arguments``.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(file_of(module).read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {
        module_of(name.removeprefix("ipo_ext.")) for name in found if name.startswith("ipo_ext.")
    }


def file_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def module_of(name: str) -> str:
    """The module that ``name`` is, or of which it is a part."""
    folder, _, rest = name.partition(".")
    inner = f"{folder}.{rest.split('.')[0]}"
    return inner if file_of(inner).is_file() else folder


def reachable(module: str) -> set[str]:
    """Every module that importing ``module`` needs, the package's own ``__init__`` aside."""
    seen: set[str] = set()
    waiting = {module}
    while waiting:
        current = waiting.pop()
        seen.add(current)
        if file_of(current).is_file():
            waiting |= imports_of(current) - seen
    return seen - {module}


OPERATORS = {"_C", "_ops.library", "_ops.checks", "functional", "metrics", "modules"}


def test_the_reference_knows_nothing_of_the_operators() -> None:
    assert reachable("reference") & OPERATORS == set()
    assert "ops." not in (PACKAGE / "reference.py").read_text()


def test_python_imports_point_one_way() -> None:
    settings = {"_numbers", "_prime_rl_sections", "_sequence_rules"}
    assert reachable("config") == settings
    settings = {*settings, "config"}
    assert reachable("output") == {"_ops.torch_internals"}
    assert reachable("_ops.torch_internals") == set()
    assert reachable("_ops.library") == set()
    assert reachable("_ops.arguments") == settings
    assert reachable("_precision") == set()
    assert reachable("_optional_tensors") == set()
    assert reachable("batch") == {"_ops.arguments", "_optional_tensors", *settings}
    assert reachable("_ops.checks") == {"_C", "_ops.arguments", "_precision", *settings}
    assert reachable("_ops.fakes") == reachable("_ops.checks") | {"_ops.checks"}
    shared = {"_ops.library", "_ops.torch_internals", "_ops.arguments", *settings}
    assert reachable("_ops.autograd") == shared
    assert reachable("_ops.changing_numbers") == shared
    assert reachable("_ops.from_logits") == shared | {
        "_ops.autograd",
        "_ops.changing_numbers",
        "_ops.errors",
    }
    from_modules = imports_of("modules")
    assert not any(name.startswith("_ops") for name in from_modules), "a module calls the function"
    assert reachable("modules") | {"modules"} >= OPERATORS


# ---------------------------------------------------------------------------------------------
# Addresses


def kept_files() -> list[Path]:
    """What git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    files = (ROOT / name for name in done.stdout.split("\0") if name)
    return [path for path in files if path.is_file()]


# Written so that this file does not match itself.
REGISTRY = re.compile(
    rb"--(extra-)?index-url|--find-links|PIP_INDEX|://[^\s\"'<>]*(pypi|/simple\b|/whl\b|conda\.)",
)


def test_no_file_contains_a_registry_address() -> None:
    here = Path(__file__).resolve()
    found = [
        f"{path.relative_to(ROOT)}: {match[0].decode()}"
        for path in kept_files()
        if path != here
        for match in REGISTRY.finditer(path.read_bytes())
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        b"pip install --index-url=somewhere",
        b"https://files.example.org/pypi/simple",
        b"https://example.org/whl/cu130",
    ],
)
def test_a_registry_address_is_seen(text: bytes) -> None:
    assert REGISTRY.search(text)
