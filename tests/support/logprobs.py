"""Inputs of the loss from log-probabilities, random and nasty; Hypothesis's strategies for them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from ipo_ext import IPOConfig
from tests.support.cases import LogprobsCase
from tests.support.layouts import misaligned, strided_within

FLOAT_FIELDS = (
    "trainer_logprobs",
    "inference_logprobs",
    "advantages",
    "teacher_logprobs",
    "loss_weights",
)


def log_ratio(case: LogprobsCase) -> torch.Tensor:
    """The log-ratio on which the band is decided."""
    dtype = case.compute_dtype
    return case.trainer_logprobs.to(dtype) - case.inference_logprobs.to(dtype)


def kept(case: LogprobsCase) -> torch.Tensor:
    """The tokens that pay, by the definition of the band."""
    low, high = case.config.log_bounds(case.compute_dtype)
    x = log_ratio(case)
    return case.loss_mask & (x >= low) & (x <= high)


# ---------------------------------------------------------------------------------------------
# Dtypes, sizes and segments

# trainer, inference, advantages, teacher, weights
DTYPES = {
    "fp32": (torch.float32,) * 5,
    "fp64": (torch.float64,) * 5,
    "bf16": (torch.bfloat16,) * 5,
    "fp16": (torch.float16,) * 5,
    "bf16-and-fp32": (
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.float32,
    ),
    "every-dtype": (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float16,
    ),
    "fp64-inference": (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ),
}

TILES = (128, 1024, 2048)  # tokens of a tile: the smallest of a warp, of a block, the CPU's
SMALL_SIZES = tuple(range(1, 41))
EDGE_SIZES = tuple(sorted({tile * n + d for tile in TILES for n in (1, 2) for d in (-1, 0, 1)}))


def cu_seqlens(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def _at_tiles(tokens: int) -> list[int]:
    """Segments that end at, one before and one after the end of each tile of a block."""
    ends = {end + d for end in range(0, tokens, TILES[1]) for d in (-1, 0, 1)}
    ends = [0, *sorted(end for end in ends if 0 < end < tokens), tokens]
    return [b - a for a, b in itertools.pairwise(ends)]


SEGMENTS: dict[str, Callable[[int], list[int]]] = {
    "one": lambda tokens: [tokens],
    "empty-around": lambda tokens: [0, 0, tokens, 0],
    "empty-many": lambda tokens: [0] * 270 + [tokens // 2] + [0] * 20 + [tokens - tokens // 2],
    "empty-between": lambda tokens: [tokens // 3, 0, 0, 0, tokens - tokens // 3],
    "singles": lambda tokens: [1] * tokens,
    "single-ends": lambda tokens: [1, tokens - 2, 1] if tokens > 2 else [tokens],
    "at-tiles": _at_tiles,
    "sevens": lambda tokens: [7] * (tokens // 7) + [tokens % 7],
}


# A segment costs two block reductions, which the emulator runs thread by thread.
MOST_TOKENS = {name: {"singles": 41, "sevens": 340}.get(name, 2**62) for name in SEGMENTS}


# ---------------------------------------------------------------------------------------------
# Cases


def random_case(
    tokens: int,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES["fp32"],
    seed: int = 0,
    teacher: bool = False,
    weights: bool = False,
    segments: str | None = None,
    masked: float = 0.2,
    spread: float = 1.5,
    **fields: Any,
) -> LogprobsCase:
    """Log-probabilities of a policy that drifted: about a quarter of the tokens leave the band."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(tokens, generator=generator)

    trainer = torch.empty(tokens).exponential_(generator=generator).mul(-2)
    inference = trainer + spread * normal()
    advantages = normal()
    teacher_logprobs = trainer + normal()
    loss_weights = torch.rand(tokens, generator=generator) * 2
    if teacher:
        fields.setdefault("config", IPOConfig(teacher_tau=0.3, kl_tau=0.05))
    return LogprobsCase(
        trainer_logprobs=trainer.to(dtypes[0]),
        inference_logprobs=inference.to(dtypes[1]),
        advantages=advantages.to(dtypes[2]),
        loss_mask=torch.rand(tokens, generator=generator) >= masked,
        teacher_logprobs=teacher_logprobs.to(dtypes[3]) if teacher else None,
        loss_weights=loss_weights.to(dtypes[4]) if weights else None,
        cu_seqlens=cu_seqlens(SEGMENTS[segments](tokens)) if segments else None,
        **fields,
    )


GARBAGE = (math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-45, -0.0, 65504.0)


def with_garbage(case: LogprobsCase, positions: torch.Tensor, seed: int = 0) -> LogprobsCase:
    """The case with garbage in every floating input at ``positions``."""
    generator = torch.Generator().manual_seed(seed)

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        chosen = torch.randint(len(GARBAGE), tensor.shape, generator=generator)
        garbage = torch.tensor(GARBAGE, dtype=torch.float64)[chosen].to(tensor.dtype)
        return torch.where(positions, garbage, tensor)

    return case.map_tokens(spoil)


def nasty_case(tokens: int, *, seed: int = 0, **options: Any) -> LogprobsCase:
    """A random case where active log-probabilities too are infinite, NaN, huge or subnormal."""
    case = random_case(tokens, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    hit = torch.rand(tokens, generator=generator) < 0.3
    spoiled = with_garbage(case, hit, seed)
    fields = ("trainer_logprobs", "inference_logprobs")
    case = case.with_(**{name: getattr(spoiled, name) for name in fields})
    return with_garbage(case, ~case.loss_mask, seed)


# ---------------------------------------------------------------------------------------------
# Memory: shapes that tempt a kernel to leave its buffers. Guarded buffers and sanitizers run these.

# cu_seqlens of 100 tokens that are no partition.
HOSTILE_CU_SEQLENS = {
    "decreasing": [0, 60, 40, 100],
    "negative": [0, -1, 100],
    "lowest": [-(2**31), 100],
    "far-beyond": [0, 2**31 - 1, 100],
    "far-end": [0, 50, 2**31 - 1],
    "short-end": [0, 50],
    "long-end": [0, 50, 101],
    "late-start": [1, 100],
    "only-zero": [0],
    "only-far": [7],
    "reversed": [100, 0],
    "zigzag": [0, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 100],
    "many-wild": [(37 * i * 2**20 - 2**30) % 2**31 for i in range(70)],
}


def _hostile(values: list[int]) -> LogprobsCase:
    return random_case(100, teacher=True).with_(cu_seqlens=torch.tensor(values, dtype=torch.int32))


def _memory_cases() -> dict[str, Callable[[], LogprobsCase]]:
    cases: dict[str, Callable[[], LogprobsCase]] = {"empty": lambda: random_case(0)}
    for tokens in (1, 2, 3, 4, 5, 7, 31, 33, 255, 257, *EDGE_SIZES):
        name = tuple(DTYPES)[tokens % len(DTYPES)]
        cases[f"{name}-{tokens}"] = lambda tokens=tokens, name=name: random_case(
            tokens, dtypes=DTYPES[name], teacher=tokens % 2 == 0, weights=tokens % 3 == 0
        )
    for name, dtypes in DTYPES.items():
        for elements in (1, 2, 3):
            cases[f"{name}-misaligned-{elements}"] = lambda dtypes=dtypes, elements=elements: (
                random_case(1025, dtypes=dtypes, teacher=True, weights=True).map_tokens(
                    lambda tensor: misaligned(tensor, elements)
                )
            )
        cases[f"{name}-strided"] = lambda dtypes=dtypes: random_case(
            1035, dtypes=dtypes, teacher=True, weights=True
        ).map_tokens(lambda tensor: strided_within(tensor, 45))
        cases[f"{name}-transposed"] = lambda dtypes=dtypes: random_case(
            1035, dtypes=dtypes, teacher=True
        ).map_tokens(lambda tensor: tensor.view(45, 23).t())
    for name in SEGMENTS:
        for tokens in sorted({min(tokens, MOST_TOKENS[name]) for tokens in (2, 1029, 3001)}):
            cases[f"segments-{name}-{tokens}"] = lambda tokens=tokens, name=name: random_case(
                tokens, segments=name
            )
    for name, values in HOSTILE_CU_SEQLENS.items():
        cases[f"hostile-{name}"] = lambda values=values: _hostile(values)
    return cases


MEMORY_CASES = _memory_cases()


# ---------------------------------------------------------------------------------------------
# Hypothesis strategies

sizes = st.one_of(st.integers(0, 40), st.sampled_from(EDGE_SIZES), st.integers(0, 5000))


@st.composite
def segment_lengths(draw: st.DrawFn, tokens: int) -> list[int]:
    """Lengths that add up to ``tokens``: a named layout, or any cuts, those at tiles favoured."""
    if draw(st.booleans()):
        names = [name for name in sorted(SEGMENTS) if tokens <= MOST_TOKENS[name]]
        return SEGMENTS[draw(st.sampled_from(names))](tokens)
    cut = st.one_of(
        st.integers(0, tokens),
        st.sampled_from([min(edge, tokens) for edge in (0, 1, *EDGE_SIZES)]),
    )
    ends = [0, *sorted(draw(st.lists(cut, max_size=12))), tokens]
    return [b - a for a, b in itertools.pairwise(ends)]


configs = st.builds(
    IPOConfig,
    dppo_mask_low=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
    dppo_mask_high=st.sampled_from([0.9, 1.0, 2.0, 5.0, math.inf]),
    adv_tau=st.sampled_from([0.0, 1.0, 0.7]),
    kl_tau=st.sampled_from([0.0, 1e-3, 0.5]),
)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    make: Callable[..., LogprobsCase] = random_case,
    tokens: st.SearchStrategy[int] = sizes,
    dtypes: Sequence[str] = tuple(DTYPES),
    packed: bool | None = None,
) -> LogprobsCase:
    """Any case: shape, segments, dtypes, alignment, optional inputs and settings."""
    count = draw(tokens)
    case = make(
        count,
        dtypes=DTYPES[draw(st.sampled_from(dtypes))],
        seed=draw(st.integers(0, 2**32)),
        teacher=draw(st.booleans()),
        weights=draw(st.booleans()),
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
    )
    config = draw(configs)
    if case.teacher_logprobs is not None:
        config = dataclasses.replace(config, teacher_tau=draw(st.sampled_from([0.0, 0.3])))
    case = case.with_(config=config, normalizer=draw(st.sampled_from([None, 1.0, 17.5, 1e-3])))
    if draw(st.booleans()) if packed is None else packed:
        case = case.with_(cu_seqlens=cu_seqlens(draw(segment_lengths(count))))
    elements = draw(st.sampled_from([0, 0, 1, 2, 3]))
    return case.map_tokens(lambda tensor: misaligned(tensor, elements)) if elements else case
