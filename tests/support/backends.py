"""The backends that a test body runs on, and what differs between them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch

from ipo_ext import _C
from ipo_ext._ops import library
from tests.emulator import operators as emulated


def available() -> list[str]:
    """cpu and emulated everywhere; cuda where the build and the machine have it."""
    cuda = bool(_C.CUDA_ARCHITECTURES) and torch.cuda.is_available()
    return ["cpu", "emulated", *(["cuda"] if cuda else [])]


def parameters(*without: str) -> list[pytest.ParameterSet]:
    """A fixture's parameters: every available backend, marked with its name for pytest's -m."""
    names = (name for name in available() if name not in without)
    return [pytest.param(name, marks=getattr(pytest.mark, name)) for name in names]


@dataclasses.dataclass(frozen=True)
class Backend:
    """Where tensors live and which operators run. emulated follows CUDA's rules, on CPU tensors."""

    name: str

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.name == "cuda" else "cpu")

    @property
    def faults_raise(self) -> bool:
        """Whether a contract fault raises (CPU) or poisons the loss and every gradient (CUDA)."""
        return self.name == "cpu"

    @property
    def namespace(self) -> str:
        return emulated.NAMESPACE if self.name == "emulated" else "ipo_ext"

    @contextlib.contextmanager
    def active(self) -> Iterator[Backend]:
        """Points the Python API at this backend's operators."""
        if self.name == "emulated":
            emulated.load()
        before = library._namespace
        library._namespace = self.namespace
        try:
            yield self
        finally:
            library._namespace = before
