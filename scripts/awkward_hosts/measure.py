"""Runs a package's losses on every awkward case, and says in words what each of them does.

`python scripts/awkward_hosts/measure.py host_trl` runs in that package's environment and prints
JSON; scripts/awkward_tokens.py makes the environments and a page of all answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import sys
import types
from collections.abc import Callable

import torch

Loss = Callable[["Batch"], torch.Tensor]  # a scalar that depends on batch.trainer
# [1, T, V] logits and [1, T] token ids to [1, T] log-probabilities
Logprobs = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

AT = (0, 1)  # the awkward token, active
MASKED = (0, 3)
VOCAB = 6


@dataclasses.dataclass
class Batch:
    """Two responses as a trainer holds them; all tensors are [2, T], the mask is bool."""

    trainer: torch.Tensor
    sampled: torch.Tensor
    advantages: torch.Tensor  # the same for all tokens of a response
    mask: torch.Tensor

    def rows(self, count: int) -> Batch:
        return Batch(*(getattr(self, field.name)[:count] for field in dataclasses.fields(self)))

    def with_padding(self, columns: int) -> Batch:
        """More positions at the end, masked and 0 but for the advantages."""
        pad = torch.nn.functional.pad
        advantages = pad(self.advantages[None], (0, columns), mode="replicate")[0]
        widened = (pad(values, (0, columns)) for values in (self.trainer, self.sampled))
        return Batch(*widened, advantages, pad(self.mask, (0, columns)))


def plain(sign: float = 1.0) -> Batch:
    """Nothing awkward: the ratio is 1 in the response of ``AT`` and 1.05 in the other."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    trainer = torch.tensor([[-1.0, -3.0, -2.0, 0.0], [-0.5, -1.5, 0.0, 0.0]])
    sampled = trainer.clone()
    sampled[1, :2] -= math.log(1.05)
    advantages = torch.tensor([[sign], [0.5]]).expand(2, 4).contiguous()
    return Batch(trainer, sampled, advantages, mask)


def sampled_as(value: float, at: tuple[int, int] = AT) -> Callable[[float], Batch]:
    def batch(sign: float) -> Batch:
        result = plain(sign)
        result.sampled[at] = value
        return result

    return batch


def nothing_active(sign: float) -> Batch:
    batch = plain(sign)
    return dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))


# Columns of the page. What an active token's sampling log-probability is:
ACTIVE = {
    "-inf": sampled_as(-math.inf),
    "NaN": sampled_as(math.nan),
    "0": sampled_as(0.0),
    "a ratio of 50": sampled_as(-3.0 - math.log(50)),
}
# What a masked token's is, or that there are more of them:
OUTSIDE = {
    "masked NaN": sampled_as(math.nan, MASKED),
    "masked -1e4": sampled_as(-1e4, MASKED),
    "more padding": lambda sign: plain(sign).with_padding(4),
}
EMPTY = {"everything masked": nothing_active, "no rows": lambda sign: plain(sign).rows(0)}


def evaluate(loss: Loss, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    trainer = batch.trainer.clone().requires_grad_()
    value = loss(dataclasses.replace(batch, trainer=trainer))
    (gradient,) = torch.autograd.grad(value, trainer, allow_unused=True)
    return value.detach(), torch.zeros_like(trainer) if gradient is None else gradient


def raised(error: Exception) -> str:
    return f"raises {type(error).__name__}"


def faults(value: torch.Tensor, gradient: torch.Tensor) -> str:
    """What of both is not finite, or nothing."""
    found = []
    if not value.isfinite():
        found.append("loss NaN" if value.isnan() else "loss infinite")
    if not gradient.isfinite().all():
        found.append("gradient NaN" if gradient.isnan().any() else "gradient infinite")
    return ", ".join(found)


def of_active(loss: Loss, batch: Callable[[float], Batch]) -> str:
    """The weight at which the awkward token trains: its gradient over that at a ratio of 1."""

    def words(sign: float) -> str:
        _, usual = evaluate(loss, plain(sign))
        value, gradient = evaluate(loss, batch(sign))
        if usual[AT] == 0:
            return "not measured"
        weight = (gradient[AT] / usual[AT]).item()
        if found := faults(value, gradient):
            return f"{found}, token dropped" if weight == 0 else found
        if not gradient[0].any():
            return "response dropped"
        return f"weight {weight:.2g}" if weight else "dropped"

    return for_both_signs(words)


def of_masked(loss: Loss, batch: Callable[[float], Batch]) -> str:
    def words(sign: float) -> str:
        expected, usual = evaluate(loss, plain(sign))
        given = batch(sign)
        value, gradient = evaluate(loss, given)
        if found := faults(value, gradient):
            return found
        if gradient[~given.mask].any():
            return "masked tokens train"
        gradient = gradient[:, : usual.shape[1]]
        if not gradient[0].any() and usual[0].any():
            return "response dropped"
        if not torch.allclose(gradient, usual, atol=1e-6):
            return f"gradient times {(gradient.norm() / usual.norm()).item():.2g}"
        return "none" if torch.allclose(value, expected, atol=1e-6) else "loss changes"

    return for_both_signs(words)


def of_empty(loss: Loss, batch: Callable[[float], Batch]) -> str:
    try:
        value, gradient = evaluate(loss, batch(1.0))
    except Exception as error:
        return raised(error)
    return faults(value, gradient) or ("0" if value == 0 and not gradient.any() else "not 0")


def for_both_signs(words: Callable[[float], str]) -> str:
    try:
        up, down = words(1.0), words(-1.0)
    except Exception as error:
        return raised(error)
    return up if up == down else f"A > 0: {up}; A < 0: {down}"


def of_token_id(logprobs: Logprobs) -> str:
    """A token id beyond the vocabulary at an active position."""
    logits = torch.arange(3.0 * VOCAB).reshape(1, 3, VOCAB) / 5
    ids = torch.tensor([[0, VOCAB, 1]])
    try:
        taken = logprobs(logits, ids)[0, 1]
    except Exception as error:
        return raised(error)
    logit = (taken + logits[0, 1].logsumexp(-1)).item()
    return f"taken for a logit of {logit:.3g}" if math.isfinite(logit) else f"{taken.item()}"


def import_parents_empty(module: str) -> None:
    """Lets ``module`` be imported without what its parent packages import, such as engines."""
    for parents in range(1, module.count(".") + 1):
        name = ".".join(module.split(".")[:parents])
        spec = importlib.util.find_spec(name)
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package


def answers_of(name: str) -> dict[str, dict]:
    """Of each loss the words by case, of each function of logits those for the token id."""
    with contextlib.redirect_stdout(sys.stderr):  # hosts print
        host = importlib.import_module(name)
        return {
            "losses": {
                label: {
                    **{case: of_active(loss, make) for case, make in ACTIVE.items()},
                    **{case: of_masked(loss, make) for case, make in OUTSIDE.items()},
                    **{case: of_empty(loss, make) for case, make in EMPTY.items()},
                }
                for label, loss in host.LOSSES.items()
            },
            "logprobs": {label: of_token_id(of) for label, of in host.LOGPROBS.items()},
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(answers_of(sys.argv[1])))
