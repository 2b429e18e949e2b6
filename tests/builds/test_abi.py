"""One binary for every torch: what _C takes from torch is in the stable ABI of torch 2.11."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

from ipo_ext import _C

LIST = Path(__file__).parent / "torch_2_11_symbols.txt"
# The platform's own libraries, by the names that the loader knows them by.
PLATFORM = {
    *("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"),
    *("libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}
# Weak hooks that every toolchain leaves undefined where nobody fills them.
TOOLCHAIN = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}


class Symbol(NamedTuple):
    name: str
    weak: bool


def symbols(library: str, which: str) -> set[Symbol]:
    """The ``defined`` or ``undefined`` dynamic symbols of a library, without their versions."""
    command = ["nm", "-D", f"--{which}-only", "--format=posix", library]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {
        Symbol(name.split("@")[0], kind in "wv")
        for name, kind in (line.split()[:2] for line in lines)
    }


def loaded_libraries() -> dict[str, str]:
    """The name that each shared library of this process gives itself, to its path."""
    maps = Path("/proc/self/maps").read_text()
    paths = sorted(set(re.findall(r"(/\S+\.so\S*)$", maps, re.MULTILINE)))
    report = subprocess.run(["readelf", "-dW", *paths], capture_output=True, text=True).stdout
    parts = re.split(r"^File: (.+)$", report, flags=re.MULTILINE)[1:]
    names = {
        path: re.search(r"SONAME\).*\[(.+)\]", text)
        for path, text in zip(parts[::2], parts[1::2], strict=True)
    }
    return {match[1]: path for path, match in names.items() if match}


def platform_exports() -> set[str]:
    """What the platform's libraries and the interpreter export in this very process."""
    wanted = {*PLATFORM, sysconfig.get_config_var("INSTSONAME")}
    files = [path for name, path in loaded_libraries().items() if name in wanted]
    files.append(str(Path(sys.executable).resolve()))
    return {symbol.name for file in files for symbol in symbols(file, "defined")}


def stable_abi() -> dict[str, bool]:
    """Function to whether only CUDA builds of torch have it."""
    lines = LIST.read_text().splitlines()
    entries = [line.split() for line in lines if not line.startswith("#")]
    return {name: kind == ["cuda"] for name, *kind in entries}


def objections(undefined: set[Symbol], exports: set[str], stable: dict[str, bool]) -> list[str]:
    """What would keep a binary with these undefined symbols from loading under torch 2.11."""
    from_torch = {symbol for symbol in undefined if symbol.name not in exports | TOOLCHAIN}
    strangers = [s.name for s in from_torch if s.name not in stable]
    strong = [s.name for s in from_torch if stable.get(s.name) and not s.weak]
    return [
        *(f"{name}: not in the stable ABI of torch 2.11" for name in strangers),
        *(f"{name}: only CUDA torch has it, so it must be weak" for name in strong),
    ]


@pytest.fixture(scope="module")
def exports() -> set[str]:
    return platform_exports()


def test_the_list_is_sorted_and_whole() -> None:
    names = list(stable_abi())
    assert names == sorted(set(names))
    kinds = stable_abi()
    assert kinds["torch_call_dispatcher"] is False
    assert kinds["aoti_torch_get_current_cuda_stream"] is True


def test_the_module_takes_nothing_else_from_torch(exports: set[str]) -> None:
    undefined = symbols(_C.__file__, "undefined")
    assert objections(undefined, exports, stable_abi()) == []
    assert "aoti_torch_library_def" in {symbol.name for symbol in undefined}


@pytest.mark.parametrize(
    ("name", "weak", "objection"),
    [
        ("_ZN3c1010TensorImplD1Ev", False, "not in the stable ABI of torch 2.11"),
        ("_ZN3c1010TensorImplD1Ev", True, "not in the stable ABI of torch 2.11"),
        ("aoti_torch_of_the_future", False, "not in the stable ABI of torch 2.11"),
        ("aoti_torch_get_current_cuda_stream", False, "only CUDA torch has it, so it must be weak"),
        ("aoti_torch_get_current_cuda_stream", True, None),
        ("torch_call_dispatcher", False, None),
        ("malloc", False, None),
        ("PyDict_New", False, None),
        ("_ZSt9terminatev", False, None),
    ],
)
def test_a_stranger_is_seen(
    exports: set[str], name: str, weak: bool, objection: str | None
) -> None:
    found = objections({Symbol(name, weak)}, exports, stable_abi())
    assert found == ([f"{name}: {objection}"] if objection else [])


def test_sources_use_no_macro_that_the_oldest_headers_lack() -> None:
    """Headers of torch newer than 2.11 have some; a build against 2.11's would fail."""
    newer = re.compile(r"\bSTABLE_TORCH_ERROR_CODE_CHECK\b")
    sources = [path for path in (LIST.parents[2] / "csrc/ops").iterdir() if path.is_file()]
    assert len(sources) > 4
    assert [path.name for path in sources if newer.search(path.read_text())] == []
