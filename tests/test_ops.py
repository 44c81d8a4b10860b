"""Every declared op x sample x dtype against ATen in float64, and forward with backward."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from accuracy import assert_accurate, error_in_ulps, in_float64
from helpers import DEVICE, assert_same_bits, assert_same_metadata, compile_
from opcheck import (
    AMPLIFIED,
    DECLARED,
    FROM_FORWARD,
    RANDOM,
    calls,
    check_call,
    make,
    one_node,
    overload,
    run_poisoned,
    tensors,
    transposed,
)
from torch.utils._pytree import tree_map

from gems_compile.kernels.op import OPS

is_tensor = torch.is_tensor
NAMES = [name for name in DECLARED if name not in RANDOM]
#: ops that IEEE 754 rounds exactly: the same bits as eager's
ROUNDED_EXACTLY = {
    "mul",
    "neg",
    "abs",
    "sign",
    "reciprocal",
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "relu",
    "where",
    "masked_fill",
    "to_copy",
    "clone",
    "copy",
    "fill",
    "floor",
    "ceil",
    "trunc",
    "round",
    "clamp",
    "clamp_min",
    "clamp_max",
    "copysign",
    "hardtanh",
    "threshold",
    "amax",
    "amin",
    "embedding",
    "index_select",
    "gather",
    "index",
}


def _main_dtype(name: str) -> str:
    dtypes = OPS[name].dtypes
    return "float32" if "float32" in dtypes else dtypes[0]


def _cases() -> list[Any]:
    """All samples in float32 (or the op's first dtype), the first one in every other dtype."""
    out = []
    for name in NAMES:
        main = _main_dtype(name)
        count = len(calls(name))
        out += [pytest.param(name, k, main, id=f"{name}-{k}-{main}") for k in range(count)]
        out += [
            pytest.param(name, 0, dtype, id=f"{name}-0-{dtype}")
            for dtype in OPS[name].dtypes
            if dtype != main and count
        ]
    return out


def test_every_overload_has_a_sample() -> None:
    assert [name for name in NAMES if not calls(name)] == []


@pytest.mark.parametrize(("name", "sample", "dtype"), _cases())
def test_op(name: str, sample: int, dtype: str) -> None:
    args, kwargs = make(calls(name)[sample], dtype)
    check_call(overload(name), args, kwargs, kernels=1)


def _once() -> list[Any]:
    return [pytest.param(name, id=name) for name in NAMES if calls(name)]


@pytest.mark.parametrize("name", _once())
def test_transposed(name: str) -> None:
    """Operands whose last two dims are swapped in memory, rows with gaps."""
    dtype = _main_dtype(name)
    args, kwargs = make(calls(name)[0], dtype, layout=transposed)
    check_call(overload(name), args, kwargs, kernels=1)


SHAPES = {"0d": lambda shape: (), "ones": lambda shape: (1,) * len(shape)}
POINTWISE = [name for name in NAMES if OPS[name].kind == "pointwise" and calls(name)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", POINTWISE)
def test_one_element(name: str, shape: str) -> None:
    args, kwargs = make(calls(name)[0], _main_dtype(name), shape=SHAPES[shape])
    check_call(overload(name), args, kwargs, kernels=1)


REDUCTIONS = [name for name in NAMES if OPS[name].kind == "reduction" and calls(name)]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction_of_ones(name: str) -> None:
    for call in calls(name):
        args, kwargs = make(call, _main_dtype(name), shape=SHAPES["ones"])
        check_call(overload(name), args, kwargs, kernels=1)


@pytest.mark.parametrize("name", POINTWISE)
def test_empty(name: str) -> None:
    """No element, no kernel; shape and dtype are still eager's."""
    empty = lambda shape: (0, *shape[1:]) if shape else ()  # noqa: E731
    args, kwargs = make(calls(name)[0], _main_dtype(name), shape=empty)
    report = check_call(overload(name), args, kwargs)
    assert report.launches == 0


# exact bits ---------------------------------------------------------------------------------------


#: of zeros of both signs ATen's CPU kernels return the first one, CUDA's the larger one
EXTREMA = {
    "relu",
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "clamp",
    "clamp_min",
    "clamp_max",
    "hardtanh",
}
#: for these ATen's own CPU and CUDA kernels differ; ours are CUDA's formulas
NAN_DIFFERS = {"elu_backward", "hardtanh_backward", "hardswish_backward", "shrink_backward"}
INFINITY_DIFFERS = {"gelu", "gelu_backward"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [n for n in POINTWISE if OPS[n].name in ROUNDED_EXACTLY])
def test_bits(name: str, dtype: str) -> None:
    """What IEEE 754 defines is eager's to the bit, signs of zeros and special values included."""
    if dtype not in OPS[name].dtypes:
        pytest.skip("not declared")
    args, kwargs = make(calls(name)[0], dtype)
    _plant(OPS[name].name, args, kwargs)
    made = one_node(overload(name), args, kwargs)
    got, _ = run_poisoned(made.graph, made.inputs)
    (want,) = tensors(overload(name)(*args, **kwargs))
    sign = 0.0 if OPS[name].name in EXTREMA else -0.0  # -0.0 + 0.0 is 0.0
    assert_same_bits(got[0].cpu() + sign, want.cpu() + sign, name)


def _plant(op: str, *trees: Any) -> None:
    """Zeros of both signs, infinities and NaN in every floating operand that has the room."""
    special = [0.0, -0.0]
    if DEVICE != "cpu" or op not in INFINITY_DIFFERS:
        special += [float("inf"), float("-inf")]
    if DEVICE != "cpu" or op not in NAN_DIFFERS:
        special.append(float("nan"))
    for t in tensors(trees):
        if t.is_floating_point() and t.numel() >= 32:
            spots = torch.randperm(t.numel())[: 3 * len(special)].to(t.device)
            t.view(-1)[spots] = torch.tensor(special * 3, dtype=t.dtype, device=t.device)


@pytest.mark.parametrize("name", [n for n in POINTWISE if "float32" in OPS[n].dtypes])
def test_special_values(name: str) -> None:
    """Infinities, NaN and zeros of both signs give what eager gives."""
    args, kwargs = make(calls(name)[0], "float32")
    _plant(OPS[name].name, args, kwargs)
    check_call(overload(name), args, kwargs, kernels=1)


# forward and backward -----------------------------------------------------------------------------


def _differentiable() -> list[str]:
    out = []
    for name in NAMES:
        if "backward" in name or name.startswith("gems.") or name in FROM_FORWARD:
            continue
        if "float32" in OPS[name].dtypes and calls(name) and _has_gradient(name):
            out.append(name)
    return out


def _has_gradient(name: str) -> bool:
    args, kwargs = make(calls(name)[0], "float32")
    try:
        _run(overload(name), args, kwargs)
    except RuntimeError:  # no autograd formula: of an integer, or the functional one of a pair
        return False
    return True


def _run(fn: Any, args: Any, kwargs: Any, seed: int = 3) -> tuple[list[Any], list[Any]]:
    """(the differentiable results, gradients) of fn on copies of the arguments."""
    args, kwargs = tree_map(lambda t: t.detach().clone() if is_tensor(t) else t, (args, kwargs))
    leaves = [t.requires_grad_() for t in tensors((args, kwargs)) if t.is_floating_point()]
    results = [t for t in tensors(fn(*args, **kwargs)) if t.requires_grad]
    draw = torch.Generator().manual_seed(seed)
    seeds = [torch.randn(t.shape, generator=draw).to(t.device, t.dtype) for t in results]
    grads = torch.autograd.grad(results, leaves, seeds, allow_unused=True)
    return results, [g for g in grads if g is not None]


@pytest.mark.parametrize("name", _differentiable())
def test_backward(name: str) -> None:
    """Compiled with a neighbour, forward and backward, against float64."""

    def fn(*a: Any, **k: Any) -> list[Any]:
        results = tensors(overload(name)(*a, **k))
        return [t * 1.5 + 0.25 if t.is_floating_point() else t for t in results]

    def eager(args: Any, kwargs: Any, seed: int = 3) -> tuple[Any, Any]:
        wide = in_float64((args, kwargs), floats_only=True)
        return [*chain(*_run(fn, args, kwargs, seed))], [*chain(*_run(fn, *wide, seed))]

    args, kwargs = make(calls(name)[0], "float32")
    results, gradients = _run(compile_(fn), args, kwargs)
    got, (its, exact) = [*results, *gradients], eager(args, kwargs)
    assert len(got) == len(its)
    draws = [eager(*make(calls(name)[0], "float32"), seed) for seed in range(10, 18)]
    for k, (a, b, c) in enumerate(zip(got, its, exact, strict=True)):
        which = f"result {k}" if k < len(results) else f"gradient {k - len(results)}"
        usual = max(error_in_ulps(e[k], w[k], b.dtype, "tensor") for e, w in draws)
        assert_same_metadata(a.detach(), b.detach(), which)
        least = 16.0 if name in AMPLIFIED else 1.0
        assert_accurate(a, b, c, which, "tensor", lambda usual=usual: usual, least)


# dropout ------------------------------------------------------------------------------------------


def test_dropout() -> None:
    """The share that is kept, its scale, one seed a run, and another mask for another op."""

    def drop(x: torch.Tensor) -> Any:
        first, kept = torch.ops.aten.native_dropout.default(x, 0.25, True)
        second, other = torch.ops.aten.native_dropout.default(x, 0.25, True)
        return first * 2, kept, second * 2, other

    x = torch.randn(64, 64, device=DEVICE)
    fn = compile_(drop)
    torch.manual_seed(5)
    first, kept, second, other = fn(x)
    assert kept.dtype == torch.bool
    assert torch.equal(first, torch.where(kept, x * (1 / 0.75), 0.0) * 2)
    assert torch.equal(second, torch.where(other, x * (1 / 0.75), 0.0) * 2)
    for mask in (kept, other):
        assert abs(mask.float().mean().item() - 0.75) < 5 * (0.75 * 0.25 / 4096) ** 0.5
    assert (kept != other).float().mean() > 0.3  # 0.375 for independent masks
    torch.manual_seed(5)
    assert torch.equal(fn(x)[1], kept)
    assert not torch.equal(fn(x)[1], kept)
