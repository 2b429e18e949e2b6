"""examples/swift_ipo.py in ms-swift's own step: loss and gradient against eager code.

The trainer is made without a model: its log-probabilities are the test's, the step around them is
ms-swift's.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from swift.rl_core.data import GRPOBatch
from swift.rlhf_trainers import GRPOConfig
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from swift.trainers.trainer_factory import TrainerFactory
from swift.utils.utils import import_external_file

from ipo_ext import IPOConfig
from tests.integrations.eager import assert_same_step, token_losses

BAND = IPOConfig(dppo_mask_low=0.5, dppo_mask_high=2.0, kl_tau=0.1)
AVERAGES = ("grpo", "bnpo", "dr_grpo", "dapo")
LENGTHS = torch.tensor([[5], [1], [6], [3]])


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file as `--external_plugins` imports it."""
    monkeypatch.setitem(TrainerFactory.TRAINER_MAPPING, "grpo", None)
    plugin = import_external_file(Path(__file__).parents[2] / "examples" / "swift_ipo.py")
    mapped = f"{plugin.__name__}.IPOSwiftTrainer"
    TrainerFactory.TRAINER_MAPPING["grpo"] = mapped  # where another test has imported it already
    monkeypatch.setattr(plugin, "CONFIG", BAND)
    return plugin


def batch(engine: bool) -> tuple[torch.Tensor, GRPOBatch]:
    old = -3 * torch.rand(4, 6)
    logprobs = (old + 0.7 * torch.randn(4, 6)).requires_grad_()
    given = GRPOBatch(
        completion_mask=torch.arange(6) < LENGTHS,
        truncated_mask=torch.tensor([False, False, True, False]),
        seq_lengths=LENGTHS[:, 0],
        old_per_token_logps=old,
        rollout_per_token_logps=old + 0.3 * torch.randn(4, 6) if engine else None,
        advantages=torch.randn(4, 1).expand(4, 6),
        num_items_in_batch=torch.tensor(40.0),
    )
    return logprobs, given


def trainer_of(kind: type[GRPOTrainer], logprobs: torch.Tensor, **options: Any) -> GRPOTrainer:
    trainer = object.__new__(kind)
    trainer.model = SimpleNamespace(training=True)
    trainer.args = SimpleNamespace(delta=None, gradient_accumulation_steps=2)
    trainer.accelerator = SimpleNamespace(num_processes=2, gather_for_metrics=lambda tensor: tensor)
    trainer._metrics = {"train": defaultdict(list)}
    settings = {
        "compute_entropy": False,
        "overlong_filter": True,
        "beta": 0.0,
        "kl_in_reward": False,
        "rollout_importance_sampling_mode": None,
        "log_rollout_offpolicy_metrics": False,
        "disable_rollout_importance_sampling": False,
        "importance_sampling_level": "token",
        "_has_teacher": False,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "off_policy_sequence_mask_delta": None,
        "max_completion_length": 8,
        "sdar_loss_coef": 0.0,
        "chord_sft_iterator": None,
        "model_accepts_loss_kwargs": False,
        "compute_loss_func": None,
        "current_gradient_accumulation_steps": 2,
        **options,
    }
    vars(trainer).update(settings)
    return trainer


@pytest.fixture(autouse=True)
def _logprobs_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        GRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda self, model, *_, **__: (model, None),
    )
    monkeypatch.setattr("swift.rlhf_trainers.grpo_trainer.gather_object", lambda values: values)


def averaged(losses: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """As ms-swift documents its loss types, for two ranks and two accumulated micro-batches."""
    if how == "dapo":
        return losses.sum() / (40 / 2) * 2  # the trainer divides by the two again
    if how == "bnpo":
        return losses.sum() / mask.sum()
    if how == "dr_grpo":
        return losses.sum() / (len(mask) * 8)
    return (losses.sum(1) / mask.sum(1).clamp(min=1)).mean()


@pytest.mark.parametrize("loss_type", AVERAGES)
@pytest.mark.parametrize("engine", [True, False], ids=["engine", "policy before"])
def test_equals_eager(example: ModuleType, loss_type: str, engine: bool) -> None:
    logprobs, given = batch(engine)
    mask = given.completion_mask & ~given.truncated_mask[:, None]
    sampled = given.rollout_per_token_logps if engine else given.old_per_token_logps
    losses = token_losses(logprobs, sampled, given.advantages, mask, BAND)
    assert 0 < (losses == 0)[mask].sum() < mask.sum(), "some are to be dropped, and some kept"
    expected = averaged(losses, mask, loss_type)

    trainer = trainer_of(example.IPOSwiftTrainer, logprobs, loss_type=loss_type)
    loss, metrics = trainer._compute_loss_and_metrics(logprobs, {}, given)
    ours = torch.autograd.grad(loss, logprobs, retain_graph=True)
    theirs = torch.autograd.grad(expected, logprobs)
    assert_same_step(loss, expected, ours, theirs)
    shares = trainer._metrics["train"]["ipo/is_masked"]
    assert shares == pytest.approx([(losses == 0)[mask].float().mean().item()])
    assert metrics["mode"] == "train"


@pytest.mark.parametrize("loss_type", AVERAGES)
def test_without_a_band_on_policy_it_is_ms_swifts_own_loss(
    example: ModuleType, loss_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = IPOConfig(dppo_mask_low=0.0, dppo_mask_high=float("inf"), kl_tau=0.0)
    monkeypatch.setattr(example, "CONFIG", everything)
    logprobs, given = batch(engine=False)
    given.old_per_token_logps = None
    outcomes = []
    for kind in (example.IPOSwiftTrainer, GRPOTrainer):
        trainer = trainer_of(kind, logprobs, loss_type=loss_type)
        loss, _ = trainer._compute_loss_and_metrics(logprobs, {}, given)
        outcomes.append((loss, torch.autograd.grad(loss, logprobs)[0]))
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-6)


def test_it_stands_in_ms_swifts_trainers_place(example: ModuleType) -> None:
    args = SimpleNamespace(rlhf_type="grpo")
    chosen = TrainerFactory.get_cls(args, TrainerFactory.TRAINER_MAPPING)
    assert chosen is example.IPOSwiftTrainer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.04),
        ("epsilon", 0.3),
        ("epsilon_high", 0.28),
        ("delta", 2.0),
        ("importance_sampling_level", "sequence"),
        ("top_entropy_quantile", 0.5),
        ("rollout_importance_sampling_mode", "token_mask"),
        ("off_policy_sequence_mask_delta", 0.1),
        ("sdar_loss_coef", 0.1),
        ("chord_sft_dataset", ["some"]),
        ("loss_type", "cispo"),
    ],
)
def test_an_option_of_another_loss_raises(example: ModuleType, name: str, value: object) -> None:
    defaults = {field.name: field.default for field in GRPOConfig.__dataclass_fields__.values()}
    args = GRPOConfig.__new__(GRPOConfig)  # as parsed; to make one asks for a GPU's settings
    vars(args).update(defaults | {"beta": 0.0, "loss_type": "grpo", "chord_sft_dataset": []})
    example.refuse_other_losses(args)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        example.refuse_other_losses(args)
