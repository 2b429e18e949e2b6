"""Shapes, dtypes and devices of every argument: one check, shared by the API and the fakes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ipo_ext import _C
from ipo_ext._ops.arguments import TOKEN_INPUTS, Components, HeadInputs, LogitScaling, LossInputs
from ipo_ext._precision import warn_if_rounded

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BOOLEAN = (torch.bool,)
LABELS = (torch.int32, torch.int64)
NORMALIZER = (*FLOATING, torch.int32, torch.int64)
MOST_IDS = 512  # of a token's sampling mask, and of its candidates


class Like(NamedTuple):
    """What other tensors must agree with, and its name for the user."""

    name: str
    tensor: torch.Tensor


def compute_dtype(trainer_logprobs: torch.Tensor, inference_logprobs: torch.Tensor) -> torch.dtype:
    """float64 if either log-probability is, else float32."""
    return widened(torch.promote_types(trainer_logprobs.dtype, inference_logprobs.dtype))


def widened(dtype: torch.dtype) -> torch.dtype:
    """What is computed in from tensors of ``dtype``: float64 or float32."""
    return torch.promote_types(dtype, torch.float32)


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient by hidden states from forward to backward: fp16 might not hold it unscaled."""
    return torch.float32 if dtype == torch.float16 else dtype


def check_per_token_loss(
    trainer_logprobs: torch.Tensor, inputs: LossInputs, teacher_tau: float
) -> None:
    """Raises unless the arguments of the loss from log-probabilities agree."""
    check_tensor("trainer_logprobs", trainer_logprobs, FLOATING)
    check_device_supported("trainer_logprobs", trainer_logprobs)
    _check_inputs_of_loss(Like("trainer_logprobs", trainer_logprobs), inputs, teacher_tau)


def check_components(trainer_logprobs: torch.Tensor, components: Components) -> None:
    """Raises unless what stands beside the loss agrees with its log-probabilities."""
    like = Like("trainer_logprobs", trainer_logprobs)
    for name in ("ce_weights", "ref_kl_weights", "ref_logprobs"):
        tensor = getattr(components, name)
        if tensor is not None:
            _check_per_token(name, tensor, FLOATING, like)
    for name in ("ce_scale", "ref_kl_scale"):
        tensor = getattr(components, name)
        if tensor is not None:
            _check_scalar(name, tensor, NORMALIZER, like)


def check_centering(
    trainer_logprobs: torch.Tensor,
    trainer_mask_logprobs: torch.Tensor,
    inference_mask_logprobs: torch.Tensor,
) -> None:
    """Raises unless there are log-probabilities of ids for each token, the trainer's and others."""
    name, like = "trainer_mask_logprobs", Like("trainer_logprobs", trainer_logprobs)
    check_tensor(name, trainer_mask_logprobs, FLOATING)
    shape = trainer_logprobs.shape
    if trainer_mask_logprobs.shape[:-1] != shape or trainer_mask_logprobs.dim() != len(shape) + 1:
        raise ValueError(
            f"{name}: expected shape {[*shape, 'K']}, K ids for each of trainer_logprobs "
            f"{_shape(trainer_logprobs)}, got {_shape(trainer_mask_logprobs)}"
        )
    check_device(name, trainer_mask_logprobs, like)
    _check_per_token(
        "inference_mask_logprobs",
        inference_mask_logprobs,
        FLOATING,
        Like(name, trainer_mask_logprobs),
    )


def check_inference_mask_logprobs(
    inference_mask_logprobs: torch.Tensor | None, sampling_mask: torch.Tensor | None
) -> None:
    """Raises unless the sampler's log-probabilities are of the ids that are replayed."""
    name = "inference_mask_logprobs"
    if inference_mask_logprobs is None:
        return
    if sampling_mask is None:
        raise ValueError(
            f"sampling_mask: expected a tensor beside {name}, whose ids it names, got None"
        )
    _check_per_token(name, inference_mask_logprobs, FLOATING, Like("sampling_mask", sampling_mask))


def check_logits_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scaling: LogitScaling,
    inputs: LossInputs,
    teacher_tau: float,
    *,
    is_sharded: bool = False,
) -> None:
    """Raises unless the arguments of the loss from logits agree."""
    check_logits(logits, labels, scaling, is_sharded=is_sharded)
    _check_inputs_of_loss(Like("labels", labels), inputs, teacher_tau)


def check_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scaling: LogitScaling,
    candidates: torch.Tensor | None = None,
    *,
    is_sharded: bool = False,
) -> None:
    """Raises unless logits, labels, temperature, sampling mask and candidates agree.

    A shard may be without columns.
    """
    check_tensor("logits", logits, FLOATING)
    check_device_supported("logits", logits)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and not is_sharded):
        raise ValueError(f"logits: expected shape [..., vocabulary], got {_shape(logits)}")
    _check_labels(labels, Like("logits", logits), scaling, candidates)


def _check_labels(
    labels: torch.Tensor, rows: Like, scaling: LogitScaling, candidates: torch.Tensor | None
) -> None:
    """Raises unless there is a label for each row, and what else each has of its own."""
    check_tensor("labels", labels, LABELS)
    if labels.shape != rows.tensor.shape[:-1]:
        raise ValueError(
            f"labels: expected shape {_shape(rows.tensor)[:-1]}, that of {rows.name} "
            f"{_shape(rows.tensor)} without its last dimension, got {_shape(labels)}"
        )
    check_device("labels", labels, rows)
    if scaling.sampling_mask is not None:
        _check_ids("sampling_mask", scaling.sampling_mask, Like("labels", labels))
    if candidates is not None:
        _check_ids("candidates", candidates, Like("labels", labels))
    temperature = scaling.temperature
    if temperature is not None and temperature.dim() > 0:
        _check_per_token("temperature", temperature, FLOATING, Like("labels", labels))
    elif temperature is not None:
        _check_scalar("temperature", temperature, FLOATING, rows)


def _check_ids(name: str, ids: torch.Tensor, labels: Like) -> None:
    """Raises unless there are some for each label."""
    check_tensor(name, ids, (torch.int32,))
    shape = labels.tensor.shape
    if ids.shape[:-1] != shape or ids.dim() != len(shape) + 1:
        raise ValueError(
            f"{name}: expected shape {[*shape, 'K']}, K ids for each of labels "
            f"{_shape(labels.tensor)}, got {_shape(ids)}"
        )
    if ids.shape[-1] > MOST_IDS:
        raise ValueError(
            f"{name}: expected at most {MOST_IDS} ids a token, got shape {_shape(ids)}"
        )
    check_device(name, ids, labels)


def check_hidden_loss(
    head: HeadInputs,
    inputs: LossInputs,
    teacher_tau: float,
    *,
    is_sharded: bool = False,
    sequence_parallel: bool = False,
) -> None:
    """Raises unless the arguments of the loss from hidden states agree."""
    check_hidden(head, is_sharded=is_sharded, sequence_parallel=sequence_parallel)
    _check_inputs_of_loss(Like("labels", head.labels), inputs, teacher_tau)


def check_hidden(
    head: HeadInputs,
    candidates: torch.Tensor | None = None,
    *,
    is_sharded: bool = False,
    sequence_parallel: bool = False,
) -> None:
    """Raises unless hidden states, weight, bias, labels and what belongs to tokens agree.

    Their dtypes may differ, for autocast: see ``product_dtype``. A shard may be without rows of the
    weight. Of how many tokens a rank has the hidden states under sequence parallelism, is looked at
    elsewhere: see ``Shard.problem``.
    """
    hidden, weight, bias, labels, scaling = head
    for name, tensor in zip(("hidden", "weight", "bias"), head.leaves, strict=True):
        _check_not_distributed(name, tensor)
    check_tensor("hidden", hidden, FLOATING)
    check_device_supported("hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden: expected shape [..., width], got {_shape(hidden)}")
    check_tensor("weight", weight, FLOATING)
    is_empty = weight.dim() == 2 and weight.shape[0] == 0 and not is_sharded
    if weight.dim() != 2 or is_empty or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape [vocabulary, {hidden.shape[-1]}] for hidden "
            f"{_shape(hidden)}, got {_shape(weight)}"
        )
    check_device("weight", weight, Like("hidden", hidden))
    if bias is not None:
        _check_bias(bias, Like("weight", weight))
    rows = Like("hidden", hidden)
    if sequence_parallel and isinstance(labels, torch.Tensor):
        rows = Like("hidden", hidden.new_empty(()).expand(*labels.shape, hidden.shape[-1]))
    _check_labels(labels, rows, scaling, candidates)


def _check_bias(bias: torch.Tensor, weight: Like) -> None:
    check_tensor("bias", bias, FLOATING)
    if bias.shape != weight.tensor.shape[:1]:
        raise ValueError(
            f"bias: expected shape {_shape(weight.tensor)[:1]}, one for each row of weight "
            f"{_shape(weight.tensor)}, got {_shape(bias)}"
        )
    check_device("bias", bias, weight)


def product_dtype(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.dtype:
    """What hidden states and weight are multiplied in, as ``torch.nn.functional.linear`` would."""
    kind = hidden.device.type
    others = [("weight", weight), *([] if bias is None else [("bias", bias)])]
    # Which autocast leaves alone.
    is_double = torch.float64 in [hidden.dtype, *[tensor.dtype for _, tensor in others]]
    # meta has no autocast, and raises. torch.amp.is_autocast_available is not for torch.compile
    # (2.11), which cannot trace it.
    has_autocast = kind != "meta"
    if has_autocast and torch.is_autocast_enabled(kind) and not is_double:
        return torch.get_autocast_dtype(kind)
    for name, tensor in others:
        if tensor.dtype != hidden.dtype:
            hint = "" if is_double else ", or call under torch.autocast"
            raise TypeError(
                f"{name}: expected dtype {hidden.dtype} like hidden, got {tensor.dtype}; "
                f"convert one{hint}"
            )
    return hidden.dtype


def _check_not_distributed(name: str, tensor: torch.Tensor | None) -> None:
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor, which is spread over ranks. Call the "
            "loss in the forward of the module that FSDP gathers (IPOLMHead is one), its inputs in "
            "an ipo_ext.LossBatch, which mixed precision does not cast, or pass "
            f'{name}.full_tensor(grad_placements=[Partial("avg")]), which averages its gradient '
            "over data-parallel ranks; under tensor parallelism pass the group of its mesh as "
            "tp_group"
        )


def _check_inputs_of_loss(like: Like, inputs: LossInputs, teacher_tau: float) -> None:
    """Raises unless ``inputs`` agree with ``like``."""
    for name in TOKEN_INPUTS:
        tensor = getattr(inputs, name)
        if tensor is not None or name not in LossInputs._field_defaults:
            dtypes = BOOLEAN if name == "loss_mask" else FLOATING
            _check_per_token(name, tensor, dtypes, like)
    warn_if_rounded(inputs.inference_logprobs)
    if inputs.cu_seqlens is not None:
        _check_cu_seqlens(inputs.cu_seqlens, like)
    if inputs.normalizer is not None:
        _check_scalar("normalizer", inputs.normalizer, NORMALIZER, like)
    if teacher_tau > 0 and inputs.teacher_logprobs is None:
        raise ValueError(
            f"teacher_logprobs: expected a tensor because config.teacher_tau is {teacher_tau!r}, "
            "got None; pass the teacher's log-probabilities or set teacher_tau to 0"
        )


def _check_cu_seqlens(cu_seqlens: torch.Tensor, like: Like) -> None:
    check_tensor("cu_seqlens", cu_seqlens, (torch.int32,))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens: expected shape [segments + 1], got {_shape(cu_seqlens)}; "
            "it holds the first token of each packed sequence, then the number of tokens"
        )
    check_device("cu_seqlens", cu_seqlens, like)


def _check_scalar(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], like: Like
) -> None:
    check_tensor(name, tensor, dtypes)
    if tensor.dim() != 0:
        raise ValueError(f"{name}: expected a 0-dim tensor, got shape {_shape(tensor)}")
    if tensor.device.type != "cpu":
        check_device(name, tensor, like)


def check_no_gradient(
    inputs: LossInputs | Components | None, **others: torch.Tensor | None
) -> None:
    """Raises if a tensor to which no gradient flows asks for one."""
    named = {**others, **({} if inputs is None else inputs._asdict())}
    for name, tensor in named.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that does not require grad, because no gradient flows "
                f"to it; pass {name}.detach()"
            )


def check_device_supported(name: str, tensor: torch.Tensor) -> None:
    kind = tensor.device.type
    if kind == "cuda" and not _C.CUDA_ARCHITECTURES:
        raise ValueError(
            f"{name}: expected a CPU tensor, got device {tensor.device}: this build of ipo_ext has "
            "no CUDA operators. Reinstall it with nvcc on the PATH and IPO_EXT_CUDA=ON"
        )
    if kind not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name}: expected a CPU or CUDA tensor, got device {tensor.device}")


def check_tensor(name: str, tensor: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if (
        tensor.is_nested
        or tensor.layout is not torch.strided
        or type(tensor).__name__ in _OTHER_KINDS
    ):
        _refuse_kind(name, tensor)
    if tensor.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        hint = f"; convert it: {name}.bool()" if dtypes == BOOLEAN else ""
        raise TypeError(f"{name}: expected dtype {expected}, got {tensor.dtype}{hint}")


# Tensor subclasses that no operator of another package can take, and what to do.
_OTHER_KINDS = {
    "DTensor": (
        "pass the rank's own part, {name}.to_local(), of columns of logits with tp_group, or all "
        "of it, {name}.full_tensor()"
    ),
    "MaskedTensor": "pass {name}.get_data(), and in loss_mask which tokens count",
}


def _refuse_kind(name: str, tensor: torch.Tensor) -> None:
    kind = type(tensor).__name__
    if tensor.is_nested:
        got, advice = "a nested one", "pass {name}.values() of a jagged one, with cu_seqlens"
    elif kind in _OTHER_KINDS:
        got, advice = f"a {kind}", _OTHER_KINDS[kind]
    else:
        got, advice = f"one of layout {tensor.layout}", "pass {name}.to_dense()"
    raise TypeError(f"{name}: expected a plain tensor, got {got}; {advice.format(name=name)}")


def _check_per_token(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], like: Like
) -> None:
    check_tensor(name, tensor, dtypes)
    if tensor.shape != like.tensor.shape:
        raise ValueError(
            f"{name}: expected shape {_shape(like.tensor)} like {like.name}, got {_shape(tensor)}"
        )
    check_device(name, tensor, like)


def check_device(name: str, tensor: torch.Tensor, like: Like) -> None:
    if tensor.device != like.tensor.device:
        raise ValueError(
            f"{name}: expected device {like.tensor.device} like {like.name}, got {tensor.device}"
        )


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)
