"""Reinforcement learning with a real engine and a real model, on a CPU, in about three minutes.

vLLM samples answers to sums, `ipo_loss_from_hidden` trains all 135 million parameters of SmolLM2,
and the weights are handed back in one process. `python scripts/engine_environment.py build/engine`
makes the environment and the model; then

    build/engine/bin/python examples/engine_loop.py build/engine/smollm2

Leaves in `--output`: each step's rollouts, a report of the mismatch each few steps, metrics as
lines of JSON and a picture. With `--sync-every 3` the engine is up to two steps behind.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ENGINE_SETTINGS = {  # before torch is imported: threads that spin make a shared machine crawl
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine and trainer share a process, and memory
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.update({name: os.environ.get(name, value) for name, value in ENGINE_SETTINGS.items()})

import torch  # noqa: E402

from ipo_ext import (  # noqa: E402
    IPOConfig,
    IPOMetrics,
    ipo_loss_from_hidden,
    linear_token_logprobs,
    loggers,
    mismatch,
)

PROMPTS, ANSWERS, TOKENS = 4, 8, 24  # a step: questions, answers to each, tokens of an answer
MICRO_BATCH = 16
CONFIG = IPOConfig(dppo_mask_low=0.2, dppo_mask_high=5.0, kl_tau=1e-3)
# Root mean square of what engine and trainer may differ by, in nats. bfloat16's rounding is 0.06.
TOLERANCE = {"bfloat16": 0.2, "float32": 1e-3}
FIXED = (
    "The capital of France is Paris. Twelve and thirty are forty-two, and rain falls from clouds."
)

Weights = Iterable[tuple[str, torch.Tensor]]


class NotInSync(RuntimeError):
    """The engine does not compute with the trainer's weights."""


# ---------------------------------------------------------------------------------------------
# The engine


class Engine:
    """vLLM in this process."""

    def __init__(self, model: Path, dtype: str, seed: int) -> None:
        from vllm import LLM

        self.llm = LLM(str(model), dtype=dtype, max_model_len=256, enforce_eager=True, seed=seed)
        self.tokenizer = self.llm.get_tokenizer()
        self.dtype = dtype

    def sample(self, prompts: Sequence[list[int]]) -> list[Any]:
        """vLLM's outputs, ``ANSWERS`` to each prompt, with log-probabilities of what it sampled."""
        from vllm import SamplingParams

        sampling = SamplingParams(n=ANSWERS, max_tokens=TOKENS, logprobs=0)
        return self.llm.generate(_requests(prompts), sampling, use_tqdm=False)

    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """Of all given tokens but the first: float32 ``[tokens - 1]``."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
        (output,) = self.llm.generate(_requests([token_ids]), sampling, use_tqdm=False)
        pairs = zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
        return torch.tensor([entry[token].logprob for token, entry in pairs])

    def take(self, weights: Weights) -> None:
        """Computes with these weights from now on."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.reset_prefix_cache()  # it holds what the old weights computed


def _requests(prompts: Iterable[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in prompts]


# ---------------------------------------------------------------------------------------------
# The trainer


class Trainer:
    """The model in float32, all of which learns."""

    def __init__(self, model: Path, learning_rate: float) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All names of the state dict, ``lm_head.weight`` among them, though it is the embedding.

        vLLM for CPUs (0.32) computes with a packed copy of the head, which it packs anew only where
        that name comes by: of ``named_parameters()``, which leaves out tied weights, it takes every
        layer and keeps the old head.
        """
        return ((name, value.detach()) for name, value in self.model.state_dict().items())

    @torch.no_grad()
    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """Of all given tokens but the first: float32 ``[tokens - 1]``."""
        ids = torch.tensor(token_ids)
        hidden = self.model.model(ids[None]).last_hidden_state[0]
        return linear_token_logprobs(hidden[:-1], self.model.lm_head.weight, ids[1:])[0]

    def step(self, batch: Batch) -> tuple[IPOMetrics, torch.Tensor]:
        """One update; the metrics and the log-probabilities ``[rows, length]`` from before it."""
        self.optimizer.zero_grad()
        metrics, logprobs = [], torch.zeros_like(batch.inference_logprobs)
        for rows in batch.lengths.argsort().split(MICRO_BATCH):  # alike ones, so little is padded
            part = batch.rows(rows)
            hidden = self.model.model(part.ids, part.attention).last_hidden_state
            out = ipo_loss_from_hidden(
                hidden,
                self.model.lm_head.weight,
                part.labels,
                part.inference_logprobs,
                part.advantages,
                part.loss_mask,
                normalizer=float(batch.loss_mask.sum()),  # of the step, and not of the micro-batch
                config=CONFIG,
            )
            out.loss.backward()
            metrics.append(out.metrics)
            logprobs[rows, : part.ids.shape[1]] = out.logprobs
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return sum(metrics[1:], start=metrics[0]), logprobs


@dataclasses.dataclass(frozen=True)
class Batch:
    """A step's rollouts, a row each, padded on the right. Position t predicts token t + 1."""

    ids: torch.Tensor  # int64 [rows, length]
    attention: torch.Tensor  # int64 [rows, length]: 1 where there is a token
    labels: torch.Tensor  # int64 [rows, length]: the token that follows
    inference_logprobs: torch.Tensor  # float32 [rows, length]
    advantages: torch.Tensor  # float32 [rows, length]
    loss_mask: torch.Tensor  # bool [rows, length]: the next token is one that the engine sampled

    @property
    def lengths(self) -> torch.Tensor:
        return self.attention.sum(1)

    def rows(self, which: torch.Tensor) -> Batch:
        """Some rows, as long as the longest of them."""
        length = int(self.lengths[which].max())
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Batch(*(each[which, :length] for each in fields))


@dataclasses.dataclass(frozen=True)
class Rollout:
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]  # the engine's, of token_ids
    reward: float
    advantage: float

    @property
    def place(self) -> slice:
        """Where in its row the answer's tokens are predicted."""
        start = len(self.prompt_token_ids) - 1
        return slice(start, start + len(self.token_ids))


def batch_of(rollouts: Sequence[Rollout]) -> Batch:
    shape = len(rollouts), max(each.place.stop + 1 for each in rollouts)
    ids, attention, labels = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    inference_logprobs, advantages = torch.zeros(shape), torch.zeros(shape)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        tokens = torch.tensor(rollout.prompt_token_ids + rollout.token_ids)
        ids[row, : len(tokens)] = tokens
        attention[row, : len(tokens)] = 1
        labels[row, : len(tokens) - 1] = tokens[1:]
        inference_logprobs[row, rollout.place] = torch.tensor(rollout.logprobs)
        advantages[row, rollout.place] = rollout.advantage
        loss_mask[row, rollout.place] = True
    return Batch(ids, attention, labels, inference_logprobs, advantages, loss_mask)


# ---------------------------------------------------------------------------------------------
# Are both one policy?


def check_sync(engine: Engine, trainer: Trainer) -> float:
    """How far the two are apart on fixed tokens, as a root mean square; raises if it is too far."""
    ids = engine.tokenizer(FIXED)["input_ids"]
    difference = trainer.logprobs(ids) - engine.logprobs(ids)
    apart = float(difference.square().mean().sqrt())
    if not apart <= TOLERANCE[engine.dtype]:
        raise NotInSync(
            f"engine: expected log-probabilities within {TOLERANCE[engine.dtype]:g} of the "
            f"trainer's on fixed tokens, got {apart:.3g}: not all weights have arrived, so what it "
            "samples is not what is trained; look at what Engine.take is given"
        )
    return apart


@torch.no_grad()
def check_that_weights_arrive(engine: Engine, trainer: Trainer) -> float:
    """Hands over weights that no rounding hides, and then the trainer's own again.

    A step moves a model by about what bfloat16 rounds, so that after it an old head, say, would be
    within the tolerance. With noise of a tenth of every weight it is 0.58 nats off, and all weights
    are 0.09.
    """
    generator = torch.Generator().manual_seed(0)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    for value in trainer.model.parameters():
        value.add_(torch.randn(value.shape, generator=generator), alpha=0.1 * float(value.std()))
    try:
        engine.take(trainer.weights())
        check_sync(engine, trainer)
    finally:
        trainer.model.load_state_dict(before, strict=False)
    engine.take(trainer.weights())
    return check_sync(engine, trainer)


# ---------------------------------------------------------------------------------------------
# The task, and a step


def question(tokenizer: Any, dice: random.Random) -> tuple[list[int], int]:
    """A prompt and the number that answers it."""
    one, other = dice.randint(0, 9), dice.randint(0, 9)
    text = f"<|im_start|>user\nWhat is {one} + {other}?<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(text, add_special_tokens=False)["input_ids"], one + other


def reward_of(text: str, number: int) -> float:
    """1 where the last number of a text is the right one."""
    found = re.findall(r"\d+", text)
    return float(bool(found) and int(found[-1]) == number)


def sampled(engine: Engine, dice: random.Random) -> list[Rollout]:
    """Answers to some questions; advantages are rewards against those of the same question."""
    asked = [question(engine.tokenizer, dice) for _ in range(PROMPTS)]
    rollouts = []
    for output, (prompt, number) in zip(
        engine.sample([prompt for prompt, _ in asked]), asked, strict=True
    ):
        rewards = torch.tensor([reward_of(answer.text, number) for answer in output.outputs])
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
        for answer, reward, advantage in zip(
            output.outputs, rewards.tolist(), advantages.tolist(), strict=True
        ):
            ids = list(answer.token_ids)
            values = [
                entry[token].logprob for entry, token in zip(answer.logprobs, ids, strict=True)
            ]
            rollouts.append(Rollout(prompt, ids, values, reward, advantage))
    return rollouts


def write_rollouts(
    path: Path, rollouts: Sequence[Rollout], trainer_logprobs: torch.Tensor, version: int
) -> None:
    """As `python -m ipo_ext mismatch` reads them; both log-probabilities, so it needs no model."""
    with path.open("w", encoding="utf-8") as file:
        for row, rollout in enumerate(rollouts):
            values = trainer_logprobs[row, rollout.place].tolist()
            known = dataclasses.asdict(rollout) | {"trainer_logprobs": values, "version": version}
            file.write(json.dumps(known) + "\n")


def report(path: Path) -> Path:
    """What the mismatch of a step's rollouts looks like, as text and as a page with a picture."""
    text = path.with_suffix(".txt")
    with text.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        mismatch.main([str(path), "--html", str(path.with_suffix(".html"))])
    return text


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    rewards, kls = figure.subplots(1, 2)
    steps = [line["step"] for line in lines]
    rewards.plot(steps, [line["reward"] for line in lines], marker="o", color="#0072b2")
    rewards.set(title="mean reward", xlabel="step", ylim=(0, 1))
    values = [line["ipo/mismatch_kl"] for line in lines]
    kls.plot(steps, values, color="#d55e00")
    for behind in sorted({line["behind"] for line in lines}):
        chosen = [line for line in lines if line["behind"] == behind]
        kls.plot(
            [line["step"] for line in chosen],
            [line["ipo/mismatch_kl"] for line in chosen],
            "ox^s"[min(behind, 3)],
            color="#009e73" if behind == 0 else "#d55e00",
            label="in sync" if behind == 0 else f"{behind} step{'s' * (behind > 1)} behind",
        )
    kls.set(title="mismatch KL, nats a token", xlabel="step", yscale="log")
    kls.legend()
    for axes in (rewards, kls):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------
# The loop


def run(options: argparse.Namespace) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "steps.jsonl"
    log.unlink(missing_ok=True)
    dice = random.Random(options.seed)
    print("starting engine and trainer", flush=True)
    engine = Engine(options.model, options.dtype, options.seed)
    trainer = Trainer(options.model, options.learning_rate)
    apart = check_that_weights_arrive(engine, trainer)
    print(f"weights arrive; {apart:.2g} nats apart on fixed tokens", flush=True)
    behind = 0  # steps of the trainer that the engine does not know
    for step in range(options.steps):
        print(f"step {step + 1:2} of {options.steps}  ", end="", flush=True)
        rollouts = one_step(engine, trainer, dice, log, step, behind)
        if step % options.report_every == 0 or step == options.steps - 1:
            print(f"  report of the mismatch: {report(rollouts)}", flush=True)
        behind += 1
        if behind == options.sync_every:
            engine.take(trainer.weights())
            check_sync(engine, trainer)
            behind = 0
    picture = options.output / "engine_loop.png"
    draw([json.loads(line) for line in log.read_text().splitlines()], picture)
    print(f"picture: {picture}")


def one_step(
    engine: Engine, trainer: Trainer, dice: random.Random, log: Path, step: int, behind: int
) -> Path:
    """Samples, trains and says how it went; the file of the rollouts, which lies beside the log."""
    started = time.monotonic()
    rollouts = sampled(engine, dice)
    between = time.monotonic()
    metrics, logprobs = trainer.step(batch_of(rollouts))
    ended = time.monotonic()
    reward = sum(rollout.reward for rollout in rollouts) / len(rollouts)
    loggers.to_jsonl(metrics, log, step, reward=reward, behind=behind)
    print(
        f"reward {reward:.3f}  mismatch KL {float(metrics['mismatch_kl']):.4f}  "
        f"masked {float(metrics['is_masked']):.2%}  {behind} behind  "
        f"sampled in {between - started:.1f} s, trained in {ended - between:.1f} s",
        flush=True,
    )
    path = log.with_name(f"step_{step:03}.jsonl")
    write_rollouts(path, rollouts, logprobs, step - behind)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory that transformers and vLLM read")
    parser.add_argument("--output", type=Path, default=Path("build/engine_loop"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--sync-every", type=int, default=1, metavar="STEPS")
    parser.add_argument("--report-every", type=int, default=3, metavar="STEPS")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16", help="the engine's")
    parser.add_argument("--learning-rate", type=float, default=4e-5)
    parser.add_argument("--seed", type=int, default=0)
    try:
        run(parser.parse_args())
    except NotInSync as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
