"""A tiny model trained by the real SkyRL's worker: loss and gradient against eager code.

SkyRL's models need flash-attn, and its worker moves each micro-batch to the current CUDA device:
the model is this file's, and that device is the CPU. Configuration, registry, loss reduction, the
step of a micro-batch and the metrics are SkyRL's.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from skyrl.backends.skyrl_train.distributed.strategy import DistributedStrategy
from skyrl.backends.skyrl_train.utils.ppo_utils import (
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
    repopulate_all_registries,
)
from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase
from skyrl.backends.skyrl_train.workers.worker_utils import all_reduce_metrics, reduce_metrics
from skyrl.train.config import (
    AlgorithmConfig,
    OffPolicyCorrectionConfig,
    SAPOConfig,
    SkyRLTrainConfig,
)
from skyrl.train.config.config import SamplingParams, TrainerConfig
from skyrl.train.dataset.replay_buffer import Experience
from torch import nn

from ipo_ext import IPOConfig
from ipo_ext.integrations import _skyrl_options
from ipo_ext.integrations import skyrl as adapter
from tests.docs.page_blocks import blocks_of_host
from tests.integrations.eager import assert_same_step, token_losses
from tests.integrations.options import assert_all_are_known
from tests.integrations.ranks import in_a_group, on_ranks

BAND = IPOConfig(dppo_mask_low=0.5, dppo_mask_high=2.0, kl_tau=0.0)
VOCAB, PROMPT, RESPONSE = 14, 3, 6
TRAINED = (5, 1, 0, 6)  # tokens of each response that train; of one none
REDUCTIONS = (
    "token_mean",
    "token_mean_legacy",
    "sequence_mean",
    "seq_mean_token_sum_norm",
    "prompt_mean",
)
PROMPTS = [(0, 2), (2, 4)]
MICRO_BATCH = 2


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    adapter.register(BAND)


class Policy(nn.Module):
    """Answers as SkyRL's model wrapper: log-probabilities of the response, and entropies."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, VOCAB)

    def forward(
        self, sequences: torch.Tensor, num_actions: int, temperature: float = 1.0, **_: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        context = self.embedding(sequences).cumsum(1).tanh()
        logprobs = (self.head(context) / temperature).log_softmax(-1)
        labels = sequences.roll(-1, dims=1)[..., None]
        chosen = logprobs.gather(-1, labels).squeeze(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return chosen[:, -num_actions - 1 : -1], {"entropy": entropy}


class Strategy:
    @staticmethod
    def backward(loss: torch.Tensor, model: nn.Module, optimizer: Any) -> None:
        loss.backward()


def algorithm(**options: Any) -> AlgorithmConfig:
    settings = {"policy_loss_type": "ipo", "use_kl_loss": False, "max_seq_len": 20, **options}
    return AlgorithmConfig(temperature=1.0, **settings)


def worker(model: Policy, config: AlgorithmConfig, ranks: int = 1) -> PolicyWorkerBase:
    """SkyRL's, without the processes and devices around it."""
    made = object.__new__(PolicyWorkerBase)
    made.model, made.optimizer, made.strategy = model, None, Strategy
    made.cfg = SimpleNamespace(algorithm=config)
    made.policy_loss_fn = PolicyLossRegistry.get(config.policy_loss_type)
    made.mesh_rank = SimpleNamespace(dp_size=ranks)
    made.scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    return made


def mini_batch() -> dict[str, torch.Tensor]:
    rows = len(TRAINED)
    mask = torch.arange(RESPONSE) < torch.tensor(TRAINED)[:, None]
    return {
        "sequences": torch.randint(VOCAB, (rows, PROMPT + RESPONSE)),
        "action_log_probs": -1.5 - 2 * torch.rand(rows, RESPONSE),
        "rollout_logprobs": torch.where(mask, -1.5 - 2 * torch.rand(rows, RESPONSE), 0),
        "advantages": torch.randn(rows, RESPONSE),
        "loss_mask": mask.long(),  # SkyRL's are integers
    }


def reduced(data: dict[str, torch.Tensor], how: str) -> torch.Tensor:
    """Advantages as SkyRL's trainer scales them, so that a sum of losses is the average."""
    mask = data["loss_mask"]
    return apply_loss_reduction_to_advantages_minibatch(
        data["advantages"], mask, how, MICRO_BATCH, 20, PROMPTS
    )


def train_step(
    model: Policy, data: dict[str, torch.Tensor], config: AlgorithmConfig, ranks: int = 1
) -> dict[str, float]:
    scaled = data | {"advantages": reduced(data, config.loss_reduction)}
    return train_rows(model, scaled, config, ranks)


def train_rows(
    model: nn.Module, scaled: dict[str, torch.Tensor], config: AlgorithmConfig, ranks: int
) -> dict[str, float]:
    """Every micro-batch through SkyRL's worker; its metrics reduced as SkyRL does."""
    made, collected, count = worker(model, config, ranks), {}, len(scaled["sequences"])
    for start in range(0, count, MICRO_BATCH):
        rows = {name: tensor[start : start + MICRO_BATCH] for name, tensor in scaled.items()}
        absent = {field.name: None for field in dataclasses.fields(Experience)}
        experience = Experience(**absent | rows | {"num_actions": RESPONSE, "info": {}})
        status = made._forward_backward_micro(experience, MICRO_BATCH / count)
        status.pop("loss_fn_outputs")
        for name, value in status.items():
            collected.setdefault(name, []).append(value)
    return reduce_metrics(collected, sum_loss_metrics=True)


def by_hand(model: Policy, data: dict[str, torch.Tensor], config: IPOConfig) -> torch.Tensor:
    logprobs, _ = model(data["sequences"], RESPONSE)
    return token_losses(
        logprobs,
        data["rollout_logprobs"].double(),
        data["advantages"].double(),
        data["loss_mask"].bool(),
        config,
    )


def averaged(losses: torch.Tensor, how: str) -> torch.Tensor:
    """The five reductions as SkyRL documents them."""
    lengths = torch.tensor(TRAINED)
    if how == "token_mean":
        return losses.sum() / lengths.sum()
    if how == "token_mean_legacy":
        parts = zip(losses.split(MICRO_BATCH), lengths.split(MICRO_BATCH), strict=True)
        return sum(part.sum() / length.sum() for part, length in parts) / 2
    if how == "sequence_mean":
        return (losses.sum(1) / lengths.clamp(min=1)).mean()
    if how == "seq_mean_token_sum_norm":
        return (losses.sum(1) / 20).mean()
    groups = [slice(*bounds) for bounds in PROMPTS]
    return sum(losses[group].sum() / lengths[group].sum() for group in groups) / len(groups)


@pytest.mark.parametrize("how", REDUCTIONS)
@pytest.mark.parametrize("ranks", [1, 4])
def test_training_equals_eager(how: str, ranks: int) -> None:
    model, config = Policy(), algorithm(loss_reduction=how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shares = []
    for _ in range(3):
        data = mini_batch()
        twin = copy.deepcopy(model).double()
        losses = by_hand(twin, data, BAND)
        expected = averaged(losses, how)
        theirs = torch.autograd.grad(expected, list(twin.parameters()))
        shares.append((losses == 0)[data["loss_mask"].bool()].double().mean().item())

        optimizer.zero_grad()
        metrics = train_step(model, data, config, ranks)
        ours = [parameter.grad / ranks for parameter in model.parameters()]
        assert_same_step(metrics["policy_loss"], expected, ours, theirs)
        assert metrics["loss_metrics/ipo/pg_loss"] == pytest.approx(expected.item(), rel=1e-5)
        optimizer.step()
    assert 0 < sum(shares) < 3, "some tokens are to be dropped, and some kept"


class RanksStrategy(Strategy):
    world_size = 2
    all_reduce = DistributedStrategy.all_reduce


def step_of_rows(ranks: int, left: int) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Gradients and metrics of this rank's rows; of the last rows ``left`` columns may train."""
    torch.manual_seed(0)
    model, data, config = Policy(), mini_batch(), algorithm()
    data["loss_mask"][MICRO_BATCH:, left:] = 0
    rows = data | {"advantages": reduced(data, config.loss_reduction)}  # before SkyRL deals it out
    trained = model
    if ranks > 1:
        trained = nn.parallel.DistributedDataParallel(model)
        rank = torch.distributed.get_rank()
        rows = {name: tensor.chunk(ranks)[rank] for name, tensor in rows.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        adapter.register(BAND)
        metrics = train_rows(trained, rows, config, ranks)
        if ranks > 1:
            metrics = all_reduce_metrics(metrics, RanksStrategy(), sum_loss_metrics=True)
    return [parameter.grad for parameter in model.parameters()], metrics


@pytest.mark.parametrize("left", [0, 3], ids=["a rank without tokens", "a rank with few"])
def test_two_ranks_step_as_one(left: int) -> None:
    gradients, metrics = step_of_rows(1, left)
    for ours, reported in on_ranks(in_a_group, step_of_rows, 2, left):
        for gradient, whole in zip(ours, gradients, strict=True):
            torch.testing.assert_close(gradient, whole)
        summed = ("policy_loss", "loss_metrics/ipo/pg_loss")
        for name in summed:
            assert reported[name] == pytest.approx(metrics[name], rel=1e-5), name


def test_the_kl_term_is_divided_by_the_normalizer() -> None:
    config = dataclasses.replace(BAND, kl_tau=0.3)
    adapter.register(config, kl_normalizer=sum(TRAINED))
    model, data = Policy(), mini_batch()
    twin = copy.deepcopy(model).double()
    expected = averaged(by_hand(twin, data, config), "token_mean")
    theirs = torch.autograd.grad(expected, list(twin.parameters()))
    metrics = train_step(model, data, algorithm())
    assert metrics["loss_metrics/ipo/kl_loss"] > 0.01
    ours = [parameter.grad for parameter in model.parameters()]
    assert_same_step(metrics["policy_loss"], expected, ours, theirs)


@pytest.mark.parametrize(
    ("config", "normalizer", "match"),
    [
        (IPOConfig(kl_tau=0.1), None, "kl_normalizer: expected a number"),
        (IPOConfig(kl_tau=0.1), 0, "kl_normalizer: expected a finite number > 0, got 0"),
        (IPOConfig(kl_tau=0.1), math.nan, "kl_normalizer: expected a finite number > 0"),
        (IPOConfig(kl_tau=0.1), True, "kl_normalizer: expected a finite number > 0"),
        (BAND, 100, "kl_normalizer: expected None"),
        (IPOConfig(kl_tau=0.0, teacher_tau=0.5), None, r"teacher_tau: expected 0, got 0\.5"),
    ],
)
def test_a_config_that_skyrl_cannot_serve_raises(
    config: IPOConfig, normalizer: Any, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        adapter.register(config, kl_normalizer=normalizer)


CORRECTIONS = (
    {"sequence_mask_metric": "geometric", "geo_mask_low": 0.9, "geo_mask_high": 2.2},
    {"sequence_mask_metric": "product", "product_mask_low": 0.9, "product_mask_high": 9.0},
    {"outlier_token_is_threshold_low": 0.4},
    {"token_mask_is_threshold_low": 0.7, "token_mask_is_threshold_high": 1.6},
)


def called_with(tensors: dict[str, Any], config: AlgorithmConfig) -> tuple[torch.Tensor, dict]:
    return PolicyLossRegistry.get("ipo")(
        tensors["log_probs"],
        tensors["old_log_probs"],
        tensors["advantages"],
        config=config,
        loss_mask=tensors["loss_mask"],
        rollout_logprobs=tensors["rollout_logprobs"],
    )


def skyrls_tensors() -> dict[str, Any]:
    data = mini_batch()
    near = data["rollout_logprobs"] + 0.3 * torch.randn(len(TRAINED), RESPONSE)
    return {
        "log_probs": near.clone().requires_grad_(),
        "old_log_probs": data["rollout_logprobs"] + 0.5 * torch.randn(len(TRAINED), RESPONSE),
        **{name: data[name] for name in ("advantages", "loss_mask", "rollout_logprobs")},
    }


@pytest.mark.parametrize("options", CORRECTIONS, ids=lambda options: next(iter(options)))
def test_the_masks_of_off_policy_correction_are_skyrls(options: dict[str, Any]) -> None:
    """Those that leave SkyRL's own loss a gradient, and no others, are left one here."""
    correction = OffPolicyCorrectionConfig(**options)
    tensors = skyrls_tensors()
    far = tensors["rollout_logprobs"] + 0.7 * torch.randn(len(TRAINED), RESPONSE)
    tensors["log_probs"] = far.requires_grad_()
    theirs = PolicyLossRegistry.get("regular")(
        tensors["log_probs"],
        tensors["log_probs"].detach(),  # a ratio of 1: nothing is clipped
        tensors["advantages"],
        config=algorithm(policy_loss_type="regular", off_policy_correction=correction),
        loss_mask=tensors["loss_mask"],
        rollout_logprobs=tensors["rollout_logprobs"],
    )
    kept_by_skyrl = torch.autograd.grad(theirs[0], tensors["log_probs"])[0] != 0
    # SkyRL's loss took log_probs for the old ones; so is ours given them here.
    tensors["old_log_probs"] = tensors["log_probs"].detach()
    config = algorithm(off_policy_correction=correction)
    adapter.register(IPOConfig(mask_rule="none", kl_tau=0.0))
    loss, metrics = called_with(tensors, config)
    kept = torch.autograd.grad(loss, tensors["log_probs"])[0] != 0
    assert torch.equal(kept, kept_by_skyrl)
    assert 0 < kept.sum() < tensors["loss_mask"].sum(), "some are to be rejected, some not"
    assert any("masked_ratio" in name or "token_mask" in name for name in metrics)


def test_garbage_outside_of_the_mask_changes_nothing() -> None:
    tensors = skyrls_tensors()
    mask = tensors["loss_mask"].bool()
    for options in ({}, *CORRECTIONS):
        config = algorithm(off_policy_correction=OffPolicyCorrectionConfig(**options))
        expected = called_with(tensors, config)[0]
        for name in ("old_log_probs", "rollout_logprobs", "advantages"):
            for garbage in (math.nan, -math.inf, 0.0):
                spoiled = torch.where(mask, tensors[name], garbage)
                assert called_with(tensors | {name: spoiled}, config)[0] == expected


def test_a_mask_of_any_kind_means_what_skyrl_multiplies_by() -> None:
    tensors, config = skyrls_tensors(), algorithm()
    mask = tensors["loss_mask"]
    expected = called_with(tensors, config)[0]
    for kind in (torch.bool, torch.int32, torch.float32, torch.float64):
        torch.testing.assert_close(
            called_with(tensors | {"loss_mask": mask.to(kind)}, config)[0], expected
        )
    for factor in (2, 0.5):
        weighed = called_with(tensors | {"loss_mask": mask * factor}, config)[0]
        torch.testing.assert_close(weighed, expected * factor)
    everything = torch.ones_like(mask)
    tensors["rollout_logprobs"] = tensors["log_probs"].detach() + 0.1
    torch.testing.assert_close(
        called_with(tensors | {"loss_mask": None}, config)[0],
        called_with(tensors | {"loss_mask": everything}, config)[0],
    )


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("options", [{}, CORRECTIONS[0]], ids=["", "corrected"])
def test_a_micro_batch_without_tokens_runs_backward(rows: int, options: dict[str, Any]) -> None:
    config = algorithm(off_policy_correction=OffPolicyCorrectionConfig(**options))
    tensors = {
        name: torch.zeros(rows, RESPONSE)
        for name in ("old_log_probs", "advantages", "loss_mask", "rollout_logprobs")
    }
    log_probs = torch.zeros(rows, RESPONSE, requires_grad=True)
    loss, metrics = called_with({"log_probs": log_probs, **tensors}, config)
    loss.backward()
    assert loss.item() == 0
    assert not log_probs.grad.any()
    assert metrics["ipo/pg_loss"] == 0


@pytest.mark.parametrize("name", ["old_log_probs", "advantages", "loss_mask", "rollout_logprobs"])
def test_a_tensor_of_another_shape_is_refused_by_skyrls_name(name: str) -> None:
    tensors = skyrls_tensors()
    tensors[name] = tensors[name][:, 1:]
    with pytest.raises(
        ValueError, match=rf"{name}: expected shape .* like log_probs, got \[4, 5\]"
    ):
        called_with(tensors, algorithm())


def test_missing_log_probabilities_of_the_engine_raise() -> None:
    with pytest.raises(ValueError, match=r"rollout_logprobs: expected .* got None: set generator"):
        called_with(skyrls_tensors() | {"rollout_logprobs": None}, algorithm())


REFUSED = (
    ({"eps_clip_low": 0.3}, r"algorithm\.eps_clip_low: expected the default 0\.2, got 0\.3"),
    ({"eps_clip_high": 0.3}, r"algorithm\.eps_clip_high: expected the default"),
    ({"clip_ratio_c": 4.0}, r"algorithm\.clip_ratio_c: expected the default"),
    ({"sapo": SAPOConfig(tau_pos=2.0)}, r"algorithm\.sapo: expected the default"),
    ({"use_tis": True}, r"algorithm\.use_tis: expected the default False"),
    (
        {"off_policy_correction": OffPolicyCorrectionConfig(tis_ratio_type="token")},
        r"off_policy_correction\.tis_ratio_type: expected the default None, got 'token': .* twice",
    ),
    (
        {"off_policy_correction": OffPolicyCorrectionConfig(token_mask_is_threshold_low=0.5)},
        r"off_policy_correction\.token_mask_is_threshold_high: expected a number beside",
    ),
)


@pytest.mark.parametrize(("options", "match"), REFUSED, ids=lambda value: str(value)[:30])
def test_an_option_that_is_not_honoured_raises(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        called_with(skyrls_tensors(), algorithm(**options))
    whole = SkyRLTrainConfig()
    whole.trainer.algorithm = algorithm(**options)
    whole.generator.sampling_params.logprobs = 1
    with pytest.raises(ValueError, match=match):
        adapter.check_config(whole)


def test_the_whole_config_is_checked_before_anything_starts() -> None:
    config = SkyRLTrainConfig()
    config.generator.sampling_params.logprobs = 1
    adapter.check_config(config)
    config.generator.sampling_params.logprobs = None
    with pytest.raises(ValueError, match=r"sampling_params\.logprobs: expected 1, got None"):
        adapter.check_config(config)


def checked(**options: Any) -> SkyRLTrainConfig:
    """A whole config with these of its options, by section, and the temperature of both."""
    config = SkyRLTrainConfig()
    sections = {
        "sampling": config.generator.sampling_params,
        "engine": config.generator.inference_engine,
        "algorithm": config.trainer.algorithm,
    }
    sampled = {"logprobs": 1, **options.get("sampling", {})}
    trained = {"temperature": sampled.get("temperature", 1.0), **options.get("algorithm", {})}
    for name, values in (options | {"sampling": sampled, "algorithm": trained}).items():
        for option, value in values.items():
            setattr(sections[name], option, value)
    return config


RAW = {"engine_init_kwargs": {"logprobs_mode": "raw_logprobs"}}
PROCESSED = {"engine_init_kwargs": {"logprobs_mode": "processed_logprobs"}}


@pytest.mark.parametrize("engine", [{}, RAW])
def test_log_probabilities_from_before_temperature_raise(engine: dict[str, Any]) -> None:
    config = checked(sampling={"temperature": 0.8}, engine=engine)
    with pytest.raises(ValueError, match=r"logprobs_mode: expected processed_logprobs, .* is 0\.8"):
        adapter.check_config(config)
    adapter.check_config(checked(sampling={"temperature": 0.8}, engine=PROCESSED))
    adapter.check_config(checked(engine=engine))


def test_an_engine_that_reports_logits_raises() -> None:
    logits = {"engine_init_kwargs": {"logprobs_mode": "processed_logits"}}
    with pytest.raises(ValueError, match=r"is 1\.0, got 'processed_logits'"):
        adapter.check_config(checked(engine=logits))


def test_another_temperature_of_the_trained_logits_raises() -> None:
    message = r"algorithm\.temperature: expected .*sampling_params\.temperature, 1\.0, .* got 0\.5"
    with pytest.raises(ValueError, match=message):
        adapter.check_config(checked(algorithm={"temperature": 0.5}))
    adapter.check_config(checked(algorithm={"temperature": 1.0}))


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"top_p": 0.9}, r"top_p=0\.9"),
        ({"top_k": 20}, "top_k=20"),
        ({"min_p": 0.1}, r"min_p=0\.1"),
        ({"additional_kwargs": {"repetition_penalty": 1.2}}, r"repetition_penalty=1\.2"),
    ],
)
def test_what_bends_the_ratio_is_warned_of(sampling: dict[str, Any], named: str) -> None:
    with pytest.warns(UserWarning, match=f"^{named}: completions are drawn from another") as seen:
        adapter.check_config(checked(sampling=sampling))
    assert seen[0].filename == __file__


@pytest.mark.filterwarnings("error:.*drawn from another")
def test_what_bends_no_ratio_is_not_warned_of() -> None:
    adapter.check_config(checked(sampling={"additional_kwargs": {"seed": 3}}))
    replayed = {"enable_sample_support_replay": True}
    adapter.check_config(checked(sampling={"top_k": 20}, algorithm=replayed))


# Options of AlgorithmConfig that SkyRL applies before, after or beside the policy loss.
SKYRLS_OWN = {
    *("advantage_estimator", "kl_ctrl", "kl_estimator_type", "use_kl_in_reward", "use_kl_loss"),
    *("kl_loss_coef", "use_entropy_loss", "entropy_loss_coef", "temperature"),
    *("advantage_batch_normalize", "value_head_prefix", "policy_loss_type", "loss_reduction"),
    *("grpo_norm_by_std", "zero_variance_filter", "zero_variance_filter_tol", "lambd", "gamma"),
    *("enable_sample_support_replay", "value_clip", "dynamic_sampling", "max_seq_len"),
    "tis_imp_ratio_cap",  # read with use_tis alone
}
OF_SAMPLING = {
    *("temperature", "logprobs", "top_p", "top_k", "min_p", "additional_kwargs"),  # checked
    "repetition_penalty",  # SkyRL does not hand it on
    *("max_generate_length", "stop"),
}
OF_THE_CORRECTION = {  # those that SkyRL's own function reads, whose masks are kept
    *("sequence_mask_metric", "geo_mask_high", "geo_mask_low"),
    *("product_mask_high", "product_mask_low"),
    *("outlier_token_is_threshold_low", "outlier_token_is_threshold_high"),
    *("token_mask_is_threshold_low", "token_mask_is_threshold_high"),
    *("tis_ratio_type", "token_tis_ratio_clip_high", "sequence_tis_ratio_clip_high"),  # refused
}
BESIDE_THE_LOSS = {
    *("policy", "policy_mini_batch_size", "recompute_old_logprobs_per_minibatch"),
    *("logprobs_chunk_size", "vocab_entropy_chunk_size", "vocab_entropy_chunk_memory_mb"),
    *("fused_lm_head_logprob", "fused_lm_head_logprob_backend"),
    *("num_logger_eval_samples", "num_logger_train_samples"),
}


def names_of(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_every_option_of_skyrl_is_honoured_or_refused() -> None:
    expected = {*_skyrl_options.NOT_HONOURED, "off_policy_correction"}
    assert names_of(AlgorithmConfig) - SKYRLS_OWN == expected
    assert names_of(OffPolicyCorrectionConfig) == OF_THE_CORRECTION
    assert names_of(SamplingParams) == OF_SAMPLING
    assert_all_are_known(names_of(TrainerConfig), BESIDE_THE_LOSS)


def test_a_worker_gets_the_registered_function() -> None:
    """Ray's registry hands it over pickled; SkyRL fills in its own losses beside it."""
    repopulate_all_registries()
    assert {"ipo", "regular"} <= set(PolicyLossRegistry.list_available())
    tensors = skyrls_tensors()
    expected = called_with(tensors, algorithm())[0]
    handed = ray.cloudpickle.loads(ray.cloudpickle.dumps(PolicyLossRegistry.get("ipo")))
    again, _ = handed(
        tensors["log_probs"],
        tensors["old_log_probs"],
        tensors["advantages"],
        config=algorithm(),
        loss_mask=tensors["loss_mask"],
        rollout_logprobs=tensors["rollout_logprobs"],
    )
    assert again == expected


@pytest.mark.parametrize("block", blocks_of_host("skyrl"), ids=str)
def test_the_docs_block_registers(block: Any) -> None:
    config = SkyRLTrainConfig()
    config.generator.sampling_params.logprobs = 1
    block.run({"config": config})
    assert "ipo" in PolicyLossRegistry.list_available()
