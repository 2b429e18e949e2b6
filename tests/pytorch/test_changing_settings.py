"""Settings that change from step to step: torch.compile compiles twice, not once for each value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import ipo_ext
from ipo_ext import IPOConfig, IPOLMHead, IPOLoss, IPOOutput, LinearIPOLoss, ipo_loss
from ipo_ext._ops.changing_numbers import NUMBERS, twin
from tests.support.backends import Backend
from tests.support.cases import same_bits
from tests.support.operators import example_arguments, group_for, operator
from tests.support.subjects import SUBJECTS, TOKENS, VOCABULARY, Subject

STEPS = 20
LOGPROBS = ("token_logprobs", "linear_token_logprobs")
Numbers = dict[str, float]


def numbers_at(step: int) -> Numbers:
    """Every setting that is a number. None is 0 or 1, which compilers know by themselves."""
    return {
        "dppo_mask_low": 0.2 + 0.01 * step,
        "dppo_mask_high": 5.5 - 0.01 * step,
        "adv_tau": 2.5 - 0.01 * step,
        "kl_tau": 0.3 + 0.01 * step,
        "teacher_tau": 0.4 + 0.01 * step,
        "rollout_min_ratio": 1e-5 * (step + 2),
        "temperature": 1.5 - 0.01 * step,
        "softcap": 9.5 + 0.25 * step,
        "logit_scale": 0.6 + 0.01 * step,
        "normalizer": 3.5 + 11 * step,
    }


FIELDS = {field.name for field in dataclasses.fields(IPOConfig)}


def config_of(numbers: Numbers, **rules: Any) -> IPOConfig:
    return IPOConfig(**{name: numbers[name] for name in numbers if name in FIELDS}, **rules)


def keywords(function: str, numbers: Numbers) -> dict[str, float]:
    """Those that the function takes beside a config."""
    names = [] if function == "ipo_loss" else ["temperature", "softcap", "logit_scale"]
    names += [] if function in LOGPROBS else ["normalizer"]
    return {name: numbers[name] for name in names}


def results_of(output: Any, leaf: torch.Tensor) -> list[torch.Tensor]:
    loss = output.loss if isinstance(output, IPOOutput) else (output[0] * 2 + output[1]).sum()
    return [loss.detach(), *(torch.autograd.grad(loss, leaf) if loss.requires_grad else ())]


def assert_compiled_twice(
    first: torch.Tensor,
    step: Callable[[torch.Tensor, Any], Any],
    argument: Callable[[int], Any],
    compiler: str = "aot_eager",
) -> None:
    """``step(leaf, argument(number))`` compiled: in each step the bits of eager, two graphs."""
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for number in range(STEPS):
        traced, eager = (
            results_of(function(leaf, argument(number)), leaf)
            for function, leaf in (
                (function, first.detach().requires_grad_(first.requires_grad))
                for function in (compiled, step)
            )
        )
        assert all(same_bits(a, b) for a, b in zip(traced, eager, strict=True))
    assert counter.frame_count <= 2


def arguments_of_step(function: str, number: int, *, config: bool) -> Numbers:
    """What the compiled function reads; of others torch would trace once more without them."""
    numbers = numbers_at(number)
    fields = [name for name in numbers if name in FIELDS] if config else []
    return {name: numbers[name] for name in (*fields, *keywords(function, numbers))}


def inputs_of(subject: Subject, backend: Backend) -> tuple[torch.Tensor, Any, torch.Tensor]:
    first, constants = subject.inputs(backend.device)
    return first.requires_grad_(), constants, -torch.rand(TOKENS, device=backend.device)


@pytest.mark.parametrize("function", SUBJECTS)
def test_numbers_that_the_compiled_function_is_given(backend: Backend, function: str) -> None:
    subject = SUBJECTS[function]
    first, constants, teacher = inputs_of(subject, backend)

    def step(leaf: torch.Tensor, numbers: Numbers) -> Any:
        options: dict[str, Any] = dict(keywords(function, numbers))
        if function not in LOGPROBS:
            options |= {"config": config_of(numbers), "teacher_logprobs": teacher}
        return subject.function(leaf, *constants, **options)

    config = function not in LOGPROBS
    assert_compiled_twice(first, step, lambda n: arguments_of_step(function, n, config=config))


@pytest.mark.parametrize("function", [name for name in SUBJECTS if name not in LOGPROBS])
def test_a_config_made_anew_for_each_step(backend: Backend, function: str) -> None:
    subject = SUBJECTS[function]
    first, constants, teacher = inputs_of(subject, backend)

    def step(leaf: torch.Tensor, config: IPOConfig) -> Any:
        return subject.function(leaf, *constants, config=config, teacher_logprobs=teacher)

    assert_compiled_twice(first, step, lambda number: config_of(numbers_at(number)))


@pytest.mark.parametrize("rule", ["dppo", "prob_diff", "kpop"])
@pytest.mark.parametrize("made", ["inside", "outside"])
def test_bounds_of_every_rule(backend: Backend, rule: str, made: str) -> None:
    first, constants, _ = inputs_of(SUBJECTS["ipo_loss"], backend)

    def config(number: float) -> IPOConfig:
        return getattr(IPOConfig, rule)(number)  # type: ignore[no-any-return]

    def step(leaf: torch.Tensor, given: Any) -> Any:
        return ipo_loss(leaf, *constants, config=config(given) if made == "inside" else given)

    def argument(step: int) -> Any:
        number = 0.1 + 0.01 * step
        return number if made == "inside" else config(number)

    assert_compiled_twice(first, step, argument)


def test_a_schedule_of_one_setting(backend: Backend) -> None:
    first, constants, _ = inputs_of(SUBJECTS["ipo_loss"], backend)
    base = IPOConfig(kl_tau=0.1)

    def step(leaf: torch.Tensor, kl_tau: float) -> Any:
        return ipo_loss(leaf, *constants, config=dataclasses.replace(base, kl_tau=kl_tau))

    assert_compiled_twice(first, step, lambda number: 0.3 / (number + 2))


@pytest.mark.parametrize("function", SUBJECTS)
def test_without_a_gradient(backend: Backend, function: str) -> None:
    subject = SUBJECTS[function]
    first, constants, _ = inputs_of(subject, backend)

    def step(leaf: torch.Tensor, numbers: Numbers) -> Any:
        return subject.function(leaf, *constants, **keywords(function, numbers))

    assert_compiled_twice(
        first.detach(), step, lambda n: arguments_of_step(function, n, config=False)
    )


# -------------------------------------------------------------------------------------------------
# Settings of modules


def test_a_config_assigned_to_a_module(backend: Backend) -> None:
    first, constants, _ = inputs_of(SUBJECTS["ipo_loss"], backend)
    module = IPOLoss()

    def assign(number: int) -> None:
        module.config = IPOConfig(kl_tau=0.3 + 0.01 * number)

    assert_compiled_twice(first, lambda leaf, _: module(leaf, *constants), assign)


@pytest.mark.parametrize("kind", [LinearIPOLoss, IPOLMHead])
def test_numbers_assigned_to_a_module(backend: Backend, kind: type[LinearIPOLoss]) -> None:
    first, (weight, *constants), _ = inputs_of(SUBJECTS["ipo_loss_from_hidden"], backend)
    linear = torch.nn.Linear(VOCABULARY, VOCABULARY, bias=False, device=backend.device)
    module = IPOLMHead(linear) if kind is IPOLMHead else LinearIPOLoss()
    weights = () if kind is IPOLMHead else (weight,)

    def assign(number: int) -> None:
        module.softcap = 9.5 + 0.25 * number
        module.logit_scale = 0.6 + 0.01 * number
        module.config = IPOConfig(kl_tau=0.3 + 0.01 * number)

    assert_compiled_twice(first, lambda leaf, _: module(leaf, *weights, *constants), assign)


# -------------------------------------------------------------------------------------------------
# Inductor


@pytest.mark.parametrize("inplace", [False, True])
def test_inductor(backend: Backend, inplace: bool) -> None:
    first, constants, teacher = inputs_of(SUBJECTS["ipo_loss_from_logits"], backend)

    def step(leaf: torch.Tensor, numbers: Numbers) -> Any:
        return ipo_ext.ipo_loss_from_logits(
            leaf * 2,
            *constants,
            teacher_logprobs=teacher,
            config=config_of(numbers),
            inplace=inplace,
            **keywords("ipo_loss_from_logits", numbers),
        )

    assert_compiled_twice(first, step, numbers_at, "inductor")


# -------------------------------------------------------------------------------------------------
# The operators behind it


@pytest.mark.parametrize("name", NUMBERS)
def test_a_twin_is_its_operator(backend: Backend, name: str) -> None:
    """The same results of the same numbers, the same arguments."""
    plain, tensors = operator(name), operator(twin(name))
    kinds = [str(argument.type) for argument in plain._schema.arguments]
    assert [str(argument.type) for argument in tensors._schema.arguments] == [
        "Tensor" if kind == "float" else kind for kind in kinds
    ]
    torch.manual_seed(1)
    with group_for(name):
        values = example_arguments(name, backend.device)
        numbers = [
            torch.tensor(value, dtype=torch.float64) if place in NUMBERS[name] else value
            for place, value in enumerate(values)
        ]
        expected, traced = (
            torch.utils._pytree.tree_leaves(function(*copied(arguments)))
            for function, arguments in ((plain, values), (tensors, numbers))
        )
    assert all(same_bits(a, b) for a, b in zip(expected, traced, strict=True))


def copied(arguments: list[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
