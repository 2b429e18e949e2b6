"""The demo: its task, its rollouts, a smoke run by command line, and the default run's claims."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from ipo_ext import demo, ipo_loss
from ipo_ext.demo import report, rollout, task, train

ONE_PROMPT = torch.tensor([[7, 38]])


def texts(tokens: torch.Tensor) -> list[str]:
    return ["".join(task.VOCABULARY[token] for token in row) for row in tokens.tolist()]


@pytest.fixture(scope="module")
def policy() -> train.Policy:
    return train.warm_up(train.Settings(warmup_steps=1))


@pytest.fixture
def rollouts(policy: train.Policy) -> rollout.Rollouts:
    generator = torch.Generator().manual_seed(3)
    operands = task.sample_operands(64, generator)
    return rollout.sample_rollouts(rollout.inference_copy(policy, "int4"), operands, generator)


@pytest.fixture
def rewarded(rollouts: rollout.Rollouts) -> rollout.Rollouts:
    """The rollouts with half of the rewards 1: advantages of both signs, whatever was sampled."""
    return dataclasses.replace(rollouts, rewards=torch.arange(64.0) % 2)


def test_prompts_and_answers_read_as_additions() -> None:
    operands = torch.tensor([[7, 38], [0, 0], [49, 49]])
    assert texts(task.prompts(operands)) == ["07+38=", "00+00=", "49+49="]
    assert texts(task.answers(operands)) == ["45..", "0...", "98.."]


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("45..", 1.0),
        ("45.7", 1.0),  # what follows the first END was never part of the answer
        ("46..", 0.0),
        ("45+.", 0.0),
        ("455.", 0.0),
        ("4545", 0.0),  # never ends
        ("4.5.", 0.0),
        ("....", 0.0),
    ],
)
def test_verifier_rewards_exactly_the_sum_and_an_end(response: str, reward: float) -> None:
    assert task.verify(task.encode(response).unsqueeze(0), ONE_PROMPT).item() == reward


def test_every_right_answer_is_rewarded_and_no_other_pair_gets_it() -> None:
    operands = torch.cartesian_prod(*[torch.arange(task.OPERANDS)] * 2)
    right = task.answers(operands)
    assert task.verify(right, operands).all()
    assert not task.verify(right, operands.roll(1, dims=0)).any()  # neighbours differ in their sum


def test_loss_mask_covers_sampled_tokens_up_to_the_first_end(rollouts: rollout.Rollouts) -> None:
    labels = texts(rollouts.tokens[:, 1:])
    for label, mask in zip(labels, rollouts.loss_mask.tolist(), strict=True):
        response = label[task.PROMPT_LENGTH - 1 :]
        length = len(response.split(".")[0] + ".") if "." in response else len(response)
        expected = [False] * (task.PROMPT_LENGTH - 1) + [True] * length
        assert mask == expected + [False] * (task.RESPONSE_LENGTH - length)


def test_sampler_reports_the_log_probabilities_that_it_sampled_from(policy: train.Policy) -> None:
    generator = torch.Generator().manual_seed(3)
    operands = task.sample_operands(64, generator)
    exact = rollout.sample_rollouts(rollout.inference_copy(policy, "none"), operands, generator)
    with torch.no_grad():
        trainer = train.token_logprobs(policy, exact.tokens)
    mask = exact.loss_mask
    torch.testing.assert_close(exact.inference_logprobs[mask], trainer[mask])


def test_coarser_rounding_means_more_mismatch(policy: train.Policy) -> None:
    def mismatch(rounding: str) -> float:
        generator = torch.Generator().manual_seed(3)
        sampler = rollout.inference_copy(policy, rounding)
        operands = task.sample_operands(256, generator)
        sampled = rollout.sample_rollouts(sampler, operands, generator)
        with torch.no_grad():
            x = train.token_logprobs(policy, sampled.tokens) - sampled.inference_logprobs
        return x[sampled.loss_mask].abs().mean().item()

    none, bf16, int8, int4 = map(mismatch, ("none", "bf16", "int8", "int4"))
    assert none < 1e-5 < bf16 < int4
    assert int8 < int4


@pytest.mark.parametrize("rounding", ["fp8", "int8", "int4"])
def test_rounding_keeps_the_largest_weight_and_stays_within_half_a_step(rounding: str) -> None:
    weight = torch.randn(5, 3 * rollout.SCALE_GROUP, generator=torch.Generator().manual_seed(0))
    groups = weight.view(5, 3, -1)
    error = (rollout.round_weight(weight, rounding).view_as(groups) - groups).abs()
    largest = groups.abs().amax(dim=-1, keepdim=True)
    half_step = {"fp8": 16 / 448, "int8": 0.5 / 127, "int4": 0.5 / 7}[rounding]
    assert (error <= largest * half_step * (1 + 1e-5)).all()
    assert (error.gather(-1, groups.abs().argmax(-1, keepdim=True)) <= 1e-6 * largest).all()


def test_the_copy_is_separate_and_frozen(policy: train.Policy) -> None:
    sampler = rollout.inference_copy(policy, "int4")
    before = [parameter.clone() for parameter in policy.parameters()]
    for parameter in sampler.parameters():
        assert not parameter.requires_grad
        parameter.zero_()
    assert all(map(torch.equal, policy.parameters(), before))


def test_advantages_are_relative_to_the_samples_of_the_same_prompt() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.0, 0.0, 0.0, 0.0])
    assert torch.equal(train.group_advantages(rewards, group=4), expected)


def test_prompt_and_tail_tokens_get_no_gradient(
    policy: train.Policy, rewarded: rollout.Rollouts
) -> None:
    hidden = policy(rewarded.tokens[:, :-1]).detach().requires_grad_()
    with policy.register_forward_hook(lambda *_: hidden):
        output = train.policy_loss(policy, rewarded, 8, train.ARMS["no mask"])
    (gradient,) = torch.autograd.grad(output.loss, hidden)
    assert torch.equal((gradient != 0).any(-1), rewarded.loss_mask)


def test_the_loss_from_hidden_states_is_that_of_the_log_probabilities(
    policy: train.Policy, rewarded: rollout.Rollouts
) -> None:
    config = train.ARMS["mask + KL"]
    output = train.policy_loss(policy, rewarded, 8, config)
    logprobs = train.token_logprobs(policy, rewarded.tokens)
    advantages = train.group_advantages(rewarded.rewards, 8)
    expected = ipo_loss(
        logprobs,
        rewarded.inference_logprobs,
        advantages.unsqueeze(1).expand_as(logprobs),
        rewarded.loss_mask,
        normalizer=float(rewarded.loss_mask.sum()),
        config=config,
    )
    torch.testing.assert_close(output.loss, expected.loss)
    parameters = list(policy.parameters())
    gradients, wanted = (
        torch.autograd.grad(loss, parameters) for loss in (output.loss, expected.loss)
    )
    torch.testing.assert_close(gradients, wanted)


def test_a_run_repeats_itself_and_leaves_torchs_state_alone() -> None:
    settings = train.Settings(warmup_steps=10, steps=3, prompts=4, threads=1)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    seen: list[train.StepRecord] = []
    first = train.run(settings, seen.append)
    second = train.run(settings)
    assert [result.history for result in first] == [result.history for result in second]
    assert seen == [record for result in first for record in result.history]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("staleness", 0), ("group", -1), ("rounding", "int3")]
)
def test_settings_refuse_what_makes_no_sense(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected .* got {value!r}"):
        train.Settings(**{name: value})  # type: ignore[arg-type]


def test_smoke_run_through_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, numbers = tmp_path / "run.png", tmp_path / "run.json"
    assert demo.main(["--smoke", "--output", str(picture), "--json", str(numbers)]) == 0
    (only,) = json.loads(numbers.read_text())["runs"]
    assert only["seed"] == 0
    for arm in only["arms"]:
        assert len(arm["history"]) == demo.SMOKE.steps
        assert 0.3 < arm["warmup_reward"] < 0.8
        assert all(0 < record["reward"] < 1 for record in arm["history"])
        assert all(math.isfinite(record["mismatch_kl"]) for record in arm["history"])
        dropped = sum(record["dropped_low"] for record in arm["history"])
        assert dropped > 0 if arm["arm"] == "mask + KL" else dropped == 0
    printed = capsys.readouterr().out
    if "no picture" not in printed:
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert "final reward" in printed


def test_without_rich_and_matplotlib_it_prints_plain_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [*sys.modules, "rich", "matplotlib"]:
        if module.split(".")[0] in ("rich", "matplotlib"):
            monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(demo, "SMOKE", train.Settings(warmup_steps=2, steps=2, prompts=2))
    picture = tmp_path / "run.png"
    assert demo.main(["--smoke", "--output", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("mask + KL") for line in lines) == 3  # two steps, one table row
    assert lines[-1] == 'no picture: matplotlib is not installed (pip install "ipo_ext[demo]")'
    assert not picture.exists()


def test_rich_reporter_shows_both_arms_and_the_table() -> None:
    console = pytest.importorskip("rich.console").Console(
        file=io.StringIO(), force_terminal=True, width=160
    )
    settings = train.Settings(warmup_steps=2, steps=2, prompts=2)
    with report.RichReporter(settings, "which run", console) as reporter:
        results = train.run(settings, reporter.on_step)
    reporter.table(results)
    printed = console.file.getvalue()
    for text in ("which run", "mask + KL", "no mask", "2/2", "mismatch KL", "final reward"):
        assert text in printed


def test_several_seeds_are_several_runs_and_their_medians(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = train.Settings(warmup_steps=2, steps=2, prompts=2)
    monkeypatch.setattr(demo, "SMOKE", tiny)
    picture, numbers = tmp_path / "run.png", tmp_path / "run.json"
    argv = ["--smoke", "--seeds", "3,5-6", "--output", str(picture), "--json", str(numbers)]
    assert demo.main(argv) == 0
    runs = {run["seed"]: run["arms"] for run in json.loads(numbers.read_text())["runs"]}
    assert list(runs) == [3, 5, 6]
    for seed, arms in runs.items():
        alone = train.run(dataclasses.replace(tiny, seed=seed))
        histories = [[dataclasses.asdict(step) for step in arm.history] for arm in alone]
        assert [arm["history"] for arm in arms] == histories
    assert runs[3][0]["history"] != runs[5][0]["history"]
    printed = capsys.readouterr().out
    for text in ("seed 3 (1 of 3)", "seed 6 (3 of 3)", "medians over the seeds 3, 5, 6"):
        assert text in printed


def arm_result(arm: str, reward: float, kl: float) -> train.ArmResult:
    step = train.StepRecord(arm, 1, reward, 0.02, 0.001, kl, tokens=10)
    return train.ArmResult(arm, warmup_reward=0.5, history=[step], seconds=1.0)


def test_medians_and_ranges_are_those_of_each_arm() -> None:
    rewards = {"mask + KL": (0.7, 0.5, 0.6), "no mask": (0.1, 0.9, 0.2)}
    runs = {
        seed: [
            arm_result(arm, values[seed], kl=0.1 * (seed + 1)) for arm, values in rewards.items()
        ]
        for seed in range(3)
    }
    lines = report.median_table(runs).splitlines()
    assert lines[1] == "medians over the seeds 0, 1, 2"
    masked, lowest, highest, unmasked, *_ = (line.split() for line in lines[3:])
    shares = ["2.00%", "0.10%"]
    assert masked == ["mask", "+", "KL", "0.500", "0.600", *shares, "0.2000", "0.2000", "1.0"]
    assert lowest[:3] == ["lowest", "0.500", "0.500"]
    assert highest[:3] == ["highest", "0.500", "0.700"]
    assert unmasked[:4] == ["no", "mask", "0.500", "0.200"]
    assert lines[-1].split()[:3] == ["highest", "0.500", "0.900"]


def test_the_picture_of_several_seeds_shows_their_median_and_range() -> None:
    arm = report.Arm([arm_result("no mask", reward, 0.1) for reward in (0.25, 1.0, 0.5)])
    figure = pytest.importorskip("matplotlib.figure", reason="the picture needs it").Figure()
    axes = figure.subplots()
    report._line(axes, arm, "reward", scale=2)
    (line,), (band,) = axes.lines, axes.collections
    assert line.get_ydata().tolist() == [1.0]
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-4", [0, 1, 2, 3, 4]), ("7", [7]), ("0,3,7", [0, 3, 7])]
)
def test_seeds_are_written_as_a_range_or_a_list(text: str, seeds: list[int]) -> None:
    assert demo._parser().parse_args(["--seeds", text]).seeds == seeds


@pytest.mark.parametrize(
    "argv",
    [
        ["--bogus"],
        ["--steps", "0"],
        ["--rounding", "int3"],
        ["--staleness", "x"],
        ["--seeds", "4-0"],
        ["--seeds", "1,1"],
        ["--seeds", "one"],
        ["--seeds", "0-4", "--seed", "1"],
    ],
)
def test_bad_options_are_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        demo.main(argv)
    assert exit_.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.slow
def test_the_default_run_shows_what_it_claims() -> None:
    masked, unmasked = train.run(train.Settings())
    assert masked.mean_over_tokens("dropped_low") > 0.001
    assert masked.mean_over_tokens("dropped_high") > 0.0001
    assert masked.final_reward > masked.warmup_reward + 0.08
    rewards = {
        result.arm: sum(record.reward for record in result.history) / len(result.history)
        for result in (masked, unmasked)
    }
    assert rewards["mask + KL"] > rewards["no mask"] + 0.03
