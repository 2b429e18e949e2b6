"""torch's private API: what the package uses of it, all in one file, does what that file says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import ipo_ext
from ipo_ext._ops import torch_internals as internals

PACKAGE = Path(ipo_ext.__file__).parent


# -------------------------------------------------------------------------------------------------
# No private name anywhere else


def private_names(source: str, own: frozenset[str] = frozenset()) -> list[str]:
    """Those of other packages in a file, ``own`` being the private names of this one."""
    nodes = ast.walk(ast.parse(source))
    return [name for node in nodes for name in _found(node) if name not in own]


def _found(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and is_private(node.attr):
        yield node.attr
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if is_outside(alias.name))
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = (f"{node.module}.{alias.name}" for alias in node.names)
        yield from (name for name in names if is_outside(name))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from re.findall(r"\btorch\.(?:\w+\.)*_[a-zA-Z]\w*", node.value)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_outside(module: str) -> bool:
    parts = module.split(".")
    return parts[0] not in ("ipo_ext", "__future__") and any(map(is_private, parts))


def own_names() -> frozenset[str]:
    """Private names that the package defines, and those that a NamedTuple has by contract."""
    found = {"_replace", "_fields", "_field_defaults", "_asdict", "_make"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                parts = (part for target in targets for part in ast.walk(target))
                found.update(
                    part.attr if isinstance(part, ast.Attribute) else part.id
                    for part in parts
                    if isinstance(part, ast.Attribute | ast.Name)
                )
    return frozenset(found)


def test_private_names_are_in_one_file() -> None:
    """Those of a host are its integration's."""
    own = own_names()
    found = {
        path.relative_to(PACKAGE).as_posix(): private_names(path.read_text(), own)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "integrations"
    }
    assert found.pop("_ops/torch_internals.py")
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "torch._C._AutoDispatchBelowAutograd()",
        "logits._is_view()",
        "forward_ad._current_level",
        "import torch._dynamo",
        "import torch.utils._pytree as pytree",
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.nn.modules import _functions",
        "sys.modules.get('torch._dynamo.compiled_autograd')",
    ],
)
def test_a_private_name_is_seen(source: str) -> None:
    assert private_names(source)


def test_own_names_are_no_one_else_s() -> None:
    assert private_names("self._made_of(sums); inputs._replace(x=1)", own_names()) == []
    assert private_names("from ipo_ext._ops import library") == []


# -------------------------------------------------------------------------------------------------
# What each does


def test_forward_mode() -> None:
    assert not internals.in_forward_mode()
    with forward_ad.dual_level():
        assert internals.in_forward_mode()
    seen = []
    torch.func.jvp(lambda x: seen.append(internals.in_forward_mode()) or x, *[(torch.ones(1),)] * 2)
    assert seen == [True]


def test_eager() -> None:
    assert internals.is_eager()
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.is_eager())
        return x.sum()

    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    make_fx(look, tracing_mode="fake")(torch.ones(2))
    with FakeTensorMode():
        look(torch.ones(2))
    assert seen == [False] * 4
    compiled = torch.compile(lambda x: x + internals.is_eager(), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())).item() == 0


def test_batched_gradients() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append(internals.is_batched_by_autograd(gradient)))
    torch.autograd.grad(y, x, torch.ones(2), retain_graph=True)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen == [False, True]


def test_compiled_autograd() -> None:
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(internals.in_compiled_autograd())
            return gradient

    x = torch.ones(2, requires_grad=True)
    Look.apply(x).sum().backward()
    with torch._dynamo.config.patch(compiled_autograd=True):
        loss = Look.apply(x).sum()
        torch.compile(lambda: loss.backward(), backend="eager")()
    assert seen == [False, True]


def test_below_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    with internals.below_autograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_without_tracking_views() -> None:
    x = torch.ones(2, 3)
    with torch.no_grad(), internals.without_tracking_views():
        assert not x.view(6)._is_view()
    assert x.view(6)._is_view()


def test_views() -> None:
    x = torch.ones(4, 3)
    base = (x * 2).requires_grad_() * 2
    assert internals.base_of_view(base) is None
    assert internals.base_of_view(base[:, :2]) is base
    assert internals.view_may_change(base[:, :2])
    assert not any(internals.view_may_change(part) for part in base.split(2))


def test_registered_operators() -> None:
    names = internals.registered_operators("ipo_ext")
    assert "ipo_ext::ipo_loss" in names
    assert all(name.startswith("ipo_ext::") for name in names)
    assert internals.has_kernel("ipo_ext::ipo_loss", "CPU")
    assert not internals.has_kernel("ipo_ext::ipo_loss", "HPU")


def test_containers() -> None:
    metrics = ipo_ext.IPOMetrics(torch.ones(1), torch.zeros(1), torch.zeros(2), has_teacher=True)
    leaves, spec = pytree.tree_flatten(ipo_ext.IPOOutput(torch.zeros(()), metrics))
    assert leaves[1] is metrics.means
    restored = pytree.treespec_loads(pytree.treespec_dumps(spec))
    output = pytree.tree_unflatten(leaves, restored)
    assert isinstance(output, ipo_ext.IPOOutput)
    assert isinstance(output.metrics, ipo_ext.IPOMetrics)
    assert output.metrics.has_teacher
    assert not output.metrics.has_entropy


def test_what_a_module_is_made_of() -> None:
    linear = nn.Linear(2, 3)
    assert list(internals.hooks_of(linear)) == []
    hook = lambda *_: None  # noqa: E731
    linear.register_forward_pre_hook(hook)
    linear.register_forward_hook(hook)
    linear.register_full_backward_pre_hook(hook)
    linear.register_full_backward_hook(hook)
    kinds = {"forward pre-hook", "forward hook", "backward pre-hook", "backward hook"}
    assert {kind for kind, _ in internals.hooks_of(linear)} == kinds
    assert all(function is hook for _, function in internals.hooks_of(linear))
    assert internals.own_parameter(linear, "weight") is linear.weight
    assert internals.own_parameter(linear, "no such") is None
    for name, function in internals.calls_of_modules().items():
        assert getattr(linear, name).__func__ is function


def test_fake_tensors() -> None:
    with FakeTensorMode():
        assert internals.is_fake(torch.ones(2))
    assert not internals.is_fake(torch.ones(2))
