"""How a group's loop variables run over a value: frames, and how two groups' frames meet."""

from __future__ import annotations

from typing import Any

from .group import Group
from .indexing import Size, is_one, is_static
from .ir import Value
from .views import Frame, Permute, Reshape


def frame_for(group: Group, v: Value) -> Frame | None:
    """How the group's atoms run over v (over its operand, for a reduction), or None."""
    shape = v.args[0].shape if v.reduces else v.shape
    if v.kind == "concat":
        return None
    frame: list[Any] = [None] * len(shape)
    whole: Frame | None = None  # of the first operand, if that has v's shape
    for a in aligned_operands(v):
        known = group.frame(a)
        if known is None or known == whole:
            continue
        if a.shape == shape and frame.count(None) == len(frame):
            whole, frame = known, list(known)
            continue
        lead = len(shape) - a.ndim
        for k, axis in enumerate(known):
            if axis is None or (is_one(a.shape[k]) and not is_one(shape[lead + k])):
                continue
            if frame[lead + k] is None:
                frame[lead + k] = axis
            elif frame[lead + k] != axis and (
                group.resolve(frame[lead + k]) != group.resolve(axis)
            ):
                return None
    return _complete(group, shape, frame)


def aligned_operands(v: Value) -> tuple[Value, ...]:
    """The operands that v reads at its own place, where their shape allows."""
    if v.kind == "gather":
        return v.inputs[1:]
    return v.inputs[:1] if v.kind == "patch" else v.inputs


def _complete(group: Group, shape: tuple[Size, ...], frame: list[Any]) -> Frame | None:
    """The frame, if it or what is left for its unknown axes covers the domain."""
    if None in frame and not _complete_unknown(group, shape, frame):
        return None
    out = tuple(group.resolve(axis) for axis in frame) if group.parts else tuple(frame)
    return out if group.is_covered(out) else None


def _complete_unknown(group: Group, shape: tuple[Size, ...], frame: list[Any]) -> bool:
    """Give unknown axes the atoms that are left; whether that works out."""
    for k, size in enumerate(shape):
        if frame[k] is None and is_one(size):
            frame[k] = ()
    if all(axis is None for axis in frame):
        return False
    unknown = [k for k, axis in enumerate(frame) if axis is None]
    if not unknown:
        return True
    used = set(group.resolve([a for axis in frame if axis for a in axis]))
    left: tuple[str, ...] = tuple(a for a in group.domain if a not in used)
    for k in reversed(unknown):
        try:
            left, frame[k] = group.take(left, shape[k])
        except ValueError:
            return False
    return not left


def align(one: Group, frame_one: Frame, two: Group, frame_two: Frame) -> dict[str, str] | None:
    """Map the atoms of ``two`` to those of ``one``, splitting both until they match."""
    mapping: dict[str, str] = {}
    for axis_one, axis_two in zip(frame_one, frame_two, strict=True):
        run_one, run_two = list(one.resolve(axis_one)), list(two.resolve(axis_two))
        while run_one and run_two:
            a, b = one.size(run_one[-1]), two.size(run_two[-1])
            try:
                if a == b:
                    mapping[run_two.pop()] = run_one.pop()
                elif is_static(a, b) and a > b:
                    run_one[-1:] = one.split(run_one[-1], b)
                else:
                    run_two[-1:] = two.split(run_two[-1], a)
            except ValueError:
                return None
        if run_one or run_two:
            return None
    return mapping if set(mapping) == set(two.domain) else None


def carried(v: Value, base: Value, frame: Frame | None, group: Group) -> Frame | None:
    """How the group runs over ``v``, a rearrangement of ``base``, if it runs so over base."""
    if frame is None or None in frame:
        return None
    if v is base:
        return tuple(group.resolve(axis) for axis in frame)
    below = carried(v.args[0], base, frame, group)
    if below is None or v.kind == "cast":
        return below
    if not isinstance(v.params, (Permute, Reshape)):
        return None
    try:
        own = v.params.carry(below, group)
    except ValueError:  # the sizes do not divide
        return None
    return None if own is None or None in own else own
