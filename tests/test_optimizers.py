"""Optimizer steps: the same parameters and state as eager mode, in few launches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import DEVICE, gems_only
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from gems_compile.backend import Gems
from gems_compile.lowering.foreach import take_foreach_apart

pytestmark = gems_only
aten = torch.ops.aten

WIDE = [(64,), (16, 32), (128, 4), (1024,), (2, 4, 8), (48, 16), (256,), (32, 3)]
ODD = [(7,), (33, 5), (1,), (64,), (3, 3, 3), (1025,), (16, 32), (9, 11)]

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "adamw": lambda ps: AdamW(ps, lr=0.1, weight_decay=0.1, foreach=True),
    "adamw_one_by_one": lambda ps: AdamW(ps, lr=0.1, foreach=False),
    "adam_amsgrad": lambda ps: Adam(ps, lr=0.1, amsgrad=True, weight_decay=0.1, foreach=True),
    "adam_maximize": lambda ps: Adam(ps, lr=0.1, maximize=True, foreach=True),
    "sgd": lambda ps: SGD(ps, lr=0.1, foreach=True),
    "sgd_momentum": lambda ps: SGD(ps, lr=0.1, momentum=0.9, dampening=0.1, foreach=True),
    "sgd_nesterov": lambda ps: SGD(
        ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True
    ),
}
#: multiplying and adding only: the same bits. (In bfloat16 ATen rounds a factor first on a CPU.)
EXACT = {"sgd", "sgd_momentum"}


def parameters(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    drawn = (torch.randn(s, generator=draw) for s in shapes)
    return [t.to(DEVICE, dtype).requires_grad_() for t in drawn]


def run(
    make: Callable[[list[Tensor]], Optimizer],
    ps: list[Tensor],
    compiled: Gems | str | None,
    before: Callable[[list[Tensor]], Any] = lambda ps: None,
    steps: int = 4,
) -> Optimizer:
    """Steps with the same gradients every time; the optimizer with its state."""
    draw = torch.Generator().manual_seed(5)
    optimizer = make(ps)

    def step() -> None:
        before(ps)
        optimizer.step()

    call = step if compiled is None else torch.compile(step, backend=compiled)
    for _ in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=draw).to(p.device, p.dtype)
        call()
    return optimizer


def state_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters and state by name."""
    found = {}
    for k, p in enumerate(optimizer.param_groups[0]["params"]):
        found[f"{k}"] = p.detach()
        state = optimizer.state[p]
        found.update({f"{k}.{n}": v for n, v in state.items() if isinstance(v, Tensor)})
    return found


def assert_as_good(got: Tensor, aten: Tensor, exact: Tensor, name: str) -> None:
    """At most twice as far from the float64 result as ATen's kernels are, in the same program."""
    unit = torch.finfo(got.dtype).eps
    far = (got.double() - exact).abs()
    near = (aten.double() - exact).abs().max() + 4 * unit * exact.abs()
    assert (far <= 2 * near).all(), f"{name}: {far.max()}, ATen: {near.max()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_and_state(name, dtype) -> None:
    ps = parameters(ODD, dtype)
    twin, ideal = copy.deepcopy(ps), [p.detach().double().requires_grad_() for p in ps]
    got = state_of(run(OPTIMIZERS[name], ps, Gems()))
    same = dtype == torch.float32 and name in EXACT
    # Dynamo keeps the powers of Adam's betas in float32, eager mode on a CPU in Python's numbers
    want = state_of(run(OPTIMIZERS[name], twin, None if same else "aot_eager"))
    draw = torch.Generator().manual_seed(5)  # the gradients, rounded to dtype as they were
    optimizer = OPTIMIZERS[name](ideal)
    for _ in range(4):
        for p in ideal:
            p.grad = torch.randn(p.shape, generator=draw).to(p.device, dtype).double()
        optimizer.step()
    exact = state_of(optimizer)
    assert got.keys() == want.keys()
    for key, tensor in got.items():
        assert tensor.dtype == want[key].dtype
        if same:
            assert torch.equal(tensor, want[key]), key
        else:
            assert_as_good(tensor, want[key], exact[key].double(), key)


def report_of_last_step(name: str, shapes: Any, **kwargs: Any) -> Any:
    backend = Gems()
    run(OPTIMIZERS[name], parameters(shapes, torch.float32), backend, **kwargs)
    return backend.reports[-1]


@pytest.mark.parametrize(
    ("name", "shapes", "launches"),
    [
        ("adamw", WIDE, 2),  # the step counters with their powers, the parameters
        ("adam_amsgrad", WIDE, 2),
        ("sgd", WIDE, 1),
        ("sgd_momentum", WIDE, 1),
        ("sgd_nesterov", WIDE, 1),
        ("sgd_nesterov", ODD, 3),  # also the odd sizes, and the single element
    ],
)
def test_launches_of_eight_parameters(name, shapes, launches) -> None:
    report = report_of_last_step(name, shapes)
    assert (report.launches, report.aten_calls) == (launches, 0), report.aten
    assert "empty(" not in report.wrapper.replace("scratch = empty(", "")  # all in place


def test_many_parameters_are_split_by_the_number_of_arguments() -> None:
    report = report_of_last_step("adamw", [(16,)] * 40, steps=1)
    assert report.launches == 2 + 3  # 39 counters, 1; 19 parameters, 19, 2


def test_two_dtypes() -> None:
    ps = parameters(WIDE[:4], torch.float32) + parameters(WIDE[:4], torch.bfloat16)
    twin = copy.deepcopy(ps)
    backend = Gems()
    got = state_of(run(OPTIMIZERS["sgd_momentum"], ps, backend))
    want = state_of(run(OPTIMIZERS["sgd_momentum"], twin, None))
    for key, tensor in got.items():
        near = 0.0 if tensor.dtype == torch.float32 else 0.02
        torch.testing.assert_close(tensor, want[key], rtol=near, atol=near)
    assert backend.reports[-1].launches == 2


def test_clipped_gradients() -> None:
    def clip(ps: list[Tensor]) -> None:
        torch.nn.utils.clip_grad_norm_(ps, 0.5, foreach=True)

    ps = parameters(WIDE, torch.float32)
    twin = copy.deepcopy(ps)
    backend = Gems()
    got = state_of(run(OPTIMIZERS["adamw"], ps, backend, clip))
    want = state_of(run(OPTIMIZERS["adamw"], twin, "aot_eager", clip))
    for key, tensor in got.items():
        torch.testing.assert_close(tensor, want[key], rtol=1e-4, atol=1e-5)
    for p, q in zip(ps, twin, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
    called = [k for r in backend.reports for k in r.aten]
    assert called and all("_foreach_norm" in k for k in called)  # of ATen's, one for all tensors


def test_parameters_off_the_16_byte_boundary() -> None:
    """Views into one flat buffer, as sharded optimizers keep them."""

    def views(flat: Tensor) -> list[Tensor]:
        return [flat[k : k + 32].requires_grad_() for k in (0, 33, 70)]

    flat = torch.randn(120, device=DEVICE)
    other = flat.clone()
    run(OPTIMIZERS["sgd_nesterov"], views(flat), Gems())
    run(OPTIMIZERS["sgd_nesterov"], views(other), None)
    torch.testing.assert_close(flat, other)


# taking apart -------------------------------------------------------------------------------------


def graph_of(fn: Callable[..., Any], *args: Any) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(fn, tracing_mode="fake")(*args)


def targets(gm: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


LISTS: dict[str, Callable[[list[Tensor], list[Tensor]], Any]] = {
    "add": lambda a, b: torch._foreach_add(a, b, alpha=3),
    "add_scalar": lambda a, b: torch._foreach_add(a, 2),
    "add_scalars": lambda a, b: torch._foreach_add(a, [1.0, 2.0, 3.0]),
    "add_tensor": lambda a, b: torch._foreach_add(a, b[0].sum(), alpha=2),
    "sub": lambda a, b: torch._foreach_sub(a, b, alpha=0.5),
    "mul_tensor": lambda a, b: torch._foreach_mul(a, b[0].sum()),
    "div": lambda a, b: torch._foreach_div(a, b),
    "addcmul": lambda a, b: torch._foreach_addcmul(a, b, a, value=0.5),
    "addcmul_scalars": lambda a, b: torch._foreach_addcmul(a, b, a, [0.5, 1.0, 2.0]),
    "addcdiv": lambda a, b: torch._foreach_addcdiv(a, a, b, 2),
    "lerp": lambda a, b: torch._foreach_lerp(a, b, 0.25),
    "lerp_tensors": lambda a, b: torch._foreach_lerp(a, b, a),
    "pow": lambda a, b: torch._foreach_pow(b, 2),
    "pow_list": lambda a, b: torch._foreach_pow(b, a),
    "pow_of_scalar": lambda a, b: torch._foreach_pow(0.9, a),
    "maximum": lambda a, b: torch._foreach_maximum(a, b),
    "maximum_scalar": lambda a, b: torch._foreach_maximum(a, 0.25),
    "minimum_scalars": lambda a, b: torch._foreach_minimum(a, [0.0, 0.5, -1.0]),
    "clamp_min": lambda a, b: torch._foreach_clamp_min(a, 0.0),
    "clamp_max": lambda a, b: torch._foreach_clamp_max(a, b),
    **{
        name: lambda a, b, name=name: getattr(torch, f"_foreach_{name}")(b)
        for name in ("neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log", "sign", "tanh")
    },
}


@pytest.mark.parametrize("name", LISTS)
def test_taken_apart(name) -> None:
    """Three nodes for a list of three, the same numbers, what was known of the node kept."""
    a = [torch.randn(s, device=DEVICE) for s in ((4,), (2, 3), (5,))]
    b = [t.abs() + 0.5 for t in (torch.randn_like(t) for t in a)]
    gm = graph_of(lambda *ts: LISTS[name](list(ts[:3]), list(ts[3:])), *a, *b)
    want = gm(*a, *b)
    assert take_foreach_apart(gm, torch.device(a[0].device)) == 1
    gm.graph.lint()
    gm.recompile()
    assert not any("_foreach" in t or "getitem" in t for t in targets(gm))
    assert all(
        n.meta["val"].shape for n in gm.graph.nodes if "sum" not in n.name and n.op[0] == "c"
    )
    torch.testing.assert_close(gm(*a, *b), want)


def test_left_whole() -> None:
    """Another device, dtypes without kernels, reductions, scalars that lie in a tensor."""
    a = [torch.randn(4, device=DEVICE) for _ in range(2)]

    def fn(*ts: Tensor) -> Any:
        return torch._foreach_norm(list(ts)), torch._foreach_max(list(ts))

    gm = graph_of(fn, *a)
    before = targets(gm)
    assert take_foreach_apart(gm, torch.device(a[0].device)) == 0
    assert targets(gm) == before
    gm = graph_of(lambda *ts: torch._foreach_exp(list(ts)), *(t.cfloat() for t in a))
    assert take_foreach_apart(gm, torch.device(a[0].device)) == 0
    gm = graph_of(lambda *ts: torch._foreach_exp(list(ts)), *a)
    assert take_foreach_apart(gm, torch.device("meta")) == 0


def test_the_rest_of_a_list_stays_together() -> None:
    """Empty and complex tensors are no kernel's; the others are."""
    a = [torch.randn(4), torch.randn(0), torch.randn(3), torch.randn(2).cfloat()]
    a = [t.to(DEVICE) for t in a]
    gm = graph_of(lambda *ts: torch._foreach_add(list(ts), 1), *a)
    want = gm(*a)
    assert take_foreach_apart(gm, torch.device(a[0].device)) == 1
    gm.graph.lint()
    gm.recompile()
    found = targets(gm)
    assert found.count("aten.add.Tensor") == 2 and found.count("aten._foreach_add.Scalar") == 1
    torch.testing.assert_close(gm(*a), want)
