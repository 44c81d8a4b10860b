"""In-place effects: what compiled code does to its inputs is what eager does."""

import pytest
import torch
import torch.nn.functional as F
from helpers import bools, check, ints, rand

# --- the old value and the new value of something written in place --------------------------------


def read_then_write(x):
    y = x + 1
    x.mul_(2)
    return x + y


def read_old_after_writing(x):
    old = x.clone()
    x.add_(1)
    return old * x


def write_twice(x):
    x.add_(1)
    y = x * 3
    x.mul_(2)
    return y - x


def write_own_flip(x):
    x.add_(x.flip(0))
    return x * 2


def copy_own_flip(x):
    x.copy_(x.flip(0))
    return x.sum()


def shift_sum(x):
    x[1:] += x[:-1].clone()  # without the clone eager refuses: the two overlap
    return x + 1


def shift_back(x):
    x[:-1] = x[1:] * 2
    return x.clone()


def write_own_transpose(x):
    x.add_(x.t() * 1)
    return x.t() - x


def copy_transpose(x):
    x.copy_(x.t() + 1)
    return x * x.t()


def roll_in_place(x):
    x.copy_(x.roll(1, 0))
    return x - x.roll(-1, 0)


def subtract_row_mean(x):
    x.sub_(x.mean(-1, keepdim=True))
    return x.amax(-1)


def softmax_in_place(x):
    x.copy_(x.softmax(-1))
    return x.sum(0)


def divide_by_own_sum(x):
    x.div_(x.exp().sum())
    return x + 1


def row_added_to_all(x):
    x.add_(x[0] * 1)
    return x[0] + x


def own_column_written(x):
    x[:, 0] = x.sum(1)
    return x.sum(1)


def swap_halves(x):
    n = x.shape[0] // 2
    top = x[:n].clone()
    x[:n] = x[n:]
    x[n:] = top
    return x * 1


def old_view_sees_new_value(x):
    view = x[1:3]
    x.mul_(3)
    return view + 1


def write_through_view(x):
    view = x.t()[0]
    view.add_(10)
    return x * 2


def write_through_reshape(x):
    x.view(-1)[::3].zero_()
    return x.cos()


def write_through_chain_of_views(x):
    x.permute(1, 0)[1:].unsqueeze(0).squeeze(0).mul_(-1)
    return x.sum(0)


def write_diagonal(x):
    x.diagonal().fill_(5)
    return x @ x


def reduce_before_and_after(x):
    a = x.sum()
    x.zero_()
    return a, x.sum()


def matmul_before_and_after(x):
    a = x @ x
    x.add_(a)
    return x @ a


def two_views_written(x):
    a, b = x[:2], x[1:]
    a.add_(1)
    b.mul_(2)
    return a + x[:2]


def intermediate_written(x):
    y = x * 2
    z = y[0]
    y.relu_()
    z.sub_(1)
    return y, z


SQUARE = [
    read_then_write,
    read_old_after_writing,
    write_twice,
    write_own_flip,
    copy_own_flip,
    shift_sum,
    shift_back,
    write_own_transpose,
    copy_transpose,
    roll_in_place,
    subtract_row_mean,
    softmax_in_place,
    divide_by_own_sum,
    row_added_to_all,
    own_column_written,
    swap_halves,
    old_view_sees_new_value,
    write_through_view,
    write_through_reshape,
    write_through_chain_of_views,
    write_diagonal,
    reduce_before_and_after,
    matmul_before_and_after,
    two_views_written,
    intermediate_written,
]


AOT_LOSES_THE_OLD_VALUE = {read_old_after_writing, divide_by_own_sum}
# eager's autograd raises for these; their inference form is compared
OVERWRITES_WHAT_BACKWARD_NEEDS = {
    matmul_before_and_after,
    intermediate_written,
}


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", SQUARE, ids=lambda fn: fn.__name__)
def test_order_of_reads_and_writes(fn, dynamic):
    check(fn, rand(6, 6), dynamic=dynamic)


@pytest.mark.parametrize("fn", SQUARE, ids=lambda fn: fn.__name__)
def test_order_of_reads_and_writes_with_history(fn):
    """The written tensor is no leaf: gradients pass through the writes."""
    if fn in AOT_LOSES_THE_OLD_VALUE:
        pytest.skip("AOTAutograd saves the input for backward, then overwrites it, and raises")
    if fn in OVERWRITES_WHAT_BACKWARD_NEEDS:
        x = rand(6, 6, grad=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sum(t.sum() for t in _tuple(fn(x * 1.5))).backward()
        return
    check(fn, rand(6, 6, grad=True), prepare=lambda x: (x * 1.5,), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("fn", [read_then_write, write_own_flip, shift_sum, write_own_transpose])
@pytest.mark.parametrize("layout", ["transposed", "strided", "view"])
def test_order_of_reads_and_writes_in_other_layouts(fn, layout):
    whole = rand(12, 12)
    x = {
        "transposed": whole[:6, :6].clone().t(),
        "strided": whole[::2, ::2],
        "view": whole[3:9, 2:8],
    }[layout]
    check(fn, x)


# --- each in-place op -----------------------------------------------------------------------------

IN_PLACE = {
    "add_": lambda x, y: x.add_(y, alpha=2),
    "add_scalar": lambda x, y: x.add_(1),
    "sub_": lambda x, y: x.sub_(y),
    "mul_": lambda x, y: x.mul_(y),
    "div_": lambda x, y: x.div_(y.abs() + 1),
    "relu_": lambda x, y: x.relu_(),
    "F.relu": lambda x, y: F.relu(x, inplace=True),
    "sigmoid_": lambda x, y: x.sigmoid_(),
    "exp_": lambda x, y: x.exp_(),
    "neg_": lambda x, y: x.neg_(),
    "clamp_": lambda x, y: x.clamp_(-0.5, 0.5),
    "copy_": lambda x, y: x.copy_(y),
    "copy_broadcast": lambda x, y: x.copy_(y[0]),
    "fill_": lambda x, y: x.fill_(3),
    "zero_": lambda x, y: x.zero_(),
    "masked_fill_": lambda x, y: x.masked_fill_(y > 0, -1.0),
    "index_put_": lambda x, y: x.index_put_((torch.tensor([0, 2], device=x.device),), y[:2]),
    "index_put_accumulate": lambda x, y: x.index_put_(
        (torch.tensor([1, 1, 0], device=x.device),), y[:3], accumulate=True
    ),
    "index_add_": lambda x, y: x.index_add_(0, torch.tensor([2, 0], device=x.device), y[:2]),
    "scatter_": lambda x, y: x.scatter_(1, (y[:, :1] > 0).long(), 9.0),
    "lerp_": lambda x, y: x.lerp_(y, 0.25),
    "addcmul_": lambda x, y: x.addcmul_(y, y, value=0.5),
    "addcdiv_": lambda x, y: x.addcdiv_(y, y.abs() + 1),
    "where": lambda x, y: x.copy_(torch.where(y > 0, x, y)),
    "cumsum_": lambda x, y: x.cumsum_(0),
    "tril_": lambda x, y: x.tril_(),
    "baddbmm_": lambda x, y: x.addmm_(y[:, :4], y[:4]),
    "slice": lambda x, y: x[1:3].copy_(y[:2]),
    "setitem_slice": lambda x, y: x.__setitem__((slice(None), slice(0, 4, 2)), 7),
    "setitem_int": lambda x, y: x.__setitem__(1, y[0] * 2),
    "setitem_mask": lambda x, y: x.__setitem__(y > 0.5, 0.0),
    "setitem_index": lambda x, y: x.__setitem__(torch.tensor([0, 3], device=x.device), y[:2]),
    "iadd_slice": lambda x, y: x[:, 1:].add_(y[:, :-1]),
    "detach_write": lambda x, y: x.detach().mul_(2),
    "swap_via_out": lambda x, y: torch.mul(x, y, out=x),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name):
    def fn(x, y):
        before = x * 2
        IN_PLACE[name](x, y)
        return before, x + 1

    check(fn, rand(4, 5), rand(4, 5))


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_on_an_intermediate_with_gradients(name):
    if name in ("detach_write", "swap_via_out"):
        pytest.skip("autograd forbids it in eager mode too, or does not see it")

    def fn(x, y):
        z = x + y
        IN_PLACE[name](z, y)
        return z * 3

    check(fn, rand(4, 5, grad=True), rand(4, 5, grad=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_in_place_keeps_the_dtype(dtype):
    """A float32 operand is computed in the promoted type and narrowed by the write."""

    def fn(x, y):
        x.add_(y)
        return x, x * 2

    y = ints(3, 5).to(dtype) if not dtype.is_floating_point else rand(3, 5)
    check(fn, ints(3, 5).to(dtype), y, exact=True)


def test_in_place_on_bool():
    check(lambda m, x: m.logical_and_(x > 0).logical_not(), bools(3, 5), rand(3, 5))


def test_out_argument():
    def fn(x, y, out):
        torch.add(x, y, out=out)
        return out * 2

    check(fn, rand(3, 5), rand(3, 5), rand(3, 5))


def test_out_argument_made_inside():
    def fn(x, y):
        out = torch.empty_like(x)
        torch.mul(x, y, out=out)
        return out

    check(fn, rand(3, 5), rand(3, 5))


def test_out_argument_with_another_layout():
    def fn(x, out):
        torch.exp(x, out=out)
        return x + out

    check(fn, rand(3, 5), rand(5, 3).t(), fullgraph=False)  # Dynamo breaks the graph here


def test_unwritten_memory_is_poisoned(device):
    assert torch.empty(16, device=device).isnan().all()
    assert torch.empty_strided((4, 4), (1, 4), device=device).isnan().all()
