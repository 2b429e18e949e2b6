"""The tensors that every form of the loss may be given besides, named once for all of them, and how
packed segments are pieces of sequences.

A public function takes them as ``**tensors: Unpack[OptionalTensors]``, by which type checkers and
editors know each keyword; ``spells_out_tensors`` shows each in its signature, and
``refuse_unknown_names`` is Python's own check of the keywords.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TypedDict, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., object])


class OptionalTensors(TypedDict, total=False):
    """Each None by default; ``ipo_loss`` says what they mean."""

    teacher_logprobs: torch.Tensor | None  # [...]
    loss_weights: torch.Tensor | None  # [...]
    cu_seqlens: torch.Tensor | None  # [segments + 1] int32
    inference_mask_logprobs: torch.Tensor | None  # [..., ids]; with config.score_centering
    # How segments are pieces of sequences that ranks share.
    sequence_ids: torch.Tensor | None  # [segments] int32
    num_sequences: int | None
    cp_group: torch.distributed.ProcessGroup | torch.distributed.device_mesh.DeviceMesh | None
    # Over what metrics are wanted besides.
    groups: torch.Tensor | None  # [segments], [...] of rows or [...] of tokens; int32
    num_groups: int | None


# As they are written above, which is how the modules hold those of the other arguments.
ANNOTATIONS = {
    name: reference.__forward_arg__ for name, reference in OptionalTensors.__annotations__.items()
}
NAMES = tuple(ANNOTATIONS)


def spells_out_tensors(function: Function) -> Function:
    """Gives ``function`` a signature with a keyword for each of its ``**tensors``.

    They stand before ``normalizer``, in the one order that the inputs have everywhere.
    """
    signature = inspect.signature(function)
    *parameters, tensors = signature.parameters.values()
    place = list(signature.parameters).index("normalizer")
    parameters[place:place] = [
        tensors.replace(name=name, kind=tensors.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in ANNOTATIONS.items()
    ]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    del function.__annotations__[tensors.name]
    function.__annotations__.update(ANNOTATIONS)
    return function


def refuse_unknown_names(function: Callable[..., object], given: Iterable[str]) -> None:
    """Raises what Python would if ``function`` had no ``**tensors`` but a keyword for each."""
    for name in given:
        if name not in NAMES:
            raise TypeError(
                f"{function.__qualname__}() got an unexpected keyword argument {name!r}"
            )
