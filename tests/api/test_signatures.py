"""The modules' calls name what the functions name, and pass each argument on under its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ipo_ext
from ipo_ext import IPOConfig, IPOOutput, LossBatch, modules
from ipo_ext.batch import FIELDS

# Module, its function, and what of the function's arguments the module itself holds.
MODULES = {
    "IPOLoss": (ipo_ext.IPOLoss, ipo_ext.ipo_loss, {"config"}),
    "LinearIPOLoss": (ipo_ext.LinearIPOLoss, ipo_ext.ipo_loss_from_hidden, {"config"}),
    "IPOLMHead": (ipo_ext.IPOLMHead, ipo_ext.ipo_loss_from_hidden, {"config", "weight"}),
}


def parameters_of(function: Callable[..., Any], without: set[str]) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter for parameter in parameters if parameter.name not in without]


@pytest.mark.parametrize("name", MODULES)
def test_a_call_names_what_the_function_names(name: str) -> None:
    module, function, held = MODULES[name]
    ours, theirs = parameters_of(module.forward, {"self"}), parameters_of(function, held)
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.annotation.startswith(expected.annotation), mine.name
        # A LossBatch may hold them; without labels a head gives logits.
        may_be_left_out = mine.name in (*FIELDS, "labels")
        required = expected.default is inspect.Parameter.empty
        allowed = {expected.default, None} if required and may_be_left_out else {expected.default}
        assert mine.default in allowed, mine.name


@pytest.mark.parametrize("name", MODULES)
def test_a_call_passes_everything_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, held = MODULES[name]
    received: dict[str, Any] = {}

    def record(*args: Any, **named: Any) -> IPOOutput:
        received.update(inspect.signature(function).bind(*args, **named).arguments)
        return IPOOutput(torch.zeros(()), {})

    monkeypatch.setattr(modules, function.__name__, record)
    config, linear = IPOConfig(0.5), nn.Linear(3, 5, bias=False)
    loss = ipo_ext.IPOLMHead(linear, config) if name == "IPOLMHead" else module(config)
    arguments = {p.name: f"the {p.name}" for p in parameters_of(function, held)}
    loss(**arguments)
    expected = {**arguments, "config": config}
    if name == "IPOLMHead":
        expected["weight"] = linear.weight
    assert received == expected


def test_a_batch_has_the_inputs_of_the_losses() -> None:
    """In the functions' order; what a gradient flows to and what shapes the call are no inputs."""
    names = [p.name for p in parameters_of(ipo_ext.ipo_loss_from_hidden, {"config"})]
    others = {"hidden", "weight", "labels", "softcap", "chunk_size", "num_active"}
    assert list(FIELDS) == [name for name in names if name not in others]
    assert [p.name for p in parameters_of(LossBatch.__init__, {"self"})] == list(FIELDS)
