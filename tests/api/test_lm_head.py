"""What IPOLMHead can stand in for: the output of the linear that it replaces, or a refusal."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.modules import module as global_hooks
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from ipo_ext import IPOLMHead, reference

TOKENS, WIDTH, VOCABULARY = 37, 16, 53

Linear = Callable[[], nn.Module]
Change = Callable[[nn.Linear], Any]


def plain_linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=False)


def linear_with_bias() -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, VOCABULARY)
    nn.init.normal_(linear.bias)
    return linear


def inputs() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Hidden states; labels, inference log-probabilities of a plain linear, advantages, mask."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    logits = plain_linear()(hidden).detach()
    inference = logits.log_softmax(dim=-1).gather(-1, labels[:, None])[:, 0]
    advantages = torch.randn(TOKENS, generator=generator)
    return hidden, (labels, inference, advantages, torch.ones(TOKENS, dtype=torch.bool))


def assert_stands_in(head: nn.Module, linear: nn.Module, steps: int = 2) -> None:
    """The head's logits, loss, gradients and state are those of ``linear`` over some steps."""
    hidden, constants = inputs()
    assert list(head.state_dict()) == list(linear.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (head, linear)]
    assert torch.equal(head(hidden), linear(hidden))
    for _ in range(steps):
        loss = head(hidden, *constants).loss
        expected = reference.ipo_loss_from_logits(linear(hidden), *constants).loss
        torch.testing.assert_close(loss, expected, check_dtype=False)
        for optimizer, value in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            value.backward()
        theirs = dict(linear.named_parameters())
        for name, parameter in head.named_parameters():
            assert_near(parameter.grad, theirs[name].grad)
        for optimizer in optimizers:
            optimizer.step()
    for name, tensor in head.state_dict().items():
        assert_near(tensor, linear.state_dict()[name])


def assert_near(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the rounding of sums in another order, in fp32."""
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------
# A bias is the linear's own


def test_a_head_with_a_bias() -> None:
    linear = linear_with_bias()
    head = IPOLMHead(linear)
    assert head.bias is linear.bias
    assert_stands_in(copy.deepcopy(head), copy.deepcopy(linear))
    linear.bias.requires_grad_(False)
    hidden, constants = inputs()
    head(hidden, *constants).loss.backward()
    assert linear.weight.grad is not None
    assert linear.bias.grad is None


def test_a_parametrized_bias_is_evaluated_in_each_call() -> None:
    linear = linear_with_bias()
    scale_weight(linear)
    parametrize.register_parametrization(linear, "bias", Scale(0.5))
    twin = copy.deepcopy(linear)
    assert_stands_in(IPOLMHead(linear), twin)


# -------------------------------------------------------------------------------------------------
# A parametrized weight is evaluated in each call


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.factor * weight


def scale_weight(module: nn.Module, factor: float = 0.5) -> None:
    parametrize.register_parametrization(module, "weight", Scale(factor))


def scale_twice(module: nn.Module) -> None:
    scale_weight(module)
    scale_weight(module, 3.0)


PARAMETRIZATIONS: dict[str, Change] = {
    "register_parametrization": scale_weight,
    "two of them": scale_twice,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("change", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
def test_a_parametrized_weight_is_evaluated_in_each_call(change: Change) -> None:
    linear = plain_linear()
    change(linear)
    twin = copy.deepcopy(linear)
    head = IPOLMHead(linear)
    assert isinstance(head, IPOLMHead)
    assert {id(p) for p in head.parameters()} == {id(p) for p in linear.parameters()}
    assert_stands_in(head, twin)


def test_a_parametrized_head_is_copied_loaded_and_made_plain() -> None:
    linear = plain_linear()
    scale_weight(linear)
    head = IPOLMHead(linear)
    assert_stands_in(copy.deepcopy(head), copy.deepcopy(linear))
    other = plain_linear()
    scale_weight(other, 2.0)
    head.load_state_dict(other.state_dict())
    torch.testing.assert_close(head.weight, other.weight, rtol=0, atol=0)
    parametrize.remove_parametrizations(head, "weight")
    parametrize.remove_parametrizations(other, "weight")
    assert isinstance(head.weight, nn.Parameter)
    assert_stands_in(head, other)


# -------------------------------------------------------------------------------------------------
# Refused: what would compute something else, or lose the weight


def named(name: str, *bases: type, **members: Any) -> type:
    """A class whose full name is that of another package's, so that the package is not needed."""
    home, _, own = name.rpartition(".")
    return type(own, bases, {"__module__": home, "__qualname__": own, **members})


def halved(self: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    return 0.5 * F.linear(hidden, self.weight)


def subclass(name: str, **members: Any) -> Linear:
    return lambda: named(name, nn.Linear, **members)(WIDTH, VOCABULARY, bias=False)


def changed(change: Change) -> Linear:
    def build() -> nn.Module:
        linear = plain_linear()
        change(linear)
        return linear

    return build


def replace_forward(linear: nn.Linear) -> None:
    forward = linear.forward
    linear.forward = lambda hidden: 0.5 * forward(hidden)


def add_accelerate_hook(linear: nn.Linear) -> None:
    """What accelerate.hooks.add_hook_to_module does, as in offloading: the weight is on meta."""
    linear._hf_hook, linear._old_forward = object(), linear.forward
    linear.weight = nn.Parameter(linear.weight.to("meta"))
    linear.forward = functools.update_wrapper(functools.partial(halved, linear), linear.forward)


def weight_as(kind: Callable[[torch.Tensor], Any]) -> Linear:
    def build() -> nn.Module:
        linear = plain_linear()
        weight = linear.weight.detach()
        del linear.weight
        linear.weight = kind(weight)
        return linear

    return build


def replace_bias(linear: nn.Linear, kind: Callable[[torch.Tensor], Any]) -> None:
    del linear.bias
    linear.bias = kind(torch.zeros(VOCABULARY))


class Quantized(torch.Tensor):
    """Stands for a tensor subclass whose product with hidden states is its own."""


OWN_FORWARD = r"linear: expected an nn\.Linear with torch's own forward, got "
HOOKS = r"linear: expected an nn\.Linear without hooks, got .*Linear\(in_features=16.* with the "
REFUSED: dict[str, tuple[Linear, type[Exception], str]] = {
    "no linear": (
        lambda: nn.Embedding(3, 4),
        TypeError,
        r"linear: expected an nn\.Linear, got torch\.nn\.modules\.sparse\.Embedding, .*"
        "ipo_loss_from_logits on its output",
    ),
    "in a container that casts": (
        lambda: named("trl.models.CastOutputToFloat", nn.Sequential)(plain_linear()),
        TypeError,
        r"linear: expected an nn\.Linear, got trl\.models\.CastOutputToFloat, .*pass the plain",
    ),
    "compiled": (
        lambda: torch.compile(plain_linear()),
        TypeError,
        r"got torch\._dynamo\.eval_frame\.OptimizedModule, .*pass the plain linear",
    ),
    "quantized module": (
        lambda: named("torch.ao.nn.quantized.dynamic.modules.linear.Linear", nn.Module)(),
        TypeError,
        r"got torch\.ao\.nn\.quantized\.dynamic\.modules\.linear\.Linear, which",
    ),
    "LoRA": (
        lambda: named("peft.tuners.lora.layer.Linear", nn.Module)(),
        TypeError,
        r"^linear: expected an nn\.Linear, got peft\.tuners\.lora\.layer\.Linear, which may "
        r"compute something else; merge its adapter \(merge_and_unload\) or keep the head out of "
        r"the adapter's modules, or use ipo_loss_from_logits on its output$",
    ),
    "subclass": (
        subclass("their.Half", forward=halved),
        TypeError,
        OWN_FORWARD
        + r"their\.Half\(in_features=16, .*\), whose forward is tests\.api\.test_lm_head\.halved,",
    ),
    "quantized subclass": (
        subclass("bitsandbytes.nn.modules.Linear4bit", forward=halved),
        TypeError,
        OWN_FORWARD + r"bitsandbytes\.nn\.modules\.Linear4bit\(",
    ),
    "__call__": (
        subclass("their.Half", __call__=halved),
        TypeError,
        r"linear: expected an nn\.Linear with torch's own __call__, got their\.Half\(",
    ),
    "_call_impl": (
        changed(lambda linear: setattr(linear, "_call_impl", functools.partial(halved, linear))),
        TypeError,
        r"own _call_impl, got .* whose _call_impl is functools\.partial, which may",
    ),
    "forward replaced": (
        changed(replace_forward),
        TypeError,
        OWN_FORWARD + r"torch\.nn\.modules\.linear\.Linear\(in_features=16, .*\), whose forward is "
        r"tests\.api\.test_lm_head\.replace_forward\.<locals>\.<lambda>, which may compute "
        "something else; pass the plain linear, or use ipo_loss_from_logits on its output",
    ),
    "forward of another": (
        changed(lambda linear: setattr(linear, "forward", plain_linear().forward)),
        TypeError,
        OWN_FORWARD,
    ),
    "accelerate, offloaded": (
        changed(add_accelerate_hook),
        TypeError,
        OWN_FORWARD + r".* is a wrapper of torch\.nn\.modules\.linear\.Linear\.forward, which .*; "
        r"remove accelerate's hook \(accelerate\.hooks\.remove_hook_from_module\), or use",
    ),
    "forward pre-hook": (
        changed(lambda linear: linear.register_forward_pre_hook(lambda _, args: (args[0] / 2,))),
        ValueError,
        HOOKS + r"forward pre-hook tests\.api\.test_lm_head\.<lambda>\.<locals>\.<lambda>, "
        r"which the head would not run; remove it \(handle\.remove\(\),.*apply it to the head",
    ),
    "forward pre-hook with keywords": (
        changed(
            lambda linear: linear.register_forward_pre_hook(
                lambda _, args, named: None, with_kwargs=True
            )
        ),
        ValueError,
        HOOKS + "forward pre-hook",
    ),
    "forward hook": (
        changed(lambda linear: linear.register_forward_hook(lambda _, args, logits: logits / 2)),
        ValueError,
        HOOKS + "forward hook",
    ),
    "full backward hook": (
        changed(lambda linear: linear.register_full_backward_hook(lambda *_: None)),
        ValueError,
        HOOKS + "backward hook",
    ),
    "backward hook": (
        changed(lambda linear: linear.register_backward_hook(lambda *_: None)),
        ValueError,
        HOOKS + "backward hook",
    ),
    "backward pre-hook": (
        changed(lambda linear: linear.register_full_backward_pre_hook(lambda *_: None)),
        ValueError,
        HOOKS + "backward pre-hook",
    ),
    "hook on a parametrized linear": (
        changed(
            lambda linear: (scale_weight(linear), linear.register_forward_hook(lambda *_: None))
        ),
        ValueError,
        HOOKS + "forward hook",
    ),
    "old weight_norm": (
        changed(old_weight_norm),
        ValueError,
        HOOKS + r"forward pre-hook torch\.nn\.utils\.weight_norm\.WeightNorm, .*remove_weight_norm",
    ),
    "old spectral_norm": (
        changed(old_spectral_norm),
        ValueError,
        HOOKS + r"forward pre-hook torch\.nn\.utils\.spectral_norm\.SpectralNorm",
    ),
    "prune": (
        changed(lambda linear: prune.l1_unstructured(linear, "weight", amount=0.5)),
        ValueError,
        HOOKS + r"forward pre-hook torch\.nn\.utils\.prune\.L1Unstructured.*prune\.remove",
    ),
    "quantized weight": (
        weight_as(lambda weight: nn.Parameter(weight.as_subclass(Quantized))),
        TypeError,
        r"linear\.weight: expected a plain nn\.Parameter, "
        r"got tests\.api\.test_lm_head\.Quantized in .*Linear\("
        ".*convert it to a plain tensor",
    ),
    "lazy": (
        lambda: nn.LazyLinear(VOCABULARY, bias=False),
        TypeError,
        r"linear\.weight: expected a plain nn\.Parameter, got torch\.nn\.parameter\."
        "UninitializedParameter in .*LazyLinear.*call the model once",
    ),
    "buffer": (
        weight_as(nn.Buffer),
        ValueError,
        r"linear\.weight: expected a parameter of the linear, got torch\..* that is none in .*"
        r"make it an nn\.Parameter",
    ),
    "attribute": (
        weight_as(lambda weight: 2 * weight),
        ValueError,
        r"linear\.weight: expected a parameter of the linear, got torch\.Tensor that is none",
    ),
    "no weight": (
        changed(lambda linear: setattr(linear, "weight", None)),
        ValueError,
        r"linear\.weight: expected a parameter of the linear, got builtins\.NoneType",
    ),
    "bias that is no parameter": (
        changed(lambda linear: replace_bias(linear, nn.Buffer)),
        ValueError,
        r"linear\.bias: expected a parameter of the linear, got torch\..* that is none in .*"
        r"make it an nn\.Parameter",
    ),
    "quantized bias": (
        changed(
            lambda linear: replace_bias(
                linear, lambda bias: nn.Parameter(bias.as_subclass(Quantized))
            )
        ),
        TypeError,
        r"linear\.bias: expected a plain nn\.Parameter, "
        r"got tests\.api\.test_lm_head\.Quantized in .*Linear\(",
    ),
}


@pytest.mark.parametrize(("build", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_computes_something_else_is_refused(
    build: Linear, error: type[Exception], message: str
) -> None:
    linear = build()
    with pytest.raises(error, match=message):
        IPOLMHead(linear)


def test_a_forward_replaced_in_the_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "forward", halved)
    with pytest.raises(TypeError, match=r"whose forward is tests\.api\.test_lm_head\.halved"):
        IPOLMHead(plain_linear())


@pytest.fixture
def one_process() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


SHARDINGS: dict[str, Callable[[nn.Linear, Any], Any]] = {
    "fully_shard": lambda linear, mesh: fully_shard(linear, mesh=mesh),
    "fully_shard of the model": lambda linear, mesh: fully_shard(nn.Sequential(linear), mesh=mesh),
    "tensor parallel": lambda linear, mesh: parallelize_module(linear, mesh, ColwiseParallel()),
    "by hand": lambda linear, mesh: setattr(
        linear, "weight", nn.Parameter(distribute_tensor(linear.weight, mesh, [Shard(0)]))
    ),
}


@pytest.mark.parametrize("shard", SHARDINGS.values(), ids=SHARDINGS)
def test_a_sharded_linear_is_refused(
    shard: Callable[[nn.Linear, Any], Any], one_process: Any
) -> None:
    linear = plain_linear()
    shard(linear, one_process)
    message = r"linear\.weight: expected a plain nn\.Parameter, got torch\.distributed\.tensor\."
    with pytest.raises(TypeError, match=message + "DTensor in .*make the head before fully_shard"):
        IPOLMHead(linear)


# -------------------------------------------------------------------------------------------------
# Accepted: what still is a plain linear


def wrap_and_unwrap_forward(linear: nn.Linear) -> None:
    """As accelerate's remove_hook_from_module: the bound method stays behind on the instance."""
    forward = linear.forward
    linear.forward = lambda hidden: 0.5 * forward(hidden)
    linear.forward = forward


ACCEPTED: dict[str, Linear] = {
    "plain": plain_linear,
    "forward put back": changed(wrap_and_unwrap_forward),
    "compiled in place": changed(lambda linear: linear.compile(backend="eager")),
    "subclass with torch's forward": lambda: NonDynamicallyQuantizableLinear(
        WIDTH, VOCABULARY, bias=False
    ),
    "hook removed": changed(lambda linear: linear.register_forward_hook(print).remove()),
    "old weight_norm removed": changed(
        lambda linear: nn.utils.remove_weight_norm(old_weight_norm(linear))
    ),
    "pruned for good": changed(
        lambda linear: (
            prune.l1_unstructured(linear, "weight", amount=0.5),
            prune.remove(linear, "weight"),
        )
    ),
    "gradient hook": changed(lambda linear: linear.weight.register_hook(lambda grad: grad / 2)),
}


@pytest.mark.parametrize("build", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_a_plain_linear_is_accepted(build: Linear) -> None:
    linear = build()
    head = IPOLMHead(linear)
    assert head.weight is linear.weight
    assert list(head.state_dict()) == ["weight"]
    assert_stands_in(copy.deepcopy(head), copy.deepcopy(linear))


def test_a_lazy_linear_after_its_first_call() -> None:
    linear = nn.LazyLinear(VOCABULARY, bias=False)
    linear(inputs()[0])
    assert_stands_in(IPOLMHead(copy.deepcopy(linear)), linear)


def test_a_linear_on_meta_gets_its_weight_later() -> None:
    with torch.device("meta"):
        head = IPOLMHead(plain_linear())
    hidden, constants = inputs()
    with pytest.raises(ValueError, match="weight: expected device cpu like hidden, got meta"):
        head(hidden, *constants)
    head.to_empty(device="cpu").load_state_dict(plain_linear().state_dict())
    assert_stands_in(head, plain_linear())


def test_a_linear_of_fake_tensors_is_accepted() -> None:
    with FakeTensorMode():
        assert IPOLMHead(plain_linear())(torch.zeros(3, WIDTH)).shape == (3, VOCABULARY)


def test_global_hooks_run_for_the_head_too() -> None:
    """They belong to no module, so they are not refused: tools that watch modules use them."""
    hidden, constants = inputs()
    handle = global_hooks.register_module_forward_pre_hook(lambda _, args: (args[0] / 2, *args[1:]))
    try:
        head = IPOLMHead(plain_linear())
        logits, loss = head(hidden), head(hidden, *constants).loss
        expected = plain_linear()(hidden)
    finally:
        handle.remove()
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(loss, head(hidden / 2, *constants).loss)


# -------------------------------------------------------------------------------------------------
# Changes after construction: made on the head they hold, made on the replaced linear they do not


def tie(module: nn.Module) -> None:
    torch.manual_seed(5)
    module.weight = nn.Embedding(VOCABULARY, WIDTH).weight


ON_THE_HEAD: dict[str, Change] = {
    **{name: PARAMETRIZATIONS[name] for name in ("register_parametrization", "weight_norm")},
    "old weight_norm": old_weight_norm,
    "prune": lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
    "tied later": tie,
    "forward pre-hook": lambda module: module.register_forward_pre_hook(
        lambda _, args: (args[0] / 2, *args[1:])
    ),
}


@pytest.mark.parametrize("change", ON_THE_HEAD.values(), ids=ON_THE_HEAD)
def test_changes_of_the_head_hold(change: Change) -> None:
    linear = plain_linear()
    head = IPOLMHead(plain_linear())
    for module in (head, linear):
        change(module)
    assert_stands_in(head, linear)


AFTERWARDS: dict[str, Change] = {
    "register_parametrization": scale_weight,
    "forward replaced": replace_forward,
    "forward hook": lambda linear: linear.register_forward_hook(lambda _, args, logits: logits / 2),
    "another weight": tie,
}


@pytest.mark.parametrize("change", AFTERWARDS.values(), ids=AFTERWARDS)
def test_later_changes_of_the_linear_are_not_seen(change: Change) -> None:
    linear = plain_linear()
    head = IPOLMHead(linear)
    change(linear)
    assert_stands_in(head, plain_linear())


def test_later_values_of_the_weight_are_seen() -> None:
    linear = plain_linear()
    head = IPOLMHead(linear)
    with torch.no_grad():
        linear.weight.mul_(0.5)
    assert_stands_in(head, copy.deepcopy(linear))


# -------------------------------------------------------------------------------------------------
# Scale and softcap: of the loss alone


class ScalesAndCapsItsLogits(nn.Module):
    """Ends as Cohere and Gemma 2 do: the model scales and caps what its head gives."""

    def __init__(self, softcap: float, logit_scale: float) -> None:
        super().__init__()
        self.lm_head: nn.Module = plain_linear()
        self.softcap, self.logit_scale = softcap, logit_scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scaled = self.logit_scale * self.lm_head(hidden)
        return self.softcap * torch.tanh(scaled / self.softcap)


def test_a_model_that_scales_and_caps_its_logits_does_so_once() -> None:
    hidden, constants = inputs()
    hidden, how = 8 * hidden, {"softcap": 2.0, "logit_scale": 0.3}
    model = ScalesAndCapsItsLogits(**how)
    logits = model(hidden)
    model.lm_head = IPOLMHead(model.lm_head, **how)
    torch.testing.assert_close(model(hidden), logits, rtol=0, atol=0)
    torch.testing.assert_close(
        model.lm_head(hidden, *constants).loss,
        reference.ipo_loss_from_logits(logits, *constants).loss,
        check_dtype=False,
    )


def test_scale_and_softcap_of_one_call_are_the_loss_alone_too() -> None:
    head = IPOLMHead(plain_linear())
    hidden, constants = inputs()
    how = {"softcap": 0.5, "logit_scale": 2.0}
    capped = reference.ipo_loss_from_logits(plain_linear()(hidden), *constants, **how).loss
    ours = head(hidden, *constants, **how).loss
    torch.testing.assert_close(ours, capped, check_dtype=False)
