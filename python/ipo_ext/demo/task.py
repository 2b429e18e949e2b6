"""The task: "07+38=" is to be continued with "45."; whether it was can be verified.

Prompts have a fixed width, so a batch needs no padding before the answer. Answers have one or two
digits and an end token, so the policy has to learn where to stop, and the loss mask ends at a
different place in different rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

VOCABULARY = "0123456789+=."
"""A token's id is its position in this string."""

END, PLUS, EQUALS = (VOCABULARY.index(character) for character in ".+=")

OPERANDS = 50
"""Operands are 0 .. OPERANDS - 1, written with two digits."""

PROMPT_LENGTH = len("07+38=")
RESPONSE_LENGTH = len("98.") + 1
"""In tokens; one more than the longest right answer, so that running on is possible."""

SEQUENCE_LENGTH = PROMPT_LENGTH + RESPONSE_LENGTH


def encode(text: str) -> Tensor:
    """Token ids of `text`: int64 [len(text)]."""
    return torch.tensor([VOCABULARY.index(character) for character in text])


def sample_operands(count: int, generator: torch.Generator) -> Tensor:
    """Pairs to add, uniform and with replacement: int64 [count, 2]."""
    return torch.randint(OPERANDS, (count, 2), generator=generator)


def prompts(operands: Tensor) -> Tensor:
    """The text "aa+bb=" of every pair: int64 [B, 2] -> int64 [B, PROMPT_LENGTH]."""
    tens, ones = operands // 10, operands % 10
    plus, equals = torch.full_like(ones[:, 0], PLUS), torch.full_like(ones[:, 0], EQUALS)
    return torch.stack((tens[:, 0], ones[:, 0], plus, tens[:, 1], ones[:, 1], equals), dim=1)


def answers(operands: Tensor) -> Tensor:
    """The right responses, filled up with END: int64 [B, 2] -> int64 [B, RESPONSE_LENGTH]."""
    table = [encode(str(total).ljust(RESPONSE_LENGTH, ".")) for total in range(2 * OPERANDS - 1)]
    return torch.stack(table)[operands.sum(dim=1)]


def response_mask(responses: Tensor) -> Tensor:
    """True up to and including the first END: int64 [B, R] -> bool [B, R]."""
    ends = (responses == END).long()
    return ends.cumsum(dim=1) - ends == 0


def verify(responses: Tensor, operands: Tensor) -> Tensor:
    """The reward, 1 for exactly the sum and an END, otherwise 0: int64 [B, R] -> fp32 [B].

    What was sampled after the first END does not count.
    """
    right = (responses == answers(operands)) | ~response_mask(responses)
    return right.all(dim=1).float()
