"""How ops are written down as values: what a composite's body and the translation build with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from ..kernels.op import BODIES
from .indexing import Size, is_static, product, simplify
from .ir import BITS, FLOATING, SIXTEEN_BIT, SizeArg, Value, is_dense
from .parts import (
    SPLITTABLE,
    contiguous_axis,
    count_of,
    normalize_axes,
    parts_of,
    parts_wanted,
    pays,
    row_shares,
)
from .views import Affine, Expand, Flip, Permute, Reshape, Slice, View


class Builder:
    """Makes Values. Composite ops receive one: ``b.exp(x)`` applies the declared op ``exp``."""

    def __init__(self, multiprocessors: int = 0) -> None:
        self.multiprocessors = multiprocessors  # 0: reductions are never split

    def hint(self, size: Size) -> int | None:
        """What a size was when the graph was traced, if that is known."""
        return size if is_static(size) else None

    # pointwise -----------------------------------------------------------------------------

    def call(self, name: str, *args: Any, dtype: str | None = None) -> Value:
        """The declared pointwise op ``name`` on Values and literals, broadcast together."""
        if name not in BODIES:
            raise KeyError(f"no op named {name} is declared")
        values = [a for a in args if isinstance(a, Value)]
        shape = broadcast_shapes([v.shape for v in values])
        strides = next((v.strides for v in values if v.shape == shape and is_dense(v)), None)
        dtype = dtype or result_dtype(values, args)
        return Value("pointwise", name, args, shape, dtype, strides=strides)

    def __getattr__(self, name: str) -> Callable[..., Value]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.call(name, *args, **kwargs)

    def cast(self, x: Value, dtype: str) -> Value:
        if x.dtype == dtype:
            return x
        return Value("cast", None, (x,), x.shape, dtype, strides=x.strides)

    def copy(self, x: Value) -> Value:
        """A fresh tensor with x's elements."""
        return Value("cast", None, (x,), x.shape, x.dtype)

    def full(self, shape: Sequence[Size], value: Any, dtype: str) -> Value:
        return Value("full", None, (value,), shape, dtype)

    def iota(self, shape: Sequence[Size], axis: int, dtype: str = "int64") -> Value:
        """The coordinate along ``axis``, as a tensor of ``shape``."""
        return Value("iota", None, (), shape, dtype, params=axis)

    def kept(self, shape: Sequence[Size], seed: Value, salt: int, threshold: int) -> Value:
        """Whether a random 32-bit word, a function of seed, salt and place, is at least that."""
        return Value("random", "kept", (seed, salt, threshold), shape, "bool")

    def random_bits(self, shape: Sequence[Size], seed: Value, salt: int, bits: int) -> Value:
        """The upper bits, fewer than 32, of such a word."""
        return Value("random", "bits", (seed, salt, bits), shape, "int32")

    # reductions ----------------------------------------------------------------------------

    def reduce(
        self,
        op: str,
        x: Value,
        axes: Sequence[int],
        dtype: str | None = None,
        split: bool = True,
    ) -> Value:
        """Reduce ``axes``, which stay with size 1.

        Few rows, or many rows under few columns, are reduced in two steps unless ``split`` is
        false: parts side by side, then the parts. Shares are parts that need not be of one size.
        """
        axes = normalize_axes(axes, x.ndim)
        parts, shares = 1, 1
        if split and op in SPLITTABLE:
            about = x, axes, self.multiprocessors, self.hint
            along = contiguous_axis(x) in axes
            shares = row_shares(*about, _loaded_bits(x)) if along else parts_wanted(*about)
            parts = self.row_parts(x, axes) if shares == 1 else 1
        if parts == shares == 1:
            return self._reduce(op, x, axes, dtype)
        hold = dtype or x.dtype
        wider = {"sum": "int64", "prod": "int64"}.get(op, hold)
        wide = "float32" if hold in SIXTEEN_BIT else (hold if hold in FLOATING else wider)
        if shares > 1:
            whole = self._reduce(op, self._partial(op, x, axes, shares, wide), (0,), hold)
        else:
            cut, inner, outer = self.split(x, axes, parts)
            found, outer = self.side_by_side(self._reduce(op, cut, inner, wide), outer)
            whole = self._reduce(op, found, outer, hold)
        return self.reshape(whole, [1 if k in axes else s for k, s in enumerate(x.shape)])

    def _partial(self, op: str, x: Value, axes: Sequence[int], shares: int, dtype: str) -> Value:
        whole = self._reduce_shape(x, axes)
        strides = (product(whole[0]), *whole[1]) if whole[1] else None
        return Value("partial", op, (x,), (shares, *whole[0]), dtype, params=axes, strides=strides)

    def split(
        self, x: Value, axes: Sequence[int], parts: int
    ) -> tuple[Value, tuple[int, ...], tuple[int, ...]]:
        """(x with one reduced axis cut in two, axes within a part, axes across parts).

        ``parts`` is what ``even_parts`` or ``parts_of`` said: a product of leading reduced axes
        and a divisor of the next.
        """
        outer: list[int] = []
        left = parts
        for axis in axes:
            size = x.shape[axis]
            if left % size == 0:
                outer.append(axis)
                left //= size
                continue
            shape = [*x.shape[:axis], left, size // left, *x.shape[axis + 1 :]]
            cut = self.reshape(x, shape)
            own = [a if a < axis else a + 1 for a in axes if a != axis and a not in outer]
            if left > 1:
                outer.append(axis)
            return cut, tuple(sorted([*own, axis + 1])), tuple(outer)
        raise ValueError("nothing is left inside a part")

    def side_by_side(self, x: Value, axes: tuple[int, ...]) -> tuple[Value, tuple[int, ...]]:
        """The results of parts along one of ``axes``, where nothing lies between those."""
        first, last = axes[0], axes[-1]
        if first == last or any(x.shape[k] != 1 for k in range(first, last) if k not in axes):
            return x, axes
        shape = [1 if k in axes else s for k, s in enumerate(x.shape)]
        shape[first] = product(x.shape[k] for k in axes)
        return self.reshape(x, shape), (first,)

    def _reduce(self, op: str, x: Value, axes: Sequence[int], dtype: str | None = None) -> Value:
        shape, strides = self._reduce_shape(x, axes)
        return Value("reduce", op, (x,), shape, dtype or x.dtype, params=axes, strides=strides)

    @staticmethod
    def _reduce_shape(
        x: Value, axes: Sequence[int]
    ) -> tuple[tuple[Size, ...], tuple[Size, ...] | None]:
        shape = tuple(1 if k in axes else s for k, s in enumerate(x.shape))
        return shape, _kept_innermost(x, shape)

    def scan(self, op: str, x: Value, axis: int, dtype: str | None = None) -> Value:
        """The results of ``op`` over the elements up to each place along ``axis``."""
        strides = x.strides if is_dense(x) else None
        axes = normalize_axes([axis], x.ndim)
        return Value("scan", op, (x,), x.shape, dtype or x.dtype, params=axes, strides=strides)

    def sum(self, x: Value, axes: Sequence[int]) -> Value:
        return self.reduce("sum", x, axes)

    def amax(self, x: Value, axes: Sequence[int]) -> Value:
        return self.reduce("amax", x, axes)

    def mean(self, x: Value, axes: Sequence[int]) -> Value:
        n = self.size_number(count_of(x, axes))
        return self.call("div", self.sum(x, axes), n)

    def count(self, x: Value, axes: Sequence[int]) -> Size:
        return count_of(x, axes)

    def even_parts(self, x: Value, axes: Sequence[int], longest: int | None = None) -> int:
        """In how many parts of one size, about ``longest`` at the most, a reduction should run:
        what ``split`` takes."""
        axes = normalize_axes(axes, x.ndim)
        wanted = parts_wanted(x, axes, self.multiprocessors, self.hint)
        if wanted == 1 or not is_static(*x.shape):
            return 1
        if longest is not None:
            wanted = max(wanted, -(-count_of(x, axes) // longest))
        return parts_of(x, axes, wanted, count_of(x, axes) // 32)

    def row_parts(self, x: Value, axes: Sequence[int], passes: int = 1) -> int:
        """In how many parts of one size few long rows should be reduced, in a launch of their own:
        what ``split`` takes. ``passes``: how often one program for each would read and write it."""
        axes = normalize_axes(axes, x.ndim)
        if not axes or not is_static(*x.shape) or contiguous_axis(x) not in axes:
            return 1
        length, many = count_of(x, axes), self.multiprocessors
        rows, row = product(x.shape) // max(1, length), length * _loaded_bits(x) // 8
        if not many or not pays(rows, row, passes, many):
            return 1
        return parts_wanted(x, axes, many, self.hint)

    def sum_of_parts(self, x: Value, axes: Sequence[int]) -> Value:
        """The sum of few parts, in one step."""
        return self._reduce("sum", x, normalize_axes(axes, x.ndim))

    def size_number(self, size: Size) -> Any:
        """A size as an operand: a literal when static."""
        return size if is_static(size) else SizeArg(size)

    # views ---------------------------------------------------------------------------------

    def view(self, x: Value, view: View) -> Value:
        if view.trivial:
            return x
        strides = view.strides(x.strides)
        return Value("view", None, (x,), view.shape, x.dtype, params=view, strides=strides)

    def permute(self, x: Value, dims: Sequence[int]) -> Value:
        return self.view(x, Permute(x.shape, dims))

    def reshape(self, x: Value, shape: Sequence[Size]) -> Value:
        static = is_static(*x.shape, *shape)
        view = _reshape(x.shape, tuple(shape)) if static else Reshape(x.shape, shape)
        return self.view(x, view)

    def expand(self, x: Value, shape: Sequence[Size]) -> Value:
        return self.view(x, Expand(x.shape, shape))

    def slice(self, x: Value, axis: int, start: Size, stop: Size, step: int = 1) -> Value:
        return self.view(x, Slice(x.shape, axis, start, stop, step))

    def affine(
        self,
        x: Value,
        shape: Sequence[Size],
        starts: Sequence[Size],
        steps: Sequence[Sequence[tuple[int, Size]]],
    ) -> Value:
        return self.view(x, Affine(x.shape, shape, starts, steps))

    def flip(self, x: Value, dims: Sequence[int]) -> Value:
        return self.view(x, Flip(x.shape, dims))

    def squeeze(self, x: Value, axes: Sequence[int]) -> Value:
        axes = normalize_axes(axes, x.ndim)
        return self.reshape(x, [s for k, s in enumerate(x.shape) if k not in axes])

    def unsqueeze(self, x: Value, axes: Sequence[int], ndim: int) -> Value:
        """Insert size-1 axes so that x has ``ndim`` dims."""
        axes = normalize_axes(axes, ndim)
        rest = iter(x.shape)
        return self.reshape(x, [1 if k in axes else next(rest) for k in range(ndim)])

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        axis %= parts[0].ndim
        total: Size = 0
        for part in parts:
            total = total + part.shape[axis]
        shape = list(parts[0].shape)
        shape[axis] = simplify(total)
        return Value("concat", None, parts, shape, parts[0].dtype, params=axis)

    def patch(self, x: Value, src: Value, places: Sequence[tuple[int, Size, int]]) -> Value:
        """x with src in the places ``start, start + step, ...`` along each (axis, start, step)."""
        return Value("patch", None, (x, src), x.shape, x.dtype, params=tuple(places))

    def gather(
        self,
        base: Value,
        indices: Sequence[tuple[int, Value]],
        places: Sequence[int | None],
        shape: Sequence[Size],
        wrap: bool = True,
    ) -> Value:
        """``base`` read at computed places.

        For each axis of base: ``indices`` holds (axis, index Value broadcastable to ``shape``);
        every other axis k of base runs along axis ``places[k]`` of the result. Negative indices
        count from the end when ``wrap``.
        """
        axes = tuple(a for a, _ in indices)
        args = (base, *(v for _, v in indices))
        return Value("gather", None, args, shape, base.dtype, params=(axes, tuple(places), wrap))

    def store(
        self,
        target: Value,
        values: Value,
        indices: Sequence[tuple[int, Value]],
        places: Sequence[int | None],
        shape: Sequence[Size],
        wrap: bool,
        how: str = "",
    ) -> Value:
        """A write of ``values``, broadcast to ``shape``, into the memory of ``target``.

        ``indices``, ``places`` and ``wrap`` say where, as they do for a gather's base; ``how`` is
        the atomic operation with what is there ("add", "max", "min"), if any. The target is no
        operand: nothing of it is read.
        """
        axes = tuple(a for a, _ in indices)
        args = (values, *(v for _, v in indices))
        params = (target, axes, tuple(places), wrap, how)
        return Value("store", None, args, shape, target.dtype, params=params)


@lru_cache(4096)
def _reshape(src: tuple[int, ...], shape: tuple[int, ...]) -> Reshape:
    """Of equal layers, one View: what follows from it is found out once."""
    return Reshape(src, shape)


def _loaded_bits(x: Value) -> int:
    """What a kernel loads for an element of x."""
    while x.kind in ("view", "cast"):
        x = x.args[0]
    return BITS[x.dtype]


def _kept_innermost(x: Value, shape: Sequence[Size]) -> tuple[Size, ...] | None:
    """A layout for a reduction's result that keeps x's order of axes: strides, or None."""
    if not is_static(*x.strides, *shape):
        return None
    order = sorted(range(len(shape)), key=lambda k: (x.strides[k], -k))
    strides, step = [1] * len(shape), 1
    for k in order:
        strides[k] = step
        step *= shape[k]
    return tuple(strides)


def broadcast_shapes(shapes: Sequence[Sequence[Size]]) -> tuple[Size, ...]:
    if shapes and shapes.count(shapes[0]) == len(shapes):
        return tuple(shapes[0])
    ndim = max((len(s) for s in shapes), default=0)
    out: list[Size] = [1] * ndim
    for shape in shapes:
        for k, size in enumerate(shape):
            place = ndim - len(shape) + k
            if type(out[place]) is int and out[place] == 1:
                out[place] = size
    return tuple(out)


_ORDER = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
]


def result_dtype(values: Sequence[Value], args: Sequence[Any] = ()) -> str:
    """torch's promotion among tensors and Python numbers (0-d tensors are not special here)."""
    dtypes = {v.dtype for v in values}
    if len(dtypes) == 1 and not dtypes.isdisjoint(FLOATING):
        return values[0].dtype
    if {"float16", "bfloat16"} <= dtypes:
        dtypes.add("float32")
    best = max(dtypes, key=_ORDER.index) if dtypes else "int64"
    has_float = any(type(a) is float for a in args)
    has_int = any(type(a) is int for a in args)
    if has_float and best not in FLOATING:
        return "float32"
    if has_int and best == "bool":
        return "int64"
    return best


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
