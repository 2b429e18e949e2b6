"""Log-probabilities of the ids that a sampler drew from, as score centering takes them."""

from __future__ import annotations

import torch

from ipo_ext import IPOConfig, reference
from tests.support.cases import HiddenCase, LogitsCase, LogprobsCase
from tests.support.logits import OF_LOGPROBS

CONFIG = IPOConfig.ipo(eps=0.1, max_importance_ratio=1.5, adv_tau=0.7, score_centering=True)


def centered(
    case: LogprobsCase, width: int = 5, dtype: torch.dtype | None = None, seed: int = 0
) -> LogprobsCase:
    """The case with log-probabilities of ids: of some tokens fewer, of some none."""
    shape = (*case.trainer_logprobs.shape, width)
    generator = torch.Generator().manual_seed(seed)
    trainer = torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)
    sampler = sampler_of(trainer, case.config, generator)
    dtype = dtype or case.trainer_logprobs.dtype
    return case.with_(
        trainer_mask_logprobs=trainer.to(dtype),
        inference_mask_logprobs=sampler.to(case.inference_logprobs.dtype),
    )


def sampler_of(
    trainer: torch.Tensor, config: IPOConfig, generator: torch.Generator
) -> torch.Tensor:
    """About as likely, about a third of them gone, none near the trust region's end."""
    noise = torch.randn(trainer.shape, generator=generator, dtype=torch.float64)
    sampler = (trainer + 0.6 * noise).log_softmax(-1)
    distance = ((trainer.exp() - sampler.exp()).abs() - config.dppo_mask_high).abs()
    gone = torch.rand(trainer.shape, generator=generator) < 0.3
    return sampler.masked_fill(gone | (distance < 0.01), -torch.inf)


def with_sampler(case: LogitsCase | HiddenCase, seed: int = 0) -> LogitsCase | HiddenCase:
    """The case, which has a sampling mask, with what the sampler gave its ids."""
    logits = case.logits if isinstance(case, LogitsCase) else case.from_logits().logits
    how = {name: getattr(case, name) for name in OF_LOGPROBS}
    *_, trainer = reference.token_logprobs(
        logits, case.labels, **how, candidates=case.sampling_mask, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(seed)
    sampler = sampler_of(trainer.detach().nan_to_num(0, 0, -9), case.config, generator)
    sampler = sampler.masked_fill(case.sampling_mask < 0, -torch.inf)
    return case.with_(inference_mask_logprobs=sampler.to(case.inference_logprobs.dtype))
