"""Settings of every mask rule: what tests of the rules go through."""

from __future__ import annotations

import dataclasses
import math

from ipo_ext import IPOConfig

RULES = {
    "dppo": IPOConfig.dppo(kl_tau=0.05),
    "dppo-lopsided": IPOConfig.dppo(0.05, 0.3, kl_tau=0.05),
    "prob-diff": IPOConfig.prob_diff(kl_tau=0.05),
    "kpop": IPOConfig.kpop(0.05, kl_tau=0.05),
    "ratio-kl-active": IPOConfig(kl_scope="active", kl_tau=0.05),
    "dppo-kl-kept": dataclasses.replace(IPOConfig.dppo(), kl_scope="kept", kl_tau=0.05),
    "everything": IPOConfig.kpop(math.inf),
    "nothing": IPOConfig.prob_diff(0.0),
}
