"""Scans: running sums and the like along the dim that a group reduces; a result is full-size.

On chip a scan is one call. In steps, the loop carries the last element of the row so far; a later
loop that needs the result scans again, as it computes any other full-size value again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .body import Instr
from .group import Group
from .indexing import Index, is_static, product
from .ir import Value, computing_dtype
from .parts import contiguous_axis
from .spelling import EmitError, accumulator_dtype, identity
from .views import Frame

if TYPE_CHECKING:
    from .emit import Emitter
    from .render import Renderer

#: elements of a row from which on a lone scan is ours
LEAST_SCAN = 512

#: (scan of a tile, combine of two states, start of the second part of the state)
SCANS = {
    "sum": ("running_sum", "plus", None),
    "prod": ("running_prod", "times", None),
    "amax": ("running_max", "larger", None),
    "amin": ("running_min", "smaller", None),
    "argmax": ("running_argmax", "later_max", "int64"),
    "argmin": ("running_argmin", "later_min", "int64"),
    "logsumexp": ("running_logsumexp", "add_exponentials", "same"),
}


def why_not_scan(group: Group, v: Value, frame: Frame) -> str | None:
    """Why a scan, run as ``frame`` says, cannot be computed by the group."""
    if {a for axis in frame for a in axis} != set(group.domain):
        return "it scans what the group holds once a row"
    if group.reduced and tuple(group.resolve(frame[v.params[0]])) != group.reduced:
        return "it scans other dims than the group reduces"
    if group.shares:
        return "the group's programs have a share of the rows each"
    return None


def scans_rows(v: Value, multiprocessors: int) -> bool:
    """Whether v runs along memory, in rows enough to keep the GPU busy: a kernel of ours is faster
    than ATen's (8192 x 8192 float32, H200: 136 us, 413)."""
    x, axis = v.args[0], v.params[0]
    return (
        is_static(*x.shape)
        and contiguous_axis(x) == axis
        and product(x.shape) >= 2 * multiprocessors * x.shape[axis]
        and x.shape[axis] >= LEAST_SCAN
    )


def emit_scan(
    emitter: Emitter,
    v: Value,
    coords: Sequence[Index],
    cond: str | None,
    level: int,
    section: tuple[str, int],
) -> str:
    """The register of v, a row of which is computed at once."""
    if cond is not None or not emitter.is_own_place(v, coords):
        raise EmitError(f"{v!r} is read in another place than its own")
    assert v.op is not None  # a name in SCANS, for a scan
    x, body = v.args[0], emitter.body
    register, hold = emitter.eval(x, coords, None, level), accumulator_dtype(v)
    if computing_dtype(x.dtype) != hold:
        register = emitter.line(section, f"{register}.to(tl.{hold})")
        body.wide.add(register)
    name = emitter.new_register(section, "s")
    place = emitter._known(coords[v.params[0]])
    if body.looped:
        carry = Instr("carry", name, v.op, dtype=hold)
        body.sections.setdefault(("row", level), []).append(carry)
    scan = Instr("scan", name, v.op, (place,), cond=register, dtype=hold)
    body.sections.setdefault(section, []).append(scan)
    body.modules.add("scans")
    body.wide.add(name)
    text = emitter.rounded(name, v.dtype, "int64" if v.op in ("argmax", "argmin") else hold, v)
    return name if text == name else emitter.line(section, text, computes=v)


def render_carry(renderer: Renderer, instr: Instr) -> None:
    """Before the loop: the state of an empty row."""
    add, out, second = renderer.lines.add, instr.out, SCANS[instr.text][2]
    start = identity(instr.text, instr.dtype)
    add(f"carry_{out} = tl.full([XBLOCK, 1], {start}, tl.{instr.dtype})")
    if second is not None:
        dtype = instr.dtype if second == "same" else second
        add(f"beside_{out} = tl.full([XBLOCK, 1], 0, tl.{dtype})")


def render_scan(renderer: Renderer, instr: Instr) -> None:
    """One tile: its own scan, behind what the tiles before it left."""
    add, out = renderer.lines.add, instr.out
    function, combine, second = SCANS[instr.text]
    state, given = f"x_{out}", f"x_{out}"
    add(f"x_{out} = tl.broadcast_to({instr.cond}, [XBLOCK, RBLOCK])")
    if second == "same":
        given = f"{given}, tl.full([XBLOCK, RBLOCK], 1, tl.{instr.dtype})"
    elif second is not None:
        place = f"tl.broadcast_to({renderer._coordinate(instr.indices[0])}, [XBLOCK, RBLOCK])"
        given = f"{given}, ({place}).to(tl.{second})"
    carry = f"carry_{out}"
    if second is not None:
        state, carry = f"{state}, y_{out}", f"{carry}, beside_{out}"
    add(f"{state} = scans.{function}({given})")
    if renderer.body.looped:
        add(f"{state} = scans.{combine}({carry}, {state})")
        add(f"carry_{out} = scans.last(x_{out})")
        if second is not None:
            add(f"beside_{out} = scans.last(y_{out})")
    if instr.text == "logsumexp":
        add(f"{out} = scans.logarithm({state})")
    else:
        add(f"{out} = {'x' if second is None else 'y'}_{out}")
