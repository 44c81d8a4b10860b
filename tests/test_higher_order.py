"""Nodes that are no plain ops: control flow, flex attention, custom ops, kernels, effects."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Pair, assert_same, check, compile_, no_new_graph, rand
from torch import Tensor, nn

# --- control flow ---------------------------------------------------------------------------------


def cond_on_value(x):
    return torch.cond(x.sum() > 0, lambda t: (t * 2).relu(), lambda t: t.sin() - 1, (x,))


def cond_inside_a_chain(x):
    y = (x * 2).softmax(-1)
    z = torch.cond(x[0, 0] > 0, lambda a, b: a + b, lambda a, b: a * b, (y, x))
    return (z + y).sum(0)


@pytest.mark.parametrize("fn", [cond_on_value, cond_inside_a_chain], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_cond(fn, grad):
    pair = Pair(fn)
    x = rand(3, 4).abs()
    for value in (x, -x):
        pair(value.clone().requires_grad_(grad))


def test_cond_with_dynamic_shapes():
    pair = Pair(cond_on_value, dynamic=True)
    pair(rand(5, 4))
    for x in (rand(17, 4).abs(), -rand(900, 4).abs()):
        want = (x * 2).relu() if x.sum() > 0 else x.sin() - 1
        with no_new_graph():  # eager's own torch.cond compiles, so it stays outside
            got = pair.compiled(x)
        assert_same(got, want)


def test_while_loop():
    from torch._higher_order_ops.while_loop import while_loop

    def fn(x, n):
        i = torch.zeros((), dtype=torch.int64, device=x.device)
        return while_loop(
            lambda i, a: i < n, lambda i, a: (i + 1, (a * 1.5).tanh() + i), (i, x * 2)
        )

    pair = Pair(fn)
    for n in (0, 1, 4):
        pair(rand(3, 4), torch.tensor(n, device=rand(1).device), grad=False)


def test_scan():
    from torch._higher_order_ops.scan import scan

    def fn(x):
        def step(carry, row):
            new = (carry * 0.5 + row).tanh()
            return new, new * 2

        return scan(step, torch.zeros_like(x[0]), x, dim=0)

    check(fn, rand(5, 4))


def test_scan_in_training():
    from torch._higher_order_ops.scan import scan

    def fn(x, init):
        def step(carry, row):
            new = (carry * 0.5 + row).tanh()
            return new, new * 2

        return scan(step, init, x, dim=0)

    check(fn, rand(5, 4, grad=True), rand(4, grad=True))


def test_associative_scan():
    from torch._higher_order_ops.associative_scan import associative_scan

    mode = "generic"  # the other mode, "pointwise", has no eager form to compare with
    check(lambda x: associative_scan(lambda a, b: a + b, x * 2, 0, combine_mode=mode), rand(5, 4))


def test_map():
    from torch._higher_order_ops.map import map as map_rows

    check(
        lambda x, y: map_rows(lambda row, other: (row * other).softmax(-1), x, y),
        rand(3, 4),
        rand(4),
    )


# --- repeated regions -----------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

    @torch.compiler.nested_compile_region
    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_nested_compile_region(grad):
    model = nn.Sequential(Layer(), Layer(), Layer()).to(rand(1).device)
    if not grad:
        model.requires_grad_(False)
    check(model, rand(5, 4, grad=grad), rtol=1e-4, atol=1e-5)


# --- flex attention -------------------------------------------------------------------------------


def causal(b, h, q, k):
    return q >= k


def distance(score, b, h, q, k):
    return score - 0.1 * (q - k).abs()


@pytest.mark.parametrize("kind", ["plain", "score_mod", "block_mask"])
def test_flex_attention(kind):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = 128 if kind == "block_mask" else 16
    device = rand(1).device
    mask = create_block_mask(causal, None, None, n, n, device=str(device))

    def fn(q, k, v):
        kwargs = {"score_mod": distance} if kind == "score_mod" else {}
        if kind == "block_mask":
            kwargs = {"block_mask": mask}
        return flex_attention(q * 2, k, v, **kwargs) + 1

    check(fn, *[rand(1, 2, n, 16) for _ in range(3)], rtol=1e-4, atol=1e-5)


# --- custom ops -----------------------------------------------------------------------------------


@torch.library.custom_op("gems_tests::scaled_sin", mutates_args=())
def scaled_sin(x: Tensor, scale: float) -> Tensor:
    return torch.sin(x) * scale


@scaled_sin.register_fake
def _(x, scale):
    return torch.empty_like(x)


scaled_sin.register_autograd(
    lambda ctx, g: (g * torch.cos(ctx.saved_tensors[0]) * ctx.scale, None),
    setup_context=lambda ctx, inputs, output: (
        ctx.save_for_backward(inputs[0]),
        setattr(ctx, "scale", inputs[1]),
    ),
)


@torch.library.custom_op("gems_tests::add_row_", mutates_args=("out",))
def add_row_(out: Tensor, row: Tensor) -> None:
    out.add_(row)


@torch.library.custom_op("gems_tests::split_sign", mutates_args=("count",))
def split_sign(x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    count.add_(1)
    return x.clamp(min=0), x.clamp(max=0)


@split_sign.register_fake
def _(x, count):
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("gems_tests::positive", mutates_args=())
def positive(x: Tensor) -> Tensor:
    return x[x > 0]


@positive.register_fake
def _(x):
    return x.new_empty(torch.library.get_ctx().new_dynamic_size())


@torch.library.custom_op("gems_tests::stride_of_rows", mutates_args=())
def stride_of_rows(x: Tensor) -> Tensor:
    """An op that sees the strides of its argument."""
    return torch.full((2,), x.stride(0), device=x.device, dtype=torch.float32)


@stride_of_rows.register_fake
def _(x):
    return x.new_empty(2, dtype=torch.float32)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_custom_op(grad, dynamic):
    def fn(x):
        return (scaled_sin(x * 2, 0.5) + x).softmax(-1)

    check(fn, rand(3, 4, grad=grad), dynamic=dynamic)


def test_custom_op_writes_an_input():
    def fn(x, row):
        before = x * 2
        add_row_(x, row)
        return before + x

    check(fn, rand(3, 4), rand(4))


def test_custom_op_writes_an_intermediate():
    def fn(x, row):
        y = x.exp()
        before = y.sum()
        add_row_(y, row + 1)
        return y * 2, before

    check(fn, rand(3, 4), rand(4))


def test_custom_op_writes_a_view():
    def fn(x, row):
        y = x * 2
        add_row_(y[1:], row)
        add_row_(x[:, ::2], row[::2])
        return y + x

    check(fn, rand(3, 4), rand(4))


def test_custom_op_writes_and_returns():
    def fn(x, count):
        a, b = split_sign(x * 2, count)
        c, d = split_sign(a + b, count)
        return a - b, c + d, count * 2

    check(fn, rand(3, 4), rand())


def test_custom_op_with_a_size_from_data():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check(lambda x: (positive(x * 2) + 1).sum(), rand(6, 4))


@pytest.mark.parametrize("view", ["contiguous", "transposed", "sliced"])
def test_custom_op_sees_the_strides_of_eager(view):
    def fn(x):
        y = x.exp()
        y = {"contiguous": y, "transposed": y.t(), "sliced": y[:, ::2]}[view]
        return stride_of_rows(y) + stride_of_rows(y + 1) * 100

    check(fn, rand(6, 4), exact=True)


# --- user Triton kernels --------------------------------------------------------------------------


@pytest.fixture
def double_plus():
    triton = pytest.importorskip("triton")
    import user_kernels

    def call(x, y):
        out = torch.empty_like(x)
        grid = (triton.cdiv(x.numel(), 64),)
        user_kernels.double_plus[grid](x, y, out, x.numel(), BLOCK=64)
        return out

    return call


@pytest.mark.gpu
def test_user_triton_kernel(double_plus):
    check(lambda x, y: (double_plus(x * 2, y) + x).softmax(-1), rand(5, 40), rand(5, 40))


@pytest.mark.gpu
def test_user_triton_kernel_with_dynamic_shapes(double_plus):
    pair = Pair(lambda x, y: double_plus(x, y) * 2, dynamic=True)
    pair(rand(5, 4), rand(5, 4))
    with no_new_graph():
        pair(rand(900, 4), rand(900, 4))


@pytest.mark.gpu
def test_user_triton_kernel_writes_its_input(double_plus):
    import user_kernels

    def fn(x, y):
        before = x + 1
        user_kernels.double_plus[(4,)](x, y, x, x.numel(), BLOCK=64)
        return before * x

    check(fn, rand(5, 40), rand(5, 40))


# --- effects --------------------------------------------------------------------------------------

HEARD: list[float] = []


@torch.library.custom_op("gems_tests::tell", mutates_args=())
def tell(x: Tensor) -> None:
    HEARD.append(float(x))


@tell.register_fake
def _(x):
    return None


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_effects_happen_once_and_in_order(grad):
    effects = pytest.importorskip("torch._higher_order_ops.effects")
    effects._register_effectful_op(tell._opoverload, effects._EffectType.ORDERED)

    def fn(x):
        y = x * 2
        tell(y.detach().sum())
        z = y.relu()
        tell(z.detach().sum())
        return z.softmax(-1)

    x = rand(3, 4, grad=grad)
    HEARD.clear()
    want = fn(x)
    told = list(HEARD)
    HEARD.clear()
    got = compile_(fn)(x)
    if grad:
        got.sum().backward()
    assert pytest.approx(told, rel=1e-5) == HEARD and len(HEARD) == 2
    assert_same(got.detach(), want.detach())


def test_print_of_a_tensor(capsys):
    x = rand(2)

    def fn(x):
        y = x * 2
        print("seen", y.shape)
        return y + 1

    assert_same(compile_(fn, fullgraph=False)(x), x * 2 + 1)
    assert "seen torch.Size([2])" in capsys.readouterr().out


def test_assertion_in_the_graph():
    def fn(x):
        torch._assert_async((x > 0).all())
        return x * 2

    check(fn, rand(3, 4).abs() + 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a failed device assert ends the process")
def test_assertion_in_the_graph_fails():
    def fn(x):
        torch._assert_async((x > 0).all(), "not positive")
        return x * 2

    with pytest.raises(RuntimeError, match="not positive"):
        compile_(fn)(-rand(3, 4).abs())
