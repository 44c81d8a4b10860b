"""Tables on a terminal: aligned text, in colours where rich is installed."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """``rows`` of texts and numbers under ``columns``; numbers stand right, texts left.

    The text in a row's last column may have further lines, which stand below it.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)

    def text(self, width: int = 120) -> str:
        """Two spaces between columns; the last column is broken at ``width``."""
        return "\n".join(line for line, _ in self._lines(width))

    def _lines(self, width: int) -> list[tuple[str, str]]:
        """(line, what it is: title, head, row, below)"""
        cells = [[_cell(c) for c in row] for row in self.rows]
        wide = [max(map(len, column)) for column in zip(self.columns, *cells, strict=True)]
        right = self.right()
        indent = 2 + sum(w + 2 for w in wide[:-1])
        lines = [(self.title, "title")]
        for kind, row in [("head", [*self.columns]), *(("row", row) for row in cells)]:
            text, *below = row[-1].split("\n")
            first, *more = textwrap.wrap(text, max(width - indent, 40)) or [""]
            parts = [
                text.rjust(w) if r else text.ljust(w)
                for text, w, r in zip((*row[:-1], first), wide, right, strict=True)
            ]
            lines.append(("  " + "  ".join(parts).rstrip(), kind))
            lines += [(" " * (indent + 2) + text, "row") for text in more]
            lines += [(_clipped(" " * (indent + 2) + text, width), "below") for text in below]
        return [(line, kind) for line, kind in lines if line.strip()]

    def right(self) -> list[bool]:
        """Which columns hold numbers: there, an empty text is a number left out."""
        numeric = [
            [isinstance(row[k], (int, float)) for row in self.rows if row[k] != ""]
            for k in range(len(self.columns))
        ]
        return [bool(column) and all(column) for column in numeric]

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The same lines, with the title in bold and what stands behind in grey."""
        from rich.text import Text

        styles = {"title": "bold", "head": "dim", "below": "dim"}
        for line, kind in self._lines(options.max_width):
            yield Text(line, style=styles.get(kind, ""), no_wrap=True, overflow="ignore")


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _filled(paragraph: str, width: int) -> str:
    return textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)


def show(blocks: Iterable[Table | str]) -> None:
    """Print tables and paragraphs."""
    blocks = list(blocks)
    console = _console() if sys.stdout.isatty() else None
    if console is None:
        print(as_text(blocks))
        return
    for k, block in enumerate(blocks):
        console.print(*([""] if k else []), block, sep="\n", markup=False)


def _console() -> Any:
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False)


def as_text(blocks: Iterable[Table | str], width: int | None = None) -> str:
    width = width or max(shutil.get_terminal_size((120, 40)).columns, 80)
    texts = [_filled(b, width) if isinstance(b, str) else b.text(width) for b in blocks]
    return "\n\n".join(t for t in texts if t)
