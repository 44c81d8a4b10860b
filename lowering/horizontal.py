"""Small independent kernels of equal text in one launch.

The chains of an optimizer step are one kernel a parameter, all alike but for sizes and pointers.
Launched together they are one kernel: each program finds the *part* it belongs to by its number,
picks that part's pointers and element count, and runs the one body they share. The text grows by a
line a pointer, not by a body a part.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.fx import GraphModule, Node

from .body import Body
from .channels_last import WEIGHT
from .flow import has_effect
from .fuse import Fuser
from .graph import output_node
from .group import Group, has_stores
from .held import Held, Needs, allocates, may_move, waits
from .indexing import Index, is_static, product
from .ir import BITS
from .kept import KEPT
from .order import needs_of, schedule
from .render import Renderer
from .schedule import Tile, pointwise_tile
from .source import Lines, Source, preamble
from .tiling import TilingOfMany
from .translate import Program
from .transposed import Transposed, transposed_of

#: torch's launcher allocates above 121 arguments, of which two are Triton's scratch memory (CUDA
#: itself ends at 512)
MOST_ARGUMENTS = 118
#: a group that allocates more than this runs where it stood, or the memory is held for longer
MOST_BYTES = 2**20


@dataclass(frozen=True)
class Part:
    """What a kernel needs to share its launch: kernels of equal ``key`` can."""

    renderer: Any  # _Shared
    source: Source
    numel: int
    key: Any

    def fits(self, parts: Sequence[Part]) -> bool:
        """Whether so many parts, this one among them, are not too many for a launch."""
        return len(_arguments([p.source for p in parts])) <= MOST_ARGUMENTS

    def together(self, parts: Sequence[Part], multiprocessors: int) -> Source:
        """The kernel of all parts."""
        return combined_source(parts, multiprocessors)


@dataclass(frozen=True)
class _Copied(Part):
    """A copy into another layout."""

    copy: Transposed

    def together(self, parts: Sequence[Part], multiprocessors: int) -> Source:
        return _copies_source([p for p in parts if isinstance(p, _Copied)])


class Combined(Group):
    """Groups that are one launch."""

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__(groups[0].number)
        self.groups = tuple(groups)
        self.members = [m for g in groups for m in g.members]
        self.outputs = [o for g in groups for o in g.outputs]
        for group in groups:
            self.stores.update(group.stores)
        self.first, self.last = min(g.first for g in groups), max(g.last for g in groups)


class _Shared(Renderer):
    """A pointwise kernel whose only loop variable is ``x``, without the lines that define it."""

    def lines_of(self, masked: bool) -> Lines:
        self.lines = Lines()
        self.lines.depth = 1
        self.xmask = "xmask" if masked else None
        self.ymask = self.rmask = None
        self.defined = set()
        self._sections()
        return self.lines

    def index(self, index: Index) -> str:
        words = super().index(index).split(" ")
        return " ".join("x" if word in self.parallel else word for word in words)


def may_share(groups: Sequence[Group]) -> set[Group]:
    """Groups of which there is another of the same pointwise ops; cheap, and true of too many."""
    kinds: dict[Any, list[Group]] = {}
    for group in groups:
        if all(m.kind in ("pointwise", "cast", "full") for m in group.members):
            kind = tuple((m.op, m.dtype) for m in group.members), len(group.outputs)
            kinds.setdefault(kind, []).append(group)
    return {g for alike in kinds.values() if len(alike) > 1 for g in alike}


def find_parts(
    candidates: Sequence[Group],
    sources: dict[Group, Source],
    apart: set[Node],
    multiprocessors: int,
) -> dict[Group, Part]:
    """Those of ``may_share`` that can share a launch; one with a node in ``apart`` may not."""
    parts: dict[Group, Part] = {}
    known: dict[Source, Part | None] = {}
    for group in candidates:
        if apart.isdisjoint(group.nodes):
            source = sources[group]
            first = source.like or source
            if first not in known:
                known[first] = _part_of(first, multiprocessors)
            part = known[first]
            if part is not None:
                parts[group] = replace(part, source=source)
    keys = Counter(part.key for part in parts.values())
    return {group: part for group, part in parts.items() if keys[part.key] > 1}


def _part_of(source: Source, multiprocessors: int) -> Part | None:
    """The kernel as a part of a launch; None for one that is no loop over contiguous memory."""
    body: Body = source.body
    group = body.group
    if body.derived or body.folds or not is_static(*(group.sizes[a] for a in group.domain)):
        return None
    if any(role == "size" for _, role, _ in source.params):
        return None
    copy = transposed_of(body)
    if copy is None and source.loops > 1:
        return None
    shared = _Shared(body, source.name, multiprocessors)
    unaligned = source.meta["unaligned"]
    pointers = tuple((n, role, what.dtype, n in unaligned) for n, role, what in source.params)
    if copy is not None:
        return _Copied(shared, source, copy.numel, ("copy", pointers), copy)
    if shared.square or shared.wide64 or len(shared.parallel) > 1:
        return None
    stores = [i.indices[0] for i in shared.instrs if i.kind == "store"]
    if any(store.coefficient(a) != 1 for store in stores for a in shared.parallel):
        return None
    numel = product(shared.sizes[a] for a in shared.parallel)
    wide = 128 // min(BITS[dtype] for _, _, dtype, _ in pointers)  # elements of a 16-byte load
    key = (*shared.lines_of(masked=True).clean, pointers, numel % wide == 0)
    return Part(shared, source, numel, key)


# which groups share a launch ----------------------------------------------------------------------


def combine(
    gm: GraphModule,
    program: Program,
    fuser: Fuser,
    groups: Sequence[Group],
    parts: dict[Group, Part],
) -> list[Any]:
    """Groups and ATen nodes in order; groups that share a launch as one, where the first stood.

    A group moves up to an earlier launch of its kind, if all that it needs ran before that, no call
    with an effect lies between, and it holds no large memory for longer.
    """
    steps = schedule(gm, program, groups, fuser.home, fuser.reads)
    if not parts:
        return steps
    needs = needs_of(program, groups, fuser.home, fuser.reads)
    late = {s for s in steps if _may_be_late(s, parts, needs)}
    if late:
        steps = _put_off(steps, late, needs)
    held = functools.cache(lambda: Held(steps, needs, late, output_node(gm.graph)))
    launches = _Combiner(steps, parts, needs, late, held).run()
    return [Combined(launch) if len(launch) > 1 else launch[0] for launch in launches]


def _may_be_late(step: Any, parts: dict[Group, Part], needs: Needs) -> bool:
    """Whether it converts what is there from the start: by a kernel, or in a call for itself."""
    if isinstance(step, Node):
        return bool(step.meta.get(WEIGHT)) and KEPT not in step.meta
    return isinstance(parts.get(step), _Copied) and all(
        isinstance(n, Node) and n.op == "placeholder" for n in waits(step, needs)
    )


def _put_off(steps: Sequence[Any], late: set[Any], needs: Needs) -> list[Any]:
    """The steps, with ``late`` ones ahead of their first reader, or of what may write an input."""
    waiting, found = dict.fromkeys(s for s in steps if s in late), list[Any]()
    for step in steps:
        if step in late:
            continue
        writes = has_effect(step) if isinstance(step, Node) else has_stores(step)
        now = waiting if writes else waits(step, needs) & waiting.keys() if waiting else ()
        for ahead in [s for s in waiting if s in now]:
            found.append(ahead)
            del waiting[ahead]
        found.append(step)
    return [*found, *waiting]


class _Combiner:
    """``late``: groups that may come earlier as far as memory allows, which ``held`` tells."""

    def __init__(
        self,
        steps: Sequence[Any],
        parts: dict[Group, Part],
        needs: Needs,
        late: set[Any],
        held: Callable[[], Held],
    ) -> None:
        self.steps, self.parts, self.needs = steps, parts, needs
        self.late, self.held = late, held
        self.at = {step: place for place, step in enumerate(steps)}
        self.launches: list[list[Any]] = []
        self.place: dict[Any, int] = {}  # step -> index into launches
        self.open: dict[Any, int] = {}  # key -> the latest launch of that kind
        self.barrier = -1  # the latest call with an effect

    def run(self) -> list[list[Any]]:
        for step in self._by_level(self.steps):
            place = self._place_in_earlier(step)
            if place is None:
                place = len(self.launches)
                self.launches.append([])
            self.launches[place].append(step)
            self.place[step] = place
            if step in self.parts:
                self.open[self.parts[step].key] = place
            elif isinstance(step, Node) and has_effect(step):
                self.barrier = place
        return self.launches

    def _by_level(self, steps: Sequence[Any]) -> Iterator[Any]:
        """Stretches of small parts in the order of what they wait for, so that launches fill up."""
        for small, stretch in itertools.groupby(steps, self._is_small):
            if not small:
                yield from stretch
                continue
            level: dict[Any, int] = {}
            for step in stretch:
                level[step] = 1 + max(
                    (level.get(n, -1) for n in waits(step, self.needs)), default=-1
                )
            yield from sorted(level, key=level.__getitem__)

    def _is_small(self, step: Any) -> bool:
        return step in self.parts and allocates(step) <= MOST_BYTES

    def _place_in_earlier(self, step: Any) -> int | None:
        part = self.parts.get(step)
        place = None if part is None else self.open.get(part.key)
        if part is None or place is None or place <= self.barrier or self._after(step) >= place:
            return None
        late, next_to_it = step in self.late, place == len(self.launches) - 1
        if not (late or next_to_it or self._is_small(step)):
            return None
        launch = self.launches[place]
        if not part.fits([self.parts[g] for g in (*launch, step)]):
            return None
        return place if not late or may_move(step, self.at[launch[0]], self.held) else None

    def _after(self, step: Any) -> int:
        """The last launch that something the step waits for is in."""
        return max((self.place.get(n, -1) for n in waits(step, self.needs)), default=-1)


def _arguments(sources: Sequence[Source]) -> list[tuple[str, str, Any]]:
    """The parameters of a launch: one that all parts have in common is passed once."""
    out: list[tuple[str, str, Any]] = []
    for same in zip(*(s.params for s in sources), strict=True):
        name, role, what = same[0]
        if all(w is what for _, _, w in same):
            out.append((name, role, what))
        else:
            out += [(f"{name}_{k}", role, w) for k, (_, _, w) in enumerate(same)]
    return out


# the text -----------------------------------------------------------------------------------------


def combined_source(parts: Sequence[Part], multiprocessors: int) -> Source:
    """One kernel for all parts."""
    tile = pointwise_tile(sum(p.numel for p in parts), multiprocessors)
    return TilingOfMany(tile, partial(_in_tiles, parts)).write()


def _in_tiles(parts: Sequence[Part], tile: Tile) -> Source:
    programs = [-(-p.numel // tile.x) for p in parts]
    masked = any(p.numel % tile.x for p in parts)
    params = _arguments([p.source for p in parts])
    select = _select(parts, programs, {n for n, _, _ in params}, masked)
    body = parts[0].renderer.lines_of(masked)
    meta = _meta(parts, params, {"XBLOCK": tile.x}, tile.warps)
    head = _head(meta["name"], list(meta["signature"]), ["XBLOCK"], parts)
    above = "\n".join([head, *select]) + "\n"
    own = parts[0].source.own
    computes = {k: own.get(v, v) for k, v in body.below(above).items()}
    return Source(meta["name"], above + body.text, params, sum(programs), meta, computes)


def _copies_source(parts: Sequence[_Copied]) -> Source:
    """Each copy has a body of its own, where its sizes are constants."""
    params = _arguments([p.source for p in parts])
    common = {n for n, _, _ in params}
    starts = list(itertools.accumulate((p.copy.programs for p in parts), initial=0))
    lines = Lines()
    lines.depth = 1
    lines.add("pid = tl.program_id(0)")

    def body(k: int) -> None:
        source, out = (n if n in common else f"{n}_{k}" for n, _, _ in parts[k].source.params)
        parts[k].copy.lines(lines, source, out, starts[k], k)

    branch(lines, starts, range(len(parts)), body)
    meta = _meta(parts, params, {}, warps=4)
    head = _head(meta["name"], list(meta["signature"]), [], parts)
    return Source(meta["name"], f"{head}\n{lines.text}", params, starts[-1], meta)


def _meta(
    parts: Sequence[Part], params: Sequence[Any], constants: dict[str, int], warps: int
) -> dict[str, Any]:
    first, renderer = parts[0].source, parts[0].renderer
    unaligned = set(first.meta["unaligned"])
    return {
        **first.meta,
        "name": f"{first.name}_x{len(parts)}",
        "signature": {n: renderer._type(role, what) for n, role, what in params},
        "constants": constants,
        "num_warps": warps,
        "unaligned": [
            n for n, _, _ in params if n.rpartition("_")[0] in unaligned or n in unaligned
        ],
    }


def _head(name: str, names: list[str], constants: list[str], parts: Sequence[Part]) -> str:
    begin = preamble([parts[0].renderer.body])
    params = ", ".join([*names, *(f"{c}: tl.constexpr" for c in constants)])
    return f"{begin}\n\n@triton.jit\ndef {name}({params}):"


def _select(
    parts: Sequence[Part], programs: Sequence[int], common: Container[str], masked: bool
) -> list[str]:
    """The lines that say which part a program works on, and where in it.

    A tree of branches: programs are short, and a select for each part and pointer would take as
    long as the work (39 parts of 3 pointers, H200: 589 us, 393 with branches).
    """
    starts = [sum(programs[:k]) for k in range(len(parts))]
    choices = {"start": list(map(str, starts)), "numel": [str(p.numel) for p in parts]}
    for name, _, _ in parts[0].source.params:
        if name not in common:
            choices[name] = [f"{name}_{k}" for k in range(len(parts))]
    if not masked:
        del choices["numel"]
    varying = {n: c for n, c in choices.items() if len(set(c)) > 1}
    lines = Lines()
    lines.add("pid = tl.program_id(0)")
    for name, choice in choices.items():
        if name not in varying:
            lines.add(f"{name} = {choice[0]}")

    def choose(k: int) -> None:
        for name, choice in varying.items():
            lines.add(f"{name} = {choice[k]}")

    branch(lines, starts, range(len(parts)), choose)
    shared = math.gcd(16, *(p.numel for p in parts))
    if "numel" in varying and shared > 1:
        lines.add(f"numel = tl.multiple_of(numel, {shared})")
    lines.add("x = (pid - start) * XBLOCK + tl.arange(0, XBLOCK)")
    if masked:
        lines.add("xmask = x < numel")
    return [f"    {line}" for line in lines.clean]


def branch(lines: Lines, starts: Sequence[int], parts: range, body: Callable[[int], None]) -> None:
    """Choose among ``parts`` by the program's number, and write what is done for each."""
    if len(parts) == 1:
        body(parts[0])
        return
    middle = len(parts) // 2
    for test, half in (
        (f"if pid < {starts[parts[middle]]}:", parts[:middle]),
        ("else:", parts[middle:]),
    ):
        lines.add(test)
        lines.depth += 1
        branch(lines, starts, half, body)
        lines.depth -= 1
