"""prime-rl's other two components, cross-entropy and distillation, which stand beside its loss."""

from __future__ import annotations

import math

import torch

from ipo_ext import _C
from ipo_ext._numbers import is_number, without_infinities
from ipo_ext._ops.arguments import Components
from ipo_ext._prime_rl_sections import NEWEST

# Version of prime-rl to what its distillation makes of the ratio: a cap, and kl_tau.
_REF_KL = {
    NEWEST: (1e4, 0.0),
    "2026-08": (math.inf, 1e-3),
}


def check_version(version: str) -> None:
    if version not in _REF_KL:
        raise ValueError(f"version: expected one of {', '.join(_REF_KL)}, got {version!r}")


def check_scale(name: str, scale: float | torch.Tensor, least: int = 1) -> None:
    """By upstream's name for it, before it is the normalizer of a component.

    A scale of no tokens is 1 upstream where the component always is, else 0.
    """
    if isinstance(scale, torch.Tensor):
        _check_scale_tensor(name, scale)
    elif not is_number(scale):
        raise TypeError(
            f"{name}: expected a number of tokens or a 0-dim tensor, got {type(scale).__name__}"
        )
    elif not scale < math.inf or scale < 0 or (scale == 0 and least > 0):
        bound = "> 0" if least > 0 else ">= 0"
        raise ValueError(f"{name}: expected a number of tokens {bound} or a tensor, got {scale!r}")


def _check_scale_tensor(name: str, scale: torch.Tensor) -> None:
    if scale.dtype == torch.bool or scale.is_complex():
        raise TypeError(f"{name}: expected a tensor of floats or integers, got {scale.dtype}")
    if scale.numel() != 1:
        raise ValueError(f"{name}: expected a tensor of one element, got {list(scale.shape)}")
    if scale.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that does not require grad; pass {name}.detach()"
        )
    if scale.is_cpu and not scale >= 0:  # on a GPU, to look would wait for it
        raise ValueError(f"{name}: expected a number of tokens >= 0, got {scale.item()}")


def components_of(
    version: str,
    ce_weights: torch.Tensor | None,
    ref_kl_weights: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    ce_scale: float | torch.Tensor,
    ref_kl_scale: float | torch.Tensor,
) -> Components | None:
    """The operator's arguments, None where nothing stands beside the loss; ``[tokens]`` each."""
    if ce_weights is None and ref_kl_weights is None:
        return None
    cap, tau = _REF_KL[version]
    return Components(
        ce_weights,
        ref_kl_weights,
        ref_logprobs,
        ce_scale=_as_tensor(ce_scale),
        ref_kl_scale=_as_tensor(ref_kl_scale),
        ref_kl_cap=without_infinities(cap),
        ref_kl_tau=tau,
    )


def metrics_of(means: torch.Tensor, components: Components) -> dict[str, torch.Tensor]:
    """Name to a mean ``[1]``, of the components that there are: upstream's, and shares left out."""
    rows = dict(zip(_C.COMPONENT_MEAN_ROWS, means.split(1), strict=True))
    metrics: dict[str, torch.Tensor] = {}
    if components.ce_weights is not None:
        metrics |= {"nll": rows["nll"], "ce/nonfinite": rows["ce_nonfinite"]}
    if components.ref_kl_weights is not None:
        metrics["ref_kl"] = rows["ref_kl"]
        for name in ("is_masked", "masked_mismatch_kl", "unmasked_mismatch_kl", "nonfinite"):
            metrics[f"ref_kl/{name}"] = rows[f"ref_kl_{name}"]
    return metrics


def _as_tensor(scale: float | torch.Tensor) -> torch.Tensor:
    """A scale of 0, of a step without tokens of the component, is a loss of 0."""
    if isinstance(scale, torch.Tensor):
        return scale.reshape(())
    return torch.scalar_tensor(scale, dtype=torch.float64, device="cpu")
