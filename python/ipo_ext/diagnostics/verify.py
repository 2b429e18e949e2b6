"""``python -m ipo_ext verify``: every operator on this machine's devices against float64.

Random and nasty inputs. An operator may be wrong by a few times what eager torch is wrong by in the
same precision; what is exactly 0 must be, and a second call must give the same bits.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, get_args

import torch

import ipo_ext
from ipo_ext import _C, reference
from ipo_ext._ops import checks
from ipo_ext.config import MaskRule

DTYPES = checks.FLOATING
DIFFERENTIABLE = ("trainer_logprobs", "logits", "hidden", "weight")
BUDGET = 4.0  # times the error of eager torch and a rounding of the result; all values are O(1)
Arguments = dict[str, Any]
Results = dict[str, torch.Tensor]


class Input(NamedTuple):
    """One shape and kind of input; ``nasty`` ones hold NaN, infinities and empty sequences."""

    name: str
    rows: int
    columns: int
    nasty: bool = False
    softcap: float | None = None  # for the operators that see logits, as the next
    logit_scale: float | None = None
    ids: int | None = None  # of each row's sampling mask
    config: ipo_ext.IPOConfig = ipo_ext.IPOConfig(teacher_tau=0.2, kl_tau=0.1)
    inplace: bool = False  # for the operator that has it
    only_gpus: bool = False


MakeInputs = Callable[[Input, torch.dtype, torch.Generator], Arguments]

INPUTS = (
    Input("random", rows=67, columns=131),
    Input("nasty", rows=101, columns=37, nasty=True),
    Input("softcap", rows=35, columns=130, softcap=20.0),
    Input("scaled", rows=35, columns=130, softcap=20.0, logit_scale=0.3),
    Input("replayed", rows=67, columns=131, ids=9, softcap=20.0),
    Input("inplace", rows=67, columns=131, inplace=True),
    Input("wide", rows=3, columns=5003),
    Input("one row", rows=1, columns=7),
    Input("empty", rows=0, columns=7),
    # Other kernels than the default rule's.
    *(
        Input(
            rule,
            rows=67,
            columns=131,
            config=ipo_ext.IPOConfig(0.1, 0.1, mask_rule=rule, kl_scope="active"),
        )
        for rule in get_args(MaskRule)
        if rule != ipo_ext.IPOConfig().mask_rule
    ),
    *(
        Input(name, rows=67, columns=131, config=config)
        for name, config in {
            "capped": ipo_ext.IPOConfig(mask_rule="none", pg_form="capped", ratio_cap=2.0),
            "ppo": ipo_ext.IPOConfig.ppo(max_importance_ratio=9.0),
            "cispo": ipo_ext.IPOConfig.cispo(0.5, 2.0),
            "rollout rule": ipo_ext.IPOConfig.icepop(rollout_min_ratio=2e-3),
            "sequence rule": ipo_ext.IPOConfig(sequence_rules=(("max_k2", 0.0, 20.0),)),
            "sequence weight": ipo_ext.IPOConfig(
                mask_rule="none", pg_form="reinforce", sequence_weight="mean"
            ),
        }.items()
    ),
    # One for each shape in which a GPU shares rows (csrc/kernels/cuda/logits/plan.h).
    Input("16,003 columns", rows=160, columns=16_003, only_gpus=True),
    Input("32,003 columns", rows=80, columns=32_003, only_gpus=True),
    Input("64,007 columns", rows=40, columns=64_007, only_gpus=True),
    Input("151,936 columns", rows=20, columns=151_936, only_gpus=True),
    Input("200,003 columns", rows=20, columns=200_003, only_gpus=True),
)


# -------------------------------------------------------------------------------------------------
# Inputs: on the CPU, the same for every device


def logits_and_labels(kind: Input, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    logits = 3 * torch.randn(kind.rows, kind.columns, generator=generator)
    labels = torch.randint(kind.columns, (kind.rows,), generator=generator)
    temperature = 0.5 + torch.rand(kind.rows, generator=generator)
    if kind.nasty:
        logits[::5, :-1] = -math.inf
        labels[::5] = kind.columns - 1
        logits[3::50, 0] = math.nan
        logits[4::50, 0] = math.inf
    arguments = {
        "logits": logits.to(dtype),
        "labels": labels,
        "temperature": temperature,
        "softcap": kind.softcap,
        "logit_scale": kind.logit_scale,
    }
    if kind.ids is not None:
        arguments["sampling_mask"] = sampling_mask(kind, labels, generator)
    return arguments


def sampling_mask(kind: Input, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Distinct ids of each row, of every other one with its label."""
    ids = torch.rand(kind.rows, kind.columns, generator=generator).argsort(-1)[:, : kind.ids]
    ids[ids == labels[:, None]] = -1
    ids[::2, 0] = labels[::2]
    return ids.int()


def token_logprobs(kind: Input, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    arguments = logits_and_labels(kind, dtype, generator)
    arguments["labels"][::4] = -100
    return arguments


def ipo_loss_from_logits(kind: Input, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    arguments = logits_and_labels(kind, dtype, generator)
    logprobs, _ = reference.token_logprobs(**arguments, dtype=torch.float64)
    arguments |= constants_of_loss(kind, logprobs.nan_to_num(0.0), generator)
    if kind.nasty:
        arguments["labels"][~arguments["loss_mask"]] = -100
    return arguments


def ipo_loss(kind: Input, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    trainer = -2 * torch.rand(kind.rows, generator=generator).to(dtype)
    constants = constants_of_loss(kind, trainer.double(), generator)
    if kind.nasty:
        trainer[2::9] = -math.inf
        trainer[5::11] = math.nan
        trainer[~constants["loss_mask"]] = math.inf
    return {"trainer_logprobs": trainer, **constants}


def constants_of_loss(kind: Input, logprobs: torch.Tensor, generator: torch.Generator) -> Arguments:
    """Everything but the policy. No log-ratio is near an end of the band: no rounding decides."""
    ratios = torch.tensor([-3.0, -0.5, 0.5, 3.0])[
        torch.randint(4, (kind.rows,), generator=generator)
    ]
    inference = (logprobs - ratios - 0.1 * torch.rand(kind.rows, generator=generator)).float()
    advantages = torch.randn(kind.rows, generator=generator)
    loss_mask = torch.rand(kind.rows, generator=generator) < 0.8
    if kind.nasty:
        inference[1::7] = torch.tensor([math.nan, math.inf, -math.inf]).repeat(kind.rows)[
            : len(inference[1::7])
        ]
        advantages[~loss_mask] = math.nan
    if kind.config.judges_sequences:
        inference[-1:] = logprobs[-1:] + 9  # drops the last sequence, if a rule does
        loss_mask[-1:] = True
    third = kind.rows // 3
    return {
        "inference_logprobs": inference,
        "advantages": advantages,
        "loss_mask": loss_mask,
        "teacher_logprobs": logprobs.float() + 0.3,
        "loss_weights": torch.rand(kind.rows, generator=generator),
        "cu_seqlens": torch.tensor([0, third, third, kind.rows], dtype=torch.int32),
        "normalizer": torch.tensor(kind.rows + 1.0),
        "config": kind.config,
    }


def linear_token_logprobs(kind: Input, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    return through_a_head(token_logprobs, kind, dtype, generator)


def ipo_loss_from_hidden(kind: Input, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    return through_a_head(ipo_loss_from_logits, kind, dtype, generator)


def through_a_head(
    make: MakeInputs, kind: Input, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    """Hidden states and a weight whose products are the finite logits that ``make`` makes.

    Each state is a one and zeros, so that the matrix product, which is torch's, does not round.
    """
    arguments = make(kind, dtype, generator)
    logits = arguments.pop("logits").nan_to_num(nan=1.0, posinf=9.0, neginf=-9.0)
    one_more = kind.rows + 1  # no rows, no columns: refused
    hidden = torch.eye(one_more, dtype=dtype)[: kind.rows]
    weight = torch.zeros(kind.columns, one_more, dtype=dtype)
    weight[:, : kind.rows] = logits.t()
    return {"hidden": hidden, "weight": weight, **arguments}


# A new operator adds one row: its name, in ipo_ext and in the reference, and its inputs.
OPERATORS: dict[str, MakeInputs] = {
    "ipo_loss": ipo_loss,
    "ipo_loss_from_logits": ipo_loss_from_logits,
    "ipo_loss_from_hidden": ipo_loss_from_hidden,
    "token_logprobs": token_logprobs,
    "linear_token_logprobs": linear_token_logprobs,
}


# -------------------------------------------------------------------------------------------------
# One check


class Check(NamedTuple):
    device: str
    operator: str
    dtype: torch.dtype
    kind: Input

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device} {self.operator} {dtype} {self.kind.name}"

    def run(self) -> str | None:
        """What is wrong, if anything is."""
        arguments = OPERATORS[self.operator](
            self.kind, self.dtype, torch.Generator().manual_seed(0)
        )
        there = {name: _to(self.device, value) for name, value in arguments.items()}
        ours = getattr(ipo_ext, self.operator)
        if self.kind.inplace and self.operator == "ipo_loss_from_logits":
            ours = loss_over_logits
        oracle = getattr(reference, self.operator)
        try:
            result, again = evaluate(ours, there), evaluate(ours, there)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        exact = evaluate(oracle, in_precision(torch.float64, arguments))
        naive = evaluate(oracle, in_precision(torch.float32, arguments))
        precision = torch.finfo(torch.promote_types(self.dtype, torch.float32)).eps
        for name in exact:
            if not _same_bits(result[name], again[name]):
                return f"{name}: a second call gave other bits"
            wrong = deviation(result[name].cpu(), exact[name], naive[name], precision)
            if wrong:
                return f"{name}: {wrong}"
        return None


def loss_over_logits(*, logits: torch.Tensor, **arguments: Any) -> ipo_ext.IPOOutput:
    """The gradient over a copy of the logits, as a model's would be."""
    return ipo_ext.ipo_loss_from_logits(logits.clone(), **arguments, inplace=True)


def in_precision(dtype: torch.dtype, arguments: Arguments) -> Arguments:
    """The policy's share in ``dtype``, and hence all that the reference computes."""
    policy = {name: arguments[name].to(dtype) for name in DIFFERENTIABLE if name in arguments}
    return {**arguments, **policy}


def evaluate(function: Callable[..., Any], arguments: Arguments) -> Results:
    """Everything that ``function`` returns, and the gradients of it."""
    leaves = {
        name: arguments[name].detach().clone().requires_grad_()
        for name in DIFFERENTIABLE
        if name in arguments
    }
    output = function(**{**arguments, **leaves})
    if isinstance(output, ipo_ext.IPOOutput):
        objective = output.loss
        results = {"loss": output.loss, **output.metrics, **totals(output, function, arguments)}
        if output.logprobs is not None and output.entropy is not None:
            results |= {"logprobs": output.logprobs, "entropy": output.entropy}
    else:
        # Rows that are NaN would make the sum, though not their neighbours' gradients, NaN.
        finite = [tensor[tensor.isfinite()] for tensor in output]
        objective = sum((weight * tensor).sum() for weight, tensor in enumerate(finite, 1))
        results = {f"output {index}": tensor for index, tensor in enumerate(output)}
    gradients = torch.autograd.grad(
        0.75 * objective,  # a factor of 1 might be skipped
        list(leaves.values()),
    )
    named = zip(leaves, gradients, strict=True)
    results |= {f"gradient by {name}": gradient for name, gradient in named}
    return {name: tensor.detach() for name, tensor in results.items()}


def totals(
    output: ipo_ext.IPOOutput, function: Callable[..., Any], arguments: Arguments
) -> Results:
    """The metrics of all sequences together."""
    if isinstance(output.metrics, ipo_ext.IPOMetrics):
        whole: Any = output.metrics.total()
    elif arguments["config"].judges_sequences:
        whole = {}  # without segments all tokens would be one sequence
    else:
        whole = function(**{**arguments, "cu_seqlens": None}).metrics
    return {f"total {name}": value for name, value in whole.items()}


def deviation(
    result: torch.Tensor, exact: torch.Tensor, naive: torch.Tensor, precision: float
) -> str | None:
    """How ``result`` is further from ``exact`` than its budget allows, if it is.

    ``naive`` comes from float32; ``precision`` is the eps of what ``result`` was computed in.
    """
    if result.shape != exact.shape:
        return f"expected shape {list(exact.shape)}, got {list(result.shape)}"
    if not torch.equal(result.isfinite(), exact.to(result.dtype).isfinite()):
        return "NaN or infinite where float64 is not, or the other way round"
    if (result[exact == 0] != 0).any():
        return "not 0 where float64 is exactly 0"
    finite = exact.isfinite()
    if not finite.any():
        return None
    expected = exact[finite].double()
    error = (result[finite].double() - expected).abs().max().item()
    naive_error = (naive[finite].double() - expected).abs().max().item()
    rounding = torch.finfo(result.dtype).eps * expected.abs().max().item()
    relative = precision / torch.finfo(torch.float32).eps
    budget = BUDGET * (naive_error * relative + rounding + precision)
    return None if error <= budget else f"error {error:.3g}, expected at most {budget:.3g}"


def _to(device: str, value: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (a, b)))


# -------------------------------------------------------------------------------------------------
# The command


def checks_on(device: str) -> list[Check]:
    kinds = [kind for kind in INPUTS if device != "cpu" or not kind.only_gpus]
    return [Check(device, *row) for row in itertools.product(OPERATORS, DTYPES, kinds)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every check; prints what fails, then one line. 0 if all holds everywhere, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m ipo_ext verify",
        description=(__doc__ or "").partition("\n\n")[2],
    )
    parser.parse_args(argv)
    devices = ["cpu", *(f"cuda:{index}" for index in range(_gpus()))]
    if len(devices) > 1 and not _C.CUDA_ARCHITECTURES:
        print("FAILED: this machine has a GPU, and this build of ipo_ext has no CUDA operators")
        return 1
    checks = [check for device in devices for check in checks_on(device)]
    failures = []
    for check in _progress(checks):
        wrong = check.run()
        if wrong:
            failures.append(f"{check}: {wrong}")
            print(failures[-1], flush=True)
    where = ", ".join(device if device == "cpu" else _described(device) for device in devices)
    verdict = f"FAILED: {len(failures)} of" if failures else "ok:"
    print(f"{verdict} {len(checks)} checks on {where}")
    return 1 if failures else 0


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _described(device: str) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})"


def _progress(checks: Sequence[Check]) -> Iterable[Check]:
    """A bar in a terminal where rich is installed, else a line for each device and operator."""
    if sys.stdout.isatty():
        try:
            from rich.progress import track
        except ImportError:
            pass
        else:
            yield from track(checks, description="verifying")
            return
    for (device, operator), group in itertools.groupby(checks, lambda check: check[:2]):
        print(f"verifying {operator} on {device}", flush=True)
        yield from group
