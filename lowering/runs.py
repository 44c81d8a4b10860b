"""Straight runs of kernels: launches with nothing but allocations between them, in one call.

What is allocated between two launches of a run is allocated ahead of it, and what dies there lives
to its end, as long as that does not take more memory than the function has at its peak anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from .cublas import Problem, in_torch
from .graph import RETURNED, is_tensor, saved_inputs, value_of
from .ir import Value
from .ledger import Block

if TYPE_CHECKING:
    from .executor import Writer

#: Kinds of values, as ``native.c`` knows them: a tensor, an address, integers of 64 and 32 bits,
#: the number of programs of a kernel.
TENSOR, ADDRESS, INT64, INT32, GRID = "TPqig"
NUMBERS = {"i64": INT64, "i32": INT32}  # of a kernel's signature

#: as many values as a line of the function can still be read with
MOST_VALUES = 256


class Operand(NamedTuple):
    """A number, or what a text of the function yields in a call plus a number."""

    kind: str
    text: str = ""
    plus: int = 0

    def spelled(self, text: str) -> str:
        """The operand as Python, where the value of its text is named ``text``."""
        if not self.text:
            return str(self.plus)
        if self.kind == TENSOR:
            text = f"{text}.data_ptr()"
        return f"{text} + {self.plus}" if self.plus else text


@dataclass
class Launch:
    """``flag``: the variable that tells whether this call needs places of 64 bits, if any may.
    ``waits``: the kernel waits for the one before it by itself."""

    kernel: str
    name: str
    grid: Operand
    args: list[Operand]
    flag: str = ""
    waits: bool = False


@dataclass
class Multiply(Launch):
    """A matrix product among them. ``args``: two factors, the result."""

    problem: Problem = field(kw_only=True)


@dataclass
class Run:
    """Launches in one call. ``values`` are what it passes: where they come among the arguments."""

    name: str
    launches: list[Launch]
    values: dict[tuple[str, str], int] = field(default_factory=dict)  # (kind, text) -> place

    def __post_init__(self) -> None:
        for launch in self.launches:
            for operand in (launch.grid, *launch.args):
                if operand.text:
                    self.values.setdefault((operand.kind, operand.text), len(self.values))

    @property
    def flag(self) -> str:
        return next((launch.flag for launch in self.launches if launch.flag), "")

    @property
    def call(self) -> str:
        """The line of the function."""
        callee = f"({self.name}w if {self.flag} else {self.name})" if self.flag else self.name
        args = ", ".join(["stream", *(text for _, text in self.values)])
        return f"{callee}({args})  # {'; '.join(launch.name for launch in self.launches)}"

    def is_early(self, place: int) -> bool:
        """Whether a launch is of a kernel that is set up while one of ours ahead of it ends. Behind
        cuBLAS's kernels that gains nothing (0.1 us slower, H200)."""
        before = self.launches[place - 1] if place else None
        return self.launches[place].waits and type(before) is Launch

    def place(self, operand: Operand) -> int:
        return self.values[operand.kind, operand.text]

    def as_python(self, wide: bool = False) -> str:
        """The run as a function that calls kernel by kernel."""
        values = "".join(f", v{k}" for k in range(len(self.values)))
        lines = [f"def {self.name}{'w' * wide}(stream{values}):"]
        for launch in self.launches:
            if isinstance(launch, Multiply):
                where = (f"v{self.place(o)}, {o.plus}" for o in launch.args)
                lines.append(f"    {launch.kernel}({', '.join(where)})  # {launch.name}")
                continue
            grid, *args = (
                operand.spelled(f"v{self.place(operand)}" if operand.text else "")
                for operand in (launch.grid, *launch.args)
            )
            kernel = f"{launch.kernel}w" if wide and launch.flag else launch.kernel
            guard = f"if {grid}: " if launch.grid.text else ""
            inner = ", ".join([grid, "1", "1", "stream", *args])
            lines.append(f"    {guard}{kernel}({inner})  # {launch.name}")
        return "\n".join(lines) + "\n"


class Runs:
    """The part of the Writer that gathers launches into runs."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.launches: dict[int, Launch] = {}  # by line
        self.early: set[int] = set()  # lines that may as well come earlier
        self.made: list[Run] = []
        self.last_used: dict[int, list[str]] = {}  # line -> variables whose last use is there

    def launch(self, launch: Launch) -> None:
        """The function's next line launches a kernel; what it says is known in the end."""
        self.launches[len(self.writer.lines)] = launch
        self.writer.add("")

    def ahead(self, line: str) -> None:
        """A line that may as well come ahead of the launches before it."""
        self.early.add(len(self.writer.lines))
        self.writer.add(line)

    def gather(self, starts: Collection[int] = ()) -> None:
        """Write the lines of the runs, once all lines are known. No run goes on at ``starts``."""
        memory = Memory(self.writer)
        for name, line in self.writer.uses.items():
            self.last_used.setdefault(line, []).append(name)
        pending: list[int] = []
        for line in range(len(self.writer.lines)):
            goes_on = (
                self._fits(pending, self.launches[line])
                if line in self.launches
                else line in self.early and memory.allows(line)
            )
            if pending and (line in starts or not goes_on):
                self._write(pending)
                pending = []
            if line in self.launches:
                pending.append(line)
            memory.passes(line, bool(pending))
        if pending:
            self._write(pending)

    def _fits(self, pending: list[int], launch: Launch) -> bool:
        before = [self.launches[line] for line in pending]
        flags = {other.flag for other in (*before, launch)} - {""}
        values = {(o.kind, o.text) for other in before for o in (other.grid, *other.args)}
        return len(flags) < 2 and len(values) + len(launch.args) < MOST_VALUES

    def _write(self, lines: list[int]) -> None:
        """One run, in the place of its last launch."""
        run = Run(f"r{len(self.made)}", [self.launches[line] for line in lines])
        self.made.append(run)
        self.writer.lines[lines[-1]] = run.call
        late = [n for line in range(lines[0], lines[-1]) for n in self.last_used.pop(line, ())]
        self.last_used.setdefault(lines[-1], []).extend(late)
        self.writer.uses.update(dict.fromkeys(late, lines[-1]))


class Memory:
    """What the function holds line by line, what it was given to let go of among that, and what a
    run would hold beyond that."""

    def __init__(self, writer: Writer) -> None:
        end = len(writer.lines)
        change, self.freed = [0] * (end + 2), [0] * (end + 1)
        ends = {**writer.ledger.ends(writer.uses, end), **_given(writer)}
        for block, last in ends.items():
            size = block.size or 1  # where it is not known: that something dies
            change[block.born] += size
            change[last + 1] -= size
            self.freed[last] += size
        self.held = list(accumulate(change))
        known = all(block.size is not None for block in ends)
        self.peak = max(self.held) if known else 0
        self.late = 0  # bytes that died in the run

    def allows(self, line: int) -> bool:
        """Whether what ``line`` allocates may be there together with all that died in the run."""
        return not self.late or self.held[line] + self.late <= self.peak

    def passes(self, line: int, within: bool) -> None:
        self.late = self.late + self.freed[line] if within else 0


def _given(writer: Writer) -> dict[Block, int]:
    """What forward saved for this graph and nobody else holds, until its last use here."""
    found = {}
    for node in saved_inputs(writer.gm.graph):
        if node.meta.get(RETURNED):
            continue
        value, val = writer.program.of.get(node), value_of(node)
        if isinstance(value, Value) and is_tensor(val):
            names = writer.names[node], writer.aligned.get(value, "")  # what kernels read
            found[Block.of(val)] = max(writer.uses.get(name, 0) for name in names)
    return found


def in_python(
    runs: Sequence[Run], kernels: Mapping[str, Callable[..., None]], wide: bool = False
) -> dict[str, Callable[..., None]]:
    """The runs as Python functions; with their kernels' wide forms, if asked."""
    scope: dict[str, Any] = dict(kernels)
    products = (x for run in runs for x in run.launches if isinstance(x, Multiply))
    scope.update((x.kernel, in_torch(x.problem)) for x in products)
    text = "".join(run.as_python(wide) for run in runs)
    exec(compile(text, "<gems launches>", "exec"), scope)
    return {run.name: scope[f"{run.name}{'w' * wide}"] for run in runs}


def wide_forms(
    runs: Sequence[Run], kernels: Mapping[str, Callable[..., None]]
) -> dict[str, Callable[..., None]]:
    """What launches the wide forms of the runs that have any, by the function's names for them."""
    return {f"{run.name}w": wide_when_called(run, kernels) for run in runs if run.flag}


def wide_when_called(run: Run, kernels: Mapping[str, Callable[..., None]]) -> Callable[..., None]:
    """The run with its kernels' wide forms, which hardly any call asks for."""

    @functools.cache
    def made() -> Callable[..., None]:
        return in_python([run], kernels, wide=True)[run.name]

    return lambda *args: made()(*args)
