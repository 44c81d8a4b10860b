"""Which calls launch kernels whose places are numbers of 64 bits.

A kernel of symbolic sizes has a bound (``reach.py``). The function compares it with what 32 bits
hold, once a call for all kernels of equal bounds; of sizes that are known to stay within it, never.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .graph import value_of
from .group import Group
from .private import largest
from .reach import LIMIT_32
from .source import Source

if TYPE_CHECKING:
    from .executor import Writer


class Widths:
    """The part of the Writer that chooses between two widths of a kernel."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.flags: dict[Any, str] = {}  # bound -> variable that says whether it is passed
        self.wide: list[tuple[str, Group]] = []  # kernels that a call may need in 64 bits

    def flag(self, kernel: str, group: Group, source: Source) -> str:
        """The variable that tells whether a call needs the wide form of ``kernel``, if any may."""
        if source.bound is None:
            return ""
        flag = self.flags.get(source.bound)
        if flag is None:
            flag = self.flags[source.bound] = self._decide(source.bound)
        if flag:
            self.wide.append((f"{kernel}w", group))
        return flag

    def _decide(self, bound: Any) -> str:
        top = largest(bound, map(value_of, self.writer.placeholders))
        if top is not None and top <= LIMIT_32:
            return ""
        flag = f"wide{sum(map(bool, self.flags.values()))}"
        self.writer.runs.ahead(f"{flag} = {self.writer.size(bound)} > {LIMIT_32}")
        return flag
