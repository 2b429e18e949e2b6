"""A tiny model trained through the real verl's actor loss: loss and gradient against eager code.

verl's engines run on CUDA and NPU only, so the loop around ``verl.workers.utils.losses.ppo_loss``
is this file's: batch, configuration, registry, aggregation and metrics are verl's.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import shlex
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict
from ray import cloudpickle
from verl.protocol import DataProto
from verl.trainer.config import AlgoConfig, RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn
from verl.trainer.ppo.rollout_corr_helper import apply_bypass_mode, compute_rollout_rejection_mask
from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import (
    ActorConfig,
    FSDPActorConfig,
    McoreActorConfig,
    PolicyLossConfig,
    RolloutConfig,
)
from verl.workers.utils.losses import ppo_loss

from ipo_ext import IPOConfig, aggregate
from ipo_ext.integrations import _verl_correction
from ipo_ext.integrations import verl as adapter
from tests.docs.page_blocks import blocks_of_host
from tests.integrations.eager import assert_same_step, token_losses
from tests.integrations.options import assert_all_are_known

BAND = IPOConfig(dppo_mask_low=0.5, dppo_mask_high=2.0, kl_tau=0.1)
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
LOCAL = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
GLOBAL = {"dp_size": 4, "batch_num_tokens": 90, "global_batch_size": 12}
VOCAB, PROMPT, RESPONSE = 14, 3, 6
RESPONSE_LENGTHS = (6, 1, 4)
TRAINED = (5, 1, 0)  # tokens of each response that train; of the last none


@pytest.fixture(autouse=True)
def _registered() -> None:
    adapter.register(BAND)
    adapter._warn_that_nothing_was_handed_over.cache_clear()


def actor_config(**options: Any) -> FSDPActorConfig:
    settings = {
        "rollout_n": 1,
        "ppo_micro_batch_size_per_gpu": 3,
        "policy_loss": PolicyLossConfig(loss_mode="ipo"),
        **options,
    }
    return FSDPActorConfig(**settings)


def policy() -> transformers.PreTrainedModel:
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def batch(world: dict[str, Any], importance_weights: bool = False) -> Any:
    """What verl's trainer hands to the actor, one row of padding after each response."""
    rows = len(RESPONSE_LENGTHS)
    lengths = torch.tensor(RESPONSE_LENGTHS)[:, None]
    present = torch.arange(RESPONSE) < lengths
    tensors = {
        "prompts": torch.randint(VOCAB, (rows, PROMPT)),
        "responses": torch.randint(VOCAB, (rows, RESPONSE)),
        "attention_mask": torch.cat([torch.ones(rows, PROMPT), present], dim=1).long(),
        "response_mask": torch.arange(RESPONSE) < torch.tensor(TRAINED)[:, None],
        "old_log_probs": torch.where(present, -1.5 - 2 * torch.rand(rows, RESPONSE), 0),
        "advantages": torch.randn(rows, RESPONSE),
    }
    if importance_weights:
        tensors["rollout_is_weights"] = torch.rand(rows, RESPONSE)
    return tensordict_utils.get_tensordict(tensors, world)


def packed_logprobs(model: transformers.PreTrainedModel, data: Any) -> torch.Tensor:
    """Of each next token, without padding, as verl's engines return them."""
    tokens = torch.cat([data["prompts"], data["responses"]], dim=1)
    logits = model(tokens, attention_mask=data["attention_mask"]).logits
    labels = tokens.roll(-1, dims=1)[..., None]
    logprobs = logits.log_softmax(-1).gather(-1, labels).squeeze(-1)
    return logprobs[data["attention_mask"].bool()]


def response_logprobs(model: transformers.PreTrainedModel, data: Any) -> torch.Tensor:
    tokens = torch.cat([data["prompts"], data["responses"]], dim=1)
    logits = model(tokens, attention_mask=data["attention_mask"]).logits[:, PROMPT - 1 : -1]
    labels = data["responses"][..., None]
    return logits.log_softmax(-1).gather(-1, labels).squeeze(-1)


def aggregated(losses: torch.Tensor, mode: str, world: dict, scale_factor: int | None):
    """The five modes as verl documents them, over the rows that train."""
    lengths, ranks = torch.tensor(TRAINED), world["dp_size"]
    sequences = world["global_batch_size"] or (lengths > 0).sum()
    if mode == "token-mean":
        return losses.sum() / (world["batch_num_tokens"] or lengths.sum()) * ranks
    if mode == "token-sum":
        return losses.sum() * ranks
    if mode == "seq-mean-token-sum":
        return losses.sum() / sequences * ranks
    if mode == "seq-mean-token-sum-norm":
        return losses.sum() / sequences / (scale_factor or RESPONSE) * ranks
    return (losses.sum(1) / lengths.clamp(min=1)).sum() / sequences * ranks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [LOCAL, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("importance_weights", [False, True], ids=["", "weights"])
def test_training_equals_eager(mode: str, world: dict, importance_weights: bool) -> None:
    scale_factor = 5 if world is GLOBAL else None
    config = actor_config(loss_agg_mode=mode, loss_scale_factor=scale_factor)
    model = policy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shares = []
    for _ in range(3):
        data = batch(world, importance_weights)
        twin = copy.deepcopy(model).double()
        losses = token_losses(
            response_logprobs(twin, data),
            data["old_log_probs"].double(),
            data["advantages"],
            data["response_mask"],
            BAND,
        )
        shares.append((losses == 0)[data["response_mask"]].double().mean().item())
        expected = aggregated(
            losses * data.get("rollout_is_weights", torch.ones(())), mode, world, scale_factor
        )
        theirs = torch.autograd.grad(expected, list(twin.parameters()))

        optimizer.zero_grad()
        loss, metrics = ppo_loss(config, {"log_probs": packed_logprobs(model, data)}, data)
        loss.backward()
        ours = [parameter.grad for parameter in model.parameters()]
        assert_same_step(loss, expected, ours, theirs)
        assert metrics["actor/pg_loss"].aggregate() == pytest.approx(expected.item(), rel=1e-5)
        assert metrics["actor/ipo/is_masked"].aggregate() == pytest.approx(shares[-1])
        assert metrics["actor/pg_clipfrac"].aggregate() == pytest.approx(shares[-1])
        optimizer.step()
    assert 0 < sum(shares) < 3, "some tokens are to be dropped, and some kept"


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_those_of_verls_aggregation(mode: str) -> None:
    mask = batch(LOCAL)["response_mask"]
    world = {**GLOBAL, "loss_scale_factor": 5}
    losses = torch.randn(mask.shape)
    weighted = (adapter._token_weights(mask, mode, world) * losses).sum()
    expected = agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode=mode, **world)
    torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize(
    ("mode", "theirs", "length"),
    [
        ("token_mean", "token-mean", None),
        ("sequence_mean_token_mean", "seq-mean-token-mean", None),
        ("sequence_mean_token_sum", "seq-mean-token-sum", None),
        ("constant", "seq-mean-token-sum-norm", 5),
    ],
)
def test_aggregate_means_what_verl_means(mode: str, theirs: str, length: int | None) -> None:
    mask = batch(LOCAL)["response_mask"]
    losses = torch.randn(mask.shape)
    weights, normalizer = aggregate(mode, mask, length=length)
    ours = (losses * mask * (1 if weights is None else weights)).sum() / normalizer
    expected = agg_loss(losses, mask, theirs, loss_scale_factor=length)
    torch.testing.assert_close(ours.float(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_micro_batch_without_loss_tokens_runs_backward(mode: str) -> None:
    data = batch(GLOBAL)
    data["response_mask"] = torch.zeros_like(data["response_mask"])
    model = policy()
    loss, _ = ppo_loss(
        actor_config(loss_agg_mode=mode), {"log_probs": packed_logprobs(model, data)}, data
    )
    loss.backward()
    assert loss.item() == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_metrics_do_not_depend_on_the_aggregation() -> None:
    data = batch(GLOBAL)
    logprobs = packed_logprobs(policy(), data)
    reported = []
    for mode in MODES[:4]:  # which weigh every token alike
        _, metrics = ppo_loss(actor_config(loss_agg_mode=mode), {"log_probs": logprobs}, data)
        reported.append({name: metrics[name].aggregate() for name in metrics if "/ipo/" in name})
    for other in reported[1:]:
        assert other == pytest.approx(reported[0], rel=1e-5)


def test_entropy_bonus_and_kl_term_stay_verls() -> None:
    data = batch(LOCAL)
    data["ref_log_prob"] = data["old_log_probs"] - 0.1
    model = policy()
    output = {
        "log_probs": packed_logprobs(model, data),
        "entropy": torch.rand_like(packed_logprobs(model, data)),
    }
    plain, _ = ppo_loss(actor_config(), {"log_probs": output["log_probs"]}, data)
    config = actor_config(entropy_coeff=0.5, use_kl_loss=True, kl_loss_coef=0.3)
    loss, metrics = ppo_loss(config, output, data)
    bonus = 0.5 * metrics["actor/entropy_loss"].aggregate()
    kl = 0.3 * metrics["kl_loss"].aggregate()
    assert loss.item() == pytest.approx(plain.item() - bonus + kl, rel=1e-5)


def refused(match: str, **options: Any) -> None:
    data = batch(LOCAL)
    with pytest.raises(ValueError, match=match):
        ppo_loss(actor_config(**options), {"log_probs": packed_logprobs(policy(), data)}, data)


@pytest.mark.parametrize(
    "name", ["clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos"]
)
def test_an_option_that_is_not_honoured_raises(name: str) -> None:
    refused(rf"{name}: expected the default .*, got 9\.0", **{name: 9.0})


@pytest.mark.parametrize("name", ["clip_cov_ratio", "kl_cov_ratio", "ppo_kl_coef", "dro_beta"])
def test_an_option_of_another_policy_loss_raises(name: str) -> None:
    options = PolicyLossConfig(loss_mode="ipo", **{name: 9.0})
    refused(rf"{name}: expected the default .*, got 9\.0", policy_loss=options)


MATRIX = [
    {"rollout_is": None},
    {"rollout_is": "token", "rollout_is_threshold": 1.3},
    {"rollout_is": "token", "rollout_is_threshold": "0.6_1.4"},
    {"rollout_is": "sequence", "rollout_is_threshold": 1.5},
    {"rollout_is": "sequence", "rollout_is_threshold": "0.2_1.9"},
]
REJECTIONS = [
    {},
    {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.7_1.9"},  # not symmetric: mind the sign
    {"rollout_rs": "token_k1", "rollout_rs_threshold": 1.3},
    {"rollout_rs": "token_k2", "rollout_rs_threshold": 0.05},
    {"rollout_rs": "token_k3", "rollout_rs_threshold": "0.05"},
    {"rollout_rs": "seq_sum_k1", "rollout_rs_threshold": "0.5_4"},
    {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.9_1.3"},
    *(
        {"rollout_rs": f"seq_{kind}", "rollout_rs_threshold": bound}
        for kind, bound in (("sum_k2", 0.3), ("sum_k3", 0.3), ("mean_k2", 0.05),
                            ("mean_k3", 0.05), ("max_k2", 0.2), ("max_k3", 0.2))
    ),
    {"rollout_rs": "token_k1,seq_mean_k3", "rollout_rs_threshold": "0.7_1.9, 0.1"},
]  # fmt: skip


def stale_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Log-probabilities whose ratios reach beyond the bounds above, on either side, in float64."""
    generator = torch.Generator().manual_seed(seed)
    log_prob = -3 * torch.rand(7, 6, generator=generator, dtype=torch.float64)
    away = 0.3 * torch.randn(7, 6, generator=generator, dtype=torch.float64)
    away += 0.2 * torch.randn(7, 1, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([6, 5, 4, 1, 6, 3, 2])[:, None]
    return {
        "old_log_prob": log_prob - away,
        "log_prob": log_prob.requires_grad_(),
        "advantages": torch.randn(7, 6, generator=generator, dtype=torch.float64),
        "response_mask": (torch.arange(6) < lengths).double(),
    }


def config_with(mode: str, **correction: Any) -> FSDPActorConfig:
    handed = RolloutCorrectionConfig(bypass_mode=True, **correction)
    options = PolicyLossConfig(loss_mode="ipo", rollout_correction=handed)
    config = actor_config(policy_loss=options, loss_agg_mode=mode)
    config.global_batch_info.update(GLOBAL)
    return config


def assert_equal_losses(ours: torch.Tensor, verls: torch.Tensor, log_prob: torch.Tensor) -> None:
    torch.testing.assert_close(ours, verls, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(loss, log_prob)[0] for loss in (ours, verls)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    assert gradients[0].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rejection", REJECTIONS)
@pytest.mark.parametrize("weighted", MATRIX)
def test_verls_reinforce_in_bypass_mode_is_verls(
    mode: str, rejection: dict[str, Any], weighted: dict[str, Any]
) -> None:
    tensors = stale_tensors()
    adapter.register()
    config = config_with(mode, loss_type="reinforce", **rejection, **weighted)
    ours, _ = get_policy_loss_fn("ipo")(**tensors, loss_agg_mode=mode, config=config)
    verls, _ = get_policy_loss_fn("bypass_mode")(**tensors, loss_agg_mode=mode, config=config)
    assert_equal_losses(ours, verls, tensors["log_prob"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rejection", REJECTIONS[1:])
def test_rejection_in_bypass_mode_goes_before_the_average(
    mode: str, rejection: dict[str, Any]
) -> None:
    tensors = stale_tensors()
    config = config_with(mode, **rejection)
    adapter.register(IPOConfig(mask_rule="none", kl_tau=0.0))
    ours, _ = get_policy_loss_fn("ipo")(**tensors, loss_agg_mode=mode, config=config)
    log_ratio = tensors["log_prob"] - tensors["old_log_prob"]
    kept, _ = compute_rollout_rejection_mask(
        log_ratio.detach(), tensors["response_mask"], **rejection
    )
    assert 0 < kept.sum() < tensors["response_mask"].sum()
    losses = -tensors["advantages"] * log_ratio.exp()
    verls = agg_loss(losses, kept, mode, **config.global_batch_info)
    assert_equal_losses(ours, verls, tensors["log_prob"])


@pytest.mark.parametrize(
    ("correction", "message"),
    [
        ({"loss_type": "reinforce", "rollout_is_batch_normalize": True},
         "rollout_correction.rollout_is_batch_normalize: expected False, got True"),
        ({"loss_type": "vanilla"}, "rollout_correction.loss_type: expected ppo_clip or reinforce"),
        ({"rollout_rs": "seq_max_k1", "rollout_rs_threshold": 2.0},
         "rollout_correction.rollout_rs: expected options such as token_k1 or seq_mean_k3, got"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": None},
         "rollout_correction.rollout_rs_threshold: expected one threshold or one for each of 1 "),
        ({"rollout_rs": "token_k1,token_k2", "rollout_rs_threshold": "1,2,3"},
         "rollout_correction.rollout_rs_threshold: expected one threshold or one for each of 2"),
    ],
)  # fmt: skip
def test_a_correction_that_is_not_covered_raises(correction: dict[str, Any], message: str) -> None:
    adapter.register()
    with pytest.raises(ValueError, match=re.escape(message)):
        get_policy_loss_fn("ipo")(**stale_tensors(), config=config_with("token-mean", **correction))


def test_verls_reinforce_takes_no_settings_of_ours() -> None:
    with pytest.raises(ValueError, match="loss_type: expected 'ppo_clip' with an ipo_config"):
        get_policy_loss_fn("ipo")(
            **stale_tensors(), config=config_with("token-mean", loss_type="reinforce")
        )


def verls_tensors() -> dict[str, torch.Tensor]:
    data = batch(LOCAL)
    return {
        "old_log_prob": data["old_log_probs"],
        "log_prob": response_logprobs(policy(), data),
        "advantages": data["advantages"],
        "response_mask": data["response_mask"],
    }


def called_with(tensors: dict[str, torch.Tensor]) -> float:
    """What the registered function returns, called as verl calls it."""
    config = actor_config()
    config.global_batch_info.update(LOCAL)
    return get_policy_loss_fn("ipo")(**tensors, config=config)[0].item()


@pytest.mark.parametrize(
    "name", ["old_log_prob", "advantages", "response_mask", "rollout_is_weights"]
)
def test_a_tensor_of_another_shape_is_refused_by_verls_name(name: str) -> None:
    shape = (len(RESPONSE_LENGTHS), RESPONSE - 1)
    with pytest.raises(ValueError, match=rf"{name}: expected shape .* like log_prob, got \[3, 5\]"):
        called_with(verls_tensors() | {name: torch.ones(shape)})


def test_a_mask_of_numbers_and_garbage_outside_of_it_change_nothing() -> None:
    tensors = verls_tensors()
    mask = tensors["response_mask"]
    expected = called_with(tensors)
    for kind in (torch.float32, torch.int64):
        assert called_with(tensors | {"response_mask": mask.to(kind)}) == expected
    weights = {"rollout_is_weights": torch.ones(mask.shape)}
    for name in ("old_log_prob", "log_prob", "advantages", "rollout_is_weights"):
        for garbage in (torch.nan, 0.0, -torch.inf, 1e30):
            other = torch.where(mask, (tensors | weights)[name], garbage)
            assert called_with(tensors | {name: other}) == expected, (name, garbage)


@pytest.mark.parametrize("value", [0.5, -1.0, torch.nan])
def test_a_mask_that_is_neither_0_nor_1_is_refused(value: float) -> None:
    tensors = verls_tensors()
    mask = torch.where(tensors["response_mask"], 1, value)
    with pytest.raises(ValueError, match="response_mask: expected 0 or 1 for each token, got"):
        called_with(tensors | {"response_mask": mask})


@pytest.mark.parametrize(
    "name", ["log_prob", "old_log_prob", "advantages", "response_mask", "rollout_is_weights"]
)
def test_what_is_no_floating_tensor_is_refused_by_verls_name(name: str) -> None:
    tensors = verls_tensors()
    with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got list"):
        called_with(tensors | {name: [0.0]})
    if name != "response_mask":
        whole = torch.zeros(tensors["log_prob"].shape, dtype=torch.int64)
        with pytest.raises(
            TypeError, match=rf"^{name}: expected a floating dtype, got torch\.int64"
        ):
            called_with(tensors | {name: whole})
    if name != "log_prob":
        differentiable = torch.zeros(tensors["log_prob"].shape, requires_grad=True)
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor that does not require"):
            called_with(tensors | {name: differentiable})


@pytest.mark.parametrize("mode", MODES)
def test_a_micro_batch_without_rows_runs_backward(mode: str) -> None:
    config = actor_config(loss_agg_mode=mode)
    config.global_batch_info.update(GLOBAL)
    log_prob = torch.empty(0, RESPONSE, requires_grad=True)
    nothing = torch.empty(0, RESPONSE)
    loss, _ = get_policy_loss_fn("ipo")(nothing, log_prob, nothing, nothing, mode, config)
    loss.backward()
    assert loss.item() == 0


CONFIGS = ("ppo_trainer", "ppo_megatron_trainer")
LEFT_TO_THE_LOSS = (
    (
        ("algorithm.rollout_correction.rollout_rs=token_k1",
         "algorithm.rollout_correction.rollout_rs_threshold=2.0"),
        "rollout_rs: expected the same in actor.policy_loss.rollout_correction",
    ),
    (
        ("algorithm.rollout_correction.loss_type=reinforce",),
        "loss_type: expected the same in actor.policy_loss.rollout_correction",
    ),
)  # fmt: skip


def guides_command() -> list[str]:
    """The overrides that the guide's command gives verl, as the shell hands them over."""
    page = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
    (command,) = re.findall(r"```\n(actor_rollout_ref.*?)```", page.read_text(), re.DOTALL)
    return shlex.split(command)


def verls_config(*overrides: str, name: str = "ppo_trainer") -> DictConfig:
    """verl's whole config, as its entry point gets it."""
    batch_sizes = (
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=3",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=3",
    )
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(name, overrides=[*batch_sizes, *overrides])


def workers_config(config: DictConfig) -> ActorConfig:
    """What both trainers make of it for their workers, and those for the loss."""
    OmegaConf.resolve(config)  # the task's runner
    section = cloudpickle.loads(cloudpickle.dumps(config.actor_rollout_ref))  # Ray
    return omega_conf_to_dataclass(section.actor)  # ActorRolloutRefWorker.init_model


def loss_in_a_worker(config: ActorConfig) -> torch.Tensor:
    data = batch(LOCAL)
    return ppo_loss(config, {"log_probs": packed_logprobs(policy(), data)}, data)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_guides_command_trains(name: str) -> None:
    config = verls_config(*guides_command(), name=name)
    assert config.algorithm.rollout_correction.bypass_mode
    torch.manual_seed(1)
    expected = loss_in_a_worker(actor_config())
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="policy_loss")
        assert loss_in_a_worker(workers_config(config)) == expected
    adapter.check_config(config)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("overrides", [overrides for overrides, _ in LEFT_TO_THE_LOSS])
def test_a_worker_applies_what_bypass_mode_leaves_to_the_loss(
    name: str, overrides: tuple[str, ...]
) -> None:
    config = verls_config(*guides_command(), *overrides, name=name)
    adapter.check_config(config)
    adapter.register()
    torch.manual_seed(1)
    plain = loss_in_a_worker(actor_config())
    torch.manual_seed(1)
    assert loss_in_a_worker(workers_config(config)) != plain


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *LEFT_TO_THE_LOSS,
        (("actor_rollout_ref.actor.clip_ratio=9",), "clip_ratio: expected the default"),
    ],
)
def test_the_whole_config_is_refused_before_anything_starts(
    name: str, overrides: tuple[str, ...], message: str
) -> None:
    bypass = "algorithm.rollout_correction.bypass_mode=True"
    with pytest.raises(ValueError, match=message):
        adapter.check_config(verls_config(bypass, *overrides, name=name))


@pytest.mark.parametrize(
    ("corrected", "name", "value"),
    [
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": 2.0}, "rollout_rs_threshold", 3.0),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": 2.0}, "rollout_rs_threshold", None),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": 2.0}, "bypass_mode", False),
        ({"loss_type": "reinforce"}, "rollout_is", "token"),
        ({"loss_type": "reinforce"}, "rollout_is_batch_normalize", True),
        ({"loss_type": "reinforce"}, "rollout_is_threshold", 3.0),
        ({}, "rollout_rs", "token_k1"),
        ({}, "loss_type", "reinforce"),
    ],
)
def test_what_is_handed_over_must_be_what_the_algorithm_says(
    corrected: dict[str, Any], name: str, value: object
) -> None:
    config = verls_config(*guides_command())
    with open_dict(config):
        correction = config.algorithm.rollout_correction
        correction.update(corrected)
        adapter.check_config(config)
        handed_over = OmegaConf.create({**correction, name: value})
        config.actor_rollout_ref.actor.policy_loss.rollout_correction = handed_over
    with pytest.raises(ValueError, match=r"expected the same in actor\.policy_loss"):
        adapter.check_config(config)


def test_what_no_loss_reads_may_differ_there() -> None:
    config = verls_config(*guides_command())
    with open_dict(config):
        handed_over = OmegaConf.create({**config.algorithm.rollout_correction, "rollout_is": None})
        config.actor_rollout_ref.actor.policy_loss.rollout_correction = handed_over
    adapter.check_config(config)


def test_a_worker_that_was_handed_nothing_sees_no_correction_and_says_so_once() -> None:
    """If a later verl hands it over, this fails, and the guide's command can be shorter."""
    correction = "algorithm.rollout_correction"
    told, untold = (
        workers_config(verls_config("actor_rollout_ref.actor.policy_loss.loss_mode=ipo", *more))
        for more in ([f"{correction}.bypass_mode=True", f"{correction}.rollout_rs=token_k1"], [])
    )
    assert told == untold
    with pytest.warns(UserWarning, match=r"\+actor_rollout_ref.*='\$\{algorithm"):
        loss_in_a_worker(told)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="policy_loss")
        loss_in_a_worker(told)


def test_bypass_and_decoupled_mode_are_honoured() -> None:
    data = batch(LOCAL)
    logprobs = packed_logprobs(policy(), data)
    losses = []
    for bypass in (True, False):
        correction = RolloutCorrectionConfig(bypass_mode=bypass)
        options = PolicyLossConfig(loss_mode="ipo", rollout_correction=correction)
        loss, _ = ppo_loss(actor_config(policy_loss=options), {"log_probs": logprobs}, data)
        losses.append(loss)
    assert losses[0] == losses[1]


def test_the_rename_of_verls_older_trainer_reaches_no_worker() -> None:
    """Its driver renames the loss after the workers have their own copies of the config."""
    data = batch(LOCAL)
    output = {"log_probs": packed_logprobs(policy(), data)}
    drivers = OmegaConf.create({"loss_mode": "ipo"})
    workers = copy.deepcopy(drivers)  # as Ray sends it
    proto = DataProto.from_dict({"rollout_log_probs": data["old_log_probs"]})
    apply_bypass_mode(proto, RolloutCorrectionConfig(bypass_mode=True), drivers)
    assert drivers.loss_mode == "bypass_mode"

    expected, _ = ppo_loss(actor_config(), output, data)
    data["old_log_probs"] = proto.batch["old_log_probs"]
    options = PolicyLossConfig(**workers)
    loss, _ = ppo_loss(actor_config(policy_loss=options), output, data)
    assert loss == expected


def test_verls_newer_trainer_takes_the_engines_logprobs_and_renames_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trainer of the guide's command; its queue, which lies between processes, is a dict."""
    queue = {"rollout_log_probs": torch.randn(2, 3)}
    expected = {"old_log_probs": queue["rollout_log_probs"]}
    monkeypatch.setattr(trainer_base.tq, "kv_batch_get", lambda **_: queue)
    monkeypatch.setattr(trainer_base.tq, "kv_batch_put", lambda fields, **_: queue.update(fields))
    config = verls_config(*guides_command())
    trainer = SimpleNamespace(config=config)
    before = copy.deepcopy(config)
    kind = get_trainer_cls(config.trainer.v1.trainer_mode)
    kind._compute_old_log_prob(trainer, SimpleNamespace(keys=[], partition_id=""), metrics={})
    assert config.trainer.use_v1
    assert queue == expected
    assert config == before


def test_every_option_of_the_config_is_accounted_for() -> None:
    """A new option of a later verl's policy losses is honoured or refused here."""
    fields = {field.name for field in dataclasses.fields(PolicyLossConfig)}
    assert fields - set(adapter._NOT_HONOURED) == {"_target_", "loss_mode", "rollout_correction"}
    fields = {field.name for field in dataclasses.fields(RolloutCorrectionConfig)}
    compared = set(
        _verl_correction._left_to_the_loss({"bypass_mode": True, "loss_type": "reinforce"})
    )
    assert fields - compared == {"_target_", "rollout_rs", "rollout_rs_threshold"}


VERLS_OWN = {  # what verl applies before, after or beside the policy loss
    *("policy_loss", "loss_agg_mode", "loss_scale_factor", "entropy_coeff", "calculate_entropy"),
    *("use_kl_loss", "kl_loss_coef", "kl_loss_type", "grad_clip", "entropy_checkpointing"),
    *("entropy_from_logits_with_chunking", "entropy_from_logits_chunk_size"),
    "use_rollout_log_probs",  # verl reads it nowhere
    *("gamma", "adv_estimator", "norm_adv_by_std_in_grpo", "use_kl_in_reward", "kl_penalty"),
    *("kl_ctrl", "filter_groups", "rollout_correction", "gdpo_reward_weights"),
}
OF_ROLLOUTS = {
    *("temperature", "logprobs_mode", "top_p", "top_k", "do_sample"),  # checked by check_config
    "calculate_log_probs",  # without it verl raises in bypass mode
    "repetition_penalty",  # verl's agent loops set it to 1
    *("over_sample_rate", "cudagraph_capture_sizes", "scheduling_policy"),
    *("log_prob_micro_batch_size", "log_prob_micro_batch_size_per_gpu"),
    *("log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu"),
}


@pytest.mark.parametrize("kind", [FSDPActorConfig, McoreActorConfig, AlgoConfig, RolloutConfig])
def test_every_option_that_may_touch_the_loss_is_known(kind: type) -> None:
    options = [field.name for field in dataclasses.fields(kind)]
    known = OF_ROLLOUTS if kind is RolloutConfig else VERLS_OWN | adapter._NOT_HONOURED.keys()
    assert_all_are_known(options, known)


ROLLOUT = "actor_rollout_ref.rollout"


@pytest.mark.parametrize(
    ("overrides", "got"),
    [
        (("temperature=0.8", "logprobs_mode=raw_logprobs"), r"is 0\.8, got 'raw_logprobs'"),
        (("temperature=0.8", "logprobs_mode=null"), r"is 0\.8, got None"),
        (("logprobs_mode=processed_logits",), r"is 1\.0, got 'processed_logits'"),
    ],
)
def test_the_engines_log_probabilities_are_those_that_it_sampled_by(
    overrides: tuple[str, ...], got: str
) -> None:
    given = [f"{ROLLOUT}.{override}" for override in overrides]
    with pytest.raises(ValueError, match=f"logprobs_mode: expected processed_logprobs, .* {got}"):
        adapter.check_config(verls_config(*guides_command(), *given))
    adapter.check_config(verls_config(*given))  # decoupled, the ratio is to verl's own


def test_log_probabilities_from_before_temperature_1_are_those_from_after() -> None:
    given = f"{ROLLOUT}.logprobs_mode=raw_logprobs"
    adapter.check_config(verls_config(*guides_command(), given))


@pytest.mark.parametrize("option", ["top_p=0.9", "top_k=20", "do_sample=False"])
def test_what_bends_the_ratio_to_the_engine_is_warned_of(option: str) -> None:
    config = verls_config(*guides_command(), f"{ROLLOUT}.{option}")
    with pytest.warns(UserWarning, match=f"^{option}: completions are drawn from another") as seen:
        adapter.check_config(config)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*drawn from another")
        adapter.check_config(verls_config(f"{ROLLOUT}.{option}"))
        adapter.check_config(verls_config(*guides_command()))


def test_another_name_and_another_config() -> None:
    adapter.register(IPOConfig(dppo_mask_low=0.9, dppo_mask_high=1.1), name="ipo_narrow")
    assert get_policy_loss_fn("ipo_narrow") is not get_policy_loss_fn("ipo")
    data = batch(LOCAL)
    output = {"log_probs": packed_logprobs(policy(), data)}
    shares = [
        ppo_loss(actor_config(policy_loss=PolicyLossConfig(loss_mode=name)), output, data)[1]
        for name in ("ipo", "ipo_narrow")
    ]
    wide, narrow = (metrics["actor/ipo/is_masked"].aggregate() for metrics in shares)
    assert wide < narrow


def test_a_teacher_raises() -> None:
    with pytest.raises(ValueError, match=r"teacher_tau: expected 0, got 0\.5"):
        adapter.register(IPOConfig(teacher_tau=0.5))


def test_the_guide_registers_its_loss() -> None:
    """Its block as it stands: what verl then calls is the loss with the block's settings."""
    (block,) = blocks_of_host("verl")
    data = batch(LOCAL)
    output = {"log_probs": packed_logprobs(policy(), data)}

    def loss_of(config: IPOConfig) -> float:
        adapter.register(config)
        return ppo_loss(actor_config(), output, data)[0].item()

    theirs, other = loss_of(IPOConfig(kl_tau=1e-3)), loss_of(BAND)
    block.run({})
    assert ppo_loss(actor_config(), output, data)[0].item() == theirs != other
