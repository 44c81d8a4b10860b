"""In-place effects and aliasing: what compiled code does to its inputs is what eager does."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Pair, assert_same, bools, check, compile_, fresh, ints, rand
from torch import nn

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


# --- outputs that are inputs, views of inputs, or each other --------------------------------------

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


# --- buffers and caches ---------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_batch_norm_buffers(train, momentum):
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum), nn.ReLU()).to(rand(1).device)
    # a cumulative mean reads its step counter, where Dynamo breaks the graph
    pair = Pair(model.train(train), fullgraph=momentum is not None)
    for _ in range(3):
        pair(rand(2, 3, 4, 4, grad=True))


def test_batch_norm_switches_between_train_and_eval():
    pair = Pair(nn.BatchNorm1d(5).to(rand(1).device))
    for train in (True, False, True):
        pair.eager.train(train)
        pair.module.train(train)
        pair(rand(6, 5, grad=True))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("last", torch.zeros(2, 5))

    def forward(self, x):
        self.steps += 1
        old = self.mean.clone()
        self.mean.lerp_(x.mean(0), 0.1)
        self.last = x * 2
        return x - old + self.mean / self.steps


def test_module_buffers():
    pair = Pair(Counter().to(rand(1).device))
    for _ in range(3):
        pair(rand(2, 5))
        assert_same(pair.module.last, pair.eager.last)


class ScaleOnce(nn.Module):
    """Reads a buffer, writes it, and reads it again in one call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(5))

    def forward(self, x):
        before = x * self.scale
        self.scale.mul_(2)
        return before + x * self.scale


def test_buffer_read_before_and_after_the_write():
    pair = Pair(ScaleOnce().to(rand(1).device))
    for _ in range(2):
        pair(rand(3, 5))


def cache_index_copy(cache, new, position):
    cache.index_copy_(1, position, new)
    return cache


def cache_index_put(cache, new, position):
    cache[:, position] = new
    return cache


class Cache(nn.Module):
    """One attention head with a static key and value cache of 8 positions."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("k", torch.zeros(2, 8, 4))
        self.register_buffer("v", torch.zeros(2, 8, 4))

    def forward(self, q, k, v, position):
        k = self.write(self.k, k, position)
        v = self.write(self.v, v, position)
        mask = torch.arange(8, device=q.device) <= position[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])


@pytest.mark.parametrize("write", [cache_index_copy, cache_index_put], ids=lambda w: w.__name__)
def test_kv_cache(write, device):
    pair = Pair(Cache(write).to(device))
    pair(*[rand(2, 3, 4) for _ in "qkv"], torch.arange(3, device=device), context=torch.no_grad)
    for step in (3, 4, 5):
        position = torch.tensor([step], device=device)
        pair(*[rand(2, 1, 4) for _ in "qkv"], position, context=torch.no_grad)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_kv_cache_written_by_slice(dynamic):
    def fn(cache, new, start: int):
        cache[:, start : start + new.shape[1]] = new
        return cache[:, : start + new.shape[1]].sum(1), cache

    pair = Pair(fn, dynamic=dynamic)
    cache = torch.zeros_like(rand(2, 8, 4))
    for start in (0, 2, 4, 6):
        pair(cache, rand(2, 2, 4), start)


def test_kv_cache_that_grows():
    pair = Pair(lambda past, new: torch.cat([past, new], 1))
    past = rand(2, 3, 4)
    for _ in range(3):
        pair(past, rand(2, 1, 4))
        past = torch.cat([past, rand(2, 1, 4)], 1)


def test_cache_kept_in_half_precision():
    def fn(cache, new, position):
        cache.index_copy_(0, position, new.to(cache.dtype))
        return cache.float() * 2

    cache = rand(8, 4, dtype=torch.bfloat16)
    check(fn, cache, rand(2, 4), torch.tensor([5, 2], device=cache.device), exact=True)


def test_sgd_with_momentum_in_the_graph():
    def fn(w, m, g):
        with torch.no_grad():
            m.mul_(0.9).add_(g)
            w.sub_(m, alpha=0.1)

    check(fn, rand(4, 5), rand(4, 5), rand(4, 5))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimizer_step_compiled(name):
    runs = []
    w = rand(4, 5)
    for wrap in (lambda step: step, lambda step: compile_(step, fullgraph=False)):
        p = nn.Parameter(w.clone())
        optimizer = getattr(torch.optim, name)([p], lr=0.1)
        step = wrap(optimizer.step)
        torch.manual_seed(3)
        for _ in range(3):
            p.grad = rand(4, 5)
            step()
        runs.append(p)
    assert_same_leaf(*runs)


def assert_same_leaf(want, got):
    assert_same(got.detach(), want.detach(), rtol=1e-4, atol=1e-5)
