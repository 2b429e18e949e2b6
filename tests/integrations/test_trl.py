"""A tiny model trained by the real TRL: loss and gradient against eager code and TRL's own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, packing
from trl.experimental.async_grpo import async_grpo_trainer as async_module
from trl.generation.vllm_generation import extract_logprobs
from trl.trainer import grpo_trainer

from ipo_ext import IPOConfig
from ipo_ext.integrations import _trl_options as trl_options
from ipo_ext.integrations.trl import IPOTrainer
from ipo_ext.integrations.trl_async import AsyncIPOTrainer
from tests.docs.page_blocks import blocks_of_host
from tests.integrations import async_rollouts
from tests.integrations.eager import assert_same_step, token_losses
from tests.integrations.options import assert_all_are_known
from tests.integrations.ranks import on_ranks

SYMBOLS = ["<pad>", "<eos>", *"0123456789+="]
AVERAGES = ("dapo", "bnpo", "dr_grpo", "grpo")
PROMPTS = Dataset.from_dict({"prompt": ["1+2=", "3+4=", "5+1=", "2+2="]})
BAND = IPOConfig(dppo_mask_low=0.5, dppo_mask_high=2.0, kl_tau=0.1)
NO_BAND = IPOConfig(dppo_mask_low=0.0, dppo_mask_high=math.inf, kl_tau=0.0)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    symbols = Tokenizer(models.WordLevel({s: i for i, s in enumerate(SYMBOLS)}, unk_token="<pad>"))
    symbols.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=symbols, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def policy(experts: bool = False) -> transformers.PreTrainedModel:
    sizes = {
        "vocab_size": len(SYMBOLS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if not experts:
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **sizes,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            output_router_logits=True,
        )
    )


def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
    """Completions as an engine returns them: its log-probabilities (some missing), its turns."""
    lengths = [1 + int(n) for n in torch.randint(6, (len(prompts),))]
    end = SYMBOLS.index("<eos>")
    completions = [torch.randint(2, len(SYMBOLS), (n,)).tolist() for n in lengths]
    out = {
        "prompt_ids": trainer.processing_class(prompts).input_ids,
        "completion_ids": [[*c[:-1], end] if i % 2 else c for i, c in enumerate(completions)],
        "logprobs": [(-1.5 - 2 * torch.rand(n)).tolist() for n in lengths],
        "env_mask": [[int(i % 3 != 1) for i in range(n)] for n in lengths],
    }
    out["logprobs"][0][0] = None  # one that the engine could not score
    return out


class Engine:
    """Stands for TRL's ``VLLMGeneration``, which needs vLLM: random completions, as it returns."""

    logprobs_mode = "processed_logprobs"

    def __init__(self, **options: object) -> None:
        info = {"model_config": {"logprobs_mode": self.logprobs_mode}}
        self.vllm_client = SimpleNamespace(get_server_info=lambda: info)

    def sync_weights(self) -> None:
        pass

    def generate(self, prompts: list[list[int]], **_: object) -> tuple:
        lengths = [1 + int(n) for n in torch.randint(6, (len(prompts),))]
        completions = [torch.randint(2, len(SYMBOLS), (n,)).tolist() for n in lengths]
        logprobs = [(-1.5 - 2 * torch.rand(n, 1)).tolist() for n in lengths]
        return prompts, completions, logprobs, None


TINY = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 8,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def rewards(completions: list[str], **_: object) -> list[float]:
    return [float(text.count("1")) for text in completions]


def trainer_of(
    kind: type[GRPOTrainer] = IPOTrainer,
    *,
    model: transformers.PreTrainedModel | None = None,
    rollout_func: Callable | None = None,
    ipo_config: IPOConfig | None = None,
    **options,
) -> GRPOTrainer:
    return kind(
        model=model if model is not None else policy(),
        reward_funcs=rewards,
        args=GRPOConfig(**TINY | options),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS,
        processing_class=tokenizer(),
        **({"rollout_func": rollout_func} if rollout_func else {}),
        **({"ipo_config": ipo_config} if ipo_config else {}),
    )


def train_with(trainer: GRPOTrainer, check: Callable) -> int:
    """Trains while ``check(model, inputs, loss, gradients)`` sees every micro-batch."""
    compute, checked = trainer._compute_loss, []

    def checking(model, inputs):
        loss = compute(model, inputs)
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        check(model, inputs, loss, gradients)
        checked.append(loss.item())
        return loss

    trainer._compute_loss = checking
    trainer.train()
    return len(checked)


def averaged(losses: torch.Tensor, mask: torch.Tensor, inputs: dict, how: str) -> torch.Tensor:
    """As TRL documents its loss types, for one process and two accumulated micro-batches."""
    if how == "dapo":
        return losses.sum() / inputs["num_items_in_batch"]
    if how == "bnpo":
        return losses.sum() / mask.sum() / 2
    if how == "dr_grpo":
        return losses.sum() / (len(mask) * 8) / 2
    return (losses.sum(1) / mask.sum(1).clamp(min=1)).mean() / 2


@pytest.mark.parametrize("loss_type", AVERAGES)
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_training_on_an_engines_logprobs_equals_eager(loss_type: str, mask_truncated: bool) -> None:
    model = policy()
    twin = copy.deepcopy(model).double()  # before TRL patches its forward
    trainer = trainer_of(
        model=model,
        rollout_func=rollout,
        ipo_config=BAND,
        loss_type=loss_type,
        temperature=0.7,
        mask_truncated_completions=mask_truncated,
    )
    shares = []

    def check(model, inputs, loss, gradients) -> None:
        twin.load_state_dict(model.state_dict())
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length = inputs["completion_ids"].shape[1]
        logits = twin(tokens, attention_mask=attention).logits[:, -length - 1 : -1] / 0.7
        labels = inputs["completion_ids"][..., None]
        logprobs = logits.log_softmax(-1).gather(-1, labels).squeeze(-1)
        mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        sampled = inputs["sampling_per_token_logps"].double()
        losses = token_losses(logprobs, sampled, inputs["advantages"][:, None], mask, BAND)
        expected = averaged(losses, mask, inputs, loss_type)

        theirs = torch.autograd.grad(expected, list(twin.parameters()))
        assert_same_step(loss, expected, gradients, theirs)
        shares.append((losses == 0)[mask].double().mean().item())

    before = copy.deepcopy(model.state_dict())
    assert train_with(trainer, check) == 6
    assert 0 < sum(shares) / len(shares) < 1, "some tokens are to be dropped, and some kept"
    assert any((value != before[name]).any() for name, value in model.state_dict().items())


@pytest.mark.parametrize("loss_type", AVERAGES)
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_without_a_band_on_policy_it_is_trls_own_loss(loss_type: str, experts: bool) -> None:
    """There both are -A with the gradient of -A log p, so all that is left is TRL's averaging."""
    trainer = trainer_of(model=policy(experts), ipo_config=NO_BAND, loss_type=loss_type)

    def check(model, inputs, loss, gradients) -> None:
        expected = GRPOTrainer._compute_loss(trainer, model, inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
        theirs = torch.autograd.grad(expected, list(model.parameters()))
        torch.testing.assert_close(gradients, theirs, rtol=1e-4, atol=1e-6)

    assert train_with(trainer, check) == 6


def test_off_policy_steps_take_the_policy_that_generated() -> None:
    trainer = trainer_of(ipo_config=NO_BAND, num_iterations=2, max_steps=4)
    ratios = []

    def check(model, inputs, loss, gradients) -> None:
        assert "old_per_token_logps" in inputs
        ratios.append(trainer._ipo_metrics["train"]["log_ratio_max"].item())

    train_with(trainer, check)
    assert max(map(abs, ratios)) > 1e-3


def test_metrics_are_those_of_all_micro_batches_since_the_last_log() -> None:
    trainer = trainer_of(rollout_func=rollout, ipo_config=BAND)
    kept = []

    def check(model, inputs, loss, gradients) -> None:
        kept.append(trainer._ipo_metrics["train"])  # of the step so far

    train_with(trainer, check)
    logs = [log for log in trainer.state.log_history if "ipo/is_masked" in log]
    assert len(logs) == 3
    for log, metrics in zip(logs, kept[1::2], strict=True):
        assert {f"ipo/{name}" for name, _ in metrics.items()} <= set(log)
        assert log["ipo/is_masked"] == pytest.approx(metrics["is_masked"].item())
        assert "entropy" in log
    assert logs[0]["ipo/nonfinite"] > 0  # the token without a log-probability


def test_what_was_not_measured_is_not_logged_and_said_once() -> None:
    trainer = trainer_of()
    with pytest.warns(UserWarning, match="no log-probabilities of what sampled") as warned:
        trainer.train()
    assert len([w for w in warned if "what sampled" in str(w.message)]) == 1
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == 3
    for log in logs:
        assert {name for name in log if "ipo/" in name} == {"ipo/pg_loss", "ipo/nonfinite"}


@pytest.mark.parametrize("measured", [{"rollout_func": rollout}, {"num_iterations": 2}])
def test_what_was_measured_is_logged(measured: dict) -> None:
    trainer = trainer_of(**measured)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no log-probabilities")
        trainer.train()
    assert {"ipo/ess", "ipo/mismatch_kl"} <= set(trainer.state.log_history[0])


def repeatable_rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
    """Completions that depend on the prompt and the place in its group alone, not on the rank."""
    out = {"prompt_ids": trainer.processing_class(prompts).input_ids}
    out["completion_ids"], out["logprobs"] = [], []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(1000 * (i % 4) + sum(map(ord, prompt)))
        length = 1 + int(torch.randint(6, (), generator=generator))
        tokens = torch.randint(2, len(SYMBOLS), (length,), generator=generator)
        logprobs = -1.5 - 2 * torch.rand(length, generator=generator)
        out["completion_ids"].append(tokens.tolist())
        out["logprobs"].append(logprobs.tolist())
    return out


TrainedWeightsAndLogs = tuple[dict[str, torch.Tensor], list[dict[str, float]]]


def trained_two_steps(make: Callable[..., Any], ranks: int) -> TrainedWeightsAndLogs:
    """By the trainer that ``make`` makes, from the same start and on the same eight rows."""
    torch.manual_seed(0)
    rows = {"per_device_train_batch_size": 8 // ranks, "max_steps": 2}
    trainer = make(ipo_config=BAND, optim="sgd", learning_rate=1.0, **rows)
    assert trainer.accelerator.num_processes == ranks
    trainer.train()
    return trainer.model.state_dict(), trainer.state.log_history[:2]


def trained(ranks: int) -> TrainedWeightsAndLogs:
    return trained_two_steps(functools.partial(trainer_of, rollout_func=repeatable_rollout), ranks)


def assert_two_ranks_train_as_one(train: Callable[[int], TrainedWeightsAndLogs]) -> None:
    (weights, logs), _ = on_ranks(train, 2)
    expected, expected_logs = train(1)
    torch.testing.assert_close(weights, expected)
    for log, expected_log in zip(logs, expected_logs, strict=True):
        assert 0 < log["ipo/is_masked"] < 1
        for name in (name for name in log if name.startswith("ipo/")):
            assert log[name] == pytest.approx(expected_log[name], rel=1e-4, abs=1e-6), name


def test_two_ranks_train_as_one() -> None:
    assert_two_ranks_train_as_one(trained)


def test_evaluates() -> None:
    trainer = trainer_of(rollout_func=rollout, ipo_config=BAND)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert "eval_ipo/is_masked" in trainer.state.log_history[-1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("loss_type", "cispo"),
        ("loss_type", "sapo"),
        ("loss_type", "luspo"),
        ("loss_type", "vespo"),
        ("beta", 0.1),
        ("epsilon", 0.3),
        ("epsilon_high", 0.3),
        ("delta", 2.0),
        ("importance_sampling_level", "sequence"),
        ("off_policy_mask_threshold", 0.5),
        ("top_entropy_quantile", 0.5),
        ("entropy_coef", 0.01),
        ("use_adaptive_entropy", True),
        ("sapo_temperature_neg", 2.0),
        ("vespo_k_pos", 1.0),
    ],
)
def test_an_option_that_is_not_honoured_raises(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{option}: expected .*, got {value!r}"):
        trainer_of(**{option: value})


def test_every_option_of_a_loss_is_accounted_for() -> None:
    """A new option of a later TRL's loss is honoured or refused here before it is released."""
    import inspect

    source = inspect.getsource(GRPOTrainer._compute_loss)
    read = {name for name in GRPOConfig.__dataclass_fields__ if f"args.{name}" in source}
    read |= {name for name in vars(trainer_of()) if f"self.{name}" in source} & set(
        GRPOConfig.__dataclass_fields__
    )
    honoured = {
        "loss_type",
        "steps_per_generation",
        "router_aux_loss_coef",
        "use_bias_correction_kl",  # of beta, which is refused
        "entropy_coef_delta",  # these four of use_adaptive_entropy, which is refused
        "entropy_coef_max",
        "entropy_coef_min",
        "entropy_target",
        "use_vllm",
        "vllm_importance_sampling_correction",
        "max_completion_length",
    }
    assert read <= honoured | set(trl_options.NOT_HONOURED)


WITH_OTHER_OPTIONS = {  # read with one that is refused, or with TRL's correction, which is off
    *("use_bias_correction_kl", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
    *("entropy_target", "vllm_importance_sampling_mode", "vllm_importance_sampling_cap"),
    *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
}
TRLS_OWN = {  # what IPOTrainer and AsyncIPOTrainer leave to TRL
    *("router_aux_loss_coef", "loss_type", "temperature", "generation_kwargs"),
    *("vllm_importance_sampling_correction", "mask_truncated_completions", "reward_weights"),
    *("multi_objective_aggregation", "scale_rewards", "num_generations", "num_generations_eval"),
    *("generation_batch_size", "steps_per_generation", "ds3_gather_for_generation"),
    "fork_threshold_tokens",
}


@pytest.mark.parametrize("kind", [GRPOConfig, AsyncGRPOConfig])
def test_every_option_that_may_touch_the_loss_is_known(kind: type) -> None:
    added = kind.__dataclass_fields__.keys() - transformers.TrainingArguments.__dataclass_fields__
    warned_of = set(trl_options._SAMPLING)
    known = WITH_OTHER_OPTIONS | TRLS_OWN | warned_of | trl_options.NOT_HONOURED.keys()
    assert_all_are_known(added, known)


@pytest.mark.parametrize("place", ["by keyword", "by position"])
def test_a_second_correction_for_the_engine_raises_before_anything_is_up(place: str) -> None:
    args = GRPOConfig(**TINY, use_vllm=True)
    given = ((), {"args": args}) if place == "by keyword" else ((args,), {})
    with pytest.raises(ValueError, match="vllm_importance_sampling_correction: expected False"):
        IPOTrainer("no/such/model", rewards, *given[0], train_dataset=PROMPTS, **given[1])


def test_without_a_second_correction_the_engine_is_started() -> None:
    args = GRPOConfig(**TINY, use_vllm=True, vllm_importance_sampling_correction=False)
    with pytest.raises(OSError, match="no/such/model"):
        IPOTrainer("no/such/model", rewards, args, train_dataset=PROMPTS)


@pytest.mark.parametrize(
    ("generation_kwargs", "message"),
    [
        ({"temperature": 0.7}, r"\['temperature'\]: expected temperature, 0\.9, .*, got 0\.7"),
        ({"logprobs": 5}, r"\['logprobs'\]: expected 0, got 5"),
        ({"logprobs": None}, r"\['logprobs'\]: expected 0, got None"),
    ],
)
def test_what_makes_the_engines_logprobs_wrong_raises(
    generation_kwargs: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=r"generation_kwargs" + message):
        trainer_of(temperature=0.9, generation_kwargs=generation_kwargs)


def test_of_more_logprobs_than_one_trl_takes_the_first_by_rank() -> None:
    """Why they are refused; the sampled token, 8, is the second."""
    position = {8: SimpleNamespace(logprob=-2.0, rank=2), 3: SimpleNamespace(logprob=-0.1, rank=1)}
    output = SimpleNamespace(outputs=[SimpleNamespace(logprobs=[position])])
    (((first, _),),), _ = extract_logprobs([output])
    assert first == -0.1


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"vllm_structured_outputs_regex": "[0-9]+"},
        {"generation_kwargs": {"repetition_penalty": 1.2}},
        {"generation_kwargs": {"presence_penalty": 0.5}},
        {"generation_kwargs": {"num_beams": 2}},
        {"generation_kwargs": {"logit_bias": {3: 1.0}}},
        {"generation_kwargs": {"a_later_engines_option": 1}},
    ],
)
def test_what_bends_the_ratio_is_named_once(options: dict) -> None:
    ((name, value),) = options.get("generation_kwargs", options).items()
    with pytest.warns(UserWarning, match="drawn from another distribution") as warned:
        trainer_of(**options)
    (message,) = [str(w.message) for w in warned if "distribution" in str(w.message)]
    assert message.startswith(f"{name}={value!r}: ")


def test_sampling_from_the_policy_warns_of_nothing() -> None:
    options = {
        "top_p": 1.0,
        "temperature": 0.7,
        "generation_kwargs": {"temperature": 0.7, "logprobs": 0, "top_k": -1, "stop": ["="]},
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*distribution")
        trainer_of(**options, rollout_func=rollout)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits"])
def test_a_server_that_reports_other_logprobs_raises(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)
    server = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_importance_sampling_correction": False,
    }
    trainer_of(**server)
    monkeypatch.setattr(Engine, "logprobs_mode", mode)
    with pytest.raises(ValueError, match=f"expected processed_logprobs, got {mode}"):
        trainer_of(**server)


@pytest.mark.parametrize("name", ["logprobs", "env_mask"])
@pytest.mark.parametrize("rows_off", ["a row is short", "a row is long", "a row is missing"])
def test_what_trl_would_pad_raises(name: str, rows_off: str) -> None:
    def careless(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        out = rollout(prompts, trainer)
        if rows_off == "a row is missing":
            del out[name][1]
        elif rows_off == "a row is short":
            del out[name][1][-1]
        else:
            out[name][1].append(1)
        return out

    with pytest.raises(ValueError, match=rf"{name}\[1\]: expected the length of completion_ids"):
        trainer_of(rollout_func=careless).train()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("completion_ids", [], r"completion_ids\[1\]: expected at least one token"),
        ("env_mask", [0.5] * 9, r"env_mask\[1\]: expected 0 or 1 for each token, got 0\.5"),
    ],
)
def test_a_malformed_rollout_raises(name: str, value: list, message: str) -> None:
    def careless(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        out = rollout(prompts, trainer)
        out[name][1] = value[: len(out[name][1])]
        return out

    with pytest.raises(ValueError, match=message):
        trainer_of(rollout_func=careless).train()


def test_a_rollout_without_a_required_key_is_trls_to_refuse() -> None:
    trainer = trainer_of(rollout_func=lambda prompts, trainer: {"logprobs": [[-1.0]]})
    with pytest.raises(ValueError, match="rollout_func must return keys"):
        trainer.train()


def test_masks_as_floats_and_truth_values_train_as_integers_do() -> None:
    def losses(kind: type) -> list[float]:
        def masked(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
            out = rollout(prompts, trainer)
            out["env_mask"] = [[kind(value) for value in row] for row in out["env_mask"]]
            return out

        torch.manual_seed(0)
        trainer = trainer_of(rollout_func=masked, ipo_config=BAND)
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    assert losses(int) == losses(float) == losses(bool)


def test_logprobs_of_whole_numbers_train_as_floats() -> None:
    """A sampler's certain token has 0, which JSON hands over without its point."""

    def losses(kind: type) -> list[float]:
        def certain(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
            out = rollout(prompts, trainer)
            out["logprobs"][0] = [kind(-2) for _ in out["logprobs"][0]]
            return out

        torch.manual_seed(0)
        trainer = trainer_of(rollout_func=certain, ipo_config=BAND)
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    assert losses(int) == losses(float)


@pytest.mark.parametrize("value", ["-1.5", True])
def test_logprobs_that_are_no_numbers_raise(value: object) -> None:
    def careless(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        out = rollout(prompts, trainer)
        out["logprobs"][1][0] = value
        return out

    with pytest.raises(TypeError, match=r"logprobs\[1\]: expected a number for each token"):
        trainer_of(rollout_func=careless).train()


@pytest.mark.parametrize("loss_type", AVERAGES)
@pytest.mark.parametrize("nothing", ["masked", "not a log-probability"])
def test_a_micro_batch_that_trains_nothing_runs_backward(loss_type: str, nothing: str) -> None:
    def empty(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        out = rollout(prompts, trainer)
        name, value = ("env_mask", 0) if nothing == "masked" else ("logprobs", math.nan)
        out[name] = [[value for _ in row] for row in out[name]]
        return out

    def check(model, inputs, loss, gradients) -> None:
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in gradients)

    trainer = trainer_of(rollout_func=empty, ipo_config=BAND, loss_type=loss_type, max_steps=1)
    assert train_with(trainer, check) == 2
    assert trainer.state.log_history[0]["ipo/nonfinite"] == (0 if nothing == "masked" else 1)


def test_a_teacher_raises() -> None:
    with pytest.raises(ValueError, match=r"ipo_config.teacher_tau: expected 0, got 0\.5"):
        trainer_of(ipo_config=IPOConfig(teacher_tau=0.5))


def test_the_guide_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its block as it stands, but for sizes, and on something that stands for vLLM."""
    policy().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")

    def tiny(**options: object) -> GRPOConfig:
        return GRPOConfig(**options | TINY)

    monkeypatch.setattr(trl, "GRPOConfig", tiny)
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)
    names = {"model": str(tmp_path / "model"), "reward_funcs": rewards, "data": PROMPTS}
    block, _ = blocks_of_host("trl")
    block.run(names)
    logs = names["trainer"].state.log_history
    assert sum("ipo/is_masked" in log for log in logs) == TINY["max_steps"]


# ---------------------------------------------------------------------------------------------
# The asynchronous trainer: its queue, its packing and its loop, without vLLM and FlashAttention


def stand_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packing, "_flash_attn", lambda: async_rollouts.kernels)
    patch.setattr(async_module, "VLLMClient", async_rollouts.Server)
    patch.setattr(async_module, "get_peak_flops_per_device", lambda *_: None)  # asks CUDA


@pytest.fixture
def saved_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    stand_in(monkeypatch)
    policy(experts=getattr(request, "param", False)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def rollout_samples(count: int, version: int = 1) -> list:
    """Pairs that share a prompt; an environment's token within, one without a log-probability."""
    samples = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i // 2)
        prompt = torch.randint(2, len(SYMBOLS), (3,), generator=generator).tolist()
        length = 2 + i % 4
        logprobs = (-1.5 - 2 * torch.rand(length)).tolist()
        logprobs[1] = math.nan if i == 3 else logprobs[1]
        samples.append(
            async_rollouts.sample(
                prompt,
                torch.randint(2, len(SYMBOLS), (length,)).tolist(),
                logprobs=logprobs,
                mask=[int(n != 2) for n in range(length)],
                advantage=1.0 - 0.7 * (i % 3),
                group=i // 2,
                version=version,
            )
        )
    return samples


def async_trainer_of(
    model: str,
    samples: list,
    kind: type[AsyncGRPOTrainer] = AsyncIPOTrainer,
    ipo_config: IPOConfig | None = None,
    worker: object = None,
    **options: object,
) -> AsyncGRPOTrainer:
    sizes = {name: value for name, value in TINY.items() if "eval" not in name}
    return kind(
        model,
        rewards,
        args=AsyncGRPOConfig(**sizes | {"token_budget": 0} | options),
        train_dataset=PROMPTS,
        rollout_worker=worker or async_rollouts.Worker(samples),
        weight_transfer=async_rollouts.NoTransfer(),
        **({"ipo_config": ipo_config} if ipo_config else {}),
    )


def train_async(trainer: AsyncGRPOTrainer, check: Callable) -> int:
    """Trains while ``check(samples, loss, gradients)`` sees every micro-batch."""
    compute, checked, packed = trainer.compute_loss, [], []
    pack = async_module.DataCollatorForRollout.torch_call

    def packing_what(collator, examples):
        packed.append([s for row in examples[0] for s in row.samples])
        return pack(collator, examples)

    def checking(model, inputs, **others):
        loss = compute(model, inputs, **others)
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        check(packed[len(checked)], loss, gradients)
        checked.append(loss.item())
        return loss

    trainer.compute_loss = checking
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_module.DataCollatorForRollout, "torch_call", packing_what)
        trainer.train()
    return len(checked)


def unpacked_terms(model: torch.nn.Module, samples: list) -> list[tuple[torch.Tensor, ...]]:
    """Of each sample alone: log-probabilities, the engine's, advantages and the mask."""
    terms = []
    for item in samples:
        tokens = torch.as_tensor(item["input_ids"])
        logits = model(tokens[None]).logits[0, :-1] / 0.7
        logprobs = logits.log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)
        mask = torch.as_tensor(item["completion_mask"])[1:].bool()
        sampled = torch.as_tensor(item["old_log_probs"])[1:].double()
        terms.append((logprobs, sampled, torch.tensor(item["advantage"]).double(), mask))
    return terms


@pytest.mark.parametrize("config", [IPOConfig.geometric(0.9, 1.1), IPOConfig.sequence_tis()])
def test_asynchronous_rows_are_cut_where_samples_end(config: IPOConfig) -> None:
    trainer = SimpleNamespace(ipo_config=config)
    ends = AsyncIPOTrainer._cu_seqlens(trainer, torch.tensor([0, 0, 0, 1, 1, 2]))
    assert ends.tolist() == [0, 3, 5, 6]


@pytest.mark.parametrize("token_budget", [0, 40], ids=["by count", "by tokens"])
@pytest.mark.parametrize("rollout_min_ratio", [0.0, 0.3])
def test_asynchronous_training_equals_eager(
    saved_policy: str, token_budget: int, rollout_min_ratio: float
) -> None:
    config = IPOConfig(
        dppo_mask_low=0.5, dppo_mask_high=2.0, kl_tau=0.1, rollout_min_ratio=rollout_min_ratio
    )
    trainer = async_trainer_of(
        saved_policy,
        rollout_samples(60),
        ipo_config=config,
        token_budget=token_budget,
        temperature=0.7,
    )
    twin = transformers.Qwen2ForCausalLM.from_pretrained(saved_policy).double()
    shares = []

    def check(samples: list, loss: torch.Tensor, gradients: tuple) -> None:
        twin.load_state_dict(trainer.model.state_dict())
        losses, tokens = [], 0
        for logprobs, sampled, advantage, mask in unpacked_terms(twin, samples):
            x = (logprobs - sampled).detach()
            broken = (mask & (x < math.log(config.rollout_min_ratio or 1e-300))).any()
            kept = mask & ~broken
            losses.append(token_losses(logprobs, sampled, advantage, kept, config))
            tokens += int(mask.sum())
            shares.append((losses[-1] == 0)[mask].double().mean().item())
        expected = torch.cat(losses).sum() / tokens / 2
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
        for ours, theirs in zip(
            gradients, torch.autograd.grad(expected, list(twin.parameters())), strict=True
        ):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)

    assert train_async(trainer, check) == 6
    assert 0 < sum(shares) / len(shares) < 1, "some tokens are to be dropped, and some kept"


@pytest.mark.parametrize("saved_policy", [False, True], ids=["dense", "experts"], indirect=True)
def test_asynchronously_without_a_band_on_policy_it_is_trls_own_loss(saved_policy: str) -> None:
    """On policy TRL clips nothing: all that is left is its averaging and the experts' balance."""
    twin = transformers.AutoModelForCausalLM.from_pretrained(saved_policy)
    samples = rollout_samples(16)
    for item in samples:
        with torch.no_grad():
            ((logprobs, *_),) = unpacked_terms(twin, [dataclasses.asdict(item)])
        item.old_log_probs[1:] = logprobs.numpy()
    losses = {}
    for kind, options in ((AsyncIPOTrainer, {"ipo_config": NO_BAND}), (AsyncGRPOTrainer, {})):
        trainer = async_trainer_of(
            saved_policy, samples, kind, max_steps=1, temperature=0.7, **options
        )
        seen = losses.setdefault(kind, [])
        train_async(trainer, lambda _, *outcome, seen=seen: seen.append(outcome))
    for ours, theirs in zip(*losses.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_asynchronously_stale_samples_are_dropped_and_metrics_logged(saved_policy: str) -> None:
    samples = rollout_samples(40)
    for item in samples[::5]:
        item.model_version = -9  # further behind than max_staleness
    trainer = async_trainer_of(saved_policy, samples, ipo_config=BAND)
    kept = []
    train_async(trainer, lambda *_: kept.append(trainer._ipo_metrics))
    logs = [log for log in trainer.state.log_history if "ipo/is_masked" in log]
    assert len(logs) == 3
    assert logs[0]["sample/dropped_stale_total"] > 0
    for log, metrics in zip(logs, kept[1::2], strict=True):
        for name, value in metrics.items():
            assert log[f"ipo/{name}"] == pytest.approx(value.item()), name
        assert {"entropy", "perf/fwd_bwd_s", "batch/groups_per_step"} <= set(log)
        assert not {"ratio", "clip_ratio/low_mean"} & set(log)
    assert trainer.rollout_worker.versions == [1, 2, 3, 4]


def test_an_asynchronous_row_without_trained_tokens_runs_backward(saved_policy: str) -> None:
    """TRL's own trainer raises there, of the largest of no sample."""
    samples = rollout_samples(16)
    for item in samples:
        item.completion_mask[:] = 0
    trainer = async_trainer_of(saved_policy, samples, max_steps=1)

    def check(_: list, loss: torch.Tensor, gradients: tuple) -> None:
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in gradients)

    assert train_async(trainer, check) == 2


def trained_asynchronously(model: str, ranks: int) -> TrainedWeightsAndLogs:
    def make(**options: Any) -> AsyncGRPOTrainer:
        return async_trainer_of(model, rollout_samples(48), **options)

    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        return trained_two_steps(make, ranks)


def test_two_ranks_train_asynchronously_as_one(saved_policy: str) -> None:
    assert_two_ranks_train_as_one(functools.partial(trained_asynchronously, saved_policy))


def test_the_guide_trains_asynchronously(
    saved_policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Worker(async_rollouts.Worker):
        def __init__(self, **_: object) -> None:
            super().__init__(rollout_samples(60))
            self._loop_kwargs: dict[str, object] = {}

    def tiny(**options: object) -> AsyncGRPOConfig:
        sizes = {name: value for name, value in TINY.items() if "eval" not in name}
        return AsyncGRPOConfig(**options | sizes | {"token_budget": 0})

    monkeypatch.setattr(trl.experimental.async_grpo, "AsyncGRPOConfig", tiny)
    monkeypatch.setattr(async_module, "AsyncRolloutWorker", Worker)
    monkeypatch.setattr(
        async_module, "WeightTransferClient", lambda **_: async_rollouts.NoTransfer()
    )
    names = {"model": saved_policy, "reward_funcs": rewards, "data": PROMPTS}
    _, block = blocks_of_host("trl")
    block.run(names)
    logs = names["trainer"].state.log_history
    assert sum("ipo/is_masked" in log for log in logs) == TINY["max_steps"]


@pytest.mark.parametrize(("option", "value"), [("epsilon", 0.3), ("epsilon_high", 0.28)])
def test_asynchronously_bounds_of_trl_raise(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{option}: expected the default .*, got {value}"):
        async_trainer_of("no/such/model", [], **{option: value})


def test_asynchronously_what_bends_the_ratio_is_named(saved_policy: str) -> None:
    with pytest.warns(UserWarning, match=r"^top_p=0\.9: completions are drawn from another"):
        async_trainer_of(saved_policy, [], top_p=0.9)


def test_asynchronously_a_teacher_raises() -> None:
    with pytest.raises(ValueError, match=r"ipo_config\.teacher_tau: expected 0, got 0\.5"):
        async_trainer_of("no/such/model", [], ipo_config=IPOConfig(teacher_tau=0.5))


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_asynchronously_the_servers_logprobs_are_checked_before_training(
    saved_policy: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_rollouts.Server, "logprobs_mode", mode)
    worker = object.__new__(async_module.AsyncRolloutWorker)  # TRL's, without its process
    worker.rollout_buffer = None
    trainer = async_trainer_of(saved_policy, [], worker=worker)
    if mode == "processed_logprobs":
        trainer.get_train_dataloader()
    else:
        with pytest.raises(ValueError, match="expected processed_logprobs, got raw_logprobs"):
            trainer.get_train_dataloader()


def test_every_option_of_the_asynchronous_trainer_is_accounted_for() -> None:
    """A new option that its loss reads is honoured or refused here before it is released."""
    import inspect

    source = inspect.getsource(AsyncGRPOTrainer.compute_loss)
    read = {name for name in AsyncGRPOConfig.__dataclass_fields__ if f"self.{name}" in source}
    read |= {name for name in AsyncGRPOConfig.__dataclass_fields__ if f"args.{name}" in source}
    assert "epsilon" in read
    assert read <= {"router_aux_loss_coef"} | set(trl_options.NOT_HONOURED)
