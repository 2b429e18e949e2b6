"""prime-rl's interfaces, spoken by dataclasses of upstream's fields; prime-rl is not needed."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch

import ipo_ext
from ipo_ext import IPOConfig, reference
from ipo_ext.integrations import prime_rl
from tests.integrations.eager import record_step
from tests.support.cases import UPSTREAM_METRICS

SETTINGS = {"dppo_mask_low": 0.5, "dppo_mask_high": 2.0, "adv_tau": 0.9, "kl_tau": 0.01}
LENGTHS = (5, 1, 9)


@dataclasses.dataclass
class LossInputs:
    """Upstream's, of the version that has teacher log-probabilities."""

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    teacher_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor


@dataclasses.dataclass
class LaterLossInputs:
    """Upstream's, of the version whose loss has components."""

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None
    trainer_mask_logprobs: torch.Tensor | None = None
    inference_mask_logprobs: torch.Tensor | None = None


@dataclasses.dataclass
class CustomLossConfig:
    """Upstream's section ``trainer.loss`` with ``type = "custom"``."""

    import_path: str = "ipo_ext.integrations.prime_rl.loss_fn"
    kwargs: dict = dataclasses.field(default_factory=lambda: dict(SETTINGS))
    type: str = "custom"


def micro_batch() -> dict[str, torch.Tensor]:
    """Per-token tensors of all sequences, as upstream's data loader packs them."""
    tokens = sum(LENGTHS)
    inference = -3 * torch.rand(tokens)
    return {
        "trainer_logprobs": (inference + torch.randn(tokens)).requires_grad_(),
        "inference_logprobs": inference,
        "advantages": torch.randn(tokens),
        "loss_mask": torch.rand(tokens) < 0.7,
    }


def split(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.split(LENGTHS)


def upstream_loop(loss_fn, batch, loss_scale, **optional):
    """What upstream's compute_loss does around a custom loss, written out."""
    columns = {name: split(tensor) for name, tensor in {**batch, **optional}.items()}
    total, metrics = 0.0, {}
    for values in zip(*columns.values(), strict=True):
        inputs = LaterLossInputs(
            **{"ref_logprobs": None, **dict(zip(columns, values, strict=True))}
        )
        result = loss_fn(inputs)
        total = total + result.loss
        for name, value in result.metrics.items():
            metrics.setdefault(name, []).append(value)
    return total / loss_scale, {name: torch.stack(values) for name, values in metrics.items()}


def gradient(loss: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.autograd.grad(loss, batch["trainer_logprobs"])[0]


def imported_loss_fn():
    """As upstream resolves ``import_path``."""
    module, name = CustomLossConfig().import_path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("kind", [LossInputs, LaterLossInputs])
def test_loss_fn_is_the_loss_of_one_sequence(kind) -> None:
    batch, teacher = micro_batch(), -torch.rand(sum(LENGTHS))
    teacher_field = "teacher_logprobs" if kind is LossInputs else "ref_logprobs"
    out = imported_loss_fn()(kind(**batch, **{teacher_field: teacher}), teacher_tau=0.1, **SETTINGS)
    expected = reference.ipo_loss(
        **batch,
        teacher_logprobs=teacher,
        config=IPOConfig(teacher_tau=0.1, **SETTINGS),
        dtype=torch.float64,
    )
    torch.testing.assert_close(out.loss.double(), expected.loss)
    ours, theirs = gradient(out.loss, batch), gradient(expected.loss, batch)
    torch.testing.assert_close(ours, theirs)
    record_step(out.loss.double(), expected.loss, [(ours, theirs)])
    assert out.metrics.keys() >= UPSTREAM_METRICS
    for name, value in out.metrics.items():
        torch.testing.assert_close(value.double(), expected.metrics[name])


def test_the_example_is_a_section_that_loads() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    example = Path(__file__).parents[2] / "examples" / "prime_rl.toml"
    section = CustomLossConfig(**tomllib.loads(example.read_text())["trainer"]["loss"])
    assert section.type == "custom"
    assert prime_rl.setup_loss_fn(section).config == IPOConfig()


def test_loss_weights_count() -> None:
    batch = micro_batch()
    weights = torch.rand(sum(LENGTHS))
    inputs = LaterLossInputs(**batch, ref_logprobs=None, loss_weights=weights)
    expected = reference.ipo_loss(**batch, loss_weights=weights)
    torch.testing.assert_close(prime_rl.loss_fn(inputs).loss, expected.loss)


def test_an_unknown_setting_is_an_error() -> None:
    inputs = LossInputs(**micro_batch(), teacher_logprobs=None)
    with pytest.raises(ValueError, match=r"clip_eps: expected one of the fields dppo_mask_low"):
        prime_rl.loss_fn(inputs, clip_eps=0.2)


def test_an_unknown_input_is_an_error() -> None:
    inputs = LossInputs(**micro_batch(), teacher_logprobs=None)
    inputs.echo_mask = None
    prime_rl.loss_fn(inputs)
    inputs.echo_mask = torch.ones(sum(LENGTHS), dtype=torch.bool)
    with pytest.raises(ValueError, match="echo_mask: expected one of advantages"):
        prime_rl.loss_fn(inputs)


def test_compute_loss_is_upstreams_loop_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = micro_batch()
    loss_fn = prime_rl.setup_loss_fn(CustomLossConfig())
    expected, expected_metrics = upstream_loop(loss_fn, batch, loss_scale=7)

    calls = []
    monkeypatch.setattr(
        prime_rl, "ipo_loss", lambda *a, **k: calls.append(1) or ipo_ext.ipo_loss(*a, **k)
    )
    loss, metrics = prime_rl.compute_loss(
        **{name: split(tensor) for name, tensor in batch.items()},
        teacher_logprobs=None,
        loss_fn=loss_fn,
        loss_scale=7,
        sft_loss=False,
    )
    assert len(calls) == 1
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, batch), gradient(expected, batch))
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(value, expected_metrics[name])


def test_compute_loss_drops_the_rollouts_that_the_loop_drops() -> None:
    batch = micro_batch()
    batch["inference_logprobs"] = batch["trainer_logprobs"].detach() - 0.1
    batch["loss_mask"] = torch.ones_like(batch["loss_mask"])
    batch["inference_logprobs"][-1] += 9  # the last sequence is broken
    settings = {**SETTINGS, "rollout_min_ratio": 1e-3}
    loss_fn = prime_rl.setup_loss_fn(CustomLossConfig(kwargs=settings))
    expected, expected_metrics = upstream_loop(loss_fn, batch, loss_scale=7)
    loss, metrics = prime_rl.compute_loss(
        **{name: split(tensor) for name, tensor in batch.items()},
        teacher_logprobs=None,
        loss_fn=loss_fn,
        loss_scale=7,
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, batch), gradient(expected, batch))
    assert metrics["rollout_dropped"].tolist() == [0, 0, 1]
    torch.testing.assert_close(metrics["is_masked"], expected_metrics["is_masked"])


def test_compute_component_loss_drops_tokens_of_weight_zero() -> None:
    batch = micro_batch()
    weights = torch.rand(sum(LENGTHS)) * (torch.rand(sum(LENGTHS)) < 0.6)
    loss_fn = prime_rl.setup_loss_fn(CustomLossConfig())
    masked = {**batch, "loss_mask": batch["loss_mask"] & (weights != 0)}
    expected, expected_metrics = upstream_loop(loss_fn, masked, 3, loss_weights=weights)
    loss, metrics = prime_rl.compute_component_loss(
        **{name: split(tensor) for name, tensor in batch.items()},
        ref_logprobs=None,
        rl_weights=split(weights),
        ce_weights=None,
        ref_kl_weights=None,
        rl_loss_fn=loss_fn,
        rl_scale=3,
        ce_scale=1,
        ref_kl_scale=1,
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, batch), gradient(expected, batch))
    torch.testing.assert_close(metrics["is_masked"], expected_metrics["is_masked"])


class BuiltInConfig:
    """A section of one of upstream's own losses, a pydantic model there."""

    def __init__(self, **section: object) -> None:
        self.section = section
        self.type = section["type"]

    def model_dump(self) -> dict[str, object]:
        return self.section


def test_built_in_losses_become_ours() -> None:
    found = prime_rl.setup_rl_loss_fn(BuiltInConfig(type="icepop", ratio_low=0.3, adv_tau=1.0))
    assert found.config == IPOConfig.icepop(0.3)
    assert prime_rl.setup_rl_loss_fn(CustomLossConfig()) == prime_rl.setup_loss_fn(
        CustomLossConfig()
    )
    centered = prime_rl.setup_rl_loss_fn(BuiltInConfig(type="ipo", score_centering=True))
    assert centered.config == IPOConfig.ipo(score_centering=True)


def test_upstream_since_september_calls_loss() -> None:
    batch = micro_batch()
    inputs = LaterLossInputs(ref_logprobs=None, **batch)
    loss_fn = prime_rl.setup_rl_loss_fn(CustomLossConfig())
    assert torch.equal(loss_fn.loss(inputs).loss, loss_fn(inputs).loss)


def components() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A micro-batch in float64, reference log-probabilities included, and three weight streams."""
    batch = {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor
        for name, tensor in micro_batch().items()
    }
    tokens = sum(LENGTHS)
    batch["trainer_logprobs"].requires_grad_()
    batch["ref_logprobs"] = -3 * torch.rand(tokens, dtype=torch.float64)
    streams = torch.rand(3, tokens, dtype=torch.float64) * (torch.rand(3, tokens) < 0.6)
    return batch, dict(zip(("rl_weights", "ce_weights", "ref_kl_weights"), streams, strict=True))


SCALES = {"rl_scale": 3.0, "ce_scale": 5.0, "ref_kl_scale": 7.0}


def component_loss(
    batch: dict[str, torch.Tensor], streams: dict[str, torch.Tensor], **options: object
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return prime_rl.compute_component_loss(
        **{name: split(tensor) for name, tensor in batch.items()},
        **{name: split(stream) for name, stream in streams.items()},
        **{**SCALES, "rl_loss_fn": prime_rl.SequenceLoss(IPOConfig.ipo()), **options},
    )


def eager_components(
    batch: dict[str, torch.Tensor], streams: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """The three formulas, token by token."""
    trainer, inference, ref, advantages = (
        batch[name]
        for name in ("trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages")
    )
    p, q = trainer.detach().exp(), inference.exp()
    ratio = (trainer - inference).exp()  # no cap is near
    rl_weights, ce_weights, ref_kl_weights = streams.values()
    rl = batch["loss_mask"] & (rl_weights != 0) & ((p - q).abs() <= 0.3)
    ce, ref_kl = ce_weights != 0, ref_kl_weights != 0
    kept = ref_kl & (p - q >= -0.2)
    distance = (ref - trainer).detach()
    loss = -(rl_weights * advantages * ratio)[rl].sum() / SCALES["rl_scale"]
    loss = loss - (ce_weights * trainer)[ce].sum() / SCALES["ce_scale"]
    loss = loss - (ref_kl_weights * distance * ratio)[kept].sum() / SCALES["ref_kl_scale"]
    x = trainer.detach() - inference
    mismatch = torch.expm1(x) - x
    metrics = {
        "nll": -trainer.detach()[ce].mean(),
        "ref_kl": distance[ref_kl].mean(),
        "ref_kl/is_masked": 1 - kept.sum() / ref_kl.sum(),
        "ref_kl/masked_mismatch_kl": mismatch[ref_kl & ~kept].mean().nan_to_num(),
        "ref_kl/unmasked_mismatch_kl": mismatch[kept].mean(),
    }
    return loss, {name: float(value) for name, value in metrics.items()}


def test_three_components_are_their_formulas() -> None:
    for _ in range(20):
        batch, streams = components()
        expected, expected_metrics = eager_components(batch, streams)
        loss, metrics = component_loss(batch, streams)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        ours, theirs = gradient(loss, batch), gradient(expected, batch)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        record_step(loss, expected, [(ours, theirs)])
        for name, value in expected_metrics.items():
            assert metrics[name].shape == (1,)
            assert float(metrics[name]) == pytest.approx(value, rel=1e-6, abs=1e-9), name


CENTERED = IPOConfig.ipo(eps=0.1, max_importance_ratio=1.4, adv_tau=0.7, score_centering=True)


def of_ids(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trainer's and the sampler's log-probabilities of six ids, as upstream pads them."""
    tokens = sum(LENGTHS)
    trainer, noise = torch.randn(2, tokens, 6, dtype=torch.float64)
    trainer = trainer.log_softmax(-1)
    sampler = (trainer + 0.5 * noise).log_softmax(-1)
    padding = (torch.arange(6) > 3) | (torch.arange(tokens) % 4 == 0)[:, None]
    return {
        "trainer_mask_logprobs": trainer.masked_fill(padding, 0.0).requires_grad_(),
        "inference_mask_logprobs": sampler.masked_fill(padding, -torch.inf),
    }


def eager_centering(batch: dict[str, torch.Tensor], ids: dict[str, torch.Tensor]) -> torch.Tensor:
    """Per token, as arXiv 2609.20807 and upstream have it."""
    trainer, sampler = ids["trainer_mask_logprobs"], ids["inference_mask_logprobs"]
    p, q = trainer.detach().exp(), sampler.exp()
    within = sampler.isfinite() & ((p - q).abs() <= 0.1)
    coefficient = torch.where(within, q * (p / q).clamp(max=1.4), 0.0)
    return 0.7 * batch["advantages"] * (coefficient * trainer).sum(-1)


def test_scores_are_centered() -> None:
    batch, streams = components()
    ids = of_ids(batch)
    split_ids = {name: list(values.split(LENGTHS)) for name, values in ids.items()}
    section = prime_rl.SequenceLoss(CENTERED)
    loss, metrics = component_loss(batch, streams, rl_loss_fn=section, **split_ids)
    plain_section = dataclasses.replace(CENTERED, score_centering=False)
    plain, _ = component_loss(batch, streams, rl_loss_fn=prime_rl.SequenceLoss(plain_section))
    rl = batch["loss_mask"] & (streams["rl_weights"] != 0)
    terms = torch.where(rl, streams["rl_weights"] * eager_centering(batch, ids), 0.0)
    expected = plain + terms.sum() / SCALES["rl_scale"]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    leaf = ids["trainer_mask_logprobs"]
    ours, theirs = (
        torch.autograd.grad(each, leaf, retain_graph=True)[0] for each in (loss, expected)
    )
    assert ours.any()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    means = [
        float(part.sum() / active.sum().clamp(min=1))
        for part, active in zip(terms.detach().split(LENGTHS), rl.split(LENGTHS), strict=True)
    ]
    assert metrics["centering_loss"].tolist() == pytest.approx(means, rel=1e-12)


def test_one_sequence_is_centered() -> None:
    batch, _ = components()
    ids = of_ids(batch)
    inputs = LaterLossInputs(**batch, **ids)
    ours = prime_rl.SequenceLoss(CENTERED).loss(inputs)
    uncentered = dataclasses.replace(CENTERED, score_centering=False)
    plain = prime_rl.SequenceLoss(uncentered).loss(inputs)
    terms = torch.where(batch["loss_mask"], eager_centering(batch, ids), 0.0)
    torch.testing.assert_close(ours.loss, plain.loss + terms.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("missing", ["trainer_mask_logprobs", "inference_mask_logprobs"])
def test_a_batch_without_the_ids_logprobs_is_not_centered(missing: str) -> None:
    """Rollouts of a frozen source have none."""
    batch, streams = components()
    ids = {name: list(values.split(LENGTHS)) for name, values in of_ids(batch).items()}
    section = prime_rl.SequenceLoss(CENTERED)
    loss, metrics = component_loss(batch, streams, rl_loss_fn=section, **{**ids, missing: None})
    uncentered = dataclasses.replace(CENTERED, score_centering=False)
    plain, _ = component_loss(batch, streams, rl_loss_fn=prime_rl.SequenceLoss(uncentered))
    assert torch.equal(loss, plain)
    assert "centering_loss" not in metrics


def test_the_head_and_the_loss_center_as_one() -> None:
    """What the head gives is what the loss takes, and as the loss from hidden states does it."""
    torch.manual_seed(3)
    head = prime_rl.FusedOutputLinear(8, 11)
    head.return_mask_logprobs = True
    states = torch.randn(1, 12, 8, requires_grad=True)
    labels = torch.randint(11, (1, 12))
    ids = torch.stack([torch.randperm(11)[:4] for _ in range(12)]).int()[None]
    ids[0, ::2, 0] = labels[0, ::2]
    ids[0, ::2, 1:].masked_fill_(ids[0, ::2, 1:] == labels[0, ::2, None], -1)
    sampler = torch.randn(1, 12, 4).log_softmax(-1).masked_fill(ids < 0, -torch.inf)
    inference, advantages = -torch.rand(1, 12), torch.randn(1, 12)
    mask = torch.arange(12)[None] % 5 != 0
    out = head(states, labels, torch.ones(1, 12), ids)
    loss, _ = prime_rl.compute_component_loss(
        [out["logprobs"][0]], [inference[0]], None, [advantages[0]], [mask[0]],
        None, None, None, prime_rl.SequenceLoss(CENTERED), 1.0, 1.0, 1.0,
        trainer_mask_logprobs=[out["mask_logprobs"][0]], inference_mask_logprobs=[sampler[0]],
    )  # fmt: skip
    whole = ipo_ext.ipo_loss_from_hidden(
        states, head.weight, labels, inference, advantages, mask,
        sampling_mask=ids, inference_mask_logprobs=sampler, config=CENTERED,
    )  # fmt: skip
    torch.testing.assert_close(loss, whole.loss)
    leaves = [states, head.weight]
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(whole.loss, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("stream", ["rl_weights", "ce_weights", "ref_kl_weights"])
def test_what_a_token_outside_a_component_holds_reaches_it_not(stream: str) -> None:
    batch, streams = components()
    outside = streams[stream] == 0
    streams = {
        name: values if name == stream else torch.zeros_like(values)
        for name, values in streams.items()
    }
    clean, _ = component_loss(batch, streams)
    for name in ("inference_logprobs", "ref_logprobs", "advantages"):
        batch[name] = torch.where(outside, torch.nan, batch[name])
    spoiled, metrics = component_loss(batch, streams)
    assert torch.equal(spoiled, clean)
    assert gradient(spoiled, batch).isfinite().all()
    assert all(values.isfinite().all() for values in metrics.values())


def test_what_the_reference_says_of_rl_s_tokens_is_not_measured() -> None:
    """It is the distillation's, whose tokens alone have one."""
    batch, streams = components()
    batch["ref_logprobs"] = torch.where(
        streams["ref_kl_weights"] == 0, torch.nan, batch["ref_logprobs"]
    )
    loss, metrics = component_loss(batch, streams)
    assert loss.isfinite()
    assert all(values.isfinite().all() for values in metrics.values())
    assert "teacher_kl" not in metrics


def test_a_step_without_tokens_of_a_component_is_0() -> None:
    batch, streams = components()
    nothing = {name: torch.zeros_like(values) for name, values in streams.items()}
    loss, metrics = prime_rl.compute_component_loss(
        **{name: split(tensor) for name, tensor in batch.items()},
        **{name: split(stream) for name, stream in nothing.items()},
        rl_scale=1.0,
        ce_scale=0.0,
        ref_kl_scale=torch.zeros(()),
        rl_loss_fn=prime_rl.SequenceLoss(IPOConfig.ipo()),
    )
    assert float(loss.detach()) == 0
    assert not gradient(loss, batch).any()
    assert float(metrics["nll"]) == float(metrics["ref_kl"]) == 0


def test_a_micro_batch_without_loss_tokens_runs_backward() -> None:
    batch = micro_batch()
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    loss, _ = prime_rl.compute_loss(
        **{name: split(tensor) for name, tensor in batch.items()},
        teacher_logprobs=None,
        loss_fn=prime_rl.setup_loss_fn(CustomLossConfig()),
        loss_scale=1,
    )
    assert loss.item() == 0
    assert not gradient(loss, batch).any()


def test_what_is_not_this_loss_is_refused() -> None:
    batch = {name: split(tensor) for name, tensor in micro_batch().items()}
    loss_fn = prime_rl.setup_loss_fn(CustomLossConfig())
    scales = {"rl_scale": 1, "ce_scale": 1, "ref_kl_scale": 1}
    weights = {"rl_weights": None, "ce_weights": None, "ref_kl_weights": None}
    with pytest.raises(ValueError, match="sft_loss: expected False"):
        prime_rl.compute_loss(
            **batch, teacher_logprobs=None, loss_fn=loss_fn, loss_scale=1, sft_loss=True
        )
    with pytest.raises(ValueError, match="ref_logprobs: expected a tensor for each sequence"):
        prime_rl.compute_component_loss(
            **batch,
            **{**weights, "ref_kl_weights": batch["advantages"]},
            **scales,
            ref_logprobs=None,
            rl_loss_fn=loss_fn,
        )
    lists = [[each.tolist()] for each in batch["advantages"]]
    for name in ("trainer_mask_logprobs", "inference_mask_logprobs"):
        with pytest.raises(TypeError, match=rf"{name}\[0\]: expected a tensor \[tokens, ids\]"):
            prime_rl.compute_component_loss(
                **batch,
                **weights,
                **scales,
                ref_logprobs=None,
                rl_loss_fn=prime_rl.SequenceLoss(CENTERED),
                **{name: lists},
            )
        with pytest.raises(ValueError, match=rf"{name}: expected shapes \[tokens, ids\] of one"):
            prime_rl.compute_component_loss(
                **batch,
                **weights,
                **scales,
                ref_logprobs=None,
                rl_loss_fn=prime_rl.SequenceLoss(CENTERED),
                **{name: batch["advantages"]},
            )
    with pytest.raises(TypeError, match=r"loss_fn: expected what .*setup_loss_fn returns"):
        prime_rl.compute_loss(**batch, teacher_logprobs=None, loss_fn=print, loss_scale=1)
    with pytest.raises(ValueError, match=r'trainer\.loss: expected type = "custom"'):
        prime_rl.setup_loss_fn(CustomLossConfig(import_path="elsewhere.loss"))


@pytest.mark.parametrize("name", ["inference_logprobs", "ref_logprobs", "loss_mask", "rl_weights"])
def test_lists_of_unequal_lengths_are_refused_by_name(name: str) -> None:
    """Of equal totals too, where a token would be read at another sequence's place."""
    whole = micro_batch()
    batch = {field: split(tensor) for field, tensor in whole.items()}
    batch |= {"ref_logprobs": None, "rl_weights": None, "ce_weights": None, "ref_kl_weights": None}
    scales = {"rl_scale": 1, "ce_scale": 1, "ref_kl_scale": 1}
    sequences = split(whole["loss_mask" if name == "loss_mask" else "inference_logprobs"])
    for wrong in (sequences[::-1], sequences[:-1], ()):
        with pytest.raises(ValueError, match=f"{name}: expected sequences of the lengths of"):
            prime_rl.compute_component_loss(
                **batch | {name: wrong}, **scales, rl_loss_fn=prime_rl.SequenceLoss(IPOConfig())
            )


def packed_loss(**columns) -> torch.Tensor:
    """The loss of a packed micro-batch in which some fields of all are other than usual."""
    batch = {field: split(tensor) for field, tensor in micro_batch().items()}
    fields = {**batch, "teacher_logprobs": None, "loss_scale": 3, **columns}
    return prime_rl.compute_loss(**fields, loss_fn=prime_rl.SequenceLoss(IPOConfig()))[0]


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(1, 5), ValueError, r"expected shape \[tokens\], got \[1, 5\]"),
        (torch.zeros(()), ValueError, r"expected shape \[tokens\], got \[\]"),
        ([0.0] * 5, TypeError, r"expected a tensor \[tokens\], got list"),
    ],
)
@pytest.mark.parametrize("name", ["trainer_logprobs", "advantages"])
def test_a_sequence_that_is_no_row_of_tokens_is_refused(name, tokens, error, message) -> None:
    with pytest.raises(error, match=rf"{name}\[0\]: {message}"):
        packed_loss(**{name: [tokens, *split(torch.zeros(sum(LENGTHS)))[1:]]})


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_number_of_tokens_is_refused_by_name(scale: float) -> None:
    with pytest.raises(ValueError, match="loss_scale: expected a number of tokens > 0"):
        packed_loss(loss_scale=scale)
    with pytest.raises(ValueError, match=r"^rl_scale: expected a number of tokens > 0"):
        component_loss(*components(), rl_scale=scale)


@pytest.mark.parametrize("name", ["ce_scale", "ref_kl_scale"])
@pytest.mark.parametrize(
    ("scale", "error"),
    [
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("3", TypeError),
        (None, TypeError),
        (torch.ones(2), ValueError),
        (torch.ones((), dtype=torch.bool), TypeError),
        (torch.ones((), requires_grad=True), ValueError),
    ],
)
def test_the_scale_of_another_component_is_refused_by_name(
    name: str, scale: object, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"^{name}: expected"):
        component_loss(*components(), **{name: scale})


def test_a_rank_without_tokens_runs_backward() -> None:
    trainer = torch.empty(0, requires_grad=True)
    nothing = {
        "trainer_logprobs": [trainer],
        "inference_logprobs": [torch.empty(0)],
        "advantages": [torch.empty(0)],
        "loss_mask": [torch.empty(0, dtype=torch.bool)],
    }
    loss = packed_loss(**nothing)
    loss.backward()
    assert loss.item() == 0
    assert trainer.grad.shape == (0,)


def test_an_empty_sequence_among_others_changes_nothing() -> None:
    columns = {name: split(tensor) for name, tensor in micro_batch().items()}
    with_empty = {name: [row[0], row[0][:0], *row[1:]] for name, row in columns.items()}
    assert packed_loss(**with_empty).item() == packed_loss(**columns).item()


@pytest.mark.parametrize("garbage", [0.0, float("nan"), float("-inf"), 1e30])
def test_padding_of_any_kind_outside_of_the_mask_changes_no_bit(garbage: float) -> None:
    batch = micro_batch()
    weights = torch.rand(sum(LENGTHS))
    padded = {
        name: torch.where(batch["loss_mask"], tensor, garbage)
        for name, tensor in {**batch, "rl_weights": weights}.items()
        if name != "loss_mask"
    }

    def gradient_of(fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        trainer = fields["trainer_logprobs"].detach().requires_grad_()
        loss, _ = prime_rl.compute_component_loss(
            **{name: split(tensor) for name, tensor in fields.items() if name in batch}
            | {"trainer_logprobs": split(trainer), "loss_mask": split(batch["loss_mask"])},
            rl_weights=split(fields["rl_weights"]),
            ref_logprobs=None,
            ce_weights=None,
            ref_kl_weights=None,
            rl_loss_fn=prime_rl.SequenceLoss(IPOConfig()),
            rl_scale=3,
            ce_scale=1,
            ref_kl_scale=1,
        )
        return loss, torch.autograd.grad(loss, trainer)[0]

    for ours, expected in zip(
        gradient_of(padded), gradient_of({**batch, "rl_weights": weights}), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["teacher_logprobs", "ref_logprobs"])
def test_a_teacher_of_another_shape_is_refused_by_upstreams_name(name: str) -> None:
    kind = LossInputs if name == "teacher_logprobs" else LaterLossInputs
    inputs = kind(**micro_batch(), **{name: torch.zeros(3)})
    with pytest.raises(ValueError, match=rf"^{name}: expected shape \[15\] like trainer_logprobs"):
        prime_rl.loss_fn(inputs, teacher_tau=0.1)


def test_no_sequence_at_all_is_refused() -> None:
    names = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")
    with pytest.raises(ValueError, match="trainer_logprobs: expected at least one sequence"):
        prime_rl.compute_loss(
            **dict.fromkeys(names, ()),
            teacher_logprobs=None,
            loss_fn=prime_rl.SequenceLoss(IPOConfig()),
            loss_scale=1,
        )


@pytest.mark.parametrize("rl_weights", [None, 1.0])
def test_a_mask_of_numbers_is_refused(rl_weights: float | None) -> None:
    batch = {field: split(tensor) for field, tensor in micro_batch().items()}
    weights = rl_weights and [torch.ones_like(tokens) for tokens in batch["advantages"]]
    with pytest.raises(TypeError, match=r"loss_mask: expected dtype torch\.bool"):
        prime_rl.compute_component_loss(
            **batch | {"loss_mask": [mask.float() for mask in batch["loss_mask"]]},
            ref_logprobs=None,
            rl_weights=weights,
            ce_weights=None,
            ref_kl_weights=None,
            rl_loss_fn=prime_rl.SequenceLoss(IPOConfig()),
            rl_scale=1,
            ce_scale=1,
            ref_kl_scale=1,
        )


class TestFusedOutputLinear:
    hidden_size, vocab = 6, 11

    def inputs(self) -> dict[str, torch.Tensor]:
        return {
            "hidden_states": torch.randn(2, 3, self.hidden_size, requires_grad=True),
            "labels": torch.randint(self.vocab, (2, 3)),
            "temperature": 0.5 + torch.rand(2, 3),
        }

    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_equals_the_logits_written_out(self, softcap: float | None) -> None:
        head = prime_rl.FusedOutputLinear(
            in_features=self.hidden_size, out_features=self.vocab, chunk_size=2, softcap=softcap
        )
        inputs = self.inputs()
        out = head(**inputs)

        logits = inputs["hidden_states"].double() @ head.weight.double().T
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_p = (logits / inputs["temperature"][..., None]).log_softmax(-1)
        logprobs = log_p.gather(-1, inputs["labels"][..., None]).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)

        assert set(out) == {"logprobs", "entropy"}
        assert out["logprobs"].dtype == torch.float32
        torch.testing.assert_close(out["logprobs"].double(), logprobs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out["entropy"].double(), entropy, rtol=1e-5, atol=1e-6)
        leaves = (inputs["hidden_states"], head.weight)
        gradients = torch.autograd.grad((out["logprobs"] + out["entropy"]).sum(), leaves)
        expected = torch.autograd.grad((logprobs + entropy).sum(), leaves)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)

    def test_takes_the_weight_that_upstream_assigns(self) -> None:
        head = prime_rl.FusedOutputLinear(
            in_features=self.hidden_size, out_features=self.vocab, chunk_size=1
        )
        head.weight = torch.nn.Linear(self.hidden_size, self.vocab, bias=False).weight
        assert set(dict(head.named_parameters())) == {"weight"}

    def test_needs_labels(self) -> None:
        head = prime_rl.FusedOutputLinear(self.hidden_size, self.vocab)
        with pytest.raises(ValueError, match=r"labels: expected a tensor \[B, T\], got None"):
            head(**{**self.inputs(), "labels": None})

    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_is_the_summed_cross_entropy_without_a_temperature(self, softcap: float | None) -> None:
        head = prime_rl.FusedOutputLinear(self.hidden_size, self.vocab, 2, softcap)
        inputs = self.inputs()
        hidden, labels = inputs["hidden_states"], inputs["labels"]
        labels[0, 1] = -100
        (loss,) = head(hidden, labels).values()
        logits = hidden.double() @ head.weight.double().T
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        leaves = (hidden, head.weight)
        found = torch.autograd.grad(loss, leaves)
        torch.testing.assert_close(
            found, torch.autograd.grad(expected, leaves), rtol=1e-4, atol=1e-6
        )

    def test_a_broken_row_shows_in_the_summed_cross_entropy(self) -> None:
        """No metric would say that it was left out."""
        head = prime_rl.FusedOutputLinear(self.hidden_size, self.vocab)
        inputs = self.inputs()
        hidden = inputs["hidden_states"].detach().clone()
        hidden[1, 2] = torch.nan
        (loss,) = head(hidden.requires_grad_(), inputs["labels"]).values()
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.isnan()
        assert gradient.isfinite().all()

    def sampling_mask(self, labels: torch.Tensor) -> torch.Tensor:
        """Of the six tokens: with the label (thrice), empty, without it, and the label alone."""
        others = (labels[..., None] + torch.arange(1, 4)) % self.vocab
        ids = torch.cat([others, labels[..., None]], -1).int()
        ids[0, 0, 1] = -1
        ids[1, 0] = -1
        ids[1, 1, 3] = -1
        ids[1, 2, :3] = -1
        return ids

    def test_replays_a_sampling_mask(self) -> None:
        head = prime_rl.FusedOutputLinear(self.hidden_size, self.vocab, 2)
        head.return_mask_logprobs = True
        inputs = self.inputs()
        labels = inputs["labels"].clamp(min=0)
        ids = self.sampling_mask(labels)
        out = head(**{**inputs, "labels": labels}, sampling_mask=ids)
        z = inputs["hidden_states"] @ head.weight.T / inputs["temperature"][..., None]
        inside = torch.zeros(2, 3, self.vocab + 1, dtype=torch.bool)
        inside = inside.scatter(-1, torch.where(ids < 0, self.vocab, ids).long(), True)[..., :-1]
        replays = inside.gather(-1, labels[..., None])
        assert replays.sum() == 4
        log_p = z.masked_fill(replays & ~inside, -torch.inf).log_softmax(-1)
        logprobs = log_p.gather(-1, labels[..., None]).squeeze(-1)
        counts = replays & (ids >= 0)
        at_ids = torch.where(counts, log_p.gather(-1, ids.clamp(min=0).long()), 0)
        entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
        assert out.keys() == {"logprobs", "entropy", "mask_logprobs"}
        expected = {"logprobs": logprobs, "entropy": entropy, "mask_logprobs": at_ids}
        torch.testing.assert_close(out, expected)
        leaves = (inputs["hidden_states"], head.weight)
        weights = torch.randn(ids.shape)
        ours = out["logprobs"].sum() + (weights * out["mask_logprobs"]).sum()
        theirs = logprobs.sum() + torch.where(counts, weights * at_ids, 0).sum()
        for mine, exact in zip(
            torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
        ):
            torch.testing.assert_close(mine, exact)

    def test_gives_log_probabilities_of_a_mask_where_asked_for(self) -> None:
        head = prime_rl.FusedOutputLinear(self.hidden_size, self.vocab)
        inputs = self.inputs()
        ids = self.sampling_mask(inputs["labels"].clamp(min=0))
        assert head(**inputs, sampling_mask=ids).keys() == {"logprobs", "entropy"}
        head.return_mask_logprobs = True
        assert head(**inputs).keys() == {"logprobs", "entropy"}

    def test_refuses_a_sampling_mask_without_a_temperature(self) -> None:
        head = prime_rl.FusedOutputLinear(self.hidden_size, self.vocab)
        inputs = {**self.inputs(), "temperature": None}
        with pytest.raises(ValueError, match="sampling_mask: expected None without a temperature"):
            head(**inputs, sampling_mask=torch.zeros(2, 3, 4, dtype=torch.int32))
