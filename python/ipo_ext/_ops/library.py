"""The operators that the package calls: ``torch.ops.ipo_ext``, or another backend's under test."""

from __future__ import annotations

from typing import Any

import torch

NAMESPACE = "ipo_ext"
_namespace = NAMESPACE


def operators() -> Any:
    """``torch.ops.ipo_ext``; tests point it at other backends."""
    return getattr(torch.ops, _namespace)
