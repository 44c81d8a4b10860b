"""Sizes known only at run time: one compile serves all lengths; 0, 1 and 0-d are right."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, Pair, assert_same, check, compile_, graphs, ints, no_new_graph, rand
from torch import nn

LENGTHS = (5, 17, 900)

BY_LENGTH = {
    "pointwise": lambda x: (x * 2 + 1).relu().sigmoid(),
    "scalar_from_size": lambda x: x * x.shape[0] + x.shape[0] // 2,
    "row_sum": lambda x: (x * x).sum(-1),
    "column_sum": lambda x: (x * x).sum(0),
    "full_sum": lambda x: (x * x).sum(),
    "mean": lambda x: x - x.mean(0),
    "softmax_rows": lambda x: (x * 0.5).softmax(-1),
    "softmax_columns": lambda x: (x * 0.5).softmax(0),
    "layer_norm": lambda x: F.layer_norm(x, (4,)) * 2,
    "view": lambda x: x.view(-1) * 2,
    "reshape_pairs": lambda x: x.reshape(x.shape[0], 2, 2).transpose(0, 1).reshape(2, -1) + 1,
    "reshape_and_slice": lambda x: x.reshape(-1)[1:] * 2,
    "transpose": lambda x: x.t().contiguous() + 1,
    "flip": lambda x: x.flip(0) + x,
    "roll": lambda x: x.roll(1, 0) - x,
    "cat": lambda x: torch.cat([x, x * 2, x[:1]], 0) + 1,
    "cat_columns": lambda x: torch.cat([-x[:, 2:], x[:, :2]], 1),
    "stack": lambda x: torch.stack([x, x + 1], 1).sum(-1),
    "slices": lambda x: x[1:] - x[:-1],
    "slice_by_size": lambda x: x[: x.shape[0] // 2] * 2,
    "slice_step": lambda x: x[::2] * 2,
    "last_row": lambda x: x[-1] + x[0],
    "pad": lambda x: F.pad(x, (1, 0, 0, 2)) * 2,
    "expand": lambda x: x[:, None].expand(-1, 3, -1) + 1,
    "broadcast_outer": lambda x: (x[:, 0] * 2)[:, None] + x[0],
    "arange": lambda x: x + torch.arange(x.shape[0], device=x.device)[:, None],
    "ones": lambda x: torch.ones(x.shape[0], device=x.device) + x[:, 0],
    "full_of_size": lambda x: torch.full((x.shape[0],), x.shape[0], device=x.device) + x[:, 1],
    "matmul": lambda x: (x.t() @ x + 1).relu(),
    "cumsum": lambda x: x.cumsum(0) * 0.01,
    "argmax": lambda x: x.argmax(0) + 1,
    "amax": lambda x: x.amax(0) + x.amin(),
    "where": lambda x: torch.where(x > 0, x, x.new_zeros(())),
    "split": lambda x: torch.split(x, [1, x.shape[0] - 1]),
    "triu": lambda x: x.triu() + 1,
    "size_returned": lambda x: (x + 1, x.shape[0], x.numel()),
    "condition_on_size": lambda x: x + 1 if x.shape[0] > 3 else x - 1,
}


@pytest.mark.parametrize("name", BY_LENGTH)
def test_dynamic_lengths(name):
    pair = Pair(BY_LENGTH[name], dynamic=True)
    near = {"rtol": 1e-5, "atol": 1e-4} if "sum" in name or name == "matmul" else {}
    pair(rand(5, 4), **near)
    with no_new_graph():
        for n in (17, 900):
            pair(rand(n, 4), **near)


@pytest.mark.parametrize(
    "name",
    ["pointwise", "softmax_rows", "softmax_columns", "layer_norm", "cat", "slices", "column_sum"],
)
def test_dynamic_lengths_in_training(name):
    pair = Pair(BY_LENGTH[name], dynamic=True)
    pair(rand(5, 4, grad=True))
    with no_new_graph():
        for n in (17, 900):
            pair(rand(n, 4, grad=True), rtol=1e-5, atol=1e-4)


def test_automatic_dynamic():
    """The second length compiles the dynamic graph, every later one compiles nothing."""
    pair = Pair(lambda x: (x * 2).softmax(-1) + x.mean(0))
    pair(rand(5, 4))
    pair(rand(7, 4))
    with no_new_graph():
        for n in (17, 900, 64):
            pair(rand(n, 4))


def test_automatic_dynamic_in_training():
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 2))
    pair = Pair(model.to(rand(1).device))
    pair(rand(3, 5, 4, grad=True))
    pair(rand(3, 7, 4, grad=True), atol=1e-4)
    with no_new_graph():
        for n in (17, 300):
            pair(rand(3, n, 4, grad=True), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_running_statistics(norm):
    """Of batches of several sizes: the variance that is kept is the unbiased one."""
    pair = Pair(norm(6).to(DEVICE), dynamic=True)
    for length in LENGTHS[:2]:
        pair(rand(length, 6, *((5, 3) if norm is nn.BatchNorm2d else ())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "area"])
def test_sizes_times_a_float(mode):
    """Sizes of the result are products with a number that is none."""
    pair = Pair(lambda x: F.interpolate(x * 2, scale_factor=1.7, mode=mode) + 1, dynamic=True)
    pair(rand(2, 3, 5, 7, grad=True), rtol=1e-4, atol=1e-4)
    with no_new_graph():
        pair(rand(4, 3, 6, 11, grad=True), rtol=1e-4, atol=1e-4)


def test_two_dynamic_sizes():
    pair = Pair(lambda x, y: (x[:, None] * y[None]).sum(-1).softmax(-1), dynamic=True)
    pair(rand(5, 4), rand(3, 4))
    with no_new_graph():
        for m, n in ((7, 9), (2, 33), (33, 2)):
            pair(rand(m, 4), rand(n, 4))


def test_equal_sizes_do_not_become_one():
    """5 and 5 in the first call are two sizes in the second, unless an op needs them equal."""
    pair = Pair(lambda x, y: (x + 1, y * 2), dynamic=True)
    pair(rand(5, 4), rand(5, 4))
    pair(rand(6, 4), rand(9, 4))
    pair(rand(2, 4), rand(3, 4))


def test_every_dim_dynamic():
    pair = Pair(lambda x: (x.transpose(1, 2) * 2).sum(-1) + x.shape[1], dynamic=True)
    pair(rand(2, 3, 4))
    with no_new_graph():
        for shape in ((5, 6, 7), (3, 2, 9), (9, 8, 2)):
            pair(rand(*shape))


def test_mark_dynamic():
    pair = Pair(lambda x: (x * 2).sum(-1))
    before = graphs()
    for n in (5, 17):
        x = rand(n, 4)
        torch._dynamo.mark_dynamic(x, 0)
        assert_same(pair.compiled(x), (x * 2).sum(-1))
    assert graphs() == before + 1


def test_dynamic_strides():
    """The outer size is static and the row length moves: so does the stride of the rows."""
    pair = Pair(lambda x: x[:, 1:].t() * 2 + x.shape[1], dynamic=True)
    for n in (5, 17, 33):
        pair(rand(4, n))


def test_dynamic_non_contiguous():
    pair = Pair(lambda x: (x * 2).sum(0), dynamic=True)
    for n in (5, 17, 33):
        pair(rand(4, n).t())
        pair(rand(n, 8)[:, ::2])


def test_int_argument():
    """Python ints become symbols when they change; they reach kernels as scalars."""
    pair = Pair(lambda x, n: (x * n + n // 3)[: n % 5 + 1], dynamic=True)
    for n in (3, 7, 11, 2**33):
        pair(rand(6, 4), n)


def test_float_argument():
    pair = Pair(lambda x, scale: (x * scale + 1) / scale)
    for scale in (0.5, 1.25, 3.0, -2.5):
        pair(rand(6, 4), scale)


def test_negative_and_bool_arguments():
    pair = Pair(lambda x, n, flag: x + n if flag else x * n, dynamic=True)
    for n, flag in ((-3, True), (4, False), (-7, False)):
        pair(rand(6, 4), n, flag)


# --- the edges ------------------------------------------------------------------------------------

EDGES = {
    "pointwise": lambda x: x * 2 + 1,
    "sum": lambda x: x.sum(),
    "sum_last": lambda x: (x + 1).sum(-1),
    "sum_first": lambda x: (x + 1).sum(0, keepdim=True),
    "mean": lambda x: (x + 1).mean(-1),
    "prod": lambda x: x.prod(),
    "softmax": lambda x: x.softmax(-1) + 1,
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "any_all": lambda x: ((x > 0).any(), (x > 0).all(-1)),
    "cat": lambda x: torch.cat([x, x + 1], 0),
    "transposed": lambda x: x.transpose(0, -1) + 1,
    "view": lambda x: x.view(-1) + 1,
    "flip": lambda x: x.flip(0) + 1,
    "matmul": lambda x: x @ x.transpose(-1, -2) + 1,
    "expand": lambda x: x[None].expand(3, *x.shape) + 1,
    "in_place": lambda x: x.mul_(2) + 1,
    "cast": lambda x: (x + 1).to(torch.bfloat16).float(),
}
SHAPES = {"rows0": (0, 4), "columns0": (4, 0), "both0": (0, 0), "one": (1, 1), "row": (1, 4)}
SHAPES |= {"column": (4, 1), "empty3d": (2, 0, 3)}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_empty_and_size_one(name, shape):
    check(EDGES[name], rand(*SHAPES[shape]))


@pytest.mark.parametrize("name", ["pointwise", "sum", "sum_last", "softmax", "norm", "matmul"])
@pytest.mark.parametrize("shape", ["rows0", "columns0", "column"])
def test_empty_and_size_one_in_training(name, shape):
    check(EDGES[name], rand(*SHAPES[shape], grad=True))


def test_dynamic_graph_meets_empty_and_one():
    """0 and 1 are specialised by Dynamo: a graph of their own, but the same numbers."""
    pair = Pair(lambda x: ((x * 2).sum(0), x.softmax(-1), x.sum()), dynamic=True)
    for n in (5, 0, 1, 17, 0, 1):
        pair(rand(n, 4))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_zero_dim(grad):
    def fn(x, y):
        return x * 2 + y, x.sum(), (x * y).exp(), x[None] + 1

    check(fn, rand(grad=grad), rand(grad=grad))


def test_zero_dim_among_others():
    check(lambda x, s: (x * s + s).sum(-1) - s, rand(3, 5, grad=True), rand(grad=True))


def test_zero_dim_written():
    def fn(s, x):
        s.add_(x.sum())
        return x / s

    check(fn, rand(), rand(3, 5), rtol=1e-4)


def test_empty_list_of_work():
    check(lambda x: x, rand(3))
    check(lambda x: None, rand(3))
    check(lambda: torch.arange(4, device=rand(1).device) + 1)


def test_long_reduction_over_one_row():
    check(lambda x: (x * x).sum(-1), rand(1, 3000), rtol=1e-5, atol=1e-3)


def test_broadcast_of_a_slice_of_unknown_step():
    """One element is left of the slice: the graph is guarded to have one, and its size says not."""

    def fn(x, start, stop, step):
        return ((x[..., start:stop:step] + x) * 2).relu()

    x = rand(5, 33, 4)
    compiled = compile_(fn, dynamic=True)
    for place in ((2, 3, 3), (1, 2, 2), (0, 4, 4)):
        assert_same(compiled(x, *place), fn(x, *place))


def test_dynamic_with_broadcast_of_one():
    pair = Pair(lambda x, y: (x + y).relu(), dynamic=True)
    pair(rand(5, 4), rand(1, 4))
    with no_new_graph():
        pair(rand(17, 4), rand(1, 4))
    pair(rand(17, 4), rand(17, 4))


# --- sizes that only the data knows ---------------------------------------------------------------


@pytest.fixture
def data_sizes():
    with torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    ):
        yield


def item_as_scalar(x, n):
    return x * n[0].item() + 1


def item_as_size(x, n):
    size = n[0].item()
    torch._check(size >= 0)
    torch._check(size <= 8)
    return (x[:size] * 2).sum(0), size


def item_as_new_size(x, n):
    size = n[1].item()
    return torch.ones(size, 4, device=x.device) * 2 + x[0]


def nonzero(x, n):
    return (x > 0).nonzero() * 2 + 1


def mask_select(x, n):
    return x[x > 0].exp().sum()


def rows_by_mask(x, n):
    return (x[n > 4] * 2).sum(-1)


def unique(x, n):
    return torch.unique(n) + 1


def repeat(x, n):
    return x.repeat_interleave(n, 0, output_size=None) * 2


def tolist_split(x, n):
    a, b = (n[:2] * 0 + 4).tolist()
    torch._check(a + b == 8)
    return [part * 2 for part in torch.split(x, [a, b])]


@pytest.mark.parametrize(
    "fn",
    [
        item_as_scalar,
        item_as_size,
        item_as_new_size,
        nonzero,
        mask_select,
        rows_by_mask,
        unique,
        repeat,
        tolist_split,
    ],
    ids=lambda fn: fn.__name__,
)
def test_unbacked_sizes(fn, data_sizes):
    pair = Pair(fn)
    pair(rand(8, 4), ints(8, low=1, high=8))
    with no_new_graph():
        pair(rand(8, 4), ints(8, low=1, high=8))


def test_unbacked_size_of_zero(data_sizes):
    pair = Pair(mask_select)
    pair(rand(8, 4), ints(8))
    pair(-rand(8, 4).abs(), ints(8))
    check(nonzero, -rand(8, 4).abs(), ints(8))


def test_unbacked_in_training(data_sizes):
    check(lambda x, keep: (x[keep] * 2).softmax(-1), rand(8, 4, grad=True), ints(8, high=2).bool())


def test_float_item(data_sizes):
    pair = Pair(lambda x, s: x * s.item() + s.item())
    pair(rand(3, 4), rand())
    with no_new_graph():
        pair(rand(3, 4), rand())


def test_bool_item(data_sizes):
    check(lambda x: (x.sum() > 0).item(), rand(3, 4), fullgraph=False)


def test_item_breaks_the_graph_by_default():
    check(lambda x: x * 2 * int(x.sum().item()) + 1, rand(3, 4), fullgraph=False)


def test_graph_break_between_kernels():
    def fn(x):
        y = (x * 2).relu()
        torch._dynamo.graph_break()
        return (y + x).sum(-1)

    check(fn, rand(3, 4, grad=True), fullgraph=False)


def test_length_seen_in_many_ranks():
    """Rank and dtype are compiled anew, and each graph is right."""
    fn = compile_(lambda x: x * 2 + 1)
    for x in (rand(3), rand(3, 4), rand(2, 3, 4), rand(3, dtype=torch.bfloat16), ints(3)):
        torch.testing.assert_close(fn(x), x * 2 + 1)
