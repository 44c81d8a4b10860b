"""What a user of `torch.compile(fn, backend="gems")` may rely on: modes, hooks, results, calls."""

import gc
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKEND,
    DEVICE,
    MLP_NEAR,
    Pair,
    assert_same,
    check,
    compile_,
    gems_only,
    ints,
    rand,
)
from torch import nn


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


def test_garbage_collection_is_as_it_was() -> None:
    """It pauses while a graph compiles, also when the compile fails."""
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            torch._dynamo.reset()
            compile_(lambda x: (x * 2).relu())(rand(8))
            assert gc.isenabled() is enabled
            with pytest.raises(Exception, match="numerics"):
                compile_(lambda x: (x * 3).relu(), options={"numerics": "wrong"})(rand(8))
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


@pytest.mark.parametrize("dynamic", [False, True])
def test_backward_twice(dynamic: bool) -> None:
    """With retain_graph, as in eager mode; what is saved is not written."""
    f = compile_(lambda x: (x * 2).softmax(-1).square() * x.exp(), dynamic=dynamic)
    x = rand(7, 33, grad=True)
    loss = f(x).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, first * 2)
