"""The public functions on small inputs, one row each: what tests of torch's machinery run over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import ipo_ext

TOKENS, VOCABULARY = 24, 13
Constants = tuple[torch.Tensor, ...]


class Subject(NamedTuple):
    """A function of one differentiable tensor and of constants."""

    function: Callable[..., Any]
    operator: str  # its forward operator
    make: Callable[[int], tuple[torch.Tensor, Constants]]  # both, for a number of tokens
    multiplies: bool = False  # its first two inputs, which autocast then casts

    def inputs(
        self, device: torch.device | str, tokens: int = TOKENS
    ) -> tuple[torch.Tensor, Constants]:
        torch.manual_seed(tokens)
        first, constants = self.make(tokens)
        return first.to(device), tuple(tensor.to(device) for tensor in constants)

    def objective(self, first: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """A scalar that differentiates all that is differentiable."""
        output = self.function(first, *constants)
        if isinstance(output, ipo_ext.IPOOutput):
            return output.loss
        logprobs, entropy = output
        return (logprobs * 2 + entropy).sum()

    def gradient(self, first: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        leaf = first.detach().requires_grad_()
        return torch.autograd.grad(self.objective(leaf, *constants), leaf)[0]


def logprobs(tokens: int) -> tuple[torch.Tensor, Constants]:
    trainer = -torch.rand(tokens)
    return trainer, constants_of_loss(trainer)


def logits(tokens: int) -> tuple[torch.Tensor, Constants]:
    return torch.randn(tokens, VOCABULARY), (torch.randint(VOCABULARY, (tokens,)),)


def logits_and_constants(tokens: int) -> tuple[torch.Tensor, Constants]:
    scores, (labels,) = logits(tokens)
    trainer = scores.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    return scores, (labels, *constants_of_loss(trainer))


def hidden(tokens: int) -> tuple[torch.Tensor, Constants]:
    states, constants = logits(tokens)
    return states, (torch.randn(VOCABULARY, VOCABULARY), *constants)


def hidden_and_constants(tokens: int) -> tuple[torch.Tensor, Constants]:
    states, constants = logits_and_constants(tokens)
    return states, (torch.eye(VOCABULARY), *constants)


def per_token(tensor: torch.Tensor) -> bool:
    """Whether it has a row for each of TOKENS tokens, as all but weights have."""
    return tensor.shape[0] == TOKENS


def constants_of_loss(trainer: torch.Tensor) -> Constants:
    inference = trainer + torch.randn_like(trainer)
    return inference, torch.randn_like(trainer), torch.rand_like(trainer) < 0.8


SUBJECTS = {
    "ipo_loss": Subject(ipo_ext.ipo_loss, "ipo_loss", logprobs),
    "ipo_loss_from_logits": Subject(
        ipo_ext.ipo_loss_from_logits, "ipo_loss_from_logits", logits_and_constants
    ),
    "ipo_loss_from_hidden": Subject(
        ipo_ext.ipo_loss_from_hidden, "ipo_loss_from_hidden", hidden_and_constants, True
    ),
    "token_logprobs": Subject(ipo_ext.token_logprobs, "token_logprobs", logits),
    "linear_token_logprobs": Subject(
        ipo_ext.linear_token_logprobs, "linear_token_logprobs", hidden, True
    ),
}
