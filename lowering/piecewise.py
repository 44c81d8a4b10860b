"""Concatenations without masks: each part is computed by programs of its own.

A kernel that asks of each element in which part it lies computes every part for all of them. Where
the parts are long, the loop variable is cut where another part begins, and the kernel is emitted
once for each piece: no comparison is left in it. A program finds its piece by its number (SiLU of
one tensor beside a gate of two, 8192 x 28672 on an H200: 555 us with masks, 271 in pieces).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .body import Body, Window
from .emit import Emitter
from .group import Group
from .indexing import NeedSplit, is_static, product
from .ir import Value
from .render import Renderer
from .source import Lines, Source, preamble

MOST_PIECES = 8
#: elements that lie side by side in each piece, so that programs read and write whole lines
SHORTEST_RUN = 512
#: elements below which a few programs do it all
LEAST = 2**16


def piecewise(whole: Renderer, inlined: set[Value], exact: bool) -> Source | None:
    """The kernel that ``whole`` would be in one piece; None if it has no cuts worth it."""
    cut = find_cut(whole)
    if cut is None:
        return None
    windows, outer = cut
    names: dict[Any, str] = {}
    params: list[tuple[str, str, Any]] = []
    try:
        bodies = [emit_piece(whole.group, inlined, exact, names, params, w) for w in windows]
    except NeedSplit:
        return None
    pieces = [Piece(body, f"{whole.name}_{k}", whole) for k, body in enumerate(bodies)]
    even = all(p.numel // outer % whole.tile.x == 0 for p in pieces)
    return assembled(whole.name, pieces, params, outer if even else 1)


def find_cut(whole: Renderer) -> tuple[list[Window], int] | None:
    """(the pieces of one atom, how often the loops outside that atom run)."""
    sizes = whole.group.sizes
    order = whole._order(whole.group.parallel)
    if whole.rank != 1 or whole.square is not None or not is_static(*(sizes[a] for a in order)):
        return None
    if product(sizes[a] for a in order) < LEAST:
        return None
    for atom, found in whole.body.cuts.items():
        cuts = [0, *sorted(c for c in found if 0 < c < sizes[atom]), sizes[atom]]
        place = order.index(atom)
        inner = product(sizes[a] for a in order[place + 1 :])
        if 3 <= len(cuts) <= MOST_PIECES + 1 and all(
            (b - a) * inner >= SHORTEST_RUN for a, b in pairwise(cuts)
        ):
            windows = [Window(atom, a, b - a) for a, b in pairwise(cuts)]
            return windows, product(sizes[a] for a in order[:place])
    return None


def emit_piece(
    group: Group,
    inlined: set[Value],
    exact: bool,
    names: dict[Any, str],
    params: list[tuple[str, str, Any]],
    window: Window | None = None,
) -> Body:
    """One piece; all pieces share the kernel's parameters."""
    emitter = Emitter(group, inlined, exact, looped=False, window=window)
    emitter.names, emitter.body.params = names, params
    return emitter.run()


class Piece(Renderer):
    """A function of the kernel's, which is given ``x``."""

    def __init__(self, body: Body, name: str, whole: Renderer) -> None:
        super().__init__(body, name, whole.multiprocessors, whole.backend)
        self.square = self.along = self.aligned = self.carried = None  # x counts all its places
        self.tile = whole.tile
        self.numel: int = product(self.sizes[a] for a in self.parallel)

    def write(self, masked: bool) -> None:
        self.lines.depth = 1
        self.xmask = "xmask" if masked else None
        self.ymask = self.rmask = None
        self.defined = set()
        if masked:
            self.lines.add(f"xmask = x < {self.numel}")
        self._unravel("x", self.parallel)
        self._sections()

    def parameters(self) -> list[str]:
        """Those of the kernel's parameters that it uses."""
        words = set(re.findall(r"\w+", "\n".join(self.lines.clean)))
        return [n for n, _, _ in self.body.params if n in words]


def assembled(
    name: str, pieces: Sequence[Piece], params: list[tuple[str, str, Any]], rows: int
) -> Source:
    """The kernel of all pieces, which take turns ``rows`` times: a row is written at once."""
    tile = pieces[0].tile
    block = tile.x
    counts = [-(-p.numel // rows // block) for p in pieces]
    for piece in pieces:
        piece.write(masked=piece.numel % block != 0)
    kernel = _dispatch(pieces, counts, any(p.wide64 for p in pieces))
    heads = [f"def {p.name}({', '.join([*p.parameters(), 'x'])}):" for p in pieces]
    heads.append(f"def {name}({', '.join([n for n, _, _ in params])}, XBLOCK: tl.constexpr):")
    functions = [*(p.lines for p in pieces), kernel]
    text, computes = preamble([p.body for p in pieces]), dict[int, Value]()
    for head, lines in zip(heads, functions, strict=True):
        text += f"\n\n@triton.jit\n{head}\n"
        computes |= lines.below(text)
        text += lines.text
    meta = {
        "name": name,
        "signature": {n: pieces[0]._type(role, what) for n, role, what in params},
        "constants": {"XBLOCK": block},
        "num_warps": tile.warps,
    }
    return Source(name, text, params, rows * sum(counts), meta, computes)


def _dispatch(pieces: Sequence[Piece], counts: Sequence[int], wide: bool) -> Lines:
    """The kernel: of each row, so many programs for each piece."""
    lines = Lines()
    lines.depth = 1
    lines.add(f"pid = tl.program_id(0){'.to(tl.int64)' if wide else ''}")
    lines.add(f"place = pid % {sum(counts)}")
    lines.add(f"row = pid // {sum(counts)}")
    start = 0
    for k, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
        last = k == len(pieces) - 1
        lines.add("else:" if last else f"{'el' if k else ''}if place < {start + count}:")
        lines.depth += 1
        lines.add(f"x = (row * {count} + place - {start}) * XBLOCK + tl.arange(0, XBLOCK)")
        lines.add(f"{piece.name}({', '.join([*piece.parameters(), 'x'])})")
        lines.depth -= 1
        start += count
    return lines
