"""Dtypes outside the common ones, and how near to eager's numbers ours are."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, FLOATS, MLP_NEAR, bools, check, compile_, ints, rand

# --- dtypes outside the common ones ---------------------------------------------------------------


def test_complex():
    def fn(z, x):
        y = z * x + z.conj()
        return y, y.real * 2, y.imag.exp(), y.abs() + x, torch.view_as_real(y) + 1

    check(fn, rand(3, 4, dtype=torch.complex64), rand(3, 4))


def test_complex_training():
    check(lambda z: (z * z.conj()).real.sum(-1), rand(3, 4, dtype=torch.complex64, grad=True))


def test_fft_between_kernels():
    check(lambda x: torch.fft.irfft(torch.fft.rfft(x * 2) * 0.5, n=4).relu(), rand(3, 4), atol=1e-5)


def test_conjugate_and_negative_views():
    def fn(z):
        return z.conj() * 2, z.conj().imag + 1, (z * 2).mH, z.imag * z.conj().real

    check(fn, rand(3, 4, dtype=torch.complex64))


def test_sparse():
    dense = rand(4, 4) * bools(4, 4)

    def fn(s, x):
        return torch.sparse.mm(s, x * 2) + 1

    check(fn, dense.to_sparse(), rand(4, 3), fullgraph=False)
    check(lambda x: (x * 2).to_sparse(), dense, fullgraph=False)


def test_int8_weights():
    def fn(x, w, scale):
        return F.linear(x, w.to(x.dtype) * scale[:, None]).relu()

    w = ints(5, 8, low=-127, high=127, dtype=torch.int8)
    check(fn, rand(3, 8, grad=True), w, rand(5) / 127, **MLP_NEAR)


def test_quantise_and_back():
    def fn(x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        q = (x / scale).round().clamp(-128, 127).to(torch.int8)
        return q, scale, q.float() * scale

    check(fn, rand(4, 16), exact=True)


def test_fake_quantise():
    def fn(x):
        return torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -128, 127) * 2

    check(fn, rand(3, 4, grad=True))


def test_int8_arithmetic_wraps():
    def fn(a, b):
        return a + b, a * b, -a, a // 3, a >> 1, a & b, (a > b), a.sum()

    check(fn, *[ints(4, 9, low=-128, high=127, dtype=torch.int8) for _ in "ab"], exact=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integers(dtype):
    def fn(a, b):
        return a * 3 - b, a // (b + 1), a % (b + 1), a / (b + 1), a.float().mean(), a.amax(), a**2

    check(fn, ints(4, 9, high=100, dtype=dtype), ints(4, 9, high=100, dtype=dtype))


def test_large_int64():
    """Values beyond 2**53, which a detour through floating point would round."""
    x = ints(4, 5) + 2**60
    check(lambda x: (x + 1, x * 3, x // 7, x % 5, x - 2**59, x.amax(), x.sum()), x, exact=True)


def test_bool():
    def fn(a, b):
        return a & b, a ^ b, ~a, a | b, a.sum(), a.any(-1), a.all(0), a + b, a * 2, a.float() - 1

    check(fn, bools(4, 5), bools(4, 5), exact=True)


def test_float64():
    def fn(x, w):
        return (x @ w).tanh().softmax(-1), (x * 1e-300).exp(), x.sum(), x / 3

    inputs = rand(4, 5, dtype=torch.float64, grad=True), rand(5, 6, dtype=torch.float64, grad=True)
    check(fn, *inputs)


def test_float64_constants_in_float32_math():
    """A Python scalar takes part in the dtype of the tensor."""
    check(lambda x: (x * 0.1 + 1e-8) / 3.3333333333333333, rand(4, 5), exact=True)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -0.0, 1e-45, 3e38])
def test_special_scalars(value):
    def fn(x):
        return x * value, x + value, torch.where(x > 0, x, value), x.clamp(max=value), x == value

    check(fn, torch.cat([rand(3, 4), torch.zeros(1, 4, device=DEVICE)]), exact=True)


def test_special_values():
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e38, -1e-40])
    x, y = [t.contiguous().to(DEVICE) for t in torch.meshgrid(special, special, indexing="ij")]

    def fn(x, y):
        return x + y, x * y, x / y, x - y, x > y, x == y, -x, x.abs(), x.sign()

    def extremes(x, y):
        both = torch.maximum(x, y), torch.minimum(x, y), x.clamp(-1, 1), torch.fmax(x, y)
        return *both, x.relu(), x.isnan(), x.isfinite(), x.amax(-1), x.amin(0)

    check(fn, x, y, exact=True)
    # which zero maximum(0.0, -0.0) returns is open (relu's differs by device): values, not signs
    check(extremes, x, y, rtol=0, atol=0)


# --- numbers --------------------------------------------------------------------------------------


def rounded_chain(a, b):
    c = a + b
    d = c * a
    e = d - b
    f = e / (a.abs() + 1)
    # float32 sqrt on a CPU is not exactly rounded in torch itself
    g = f.abs().sqrt() if f.dtype != torch.float32 or f.is_cuda else f.abs()
    h = torch.where(g > c, g, e * 0.3)
    i = (h.float() * 1.7).to(a.dtype) + (a >= b)
    return i.relu() - g.neg() + torch.maximum(a, c), e, h


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exactly_rounded_chain_has_the_bits_of_eager(dtype):
    check(rounded_chain, rand(7, 33, dtype=dtype), rand(7, 33, dtype=dtype), exact=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exactly_rounded_chain_in_training(dtype):
    def fn(a, b):
        return ((a + b) * a - b) * 0.3 / (b * b + 1)

    check(fn, rand(7, 9, dtype=dtype, grad=True), rand(7, 9, dtype=dtype, grad=True), exact=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_chain_with_broadcasts_has_the_bits_of_eager(dtype):
    def fn(x, row, column):
        y = x * row + column
        return (y - row) * 0.1 + y, y.t() + 1, y.flip(0) * column

    inputs = rand(6, 9, dtype=dtype), rand(9, dtype=dtype), rand(6, 1, dtype=dtype)
    check(fn, *inputs, exact=True)


def test_no_fused_multiply_add_in_float32():
    """a * b + c rounds twice in eager; with equal magnitudes an FMA shows in most elements."""
    a, b = rand(16, 16), rand(16, 16)
    check(lambda a, b: (a * b - (a * b).round(decimals=0) * 1.0, a * b + a), a, b, exact=True)


def test_widening_and_narrowing():
    def fn(x):
        wide = x.float() * 1.001
        return wide, wide.to(x.dtype), wide.half(), wide.to(torch.int32), wide.double() * 3

    check(fn, rand(5, 7, dtype=torch.bfloat16), exact=True)


def test_overflow_of_an_intermediate_is_kept():
    """float16 overflows at the product, though the quotient would fit."""
    check(lambda x: x * 1000 / 1000, rand(5, 7, dtype=torch.float16) * 200, exact=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_no_less_accurate_than_eager(dtype):
    x = rand(3, 500, dtype=dtype)
    true = x.double().sum(-1)
    eager = (x.sum(-1).double() - true).abs().max()
    ours = (compile_(lambda x: x.sum(-1))(x).double() - true).abs().max()
    assert ours <= eager + torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize(
    "name", ["exp", "tanh", "sigmoid", "gelu", "silu", "log1p", "erf", "rsqrt"]
)
def test_transcendental_accuracy(name):
    """Against float64: no worse than eager's error, or within two units of the last place."""
    fn = getattr(F, name, None) or getattr(torch, name)
    x = rand(20, 20).abs() + 0.01
    true = fn(x.double())
    error = (compile_(fn)(x).double() - true).abs() / true.abs()
    eager = (fn(x).double() - true).abs() / true.abs()
    assert error.max() <= max(eager.max().item(), 2 * 2**-23)


def test_the_tail_of_a_soft_margin_is_no_less_accurate_than_eager():
    """Where target times input is large the gradient is small, and not the rest of a difference."""
    x, target = torch.linspace(5, 30, 26, device=DEVICE, requires_grad=True), 1.0 + rand(26).abs()
    compiled = compile_(lambda x: F.soft_margin_loss(x, target, reduction="sum"))
    (grad,) = torch.autograd.grad(compiled(x), x)
    exact = -target.double() * torch.sigmoid(-target.double() * x.detach().double())
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("name", ["max", "min"])
def test_the_best_of_bytes_of_a_row_that_fills_no_tile(name: str, dtype: torch.dtype) -> None:
    """Places outside the row lose against all bytes: -128 is none of uint8's, but 128."""
    for low in (0, 100, 200 if dtype == torch.uint8 else -128):
        x = ints(5, 13, low=low, high=low + 28, dtype=dtype)
        check(lambda x: getattr(torch, name)(x, 1), x)
