"""How many elements a thread of a pointwise kernel asks for before it needs the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .indexing import Index, Size, is_static
from .ir import BITS

if TYPE_CHECKING:
    from .body import Instr
    from .render import Renderer

#: bytes of an element's operands up to which eight of them keep too few loads in flight
FEW_BYTES = 8
#: elements for each multiprocessor that are work enough in long tiles
LONG_TILES = 2**17
#: ops of so many instructions that twice the elements would only take twice the registers
LONG = ("gelu", "erf", "tanh", "pow", "sin", "cos", "gamma", "random.")


def elements_of_a_thread(renderer: Renderer, numel: Size) -> int:
    """How many of a kernel's are enough loads in flight.

    Twice as many where there is work for long tiles, and a byte is all that a place reads (weights
    of 8 bits dequantized, H200, shares of a copy's speed: 8192 x 4096 0.950, 0.941 with 32; 4096 x
    11008 0.948, 0.941; 32768 x 4096 0.970, 0.976; 16384 x 1024, which is too small, 0.919, 0.926).
    """
    if asks_for_a_byte(renderer):
        return 64 if has_long_tiles(renderer, numel) else 32
    return 16 if asks_for_little(renderer) else 8


def asks_for_little(renderer: Renderer) -> bool:
    """Whether a thread had better work on sixteen elements than on eight.

    H200, of a channels-last image in bfloat16: batch norm's last kernel 54 us, not 68, and that of
    its backward with a ReLU 78 us, not 101; SwiGLU's backward 278 us, not 294. No gain, or a loss,
    with GELU (registers), with numbers that change from row to row, and with masked parts.
    """
    body = renderer.body
    if body.derived or not renderer.parallel:
        return False
    instrs = renderer.instrs
    if any(map(_is_long, instrs)):
        return False
    bits = 0
    for load in _loads(instrs):
        index = load.indices[0]
        if load.cond is not None or (index.atoms and not _runs_along(renderer, index)):
            return False
        if all(index.coefficient(a) != 0 for a in renderer.parallel):
            bits += BITS[load.dtype]
    return 0 < bits <= 8 * FEW_BYTES


def asks_for_a_byte(renderer: Renderer) -> bool:
    """Whether a place of its own is all that each place of a large kernel reads, and that a byte.

    A thread's eight places are then eight bytes in flight; more are better (weights of 8 bits
    dequantized to bfloat16, 4096 x 11008, H200: 0.92 of a copy's speed with 32, 0.89 with eight).
    """
    inner = renderer.parallel[-1] if renderer.parallel else ""
    instrs = renderer.instrs
    if renderer.body.derived or any(map(_is_long, instrs)):
        return False
    own = [load for load in _loads(instrs) if load.indices[0].coefficient(inner) != 0]
    simple = all(load.cond is None and _runs_along(renderer, load.indices[0]) for load in own)
    return simple and sum(BITS[load.dtype] for load in own) == 8


def has_long_tiles(renderer: Renderer, numel: Size) -> bool:
    """Whether a kernel is large enough that fewer and longer tiles keep a GPU busy."""
    return is_static(numel) and numel >= LONG_TILES * renderer.multiprocessors


def stores_more(renderer: Renderer, numel: Size) -> bool:
    """Whether the stores of a large transposing kernel take more memory than its loads."""
    instrs = renderer.instrs
    bits = {k: [BITS[i.dtype] for i in instrs if i.kind == k] for k in ("load", "store")}
    stored = min(bits["store"], default=0)
    return has_long_tiles(renderer, numel) and stored > max(bits["load"])


def _is_long(instr: Instr) -> bool:
    return instr.kind == "line" and any(word in instr.text for word in LONG)


def _runs_along(renderer: Renderer, index: Index) -> bool:
    """Whether neighbours of a program read neighbours in memory."""
    return index.coefficient(renderer.parallel[-1]) == 1


def _loads(instrs: list[Instr]) -> list[Instr]:
    """The loads, each once."""
    return list({(i.text, i.indices): i for i in instrs if i.kind == "load"}.values())
