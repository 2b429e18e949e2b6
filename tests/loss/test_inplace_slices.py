"""inplace=True on slices: what lies beside them stays, nothing is read once it is overwritten."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from ipo_ext import IPOConfig
from tests.support.backends import Backend
from tests.support.cases import LogitsCase, same_bits
from tests.support.logits import WIDE_BAND, random_case
from tests.support.operators import call_operator

ROWS, COLUMNS = 9, 40
Cut = Callable[[torch.Tensor], torch.Tensor]

# Of [2, 5, 40].
CUTS: dict[str, Cut] = {
    "without the last token": lambda logits: logits[:, :-1],
    "without the first token": lambda logits: logits[:, 1:],
    "without the first sequence": lambda logits: logits[1:],
    "every other sequence": lambda logits: logits[::2],
    "every other token": lambda logits: logits[:, ::2],
    "one token": lambda logits: logits[:, 1],
    "fewer columns": lambda logits: logits[:, :, :37],
    "within": lambda logits: logits[1:, 1:-1, 3:],
    "time first": lambda logits: logits.transpose(0, 1)[1:],
    "flat": lambda logits: logits.flatten(0, 1)[1:-1],
}
PRODUCERS: dict[str, Cut] = {
    "pointwise": lambda hidden: hidden * 1.5,
    "product": lambda hidden: hidden[..., :4] @ _weight(hidden),
    "cast product": lambda hidden: (
        hidden[..., :4].bfloat16() @ _weight(hidden).bfloat16()
    ).float(),
}


def _weight(hidden: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, 4 * COLUMNS, device=hidden.device).view(4, COLUMNS)


def hidden_states(backend: Backend, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, COLUMNS, generator=generator)
    return hidden.to(backend.device, dtype).requires_grad_()


def tokens_of(logits: torch.Tensor) -> LogitsCase:
    """Labels and the like for logits of any shape."""
    case = random_case(logits.shape[:-1].numel(), logits.shape[-1], masked=0, config=WIDE_BAND)
    case = case.to(logits.device)
    shape = logits.shape[:-1]
    names = ("labels", "inference_logprobs", "advantages", "loss_mask")
    return case.with_(logits=logits, **{name: getattr(case, name).view(shape) for name in names})


def step(
    hidden: torch.Tensor, tokens: LogitsCase, producer: Cut, cut: Cut, *, inplace: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out = tokens.with_(logits=cut(producer(hidden))).call(inplace=inplace)
    return out.loss, out.logprobs


# -------------------------------------------------------------------------------------------------
# Compiled


@pytest.mark.parametrize(
    ("producer", "cut"),
    [
        *(("pointwise", cut) for cut in CUTS if cut not in ("within", "every other sequence")),
        ("product", "without the last token"),
        ("product", "time first"),
        ("cast product", "without the last token"),
    ],
)
def test_a_compiled_slice(backend: Backend, producer: str, cut: str) -> None:
    """Inductor makes what is cut off or not, and lays it out as it likes."""
    hidden = hidden_states(backend)
    how = (PRODUCERS[producer], CUTS[cut])
    tokens = tokens_of(how[1](how[0](hidden)).detach())
    loss, logprobs = step(hidden, tokens, *how, inplace=False)
    (expected,) = torch.autograd.grad(loss, hidden)
    compiled = torch.compile(step, fullgraph=True)
    our_loss, our_logprobs = compiled(hidden, tokens, *how, inplace=True)
    (gradient,) = torch.autograd.grad(our_loss, hidden)
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_logprobs, logprobs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_what_a_compiled_slice_leaves_is_read_afterwards(backend: Backend) -> None:
    """The logits are needed once more, so they cannot be overwritten: a copy is, as a whole."""

    def and_the_last(hidden: torch.Tensor, tokens: LogitsCase, *, inplace: bool) -> torch.Tensor:
        logits = hidden * 1.5
        loss = tokens.with_(logits=logits[:, :-1]).call(inplace=inplace).loss
        return loss + logits[:, -1].square().sum()

    hidden = hidden_states(backend)
    tokens = tokens_of(hidden.detach()[:, :-1])
    results = []
    for run, inplace in ((and_the_last, False), (torch.compile(and_the_last), True)):
        loss = run(hidden, tokens, inplace=inplace)
        results.append((loss, *torch.autograd.grad(loss, hidden)))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_slice_of_a_product_is_not_copied(backend: Backend) -> None:
    hidden = hidden_states(backend)
    how = (PRODUCERS["product"], CUTS["without the last token"])
    tokens = tokens_of(how[1](how[0](hidden)).detach())
    compiled = torch.compile(step, fullgraph=True)
    _, sources = torch._inductor.utils.run_and_get_code(
        lambda: compiled(hidden, tokens, *how, inplace=True)
    )
    made = re.findall(rf"empty_strided_\w+\(\(([\d, ]+), {COLUMNS}\)", sources[0])
    assert len(made) == 1, sources[0]


# -------------------------------------------------------------------------------------------------
# Eager


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_an_eager_slice(backend: Backend, dtype: torch.dtype, cut: str, factor: float) -> None:
    hidden = hidden_states(backend, dtype)
    how = (PRODUCERS["pointwise"], CUTS[cut])
    tokens = tokens_of(how[1](how[0](hidden)).detach())
    gradients = []
    for inplace in (False, True):
        loss, _ = step(hidden, tokens, *how, inplace=inplace)
        gradients += torch.autograd.grad(loss * factor, hidden)
    assert gradients[0].any()
    assert same_bits(*gradients)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_what_lies_beside_a_slice_stays(backend: Backend, dtype: torch.dtype, cut: str) -> None:
    logits = hidden_states(backend, dtype).detach().requires_grad_() * 1
    before = logits.detach().clone()
    inside = torch.zeros_like(before, dtype=torch.bool)
    CUTS[cut](inside).fill_(True)
    loss = tokens_of(CUTS[cut](logits)).call(inplace=True).loss
    (loss * 0.3).backward()
    assert torch.equal(logits[~inside], before[~inside])
    assert not torch.equal(logits[inside], before[inside])


# -------------------------------------------------------------------------------------------------
# A view that its storage is too small for


def leaving(shape: tuple[int, ...], strides: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A view that only a compiler can make: its storage holds one element too few."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    room = torch.zeros(last, dtype=like.dtype, device=like.device)
    return torch._C._dynamo.guards._reinterpret_tensor(room, shape, strides, 0)


# Every operator that takes logits or their gradient, and which argument is that.
MATRICES = [
    ("ipo_loss_from_logits", "logits"),
    ("ipo_loss_from_logits_", "logits"),
    ("chunk_logprobs_and_gradient", "logits"),
    ("chunk_logprobs_and_gradient", "gradient"),
    ("token_logprobs", "logits"),
    ("token_logprobs_backward", "logits"),
    ("chunk_logprobs", "logits"),
    ("chunk_logprobs_backward", "logits"),
    ("chunk_logprobs_backward", "gradient"),
    ("scale_", "gradient"),
]


@pytest.mark.parametrize("strides", [(COLUMNS, 1), (COLUMNS + 2, 1)], ids=["dense", "strided"])
@pytest.mark.parametrize(("name", "argument"), MATRICES)
def test_a_matrix_that_leaves_its_storage(
    backend: Backend, name: str, argument: str, strides: tuple[int, ...]
) -> None:
    case = random_case(ROWS, COLUMNS).to(backend.device)
    matrix = leaving((ROWS, COLUMNS), strides, case.logits)
    per_token = torch.zeros(ROWS, device=backend.device)
    made = {
        **dict.fromkeys(("entropy", "grad_logprobs", "grad_entropy"), per_token),
        "softmax_stats": torch.ones(2, ROWS, device=backend.device),
        "fault": torch.zeros(1, dtype=torch.int32, device=backend.device),
        "gradient": torch.zeros_like(case.logits),
        "factor": per_token[0],
        "row_scales": None,
    }
    with pytest.raises(RuntimeError, match=f"{argument}: expected a view within its storage"):
        call_operator(name, case, **{**made, argument: matrix})
    assert not matrix[:-1].any()


@pytest.mark.parametrize("name", ["inference_logprobs", "advantages", "labels", "loss_mask"])
def test_a_token_input_that_leaves_its_storage(backend: Backend, name: str) -> None:
    case = random_case(ROWS, COLUMNS).to(backend.device)
    before = case.logits.clone()
    outside = leaving((ROWS,), (3,), getattr(case, name))
    with pytest.raises(RuntimeError, match=f"{name}: expected a view within its storage"):
        call_operator("ipo_loss_from_logits_", case.with_(**{name: outside}))
    assert torch.equal(case.logits, before)


# -------------------------------------------------------------------------------------------------
# Inputs in the memory of the logits

INPUTS = (
    *("labels", "inference_logprobs", "advantages", "loss_mask", "temperature"),
    *("teacher_logprobs", "loss_weights", "cu_seqlens", "normalizer"),
)


def full_case(device: torch.device) -> LogitsCase:
    """Every input that there is."""
    case = random_case(
        ROWS,
        COLUMNS,
        token_temperature=True,
        normalizer=torch.tensor(3.0),
        teacher_logprobs=-torch.rand(ROWS),
        loss_weights=torch.rand(ROWS),
        cu_seqlens=torch.tensor([0, 4, ROWS], dtype=torch.int32),
        config=IPOConfig(teacher_tau=0.3),
    )
    return case.with_(labels=case.labels.int()).to(device)


def in_the_first_row(logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The values of an input in bytes of the first row, which is the first to be overwritten."""
    memory = logits.detach().view(-1).view(value.dtype)[4 : 4 + value.numel()].view(value.shape)
    return memory.copy_(value)


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_in_the_memory_of_the_logits(backend: Backend, name: str) -> None:
    case = full_case(backend.device)
    inside = in_the_first_row(case.logits, getattr(case, name))
    results = []
    for value in (inside.clone(), inside):
        case.logits.requires_grad_()
        logits = case.logits * 1
        here = in_the_first_row(logits, inside) if value is inside else value
        out = case.with_(**{"logits": logits, name: here}).call(inplace=True)
        gradient = torch.autograd.grad(out.loss * 0.3, case.logits)[0]
        results.append((out.loss, out.logprobs, out.metrics.sums, gradient))
    for expected, ours in zip(*results, strict=True):
        assert same_bits(ours, expected)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_normalizer_that_is_a_logit(backend: Backend, dtype: torch.dtype, compiled: bool) -> None:
    """In fp16 backward divides by it, long after."""

    def one_step(leaf: torch.Tensor, case: LogitsCase, *, aliases: bool) -> torch.Tensor:
        logits = leaf * 1
        logit = logits.detach()[0, 3]
        normalizer = logit if aliases else logit.clone()
        return case.with_(logits=logits, normalizer=normalizer).call(inplace=True).loss

    case = random_case(ROWS, COLUMNS, dtype).to(backend.device)
    case.logits[0, 3] = 7
    leaf = case.logits.clone().requires_grad_()
    loss = one_step(leaf, case, aliases=False)
    (expected,) = torch.autograd.grad(loss * 2, leaf)
    run = torch.compile(one_step, fullgraph=True) if compiled else one_step
    our_loss = run(leaf, case, aliases=True)
    (gradient,) = torch.autograd.grad(our_loss * 2, leaf)
    torch.testing.assert_close(our_loss, loss)
    torch.testing.assert_close(gradient, expected)


# -------------------------------------------------------------------------------------------------
# Refused before a byte is touched

REFUSED: dict[str, tuple[Cut, type[Exception], str]] = {
    "unbind": (lambda logits: logits.unbind(0)[1], ValueError, "logits: expected"),
    "split": (lambda logits: logits.split([1, 4], 1)[1], ValueError, "logits: expected"),
    "slice of a chunk": (lambda logits: logits.chunk(2, 1)[1][1:], ValueError, "logits: expected"),
    "every other column": (lambda logits: logits[..., ::2], RuntimeError, "logits: expected rows"),
    "three strides": (
        lambda logits: logits.view(2, 5, 4, 10)[:, :4, :2],
        RuntimeError,
        "logits: expected rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_the_logits(backend: Backend, name: str) -> None:
    cut, error, words = REFUSED[name]
    logits = hidden_states(backend) * 1
    before = logits.detach().clone()
    view = cut(logits)
    with pytest.raises(error, match=words):
        tokens_of(view).call(inplace=True)
    assert torch.equal(logits, before)
    tokens_of(view).call().loss.backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_slice_of_a_leaf_is_refused(backend: Backend, compiled: bool) -> None:
    def one_step(leaf: torch.Tensor, tokens: LogitsCase) -> torch.Tensor:
        return tokens.with_(logits=leaf[:, :-1]).call(inplace=True).loss

    leaf = hidden_states(backend)
    before = leaf.detach().clone()
    run = torch.compile(one_step) if compiled else one_step
    with pytest.raises(ValueError, match="logits: expected the result of an operation"):
        run(leaf, tokens_of(before[:, :-1]))
    assert torch.equal(leaf, before)
