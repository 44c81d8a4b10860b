"""Tables on a terminal: aligned text everywhere, rich's where it is installed and seen by a person."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """``rows`` of texts and numbers under ``columns``; numbers stand right, texts left."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)

    def text(self, width: int = 140) -> str:
        """Two spaces between columns; the last column ends at ``width``."""
        cells = [[_cell(c) for c in row] for row in self.rows]
        wide = [max(map(len, column)) for column in zip(self.columns, *cells, strict=True)]
        right = self.right()
        lines = [self.title] if self.title else []
        for row in ([str(c) for c in self.columns], *cells):
            parts = [
                text.rjust(w) if r else text.ljust(w)
                for text, w, r in zip(row, wide, right, strict=True)
            ]
            lines.append(clip("  " + "  ".join(parts).rstrip(), width))
        return "\n".join(lines)

    def right(self) -> list[bool]:
        return [
            all(isinstance(row[k], (int, float)) for row in self.rows) and bool(self.rows)
            for k in range(len(self.columns))
        ]

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table as Rich
        from rich.text import Text

        made = Rich(title=self.title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name, right in zip(self.columns, self.right(), strict=True):
            made.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            made.add_row(*(Text(_cell(c)) for c in row))
        return made


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def show(blocks: Iterable[Table | str]) -> None:
    """Print tables and paragraphs."""
    blocks = list(blocks)
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            console = Console(highlight=False)
            for block in blocks:
                console.print(block, markup=False) if isinstance(block, str) else console.print(block)
            return
    print(as_text(blocks))


def as_text(blocks: Iterable[Table | str], width: int | None = None) -> str:
    width = width or max(shutil.get_terminal_size((140, 40)).columns, 100)
    texts = [b if isinstance(b, str) else b.text(width) for b in blocks]
    return "\n\n".join(t for t in texts if t)
