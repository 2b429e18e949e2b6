"""The modules: settings at construction, a head with its loss, a head tied to its embedding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ipo_ext
from ipo_ext import IPOConfig, reference
from tests.support.backends import Backend
from tests.support.cases import evaluate
from tests.support.hidden import VOCABULARY, WIDTH, random_case


def test_modules(backend: Backend) -> None:
    case = random_case().to(backend.device)
    config = IPOConfig(dppo_mask_high=2.0)
    scaling = {"softcap": 4.0, "logit_scale": 0.7}
    expected = evaluate(case, config=config, **scaling)
    module = ipo_ext.LinearIPOLoss(config, chunk_size=9, **scaling)
    ours = evaluate(case, module)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.grad_weight, expected.grad_weight)

    linear = nn.Linear(WIDTH, VOCABULARY, bias=False, device=backend.device)
    with torch.no_grad():
        linear.weight.copy_(case.weight)
    head = ipo_ext.IPOLMHead(linear, config, **scaling)
    assert head.weight is linear.weight
    assert list(head.state_dict()) == list(linear.state_dict())
    constants = (case.labels, case.inference_logprobs, case.advantages, case.loss_mask)
    head(case.hidden, *constants).loss.backward()
    torch.testing.assert_close(linear.weight.grad, expected.grad_weight)
    once = head(case.hidden, *constants, softcap=2.0, logit_scale=1.5).loss
    other = evaluate(case, config=config, softcap=2.0, logit_scale=1.5)
    torch.testing.assert_close(once, other.loss)
    assert torch.equal(head(case.hidden), F.linear(case.hidden, linear.weight))
    for other in ({"temperature": 0.8}, {"entropy": False}):
        with pytest.raises(TypeError, match="labels: expected a tensor beside the loss's other"):
            head(case.hidden, **other)


def test_head_tied_to_the_embedding(backend: Backend) -> None:
    torch.manual_seed(3)
    embedding = nn.Embedding(VOCABULARY, WIDTH, device=backend.device)
    linear = nn.Linear(WIDTH, VOCABULARY, bias=False, device=backend.device)
    linear.weight = embedding.weight
    head = ipo_ext.IPOLMHead(linear)
    case = random_case(masked=0).to(backend.device)
    tokens = case.labels
    exact, _ = reference.linear_token_logprobs(embedding(tokens), embedding.weight, tokens)
    constants = (tokens, exact.detach(), case.advantages, case.loss_mask)
    ours = torch.autograd.grad(head(embedding(tokens), *constants).loss, embedding.weight)[0]
    truth = reference.ipo_loss_from_hidden(embedding(tokens), embedding.weight, *constants).loss
    torch.testing.assert_close(
        ours, torch.autograd.grad(truth, embedding.weight)[0], rtol=1e-4, atol=1e-4
    )
