"""csrc/math/exponential.h: within 1 ULP over all floats, and the same bits on every host."""

import os
import platform
import re
import subprocess

import pytest

from tests.emulator import build

SOURCE = "tests/loss/exponential.cpp"
STEP = "251"  # of all 2^32 floats, every so many are checked
# As CMakeLists.txt compiles the CPU kernels.
FLAGS = (
    *("-std=c++17", "-O3", "-Wall", "-Wextra", "-Wno-psabi"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)


def instruction_sets():
    """The instruction sets that the kernels are compiled for and this machine has."""
    if platform.machine() != "x86_64":
        return ["native"]
    with open("/proc/cpuinfo") as cpuinfo:
        has = set(re.search(r"^flags\s*:(.*)$", cpuinfo.read(), re.MULTILINE)[1].split())
    needs = {
        "x86-64": set(),
        "x86-64-v3": {"avx2", "fma", "bmi2"},
        "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    }
    return [name for name, features in needs.items() if features <= has]


def compiled(folder, instruction_set):
    program = folder / instruction_set
    command = [
        os.environ.get("CXX", "g++"),
        *FLAGS,
        f"-march={instruction_set}",
        "-Icsrc",
        SOURCE,
        "-o",
        str(program),
    ]
    subprocess.run(command, cwd=build.ROOT, check=True)
    return program


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Exit status and output of the checking program, for each instruction set."""
    folder = tmp_path_factory.mktemp("exponential")
    programs = {name: compiled(folder, name) for name in instruction_sets()}
    return {
        name: subprocess.run([program, STEP], capture_output=True, text=True)
        for name, program in programs.items()
    }


def test_cpu_exponential_is_within_its_error_bounds(reports):
    for name, done in reports.items():
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"


def test_cpu_exponential_has_the_same_bits_for_every_instruction_set(reports):
    outputs = {done.stdout for done in reports.values()}
    assert len(outputs) == 1
    assert outputs.pop().count(" digest ") == 2
