"""Writes into memory at computed places (a KV cache), by the kernel that makes what is written.

The memory is an input, where ``passes.reinplace_updates`` left an in-place call, or a tensor that
``updates`` made for the purpose. A place out of range is not written, where ATen would stop with an
assertion of the device; of equal places one value stays, no matter which, or the sum of all. Under
``torch.use_deterministic_algorithms`` ATen makes the choice, so the call is ATen's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from .body import Instr
from .builder import Builder
from .indexing import ZERO, Index
from .ir import SIXTEEN_BIT, Declined, Value, base_of
from .scatter import NATIVE, OWN, SCATTERS
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
    if base.node is None or not (base.node.op == "placeholder" or OWN in base.node.meta):
        raise Declined("it writes memory that others may hold")
    if not _is_injective(target):
        raise Declined("its places may be the same memory")
    store = WRITES[str(node.target)](b, *args)
    if store.params[-1] == "add" and target.dtype in SIXTEEN_BIT and NATIVE not in node.meta:
        if "index_put" in str(node.target):
            raise Declined(f"sums in {target.dtype}, which ATen rounds less often")
        raise Declined(f"sums in {target.dtype}, which the target does not add atomically")
    return store


def _is_injective(target: Value) -> bool:
    while target.kind == "view":
        if not isinstance(target.params, (Permute, Reshape, Slice)):
            return False
        target = target.args[0]
    return not any(
        type(stride) is int and stride == 0 and not (type(size) is int and size == 1)
        for size, stride in zip(target.shape, target.strides, strict=True)
    )


def _copy_part(b: Builder, target: Value, source: Value, *_: Any) -> Value:
    if target.kind != "view":
        raise Declined("a copy into all of an input")
    own = list(range(target.ndim))
    return b.store(target, b.cast(source, target.dtype), [], own, target.shape, wrap=False)


WRITES: dict[str, Callable[..., Value]] = {**SCATTERS, "aten.copy_.default": _copy_part}


def emit_store(emitter: Emitter, v: Value, level: int) -> None:
    """Put v's operand at its places."""
    target, axes, places, wrap, how = v.params
    coords = emitter.coords(v)
    wide = emitter._varies(*coords)
    register = emitter.at(v.args[0], coords, v.shape, None, level)
    section = emitter._section(wide, level)
    own = [ZERO if p is None else coords[p] for p in places]
    inside = []
    for axis, index in zip(axes, v.args[1:], strict=True):
        place = emitter.at(index, coords, v.shape, None, level)
        size = emitter.size_name(target.shape[axis])
        if index.dtype != "int64":  # its product with a stride may need more bits
            place = _made(emitter, section, wide, f"{place}.to(tl.int64)")
        if wrap:
            text = f"tl.where({place} < 0, {place} + {size}, {place})"
            place = _made(emitter, section, wide, text)
        inside.append(f"({place} >= 0) & ({place} < {size})")
        own[axis] = Index({place: 1})
    while target.kind == "view":
        own = target.params.pull(own, emitter)
        target = target.args[0]
    mask = emitter.line(section, " & ".join(inside), prefix="m") if inside else None
    name = emitter.buffer_name(target, "in")
    put = Instr("put", register, name, (emitter.address(target, own),), mask, dtype=target.dtype)
    put.wide, put.how = wide, how
    emitter.body.sections.setdefault(section, []).append(put)


def _made(emitter: Emitter, section: tuple[str, int], wide: bool, text: str) -> str:
    register = emitter.line(section, text)
    emitter.body.wide.update([register] if wide else ())
    return register


def render_put(renderer: Renderer, instr: Instr) -> None:
    index = instr.indices[0]
    pointer = renderer.index(index) + renderer._missing(index, instr.wide)
    masks = [renderer.xmask, renderer.ymask, renderer.rmask if instr.wide else None, instr.cond]
    mask = ", mask=" + " & ".join(m for m in masks if m) if any(masks) else ""
    put, order = (f"tl.atomic_{instr.how}", ', sem="relaxed"') if instr.how else ("tl.store", "")
    renderer.lines.add(f"{put}({instr.text} + ({pointer}), {instr.out}{mask}{order})")
