"""ATen nodes -> Values. What cannot be translated stays an ATen call, with a reason."""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..kernels.op import OPS, Op
from .indexing import Size, is_static, simplify, size_of
from .ir import INTEGERS, SUPPORTED, Builder, SizeArg, Value, normalize_axes, result_dtype
from .views import Permute, Reshape


@dataclass
class Program:
    """The Values of one graph, in topological order, and how they map back to its nodes."""

    values: list[Value] = field(default_factory=list)
    of: dict[Node, Any] = field(default_factory=dict)  # node -> Value | SizeArg | tuple of them
    aten: dict[Node, str] = field(default_factory=dict)  # node run by ATen -> why
    made: dict[Node, list[Value]] = field(default_factory=dict)  # all that a node became


class Declined(Exception):
    """This node stays an ATen call; the message says why."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def op_of(target: Any) -> Op | None:
    return OPS.get(str(target)) if isinstance(target, torch._ops.OpOverload) else None


@functools.cache
def _schema(target: Any) -> list[tuple[str, Any, bool]]:
    return [
        (a.name, a.default_value if a.has_default_value() else None, a.kwarg_only)
        for a in target._schema.arguments
    ]


@functools.cache
def _arity(op: Op) -> int:
    return len(inspect.signature(getattr(op.body, "fn", op.body)).parameters)


def schema_args(node: Node) -> list[Any]:
    """Every argument of the node's schema in order, defaults filled in."""
    out = []
    for place, (name, default, kwarg_only) in enumerate(_schema(node.target)):
        if not kwarg_only and place < len(node.args):
            out.append(node.args[place])
        else:
            out.append(node.kwargs.get(name, default))
    return out


class Translator:
    """Walks a graph once. ``device`` is where kernels run; ``deny`` nodes stay ATen calls."""

    def __init__(self, device: torch.device, deny: dict[Node, str], multiprocessors: int) -> None:
        self.device, self.deny = device, deny
        self.program = Program()
        self.builder = _Recorder(self.program.values, multiprocessors)

    # one node ------------------------------------------------------------------------------

    def run(self, graph: torch.fx.Graph) -> Program:
        for node in graph.nodes:
            if node.op == "output":
                continue
            if node.op != "call_function":
                self.program.of[node] = self._memory(node)
            elif node.target is operator.getitem and node.args[0] in self.program.of:
                whole = self.program.of[node.args[0]]
                picked = whole[node.args[1]] if isinstance(whole, (tuple, list)) else None
                if picked is None and isinstance(whole, tuple):
                    _make_alone(node)
                self.program.of[node] = picked if picked is not None else self._memory(node)
            else:
                self.program.of[node] = self._translate(node)
        return self.program

    def _translate(self, node: Node) -> Any:
        val = node.meta.get("val")
        if isinstance(val, (torch.SymInt, int)) and not isinstance(val, bool):
            size = size_of(val)
            if _unbacked(val):
                self.program.aten[node] = "a number that depends on data"
            return size if is_static(size) else SizeArg(size)
        mark = len(self.program.values)
        try:
            if node in self.deny:
                raise Declined(self.deny[node])
            out = self._lower(node, val)
        except Declined as why:
            del self.program.values[mark:]
            self.program.aten[node] = str(why)
            out = self._memory(node)
        self.program.made[node] = self.program.values[mark:]
        return out

    def _memory(self, node: Node) -> Any:
        """The result of an ATen call or an input: a buffer, or whatever it is."""
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            size = size_of(val)
            return size if is_static(size) else SizeArg(size)
        if not isinstance(val, torch.Tensor) or unsupported_tensor(val):
            value = Value("buffer", "opaque", (), (), "opaque", node=node)
        else:
            value = Value(
                "buffer",
                None,
                (),
                [size_of(s) for s in val.shape],
                dtype_name(val.dtype),
                strides=[size_of(s) for s in val.stride()],
                node=node,
            )
        self.program.values.append(value)
        return value

    def _lower(self, node: Node, val: Any) -> Any:
        if not isinstance(node.target, torch._ops.OpOverload):
            raise Declined("not an ATen operator")
        name = str(node.target)
        view = VIEWS.get(name)
        op = op_of(node.target)
        if view is None and op is None:
            raise Declined("no kernel is declared for it")
        self._check_tensors(node, val, composite=op is not None and op.kind == "composite")
        args = map_arg(schema_args(node), self._operand)
        if view is not None:
            return self._bind_view(view(self.builder, val, *args), node, val)
        if op.declines is not None and (why := op.declines(*args)):
            raise Declined(why)
        if op.kind == "pointwise":
            return self._pointwise(op, args[: _arity(op)], node, val)
        if op.kind == "reduction":
            return self._bind(self._reduction(op, args, val), node, val)
        result = op.body(self._for_node(node), *args[: _arity(op) - 1])
        return self._bind(result, node, val)

    def _for_node(self, node: Node) -> Builder:
        self.builder.origin = node
        return self.builder

    def _operand(self, node: Node) -> Any:
        value = self.program.of.get(node)
        if _is_empty(node.meta.get("val")):
            return None  # of a composite: see _check_tensors
        if value is None or (isinstance(value, Value) and value.op == "opaque"):
            raise Declined(f"operand {node.name} is no plain tensor")
        return value

    def _check_tensors(self, node: Node, val: Any, composite: bool) -> None:
        """A composite's further operands and results may be empty, which says that they are absent
        (the saved statistics of a batch norm in evaluation)."""
        for k, tensor in enumerate(_tensors(val)):
            if not (composite and k and _is_empty(tensor)):
                self._check(tensor, "result")
        for k, arg in enumerate(node.all_input_nodes):
            for tensor in _tensors(arg.meta.get("val")):
                if not (composite and k and _is_empty(tensor)):
                    self._check(tensor, f"operand {arg.name}")

    def _check(self, tensor: torch.Tensor, what: str) -> None:
        if why := unsupported_tensor(tensor):
            raise Declined(f"{what} is {why}")
        if any(_unbacked(s) for s in tensor.shape):
            raise Declined(f"{what} has a size that depends on data")
        if tensor.device != self.device:
            raise Declined(f"{what} is on {tensor.device}, the kernels are on {self.device}")

    # results -------------------------------------------------------------------------------

    def _pointwise(self, op: Op, args: Sequence[Any], node: Node, val: torch.Tensor) -> Value:
        if not all(isinstance(a, _OPERANDS) for a in args):
            bad = next(a for a in args if not isinstance(a, _OPERANDS))
            raise Declined(f"operand {bad!r} is no tensor and no number")
        if any(map(_negative_zero, args)):
            raise Declined("negative zero as a literal")
        shape, dtype = [size_of(s) for s in val.shape], dtype_name(val.dtype)
        if dtype in INTEGERS and not INTEGERS & set(op.dtypes):
            raise Declined(f"its kernel is not for {dtype}")
        strides = [size_of(s) for s in val.stride()]
        if op.name in CASTS:
            return self._add(
                Value("cast", None, args[:1], shape, dtype, strides=strides, node=node)
            )
        return self._add(
            Value("pointwise", op.name, args, shape, dtype, strides=strides, node=node)
        )

    def _reduction(self, op: Op, args: Sequence[Any], val: torch.Tensor) -> Value:
        x = args[0]
        dims = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple, int)) else None
        axes = [dims] if isinstance(dims, int) else dims
        axes = axes if axes else list(range(x.ndim))
        self.builder.origin = None
        out = op.body(self.builder, x, normalize_axes(axes, x.ndim), dtype_name(val.dtype))
        if out.ndim != val.ndim:
            out = self.builder.squeeze(out, axes)
        return out

    def _bind(self, result: Any, node: Node, val: Any) -> Any:
        if isinstance(result, (tuple, list)):
            users = {u.args[1]: u for u in node.users if u.target is operator.getitem}
            for k, (out, v) in enumerate(zip(result, val, strict=True)):
                if out is None and k in users and isinstance(v, torch.Tensor) and v.numel():
                    raise Declined(f"its result {k} is wanted, which the kernel does not make")
            return tuple(
                None if v is None or out is None else self._bind(out, users.get(k, node), v)
                for k, (out, v) in enumerate(zip(result, val, strict=True))
            )
        b = self.builder
        b.origin = node
        dtype = dtype_name(val.dtype)
        fresh = result.computes and result.node is None and result.kind not in ("full", "iota")
        base = result.args[0] if result.kind == "view" else result
        squeezed = (
            result.kind == "view"
            and isinstance(result.params, Reshape)
            and base.computes
            and base.node is None
            and base.kind == "reduce"
        )
        if result.dtype != dtype or not (fresh or squeezed):
            result = self._add(Value("cast", None, (result,), result.shape, dtype))
            squeezed = False
        strides = [size_of(s) for s in val.stride()]
        if squeezed:  # the reduction is stored with its size-1 axes, in the layout asked for
            rest = iter(strides)
            own = iter(result.shape)
            base.strides = tuple(
                1 if type(s) is int and s == 1 else _next_stride(rest, own) for s in base.shape
            )
            base.node = node
        result.strides, result.node = tuple(strides), node
        return result

    def _bind_view(self, result: Any, node: Node, val: Any) -> Any:
        if isinstance(result, (tuple, list)):
            return tuple(map(self._as_view, result))
        if (result.kind == "full" and result.node is None) or (
            result.kind == "view" and result.node is None
        ):
            result.node = node
            result.strides = tuple(size_of(s) for s in val.stride())
        elif result.computes and result.node is None:
            return self._bind(result, node, val)
        return result

    def _as_view(self, piece: Value) -> Value:
        """A part that is all of its tensor (a split into one) is a view of it still."""
        if piece.kind == "view":
            return piece
        same = Permute(piece.shape, range(piece.ndim))
        return self._add(Value("view", None, (piece,), piece.shape, piece.dtype, params=same))

    def _add(self, value: Value) -> Value:
        self.program.values.append(value)
        return value


def _next_stride(strides: Any, sizes: Any) -> Size:
    """The stride of the next axis whose size is not 1."""
    for stride, size in zip(strides, sizes, strict=False):
        if not (type(size) is int and size == 1):
            return stride
    return 1


class _Recorder(Builder):
    """A Builder that appends what it makes to the program."""

    def __init__(self, values: list[Value], multiprocessors: int) -> None:
        super().__init__(multiprocessors)
        self.values = values
        self.origin: Node | None = None

    def reduce(self, op: str, x: Value, axes: Sequence[int], dtype: str | None = None) -> Value:
        """A reduction of single elements is none; a kernel could not tell its levels apart."""
        lengths = [x.shape[k] for k in normalize_axes(axes, x.ndim)]
        if not all(type(n) is int and n == 1 for n in lengths):
            return super().reduce(op, x, axes, dtype)
        dtype = dtype or x.dtype
        if op in ("argmax", "argmin"):
            return self.full(x.shape, 0, dtype)
        return self.cast(self.cast(x, "bool") if op in ("any", "all") else x, dtype)


def _recorded(method: Callable[..., Value]) -> Callable[..., Value]:
    @functools.wraps(method)
    def wrapper(self: _Recorder, *args: Any, **kwargs: Any) -> Value:
        value = method(self, *args, **kwargs)
        if not self.values or self.values[-1] is not value:
            known = any(isinstance(a, Value) and a is value for a in args)
            if not known:
                self.values.append(value)
        return value

    return wrapper


for _name in (
    "call",
    "cast",
    "copy",
    "full",
    "iota",
    "random",
    "_reduce",
    "view",
    "concat",
    "gather",
):
    setattr(_Recorder, _name, _recorded(getattr(_Recorder, _name)))

_OPERANDS = (Value, SizeArg, int, float, bool, str, type(None), torch.dtype)
CASTS = {"to_copy", "convert_element_type", "clone"}


def unsupported_tensor(tensor: torch.Tensor) -> str | None:
    """Why kernels cannot touch this tensor, or None."""
    if tensor.layout != torch.strided:
        return f"of layout {tensor.layout}"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_neg() or tensor.is_conj():
        return "a lazily negated or conjugated view"
    if dtype_name(tensor.dtype) not in SUPPORTED:
        return f"of dtype {dtype_name(tensor.dtype)}"
    return "empty" if _is_empty(tensor) else None


def _is_empty(val: Any) -> bool:
    return isinstance(val, torch.Tensor) and any(type(s) is int and s == 0 for s in val.shape)


def _make_alone(node: Node) -> None:
    """Turn an empty part of a composite's result into a call that makes it."""
    val = node.meta.get("val")
    if _is_empty(val):
        node.target = torch.ops.aten.full.default
        node.args = (list(val.shape), 0)
        node.kwargs = {"dtype": val.dtype, "device": val.device}


def _negative_zero(value: Any) -> bool:
    """Triton drops the sign of a literal -0.0."""
    return type(value) is float and value == 0.0 and math.copysign(1.0, value) < 0


def _unbacked(size: Any) -> bool:
    if type(size) is int:
        return False
    return any(str(s).startswith(("u", "zuf")) for s in size.node.expr.free_symbols)


def _tensors(val: Any) -> list[torch.Tensor]:
    if isinstance(val, torch.Tensor):
        return [val]
    if isinstance(val, (tuple, list)):
        return [t for v in val for t in _tensors(v)]
    return []


# views ---------------------------------------------------------------------------------------


def _shape(val: torch.Tensor) -> list[Size]:
    return [size_of(s) for s in val.shape]


def _reshape(b: Builder, val: torch.Tensor, x: Value, *_: Any) -> Value:
    return b.reshape(x, _shape(val))


def _slice(
    b: Builder, val: Any, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    size = x.shape[dim]
    first = _clamp(0 if start is None else start, size)
    if first is None:
        raise Declined("slice with a symbolic start")
    length = size_of(val.shape[dim])
    return b.slice(
        x,
        dim,
        first,
        simplify(first + length * step) if step == 1 else first + (length - 1) * step + 1,
        step,
    )


def _clamp(start: Any, size: Size) -> Size | None:
    """A slice's start as an offset from 0; None when it depends on a symbol's value."""
    if isinstance(start, SizeArg) or not isinstance(start, int):
        return None
    if start >= 0:
        return min(start, size) if is_static(size) else (start if start == 0 else None)
    return max(start + size, 0) if is_static(size) else None


def _select(b: Builder, val: Any, x: Value, dim: int, index: Any) -> Value:
    if not isinstance(index, int):
        raise Declined("select with a symbolic index")
    start = index if index >= 0 else simplify(x.shape[dim] + index)
    return b.reshape(b.slice(x, dim, start, start + 1), _shape(val))


def _expand(b: Builder, val: Any, x: Value, *_: Any) -> Value:
    return b.expand(x, _shape(val))


def _permute(b: Builder, val: Any, x: Value, dims: Sequence[int]) -> Value:
    return b.permute(x, dims)


def _transpose(b: Builder, val: Any, x: Value, d0: int, d1: int) -> Value:
    dims = list(range(x.ndim))
    if dims:
        dims[d0], dims[d1] = dims[d1], dims[d0]
    return b.permute(x, dims)


def _t(b: Builder, val: Any, x: Value) -> Value:
    return b.permute(x, list(reversed(range(x.ndim))))


def _split(b: Builder, val: Any, x: Value, _size: Any, dim: int = 0) -> tuple[Value, ...]:
    out, start = [], 0
    for piece in val:
        length = size_of(piece.shape[dim])
        out.append(b.slice(x, dim, start, simplify(start + length)))
        start = simplify(start + length)
    return tuple(out)


def _unbind(b: Builder, val: Any, x: Value, dim: int = 0) -> tuple[Value, ...]:
    return tuple(_select(b, piece, x, dim, k) for k, piece in enumerate(val))


def _flip(b: Builder, val: Any, x: Value, dims: Sequence[int]) -> Value:
    return b.copy(b.flip(x, dims))


def _cat(b: Builder, val: torch.Tensor, parts: Sequence[Value], dim: int = 0) -> Value:
    if len(parts) > 8:
        raise Declined(f"{len(parts)} parts; up to 8 are fused")
    if any(p.ndim != val.ndim for p in parts):
        raise Declined("parts of several ranks")
    dtype = dtype_name(val.dtype)
    return b.concat([b.cast(p, dtype) for p in parts], dim)


def _stack(b: Builder, val: torch.Tensor, parts: Sequence[Value], dim: int = 0) -> Value:
    dim %= val.ndim
    return _cat(b, val, [b.unsqueeze(p, [dim], val.ndim) for p in parts], dim)


def _pad(b: Builder, val: torch.Tensor, x: Value, pad: Sequence[Any], value: Any = 0) -> Value:
    if not all(isinstance(p, int) and p >= 0 for p in pad):
        raise Declined("negative or symbolic padding")
    for k in range(len(pad) // 2):
        axis = x.ndim - 1 - k
        before, after = pad[2 * k], pad[2 * k + 1]
        for amount, first in ((before, True), (after, False)):
            if amount:
                shape = [amount if a == axis else s for a, s in enumerate(x.shape)]
                edge = b.full(shape, value or 0, x.dtype)
                x = b.concat([edge, x] if first else [x, edge], axis)
    return x


def _full(b: Builder, val: torch.Tensor, size: Any, value: Any, *_: Any) -> Value:
    if not isinstance(value, (int, float, SizeArg)):
        raise Declined("fill value is no number")
    if _negative_zero(value):
        raise Declined("negative zero as a literal")
    return b.full(_shape(val), value, dtype_name(val.dtype))


def _constant(value: int) -> Callable[..., Value]:
    return lambda b, val, *_: b.full(_shape(val), value, dtype_name(val.dtype))


def _scalar(b: Builder, val: torch.Tensor, value: Any, *_: Any) -> Value:
    return _full(b, val, (), value)


def _arange(b: Builder, val: torch.Tensor, start: Any, end: Any, step: Any = 1, *_: Any) -> Value:
    dtype = dtype_name(val.dtype)
    if dtype not in ("int64", "int32") or not all(
        isinstance(n, (int, SizeArg)) for n in (start, step)
    ):
        raise Declined("arange of floats")
    out = b.iota(_shape(val), 0)
    if step != 1:
        out = b.call("mul", out, step)
    if start != 0:
        out = b.call("add", out, start, 1)
    return b.cast(out, dtype)


VIEWS: dict[str, Callable[..., Any]] = {
    "aten.view.default": _reshape,
    "aten._unsafe_view.default": _reshape,
    "aten.reshape.default": _reshape,
    "aten._reshape_alias.default": _reshape,
    "aten.unsqueeze.default": _reshape,
    "aten.squeeze.default": _reshape,
    "aten.squeeze.dim": _reshape,
    "aten.squeeze.dims": _reshape,
    "aten.expand.default": _expand,
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.t.default": _t,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.unbind.int": _unbind,
    "aten.flip.default": _flip,
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.constant_pad_nd.default": _pad,
    "aten.full.default": _full,
    "aten.full_like.default": _full,
    "aten.zeros.default": _constant(0),
    "aten.zeros_like.default": _constant(0),
    "aten.ones.default": _constant(1),
    "aten.ones_like.default": _constant(1),
    "aten.new_zeros.default": _constant(0),
    "aten.new_ones.default": _constant(1),
    "aten.new_full.default": lambda b, val, x, size, value, *_: _full(b, val, size, value),
    "aten.scalar_tensor.default": _scalar,
    "aten.arange.default": lambda b, val, end, *_: _arange(b, val, 0, end),
    "aten.arange.start": lambda b, val, start, end, *_: _arange(b, val, start, end),
    "aten.arange.start_step": _arange,
}


def common_dtype(values: Sequence[Value], args: Sequence[Any]) -> str:
    """torch.result_type: tensors of no dims yield to tensors with dims of the same category."""
    big = [v for v in values if v.ndim] or list(values)
    small = [v for v in values if not v.ndim]
    best = result_dtype(big, args)
    for v in small:
        if _category(v.dtype) > _category(best):
            best = v.dtype
    return best


def _category(dtype: str) -> int:
    return 0 if dtype == "bool" else 2 if "float" in dtype else 1
