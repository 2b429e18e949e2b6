"""The benchmarks' harness: modules import one way, pictures need JSON alone, wrong is not timed."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from benchmarks.harness import command, cuda, results, timing
from benchmarks.harness.provider import Provider
from benchmarks.harness.runner import Runner
from benchmarks.harness.step import Bind, Work, step_of
from benchmarks.harness.terminal import Terminal
from benchmarks.hidden.benchmark import FromHidden
from benchmarks.logits.benchmark import FromLogits
from benchmarks.logprobs.benchmark import FromLogprobs
from benchmarks.logprobs.cases import packed
from benchmarks.logprobs.providers import PROVIDERS

ROOT = Path(__file__).resolve().parents[2]
ALL = [FromLogprobs, FromLogits, FromHidden]
RESULTS = sorted(
    path
    for path in (ROOT / "benchmarks/results").glob("*/*.json")
    if "benchmark" in json.loads(path.read_text())
)


# ---- Modules ----


def imports_of(path: Path) -> Iterator[str]:
    """The modules of the benchmarks that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found = ROOT.joinpath(*name.split("."))
            if found.is_dir() or found.with_suffix(".py").is_file():
                yield name
            elif name.startswith("benchmarks."):
                yield name.rpartition(".")[0]


def module_graph() -> dict[str, set[str]]:
    paths = [path for path in ROOT.glob("benchmarks/**/*.py") if path.name != "__init__.py"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return {name: set(imports_of(path)) for name, path in zip(names, paths, strict=True)}


def test_modules_import_one_way() -> None:
    graph = module_graph()
    assert "benchmarks.harness.timing" in graph["benchmarks.harness.runner"]
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises on a circle
    assert set(graph) <= set(order)
    for name, imported in graph.items():
        package = name.split(".")[1]
        if package == "draw":  # the one command that knows all of them
            continue
        for other in imported:
            assert other.split(".")[1] in (package, "harness"), f"{name} imports {other}"


# ---- Pictures ----


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_that_are_kept_are_drawn_without_torch(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    program = "import sys; sys.modules |= dict.fromkeys(('torch', 'ipo_ext')); "
    program += "from benchmarks.draw import main; main(sys.argv[1:])"
    picture = tmp_path / "picture.png"
    arguments = [sys.executable, "-c", program, str(path), str(picture)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


@pytest.mark.skipif(not RESULTS, reason="a source distribution holds no results")
def test_there_are_results_of_every_benchmark() -> None:
    kept = {results.read(path)["benchmark"] for path in RESULTS}
    assert kept == {benchmark.name for benchmark in ALL}


def test_every_provider_has_a_style() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.hidden import picture as hidden
    from benchmarks.logits import picture as logits
    from benchmarks.logprobs import picture as logprobs

    for benchmark, picture in zip(ALL, (logprobs, logits, hidden), strict=True):
        assert set(picture.STYLES) == set(benchmark.providers)


# ---- The runner ----


def arguments_of(benchmark: type, *options: str) -> argparse.Namespace:
    return command.parse(benchmark, ["--quick", *options])


def with_a_wrong_gradient(provider: Provider) -> Provider:
    def make() -> Bind:
        bind = provider.make()

        def wrong(batch) -> Work:
            work = bind(batch)

            def backward(*given) -> list[torch.Tensor]:
                return [gradient * 1.01 for gradient in work.backward(*given)]

            return work._replace(backward=backward)

        return wrong

    return dataclasses.replace(provider, make=make)


def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = with_a_wrong_gradient(PROVIDERS["packed_eager"])
    monkeypatch.setattr(FromLogprobs, "providers", {**PROVIDERS, "packed_eager": wrong})
    options = arguments_of(FromLogprobs, "--providers", "ipo_ext,packed_eager")
    running = Runner(FromLogprobs(options), Terminal())
    running.run([packed(1024)])
    assert running.wrong
    assert {row["provider"] for row in running.rows} == {"ipo_ext", "copy"}
    (left,) = running.left_out
    assert left["provider"] == "packed_eager"
    assert left["reason"].startswith("wrong: gradient: relative error 1.0e-02")


@pytest.mark.parametrize("place", ["make", "bind", "run"])
@pytest.mark.parametrize("name", ["ipo_ext", "packed_eager"])
def test_only_a_provider_of_others_may_be_unavailable(
    name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> NoReturn:
        raise RuntimeError("no such operator")

    work = Work(fails, fails, fails) if place == "run" else None
    bind = fails if place == "bind" else lambda _: work
    broken = dataclasses.replace(PROVIDERS[name], make=fails if place == "make" else lambda: bind)
    monkeypatch.setattr(FromLogprobs, "providers", {**PROVIDERS, name: broken})
    running = Runner(FromLogprobs(arguments_of(FromLogprobs, "--providers", name)), Terminal())
    running.run([packed(1024)])
    assert running.wrong == (name == "ipo_ext")
    (left,) = running.left_out
    assert left["reason"].startswith("failed: " if name == "ipo_ext" else "unavailable")
    assert left["reason"].endswith("no such operator")


def test_on_a_gpu_inputs_rotate_and_graphs_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the device replaced by the CPU: what is timed, how often, and what is said of it."""

    class OnTheCPU(FromLogprobs):
        grad_outs = (1.0,)

        def make_batch(self, case):
            self.device = "cpu"
            batch = super().make_batch(case)
            self.device = "cuda"
            return batch

    ones = torch.ones
    replayed: list[int] = []

    def replay(calls) -> timing.Step:
        def step(mark: timing.Mark) -> None:
            replayed.append(len(calls))
            for call in calls:
                call()
            mark()

        return step

    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(timing, "EventClock", lambda flush=None: timing.WallClock())
    monkeypatch.setattr(cuda, "l2_bytes", lambda: 2 * 1024 * 17)
    monkeypatch.setattr(cuda, "graph_step", replay)
    monkeypatch.setattr(cuda, "waits_for_device", lambda call: not call())
    monkeypatch.setattr(cuda, "launches", lambda call: len(call()))
    options = arguments_of(OnTheCPU, "--providers", "ipo_ext,upstream_loop,packed_eager")
    benchmark = OnTheCPU(options)
    benchmark.device = "cuda"
    running = Runner(benchmark, Terminal())
    case = packed(1024)
    running.run([case])
    assert running.left_out == []
    assert set(replayed) == {4}  # input sets, twice the cache
    found = {(row["provider"], row["clock"]) for row in running.rows}
    graphs = {
        (name, clock)
        for name in ("ipo_ext", "packed_eager")
        for clock in ("graph", "graph/forward")
    }
    steps = {(name, "wall") for name in ("ipo_ext", "upstream_loop", "packed_eager", "copy")}
    assert found == graphs | steps | {("copy", "graph")}
    ours = results.find(running.rows, case, "ipo_ext")
    assert ours["host_synchronisation"] is False
    assert ours["forward_launches"] == 2


def test_a_step_marks_the_phases_that_there_are() -> None:
    order: list[str] = []

    def noted(word: str):
        return lambda *given: order.append(word) or given

    for work, phases in (
        (Work(noted("forward")), ["forward"]),
        (Work(noted("forward"), noted("backward")), ["forward", "backward"]),
        (Work(noted("forward"), noted("backward"), noted("read")), ["forward", "backward", "read"]),
    ):
        order.clear()
        step_of(work)(lambda: order.append("mark"))
        assert order == [word for phase in phases for word in (phase, "mark")]
