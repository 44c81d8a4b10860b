"""torch.func inside compiled code, checkpointing, custom autograd functions, double backward."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKEND, Pair, assert_same, assert_same_values, check, compile_, rand
from torch import nn
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)
from torch.utils.checkpoint import checkpoint


def loss(w, x):
    return ((x @ w).tanh() ** 2).sum()


def jvp_of_mlp(w, x):
    return jvp(lambda v: (x @ v).tanh(), (w,), (w * 0.5,))


def vjp_of_softmax(w, x):
    out, pull = vjp(lambda v: (x @ v).softmax(-1), w)
    return out, pull(out * 2)[0]


def per_sample_gradients(w, x):
    return vmap(grad(loss), in_dims=(None, 0))(w, x)


def vmap_of_norm(w, x):
    return vmap(lambda row: F.layer_norm(row, (4,)) * row.amax())(x)


def nested_vmap(w, x):
    return vmap(lambda a: vmap(lambda b: (a * b).sum())(x))(x)


def vmap_over_columns(w, x):
    return vmap(lambda c, s: c.softmax(0) * s, in_dims=(1, 0), out_dims=1)(x, w[:, 0])


TRANSFORMS = {
    "grad": lambda w, x: grad(loss)(w, x),
    "grad_and_value": lambda w, x: grad_and_value(loss)(w, x),
    "grad_of_grad": lambda w, x: grad(lambda v: grad(loss)(v, x).sin().sum())(w),
    "vmap": lambda w, x: vmap(lambda row: (row @ w).relu().sum())(x),
    "vmap_of_norm": vmap_of_norm,
    "nested_vmap": nested_vmap,
    "vmap_over_columns": vmap_over_columns,
    "jvp": jvp_of_mlp,
    "vjp": vjp_of_softmax,
    "jacrev": lambda w, x: jacrev(lambda v: (x @ v).sum(0))(w),
    "jacfwd": lambda w, x: jacfwd(lambda v: (v * v).sum(0))(w),
    "hessian": lambda w, x: hessian(lambda v: (v**3).sum())(w[0]),
    "per_sample_gradients": per_sample_gradients,
}


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name, dynamic):
    if dynamic and name in ("jacrev", "jacfwd", "hessian"):
        pytest.skip("Dynamo does not trace it with symbolic sizes")
    check(TRANSFORMS[name], rand(4, 3), rand(5, 4), dynamic=dynamic, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vmap", "vmap_of_norm", "nested_vmap", "vmap_over_columns"])
def test_backward_through_transform(name):
    check(TRANSFORMS[name], rand(4, 3, grad=True), rand(5, 4, grad=True), rtol=1e-4, atol=1e-5)


def test_functional_call():
    model = nn.Linear(4, 3).to(rand(1).device)
    names = [name for name, _ in model.named_parameters()]

    def fn(weight, bias, x):
        state = dict(zip(names, (weight, bias), strict=True))
        return grad(lambda p: functional_call(model, p, (x,)).square().mean())(state)

    check(fn, rand(3, 4), rand(3), rand(5, 4))


def test_transform_of_compiled_parts():
    """vmap around a compiled function: Dynamo runs it eagerly or raises, but never wrongly."""
    x = rand(5, 4)
    fn = compile_(lambda row: (row * 2).softmax(-1), fullgraph=False)
    assert_same(vmap(fn)(x), (x * 2).softmax(-1))


# --- activation checkpointing ---------------------------------------------------------------------


def block(x, w):
    return F.gelu(x @ w).softmax(-1) @ w.t()


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_checkpoint(dynamic):
    def fn(x, w):
        for _ in range(2):
            x = x + checkpoint(block, x, w, use_reentrant=False)
        return x.sum(-1)

    check(fn, rand(5, 4, grad=True), rand(4, 6, grad=True), dynamic=dynamic, rtol=1e-4, atol=1e-5)


def test_checkpoint_of_a_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 4))

        def forward(self, x):
            return x + checkpoint(self.inner, x, use_reentrant=False)

    check(Model().to(rand(1).device), rand(5, 4, grad=True), rtol=1e-4, atol=1e-5)


def test_checkpoint_recomputes_the_same_dropout():
    """With p = 0.5 the gradient of the sum is 2 where the output survived and 0 elsewhere."""
    x = (rand(16, 16).abs() + 1).requires_grad_()
    fn = compile_(lambda x: checkpoint(lambda t: F.dropout(t * 1.0, 0.5), x, use_reentrant=False))
    out = fn(x)
    out.sum().backward()
    assert 0 < (out == 0).sum() < out.numel()
    assert torch.equal(x.grad, (out != 0) * 2.0)


def test_selective_checkpoint():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx, op, *args, **kwargs):
        saved = op is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    def fn(x, w):
        return checkpoint(block, x, w, use_reentrant=False, context_fn=contexts)

    check(fn, rand(5, 4, grad=True), rand(4, 6, grad=True), rtol=1e-4, atol=1e-5)


# --- autograd -------------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * x * x + 1  # not the true gradient: it shows whose backward ran


def test_custom_autograd_function():
    check(lambda x: Cube.apply(x * 2).sum(-1), rand(3, 4, grad=True))


def test_double_backward_by_eager_part():
    """The gradient of a gradient where only a linear part is compiled beside an eager cube."""

    def fn(x):
        return torch.func.grad(lambda t: (t**3).sum())(x)

    check(fn, rand(3, 4, grad=True))


def test_gradient_inside_the_graph():
    """torch.func.grad, and backward of its result outside the graph."""
    x = rand(3, 4, grad=True)
    second = torch.autograd.grad(compile_(lambda t: grad(lambda v: (v**3).sum())(t))(x).sum(), x)
    assert_same(second[0], 6 * x.detach())


def test_retain_graph():
    x = rand(3, 4, grad=True)
    out = compile_(lambda x: (x.exp() * x).softmax(-1))(x)
    first = torch.autograd.grad(out[0].sum() + out[1, 2], x, retain_graph=True)[0]
    second = torch.autograd.grad(out[0].sum() + out[1, 2], x)[0]
    assert torch.equal(first, second)


def test_backward_twice_raises():
    x = rand(3, 4, grad=True)
    out = compile_(lambda x: x.exp().tanh().sum())(x)
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_of_one_output_only(which):
    def fn(x, w):
        return (x * w).relu(), (x @ w.t()).exp(), w.sum(0)

    grads = []
    x, w = rand(3, 4, grad=True), rand(3, 4, grad=True)
    for run in (fn, compile_(fn)):
        out = run(x, w)[which]
        grads.append(torch.autograd.grad(out.sum(), (x, w), allow_unused=True))
    for want, got in zip(*grads, strict=True):
        if want is None:  # AOTAutograd gives zeros for an output nobody asked about
            assert got is None or not got.any()
        else:
            assert_same_values(got, want)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "zeros", "strided"])
def test_layout_of_the_cotangent(kind):
    make = {
        "expanded": lambda t: torch.ones((), device=t.device).expand(t.shape),
        "transposed": lambda t: (
            torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape[::-1]).t()
        ),
        "zeros": torch.zeros_like,
        "strided": lambda t: torch.linspace(-1, 1, 2 * t.numel(), device=t.device).view(
            t.shape[0], -1
        )[:, ::2],
    }[kind]
    check(
        lambda x, w: (x @ w).tanh().softmax(-1),
        rand(3, 4, grad=True),
        rand(4, 5, grad=True),
        cotangent=make,
    )


def test_cotangent_layouts_change_between_calls():
    x = rand(4, 6, grad=True)
    fn = compile_(lambda x: x.tanh().softmax(-1))
    for g in (rand(4, 6), rand(6, 4).t(), rand(4, 12)[:, ::2], rand(1).expand(4, 6)):
        want = torch.autograd.grad(x.tanh().softmax(-1), x, g)[0]
        assert_same(torch.autograd.grad(fn(x), x, g)[0], want)


def test_backend_has_the_name_it_was_asked_for():
    from torch._dynamo.backends.registry import lookup_backend

    assert callable(lookup_backend(BACKEND))


def test_gradients_accumulate():
    pair = Pair(nn.Linear(4, 3).to(rand(1).device))
    for _ in range(3):
        pair(rand(5, 4))


def test_training_loop():
    """Three steps of SGD around a compiled forward and backward."""
    runs = []
    data = [(rand(6, 4), rand(6, 3)) for _ in range(3)]
    first = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 3))
    state = {name: t.clone() for name, t in first.state_dict().items()}
    for wrap in (lambda m: m, compile_):
        first.load_state_dict(state)
        model = first.to(data[0][0].device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step = wrap(model)
        losses = []
        for x, y in data:
            optimizer.zero_grad()
            value = F.mse_loss(step(x), y)
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        runs.append(torch.stack(losses))
    assert_same(runs[1], runs[0])
