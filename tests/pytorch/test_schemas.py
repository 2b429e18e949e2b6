"""The named tuples of Python against the operators' schemas, and the schemas' common order."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from ipo_ext._ops import arguments as groups
from ipo_ext._ops import changing_numbers, library
from ipo_ext.config import IPOConfig, LossSettings
from ipo_ext.diagnostics import info
from tests.support.backends import Backend

# Names in the order in which every schema has them; what else a schema has comes before or behind.
COMMON = [
    *groups.LogitScaling._fields,
    *groups.LossInputs._fields,
    *LossSettings._fields,
]


def arguments_of(library: Any, operator: str) -> list[tuple[str, str]]:
    """Name and type of each argument, as the schema's text has them."""
    text = str(getattr(library, operator).default._schema)
    within = re.fullmatch(r"[\w:]+\((.*)\) -> .*", text)[1]
    pairs = (argument.rsplit(" ", 1) for argument in within.split(", "))
    return [(name, re.sub(r"\(.!\)", "", kind)) for kind, name in pairs]


def test_every_operator_has_its_arguments() -> None:
    twins = {changing_numbers.twin(name) for name in changing_numbers.NUMBERS}
    expected = {*groups.OPERATORS, *twins, "log_bound"}
    assert {name.removeprefix("ipo_ext::") for name in info.operators()} == expected


@pytest.mark.parametrize("operator", groups.OPERATORS)
def test_the_fields_are_the_schema_s(backend: Backend, operator: str) -> None:
    expected = arguments_of(library.operators(), operator)
    assert groups.schema_fields(groups.OPERATORS[operator]) == expected


@pytest.mark.parametrize("operator", groups.OPERATORS)
def test_shared_arguments_come_in_one_order(operator: str) -> None:
    """find_faults takes some of them; what comes behind the settings are an operator's own."""
    names = [name for name, _ in groups.schema_fields(groups.OPERATORS[operator])]
    shared = [name for name in names if name in COMMON]
    assert shared == [name for name in COMMON if name in shared]
    first = names.index(shared[0]) if shared else 0
    assert names[first : first + len(shared)] == shared


@pytest.mark.parametrize("operator", groups.OPERATORS)
def test_flatten_and_unflatten(operator: str) -> None:
    kind = groups.OPERATORS[operator]
    names = [name for name, _ in groups.schema_fields(kind)]
    arguments = groups.unflatten(kind, names)
    assert type(arguments) is kind
    assert list(groups.flatten(arguments)) == names
    inputs = getattr(arguments, "inputs", None)
    if inputs is not None:
        assert inputs == groups.LossInputs._fields
        assert arguments.settings == LossSettings._fields


def test_a_schema_is_made_of_the_fields() -> None:
    text = groups.schema(groups.LinearTokenLogprobsArguments, groups.LinearTokenLogprobsResults)
    assert text == (
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? temperature, "
        "float softcap, Tensor? sampling_mask, bool with_entropy, Tensor? candidates, "
        "SymInt chunk_size) -> (Tensor logprobs, Tensor entropy, Tensor softmax_stats, "
        "Tensor candidate_logprobs)"
    )


def test_the_operator_says_which_rule_it_does_not_know(backend: Backend) -> None:
    inputs = groups.LossInputs(*(torch.zeros(2, device=backend.device),) * 2, torch.ones(2) == 1)
    settings = IPOConfig().settings(torch.float32)._replace(mask_rule=99)
    with pytest.raises(RuntimeError, match="mask_rule: expected the index of a word, got 99"):
        library.operators().ipo_loss(torch.zeros(2), *inputs, *settings, False)
