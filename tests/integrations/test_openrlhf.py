"""examples/openrlhf_ipo.py inside OpenRLHF's package: loss and gradient against eager code.

OpenRLHF's models import kernels for GPUs; its loss is imported without them, and its Ray workers
are not run here.
"""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "scripts" / "awkward_hosts")]

from measure import import_parents_empty  # noqa: E402

import_parents_empty("openrlhf.models.loss")
sys.modules.setdefault("deepspeed", types.ModuleType("deepspeed"))

import openrlhf_ipo as example  # noqa: E402
from openrlhf.models.loss import PolicyLoss  # noqa: E402

from ipo_ext import IPOConfig  # noqa: E402
from tests.integrations.eager import assert_same_step, token_losses  # noqa: E402

BAND = IPOConfig(dppo_mask_low=0.5, dppo_mask_high=2.0, kl_tau=0.1)
STEP = {"dp_size": 4, "batch_num_tokens": torch.tensor(90.0), "global_batch_size": torch.tensor(12)}


@pytest.fixture(autouse=True)
def _band(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "CONFIG", BAND)


def batch() -> dict[str, torch.Tensor]:
    lengths = torch.tensor([[5], [1], [0], [3]])
    old = -3 * torch.rand(4, 6)
    return {
        "log_probs": (old + 0.7 * torch.randn(4, 6)).requires_grad_(),
        "old_log_probs": old,
        "advantages": torch.randn(4, 6),
        "action_mask": torch.arange(6) < lengths,
        "rollout_log_probs": old + 0.3 * torch.randn(4, 6),
    }


@pytest.mark.parametrize("token_level", [True, False], ids=["tokens", "responses"])
@pytest.mark.parametrize("engine", [True, False], ids=["engine", "policy before"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_equals_eager(token_level: bool, engine: bool, mask_dtype: torch.dtype) -> None:
    tensors = batch()
    mask = tensors["action_mask"]
    if not engine:
        tensors["rollout_log_probs"] = None
    sampled = tensors["rollout_log_probs"] if engine else tensors["old_log_probs"]
    losses = token_losses(tensors["log_probs"], sampled, tensors["advantages"], mask, BAND)
    if token_level:
        expected = losses.sum() / 90 * 4
    else:
        expected = (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / 12 * 4
    assert 0 < (losses == 0)[mask].sum() < mask.sum(), "some are to be dropped, and some kept"

    loss_fn = example.IPOPolicyLoss(
        token_level_loss=token_level, is_correction_level="token" if engine else "off"
    )
    called = tensors | {"action_mask": mask.to(mask_dtype)}
    loss, clip_ratio, _, *absent = loss_fn(**called, **STEP)  # as ActorPPOTrainer unpacks it
    ours = torch.autograd.grad(loss, tensors["log_probs"])
    theirs = torch.autograd.grad(expected, tensors["log_probs"])
    assert_same_step(loss, expected, ours, theirs)
    torch.testing.assert_close(clip_ratio, (losses == 0)[mask].float().mean())
    assert absent == [None, None]


def test_a_micro_batch_without_loss_tokens_is_zero() -> None:
    tensors = batch()
    tensors["action_mask"] = torch.zeros(4, 6, dtype=torch.bool)
    loss, *_ = example.IPOPolicyLoss()(**tensors, **STEP)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, tensors["log_probs"])[0].any()


@pytest.mark.parametrize(
    "option",
    [
        {"clip_eps_low": 0.1},
        {"clip_eps_high": 0.28},
        {"dual_clip": 3.0},
        {"policy_loss_type": "gspo"},
        {"is_correction_level": "token", "is_correction_mode": "clip"},
        {"is_correction_threshold": [0.5, 2.0]},
        {"is_correction_gating": "tv"},
    ],
)
def test_an_option_of_another_loss_raises(option: dict[str, object]) -> None:
    *_, (name, _) = option.items()
    with pytest.raises(ValueError, match=f"{name}: expected the default"):
        example.IPOPolicyLoss(**option)


def test_what_openrlhfs_command_hands_over_by_default_is_taken() -> None:
    example.IPOPolicyLoss(
        clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, is_correction_threshold=[0.5, 5.0]
    )


def test_openrlhf_makes_and_calls_its_loss_as_the_example_expects() -> None:
    """Read, as its actor needs a GPU: the name that is replaced, and the call."""
    package = Path(sys.modules["openrlhf"].__path__[0])
    source = (package / "trainer" / "ray" / "ppo_actor.py").read_text()
    assert "import Actor, PolicyLoss, aggregate_loss\n" in source
    assert (
        "actor_loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio = self.actor_loss_fn(" in source
    )
    assert all(
        f"            {name}=self." in source for name in inspect.signature(PolicyLoss).parameters
    )
