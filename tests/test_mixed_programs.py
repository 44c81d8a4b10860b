"""Random programs of several dtypes and layouts, which write into inputs, beside eager PyTorch.

``test_random_programs`` has gradients and float64 to compare with; here are bools, bytes and
integers, 16-bit floats with eager's roundings, inputs that lie in memory in any way, and copies
into them. A failure prints the program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, compile_, gems_only, pretend_multiprocessors
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from opcheck import SEED
from torch import Tensor

import gems_compile

pytestmark = gems_only
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OTHERS = (F32, F16, BF16, torch.float64, torch.int32, torch.int64, torch.int8, torch.bool)

SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 33, 64)
MOST = 6000  # elements of an input
#: of the largest number of a value: a rounding to the dtype now and then another way
NEAR = {F32: 3e-4, torch.float64: 3e-4, F16: 4e-3, BF16: 3e-2}
Op = Callable[..., Tensor]

FLOATS: dict[str, Op] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": torch.relu,
    "abs": torch.abs,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "x * 2 + 1": lambda x: x * 2 + 1,
    "x / 3": lambda x: x / 3,
    "exp(tanh)": lambda x: x.tanh().exp(),
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "clamp": lambda x: x.clamp(-1, 1),
    "isnan": torch.isnan,
    "hardswish": F.hardswish,
}
INTEGERS: dict[str, Op] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "not": torch.bitwise_not,
    "x * 3 - 1": lambda x: x * 3 - 1,
    "x // 2": lambda x: x // 2,
    "x % 5": lambda x: x % 5,
    "x > 0": lambda x: x > 0,
    "x & 7": lambda x: x & 7,
    "half": lambda x: x.float() / 2,
    "clamp": lambda x: x.clamp(-3, 9),
}
BOOLS: dict[str, Op] = {
    "not": torch.logical_not,
    "float": lambda x: x.float(),
    "x * 2": lambda x: x * 2,
    "x + 1": lambda x: x.int() + 1,
}
PAIRS: dict[str, Op] = {
    "add": torch.add,
    "twice": lambda a, b: torch.add(a, b, alpha=2),
    "sub": lambda a, b: a - b,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "div": lambda a, b: a / (b * b + 1),
    "where": lambda a, b: torch.where(a > 0, b, a),
    "gt": torch.gt,
    "eq": torch.eq,
    "masked_fill": lambda a, b: a.masked_fill(b > 0, 2),
}
#: of these pairs, which operand a rounding must not have changed: it decides between others
DECIDES = {"where": 0, "masked_fill": 1}


@dataclass
class Program:
    """``steps``: (what computes a value, or writes into an input; the values that it reads).

    Roundings may differ from eager's now and then. What they cannot have changed is ``exact``: only
    that is compared with numbers, counted, or looked at bit by bit.
    """

    inputs: list[Tensor]
    values: list[Tensor]
    exact: list[bool]
    steps: list[tuple[Op, tuple[int, ...]]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    results: list[int] = field(default_factory=list)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        values = list(inputs)
        for op, operands in self.steps:
            made = op(*[values[k] for k in operands])
            if made is not None:
                values.append(made)
        return [values[k] for k in self.results]

    def __repr__(self) -> str:
        return "\n".join(["", *self.text, f"results: {self.results}"])

    def add(self, name: str, op: Op, *operands: int, moves: bool = False) -> None:
        """A step, unless eager mode refuses it, or its numbers or sizes are no good. ``moves``: it
        rounds nothing."""
        try:
            value = op(*[self.values[k] for k in operands])
        except (RuntimeError, TypeError):
            return
        most = 500 if value.is_floating_point() else 10**6
        small = value.dtype == torch.bool or bool((value.abs() < most).all())
        exact = all(self.exact[k] for k in operands)
        sharp = not value.is_floating_point() or not self._decided_well(name, operands)
        if 0 < value.numel() <= 3 * MOST and small and (exact or not sharp):
            self.steps.append((op, operands))
            self.values.append(value)
            self.exact.append(exact and (moves or not value.is_floating_point()))
            shape = tuple(value.shape)
            self.text.append(f"v{len(self.values) - 1} {value.dtype} {shape} = {name}{operands}")

    def _decided_well(self, name: str, operands: Sequence[int]) -> bool:
        place = DECIDES.get(name)
        return place is None or self.exact[operands[place]]

    def write(self, name: str, into: int, source: int) -> None:
        """Copy, add or multiply into an input."""

        def write(y: Tensor, x: Tensor) -> None:
            getattr(y, name)(x.to(y.dtype))

        write(self.values[into], self.values[source])
        exact = self.exact[source] and name == "copy_"
        memory = self.values[into].untyped_storage().data_ptr()
        for k, value in enumerate(self.values):
            if value.untyped_storage().data_ptr() == memory:  # the input, and views of it
                self.exact[k] = self.exact[k] and exact
        self.steps.append((write, (into, source)))  # type: ignore[arg-type]
        self.text.append(f"v{into}.{name}(v{source})")


def filled(rng: Random, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(rng.randrange(2**16))
    if dtype == torch.bool:
        return torch.rand(shape, generator=random) > 0.5
    if not dtype.is_floating_point:
        return torch.randint(-20, 20, shape, generator=random).to(dtype)
    return torch.randn(shape, generator=random).to(dtype)


def laid_out(rng: Random, x: Tensor) -> Tensor:
    """The numbers of x, somewhere in memory: permuted, with gaps, at odd addresses, expanded."""
    kind = rng.randrange(8)
    if kind == 0 and x.ndim > 1:
        order = list(range(x.ndim))
        rng.shuffle(order)
        return x.permute(order).contiguous().permute([order.index(k) for k in range(x.ndim)])
    if kind == 1 and x.ndim:
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        return wide[..., 1::2].copy_(x)
    if kind == 2:
        return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if kind == 3 and x.ndim:
        return x.narrow(rng.randrange(x.ndim), 0, 1).expand(x.shape)
    return x


def broadcasts(a: Tensor, b: Tensor) -> bool:
    sizes = zip(reversed(a.shape), reversed(b.shape), strict=False)
    return all(m == n or 1 in (m, n) for m, n in sizes)


def overlaps(x: Tensor) -> bool:
    return any(s == 0 and n > 1 for n, s in zip(x.shape, x.stride(), strict=True))


def moved(rng: Random, x: Tensor) -> tuple[str, Op]:
    """A view, or a copy of elements to other places."""
    d = rng.randrange(x.ndim)
    start = rng.randrange(x.shape[d])
    end, step = rng.randint(start + 1, x.shape[d]), rng.randint(1, 3)
    order = list(range(x.ndim))
    rng.shuffle(order)
    ops: dict[str, Op] = {
        "slice": lambda x: torch.ops.aten.slice.Tensor(x, d, start, end, step),
        "select": lambda x: x.select(d, start),
        "flip": lambda x: x.flip(d),
        "unsqueeze": lambda x: x.unsqueeze(d),
        "cat": lambda x: torch.cat([x, x * 2], d),
        "permute": lambda x: x.permute(order),
        "contiguous": lambda x: x.permute(order).contiguous(),
        "roll": lambda x: x.roll(step, d),
        "flat": lambda x: x.reshape(-1),
        "pad": lambda x: F.pad(x, (start % 3, step)),
        "crop": lambda x: F.pad(x, (1, -1)),
        "unfold": lambda x: x.unfold(d, min(2, x.shape[d]), step),
        "repeat": lambda x: x.repeat(*([1] * (x.ndim - 1)), 2),
        "diagonal": lambda x: x.diagonal(0, 0, -1),
        "scatter": lambda x: torch.slice_scatter(x, x.narrow(d, start, 1) * 1, d, start, start + 1),
        "tril": lambda x: x.tril(),
        "bits": lambda x: x.view(torch.int32) if x.dtype == F32 else x.clone(),
    }
    return rng.choice(list(ops.items()))


def reduced(rng: Random, x: Tensor) -> tuple[str, Op]:
    d, keep = rng.randrange(x.ndim), rng.random() < 0.5
    dims = sorted(rng.sample(range(x.ndim), rng.randint(1, x.ndim)))
    ops: dict[str, Op] = {
        "sum": lambda x: x.sum(dims, keepdim=keep),
        "wide sum": lambda x: x.sum(dims, dtype=F32),
        "mean": lambda x: x.float().mean(dims, keepdim=keep),
        "amax": lambda x: x.amax(dims, keepdim=keep),
        "amin": lambda x: x.amin(dims, keepdim=keep),
        "any": lambda x: (x > 0).any(d),
        "all": lambda x: (x > -1).all(d),
        "count": lambda x: (x > 0).sum(d),
        "softmax": lambda x: x.softmax(d),
        "cumsum": lambda x: x.cumsum(d),
        "argmax": lambda x: x.argmax(d),
        "max": lambda x: x.max(d, keepdim=keep)[0],
        "norm": lambda x: torch.linalg.vector_norm(x, dim=d, keepdim=keep),
    }
    return rng.choice(list(ops.items()))


def extend(rng: Random, program: Program) -> None:
    """One more step."""
    last = len(program.values) - 1
    at = last if rng.random() < 0.6 else rng.randrange(last + 1)
    x, kind = program.values[at], rng.randrange(12)
    if kind < 3:
        ops = FLOATS if x.is_floating_point() else BOOLS if x.dtype == torch.bool else INTEGERS
        program.add(*rng.choice(list(ops.items())), at)
    elif kind < 6:
        others = [k for k, v in enumerate(program.values) if broadcasts(v, x)]
        program.add(*rng.choice(list(PAIRS.items())), at, rng.choice(others))
    elif kind == 6:
        dtype = rng.choice(OTHERS)
        program.add(f"to {dtype}", lambda x: x.to(dtype), at, moves=True)
    elif kind < 9 and x.ndim:
        program.add(*moved(rng, x), at, moves=True)
    elif kind < 11 and x.ndim:
        program.add(*reduced(rng, x), at)
    elif kind == 11:
        into = rng.randrange(len(program.inputs))
        y, name = program.values[into], rng.choice(["copy_", "add_", "mul_"])
        if at == into or y.shape != x.shape or overlaps(y):
            return
        if y.dtype != torch.bool or name == "copy_":
            program.write(name, into, at)


def drawn(rng: Random) -> Program:
    shape = [rng.choice(SIZES) for _ in range(rng.randint(1, 4))]
    while torch.Size(shape).numel() > MOST:
        shape.pop()
    main, inputs = rng.choice([F32, F32, BF16, F16]), []
    for k in range(rng.randint(1, 4)):
        own = shape if k == 0 else [n if rng.random() < 0.7 else 1 for n in shape]
        dtype = main if rng.random() < 0.7 else rng.choice(OTHERS)
        inputs.append(laid_out(rng, filled(rng, own, dtype)))
    program = Program(inputs, [twin(x) for x in inputs], [True] * len(inputs))
    for k, x in enumerate(inputs):
        where = f"strides {x.stride()}, from {x.storage_offset()}"
        program.text.append(f"v{k} {x.dtype} {tuple(x.shape)}: {where}")
    for _ in range(rng.randint(2, 11)):
        extend(rng, program)
    last = len(program.values) - 1
    program.results = sorted({last} | {rng.randint(0, last) for _ in range(rng.randrange(3))})
    return program


def twin(x: Tensor, device: str = "cpu") -> Tensor:
    """Another tensor that lies in memory of its own as x does."""
    memory = x.untyped_storage().clone().to(device=device)
    empty = torch.empty(0, dtype=x.dtype, device=device)
    return empty.set_(memory, x.storage_offset(), x.shape, x.stride())  # type: ignore[call-overload]


def assert_alike(got: Tensor, wanted: Tensor, near: float) -> None:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    if not wanted.is_floating_point():
        assert torch.equal(got, wanted)
        return
    a, b = got.double(), wanted.double()
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(), b.nan_to_num()
    assert (a - b).abs().max().item() <= near * (1 + b.abs().max().item())


def run(program: Program, how: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    if how == "eager":
        with gems_compile.use_gems():
            return program(*inputs)
    torch._dynamo.reset()
    return compile_(program.__call__, dynamic=how == "dynamic")(*inputs)


@pytest.mark.parametrize(("how", "count"), [("static", 30), ("dynamic", 10), ("eager", 15)])
@pytest.mark.parametrize("multiprocessors", [0, 132])
def test_mixed_programs(how: str, count: int, multiprocessors: int, monkeypatch) -> None:
    """Compiled, and by the same kernels behind eager PyTorch."""
    pretend_multiprocessors(monkeypatch, multiprocessors)

    @seed(SEED + multiprocessors + len(how))
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(st.randoms(use_true_random=False).map(drawn))
    def check(program: Program) -> None:
        theirs, ours = ([twin(x, DEVICE) for x in program.inputs] for _ in range(2))
        wanted = program(*theirs)
        got = run(program, how, ours)
        near = max(NEAR.get(x.dtype, 0) for x in program.values)
        for a, b in zip((*got, *ours), (*wanted, *theirs), strict=True):
            assert_alike(a, b, near)

    check()
