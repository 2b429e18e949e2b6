"""The budget of machine code: what a listing says, the ways through it, and that a dearer loop is
noticed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import compiled_kernels  # noqa: E402
import sass_budget  # noqa: E402
from sass import pipes  # noqa: E402
from sass.listing import Control, Kernel, parsed  # noqa: E402
from sass.ways import Flow  # noqa: E402


def word(stall: int = 1, write: int = 7, read: int = 7, waits: int = 0) -> int:
    """The control bits of an instruction, as they are encoded."""
    return (stall | write << 5 | read << 8 | waits << 11) << 41


def kernel(*lines: str | tuple[str, int]) -> Kernel:
    """Of instructions, labels and source lines, as nvdisasm prints them."""
    text, address = [".text.some_kernel:"], 0
    for line in lines:
        code, control = line if isinstance(line, tuple) else (line, word())
        if code.startswith(("//", ".L")):
            text.append(f"        {code}" if code.startswith("//") else code)
            continue
        text.append(f"        /*{address:04x}*/   {code} ;    /* 0x{0:016x} */")
        text.append(f"      /* 0x{control:016x} */")
        address += 16
    (found,) = parsed("\n".join(text))
    return found


# A loop that loads, chooses between two branches of which the second is dearer, and stores.
LOOP = (
    "MOV R1, R2",
    ".L_x_1:",
    "@P3 LDG.E.128 R4, [R2]",
    "@P0 BRA `(.L_x_2)",
    "FADD R4, R4, R5",
    "FMUL R4, R4, R5",
    "FMUL R4, R4, R5",
    ".L_x_2:",
    "DADD R4, R4, R6",
    "STG.E.128 [R2], R4",
    "@P1 BRA `(.L_x_1)",
    "EXIT",
)


def opcodes(instructions: Sequence[object]) -> list[str]:
    return [instruction.opcode for instruction in instructions]


def test_the_cheapest_way_round_leaves_a_dearer_branch_out() -> None:
    way = Flow(kernel(*LOOP)).cheapest_loop(["LDG", "DADD", "STG"])
    assert opcodes(way) == ["LDG.E.128", "BRA", "DADD", "STG.E.128", "BRA"]


def test_an_anchor_leads_through_the_branch_that_has_it() -> None:
    way = Flow(kernel(*LOOP)).cheapest_loop(["LDG", "FMUL", "STG"])
    assert opcodes(way).count("FMUL") == 2


def test_a_branch_that_is_certain_has_one_successor() -> None:
    certain = [line.replace("@P0 BRA", "BRA") for line in LOOP]
    assert Flow(kernel(*certain)).cheapest_loop(["LDG", "FMUL", "STG"]) == []
    diverging = [line.replace("@P0 BRA", "BRA.DIV UR4,") for line in LOOP]
    assert Flow(kernel(*diverging)).cheapest_loop(["LDG", "FMUL", "STG"])
    by_operand = [line.replace("@P0 BRA", "BRA !P0,") for line in LOOP]
    assert Flow(kernel(*by_operand)).cheapest_loop(["LDG", "FMUL", "STG"])


def test_a_path_goes_from_the_entry_to_the_end() -> None:
    way = Flow(kernel(*LOOP)).cheapest_path(["STG"])
    assert opcodes(way) == ["MOV", "LDG.E.128", "BRA", "DADD", "STG.E.128", "BRA", "EXIT"]


@pytest.mark.parametrize(
    ("opcode", "pipe"),
    [
        ("FFMA", "fma"),
        ("FSEL", "alu"),
        ("F2F.F64.F32", "xu"),
        ("F2FP.BF16.F32.PACK_AB", "alu"),
        ("MUFU.EX2", "xu"),
        ("IMAD.MOV.U32", "imad"),
        ("DADD", "fp64"),
        ("LDGSTS.E.BYPASS.128", "lsu"),
        ("ULDC.64", "uniform"),
        ("LDC", "const"),
        ("I2FP.F32.U32", "alu"),
        ("ACQBULK", "ctrl"),
    ],
)
def test_pipes(opcode: str, pipe: str) -> None:
    assert pipes.pipe_of(kernel(f"{opcode} R1, R2").instructions[0]) == pipe


def test_control_words() -> None:
    assert Control.of(word(5, 2, 3, 0b100001)) == Control(5, 2, 3, 0b100001)


def test_one_warp_waits_for_what_it_needs() -> None:
    """A load of 600 cycles, work meanwhile, then the sum that waits for barrier 0."""
    code = kernel(
        ("LDG.E R4, [R2]", word(2, write=0)),
        ("FADD R5, R5, R6", word(4)),
        ("FADD R5, R5, R4", word(3, waits=1)),
        ("EXIT", word(5)),
    )
    assert pipes.latency(code.instructions) == pipes.LOAD_LATENCY + 3 + 5
    assert pipes.latency(code.instructions[1:]) == 4 + 3 + 5


def test_a_region_is_a_function_wherever_it_was_inlined(tmp_path: Path) -> None:
    header = tmp_path / "csrc/kernels/cuda/some.cuh"
    header.parent.mkdir(parents=True)
    header.write_text("int one() {\n  return 1;\n}\n\nint two() {\n  return one();\n}\n")
    code = kernel(
        '//## File "/src/some.cuh", line 2 inlined at "/src/some.cuh", line 6',
        '//## File "/src/some.cuh", line 6',
        "FADD R1, R2, R3",
        '//## File "/src/some.cuh", line 6',
        "FMUL R1, R2, R3",
        "FMUL R1, R2, R3",
    )
    one, two = (
        sass_budget.chosen_of({"region": f"some.cuh:{name}"}, code, tmp_path)
        for name in ("one", "two")
    )
    assert opcodes(one) == ["FADD"]
    assert opcodes(two) == ["FADD", "FMUL", "FMUL"]


def test_every_budget_is_of_one_kind_and_limits_something() -> None:
    for entry in json.loads(sass_budget.BUDGETS.read_text())["budgets"]:
        assert len({"loop", "region", "path"} & entry.keys()) <= 1
        assert entry["at_most"], entry["name"]
        assert (ROOT / entry["source"]).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no such budget"], "no budget is called no such budget"),
        (["log-probabilities, default, a tame token", "--update"], "--update writes all budgets"),
    ],
)
def test_a_wrong_call_is_refused(arguments: list[str], message: str) -> None:
    command = [sys.executable, "scripts/sass_budget.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


def has_tools() -> bool:
    try:
        compiled_kernels.nvdisasm()
    except SystemExit:
        return False
    return shutil.which("nvcc") is not None


@pytest.mark.skipif(not has_tools(), reason="needs nvcc and nvdisasm")
def test_a_select_more_in_the_loop_is_above_the_budget(tmp_path: Path) -> None:
    """And nothing else than the budgets of the kernels' release of nvcc is compared."""
    if json.loads(sass_budget.BUDGETS.read_text())["nvcc"] != sass_budget.nvcc_release():
        pytest.skip("the budgets are of another release of nvcc")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    math = tmp_path / "csrc/math/token_loss.h"
    text = math.read_text()
    term = "T pg_loss = weight * pg.loss;"
    assert term in text
    dearer = term.replace("pg.loss", "select<T>(pg.loss > E(-1e30), pg.loss, T{})")
    math.write_text(text.replace(term, dearer))
    name = "log-probabilities, default, a tame token"
    command = [sys.executable, "scripts/sass_budget.py", name, "--root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ABOVE: issue" in done.stdout
