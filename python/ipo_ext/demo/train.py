"""Warm-up on right answers, then one run of reinforcement learning for every arm, from one seed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ipo_ext import IPOConfig, IPOOutput, ipo_loss_from_hidden

from . import task
from .model import Policy, token_logprobs
from .rollout import ROUNDINGS, Rollouts, inference_copy, sample_rollouts

ARMS = {
    "mask + KL": IPOConfig(),
    "no mask": IPOConfig(dppo_mask_low=0.0, dppo_mask_high=math.inf, kl_tau=0.0),
}
"""What is compared. Everything else, prompts and initial weights included, is the same."""

EVALUATION_PROMPTS = 1024

WARMUP_CHECK = 10
"""Supervised steps between looks at the policy's reward."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on, besides the machine's floating point.

    The defaults are chosen for ratios that leave the band on both sides. int4 weights do so from
    the first step; up to seven steps of staleness, at this learning rate, add to it as the run goes
    on. With bf16 weights and a fresh copy almost nothing is dropped and the arms coincide.

    Both arms use plain SGD with momentum and no gradient clipping. Adam divides a spike in the
    gradient by its own size, and clipping cuts it: either hides much of what an unbounded ratio
    does. With Adam the arms are close on this task, and the unmasked one is often ahead; with SGD
    at several times this learning rate both fail.
    """

    seed: int = 0
    warmup_steps: int = 600
    """At most; the warm-up ends as soon as the policy's reward is `warmup_reward`."""
    warmup_reward: float = 0.5
    """Right and wrong answers in most groups, whatever the seed: there is something to learn."""
    steps: int = 400
    """Reinforcement-learning steps in each arm."""
    staleness: int = 8
    """The inference copy is renewed every `staleness` steps: it is 0 .. staleness - 1 steps old."""
    rounding: str = "int4"
    """How the inference copy's weights are stored; one of `rollout.ROUNDINGS`."""

    prompts: int = 32
    """Different prompts in a step."""
    group: int = 8
    """Samples of each prompt; advantages are relative to the group's mean reward."""
    learning_rate: float = 0.0125
    momentum: float = 0.9

    warmup_batch: int = 128
    warmup_learning_rate: float = 2e-3
    """Of AdamW."""

    width: int = 64
    heads: int = 4
    layers: int = 2
    threads: int = 1
    """Fixed, because the order of sums in torch's own matrix products may depend on it; and one,
    because products this small gain little from a second and lose a lot on a busy machine."""

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "steps", "staleness", "prompts", "group", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.rounding not in ROUNDINGS:
            expected = ", ".join(ROUNDINGS)
            raise ValueError(f"rounding: expected one of {expected}; got {self.rounding!r}")


@dataclass(frozen=True)
class StepRecord:
    """One step of one arm. Shares are of the step's loss tokens."""

    arm: str
    step: int
    """1 .. settings.steps."""
    reward: float
    """Mean over the step's rollouts, as the inference copy sampled them."""
    dropped_low: float
    dropped_high: float
    mismatch_kl: float
    """Mean of r - log r - 1 over loss tokens, in nats."""
    tokens: int
    """Loss tokens."""


@dataclass
class ArmResult:
    """The history of one arm and what the table says about it."""

    arm: str
    warmup_reward: float
    """Of the inference copy before the first step."""
    history: list[StepRecord] = field(default_factory=list)
    seconds: float = 0.0
    """Wall time, without the warm-up."""

    @property
    def final_reward(self) -> float:
        """Mean over the last tenth of the steps."""
        last = self.history[-max(1, len(self.history) // 10) :]
        return sum(record.reward for record in last) / len(last)

    @property
    def peak_mismatch_kl(self) -> float:
        return max(record.mismatch_kl for record in self.history)

    def mean_over_tokens(self, name: str) -> float:
        """The mean over every loss token of the run of a per-token quantity in StepRecord."""
        total: float = sum(getattr(record, name) * record.tokens for record in self.history)
        return total / sum(record.tokens for record in self.history)


def run(settings: Settings, on_step: Callable[[StepRecord], None] | None = None) -> list[ArmResult]:
    """Warms one policy up, then trains a copy of it in every arm; calls `on_step` as it goes."""
    with _threads(settings.threads):
        policy = warm_up(settings)
        return [
            train_arm(policy, arm, config, settings, on_step or (lambda record: None))
            for arm, config in ARMS.items()
        ]


def warm_up(settings: Settings) -> Policy:
    """A new policy, supervised on right answers until it gives `warmup_reward` of them itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        policy = Policy(
            vocabulary=len(task.VOCABULARY),
            context=task.SEQUENCE_LENGTH,
            width=settings.width,
            heads=settings.heads,
            layers=settings.layers,
        )
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.warmup_learning_rate)
    for step in range(settings.warmup_steps):
        if step % WARMUP_CHECK == 0 and evaluate(policy, generator) >= settings.warmup_reward:
            break
        operands = task.sample_operands(settings.warmup_batch, generator)
        responses = task.answers(operands)
        tokens = torch.cat((task.prompts(operands), responses), dim=1)
        logprobs = token_logprobs(policy, tokens)[:, -task.RESPONSE_LENGTH :]
        optimizer.zero_grad()
        loss = -logprobs[task.response_mask(responses)].mean()
        loss.backward()
        optimizer.step()
    return policy


def train_arm(
    warmed_up: Policy,
    arm: str,
    config: IPOConfig,
    settings: Settings,
    on_step: Callable[[StepRecord], None],
) -> ArmResult:
    """Reinforcement learning from `warmed_up`, which is not changed."""
    start = time.perf_counter()
    policy = copy.deepcopy(warmed_up)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    optimizer = torch.optim.SGD(
        policy.parameters(), lr=settings.learning_rate, momentum=settings.momentum
    )
    sampler = inference_copy(policy, settings.rounding)
    result = ArmResult(arm, evaluate(sampler, generator))
    for step in range(settings.steps):
        if step % settings.staleness == 0:
            sampler = inference_copy(policy, settings.rounding)
        operands = task.sample_operands(settings.prompts, generator)
        operands = operands.repeat_interleave(settings.group, dim=0)
        rollouts = sample_rollouts(sampler, operands, generator)

        output = policy_loss(policy, rollouts, settings.group, config)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()

        result.history.append(_record(arm, step + 1, rollouts, output))
        on_step(result.history[-1])
    result.seconds = time.perf_counter() - start
    return result


def policy_loss(policy: Policy, rollouts: Rollouts, group: int, config: IPOConfig) -> IPOOutput:
    """The IPO+KL loss of the rollouts from hidden states, a mean over their loss tokens."""
    labels = rollouts.tokens[:, 1:]
    advantages = group_advantages(rollouts.rewards, group)
    num_active = int(rollouts.loss_mask.sum())
    return ipo_loss_from_hidden(
        policy(rollouts.tokens[:, :-1]),
        policy.lm_head.weight,
        labels,
        rollouts.inference_logprobs,
        advantages.unsqueeze(1).expand(labels.shape),
        rollouts.loss_mask,
        normalizer=float(num_active),
        num_active=num_active,
        config=config,
    )


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """Reward minus the mean of its `group` neighbours, samples of one prompt: fp32 [B] -> [B]."""
    grouped = rewards.view(-1, group)
    return (grouped - grouped.mean(dim=1, keepdim=True)).flatten()


def evaluate(sampler: Policy, generator: torch.Generator) -> float:
    """Mean reward of one sample for each of EVALUATION_PROMPTS prompts."""
    operands = task.sample_operands(EVALUATION_PROMPTS, generator)
    return sample_rollouts(sampler, operands, generator).rewards.mean().item()


def _record(arm: str, step: int, rollouts: Rollouts, output: IPOOutput) -> StepRecord:
    metrics = output.metrics
    return StepRecord(
        arm=arm,
        step=step,
        reward=rollouts.rewards.mean().item(),
        dropped_low=metrics["is_masked_low"].item(),
        dropped_high=metrics["is_masked_high"].item(),
        mismatch_kl=metrics["mismatch_kl"].item(),
        tokens=int(rollouts.loss_mask.sum()),
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Runs the body with `count` torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
