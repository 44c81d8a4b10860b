"""ATen nodes -> Values. What cannot be translated stays an ATen call, with a reason."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..kernels.op import OPS, Authored, Op
from .authored import lower_authored
from .builder import Builder
from .indexing import Size, is_one, is_static, size_of
from .ir import INTEGERS, SUPPORTED, Declined, SizeArg, Value, dtype_name
from .one_hot import sum_of_one_hot
from .overload import name_of
from .parts import normalize_axes
from .repeats import Repeats
from .spelling import parameters
from .symbols import hints_of, number_of
from .view_ops import VIEWS, negative_zero
from .views import Permute, Reshape
from .whole import WHOLE, lower_whole
from .writes import WRITES, lower_store


@dataclass
class Program:
    """The Values of one graph, in topological order, and how they map back to its nodes."""

    values: list[Value] = field(default_factory=list)
    of: dict[Node, Any] = field(default_factory=dict)  # node -> Value | SizeArg | tuple of them
    aten: dict[Node, str] = field(default_factory=dict)  # node run by ATen -> why
    made: dict[Node, list[Value]] = field(default_factory=dict)  # all that a node became
    #: of nodes that became what others did: after which recipe, of which operands
    recipes: dict[Node, tuple[Any, list[Value]]] = field(default_factory=dict)


def op_of(target: Any) -> Op | None:
    return OPS.get(name_of(target))


@functools.cache
def _schema(target: Any) -> list[tuple[str, Any, bool]]:
    return [
        (a.name, a.default_value if a.has_default_value() else None, a.kwarg_only)
        for a in target._schema.arguments
    ]


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
    """Walks a graph once. ``device`` is where kernels run; ``deny`` nodes stay ATen calls;
    ``alone``: a constant that is returned is a kernel's, too."""

    def __init__(
        self,
        device: torch.device,
        deny: dict[Node, str],
        multiprocessors: int,
        alone: bool = False,
    ) -> None:
        self.device, self.deny, self.alone = device, deny, alone
        self.program = Program()
        self.builder = _Recorder(self.program.values, multiprocessors)
        self.repeats = Repeats()
        # tensors by id, for the graph holds them: why kernels cannot touch them, or None ...
        self.unsupported: dict[int, str | None] = {}
        self.fine: set[int] = set()  # ... and those that they can, where they are

    # one node ------------------------------------------------------------------------------

    def run(self, graph: torch.fx.Graph) -> Program:
        self.builder.graph = graph
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
            out = self._lowered(node, val)
        except Declined as why:
            del self.program.values[mark:]
            self.program.aten[node] = str(why)
            out = self._memory(node)
        self.program.made[node] = self.program.values[mark:]
        return out

    def _lowered(self, node: Node, val: Any) -> Any:
        try:
            return self._lower(node, val)
        except TypeError as error:  # sympy's: a rule asks which of two symbolic sizes is larger
            if "truth value of Relational" not in str(error):
                raise
            raise Declined("which form its kernel has depends on symbolic sizes") from error

    def _memory(self, node: Node) -> Any:
        """The result of an ATen call or an input: a buffer, or whatever it is."""
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            size = size_of(val)
            return size if is_static(size) else SizeArg(size)
        if not isinstance(val, torch.Tensor) or self._unsupported(val):
            value = Value("buffer", "opaque", (), (), "opaque", node=node)
        else:
            value = Value(
                "buffer",
                "seed" if name_of(node.target) == "gems.seed.default" else None,
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
        name = name_of(node.target)
        view, op = VIEWS.get(name), OPS.get(name)
        if view is None and op is None and name not in WRITES and name not in WHOLE:
            raise Declined("no kernel is declared for it")
        self._check_tensors(node, val, op)
        args = map_arg(schema_args(node), self._operand)
        if name in WRITES:
            store = lower_store(self._for_node(node), node, args)
            store.node = node
            return store
        if name in WHOLE:
            return self._whole(name, args, node, val)
        if view is not None:
            return self._bind_view(view(self.builder, val, *args), node, val)
        assert op is not None  # or there is a view, see above
        if isinstance(op, Authored):
            results = val if isinstance(val, (tuple, list)) else (val,)
            made = [self._add(v) for v in lower_authored(self._for_node(None), op, args, results)]
            return self._bind(made if results is val else made[0], node, val)
        if op.declines is not None and (why := op.declines(*args)):
            raise Declined(why)
        if op.kind == "pointwise":
            return self._pointwise(op, args[: len(parameters(op))], node, val)
        if op.kind == "reduction":
            return self._bind(self._reduction(op, args, val), node, val)
        given, builder = args[: len(parameters(op)) - 1], self._for_node(node)
        values, make = self.program.values, functools.partial(op.body, builder, *given)
        result = self.repeats.made(op, given, values, make)
        if self.repeats.latest is not None:
            self.program.recipes[node] = self.repeats.latest
        return self._bind(result, node, val)

    def _for_node(self, node: Node | None) -> Builder:
        self.builder.origin = node
        return self.builder

    def _operand(self, node: Node) -> Any:
        value = self.program.of.get(node)
        val = node.meta.get("val")
        if id(val) not in self.fine and is_empty(val):
            return None  # absent: see _check_tensors
        if value is None or (isinstance(value, Value) and value.op == "opaque"):
            raise Declined(f"operand {node.name} is no plain tensor")
        return value

    def _check_tensors(self, node: Node, val: Any, op: Op | None) -> None:
        """A composite's further results may be empty, which says that they are absent; operands, of
        some (the saved statistics of a batch norm in evaluation)."""
        composite = op is not None and op.kind == "composite"
        absent = op is not None and op.absent
        for k, tensor in enumerate(_tensors(val)):
            self._check(tensor, "result", composite and k > 0)
        for k, arg in enumerate(node.all_input_nodes):
            whole = arg.meta.get("val")
            if id(whole) not in self.fine:
                for tensor in _tensors(whole):
                    self._check(tensor, arg, absent and k > 0)

    def _check(self, tensor: torch.Tensor, of: Node | str, may_be_empty: bool) -> None:
        if id(tensor) in self.fine or (may_be_empty and is_empty(tensor)):
            return
        what = of if isinstance(of, str) else f"operand {of.name}"
        if why := self._unsupported(tensor):
            raise Declined(f"{what} is {why}")
        if not is_static(*tensor.shape) and any(map(_unbacked, tensor.shape)):
            raise Declined(f"{what} has a size that depends on data")
        if tensor.device != self.device:
            raise Declined(f"{what} is on {tensor.device}, the kernels are on {self.device}")
        self.fine.add(id(tensor))

    def _unsupported(self, tensor: torch.Tensor) -> str | None:
        """``unsupported_tensor``, asked once of each that the graph holds."""
        known = self.unsupported
        place = id(tensor)
        if place not in known:
            known[place] = unsupported_tensor(tensor)
        return known[place]

    # results -------------------------------------------------------------------------------

    def _whole(self, name: str, args: Sequence[Any], node: Node, val: Any) -> Any:
        several = isinstance(val, (tuple, list))
        made = [self._add(v) for v in lower_whole(name, args, val if several else (val,))]
        picked = {u.args[1]: u for u in node.users if u.target is operator.getitem}
        for k, value in enumerate(made):
            value.node = picked.get(k, node) if several else node
        return tuple(made) if several else made[0]

    def _pointwise(self, op: Op, args: Sequence[Any], node: Node, val: torch.Tensor) -> Value:
        if not all(isinstance(a, _OPERANDS) for a in args):
            bad = next(a for a in args if not isinstance(a, _OPERANDS))
            raise Declined(f"operand {bad!r} is no tensor and no number")
        if any(map(negative_zero, args)):
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
            and _long_axes(base) == _long_axes(result)
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
        if self.alone and result.kind == "full" and any(map(_keeps, node.users)):
            return self._bind(result, node, val)
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


def _keeps(user: Node) -> bool:
    """Whether what it takes is in memory from then on."""
    return user.op == "output" or user.target is torch.ops.aten.copy_.default


def _long_axes(v: Value) -> list[Size]:
    return [s for s in v.shape if not is_one(s)]


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
        self.graph: torch.fx.Graph | None = None

    @functools.cached_property
    def hints(self) -> dict[Any, int]:
        return hints_of(self.graph) if self.graph is not None else {}

    def hint(self, size: Size) -> int | None:
        return size if type(size) is int else number_of(size, self.hints)

    def reduce(
        self,
        op: str,
        x: Value,
        axes: Sequence[int],
        dtype: str | None = None,
        split: bool = True,
    ) -> Value:
        """A reduction of single elements is none; a kernel could not tell its levels apart."""
        axes = normalize_axes(axes, x.ndim)
        if not _is_single(x, axes):
            known = sum_of_one_hot(self, x, axes) if op == "sum" else None
            if known is not None:
                return self.cast(known, dtype or x.dtype)
            return super().reduce(op, x, axes, dtype, split)
        return self._of_single(op, x, dtype or x.dtype)

    def scan(self, op: str, x: Value, axis: int, dtype: str | None = None) -> Value:
        if not _is_single(x, [axis]):
            return self._scan(op, x, axis, dtype)
        return self._of_single(op, x, dtype or x.dtype)

    def _scan(self, op: str, x: Value, axis: int, dtype: str | None) -> Value:
        return super().scan(op, x, axis, dtype)

    def _of_single(self, op: str, x: Value, dtype: str) -> Value:
        if op in ("argmax", "argmin"):
            return self.full(x.shape, 0, dtype)
        if op == "logsum":
            return self.call("sub", x, x, 1)  # 0, or NaN where x is infinite
        return self.cast(self.cast(x, "bool") if op in ("any", "all") else x, dtype)


def _is_single(x: Value, axes: Sequence[int]) -> bool:
    return all(is_one(x.shape[k]) for k in axes)


def _recorded(method: Callable[..., Value]) -> Callable[..., Value]:
    @functools.wraps(method)
    def wrapper(self: _Recorder, *args: Any, **kwargs: Any) -> Value:
        value = method(self, *args, **kwargs)
        last = self.values[-1] if self.values else None
        if value is not last:
            for a in args:
                if a is value:
                    break
            else:
                self.values.append(value)
        return value

    return wrapper


for _name in (
    "call",
    "cast",
    "copy",
    "full",
    "iota",
    "kept",
    "random_bits",
    "_reduce",
    "_partial",
    "_scan",
    "view",
    "concat",
    "patch",
    "gather",
    "store",
):
    setattr(_Recorder, _name, _recorded(getattr(_Recorder, _name)))

_OPERANDS = (Value, SizeArg, int, float, bool, str, type(None), torch.dtype)
CASTS = {"to_copy", "convert_element_type", "clone", "aligned_rows"}


def unsupported_tensor(tensor: torch.Tensor) -> str | None:
    """Why kernels cannot touch this tensor, or None."""
    if tensor.layout != torch.strided:
        return f"of layout {tensor.layout}"
    dtype = dtype_name(tensor.dtype)
    if dtype not in SUPPORTED:
        return f"of dtype {dtype}"
    if tensor.is_neg():
        return "a lazily negated view"
    return "empty" if is_empty(tensor) else None


def is_empty(val: Any) -> bool:
    """Whether it is a tensor that is known to have no elements."""
    if not isinstance(val, torch.Tensor):
        return False
    shape = val.shape
    return 0 in (shape if is_static(*shape) else [s for s in shape if type(s) is int])


def makes_nothing(node: Node) -> bool:
    """Whether all that a node returns are empty tensors."""
    val = node.meta.get("val")
    return all(map(is_empty, val)) if isinstance(val, (list, tuple)) else is_empty(val)


def _make_alone(node: Node) -> None:
    """Turn an empty part of a composite's result into a call that makes it."""
    val: Any = node.meta.get("val")
    if is_empty(val):
        node.target = torch.ops.aten.full.default
        node.args = (list(val.shape), 0)
        node.kwargs = {"dtype": val.dtype, "device": val.device}


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
