"""Random programs of pointwise ops, views, reductions and scans, beside eager PyTorch.

Hypothesis draws a program step by step, from the shapes that are there so far, and makes a smaller
one of what fails. Another day has other programs; a failure prints how to have its own again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, compile_, gems_only, pretend_multiprocessors
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from opcheck import SEED
from torch import Tensor

from gems_compile.lowering import parts, schedule

pytestmark = gems_only

MOST = 20_000  # elements of a value
LARGEST = 100  # numbers grow no further, so that errors stay those of a few roundings
NEAR = 2e-4  # of the largest number of a value: sums of another order, through all steps
Op = Callable[..., Tensor]

#: ops by how many tensors they read: those with gradients that a rounding cannot change much, and
#: those with a kink, which are taken where no gradients are
SMOOTH: dict[int, list[Op]] = {
    1: [
        torch.tanh,
        torch.sigmoid,
        torch.sin,
        torch.neg,
        F.gelu,
        F.silu,
        lambda x: x * 2 + 1,
        lambda x: x.tanh().exp(),
        lambda x: (x * x + 1).rsqrt(),
    ],
    2: [torch.add, torch.sub, torch.mul, lambda a, b: a / (b * b + 1)],
}
KINKED: dict[int, list[Op]] = {
    1: [
        torch.abs,
        torch.relu,
        lambda x: x.clamp(-1, 1),
        lambda x: (x.abs() + 1).log(),
        lambda x: torch.where(x > 0, x, x * 0.1),
    ],
    2: [torch.maximum, torch.hypot],
}
#: of a tensor with dims, and one of them
ALONG: list[Callable[[Tensor, int], Tensor]] = [
    lambda x, d: x.softmax(d),
    lambda x, d: x.log_softmax(d),
    lambda x, d: x.cumsum(d),
    lambda x, d: x.flip(d),
    lambda x, d: x.unsqueeze(d),
    lambda x, d: torch.cat([x, x * 2], d),
    lambda x, d: x.transpose(d, -1).contiguous(),
    lambda x, d: x.roll(2, d),
    lambda x, d: x.movedim(d, 0),
    lambda x, d: F.layer_norm(x, x.shape[d % x.ndim :], eps=0.1),
    lambda x, d: x.index_select(d, torch.arange(x.shape[d] - 1, -1, -1, device=x.device)),
    lambda x, d: x.reshape(-1, *x.shape[d % x.ndim + 1 :]),
]
#: of a tensor, dims of it, and whether they stay
OVER: list[Callable[[Tensor, Sequence[int], bool], Tensor]] = [
    lambda x, dims, keep: x.sum(dims, keepdim=keep),
    lambda x, dims, keep: x.mean(dims, keepdim=keep),
    lambda x, dims, keep: x.var(dims, correction=0, keepdim=keep),
]
KINKED_OVER: list[Callable[[Tensor, Sequence[int], bool], Tensor]] = [
    lambda x, dims, keep: x.amax(dims, keepdim=keep),
    lambda x, dims, keep: x.max(dims[0], keepdim=keep)[0],
]


KINKED_ALONG: list[Callable[[Tensor, int], Tensor]] = [
    lambda x, d: x.gather(d, x.argmax(d, keepdim=True)),
    lambda x, d: x.gather(d, x.argmin(d, keepdim=True)) - x,
]


@dataclass
class Program:
    """``steps``: (what computes a value, the values it reads); inputs come first."""

    values: list[Tensor]
    inputs: int = 0
    steps: list[tuple[Op, tuple[int, ...]]] = field(default_factory=list)
    results: list[int] = field(default_factory=list)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        values = list(inputs)
        for op, operands in self.steps:
            values.append(op(*[values[k] for k in operands]))
        return [values[k] for k in self.results]

    def add(self, op: Op, *operands: int) -> None:
        """A step, unless its numbers or sizes are no good."""
        value = op(*[self.values[k] for k in operands])
        if 0 < value.numel() <= MOST and bool((value.abs() < LARGEST).all()):
            self.values.append(value)
            self.steps.append((op, operands))


def sliced(draw: Any, x: Tensor, smooth: bool) -> Op:
    dim = draw(st.integers(0, x.ndim - 1))
    start = draw(st.integers(0, x.shape[dim] - 1))
    end, step = draw(st.integers(start + 1, x.shape[dim])), draw(st.integers(1, 3))
    return lambda x: torch.ops.aten.slice.Tensor(x, dim, start, end, step)


def picked(draw: Any, x: Tensor, smooth: bool) -> Op:
    dim = draw(st.integers(0, x.ndim - 1))
    place = draw(st.integers(0, x.shape[dim] - 1))
    return lambda x: x.select(dim, place)


def padded(draw: Any, x: Tensor, smooth: bool) -> Op:
    before, behind = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    return lambda x: F.pad(x, (before, behind))


def along(draw: Any, x: Tensor, smooth: bool) -> Op:
    op = draw(st.sampled_from(ALONG if smooth else ALONG + KINKED_ALONG))
    dim = draw(st.integers(0, x.ndim - 1))
    return lambda x: op(x, dim)


def over(draw: Any, x: Tensor, smooth: bool) -> Op:
    op = draw(st.sampled_from(OVER if smooth else OVER + KINKED_OVER))
    keep = draw(st.booleans())
    dims = draw(st.sets(st.integers(0, x.ndim - 1), min_size=1).map(sorted))
    return lambda x: op(x, dims, keep)


def fit(a: Tensor, b: Tensor) -> bool:
    """Whether they can be broadcast together."""
    sizes = zip(reversed(a.shape), reversed(b.shape), strict=False)
    return all(m == n or 1 in (m, n) for m, n in sizes)


def pointwise(draw: Any, operands: int, smooth: bool) -> Op:
    return draw(st.sampled_from(SMOOTH[operands] + (KINKED[operands] if not smooth else [])))


@st.composite
def programs(draw: Any, smooth: bool) -> Program:
    size = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 33, 64])
    shape = draw(st.lists(size, min_size=1, max_size=4))
    while torch.Size(shape).numel() > MOST:
        shape.pop()
    shapes = [shape]
    for _ in range(draw(st.integers(0, 2))):  # more inputs, broadcast
        kept = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
        shapes.append([n if k else 1 for n, k in zip(shape, kept, strict=True)])
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    program = Program([torch.randn(s, generator=random, dtype=torch.float64) for s in shapes])
    program.inputs = len(shapes)
    for _ in range(draw(st.integers(2, 12))):
        last = len(program.values) - 1
        at = draw(st.integers(0, last)) if draw(st.booleans()) else last
        x = program.values[at]
        kind = draw(st.integers(0, 9))
        if kind < 3:
            program.add(pointwise(draw, 1, smooth), at)
        elif kind < 5:
            others = [k for k, v in enumerate(program.values) if fit(x, v)]
            program.add(pointwise(draw, 2, smooth), at, draw(st.sampled_from(others)))
        elif x.ndim:
            make = draw(st.sampled_from([sliced, picked, padded, along, along, over, over]))
            program.add(make(draw, x, smooth), at)
    last = len(program.values) - 1
    if program.steps:
        more = draw(st.sets(st.integers(program.inputs, last), max_size=2))
        program.results = sorted(more | {last})
    return program


def run(fn: Op, inputs: Sequence[Tensor], grad: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of their sum."""
    inputs = [x.detach().clone().requires_grad_(grad) for x in inputs]
    results = fn(*inputs)
    used = [y for y in results if y.requires_grad]
    ones = [torch.ones_like(y) for y in used]
    found = torch.autograd.grad(used, inputs, ones, allow_unused=True) if used else ()
    return results, [g for g in found if g is not None]


def assert_near(got: Tensor, want: Tensor, exact: Tensor) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    strides = zip(got.shape, got.stride(), want.stride(), strict=True)
    assert all(n == 1 or a == b for n, a, b in strides)
    scale = 1 + exact.abs().max().item()
    error = (got.double().cpu() - exact).abs().max().item()
    assert error <= NEAR * scale + 4 * (want.double().cpu() - exact).abs().max().item()


@pytest.fixture
def all_rows_are_long(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Rows of more than 8 elements are looped over, in steps of 8, and cut in parts."""

    def ask() -> None:
        for module in (schedule, parts):
            monkeypatch.setattr(module, "MAX_PERSISTENT", 8)
        monkeypatch.setattr(schedule, "ROW_STEP", 8)
        monkeypatch.setattr(parts, "LEAST_OF_A_ROW", 4)
        monkeypatch.setattr(parts, "LAUNCH", -1e9)

    return ask


@pytest.mark.parametrize(("dynamic", "count"), [(False, 30), (True, 5)], ids=["static", "dynamic"])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("multiprocessors", [0, 132])
@pytest.mark.parametrize("long", [False, True], ids=["", "long"])
def test_random_programs(
    dynamic: bool,
    count: int,
    grad: bool,
    multiprocessors: int,
    long: bool,
    all_rows_are_long: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As for a GPU with many multiprocessors too, for which reductions are cut in parts; and as if
    rows were long."""
    pretend_multiprocessors(monkeypatch, multiprocessors)
    if long:
        all_rows_are_long()
        count = max(count // 2, 5)

    @seed(SEED + multiprocessors)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(programs(smooth=grad))
    def check(program: Program) -> None:
        torch._dynamo.reset()
        drawn = program.values[: program.inputs]
        inputs = [x.float().to(DEVICE) for x in drawn]
        exact = run(program, drawn, grad)
        want = run(program, inputs, grad)
        got = run(compile_(program.__call__, dynamic=dynamic), inputs, grad)
        for kind in range(2):
            for a, b, c in zip(got[kind], want[kind], exact[kind], strict=True):
                assert_near(a, b, c)

    check()
