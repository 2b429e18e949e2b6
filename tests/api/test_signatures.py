"""Signatures name every argument; modules name what the functions name, and pass each on."""

from __future__ import annotations

import functools
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import ipo_ext
from ipo_ext import IPOConfig, IPOOutput, LossBatch, modules
from ipo_ext._ops.arguments import IPOLossFromLogitsArguments, LossInputs
from ipo_ext._optional_tensors import ANNOTATIONS, NAMES, OptionalTensors
from ipo_ext.batch import FIELDS

# What takes the optional tensors, with the arguments that users see.
TENSORS = "teacher_logprobs=None, loss_weights=None, cu_seqlens=None"
SHARED = "sequence_ids=None, num_sequences=None, cp_group=None"
GROUPS = "groups=None, num_groups=None"
REST = f"inference_mask_logprobs=None, {SHARED}, {GROUPS}"
SHARD = "tp_group=None, vocab_size=None, vocab_start=None"
SPELLED_OUT: dict[Callable[..., Any], str] = {
    ipo_ext.ipo_loss: (
        "trainer_logprobs, inference_logprobs, advantages, loss_mask, *, "
        f"{TENSORS}, {REST}, normalizer=None, config=IPOConfig(), "
        "trainer_mask_logprobs=None, histogram=False"
    ),
    ipo_ext.ipo_loss_from_logits: (
        "logits, labels, inference_logprobs, advantages, loss_mask, *, temperature=None, "
        f"softcap=None, {TENSORS}, {REST}, normalizer=None, inplace=False, config=IPOConfig(), "
        f"logit_scale=None, sampling_mask=None, entropy=True, histogram=False, {SHARD}"
    ),
    ipo_ext.ipo_loss_from_hidden: (
        "hidden, weight, labels, inference_logprobs, advantages, loss_mask, *, temperature=None, "
        f"softcap=None, {TENSORS}, {REST}, normalizer=None, chunk_size=None, num_active=None, "
        "config=IPOConfig(), logit_scale=None, bias=None, sampling_mask=None, entropy=True, "
        f"histogram=False, {SHARD}, reduce_hidden_grad=True, "
        "sequence_parallel=False"
    ),
    ipo_ext.IPOLoss.forward: (
        "self, trainer_logprobs, inference_logprobs, advantages=None, loss_mask=None, *, "
        f"{TENSORS}, {REST}, normalizer=None, trainer_mask_logprobs=None, histogram=False"
    ),
    ipo_ext.LinearIPOLoss.forward: (
        "self, hidden, weight, labels, inference_logprobs, advantages=None, loss_mask=None, *, "
        f"temperature=None, softcap=None, {TENSORS}, {REST}, normalizer=None, chunk_size=None, "
        "num_active=None, logit_scale=None, bias=None, sampling_mask=None, entropy=True, "
        "histogram=False"
    ),
    ipo_ext.IPOLMHead.forward: (
        "self, hidden, labels=None, inference_logprobs=None, advantages=None, loss_mask=None, *, "
        f"temperature=None, softcap=None, {TENSORS}, {REST}, normalizer=None, chunk_size=None, "
        "num_active=None, logit_scale=None, sampling_mask=None, entropy=True, "
        "histogram=False"
    ),
    LossBatch.__init__: (
        "self, inference_logprobs, advantages, loss_mask, *, temperature=None, "
        f"{TENSORS}, {REST}, normalizer=None"
    ),
}
functions = pytest.mark.parametrize("function", SPELLED_OUT, ids=lambda each: each.__qualname__)

# Module, its function, and what of the function's arguments the module itself holds.
OF_SHARD = {"tp_group", "vocab_size", "vocab_start", "reduce_hidden_grad", "sequence_parallel"}
OF_HEAD = {"weight", "bias"}
MODULES = {
    "IPOLoss": (ipo_ext.IPOLoss, ipo_ext.ipo_loss, {"config"}),
    "LinearIPOLoss": (ipo_ext.LinearIPOLoss, ipo_ext.ipo_loss_from_hidden, {"config", *OF_SHARD}),
    "IPOLMHead": (
        ipo_ext.IPOLMHead,
        ipo_ext.ipo_loss_from_hidden,
        {"config", *OF_SHARD, *OF_HEAD},
    ),
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
    config, linear = IPOConfig(0.5), nn.Linear(3, 5)
    shard = {each: f"the {each}" for each in OF_SHARD & held}
    operands = (linear, config) if name == "IPOLMHead" else (config,)
    loss = module(*operands, **shard)
    arguments = {p.name: f"the {p.name}" for p in parameters_of(function, held)}
    loss(**arguments)
    expected = {**arguments, **shard, "config": config}
    if name == "IPOLMHead":
        expected |= {"weight": linear.weight, "bias": linear.bias}
    assert received == expected


def test_a_batch_has_the_inputs_of_the_losses() -> None:
    """In the functions' order; what a gradient flows to and what shapes the call are no inputs."""
    names = [p.name for p in parameters_of(ipo_ext.ipo_loss_from_hidden, {"config"})]
    others = {"hidden", "weight", "bias", "labels", "softcap", "logit_scale"}
    others |= {"chunk_size", "num_active", "sampling_mask", "entropy", "histogram", *OF_SHARD}
    assert list(FIELDS) == [name for name in names if name not in others]
    assert [p.name for p in parameters_of(LossBatch.__init__, {"self"})] == list(FIELDS)


# ---------------------------------------------------------------------------------------------
# The optional tensors, each a keyword to whoever looks or calls


@functions
def test_every_keyword_stands_in_the_signature(function: Callable[..., Any]) -> None:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    text = str(inspect.Signature(bare)).replace(repr(IPOConfig()), "IPOConfig()")
    assert text == f"({SPELLED_OUT[function]})"
    written = {name: signature.parameters[name].annotation for name in NAMES}
    assert written == ANNOTATIONS  # in words, as the other annotations are
    hints = get_type_hints(function)
    assert hints.keys() == {*signature.parameters, "return"} - {"self"}
    kinds = get_type_hints(OptionalTensors)
    assert {name: hints[name] for name in NAMES} == kinds
    tensors = [name for name in NAMES if kinds[name] == torch.Tensor | None]
    others = ("num_sequences", "cp_group", "num_groups")
    assert tensors == [name for name in NAMES if name not in others]


@pytest.mark.parametrize(
    "thing",
    [ipo_ext.ipo_loss, ipo_ext.ipo_loss_from_logits, ipo_ext.ipo_loss_from_hidden, LossBatch],
)
def test_the_docstring_tells_of_every_argument(thing: Callable[..., Any]) -> None:
    described = re.search(r"^Args:\n(.*?)\n\n", inspect.getdoc(thing), re.M | re.S)[1]
    names = ", ".join(re.findall(r"^ {4}(\w[\w, ]*):", described, re.M)).split(", ")
    assert sorted(names) == sorted(inspect.signature(thing).parameters)


def test_they_are_the_operators_own() -> None:
    """But for the normalizer, which may be a float, for what not every operator takes, for what
    says how ranks share sequences, of which the operators are given the totals, and for groups,
    into which metrics are put behind the operators."""
    *own, of_ids = (name for name in NAMES if name not in (SHARED + GROUPS))
    assert (*own, "normalizer", "sequence_totals") == tuple(LossInputs._field_defaults)
    given, kinds = get_type_hints(OptionalTensors), get_type_hints(LossInputs)
    assert {name: given[name] for name in own} == {name: kinds[name] for name in own}
    assert given[of_ids] == get_type_hints(IPOLossFromLogitsArguments)[of_ids]


def call(function: Callable[..., Any], **named: Any) -> Any:
    """With None for whatever it cannot do without."""
    needed = [
        None
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is inspect.Parameter.empty
    ]
    return function(*needed, **named)


@functions
@pytest.mark.parametrize("given", [{"teacher": None}, {"loss_weights": None, "tensors": {}}])
def test_an_unknown_keyword_is_refused_as_python_does(
    function: Callable[..., Any], given: dict[str, Any]
) -> None:
    unknown = list(given)[-1]
    with pytest.raises(TypeError) as caught:
        call(function, **given)
    message = f"{function.__qualname__}() got an unexpected keyword argument {unknown!r}"
    assert str(caught.value) == message


@functions
def test_a_keyword_given_twice_is_an_error(function: Callable[..., Any]) -> None:
    first = next(name for name in inspect.signature(function).parameters if name != "self")
    with pytest.raises(TypeError, match=rf"multiple values for argument '{first}'"):
        call(function, **{first: None})


def test_a_module_does_not_take_its_own_config_again() -> None:
    with pytest.raises(TypeError, match=r"^IPOLoss\.forward\(\) got an unexpected .* 'config'$"):
        ipo_ext.IPOLoss()(torch.zeros(1), torch.zeros(1), config=IPOConfig())


def test_functions_can_be_bound_and_pickled() -> None:
    bound = functools.partial(ipo_ext.ipo_loss, loss_weights=None, normalizer=2.0)
    parameters = inspect.signature(bound).parameters
    assert parameters["normalizer"].default == 2.0
    assert "tensors" not in parameters
    assert pickle.loads(pickle.dumps(bound)).func is ipo_ext.ipo_loss
    head = ipo_ext.IPOLMHead(nn.Linear(3, 5, bias=False))
    assert (
        list(inspect.signature(head.forward).parameters)
        == list(inspect.signature(ipo_ext.IPOLMHead.forward).parameters)[1:]
    )
