"""What a page's blocks may use without defining it. A page that is not here defines all."""

from __future__ import annotations

import sys
import tempfile
import types
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import ipo_ext

Names = dict[str, Any]

BATCH, LENGTH, VOCABULARY, WIDTH = 2, 9, 50, 16


def policy() -> Names:
    """LENGTH tokens of which all but the first are predicted; every input that trains is a leaf."""
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    hidden = torch.randn(BATCH, LENGTH, WIDTH)
    logits = lm_head(hidden).detach()
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    loss_mask = torch.rand(BATCH, LENGTH - 1) < 0.7
    return {
        "tokens": tokens,
        "labels": tokens,
        "model": types.SimpleNamespace(lm_head=lm_head),
        "weight": lm_head.weight,
        "hidden": hidden.requires_grad_(),
        "logits": logits.requires_grad_(),
        "trainer_logprobs": logprobs.clone().requires_grad_(),
        "inference_logprobs": logprobs + 0.1 * torch.randn_like(logprobs),
        "advantages": torch.randn_like(logprobs),
        "loss_mask": loss_mask,
        "num_tokens": float(loss_mask.sum()),
        "num_active": int(loss_mask.sum()),
        "cu_seqlens": (LENGTH - 1) * torch.arange(BATCH + 1, dtype=torch.int32),
        "device": torch.device("cpu"),
    }


def readme(until_the_end: ExitStack) -> Names:
    return vars(ipo_ext) | policy()


def installing(until_the_end: ExitStack) -> Names:
    names = policy()

    def head_and_loss(hidden: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden[:, :-1], names["weight"])
        constants = (names[name] for name in ("inference_logprobs", "advantages", "loss_mask"))
        return ipo_ext.ipo_loss_from_logits(logits, names["tokens"][:, 1:], *constants).loss

    return {"torch": torch, "hidden": names["hidden"], "head_and_loss": head_and_loss}


def integrations(until_the_end: ExitStack) -> Names:
    """One process that is a group, and empty modules in the place of prime-rl's, which no package
    index has."""
    until_the_end.enter_context(mock.patch.dict(sys.modules))
    for name in (
        "prime_rl",
        "prime_rl.trainer",
        "prime_rl.trainer.models",
        "prime_rl.trainer.models.layers",
        "prime_rl.trainer.models.layers.lm_head",
        "prime_rl.trainer.rl",
        "prime_rl.trainer.rl.train",
    ):
        sys.modules[name] = types.ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])

    make_a_group(until_the_end)
    return policy()


def make_a_group(until_the_end: ExitStack) -> None:
    """Of this process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    until_the_end.callback(torch.distributed.destroy_process_group)


def distributed(until_the_end: ExitStack) -> Names:
    """A batch of 24 packed tokens."""
    make_a_group(until_the_end)
    tokens = torch.randint(VOCABULARY, (24,))
    table = torch.randn(VOCABULARY, VOCABULARY, requires_grad=True)

    def policy_logprobs(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return table[inputs].log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    shifted_labels = tokens.roll(-1)
    logprobs = policy_logprobs(tokens, shifted_labels).detach()
    return {
        "tokens": tokens,
        "shifted_labels": shifted_labels,
        "policy_logprobs": policy_logprobs,
        "inference_logprobs": logprobs + 0.1 * torch.randn(24),
        "advantages": torch.randn(24),
        "loss_mask": torch.rand(24) < 0.7,
    }


def vocabulary_parallel(until_the_end: ExitStack) -> Names:
    """One process that is a group, and has all of the head."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    until_the_end.callback(torch.distributed.destroy_process_group)
    names = policy()
    states = names["hidden"][:, :-1]
    return names | {"lm_head": names["model"].lm_head, "hidden_of_rank": states}


def mismatch(until_the_end: ExitStack) -> Names:
    """A folder that is removed, and an engine without an answer in the place of vLLM's."""
    folder = Path(until_the_end.enter_context(tempfile.TemporaryDirectory()))
    llm = types.SimpleNamespace(generate=lambda prompts, sampling: [])
    return {"llm": llm, "prompts": [], "sampling": None, "folder": folder, "step": 3}


def quickstart(until_the_end: ExitStack) -> Names:
    """A folder that is removed."""
    return {"folder": Path(until_the_end.enter_context(tempfile.TemporaryDirectory()))}


def docstrings() -> Names:
    names = vars(ipo_ext) | policy()
    return names | {
        "trainer": names["trainer_logprobs"],
        "inference": names["inference_logprobs"],
        "mask": names["loss_mask"],
        "lm_head": names["model"].lm_head,
    }


OF_PAGE: dict[str, Callable[[ExitStack], Names]] = {
    "README.md": readme,
    "docs/distributed.md": distributed,
    "docs/installing.md": installing,
    "docs/integrations.md": integrations,
    "docs/mismatch.md": mismatch,
    "docs/quickstart.md": quickstart,
    "docs/vocabulary-parallel.md": vocabulary_parallel,
}


def namespace_of(page: str, until_the_end: ExitStack) -> Names:
    """The page's names; ``until_the_end`` undoes what they needed."""
    torch.manual_seed(0)
    return OF_PAGE[page](until_the_end) if page in OF_PAGE else {}
