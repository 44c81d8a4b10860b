"""Samples of declared ops as one-node graphs, compiled and compared with ATen in float64."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import math
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accuracy import assert_accurate, error_in_ulps, in_float64
from helpers import DEVICE, assert_same_metadata
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from gems_compile.config import cache_dir
from gems_compile.kernels import load_ops
from gems_compile.kernels.fused import register_torch_ops
from gems_compile.kernels.op import OPS, Authored, Call, Op, T
from gems_compile.kernels.target import current_target
from gems_compile.lowering import private
from gems_compile.lowering.decompose import Decompositions
from gems_compile.lowering.options import Options
from gems_compile.lowering.pipeline import compile_graph
from gems_compile.lowering.report import Report

load_ops()
register_torch_ops()
aten = torch.ops.aten

#: what is declared beside our kernels; tests declare ops of their own
DECLARED = {name: op for name, op in OPS.items() if not isinstance(op, Authored)}
#: which samples a run takes; another number every day, and ids of tests name it
SEED = int(os.environ.get("GEMS_TEST_SEED") or datetime.date.today().toordinal())
FULL = os.environ.get("GEMS_TEST_FULL") == "1"
QUICK = os.environ.get("GEMS_TEST_QUICK") == "1"  # ``--quick``
REF = os.environ.get("GEMS_TEST_REF", "device")  # ``--ref``
#: sample arguments that are the name of a dtype
DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool")


def overload(name: str) -> Any:
    """ "aten.add.Tensor" -> the overload."""
    space, packet, which = name.split(".")
    return getattr(getattr(getattr(torch.ops, space), packet), which)


# filling samples ----------------------------------------------------------------------------------


def dense(t: Tensor) -> Tensor:
    return t


def transposed(t: Tensor) -> Tensor:
    """The same values, the last two dims swapped in memory; a row with gaps between elements."""
    if t.ndim >= 2:
        return t.mT.contiguous().mT
    if t.ndim == 1:
        return torch.stack([t, t], 1)[:, 0]
    return t


def fill(spec: T, dtype: str, layout: Callable[[Tensor], Tensor] = dense) -> Tensor:
    """A random tensor: normal where no bounds are given, integers in [-9, 10), else uniform."""
    name = spec.dtype or dtype
    kind = getattr(torch, name)
    if kind == torch.bool:
        t = torch.rand(spec.shape) > 0.5
    elif kind.is_floating_point:
        low, high = spec.low, spec.high
        if low is None and high is None:
            t = torch.randn(spec.shape).to(kind)
        else:
            low = -4.0 if low is None else low
            high = low + 4.0 if high is None else high
            t = (torch.rand(spec.shape) * (high - low) + low).to(kind)
    else:
        low = -9 if spec.low is None else math.floor(spec.low)
        high = 10 if spec.high is None else math.ceil(spec.high)
        t = torch.randint(low, max(high, low + 1), spec.shape, dtype=kind)
    return layout(t.to(DEVICE))


def instantiate(
    sample: Call,
    dtype: str,
    layout: Callable[[Tensor], Tensor] = dense,
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) with tensors in place of ``T`` and dtypes in place of their names."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, T):
            if shape is not None:
                leaf = T(*shape(leaf.shape), dtype=leaf.dtype, low=leaf.low, high=leaf.high)
            return fill(leaf, dtype, layout)
        if leaf == "input_dtype":
            return getattr(torch, dtype)
        if isinstance(leaf, str) and leaf in DTYPES:
            return getattr(torch, leaf)
        return leaf

    return tree_map(one, (tuple(sample.args), dict(sample.kwargs)))


# one call as a graph ------------------------------------------------------------------------------


@dataclass
class OneNode:
    """The graph of one call; its placeholders are the call's tensors, in order."""

    graph: fx.GraphModule
    inputs: list[Tensor]


def one_node(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> OneNode:
    """Without AOTAutograd and without tracing: one call_function, and its parts."""
    graph, inputs, mode = fx.Graph(), [], FakeTensorMode()

    def enter(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        node = graph.placeholder(f"x{len(inputs)}")
        node.meta["val"] = mode.from_tensor(leaf)
        inputs.append(leaf)
        return node

    node_args, node_kwargs = tree_map(enter, (tuple(args), dict(kwargs)))
    fake_args, fake_kwargs = fx.map_arg((node_args, node_kwargs), lambda n: n.meta["val"])
    with mode:
        val = target(*fake_args, **fake_kwargs)
    call = graph.call_function(target, node_args, node_kwargs)
    call.meta["val"] = val
    graph.output(_parts(graph, call, val))
    return OneNode(fx.GraphModule(torch.nn.Module(), graph), inputs)


def _parts(graph: fx.Graph, call: fx.Node, val: Any) -> Any:
    if isinstance(val, Tensor):
        return (call,)
    out = []
    for k, part in enumerate(val):
        if isinstance(part, Tensor):
            node = graph.call_function(operator.getitem, (call, k))
            node.meta["val"] = part
            out.append(node)
    return tuple(out)


def options(**changes: Any) -> Options:
    return Options(
        **{
            "target": current_target(),
            "strict": True,
            "alone": True,
            "cache_dir": cache_dir(),
            **changes,
        }
    )


def poisoned(device: torch.device) -> Callable[..., Tensor]:
    """The executor's allocator, with a value in every element that no kernel would leave."""

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        t = torch.empty_strided(size, stride, dtype=dtype, device=device)
        if dtype == torch.bool:
            return t.fill_(True)
        return t.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max - 7)

    return empty


def run_poisoned(
    graph: fx.GraphModule, inputs: Sequence[Any], given: Options | None = None
) -> tuple[Any, Report]:
    """Compile, run once on copies of the inputs; the inputs must come out unchanged."""
    before = private.allocator
    private.allocator = poisoned
    try:
        run, report = compile_graph(graph, inputs, given or options())
    finally:
        private.allocator = before
    kept = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
    got = run(list(inputs))
    for t, was in zip(inputs, kept, strict=True):
        if isinstance(t, Tensor):
            assert torch.equal(_bits(t), _bits(was)), "an input was written"
    return got, report


def _bits(t: Tensor) -> Tensor:
    return torch.nan_to_num(t, nan=12345.0) if t.is_floating_point() else t


# the reference ------------------------------------------------------------------------------------


def _var_mean(x: Tensor, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> Any:
    mean = x.mean(dim, keepdim=True)
    squares = (x - mean).square().sum(dim, keepdim=keepdim)
    count = x.numel() // mean.numel()
    return squares / (count - correction), mean if keepdim else x.mean(dim)


def _one_by_one(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def scan(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
        return torch.stack(list(itertools.accumulate(x.to(dtype or x.dtype).unbind(dim), op)), dim)

    return scan


#: what ATen accumulates in float64 on a CPU and in float32 on a GPU: the GPU's formula
IN_FLOAT32: dict[str, Callable[..., Any]] = {
    "aten.var.correction": lambda *a, **k: _var_mean(*a, **k)[0],
    "aten.std.correction": lambda *a, **k: _var_mean(*a, **k)[0].sqrt(),
    "aten.var_mean.correction": _var_mean,
    "aten.cumsum.default": _one_by_one(torch.add),
    "aten.cumprod.default": _one_by_one(torch.mul),
}


def usual_error(target: Any, args: Any, kwargs: Any, k: int, scale: str) -> float:
    """The largest error of eager's k-th result over shuffles of the call's floating operands."""

    def shuffle(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.flatten()[torch.randperm(leaf.numel())].view(leaf.shape)

    worst = 0.0
    for _ in range(8):
        again, names = tree_map(shuffle, (args, kwargs))
        eager, exact = reference(target, again, names)
        if str(target) in IN_FLOAT32:
            eager = tensors(IN_FLOAT32[str(target)](*again, **names))
        worst = max(worst, error_in_ulps(eager[k].cpu(), exact[k], eager[k].dtype, scale))
    return worst


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def reference(target: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(eager's results, the same in float64); an op that eager lacks for a dtype is rounded."""
    floating = any(t.is_floating_point() for t in tensors((args, kwargs)))
    if str(target) in CONTIGUOUS_ONLY:
        args = tree_map(lambda a: a.contiguous() if isinstance(a, Tensor) else a, args)
    wide_args, wide_kwargs = in_float64((args, kwargs), floats_only=floating)
    try:
        eager = tensors(target(*args, **kwargs))
    except (NotImplementedError, RuntimeError) as missing:
        if "not implemented" not in str(missing) and "Could not run" not in str(missing):
            raise
        eager = None
    if eager is not None and not any(t.is_floating_point() for t in eager):
        return eager, eager
    exact = tensors(STAND_INS.get(str(target), target)(*wide_args, **wide_kwargs))
    if eager is None:
        fakes = tensors(
            one_node(target, args, kwargs)
            .graph.graph.find_nodes(op="call_function", target=target)[0]
            .meta["val"]
        )
        eager = [
            torch.empty_strided(f.shape, f.stride(), dtype=f.dtype).copy_(t)
            for f, t in zip(fakes, exact, strict=True)
        ]
    return eager, exact


def _as_promised(t: Tensor, fake: Tensor) -> Tensor:
    out = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=t.device)
    return out.copy_(t)


#: torch's own FakeTensors have another dtype, or of transposed operands other strides, than its
#: results; the graph goes by the FakeTensors
MISDESCRIBED = {
    "aten._native_batch_norm_legit_functional.default",
    "aten._native_batch_norm_legit_no_training.default",
    "aten.native_batch_norm_backward.default",
    "aten.native_group_norm.default",
    "aten.native_group_norm_backward.default",
    "aten.native_layer_norm_backward.default",
    "aten.native_dropout_backward.default",
    "aten._log_softmax_backward_data.default",
    "aten._fused_rms_norm_backward.default",
}
#: eager's CPU kernel takes contiguous operands only
CONTIGUOUS_ONLY = {
    "aten.native_group_norm.default",
    "aten.native_group_norm_backward.default",
}
#: a GPU fills results that the kernel does not give: ATen runs where all of them are wanted
FILLED_ON_A_GPU = {"aten._native_batch_norm_legit_no_training.default"}
#: the CPU's forward accumulates in float64, and the backward takes exp() of its error
AMPLIFIED = {"aten.logcumsumexp.default"}
#: sums of terms that round before they are added, in the order of eager's CUDA kernel
CANCELS = {"addcmul", "addcdiv", "lerp"}


def scale_of(op: Op | None) -> str:
    """Whether an op's errors are those of each element, or of the tensor."""
    by_element = op is not None and op.kind == "pointwise" and op.name not in CANCELS
    return "element" if by_element else "tensor"


def check_call(target: Any, args: Any, kwargs: Any, kernels: int | None = None) -> Report:
    """Compile one call and compare everything; ``kernels`` is the least number of launches."""
    op = OPS[str(target)]
    made = one_node(target, args, kwargs)
    got, report = run_poisoned(made.graph, made.inputs)
    promised = [n.meta["val"] for n in made.graph.graph.output_node().args[0]]
    scale = scale_of(op)
    fakes = promised if str(target) in MISDESCRIBED else None
    compare(got, target, args, kwargs, op.name, scale, fakes)
    if kernels is not None and not (DEVICE == "cuda" and str(target) in FILLED_ON_A_GPU):
        assert report.launches >= kernels, f"{op.name} ran as ATen: {report.aten}"
    return report


def compare(
    got: Sequence[Tensor],
    target: Any,
    args: Any,
    kwargs: Any,
    name: str,
    scale: str,
    fakes: Sequence[Tensor] | None = None,
    least: float = 1.0,
) -> None:
    """Results of target(*args, **kwargs) against eager's: layout (or that of ``fakes``), values.

    ``least`` is what is always allowed where errors are counted for the whole tensor.
    """
    eager, exact = reference(target, args, kwargs)
    assert len(got) == len(eager)
    for k, (a, b, c) in enumerate(zip(got, eager, exact, strict=True)):
        which = f"{name}[{k}]" if len(got) > 1 else name
        assert_same_metadata(a, b if fakes is None else _as_promised(b, fakes[k]), which)
        usual = functools.partial(usual_error, target, args, kwargs, k, scale)
        if scale == "tensor":
            assert_accurate(a, b, c, which, scale, usual, least)
        else:
            assert_accurate(a, b, c, which)


# samples ------------------------------------------------------------------------------------------


def _rms_norm_backward(dy: Tensor, x: Tensor, shape: Any, rstd: Tensor, w: Any, mask: Any) -> Any:
    """What ATen has on a GPU only, by autograd of the forward."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        leaves = [x] if w is None else [x, w := w.detach().requires_grad_()]
        eps = 1e-6
        y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (1 if w is None else w)
    return torch.autograd.grad(y, leaves, dy)


#: overload -> the same function where ATen has no CPU kernel
STAND_INS: dict[str, Callable[..., Any]] = {
    "aten._fused_rms_norm_backward.default": _rms_norm_backward,
}


def _layer_norm_backward(new: Callable[..., Tensor], mask: list[bool], affine: bool) -> Any:
    x, dy = new(4, 33), new(4, 33)
    w, b = (new(33), new(33)) if affine else (None, None)
    _, mean, rstd = aten.native_layer_norm(x, [33], w, b, 1e-5)
    return dy, x, [33], mean, rstd, w, b, mask


def _rms_backward(new: Callable[..., Tensor], mask: list[bool], affine: bool) -> Any:
    x, dy, w = new(4, 33), new(4, 33), new(33) if affine else None
    rstd = (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return dy, x, [33], rstd, w, mask


def _group_norm_backward(new: Callable[..., Tensor], mask: list[bool], affine: bool) -> Any:
    x, dy = new(2, 6, 5), new(2, 6, 5)
    w, b = (new(6), new(6)) if affine else (None, None)
    _, mean, rstd = aten.native_group_norm(x.contiguous(), w, b, 2, 6, 5, 3, 1e-5)
    return dy, x, mean, rstd, w, 2, 6, 5, 3, mask


def _batch_norm_backward(train: bool) -> Callable[..., Any]:
    def build(new: Callable[..., Tensor], mask: list[bool], affine: bool) -> Any:
        x, dy = new(3, 4, 5), new(3, 4, 5)
        w, b = (new(4), new(4)) if affine else (None, None)
        mean, var = new(4), new(4).abs() + 0.5
        saved = aten.native_batch_norm(x, w, b, mean.clone(), var.clone(), train, 0.1, 1e-5)[1:]
        return dy, x, w, mean, var, *saved, train, 1e-5, mask

    return build


ALL_THREE = [True, True, True]
#: backward ops whose operands must come from a forward call
FROM_FORWARD: dict[str, list[Callable[..., Any]]] = {
    "aten.native_layer_norm_backward.default": [
        lambda new: _layer_norm_backward(new, ALL_THREE, True),
        lambda new: _layer_norm_backward(new, [True, False, False], False),
        lambda new: _layer_norm_backward(new, [False, True, True], True),
    ],
    "aten._fused_rms_norm_backward.default": [
        lambda new: _rms_backward(new, [True, True], True),
        lambda new: _rms_backward(new, [True, False], False),
    ],
    "aten.native_group_norm_backward.default": [
        lambda new: _group_norm_backward(new, ALL_THREE, True),
        lambda new: _group_norm_backward(new, [True, False, False], False),
    ],
    "aten.native_batch_norm_backward.default": [
        lambda new: _batch_norm_backward(True)(new, ALL_THREE, True),
        lambda new: _batch_norm_backward(False)(new, ALL_THREE, True),
        lambda new: _batch_norm_backward(True)(new, [True, False, False], False),
    ],
}
#: results differ from call to call; they have tests of their own
RANDOM = {"aten.native_dropout.default"}


@functools.cache
def calls(name: str) -> list[Any]:
    """What to call an overload with: samples of its op that it takes, or builders."""
    if name in FROM_FORWARD:
        return list(FROM_FORWARD[name])
    return [s for s in OPS[name].samples if _takes(name, s)]


def _takes(name: str, sample: Call) -> bool:
    """Whether ATen accepts the sample for this overload, in the first dtype the op declares."""
    dtypes = [d for d in ("float32", *OPS[name].dtypes) if d in OPS[name].dtypes]
    args, kwargs = instantiate(sample, dtypes[0])
    try:
        one_node(overload(name), args, kwargs)
    except (RuntimeError, TypeError):
        return False
    return True


def make(call: Any, dtype: str, **how: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(call, Call):
        return instantiate(call, dtype, **how)
    return call(lambda *shape: fill(T(*shape), dtype, **how)), {}


# whole functions ----------------------------------------------------------------------------------


def trace(fn: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> fx.GraphModule:
    """fn as AOTAutograd would hand it over: ATen, decomposed, without mutation."""
    mode = "symbolic" if dynamic else "fake"
    pure = torch.func.functionalize(lambda *a: tree_leaves(fn(*a)), remove="mutations")
    return make_fx(pure, Decompositions(), tracing_mode=mode)(*inputs)


def lower(
    fn: Callable[..., Any],
    *inputs: Any,
    dynamic: bool = False,
    alone: bool = False,
    multiprocessors: int | None = None,
) -> tuple[list[Tensor], Report]:
    """Trace, compile and run on fresh memory; for a GPU with so many multiprocessors, or this."""
    graph = trace(fn, *inputs, dynamic=dynamic)
    how = options(alone=alone)
    if multiprocessors is not None:
        target = dataclasses.replace(how.target, multiprocessors=multiprocessors)
        how = dataclasses.replace(how, target=target)
    return run_poisoned(graph, list(tree_flatten(inputs)[0]), how)
