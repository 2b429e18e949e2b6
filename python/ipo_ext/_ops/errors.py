"""Errors of operators, which know RuntimeErrors alone, as Python's and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ipo_ext._ops.arguments import flatten

Results = TypeVar("Results")


def with_torch_errors(run: Callable[..., Results], *inputs: Any) -> Results:
    """Raises the error that the operator, which knows RuntimeErrors alone, means.

    An IndexError for a label or the id of a sequence; where memory of a GPU was lacking the error
    that torch's allocator raises there, for handlers that free some and try again.
    """
    if torch.compiler.is_compiling():
        return run(*inputs)
    try:
        return run(*inputs)
    except RuntimeError as error:
        if str(error).startswith(("labels:", "sequence_ids:")):
            raise IndexError(str(error)) from None
        if "no memory for" in str(error) and any(map(_is_on_gpu, flatten(inputs))):
            # An earlier kernel's error fails every call after it: it is then what this raises.
            torch.cuda.synchronize()
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda
