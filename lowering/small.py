"""Small independent kernels, alike or not, in one launch.

A launch takes as long as moving a few MB does, so kernels that move less wait for one another: a
small one is put off until something reads what it makes (or memory that it reads may change), and
those that wait by then are launched together. Programs find their kernel by their number, and each
kernel's text is a function that one branch calls. What a kernel computes stays the same to the last
bit: its tile, and of a reduction the number of warps, are its own.

The second steps of column reductions are the common case: one for each bias and norm weight of a
backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from .flow import has_effect
from .group import Group, has_stores
from .held import Held, Needs, may_move, waits
from .horizontal import MOST_ARGUMENTS, Combined, branch
from .indexing import is_static, product
from .ir import BITS, Value
from .source import HEADER, POINTER, WAIT, Lines, Source

#: bytes that a kernel moves in less time than a launch takes
SMALL = 2**22
#: bytes of operands that are held for kernels that wait
MOST_HELD = 2**23
#: kernels of different text in one launch
MOST_KINDS = 8

_START = "\n\n@triton.jit\ndef "


class Joined(Combined):
    """Groups whose kernels need not be alike, in one launch."""


def may_join(groups: Sequence[Group], apart: Collection[Node]) -> set[Group]:
    """Small groups, where there is more than one."""
    found = {g for g in groups if _is_small(g) and not any(n in apart for n in g.nodes)}
    return found if len(found) > 1 else set()


def _is_small(group: Group) -> bool:
    if group.whole or not is_static(*group.sizes.values()) or has_stores(group):
        return False
    if sum(map(_bytes, group.outputs)) > SMALL:
        return False
    made = set(group.members)
    read = {a for m in group.members for a in m.inputs if a not in made}
    return (
        all(is_static(*v.shape) for v in read)
        and sum(map(_bytes, [*read, *group.outputs])) <= SMALL
    )


def _bytes(v: Value) -> int:
    return product(v.shape) * BITS[v.dtype] // 8


def join(
    steps: Sequence[Any],
    small: Collection[Group],
    sources: Mapping[Group, Source],
    needs: Needs,
    output: Node,
) -> list[Any]:
    """The steps, with small groups that do not wait for each other as one; ``output``: the graph's
    last node."""
    kinds = {g: kind for g in small if (kind := _kind(sources[g])) is not None}
    if len(kinds) < 2:
        return list(steps)
    held = functools.cache(lambda: Held(steps, needs, kinds, output))
    return _Joiner(kinds, sources, needs, held).run(steps)


def _kind(source: Source) -> Any:
    """What kernels must have in common to be one launch; None of one that is launched alone."""
    if source.text.count(_START) != 1 or source.text.count("tl.program_id(0)") != 1:
        return None
    if any(role == "size" for _, role, _ in source.params):
        return None
    tile, warps = source.meta["constants"], source.meta["num_warps"]
    if "RBLOCK" not in tile:
        return "pointwise"  # however many warps: each element is computed by itself
    # the largest tile's registers are everybody's
    return warps, (tile["XBLOCK"] * tile["RBLOCK"] // (32 * warps)).bit_length() // 2


@dataclass
class _Waiting:
    """Groups that wait for a launch, and what it will take."""

    groups: list[Group] = field(default_factory=list)
    held: set[Value] = field(default_factory=set)
    bytes: int = 0  # of what is held
    arguments: int = 0
    texts: set[Any] = field(default_factory=set)

    def has_room(self, source: Source) -> bool:
        return (
            self.arguments + len(source.params) <= MOST_ARGUMENTS
            and (len(self.texts) < MOST_KINDS or kind_of(source) in self.texts)
            and self.bytes + sum(map(_bytes, self._more(source))) <= MOST_HELD
        )

    def add(self, group: Group, source: Source) -> None:
        self.groups.append(group)
        more = self._more(source)
        self.held |= more
        self.bytes += sum(map(_bytes, more))
        self.arguments += len(source.params)
        self.texts.add(kind_of(source))

    def _more(self, source: Source) -> set[Value]:
        """What would be held for it, too."""
        return {w for _, role, w in source.params if role == "in" and w not in self.held}


class _Joiner:
    def __init__(
        self,
        kinds: Mapping[Group, Any],
        sources: Mapping[Group, Source],
        needs: Needs,
        held: Callable[[], Held],
    ) -> None:
        self.kinds, self.sources, self.needs, self.held = kinds, sources, needs, held
        self.place = 0  # of the step that it is at
        self.steps: list[Any] = []
        self.waiting: dict[Any, _Waiting] = {}
        self.home: dict[Group, Any] = {}  # waiting group -> its kind
        self.maker: dict[Value, Group] = {}  # what waiting groups make

    def run(self, steps: Sequence[Any]) -> list[Any]:
        for self.place, step in enumerate(steps):
            self._launch_what_it_needs(step)
            kind = self.kinds.get(step) if isinstance(step, Group) else None
            if kind is not None:
                self._wait(step, kind)
                continue
            if has_effect(step) if isinstance(step, Node) else has_stores(step):
                self._launch_all()
            self.steps.append(step)
        self._launch_all()
        return self.steps

    def _launch_what_it_needs(self, step: Any) -> None:
        if not self.home:
            return
        if isinstance(step, Node):
            needed = waits(step, self.needs)
        else:  # what it loads says it, at less expense
            groups = step.groups if isinstance(step, Combined) else (step,)
            operands = (what for g in groups for _, role, what in self.sources[g].params)
            needed = {self.maker[v] for v in operands if v in self.maker}
        for need in needed:
            if need in self.home:
                self._launch(self.home[need], needed)

    def _wait(self, group: Group, kind: Any) -> None:
        source = self.sources[group]
        if kind in self.waiting and not self.waiting[kind].has_room(source):
            self._launch(kind)
        self.waiting.setdefault(kind, _Waiting()).add(group, source)
        self.home[group] = kind
        self.maker.update(dict.fromkeys(group.outputs, group))

    def _launch(self, kind: Any, needed: Collection[Any] | None = None) -> None:
        """All that wait; if some of them are ``needed``, the others as far as memory allows."""
        groups = self.waiting.pop(kind).groups
        early = [
            g for g in groups if needed is None or g in needed or may_move(g, self.place, self.held)
        ]
        self.steps.append(Joined(early) if len(early) > 1 else early[0])
        for group in early:
            del self.home[group]
        for group in groups:
            if group in self.home:
                self.waiting.setdefault(kind, _Waiting()).add(group, self.sources[group])

    def _launch_all(self) -> None:
        for kind in list(self.waiting):
            self._launch(kind)


# the text -----------------------------------------------------------------------------------------


def joined_source(sources: Sequence[Source]) -> Source:
    """One kernel that calls each kernel's function."""
    kinds: dict[Any, list[Source]] = {}
    for source in sources:
        kinds.setdefault(kind_of(source), []).append(source)
    alike = list(kinds.values())
    params, named = _arguments(alike)
    name = f"{alike[0][0].name}_and_{len(sources) - 1}"
    functions = [_function(some[0], f"part_{k}") for k, some in enumerate(alike)]
    imports = dict.fromkeys(line for some in alike for line in _imports(some[0]))
    text = HEADER + "".join(f"\n{line}\n" for line in imports) + "".join(functions)
    text += f"{_START}{name}({', '.join(n for n, _, _ in params)}):\n"
    lines = Lines()
    lines.depth = 1
    if all(source.waits for source in sources):
        lines.add(WAIT)
    lines.add("pid = tl.program_id(0)")
    starts = [0]
    for some in alike:
        starts.append(starts[-1] + some[0].grid * len(some))

    def call(kind: int) -> None:
        _call(lines, alike[kind], named[kind], starts[kind], kind)

    branch(lines, starts, range(len(alike)), call)
    meta = {
        **alike[0][0].meta,
        "name": name,
        "signature": {n: POINTER[what.dtype] for n, _, what in params},
        "constants": {},
        "num_warps": max(s.meta["num_warps"] for s in sources),
        "unaligned": _unaligned(alike, named),
    }
    return Source(name, text + lines.text, params, starts[-1], meta)


def kind_of(source: Source) -> tuple[str, int]:
    """What kernels alike agree in: a text that needs no mask is that of any number of rows."""
    return source.key, source.grid


def _arguments(
    alike: Sequence[Sequence[Source]],
) -> tuple[list[tuple[str, str, Any]], list[list[dict[str, str]]]]:
    """The launch's parameters, and for each part what its kernel's own are called there."""
    params: list[tuple[str, str, Any]] = []
    named = []
    for k, some in enumerate(alike):
        named.append([{n: f"{n}_{k}_{j}" for n, _, _ in s.params} for j, s in enumerate(some)])
        for names, source in zip(named[-1], some, strict=True):
            params += [(names[n], role, what) for n, role, what in source.params]
    return params, named


def _unaligned(
    alike: Sequence[Sequence[Source]], named: Sequence[Sequence[dict[str, str]]]
) -> list[str]:
    return [
        names[n]
        for some, parts in zip(alike, named, strict=True)
        for names in parts
        for n in some[0].meta["unaligned"]
    ]


def _imports(source: Source) -> list[str]:
    return [line for line in source.text.split("\n") if line.startswith("from ")]


def _function(source: Source, name: str) -> str:
    """A kernel's text as a function that is given its program's number."""
    body = source.text.split(_START)[1].partition(":\n")[2]
    names = [*(n for n, _, _ in source.params), "pid"]
    constants = [f"{c}: tl.constexpr" for c in source.meta["constants"]]
    return f"{_START}{name}({', '.join([*names, *constants])}):\n" + body.replace(
        "tl.program_id(0)", "pid"
    )


def _call(
    lines: Lines, some: Sequence[Source], named: Sequence[dict[str, str]], start: int, kind: int
) -> None:
    """Choose the operands of one of the kernels alike, and call their function."""
    first = some[0]
    own = [n for n, _, _ in first.params]
    starts = [start + k * first.grid for k in range(len(some))]
    at = f"pid - {start}" if start else "pid"
    if len(some) == 1:
        operands = [named[0][n] for n in own]
    else:
        # a name is of one type, also where branches that exclude each other set it
        operands = [f"of_{kind}_{n}" for n in own]

        def choose(k: int) -> None:
            for operand, name in zip(operands, own, strict=True):
                lines.add(f"{operand} = {named[k][name]}")

        branch(lines, starts, range(len(some)), choose)
        at = f"({at}) % {first.grid}"
    constants = [f"{n}={c}" for n, c in first.meta["constants"].items()]
    lines.add(f"part_{kind}({', '.join([*operands, at, *constants])})")
