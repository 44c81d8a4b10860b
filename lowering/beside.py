"""Independent kernels of equal ops over unlike sizes in one launch: rotary queries and keys.

Kernels of equal text share one body (``horizontal``). These have a body each, and the launch's
programs find theirs by their number, as those of pieces do (``piecewise``). Kernels take turns, so
that what both read (the angles of a position) is read while it is in cache. Queries of 32 heads and
keys of 8, 8192 positions, bfloat16, H200: 47.5 us, and 38.8 + 14.8 in two launches.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from .group import Group
from .horizontal import MOST_ARGUMENTS, Part
from .indexing import is_static, product
from .ir import Value
from .piecewise import Piece, assembled, emit_piece, find_cut
from .render import Renderer
from .schedule import pointwise_tile
from .source import Source

#: kernels of one launch: each is text to compile, and a branch of all programs
MOST = 4
KINDS = frozenset({"pointwise", "cast", "full", "concat", "patch"})


@dataclass(frozen=True)
class Beside(Part):
    """A kernel with a body of its own: its group is emitted again, for parameters in common."""

    renderer: Renderer
    group: Group
    inlined: set[Value]

    def fits(self, parts: Sequence[Part]) -> bool:
        return len(parts) <= MOST and sum(len(p.source.params) for p in parts) <= MOST_ARGUMENTS

    def together(self, parts: Sequence[Part], multiprocessors: int) -> Source:
        return _source([p for p in parts if isinstance(p, Beside)], multiprocessors)


def ops_of(group: Group) -> Any:
    """What groups have in common that may be parts of one launch; None for one that may not."""
    if not KINDS.issuperset(m.kind for m in group.members):
        return None
    return tuple((m.kind, m.op, m.dtype) for m in group.members), len(group.outputs)


def may_stand_beside(groups: Iterable[Group]) -> set[Group]:
    """Groups of which there is another of equal ops; cheap, and true of too many."""
    kinds = {group: ops_of(group) for group in groups}
    many = Counter(kind for kind in kinds.values() if kind is not None)
    return {group for group, kind in kinds.items() if many[kind] > 1}


def find_beside(
    groups: Iterable[Group],
    sources: dict[Group, Source],
    apart: Collection[Node],
    inlined: set[Value],
    multiprocessors: int,
) -> dict[Group, Part]:
    """Those of the groups that can share a launch with another of them, which reads the same.

    Others would save a launch alone, and none of them could write over an operand.
    """
    found: dict[Group, Part] = {}
    shared = _sharing(groups, sources, apart)
    many = Counter(shared.values())
    known: dict[Source, Beside | None] = {}  # of those that were written
    for group, key in shared.items():
        if many[key] < 2:
            continue
        source = sources[group]
        first = source.like or source
        if first not in known:
            known[first] = _part_of(group, source, inlined, multiprocessors)
        part = known[first]
        if part is not None:
            found[group] = replace(part, source=source, group=group, key=("beside", *key))
    keys = Counter(part.key for part in found.values())
    return {group: part for group, part in found.items() if keys[part.key] > 1}


def _sharing(
    groups: Iterable[Group], sources: dict[Group, Source], apart: Collection[Node]
) -> dict[Group, tuple[Any, frozenset[Value]]]:
    """Groups that read what another one of equal ops reads: the ops, and that."""
    reads: dict[Any, dict[Group, set[Value]]] = defaultdict(dict)  # by the ops
    for group in groups:
        ops = ops_of(group)
        if ops is not None and not any(node in apart for node in group.nodes):
            params = sources[group].params
            reads[ops][group] = {what for _, role, what in params if role == "in"}
    found: dict[Group, tuple[Any, frozenset[Value]]] = {}
    for ops, alike in reads.items():
        many = Counter(v for read in alike.values() for v in read)
        for group, read in alike.items():
            if shared := frozenset(v for v in read if many[v] > 1):
                found[group] = ops, shared
    return found


def _part_of(
    group: Group, source: Source, inlined: set[Value], multiprocessors: int
) -> Beside | None:
    """The kernel as a part; None for one whose programs do not count places one by one."""
    sizes = [group.sizes[a] for a in group.domain]
    if not is_static(*sizes) or any(role == "size" for _, role, _ in source.params):
        return None
    whole = Renderer(source.body, source.name, multiprocessors)
    if whole.rank != 1 or find_cut(whole) is not None:
        return None
    if any(form is not None for form in (whole.square, whole.along, whole.carried)):
        return None
    numel = product(whole.sizes[a] for a in whole.parallel)
    return Beside(whole, source, numel, None, group, inlined)


def _source(parts: Sequence[Beside], multiprocessors: int) -> Source:
    """One kernel for all parts."""
    names: dict[Any, str] = {}
    params: list[tuple[str, str, Any]] = []
    first = parts[0]
    tile = pointwise_tile(sum(p.numel for p in parts), multiprocessors)
    exact = first.source.meta["exact"]
    name = f"{first.source.name}_x{len(parts)}"
    pieces = []
    for k, part in enumerate(parts):
        body = emit_piece(part.group, part.inlined, exact, names, params)
        piece = Piece(body, f"{name}_{k}", part.renderer)
        piece.tile = tile
        pieces.append(piece)
    turns = math.gcd(*(-(-p.numel // tile.x) for p in parts))
    source = assembled(name, pieces, params, turns)
    unaligned = {
        what
        for part in parts
        for n, _, what in part.source.params
        if n in part.source.meta["unaligned"]
    }
    source.meta["exact"] = exact
    source.meta["unaligned"] = [n for n, role, what in params if role == "in" and what in unaligned]
    return source
