"""The seed of a run's dropout masks, drawn on the host: on the device that is a launch of its own.

A kernel takes such a seed as a number beside the seed's memory, and leaves it there for later
kernels and for backward (``kernels.random.drawn``). Where the host cannot draw (a CUDA graph is
captured, whose replays must draw anew), ATen fills the memory and the number is ``IN_MEMORY``.
Kernels serve both. Which it is for a graph is decided when its function is written, and for a
capture when it runs; the seed is the same, and the generator moves as far.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..kernels.dropout import DRAWN_AT_ONCE, IN_MEMORY, draw_seed, number_drawn, source
from . import native, private
from .flow import flatten
from .graph import value_of
from .indexing import is_static
from .ir import Value, base_of, is_seed
from .runs import INT64, Operand
from .source import NUMBER, Source

if TYPE_CHECKING:
    from .emit import Emitter
    from .executor import Writer


# in a kernel --------------------------------------------------------------------------------------


def takes_number(emitter: Emitter, v: Value) -> bool:
    """Whether the kernel takes v's number, too; the first program of a piece is not known there."""
    return is_seed(v) and emitter.body.window is None


def emit_seed(emitter: Emitter, v: Value, memory: str, section: tuple[str, int]) -> str:
    """The register of a seed."""
    params = emitter.body.params
    name = next((n for n, role, what in params if role == NUMBER and what is v), None)
    if name is None:
        name = f"number{sum(role == NUMBER for _, role, _ in params)}"
        params.append((name, NUMBER, v))
    emitter.body.modules.add("random")
    return emitter.line(section, f"random.drawn({memory}, {name}, tl.program_id(0) == 0)")


# in the function ----------------------------------------------------------------------------------


class Seeds:
    """The part of the Writer that draws seeds on the host."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.numbers: dict[Value, str] = {}  # a seed that the host draws -> variable

    def draws(self, v: Value) -> bool:
        """Whether the host may draw v: kernels alone read it, and one of them runs in any case."""
        writer, device = self.writer, self.writer.device
        known = device.type == "cpu" or (device.type == "cuda" and torch.version.hip is None)
        if not is_seed(v) or not known or value_of(v.node).device != device:
            return False
        readers = [s for s in writer.sources.values() if any(p[1:] == ("in", v) for p in s.params)]
        return (
            all(any(p[1:] == (NUMBER, v) for p in s.params) for s in readers)
            and any(map(self._runs, readers))
            and (writer.cut is None or writer.cut.stays_within_its_part(v))
            and not any(self._reads(step, v) for step in writer.plan.steps)
        )

    def _runs(self, source: Source) -> bool:
        """Whether the kernel is launched whatever the sizes are: it stores the seed."""
        if is_static(source.grid):
            return source.grid > 0
        least = private.smallest(source.grid, map(value_of, self.writer.placeholders))
        return least is not None and least > 0

    def _reads(self, step: Any, v: Value) -> bool:
        """Whether the step is a call of ATen's that reads v."""
        operands = step.all_input_nodes if isinstance(step, Node) else ()
        return any(
            base_of(own) is v for node in operands for own in flatten(self.writer.program.of[node])
        )

    def draw(self, name: str, v: Value, node: Node) -> None:
        """Write the line that draws v."""
        writer, number = self.writer, f"{name}n"
        writer.names[node] = writer.names[v] = name
        self.numbers[v] = number
        writer.plan.drawn.add(node)
        writer.plan.aten.pop(node, None)
        writer.ledger.allocate(name, len(writer.lines), v)
        writer.runs.ahead(f"{name}, {number} = seed()")

    def number(self, v: Value) -> Operand:
        """What a kernel takes as the number of a seed."""
        drawn = v in self.numbers
        return Operand(INT64, self.numbers[v]) if drawn else Operand(INT64, plus=IN_MEMORY)


# in a call ----------------------------------------------------------------------------------------

_lock = threading.Lock()  # no two threads of ours read a generator's offset before one moves it


def drawer(device: torch.device) -> Callable[[], tuple[torch.Tensor, int]]:
    """() -> (the seed's memory, its number): what the functions know as ``seed``."""
    empty = private.allocator(device)
    if device.type != "cuda":
        return lambda: (empty((), (), torch.int64), int(draw_seed(device)))
    index, capturing = device.index or 0, torch.cuda.is_current_stream_capturing
    number = native.number_drawn() or number_drawn

    def draw() -> tuple[torch.Tensor, int]:
        if capturing():  # where the offset is on the device
            return draw_seed(device), IN_MEMORY
        # The same state as another object: to set the default one's offset would also tell cuDNN
        # to make the state of its own dropout anew.
        default = torch.cuda.default_generators[index]
        generator = source.generator or default.graphsafe_get_state()
        with _lock:
            offset = generator.get_offset()
            generator.set_offset(offset + DRAWN_AT_ONCE)
        return empty((), (), torch.int64), number(generator.initial_seed(), offset)

    return draw
