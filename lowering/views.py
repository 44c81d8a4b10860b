"""Views as index arithmetic.

Each view says two things: which place of its argument one of its own places shows (``pull``), and
how the loop variables of a kernel run over it when they are known for its argument (``carry``).
A *frame* is, for each axis, the tuple of atoms (outermost first) whose mixed-radix number is the
coordinate; ``None`` stands for an axis that nothing is known about yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

from .indexing import (
    ZERO,
    Index,
    Size,
    contiguous_strides,
    is_static,
    segments,
    simplify,
    split_index,
)

Frame = tuple[Any, ...]  # per axis: tuple of atoms, or None


class Atoms(Protocol):
    """What carry() may ask of a group: the sizes of atoms, and to split one."""

    def size(self, atom: str) -> Size: ...
    def resolve(self, atoms: Sequence[str]) -> tuple[str, ...]: ...
    def take(
        self, atoms: Sequence[str], inner: Size
    ) -> tuple[tuple[str, ...], tuple[str, ...]]: ...


class View:
    """Base: ``shape`` is the view's own, ``src`` its argument's."""

    src: tuple[Size, ...]
    shape: tuple[Size, ...]
    derived = ("runs", "back", "key")

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """All that tells one view from another; what is ``derived`` follows from the rest."""
        return (type(self), *(w for name, w in vars(self).items() if name not in self.derived))

    @property
    def trivial(self) -> bool:
        return False

    def pull(self, coords: Sequence[Index], context: Any) -> list[Index]:
        raise NotImplementedError

    def carry(self, frame: Frame, atoms: Atoms) -> Frame | None:
        """The view's frame, or None when the view is no bijection."""
        return None

    def carry_back(self, frame: Frame, atoms: Atoms) -> Frame | None:
        """The argument's frame, given the view's; None when the view is no bijection."""
        return None

    def strides(self, src: Sequence[Size]) -> tuple[Size, ...]:
        """Where the view's elements lie, given the argument's strides (to choose loop orders)."""
        return contiguous_strides(self.shape)


class Permute(View):
    def __init__(self, src: Sequence[Size], dims: Sequence[int]) -> None:
        self.src = tuple(src)
        self.dims = tuple(d % len(src) for d in dims) if src else ()
        self.shape = tuple(self.src[d] for d in self.dims)

    @property
    def trivial(self) -> bool:
        return self.dims == tuple(range(len(self.dims)))

    def pull(self, coords: Sequence[Index], context: Any) -> list[Index]:
        out = [ZERO] * len(coords)
        for place, dim in enumerate(self.dims):
            out[dim] = coords[place]
        return out

    def carry(self, frame: Frame, atoms: Atoms) -> Frame | None:
        return tuple(frame[d] for d in self.dims)

    def carry_back(self, frame: Frame, atoms: Atoms) -> Frame | None:
        out: list[Any] = [()] * len(self.dims)
        for place, dim in enumerate(self.dims):
            out[dim] = frame[place]
        return tuple(out)

    def strides(self, src: Sequence[Size]) -> tuple[Size, ...]:
        return tuple(src[d] for d in self.dims)


class Expand(View):
    def __init__(self, src: Sequence[Size], shape: Sequence[Size]) -> None:
        self.src, self.shape = tuple(src), tuple(shape)

    @property
    def trivial(self) -> bool:
        return self.src == self.shape

    def pull(self, coords: Sequence[Index], context: Any) -> list[Index]:
        lead = len(self.shape) - len(self.src)
        return [
            ZERO if type(s) is int and s == 1 else coords[lead + k] for k, s in enumerate(self.src)
        ]

    def carry(self, frame: Frame, atoms: Atoms) -> Frame | None:
        lead = len(self.shape) - len(self.src)
        out: list[Any] = []
        for k, size in enumerate(self.shape):
            src = self.src[k - lead] if k >= lead else 1
            if type(src) is int and src == 1 and not (type(size) is int and size == 1):
                out.append(None)
            else:
                out.append(frame[k - lead] if k >= lead else ())
        return tuple(out)

    def strides(self, src: Sequence[Size]) -> tuple[Size, ...]:
        lead = len(self.shape) - len(self.src)
        return tuple(
            src[k - lead] if k >= lead and self.src[k - lead] == size else 0
            for k, size in enumerate(self.shape)
        )


class Reshape(View):
    def __init__(self, src: Sequence[Size], shape: Sequence[Size]) -> None:
        self.src, self.shape = tuple(src), tuple(shape)
        self.runs = segments(self.src, self.shape)

    @property
    def trivial(self) -> bool:
        return self.src == self.shape

    def pull(self, coords: Sequence[Index], context: Any) -> list[Index]:
        runs = self.runs
        if runs is None:  # symbolic sizes that cannot be paired: through one linear index
            runs = [(list(range(len(self.src))), list(range(len(self.shape))))]
        out = [ZERO] * len(self.src)
        for src_dims, own_dims in runs:
            linear = coords[own_dims[0]] if own_dims else ZERO
            for dim in own_dims[1:]:
                linear = linear.scale(self.shape[dim]) + coords[dim]
            for dim in reversed(src_dims[1:]):
                linear, out[dim] = split_index(linear, self.src[dim], context.size, context.derive)
            if src_dims:
                out[src_dims[0]] = linear
        return out

    def carry(self, frame: Frame, atoms: Atoms) -> Frame | None:
        if self.runs is None:
            return None
        out: list[Any] = [()] * len(self.shape)
        for src_dims, own_dims in self.runs:
            if any(frame[d] is None for d in src_dims):
                if len(src_dims) == len(own_dims) == 1:
                    out[own_dims[0]] = None
                    continue
                return None
            run = atoms.resolve([a for d in src_dims for a in frame[d]])
            for dim in reversed(own_dims[1:]):
                try:
                    run, out[dim] = atoms.take(run, self.shape[dim])
                except ValueError:
                    return None
            if own_dims:
                out[own_dims[0]] = run
        return tuple(out)

    def carry_back(self, frame: Frame, atoms: Atoms) -> Frame | None:
        return self.back.carry(frame, atoms)

    @functools.cached_property
    def back(self) -> Reshape:
        """The reshape of the view to its argument."""
        return Reshape(self.shape, self.src)

    def strides(self, src: Sequence[Size]) -> tuple[Size, ...]:
        if self.runs is None:
            return contiguous_strides(self.shape)
        out: list[Size] = [1] * len(self.shape)
        for src_dims, own_dims in self.runs:
            if any(src[a] != simplify(src[b] * self.src[b]) for a, b in pairwise(src_dims)):
                return contiguous_strides(self.shape)
            step = src[src_dims[-1]]
            for dim in reversed(own_dims):
                out[dim] = step
                step = simplify(step * self.shape[dim])
        return tuple(out)


class Slice(View):
    def __init__(
        self, src: Sequence[Size], axis: int, start: Size, stop: Size, step: int = 1
    ) -> None:
        self.src = tuple(src)
        self.axis, self.start, self.step = axis % len(src), start, step
        length = simplify(stop - start)
        if step != 1:
            length = -((-length) // step)
        self.shape = tuple(length if k == self.axis else s for k, s in enumerate(src))

    @property
    def trivial(self) -> bool:
        return is_static(self.start) and self.start == 0 and self.shape == self.src

    def pull(self, coords: Sequence[Index], context: Any) -> list[Index]:
        out = list(coords)
        out[self.axis] = out[self.axis].scale(self.step).shift(self.start)
        return out

    def strides(self, src: Sequence[Size]) -> tuple[Size, ...]:
        return tuple(s * self.step if k == self.axis else s for k, s in enumerate(src))


class Flip(View):
    def __init__(self, src: Sequence[Size], dims: Sequence[int]) -> None:
        self.src = self.shape = tuple(src)
        self.dims = tuple(d % len(src) for d in dims) if src else ()

    @property
    def trivial(self) -> bool:
        return not self.dims

    def pull(self, coords: Sequence[Index], context: Any) -> list[Index]:
        out = list(coords)
        for dim in self.dims:
            out[dim] = out[dim].scale(-1).shift(self.shape[dim] - 1)
        return out

    def strides(self, src: Sequence[Size]) -> tuple[Size, ...]:
        return tuple(src)


class Affine(View):
    """Each coordinate of the argument is ``start`` plus steps along the view's own axes.

    ``steps[k]`` holds (own axis, step) for axis k of the argument; places may be shown many times.
    """

    def __init__(
        self,
        src: Sequence[Size],
        shape: Sequence[Size],
        starts: Sequence[Size],
        steps: Sequence[Sequence[tuple[int, Size]]],
    ) -> None:
        self.src, self.shape = tuple(src), tuple(shape)
        self.starts, self.steps = tuple(starts), tuple(map(tuple, steps))

    def pull(self, coords: Sequence[Index], context: Any) -> list[Index]:
        out = []
        for start, steps in zip(self.starts, self.steps, strict=True):
            place = Index(const=start)
            for axis, step in steps:
                place = place + coords[axis].scale(step)
            out.append(place)
        return out

    def strides(self, src: Sequence[Size]) -> tuple[Size, ...]:
        out: list[Size] = [0] * len(self.shape)
        for stride, steps in zip(src, self.steps, strict=True):
            for axis, step in steps:
                out[axis] = simplify(out[axis] + step * stride)
        return tuple(out)


def take_inner(
    run: Sequence[str],
    inner: Size,
    size: Callable[[str], Size],
    split: Callable[[str, Size], tuple[str, str]],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Part ``run`` (outermost first) so that the second part's sizes multiply to ``inner``.

    Splits an atom when the cut falls inside it; ValueError when no exact cut exists.
    """
    from .indexing import quotient

    run = list(run)
    taken: list[str] = []
    have: Size = 1
    while have != inner:
        if not run:
            raise ValueError("sizes do not match")
        rest = quotient(inner, have)
        atom = run[-1]
        if rest is None:
            raise ValueError("sizes do not divide")
        if quotient(rest, size(atom)) is not None:
            taken.insert(0, run.pop())
            have = simplify(have * size(atom))
        elif quotient(size(atom), rest) is not None:
            outer_atom, inner_atom = split(atom, rest)
            run[-1] = outer_atom
            taken.insert(0, inner_atom)
            have = inner
        else:
            raise ValueError("sizes do not divide")
    return tuple(run), tuple(taken)
