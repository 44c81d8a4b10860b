"""enable(), use_gems() and ops: eager's results from our kernels, and ATen's kernels afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gems_compile
from gems_compile import eager, one_op
from gems_compile.errors import UnknownOp
from gems_compile.kernels.op import OPS
from gems_compile.kernels.target import current_target

from helpers import DEVICE, assert_same, check, compile_, rand
from opcheck import FROM_FORWARD, RANDOM, calls, make, overload, tensors

KEY = "CUDA" if DEVICE == "cuda" else "CPU"


@pytest.fixture(autouse=True)
def _nothing_left():
    """Each test starts with no handler and ends with none registered."""
    gems_compile.disable()
    eager._state.handlers.clear()
    yield
    gems_compile.disable()
    assert not eager._state.blocks and not eager._state.single
    assert gems_compile.enabled_ops() == ()


def ours(name: str) -> int:
    """How many calls of an overload our kernels have served."""
    return eager.stats().get(name, {}).get("ours", 0)


def every_op() -> list[str]:
    """Everything that can be replaced here, whatever is on by default."""
    target = current_target()
    return [n for n in eager._overloads() if eager.why_not_replaced(n, target) is None]


def same(fn: Callable[..., Any], *args: Any, served: tuple[str, ...] = (), **tolerance: Any) -> Any:
    """fn gives eager's results, layouts and gradients with every op replaced."""
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

    def run() -> list[Any]:
        out = tensors(fn(*args))
        torch.manual_seed(3)
        used = [t for t in out if t.requires_grad]
        grads = [torch.randn(t.shape).to(t) for t in used]
        return [*out, *(torch.autograd.grad(used, leaves, grads) if leaves else ())]

    want = run()
    with gems_compile.use_gems(only=every_op()):
        got = run()
    for name in served:
        assert ours(name), f"{name} was ATen's: {whys(name)}"
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same(a.detach(), b.detach(), f"result {k}", **tolerance)
    return got


def whys(name: str) -> list[str]:
    return [
        v.why for h in eager._state.handlers.values() if h.name == name
        for v in h.variants.values()
    ]


# results -----------------------------------------------------------------------------------------

x = lambda *shape, **kw: rand(*shape, grad=True, **kw)  # noqa: E731
PROGRAMS = {
    "gelu": (lambda a: F.gelu(a, approximate="tanh"), [(4, 33)], ("gelu", "gelu_backward")),
    "softmax": (lambda a: a.softmax(-1), [(4, 33)], ("_softmax", "_softmax_backward_data")),
    "log_softmax": (lambda a: a.log_softmax(1), [(4, 33)], ("_log_softmax",)),
    "layer_norm": (
        lambda a, w, b: F.layer_norm(a, (33,), w, b), [(2, 3, 33), (33,), (33,)],
        ("native_layer_norm", "native_layer_norm_backward"),
    ),
    "group_norm": (lambda a, w: F.group_norm(a, 2, w), [(2, 4, 6), (4,)], ("native_group_norm",)),
    "sum": (lambda a: (a.sum(), a.sum(0), a.sum(-1, keepdim=True)), [(4, 33)],
            ("sum", "sum.dim_IntList")),
    "mean and variance": (lambda a: (a.mean(-1), *torch.var_mean(a, 0)), [(4, 33)],
                          ("mean.dim", "var_mean.correction")),
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
        lambda a: F.cross_entropy(a, torch.arange(4, device=DEVICE)), [(4, 33)],
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
    for t, want in zip(got, (a * number, torch.ones(3, dtype=torch.int64).to(DEVICE) * number),
                       strict=True):
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
    names = [n for n in eager._overloads() if n not in RANDOM and n not in FROM_FORWARD]
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
    with gems_compile.use_gems(only=every_op()):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True, nondet_tol=0.0)
    assert ours(one_op.aten_name(fn)), whys(one_op.aten_name(fn))


def _smallest_sample(name: str) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """The declared sample with the fewest elements above one, and its real operands as leaves."""
    made = [make(call, "float64") for call in calls(name)]
    usable = [m for m in made if all(t.numel() > 1 for t in tensors(m)[:1])] or made
    args, kwargs = min(usable, key=lambda m: sum(t.numel() for t in tensors(m)))
    leaves = [t for t in tensors((args, kwargs)) if t.dtype == torch.float64]
    refused = "rrelu_with_noise_backward"  # its second operand may not require a gradient
    leaves = [t for k, t in enumerate(leaves) if not (refused in name and k == 2)]
    return args, kwargs, [t.requires_grad_() for t in leaves]


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
    for g, w in zip(torch.autograd.grad(got.sum(), a), torch.autograd.grad(want.sum(), a),
                    strict=True):
        assert_same(g, w, rtol=1e-4, atol=1e-5)


def test_the_compiler_is_checked_in_an_enabled_process() -> None:
    with gems_compile.use_gems(only=every_op()):
        check(lambda a, b: F.layer_norm(a + b, (33,)).gelu() if False else F.gelu(a + b),
              x(4, 33), x(33))


def test_fake_tensors_do_not_meet_our_kernels() -> None:
    from torch._subclasses import FakeTensorMode

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
    import os

    env = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert run.stdout.split() == ["1", "0"], run.stderr


# what is on --------------------------------------------------------------------------------------


def test_enable_and_disable() -> None:
    a = rand(4)
    gems_compile.enable(only=["gelu", "add.Tensor"])
    assert gems_compile.enabled_ops() == ("add.Tensor", "gelu")
    F.gelu(a)
    assert ours("gelu") == 1
    gems_compile.enable(only="gelu")  # the last selection counts
    assert gems_compile.enabled_ops() == ("gelu",)
    gems_compile.disable()
    gems_compile.disable()
    assert gems_compile.enabled_ops() == ()
    F.gelu(a)
    assert ours("gelu") == 1


def test_the_default_can_be_narrowed() -> None:
    gems_compile.enable()
    on = gems_compile.enabled_ops()
    assert "_softmax" in on and "native_layer_norm" in on
    gems_compile.enable(exclude=["softmax", "gelu"])
    assert set(on) - set(gems_compile.enabled_ops()) == {"_softmax", "gelu"} & set(on)


def test_atens_kernels_are_back() -> None:
    """The dispatcher's own table is as it was."""
    names = [overload(n).name() for n in every_op()]
    table = lambda: [torch._C._dispatch_dump_table(n) for n in names]  # noqa: E731
    before = table()
    gems_compile.enable(only=every_op())
    during = table()
    assert all(a != b for a, b in zip(before, during, strict=True))
    gems_compile.disable()
    assert table() == before


def test_names() -> None:
    resolve = lambda *names: eager._names(names, "enable")  # noqa: E731
    assert resolve("softmax") == resolve("_softmax") == {"aten._softmax.default"}
    assert resolve("add.Tensor") == resolve("aten.add.Tensor") == resolve("aten::add.Tensor")
    assert resolve("add") == {"aten.add.Tensor", "aten.add.Scalar"}
    assert resolve("amax") == {"aten.amax.default"}
    assert resolve("max") == {"aten.max.default"}


@pytest.mark.parametrize("typo, close", [("softmx", "softmax"), ("gleu", "gelu"), ("Add", "add")])
def test_typos(typo: str, close: str) -> None:
    for arguments in ({"only": [typo]}, {"exclude": [typo]}):
        for call in (gems_compile.enable, gems_compile.use_gems):
            with pytest.raises(UnknownOp, match=rf"'{typo}' is declared; close to it: .*{close}"):
                call(**arguments)
    assert gems_compile.enabled_ops() == ()


def test_blocks_nest() -> None:
    on = gems_compile.enabled_ops
    gems_compile.enable(only=["add.Tensor"])
    with gems_compile.use_gems(only=["gelu", "exp"]):
        assert on() == ("exp", "gelu")
        with gems_compile.use_gems(only=["gelu", "exp"], exclude=["exp"]) as block:
            assert on() == ("gelu",)
            with block:  # the same object again
                assert on() == ("gelu",)
            gems_compile.disable()
            assert on() == ("gelu",)
        assert on() == ("exp", "gelu")
    assert on() == ()


def test_a_block_ends_with_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), gems_compile.use_gems(only=["gelu"]):
        raise ZeroDivisionError
    assert gems_compile.enabled_ops() == ()


def test_a_block_decorates() -> None:
    @gems_compile.use_gems(only=["gelu"])
    def f(n: int) -> tuple[str, ...]:
        return f(n - 1) if n else gems_compile.enabled_ops()

    assert f(2) == ("gelu",)
    assert gems_compile.enabled_ops() == ()


def test_blocks_of_several_threads_add_up() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with gems_compile.use_gems(only=["exp"]):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with gems_compile.use_gems(only=["gelu"]):
        thread.start()
        assert inside.wait(10)
        assert gems_compile.enabled_ops() == ("exp", "gelu")
    assert gems_compile.enabled_ops() == ("exp",)
    leave.set()
    thread.join()
    assert gems_compile.enabled_ops() == ()


def test_threads_that_switch_while_others_compute() -> None:
    a = rand(4, 8)
    want, failed, stop = F.gelu(a).exp(), [], threading.Event()

    def compute() -> None:
        while not stop.is_set():
            got = F.gelu(a).exp()
            if not torch.allclose(got, want):
                failed.append(got)

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for t in threads:
        t.start()
    for k in range(150):
        with gems_compile.use_gems(only=["gelu", "exp"][: 1 + k % 2]):
            assert torch.allclose(F.gelu(a).exp(), want)
    stop.set()
    for t in threads:
        t.join()
    assert not failed


def test_reentering_the_same_selection_registers_nothing(monkeypatch: Any) -> None:
    with gems_compile.use_gems(only=["gelu"]):
        monkeypatch.setattr(one_op.Handler, "register", lambda self: pytest.fail("registered"))
        with gems_compile.use_gems(only=["gelu"]):
            F.gelu(rand(4))
    assert ours("gelu") == 1


def test_a_composite_op_is_refused() -> None:
    """Ours at the device key would cut autograd off from the decomposition."""
    target = current_target()
    for name in eager._overloads():
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        aten = overload(name).name()
        if has(aten, "CompositeImplicitAutograd") and not has(aten, KEY):
            assert "decomposition" in str(eager.why_not_replaced(name, target))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU ATen's _fused_rms_norm is no composite")
def test_rms_norm_keeps_its_gradient() -> None:
    gems_compile.enable()
    assert "_fused_rms_norm" not in gems_compile.enabled_ops()
    same(lambda a, w: F.rms_norm(a, (33,), w, 1e-6), x(4, 33), x(33))


def test_every_declared_overload_exists_in_this_torch() -> None:
    """At run time an unknown one is skipped; here it would be a typo of ours."""
    missing = {n for n in OPS if n.startswith("aten.")} - set(eager._overloads())
    assert not missing


def test_an_unknown_overload_is_skipped_with_a_reason(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setitem(OPS, "aten.gelu.nonsense", OPS["aten.gelu.default"])
    eager._overloads.cache_clear()
    try:
        with caplog.at_level("INFO"):
            assert "aten.gelu.nonsense" not in eager._overloads()
        assert "aten.gelu.nonsense is skipped" in caplog.text
    finally:
        monkeypatch.undo()
        eager._overloads.cache_clear()


def test_without_a_target_nothing_is_replaced(monkeypatch: Any) -> None:
    monkeypatch.setattr(eager, "current_target", lambda vendor=None: None)
    gems_compile.enable()
    assert gems_compile.enabled_ops() == ()


# records -----------------------------------------------------------------------------------------


def test_record_to_a_function() -> None:
    seen: list[str] = []
    with gems_compile.use_gems(only=["gelu", "exp"], record=seen.append):
        for _ in range(3):
            F.gelu(rand(4)).exp()
        rand(0).exp()
    assert seen == ["gelu", "exp"]


def test_record_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ops.txt"
    gems_compile.enable(only=["gelu", "exp"], record=path)
    a = rand(4)
    F.gelu(a)
    assert path.read_text() == "gelu\n"
    a.exp()
    a.exp()
    gems_compile.disable()
    assert path.read_text() == "exp 2\ngelu 1\n"
    F.gelu(a)
    assert path.read_text() == "exp 2\ngelu 1\n"


# the cache of variants ---------------------------------------------------------------------------


def test_one_compile_a_kind_of_call() -> None:
    a = rand(4, 6)
    with gems_compile.use_gems(only=["gelu"]):
        for t in (a, a + 1, a.t(), a.double(), a[:2], a):
            F.gelu(t)
        F.gelu(a, approximate="tanh")
    assert eager.stats()["gelu"] == {"ours": 7, "native": 0, "compiled": 5}


def test_shapes_that_never_repeat_stop_compiling(monkeypatch: Any) -> None:
    monkeypatch.setattr(one_op, "MAX_COMPILED", 2)
    with gems_compile.use_gems(only=["exp"]):
        for n in range(1, 6):
            a = rand(n)
            assert_same(a.exp(), torch.exp(a.double()).float())
    assert eager.stats()["exp"] == {"ours": 2, "native": 3, "compiled": 2}


def _breaks(*_: Any) -> Any:
    raise RuntimeError("no such luck")


def test_a_failing_compile_is_atens(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv("GEMS_STRICT", "0")
    monkeypatch.setattr(one_op, "compile_one", _breaks)
    a = rand(4)
    with gems_compile.use_gems(only=["exp"]):
        assert_same(a.exp(), a.exp())
    assert caplog.text.count("exp runs as ATen: RuntimeError: no such luck") == 1
    assert not ours("exp")


def test_a_failing_kernel_is_atens_and_strict_mode_raises(monkeypatch: Any, caplog: Any) -> None:
    a = rand(4)
    layouts = [one_op.layout_of(a)]
    monkeypatch.setattr(one_op, "compile_one",
                        lambda *_: one_op.Variant(_breaks, True, "", layouts))
    with gems_compile.use_gems(only=["exp"]), pytest.raises(RuntimeError, match="no such luck"):
        a.exp()
    eager._state.handlers.clear()
    monkeypatch.setenv("GEMS_STRICT", "0")
    with gems_compile.use_gems(only=["exp"]):
        assert_same(a.exp(), torch.exp(a))
    assert "its kernel failed" in caplog.text
    assert eager.stats()["exp"] == {"ours": 0, "native": 2, "compiled": 0}


def test_a_result_laid_out_otherwise_is_atens(monkeypatch: Any) -> None:
    monkeypatch.setattr(one_op, "compile_one",
                        lambda *_: one_op.Variant(_breaks, True, "", [("another",)]))
    with gems_compile.use_gems(only=["exp"]):
        rand(4).exp()
    assert "its meta" in whys("exp")[0]


# ops ---------------------------------------------------------------------------------------------


def test_ops() -> None:
    a = x(4, 33)
    got = gems_compile.ops.gelu(a, approximate="tanh")
    assert_same(got.detach(), F.gelu(a, approximate="tanh").detach())
    assert_same(torch.autograd.grad(got.sum(), a)[0],
                torch.autograd.grad(F.gelu(a, approximate="tanh").sum(), a)[0])
    assert ours("gelu") == 1
    assert_same(gems_compile.ops.softmax(a, dim=-1, half_to_float=False).detach(),
                a.softmax(-1).detach())
    assert_same(gems_compile.ops.add(a, 2.5, alpha=2).detach(), (a + 5.0).detach())
    assert ours("_softmax") == ours("add.Tensor") == 1
    assert gems_compile.enabled_ops() == ()


def test_ops_beside_enable() -> None:
    gems_compile.enable(only=["gelu"])
    gems_compile.ops.gelu(rand(4))
    gems_compile.ops.exp(rand(4))
    assert gems_compile.enabled_ops() == ("gelu",)
    assert (ours("gelu"), ours("exp")) == (1, 1)


def test_ops_and_names_that_do_not_exist() -> None:
    assert isinstance(gems_compile.ops.gelu, types.FunctionType)
    assert "aten::gelu(" in gems_compile.ops.gelu.__doc__
    assert {"gelu", "softmax", "add"} <= set(dir(gems_compile.ops))
    with pytest.raises(AttributeError, match="'gleu' is declared; close to it: gelu"):
        gems_compile.ops.gleu  # noqa: B018
    with pytest.raises(TypeError):
        gems_compile.ops.gelu()


# on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_defaults_serve_a_model_on_a_gpu() -> None:
    model = nn.Sequential(nn.LayerNorm(1024), nn.Softmax(-1)).to(DEVICE, torch.bfloat16)
    a = rand(64, 1024, dtype=torch.bfloat16)
    want = model(a)
    gems_compile.enable()
    with torch.compiler.set_stance("force_eager"):
        got = torch.compile(model, backend="gems")(a)
    assert ours("native_layer_norm") == ours("_softmax") == 1
    assert_same(got.detach(), want.detach())


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
