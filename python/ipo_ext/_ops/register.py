"""Registers the Python half of the operators with torch; csrc/ops/register.cpp does the C++ half.

The operators from hidden states are defined here, whose matrix products are torch's, and those that
exchange with other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ipo_ext import _C
from ipo_ext._ops import (
    chunk_loop,
    from_hidden,
    from_logits,
    from_logprobs,
    shards,
    shared_sequences,
)
from ipo_ext._ops.arguments import EXCHANGING, OPERATORS, by_name, schema
from ipo_ext._ops.autograd import Formula, refuse_vmap
from ipo_ext._ops.changing_numbers import (
    LOG_BOUND,
    NUMBERS,
    log_bound_fake,
    log_bound_kernel,
    twin,
    twin_fake,
    twin_kernel,
    twin_schema,
)
from ipo_ext._ops.fakes import FAKES
from ipo_ext._ops.flops import register_formulas
from ipo_ext._ops.torch_internals import (
    keep_in_order,
    registered_operators,
    without_tracking_views,
)

AUTOGRAD: dict[str, Formula] = {
    **from_logprobs.AUTOGRAD,
    **from_logits.AUTOGRAD,
    **from_hidden.AUTOGRAD,
}

KERNELS = {**chunk_loop.KERNELS, **shards.KERNELS, **shared_sequences.KERNELS}

# Libraries unregister what they hold when they are collected.
_libraries: list[torch.library.Library] = []


def register(namespace: str) -> None:
    """Defines what Python does of the operators of ``namespace``, whose C++ half is loaded."""
    if f"{namespace}::{next(iter(KERNELS))}" in registered_operators(namespace):
        return  # a second import, after removal from sys.modules: torch still holds the first one's
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    keys = ("CPU", "CUDA") if _C.CUDA_ARCHITECTURES else ("CPU",)
    for name, (results, kernel) in KERNELS.items():
        text = name + schema(OPERATORS[name], results)
        # They read counts back, unless told.
        library.define(text, tags=(torch.Tag.cudagraph_unsafe,))
        for key in keys:
            library.impl(name, _kernel(name, kernel, namespace), key)
    library.define(LOG_BOUND)
    for key in keys:
        library.impl("log_bound", log_bound_kernel, key)
    torch.library.register_fake(f"{namespace}::log_bound", log_bound_fake, lib=library)
    for name in NUMBERS:
        # They read numbers on the host.
        library.define(twin_schema(namespace, name), tags=(torch.Tag.cudagraph_unsafe,))
        for key in keys:
            library.impl(twin(name), twin_kernel(namespace, name), key)
        fake = twin_fake(name, FAKES[name])
        torch.library.register_fake(f"{namespace}::{twin(name)}", fake, lib=library)
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", by_name(name, fake), lib=library)
    for name, (backward, setup_context) in AUTOGRAD.items():
        torch.library.register_autograd(
            f"{namespace}::{name}", backward, setup_context=setup_context, lib=library
        )
    for name in (*EXCHANGING, *shared_sequences.KERNELS):
        for each in (name, twin(name)):
            keep_in_order(f"{namespace}::{each}", library)
    for name in (*AUTOGRAD, "linear_token_logprobs_backward"):
        torch.library.register_vmap(f"{namespace}::{name}", refuse_vmap, lib=library)
    register_formulas(namespace)


def _kernel(name: str, function: Callable[..., Any], namespace: str) -> Callable[..., Any]:
    """``function`` over the C++ operators of ``namespace``, in the precision that it asks for."""
    run = by_name(name, lambda arguments: function(getattr(torch.ops, namespace), arguments))

    def kernel(hidden: torch.Tensor, *others: Any) -> Any:
        autocast = torch.autocast(hidden.device.type, enabled=False)
        with torch.no_grad(), autocast, without_tracking_views():
            return run(hidden, *others)

    return kernel
