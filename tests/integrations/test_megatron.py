"""The real ``GPTModel`` of Megatron-Core with the processors in place of its output layer: loss and
gradients of every parameter beside those of its own logits.

It runs on the CPU but for two things, which are stood in for here: it names the CUDA device in
which buffers are made, and keeps a CUDA generator for dropout, of which there is none.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from ipo_ext import IPOConfig, LossBatch, reference
from ipo_ext.integrations.megatron import IPOLossProcessor, TokenLogprobsProcessor
from tests.docs.page_blocks import blocks_of_host
from tests.integrations.eager import record_step
from tests.integrations.ranks import in_a_group, on_ranks

BATCH, TOKENS, HIDDEN, VOCABULARY = 3, 8, 16, 64
NLL = IPOConfig(mask_rule="none", pg_form="reinforce", kl_tau=0.0)
CONFIG = IPOConfig(dppo_mask_low=0.7, dppo_mask_high=1.4)


@dataclasses.dataclass(frozen=True)
class Setup:
    """How the model is split and made."""

    sequence_parallel: bool = False
    tied: bool = False
    vocab_size: int | None = None  # of which the last columns are padding
    packed: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def on_cpu(setup: Setup, run: Callable[[GPTModel, Setup], Any]) -> Any:
    torch.cuda.current_device = lambda: "cpu"
    tensor_parallel.get_cuda_rng_tracker().fork = contextlib.nullcontext
    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    return run(gpt(setup, ranks), setup)


def gpt(setup: Setup, ranks: int) -> GPTModel:
    """One layer; without its norms, whose parallel form needs CUDA, and packed without attention,
    which does."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        tensor_model_parallel_size=ranks,
        sequence_parallel=setup.sequence_parallel,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        init_method_std=0.3,
        **setup.options,
    )
    whole = get_gpt_layer_local_spec().submodules
    parts = {name: getattr(whole, name) for name in ("mlp", "mlp_bda")}
    if not setup.packed:
        parts.update(self_attention=whole.self_attention, self_attn_bda=whole.self_attn_bda)
    layer = ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**parts))
    torch.manual_seed(0)
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[layer], layer_norm=IdentityOp),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        parallel_output=True,
        share_embeddings_and_output_weights=setup.tied,
    )


def batch_of(setup: Setup) -> SimpleNamespace:
    rows, tokens = (1, 2 * TOKENS) if setup.packed else (BATCH, TOKENS)
    generator = torch.Generator().manual_seed(7)
    below = setup.vocab_size or VOCABULARY
    ends = torch.tensor([0, 5, 2 * TOKENS], dtype=torch.int32)
    return SimpleNamespace(
        tokens=torch.randint(below, (rows, tokens), generator=generator),
        labels=torch.randint(below, (rows, tokens), generator=generator),
        positions=torch.arange(tokens).expand(rows, -1),
        attention=torch.triu(torch.ones(1, 1, tokens, tokens), 1).bool(),
        packed=PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends),
        advantages=torch.randn(rows, tokens, generator=generator),
        loss_mask=torch.rand(rows, tokens, generator=generator) < 0.7,
        noise=torch.randn(rows, tokens, generator=generator) * 0.3,
    )


def forward(model: GPTModel, setup: Setup, data: SimpleNamespace, **more: Any) -> Any:
    if setup.packed:
        more["packed_seq_params"] = data.packed
    return model(data.tokens, data.positions, data.attention, **more)


def logits_of(model: GPTModel, setup: Setup, data: SimpleNamespace) -> torch.Tensor:
    """Megatron's own, of the whole vocabulary, whose backward pass is Megatron's, too."""
    logits = forward(model, setup, data)
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    if scale := setup.options.get("mup_output_mult"):
        assert scale != 1
    return logits[..., : setup.vocab_size]


def grads_of(model: GPTModel) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def step(model: GPTModel, setup: Setup) -> dict[str, Any]:
    """One step by our processor, and the same by Megatron's logits and the reference."""
    data = batch_of(setup)
    with torch.no_grad():
        own, _ = reference.token_logprobs(
            logits_of(model, setup, data), data.labels, dtype=torch.float64
        )
    inputs = {
        "inference_logprobs": (own + data.noise).float(),
        "advantages": data.advantages,
        "loss_mask": data.loss_mask,
        "normalizer": 11.0,
    }
    processor = IPOLossProcessor(CONFIG, vocab_size=setup.vocab_size)
    out = forward(
        model,
        setup,
        data,
        labels=data.labels,
        output_processor=processor,
        output_processor_context=LossBatch(**inputs),
    )
    out.loss.backward()
    ours = grads_of(model)
    if setup.packed:
        inputs["cu_seqlens"] = data.packed.cu_seqlens_q
    exact = reference.ipo_loss_from_logits(
        logits_of(model, setup, data), data.labels, **inputs, config=CONFIG, dtype=torch.float64
    )
    exact.loss.backward()
    return {
        "loss": (out.loss.detach(), exact.loss.detach()),
        "logprobs": (out.logprobs.detach(), exact.logprobs.detach()),
        "metrics": (dict(out.metrics), dict(exact.metrics)),
        "grads": (ours, grads_of(model)),
    }


SETUPS = {
    "plain": Setup(),
    "sequence-parallel": Setup(sequence_parallel=True),
    "tied": Setup(tied=True),
    "tied-sequence-parallel": Setup(tied=True, sequence_parallel=True),
    "padded": Setup(vocab_size=51),
    "packed": Setup(packed=True),
    "packed-sequence-parallel": Setup(packed=True, sequence_parallel=True),
    "mup": Setup(options={"use_mup": True, "mup_output_mult": 0.25}),
}


def run_in_group(setup: Setup, run: Callable[[GPTModel, Setup], Any]) -> Any:
    return in_a_group(on_cpu, setup, run)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", SETUPS)
def test_a_step_is_that_of_megatrons_own_logits(name: str, ranks: int) -> None:
    setup = SETUPS[name]
    if ranks == 1 and setup.sequence_parallel:
        setup = dataclasses.replace(setup, sequence_parallel=False)
    steps = on_ranks(run_in_group, setup, step, ranks=ranks)
    for found in steps:
        ours, truth = found["grads"]
        pairs = [(ours[key].double(), truth[key].double()) for key in truth]
        record_step(*(loss.double() for loss in found["loss"]), pairs)
        for mine, exact in (found["loss"], found["logprobs"]):
            torch.testing.assert_close(mine.double(), exact.double(), rtol=2e-6, atol=2e-6)
        mine, exact = found["metrics"]
        for metric, value in exact.items():
            torch.testing.assert_close(
                mine[metric].double(), value.double(), rtol=1e-5, atol=1e-6, msg=metric
            )
        mine, exact = found["grads"]
        assert mine.keys() == exact.keys()
        assert all(value.any() for value in exact.values())
        for parameter, value in exact.items():
            torch.testing.assert_close(mine[parameter], value, rtol=1e-4, atol=1e-6, msg=parameter)
    for found in steps[1:]:
        assert torch.equal(found["loss"][0], steps[0]["loss"][0])
        assert torch.equal(found["logprobs"][0], steps[0]["logprobs"][0])


def logprobs_step(model: GPTModel, setup: Setup) -> dict[str, Any]:
    data = batch_of(setup)
    temperature = torch.rand(data.labels.shape) + 0.5
    torch.distributed.broadcast(temperature, 0)
    weights = torch.randn(2, *data.labels.shape, generator=torch.Generator().manual_seed(3))
    results = []
    for ours in (True, False):
        if ours:
            logprobs, entropy = forward(
                model,
                setup,
                data,
                labels=data.labels,
                loss_mask=data.loss_mask,
                output_processor=TokenLogprobsProcessor(),
                output_processor_context=temperature,
            )
        else:
            logprobs, entropy = reference.token_logprobs(
                logits_of(model, setup, data),
                data.labels.masked_fill(~data.loss_mask, -100),
                temperature=temperature,
                dtype=torch.float64,
            )
        (logprobs * weights[0] + entropy * weights[1]).sum().backward()
        results.append((logprobs.detach(), entropy.detach(), grads_of(model)))
    return {"ours": results[0], "exact": results[1]}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_logprobs_and_entropies(sequence_parallel: bool) -> None:
    setup = Setup(sequence_parallel=sequence_parallel)
    for found in on_ranks(run_in_group, setup, logprobs_step):
        *mine, mine_grads = found["ours"]
        *exact, exact_grads = found["exact"]
        for value, truth in zip(mine, exact, strict=True):
            torch.testing.assert_close(value.double(), truth.double(), rtol=2e-6, atol=2e-6)
        for parameter, value in exact_grads.items():
            torch.testing.assert_close(
                mine_grads[parameter], value, rtol=1e-4, atol=1e-5, msg=parameter
            )


def accumulated(model: GPTModel, setup: Setup) -> dict[str, dict[str, torch.Tensor]]:
    """What two micro-batches leave in Megatron's fp32 buffers, ours and those of its own loss."""
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model
    )
    data = batch_of(setup)
    ones = torch.ones(data.labels.shape)
    batch = LossBatch(ones.neg(), ones, ones.bool())
    left = {}
    for name in ("ours", "megatron"):
        wrapped.zero_grad_buffer()
        for _ in range(2):
            if name == "ours":
                context = {"output_processor_context": batch}
                processor = {"output_processor": IPOLossProcessor(NLL)}
                loss = forward(
                    wrapped, setup, data, labels=data.labels, **processor, **context
                ).loss
            else:
                loss = forward(wrapped, setup, data, labels=data.labels).sum()
            loss.backward()
        left[name] = {key: value.main_grad.clone() for key, value in model.named_parameters()}
    return left


@pytest.mark.parametrize("setup", [Setup(), Setup(tied=True, sequence_parallel=True)], ids=str)
def test_gradients_reach_megatrons_buffers(setup: Setup) -> None:
    """The loss as a cross-entropy is Megatron's own."""
    for left in on_ranks(run_in_group, setup, accumulated):
        for name, value in left["megatron"].items():
            torch.testing.assert_close(left["ours"][name], value, rtol=1e-4, atol=1e-5, msg=name)
            assert value.any(), name


def documented(model: GPTModel, setup: Setup) -> dict[str, Any]:
    (block,) = blocks_of_host("megatron")
    names: dict[str, Any] = {}
    block.run(names)
    data = batch_of(setup)
    batch = SimpleNamespace(
        tokens=data.tokens,
        positions=data.positions,
        attention_mask=data.attention,
        labels=data.labels,
        inference_logprobs=data.noise - 4,
        advantages=data.advantages,
        loss_mask=data.loss_mask,
    )
    metrics = names["step"](model, batch, data.loss_mask.sum())
    return {"metrics": metrics.tolist(), "grads": grads_of(model)}


def test_the_page_trains() -> None:
    first, second = on_ranks(run_in_group, Setup(), documented)
    assert first["metrics"] == second["metrics"]
    assert 0 < first["metrics"]["is_masked"] < 1
    assert all(grad.isfinite().all() and grad.any() for grad in first["grads"].values())


# -------------------------------------------------------------------------------------------------
# What is refused


def given(**changed: Any) -> dict[str, Any]:
    """What ``GPTModel`` hands over, of one rank."""
    config = SimpleNamespace(
        use_mup=False, defer_embedding_wgrad_compute=False, context_parallel_size=1
    )
    layer = SimpleNamespace(
        weight=torch.randn(VOCABULARY, HIDDEN), bias=None, tp_group=None, sequence_parallel=False
    )
    ones = torch.ones(BATCH, TOKENS)
    return {
        "hidden_states": torch.randn(TOKENS, BATCH, HIDDEN),
        "output_layer": layer,
        "output_weight": None,
        "labels": torch.zeros(BATCH, TOKENS, dtype=torch.long),
        "loss_mask": None,
        "packed_seq_params": None,
        "inference_context": None,
        "runtime_gather_output": None,
        "config": config,
        "context": LossBatch(-ones, ones, ones.bool()),
        **changed,
    }


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"labels": None}, ValueError, r"labels: expected \[B, S\], got None; call the model"),
        ({"context": None}, TypeError, "output_processor_context: expected a LossBatch, got None"),
        (
            {"inference_context": object()},
            ValueError,
            "without output_processor where it generates",
        ),
        (
            {"runtime_gather_output": True},
            ValueError,
            "without output_processor where it generates",
        ),
        ({"loss_mask": torch.ones(BATCH, TOKENS)}, ValueError, "loss_mask: expected None or the"),
        (
            {"labels": torch.zeros(TOKENS, BATCH, dtype=torch.long)},
            ValueError,
            r"inference_logprobs: expected shape \[8, 3\] like labels, got \[3, 8\]",
        ),
    ],
)
def test_refusals(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        IPOLossProcessor()(**given(**changed))


def test_an_option_that_the_loss_would_ignore_is_refused() -> None:
    arguments = given()
    arguments["config"].defer_embedding_wgrad_compute = True
    with pytest.raises(ValueError, match="defer_embedding_wgrad_compute: expected False, got True"):
        IPOLossProcessor()(**arguments)


def test_more_tokens_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size: expected at most the output layer's 64"):
        IPOLossProcessor(vocab_size=65)(**given())


def test_rows_are_sequences_unless_ranks_share_them() -> None:
    processor = IPOLossProcessor(IPOConfig.geometric(0.9, 1.1))
    ones = torch.ones(BATCH, TOKENS)
    arguments = given(context=LossBatch(-ones, ones, ones.bool()))
    with torch.no_grad():
        sampled, _ = TokenLogprobsProcessor()(**{**arguments, "context": None})
    sampled[1] -= 1  # of one row the geometric mean is off
    arguments["context"] = LossBatch(sampled, ones, ones.bool())
    assert processor(**arguments).metrics["is_masked"].item() == pytest.approx(1 / BATCH)
    arguments["config"].context_parallel_size = 2
    with pytest.raises(ValueError, match="under context parallelism a rank has parts of sequences"):
        processor(**arguments)
    ids = torch.zeros(1, dtype=torch.int32)
    ends = torch.tensor([0, BATCH * TOKENS], dtype=torch.int32)
    arguments["context"] = LossBatch(
        sampled, ones, ones.bool(), cu_seqlens=ends, sequence_ids=ids, num_sequences=1
    )
    with pytest.raises(ValueError, match="cp_group"):  # the loss's own words
        processor(**arguments)


def test_packed_rows_that_ranks_share_have_no_ends_here() -> None:
    arguments = given(
        packed_seq_params=PackedSeqParams(cu_seqlens_q=torch.tensor([0, 48], dtype=torch.int32))
    )
    arguments["config"].context_parallel_size = 2
    assert IPOLossProcessor()(**arguments).metrics["is_masked"].dim() == 0


def test_the_model_hands_over_what_is_tested() -> None:
    """The names that the refusals' tests make up are those of the real call."""

    def names_of(model: GPTModel, setup: Setup) -> set[str]:
        data = batch_of(setup)
        seen: set[str] = set()

        def look(**handed: Any) -> torch.Tensor:
            seen.update(handed)
            return handed["hidden_states"]

        forward(model, setup, data, labels=data.labels, output_processor=look)
        return seen

    (names,) = on_ranks(run_in_group, Setup(), names_of, ranks=1)
    assert set(given()) <= names
