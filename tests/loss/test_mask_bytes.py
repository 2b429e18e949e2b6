"""Any byte but 0 of a bool tensor is true: a loss mask made as uint8 counts like any other."""

from __future__ import annotations

import pytest
import torch

from ipo_ext import IPOConfig, reference
from tests.support import hidden, logits, logprobs
from tests.support.backends import Backend
from tests.support.cases import assert_same_bits, evaluate

BYTES = (2, 16, 128, 255)
CONFIGS = {
    "ratio": IPOConfig(),
    "rollout": IPOConfig(rollout_min_ratio=0.02),
    "dppo": IPOConfig.dppo(),
}


def with_true_bytes(mask: torch.Tensor, byte: int) -> torch.Tensor:
    """The same booleans, true ones held as ``byte``, or as each of ``BYTES`` in turn for 0."""
    values = torch.tensor([byte] if byte else BYTES, dtype=torch.uint8, device=mask.device)
    values = values[torch.arange(mask.numel(), device=mask.device) % len(values)]
    return torch.where(mask, values, 0).view(torch.bool)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 75, 1024, 5001])
@pytest.mark.parametrize("byte", [255, 0])
def test_from_logprobs(
    backend: Backend, byte: int, tokens: int, dtype: torch.dtype, config: IPOConfig
) -> None:
    case = logprobs.random_case(tokens, dtypes=(dtype,) * 5, config=config).to(backend.device)
    case.loss_mask[0] = True
    mask = with_true_bytes(case.loss_mask, byte)
    assert_same_bits(evaluate(case.with_(loss_mask=mask)), evaluate(case))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("byte", [255, 0])
def test_from_logits(backend: Backend, byte: int, config: IPOConfig) -> None:
    case = logits.random_case(75, 33, config=config).to(backend.device)
    mask = with_true_bytes(case.loss_mask, byte)
    assert_same_bits(evaluate(case.with_(loss_mask=mask)), evaluate(case))


@pytest.mark.parametrize("num_active", [None, 60, 75])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("byte", [255, 0])
def test_from_hidden_states(
    backend: Backend, byte: int, config: IPOConfig, num_active: int | None
) -> None:
    case = hidden.random_case(75, config=config, num_active=num_active).to(backend.device)
    assert 40 < case.loss_mask.sum() <= 60
    mask = with_true_bytes(case.loss_mask, byte)
    assert_same_bits(evaluate(case.with_(loss_mask=mask)), evaluate(case))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("byte", [255, 0])
def test_the_reference(byte: int, config: IPOConfig) -> None:
    case = logits.random_case(75, 33, config=config)
    mask = with_true_bytes(case.loss_mask, byte)
    expected = case.call(reference.ipo_loss_from_logits)
    ours = case.with_(loss_mask=mask).call(reference.ipo_loss_from_logits)
    assert torch.equal(ours.loss, expected.loss)
    for name, value in expected.metrics.items():
        assert torch.equal(ours.metrics[name], value), name
