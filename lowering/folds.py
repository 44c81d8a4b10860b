"""Results of few parts that each kernel reduces for itself, where it reads them.

Few long rows are reduced in parts by as many programs as a GPU keeps busy. What the parts of a row
come to is a few numbers in the cache: a launch that combines them takes longer than to combine them
anew in every program of the kernel that needs the row's result. So softmax of eight long rows is
two launches, not three.

``fold_parts`` finds such kernels once the groups are known, and moves their members to the readers.
``fold`` writes one reduction, ``row_atoms`` says which rows a pointwise program must not straddle.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from .body import Instr
from .group import atoms_of
from .indexing import Index, is_one, is_static, product
from .ir import Value, base_of, computing_dtype
from .schedule import power_of_two
from .spelling import ONLINE, REDUCTIONS, EmitError, accumulator_dtype, identity
from .views import Frame

if TYPE_CHECKING:
    from .emit import Emitter
    from .fuse import Fuser
    from .group import Group
    from .render import Renderer

#: parts of a row that one program combines
MOST_PARTS = 1024
#: numbers that every program reads of all rows' parts stay in the cache
MOST_NUMBERS = 2**18
#: parts that are combined one by one, where a tile has no axis left for them
UNROLLED = 16
OPS = ("sum", "prod", "amax", "amin", *ONLINE)
KINDS = ("pointwise", "cast", "reduce")


# which kernels ------------------------------------------------------------------------------------


def fold_parts(fuser: Fuser) -> None:
    """Move what only combines a few parts from its kernel into those that read the results."""
    for group in fuser.groups:
        if group.members and _combines(fuser, group):
            _try(fuser, group)


def _combines(fuser: Fuser, group: Group) -> bool:
    """Whether the kernel reduces a few parts that other kernels have made, and little else."""
    reductions = [m for m in group.members if m.reduces]
    sizes = [group.sizes[a] for a in group.domain]
    if not reductions or not is_static(*sizes) or product(sizes) > MOST_NUMBERS:
        return False
    return all(m.kind in KINDS and not _why_not_fold(m) for m in group.members) and all(
        _is_made(fuser, r.args[0], group) for r in reductions
    )


def _why_not_fold(v: Value) -> str | None:
    if not v.reduces:
        return None
    axes = [k for k in v.params if not is_one(v.args[0].shape[k])]
    if v.kind != "reduce" or v.op not in OPS or len(axes) != 1:
        return "no reduction of one axis"
    length = v.args[0].shape[axes[0]]
    return None if is_static(length) and length <= MOST_PARTS else "too many parts"


def _is_made(fuser: Fuser, x: Value, group: Group) -> bool:
    """Whether another kernel's reduction made the parts that x is computed from."""
    found = False
    stack, seen = [x], {x}
    while stack:
        v = base_of(stack.pop())
        home = fuser.home.get(v)
        if home is not None and home is not group:
            if not v.reduces and not home.reduced:
                return False
            found = True
        elif v in fuser.inlined or home is group:
            if v.kind not in (*KINDS, "full"):
                return False
            fresh = [a for a in v.inputs if a not in seen]
            seen.update(fresh)
            stack.extend(fresh)
        elif v.kind != "buffer" or v in fuser.written:
            return False
    return found


def _try(fuser: Fuser, group: Group) -> None:
    """Fold the group's members into all kernels that read them, if each can be written so."""
    readers = dict.fromkeys(h for m in group.members for h in _reading(fuser, m) if h is not group)
    kept = [m for m in group.members if m in fuser.escapes]
    if not readers or not all(_may_fold(fuser, h, group) for h in readers):
        return
    host, frames = _host(fuser, group, kept, readers) if kept else (next(iter(readers)), {})
    if len(frames) < len(kept):
        return
    before = dict(host.frames), list(host.members)
    made = {m: (m.kind, m.args, m.op, m.params) for m in kept if m.reduces}
    folded = set(group.members).difference(kept).union(_show(fuser, m) for m in made)
    host.frames.update(frames)
    host.members += kept
    if all(_can_be_written(fuser, h, folded, kept if h is host else ()) for h in readers):
        for m in group.members:
            fuser.home.pop(m)
        fuser.inline(folded)
        fuser.home.update(dict.fromkeys(kept, host))
        group.members = []
        return
    host.frames, host.members = before
    for m, how in made.items():
        fuser.turn(m, *how)


def _show(fuser: Fuser, r: Value) -> Value:
    """Have a reduction that is stored show one that is folded, which is returned."""
    same = Value("reduce", r.op, r.args, r.shape, r.dtype, params=r.params, strides=r.strides)
    fuser.turn(r, "cast", (same,))
    return same


def _reading(fuser: Fuser, v: Value) -> Iterator[Group]:
    """The groups that read v, seen through inlined values."""
    for reader, _ in fuser.readers.get(v, ()):
        if reader in fuser.inlined:
            yield from _reading(fuser, reader)
        elif reader in fuser.home:
            yield fuser.home[reader]


def _may_fold(fuser: Fuser, host: Group, group: Group) -> bool:
    """Whether the kernel is of a kind that may combine parts."""
    plain = all(m.kind in (*KINDS, "random", "gather") for m in host.members)
    if not plain or host.column or host.shares or host.scans or host.stores:
        return False
    return bool(host.reduced) or not _runs_across_rows(fuser, host, group)


def _runs_across_rows(fuser: Fuser, host: Group, group: Group) -> bool:
    """Whether neighbours in the memory of what a pointwise kernel stores lie in different rows of
    the group, as they do where channels are last: ``row_of`` finds no program with a row of its
    own then, but only once all else is written."""
    out = next((m for m in host.members if fuser._stored(m, host)), None)
    frame = None if out is None else host.frame(out)
    if out is None or frame is None or None in frame or not is_static(*out.strides):
        return False
    steps = [(step, axis[-1]) for step, axis in zip(out.strides, frame, strict=True) if axis]
    rows = {a for run in _atoms(group, host).values() for a in run}
    return bool(steps) and min(steps)[1] in rows


def _host(
    fuser: Fuser, group: Group, kept: Sequence[Value], readers: Collection[Group]
) -> tuple[Group, dict[Value, Frame]]:
    """The kernel that also stores what is ``kept``, and how it runs over that."""
    for host in readers:
        if fuser._path_between(group, host):
            continue  # it would wait for what waits for it
        atoms = _atoms(group, host)
        frames: dict[Value, Frame] = {}
        for m in kept:
            own = group.frame(m)
            if own is not None and None not in own and {*atoms_of(own)} <= atoms.keys():
                frames[m] = tuple(tuple(a for b in axis for a in atoms[b]) for axis in own)
        if len(frames) == len(kept):
            return host, frames
    return next(iter(readers)), {}


def _atoms(group: Group, host: Group) -> dict[str, tuple[str, ...]]:
    """The group's parallel atoms -> those of the host, where it reads a member at its own place."""
    for m in host.members:
        frame = host.frame(m.args[0] if m.reduces else m)
        for a in m.inputs:
            own = group.frame(base_of(a)) if base_of(a) in group.frames else None
            if own is None or frame is None:
                continue
            seen = _below(a, frame[len(frame) - a.ndim :], host)
            if seen is None:
                continue
            pairs = list(zip(own, seen, strict=True))
            if all(y is not None and _lengths(group, x, host, y) for x, y in pairs):
                return {x[0]: tuple(y) for x, y in pairs if x}
    return {}


def _below(a: Value, frame: Frame, host: Group) -> Frame | None:
    """The frame of what the view ``a`` shows, which may be broadcast along some axes."""
    known: Frame | None = tuple(
        () if is_one(size) else axis for size, axis in zip(a.shape, frame, strict=True)
    )
    while a.kind == "view" and known is not None:
        known, a = a.params.carry_back(known, host), a.args[0]
    return known


def _lengths(group: Group, own: Sequence[str], host: Group, seen: Sequence[str]) -> bool:
    """Whether one atom of the group is a run of the host's."""
    if len(own) != 1:
        return not own and not seen
    return product(host.size(a) for a in seen) == group.size(own[0])


def _can_be_written(fuser: Fuser, host: Group, folded: set[Value], kept: Collection[Value]) -> bool:
    """Whether there is a kernel of the host's members with the folds in it: one is written."""
    from .emit import emit
    from .render import Renderer
    from .schedule import needs_loop

    outputs, host.outputs = host.outputs, []
    host.outputs = [m for m in host.members if m in kept or fuser._stored(m, host)]
    rows = product(host.sizes[a] for a in host.parallel)
    looped = bool(host.reduced) and needs_loop(rows, host.reduced_length, host.column)
    try:
        body = emit(host, fuser.inlined | folded, True, looped)
        Renderer(body, "trial", fuser.multiprocessors)
    except EmitError:
        return False
    finally:
        host.outputs = outputs
    return True


# one reduction ------------------------------------------------------------------------------------


def fold(
    emitter: Emitter,
    r: Value,
    coords: Sequence[Index],
    cond: str | None,
    level: int,
    section: tuple[str, int],
) -> str:
    """The register of r's result at ``coords``, reduced there and then."""
    assert r.op is not None  # a name in OPS
    x = r.args[0]
    (axis,) = (k for k in r.params if not is_one(x.shape[k]))
    if cond is not None or emitter.walked:
        raise EmitError("parts are only combined where every lane has a row")
    if any(a not in emitter.group.sizes for c in coords for a in c.atoms):
        raise EmitError("the row is a quotient, or a number that was loaded")
    emitter.body.modules.add("reductions")
    have = accumulator_dtype(r)
    if emitter._varies(*coords):
        name = _one_by_one(emitter, r, axis, coords, level, section)
    else:
        atom = f"f{x.shape[axis]}"
        emitter.body.folds[atom] = x.shape[axis]
        register = emitter.eval(x, _at(coords, axis, Index({atom: 1})), None, level)
        register = _wide(emitter, x, register, have, section)
        name = emitter.new_register(section)
        step = Instr("fold", name, r.op, (Index({atom: 1}),), cond=register, dtype=have)
        emitter.body.sections.setdefault(section, []).append(step)
    text = emitter.rounded(name, r.dtype, have, r)
    return name if text == name else emitter.line(section, text, computes=r)


def _one_by_one(
    emitter: Emitter,
    r: Value,
    axis: int,
    coords: Sequence[Index],
    level: int,
    section: tuple[str, int],
) -> str:
    x, have = r.args[0], accumulator_dtype(r)
    if x.shape[axis] > UNROLLED or r.op not in REDUCTIONS:
        raise EmitError("too many parts to combine one by one")
    total = ""
    for k in range(x.shape[axis]):
        register = emitter.eval(x, _at(coords, axis, Index({}, k)), None, level)
        register = _wide(emitter, x, register, have, section)
        both = REDUCTIONS[r.op][0].format(total, register)
        total = emitter.line(section, both) if total else register
        emitter.body.wide.add(total)
    return total


def _at(coords: Sequence[Index], axis: int, place: Index) -> list[Index]:
    return [place if k == axis else c for k, c in enumerate(coords)]


def _wide(emitter: Emitter, x: Value, register: str, have: str, section: tuple[str, int]) -> str:
    if computing_dtype(x.dtype) == have:
        return register
    return emitter.line(section, f"{register}.to(tl.{have})")


# its text -----------------------------------------------------------------------------------------


def parts_of(renderer: Renderer, index: Index) -> str | None:
    """The atom that counts the parts of a row, where an address has one."""
    if not renderer.body.folds:
        return None
    return next((a for a in _variables(renderer, index) if a in renderer.body.folds), None)


def _variables(renderer: Renderer, index: Index) -> Iterator[str]:
    """The loop variables that an address depends on, quotients taken apart."""
    for atom in index.atoms:
        if atom in renderer.body.derived:
            yield from _variables(renderer, renderer.body.derived[atom][1])
        else:
            yield atom


def define(renderer: Renderer, atom: str) -> None:
    """The lanes that a row's parts take."""
    count = renderer.body.folds[atom]
    lanes = power_of_two(count)
    two = "[None, :]" if renderer.rank == 2 else ""
    renderer.lines.add(f"{atom} = tl.arange(0, {lanes}){two}")
    if lanes != count:
        renderer.lines.add(f"{atom}_mask = {atom} < {count}")
    renderer.defined.add(atom)


def _mask(renderer: Renderer, atom: str) -> str | None:
    count = renderer.body.folds[atom]
    return None if power_of_two(count) == count else f"{atom}_mask"


def render_load(renderer: Renderer, instr: Instr, atom: str) -> str:
    """A row's parts, as a tile of their own."""
    index = instr.indices[0]
    across = any(a in renderer.parallel for a in _variables(renderer, index))
    masks = [m for m in (_mask(renderer, atom),) if m]
    if renderer.rank == 2 and renderer.xmask and across:
        masks.append(renderer.xmask)
    mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
    return f"tl.load({instr.text} + ({renderer.index(index)}){mask})"


def render_fold(renderer: Renderer, instr: Instr) -> None:
    """One number for each row of the tile; of a pointwise program's only row, a scalar."""
    (atom,) = instr.indices[0].atoms
    add, op, dtype = renderer.lines.add, instr.text, instr.dtype
    count = renderer.body.folds[atom]
    lanes = power_of_two(count)
    mask = _mask(renderer, atom) or f"{atom} < {count}"  # of all lanes: parts may be one number
    two = "" if renderer.rank == 2 else "[None, :]"
    add(f"x_{instr.out} = tl.where({mask}, {instr.cond}, {identity(op, dtype)}){two}")
    if op in ONLINE:
        text = f"reductions.row_{op}(x_{instr.out}, tl.full([1, {lanes}], 1, tl.{dtype}))"
    else:
        text = f"{REDUCTIONS[op][3]}(x_{instr.out})"
    add(f"{instr.out} = {text if renderer.rank == 2 else f'reductions.only({text})'}")


def row_atoms(renderer: Renderer) -> set[str]:
    """The loop variables that say which row's parts a program combines."""
    found: set[str] = set()
    for instr in renderer.instrs if renderer.body.folds else ():
        for index in instr.indices if instr.kind == "load" else ():
            if parts_of(renderer, index) is not None:
                found.update(_variables(renderer, index))
    return found.difference(renderer.body.folds)
