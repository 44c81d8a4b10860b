"""Eager mode gives eager's results from our kernels; autograd, autocast and torch.compile hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eagercheck import every_op, nothing_left, ours, same, whys  # noqa: F401
from helpers import DEVICE, assert_same, check, compile_, rand
from opcheck import FROM_FORWARD, RANDOM, calls, make, overload, tensors
from torch import Tensor, nn

import gems_compile
from gems_compile import eager
from gems_compile.calls import one_call
from gems_compile.kernels.op import OPS
from gems_compile.kernels.target import current_target

# results -----------------------------------------------------------------------------------------

x = lambda *shape, **kw: rand(*shape, grad=True, **kw)  # noqa: E731
PROGRAMS = {
    "gelu": (lambda a: F.gelu(a, approximate="tanh"), [(4, 33)], ("gelu", "gelu_backward")),
    "softmax": (lambda a: a.softmax(-1), [(4, 33)], ("_softmax", "_softmax_backward_data")),
    "log_softmax": (lambda a: a.log_softmax(1), [(4, 33)], ("_log_softmax",)),
    "layer_norm": (
        lambda a, w, b: F.layer_norm(a, (33,), w, b),
        [(2, 3, 33), (33,), (33,)],
        ("native_layer_norm", "native_layer_norm_backward"),
    ),
    "group_norm": (lambda a, w: F.group_norm(a, 2, w), [(2, 4, 6), (4,)], ("native_group_norm",)),
    "sum": (
        lambda a: (a.sum(), a.sum(0), a.sum(-1, keepdim=True)),
        [(4, 33)],
        ("sum", "sum.dim_IntList"),
    ),
    "mean and variance": (
        lambda a: (a.mean(-1), *torch.var_mean(a, 0)),
        [(4, 33)],
        ("mean.dim", "var_mean.correction"),
    ),
    "maximum": (lambda a: (a.amax(1), a.argmax(0)), [(4, 33)], ("amax", "argmax")),
    "broadcasting": (lambda a, b: a * b + b, [(4, 1, 5), (3, 1)], ("mul.Tensor", "add.Tensor")),
    "numbers": (lambda a: 2 - a * 0.1 / 3, [(4, 33)], ("mul.Tensor", "div.Tensor")),
    "transposed": (lambda a: a.t().exp().sin(), [(4, 33)], ("exp", "sin")),
    "strided": (lambda a: a[:, ::2].tanh(), [(4, 34)], ("tanh", "tanh_backward")),
    "expanded": (lambda a: a.expand(4, 5).sigmoid(), [(4, 1)], ("sigmoid",)),
    "where": (lambda a, b: torch.where(a > b, a, b.sin() * 0.5), [(4, 5), (4, 5)], ("where.self",)),
    "clamp": (lambda a: a.clamp(min=-0.5).relu(), [(7, 9)], ("clamp", "relu")),
    "scalar": (lambda a: a.sin() * 2, [()], ("sin",)),
    "misaligned": (lambda a: a[1:].exp(), [(9,)], ()),
    "empty": (lambda a: (a.exp(), a.sum()), [(0, 3)], ()),
    "cross entropy": (
        lambda a: F.cross_entropy(a, torch.arange(4, device=DEVICE)),
        [(4, 33)],
        ("nll_loss_forward", "nll_loss_backward"),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_results_and_gradients(name: str) -> None:
    program, shapes, served = PROGRAMS[name]
    same(program, *(x(*shape) for shape in shapes), served=served)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats(dtype: torch.dtype) -> None:
    same(lambda a: (F.gelu(a) + a * 0.1).softmax(-1), x(4, 33, dtype=dtype), served=("_softmax",))


def test_embedding_and_gather() -> None:
    index = torch.tensor([[1, 3], [0, 3]], device=DEVICE)
    same(lambda w: (F.embedding(index, w), w.gather(0, index)), x(5, 8), served=("embedding",))


def test_results_keep_eagers_layout() -> None:
    """Operands in every order of dims; a result whose strides differ from ATen's stays ATen's."""
    a = rand(2, 4, 3, 5)
    for view in (a.permute(0, 2, 3, 1), a.permute(3, 2, 1, 0), a.transpose(1, 2)[:, ::2]):
        same(lambda v: (v.exp(), v + 1, v.sum(1), v.softmax(1), F.group_norm(v, 1)), view)


def test_first_operand_decides_nothing_of_a_number() -> None:
    """``x + 2.5`` brings a number, not a 0-d tensor: dtypes promote as eager's, by us and ATen."""
    whole, flag, half = torch.arange(6, device=DEVICE), rand(6) > 0, rand(6, dtype=torch.float16)
    zero_d = torch.tensor(3, device=DEVICE)
    strange = torch.arange(7, device=DEVICE)[1:]  # not aligned: ATen's
    cpu = torch.tensor(2.5, dtype=torch.float64)
    for t in (whole, flag, half, zero_d, strange):
        same(lambda t=t: (t + 2.5, t * 2, 2.5 * t, t > 0.5, t / 2, t == 1, t * True, t + cpu))


@pytest.mark.parametrize("number", [0.0, -0.0, float("inf"), float("nan"), 1, True, 1.0])
def test_numbers_that_are_equal_but_not_the_same(number: float) -> None:
    a = rand(5)
    with gems_compile.use_gems(only=["mul", "add"]):
        for other in (0.0, -0.0, 1, True, 1.0, number):
            a * other
        got = (a * number, torch.ones(3, dtype=torch.int64, device=DEVICE) * number)
        a * number
    assert eager.stats()["mul.Tensor"]["compiled"] <= 8
    for t, want in zip(
        got, (a * number, torch.ones(3, dtype=torch.int64).to(DEVICE) * number), strict=True
    ):
        assert_same(t, want, exact=True)


def test_what_has_no_kernel_is_atens() -> None:
    z = rand(3, dtype=torch.complex64)
    overlapping = torch.arange(6.0, device=DEVICE).as_strided((4, 3), (1, 1))
    same(lambda: (z * z, z.exp(), (z.conj().imag + 1), overlapping.exp()))
    same(lambda: torch.sparse_coo_tensor([[0, 2]], [1.0, 2.0], (3,), device=DEVICE).to_dense() * 2)
    with gems_compile.use_gems(only=every_op()), pytest.raises(RuntimeError, match="must match"):
        rand(3) + rand(4)


def test_subclasses_of_tensor_are_atens() -> None:
    class Mine(Tensor):
        pass

    a = rand(4).as_subclass(Mine)
    with gems_compile.use_gems(only=["exp"]):
        assert type(a.exp()) is Mine
    assert not ours("exp")


def test_in_place_and_out_are_atens_and_right() -> None:
    def program(a: Tensor) -> Any:
        b = a.clone().mul_(2).add_(a)
        return b, torch.add(a, b, out=torch.empty(0, device=DEVICE)), b.relu_()

    same(program, rand(4, 5))


# autograd and other transforms -------------------------------------------------------------------


def _differentiable() -> list[str]:
    names = [n for n in OPS if n.startswith("aten.") and n not in RANDOM | FROM_FORWARD.keys()]
    return [n for n in names if "float32" in OPS[n].dtypes and calls(n)]


#: overloads whose declared samples gradcheck cannot judge, in plain eager mode either
NOT_DIFFERENTIABLE = {
    "aten.copy.default": "ATen has no derivative",
    "aten.floor_divide.Scalar": "ATen has no derivative",
    "aten.floor_divide.default": "ATen has no derivative",
    "aten.heaviside.default": "ATen has no derivative",
    "aten.remainder.Scalar_Tensor": "ATen has no derivative",
    "aten.hardsigmoid_backward.default": "ATen has no second derivative",
    "aten.logit_backward.default": "ATen has no second derivative",
    "aten.native_group_norm.default": "its mean and rstd count as constants; see the test of it",
}


#: overloads with a kernel that cannot serve a call in eager mode
ATENS = {
    "aten._native_batch_norm_legit_no_training.default": (
        "its saved statistics are results that the kernel does not give"
    ),
}


@pytest.mark.parametrize("name", _differentiable())
def test_gradcheck(name: str) -> None:
    """In float64, where our kernel serves the call (or ATen's, for the ops we have none for)."""
    if why := eager.why_not_replaced(name, current_target()):
        pytest.skip(why)
    fn = overload(name)
    args, kwargs, leaves = _smallest_sample(name)

    def function(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in tensors(fn(*args, **kwargs)) if t.requires_grad)

    if name in NOT_DIFFERENTIABLE:
        pytest.skip(NOT_DIFFERENTIABLE[name])
    if not leaves or not function():
        pytest.skip("no result depends on a real number")
    backward = [n for n in every_op() if "backward" in n]  # gradcheck itself uses the plain ones
    with gems_compile.use_gems(only=[name, *backward]):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    if name not in ATENS:
        assert ours(one_call.aten_name(fn)), whys(one_call.aten_name(fn))


def _smallest_sample(name: str) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """The declared sample with the fewest elements above one, and its real operands as leaves."""
    made = [make(call, "float64") for call in calls(name)]
    usable = [m for m in made if all(t.numel() > 1 for t in tensors(m)[:1])] or made
    args, kwargs = min(usable, key=lambda m: sum(t.numel() for t in tensors(m)))
    leaves = []
    for t in tensors((args, kwargs)):
        if t.dtype == torch.float64:
            try:  # some operands may not require a gradient: running_mean, noise
                t.requires_grad_()
                overload(name)(*args, **kwargs)
                leaves.append(t)
            except RuntimeError:
                t.requires_grad_(False)
    return args, kwargs, leaves


def test_gradcheck_of_group_norm() -> None:
    a, w = (rand(*s).double().requires_grad_() for s in ((2, 4, 3), (4,)))
    with gems_compile.use_gems(only=every_op()):
        assert torch.autograd.gradcheck(lambda a, w: F.group_norm(a, 2, w), (a, w), fast_mode=True)
    assert ours("native_group_norm"), whys("native_group_norm")


def test_second_derivative() -> None:
    a = rand(3, 4).double().requires_grad_()
    with gems_compile.use_gems(only=every_op()):
        assert torch.autograd.gradgradcheck(lambda a: F.gelu(a).tanh().sum(-1), a, fast_mode=True)


def test_autocast() -> None:
    def program(a: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            h = F.linear(a, w)
            return F.gelu(h).softmax(-1)

    same(program, x(4, 8), x(6, 8), served=("gelu", "_softmax"))


def test_func_transforms() -> None:
    f = lambda a: F.gelu(a).softmax(-1).sum()  # noqa: E731
    a = rand(4, 8)
    same(lambda: torch.func.vmap(torch.func.grad(f))(a), served=("gelu", "gelu_backward"))
    same(lambda: torch.func.jvp(f, (a,), (torch.ones_like(a),)), served=("gelu",))


def test_inference_mode_and_checkpointing() -> None:
    with torch.inference_mode():
        same(lambda: F.gelu(rand(4) * 0 + 1), served=("gelu",))
    again = torch.utils.checkpoint.checkpoint
    same(lambda a: again(lambda b: F.gelu(b), a, use_reentrant=False), x(4, 5), served=("gelu",))


def test_a_model_trains_alike() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4), nn.LogSoftmax(-1)
    ).to(DEVICE)
    a, target = rand(5, 8), torch.arange(5, device=DEVICE) % 4

    def train() -> list[Tensor]:
        copy = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.nll_loss(model(a), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        trained = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        torch.nn.utils.vector_to_parameters(copy, model.parameters())
        return [*losses, trained]

    want = train()
    with gems_compile.use_gems(only=every_op()):
        got = train()
    assert ours("native_layer_norm") == 3
    for a1, b1 in zip(got, want, strict=True):
        assert_same(a1, b1, rtol=1e-4, atol=1e-5)


# under the compiler ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["gems", "aot_eager"])
def test_compiled_code_in_an_enabled_process(backend: str) -> None:
    f = lambda a: F.gelu(a).softmax(-1) @ a.t()  # noqa: E731
    a = x(4, 33)
    want = f(a)
    gems_compile.enable(only=every_op())
    got = torch.compile(f, backend=backend, fullgraph=True)(a)
    assert_same(got.detach(), want.detach())
    for g, w in zip(
        torch.autograd.grad(got.sum(), a), torch.autograd.grad(want.sum(), a), strict=True
    ):
        assert_same(g, w, rtol=1e-4, atol=1e-5)


def test_the_compiler_is_checked_in_an_enabled_process() -> None:
    with gems_compile.use_gems(only=every_op()):
        check(
            lambda a, b: F.layer_norm(a + b, (33,)).gelu() if False else F.gelu(a + b),
            x(4, 33),
            x(33),
        )


def test_fake_tensors_do_not_meet_our_kernels(monkeypatch) -> None:
    from torch._subclasses import FakeTensorMode

    # or a real tensor is filled, which FakeTensorMode makes on a GPU to wake it
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with gems_compile.use_gems(only=every_op()), FakeTensorMode():
        F.gelu(torch.empty(4, device=DEVICE))
    torch.empty(4, device="meta").exp()
    assert eager.stats() == {}


def test_force_eager_still_runs_our_kernels() -> None:
    f = compile_(lambda a: F.gelu(a).softmax(-1))
    gems_compile.enable(only=["gelu", "softmax"])
    with torch.compiler.set_stance("force_eager"):
        f(rand(4, 33))
    assert (ours("gelu"), ours("_softmax")) == (1, 1)


def test_compile_disabled_by_the_environment(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import torch, gems_compile\n"
        "from gems_compile import eager\n"
        "gems_compile.enable(only=['gelu'])\n"
        "f = torch.compile(torch.nn.functional.gelu, backend='gems')\n"
        f"f(torch.ones(4, device={DEVICE!r}))\n"
        "print(eager.stats()['gelu']['ours'], len(gems_compile.reports()))\n"
    )
    env = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert run.stdout.split() == ["1", "0"], run.stderr


# on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_defaults_serve_a_model_on_a_gpu() -> None:
    """Large calls go to our kernels, small ones to ATen's, unless they are asked for."""
    model = nn.Sequential(nn.LayerNorm(4096), nn.Softmax(-1)).to(DEVICE, torch.bfloat16)
    a = rand(8192, 4096, dtype=torch.bfloat16)
    want = model(a)
    gems_compile.enable()
    with torch.compiler.set_stance("force_eager"):
        got = compile_(model)(a)
        assert ours("native_layer_norm") == ours("_softmax") == 1
        compile_(model)(a[:8])
        assert ours("native_layer_norm") == ours("_softmax") == 1
        gems_compile.ops.softmax(a[:8], -1, False)
        assert ours("_softmax") == 2
    assert_same(got.detach(), want.detach(), rtol=2**-7, atol=2**-7)


@pytest.mark.gpu
def test_cpu_scalars_and_cuda_graphs() -> None:
    a = rand(8)
    with gems_compile.use_gems(only=["mul", "exp"]):
        assert_same(a * torch.tensor(2.0), a * 2)
        a.exp()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = a.exp() * a  # one kernel known, one met while capturing
        graph.replay()
    assert_same(out, a.exp() * a)
