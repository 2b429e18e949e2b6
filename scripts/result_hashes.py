"""Saves or compares the bits of seeded random calls of operators, on the CPU and emulated.

`python scripts/result_hashes.py --save before.json`, change what must compute the same,
`python scripts/result_hashes.py --compare before.json`: exits 1 and names the first calls whose
bits differ. Every argument has a random stream of its own, named after it, so that a schema may
order its arguments anew. All operators but those that exchange with other ranks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ipo_ext import IPOConfig  # noqa: E402
from ipo_ext._ops.arguments import OPERATORS  # noqa: E402

ALONE = [name for name in OPERATORS if "sharded" not in name and "totals" not in name]
FROM_LOGPROBS = (
    "ipo_loss",
    "component_loss",
    "loss_and_metrics",
    "score_centering",
    "sequence_statistics",
    "log_ratio_histogram",
)
# What may replay a sampling mask, and see candidates; the backward pass of the second likewise.
REPLAYING = ("ipo_loss_from_logits", "token_logprobs", "token_logprobs_backward")

BLOCK = 50  # calls of a hash
TOKENS = (0, 1, 2, 3, 7, 15, 16, 31, 32, 33, 64, 100, 257, 1023, 1024, 1025, 2500)
ROWS = (0, 1, 2, 3, 5, 8)
COLUMNS = (1, 2, 7, 8, 9, 31, 64, 100, 255, 257, 1000, 2053)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONFIGS = (
    IPOConfig(),
    IPOConfig(0.0, math.inf, adv_tau=0.5, kl_tau=0.1, teacher_tau=0.3),
    IPOConfig(0.9, 1.1),
    IPOConfig(0.5, 2.0, kl_scope="active"),
    IPOConfig.dppo(),
    IPOConfig.icepop(rollout_min_ratio=0.3),
    IPOConfig.prob_diff(),
    IPOConfig.kpop(0.01),
    IPOConfig.ipo(),
    IPOConfig.ppo(),
    IPOConfig.cispo(),
    IPOConfig.geometric(0.9, 1.1),
    IPOConfig.sequence_tis(2.0),
)


class Call:
    """One seeded call: every quantity is drawn from a stream that its name and the call seed."""

    def __init__(self, operator: str, index: int, ops: Any) -> None:
        self.key, self.ops = f"{operator}/{index}", ops
        self.operator, choose = operator, self.choices("call")
        self.from_logits = operator not in FROM_LOGPROBS
        self.tokens = choose.choice(ROWS if self.from_logits else TOKENS)
        self.vocabulary = choose.choice(COLUMNS)
        self.width = choose.choice((1, 8, 33))
        self.dtype = choose.choice(DTYPES)
        sees_sequences = operator != "chunk_logprobs_and_gradient"
        configs = [c for c in CONFIGS if sees_sequences or not c.judges_sequences]
        if operator == "sequence_statistics":
            configs = [c for c in CONFIGS if c.judges_sequences]
        self.config = choose.choice(configs)

    def choices(self, name: str) -> random.Random:
        return random.Random(f"{self.key}/{name}")

    def normal(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.choices(name).getrandbits(62))
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype or self.dtype)

    def some(self, name: str, make: Callable[[], Any], probability: float = 0.5) -> Any:
        return make() if self.choices(name + "?").random() < probability else None

    def argument(self, name: str) -> Any:
        settings = self.settings()
        return settings[name] if name in settings else getattr(self, name)()

    # Operands

    def trainer_logprobs(self) -> torch.Tensor:
        values = -self.normal("logprob", self.tokens).abs() + 0.3 * self.normal("x", self.tokens)
        if self.tokens and self.choices("hostile").random() < 0.2:
            values[self.choices("where").randrange(self.tokens)] = math.nan
        return values.to(self.dtype)

    logprobs = trainer_logprobs

    def inference_logprobs(self) -> torch.Tensor:
        if self.from_logits:
            spread = self.normal("x", self.tokens, dtype=torch.float64)
            return (0.5 * spread - math.log(self.vocabulary)).to(self.per_token_dtype("inference"))
        values = -self.normal("logprob", self.tokens).abs()
        return values.to(self.per_token_dtype("inference"))

    def per_token_dtype(self, name: str) -> torch.dtype:
        return self.choices(name + " dtype").choice((torch.float32, torch.float32, self.dtype))

    def advantages(self) -> torch.Tensor:
        return self.normal("advantages", self.tokens, dtype=self.per_token_dtype("advantages"))

    def loss_mask(self) -> torch.Tensor:
        return self.normal("loss_mask", self.tokens) < self.choices("density").choice((-9, 0.5, 9))

    def teacher_logprobs(self) -> torch.Tensor | None:
        def make() -> torch.Tensor:
            return -self.normal("teacher", self.tokens, dtype=self.per_token_dtype("t")).abs()

        return self.some("teacher", make, 1.0 if self.config.teacher_tau > 0 else 0.3)

    def loss_weights(self) -> torch.Tensor | None:
        return self.some("weights", lambda: self.normal("weights", self.tokens).abs())

    def cu_seqlens(self) -> torch.Tensor | None:
        def make() -> torch.Tensor:
            choose = self.choices("cu_seqlens")
            inner = [choose.randint(0, self.tokens) for _ in range(choose.choice((0, 1, 5, 40)))]
            return torch.tensor([0, *sorted(inner), self.tokens], dtype=torch.int32)

        sees_a_chunk = self.operator == "chunk_logprobs_and_gradient"
        return None if sees_a_chunk else self.some("packed", make)

    def normalizer(self) -> torch.Tensor | None:
        value = self.choices("normalizer").choice((0, 1, 3, 1000))
        dtype = self.choices("normalizer dtype").choice((torch.float64, torch.float32, torch.int64))
        return self.some("normalized", lambda: torch.tensor(value, dtype=dtype))

    def ce_weights(self) -> torch.Tensor:
        return torch.relu(self.normal("ce", self.tokens))

    def ref_kl_weights(self) -> torch.Tensor:
        return torch.relu(self.normal("ref_kl", self.tokens))

    def ref_logprobs(self) -> torch.Tensor:
        return -self.normal("ref", self.tokens).abs()

    def ce_scale(self) -> torch.Tensor | None:
        return self.some("ce_scale", lambda: torch.tensor(3.0))

    def ref_kl_scale(self) -> torch.Tensor | None:
        return self.some("ref_kl_scale", lambda: torch.tensor(5.0))

    def ref_kl_cap(self) -> float:
        return self.choices("ref_kl_cap").choice((1.0, 1e4))

    def ref_kl_tau(self) -> float:
        return self.choices("ref_kl_tau").choice((0.0, 1e-3))

    def logits(self) -> torch.Tensor:
        scale = self.choices("scale").choice((0.1, 3.0, 30.0))
        shape = (self.tokens, self.vocabulary)
        if self.choices("strided").random() < 0.3:
            return (scale * self.normal("logits", shape[0], shape[1] + 3))[:, :-3]
        return scale * self.normal("logits", *shape)

    def labels(self) -> torch.Tensor:
        choose = self.choices("labels")
        labels = [choose.randrange(self.vocabulary) for _ in range(self.tokens)]
        if "logprobs" in self.operator and "gradient" not in self.operator:
            labels = [-100 if choose.random() < 0.2 else label for label in labels]
        return torch.tensor(labels, dtype=choose.choice((torch.int32, torch.int64)))

    def temperature(self) -> torch.Tensor | None:
        def make() -> torch.Tensor:
            if self.choices("temperature").random() < 0.5:
                return torch.tensor(0.7)
            return self.normal("temperature", self.tokens, dtype=torch.float32).abs() + 0.5

        return self.some("tempered", make)

    def softcap(self) -> float:
        return self.choices("softcap").choice((0.0, 0.0, 5.0))

    def sampling_mask(self) -> torch.Tensor | None:
        """Distinct ids, among which a label may be, and -1 behind them."""
        if self.operator not in REPLAYING:
            return None
        choose = self.choices("sampling_mask")
        width = min(5, self.vocabulary)
        rows = [choose.sample(range(self.vocabulary), width) for _ in range(self.tokens)]
        kept = [row[: choose.randint(0, width)] for row in rows]
        padded = [row + [-1] * (width - len(row)) for row in kept]
        ids = torch.tensor(padded, dtype=torch.int32).view(self.tokens, width)
        return self.some("replays", lambda: ids)

    def candidates(self) -> torch.Tensor | None:
        if not self.operator.startswith("token_logprobs"):
            return None
        choose = self.choices("candidates")
        ids = [[choose.randrange(-1, self.vocabulary) for _ in "abc"] for _ in range(self.tokens)]
        made = torch.tensor(ids, dtype=torch.int32).view(self.tokens, 3)
        return self.some("candidates", lambda: made, 0.3)

    def grad_candidates(self) -> torch.Tensor | None:
        if self.candidates() is None:
            return None
        compute = torch.promote_types(self.dtype, torch.float32)
        return self.normal("grad_candidates", self.tokens, 3, dtype=compute)

    def trainer_mask_logprobs(self) -> torch.Tensor:
        return self.normal("trainer ids", self.tokens, 4).log_softmax(-1)

    def inference_mask_logprobs(self) -> torch.Tensor | None:
        width = 4
        if self.from_logits:
            ids = self.sampling_mask()
            if ids is None:
                return None
            width = ids.shape[-1]
        return self.normal("sampler's ids", self.tokens, width).log_softmax(-1)

    def sequence_totals(self) -> None:
        return None

    def sequence_ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.choices("pieces").getrandbits(62))
        ids = torch.randint(self.num_sequences(), (self.tokens,), generator=generator)
        return ids.to(torch.int32)

    def num_sequences(self) -> int:
        return 3

    def first_column(self) -> int:
        return 0

    def packets(self) -> torch.Tensor:
        schema = self.ops.chunk_packets.default._schema
        made: torch.Tensor = self.ops.chunk_packets(**arguments_of(self, schema))
        return made

    def with_entropy(self) -> bool:
        return True

    def replayed(self) -> None:
        return None

    def hidden(self) -> torch.Tensor:
        return self.normal("hidden", self.tokens, self.width)

    def weight(self) -> torch.Tensor:
        return self.normal("weight", self.vocabulary, self.width)

    # Settings and flags

    def settings(self) -> dict[str, Any]:
        compute = torch.promote_types(self.dtype, torch.float32)
        if self.operator in FROM_LOGPROBS and self.operator != "loss_and_metrics":
            compute = torch.promote_types(compute, self.per_token_dtype("inference"))
        return self.config.settings(compute)._asdict()

    def with_gradient(self) -> bool:
        return self.choices("with_gradient").random() < 0.8

    needs_grad_hidden = needs_grad_weight = with_gradient

    def bias(self) -> None:
        return None

    def needs_grad_bias(self) -> bool:
        return False

    def normalized(self) -> bool:  # of older commits
        return True

    def row_scales(self) -> torch.Tensor | None:
        of_rows = self.operator == "scale_rows_"
        return self.normal("scales", self.tokens, dtype=torch.float32) if of_rows else None

    def chunk_size(self) -> int:
        return self.choices("chunk_size").choice((1, 2, 128))

    def num_active(self) -> int | None:
        return self.some("num_active", lambda: self.tokens)

    def columns(self) -> int:
        return self.vocabulary

    def max_active(self) -> int:
        return self.tokens

    # Of the other operators

    def fault(self) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.int32)

    def gradient(self) -> torch.Tensor:
        if self.operator == "scale_rows_":
            return self.normal("gradient", self.tokens, self.vocabulary, dtype=torch.float16)
        if self.operator.startswith("scale"):
            return self.normal("gradient", self.tokens, self.vocabulary)
        return torch.zeros(self.tokens, self.vocabulary, dtype=self.dtype)

    def factor(self) -> torch.Tensor:
        return torch.tensor(self.choices("factor").choice((1.0, 0.5, -3.3)))

    def out(self) -> torch.Tensor:
        narrower = torch.bfloat16 if self.dtype == torch.float32 else self.dtype
        return torch.zeros(self.tokens, self.vocabulary, dtype=narrower)

    def sums(self) -> torch.Tensor:
        if self.operator == "fold_segments":
            return self.normal("sums", 5, self.tokens, dtype=torch.float64)
        return self.of_loss()[3]

    def extremes(self) -> torch.Tensor:
        if self.operator == "fold_segments":
            return self.normal("extremes", 4, self.tokens, dtype=torch.float64)
        return self.of_loss()[4]

    def float64(self) -> bool:
        return self.dtype == torch.float64

    def of_loss(self) -> Any:
        return run(Call("ipo_loss", self.choices("loss").getrandbits(30), self.ops))

    def of_forward(self) -> Any:
        linear = self.operator.startswith("linear")
        name = "linear_token_logprobs" if linear else "token_logprobs"
        schema = getattr(self.ops, name).default._schema
        return getattr(self.ops, name)(**arguments_of(self, schema))

    def entropy(self) -> torch.Tensor:
        if self.operator.endswith("backward"):
            return self.of_forward()[1]
        return self.normal("entropy", self.tokens).abs().to(self.dtype)

    def softmax_stats(self) -> torch.Tensor:
        return self.of_forward()[2]

    def grad_logprobs(self) -> torch.Tensor:
        compute = torch.promote_types(self.dtype, torch.float32)
        return self.normal("grad_logprobs", self.tokens, dtype=compute)

    def grad_entropy(self) -> torch.Tensor:
        compute = torch.promote_types(self.dtype, torch.float32)
        return self.normal("grad_entropy", self.tokens, dtype=compute)


def arguments_of(call: Call, schema: Any) -> dict[str, Any]:
    names = [argument.name for argument in schema.arguments]
    return {name: call.argument(name) for name in names}


def run(call: Call) -> list[torch.Tensor]:
    """The results, then every argument that the operator may have written to."""
    operator = getattr(call.ops, call.operator)
    arguments = arguments_of(call, operator.default._schema)
    results = operator(**arguments)
    results = [results] if isinstance(results, torch.Tensor) else list(results or ())
    written = [
        arguments[argument.name]
        for argument in operator.default._schema.arguments
        if argument.alias_info is not None and arguments[argument.name] is not None
    ]
    return results + written


def bits(tensor: torch.Tensor) -> bytes:
    """Of the values in order; a NaN has many forms and counts as one."""
    if tensor.dtype.is_floating_point:
        tensor = torch.where(tensor.isnan(), math.nan, tensor)
    return (
        str(tensor.dtype).encode()
        + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    )


def hashes(operator: str, calls: int, ops: Any) -> list[str]:
    found = []
    for start in range(0, calls, BLOCK):
        digest = hashlib.sha256()
        for index in range(start, min(start + BLOCK, calls)):
            try:
                for tensor in run(Call(operator, index, ops)):
                    digest.update(bits(tensor))
            except (RuntimeError, ValueError, TypeError) as error:
                raise RuntimeError(f"{operator}, call {index}: {error}") from error
        found.append(digest.hexdigest()[:16])
    return found


def backends() -> dict[str, Any]:
    """The CPU's operators, and the CUDA kernels' on the emulator."""
    from tests.emulator import operators

    operators.load()
    return {"cpu": torch.ops.ipo_ext, "emulated": getattr(torch.ops, operators.NAMESPACE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--calls", type=int, default=2000, help="of each operator and backend")
    parser.add_argument("--operators", nargs="*", default=ALONE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for backend, ops in backends().items():
        for operator in options.operators:
            found[f"{backend}/{operator}"] = hashes(operator, options.calls, ops)
            print(f"{backend}/{operator}: {options.calls} calls", file=sys.stderr, flush=True)
    if options.save:
        options.save.write_text(json.dumps(found, indent=1) + "\n")
    if options.compare:
        sys.exit(compare(json.loads(options.compare.read_text()), found))


def compare(before: dict[str, list[str]], now: dict[str, list[str]]) -> int:
    different = 0
    for name, blocks in now.items():
        if len(before[name]) != len(blocks):
            raise SystemExit(f"{name}: expected as many calls as were saved; pass the same --calls")
        for index, (one, other) in enumerate(zip(before[name], blocks, strict=True)):
            if one != other:
                different += 1
                print(f"{name}: calls {index * BLOCK} to {(index + 1) * BLOCK - 1} differ")
                break
    print(f"{len(now) - different} of {len(now)} operators have the same bits")
    return int(different > 0)


if __name__ == "__main__":
    main()
