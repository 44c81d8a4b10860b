"""What a user of `torch.compile(fn, backend="gems")` may rely on beside shapes and mutation."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKEND,
    DEVICE,
    FLOATS,
    Pair,
    assert_same,
    assert_same_bits,
    bools,
    check,
    compile_,
    gems_only,
    ints,
    rand,
)
from torch import nn

MLP_NEAR = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums of eight products, twice, in another order


def mlp():
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 4)).to(DEVICE)


# --- training, inference and the modes around them ------------------------------------------------


def test_training():
    check(mlp(), rand(5, 8, grad=True), **MLP_NEAR)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_contexts(context):
    grad = context is torch.enable_grad
    check(mlp(), rand(5, 8, grad=grad), context=context, grad=grad, **MLP_NEAR)


def test_one_function_in_all_contexts():
    """The graph for one context is not reused in another, and each gives its own autograd flags."""
    pair = Pair(mlp())
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad):
        grad = context is torch.enable_grad
        pair(rand(5, 8), context=context, grad=grad, **MLP_NEAR)


def test_no_grad_inside():
    def fn(x, w):
        with torch.no_grad():
            scale = (x * w).softmax(-1)
        return x * scale + w.exp()

    check(fn, rand(3, 4, grad=True), rand(3, 4, grad=True))


def test_detach_inside():
    check(lambda x: (x * 2).detach() * x + x.detach().exp(), rand(3, 4, grad=True))


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_autocast(where, grad):
    model = mlp()

    def inside(x, w):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return (F.linear(x, w).relu() + 1).softmax(-1) @ w

    def outside(x, w):
        return F.layer_norm(F.linear(x, w), (6,)) * 2, (F.linear(x, w) + 1).float()

    inputs = rand(5, 8, grad=grad), rand(6, 8, grad=grad)
    near = {"rtol": 2**-6, "atol": 2**-6}  # bfloat16 products feed a sum

    def context():
        return torch.autocast(DEVICE, dtype=torch.bfloat16)

    if where == "inside":
        check(inside, *inputs, **near)
    else:
        check(outside, *inputs, context=context, **near)
    check(model, rand(5, 8), context=context, **near)


def test_frozen_parameters():
    model = mlp()
    model[0].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    check(model, rand(5, 8), **MLP_NEAR)
    check(model, rand(5, 8, grad=True), **MLP_NEAR)


def test_everything_frozen_but_the_input():
    check(mlp().requires_grad_(False), rand(5, 8, grad=True), **MLP_NEAR)


@pytest.mark.parametrize("which", range(4))
def test_some_inputs_need_gradients(which):
    x, w, b = rand(3, 4), rand(4, 5), rand(5)
    for i, t in enumerate((x, w, b)):
        t.requires_grad_(which in (i, 3))
    check(lambda x, w, b: F.gelu(x @ w + b).softmax(-1), x, w, b)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.mid = nn.Linear(6, 6)

    def forward(self, tokens):
        logits = self.head(torch.tanh(self.mid(self.embed(tokens))))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def test_tied_weights():
    pair = Pair(Tied().to(DEVICE))
    assert pair.module.head.weight is pair.module.embed.weight
    for _ in range(2):
        pair(ints(2, 5, high=11), **MLP_NEAR)


def test_unused_input_and_parameter():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).to(DEVICE)

        def forward(self, x, unused):
            return self.parts[0](x).relu()

    check(Half(), rand(3, 4, grad=True), rand(3, 4, grad=True), **MLP_NEAR)


# --- hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
def test_module_hooks(kind):
    hooks = {
        "forward_pre": lambda module, args: (args[0] * 2,),
        "forward": lambda module, args, out: out.relu() + 1,
        "full_backward": lambda module, grads_in, grads_out: (grads_in[0] * 3,),
        "full_backward_pre": lambda module, grads_out: (grads_out[0] * 3,),
    }
    model = mlp()
    getattr(model[1], f"register_{kind}_hook")(hooks[kind])
    check(model, rand(5, 8, grad=True), fullgraph=False, **MLP_NEAR)


def test_hooks_on_inputs_and_outputs():
    """A hook on a leaf and one on a result outside the graph see eager's gradients."""
    seen = []
    x = rand(3, 4)
    for run in (lambda t: (t * 2).softmax(-1), compile_(lambda t: (t * 2).softmax(-1))):
        grads = []
        leaf = x.clone().requires_grad_()
        leaf.register_hook(lambda g, grads=grads: grads.append(g) or g * 2)
        out = run(leaf)
        out.register_hook(lambda g, grads=grads: grads.append(g) or g + 1)
        (out**2).sum().backward()
        seen.append([*grads, leaf.grad])
    for want, got in zip(*seen, strict=True):
        assert_same(got, want)


def test_hook_inside_the_graph():
    def fn(x):
        x.register_hook(lambda g: g * 2)
        return (x * 3).exp()

    check(fn, rand(3, 4, grad=True), fullgraph=False, **MLP_NEAR)


def test_post_accumulate_hook():
    model = mlp()
    sizes = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: sizes.append(p.grad.numel()))
    compile_(model)(rand(5, 8)).sum().backward()
    assert sorted(sizes) == sorted(p.numel() for p in model.parameters())


# --- the shape of results -------------------------------------------------------------------------

Two = namedtuple("Two", "left right")


@dataclass
class Record:
    value: torch.Tensor
    size: int


OUTPUTS = {
    "none": lambda x: (x + 1, None),
    "ints": lambda x: (x + 1, 3, x.shape[0], x.dim()),
    "float_and_str": lambda x: (x + 1, 0.5, "name", True),
    "dict": lambda x: {"a": x + 1, "b": {"c": x * 2, "d": None}},
    "list": lambda x: [x + 1, [x * 2, (x,)]],
    "namedtuple": lambda x: Two(x + 1, x * 2),
    "empty": lambda x: (),
    "only_none": lambda x: None,
    "size": lambda x: (x.shape, x + 1),
    "dtype_and_device": lambda x: (x.dtype, x.device, x + 1),
    "constant": lambda x: (torch.ones(3, device=x.device), torch.arange(4, device=x.device)),
    "independent_of_inputs": lambda x: torch.full((2, 3), 1.5, device=x.device) * 2,
    "same_twice": lambda x: (lambda y: (y, y, y + 1))(x * 2),
    "input_and_output": lambda x: (x, x * 2, x),
    "many": lambda x: tuple(x * i for i in range(12)),
    "mixed_dtypes": lambda x: (x > 0, x.long(), x.bfloat16(), x.double(), x.argmax()),
    "not_differentiable": lambda x: (x * 2, (x * 2).detach(), x.argmax(-1), x.sign() > 0),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_structure_of_outputs(name, grad):
    check(OUTPUTS[name], rand(3, 4, grad=grad))


def test_dataclass_output():
    run = compile_(lambda x: Record(x * 2, x.shape[0]), fullgraph=False)
    x = rand(3, 4)
    got = run(x)
    assert got.size == 3
    assert_same(got.value, x * 2)


def test_structure_of_inputs():
    def fn(batch, *rest, scale=2.0, flags=()):
        return batch["a"] * scale + batch["b"][0] + rest[0].sum() * len(flags)

    batch = {"a": rand(3, 4, grad=True), "b": [rand(4)]}
    check(fn, batch, rand(2, grad=True))


def test_generator_of_tensors():
    def fn(*xs):
        return sum(x.relu() for x in xs) / len(xs)

    check(fn, *[rand(3, 4, grad=i % 2 == 0) for i in range(5)])


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


# --- dropout: our own random numbers --------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_statistics(p):
    x = rand(64, 64).abs() + 1
    out = compile_(lambda x: F.dropout(x * 1.0, p))(x)
    kept = out != 0
    share = kept.float().mean().item()
    sigma = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(share + p - 1) < 5 * sigma
    torch.testing.assert_close(out[kept], x[kept] / (1 - p), rtol=1e-6, atol=0)
    for dim in (0, 1):  # no row and no column is treated alike
        shares = kept.float().mean(dim)
        assert (shares - (1 - p)).abs().max() < 6 * (p * (1 - p) / 64) ** 0.5
        assert shares.unique().numel() > 3
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[:, 0], kept[:, 1])


def test_dropout_is_reproducible():
    x = rand(16, 16)
    fn = compile_(lambda x: F.dropout(x, 0.5))
    torch.manual_seed(5)
    first, second = fn(x), fn(x)
    torch.manual_seed(5)
    again = fn(x), fn(x)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(fn(x), first)


def test_dropout_draws_afresh_at_each_place():
    x = rand(16, 16).abs() + 1
    a, b = compile_(lambda x: (F.dropout(x * 1.0, 0.5), F.dropout(x * 1.0, 0.5)))(x)
    assert not torch.equal(a == 0, b == 0)


def test_dropout_backward_uses_the_forward_mask():
    x = (rand(16, 16).abs() + 1).requires_grad_()
    fn = compile_(lambda x: F.dropout(x * 1.0, 0.25))
    for _ in range(2):
        x.grad = None
        out = fn(x)
        torch.rand(3)  # moves the generator between forward and backward
        out.sum().backward()
        torch.testing.assert_close(x.grad, (out != 0) / 0.75)
        assert 0 < (x.grad == 0).sum() < x.numel()


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(p):
    check(lambda x: F.dropout(x * 2, p) + 1, rand(3, 4, grad=True))


def test_dropout_in_eval():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(DEVICE).eval()
    check(model, rand(3, 4, grad=True), **MLP_NEAR)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dropout_in_half_precision(dtype):
    x = (rand(16, 16).abs() + 1).to(dtype)
    out = compile_(lambda x: F.dropout(x, 0.5))(x)
    assert out.dtype == dtype
    assert_same_bits(out[out != 0], (x * 2)[out != 0])


def test_dropout_dynamic():
    fn = compile_(lambda x: F.dropout(x, 0.5).sum(-1), dynamic=True)
    for n in (5, 17):
        out = fn(torch.ones(n, 64, device=DEVICE))
        assert 0.3 < out.mean().item() / 64 < 1.7


def test_random_ops_are_reproducible():
    def fn(x):
        return torch.rand_like(x) + x, torch.randn(4, device=x.device), torch.bernoulli(x.sigmoid())

    run = compile_(fn)
    x = rand(8, 8)
    torch.manual_seed(3)
    first = run(x)
    torch.manual_seed(3)
    for a, b in zip(run(x), first, strict=True):
        assert torch.equal(a, b)
    uniform = first[0] - x
    assert uniform.min() >= -1e-6 and uniform.max() <= 1 + 1e-6


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


# --- calls ----------------------------------------------------------------------------------------


def test_one_graph_for_many_calls():
    calls = compile_(lambda x: (x * 2).softmax(-1))
    for _ in range(5):
        x = rand(3, 4)
        assert_same(calls(x), (x * 2).softmax(-1))


def test_two_functions_side_by_side():
    a, b = compile_(lambda x: x * 2 + 1), compile_(lambda x: x * 3 + 1)
    x = rand(3, 4)
    assert_same(a(x), x * 2 + 1)
    assert_same(b(x), x * 3 + 1)
    assert_same(a(b(x)), (x * 3 + 1) * 2 + 1)


def test_decorator_and_method():
    class Scaler:
        factor = 3.0

        @torch.compile(backend=BACKEND)
        def apply(self, x):
            return (x * self.factor).relu()

    x = rand(3, 4)
    scaler = Scaler()
    assert_same(scaler.apply(x), (x * 3).relu())
    scaler.factor = 2.0
    assert_same(scaler.apply(x), (x * 2).relu())


def test_module_compile_method():
    model = mlp()
    x = rand(5, 8)
    want = model(x).detach()
    model.compile(backend=BACKEND)
    assert_same(model(x).detach(), want, **MLP_NEAR)


def test_calls_from_threads():
    from concurrent.futures import ThreadPoolExecutor

    fn = compile_(lambda x: (x * 2).softmax(-1))
    xs = [rand(3, 4) for _ in range(8)]
    fn(xs[0])
    with ThreadPoolExecutor(4) as pool:
        for x, got in zip(xs, pool.map(fn, xs), strict=True):
            assert_same(got, (x * 2).softmax(-1))


def test_an_exception_in_user_code_passes():
    def fn(x):
        if x.shape[0] == 3:
            raise ValueError("three rows")
        return x * 2

    with pytest.raises(ValueError, match="three rows"):
        compile_(fn, fullgraph=False)(rand(3, 4))


def test_shape_error_is_still_an_error():
    with pytest.raises((RuntimeError, torch._dynamo.exc.TorchRuntimeError), match=r"size|shape"):
        compile_(lambda a, b: a @ b)(rand(3, 4), rand(3, 4))


# --- what gems alone does -------------------------------------------------------------------------


@gems_only
def test_fast_numerics_are_close():
    near = {"rtol": 2**-6, "atol": 2**-6}
    inputs = rand(7, 33, dtype=torch.bfloat16), rand(7, 33, dtype=torch.bfloat16)

    def fn(a, b):
        return ((a + b) * a - b) * 0.3 / (b * b + 1)

    check(fn, *inputs, options={"numerics": "fast"}, **near)
    check(fn, *inputs, options={"numerics": "eager"}, exact=True)


@gems_only
@pytest.mark.parametrize("options", [{"numerix": "fast"}, {"numerics": "quick"}], ids=str)
def test_unknown_option_is_one_sentence(options):
    with pytest.raises(Exception, match="numerics") as caught:
        torch.compile(lambda x: x * 2, backend="gems", options=options)(rand(3))
    text = str(caught.value)
    assert str(*options) in text
    for valid in ("numerics",) if "numerix" in options else ("eager", "fast"):
        assert valid in text


@gems_only
def test_unknown_mode_is_one_sentence():
    with pytest.raises(Exception, match="max-autotune"):
        torch.compile(lambda x: x * 2, backend="gems", mode="fastest")(rand(3))


@gems_only
def test_options_separate_their_graphs():
    def fn(x):
        return x * 1000 / 1000

    x = torch.full((4,), 200.0, dtype=torch.float16, device=DEVICE)
    eager = torch.compile(fn, backend="gems", options={"numerics": "eager"})
    fast = torch.compile(fn, backend="gems", options={"numerics": "fast"})
    fast(x)
    assert eager(x).isinf().all()


@gems_only
def test_bad_variable_warns_once(monkeypatch, caplog):
    monkeypatch.setenv("GEMS_NUMERICS", "sloppy")
    x = rand(3)
    with caplog.at_level("WARNING", logger="gems_compile"):
        for scale in (2, 3):
            assert_same(torch.compile(lambda x, s=scale: x * s, backend="gems")(x), x * scale)
    heard = [r.getMessage() for r in caplog.records if "GEMS_NUMERICS" in r.getMessage()]
    assert len(heard) == 1
    assert "eager" in heard[0] and "fast" in heard[0]
