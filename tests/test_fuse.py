"""Small programs -> their kernels: how many, what stays an ATen call, and the numbers.

One program each: traced as AOTAutograd would, fused, run on poisoned memory, compared with eager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_same_values, bools, compile_, gems_only, ints, rand
from opcheck import lower, options, run_poisoned, tensors, trace
from torch import Tensor

import gems_compile
from gems_compile.kernels.op import T
from gems_compile.lowering.report import Report

pytestmark = gems_only


def fused(
    fn: Callable[..., Any], *inputs: Tensor, kernels: int, aten: int = 0, **how: Any
) -> Report:
    """fn becomes this many kernel launches and calls of ATen, and gives eager's numbers."""
    got, report = lower(fn, *inputs, **how)
    for k, (a, b) in enumerate(zip(got, tensors(fn(*inputs)), strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), f"output {k}"
        assert_same_values(a, b, f"output {k}")
    found = [s.name for s in report.sources], dict(report.aten)
    assert (report.launches, report.aten_calls) == (kernels, aten), found
    return report


# pointwise ----------------------------------------------------------------------------------------


def test_chain() -> None:
    fused(lambda x, y: torch.relu(x * 2 + y).exp() - 1, rand(7, 33), rand(33), kernels=1)


def test_several_outputs() -> None:
    def fn(x: Tensor, y: Tensor) -> Any:
        a = x + y
        b = a.sigmoid()
        return a, b, (b * 3).to(torch.bfloat16), a > 0

    fused(fn, rand(7, 33), rand(7, 33), kernels=1)


@pytest.mark.parametrize("shape", [(20, 2000), (3, 7, 2048), (9, 4093)])
def test_a_number_for_each_row(shape: tuple[int, ...]) -> None:
    """Programs have parts of rows, and load a row's numbers once."""
    *rows, length = shape

    def fn(x: Tensor, scale: Tensor, place: Tensor, rows: Tensor) -> Any:
        columns = torch.arange(length, device=x.device)
        return torch.where(columns == place, -1.0, x * scale) + rows[:, None], x * scale.exp()

    inputs = rand(*shape), rand(*rows, 1), ints(*rows, 1, high=length), rand(rows[-1])
    # of a large GPU most of the multiprocessors would have no part
    report = fused(fn, *inputs, kernels=1, multiprocessors=4)
    assert "z = pid // " in report.sources[0].text


def test_a_number_for_each_of_many_short_rows() -> None:
    """A part of a row would leave lanes idle: programs take places one after the other."""
    report = fused(lambda x, y: x * y, rand(300, 100), rand(300, 1), kernels=1, alone=True)
    assert "z = pid // " not in report.sources[0].text


def test_broadcast() -> None:
    def fn(x: Tensor, row: Tensor, column: Tensor, one: Tensor) -> Tensor:
        return (x + row) * column - one

    fused(fn, rand(4, 5, 33), rand(33), rand(5, 1), rand(), kernels=1)


def test_small_operand_is_recomputed_by_its_reader() -> None:
    """exp(row) is cheap, and a kernel of its own would cost a launch."""
    fused(lambda x, row: x * row.exp(), rand(64, 33), rand(33), kernels=1)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x.view(2, 3, 40).permute(2, 0, 1),
        lambda x: x[1:5, ::3],
        lambda x: x[2],
        lambda x: x[:, 7],
        lambda x: x.view(3, 2, 8, 5).transpose(1, 2).reshape(24, 10),
        lambda x: x.unsqueeze(1).expand(6, 4, 40),
        lambda x: x.flip(1),
        lambda x: x.view(240)[5:],
        lambda x: torch.cat([x[:, :10], x[:, 30:]], 1),
        lambda x: F.pad(x, (1, 2)),
        lambda x: torch.stack([x, x * 3], 2),
        lambda x: x.chunk(4, 1)[2],
    ],
)
def test_view_inside(view: Callable[[Tensor], Tensor]) -> None:
    """A view between two pointwise ops is index arithmetic of the one kernel."""
    fused(lambda x: view(x * 2 + 1).relu() - 0.5, rand(6, 40), kernels=1)


def test_transposed_operand() -> None:
    fused(lambda x, y: (x.t() + y).relu(), rand(40, 70), rand(70, 40), kernels=1)


def test_two_strides_meet() -> None:
    """Attention's heads: [B, S, H * D] -> [B, H, S, D], with a bias before and a scale after."""

    def fn(x: Tensor, b: Tensor) -> Tensor:
        return ((x + b).view(2, 10, 4, 8).transpose(1, 2) * 0.5).contiguous()

    fused(fn, rand(2, 10, 32), rand(32), kernels=1)


def test_matmul_stays_between() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return torch.relu((x * 2 + 1) @ w) - 1

    fused(fn, rand(8, 16), rand(16, 12), kernels=2, aten=1)


CHANGES = {
    "add of a transposed": lambda x: x[0] + x[1].t(),
    "to channels last": lambda x: x.view(2, 8, 64, 512).clone(memory_format=torch.channels_last),
    "to contiguous": lambda x: (
        x.view(2, 64, 512, 8)
        .permute(0, 3, 1, 2)
        .to(torch.bfloat16, memory_format=torch.contiguous_format)
    ),
    "transposed": lambda x: x[0].t().contiguous(),
}


@pytest.mark.parametrize("case", CHANGES)
def test_lone_change_of_layout_has_a_tile_of_both_axes(case: str) -> None:
    """ATen reads a line of memory for each element."""
    report = fused(CHANGES[case], rand(2, 512, 512), kernels=1)
    assert "YBLOCK" in report.sources[0].text


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[0] + x[1],
        lambda x: x[0].t() + x[1].t(),
        lambda x: x[0] + x[1, :, :1],
        lambda x: x[:, :64, :64].transpose(1, 2).contiguous(),
    ],
    ids=["one layout", "also one", "broadcast", "small"],
)
def test_lone_op_of_one_layout_is_atens(fn: Callable[[Tensor], Tensor]) -> None:
    fused(fn, rand(2, 512, 512), kernels=0, aten=1)


def test_op_without_neighbours_is_atens() -> None:
    fused(lambda x, w: (x * 2) @ w, rand(8, 16), rand(16, 12), kernels=0, aten=2)


def test_view_of_a_member_read_by_aten() -> None:
    """ATen takes a view of what a kernel stored; the kernel's other value stays in the kernel."""

    def fn(x: Tensor, w: Tensor) -> Any:
        h = torch.relu(x + 1)
        return h.view(2, 5, 4, 8).transpose(1, 2).reshape(8, 40)[:, :8] @ w, h * 2

    fused(fn, rand(2, 5, 32), rand(8, 3), kernels=1, aten=1)


def test_constant_of_a_value_that_is_not_stored() -> None:
    """zeros_like(m) needs m's shape, not m."""
    got, _ = lower(lambda t: (torch.zeros_like(t * 1.5), (t * 1.5).sum(0)), rand(4, 33))
    assert torch.equal(got[0], torch.zeros(4, 33, device=DEVICE))


# rows ---------------------------------------------------------------------------------------------


def test_norm_residual_gelu() -> None:
    def fn(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.gelu(F.layer_norm(x + r, (33,), w, b)) + r

    fused(fn, rand(9, 33), rand(9, 33), rand(33), rand(33), kernels=1)


def test_softmax_with_mask_and_scale() -> None:
    def fn(scores: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(scores * 0.125 + mask, -1)

    fused(fn, rand(2, 3, 10, 17), rand(10, 17), kernels=1)


def test_masked_softmax() -> None:
    def fn(scores: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(scores.masked_fill(mask, float("-inf")), -1)

    mask = torch.ones(10, 17, dtype=torch.bool, device=DEVICE).triu(1)
    fused(fn, rand(2, 3, 10, 17), mask, kernels=1)


def test_reduction_with_epilogue() -> None:
    fused(lambda x: (x * x).mean(-1, keepdim=True).add(1e-6).rsqrt() * x, rand(9, 33), kernels=1)
    fused(lambda x: torch.sqrt((x * x).sum(-1)) * 2 + 1, rand(9, 33), kernels=1)


def test_two_reductions_of_one_row() -> None:
    fused(lambda x: (x.amax(-1), x.sum(-1), x - x.amin(-1, keepdim=True)), rand(9, 33), kernels=1)


def test_primitive_rms_norm() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * h.to(x.dtype)

    fused(fn, rand(9, 64, dtype=torch.bfloat16), rand(64, dtype=torch.bfloat16), kernels=1)


def test_rope() -> None:
    def fn(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = q.shape[-1] // 2
        turned = torch.cat([-q[..., half:], q[..., :half]], -1)
        return q * cos + turned * sin

    fused(fn, rand(2, 4, 10, 16), rand(10, 16), rand(10, 16), kernels=1)


def test_embedding_position_norm() -> None:
    def fn(ids: Tensor, words: Tensor, places: Tensor, w: Tensor, b: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        return F.layer_norm(F.embedding(ids, words) + F.embedding(at, places), (32,), w, b)

    table = rand(50, 32), rand(20, 32), rand(32), rand(32)
    fused(fn, ints(3, 10, high=50), *table, kernels=1)


def test_cross_entropy() -> None:
    """One kernel for the rows, one for their mean."""

    def fn(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x * 2, t)

    fused(fn, rand(16, 40), ints(16, high=40), kernels=2)


# forward and backward -----------------------------------------------------------------------------


def launches(fn: Callable[..., Any], *inputs: Tensor) -> dict[str, tuple[int, int]]:
    """{"forward": (kernels, ATen calls), "backward": ...} of fn under torch.compile."""
    leaves = [x for x in inputs if x.requires_grad]
    seed = None
    seen = []
    for run in (fn, compile_(fn)):
        y = run(*inputs)
        seed = torch.randn_like(y) if seed is None else seed
        seen.append([y.detach(), *torch.autograd.grad(y, leaves, seed)])
    for a, b in zip(*reversed(seen), strict=True):
        assert_same_values(a, b, rtol=1e-4, atol=1e-5)
    return {r.kind: (r.launches, r.aten_calls) for r in gems_compile.reports()}


def test_swiglu() -> None:
    found = launches(
        lambda gate, up: F.silu(gate) * up, rand(8, 33, grad=True), rand(8, 33, grad=True)
    )
    assert found == {"forward": (1, 0), "backward": (1, 0)}


def test_gelu_residual() -> None:
    """The backward is one op of ATen's, and stays that."""
    found = launches(lambda x, r: F.gelu(x) + r, rand(8, 33, grad=True), rand(8, 33))
    assert found == {"forward": (1, 0), "backward": (0, 1)}


def test_layer_norm_backward() -> None:
    """dx with its row sums in one kernel; dw and db, sums over rows, in one more."""
    found = launches(
        lambda x, w, b: F.gelu(F.layer_norm(x, (33,), w, b)),
        rand(8, 33, grad=True),
        rand(33, grad=True),
        rand(33, grad=True),
    )
    assert found == {"forward": (1, 0), "backward": (2, 0)}


def test_softmax_backward() -> None:
    found = launches(lambda x: torch.softmax(x * 0.5, -1) * 2, rand(8, 33, grad=True))
    assert found == {"forward": (1, 0), "backward": (1, 0)}


# persistent and looped ----------------------------------------------------------------------------


ROWS: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x.sum(-1),
    "mean_of_squares": lambda x: (x * x).mean(-1),
    "amax": lambda x: x.amax(-1),
    "argmax": lambda x: x.argmax(-1),
    "any": lambda x: (x > 4.5).any(-1),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "softmax": lambda x: torch.softmax(x * 2, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (x.shape[-1],)) * 2,
    "var_mean": lambda x: torch.var_mean(x, -1),
}


@pytest.mark.parametrize("length", [1, 2, 127, 1024, 4100, 20000])
@pytest.mark.parametrize("name", ROWS)
def test_row_lengths(name: str, length: int) -> None:
    """On chip, in steps, or in parts that are combined: the same numbers."""
    if length == 1 and name == "var_mean":
        pytest.skip("no degrees of freedom")
    x = rand(2, length)
    got, report = lower(ROWS[name], x, alone=True)
    assert report.launches >= 1
    for a, b in zip(got, tensors(ROWS[name](x.double())), strict=True):
        assert_same_values(a, b.to(a.dtype), name, rtol=1e-5, atol=1e-5)


def test_looped_rows() -> None:
    """Enough long rows to keep a GPU busy: one program a row, in steps."""
    fn = ROWS["softmax"]
    x = rand(64 if DEVICE == "cpu" else 1000, 20000)
    got, report = lower(fn, x, alone=True)
    assert report.launches == 1
    assert "for start in range" in report.sources[0].text
    assert_same_values(got[0], fn(x.double()).float(), rtol=1e-5, atol=1e-8)


# columns and everything ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 33), (1000, 7), (3000, 2), (1, 33), (33, 1)])
def test_columns(shape: tuple[int, int]) -> None:
    x = rand(*shape)

    def fn(x: Tensor) -> Any:
        return (x * 2).sum(0), x.amax(0), (x > 2).any(0), x.mean(0)

    got, _ = lower(fn, x, alone=True)
    for a, b in zip(got, fn(x.double()), strict=True):
        assert_same_values(a, b.to(a.dtype), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(33,), (7, 1000), (300, 200), (3, 4, 5, 6), ()])
def test_everything(shape: tuple[int, ...]) -> None:
    x = rand(*shape)

    def fn(x: Tensor) -> Any:
        return (x * x).sum(), x.amax(), x.amin() + 1, x.argmax(), (x > -9).all(), x.mean() * 2

    got, _ = lower(fn, x, alone=True)
    for a, b in zip(got, fn(x.double()), strict=True):
        assert_same_values(a, b.to(a.dtype), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dims", [(0, 2), (1,), (0, 1), (2, 0, 1), (0, -1)])
def test_middle_dims(dims: tuple[int, ...]) -> None:
    x = rand(5, 6, 7)
    got, _ = lower(lambda x: (x + 1).sum(dims), x, alone=True)
    assert_same_values(got[0], (x.double() + 1).sum(dims).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [33, 20000])
@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_arg_ties_and_nan(name: str, length: int) -> None:
    """The first of equals; the first NaN if there is one; infinities of the worst sign count."""
    op = getattr(torch, name)
    worst = float("-inf") if name == "argmax" else float("inf")
    x = torch.full((5, length), worst, device=DEVICE)
    x[1] = ints(length, high=3).float()
    x[2, 7], x[2, 20] = float("nan"), float("nan")
    x[3, length - 1] = 1.0
    x[4, 5] = -worst
    got, report = lower(lambda x: (op(x, -1), op(x * 1), op(x, 0)), x, alone=True)
    assert report.aten_calls == 0
    for a, b in zip(got, (op(x, -1), op(x), op(x, 0)), strict=True):
        assert torch.equal(a, b), f"{a}, eager: {b}"


def test_integer_extremes() -> None:
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    x = torch.tensor([[low, high, 0], [high, high, low]], device=DEVICE)
    got, _ = lower(lambda x: (x.amax(-1), x.amin(-1), x.argmin(-1), x.sum(-1)), x, alone=True)
    for a, b in zip(got, (x.amax(-1), x.amin(-1), x.argmin(-1), x.sum(-1)), strict=True):
        assert torch.equal(a, b)


# symbolic sizes -----------------------------------------------------------------------------------

SYMBOLIC: dict[str, tuple[Callable[..., Any], list[T]]] = {
    "chain": (lambda x, y: (x * 2 + y).relu(), [T(7, 33), T(33)]),
    "norm": (lambda x, w: F.layer_norm(x, (33,), w).relu(), [T(7, 33), T(33)]),
    "softmax": (lambda x: torch.softmax(x * 2, -1), [T(3, 5, 7)]),
    "heads": (
        lambda x: (x + 1).view(*x.shape[:2], 4, 8).transpose(1, 2) * 2,
        [T(2, 5, 32)],
    ),
    "rope": (
        lambda q, c: torch.cat([-q[..., 4:], q[..., :4]], -1) * c + q,
        [T(2, 5, 8), T(5, 8)],
    ),
    "mean": (lambda x: x.mean(1) + x.shape[1], [T(4, 9)]),
    "columns": (lambda x: (x * 2).sum(0), [T(9, 4)]),
    "flat": (lambda x: (x * 2).flatten(0, 1) + 1, [T(3, 5, 7)]),
    "last": (lambda x: x[:, -1] * 2, [T(5, 7)]),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes(name: str) -> None:
    """One kernel for all sizes: sizes are its arguments."""
    fn, specs = SYMBOLIC[name]
    inputs = [rand(*s.shape) for s in specs]
    graph = trace(fn, *inputs, dynamic=True)
    got, report = run_poisoned(graph, inputs, options())
    assert report.launches == 1, [s.name for s in report.sources]
    assert any(role == "size" for _, role, _ in report.sources[0].params)
    assert_same_values(got[0], fn(*inputs))


def test_mask_of_truth_values() -> None:
    def fn(x: Tensor, m: Tensor) -> Tensor:
        return torch.where(m & (x > 0), x, x * 0.1) + m

    fused(fn, rand(7, 33), bools(7, 33), kernels=1)


# cross entropy ------------------------------------------------------------------------------------


def test_log_softmax_is_not_stored_for_the_loss() -> None:
    """Two numbers a row are; one kernel reads the logits, one the logits at the targets."""

    def fn(x: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(torch.log_softmax(x, 1), target, ignore_index=3)

    report = fused(fn, rand(7, 33), ints(7, high=33), kernels=2)
    outputs = [what for s in report.sources for _, role, what in s.params if role == "out"]
    assert max(len(v.shape) and v.shape[-1] for v in outputs) == 1


def test_cross_entropy_backward_reads_once() -> None:
    """The sum of a gradient that is zero but at the target needs no pass over the row."""

    def fn(x: Tensor, target: Tensor, top: Tensor, logsum: Tensor) -> Tensor:
        logp = (x - top) - logsum
        one, count = torch.ones((), device=x.device), torch.tensor(5.0, device=x.device)
        g = torch.ops.aten.nll_loss_backward(one, logp, target, None, 1, 3, count)
        return torch.ops.aten._log_softmax_backward_data(g, logp, 1, torch.float32)

    x, target = rand(7, 33), ints(7, high=33)
    target[2] = 3  # ignored
    report = fused(fn, x, target, *torch.ops.gems.log_softmax_stats(x, 1), kernels=1)
    assert "sum" not in report.sources[0].text.partition("\n    x =")[2]


def test_backward_of_log_softmax_saves_rows() -> None:
    """What backward reads again is x and two numbers a row."""
    launches(lambda x: torch.log_softmax(x, -1) * 2, rand(8, 33, grad=True))
    (forward,) = [r for r in gems_compile.reports() if r.kind == "forward"]
    big = [
        what
        for s in forward.sources
        for _, role, what in s.params
        if role == "out" and what.shape == (8, 33)
    ]
    assert len(big) == 1, "log_softmax(x) * 2 alone is stored at full size"


def test_column_sum_of_an_expanded_value_beside_rows() -> None:
    """Its coordinate along the expanded dim is no loop variable of the row kernel."""

    def fn(x: Tensor, w: Tensor) -> Any:
        y = x.softmax(-1) * w
        return y, (x * w).expand(3, 600, 33).sum((0, 1))

    x, w = rand(600, 33) / 16, rand(33)
    got, _ = lower(fn, x, w)
    for a, b in zip(got, fn(x, w), strict=True):
        assert_same_values(a, b, rtol=1e-4, atol=1e-5)
