"""Optional packages: imported where they are needed, and named in a sentence where missing."""

from __future__ import annotations

import importlib
from typing import Any


class Missing(ImportError):
    """A package that what was asked for needs, in a sentence."""


def need(package: str, purpose: str) -> Any:
    """The module ``package``, which ``purpose`` needs."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        root = package.partition(".")[0]
        raise Missing(
            f"{root}: {purpose} needs it, and it cannot be imported ({error}); "
            'pip install "ipo_ext[mismatch]"'
        ) from error
