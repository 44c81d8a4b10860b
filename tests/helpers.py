"""Compare a function in eager mode with the same function under `torch.compile`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

from gems_compile.kernels.target import current_target

BACKEND = os.environ.get("GEMS_TEST_BACKEND", "gems")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MLP_NEAR = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums of eight products, twice, in another order

gems_only = pytest.mark.skipif(
    BACKEND != "gems", reason=f"asks for what gems alone does, and the backend here is {BACKEND}"
)

# (rtol, atol): for the narrow floats one unit in the last place of a value near one
TOLERANCE = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2**-10, 2**-10),
    torch.bfloat16: (2**-7, 2**-7),
    torch.complex128: (1e-10, 1e-10),
    torch.complex64: (1e-5, 1e-5),
}


def rand(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """A normal tensor on the tests' device, the same values on every device."""
    drawn = torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32)
    return drawn.to(DEVICE, dtype).requires_grad_(grad)


def ints(*shape: int, high: int = 10, low: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(low, high, shape).to(DEVICE, dtype)


def bools(*shape: int) -> Tensor:
    return (torch.rand(*shape) > 0.5).to(DEVICE)


def pretend_multiprocessors(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The interpreter is planned for as a GPU with so many; a GPU stays what it is."""
    target = current_target()
    if target.name == "interpreter":
        target = dataclasses.replace(target, multiprocessors=count)
        monkeypatch.setattr("gems_compile.backend.current_target", lambda vendor=None: target)


def compile_(fn: Callable, dynamic: bool | None = None, fullgraph: bool = True, **kwargs: Any):
    """`torch.compile` with the backend under test."""
    return torch.compile(fn, backend=BACKEND, dynamic=dynamic, fullgraph=fullgraph, **kwargs)


def graphs() -> int:
    """How many graphs Dynamo has handed to a backend since the last reset of its counters."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextlib.contextmanager
def no_new_graph():
    """Fails when the block compiles anything."""
    before = graphs()
    yield
    assert graphs() == before, f"{graphs() - before} new graphs were compiled"


def check(fn: Callable, *inputs: Any, **kwargs: Any) -> None:
    """Run fn(*inputs) forward and backward in eager mode and compiled, and compare all effects.

    See `Pair` for the keywords.
    """
    names = ("dynamic", "fullgraph", "options", "mode")
    made = Pair(fn, **{name: kwargs.pop(name) for name in names if name in kwargs})
    made(*inputs, **kwargs)


class Pair:
    """fn beside its compiled form; a call runs both and compares them.

    A module is copied for each side and keeps its state from call to call, so buffers, parameters
    and accumulated gradients are compared after every step. Inputs are copied for each side: views
    keep their base, inputs that share memory still share it.
    """

    def __init__(
        self, fn: Callable, *, dynamic: bool | None = None, fullgraph: bool = True, **kwargs: Any
    ) -> None:
        self.eager = copy.deepcopy(fn) if isinstance(fn, nn.Module) else fn
        self.module = copy.deepcopy(fn) if isinstance(fn, nn.Module) else None
        self.compiled = compile_(self.module or fn, dynamic, fullgraph, **kwargs)

    def __call__(
        self,
        *inputs: Any,
        grad: bool = True,
        exact: bool = False,
        rtol: float | None = None,
        atol: float | None = None,
        context: Callable[[], Any] = contextlib.nullcontext,
        prepare: Callable[..., Any] | None = None,
        cotangent: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Compare one call.

        exact     demands equal bits of every value (the payload of a NaN aside)
        context   a context manager around the forward call, such as torch.no_grad
        prepare   makes fn's arguments from the inputs, outside the compiled region: for arguments
                  that are not leaves of autograd
        cotangent makes the gradient of an output; random and contiguous without it
        """
        seen = []
        for run, module in ((self.eager, self.eager), (self.compiled, self.module)):
            state = _state(module) if isinstance(module, nn.Module) else {}
            memo: dict[int, Tensor] = {}
            args = fresh(inputs, memo)
            leaves = [t for t in memo.values() if t.is_leaf]
            torch.manual_seed(1)
            if prepare is not None:
                args = prepare(*args)
            with context():
                outputs = run(*args)
            seen.append(_observe(outputs, args, leaves, state, grad, cotangent))
        _compare(*seen, exact=exact, rtol=rtol, atol=atol)


@dataclass
class Seen:
    """What a caller can see of one run."""

    outputs: list[Any]
    spec: TreeSpec
    inputs: list[Any]
    leaves: list[Tensor]
    state: dict[str, Tensor]


def fresh(tree: Any, memo: dict[int, Tensor] | None = None) -> Any:
    """A copy of each tensor in the tree: strides, base, shared memory and autograd flag kept."""
    memo = {} if memo is None else memo
    return tree_map(lambda leaf: _fresh(leaf, memo) if isinstance(leaf, Tensor) else leaf, tree)


def _fresh(t: Tensor, memo: dict[int, Tensor]) -> Tensor:
    if id(t) in memo:
        return memo[id(t)]
    if t.layout != torch.strided or t.is_quantized or type(t) not in (Tensor, nn.Parameter):
        new = t.detach().clone()
    elif t._is_view():
        with torch.enable_grad():
            base = _fresh(t._base, memo)
            new = base.as_strided(t.shape, t.stride(), t.storage_offset())
    else:
        new = torch.empty(0, dtype=t.dtype, device=t.device)
        storage = t.untyped_storage().clone()
        new.set_(storage, t.storage_offset(), t.shape, t.stride())
    if isinstance(t, nn.Parameter):
        new = nn.Parameter(new, requires_grad=t.requires_grad)
    elif t.requires_grad and not new.requires_grad:
        new.requires_grad_()
    memo[id(t)] = new
    return new


def _state(module: nn.Module) -> dict[str, Tensor]:
    named = (module.named_parameters, module.named_buffers)
    return {name: t for each in named for name, t in each(remove_duplicate=False)}


def _observe(
    outputs: Any,
    args: Any,
    leaves: list[Tensor],
    state: dict[str, Tensor],
    grad: bool,
    cotangent: Callable[[Tensor], Tensor] | None,
) -> Seen:
    """Run backward, then collect everything: a backward that spoils an output is seen too."""
    flat, spec = tree_flatten(outputs)
    inputs = tree_flatten(args)[0]
    if grad:
        _backward([*flat, *inputs, *state.values()], cotangent)
    return Seen(flat, spec, inputs, leaves, state)


def _backward(values: Iterable[Any], cotangent: Callable[[Tensor], Tensor] | None) -> None:
    """Backward from every result that has a history: outputs, and inputs written in place."""
    roots = {id(v): v for v in values if isinstance(v, Tensor) and v.grad_fn is not None}
    if not roots:
        return
    draw = torch.Generator().manual_seed(7)

    def random(t: Tensor) -> Tensor:
        kind = torch.complex64 if t.is_complex() else torch.float32
        return torch.randn(t.shape, dtype=kind, generator=draw).to(t.device, t.dtype)

    tensors = list(roots.values())
    torch.autograd.backward(tensors, [(cotangent or random)(t) for t in tensors])


def _compare(want: Seen, got: Seen, **tolerance: Any) -> None:
    assert got.spec == want.spec, f"structure of the outputs: {got.spec}, eager: {want.spec}"
    for name in ("outputs", "inputs", "leaves"):
        for i, (a, b) in enumerate(zip(getattr(got, name), getattr(want, name), strict=True)):
            assert_same(a, b, f"{name}[{i}]", **tolerance)
    for name, b in want.state.items():
        assert_same(got.state[name], b, name, **tolerance)
    assert _aliases(got) == _aliases(want), "memory shared among inputs and outputs"


def _aliases(seen: Seen) -> list[tuple[Any, ...]]:
    """Per output: the tensor it is, the first it shares memory with, the input it views."""
    tensors = [t for t in (*seen.inputs, *seen.state.values()) if isinstance(t, Tensor)]
    given = len(tensors)
    rows = []
    for out in seen.outputs:
        if not isinstance(out, Tensor):
            continue
        same = next((i for i, t in enumerate(tensors) if t is out), None)
        memory = next((i for i, t in enumerate(tensors) if _shares(t, out)), None)
        base = next((i for i, t in enumerate(tensors[:given]) if t is out._base), None)
        offset = out.storage_offset() if memory is not None and memory < given else None
        rows.append((same, memory, base, offset))
        tensors.append(out)
    return rows


def _shares(a: Tensor, b: Tensor) -> bool:
    if a.layout != torch.strided or b.layout != torch.strided:
        return False
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def assert_same(
    got: Any,
    want: Any,
    name: str = "value",
    exact: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Equal type, dtype, device, shape, stride and autograd flag, near values, and so the .grad."""
    assert type(got) is type(want), f"{name}: {type(got)}, eager: {type(want)}"
    if not isinstance(want, Tensor):
        assert got == want, f"{name}: {got!r}, eager: {want!r}"
        return
    assert_same_metadata(got, want, name)
    assert_same_values(got, want, name, exact, rtol, atol)
    if want.is_leaf:
        assert (got.grad is None) == (want.grad is None), (
            f"{name}.grad: {got.grad}, eager: {want.grad}"
        )
        if want.grad is not None:
            assert_same(got.grad, want.grad, f"{name}.grad", exact, rtol, atol)


def assert_same_metadata(got: Tensor, want: Tensor, name: str = "value") -> None:
    for field in ("dtype", "device", "shape", "layout", "requires_grad", "is_leaf"):
        a, b = getattr(got, field), getattr(want, field)
        assert a == b, f"{name}.{field}: {a}, eager: {b}"
    if want.layout == torch.strided and want.numel():
        a, b = _strides(got), _strides(want)
        assert a == b, f"{name}: strides {got.stride()}, eager: {want.stride()} of {want.shape}"


def _strides(t: Tensor) -> list[int]:
    """The strides that address memory: a dim of size one has none."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def assert_same_values(
    got: Tensor,
    want: Tensor,
    name: str = "value",
    exact: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    got, want = got.detach(), want.detach()
    if want.layout != torch.strided:
        got, want = got.to_dense(), want.to_dense()
    if exact and want.is_floating_point():
        assert_same_bits(got, want, name)
        return
    near = TOLERANCE.get(want.dtype, (0.0, 0.0))
    if exact:
        near = (0.0, 0.0)
    elif rtol is not None or atol is not None:
        near = (rtol or 0.0, atol or 0.0) if want.dtype in TOLERANCE else near
    torch.testing.assert_close(
        got, want, rtol=near[0], atol=near[1], equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def assert_same_bits(got: Tensor, want: Tensor, name: str = "value") -> None:
    """Equal values, signs of zeros included; any NaN equals any NaN."""
    same = (got == want) & (torch.signbit(got) == torch.signbit(want))
    same |= got.isnan() & want.isnan()
    wrong = (~same).nonzero().tolist()
    assert not wrong, (
        f"{name}: {len(wrong)} of {want.numel()} differ, the first at {wrong[0]}: "
        + (f"{got[tuple(wrong[0])].item()!r}, eager: {want[tuple(wrong[0])].item()!r}")
    )
