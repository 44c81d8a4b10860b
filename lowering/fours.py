"""Where a tile's places come in runs of four, for which one call of Philox makes the words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .indexing import Index, is_static, product, simplify

if TYPE_CHECKING:
    from .render import Renderer


def axis_of_fours(kernel: Renderer, place: Index) -> int | None:
    """The axis of the tile along which ``place`` runs 4k, 4k + 1, 4k + 2, 4k + 3, or None."""
    if any(a not in kernel.group.sizes for a in place.atoms):
        return None  # a quotient, or a number that was loaded: it may change within a run
    for axis, atoms, block in _axes(kernel):
        if atoms and block % 4 == 0 and _runs(kernel, place, atoms):
            return axis
    return None


def whole_axis(kernel: Renderer, place: Index) -> str | None:
    """``x`` where a place is the program's own x: no digits are taken, to be put together again."""
    if (
        kernel.square is not None
        or kernel.along is not None
        or set(place.atoms) - {*kernel.parallel, *kernel.merged}
    ):
        return None
    steps = {a: place.coefficient(a) for a in place.atoms if a not in kernel.merged}
    plain = is_plain(kernel, steps, kernel.parallel) and is_static(place.const)
    return "x" if steps and plain and place.const == 0 else None


def _axes(kernel: Renderer) -> Iterator[tuple[int, list[str], int]]:
    """Each axis that starts at a multiple of its block: (axis, its atoms, block)."""
    tile = kernel.tile
    if kernel.aligned is not None:
        return  # it starts where memory does
    if kernel.square is not None:
        x, y = kernel.square
        yield 1, [x], tile.x
        yield 0, [y], tile.r
    elif kernel.rank == 1:
        yield 0, kernel.parallel if kernel.along is None else [kernel.along], tile.x
    else:
        if kernel.sweeps or not kernel.shares:  # else each share starts where it starts
            yield 1, kernel.reduced, tile.r
        if not kernel.sweeps:
            yield 0, kernel.parallel, tile.x


def _runs(kernel: Renderer, place: Index, atoms: list[str]) -> bool:
    """Whether place moves by one where the last of an axis' atoms does, four times in a row."""
    steps = {a: place.coefficient(a) for a in place.atoms if a not in kernel.merged}
    steps["the start"] = place.const
    if is_plain(kernel, steps, atoms):
        steps = {a: s for a, s in steps.items() if a not in atoms}
    elif steps.pop(atoms[-1], 0) != 1 or not _is_multiple(kernel.sizes[atoms[-1]]):
        return False
    return all(map(_is_multiple, steps.values()))


def is_plain(kernel: Renderer, steps: dict[str, object], atoms: list[str]) -> bool:
    """Whether the atoms are the digits of the place itself: a run may go over their ends."""
    inner = [product(kernel.sizes[b] for b in atoms[k + 1 :]) for k in range(len(atoms))]
    return all(steps.get(a, 0) == simplify(size) for a, size in zip(atoms, inner, strict=True))


def _is_multiple(size: object) -> bool:
    return is_static(size) and size % 4 == 0  # type: ignore[operator]
