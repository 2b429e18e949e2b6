"""The scripts of a release: what they object to, and the table that they write."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import abi_matrix
import repair_wheel

MODULE = "ipo_ext/_C.cpython-311-x86_64-linux-gnu.so"
GOOD_FILES = (MODULE, "ipo_ext/__init__.py", "ipo_ext-1.0.dist-info/METADATA")
GOOD_LIBRARIES = (*repair_wheel.FROM_TORCH, "libstdc++.so.6", "libc.so.6", "ld-linux-aarch64.so.1")


@pytest.mark.parametrize(
    ("files", "objection"),
    [
        (GOOD_FILES, None),
        (GOOD_FILES[1:], "expected one module"),
        ((*GOOD_FILES, MODULE.replace("311", "312")), "expected one module"),
        ((*GOOD_FILES, "ipo_ext.libs/libtorch-1a2b.so"), "got ipo_ext.libs/libtorch-1a2b.so"),
        ((*GOOD_FILES, "tests/test_smoke.py"), "got tests/test_smoke.py"),
    ],
)
def test_files_of_a_wheel(files: tuple[str, ...], objection: str | None) -> None:
    found = list(repair_wheel.wrong_files(files))
    assert not found if objection is None else objection in found[0]


@pytest.mark.parametrize(
    ("libraries", "objection"),
    [
        (GOOD_LIBRARIES, None),
        (GOOD_LIBRARIES[1:], "expected it to need libtorch.so"),
        ((*GOOD_LIBRARIES, "libcudart.so.13"), "needs libcudart.so.13"),
        ((*GOOD_LIBRARIES, "libtorch_cuda.so"), "needs libtorch_cuda.so"),
        ((*GOOD_LIBRARIES, "libtorch_python.so"), "needs libtorch_python.so"),
    ],
)
def test_libraries_that_a_wheel_needs(libraries: tuple[str, ...], objection: str | None) -> None:
    found = list(repair_wheel.wrong_libraries(libraries))
    assert not found if objection is None else objection in found[0]


def test_the_size_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "ipo_ext-1.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in GOOD_FILES:
            archive.writestr(name, b"0" * 1000)
    monkeypatch.setattr(repair_wheel, "libraries_needed", lambda module: GOOD_LIBRARIES)
    assert list(repair_wheel.objections(wheel)) == []
    monkeypatch.setattr(repair_wheel, "SIZE_BUDGET", 2e3)
    assert list(repair_wheel.objections(wheel)) == ["expected at most 0 MB, got 0.0 MB"]


def row(**changes: Any) -> abi_matrix.Row:
    facts = {"torch": "2.11.0+cu130", "built_with": "2.13.0+cpu", "python": "3.11.7"}
    counts = {"passed": 9, "tests": 9, "fakes": True, "cuda_operators": 6, "operators": 6}
    return abi_matrix.Row(**{**facts, **counts, "seconds": 1.0, **changes})


@pytest.mark.parametrize("change", [{"passed": 8}, {"fakes": False}, {"cuda_operators": 0}])
def test_a_row_that_is_not_good(change: dict[str, Any]) -> None:
    assert row().good
    assert not row(**change).good


def test_the_table_goes_between_its_markers(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n{}\nold\n{}\nafter\n".format(*abi_matrix.MARKERS))
    wheel = tmp_path / "ipo_ext.whl"
    wheel.write_bytes(b"0")
    abi_matrix.write_between_markers(file, abi_matrix.table(wheel, [row()]))
    text = file.read_text()
    assert "old" not in text
    assert "| 2.11.0+cu130 | 3.11.7 | 9 of 9 | 6 of 6 | yes |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    with pytest.raises(SystemExit, match="expected the lines"):
        abi_matrix.write_between_markers(wheel, "")
