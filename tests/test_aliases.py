"""Outputs that are inputs, views of inputs, or each other; inputs that share memory."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, check, compile_, fresh, rand

ALIASES = {
    "input": lambda x: x,
    "input_and_more": lambda x: (x, x + 1),
    "input_twice": lambda x: (x, x),
    "view": lambda x: x.view(-1),
    "transpose": lambda x: x.t(),
    "slice": lambda x: x[1:, ::2],
    "select": lambda x: x[1],
    "expand": lambda x: x[:, :1].expand(4, 6),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "detach": lambda x: x.detach(),
    "alias_after_math": lambda x: (x * 2, x.view(6, 4)),
    "contiguous": lambda x: x.contiguous(),
    "same_dtype_cast": lambda x: x.to(torch.float32),
    "reshape": lambda x: x.reshape(3, 8),
    "as_strided": lambda x: x.as_strided((3, 2), (5, 2), 1),
    "split": lambda x: x.split(2),
    "unbind": lambda x: x.unbind(0),
    "chunk": lambda x: x.chunk(2, 1),
    "squeeze": lambda x: x[None].squeeze(0),
    "diagonal": lambda x: x.diagonal(),
    "unfold": lambda x: x.unfold(1, 3, 2),
    "view_of_intermediate": lambda x: (x + 1).t(),
    "two_views_of_intermediate": lambda x: (lambda y: (y[0], y[1:], y))(x + 1),
    "same_intermediate_twice": lambda x: (lambda y: (y, y))(x + 1),
    "equal_but_distinct": lambda x: (x + 1, x + 1),
    "clone": lambda x: (x.clone(), x),
    "dropout_in_eval": lambda x: F.dropout(x * 2, 0.5, training=False) + 1,
    "zero_dim_view": lambda x: x[1, 2],
    "dtype_view": lambda x: x.view(torch.int32),
    "movedim": lambda x: x.view(2, 2, 6).movedim(0, -1),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ALIASES)
def test_aliases(name, grad):
    check(ALIASES[name], rand(4, 6), grad=False)
    if grad:
        check(ALIASES[name], rand(4, 6, grad=True))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_output_can_be_written_without_touching_the_input(grad):
    """`x + 0`, `x * 1` and a copy are new tensors, whatever a pass thinks of them."""

    def fn(x):
        return x + 0, x * 1, x.clone(), x.to(torch.float32, copy=True), x / 1

    x = rand(4, 6, grad=grad)
    check(fn, x)
    with torch.no_grad():
        before = x.clone()
        for out in compile_(fn)(x):
            out.zero_()
    assert torch.equal(x, before)


#: memory of their own in eager mode, though nothing changes, or nothing but what is left out
COPIES = {
    "pad_by_nothing": lambda x: F.pad(x, (0, 0)),
    "pad_takes_away": lambda x: F.pad(x, (-1, -1)),
    "pad_takes_away_one_end": lambda x: F.pad(x, (-1, 0, 0, -1)),
    "cat_of_one": lambda x: torch.cat([x]),
    "stack_of_one": lambda x: torch.stack([x]),
    "repeat_once": lambda x: x.repeat(1, 1),
    "roll_by_nothing": lambda x: torch.roll(x, 0),
    "flip_of_nothing": lambda x: x.flip([]),
    "scatter_of_all": lambda x: torch.slice_scatter(x, x, 0, 0, 4),
    "narrow_copy": lambda x: torch.narrow_copy(x, 1, 1, 3),
    "tril_of_all": lambda x: x.tril(9),
}


@pytest.mark.parametrize("of", ["input", "product", "kernel"])
@pytest.mark.parametrize("name", COPIES)
def test_copies_are_no_views(name, of):
    """Of an input, of what ATen makes and of what a kernel makes, which are returned as well."""
    copy, w = COPIES[name], rand(6, 6)

    def fn(x):
        y = {"input": lambda: x, "product": lambda: x @ w, "kernel": lambda: x.exp()}[of]()
        return y, copy(y)

    check(fn, rand(4, 6), rtol=1e-4, atol=1e-5)


def test_distinct_outputs_do_not_share_memory():
    x = rand(4, 6)
    a, b = compile_(lambda x: (x.sin(), x.sin()))(x)
    a.zero_()
    assert torch.equal(b, x.sin()) or torch.allclose(b, x.sin())


def test_results_survive_the_next_call():
    fn = compile_(lambda x: (x * 2, x.sum(-1)))
    x, other = rand(4, 6), rand(4, 6)
    first = fn(x)
    kept = fresh(first)
    second = fn(other)
    assert_same(first[0], kept[0])
    assert_same(first[1], kept[1])
    assert_same(second[0], other * 2)


def test_written_view_returned_with_its_base():
    def fn(x):
        view = x[1:]
        view.mul_(2)
        return view, x, x.t()

    check(fn, rand(4, 6))


def test_inputs_that_overlap():
    base = rand(24)

    def fn(a, b):
        a.add_(1)
        return a * 2 + b

    check(fn, base[:12], base[6:18])


def test_inputs_that_are_one_tensor():
    x = rand(4, 6)

    def fn(a, b):
        a.mul_(2)
        return a + b

    check(fn, x, x)


def test_input_and_its_view():
    x = rand(4, 6)

    def fn(a, b):
        b.add_(1)
        return a.sum(0), b.sum(0)

    check(fn, x, x.t())


def test_second_input_copied_from_first():
    def fn(x, y):
        y.copy_(x)
        x.zero_()
        return x + y

    check(fn, rand(4, 6), rand(4, 6))


def test_view_that_aten_makes_is_of_its_input():
    """Kernels read a copy of it where it starts off a 16-byte boundary; who gets it does not."""

    def fn(x, k):
        y = x.select(1, k)
        return y, y[1:], torch.cat([y, y * 2]).abs()

    x = rand(5, 33)
    compiled = compile_(fn, dynamic=True)
    for k in (26, 3, 8):
        got, want = compiled(x, k), fn(x, k)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(got[:2], want[:2], strict=True):
            assert a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
        got[0].fill_(k)
        assert torch.equal(x[:, k], torch.full_like(x[:, k], k))


@pytest.mark.parametrize("dynamic", [False, True])
def test_repeated_elements_off_a_boundary(dynamic):
    """The copy on a 16-byte boundary repeats them too; ATen writes none of them twice."""
    base, fn = rand(40), lambda x: (x * 2 + 1, x.sum(0))
    compiled = compile_(fn, dynamic=dynamic)
    for x in (
        base[1:4].unsqueeze(1).expand(3, 5),
        base[3:4].expand(6, 2),
        base[1:].as_strided((4, 3), (1, 1)),
        base[5:17].view(3, 1, 4).expand(3, 7, 4)[:, :, ::2],
    ):
        for got, want in zip(compiled(x), fn(x), strict=True):
            torch.testing.assert_close(got, want)


def test_swap_inputs():
    def fn(x, y):
        t = x.clone()
        x.copy_(y)
        y.copy_(t)
        return x - y

    check(fn, rand(4, 6), rand(4, 6))


def test_swap_inputs_of_different_layout():
    def fn(x, y):
        t = x * 1
        x.copy_(y + 1)
        y.copy_(t.relu())

    check(fn, rand(4, 6), rand(6, 4).t())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_write_without_grad_to_a_leaf(context):
    def fn(w, g):
        w.sub_(0.1 * g)
        return w.norm()

    check(fn, rand(4, 6, grad=context is torch.no_grad), rand(4, 6), context=context, grad=False)


def test_write_inside_no_grad_then_use():
    def fn(w, x):
        with torch.no_grad():
            w.mul_(0.5)
        return (w * x).sum(-1)

    check(fn, rand(4, 6), rand(4, 6, grad=True))


def test_metadata_written():
    def fn(x):
        x.t_()
        y = x * 2
        y.unsqueeze_(0)
        return y

    check(fn, rand(4, 6), fullgraph=False)  # Dynamo breaks the graph at an input


def test_write_to_leaf_that_needs_grad_raises():
    with pytest.raises(RuntimeError, match="leaf"):
        (lambda x: x.add_(1))(rand(3, grad=True))
    with pytest.raises(RuntimeError, match="leaf"):
        compile_(lambda x: x.add_(1))(rand(3, grad=True))
