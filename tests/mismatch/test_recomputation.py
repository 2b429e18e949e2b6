"""The trainer's log-probabilities: transformers' own, whatever is padded, scaled or capped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from ipo_ext.mismatch import recomputation
from ipo_ext.mismatch.policy import BadModel, load
from ipo_ext.mismatch.recomputation import with_trainer_logprobs
from ipo_ext.mismatch.rollouts import Rollout, rollout_of_completion
from tests.mismatch import planted

SMALL = {
    "vocab_size": planted.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MODELS = {
    "plain": lambda: planted.policy(),
    "tied": lambda: planted.policy(tied=True),
    "softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5)
    ),
    "scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
}


def rollouts(temperature: float | None = None) -> list[Rollout]:
    """Of many lengths, in no order."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for number in range(20):
        lengths = 1 + 3 * (number % 5), 1 + 7 * number % 13
        prompt, answer = (
            torch.randint(planted.VOCABULARY, (length,), generator=generator).tolist()
            for length in lengths
        )
        logprobs = [-1.0] * len(answer)
        made.append(
            rollout_of_completion(f"f:{number}", prompt, answer, logprobs, temperature=temperature)
        )
    return made


@torch.no_grad()
def expected(model: Any, rollout: Rollout, temperature: float) -> torch.Tensor:
    logits = model(input_ids=rollout.token_ids[None]).logits[0].double() / temperature
    logprobs = logits.log_softmax(-1)
    places = rollout.sampled.nonzero()[:, 0]
    return logprobs[places - 1].gather(-1, rollout.token_ids[places][:, None])[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_the_models_own_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recomputation, "_TOKENS_AT_ONCE", 64)
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path)
    policy = load(str(tmp_path), device="cpu")
    made = list(with_trainer_logprobs(rollouts(), policy, None))
    assert [each.where for each in made] == [f"f:{number}" for number in range(20)]
    for rollout in made:
        assert rollout.trainer_logprobs is not None
        found = rollout.trainer_logprobs[rollout.sampled]
        torch.testing.assert_close(found, expected(model, rollout, 1.0), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("of_file", "given", "used"), [(0.5, None, 0.5), (0.5, 2.0, 2.0)])
def test_the_temperature_is_the_commands_else_the_files(
    directory: Path, model: Any, of_file: float, given: float | None, used: float
) -> None:
    policy = load(str(directory), device="cpu")
    for rollout in with_trainer_logprobs(rollouts(of_file), policy, given):
        assert rollout.trainer_logprobs is not None
        found = rollout.trainer_logprobs[rollout.sampled]
        torch.testing.assert_close(found, expected(model, rollout, used), atol=2e-5, rtol=0)


def test_a_rollout_that_has_them_keeps_them(directory: Path) -> None:
    policy = load(str(directory), device="cpu")
    kept = rollout_of_completion("f", [1], [2, 3], [-1.0, -2.0], trainer_logprobs=[-1.5, -2.5])
    lacking, same = with_trainer_logprobs([rollouts()[0], kept], policy, None)
    assert lacking.trainer_logprobs is not None
    assert same is kept


def test_a_head_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    planted.policy().save_pretrained(tmp_path)
    policy = load(str(tmp_path), device="cpu")
    original = type(policy.model).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(policy.model), "forward", scaled)
        with pytest.raises(BadModel, match=r"LlamaForCausalLM makes something of .* not known"):
            load(str(tmp_path), device="cpu")
