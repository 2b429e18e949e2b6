"""An independent oracle: the functions of hidden states against what vLLM says of its own tokens.

vLLM in float32 samples, with kernels, weights' layout and softmax of its own; transformers' hidden
states go through `linear_token_logprobs` and `ipo_loss_from_hidden`. In the environment of
scripts/engine_environment.py, `build/engine/bin/python scripts/engine_oracle.py
build/engine/smollm2` asks for 10,000 tokens within 1e-4 nats; three minutes. `--sample FILE` keeps
the first answer to each prompt: tests/mismatch/rollouts/vllm_fp32.jsonl is one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mismatch_levels import TOKENS, prompts, rollouts_in  # first: it sets how torch's threads wait

# isort: split
import torch
from transformers import AutoModelForCausalLM

from ipo_ext import IPOMetrics, ipo_loss_from_hidden, linear_token_logprobs
from ipo_ext.mismatch import dump
from ipo_ext.mismatch.rollouts import Rollout

WITHIN = 1e-4


def sampled(model: Path, answers: int, path: Path) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(str(model), dtype="float32", max_model_len=512, enforce_eager=True, seed=0)
    asked = [{"prompt_token_ids": ids} for ids in prompts(engine.get_tokenizer())]
    sampling = SamplingParams(n=answers, max_tokens=TOKENS, logprobs=0)
    dump(engine.generate(asked, sampling, use_tqdm=False), path)


@torch.no_grad()
def log_ratios(model: Path, rollouts: Sequence[Rollout]) -> tuple[dict[str, torch.Tensor], Any]:
    """By function, log-probability minus the engine's of each sampled token; the loss's metrics."""
    trainer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    weight = trainer.lm_head.weight
    found: dict[str, list[torch.Tensor]] = {"linear_token_logprobs": [], "ipo_loss_from_hidden": []}
    metrics: list[IPOMetrics] = []
    for rollout in rollouts:
        ids, mask = rollout.token_ids, rollout.sampled[1:]
        hidden = trainer.model(ids[None]).last_hidden_state[0, :-1]
        engine = rollout.inference_logprobs[1:].float()
        logprobs, _ = linear_token_logprobs(hidden, weight, ids[1:])
        zeros = torch.zeros_like(engine)
        out = ipo_loss_from_hidden(hidden, weight, ids[1:], engine, zeros, mask)
        for name, values in zip(found, (logprobs, out.logprobs), strict=True):
            found[name].append((values - engine)[mask].double())
        metrics.append(out.metrics)
    ratios = {name: torch.cat(values) for name, values in found.items()}
    return ratios, sum(metrics[1:], start=metrics[0])


def keep_first_answers(rollouts: Sequence[Rollout], path: Path) -> None:
    """The first to each prompt, values to seven digits: float32 has no more."""
    kept: dict[str, str] = {}
    for rollout in rollouts:
        prompt = rollout.token_ids[~rollout.sampled].tolist()
        values = rollout.inference_logprobs[rollout.sampled].tolist()
        row = {
            "prompt_token_ids": prompt,
            "token_ids": rollout.token_ids[rollout.sampled].tolist(),
            "logprobs": [float(f"{value:.7g}") for value in values],
        }
        kept.setdefault(str(prompt), json.dumps(row))
    path.write_text("\n".join(kept.values()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory that transformers and vLLM read")
    parser.add_argument("--answers", type=int, default=6, help="to each of 40 prompts")
    parser.add_argument("--sample", type=Path, metavar="FILE", help="keep some of the rollouts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rollouts.jsonl"
        sampled(options.model, options.answers, path)
        rollouts = rollouts_in(path)
    if options.sample:
        keep_first_answers(rollouts, options.sample)
    ratios, metrics = log_ratios(options.model, rollouts)
    for name, x in ratios.items():
        print(
            f"{name}: {len(x):,} tokens, log-ratio {float(x.min()):+.1e} to {float(x.max()):+.1e}, "
            f"mean {float(x.mean()):+.1e}"
        )
    print(f"mismatch KL {float(metrics['mismatch_kl']):.1e}, masked {float(metrics['is_masked'])}")
    tokens = len(ratios["linear_token_logprobs"])
    sys.exit(tokens < 10_000 or max(float(x.abs().max()) for x in ratios.values()) > WITHIN)


if __name__ == "__main__":
    main()
