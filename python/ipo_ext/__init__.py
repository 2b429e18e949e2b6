"""The IPO+KL policy loss for RL of language models, as fused PyTorch operators."""

from torch.serialization import add_safe_globals as _add_safe_globals

from ipo_ext import distributed, reference
from ipo_ext._C import VERSION as __version__
from ipo_ext._histogram import HISTOGRAM_EDGES
from ipo_ext._ops.library import NAMESPACE as _NAMESPACE
from ipo_ext._ops.register import register as _register
from ipo_ext._precision import LowPrecisionWarning
from ipo_ext.aggregation import aggregate, aggregation_counts
from ipo_ext.batch import LossBatch
from ipo_ext.config import IPOConfig
from ipo_ext.functional import (
    ipo_loss,
    ipo_loss_from_hidden,
    ipo_loss_from_logits,
    linear_token_logprobs,
    token_logprobs,
)
from ipo_ext.metrics import IPOMetrics
from ipo_ext.modules import IPOLMHead, IPOLoss, LinearIPOLoss
from ipo_ext.output import IPOOutput

__all__ = [
    "HISTOGRAM_EDGES",
    "IPOConfig",
    "IPOLMHead",
    "IPOLoss",
    "IPOMetrics",
    "IPOOutput",
    "LinearIPOLoss",
    "LossBatch",
    "LowPrecisionWarning",
    "__version__",
    "aggregate",
    "aggregation_counts",
    "distributed",
    "ipo_loss",
    "ipo_loss_from_hidden",
    "ipo_loss_from_logits",
    "linear_token_logprobs",
    "reference",
    "token_logprobs",
]

_register(_NAMESPACE)

# Tensors and numbers alone: a checkpoint that holds them loads with ``weights_only=True``.
_add_safe_globals([IPOConfig, IPOMetrics, IPOOutput, LossBatch])
