"""The compiled function in pieces: those that CUDA graphs hold, and what runs between them.

A piece becomes a function of its own, which takes tensors and numbers and returns what later lines
need; the function calls it through what captures it (``cuda_graphs.Captured``). Lines stay as the
Writer wrote them: Python's parser tells which names they read and set.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from .apart import steps_apart
from .capturable import (
    Stretch,
    bytes_of,
    crossing,
    in_order,
    is_size,
    merged,
    stretches,
    too_short,
    why_not_captured,
    written,
)
from .flow import flatten
from .graph import Storage, output_node, value_of
from .group import Group, Plan
from .ir import Value, base_of
from .packed import is_packed, is_unpacked
from .source import Source
from .translate import Program

if TYPE_CHECKING:
    from .executor import Writer

_NUMBER, _SIZE = re.compile(r"(n|wide)\d+"), re.compile(r"n\d+")
#: first: ranges, while a profiler is on
PROFILED = "if profiler._is_profiler_enabled: return profiled(args)"
ALIGNED = "{names}, = [t if not t.data_ptr() & 15 else aligned(t) for t in ({inputs},)]"


@dataclass(eq=False)
class Piece:
    """A part of the function that is captured. ``static``: which of its tensors are at the same
    address in every call. ``notes``: what became of it at run time."""

    name: str
    kind: str
    static: list[int]
    what: str
    results: int
    mixed: bool  # attention saves numbers on the CPU where it runs without a graph
    saved: int | None = None  # one of its results that are saved for backward
    notes: list[str] = field(default_factory=list)


@dataclass
class Captures:
    """What of one graph is captured. ``others``: what is not, and why; ``outside``: the names of
    what is saved for backward in no graph's memory."""

    pieces: list[Piece] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    why_not: str = ""  # nothing is even looked at

    def told(self) -> list[str]:
        """For people."""
        if self.why_not:
            return [f"not captured: {self.why_not}"]
        lines = [f"captured as a CUDA graph: {piece.what}" for piece in self.pieces]
        lines += [f"not captured: {other}" for other in self.others]
        return lines + [note for piece in self.pieces for note in piece.notes]


@dataclass
class Facts:
    """What AOTAutograd knows of the graph. ``static``: inputs that are the same memory in every
    call; ``saved``: what forward computed, and lies in its graphs' memory; ``visible``: how many
    results are the caller's, the others are saved for backward; ``names``: of all results."""

    kind: str
    static: set[Node]
    saved: set[Node]
    visible: int | None
    names: list[str]


class Cut:
    """The part of the Writer that makes pieces."""

    def __init__(
        self,
        gm: GraphModule,
        program: Program,
        plan: Plan,
        sources: dict[Group, Source],
        device: torch.device,
        facts: Facts,
    ) -> None:
        self.gm, self.program, self.sources, self.facts = gm, program, sources, facts
        self.storage = Storage(gm.graph)
        steps = in_order(plan.steps)
        why = {s: why for s in steps if (why := why_not_captured(s, sources, device)) is not None}
        found = stretches(steps, {**self._apart(steps, why), **why}.get)
        for part in found:
            reason = self._why_not(part) if part.captured else None
            if reason is not None:
                part.captured = False
                part.reasons.append(reason)
        self.parts = merged(found)
        self.crossing = crossing(self.parts, sources)
        self.starts: list[int] = []  # the line at which each part begins
        self.written: list[list[str]] = []  # variables in whose memory each part writes
        others = [r for p in self.parts for r in p.reasons]
        self.captures = Captures(others=others, outside=self._saved_outside())

    @property
    def any(self) -> bool:
        return any(part.captured for part in self.parts)

    def within_parts(self, in_place: dict[Value, Value]) -> dict[Value, Value]:
        """Of the results that take an operand's memory, those whose operand is of the same part."""
        parts = enumerate(self.parts)
        home = {v: k for k, part in parts for step in part.steps for v in self._makes(step)}
        return {a: b for a, b in in_place.items() if home.get(a) == home.get(b)}

    def stays_within_its_part(self, v: Value) -> bool:
        """Whether the part that makes v alone has kernels that read it."""
        reading = [p for p in self.parts if v in self._reads(p) or v.node in p.steps]
        return len(reading) == 1

    # what may be captured ------------------------------------------------------------------------

    def _apart(self, steps: Sequence[Any], why: Collection[Any]) -> dict[Any, str]:
        of, fixed = self.program.of, self.facts.static | self.facts.saved
        copied = [n for n in self.gm.graph.nodes if n.op == "placeholder" and n not in fixed]
        # a backward's results are lent
        given = [] if self.facts.kind == "backward" else self._visible()
        outside, results = (
            {base_of(v) for n in nodes for v in flatten(of.get(n))}
            for nodes in (copied, [n for n in given if isinstance(n, Node)])
        )
        return steps_apart(steps, self._needs, self._makes, outside, results, why.__contains__)

    def _makes(self, step: Any) -> list[Value]:
        own = step.outputs if isinstance(step, Group) else flatten(self.program.of.get(step))
        return list(map(base_of, own))

    def _needs(self, step: Any) -> list[Value]:
        """What lies in memory and is read by a step."""
        if isinstance(step, Group):
            return [v for _, role, v in self.sources[step].params if role == "in"]
        nodes = step.all_input_nodes
        return [base_of(v) for n in nodes for v in flatten(self.program.of.get(n))]

    def _saved_outside(self) -> list[str]:
        if self.facts.visible is None:
            return []
        results: Any = output_node(self.gm.graph).args[0]
        captured = {
            v for p in self.parts if p.captured for step in p.steps for v in self._makes(step)
        }
        pairs = list(zip(self.facts.names, results, strict=True))[self.facts.visible :]
        return [
            name
            for name, node in pairs
            if isinstance(node, Node)
            and node.op != "placeholder"
            and captured.isdisjoint(map(base_of, flatten(self.program.of.get(node))))
        ]

    def _why_not(self, part: Stretch) -> str | None:
        reads = self._reads(part)
        for node in [n for step in part.steps for n in written(step)]:
            root, base = self.storage.root.get(node), self._base(node)
            if any(self.storage.root.get(v.node) is root and v is not base for v in reads):
                return f"it writes {node.name} and reads its memory as another tensor"
        return too_short(part, self._copied(part, reads))

    def _base(self, node: Node) -> Value | None:
        value = self.program.of.get(node)
        return base_of(value) if isinstance(value, Value) else None

    def _reads(self, part: Stretch) -> set[Value]:
        """What lies in memory before the part runs, and is read by it."""
        found: set[Value] = set()
        made: set[Value] = set()
        for step in part.steps:
            made.update(self._makes(step))
            found.update(self._needs(step))
        return {v for v in found if v.node is not None and (v not in made or _is_input(v))}

    def _copied(self, part: Stretch, reads: Iterable[Value]) -> int:
        fixed = self.facts.static | self.facts.saved
        inputs = [v.node for v in reads if _is_input(v) and v.node not in fixed]
        bases = {self._base(n) for step in part.steps for n in written(step)}
        inputs += [n for n in inputs if self._base(n) in bases]  # in, and back
        made = {v for s in part.steps if isinstance(s, Group) for v in s.outputs}
        nodes = {s for s in part.steps if isinstance(s, Node)}
        results = [n for n in self._visible() if isinstance(n, Node)]
        own = [n for n in results if n in nodes or self._base(n) in made]
        return sum(bytes_of(value_of(n)) for n in [*inputs, *own])

    def _visible(self) -> Sequence[Any]:
        results: Any = output_node(self.gm.graph).args[0]
        results = results if isinstance(results, (list, tuple)) else (results,)
        return results[: self.facts.visible]

    # while the Writer writes ---------------------------------------------------------------------

    def begins(self, writer: Writer) -> None:
        """The next part's lines follow."""
        self.starts.append(len(writer.lines))

    def ends(self, writer: Writer, part: Stretch) -> None:
        names = [_name(writer, n) for step in part.steps for n in written(step)]
        self.written.append(list(dict.fromkeys(n for n in names if n)))

    # afterwards ----------------------------------------------------------------------------------

    def assemble(self, writer: Writer, results: list[str]) -> str:
        """The text of all functions."""
        return _Assembler(self, writer).text(results)


def _is_input(value: Value) -> bool:
    return value.node is not None and value.node.op == "placeholder"


def _name(writer: Writer, node: Node) -> str | None:
    value = writer.program.of.get(node)
    if isinstance(value, Value):
        base = base_of(value)
        return writer.names.get(base) or writer.names.get(base.node) or writer.names.get(node)
    return writer.names.get(node)


@dataclass
class _Line:
    text: str
    reads: set[str]
    sets: list[str]

    @classmethod
    def of(cls, text: str) -> _Line:
        nodes = list(ast.walk(ast.parse(text)))
        inner = {ast.unparse(n.target) for n in nodes if isinstance(n, ast.comprehension)}
        names = [n for n in nodes if isinstance(n, ast.Name) and n.id not in inner]
        sets = [n.id for n in names if isinstance(n.ctx, ast.Store)]
        reads = {n.id for n in names if isinstance(n.ctx, ast.Load)}
        if "s0" in reads:
            reads.add("scratch")  # which must live as long as its address is in use
        return cls(text, reads, sets)


class _Assembler:
    def __init__(self, cut: Cut, writer: Writer) -> None:
        self.cut, self.writer = cut, writer
        lines = [_Line.of(text) for text in writer.lines]
        self.head = lines[: cut.starts[0]] if cut.starts else lines
        ends = [*cut.starts[1:], len(lines)]
        self.bodies = [lines[a:b] for a, b in zip(cut.starts, ends, strict=True)]
        self.inputs = [writer.names[n] for n in writer.placeholders]
        self.known = {name for line in lines for name in line.sets} | set(self.inputs)
        read_from = {x: writer.names[v] for v, x in writer.aligned.items()}
        self.read_from = {x: i for x, i in read_from.items() if i in self.inputs}
        self.numbers = self._numbers()
        sizes = {writer.names[n] for n in writer.placeholders if is_size(value_of(n))}
        self.symbols = sizes | {n for n in self.known if _SIZE.fullmatch(n)}  # a graph for each

    def _set_by(self, lines: Iterable[_Line]) -> set[str]:
        return {name for line in lines for name in line.sets}

    def _numbers(self) -> set[str]:
        kinds = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
        named = self.writer.names.items()
        found = {x for n, x in named if isinstance(n, Node) and isinstance(value_of(n), kinds)}
        return found | {n for n in self.known if _NUMBER.fullmatch(n)}

    def text(self, results: list[str]) -> str:
        main: list[_Line] = list(self.head)
        pieces: list[str] = []
        captured: dict[str, tuple[Piece, int]] = {}  # variable whose memory is a graph's
        returned = _Line.of(f"return ({''.join(f'{r}, ' for r in results)})")
        for k, (part, body) in enumerate(zip(self.cut.parts, self.bodies, strict=True)):
            body = [line for line in body if line.text]
            if not part.captured:
                main += [*self._before(body), *body]
                continue
            own = [line for line in body if not self._counts(line)]
            main += [line for line in body if self._counts(line)]
            later = [line for rest in self.bodies[k + 1 :] for line in rest]
            calls, text, outs = self._piece(k, own, main, [*later, returned])
            main += calls
            piece = self.cut.captures.pieces[-1]
            captured.update((name, (piece, place)) for place, name in enumerate(outs))
            pieces.append(text)
        main += self._results(results, captured)
        return "\n".join(
            [*pieces, _function("call(args)", [_Line.of(PROFILED), *self._with_stream(main)])]
        )

    def _counts(self, line: _Line) -> bool:
        return bool(line.sets) and self.numbers.issuperset(line.sets)

    def _before(self, body: Sequence[_Line]) -> list[_Line]:
        """What lines need ahead of them: scratch memory, and inputs that are aligned."""
        reads = {name for line in body for name in line.reads}
        found: list[str] = []
        if "s0" in reads:
            found += self.writer.slab.lines
        aligned = [x for x in self.read_from if x in reads]
        if aligned:
            inputs = ", ".join(self.read_from[x] for x in aligned)
            found.append(ALIGNED.format(names=", ".join(aligned), inputs=inputs))
        return [_Line.of(text) for text in found]

    def _piece(
        self, k: int, body: list[_Line], before: list[_Line], later: list[_Line]
    ) -> tuple[list[_Line], str, list[str]]:
        """(lines that call the piece, its own text, variables that it sets)."""
        body = [*self._before(body), *body]
        ins = self._free(body)
        numbers = [n for n in ins if n in self.numbers]
        numbers += sorted((self.symbols & self._set_by(before)).difference(numbers))
        tensors = [n for n in ins if n not in self.numbers]
        wanted = {name for line in later for name in line.reads}
        wanted |= {self.read_from[x] for x in wanted & set(self.read_from)}
        sets = dict.fromkeys(n for line in body for n in line.sets)
        outs = [n for n in sets if n in wanted and n not in self.read_from]
        static = self._static(tensors)
        changed = [
            n for n in self.cut.written[k] if n in tensors and tensors.index(n) not in static
        ]
        name = f"{len(self.cut.captures.pieces)}"
        kind = self.cut.facts.kind
        results = len(outs) + len(changed)
        piece = Piece(f"graph{name}", kind, static, self._what(k), results, self._is_mixed(k))
        self.cut.captures.pieces.append(piece)
        arguments = ", ".join(["args", *numbers])
        unpack = [_Line.of(f"{_tuple(tensors, bare=True)} = args")] if tensors else []
        returned = _Line.of(f"return ({''.join(f'{n}, ' for n in [*outs, *changed])})")
        text = _function(
            f"part{name}({arguments})",
            self._with_stream([*unpack, _Line.of("args.clear()"), *body, returned]),
        )
        left = [*outs, *(f"m{n}" for n in changed)]
        call = f"graph{name}({_tuple(numbers)}, list{name})"
        if left:
            call = f"{_tuple(left, bare=True)} = {call}"
        calls = [f"list{name} = [{', '.join(tensors)}]", f"{call}  # {piece.what}"]
        calls += [f"if m{n} is not {n}: {n}.copy_(m{n})" for n in changed]
        return [_Line.of(text) for text in calls], text, outs

    def _static(self, tensors: Sequence[str]) -> list[int]:
        fixed = {self.writer.names[n] for n in self.cut.facts.static}
        return [k for k, name in enumerate(tensors) if name in fixed]

    def _is_mixed(self, k: int) -> bool:
        names = [
            getattr(getattr(s, "target", None), "_opname", "") for s in self.cut.parts[k].steps
        ]
        return any(n.startswith("_scaled_dot") and n.endswith("_backward") for n in names)

    def _what(self, k: int) -> str:
        steps = self.cut.parts[k].steps
        kernels = sum(isinstance(s, Group) for s in steps)
        calls = sum(
            isinstance(s, Node)
            and s.op == "call_function"
            and getattr(s.target, "_schema", None) is not None
            and not (is_packed(s) or is_unpacked(s))
            for s in steps
        )
        return f"{kernels} kernels, {calls} ATen calls"

    def _free(self, body: Iterable[_Line]) -> list[str]:
        """The names that lines read before they set them."""
        found: dict[str, None] = {}
        known: set[str] = set()
        for line in body:
            for name in sorted(line.reads & self.known - known):
                found[name] = None
            known.update(line.sets)
        return sorted(found, key=_order)

    def _with_stream(self, lines: list[_Line]) -> list[_Line]:
        if not any("stream" in line.reads for line in lines):
            return lines
        now = "None" if self.writer.device.type == "cpu" else "current_stream()"
        return [_Line.of(f"stream = {now}"), *lines]

    def _results(self, results: list[str], captured: dict[str, tuple[Piece, int]]) -> list[_Line]:
        """The return; what is a graph's own memory, and the caller's to keep, is copied.

        Of what a piece saves for backward one result tells whether all of it is still in use: it is
        another tensor of the same memory, for the trees look at their own tensors' references from
        Python, and autograd holds them from C++.
        """
        visible = len(results) if self.cut.facts.visible is None else self.cut.facts.visible
        reads = [sorted(_Line.of(text).reads & set(captured)) for text in results]
        texts = list(results)
        for k in range(visible, len(texts)):
            for piece, place in [captured[name] for name in reads[k][:1]]:
                if piece.saved is None:
                    piece.saved = place
                    if texts[k] in captured:  # else it is a view of it already
                        texts[k] = f"alias({texts[k]})"
        kept = [k for k in range(min(visible, len(texts))) if reads[k]]
        lines = []
        if kept:
            names = [f"o{k}" for k in kept]
            copied = ", ".join(results[k] for k in kept)
            copy = "own_together" if self._share_memory(kept, reads) else "own"
            lines.append(_Line.of(f"{_tuple(names, bare=True)} = {copy}({copied})"))
            for k, name in zip(kept, names, strict=True):
                texts[k] = name
        return [*lines, _Line.of(f"return ({''.join(f'{t}, ' for t in texts)})")]

    def _share_memory(self, places: Sequence[int], reads: Sequence[Sequence[str]]) -> bool:
        """Whether some of these results are the same memory."""
        nodes: Any = output_node(self.cut.gm.graph).args[0]
        roots = [self.cut.storage.root[nodes[k]] for k in places]
        names = [name for k in places for name in reads[k]]
        return len(set(roots)) < len(roots) or len(set(names)) < len(names)


def _order(name: str) -> tuple[str, int]:
    return name.rstrip("0123456789"), int(re.sub(r"\D", "", name) or 0)


def _tuple(names: Sequence[str], bare: bool = False) -> str:
    inner = ", ".join(names) + ("," if names and (bare or len(names) == 1) else "")
    return inner if bare else f"({inner})"


def _function(head: str, lines: Sequence[_Line]) -> str:
    """A function's text, with a ``del`` behind the last use of each name that it sets."""
    sets = {name for line in lines for name in line.sets}
    last: dict[str, int] = {}
    for k, line in enumerate(lines):
        last.update((name, k) for name in (*line.reads, *line.sets) if name in sets)
    body: list[str] = []
    for k, line in enumerate(lines):
        body.append(line.text)
        dead = [n for n in sorted(sets, key=_order) if last[n] == k] if k < len(lines) - 1 else []
        if dead:
            body.append(f"del {', '.join(dead)}")
    return f"def {head}:\n" + "".join(f"    {text}\n" for text in body)
