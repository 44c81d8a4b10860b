"""A tensor with some places taken from another one (slice_scatter, select_scatter)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .builder import Builder
from .indexing import ZERO, Index, Size, is_static, simplify, split_index
from .ir import Value
from .pieces import mask_line, tests, tile
from .views import Reshape, Slice

if TYPE_CHECKING:
    from .emit import Emitter

Places = tuple[tuple[int, Size, int], ...]  # (axis, start, step) for each axis that is cut


def patched(b: Builder, x: Value, src: Value, axis: int, start: Size, step: int = 1) -> Value:
    """x with src, which has as many dims, at ``start, start + step, ...`` along ``axis``.

    Where src is that part of x with a patch of its own (``x[1:3, 2:4] = y``), the inner patch is
    laid on x at once, and nothing reads the part.
    """
    axis %= x.ndim
    places: dict[int, tuple[Size, int]] = {axis: (start, step)}
    inner = _inner_patch(x, src, axis, start, step)
    if inner is not None:
        src, own = inner
        for a, inside, stride in own:
            first, stretch = places.get(a, (0, 1))
            places[a] = (simplify(first + stretch * inside), stretch * stride)
    return b.patch(x, src, tuple((a, *places[a]) for a in sorted(places)))


def patched_part(b: Builder, x: Value, src: Value, axis: int, start: Size) -> Value:
    """x with src, which lacks ``axis``, at ``start`` along it."""
    axis %= x.ndim
    inner = _inner_patch_of_part(x, src, axis, start)
    if inner is None:
        return b.patch(x, b.unsqueeze(src, [axis], x.ndim), ((axis, start, 1),))
    src, own = inner
    lifted = ((a + (a >= axis), inside, step) for a, inside, step in own)
    places = sorted([*lifted, (axis, start, 1)], key=lambda place: place[0])
    return b.patch(x, b.unsqueeze(src, [axis], x.ndim), tuple(places))


def _inner_patch(
    x: Value, src: Value, axis: int, start: Size, step: int
) -> tuple[Value, Places] | None:
    if src.kind != "patch" or not _shows(src.args[0], x, axis, start, step):
        return None
    return (src.args[1], src.params) if src.dtype == x.dtype else None


def _inner_patch_of_part(
    x: Value, src: Value, axis: int, start: Size
) -> tuple[Value, Places] | None:
    under = src.args[0] if src.kind == "patch" else None
    if under is None or under.kind != "view" or not isinstance(under.params, Reshape):
        return None
    if not _shows(under.args[0], x, axis, start, 1) or under.ndim != x.ndim - 1:
        return None
    return (src.args[1], src.params) if src.dtype == x.dtype else None


def _shows(part: Value, x: Value, axis: int, start: Size, step: int) -> bool:
    """Whether ``part`` is the slice of x that starts there."""
    if part.kind != "view" or part.args[0] is not x or not isinstance(part.params, Slice):
        return False
    return (part.params.axis, part.params.start, part.params.step) == (axis, start, step)


def emit_patch(
    emitter: Emitter,
    v: Value,
    coords: Sequence[Index],
    cond: str | None,
    level: int,
    section: tuple[str, int],
) -> str:
    """The register of v: the patch's element where there is one, else what lies under it."""
    under, patch = v.args
    own, inside = list(coords), [cond]
    wide = cond in emitter.body.wide
    for axis, start, step in v.params:
        shifted = coords[axis].shift(-start if is_static(start) else -1 * start)
        place, between = split_index(shifted, step, emitter.size, emitter.derive)
        size = patch.shape[axis]
        asked = tests(emitter, section, place, 0, size)
        if asked is None:
            return emitter.eval(under, coords, cond, level)
        inside += asked
        if between != ZERO:
            inside.append(f"({tile(emitter, section, between)} == 0)")
        wide = wide or emitter._varies(coords[axis])
        own[axis] = ZERO if is_static(size) and size == 1 else place
    mask = mask_line(emitter, section, inside, wide)
    above = emitter.eval(patch, own, mask, level)
    if mask == cond:
        return above
    below = emitter.eval(under, coords, cond, level)
    return emitter.line(section, f"tl.where({mask}, {above}, {below})")
