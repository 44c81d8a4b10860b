"""Values of a kernel that read no tensor at their place: constants, coordinates, random masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .indexing import ZERO, Index
from .ir import FLOATING, SIXTEEN_BIT, SizeArg, Value, computing_dtype
from .spelling import literal, storage

if TYPE_CHECKING:
    from .emit import Emitter


def emit_full(
    emitter: Emitter,
    v: Value,
    coords: Sequence[Index],
    cond: str | None,
    level: int,
    section: tuple[str, int],
) -> str:
    value = v.args[0]
    dtype = computing_dtype(v.dtype)
    if isinstance(value, SizeArg):
        return emitter.line(section, f"{emitter.size_name(value.expr)}.to(tl.{dtype})")
    if v.dtype == "bool":
        value = bool(value)
    elif v.dtype not in FLOATING:
        value = int(value)
    else:
        value = float(value)
    text = f"tl.full([{{ones}}], {literal(value)}, tl.{storage(dtype)})"
    if v.dtype in SIXTEEN_BIT:
        text = f"{text}.to(tl.{v.dtype}).to(tl.float32)"
    return emitter.line(section, text)


def emit_iota(
    emitter: Emitter,
    v: Value,
    coords: Sequence[Index],
    cond: str | None,
    level: int,
    section: tuple[str, int],
) -> str:
    return emitter.line(section, f"({{i0}}).to(tl.{v.dtype})", [emitter._known(coords[v.params])])


def emit_random(
    emitter: Emitter,
    v: Value,
    coords: Sequence[Index],
    cond: str | None,
    level: int,
    section: tuple[str, int],
) -> str:
    linear = ZERO
    for c, size in zip(coords, v.shape, strict=True):
        linear = linear.scale(size) + c
    seed = emitter.eval(v.args[0], (), None, level)
    salt = f"salt{sum(n.startswith('salt') for n, _, _ in emitter.body.params)}"
    emitter.body.params.append((salt, "size", v.args[1]))  # an argument: equal layers, one kernel
    emitter.body.modules.add("random")
    text = f"random.{v.op}({seed}, {salt}, {{i0}}, {v.args[2]}, {{fours}}, {{nvidia}})"
    return emitter.line(section, text, [emitter._known(linear)], computes=v)
