"""The loss from log-probabilities in every form of call, and as functions that torch transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from ipo_ext import IPOOutput, ipo_loss
from tests.support.cases import LogprobsCase, same_bits
from tests.support.layouts import strided_within
from tests.support.logprobs import DTYPES, random_case

TOKENS = 100


FORMS: dict[str, Callable[[], LogprobsCase]] = {
    "plain": lambda: random_case(TOKENS),
    "packed": lambda: random_case(TOKENS, segments="empty-between"),
    "everything": lambda: random_case(
        TOKENS, teacher=True, weights=True, segments="sevens", normalizer=torch.tensor(70)
    ),
    "bf16": lambda: random_case(TOKENS, dtypes=DTYPES["bf16"], normalizer=torch.tensor(7.5)),
    "fp16": lambda: random_case(TOKENS, dtypes=DTYPES["fp16"], weights=True),
    "fp64-inference": lambda: random_case(TOKENS, dtypes=DTYPES["fp64-inference"], teacher=True),
    "strided": lambda: random_case(TOKENS, weights=True).map_tokens(
        lambda t: strided_within(t, 10)
    ),
    "all-masked": lambda: random_case(TOKENS, masked=1.0),
    "empty": lambda: random_case(0, segments="one"),
}


forms = pytest.mark.parametrize("form", FORMS)


def output_of(case: LogprobsCase) -> Callable[..., IPOOutput]:
    """``ipo_loss`` as a function of the trainer's log-probabilities; compilers trace it."""
    arguments = case.arguments

    def output(trainer: torch.Tensor, **changes: Any) -> IPOOutput:
        return ipo_loss(**{**arguments, "trainer_logprobs": trainer, **changes})

    return output


def loss_of(case: LogprobsCase) -> Callable[[torch.Tensor], torch.Tensor]:
    output = output_of(case)
    return lambda trainer: output(trainer).loss


def token_arguments(case: LogprobsCase) -> tuple[torch.Tensor, ...]:
    return case.trainer_logprobs, case.inference_logprobs, case.advantages, case.loss_mask


def leaf(case: LogprobsCase) -> torch.Tensor:
    return case.trainer_logprobs.detach().requires_grad_()


def compiled(function: Any = ipo_loss, backend: Any = "inductor") -> Any:
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def assert_same_tree(a: Any, b: Any) -> None:
    """Same structure (types included) and the same bits in every tensor."""
    assert pytree.tree_structure(a) == pytree.tree_structure(b)
    assert all(same_bits(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))
