"""Which part of a concatenation, or of a patched tensor, an element lies in.

``emit_concat`` and ``emit_patch`` ask for the places that need a look: a comparison that the sizes
of the loop variables decide is not made. ``Body.cuts`` notes where the answer changes: a kernel
whose programs lie between two cuts needs no look at all (see ``piecewise``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .body import Range
from .indexing import Index, Size, is_static, product, simplify
from .ir import Value, base_of

if TYPE_CHECKING:
    from .emit import Emitter

Section = tuple[str, int]

#: elements of an operand that stay in a multiprocessor's L1 cache
SMALL = 4096


def bounds(index: Index, emitter: Emitter) -> tuple[int, int] | None:
    """The least and the largest number that an index of loop variables alone is."""
    low = high = index.const
    for atom, c in index.terms:
        size = emitter.size(atom)
        if atom not in emitter.group.sizes or not is_static(c, size):
            return None
        low, high = low + min(0, c * (size - 1)), high + max(0, c * (size - 1))
    return (low, high) if is_static(low, high) else None


def lies_inside(v: Value, coords: Sequence[Index], emitter: Emitter) -> bool:
    """Whether memory so small that it stays in the L1 cache is read at places that all exist: a
    mask costs more than the load."""
    if not is_static(*v.shape) or product(v.shape) > SMALL:
        return False
    known = [bounds(c, emitter) for c in coords]
    return all(
        k is not None and k[0] >= 0 and k[1] < n for k, n in zip(known, v.shape, strict=True)
    )


def tests(
    emitter: Emitter, section: Section, place: Index, start: Size, end: Size
) -> list[str] | None:
    """What tells whether ``start <= place < end``; None if it never is."""
    _note_cuts(emitter, place, (start, end))
    known = bounds(place, emitter) if is_static(start, end) else None
    if known is not None and (known[1] < start or known[0] >= end):
        return None
    register = tile(emitter, section, place)
    found = []
    if known is None or known[0] < start:
        found.append(f"({register} >= {emitter.size_name(start)})")
        if is_static(start):
            emitter.body.ranges[found[-1]] = Range(place, low=start)
    if known is None or known[1] >= end:
        found.append(f"({register} < {emitter.size_name(end)})")
        if is_static(end):
            emitter.body.ranges[found[-1]] = Range(place, high=end)
    return found


def _note_cuts(emitter: Emitter, place: Index, cuts: Sequence[Size]) -> None:
    if len(place.terms) == 1 and is_static(place.const, *cuts):
        ((atom, c),) = place.terms
        if atom in emitter.group.sizes and is_static(c) and c == 1:
            emitter.body.cuts.setdefault(atom, set()).update(cut - place.const for cut in cuts)


def tile(emitter: Emitter, section: Section, index: Index) -> str:
    """A coordinate in a register."""
    register = emitter.line(section, "{i0}", [emitter._known(index)], prefix="c")
    if emitter._varies(index):
        emitter.body.wide.add(register)
    return register


def mask_line(
    emitter: Emitter, section: Section, inside: Sequence[str | None], wide: bool
) -> str | None:
    """All of ``inside`` in one register; None if nothing is asked. ``wide``: whether it differs
    along a row; of a mask that is made in a loop what it masks is loaded there too."""
    texts = [text for text in inside if text is not None]
    if not texts:
        return None
    if len(texts) == 1 and texts[0].isidentifier():
        return texts[0]
    mask = emitter.line(section, " & ".join(texts), prefix="m")
    emitter.body.masks[mask] = tuple(texts)
    if wide or section[0] == "loop":
        emitter.body.wide.add(mask)
    return mask


def emit_concat(
    emitter: Emitter,
    v: Value,
    coords: Sequence[Index],
    cond: str | None,
    level: int,
    section: Section,
) -> str:
    """The register of v: the element of the part in which it lies."""
    axis = v.params
    varies = emitter._varies(coords[axis])
    start: Size = 0
    pieces: list[tuple[str | None, str]] = []
    for part in v.args:
        end = simplify(start + part.shape[axis])
        asked = tests(emitter, section, coords[axis], start, end)
        if asked is not None:
            inside = mask_line(emitter, section, asked, varies)
            mask = inside
            if base_of(part).kind != "full":  # else nothing is loaded
                mask = mask_line(
                    emitter, section, [inside, cond], varies or cond in emitter.body.wide
                )
            own = list(coords)
            own[axis] = emitter._known(
                coords[axis].shift(-start if is_static(start) else -1 * start)
            )
            pieces.append((inside, emitter.eval(part, own, mask, level)))
        start = end
    text = pieces[-1][1]
    for inside, register in reversed(pieces[:-1]):
        text = f"tl.where({inside}, {register}, {text})"
    return text if len(pieces) == 1 else emitter.line(section, text)
