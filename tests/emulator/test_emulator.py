"""The emulator sees what it claims to see.

Every fault planted in tests/emulator/faults.cpp is caught, and how: by a report that names kernel,
block, thread and line, or by a result that is wrong or depends on the schedule. Its correct twin
gives one result under every schedule.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests.emulator import build

pytestmark = pytest.mark.emulated
SEEDS = 20
FAULTS = Path("tests/emulator/faults.cpp")
BUILTINS = Path("tests/emulator/builtins.cpp")

# What the report says. The line it names is the one marked "planted: <name>".
REPORTED = {
    "barrier_against_shuffle": r"divergent barrier: thread \d+ of the block is at another one",
    "divergent_barrier": r"threads 40-127: exited\n    threads 0-39: wait in __syncthreads",
    "endless_loop": r"computes without end",
    "exited_cluster_block": r"shared memory of block \(\d,0,0\), which has exited",
    "exited_lane": r"for lane 31, which has exited",
    "load_past_the_end": r"0 bytes past the end of a guarded buffer of 2048 bytes",
    "mask_without_the_caller": r"the mask 0x0000ffff does not name the calling lane \d\d",
    "misaligned_vector_load": r"misaligned access: 0x\w+ is not a multiple of 8 bytes",
    "missing_async_wait": r"exits with an asynchronous copy it never waited for",
    "stack_overflow": r"its stack overflowed",
    "two_barriers": r"divergent barrier: thread \d+ of the block is at another one",
    "two_masks": r"__shfl_xor_sync\(mask 0xffffffff\) at \S+ for lane 16, which has exited",
    "unnamed_source": r"shuffle reads from lane 16, which the mask 0x0000ffff does not name",
    "unstarted_cluster_block": r"shared memory of block \(\d,0,0\), which has not started",
}
# Of those, a neighbour that happens to have started already is found under other schedules only.
REPORTED_UNDER_SOME_SEEDS = {"unstarted_cluster_block"}
# Reported when the block ends, when no line is to blame any more.
REPORTED_FOR_THE_BLOCK = {
    "shared_store_past_the_end": r"wrote past the end of its shared memory: byte 2048 of 2048",
}
# The value at fault is poison, or one that another thread had yet to write or overwrote.
WRONG_RESULT = {
    "late_async_wait": "nan",
    "missing_block_barrier": "nan",
    "missing_cluster_barrier": "nan",
    "missing_second_barrier": "3",
    "missing_warp_barrier": "nan",
    "tail_vector_load": "nan",
    "unwritten_shared_read": "nan",
}
CHANGING_RESULT = {"float_atomic"}

ALL_FAULTS = {*REPORTED, *REPORTED_FOR_THE_BLOCK, *WRONG_RESULT, *CHANGING_RESULT}


def run(program, *arguments):
    return subprocess.run(
        [program, *arguments], cwd=build.ROOT, capture_output=True, text=True, timeout=120
    )


def outcomes(program, *arguments):
    """Exit status, and what each of the seeds printed."""
    done = run(program, *arguments, "--seeds", str(SEEDS))
    printed = re.split(r"^seed \d+: ", done.stdout, flags=re.MULTILINE)[1:]
    assert len(printed) == SEEDS, done.stdout + done.stderr
    return done.returncode, printed


def planted_line(name):
    lines = (build.ROOT / FAULTS).read_text().splitlines()
    return 1 + next(i for i, line in enumerate(lines) if line.endswith(f"// planted: {name}"))


def planted_lines(name):
    # An optimised load may count as part of its use on the next line; which statement of a loop or
    # a recursion is interrupted is a matter of chance.
    near = {"load_past_the_end": 1, "endless_loop": 1, "stack_overflow": 8}.get(name, 0)
    return range(planted_line(name) - near, planted_line(name) + near + 1)


def named_lines(report):
    return {int(line) for line in re.findall(r"faults\.cpp:(\d+)", report)}


def listed(program):
    return run(program).stdout.split()


@pytest.fixture(scope="session")
def faults():
    return build.build("faults", [FAULTS])


@pytest.fixture(scope="session")
def sanitized_faults():
    return build.build("faults", [FAULTS], sanitize=build.ADDRESS_AND_UNDEFINED)


@pytest.fixture(scope="session")
def builtins():
    return build.build("builtins", [BUILTINS])


def test_every_planted_fault_is_expected_here(faults):
    assert set(listed(faults)) == ALL_FAULTS


@pytest.mark.parametrize("name", sorted(REPORTED))
def test_a_broken_rule_is_reported_with_kernel_block_thread_and_line(faults, name):
    status, printed = outcomes(faults, name)
    assert status == 1
    reports = [text for text in printed if text.startswith("emulator: ")]
    assert reports if name in REPORTED_UNDER_SOME_SEEDS else reports == printed
    for report in reports:
        assert re.search(REPORTED[name], report), report
        assert f"faults::{name}<false>(" in report
        assert re.search(r"\n  block   \(\d,0,0\)", report), report
        assert re.search(r"\n  thread  \(\d+,0,0\), warp \d, lane \d+\n", report), report
        assert named_lines(report) & set(planted_lines(name)), report


@pytest.mark.parametrize("name", sorted(REPORTED_FOR_THE_BLOCK))
def test_an_overrun_of_shared_memory_is_reported_with_its_block(faults, name):
    status, printed = outcomes(faults, name)
    assert status == 1
    for report in printed:
        assert re.search(REPORTED_FOR_THE_BLOCK[name], report), report
        assert f"faults::{name}<false>(" in report
        assert "\n  block   (0,0,0)" in report


@pytest.mark.parametrize("name", sorted(WRONG_RESULT))
def test_a_missing_barrier_or_write_gives_a_wrong_result(faults, name):
    status, printed = outcomes(faults, name)
    assert status == 1
    wrong = [text for text in printed if text.startswith("wrong result")]
    assert wrong
    assert all(WRONG_RESULT[name] in text.split(" instead")[0] for text in wrong)


@pytest.mark.parametrize("name", sorted(CHANGING_RESULT))
def test_a_float_atomic_gives_results_that_depend_on_the_schedule(faults, name):
    _, printed = outcomes(faults, name)
    assert len(set(printed)) > 1
    _, again = outcomes(faults, name)
    assert again == printed, "a seed must give the same schedule every time"


@pytest.mark.parametrize("name", sorted(ALL_FAULTS))
def test_the_correct_twin_gives_one_result_under_every_schedule(faults, name):
    status, printed = outcomes(faults, name, "--correct")
    assert status == 0, printed[0]
    assert len(set(printed)) == 1


@pytest.mark.parametrize(
    ("name", "access"),
    [("shared_store_past_the_end", "WRITE of size 4"), ("tail_vector_load", "READ of size ")],
)
def test_address_sanitizer_names_the_line_of_a_partial_overrun(sanitized_faults, name, access):
    done = run(sanitized_faults, name)
    assert done.returncode == 1
    assert "AddressSanitizer: use-after-poison" in done.stderr
    assert access in done.stderr
    assert f"faults.cpp:{planted_line(name)}" in done.stderr


def test_correct_kernels_are_clean_under_sanitizers(sanitized_faults):
    for name in listed(sanitized_faults):
        done = run(sanitized_faults, name, "--correct", "--seeds", "3")
        assert (done.returncode, done.stderr) == (0, ""), name


def test_reports_survive_address_sanitizer(sanitized_faults):
    for name in ("divergent_barrier", "load_past_the_end", "stack_overflow"):
        status, printed = outcomes(sanitized_faults, name)
        assert status == 1
        assert all(re.search(REPORTED[name], report) for report in printed)


def test_seed_is_read_from_the_environment(faults):
    done = subprocess.run(
        [faults, "float_atomic"], env={"EMULATOR_SEED": "7"}, capture_output=True, text=True
    )
    assert done.stdout.startswith("seed 7: ")
    assert done.stdout == run(faults, "float_atomic", "--seed", "7").stdout


@pytest.mark.parametrize("seed", ["0", "1", "2"], ids=lambda seed: f"seed{seed}")
@pytest.mark.parametrize(
    "name",
    [
        "indices",
        "shuffles",
        "shuffled_types",
        "votes",
        "block_votes",
        "atomics",
        "shared_memory",
        "clusters",
        "asynchronous_copies",
        "launch_checks",
        "statistics",
        "guarded_buffers",
        "speed",
    ],
)
def test_builtins_do_what_cuda_defines(builtins, name, seed):
    done = run(builtins, name, "--seed", seed)
    assert done.returncode == 0, done.stdout


def test_build_is_cached(faults):
    before = faults.stat().st_mtime_ns
    assert build.build("faults", [FAULTS]) == faults
    assert faults.stat().st_mtime_ns == before
