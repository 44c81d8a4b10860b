"""How a group's reductions are written as instructions: accumulated, then finished."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .body import Instr
from .indexing import ZERO
from .ir import Value, computing_dtype
from .spelling import accumulator_dtype

if TYPE_CHECKING:
    from .emit import Emitter


def accumulate(emitter: Emitter, r: Value, level: int) -> None:
    """Take r's operand, which is of ``level``, into its accumulator."""
    assert r.op is not None  # a name in REDUCTIONS, for a reduction
    _, (x, _) = emitter.online.get(r, (r.op, (r.args[0], r.params)))
    body = emitter.body
    coords = emitter.coords(x)
    register = emitter.eval(x, coords, None, level)
    hold = accumulator_dtype(r)
    if computing_dtype(x.dtype) != hold and r.op not in ("argmax", "argmin"):
        cast = f"({register} != 0)" if hold == "bool" else f"{register}.to(tl.{hold})"
        register = emitter.line(emitter._section(True, level), cast)
        body.wide.add(register)
    body.modules.add("reductions")
    place = ZERO
    for k in r.params:
        place = place.scale(x.shape[k]) + coords[k]
    emitter._known(place)
    name = emitter.reductions.setdefault(r, f"r{len(emitter.reductions)}")
    if emitter._over_rows(r):
        _sweep(emitter, r, name, register, hold)
        return
    if r in emitter.online:
        _run_online(emitter, r, name, register, hold, level)
        return
    for kind in ("begin", "step", "end"):
        where = ("row", level) if kind == "begin" else ("loop", level)
        if not body.looped:
            where = ("row", 0)
        elif kind == "end":
            where = ("row", level + 1)
        body.sections.setdefault(where, []).append(
            Instr(kind, name, r.op, (place,), cond=register, dtype=hold)
        )


def _run_online(
    emitter: Emitter, r: Value, name: str, register: str, hold: str, level: int
) -> None:
    """Finish r from the running maximum and sum of its operand, which the first to ask begins."""
    which, pair = emitter.online[r]
    sections, running = emitter.body.sections, emitter.running
    if pair not in running:
        running[pair] = name
        for kind, where in (("begin", "row"), ("step", "loop")):
            step = Instr(f"online_{kind}", name, cond=register, text="", dtype=hold)
            sections.setdefault((where, level), []).append(step)
    end = Instr("online_end", name, which, cond=running[pair])
    sections.setdefault(("row", level + 1), []).append(end)


def _sweep(emitter: Emitter, r: Value, name: str, register: str, hold: str) -> None:
    """Accumulate a reduction over the rows that a program walks over."""
    for kind, section in (("begin", "once"), ("step", "row"), ("end", "after")):
        emitter.body.sections.setdefault((section, 0), []).append(
            Instr(f"sweep_{kind}", name, r.op or "", cond=register, dtype=hold)
        )


def finish_reduction(emitter: Emitter, r: Value) -> None:
    """Note the register of r's result, rounded as eager would."""
    section = ("row", emitter.level(r)) if emitter.body.looped else ("row", 0)
    if emitter._over_rows(r):
        section = ("after", 0)
    have = "int64" if r.op in ("argmax", "argmin") else accumulator_dtype(r)
    name = emitter.reductions[r]
    text = emitter.rounded(name, r.dtype, have, r)
    if r.dtype == "bool" and have != "bool":
        text = f"({name} != 0)"
    if text == name:
        emitter.after[name] = section[1]
    emitter.results[r] = name if text == name else emitter.line(section, text, computes=r)
