"""Inputs of the loss, random and nasty, and how to run one: for tests, sanitizers, benchmarks."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

import ipo_ext
from ipo_ext import IPOConfig, _operators, reference

TOKEN_FIELDS = (
    "trainer_logprobs",
    "inference_logprobs",
    "advantages",
    "loss_mask",
    "teacher_logprobs",
    "loss_weights",
)
FLOAT_FIELDS = tuple(name for name in TOKEN_FIELDS if name != "loss_mask")
_DEFAULT = IPOConfig()


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of one call of ``ipo_loss``."""

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    teacher_logprobs: torch.Tensor | None = None
    loss_weights: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    normalizer: float | torch.Tensor | None = None
    config: IPOConfig = _DEFAULT

    def with_(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def map_tokens(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        """The case with ``function`` applied to every per-token tensor."""
        fields = {name: getattr(self, name) for name in TOKEN_FIELDS}
        return self.with_(**{k: function(v) for k, v in fields.items() if v is not None})

    def to(self, device: torch.device | str) -> Case:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return self.with_(
            **{k: v.to(device) for k, v in fields.items() if isinstance(v, torch.Tensor)}
        )

    @property
    def tokens(self) -> int:
        return self.trainer_logprobs.numel()

    @property
    def compute_dtype(self) -> torch.dtype:
        float64 = torch.float64 in (self.trainer_logprobs.dtype, self.inference_logprobs.dtype)
        return torch.float64 if float64 else torch.float32

    def call(self, function: Callable[..., ipo_ext.IPOOutput], **options: Any) -> ipo_ext.IPOOutput:
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        required = [arguments.pop(name) for name in TOKEN_FIELDS[:4]]
        return function(*required, **arguments, **options)


# ---------------------------------------------------------------------------------------------
# Running a case


@dataclasses.dataclass(frozen=True)
class Evaluation:
    loss: torch.Tensor
    gradient: torch.Tensor
    metrics: Mapping[str, torch.Tensor]


def evaluate(
    case: Case,
    function: Callable[..., ipo_ext.IPOOutput] = ipo_ext.ipo_loss,
    *,
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    **options: Any,
) -> Evaluation:
    """Loss, metrics and the gradient of ``scale(loss)``, in the trainer's dtype."""
    leaf = case.trainer_logprobs.detach().requires_grad_()
    loss, metrics, *_ = case.with_(trainer_logprobs=leaf).call(function, **options)
    (gradient,) = torch.autograd.grad(scale(loss), leaf)
    return Evaluation(loss.detach(), gradient, metrics)


def operator_gradient(case: Case) -> torch.Tensor:
    """The gradient as the operator makes it, in the compute dtype."""
    normalizer = case.normalizer
    if isinstance(normalizer, float | int):
        normalizer = torch.tensor(normalizer, dtype=torch.float64)
    return _operators.library().ipo_loss(
        *(getattr(case, name) for name in TOKEN_FIELDS),
        case.cu_seqlens,
        normalizer,
        *case.config.settings(case.compute_dtype),
        True,
    )[1]


def log_ratio(case: Case) -> torch.Tensor:
    """The log-ratio on which the band is decided."""
    dtype = case.compute_dtype
    return case.trainer_logprobs.to(dtype) - case.inference_logprobs.to(dtype)


def kept(case: Case) -> torch.Tensor:
    """The tokens that pay, by the definition of the band."""
    low, high = case.config.log_bounds(case.compute_dtype)
    x = log_ratio(case)
    return case.loss_mask & (x >= low) & (x <= high)


def widened(case: Case) -> Case:
    """The same per-token losses in float64: the band's decisions become the mask."""
    wide = case.map_tokens(lambda t: t.double() if t.is_floating_point() else t)
    everything = dataclasses.replace(case.config, dppo_mask_low=0.0, dppo_mask_high=math.inf)
    return wide.with_(loss_mask=kept(case), config=everything)


def exact_gradient(case: Case) -> torch.Tensor:
    """The reference's gradient in float64."""
    return evaluate(widened(case), reference.ipo_loss).gradient


def naive_gradient(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """The gradient by eager torch in ``dtype``."""
    narrow = widened(case).map_tokens(lambda t: t.to(dtype) if t.is_floating_point() else t)
    return evaluate(narrow, reference.ipo_loss).gradient


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers: equal where every bit is."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(integers[tensor.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def assert_same_bits(a: Evaluation, b: Evaluation) -> None:
    """Fails unless loss, gradient, sums, extremes and means agree in every bit."""
    assert same_bits(a.loss, b.loss), f"loss {a.loss.item()!r} and {b.loss.item()!r}"
    assert same_bits(a.gradient, b.gradient), "gradients differ"
    for part in ("sums", "extremes", "means"):
        left, right = getattr(a.metrics, part), getattr(b.metrics, part)
        assert same_bits(left, right), f"{part} differ: {left} and {right}"


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

TILES = (1024, 2048)  # tokens of a tile: the CUDA kernel's smallest, and the CPU's
SMALL_SIZES = tuple(range(1, 41))
EDGE_SIZES = tuple(sorted({tile * n + d for tile in TILES for n in (1, 2) for d in (-1, 0, 1)}))


def cu_seqlens(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def _at_tiles(tokens: int) -> list[int]:
    """Segments that end at, one before and one after each tile's end."""
    ends = {end + d for end in range(0, tokens, TILES[0]) for d in (-1, 0, 1)}
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
) -> Case:
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
    return Case(
        trainer.to(dtypes[0]),
        inference.to(dtypes[1]),
        advantages.to(dtypes[2]),
        torch.rand(tokens, generator=generator) >= masked,
        teacher_logprobs.to(dtypes[3]) if teacher else None,
        loss_weights.to(dtypes[4]) if weights else None,
        cu_seqlens(SEGMENTS[segments](tokens)) if segments else None,
        **fields,
    )


GARBAGE = (math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-45, -0.0, 65504.0)


def with_garbage(case: Case, positions: torch.Tensor, seed: int = 0) -> Case:
    """The case with garbage in every floating input at ``positions``."""
    generator = torch.Generator().manual_seed(seed)

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        chosen = torch.randint(len(GARBAGE), tensor.shape, generator=generator)
        garbage = torch.tensor(GARBAGE, dtype=torch.float64)[chosen].to(tensor.dtype)
        return torch.where(positions, garbage, tensor)

    return case.map_tokens(spoil)


def nasty_case(tokens: int, *, seed: int = 0, **options: Any) -> Case:
    """A random case where active log-probabilities too are infinite, NaN, huge or subnormal."""
    case = random_case(tokens, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    hit = torch.rand(tokens, generator=generator) < 0.3
    spoiled = with_garbage(case, hit, seed)
    fields = ("trainer_logprobs", "inference_logprobs")
    case = case.with_(**{name: getattr(spoiled, name) for name in fields})
    return with_garbage(case, ~case.loss_mask, seed)


def misaligned(tensor: torch.Tensor, elements: int = 1) -> torch.Tensor:
    """A copy that begins ``elements`` elements past an aligned address."""
    room = tensor.new_empty(tensor.numel() + elements)
    return room[elements:].view(tensor.shape).copy_(tensor)


def strided(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    """``[rows, columns]`` of a flat tensor as rows of a wider matrix, NaN (or True) between."""
    rows = tensor.numel() // columns
    filler = True if tensor.dtype == torch.bool else math.nan
    room = tensor.new_full((rows, columns + 3), filler)
    room[:, 1:-2] = tensor[: rows * columns].view(rows, columns)
    return room[:, 1:-2]


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


def _hostile(values: list[int]) -> Case:
    return random_case(100, teacher=True).with_(cu_seqlens=torch.tensor(values, dtype=torch.int32))


def _memory_cases() -> dict[str, Callable[[], Case]]:
    cases: dict[str, Callable[[], Case]] = {"empty": lambda: random_case(0)}
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
        ).map_tokens(lambda tensor: strided(tensor, 45))
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
    make: Callable[..., Case] = random_case,
    tokens: st.SearchStrategy[int] = sizes,
    dtypes: Sequence[str] = tuple(DTYPES),
    packed: bool | None = None,
) -> Case:
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
