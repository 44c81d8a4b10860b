"""Program -> groups. ``Fuser.why_not`` is the whole legality test, and what explain() prints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .closure import Closure
from .flow import copies_alone, drop_unread, find_escapes, find_readers, order_edges
from .folds import fold_parts
from .frames import align, aligned_operands, frame_for
from .group import MAX_POINTERS, SHARE, Group, atoms_of, latest_first, pointers, reductions_first
from .indexing import contiguous_strides, is_static, product
from .inline import Inliner
from .ir import Value, base_of, is_alike, is_dense, is_further
from .parts import sweep_parts
from .places import Crossings, find_tied, is_tied, reads_through, strays
from .recompute import recompute
from .replay import Replays
from .scan import why_not_scan
from .schedule import COLUMNS
from .sweep import is_column, on_chip, reduction_of, set_shares, why_not_sweep
from .translate import Program
from .views import Frame

MAX_MEMBERS = 96
#: values further apart than this do not share a kernel only because they read the same data
SIBLING_DISTANCE = 24
WRITES = "one writes memory that the other reads"
WHOLE = "the kernel of one of them is written as a whole"
#: one program does this many elements as fast as a whole GPU would
SMALL = 16384


class Fuser:
    """Greedy, in topological order, linear in the number of values for common graphs."""

    def __init__(self, program: Program, graph: Any, multiprocessors: int) -> None:
        self.program, self.multiprocessors = program, multiprocessors
        self.escapes = find_escapes(program, graph)
        drop_unread(program, self.escapes)
        self.groups: list[Group] = []
        self.home: dict[Value, Group] = {}
        self.closure = Closure(program.values, self.home)
        self.place = self.closure.place
        self.near: dict[Value, list[Group]] = defaultdict(list)  # value -> groups that frame it
        self.unfused: list[tuple[Value, Value, str]] = []
        self.readers = find_readers(program)
        self.copies = copies_alone(program, graph)
        self.waits, self.written = order_edges(program, graph, self.copies)
        self.seen: dict[Value, Sequence[Value]] = {}  # what a value reads, see ``reads``
        self.twins: dict[Any, Group] = {}
        self.twin_frames: dict[Any, Frame] = {}
        inliner = Inliner(program, self.readers, self.escapes, self.waits, self.written)
        self.column_feeds, self.inlined = inliner.column_feeds, inliner.run()

    # grouping -------------------------------------------------------------------------------

    def run(self) -> list[Group]:
        for stretch in Replays(self).stretches():
            if stretch.follow():
                continue
            for v in stretch.values:
                if v.kind == "view":
                    continue
                self.closure.meet(v, self._sources(v))
                if v.computes and v not in self.inlined:
                    self._place(v)
            stretch.keep()
        recompute(self)
        fold_parts(self)
        live = [g for g in self.groups if g.members]
        for group in live:
            group.outputs = [m for m in group.members if self._stored(m, group)]
            for out in group.outputs:
                if out.node is None and not is_dense(out):
                    out.strides = contiguous_strides(out.shape)
        return live

    def _sources(self, v: Value) -> tuple[Value, ...]:
        waits = self.waits.get(v)
        return (*v.bases, *waits) if waits else v.bases

    def turn(
        self,
        v: Value,
        kind: str,
        args: Sequence[Any] = (),
        op: str | None = None,
        params: Any = None,
    ) -> None:
        """Have a value made otherwise than the graph says."""
        v.become(kind, op, args, params)
        self.seen.clear()

    def inline(self, values: set[Value]) -> None:
        """Have values computed where they are read."""
        self.inlined |= values
        self.seen.clear()

    def _stored(self, v: Value, group: Group) -> bool:
        if v in self.escapes or v.kind == "whole":
            return True
        for reader, _ in self.readers.get(v, ()):
            if self.home.get(reader) is not group and self._reads_elsewhere(reader, group):
                return True
        return False

    def _reads_elsewhere(self, reader: Value, group: Group) -> bool:
        if reader in self.inlined:
            return any(self._reads_elsewhere(r, group) for r, _ in self.readers.get(reader, []))
        return self.home.get(reader) is not group

    def _candidates(self, v: Value) -> tuple[list[Group], list[Group]]:
        """(groups that produce an operand, groups that only read the same data), latest first."""
        producers: dict[Group, None] = {}
        siblings: dict[Group, None] = {}
        place = self.place[v]
        for a in v.inputs:
            while True:
                own = self.home.get(a)
                if own is not None:
                    producers[own] = None
                for g in self.near.get(a, ()):
                    if g is not own and g not in siblings and self.is_near(g, place):
                        siblings[g] = None
                if a.kind != "view" and not (a.kind == "cast" and a in self.inlined):
                    break
                a = a.args[0]
        key = self._twin_key(v)
        twin = None if key is None else self.twins.get(key)
        if twin is not None and twin.members:
            siblings[twin] = None
        others = [g for g in siblings if g not in producers]
        # a reduction first: it takes in a pointwise group, not the other way round
        return sorted(producers, key=reductions_first), sorted(others, key=latest_first)

    def is_near(self, group: Group, place: int) -> bool:
        """Whether a value there may share the group's kernel because it reads the same data."""
        return group.last >= place - SIBLING_DISTANCE and bool(group.members)

    def _twin_key(self, v: Value) -> Any:
        """Reductions alike over results of one kernel can share the next kernel, and writes to the
        same places of two inputs one (keys and values of a cache)."""
        if v.kind == "store":
            return ("store", v.shape, v.params[1], *map(base_of, v.args[1:]))
        if not v.reduces:
            return None
        x = v.args[0]
        producer = self.home.get(base_of(x))
        return producer and (producer.number, x.shape, x.strides, v.params)

    def _place(self, v: Value) -> None:
        if is_further(v):
            self._enter(self.home[v.args[0]], v)
            return
        producers, siblings = self._candidates(v)
        joined: Group | None = None
        if v.kind == "whole":
            self._open(v)
            for group in producers:
                self._note(group, v, WHOLE)
            return
        for group in (*producers, *siblings):
            if joined is None:
                frame = frame_for(group, v)
                if frame is None:
                    frame = self.twin_frames.get((group, self._twin_key(v)))
                why = self.why_not(group, v, frame, sibling=group not in producers)
                if why is None:
                    assert frame is not None  # else there is a reason why not
                    self._join(group, v, frame)
                    joined = group
                    continue
            elif (
                group in producers
                or (v in self.column_feeds and group.column)
                or self._reduces_with(group, v)
            ):
                why = self._merge(joined, group, v)
                if why is None:
                    continue
            else:
                continue
            if group in producers:
                self._note(group, v, why)
        if joined is None:
            self._open(v)

    def _reduces_with(self, group: Group, v: Value) -> bool:
        """Whether v is only there to be reduced as the group's rows are, of the same data."""
        if not group.reduced or group.column or group.scans:
            return False
        if not all(r.kind == "reduce" for r, _ in self.readers.get(v, ())):
            return False
        frame = frame_for(group, v)
        found = None if frame is None else reduction_of(group, v, frame, self.readers)
        return found is not None and set(found[1]) == set(group.reduced)

    def _note(self, group: Group, v: Value, why: str) -> None:
        for a in v.inputs:
            if self.home.get(base_of(a)) is group:
                self.unfused.append((base_of(a), v, why))
                return

    def why_not(
        self, group: Group, v: Value, frame: Frame | None, sibling: bool = False
    ) -> str | None:
        """Why v cannot join the group, or None."""
        if group.whole:
            return WHOLE
        if len(group.members) >= MAX_MEMBERS:
            return f"the group has {MAX_MEMBERS} members already"
        if frame is None:
            return "their shapes do not line up without recomputing the producer"
        if (
            v in self.column_feeds
            and not self._only_feeds(group)
            and self._why_not_sweep(group, v, frame)
        ):
            return "only a column reduction needs it, which computes it in its own kernel"
        if self._makes_cycle(group, v):
            return "the kernel would wait for its own result"
        if pointers(group, v) > MAX_POINTERS:
            return f"the kernel would take more than {MAX_POINTERS} tensors"
        if group.tied and (
            reads_through(v, self.inlined, group.tied) or strays(v, frame, group, group.tied)
        ):
            return "it reads what the kernel has for its own row only in another place"
        if v in self.waits and any(self.home.get(w) is group for w in self.waits[v]):
            return WRITES
        if group.parts:  # a look at views splits atoms
            frame = tuple(group.resolve(axis) for axis in frame)
        if v.reduces:
            return self._why_not_reduce(group, v, frame)
        if v.kind == "scan":
            why = why_not_scan(group, v, frame)
            return why or (None if group.reduced else self._why_idle(group, v, frame))
        if group.reduced:
            full = set(group.resolve(atoms_of(frame))) == set(group.domain)
            if (
                full
                and group.column
                and not group.scans
                and v not in self.column_feeds
                and (sibling or not on_chip(group))
                and not self._busy_with_columns(group, group.reduced)
            ):
                return "its columns would leave most of the GPU idle, which stores the operands too"
            if not full and sibling:
                return "row values only share a kernel with their own reduction"
        return None

    def _why_not_sweep(self, group: Group, v: Value, frame: Frame) -> str | None:
        return why_not_sweep(group, v, frame, self.readers)

    def _only_feeds(self, group: Group) -> bool:
        return (group.column and not group.scans) or all(
            m in self.column_feeds for m in group.members
        )

    def _why_not_reduce(self, group: Group, v: Value, frame: Frame) -> str | None:
        atoms = tuple(a for k in v.params for a in frame[k])
        if set(atoms_of(frame)) != set(group.domain):
            return "it reduces what the group holds once a row"
        if group.reduced:
            if set(group.resolve(atoms)) != set(group.reduced):
                return self._why_not_sweep(group, v, frame)
            if (v.kind == "partial") != bool(group.column and group.shares):
                return "one of them reduces its rows in shares, the other at once"
            return None
        column = is_column(v)
        shares = v.shape[0] if v.kind == "partial" else 1
        if (
            column
            and not self._busy_with_columns(group, atoms, shares)
            and any(self._stored_beside(m, group, v) for m in group.members)
        ):
            return "its columns would leave most of the GPU idle, which stores the operands too"
        return None if column else self._why_idle(group, v, frame)

    def _why_idle(self, group: Group, v: Value, frame: Frame) -> str | None:
        """Why a pointwise group is better not run by the few programs that v's rows get."""
        if is_static(*(group.sizes[a] for a in group.domain)):
            atoms = {a for k in v.params for a in frame[k]}
            rows = product(group.sizes[a] for a in group.domain if a not in atoms)
            work = product(group.sizes[a] for a in group.domain)
            if (
                rows < 8
                and work > SMALL
                and any(self._stored_beside(m, group, v) for m in group.members)
            ):
                return "few long rows: storing the operands would leave most of the GPU idle"
        return None

    def _busy_with_columns(self, group: Group, reduced: Sequence[str], shares: int = 1) -> bool:
        """Whether programs that reduce ``reduced``, a tile of columns each, keep the GPU busy."""
        sizes = [group.sizes[a] for a in group.domain if a not in set(reduced)]
        if not self.multiprocessors or not is_static(*sizes):
            return False
        programs = product(sizes) // COLUMNS * max(1, group.shares or shares)
        return programs >= 2 * self.multiprocessors

    def _stored_beside(self, m: Value, group: Group, v: Value) -> bool:
        if m in self.escapes:
            return True
        if m in self.column_feeds:
            return False  # its readers will join v
        return any(
            not is_alike(r, v) and self._reads_elsewhere(r, group)
            for r, _ in self.readers.get(m, [])
        )

    def _makes_cycle(self, group: Group, v: Value) -> bool:
        bit = 1 << group.number
        if not self.closure.before(v) & bit:
            return False
        for s in self.reads(v):
            if self.closure.before(s) & bit and self.home.get(s) is not group:
                return True
        return False

    def reads(self, v: Value) -> Sequence[Value]:
        """What v reads, seen through inlined values."""
        known = self.seen.get(v)
        if known is None:
            known = self._sources(v)
            if not self.inlined.isdisjoint(known):
                known = [r for s in known for r in (self.reads(s) if s in self.inlined else (s,))]
            self.seen[v] = known
        return known

    # changes --------------------------------------------------------------------------------

    def _open(self, v: Value) -> None:
        group = Group(len(self.groups))
        self.groups.append(group)
        group.first = self.place[v]
        frame = group.open(v.args[0].shape if v.reduces else v.shape)
        self._join(group, v, frame)

    def _join(self, group: Group, v: Value, frame: Frame) -> None:
        if v.reduces:
            if not group.reduced:
                group.set_reduced([a for k in v.params for a in frame[k]])
                group.column = is_column(v)
            if v.kind == "partial":
                self._share(group, v)
            self._frame_operand(group, v.args[0], frame)
            kept = tuple(() if k in v.params else f for k, f in enumerate(frame))
            group.frames[v] = kept if v.kind == "reduce" else ((SHARE,), *kept)
        else:
            group.frames[v] = frame
            if v.kind == "scan":
                group.scans = True
                if not group.reduced:
                    group.set_reduced(frame[v.params[0]])
                    group.column = is_column(v)
            group.whole = v.kind == "whole"
            if v.kind not in ("gather", "concat", "whole"):
                for a in aligned_operands(v):
                    if a.shape == v.shape:
                        self._frame_operand(group, a, frame)
        key = self._twin_key(v)
        if key is not None:
            self.twins[key] = group
            self.twin_frames[(group, key)] = frame
        group.operands += len(v.inputs)
        if is_tied(v, group.tied):
            group.tied.add(v)
        self._enter(group, v)

    def _enter(self, group: Group, v: Value) -> None:
        group.members.append(v)
        group.last = max(group.last, self.place[v])
        self.home[v] = group
        self.closure.grow(group)

    def _share(self, group: Group, v: Value) -> None:
        """Agree on the shares of rows that the group's programs reduce."""
        if not group.shares:
            length = product(group.sizes[a] for a in group.reduced)
            rows = product(group.sizes[a] for a in group.parallel)
            wanted = v.shape[0] if group.column else sweep_parts(rows, length, self.multiprocessors)
            group.share(wanted)
        set_shares(v, group.shares)

    def _frame_operand(self, group: Group, a: Value, frame: Frame) -> None:
        """Note how the group runs over an operand, and over what it is a view of."""
        known: Frame | None = frame
        while known is not None:
            group.frames.setdefault(a, known)
            self._near(a, group)
            if a.kind == "view":
                known = a.params.carry_back(known, group)
            elif not (a.kind == "cast" and a in self.inlined):
                return
            a = a.args[0]

    def _near(self, a: Value, group: Group) -> None:
        groups = self.near[a]
        if group not in groups:
            groups.append(group)

    def _merge(self, one: Group, two: Group, v: Value) -> str | None:
        """Move the members of ``two`` into ``one`` (both feed v), or say why not."""
        if two.whole:  # nothing joined one
            return WHOLE
        if len(one.members) + len(two.members) > MAX_MEMBERS:
            return f"together they have more than {MAX_MEMBERS} members"
        frame = frame_for(two, v)
        own = one.frame(v.args[0] if v.reduces else v)
        if frame is None or own is None:
            return "their shapes do not line up"
        if one.reduced and set(atoms_of(own)) != set(one.domain):
            if two.reduced:
                return "they reduce different dims"
        elif self._only_feeds(one) != self._only_feeds(two):
            return "one of them is for a column reduction, which runs in its own kernel"
        if self._path_between(one, two) or self._path_between(two, one):
            return "the kernel would wait for its own result"
        if self._wait_for(one, two) or self._wait_for(two, one):
            return WRITES
        crossings = Crossings(one, two)
        mapping = align(one, own, two, frame)
        if mapping is None:
            return "their shapes do not line up"
        if two.reduced and one.reduced:
            order = tuple(mapping[a] for a in two.reduced)
            if set(order) != set(one.reduced):
                return "they reduce different dims"
            if order != one.reduced and (one.scans or two.scans):
                return "they run over the dims in different orders"
            both = one.shares and two.shares
            scans = one.scans or two.scans
            if two.shares != one.shares and (one.column or both or scans):
                return "one of them reduces its rows in shares, the other at once"
        hidden = any(
            reads_through(m, self.inlined, b.tied)
            for a, b in ((one, two), (two, one))
            for m in a.members
            if b.tied
        )
        if hidden or crossings.stray(mapping):
            return "one of them reads what the other has for its own row only in another place"
        self._absorb(one, two, mapping)
        return None

    def _wait_for(self, one: Group, two: Group) -> bool:
        return any(self.home.get(w) is two for m in one.members for w in self.waits.get(m, ()))

    def _absorb(self, one: Group, two: Group, mapping: dict[str, str]) -> None:
        if two.reduced and not one.reduced:
            one.set_reduced([mapping[a] for a in two.reduced])
            one.column = two.column
        if two.shares:
            one.share(two.shares)
        for value in list(two.frames):
            frame = two.frame(value)
            if value in one.frames or frame is None:
                continue
            one.frames[value] = tuple(
                None if axis is None else tuple(mapping.get(a, a) for a in axis) for axis in frame
            )
            if two in self.near.get(value, ()):
                self.near[value].remove(two)
                self._near(value, one)
        for key in [k for k in self.twins if k[0] == two.number]:
            moved = (one.number, *key[1:])
            group = self.twins[moved] = self.twins.pop(key)
            self.twin_frames[group, moved] = self.twin_frames.pop((group, key))
        first = min(one.first, two.first)
        self.closure.absorb(one, two, first)
        for m in two.members:
            self.home[m] = one
        one.members = sorted(one.members + two.members, key=self.place.__getitem__)
        one.first, one.last = first, max(one.last, two.last)
        one.operands += two.operands
        one.scans = one.scans or two.scans
        one.tied = find_tied(one.members)
        two.members, two.tied = [], set()

    def _path_between(self, start: Group, end: Group) -> bool:
        """Whether something outside both waits for ``start`` and is waited for by ``end``."""
        if not self.closure.waits(end, start):
            return False
        bit = 1 << start.number
        outside = {s for m in end.members for s in self.reads(m)}
        return any(
            self.closure.until_read(s) & bit
            for s in outside
            if self.home.get(s) not in (start, end)
        )
