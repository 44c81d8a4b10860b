"""Repairs to Triton's interpreter, so that kernels run on a CPU give a GPU's numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# NumPy warns of what masked lanes compute (0 / 0, log(0)); a GPU does not
_QUIET = ("create_dot", "binary_op", "ternary_op", "unary_op", "create_idiv", "create_rsqrt")


def repair() -> None:
    """Repair the interpreter, once; without ``TRITON_INTERPRET=1`` there is nothing to do.

    - A cast to bfloat16 rounds to nearest even; Triton 3.6 and 3.7 truncate float32, and read
      any other type's bits as bfloat16.
    - ``tl.fma`` rounds once.
    - A comparison of two scalars is a truth value to what follows, not a float.
    - Integers wrap, as on a GPU, where the interpreter asserts that int32 does not overflow.
    - No NumPy warnings from masked lanes.
    - A loop's bound may be a scalar that NumPy holds in an array: Triton 3.6 with NumPy 2.4.
    - A scan or a reduction with a function of ours combines whole rows, not one element after
      another.
    - Matrices of bfloat16 are multiplied as such, not their bits.
    - ``~x`` of unsigned integers: NumPy 2 makes no such number of -1.
    - bfloat16 is added atomically, each sum rounded, and so is one number to many places.
    - ``triton.language`` is patched once a kernel, and not again in each call of a device function:
      half of an interpreted kernel's time.
    """
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired_by_gems", False):
        return

    patch_tensor = interpreter._patch_lang_tensor

    def patched_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched_tensor
    _repair_builder(interpreter, builder)
    _patch_once(interpreter)
    interpreter.ScanOps.generic_scan = _scan_by_doubling
    interpreter.ReduceOps.generic_reduce = _reduce_by_halving
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    builder.repaired_by_gems = True


def _patch_once(interpreter: Any) -> None:
    """Let device functions find the language as their kernel had it patched."""
    patch_lang, patched = interpreter._patch_lang, set[Any]()

    @functools.cache
    def languages(fn: Any) -> set[Any]:
        return {v for v in fn.__globals__.values() if v is tl or v is tl.core}

    def patch_for_kernel(fn: Any) -> Any:
        scope = patch_lang(fn)
        patched.update(languages(fn))
        restore = scope.restore

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not languages(self.fn) <= patched:
            patch_lang(self.fn)
            patched.update(languages(self.fn))
        fn = self.rewrite()
        try:
            return fn(*args, **kwargs)
        except Exception as e:
            raise interpreter.InterpreterError(repr(e)) from e

    interpreter._patch_lang = patch_for_kernel
    interpreter.InterpretedFunction.__call__ = call


def _quiet(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method without NumPy's warnings."""
    import numpy as np

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return method(*args, **kwargs)

    return call


def _repair_builder(interpreter: Any, builder: Any) -> None:
    """What single operations compute."""
    import numpy as np

    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        to_bfloat16 = target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16
        if not to_bfloat16:
            return cast(self, source, target)
        return interpreter.TensorHandle(_bfloat16_bits(source.data), target.scalar)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # a float32 product is exact in float64
        wide = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    binary_op = builder.binary_op

    def typed_binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        result = binary_op(self, left, right, op)
        if result.data.dtype == np.bool_:
            result.dtype = tl.int1
        return result

    atomic_rmw = builder.create_atomic_rmw

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *how: Any) -> Any:
        if val.dtype.scalar == tl.bfloat16:  # for which Triton has no other operation
            old = _add_bfloat16(ptr.data, val.data, mask.data)
            return interpreter.TensorHandle(old, tl.bfloat16)
        whole = [
            interpreter.TensorHandle(np.ascontiguousarray(t.data), t.dtype)
            for t in (ptr, val, mask)
        ]
        return atomic_rmw(self, op, *whole, *how)

    create_dot = builder.create_dot

    def create_wide_dot(self: Any, a: Any, b: Any, *how: Any) -> Any:
        wide = (
            interpreter.TensorHandle(_widened(t.data), tl.float32)
            if t.dtype.scalar == tl.bfloat16
            else t
            for t in (a, b)
        )
        return create_dot(self, *wide, *how)

    all_ones = builder.get_all_ones_value

    def get_all_ones_value(self: Any, type: Any) -> Any:
        bits = type.scalar.primitive_bitwidth
        if bits == 1 or not type.scalar.is_int_unsigned():
            return all_ones(self, type)
        unsigned = f"uint{bits}"
        return interpreter.TensorHandle(~np.zeros(1, unsigned), type.scalar)

    builder.create_dot = create_wide_dot
    builder.get_all_ones_value = get_all_ones_value
    builder.binary_op = typed_binary_op
    for name in _QUIET:
        setattr(builder, name, _quiet(getattr(builder, name)))
    builder.cast_impl = _quiet(cast_impl)
    builder.create_fma = _quiet(create_fma)
    builder.create_atomic_rmw = create_atomic_rmw


def _scan_by_doubling(self: Any, given: Any) -> list[Any]:
    """Each element combined with what lies 1, then 2, then 4, ... places before it."""
    import numpy as np

    axis, dtypes = self.axis, [t.dtype for t in given]
    state = [t.handle.data for t in given]
    shape = state[0].shape
    place = np.arange(shape[axis]).reshape([-1 if k == axis else 1 for k in range(len(shape))])
    step = 1
    while step < shape[axis]:
        parts = (*(np.roll(d, step, axis) for d in state), *state)
        made = self.combine_fn.fn(*map(self.to_tensor, parts, (*dtypes, *dtypes)))
        made = made if isinstance(made, tuple) else (made,)
        state = [np.where(place < step, d, m.handle.data) for d, m in zip(state, made, strict=True)]
        step *= 2
    return [self.to_tensor(d, t) for d, t in zip(state, dtypes, strict=True)]


def _reduce_by_halving(self: Any, given: Any) -> list[Any]:
    """Upper halves combined with lower ones until one element is left: tiles are powers of two."""
    import numpy as np

    axis = self.axis
    dtypes, state = [t.dtype for t in given], [t.handle.data for t in given]
    while state[0].shape[axis] > 1:
        halves = [np.split(d, 2, axis) for d in state]
        parts = (*(low for low, _ in halves), *(high for _, high in halves))
        made = self.combine_fn.fn(*map(self.to_tensor, parts, (*dtypes, *dtypes)))
        made = made if isinstance(made, tuple) else (made,)
        state = [m.handle.data for m in made]
    if not self.keep_dims:
        state = [np.squeeze(d, axis) for d in state]
    return [self.to_tensor(d, t) for d, t in zip(state, dtypes, strict=True)]


def _add_bfloat16(places: Any, values: Any, mask: Any) -> Any:
    """Add one number after the other to memory; returns what was there, all as bits."""
    import numpy as np
    from triton._C.libtriton import interpreter

    old = np.zeros_like(values)
    for k in np.ndindex(values.shape):
        if mask[k]:
            here, true, zero = places[k].reshape(1), np.ones(1, bool), np.zeros(1, np.uint16)
            found = interpreter.load(here, true, zero, np.dtype(np.uint16))
            old[k] = found[0]
            both = _widened(np.append(found, values[k]))
            interpreter.store(here, _bfloat16_bits(both[:1] + both[1:]), true)
    return old


def _widened(bits: Any) -> Any:
    """bfloat16 numbers, given as bits, as float32."""
    import numpy as np

    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bfloat16_bits(data: Any) -> Any:
    """The upper halves of float32 numbers, rounded to nearest even, as uint16."""
    import numpy as np

    single = np.ascontiguousarray(data, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    rounded = np.where(np.isnan(single), np.uint32(0x7FC0), rounded)
    return rounded.astype(np.uint16).reshape(np.shape(data))
