"""A copy into an input is a store of the kernel that computes what is copied: where that is right,
and where it is not. The old value is read late, elsewhere, through views and aliases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEVICE, check, gems_only, ints, rand
from machine_code import sources
from opcheck import trace

import gems_compile
from gems_compile.backend import Gems
from gems_compile.lowering.load import Pool

pytestmark = gems_only


def copies(fn: Callable[..., Any], *args: Any) -> list[str]:
    """Why copies into inputs were left to ATen, after a check of the numbers."""
    check(fn, *args)
    backend = Gems()
    torch.compile(fn, backend=backend, fullgraph=True)(*(a.clone() for a in args))
    plans = [r.plan for r in backend.reports]
    return [
        why for p in plans for n, why in p.aten.items() if str(n.target) == "aten.copy_.default"
    ]


def launches(fn: Callable[..., Any], *args: Any) -> int:
    backend = Gems()
    torch.compile(fn, backend=backend, fullgraph=True)(*(a.clone() for a in args))
    return sum(r.launches for r in backend.reports)


# stores -------------------------------------------------------------------------------------------


def scale(x, y):
    x.mul_(2).add_(y)


def scale_and_return(x, y):
    return x.mul_(2).add_(y)


def new_value_returned(x, y):
    z = x * 2 + y
    x.copy_(z)
    return z


def into_both(x, y):
    z = x * 2 + y
    x.copy_(z)
    y.copy_(z + 1)


def one_value_into_both(x, y):
    z = x * 2 + y
    x.copy_(z)
    y.copy_(z)
    return z


def old_value_read_in_place(x, y):
    old = x.sigmoid()
    x.add_(y)
    return old * x


def old_value_kept(x, y):
    old = x.clone()
    x.add_(y)
    return old


def through_a_reshape(x, y):
    x.view(-1).mul_(y.view(-1)).add_(1)


def minus_own_mean(x, y):
    x.sub_(x.mean(-1, keepdim=True)).add_(y)


STORED = [
    scale,
    scale_and_return,
    new_value_returned,
    into_both,
    one_value_into_both,
    old_value_read_in_place,
    old_value_kept,
    through_a_reshape,
    minus_own_mean,
]


@pytest.mark.parametrize("fn", STORED, ids=lambda fn: fn.__name__)
def test_stored(fn) -> None:
    assert copies(fn, rand(6, 6), rand(6, 6)) == []
    assert launches(fn, rand(6, 6), rand(6, 6)) == 1


def test_all_is_loaded_before_anything_is_stored() -> None:
    """One kernel writes x, whose old value only the new y needs, and y likewise."""

    def fn(x, y, z):
        a = y * 2 + z
        b = x * 3 + a
        x.copy_(a)
        y.copy_(b)

    for size in (5, 5000):
        check(fn, rand(size), rand(size), rand(size))
    assert launches(fn, rand(5), rand(5), rand(5)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.float64])
def test_the_write_narrows(dtype) -> None:
    """The new value is computed in another dtype than the input's."""

    def fn(x, y):
        x.copy_(y * 3 + 0.5)
        return y * 3

    x = ints(5, 7).to(dtype)
    assert copies(fn, x, rand(5, 7)) == []


def test_batch_norm_running_statistics() -> None:
    norm = torch.nn.BatchNorm2d(5).to(DEVICE)
    check(norm, rand(4, 5, 6, 6), rtol=1e-5, atol=1e-5)
    backend = Gems()
    torch.compile(norm, backend=backend)(rand(4, 5, 6, 6))
    (forward,) = (r for r in backend.reports if r.kind == "forward")
    assert [n for n in forward.plan.aten if str(n.target) == "aten.copy_.default"] == []


@pytest.mark.parametrize("layout", ["transposed", "strided", "off by one"])
def test_layouts(layout) -> None:
    whole = rand(37 * 2)
    x = {
        "transposed": rand(6, 5).t(),
        "strided": rand(10, 12)[::2, ::2],
        "off by one": whole[1:31].view(5, 6),
    }[layout]
    check(scale, x, rand(5, 6))
    check(new_value_returned, x, rand(5, 6))


def test_an_input_off_the_16_byte_boundary_is_written() -> None:
    """Kernels work on an aligned copy, which goes back before ATen reads the input."""

    def fn(x, y):
        x.add_(1)
        return torch.ops.aten.cumsum.default(x, 0) + y

    compiled = torch.compile(fn, backend="gems")
    for start in (0, 1, 0, 3):
        whole = rand(40)
        want = whole.clone()
        got = compiled(whole[start : start + 30], rand(30) * 0)
        torch.testing.assert_close(got, fn(want[start : start + 30], torch.zeros_like(got)))
        torch.testing.assert_close(whole, want)


# not stores ---------------------------------------------------------------------------------------


def flipped(x, y):
    x.add_(x.flip(0))


def first_row_added(x, y):
    x.add_(x[0] * y)


def new_value_read_elsewhere(x, y):
    """add is computed again, from the old x, for its first row."""
    z = x + y
    x.copy_(z)
    return z[0] + z


def old_value_needs_the_new(x, y):
    """The old x is read by a kernel that waits for the one that computes the new x."""
    z = (x * 2 + y).cos()
    total = (z @ y).sum()
    late = (x * total).cos()
    x.copy_(z)
    return late


def written_in_parts(x, y):
    x[1:].copy_(y[1:] * 2)
    x[:1].copy_(y[:1] * 3)


def copied_as_it_is(x, y):
    x.copy_(y)


def gathered(x, y):
    x.copy_(x[torch.arange(5, -1, -1, device=x.device)] * y)


def joined(x, y):
    x.copy_(torch.cat([x[3:], x[:3]]) * y)


NOT_STORED = [
    flipped,
    first_row_added,
    new_value_read_elsewhere,
    old_value_needs_the_new,
    copied_as_it_is,
    gathered,
    joined,
]


@pytest.mark.parametrize("fn", NOT_STORED, ids=lambda fn: fn.__name__)
def test_not_stored(fn) -> None:
    (why,) = copies(fn, rand(6, 6), rand(6, 6))
    assert why


@pytest.mark.parametrize("fn", NOT_STORED, ids=lambda fn: fn.__name__)
def test_not_stored_over_many_programs(fn) -> None:
    """Larger than a tile: a store that is too early is seen by another program."""
    if fn is not gathered:  # its index is of six rows
        check(fn, rand(80, 80), rand(80, 80), rtol=1e-4, atol=1e-4)


def test_written_in_parts() -> None:
    check(written_in_parts, rand(6, 6), rand(6, 6))


# who reads the old value, and when ----------------------------------------------------------------


def old_value_by_aten(x, y):
    before = torch.ops.aten.cumsum.default(x, 0)
    x.mul_(2)
    return before, torch.ops.aten.cumsum.default(x, 0)


def old_value_by_another_kernel(x, y):
    """The sum over columns of the old x is no part of the kernel that writes x."""
    before = x.sum(0)
    x.mul_(y)
    return before, x.sum(0)


def old_value_through_a_view(x, y):
    part = x[1:4, ::2] * 2
    x.mul_(y)
    return part


def view_of_the_new_value(x, y):
    part = x[1:4]
    x.mul_(y)
    return part, part + 1


def written_twice(x, y):
    x.add_(y)
    z = torch.ops.aten.cumsum.default(x, 0)
    x.mul_(z)
    return z


def both_written_from_the_other(x, y):
    a, b = x + y, x - y
    x.copy_(a)
    y.copy_(b)
    return a * b


def transposed_sum(x, y):
    x.copy_(x.t() * y)


def swapped(x, y):
    old = x * 1.5
    x.copy_(y * 2)
    y.copy_(old)


ORDER = [
    old_value_by_aten,
    old_value_by_another_kernel,
    old_value_through_a_view,
    view_of_the_new_value,
    written_twice,
    both_written_from_the_other,
    transposed_sum,
    swapped,
]


@pytest.mark.parametrize("size", [6, 70])
@pytest.mark.parametrize("fn", ORDER, ids=lambda fn: fn.__name__)
def test_order(fn, size) -> None:
    check(fn, rand(size, size), rand(size, size), rtol=1e-4, atol=1e-4)


def test_inputs_that_are_one_tensor() -> None:
    def fn(x, y):
        x.mul_(2)
        return x + y

    def same(x):
        return fn(x, x)

    check(same, rand(6, 6))


@pytest.mark.parametrize("start", [0, 3])
def test_inputs_that_overlap(start) -> None:
    """Two views of one memory: what is written through one is seen through the other."""

    def run(f, whole):
        return f(whole[:30], whole[start : start + 30])

    def fn(x, y):
        x.mul_(2)
        return y + 1

    whole = rand(40)
    want = whole.clone()
    got = run(torch.compile(fn, backend="gems"), whole)
    torch.testing.assert_close(got, run(fn, want))
    torch.testing.assert_close(whole, want)


def test_an_expanded_input() -> None:
    """Eager mode refuses to write memory that shows in several places; so does compiled code."""
    x = rand(1, 6).expand(5, 6)
    with pytest.raises(Exception, match="single memory location"):
        torch.compile(scale, backend="gems")(x, rand(5, 6))


def test_explain_says_what_is_stored_and_why_not() -> None:
    found = gems_compile.explain(scale, rand(6, 6), rand(6, 6))
    assert any("copy_" in fact and "fused in" in fact for fact in found.why("copy_"))
    found = gems_compile.explain(flipped, rand(6, 6), rand(6, 6))
    assert "reads the old value at another place" in str(found)


def test_no_memory_is_allocated_for_what_is_stored() -> None:
    backend = Gems()
    torch.compile(scale, backend=backend)(rand(6, 6), rand(6, 6))
    (report,) = backend.reports
    assert "empty(" not in report.wrapper


def running_mean(x, y):
    """A statistic of rows, and what a whole row needs of the old one."""
    out = y - x
    x.mul_(0.9).add_(y.mean(1, keepdim=True) * 0.1)
    return out


@pytest.mark.parametrize("columns", [6, 300, 20000])
def test_row_statistics(columns) -> None:
    check(running_mean, rand(5, 1), rand(5, columns), rtol=1e-4, atol=1e-4)
    assert copies(running_mean, rand(5, 1), rand(5, 6)) == []


@pytest.mark.parametrize(
    "target", [["cuda", 90, 32], ["hip", "gfx942", 64]], ids=["sm_90", "gfx942"]
)
def test_kernels_compile_for_targets(target, tmp_path) -> None:
    """Among them those that wait for all threads' loads before they store."""
    own = trace(minus_own_mean, torch.empty(6, 6), torch.empty(6, 6))
    running = trace(running_mean, torch.empty(6, 1), torch.empty(6, 300))
    found = [source for graph in (own, running) for source in sources(graph)]
    assert any("debug_barrier" in source.text for source in found)
    pool = Pool(1)
    try:
        for k, source in enumerate(found):
            path = tmp_path / f"kernel_{k}.py"
            path.write_text(source.text)
            job = {"path": str(path), "meta": source.meta, "target": target}
            assert pool.submit(job).get(timeout=300) is None
    finally:
        pool.close()


def test_dynamic_sizes() -> None:
    compiled = torch.compile(scale, backend="gems", dynamic=True)
    for n in (5, 8, 17):
        x, y = rand(n, 6), rand(n, 6)
        want = x * 2 + y
        compiled(x, y)
        torch.testing.assert_close(x, want)
