"""One call of a public function: what it is called with, running it, and what it gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import ipo_ext
from ipo_ext import IPOConfig, LossBatch


class Function(NamedTuple):
    call: Callable[..., Any]
    operands: tuple[str, ...]  # the arguments that every call gives
    leaves: tuple[str, ...]  # those that it differentiates, as far as they are given


DEFAULT = IPOConfig()
_OF_LOSS = ("inference_logprobs", "advantages", "loss_mask")
FUNCTIONS = {
    "ipo_loss": Function(ipo_ext.ipo_loss, ("trainer_logprobs", *_OF_LOSS), ("trainer_logprobs",)),
    "ipo_loss_from_logits": Function(
        ipo_ext.ipo_loss_from_logits, ("logits", "labels", *_OF_LOSS), ("logits",)
    ),
    "ipo_loss_from_hidden": Function(
        ipo_ext.ipo_loss_from_hidden,
        ("hidden", "weight", "labels", *_OF_LOSS),
        ("hidden", "weight", "bias"),
    ),
    "token_logprobs": Function(ipo_ext.token_logprobs, ("logits", "labels"), ("logits",)),
    "linear_token_logprobs": Function(
        ipo_ext.linear_token_logprobs,
        ("hidden", "weight", "labels"),
        ("hidden", "weight", "bias"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments by name, without those left to their defaults; tensors as they lie in memory."""

    function: str
    arguments: dict[str, Any]
    # Those of the function's leaves that require grad; none runs it under no_grad.
    leaves: tuple[str, ...]
    # What flows into the loss, or into log-probabilities and entropy, None where nothing does.
    grads: tuple[float | torch.Tensor | None, ...]
    twice: bool = False  # backward with a retained graph, and again
    through_module: bool = False  # IPOLoss or LinearIPOLoss, its batch in a LossBatch
    # Of a call that breaks a rule: what must be raised, and the name its message begins with.
    fault: Fault | None = None

    @property
    def is_loss(self) -> bool:
        return "logprobs" not in self.function

    @property
    def config(self) -> IPOConfig:
        return self.arguments.get("config", DEFAULT)

    def with_(self, **changes: Any) -> Call:
        """The call with other arguments; None leaves one to its default."""
        arguments = {**self.arguments, **changes}
        given = {name: value for name, value in arguments.items() if value is not None}
        return dataclasses.replace(self, arguments=given)


class Fault(NamedTuple):
    name: str
    argument: str
    error: type[Exception]
    of_data: bool = False  # what only a look at the data shows: on CUDA it poisons instead


class Result(NamedTuple):
    """What a call gave, or what it raised."""

    outputs: tuple[torch.Tensor, ...] = ()  # loss, or log-probabilities and entropy
    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    means: torch.Tensor | None = None
    gradients: Mapping[str, torch.Tensor] = MappingProxyType({})
    error: Exception | None = None
    wrong: str | None = None  # what contradicts itself, whatever the reference says


def run(call: Call) -> Result:
    """Forward, and backward if leaves require grad."""
    try:
        return _run(call)
    except Exception as error:  # judged like any other result
        return Result(error=error)


def _run(call: Call) -> Result:
    arguments, leaves, room = _with_leaves(call)
    before = None if room is None else room.detach().clone()
    with torch.set_grad_enabled(bool(call.leaves)):
        output = _function_of(call)(**arguments)
    result = _as_result(call, output)
    if not call.leaves:
        return result
    made = _gradients(call, result.outputs, leaves, retain_graph=call.twice)
    wrong = _run_again(call, result.outputs, leaves, made) if call.twice else None
    gradients = dict(zip(call.leaves, made, strict=True))
    if room is not None:
        gradients["logits"], wrong = _within(call.arguments["logits"], made[0])
        wrong = wrong or _beside(call.arguments["logits"], before, room.detach().clone())
    return result._replace(gradients=gradients, wrong=wrong)


def _with_leaves(call: Call) -> tuple[dict[str, Any], list[torch.Tensor], torch.Tensor | None]:
    """The arguments that the function gets, its leaves, and what is overwritten in place."""
    arguments = dict(call.arguments)
    if arguments.get("inplace") and call.leaves:
        logits = arguments["logits"]
        leaf = storage_of(logits).clone().requires_grad_()
        room = leaf * 1
        arguments["logits"] = room.as_strided(
            logits.shape, logits.stride(), logits.storage_offset()
        )
        return arguments, [leaf], room
    leaves = [arguments[name].detach().requires_grad_() for name in call.leaves]
    return {**arguments, **dict(zip(call.leaves, leaves, strict=True))}, leaves, None


def storage_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of the memory that the tensor is a view of, flat."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((elements,), (1,), 0)


def _function_of(call: Call) -> Callable[..., Any]:
    return _module_of(call) if call.through_module else FUNCTIONS[call.function].call


_OF_MODULE = ("softcap", "chunk_size", "logit_scale")
_IN_BATCH = ("teacher_logprobs", "loss_weights", "cu_seqlens", "normalizer", "temperature")


def _module_of(call: Call) -> Callable[..., Any]:
    """The function's module, as a function of the same arguments."""

    def run_module(config: IPOConfig | None = None, **arguments: Any) -> Any:
        names = [name for name in (*_OF_LOSS, *_IN_BATCH) if name in arguments]
        batch = LossBatch(**{name: arguments.pop(name) for name in names})
        if call.function == "ipo_loss":
            return ipo_ext.IPOLoss(config)(arguments["trainer_logprobs"], batch)
        settings = {k: arguments.pop(k) for k in _OF_MODULE if k in arguments}
        module = ipo_ext.LinearIPOLoss(config, **settings)
        return module(inference_logprobs=batch, **arguments)

    return run_module


def _as_result(call: Call, output: Any) -> Result:
    if not call.is_loss:
        return Result(tuple(output), *(tensor.detach() for tensor in output))
    means = output.metrics.means
    return Result((output.loss,), output.logprobs, output.entropy, means)


def _gradients(
    call: Call, outputs: tuple[torch.Tensor, ...], leaves: list[torch.Tensor], retain_graph: bool
) -> list[torch.Tensor]:
    flowing = [(o, g) for o, g in zip(outputs, call.grads, strict=True) if g is not None]
    into = [o.new_tensor(g) if isinstance(g, float) else g for o, g in flowing]
    made = torch.autograd.grad([o for o, _ in flowing], leaves, into, retain_graph=retain_graph)
    return list(made)


def _run_again(
    call: Call,
    outputs: tuple[torch.Tensor, ...],
    leaves: list[torch.Tensor],
    before: list[torch.Tensor],
) -> str | None:
    """A second backward pass gives the same bits, whatever became of what the first gave."""
    kept = [gradient.clone() for gradient in before]
    for gradient in before:
        gradient.zero_()
    again = _gradients(call, outputs, leaves, retain_graph=False)
    same = all(map(same_bits, again, kept))
    for gradient, value in zip(before, kept, strict=True):
        gradient.copy_(value)
    return None if same else "a second backward pass gave other bits"


def _within(logits: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, str | None]:
    """Of the gradient by all of the memory, that by the logits; none must flow beside them."""
    view = gradient.as_strided(logits.shape, logits.stride(), logits.storage_offset())
    inside = view.clone()
    view.zero_()
    return inside, "a gradient flows beside the logits" if gradient.any() else None


def _beside(logits: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> str | None:
    """Whether what lies beside logits that are overwritten has changed."""
    for memory in (before, after):
        memory.as_strided(logits.shape, logits.stride(), logits.storage_offset()).zero_()
    return None if same_bits(before, after) else "what lies beside the logits has changed"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(integers), b.contiguous().view(integers)
    )
