"""Every private API of torch that the package uses, and why: the file that a torch upgrade breaks.

All are there from torch 2.11, the oldest that the package runs under, to 2.13;
tests/pytorch/test_internals.py calls each, and keeps private names out of the other files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

# -------------------------------------------------------------------------------------------------
# What surrounds a call


def in_forward_mode() -> bool:
    """Whether jvp, jacfwd or a dual level surrounds the call.

    An operator without a formula for tangents drops them, silently. The public ``forward_ad`` opens
    levels and does not say whether one is open.
    """
    return forward_ad._current_level >= 0


def is_eager() -> bool:
    """Whether nothing traces, transforms or fakes what is called: tensors are what they seem.

    Only torch.compile has a public question. functorch's transforms and modes of
    ``__torch_dispatch__`` (fake tensors, make_fx, a user's own) have none.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def assert_on_cpu(holds: torch.Tensor, words: str) -> None:
    """Raises a RuntimeError where a graph that a compiler has made runs, of a tensor on the CPU."""
    torch._assert_async(holds, words)


def is_batched_by_autograd(tensor: torch.Tensor) -> bool:
    """Whether ``is_grads_batched=True`` has made it: a whole batch that looks like one tensor."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))


def in_compiled_autograd() -> bool:
    """Whether compiled autograd traces a backward pass: its graph adds gradients that are None.

    The module is looked up, not imported: that would load the compiler into every process.
    """
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and bool(getattr(module, "in_compiled_autograd_region", False))


def compiler_knows(number: float) -> bool:
    """Whether it is a constant to the compiler at work: not a symbol for whatever comes.

    Imported here, where the compiler is loaded: it would take half a second of every start.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)


def graph_is_kept() -> bool:
    """Whether the backward pass that runs may run again: ``retain_graph`` or ``create_graph``.

    Autograd tells it to no Function. True outside of a backward pass.
    """
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


# -------------------------------------------------------------------------------------------------
# What a tensor is a view of


def base_of_view(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor that autograd tracks it as a view of; None where it is none."""
    return tensor._base


def view_may_change(view: torch.Tensor) -> bool:
    """Whether autograd lets it be changed in place.

    Not what ``unbind``, ``split``, ``chunk`` or a custom Function has made. Autograd raises only
    when it records the change, after the operator has written.
    """
    meta = torch._C._autograd._get_creation_meta(view)
    return bool(meta == torch._C._autograd.CreationMeta.DEFAULT)


# -------------------------------------------------------------------------------------------------
# How an operator runs


def below_autograd() -> AbstractContextManager[None]:
    """Within it an operator runs without its autograd formula, which is a detour through Python.

    ``no_grad`` does not skip the formula, it only records nothing there.
    """
    return cast(AbstractContextManager[None], torch._C._AutoDispatchBelowAutograd())


def without_tracking_views() -> AbstractContextManager[None]:
    """Within it a reshape is not tracked as a view.

    A kernel written in Python runs where autograd has been, but its ATen calls pass through
    ADInplaceOrView again, and what the kernel returns would count as a view of an input.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    return cast(AbstractContextManager[None], torch._C._ExcludeDispatchKeyGuard(keys))


def keep_in_order(operator: str, library: torch.library.Library) -> None:
    """Makes compilers keep the calls of ``namespace::name``, in their order, whoever uses them.

    One that meets other ranks must be called by all of them, or none. torch has a public name for
    effects of operators that ``custom_op`` has defined alone.
    """
    from torch._library.effects import EffectType

    library._register_effectful_op(f"{operator}", EffectType.ORDERED)


def gathered(tensor: torch.Tensor, group_name: str) -> torch.Tensor:
    """``[ranks, *shape]``: what the ranks of a process group have, in their order.

    torch 2.13 deprecates the public ``all_gather_into_tensor``, and its successor is younger than
    2.11; the operator below both is in all of them.
    """
    from torch.distributed import distributed_c10d

    group = cast(Any, distributed_c10d)._resolve_process_group(group_name)
    collectives = torch.ops._c10d_functional
    flat = collectives.all_gather_into_tensor(tensor.reshape(-1), group.size(), group_name)
    ranks = collectives.wait_tensor(flat).view(group.size(), *tensor.shape)
    return cast(torch.Tensor, ranks)


def gathered_later(tensor: torch.Tensor, group_name: str, ranks: int) -> torch.Tensor:
    """``[ranks * rows, ...]`` of ``[rows, ...]``, once ``waited`` for; as ``gathered``."""
    collectives = torch.ops._c10d_functional
    return cast(torch.Tensor, collectives.all_gather_into_tensor(tensor, ranks, group_name))


def scattered_later(tensor: torch.Tensor, group_name: str, ranks: int) -> torch.Tensor:
    """The inverse: this rank's ``[rows, ...]`` of the sum of all ranks' ``[ranks * rows, ...]``."""
    collectives = torch.ops._c10d_functional
    part = collectives.reduce_scatter_tensor(tensor, "sum", ranks, group_name)
    return cast(torch.Tensor, part)


def waited(tensor: torch.Tensor) -> torch.Tensor:
    """What a collective has been started for, for whoever uses it next."""
    return cast(torch.Tensor, torch.ops._c10d_functional.wait_tensor(tensor))


def member_of(group_name: str) -> tuple[int, int]:
    """This process's rank in a process group, and the number of its ranks."""
    from torch.distributed import distributed_c10d

    group = cast(Any, distributed_c10d)._resolve_process_group(group_name)
    return group.rank(), group.size()


def summed_later(tensor: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks of ``group``, for which the first to use it waits.

    The public ``all_reduce(async_op=True)`` leaves the waiting to the caller.
    """
    from torch.distributed._functional_collectives import all_reduce

    return cast(torch.Tensor, all_reduce(tensor, "sum", group))


def sum_of_ranks(tensor: torch.Tensor, group_name: str) -> torch.Tensor:
    """The sum over the ranks of a process group, with the same bits on each; as ``gathered``."""
    collectives = torch.ops._c10d_functional
    total = collectives.wait_tensor(collectives.all_reduce(tensor, "sum", group_name))
    return cast(torch.Tensor, total)


def registered_operators(namespace: str) -> list[str]:
    """``namespace::name`` of every operator: ``torch.ops`` lists only those already used."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name for name in names if name.startswith(f"{namespace}::"))


def schema_of(namespace: str, name: str) -> str:
    """``namespace::name(Tensor ..., float ...) -> ...`` as torch prints it."""
    return str(getattr(getattr(torch.ops, namespace), name).default._schema)


def has_kernel(operator: str, dispatch_key: str) -> bool:
    """Whether ``namespace::name`` has one for CPU, CUDA, ..."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, dispatch_key))


# -------------------------------------------------------------------------------------------------
# Results that pass through torch.compile and torch.export


def register_pytree(
    kind: type[Any],
    flatten: Callable[[Any], tuple[list[Any], Any]],
    unflatten: Callable[[Any, Any], Any],
    *,
    name: str,
) -> None:
    """Makes ``kind`` a container of tensors, saved with an exported program under ``name``.

    torch.export reads this registry, which has no public name. A context is saved as JSON, so a
    tuple goes there as a list.
    """
    pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=name,
        to_dumpable_context=list,
        from_dumpable_context=tuple,
    )


def register_namedtuple(kind: type[Any], *, name: str) -> None:
    """The same for a NamedTuple, a container already that only lacks a name to be saved under."""
    pytree._register_namedtuple(kind, serialized_type_name=name)


# -------------------------------------------------------------------------------------------------
# What a module is made of

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def hooks_of(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Kind and function of each hook that a call runs. Modules take hooks and do not list them."""
    for registry, kind in _HOOKS.items():
        for hook in getattr(module, registry).values():
            yield kind, hook


def calls_of_modules() -> dict[str, Callable[..., Any]]:
    """What a call of a module runs before its ``forward``, by name: the latter runs the hooks."""
    return {"__call__": nn.Module.__call__, "_call_impl": nn.Module._call_impl}


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter registered as ``name``, unlike the attribute, which may hide it."""
    return module._parameters.get(name)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it stands for a tensor without data, as under ``FakeTensorMode``."""
    return type(tensor) is FakeTensor
