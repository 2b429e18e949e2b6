"""Calls over a vocabulary that ranks share, and the same where one rank has all of it."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ipo_ext
from ipo_ext import IPOConfig
from tests.support import hidden
from tests.support.backends import Backend
from tests.support.cases import HiddenCase

# -------------------------------------------------------------------------------------------------
# Who has which columns


@dataclasses.dataclass(frozen=True)
class Part:
    """What one rank has of a vocabulary: tokens from ``start`` to ``stop``, then padding."""

    start: int
    stop: int
    padding: int = 0
    says: tuple[str, ...] = ()  # which of vocab_size and vocab_start the call names

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """[vocabulary, ...] -> this rank's, whose padding is NaN."""
        padding = rows.new_full((self.padding, *rows.shape[1:]), torch.nan)
        return torch.cat([rows[self.start : self.stop], padding])

    def keywords(self, vocabulary: int) -> dict[str, int]:
        known = {"vocab_size": vocabulary, "vocab_start": self.start}
        return {name: known[name] for name in self.says}


def equal(vocabulary: int, rank: int, ranks: int) -> Part:
    each = vocabulary // ranks
    return Part(rank * each, (rank + 1) * each)


def uneven(vocabulary: int, rank: int, ranks: int) -> Part:
    """As torch.chunk and DTensor share them out."""
    each = -(-vocabulary // ranks)
    start = min(rank * each, vocabulary)
    return Part(start, min(start + each, vocabulary), says=("vocab_size",))


def empty(vocabulary: int, rank: int, ranks: int) -> Part:
    """The first rank has a few, the last all others, those between nothing."""
    ends = [0, *[3 if ranks > 1 else vocabulary] * (ranks - 1), vocabulary]
    return Part(ends[rank], ends[rank + 1], says=("vocab_size", "vocab_start"))


def padded(vocabulary: int, rank: int, ranks: int) -> Part:
    """Equal shards of a vocabulary that was made divisible, as in Megatron."""
    each = -(-vocabulary // ranks) + 2
    start = min(rank * each, vocabulary)
    stop = min(start + each, vocabulary)
    return Part(start, stop, each - (stop - start), says=("vocab_size", "vocab_start"))


LAYOUTS = {"equal": equal, "uneven": uneven, "empty": empty, "padded": padded}

# -------------------------------------------------------------------------------------------------
# The table

RULES = {
    "default": IPOConfig(kl_tau=0.05),
    "ppo": IPOConfig.ppo(),
    "dppo": IPOConfig.dppo(kl_tau=0.05),
    "geometric": IPOConfig.geometric(0.5, 2.0),
    "sequence_tis": IPOConfig.sequence_tis(2.0),
}
LOSSES = ("ipo_loss_from_logits", "ipo_loss_from_hidden", "LinearIPOLoss", "IPOLMHead")
BLOCKS = ("token_logprobs", "linear_token_logprobs")
FROM_HIDDEN = ("ipo_loss_from_hidden", "linear_token_logprobs")
WIDE = (torch.float32, torch.float64)
FROM_LOGITS = ("ipo_loss_from_logits", "token_logprobs")
MODULES = ("LinearIPOLoss", "IPOLMHead")
TOKENS, CHUNK = 48, 16
CU_SEQLENS = torch.tensor([0, 11, 11, 25, TOKENS], dtype=torch.int32)


@dataclasses.dataclass(frozen=True)
class Row:
    """A call of the table."""

    function: str
    dtype: torch.dtype
    layout: str
    softcap: float | None = None
    token_temperature: bool = False
    rule: str = "default"
    reduces: bool = True  # the gradient by hidden states, within
    in_parts: bool = False  # the hidden states: sequence parallel

    @property
    def vocabulary(self) -> int:
        return 60 if self.layout == "equal" else 53

    def case(self) -> HiddenCase:
        return hidden.random_case(
            TOKENS,
            vocabulary=self.vocabulary,
            dtype=self.dtype,
            token_temperature=self.token_temperature,
            softcap=self.softcap,
            has_bias=self.function != "ipo_loss_from_logits",
            config=RULES[self.rule],
            cu_seqlens=CU_SEQLENS,
            normalizer=7.0,
        )


def table() -> list[Row]:
    numerics = list(
        itertools.product((torch.float32, torch.float64), LAYOUTS, (None, 5.0), (False, True))
    )
    rows = [Row(name, *how, rule) for name in LOSSES for how in numerics for rule in RULES]
    rows += [Row(name, *how) for name in BLOCKS for how in numerics]
    parts = [row for row in rows if row.function not in FROM_LOGITS and row.rule == "default"]
    rows += [dataclasses.replace(row, reduces=False) for row in parts]
    halves = itertools.product((*LOSSES[:2], *BLOCKS), (torch.float16, torch.bfloat16), LAYOUTS)
    rows += [Row(*how, None, True) for how in halves]
    judged = [row for row in rows if row.function in LOSSES[1:3] and row.rule == "geometric"]
    halves = [row for row in rows if row.function in FROM_HIDDEN and row.dtype not in WIDE]
    return rows + [dataclasses.replace(row, in_parts=True) for row in (*parts, *judged, *halves)]


def one_in(count: int) -> list[Row]:
    """Others each day."""
    return table()[datetime.date.today().toordinal() % count :: count]


# -------------------------------------------------------------------------------------------------
# Running one


def call(
    row: Row, case: HiddenCase, part: Part | None = None, *, in_float64: bool = False
) -> dict[str, torch.Tensor]:
    """All results, and the gradients, by name: of this rank's part, or of the whole vocabulary."""
    shard: dict[str, Any] = {}
    weight, bias = case.weight, case.bias
    if part is not None:
        shard = {"tp_group": dist.group.WORLD, **part.keywords(row.vocabulary)}
        weight, bias = part.of(weight), None if bias is None else part.of(bias)
    if part is not None and row.function not in FROM_LOGITS:
        shard |= {"reduce_hidden_grad": row.reduces, "sequence_parallel": row.in_parts}
    states = case.hidden
    if part is not None and row.in_parts:
        states = states.chunk(dist.get_world_size())[dist.get_rank()]
    leaves = {"hidden": states, "weight": weight, "bias": bias}
    if row.function in FROM_LOGITS:
        logits = case.from_logits().logits
        leaves = {"logits": logits if part is None else part.of(logits.t()).t()}
    leaves = {
        name: (leaf.double() if in_float64 else leaf).detach().clone().requires_grad_()
        for name, leaf in leaves.items()
        if leaf is not None
    }
    results = _run(row, case, leaves, shard)
    objective = results.pop("objective")
    gradients = torch.autograd.grad(objective, list(leaves.values()))
    named = zip(leaves, gradients, strict=True)
    results = {name: result.detach() for name, result in results.items()}
    return {**results, **{f"grad_{name}": gradient for name, gradient in named}}


def _run(
    row: Row, case: HiddenCase, leaves: dict[str, torch.Tensor], shard: dict[str, Any]
) -> dict[str, torch.Tensor]:
    how: dict[str, Any] = {"temperature": case.temperature, "softcap": case.softcap}
    of_hidden = {} if row.function in FROM_LOGITS else {"chunk_size": CHUNK}
    if row.function in BLOCKS:
        function: Callable[..., Any] = getattr(ipo_ext, row.function)
        operands = [leaf for name, leaf in leaves.items() if name != "bias"]
        bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
        logprobs, entropy = function(*operands, case.labels, **how, **bias, **of_hidden, **shard)
        by_entropy = torch.linspace(-1, 1, TOKENS, dtype=entropy.dtype, device=entropy.device)
        objective = (logprobs * case.advantages).sum() + (entropy * by_entropy).sum()
        return {"logprobs": logprobs, "entropy": entropy, "objective": objective}
    others = {"normalizer": case.normalizer, "cu_seqlens": case.cu_seqlens, **how, **of_hidden}
    inputs = (case.labels, case.inference_logprobs, case.advantages, case.loss_mask)
    output = _loss(row, case, leaves, shard)(*inputs, **others)
    return {
        "objective": output.loss * 3,
        "loss": output.loss,
        "logprobs": output.logprobs,
        "entropy": output.entropy,
        "sums": output.metrics.sums,
        "extremes": output.metrics.extremes,
        "means": output.metrics.means,
    }


def _loss(
    row: Row, case: HiddenCase, leaves: dict[str, torch.Tensor], shard: dict[str, Any]
) -> Callable[..., ipo_ext.IPOOutput]:
    """The row's function or module, all but the loss's inputs given."""
    if row.function == "ipo_loss_from_logits":
        return lambda *inputs, **others: ipo_ext.ipo_loss_from_logits(
            leaves["logits"], *inputs, **others, config=case.config, **shard
        )
    operands, bias = (leaves["hidden"], leaves["weight"]), leaves.get("bias")
    if row.function == "IPOLMHead":
        linear = nn.Linear(1, 1, bias=bias is not None)
        linear.weight = nn.Parameter(torch.empty(0))
        head = ipo_ext.IPOLMHead(linear, case.config, **shard)
        # The very leaves, as a host that computes its weight would have them.
        del head.weight, head.bias
        head.weight, head.bias = leaves["weight"], bias
        return lambda *inputs, **others: head(leaves["hidden"], *inputs, **others)
    if row.function == "LinearIPOLoss":
        module = ipo_ext.LinearIPOLoss(case.config, **shard)
        return lambda *inputs, **others: module(*operands, *inputs, bias=bias, **others)
    return lambda *inputs, **others: ipo_ext.ipo_loss_from_hidden(
        *operands, *inputs, bias=bias, config=case.config, **others, **shard
    )


# -------------------------------------------------------------------------------------------------
# Judging it, on each rank


def check_rows(backend_name: str, rows: list[Row]) -> None:
    """For ``on_ranks``: every row right on every rank, and the same on all of them."""
    with Backend(backend_name).active() as backend:
        found = [text for row in rows for text in wrong(row, backend)]
    assert not found, "\n".join(found)


def wrong(row: Row, backend: Backend) -> Iterator[str]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    part = LAYOUTS[row.layout](row.vocabulary, rank, ranks)
    case = row.case().to(backend.device)
    mine = call(row, case, part)
    if not row.reduces:
        total = mine["grad_hidden"].double()
        dist.all_reduce(total)
        mine["grad_hidden"] = total
    if row.in_parts:
        of_ranks = [torch.empty_like(mine["grad_hidden"]) for _ in range(ranks)]
        dist.all_gather(of_ranks, mine["grad_hidden"].contiguous())
        mine["grad_hidden"] = torch.cat(of_ranks)
    for name in same_on_all_ranks(mine):
        yield f"{row}, rank {rank} of {ranks}: {name} differs between ranks"
    truth = call(row, case, in_float64=True)
    for name, value in mine.items():
        exact = of_part(name, truth[name], part)
        if not is_near(value, exact, row.dtype):
            error = (value.double() - exact).abs().max()
            yield f"{row}, rank {rank} of {ranks}: {name} is off by {error}"


def same_on_all_ranks(results: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is not; gradients by a rank's own columns are its own."""
    shared = {
        name: hashlib.sha1(value.detach().contiguous().view(-1).view(torch.uint8).numpy())
        for name, value in results.items()
        if name not in ("grad_logits", "grad_weight", "grad_bias")
    }
    digests = {name: digest.hexdigest() for name, digest in shared.items()}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, digests)
    return [name for name in digests if len({digests[name] for digests in of_ranks}) > 1]


def of_part(name: str, whole: torch.Tensor, part: Part) -> torch.Tensor:
    """What a rank should have of a result: a gradient's own columns, 0 for its padding."""
    if name in ("grad_weight", "grad_bias"):
        return part.of(whole).nan_to_num(nan=0.0)
    if name == "grad_logits":
        return part.of(whole.t()).t().nan_to_num(nan=0.0)
    return whole


def is_near(value: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    """Within what rounding costs; one more rounding of gradients in half precision."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    if value.dtype in (torch.float16, torch.bfloat16):
        tolerance += torch.finfo(value.dtype).eps
    size = exact[exact.isfinite()].abs().max() if exact.isfinite().any() else exact.new_ones(())
    return torch.allclose(
        value.double(), exact.double(), rtol=0, atol=tolerance * (1 + float(size))
    )
