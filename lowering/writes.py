"""Writes into an input at computed places (a KV cache), by the kernel that makes what is written.

The forms are those that ``passes.reinplace_updates`` leaves: ``index_copy_``, ``index_put_`` and
``copy_`` into a part. A place out of range is not written, where ATen would stop with an assertion
of the device; of equal places one value stays, no matter which. Under
``torch.use_deterministic_algorithms`` ATen makes the choice, so the call is ATen's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..kernels.indexing import masks, picked
from .body import Instr
from .indexing import ZERO, Index
from .ir import Builder, Declined, Value, base_of
from .views import Permute, Reshape, Slice

if TYPE_CHECKING:
    from .emit import Emitter
    from .render import Renderer


def lower_store(b: Builder, node: Node, args: Sequence[Any]) -> Value:
    """The store that an in-place node is; Declined where the call has to be ATen's."""
    target = args[0]
    base = base_of(target)
    if node.users:
        raise Declined("its result is read; only the memory may be")
    if base.kind != "buffer" or base.node is None or base.node.op != "placeholder":
        raise Declined("it writes no input")
    if not _is_injective(target):
        raise Declined("its places may be the same memory")
    return WRITES[str(node.target)](b, *args)


def _is_injective(target: Value) -> bool:
    while target.kind == "view":
        if not isinstance(target.params, (Permute, Reshape, Slice)):
            return False
        target = target.args[0]
    return not any(
        type(stride) is int and stride == 0 and not (type(size) is int and size == 1)
        for size, stride in zip(target.shape, target.strides, strict=True)
    )


def _check(target: Value, values: Value) -> None:
    if torch.are_deterministic_algorithms_enabled():
        raise Declined("deterministic algorithms are asked for")
    if not target.ndim or values.dtype != target.dtype:
        raise Declined(f"{values.dtype} values for {target.dtype} in {target.ndim} dims")


def _index_copy(b: Builder, target: Value, dim: int, index: Value, source: Value) -> Value:
    _check(target, source)
    dim %= target.ndim
    if source.ndim != target.ndim or index.ndim != 1:
        raise Declined("its operands have several ranks")
    places = b.reshape(index, [index.shape[0] if a == dim else 1 for a in range(target.ndim)])
    along = [None if a == dim else a for a in range(target.ndim)]
    return b.store(target, source, [(dim, places)], along, source.shape, wrap=False)


def _index_put(
    b: Builder, target: Value, indices: Sequence[Any], values: Value, accumulate: bool = False
) -> Value:
    _check(target, values)
    if accumulate:
        raise Declined("it adds to what is there")
    if why := masks(target, indices):
        raise Declined(why)
    spread, places, shape = picked(b, target, indices)
    return b.store(target, values, spread, places, shape, wrap=True)


def _copy_part(b: Builder, target: Value, source: Value, *_: Any) -> Value:
    if target.kind != "view":
        raise Declined("a copy into all of an input")
    own = list(range(target.ndim))
    return b.store(target, b.cast(source, target.dtype), [], own, target.shape, wrap=False)


WRITES: dict[str, Callable[..., Value]] = {
    "aten.index_copy_.default": _index_copy,
    "aten.index_put_.default": _index_put,
    "aten.copy_.default": _copy_part,
}


def emit_store(emitter: Emitter, v: Value, level: int) -> None:
    """Put v's operand at its places."""
    target, axes, places, wrap = v.params
    coords = emitter.coords(v)
    wide = any(emitter._varies(c) for c in coords)
    register = emitter.at(v.args[0], coords, v.shape, None, level)
    section = emitter._section(wide, level)
    own = [ZERO if p is None else coords[p] for p in places]
    inside = []
    for axis, index in zip(axes, v.args[1:], strict=True):
        place = emitter.at(index, coords, v.shape, None, level)
        size = emitter.size_name(target.shape[axis])
        if wrap:
            place = emitter.line(section, f"tl.where({place} < 0, {place} + {size}, {place})")
            emitter.body.wide.update([place] if wide else ())
        inside.append(f"({place} >= 0) & ({place} < {size})")
        own[axis] = Index({place: 1})
    while target.kind == "view":
        own = target.params.pull(own, emitter)
        target = target.args[0]
    mask = emitter.line(section, " & ".join(inside), prefix="m") if inside else None
    name = emitter.buffer_name(target, "in")
    put = Instr("put", register, name, (emitter.address(target, own),), mask, dtype=target.dtype)
    put.wide = wide
    emitter.body.sections.setdefault(section, []).append(put)


def render_put(renderer: Renderer, instr: Instr) -> None:
    index = instr.indices[0]
    pointer = renderer.index(index) + renderer._missing(index, instr.wide)
    masks = [renderer.xmask, renderer.ymask, renderer.rmask if instr.wide else None, instr.cond]
    mask = ", mask=" + " & ".join(m for m in masks if m) if any(masks) else ""
    renderer.lines.add(f"tl.store({instr.text} + ({pointer}), {instr.out}{mask})")
