"""The functions for slime and miles, called as the trainers document it; loss and gradient by hand.

Neither trainer is on an index. What calls the functions here is this file's, with each trainer's
argument names and shapes; where a checkout of slime or miles, with megatron-core, is on the path,
its own ``loss_function`` and ``policy_loss_function`` call them as well.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import math
import re
import sys
import types
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from ipo_ext import IPOConfig
from ipo_ext.integrations import _slime_options as options
from ipo_ext.integrations import slime as adapter
from ipo_ext.integrations._batches import PER_TOKEN
from tests.docs.page_blocks import ROOT, blocks_of_page
from tests.integrations.eager import assert_same_step, token_losses
from tests.integrations.options import assert_all_are_known
from tests.integrations.ranks import in_a_group, on_ranks

BAND = IPOConfig(dppo_mask_low=0.5, dppo_mask_high=2.0, kl_tau=0.1)
BAND_LOSS = adapter.custom_loss(BAND)
ROLLOUT_LOSS = adapter.custom_loss(IPOConfig(kl_tau=0.1, rollout_min_ratio=0.1))
TIS = adapter.custom_tis(IPOConfig(dppo_mask_low=0.5, dppo_mask_high=2.0, kl_tau=0.0))

VOCAB = 11
PROMPTS, RESPONSES = (2, 3, 1), (4, 1, 6)
TRAINED = ([1, 1, 0, 1], [1], [0, 0, 0, 0, 0, 0])  # of the last response none


def named(function: str) -> str:
    return f"{__name__}.{function}"


# -------------------------------------------------------------------------------------------------
# Who calls: the trainers' documented interfaces, and the trainers where they are installed


def log_probs_of_responses(
    logits: torch.Tensor, args: Namespace, batch: dict[str, Any]
) -> list[torch.Tensor]:
    found, end = [], 0
    for tokens, response in zip(batch["unconcat_tokens"], batch["response_lengths"], strict=True):
        end += len(tokens)
        rows = logits[0, end - response - 1 : end - 1] / args.rollout_temperature
        labels = tokens[len(tokens) - response :, None]
        found.append(rows.log_softmax(-1).gather(-1, labels).squeeze(-1))
    return found


def reducer(args: Namespace, batch: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """``sum_of_sample_mean``, or the sum over tokens with ``calculate_per_token_loss``."""

    def reduce(values: torch.Tensor) -> torch.Tensor:
        total = values.new_zeros(())
        parts = values.split(batch["response_lengths"])
        for part, mask, length in zip(
            parts, batch["loss_masks"], batch["rollout_mask_sums"], strict=True
        ):
            divisor = 1 if args.calculate_per_token_loss else length.clamp(min=1)
            total = total + (part * mask).sum() / divisor
        return total

    return reduce


def named_log_probs(
    logits: torch.Tensor, args: Namespace, tokens: list[torch.Tensor], response_lengths: list[int]
) -> dict[str, list[torch.Tensor]]:
    batch = {"unconcat_tokens": tokens, "response_lengths": response_lengths}
    return {"log_probs": log_probs_of_responses(logits, args, batch)}


def slimes_log_probs(
    logits: torch.Tensor,
    *,
    args: Namespace,
    unconcat_tokens: list[torch.Tensor],
    total_lengths: list[int],
    response_lengths: list[int],
    with_entropy: bool = False,
    top_p_token_ids: Any = None,
) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    assert (top_p_token_ids is not None) == (args.rollout_top_p != 1)
    return torch.empty(0), named_log_probs(logits, args, unconcat_tokens, response_lengths)


def slimes_top_p(args: Namespace, batch: dict[str, Any]) -> dict[str, Any]:
    return {"top_p_token_ids": []} if args.rollout_top_p != 1 else {}


def miles_log_probs(
    logits: torch.Tensor,
    *,
    args: Namespace,
    unconcat_tokens: list[torch.Tensor],
    total_lengths: list[int],
    response_lengths: list[int],
    with_entropy: bool = False,
    max_seq_lens: list[int] | None = None,
) -> dict[str, list[torch.Tensor]]:
    assert max_seq_lens is not None
    return named_log_probs(logits, args, unconcat_tokens, response_lengths)


SLIME = "slime.backends.megatron_utils.loss"
MILES = "miles.backends.training_utils.loss_hub.logit_processors"
DOCUMENTED = {
    SLIME: {
        "get_log_probs_and_entropy": slimes_log_probs,
        "get_rollout_top_p_logprob_kwargs": slimes_top_p,
    },
    MILES: {"get_log_probs_and_entropy": miles_log_probs},
    MILES.replace("loss_hub", "loss.hub"): {"get_log_probs_and_entropy": miles_log_probs},
}
LossAndLog = tuple[torch.Tensor, dict[str, torch.Tensor]]


class Documented:
    """Calls the functions with the arguments that the trainers document."""

    log_probs = staticmethod(log_probs_of_responses)
    dtype = torch.float64  # of the yardstick

    def __init__(self, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
        made = types.ModuleType(module)
        vars(made).update(DOCUMENTED[module])
        for name in DOCUMENTED:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, module, made)

    def loss(self, args: Namespace, batch: dict[str, Any], logits: torch.Tensor) -> LossAndLog:
        function = load(args.custom_loss_function_path)
        return function(args, batch, logits, reducer(args, batch))

    def corrected(self, args: Namespace, batch: dict[str, Any], logits: torch.Tensor) -> LossAndLog:
        """PPO's loss, which nothing clips here, and its correction."""
        log_probs = log_probs_of_responses(logits, args, batch)
        ratio = (torch.cat(log_probs) - torch.cat(batch["log_probs"])).exp()
        pg_loss, masks, metrics = load(args.custom_tis_function_path)(
            args=args,
            pg_loss=-ratio * torch.cat(batch["advantages"]),
            train_log_probs=batch["log_probs"],
            rollout_log_probs=batch["rollout_log_probs"],
            loss_masks=batch["loss_masks"],
            total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
        )
        reduce = reducer(args, batch | {"loss_masks": masks})
        return reduce(pg_loss), {name: reduce(value) for name, value in metrics.items()}


class Slime:
    """The trainer itself, in a world of one process.

    The yardstick takes its log-probabilities, since miles' (Megatron's fused cross-entropy) have a
    gradient that is rounded to bfloat16.
    """

    dtype = torch.float32

    def log_probs(
        self, logits: torch.Tensor, args: Namespace, batch: dict[str, Any]
    ) -> list[torch.Tensor]:
        names = ("unconcat_tokens", "total_lengths", "response_lengths")
        fields = {name: batch[name] for name in names}
        return self.module.get_log_probs_and_entropy(logits, args=args, **fields)[1]["log_probs"]

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = importlib.import_module(SLIME)
        for name in DOCUMENTED:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, SLIME, self.module)

    def loss(self, args: Namespace, batch: dict[str, Any], logits: torch.Tensor) -> LossAndLog:
        loss, _, logged = self.module.loss_function(args, batch, 1, 1, logits)
        return loss, dict(zip(logged["keys"], logged["values"][1:], strict=True))

    def corrected(self, args: Namespace, batch: dict[str, Any], logits: torch.Tensor) -> LossAndLog:
        return self.module.policy_loss_function(args, batch, logits, reducer(args, batch))


class Miles(Slime):
    def log_probs(
        self, logits: torch.Tensor, args: Namespace, batch: dict[str, Any]
    ) -> list[torch.Tensor]:
        names = ("unconcat_tokens", "total_lengths", "response_lengths", "max_seq_lens")
        fields = {name: batch[name] for name in names}
        return self.log_probs_of(logits, args=args, **fields)["log_probs"]

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = importlib.import_module(MODULES["miles"])
        self.losses = importlib.import_module("miles.backends.training_utils.loss_hub.losses")
        self.log_probs_of = importlib.import_module(MILES).get_log_probs_and_entropy
        for name in {*DOCUMENTED} - {MILES}:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, MILES, importlib.import_module(MILES))

    def loss(self, args: Namespace, batch: dict[str, Any], logits: torch.Tensor) -> LossAndLog:
        loss, _, logged = self.module.loss_function(args, batch, 1, logits, True, 1)
        return loss, dict(zip(logged["keys"], logged["values"][1:], strict=True))

    def corrected(self, args: Namespace, batch: dict[str, Any], logits: torch.Tensor) -> LossAndLog:
        return self.losses.policy_loss_function(args, batch, logits, reducer(args, batch))


INSTALLED = [name for name in ("slime", "miles") if importlib.util.find_spec(name)]


@contextlib.contextmanager
def megatrons_groups(name: str, tensor: int = 1, context: int = 1) -> Iterator[None]:
    """The process groups that Megatron's functions ask for, of all ranks that there are."""
    from megatron.core import mpu

    mpu.initialize_model_parallel(tensor, context_parallel_size=context)
    if name == "miles":
        parallel = importlib.import_module("miles.backends.training_utils.parallel")
        group = parallel.GroupInfo
        alone = group(rank=0, size=1, group=mpu.get_data_parallel_group())
        fields = ("intra_dp", "intra_dp_cp", "cp", "tp", "pp", "ep", "etp", "indep_dp")
        rank = torch.distributed.get_rank()
        split = {
            "tp": group(rank % tensor, tensor, mpu.get_tensor_model_parallel_group()),
            "cp": group(rank % context, context, mpu.get_context_parallel_group()),
            "intra_dp_cp": group(
                rank % context, context, mpu.get_data_parallel_group(with_context_parallel=True)
            ),
        }
        parallel.set_parallel_state(parallel.ParallelState(**dict.fromkeys(fields, alone) | split))
    try:
        yield
    finally:
        mpu.destroy_model_parallel()


@contextlib.contextmanager
def world_of_one(name: str, folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
    )
    try:
        with megatrons_groups(name):
            yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(params=[*DOCUMENTED, *INSTALLED])
def trainer(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Any]:
    if request.param in DOCUMENTED:
        yield Documented(request.param, monkeypatch)
        return
    with world_of_one(request.param, tmp_path):
        yield TRAINERS[request.param](monkeypatch)


TRAINERS = {"slime": Slime, "miles": Miles}
MODULES = {"slime": SLIME, "miles": "miles.backends.training_utils.loss"}


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> Documented:
    return Documented(SLIME, monkeypatch)


def load(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


# -------------------------------------------------------------------------------------------------
# What they hand over


def arguments(**options: Any) -> Namespace:
    """Those that either trainer's losses read, at their defaults."""
    defaults = {
        "loss_type": "custom_loss",
        "custom_loss_function_path": named("BAND_LOSS"),
        "calculate_per_token_loss": False,
        "recompute_loss_function": False,
        "rollout_temperature": 0.8,
        "rollout_top_p": 1.0,
        "log_probs_chunk_size": -1,
        "allgather_cp": False,
        "context_parallel_size": 1,
        "advantage_estimator": "grpo",
        "eps_clip": 0.2,
        "eps_clip_high": 0.2,  # filled in with eps_clip
        "eps_clip_c": None,
        "entropy_coef": 0.0,
        "use_kl_loss": False,
        "use_rollout_logprobs": False,
        "use_tis": False,
        "tis_clip": 2.0,
        "tis_clip_low": 0,
        "get_mismatch_metrics": False,
        "custom_tis_function_path": None,
        "custom_pg_loss_reducer_function_path": None,
        "use_opsm": False,
        # miles alone
        "observe_training_entropy": False,
        "skip_actor_forward_only": False,
        "true_on_policy_mode": False,
        "qkv_format": "thd",
        "multi_lora": False,
    }
    return Namespace(**{**defaults, **options})


def batch(masks: Any = TRAINED) -> dict[str, Any]:
    lengths = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    loss_masks = [torch.tensor(mask, dtype=torch.int32) for mask in masks]

    def each(make: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        return [make(length) for length in RESPONSES]

    return {
        "unconcat_tokens": [torch.randint(VOCAB, (length,)) for length in lengths],
        "total_lengths": lengths,
        "response_lengths": list(RESPONSES),
        "max_seq_lens": lengths,
        "loss_masks": loss_masks,
        "rollout_mask_sums": [mask.sum() for mask in loss_masks],
        "advantages": each(torch.randn),
        "log_probs": each(lambda length: -1.5 - 2 * torch.rand(length)),
        "rollout_log_probs": each(lambda length: -1.5 - 2 * torch.rand(length)),
    }


class Policy(nn.Module):
    """Logits ``[1, T, V]`` of packed tokens, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, data: dict[str, Any]) -> torch.Tensor:
        contexts = [self.embedding(tokens).cumsum(0) for tokens in data["unconcat_tokens"]]
        return self.head(torch.cat(contexts).tanh())[None]


def by_hand(
    trainer: Any, model: Policy, args: Namespace, data: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss in float64, and those of its tokens that train."""
    logprobs = torch.cat(trainer.log_probs(model(data), args, data)).double()
    mask = torch.cat(data["loss_masks"]).bool()
    losses = token_losses(
        logprobs,
        torch.cat(data["rollout_log_probs"]).double(),
        torch.cat(data["advantages"]).double(),
        mask,
        BAND,
    )
    return reducer(args, data)(losses), losses[mask]


# -------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("per_token", [False, True], ids=["per sample", "per token"])
def test_training_equals_eager(trainer: Any, per_token: bool) -> None:
    args, model = arguments(calculate_per_token_loss=per_token), Policy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    dropped = []
    for _ in range(3):
        data, twin = batch(), copy.deepcopy(model).to(trainer.dtype)
        expected, losses = by_hand(trainer, twin, args, data)
        theirs = torch.autograd.grad(expected, list(twin.parameters()))
        optimizer.zero_grad()
        loss, log = trainer.loss(args, data, model(data))
        loss.backward()
        ours = [parameter.grad for parameter in model.parameters()]
        assert_same_step(loss, expected, ours, theirs)
        # What the trainer divides by is 4 tokens, or 2 samples with a token.
        tokens = 4 if per_token else 2
        dropped.append((losses == 0).double().mean().item())
        assert log["ipo/is_masked"].item() / tokens == pytest.approx(dropped[-1])
        assert log["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        parts = log["ipo/pg_loss"] + log["ipo/kl_loss"]
        assert parts.item() == pytest.approx(expected.item(), rel=1e-5)
        optimizer.step()
    assert 0 < sum(dropped) < 3, "some tokens are to be dropped, and some kept"


def test_recomputing_the_loss_changes_nothing(trainer: Any) -> None:
    """``recompute_loss_function`` calls it twice, the first time perhaps without gradients."""
    data, model = batch(), Policy()
    logits = model(data).detach().requires_grad_()
    loss, _ = trainer.loss(arguments(), data, logits)
    expected = torch.autograd.grad(loss, logits)[0]
    args = arguments(recompute_loss_function=True)
    loss, _ = trainer.loss(args, data, logits)
    loss.backward()
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=0)


def test_a_rollout_rule_drops_a_whole_response(documented: Documented) -> None:
    args, data = arguments(custom_loss_function_path=named("ROLLOUT_LOSS")), batch()
    logits = Policy()(data).detach().requires_grad_()
    sampled = log_probs_of_responses(logits.detach(), args, data)
    data["rollout_log_probs"] = [logprobs.clone() for logprobs in sampled]
    data["rollout_log_probs"][0][3] += 3  # far below the policy's
    loss, log = documented.loss(args, data, logits)
    gradient = torch.autograd.grad(loss, logits)[0][0]
    assert not gradient[:6].any()  # the first sample's rows
    assert gradient[6 + 2].any()  # of the second sample the token that trains
    assert log["ipo/rollout_dropped"].item() / 2 == pytest.approx(3 / 4)


def test_a_part_of_each_sequence_is_served_and_cannot_drop_the_whole(
    documented: Documented, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Context parallelism: lists of parts, loss masks and lengths of the whole."""
    data, args = batch(), arguments()
    parts = [(length + 1) // 2 for length in RESPONSES]
    for name in ("advantages", "log_probs", "rollout_log_probs"):
        data[name] = [values[:part] for values, part in zip(data[name], parts, strict=True)]
    whole = slimes_log_probs

    def halves(logits: torch.Tensor, **options: Any) -> Any:
        empty, found = whole(logits, **options)
        cut = [values[:part] for values, part in zip(found["log_probs"], parts, strict=True)]
        return empty, {"log_probs": cut}

    halves.__signature__ = inspect.signature(whole)
    monkeypatch.setattr(sys.modules[SLIME], "get_log_probs_and_entropy", halves)
    masks = [mask[:part] for mask, part in zip(data["loss_masks"], parts, strict=True)]
    local = reducer(args, data | {"loss_masks": masks, "response_lengths": parts})
    logits = Policy()(data).detach().requires_grad_()
    loss, _ = BAND_LOSS(args, data, logits, local)
    cut = [
        values[:part]
        for values, part in zip(log_probs_of_responses(logits, args, data), parts, strict=True)
    ]
    expected = token_losses(
        torch.cat(cut),
        torch.cat(data["rollout_log_probs"]),
        torch.cat(data["advantages"]),
        torch.cat(masks).bool(),
        BAND,
    )
    torch.testing.assert_close(loss, local(expected))
    with pytest.raises(ValueError, match=r"min_ratio: expected 0\.0, got 0\.1: under context"):
        ROLLOUT_LOSS(args, data, logits, local)


def test_a_rank_that_holds_whole_sequences_refuses_with_the_others(documented: Documented) -> None:
    """Of context parallelism: short samples can lie on one rank, and the other has nothing."""
    data, args = batch(), arguments(context_parallel_size=2)
    with pytest.raises(ValueError, match=r"min_ratio: expected 0\.0, got 0\.1: under context"):
        ROLLOUT_LOSS(args, data, Policy()(data), reducer(args, data))
    tis = adapter.custom_tis(IPOConfig.geometric(0.9, 1.1))
    names = ("rollout_log_probs", "loss_masks", "response_lengths")
    with pytest.raises(ValueError, match=r"sequence_rules: expected .*: under context"):
        tis(
            args=correcting(context_parallel_size=2),
            pg_loss=torch.ones(sum(RESPONSES)),
            train_log_probs=data["log_probs"],
            **{name: data[name] for name in names},
        )


class Step(NamedTuple):
    loss: torch.Tensor
    log: dict[str, torch.Tensor]
    gradients: tuple[torch.Tensor, ...]


def step_in_the_trainer(name: str, function: str, tensor: int = 1, context: int = 1) -> Step:
    """Of this rank's shard of the vocabulary, or of its part of the sequences."""
    torch.manual_seed(0)
    data, model = batch(), Policy()
    args = {"loss": arguments, "corrected": correcting}[function](context_parallel_size=context)
    with pytest.MonkeyPatch.context() as patch, megatrons_groups(name, tensor, context):
        trainer = TRAINERS[name](patch)
        logits = nn.functional.pad(model(data), (0, 1), value=-30.0)  # Megatron pads vocabularies
        if context > 1:
            logits, data = part_of_sequences(name, logits, data)
        shard = logits.chunk(tensor, -1)[torch.distributed.get_rank() % tensor]
        loss, log = getattr(trainer, function)(args, data, shard.contiguous())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    return Step(loss.detach(), {key: value.detach() for key, value in log.items()}, gradients)


def part_of_sequences(
    name: str, logits: torch.Tensor, data: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """By the trainer's own functions, as it deals a batch out to ranks."""
    module = {
        "slime": "slime.backends.megatron_utils.cp_utils",
        "miles": "miles.backends.training_utils.cp_utils",
    }[name]
    cp_utils = importlib.import_module(module)
    rows = logits[0].split(data["total_lengths"])
    lengths = list(zip(data["total_lengths"], data["response_lengths"], strict=True))
    parts = {
        field: [
            cp_utils.slice_log_prob_with_cp(values, *both)
            for values, both in zip(data[field], lengths, strict=True)
        ]
        for field in ("advantages", "log_probs", "rollout_log_probs")
    }
    return torch.cat([cp_utils.slice_with_cp(row, 0.0) for row in rows])[None], data | parts


if INSTALLED:  # a parametrization of nothing would be a skip

    @pytest.mark.parametrize("name", INSTALLED)
    @pytest.mark.parametrize(
        ("function", "split"),
        [("loss", {"tensor": 2}), ("corrected", {"tensor": 2}), ("loss", {"context": 2})],
        ids=["loss, tensor parallel", "correction, tensor parallel", "loss, context parallel"],
    )
    def test_two_ranks_step_as_one(name: str, function: str, split: dict[str, int]) -> None:
        """Each rank's loss is of all of the vocabulary, or of its tokens; gradients add up."""
        # A fork would wait for what the trainers compile.
        spawned = functools.partial(on_ranks, in_a_group, start_method="spawn")
        (whole,) = spawned(step_in_the_trainer, name, function, ranks=1)
        steps = spawned(functools.partial(step_in_the_trainer, **split), name, function)
        ranks = split.get("context", 1)  # over which Megatron averages
        losses = sum(step.loss for step in steps) / len(steps)
        torch.testing.assert_close(losses, whole.loss, rtol=1e-5, atol=1e-6)
        for *ours, theirs in zip(*(step.gradients for step in steps), whole.gradients, strict=True):
            torch.testing.assert_close(sum(ours) / ranks, theirs, rtol=1e-4, atol=1e-6)
        # Of tokens that weigh unequally, means of ranks have no mean but for the losses.
        names = whole.log if ranks == 1 else ("loss", "ipo/pg_loss", "ipo/kl_loss")
        for key in names:
            logged = sum(step.log[key] for step in steps) / (len(steps) / ranks)
            torch.testing.assert_close(logged, whole.log[key], rtol=1e-5, atol=1e-6)


def test_replay_of_top_p_stays_the_trainers(documented: Documented) -> None:
    data = batch()
    documented.loss(arguments(rollout_top_p=0.9), data, Policy()(data))  # asserted in the callee


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_a_mask_of_any_kind_means_the_same(documented: Documented, kind: torch.dtype) -> None:
    data = batch()
    logits = Policy()(data)
    expected, _ = documented.loss(arguments(), data, logits)
    data["loss_masks"] = [mask.to(kind) for mask in data["loss_masks"]]
    assert documented.loss(arguments(), data, logits)[0] == expected


def test_garbage_outside_of_the_mask_changes_nothing(documented: Documented) -> None:
    data = batch()
    logits = Policy()(data)
    expected, _ = documented.loss(arguments(), data, logits)
    for name in ("rollout_log_probs", "advantages"):
        for garbage in (math.nan, math.inf, 0.0):
            spoiled = [
                torch.where(mask.bool(), values, garbage)
                for values, mask in zip(data[name], data["loss_masks"], strict=True)
            ]
            assert documented.loss(arguments(), data | {name: spoiled}, logits)[0] == expected


def test_a_micro_batch_without_tokens_runs_backward(trainer: Any) -> None:
    data = batch(masks=[[0] * length for length in RESPONSES])
    logits = Policy()(data).detach().requires_grad_()
    loss, log = trainer.loss(arguments(), data, logits)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    assert log["ipo/is_masked"].item() == 0


def test_a_rank_without_tokens_runs_backward(
    documented: Documented, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of context parallelism: samples of which this rank has no token, nor a graph to them."""
    nothing = [torch.zeros(0)] * 2

    def no_log_probs(logits: torch.Tensor, **_: Any) -> dict[str, list[torch.Tensor]]:
        return {"log_probs": nothing}

    monkeypatch.setattr(sys.modules[SLIME], "get_log_probs_and_entropy", no_log_probs)
    data = batch() | {
        "unconcat_tokens": [torch.zeros(3, dtype=torch.long)] * 2,
        "total_lengths": [3, 3],
        "response_lengths": [0, 0],
        "loss_masks": nothing,
        "rollout_mask_sums": [torch.tensor(1)] * 2,
        "advantages": nothing,
        "rollout_log_probs": nothing,
    }
    logits = torch.full((1, 6, VOCAB), math.nan, requires_grad=True)
    loss, log = documented.loss(arguments(), data, logits)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    assert all(value.isfinite() for value in log.values())


def cut(values: list[torch.Tensor]) -> list[torch.Tensor]:
    return [values[0][1:], *values[1:]]


@pytest.mark.parametrize(
    ("name", "spoil", "match"),
    [
        ("rollout_log_probs", lambda _: None, "rollout_log_probs: expected .*, got None: the"),
        ("rollout_log_probs", cut, r"rollout_log_probs: .* of log_probs, \[4, 1, 6\], got \[3, 1"),
        ("advantages", cut, r"advantages: expected .* of log_probs, \[4, 1, 6\], got \[3, 1, 6\]"),
        ("advantages", lambda values: values[:2], r"advantages: expected .*, got \[4, 1\]"),
        ("loss_masks", cut, r"loss_masks: expected .* response_lengths, \[4, 1, 6\], got \[3, 1"),
        ("loss_masks", lambda values: values[:2], r"loss_masks: expected .*, got \[4, 1\]"),
    ],
)
def test_lists_that_do_not_fit_are_refused_by_name(
    documented: Documented, name: str, spoil: Callable[[Any], Any], match: str
) -> None:
    data = batch()
    with pytest.raises(ValueError, match=match):
        documented.loss(arguments(), data | {name: spoil(data[name])}, Policy()(data))


REFUSED = (
    ({"eps_clip": 0.3, "eps_clip_high": 0.3}, r"eps_clip: expected the default 0\.2, got 0\.3"),
    ({"eps_clip_high": 0.28}, r"eps_clip_high: expected the default None, got 0\.28"),
    ({"eps_clip_c": 3.0}, "eps_clip_c: expected the default None"),
    ({"use_tis": True}, "use_tis: expected the default False, got True: the ratio"),
    ({"get_mismatch_metrics": True}, "get_mismatch_metrics: expected the default False"),
    ({"custom_tis_function_path": "a.b"}, "custom_tis_function_path: expected the default None"),
    ({"custom_pg_loss_reducer_function_path": "a.b"}, "custom_pg_loss_reducer_function_path: exp"),
    ({"use_opsm": True}, "use_opsm: expected the default False, got True: set sequence_rules"),
    ({"entropy_coef": 0.01}, r"entropy_coef: expected the default 0\.0, got 0\.01: .* no entropy"),
    ({"observe_training_entropy": True}, "observe_training_entropy: expected the default False"),
    ({"use_kl_loss": True}, "use_kl_loss: expected the default False, got True: .* no reference"),
    ({"advantage_estimator": "gspo"}, "advantage_estimator: expected .* a loss of its own"),
    ({"advantage_estimator": "cispo"}, "advantage_estimator: expected .* a loss of its own"),
)


@pytest.mark.parametrize(("options", "match"), REFUSED, ids=lambda value: str(value)[:30])
def test_an_option_that_is_not_honoured_raises(
    documented: Documented, options: dict[str, Any], match: str
) -> None:
    data = batch()
    with pytest.raises(ValueError, match=match):
        documented.loss(arguments(**options), data, Policy()(data))


# What the trainers' own policy_loss_function reads of the arguments, beside what is refused.
KEPT_BY_THE_TRAINERS = {
    *("use_rollout_logprobs", "calculate_per_token_loss", "qkv_format", "skip_actor_forward_only"),
    *("kl_loss_coef", "kl_loss_type", "use_unbiased_kl"),  # read with use_kl_loss alone
    "dump_details",  # a file for debugging
}


def test_every_option_of_the_trainers_losses_is_honoured_or_refused() -> None:
    refused = {name for changed, _ in REFUSED for name in changed}
    assert {*options.NOT_HONOURED} <= refused
    for name in INSTALLED:
        losses = {"slime": SLIME, "miles": "miles.backends.training_utils.loss_hub.losses"}[name]
        source = inspect.getsource(importlib.import_module(losses).policy_loss_function)
        read = set(re.findall(r"\bargs(?:\.|, \")(\w+)", source))
        assert read - refused <= KEPT_BY_THE_TRAINERS


THE_TRAINERS_OWN = {  # of all arguments, what is not of the loss
    # advantages and rewards, before it
    *("advantage_estimator", "gamma", "lambd", "kl_coef", "normalize_advantages", "opd_kl_coef"),
    *("use_opd", "opd_type", "opd_teacher_load", "opd_teacher_ckpt_step", "opd_teacher_key"),
    *("opd_teacher_urls", "opd_log_prob_top_k", "opd_reward_weight_mode", "opd_top_k_strategy"),
    *("opd_topk_per_position", "custom_advantage_function_path"),
    *("disable_compute_advantages_and_returns", "disable_grpo_std_normalization"),
    "disable_rewards_normalization",
    # which samples and tokens there are
    *("buffer_filter_path", "dynamic_sampling_filter_path", "over_sampling_batch_size"),
    *("n_samples_per_prompt", "rollout_sample_filter_path", "rollout_sample_hook_path"),
    *("rollout_all_samples_process_path", "custom_convert_samples_to_train_data_path"),
    *("loss_mask_type", "mask_offpolicy_in_partial_rollout", "min_batch_collection_ratio"),
    *("session_sample_picker_path", "session_sample_postprocessor_path"),
    *("disable_rollout_trim_samples", "async_unused_samples_handler", "pause_generation_mode"),
    # how log-probabilities are made; what the engine samples by (replayed, or warned of)
    *("rollout_temperature", "rollout_top_p", "rollout_top_k", "log_probs_chunk_size"),
    *("log_probs_max_tokens_per_gpu", "custom_megatron_before_log_prob_hook_path"),
    *("recompute_logprobs_via_prefill", "recompute_loss_function", "true_on_policy_mode"),
    # what names the loss and the average
    *("loss_type", "custom_loss_function_path", "calculate_per_token_loss"),
    # read with an option that is refused: use_tis, use_kl_loss, use_opsm
    *("tis_clip", "tis_clip_low", "kl_loss_coef", "kl_loss_type", "use_unbiased_kl", "opsm_delta"),
    # the critic, other losses of the model, metrics, evaluation, checks
    *("value_clip", "mtp_loss_scaling_factor", "clip_grad", "use_rollout_entropy"),
    *(
        "log_correct_samples",
        "eval_temperature",
        "eval_top_k",
        "eval_top_p",
        "eval_overflow_policy",
    ),
    *("n_samples_per_eval_prompt", "moe_input_jitter_eps", "async_max_concurrent_samples"),
    *("async_data_buffer_capacity_factor", "miles_dsa_topk_backend", "use_rollout_logprobs"),
}
NO_LOSS = ("ci_", "update_weight", "check_weight", "miles_router")


def test_every_argument_that_may_touch_the_loss_is_known() -> None:
    known = THE_TRAINERS_OWN | options.NOT_HONOURED.keys() | {"eps_clip_high"}
    for name in INSTALLED:
        source = Path(importlib.util.find_spec(f"{name}.utils.arguments").origin).read_text()
        names = {found.replace("-", "_") for found in re.findall(r'"--([a-z0-9-]+)"', source)}
        assert_all_are_known((name for name in names if not name.startswith(NO_LOSS)), known)


@pytest.mark.parametrize("function", ["loss", "corrected"])
@pytest.mark.parametrize(
    ("module", "sampling", "named"),
    [
        (SLIME, {"rollout_top_k": 20}, "top_k=20"),
        (MILES, {"rollout_top_k": 20}, "top_k=20"),
        (MILES, {"rollout_top_p": 0.9}, r"top_p=0\.9"),
        (MILES, {"rollout_top_p": 0.9, "rollout_top_k": 5}, r"top_p=0\.9, top_k=5"),
    ],
)
def test_what_bends_the_ratio_is_warned_of_once(
    function: str,
    module: str,
    sampling: dict[str, Any],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options._warn_once.cache_clear()
    data, args = batch(), {"loss": arguments, "corrected": correcting}[function](**sampling)
    call = getattr(Documented(module, monkeypatch), function)
    logits = Policy()(data)
    with pytest.warns(UserWarning, match=f"^{named}: completions are drawn from another") as seen:
        call(args, data, logits)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(args, data, logits)


@pytest.mark.filterwarnings("error:.*drawn from another")
def test_what_slime_replays_is_not_warned_of(documented: Documented) -> None:
    options._warn_once.cache_clear()
    data = batch()
    documented.loss(arguments(rollout_top_p=0.9), data, Policy()(data))


def test_metrics_that_add_up_are_means_over_active_tokens() -> None:
    """The list that adapters share is the one of csrc/math/metrics.h."""
    header = (ROOT / "csrc/math/metrics.h").read_text()
    names = [
        line.split("(")[1].split(",")[0]
        for line in header.splitlines()
        if line.strip().startswith("X(") and line.rstrip(" \\").endswith(", active)")
    ]
    assert set(names) == set(PER_TOKEN)


def test_a_call_from_no_trainer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DOCUMENTED:
        monkeypatch.delitem(sys.modules, name, raising=False)
    data = batch()
    with pytest.raises(RuntimeError, match="custom_loss: expected a trainer that has imported one"):
        BAND_LOSS(arguments(), data, Policy()(data), reducer(arguments(), data))


def test_a_teacher_raises() -> None:
    for make in (adapter.custom_loss, adapter.custom_tis):
        with pytest.raises(ValueError, match=r"teacher_tau: expected 0, got 0\.5: slime"):
            make(IPOConfig(kl_tau=0.0, teacher_tau=0.5))


# -------------------------------------------------------------------------------------------------
# The correction of the trainer's own loss


def correcting(**options: Any) -> Namespace:
    settings = {"use_tis": True, "custom_tis_function_path": named("TIS"), "eps_clip": 1e9}
    return arguments(loss_type="policy_loss", **{"eps_clip_high": 1e9, **settings, **options})


def weight_by_hand(data: dict[str, Any]) -> torch.Tensor:
    x = torch.cat(data["log_probs"]) - torch.cat(data["rollout_log_probs"])
    return torch.where((x >= math.log(0.5)) & (x <= math.log(2)), x.exp(), 0).double()


def test_the_trainers_own_loss_is_weighed(trainer: Any) -> None:
    args, model, data = correcting(), Policy(), batch()
    twin = copy.deepcopy(model).to(trainer.dtype)
    log_probs = torch.cat(trainer.log_probs(twin(data), args, data))
    ratio = (log_probs - torch.cat(data["log_probs"])).exp()
    weights = weight_by_hand(data)
    losses = -ratio * torch.cat(data["advantages"]).double() * weights
    expected = reducer(args, data)(losses)
    theirs = torch.autograd.grad(expected, list(twin.parameters()))

    loss, log = trainer.corrected(args, data, model(data))
    loss.backward()
    ours = [parameter.grad for parameter in model.parameters()]
    assert_same_step(loss, expected, ours, theirs)
    assert log["ipo/is_masked"] == reducer(args, data)((weights == 0).float())
    mask = torch.cat(data["loss_masks"]).bool()
    assert 0 < (weights[mask] == 0).sum() < mask.sum(), "some are to be dropped, some kept"


def test_metrics_without_a_correction_leave_the_loss_alone(trainer: Any) -> None:
    data, logits = batch(), Policy()(batch())
    plain = correcting(use_tis=False, custom_tis_function_path=None)
    log_probs = torch.cat(log_probs_of_responses(logits, plain, data))
    ratio = (log_probs - torch.cat(data["log_probs"])).exp()
    expected = reducer(plain, data)(-ratio * torch.cat(data["advantages"]))
    args = correcting(use_tis=False, get_mismatch_metrics=True)
    loss, log = trainer.corrected(args, data, logits)
    torch.testing.assert_close(loss, expected)
    assert log["ipo/is_masked"] > 0


def weights_for(config: IPOConfig, data: dict[str, Any]) -> torch.Tensor:
    """What a loss of ones becomes."""
    ones = torch.ones(sum(RESPONSES))
    weighted, masks, _ = adapter.custom_tis(config)(
        args=correcting(),
        pg_loss=ones,
        train_log_probs=data["log_probs"],
        rollout_log_probs=data["rollout_log_probs"],
        loss_masks=data["loss_masks"],
        response_lengths=data["response_lengths"],
    )
    assert masks is data["loss_masks"]
    return weighted


def test_each_form_has_its_weight() -> None:
    data = batch(masks=[[1] * length for length in RESPONSES])
    ratio = (torch.cat(data["log_probs"]) - torch.cat(data["rollout_log_probs"])).exp()
    kept = (ratio > 0.5) & (ratio < 1.3)
    for config, expected in (
        (IPOConfig(dppo_mask_low=0.5, dppo_mask_high=1.3, kl_tau=0.0), torch.where(kept, ratio, 0)),
        (IPOConfig(mask_rule="none", kl_tau=0.0), ratio),
        (IPOConfig.tis(cap=1.5), ratio.clamp(max=1.5)),
        (IPOConfig.cispo(0.7, 1.5), ratio.clamp(0.7, 1.5)),
        (
            IPOConfig(mask_rule="none", pg_form="capped", ratio_cap=1.2, kl_tau=0.0),
            ratio.clamp(max=1.2),
        ),
        (
            IPOConfig(dppo_mask_low=0.5, dppo_mask_high=1.3, pg_form="reinforce", kl_tau=0.0),
            kept.float(),
        ),
    ):
        torch.testing.assert_close(weights_for(config, data), expected)


def test_a_rollout_rule_takes_the_weight_of_a_whole_response() -> None:
    data = batch()
    data["rollout_log_probs"] = [values.clone() for values in data["log_probs"]]
    data["rollout_log_probs"][0][2] += 5  # a token that does not train drops nothing
    data["rollout_log_probs"][1][0] += 5
    config = IPOConfig(mask_rule="none", rollout_min_ratio=0.1, kl_tau=0.0)
    first, second, _ = weights_for(config, data).split(RESPONSES)
    torch.testing.assert_close(first, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert not second.any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_a_token_without_a_finite_ratio_pays_exactly_nothing(garbage: float) -> None:
    data = batch()
    data["rollout_log_probs"][0][1] = garbage
    pg_loss = torch.ones(sum(RESPONSES))
    pg_loss[1] = math.nan  # what the trainer's own loss makes of it
    pg_loss.requires_grad_()
    weighted, _, metrics = TIS(
        args=correcting(),
        pg_loss=pg_loss,
        train_log_probs=data["log_probs"],
        rollout_log_probs=data["rollout_log_probs"],
        loss_masks=data["loss_masks"],
        response_lengths=data["response_lengths"],
    )
    weighted.sum().backward()
    assert weighted[1] == 0
    assert pg_loss.grad[1] == 0
    assert pg_loss.grad.isfinite().all()
    assert metrics["ipo/nonfinite"].tolist().index(1) == 1
    assert metrics["ipo/is_masked"].isfinite().all()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (IPOConfig(kl_tau=0.1), "kl_tau"),
        (IPOConfig.dppo(kl_tau=0.0), "mask_rule"),
        (
            IPOConfig(
                kl_tau=0.0,
                sequence_rules=(("mean_k1", 0.9, 2.0),),
                sequence_rule_when="negative_advantage",
            ),
            "sequence_rule_when",
        ),
        (IPOConfig.ppo(), "pg_form"),
    ],
)
def test_what_a_weight_cannot_have_is_refused(config: IPOConfig, name: str) -> None:
    with pytest.raises(ValueError, match=rf"ipo_config\.{name}: got .* use custom_loss instead"):
        adapter.custom_tis(config)


@pytest.mark.parametrize(
    ("options", "changes", "match"),
    [
        ({"tis_clip": 5.0}, {}, r"tis_clip: expected the default 2\.0, got 5\.0"),
        ({"tis_clip_low": 0.5}, {}, r"tis_clip_low: expected the default 0, got 0\.5"),
        ({}, {"rollout_log_probs": None}, "rollout_log_probs: expected .*, got None"),
        ({}, {"rollout_log_probs": cut}, r"rollout_log_probs: expected .* of train_log_probs"),
        ({}, {"loss_masks": cut}, "loss_masks: expected the lengths of response_lengths"),
    ],
)
def test_the_correction_refuses_what_it_cannot_honour(
    options: dict[str, Any], changes: dict[str, Any], match: str
) -> None:
    data = batch()
    for name, change in changes.items():
        data[name] = change(data[name]) if callable(change) else change
    with pytest.raises(ValueError, match=match):
        TIS(
            args=correcting(**options),
            pg_loss=torch.ones(sum(RESPONSES)),
            train_log_probs=data["log_probs"],
            rollout_log_probs=data["rollout_log_probs"],
            loss_masks=data["loss_masks"],
            response_lengths=data["response_lengths"],
        )


def test_the_docs_block_is_a_module_of_both_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (
        found
        for found in blocks_of_page("docs/integrations.md")
        if "integrations import slime" in found.source
    )
    made: dict[str, Any] = {}
    block.run(made)
    trainer, data = Documented(SLIME, monkeypatch), batch()
    made["loss"](arguments(), data, Policy()(data), reducer(arguments(), data))
    assert isinstance(trainer, Documented)
    made["tis"](
        args=correcting(),
        pg_loss=torch.ones(sum(RESPONSES)),
        train_log_probs=data["log_probs"],
        rollout_log_probs=data["rollout_log_probs"],
        loss_masks=data["loss_masks"],
        response_lengths=data["response_lengths"],
    )
