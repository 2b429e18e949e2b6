"""One test body for every backend: the fixture `backend` runs it on cpu, emulated and cuda."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.support.backends import Backend, parameters

hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.register_profile("few", deadline=None, max_examples=5, derandomize=True)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=10_000)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev")
)

# Inductor's cache on disk knows an operator by its name: after a change of the operator's results
# it would hand out graphs that were compiled before. Processes of a parallel run share the one.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="ipo_ext_inductor_"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Deselected, not skipped: a test that was not asked for, or is of CUDA alone, is no hole in the
    # run of another backend.
    left_out = [item for item in items if _is_left_out(config, item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _is_left_out(config: pytest.Config, item: pytest.Item) -> bool:
    if item.get_closest_marker("slow") and not config.getoption("--run-slow"):
        return True
    return bool(item.get_closest_marker("cuda_only") and not item.get_closest_marker("cuda"))


@pytest.fixture(params=parameters(), scope="session")
def backend_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(backend_name: str) -> Iterator[Backend]:
    with Backend(backend_name).active() as chosen:
        yield chosen


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> None:
    """What a test finds does not depend on those before it: they add up to recompilation limits."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
