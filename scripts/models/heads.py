"""What a model does around its head, found by measuring, and whether our head does the same."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from models import tiny
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ipo_ext import IPOConfig, IPOLMHead, reference

# Settings whose names may mean that logits are scaled or capped. Each that is there is set to a
# number that shows, so that no default of 1 or None hides what a checkpoint may do.
_SUSPECT = re.compile(r"logit|cap$|capping|multiplier|mup|scale|scaling|dim_model_base|depth")
_PROBES = (3.0, 0.5, 2)
_CLOSE = {"rtol": 1e-4, "atol": 1e-4}

WORKS, WITH_ARGUMENT, REFUSED, OTHER, NOT_RUN = (
    "works",
    "works with an argument",
    "refused",
    "no linear head",
    "not run",
)
AS_THEY_ARE, ELSEWHERE = "as they are", "the head's input"


class Outcome(NamedTuple):
    architecture: str
    verdict: str
    arguments: str = ""  # as a call would write them
    hidden: str = ""  # what comes between the base model and the head
    has_bias: bool = False
    note: str = ""


class Seen(NamedTuple):
    """One forward pass: what went into the head, what it gave, and what the model made of it."""

    hidden: torch.Tensor  # [batch, tokens, width]
    scores: torch.Tensor  # [batch, tokens, vocabulary]
    logits: torch.Tensor  # the same
    last_hidden: torch.Tensor | None  # of the base model


class Unreadable(Exception):
    """What becomes of the head's output is nothing that arguments could say."""


def examine(kind: type[PreTrainedModel]) -> Outcome:
    """The verdict on an architecture; whatever keeps it from running is a note."""
    name = kind.__name__
    try:
        model = tiny.tiny_model(kind)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            what = "no head" if head is None else f"its head is a {type(head).__name__}"
            return Outcome(name, OTHER, note=what)
        seen = run(model)
    except Unreadable as error:
        return Outcome(name, REFUSED, note=str(error))
    except Exception as error:
        *_, last_line = str(error).strip().split("\n")
        return Outcome(name, NOT_RUN, note=last_line.strip())
    return _judge(kind, model, seen)


def _judge(kind: type[PreTrainedModel], model: PreTrainedModel, seen: Seen) -> Outcome:
    head = model.get_output_embeddings()
    sources: dict[str, list[str]] = {}  # of each number, what it may be in every run
    hidden = AS_THEY_ARE
    try:
        for probed, here in itertools.chain([(model, seen)], _with_settings(kind)):
            numbers = arguments_for(probed.config, here)
            assert_same(probed.get_output_embeddings(), here, numbers)
            factor = _factor_of_hidden(here)
            if factor is None:
                hidden = ELSEWHERE
            elif factor != 1:
                numbers["hidden"] = factor
            for name, number in numbers.items():
                found = _sources(probed.config, number)
                sources[name] = [text for text in sources.get(name, found) if text in found]
        for name, found in sources.items():
            if not found:
                raise Unreadable(f"{name} is a number that is no setting")
    except (Unreadable, TypeError, ValueError) as error:
        note, *_ = str(error).split(", which may compute")
        return Outcome(kind.__name__, REFUSED, note=note, has_bias=head.bias is not None)
    first = {name: found[0] for name, found in sources.items()}
    if "hidden" in first:
        hidden = f"times `{first.pop('hidden')}`, or with that as `logit_scale`"
    text = ", ".join(f"{name}={source}" for name, source in first.items())
    verdict = WITH_ARGUMENT if text else WORKS
    return Outcome(kind.__name__, verdict, text, hidden, head.bias is not None)


def _with_settings(kind: type[PreTrainedModel]) -> Iterator[tuple[PreTrainedModel, Seen]]:
    """With each suspect setting at a number that shows."""
    for name, value in vars(tiny.tiny_config(kind).get_text_config()).items():
        is_number = value is None or isinstance(value, (int, float))
        if not _SUSPECT.search(name) or not is_number or isinstance(value, bool):
            continue
        for number in _PROBES:
            try:
                model = tiny.tiny_model(kind, **{name: number})
                seen = run(model)
            except Unreadable:
                raise
            except Exception:  # of the wrong type, or none that the model can have
                continue
            yield model, seen
            break


# -------------------------------------------------------------------------------------------------
# One forward pass


def run(model: PreTrainedModel) -> Seen:
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    last_hidden: list[torch.Tensor] = []
    base = model.base_model if model.base_model is not model else getattr(model, "model", None)
    hooks = [
        model.get_output_embeddings().register_forward_hook(
            lambda _, inputs, scores: calls.append((inputs[0], scores))
        )
    ]
    if base is not None:
        hooks.append(base.register_forward_hook(lambda _, __, out: last_hidden.append(_first(out))))
    try:
        with torch.no_grad():
            logits = model(input_ids=tiny.tokens()).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) != 1:
        raise Unreadable(f"its head is called {len(calls)} times in a forward pass")
    hidden, scores = calls[0]
    if not (hidden.isfinite().all() and logits.isfinite().all()):
        raise RuntimeError("logits that are not finite, of random weights")
    if scores.shape != logits.shape:
        raise Unreadable(
            f"its logits {list(logits.shape)} are not of the shape of its head's output "
            f"{list(scores.shape)}"
        )
    return Seen(hidden, scores, logits, last_hidden[-1] if last_hidden else None)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def _factor_of_hidden(seen: Seen) -> float | None:
    """What the base model's hidden states are multiplied by; None if that is not all."""
    last, hidden = seen.last_hidden, seen.hidden
    if last is None or last.shape != hidden.shape:
        return None
    return 1.0 if torch.equal(last, hidden) else _factor(last, hidden)


# -------------------------------------------------------------------------------------------------
# Scale and softcap


def arguments_for(config: PretrainedConfig, seen: Seen) -> dict[str, float]:
    """The numbers with which the head gives the model's logits."""
    if torch.allclose(seen.scores, seen.logits, **_CLOSE):
        return {}
    factor = _factor(seen.scores, seen.logits)
    if factor is not None:
        return {"logit_scale": factor}
    for name, cap in _numbers(config):
        if _SUSPECT.search(name) and _is_capped(seen, cap):
            return {"softcap": cap}
    raise Unreadable("its logits are no scaled or capped output of its head")


def _is_capped(seen: Seen, cap: float) -> bool:
    return torch.allclose(cap * (seen.scores / cap).tanh(), seen.logits, **_CLOSE)


def _factor(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """The number that one is of the other, if it is one."""
    factor = ((before * after).sum() / (before * before).sum()).item()
    return factor if torch.allclose(factor * before, after, **_CLOSE) else None


def _sources(config: PretrainedConfig, number: float) -> list[str]:
    """Settings, and quotients with one that is suspect, that are the number."""
    numbers = list(_numbers(config))
    suspect = [pair for pair in numbers if _SUSPECT.search(pair[0])]
    expressions = [(f"config.{name}", value) for name, value in suspect]
    expressions += [(f"1 / config.{name}", 1 / value) for name, value in suspect]
    for name, value in suspect:
        for other, beside in numbers:
            expressions.append((f"config.{name} / config.{other}", value / beside))
            expressions.append((f"config.{other} / config.{name}", beside / value))
    return [text for text, value in expressions if math.isclose(value, number, rel_tol=1e-5)]


def _numbers(config: PretrainedConfig) -> Iterator[tuple[str, float]]:
    for name, value in vars(config.get_text_config()).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            yield name, float(value)


# -------------------------------------------------------------------------------------------------
# Our head against the model's own path


def assert_same(head: nn.Linear, seen: Seen, numbers: dict[str, float]) -> None:
    """Raises unless log-probabilities, loss and gradients by the head are the model's."""
    generator = torch.Generator().manual_seed(1)
    shape = seen.logits.shape[:-1]
    labels = torch.randint(seen.logits.shape[-1], shape, generator=generator)
    logprobs = seen.logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    inference = logprobs + 0.3 * torch.randn(shape, generator=generator)
    advantages = torch.randn(shape, generator=generator)
    constants = (labels, inference, advantages, torch.ones(shape, dtype=torch.bool))
    every = IPOConfig(0.0, float("inf"))
    out = IPOLMHead(head, every, **numbers)(seen.hidden, *constants)
    own = reference.ipo_loss_from_logits(_own_path(head, seen, numbers), *constants, config=every)
    pairs: list[tuple[str, torch.Tensor, torch.Tensor]] = [
        ("log-probabilities", out.logprobs, logprobs),
        ("loss", out.loss, own.loss),
    ]
    parameters = list(head.parameters())
    gradients = (torch.autograd.grad(result.loss, parameters) for result in (out, own))
    pairs += [("gradient", *both) for both in zip(*gradients, strict=True)]
    for what, ours, theirs in pairs:
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
            raise Unreadable(f"its {what} differ by {(ours - theirs).abs().max():.2g}")


def _own_path(head: nn.Linear, seen: Seen, numbers: dict[str, float]) -> torch.Tensor:
    """The logits once more, for their gradient, in eager torch."""
    logits = numbers.get("logit_scale", 1.0) * F.linear(seen.hidden, head.weight, head.bias)
    cap = numbers.get("softcap")
    return logits if cap is None else cap * torch.tanh(logits / cap)
