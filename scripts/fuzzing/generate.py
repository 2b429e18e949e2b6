"""Random valid calls, a batch at a time: what makes a batch is drawn as a whole, then cut up.

The calls of a batch share function, dtypes, settings and the width of their rows, so that one call
of the reference judges them all; sizes, shapes, strides, values and optional numbers are their own.
A call is a function of the seed and of its number alone.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import torch

from fuzzing.calls import DEFAULT, FUNCTIONS, Call
from ipo_ext import IPOConfig
from tests.support.logprobs import DTYPES, GARBAGE, MOST_TOKENS, SEGMENTS, TILES
from tests.support.rules import RULES

BATCH = 64
SHARES = {
    "ipo_loss": 0.60,
    "ipo_loss_from_logits": 0.14,
    "ipo_loss_from_hidden": 0.06,
    "token_logprobs": 0.14,
    "linear_token_logprobs": 0.06,
}
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Around the ends of vectors and tiles; how many tokens, and how many columns.
TOKENS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65)
LONG = tuple(tile + d for tile in TILES for d in (-1, 0, 1))
COLUMNS = (1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65)
WIDE = (127, 128, 129, 255, 257, 1000, 1023, 1024, 1025, 2053)
WIDTHS = (1, 2, 7, 8, 16, 33)
CHUNKS = (None, 1, 2, 3, 128)

# A trainer and an inference log-probability whose ratio is not finite, or nearly so.
NONFINITE = (
    (math.nan, -1.0),
    (-1.0, math.nan),
    (math.inf, -1.0),
    (-math.inf, -1.0),
    (-1.0, -math.inf),
    (-1.0, math.inf),
    (-math.inf, -math.inf),
    (60_000.0, -1000.0),
    (0.0, -88.72283),
    (0.0, -88.7229),
    (-104.0, 0.0),
)

# Those that float32 does not hold, or whose reciprocal it does not, are a test's own:
# tests/api/test_extreme_numbers.py.
NORMALIZERS = (1.0, 17.5, 1e-3, 3, 4096.0, 1e6)
TEMPERATURES = (1.0, 0.7, 0.05, 3.0, 40.0)
SOFTCAPS = (None, None, None, 5.0, 30.0, 0.25)
LOGIT_SCALES = (None, None, None, 0.0625, 0.3, 4.0)


def calls_of_batch(seed: int, batch: int) -> list[Call]:
    """The ``BATCH`` valid calls of a batch."""
    choose = random.Random(f"{seed}/{batch}")
    function = choose.choices(tuple(SHARES), tuple(SHARES.values()))[0]
    return list(_Batch(function, choose).calls())


class _Batch:
    """What the calls of a batch have in common, and the values of all of them, end to end."""

    def __init__(self, function: str, choose: random.Random) -> None:
        self.function, self.choose = function, choose
        self.generator = torch.Generator().manual_seed(choose.getrandbits(62))
        self.takes = FUNCTIONS[function]
        self.from_logprobs = function == "ipo_loss"
        self.is_loss = "logprobs" not in function
        self.dtypes = self._dtypes()
        self.config = _config(choose) if self.is_loss else DEFAULT
        self.softcap = None if self.from_logprobs else choose.choice(SOFTCAPS)
        self.logit_scale = None if self.from_logprobs else choose.choice(LOGIT_SCALES)
        self.columns = choose.choice(WIDE) if choose.random() < 0.05 else choose.choice(COLUMNS)
        self.width = choose.choice(WIDTHS)
        self.hostile = choose.random() < 0.5  # garbage where it must not matter, and NaN where
        self.has_teacher = self.config.teacher_tau > 0 or choose.random() < 0.3
        self.has_bias = choose.random() < 0.4
        self.has_weights = choose.random() < 0.4
        self.sizes = [self._size() for _ in range(BATCH)]

    def calls(self) -> Iterator[Call]:
        tokens = sum(self.sizes)
        values = self._row_values(tokens) if not self.from_logprobs else {}
        if self.is_loss:
            values.update(self._loss_values(tokens, values))
        if self.hostile:
            self._spoil(values)
        ends = itertools.accumulate(self.sizes, initial=0)
        for begin, end in itertools.pairwise(ends):
            yield self._call({name: value[begin:end] for name, value in values.items()})

    # ---------------------------------------------------------------------------------------------
    # Shared

    def _dtypes(self) -> dict[str, torch.dtype]:
        names = ("trainer_logprobs", "inference_logprobs", "advantages")
        names = (*names, "teacher_logprobs", "loss_weights")
        chosen: Any = self.choose.choice(tuple(DTYPES.values()))
        if self.choose.random() < 0.3:
            chosen = [self.choose.choice(FLOATING) for _ in names]
        rows = self.choose.choice(FLOATING)
        of_rows = dict.fromkeys(("logits", "hidden", "weight", "bias"), rows)
        return {**dict(zip(names, chosen, strict=True)), **of_rows}

    def _size(self) -> int:
        choose = self.choose
        if not self.from_logprobs:
            most = 8 if self.columns < 100 else 3
            return choose.choice((0, 1, 1, 2, 2, 3, 4, most))
        return choose.choice(LONG) if choose.random() < 0.01 else choose.choice(TOKENS)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def _some(self, shape: torch.Size | tuple[int, ...], share: float) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator) < share

    def _pick(self, values: tuple[float, ...], tokens: int) -> torch.Tensor:
        index = torch.randint(len(values), (tokens,), generator=self.generator)
        return torch.tensor(values, dtype=torch.float64)[index]

    # ---------------------------------------------------------------------------------------------
    # Values

    def _row_values(self, tokens: int) -> dict[str, torch.Tensor]:
        spread = self.choose.choice((0.1, 2.0, 2.0, 8.0))
        labels = torch.randint(self.columns, (tokens,), generator=self.generator)
        integer = self.choose.choice((torch.int32, torch.int64))
        values = {
            "labels": labels.to(integer),
            "temperature": self._uniform(tokens) * 2 + 0.25,
        }
        if "hidden" in self.takes.leaves:
            values["hidden"] = self._as("hidden", self._normal(tokens, self.width))
            scale = spread / self.width**0.5
            weights = scale * self._normal(BATCH, self.columns, self.width)
            self.weights = iter(self._as("weight", weights))
            self.biases = iter(self._as("bias", spread * self._normal(BATCH, self.columns)))
        else:
            logits = spread * self._normal(tokens, self.columns)
            logits += self.choose.choice((0.0, 0.0, 0.0, 50.0, -1000.0))
            values["logits"] = self._as("logits", logits)
        return values

    def _loss_values(self, tokens: int, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        choose = self.choose
        x = choose.choice((0.0, 0.05, 1.5, 1.5, 12.0)) * self._normal(tokens)
        if choose.random() < 0.3:
            trainer = 3 * self._normal(tokens)  # no logarithms of probabilities
        else:
            trainer = -2 * torch.empty(tokens, dtype=torch.float64).exponential_(
                generator=self.generator
            )
        if "logits" in rows:
            trainer = self._likely(rows)
        inference = trainer - x
        if choose.random() < 0.3:
            self._put_at_edges(trainer, inference)
        if self.from_logprobs and choose.random() < 0.4:
            self._put_nonfinite(trainer, inference)
        values = {
            "trainer_logprobs": trainer,
            "inference_logprobs": inference,
            "advantages": choose.choice((1.0, 1.0, 100.0)) * self._normal(tokens),
            "teacher_logprobs": trainer.nan_to_num(0.0, 3.0, -3.0) + self._normal(tokens),
            "loss_weights": choose.choice((1.0, 1.0, 1e-3)) * self._uniform(tokens),
        }
        if choose.random() < 0.1:
            values["loss_weights"][self._some((tokens,), 0.2)] = 0
        if self.from_logprobs and choose.random() < 0.03:
            values["advantages"][self._some((tokens,), 0.02)] = math.nan
        optional = {"trainer_logprobs": self.from_logprobs}
        optional |= {"teacher_logprobs": self.has_teacher, "loss_weights": self.has_weights}
        values = {k: self._as(k, v) for k, v in values.items() if optional.get(k, True)}
        active = choose.choice((0.0, 0.2, 0.7, 0.9, 1.0))
        return {**values, "loss_mask": self._some((tokens,), active)}

    def _as(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.dtypes[name])

    def _likely(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """Roughly the log-probabilities of the labels."""
        log_p = rows["logits"].double().log_softmax(-1)
        return log_p.gather(-1, rows["labels"].long()[:, None])[:, 0]

    def _put_at_edges(self, trainer: torch.Tensor, inference: torch.Tensor) -> None:
        """Some tokens exactly at a bound of the rule, or one rounding beyond."""
        config, here = self.config, self._some(trainer.shape, 0.05)
        if config.mask_rule != "ratio":  # at most one in a call: a flip is proven for all at once
            stride = max(self.sizes) + 1
            here = torch.arange(len(trainer)) % stride == self.choose.randrange(stride)
        some = int(here.sum())
        compute = torch.float64 if torch.float64 in self._logprob_dtypes() else torch.float32
        if config.mask_rule == "ratio" and self.from_logprobs:
            x = self._pick(config.log_bounds(compute), some).to(compute)
            beyond = self._pick((-math.inf, 0.0, math.inf), some).to(compute)
            x = torch.where(self._some(x.shape, 0.5), x, torch.nextafter(x, beyond))
            trainer[here], inference[here] = x.double(), 0.0
        elif config.mask_rule in ("dppo", "prob_diff"):
            q = self._uniform(some) * 0.5 + 0.05
            p = (q + self._pick((config.dppo_mask_high, -config.dppo_mask_low), some)).clamp(min=0)
            trainer[here], inference[here] = p.log(), q.log()

    def _logprob_dtypes(self) -> tuple[torch.dtype, ...]:
        return self.dtypes["trainer_logprobs"], self.dtypes["inference_logprobs"]

    def _put_nonfinite(self, trainer: torch.Tensor, inference: torch.Tensor) -> None:
        here = self._some(trainer.shape, 0.05)
        index = torch.randint(len(NONFINITE), trainer.shape, generator=self.generator)[here]
        pairs = torch.tensor(NONFINITE, dtype=torch.float64)[index]
        trainer[here], inference[here] = pairs[:, 0], pairs[:, 1]

    def _spoil(self, values: dict[str, torch.Tensor]) -> None:
        """Garbage where the mask or a label of -100 leaves a token out, and in some active rows."""
        labels = values.get("labels")
        if self.is_loss:
            inactive = ~values["loss_mask"]
            if labels is not None:
                labels[inactive] = self.choose.choice((-100, -1, 2**31 - 1))
        else:
            inactive = self._some(labels.shape, 0.2)
            labels[inactive] = -100
        for tensor in values.values():
            if tensor.is_floating_point():
                garbage = self._pick(GARBAGE, len(tensor)).to(tensor.dtype)
                chosen = inactive if tensor.dim() == 1 else inactive[:, None]
                tensor.copy_(
                    torch.where(chosen, garbage.view(-1, *[1] * (tensor.dim() - 1)), tensor)
                )
        for name in ("logits", "hidden"):
            if name in values:
                rows = values[name]
                here = self._some((len(rows),), 0.05)[:, None] & self._some(rows.shape, 0.3)
                # Of hidden states only what cannot be undone: a finite one may cancel or overflow.
                kinds = GARBAGE if name == "logits" else (math.nan, math.inf)
                rows[here] = self._pick(kinds, int(here.sum())).to(rows.dtype)

    # ---------------------------------------------------------------------------------------------
    # One call

    def _call(self, values: dict[str, torch.Tensor]) -> Call:
        choose = self.choose
        tokens = len(next(iter(values.values())))
        arguments: dict[str, Any] = {}
        shape = self._shape(tokens)
        temperature = values.pop("temperature", None)
        for name, value in values.items():
            arguments[name] = _lay_out(value.view((*shape, *value.shape[1:])).clone(), choose)
        if "hidden" in arguments:
            arguments["weight"] = _lay_out(next(self.weights).clone(), choose)
            bias = _lay_out(next(self.biases).clone(), choose)
            self._put(arguments, "bias", bias if self.has_bias else None)
            self._put(arguments, "chunk_size", choose.choice(CHUNKS))
        if temperature is not None:
            self._put(arguments, "temperature", self._temperature(temperature.view(shape)))
        self._put(arguments, "softcap", self.softcap)
        self._put(arguments, "logit_scale", self.logit_scale)
        if self.is_loss:
            self._put_loss_options(arguments, shape)
        return self._how(arguments)

    @staticmethod
    def _put(arguments: dict[str, Any], name: str, value: Any) -> None:
        if value is not None:
            arguments[name] = value

    def _shape(self, tokens: int) -> tuple[int, ...]:
        """1-D where the rows of [..., T] would be sequences of a rollout rule."""
        kind = self.choose.random()
        if self.config.has_rollout_rule or kind < 0.6:
            return (tokens,)
        if tokens == 1 and kind < 0.7:
            return ()
        divisors = [d for d in (1, 2, 3, 4, 5, 8) if tokens % d == 0]
        rows = self.choose.choice(divisors)
        return (rows, tokens // rows) if kind < 0.95 else (1, rows, tokens // rows)

    def _temperature(self, per_token: torch.Tensor) -> float | torch.Tensor | None:
        kind, number = self.choose.random(), self.choose.choice(TEMPERATURES)
        dtype = self.choose.choice(FLOATING)
        if kind < 0.4:
            return None
        if kind < 0.6:
            return number
        if kind < 0.8:
            return torch.tensor(number, dtype=dtype)
        return _lay_out(per_token.clone().to(dtype), self.choose)

    def _put_loss_options(self, arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
        choose, tokens = self.choose, math.prod(shape)
        if choose.random() < 0.3:
            arguments["cu_seqlens"] = self._cu_seqlens(tokens)
        if choose.random() < 0.5:
            arguments["normalizer"] = self._normalizer()
        if self.config is not DEFAULT:
            arguments["config"] = self.config
        if "hidden" in arguments and choose.random() < 0.3:
            active = int(arguments["loss_mask"].sum())
            arguments["num_active"] = active + choose.choice((0, 0, 1, 5, 1000))

    def _normalizer(self) -> float | torch.Tensor:
        number = self.choose.choice(NORMALIZERS)
        if self.choose.random() < 0.5:
            return number
        dtype = self.choose.choice((*FLOATING, torch.int32, torch.int64))
        if self.choose.random() < 0.2:
            return torch.zeros((), dtype=dtype)
        if dtype in (torch.int32, torch.int64, torch.float16):
            number = max(1, int(min(number, 4096)))
        return torch.tensor(number, dtype=dtype)

    def _cu_seqlens(self, tokens: int) -> torch.Tensor:
        choose = self.choose
        if choose.random() < 0.3 and tokens <= 65:
            names = [name for name in SEGMENTS if tokens <= MOST_TOKENS[name]]
            names.remove("empty-many")  # 290 segments, each of which costs the reference a while
            lengths = SEGMENTS[choose.choice(names)](tokens)
            ends = [0, *itertools.accumulate(lengths)]
        else:
            inner = [choose.randint(0, tokens) for _ in range(choose.choice((0, 1, 1, 2, 3, 5)))]
            ends = [0, *sorted(inner), tokens]
        return torch.tensor(ends, dtype=torch.int32)

    def _how(self, arguments: dict[str, Any]) -> Call:
        """How it is differentiated and called."""
        choose = self.choose
        leaves = tuple(name for name in self.takes.leaves if name in arguments)
        kind = choose.random()
        if kind < 0.07:
            leaves = ()
        elif kind < 0.2 and len(leaves) > 1:
            leaves = (choose.choice(leaves),)
        from_logits = self.function == "ipo_loss_from_logits"
        if from_logits and choose.random() < 0.25 and _can_be_overwritten(arguments["logits"]):
            arguments["inplace"] = True
        through_module = self.function in ("ipo_loss", "ipo_loss_from_hidden")
        return Call(
            self.function,
            arguments,
            leaves,
            self._grads(arguments),
            twice=bool(leaves) and not arguments.get("inplace") and choose.random() < 0.1,
            through_module=through_module and choose.random() < 0.1,
        )

    def _grads(self, arguments: dict[str, Any]) -> tuple[float | torch.Tensor | None, ...]:
        if self.is_loss:
            return (self.choose.choice((1.0, 1.0, 0.37, -3.0, 1024.0)),)
        labels = arguments["labels"]
        leaf = arguments[self.takes.leaves[0]]
        compute = torch.promote_types(leaf.dtype, torch.float32)
        grads = [self._normal(*labels.shape).to(compute) for _ in range(2)]
        if self.choose.random() < 0.2:
            grads[0] = grads[0] * self._some(labels.shape, 0.5)
        if self.choose.random() < 0.3:
            grads[self.choose.randrange(2)] = None
        return tuple(grads)


def _config(choose: random.Random) -> IPOConfig:
    kind = choose.random()
    teacher_tau = choose.choice((0.0, 0.0, 0.3))
    if kind < 0.2:
        return IPOConfig(teacher_tau=teacher_tau) if teacher_tau else DEFAULT
    settings = {
        "adv_tau": choose.choice((0.0, 1.0, 1.0, 0.7)),
        "kl_tau": choose.choice((0.0, 1e-3, 0.5)),
        "teacher_tau": teacher_tau,
        "kl_scope": choose.choice(("kept", "active")),
        "rollout_min_ratio": choose.choice((0.0, 0.0, 0.0, 1e-5, 0.3)),
    }
    if kind < 0.7:
        low, high = choose.choice((0.0, 0.2, 0.5, 0.9)), choose.choice((0.9, 1, 2, 5, math.inf))
        return IPOConfig(low, high, **settings)
    rule = choose.choice([rule for rule in RULES.values() if rule.mask_rule != "ratio"])
    bounds = rule.dppo_mask_low, rule.dppo_mask_high
    return IPOConfig(*bounds, mask_rule=rule.mask_rule, **settings)


# -------------------------------------------------------------------------------------------------
# How tensors lie in memory


def _lay_out(tensor: torch.Tensor, choose: random.Random) -> torch.Tensor:
    """The same values, contiguous or among others that must not be read."""
    kind = choose.random()
    if kind < 0.5 or tensor.dim() == 0:
        return tensor
    if kind < 0.6:
        return _within(tensor, (*tensor.shape[:-1], tensor.shape[-1]), offset=choose.randint(1, 3))
    if kind < 0.7:
        return _within(tensor, (*tensor.shape[:-1], tensor.shape[-1] + choose.randint(1, 3)))
    if tensor.dim() == 1 or kind < 0.8:
        return _within(tensor, (*tensor.shape[:-1], 2 * tensor.shape[-1]), step=2)
    if kind < 0.9:
        return _within(tensor, (*tensor.shape[:-2], tensor.shape[-2] + 1, tensor.shape[-1]))
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _within(
    tensor: torch.Tensor, shape: tuple[int, ...], *, offset: int = 0, step: int = 1
) -> torch.Tensor:
    """A copy inside a larger tensor, full of what no one may read."""
    filler = math.nan if tensor.is_floating_point() else 1
    room = tensor.new_full((math.prod(shape) + offset,), filler)[offset:].view(shape)
    view = room[..., ::step][tuple(slice(n) for n in tensor.shape)]
    return view.copy_(tensor)


def _can_be_overwritten(logits: torch.Tensor) -> bool:
    return logits.dim() > 0 and logits.stride(-1) == 1 and 0 not in logits.shape
