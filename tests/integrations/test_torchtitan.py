"""A tiny model trained through the real torchtitan's chunked loss: loss and gradient by hand.

torchtitan's RL trainer needs vLLM and monarch to be imported, and its models Triton; so the model
and the loop are this file's. Configuration, the loss's interface, the chunks and their backward
pass are torchtitan's, and so is the loss that is compared with, loaded from its file.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torchtitan
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper
from torchtitan.config import ParallelismConfig
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division
from torchtitan.distributed.spmd_types import set_current_spmd_mesh

from ipo_ext import IPOConfig
from ipo_ext.integrations.torchtitan import IPOLoss, check_config
from tests.docs.page_blocks import blocks_of_host
from tests.integrations.eager import assert_same_step, token_losses
from tests.integrations.ranks import in_a_group, on_ranks

BAND = IPOConfig(dppo_mask_low=0.5, dppo_mask_high=2.0, kl_tau=0.1)
BATCH, LENGTH, VOCAB, CHUNKS = 2, 12, 11, 4


def loaded(file: str) -> ModuleType:
    """A module of torchtitan's RL package, which as a whole needs vLLM."""
    path = Path(torchtitan.__file__).parent / "experiments" / "rl" / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


DAPOLoss = loaded("losses/dapo.py").DAPOLoss


def loss_of(config: IPOConfig = BAND) -> IPOLoss:
    return IPOLoss.Config(ipo_config=config).build()


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.lm_head = nn.Linear(16, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states, as of a torchtitan model that skips its head."""
        return self.embedding(tokens).cumsum(1).tanh()


def micro_batch(shape: tuple[int, ...] = (BATCH, LENGTH)) -> dict[str, torch.Tensor]:
    loss_mask = torch.rand(shape) < 0.7
    labels = torch.randint(VOCAB, shape)
    return {
        "tokens": torch.randint(VOCAB, shape),
        "labels": torch.where(loss_mask, labels, IGNORE_INDEX),
        "generator_logprobs": torch.where(loss_mask, -1.5 - 2 * torch.rand(shape), 0),
        "advantages": torch.randn(shape),
        "loss_mask": loss_mask,
    }


def constants(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: data[name] for name in ("generator_logprobs", "advantages", "loss_mask")}


def by_hand(model: Policy, data: dict[str, torch.Tensor], config: IPOConfig) -> torch.Tensor:
    """The losses of tokens, not yet divided."""
    logprobs = model.lm_head(model(data["tokens"])).log_softmax(-1)
    chosen = logprobs.gather(-1, data["labels"].clamp(min=0)[..., None]).squeeze(-1)
    generator = data["generator_logprobs"].double()
    return token_losses(chosen, generator, data["advantages"].double(), data["loss_mask"], config)


def combined(reports: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """As torchtitan's controller combines micro-batches: by the suffix of each name."""
    total = dict(reports[0])
    for report in reports[1:]:
        for name, value in report.items():
            is_max = name.endswith("/max")
            total[name] = torch.maximum(total[name], value) if is_max else total[name] + value
    return total


@pytest.mark.parametrize("chunks", [1, CHUNKS])
def test_training_equals_eager(chunks: int) -> None:
    wrapper = ChunkedLossWrapper.Config(
        num_chunks=chunks, loss_fn=IPOLoss.Config(ipo_config=BAND)
    ).build()
    model = Policy()
    wrapper.set_lm_head(model.lm_head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    dropped = []
    for _ in range(3):
        batches, twin = [micro_batch(), micro_batch()], copy.deepcopy(model).double()
        tokens = int(sum(data["loss_mask"].sum() for data in batches))
        losses = [by_hand(twin, data, BAND) for data in batches]
        expected = sum(loss.sum() for loss in losses) / tokens
        theirs = torch.autograd.grad(expected, list(twin.parameters()))

        optimizer.zero_grad()
        reports, total = [], 0.0
        for data in batches:
            hidden = model(data["tokens"])
            loss, metrics = wrapper(hidden, data["labels"], tokens, **constants(data))
            loss.backward()
            total += loss.item()
            reports.append(metrics)
        ours = [parameter.grad for parameter in model.parameters()]
        assert_same_step(total, expected, ours, theirs)
        masked = [
            (loss == 0)[data["loss_mask"]] for loss, data in zip(losses, batches, strict=True)
        ]
        dropped.append(torch.cat(masked).double().mean().item())
        metrics = combined(reports)
        assert metrics["loss/ipo/is_masked/mean"].item() == pytest.approx(dropped[-1])
        assert metrics["loss/mean"].item() == pytest.approx(expected.item(), rel=1e-5)
        parts = metrics["loss/ipo/pg_loss/mean"] + metrics["loss/ipo/kl_loss/mean"]
        assert parts.item() == pytest.approx(expected.item(), rel=1e-5)
        optimizer.step()
    assert 0 < sum(dropped) < 3, "some tokens are to be dropped, and some kept"


@pytest.mark.parametrize("shape", [(BATCH, LENGTH), (BATCH * LENGTH,)], ids=["B, L", "T"])
def test_the_clipped_loss_is_torchtitans_own(shape: tuple[int, ...]) -> None:
    """PPO's form against DAPOLoss, which takes ``[B, L, V]``; flat logits are the same rows."""
    data = micro_batch((BATCH, LENGTH))
    data["labels"] = data["labels"].clamp(min=0)  # DAPOLoss trains an ignored label
    data["generator_logprobs"][0, :2] = math.nan  # as vLLM reports under CUDA graphs
    logits = torch.randn(BATCH, LENGTH, VOCAB)
    theirs = logits.clone().requires_grad_()
    own = DAPOLoss.Config(ratio_clip_low=0.2, ratio_clip_high=0.28).build()
    expected, reported = own(theirs, data["labels"], 17, **constants(data))
    expected.backward()

    ours = logits.reshape(*shape, VOCAB).clone().requires_grad_()
    flat = {name: tensor.reshape(shape) for name, tensor in data.items()}
    config = IPOConfig.ppo(0.8, 1.28, max_importance_ratio=math.exp(10))
    loss, metrics = loss_of(config)(ours, flat["labels"], 17, **constants(flat))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad.reshape(ours.shape), rtol=1e-4, atol=1e-7)
    shared = metrics.keys() & reported.keys()
    assert {"loss/mean", "trainer/entropy/mean", "bit_wise/logprob_diff/max"} == shared
    for name in shared:
        torch.testing.assert_close(metrics[name].float(), reported[name].float())


def test_the_call_is_that_of_torchtitans_own_losses() -> None:
    def parameters(loss: type) -> list[tuple[str, Any]]:
        return [
            (one.name, one.kind) for one in inspect.signature(loss.__call__).parameters.values()
        ]

    assert parameters(IPOLoss) == parameters(DAPOLoss)
    assert inspect.signature(IPOLoss).parameters.keys() == (
        inspect.signature(DAPOLoss).parameters.keys()
    )


@pytest.mark.parametrize("tokens", [None, 17, 17.0, torch.tensor(17), 0, torch.tensor(0)])
def test_what_the_loss_is_divided_by(tokens: Any) -> None:
    data, logits = micro_batch(), torch.randn(BATCH, LENGTH, VOCAB)
    undivided, _ = loss_of()(logits, data["labels"], 1, **constants(data))
    loss, _ = loss_of()(logits, data["labels"], tokens, **constants(data))
    torch.testing.assert_close(loss * max(int(tokens or 1), 1), undivided)


@pytest.mark.parametrize("shape", [(0, LENGTH), (BATCH, LENGTH)], ids=["no rows", "no tokens"])
def test_a_micro_batch_without_tokens_runs_backward(shape: tuple[int, ...]) -> None:
    data = micro_batch(shape)
    data["loss_mask"] = torch.zeros(shape, dtype=torch.bool)
    logits = torch.full((*shape, VOCAB), math.nan, requires_grad=True)
    loss, metrics = loss_of()(logits, data["labels"], 17, **constants(data))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    assert all(value.isfinite() for value in metrics.values())


def test_garbage_outside_of_the_mask_and_masks_of_numbers_change_nothing() -> None:
    data, logits = micro_batch(), torch.randn(BATCH, LENGTH, VOCAB)
    expected, _ = loss_of()(logits, data["labels"], 17, **constants(data))
    for name in ("generator_logprobs", "advantages"):
        for garbage in (math.nan, math.inf, 0.0):
            spoiled = {name: torch.where(data["loss_mask"], data[name], garbage)}
            loss, _ = loss_of()(logits, data["labels"], 17, **constants(data | spoiled))
            assert loss == expected
    for kind in (torch.int64, torch.float32):
        numbers = {"loss_mask": data["loss_mask"].to(kind)}
        assert loss_of()(logits, data["labels"], 17, **constants(data | numbers))[0] == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("labels", IGNORE_INDEX), ("generator_logprobs", math.nan), ("generator_logprobs", -math.inf)],
)
def test_a_token_that_torchtitan_does_not_count_takes_no_part(name: str, value: float) -> None:
    """Neither in the loss nor in metrics, whose shares are of ``global_valid_tokens``."""
    data, logits = micro_batch(), torch.randn(BATCH, LENGTH, VOCAB)
    without = data | {"loss_mask": data["loss_mask"].clone()}
    without["loss_mask"][:, ::3] = False
    expected, measured = loss_of()(logits, without["labels"], 17, **constants(without))
    data[name] = torch.where(without["loss_mask"], data[name], value)
    loss, metrics = loss_of()(logits, data["labels"], 17, **constants(data))
    assert loss == expected
    assert metrics == measured


@pytest.mark.parametrize("name", ["generator_logprobs", "advantages", "loss_mask"])
def test_a_tensor_of_another_shape_is_refused_by_name(name: str) -> None:
    data, logits = micro_batch(), torch.randn(BATCH, LENGTH, VOCAB)
    data[name] = data[name][:, 1:]
    with pytest.raises(ValueError, match=rf"{name}: expected shape .* like labels, got \[2, 11\]"):
        loss_of()(logits, data["labels"], 17, **constants(data))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (IPOConfig(rollout_min_ratio=0.1), r"min_ratio: expected 0\.0, got 0\.1: torchtitan"),
        (IPOConfig(teacher_tau=0.5), r"teacher_tau: expected 0, got 0\.5: torchtitan"),
    ],
)
def test_a_config_that_torchtitan_cannot_serve_raises(config: IPOConfig, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        loss_of(config)


@pytest.fixture
def two_ranks() -> Iterator[Any]:
    """A mesh of two tensor-parallel ranks, of which this process is the first."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(2), Replicate()], ids=str)
def test_a_dtensor_is_refused(two_ranks: Any, placement: Any) -> None:
    data = micro_batch()
    logits = distribute_tensor(torch.randn(BATCH, LENGTH, VOCAB + 1), two_ranks, [placement])
    with pytest.raises(ValueError, match=r"logits: expected a plain tensor .*, got a DTensor of"):
        loss_of()(logits, data["labels"], 17, **constants(data))


def test_a_plain_shard_of_the_vocabulary_is_refused(two_ranks: Any) -> None:
    """torchtitan's default backend hands over a plain tensor, which looks like a whole one."""
    data, logits = micro_batch(), torch.randn(BATCH, LENGTH, VOCAB)
    with (
        set_current_spmd_mesh(two_ranks),
        pytest.raises(ValueError, match=r"got a shard: .*tensor_parallel_degree=1"),
    ):
        loss_of()(logits, data["labels"], 17, **constants(data))


def refusals_on_this_rank() -> list[str]:
    """Of a shard of the vocabulary, plain and as a DTensor, both of this rank."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    data, logits = micro_batch(), torch.randn(BATCH, LENGTH, VOCAB + 1)
    shard = distribute_tensor(logits, mesh, [Shard(2)])
    refused = []
    with set_current_spmd_mesh(mesh):
        for given in (shard.to_local(), shard):
            with pytest.raises(ValueError, match="logits: expected a plain tensor") as raised:
                loss_of()(given, data["labels"], 17, **constants(data))
            refused.append(str(raised.value))
    return refused


def test_every_tensor_parallel_rank_refuses() -> None:
    for plain, distributed in on_ranks(in_a_group, refusals_on_this_rank):
        assert "got a shard: this loss knows no shards" in plain
        assert "got a DTensor of" in distributed


class Step(NamedTuple):
    """Of a rank, or of the whole, what the optimizer gets and what is reported."""

    gradients: list[torch.Tensor]
    metrics: dict[str, torch.Tensor]


def step_of_rows(ranks: int, left: int) -> Step:
    """A chunked step on this rank's rows; of the last rows ``left`` columns may train."""
    torch.manual_seed(0)
    model, data = Policy(), micro_batch((2 * BATCH, LENGTH))
    data["loss_mask"][BATCH:, left:] = False
    tokens = int(data["loss_mask"].sum())
    if ranks > 1:
        rank = torch.distributed.get_rank()
        data = {name: tensor.chunk(ranks)[rank] for name, tensor in data.items()}
        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        disable_fsdp_gradient_division(model)
        for module in (model, model.lm_head):
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply before it adds
    loss_fn = IPOLoss.Config(ipo_config=BAND)
    wrapper = ChunkedLossWrapper.Config(num_chunks=CHUNKS, loss_fn=loss_fn).build()
    wrapper.set_lm_head(model.lm_head)
    loss, metrics = wrapper(model(data["tokens"]), data["labels"], tokens, **constants(data))
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in gradients]
    return Step(whole, metrics)


@pytest.mark.parametrize("left", [0, 3], ids=["a rank without tokens", "a rank with few"])
def test_two_ranks_step_as_one(left: int) -> None:
    """By torchtitan's own FSDP, which adds gradients up."""
    steps, whole = on_ranks(in_a_group, step_of_rows, 2, left), step_of_rows(1, left)
    for step in steps:
        for ours, theirs in zip(step.gradients, whole.gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
    metrics = combined([step.metrics for step in steps])
    assert 0 < metrics["loss/ipo/is_masked/mean"] < 1
    for name, value in whole.metrics.items():
        torch.testing.assert_close(metrics[name], value)


@pytest.mark.parametrize("block", blocks_of_host("torchtitan"), ids=str)
def test_the_docs_block_builds(block: Any) -> None:
    names: dict[str, Any] = {}
    block.run(names)
    assert isinstance(names["loss"].build().loss_fn, IPOLoss)


def whole_config(**changes: Any) -> SimpleNamespace:
    """The options that are checked of torchtitan's, whose own class needs vLLM."""
    sampling = {"temperature": 1.0, "top_p": 1.0} | changes
    degree = sampling.pop("tensor_parallel_degree", 1)
    return SimpleNamespace(
        trainer=SimpleNamespace(parallelism=ParallelismConfig(tensor_parallel_degree=degree)),
        generator=SimpleNamespace(sampling=SimpleNamespace(**sampling)),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.8}, r"generator\.sampling\.temperature: expected 1, got 0\.8"),
        ({"tensor_parallel_degree": 2}, r"tensor_parallel_degree: expected 1, got 2"),
    ],
)
def test_the_whole_config_is_checked_before_anything_starts(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(whole_config(**changes))


def test_what_bends_the_ratio_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"^top_p=0\.95: completions are drawn") as seen:
        check_config(whole_config(top_p=0.95))
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_config(whole_config())


def options_of(file: str, *kinds: str) -> set[str]:
    """Of a config class, maybe inside another, in a module that needs vLLM: its text is read."""
    path = Path(torchtitan.__file__).parent / "experiments" / "rl" / file
    found: Any = ast.parse(path.read_text())
    for kind in kinds:
        (found,) = (
            node for node in found.body if isinstance(node, ast.ClassDef) and node.name == kind
        )
    return {node.target.id for node in found.body if isinstance(node, ast.AnnAssign)}


def test_every_option_of_sampling_is_known() -> None:
    """torchtitan's losses have settings of their own; ours is put in their place."""
    assert options_of("actors/generator.py", "SamplingConfig") == {
        *("temperature", "top_p"),  # checked by check_config
        *("max_tokens", "seed", "stop_token_ids"),
    }


def test_what_is_checked_stands_where_torchtitan_has_it() -> None:
    assert {"trainer", "generator"} <= options_of("controller.py", "Controller", "Config")
    assert {"parallelism", "loss"} <= options_of("actors/trainer.py", "PolicyTrainer", "Config")
    assert "sampling" in options_of("actors/generator.py", "VLLMGenerator", "Config")
