"""Metrics in what hosts do with outputs: they come through whole, or are refused in words."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import convert_to_fp32, send_to_device
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel, gather
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from ipo_ext import IPOConfig, IPOMetrics, IPOOutput, LossBatch, ipo_loss
from tests.support import host_casts
from tests.support.cases import same_bits


def output_of(model: Callable[..., IPOOutput], rank: int = 0) -> IPOOutput:
    hidden, labels, others = host_casts.inputs(rank)
    return model(hidden, labels, LossBatch(**others))


@pytest.fixture
def output() -> IPOOutput:
    """Without a graph, which copies and pickles refuse."""
    with torch.no_grad():
        return output_of(host_casts.Policy())


def assert_whole(found: Any, expected: IPOMetrics) -> None:
    assert type(found) is IPOMetrics
    assert found.keys() == expected.keys()
    assert all(map(same_bits, pytree.tree_leaves(found), pytree.tree_leaves(expected)))


def assert_output_whole(found: Any, expected: IPOOutput) -> None:
    assert type(found) is IPOOutput
    assert_whole(found.metrics, expected.metrics)
    for field in ("loss", "logprobs", "entropy"):
        assert same_bits(getattr(found, field), getattr(expected, field)), field


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -------------------------------------------------------------------------------------------------
# What passes an output on


def through_align_devices_hook(output: IPOOutput) -> IPOOutput:
    """What ``dispatch_model`` puts around each module that is elsewhere than its inputs."""
    module = torch.nn.Identity()
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    hook.pre_forward(module, output.loss)
    return hook.post_forward(module, output)


def through_queue(output: IPOOutput) -> IPOOutput:
    queue = torch.multiprocessing.SimpleQueue()
    queue.put(output)
    return queue.get()


@pytest.mark.parametrize(
    "passes",
    [
        convert_to_fp32,
        lambda output: send_to_device(output, "cpu"),
        through_align_devices_hook,
        saved_and_loaded,
        copy.copy,
        copy.deepcopy,
        lambda output: pickle.loads(pickle.dumps(output)),
        through_queue,
    ],
)
def test_an_output_comes_through_whole(passes: Callable[[Any], Any], output: IPOOutput) -> None:
    assert_output_whole(passes(output), output)


def test_a_loader_passes_metrics_on(output: IPOOutput) -> None:
    assert_whole(pin_memory(output.metrics), output.metrics)


def test_accelerate_moves_metrics_and_keeps_their_dtypes(output: IPOOutput) -> None:
    moved = send_to_device(output, "meta").metrics
    assert type(moved) is IPOMetrics
    assert moved.keys() == output.metrics.keys()
    leaves = pytree.tree_leaves(moved), pytree.tree_leaves(output.metrics)
    for found, expected in zip(*leaves, strict=True):
        assert (found.device.type, found.dtype) == ("meta", expected.dtype)
    with pytest.raises(TypeError, match=r"^device: expected a device, got torch\.bfloat16"):
        output.metrics.to(torch.bfloat16)


def test_a_checkpoint_of_all_public_values_loads_weights_only() -> None:
    config, others = IPOConfig.icepop(), host_casts.inputs(rank=0)[2]
    loaded = saved_and_loaded({"config": config, "batch": LossBatch(**others)})
    assert loaded["config"] == config
    batch = loaded["batch"].arguments()
    assert batch.keys() == others.keys()
    assert all(same_bits(batch[name], value) for name, value in others.items())


@pytest.mark.parametrize("read", [lambda m: {**m}, lambda m: dict(m.items())])
def test_metrics_are_read_in_a_compiled_function(read: Callable[[IPOMetrics], Any]) -> None:
    inputs = (-torch.rand(9), -torch.rand(9), torch.randn(9), torch.rand(9) < 0.8)

    def step(*inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return read(ipo_loss(*inputs).metrics)

    compiled, expected = torch.compile(step, fullgraph=True, backend="aot_eager"), step(*inputs)
    found = compiled(*inputs)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], value) for name, value in expected.items())


# -------------------------------------------------------------------------------------------------
# What would take metrics apart


@pytest.mark.parametrize(
    ("takes_apart", "sentence"),
    [
        (lambda metrics: gather([metrics, metrics], "cpu"), "^metrics: cannot be iterated over"),
        (list, r"^metrics: cannot be iterated over, .* metrics\.keys\(\) .* metrics\.all_reduce"),
        (lambda metrics: default_collate([metrics, metrics]), "found .*IPOMetrics"),
    ],
)
def test_metrics_are_not_taken_apart(
    takes_apart: Callable[[Any], Any], sentence: str, output: IPOOutput
) -> None:
    with pytest.raises(TypeError, match=sentence):
        takes_apart(output.metrics)


def test_sums_that_lost_float64_are_refused() -> None:
    inputs = (-torch.rand(9), -torch.rand(9), torch.randn(9), torch.rand(9) < 0.8)
    whole = ipo_loss(*inputs, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32)).metrics
    cast = pytree.tree_map(torch.Tensor.bfloat16, whole)
    sentence = (
        r"^metrics: expected sums in float64, got torch\.bfloat16: .*; combine metrics before"
    )
    for combine in (cast.total, cast.all_reduce, lambda: cast + whole, lambda: whole + cast):
        with pytest.raises(TypeError, match=sentence):
            combine()
    unsure = IPOMetrics(whole.means, whole.sums, whole.extremes.half())
    with pytest.raises(TypeError, match=r"^metrics: expected extremes in float64, got .*float16"):
        unsure.total()


def test_total_of_no_segments_under_a_default_device() -> None:
    nothing = torch.zeros(0)
    ends = torch.zeros(1, dtype=torch.int32)
    metrics = ipo_loss(nothing, nothing, nothing, nothing.bool(), cu_seqlens=ends).metrics
    expected = metrics.total()
    with torch.device("meta"):
        assert_whole(metrics.total(), expected)
    assert expected.extremes.tolist() == [torch.inf, -torch.inf]


# -------------------------------------------------------------------------------------------------
# Two ranks


def with_accelerate(rank: int, meeting: str) -> None:
    accelerator = host_casts.accelerator_of(rank, meeting)
    metrics = output_of(accelerator.prepare(host_casts.Policy()), rank).metrics
    assert_whole(metrics, output_of(host_casts.Policy(), rank).metrics)

    with pytest.raises(TypeError, match=r"^metrics: cannot be iterated over"):
        accelerator.gather_for_metrics(metrics)
    for collective in (accelerator.gather, accelerator.reduce, accelerator.pad_across_processes):
        with pytest.raises(TypeError, match="IPOMetrics"):
            collective(metrics)

    gathered = accelerator.gather_for_metrics([metrics])
    assert len(gathered) == 2
    assert_whole(gathered[rank], metrics)
    assert_whole(sum(gathered), metrics.all_reduce())


def with_ddp(rank: int, meeting: str) -> None:
    host_casts.join_group(rank, meeting)
    expected = output_of(host_casts.Policy(), rank)
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        model = DistributedDataParallel(host_casts.Policy(), **options)
        output = output_of(model, rank)
        assert_output_whole(output, expected)
        output.loss.backward()


def with_fsdp2_casting_outputs(rank: int, meeting: str) -> None:
    host_casts.join_group(rank, meeting)
    policy, model = MixedPrecisionPolicy(output_dtype=torch.bfloat16), host_casts.Policy()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    output = output_of(model, rank)
    assert output.loss.dtype == torch.bfloat16
    assert_whole(output.metrics, output_of(host_casts.Policy(), rank).metrics)


@pytest.mark.parametrize("on_rank", [with_accelerate, with_ddp, with_fsdp2_casting_outputs])
def test_on_two_ranks(on_rank: Callable[[int, str], None], tmp_path: Path) -> None:
    host_casts.run_on_two_ranks(on_rank, tmp_path)
