"""How much memory the compiled function holds at once, from its text alone: nothing runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from .indexing import Size, is_static, size_of
from .ir import BITS, Value


@dataclass(eq=False)
class Block:
    """One tensor's memory; ``size`` in bytes, None where that is symbolic."""

    size: int | None
    born: int  # the line that allocates it

    @classmethod
    def of(cls, what: Any, line: int = 0) -> Block:
        """The memory of a number of bytes, a Value or a FakeTensor."""
        return cls(_bytes_of(what), line)


class Ledger:
    """Which variables hold which blocks. Inputs are the caller's memory, and no blocks."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[Block, ...]] = {}

    def allocate(self, name: str, line: int, what: Any) -> None:
        """``what``: a number of bytes, a Value, a FakeTensor, or a tuple of those."""
        parts = what if isinstance(what, (tuple, list)) else (what,)
        self.held[name] = tuple(Block.of(part, line) for part in parts)

    def share(self, name: str, source: str | None, part: int | None = None) -> None:
        """The variable holds what ``source`` does, or one part of that."""
        blocks = self.held.get(source or "", ())
        self.held[name] = blocks if part is None else blocks[part : part + 1]

    def ends(self, uses: Mapping[str, int], end: int) -> dict[Block, int]:
        """The line behind which each block is free; ``uses``: the last line that names a variable,
        ``end``: the function's."""
        last: dict[Block, int] = {}
        for name, blocks in self.held.items():
            for block in blocks:
                last[block] = max(last.get(block, block.born), uses.get(name, end))
        return last

    def peak(self, uses: Mapping[str, int], end: int) -> int | None:
        """The most bytes at once; see ``ends``. None where sizes are symbolic."""
        change = [0] * (end + 2)
        for block, line in self.ends(uses, end).items():
            if block.size is None:
                return None
            change[block.born] += block.size
            change[line + 1] -= block.size
        return max(accumulate(change))


def _bytes_of(what: Any) -> int | None:
    if isinstance(what, Value):
        return _span(what.shape, what.strides, BITS[what.dtype] // 8)
    if isinstance(what, torch.Tensor) and what.layout == torch.strided:
        return _span(
            [size_of(n) for n in what.shape], [size_of(s) for s in what.stride()], what.itemsize
        )
    return what if isinstance(what, int) else 0


def _span(shape: Sequence[Size], strides: Sequence[Size], each: int) -> int | None:
    """From the first byte of the first element to the last of the last."""
    if not is_static(*shape, *strides):
        return None
    if 0 in shape:
        return 0
    return each * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
