"""Where tensors lie: results have the strides and the devices of eager's."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, Pair, check, compile_, gems_only, rand

from gems_compile.backend import Gems

# --- layout ---------------------------------------------------------------------------------------


def image(*shape, grad=False):
    return rand(*shape).to(memory_format=torch.channels_last).requires_grad_(grad)


LAYOUTS = {
    "contiguous": lambda: rand(2, 3, 4, 5),
    "channels_last": lambda: image(2, 3, 4, 5),
    "permuted": lambda: rand(4, 2, 5, 3).permute(1, 3, 0, 2),
    "sliced": lambda: rand(2, 3, 8, 10)[:, :, ::2, ::2],
    "offset": lambda: rand(3, 4, 5, 6)[1:, 1:, 1:, 1:],
    "expanded": lambda: rand(2, 1, 4, 1).expand(2, 3, 4, 5),
    "expanded_all": lambda: rand(1).expand(2, 3, 4, 5),
    "overlapping": lambda: rand(40).as_strided((2, 3, 4, 5), (12, 6, 3, 1)),
    "flipped": lambda: rand(2, 3, 4, 5).flip(0, 3),
    "one_channel": lambda: image(2, 1, 4, 5),
}

LAYOUT_OPS = {
    "pointwise": lambda x: x * 2 + 1,
    "pointwise_with_row": lambda x: x * x[0, 0, 0] - 1,
    "unary": lambda x: x.sigmoid(),
    "comparison": lambda x: (x > 0, x.abs()),
    "sum_channels": lambda x: x.sum(1),
    "sum_keepdim": lambda x: x - x.mean((2, 3), keepdim=True),
    "softmax_channels": lambda x: x.softmax(1),
    "softmax_last": lambda x: x.softmax(-1),
    "transposed_output": lambda x: (x * 2).transpose(1, 3),
    "permute_then_math": lambda x: x.permute(0, 2, 3, 1) + 1,
    "permute_back": lambda x: (x.permute(0, 2, 3, 1) * 2).permute(0, 3, 1, 2),
    "contiguous": lambda x: (x + 1).contiguous(),
    "to_channels_last": lambda x: (x * 2).contiguous(memory_format=torch.channels_last),
    "clone": lambda x: x.clone() + 0,
    "clone_contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "cast": lambda x: x.to(torch.float64),
    "empty_like": lambda x: torch.zeros_like(x) + 1,
    "flatten": lambda x: x.flatten(1) + 1,
    "reshape": lambda x: x.reshape(2, -1, 2) * 2,
    "flip": lambda x: x.flip(1, 2) + x,
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "stack": lambda x: torch.stack([x, x + 1], 2),
    "with_contiguous": lambda x: x + torch.ones(2, 3, 4, 5, device=x.device),
    "contiguous_with": lambda x: torch.ones(2, 3, 4, 5, device=x.device) + x,
    "as_strided": lambda x: (x + 1).contiguous().as_strided((3, 4), (2, 5), 1) * 2,
    "pad": lambda x: F.pad(x, (1, 1, 0, 2)) + 1,
    "where": lambda x: torch.where(x > 0, x, x * 0.5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYOUT_OPS)
def test_strides(name, layout):
    check(LAYOUT_OPS[name], LAYOUTS[layout]())


@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced", "expanded"])
@pytest.mark.parametrize("name", ["unary", "softmax_channels", "permute_then_math", "flatten"])
def test_strides_in_training(name, layout):
    check(LAYOUT_OPS[name], LAYOUTS[layout]().requires_grad_())


def test_operands_of_three_layouts():
    check(
        lambda a, b, c: (a + b) * c,
        rand(2, 3, 4, 5),
        image(2, 3, 4, 5),
        rand(5, 4, 3, 2).permute(3, 2, 1, 0),
    )


def test_layouts_change_between_calls():
    """A graph compiled for one layout is guarded against the next."""
    pair = Pair(lambda x: ((x * 2).softmax(1), x.sum((0, 2))))
    for make in list(LAYOUTS.values())[:7]:  # Dynamo recompiles a function eight times at most
        pair(make())


# --- devices --------------------------------------------------------------------------------------


def test_cpu_scalar_tensor():
    """A 0-d CPU tensor may meet tensors of any device."""

    def fn(x, s):
        return x * s + 1, (x + s).softmax(-1), torch.where(x > 0, x, s)

    check(fn, rand(3, 4, grad=True), torch.tensor(0.7))
    check(fn, rand(3, 4, dtype=torch.bfloat16), torch.tensor(0.7, dtype=torch.float64))


def test_cpu_scalar_tensor_that_needs_a_gradient():
    check(lambda x, s: (x * s).exp(), rand(3, 4), torch.tensor(0.7, requires_grad=True), rtol=1e-4)


def test_cpu_scalar_changes():
    pair = Pair(lambda x, s: x * s)
    for value in (0.5, -2.0, float("inf")):
        pair(rand(3, 4), torch.tensor(value))


@pytest.mark.gpu
def test_two_devices_in_one_graph():
    def fn(x, c):
        y = (c * 2).relu()
        return x * 2 + y.to(x.device), y + 1, x.sum().cpu() + c

    check(fn, rand(3, 4), torch.randn(3, 4))


def test_meta_device():
    out = compile_(lambda x: (x * 2).sum(-1))(torch.empty(3, 4, device="meta"))
    assert out.device.type == "meta" and out.shape == (3,)


def test_to_device_of_the_same_kind():
    check(lambda x: x.to(DEVICE) * 2 + x.cpu().to(x.device), rand(3, 4))


@gems_only
@pytest.mark.parametrize(
    ("cut", "dtype", "ours"),
    [
        (lambda x: x[..., :1000], torch.bfloat16, True),
        (lambda x: x[:, 1:], torch.float16, True),
        (lambda x: x[..., :1000], torch.float32, False),  # ATen moves as much at a time
        (lambda x: x[2:7], torch.bfloat16, False),  # in one piece
        (lambda x: x[:, :9, :1000], torch.bfloat16, False),  # small
    ],
    ids=["columns", "rows", "float32", "one piece", "small"],
)
def test_lone_copies_that_leave_gaps_out(cut, dtype, ours):
    x, backend = torch.randn(8, 64, 1008, device=DEVICE).to(dtype), Gems()
    got = torch.compile(lambda x: cut(x).neg(), backend=backend)(x)
    assert torch.equal(got, cut(x).neg()) and got.stride() == cut(x).neg().stride()
    (report,) = backend.reports
    assert (report.launches, report.aten_calls) == ((1, 0) if ours else (0, 1)), report.aten


@torch.library.custom_op("gems_tests::laid_out_otherwise", mutates_args=())
def laid_out_otherwise(x: torch.Tensor) -> torch.Tensor:
    """A complex tensor with x's elements, not in the layout that its FakeTensor has."""
    return torch.complex(x, x * 2).t().contiguous().t()


@laid_out_otherwise.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.complex64)


def test_a_view_of_what_aten_lays_out_otherwise() -> None:
    """As torch 2.11's transforms of real numbers do: the gradient of ``irfft`` was read as if it
    lay as promised."""
    x = rand(3, 5)
    real = lambda x: torch.view_as_real(laid_out_otherwise(x))[..., 0]  # noqa: E731
    assert torch.equal(compile_(real)(x), x)
    assert torch.equal(compile_(lambda x: real(x) * 2 + 1)(x), x * 2 + 1)


def test_unpooled_images_stay_channels_last() -> None:
    x = rand(2, 3, 6, 8).contiguous(memory_format=torch.channels_last)
    values, places = F.max_pool2d(x, 2, return_indices=True)
    check(lambda v, p: F.max_unpool2d(v, p, 2), values, places)
