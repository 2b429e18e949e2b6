"""Makes a failing call as small and plain as it can, and prints it as a script of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch

from fuzzing.calls import Call, run, storage_of
from fuzzing.judge import judge
from ipo_ext import IPOConfig

_SECONDS = 20.0
_ROWS = ("logits", "hidden")  # have a last dimension of their own


def verdict_of(call: Call) -> str | None:
    return judge([call], [run(call)])[0]


def minimised(call: Call) -> Call:
    """A smaller call of which the same is wrong, as far as is found within a while."""
    deadline = time.monotonic() + _SECONDS
    kind = _kind(verdict_of(call))
    while True:
        for smaller in _smaller(call):
            if time.monotonic() > deadline:
                return call
            if _kind(verdict_of(smaller)) == kind:
                call = smaller
                break
        else:
            return call


def _kind(verdict: str | None) -> str | None:
    """What is wrong, without where and by how much."""
    return verdict and verdict.split("[")[0].split(":")[0]


def _smaller(call: Call) -> Iterator[Call]:
    """Simpler calls, those first that leave out most."""
    if call.fault is None:
        yield from _with_fewer_tokens(call)
    yield from _with_fewer_options(call)
    if call.fault is None:
        yield from _with_fewer_columns(call)
        yield from _with_plainer_tensors(call)


# -------------------------------------------------------------------------------------------------
# Tokens


def _with_fewer_tokens(call: Call) -> Iterator[Call]:
    tokens = _like(call).numel()
    if _like(call).dim() != 1:
        yield _of_tokens(call, torch.ones(tokens, dtype=torch.bool))
    step = tokens
    while step > 1:
        step = (step + 1) // 2
        for begin in range(0, tokens, step):
            stays = torch.ones(tokens, dtype=torch.bool)
            stays[begin : begin + step] = False
            yield _of_tokens(call, stays)


def _like(call: Call) -> torch.Tensor:
    """An argument that has one value for each token."""
    return call.arguments["labels" if "labels" in call.arguments else "loss_mask"]


def _of_tokens(call: Call, stays: torch.Tensor) -> Call:
    """The call for a flat choice of its tokens."""
    shape = _like(call).shape

    def chosen(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or name in ("weight", "bias", "normalizer"):
            return value
        if name == "cu_seqlens":
            before = torch.cat([torch.zeros(1, dtype=torch.int64), stays.cumsum(0)])
            return before[value.long()].to(torch.int32)
        if name in _ROWS:
            return value.reshape(-1, value.shape[-1])[stays]
        return value.reshape(-1)[stays] if value.shape == shape and value.dim() else value

    arguments = {name: chosen(name, value) for name, value in call.arguments.items()}
    if call.arguments.get("temperature") is not None and not shape:
        arguments["temperature"] = call.arguments["temperature"]
    grads = tuple(chosen("grad", grad) if not call.is_loss else grad for grad in call.grads)
    return dataclasses.replace(call, arguments=arguments, grads=grads)


# -------------------------------------------------------------------------------------------------
# Options


_OPTIONS = (
    "teacher_logprobs",
    "loss_weights",
    "cu_seqlens",
    "normalizer",
    "temperature",
    "softcap",
    "logit_scale",
    "bias",
    "chunk_size",
    "num_active",
    "inplace",
    "config",
)


def _with_fewer_options(call: Call) -> Iterator[Call]:
    for name in _OPTIONS:
        if name in call.arguments and not (call.fault and call.fault.argument == name):
            yield call.with_(**{name: None})
    if isinstance(call.arguments.get("config"), IPOConfig):
        yield from _with_plainer_configs(call)
    for change in ({"twice": False}, {"through_module": False}):
        if any(getattr(call, name) for name in change):
            yield dataclasses.replace(call, **change)
    if call.is_loss and call.grads != (1.0,):
        yield dataclasses.replace(call, grads=(1.0,))
    for leaf in call.leaves if len(call.leaves) > 1 else ():
        yield dataclasses.replace(call, leaves=(leaf,))


def _with_plainer_configs(call: Call) -> Iterator[Call]:
    for field in dataclasses.fields(IPOConfig):
        if getattr(call.config, field.name) != field.default:
            try:
                config = dataclasses.replace(call.config, **{field.name: field.default})
            except ValueError:  # bounds that cross
                continue
            yield call.with_(config=config)


# -------------------------------------------------------------------------------------------------
# Columns, layouts and values


def _with_fewer_columns(call: Call) -> Iterator[Call]:
    for name in ("logits", "weight"):
        if name in call.arguments:
            tensor = call.arguments[name]
            dimension = -1 if name == "logits" else 0
            columns = tensor.shape[dimension]
            labels = call.arguments["labels"]
            least = int(labels.max()) + 1 if labels.numel() else 1
            for fewer in sorted({least, columns // 2, columns - 1}):
                if max(least, 1) <= fewer < columns:
                    narrow = tensor.narrow(dimension, 0, fewer).clone()
                    changes = {name: narrow}
                    if "bias" in call.arguments:
                        changes["bias"] = call.arguments["bias"][:fewer].clone()
                    yield call.with_(**changes)
    if "hidden" in call.arguments and (width := call.arguments["hidden"].shape[-1]) > 1:
        half = {n: call.arguments[n][..., : width // 2].clone() for n in ("hidden", "weight")}
        yield call.with_(**half)


def _with_plainer_tensors(call: Call) -> Iterator[Call]:
    for name, tensor in call.arguments.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if not tensor.is_contiguous() or storage_of(tensor).numel() != tensor.numel():
            yield call.with_(**{name: tensor.contiguous().clone()})
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            yield call.with_(**{name: tensor.float()})
        if tensor.is_floating_point() and tensor.dim():
            for digits in (0, 2):
                rounded = torch.where(tensor.isfinite(), tensor.round(decimals=digits), tensor)
                if not torch.equal(rounded.nan_to_num(), tensor.nan_to_num()):
                    yield call.with_(**{name: rounded})


# -------------------------------------------------------------------------------------------------
# As a script


_IMPORTS = (
    "import torch",
    "from torch import inf, nan  # noqa: F401",
    "",
    "import ipo_ext",
    "from ipo_ext import reference",
)


def script_of(call: Call, verdict: str) -> str:
    """A script that makes the call, and the reference's beside it, and prints both."""
    lines = [f'"""Fails: {verdict}"""', "", *_IMPORTS, ""]
    lines += [f"{name} = {_as_code(value)}" for name, value in call.arguments.items()]
    lines += ["", "", "def run(module, **options):"]
    lines += [f"    # {note}" for note in _notes(call)]
    names = ", ".join(f"{name}={name}" for name in call.arguments if name != "inplace")
    lines += _lines_of_leaves(call)
    renamed = names
    for leaf in call.leaves:
        renamed = renamed.replace(f"{leaf}={leaf}", f"{leaf}={leaf}_given")
    lines.append(f"    output = module.{call.function}({renamed}, **options)")
    lines += _lines_of_backward(call)
    lines += ["", "", f"run(ipo_ext{', inplace=True' if call.arguments.get('inplace') else ''})"]
    if call.fault is None:
        of_reference = [
            f'"{name}"' for name in ("chunk_size", "num_active") if name in call.arguments
        ]
        for name in of_reference:
            lines.append(f"# The reference takes no {name}: leave it out there.")
        if not of_reference:
            lines.append("run(reference, dtype=torch.float64)")
    return "\n".join(lines) + "\n"


def _notes(call: Call) -> list[str]:
    notes = []
    if call.fault is not None:
        notes.append(f"Expected: {call.fault.error.__name__} ({call.fault.name}).")
    if call.twice:
        notes.append("The failure was seen with a second backward pass over a retained graph.")
    if call.through_module:
        notes.append("The failure was seen through the function's module and a LossBatch.")
    return notes


def _lines_of_leaves(call: Call) -> list[str]:
    lines = [f"    {leaf}_leaf = {leaf}.detach().requires_grad_()" for leaf in call.leaves]
    for leaf in call.leaves:
        if not call.arguments.get("inplace"):
            lines.append(f"    {leaf}_given = {leaf}_leaf")
            continue
        logits = call.arguments["logits"]
        view = f"{tuple(logits.shape)}, {logits.stride()}, {logits.storage_offset()}"
        lines.append("    # All of the memory, of which the logits are a view.")
        lines.append("    size = logits.untyped_storage().nbytes() // logits.element_size()")
        lines.append("    logits_leaf = logits.as_strided((size,), (1,), 0).detach().clone()")
        lines.append("    logits_leaf.requires_grad_()")
        lines.append(f"    logits_given = (logits_leaf * 1).as_strided({view})")
    return lines


def _lines_of_backward(call: Call) -> list[str]:
    lines = []
    if call.is_loss:
        lines += ["    print(output.loss, output.metrics, output.logprobs, output.entropy)"]
        flowing, outputs = (
            [f"torch.tensor({_number(call.grads[0])}).to(output.loss)"],
            ["output.loss"],
        )
    else:
        lines += ["    print(output)"]
        pairs = [(i, grad) for i, grad in enumerate(call.grads) if grad is not None]
        flowing = [f"{_as_code(grad)}.to(output[{i}])" for i, grad in pairs]
        outputs = [f"output[{i}]" for i, _ in pairs]
    if call.leaves:
        leaves = ", ".join(f"{leaf}_leaf" for leaf in call.leaves)
        lines.append(f"    into = [{', '.join(flowing)}]")
        lines.append(f"    print(torch.autograd.grad([{', '.join(outputs)}], [{leaves}], into))")
    return lines


def _as_code(value: Any) -> str:
    """An expression of exactly this value, a tensor with its strides and what lies between."""
    if isinstance(value, IPOConfig):
        return f"ipo_ext.{value!r}"
    if not isinstance(value, torch.Tensor):
        return _number(value) if isinstance(value, float) else repr(value)
    if value.is_meta:
        return f"torch.empty({tuple(value.shape)}, dtype={value.dtype}, device='meta')"
    plain = value.is_contiguous() and storage_of(value).numel() == value.numel()
    memory = storage_of(value.detach())
    code = f"torch.tensor({memory.tolist()}, dtype={value.dtype})"
    how = "reshape" if plain else "as_strided"
    place = f"{tuple(value.shape)}"
    if not plain:
        place += f", {value.stride()}, {value.storage_offset()}"
    return f"{code}.{how}({place})" + (".requires_grad_()" if value.requires_grad else "")


def _number(value: float) -> str:
    return repr(value)
