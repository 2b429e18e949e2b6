"""Whether a module is a plain linear, the only thing that ``IPOLMHead`` can stand in for."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ipo_ext._ops import torch_internals

# Taken at import, so that a class-wide replacement that comes later is seen as well.
_LINEAR_FORWARD = nn.Linear.forward

PARAMETERS = ("weight", "bias")  # of a linear, the latter perhaps None

_INSTEAD = "or use ipo_loss_from_logits on its output"


def check_plain_linear(linear: object) -> None:
    """Raises unless a call is ``F.linear(hidden, linear.weight, linear.bias)`` and nothing else.

    What is parametrized is accepted: ``linear.weight`` is then what the parametrization makes of
    its own parameters. Global hooks are no hindrance: they run for whatever module is called.
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(
            f"linear: expected an nn.Linear, got {_full_name(linear)}, which may compute something "
            f"else; {_remedy(linear)}, {_INSTEAD}"
        )
    _check_own_forward(linear)
    plain = [name for name in PARAMETERS if not is_parametrized(linear, name)]
    for name in plain:
        _check_type(linear, name)
    _check_no_hooks(linear)
    for name in plain:
        _check_is_a_parameter(linear, name)


def _check_own_forward(linear: nn.Linear) -> None:
    """Raises where a call runs other code than torch's: of a subclass, or put on the instance."""
    expected = {"forward": _LINEAR_FORWARD, **torch_internals.calls_of_modules()}
    for name, function in expected.items():
        method = getattr(linear, name)
        # A bound method put on the instance is the same method: what a removed wrapper leaves.
        if getattr(method, "__func__", method) is not function or method.__self__ is not linear:
            wrapped = getattr(method, "__wrapped__", None)
            found = f"a wrapper of {_full_name(wrapped)}" if wrapped else _full_name(method)
            raise TypeError(
                f"linear: expected an nn.Linear with torch's own {name}, got {_described(linear)}, "
                f"whose {name} is {found}, which may compute something else; "
                f"{_remedy(linear)}, {_INSTEAD}"
            )


def _check_type(linear: nn.Linear, name: str) -> None:
    """Raises for a tensor subclass, which computes a product of its own or is no whole matrix."""
    own = torch_internals.own_parameter(linear, name)
    if own is None or type(own) is nn.Parameter or torch_internals.is_fake(own):
        return
    remedies = {
        "DTensor": "make the head before fully_shard or parallelize_module, and shard the head",
        "UninitializedParameter": "call the model once first, which initializes it",
    }
    remedy = remedies.get(type(own).__name__, f"convert it to a plain tensor, {_INSTEAD}")
    raise TypeError(
        f"linear.{name}: expected a plain nn.Parameter, got {_full_name(own)} in "
        f"{_described(linear)}; {remedy}"
    )


def _check_no_hooks(linear: nn.Linear) -> None:
    for kind, hook in torch_internals.hooks_of(linear):
        raise ValueError(
            f"linear: expected an nn.Linear without hooks, got {_described(linear)} with the "
            f"{kind} {_full_name(hook)}, which the head would not run; remove it "
            "(handle.remove(), or torch's remove_weight_norm, remove_spectral_norm or "
            "prune.remove) and, to keep it, apply it to the head"
        )


def _check_is_a_parameter(linear: nn.Linear, name: str) -> None:
    own, used = torch_internals.own_parameter(linear, name), getattr(linear, name)
    if own is not used or (own is None and name == "weight"):
        raise ValueError(
            f"linear.{name}: expected a parameter of the linear, got {_full_name(used)} "
            f"that is none in {_described(linear)}: a buffer, a view or an attribute, which the "
            "head would not keep; make it an nn.Parameter, or make the head before a wrapper "
            "takes the parameter away"
        )


def _remedy(linear: object) -> str:
    """How to come from this module to a plain linear."""
    if type(linear).__module__.startswith("peft."):
        return "merge its adapter (merge_and_unload) or keep the head out of the adapter's modules"
    if hasattr(linear, "_hf_hook"):
        return "remove accelerate's hook (accelerate.hooks.remove_hook_from_module)"
    return "pass the plain linear"


def _described(linear: nn.Linear) -> str:
    """The module's type and sizes in one line, without its submodules."""
    return f"{_full_name(linear)}({linear.extra_repr()})"


def _full_name(thing: Any) -> str:
    """Where a function is defined, or else the type of an object."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
