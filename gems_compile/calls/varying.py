"""Calls that differ in sizes alone: a few are compiled each for its own sizes, then one kernel for
all, in which those that differ are run-time arguments, as Dynamo's automatic dynamic shapes are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..lowering.indexing import product, size_of
from ..lowering.private import some_size
from ..lowering.schedule import MAX_PERSISTENT
from ..lowering.symbols import number_of
from .operands import describe

#: Calls compiled for their own sizes before sizes become arguments: models have few kinds of an op,
#: for which constants make the better kernel; where lengths vary there is no end of them. With 0
#: sizes of the first call are arguments.
OWN_SIZES = 4
#: which of them: "all", or the "first" of each tensor
AT_ONCE = "all"
#: Shared kernels of one family. Each has conditions on sizes, which the next call may not meet.
SHARED = 8
#: Numbers with which calls that are alike otherwise are compiled. Where a number is another at each
#: step of a training, as a bias correction is, that would never end.
MAX_NUMBERS = 16
#: Rows of a multiple of this many elements are read in whole vectors.
MULTIPLE = 16


def family_of(parts: Sequence[Any]) -> Any:
    """What calls of one family have in common, of what ``operands.describe`` says: all but sizes
    and strides; of these which are 0 or 1, their order, and about how large the call is."""
    common: list[Any] = []
    largest = 0
    for part in parts:
        if type(part) is torch.Size:
            common.append(tuple([n if n < 2 else 2 for n in part]))
            largest = max(largest, part.numel())
        elif type(part) is tuple:
            common.append(tuple([s > 0 for s in part]))
            common.append(tuple(sorted(range(len(part)), key=part.__getitem__)))
        else:
            common.append(part)
    common.append(largest.bit_length() // 4)  # blocks are chosen for a size
    return tuple(common)


class Variant:
    """What becomes of calls of one description: ``run`` serves them, or ATen does, for ``why``.
    ``shared``: those of others are served by it, too, see ``varying``."""

    __slots__ = ("calls", "layouts", "run", "shared", "single", "why")

    def __init__(
        self,
        run: Callable[[list[Any]], Any] | None,
        single: bool,
        why: str = "",
        layouts: Sequence[Any] | None = (),
    ) -> None:
        self.run, self.single, self.why = run, single, why
        self.layouts = layouts  # of its results, see layout_of; None: its first run tells
        self.calls = 0
        self.shared = False


class Numbers:
    """The numbers with which one overload was called, which its kernels are compiled for."""

    def __init__(self, overload: torch._ops.OpOverload) -> None:
        self._places = {
            place
            for k, argument in enumerate(overload._schema.arguments)
            if any(kind in str(argument.type) for kind in ("number", "float", "Tensor"))
            for place in (k, argument.name)
        }
        self._met: dict[Any, set[Any]] = {}

    def why_not(self, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
        """Why a call with numbers that calls like it did not have is ATen's, or None."""
        parts: list[Any] = [*kwargs]
        numbers: list[Any] = []
        values: list[Any] = []
        for place, value in (*enumerate(args), *kwargs.items()):
            number = place in self._places and isinstance(value, (int, float, complex))
            (numbers if number else values).append(value)
        if not numbers:
            return None
        describe(values, parts, [])
        met = self._met.setdefault(family_of(parts), set())
        these = tuple(map(repr, numbers))  # 0.0 equals -0.0, and a NaN not even itself
        if these not in met and len(met) == MAX_NUMBERS:
            return "its number is another each time"
        met.add(these)
        return None


class Family:
    """What is known of calls that have ``family_of`` in common."""

    def __init__(self) -> None:
        self._own = 0  # how many calls were compiled for their own sizes
        self._tries = 0  # and for others, too
        self._met: list[int] = []  # the sizes and strides of the first call, and which differed:
        self._varies: list[bool] = []
        self._multiple: list[bool] = []
        self._shared: list[tuple[Callable[[Sequence[Tensor]], bool], Variant]] = []

    def shared(self) -> list[Variant]:
        """What serves calls of several sizes."""
        return [found for _, found in self._shared]

    def served_by(self, tensors: Sequence[Tensor]) -> Variant | None:
        """What was compiled for sizes among which these are, or None."""
        for fits, found in self._shared:
            if fits(tensors):
                return found
        return None

    def compile(
        self,
        tensors: Sequence[Tensor],
        make: Callable[[Sizes | None], Variant],
        worth: Callable[[str], bool] = lambda which: True,
    ) -> Variant:
        """What ``make`` makes of a call, for any sizes if there were many, and that can be and is
        ``worth`` it: where "all" sizes vary, or the "first" of each tensor alone."""
        lengths = [n for t in tensors for n in (*t.shape, *t.stride())]
        first = [d == 0 for t in tensors for d in range(2 * t.ndim)]
        if not self._met:
            at_once = first if AT_ONCE == "first" else [True] * len(lengths)
            self._met, self._varies = lengths, [not OWN_SIZES and yes for yes in at_once]
            self._multiple = [True] * len(lengths)
        for k, (n, met) in enumerate(zip(lengths, self._met, strict=True)):
            self._varies[k] |= n != met
            self._multiple[k] &= n % MULTIPLE == 0
        others = any(v and not f for v, f in zip(self._varies, first, strict=True))
        may = self._own >= OWN_SIZES and self._tries < SHARED and any(self._varies)
        if may and (not OWN_SIZES or worth("all" if others else "first")):
            sizes = Sizes(tensors, self._varies, self._multiple)
            found = make(sizes)
            if found.run is not None:
                found.shared = True
                self._shared.append((sizes.condition(), found))
                self._tries += 1
                return found
            self._tries = SHARED  # no kernel takes other sizes
        self._own += 1
        return make(None)


def why_idle(plan: Any, multiprocessors: int, known: Mapping[Any, int]) -> str | None:
    """Why a plan's kernels would leave most of a GPU idle, the symbols of sizes being what is
    ``known``, or None. Where sizes are constants, long rows are cut in parts in more ways."""
    for group in () if plan is None else plan.groups:
        if not group.reduced:
            continue
        rows, length = (
            number_of(product(group.sizes[a] for a in atoms), known)
            for atoms in (group.parallel, group.reduced)
        )
        if rows is None or length is None:
            continue
        shares = max(1, group.shares)
        if rows * shares < multiprocessors // 4 and length > shares * MAX_PERSISTENT:
            return f"{rows * shares} programs would reduce {length // shares} elements each"
    return None


class Sizes:
    """Sizes and strides of a call's tensors, those that vary as symbols.

    varies, multiple: of each tensor's sizes and then its strides, all in a row: whether calls
    before had another one there, and whether all had a multiple of 16. Equal sizes are one symbol.
    """

    def __init__(
        self, tensors: Sequence[Tensor], varies: Sequence[bool], multiple: Sequence[bool]
    ) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self.env = ShapeEnv()
        self._symbols: dict[int, Any] = {}  # a length of this call -> the symbol's multiple
        self._learnt: list[str] = []  # lines of the condition: what each symbol is
        lengths = [n for t in tensors for n in (*t.shape, *t.stride())]
        self._odd = {
            n for n, v, m in zip(lengths, varies, multiple, strict=True) if v and not m
        }  # lengths that once were no multiple
        self._given: list[tuple[list[Any], list[Any]]] = []
        start = 0
        for k, t in enumerate(tensors):
            middle, end = start + t.ndim, start + 2 * t.ndim
            shape = [
                self._length(n, varies[start + d], f"t[{k}].shape[{d}]")
                for d, n in enumerate(t.shape)
            ]
            strides = self._strides(k, t, shape, varies[middle:end])
            self._given.append((shape, strides))
            start = end

    def _length(self, length: int, varies: bool, where: str) -> Any:
        """A size or a stride of this call, or the symbol that stands for it."""
        if not varies or length < 2:
            return length
        if length not in self._symbols:
            by = MULTIPLE if length not in self._odd and length >= 2 * MULTIPLE else 1
            symbol = some_size(self.env, f"length{len(self._symbols)}", length // by)
            divided = f" // {by}" if by > 1 else ""
            self._learnt.append(f"{size_of(symbol)} = {where}{divided}")
            self._symbols[length] = by * symbol
        return self._symbols[length]

    def _strides(
        self, k: int, t: Tensor, shape: Sequence[Any], varies: Sequence[bool]
    ) -> list[Any]:
        """Those of a dense tensor as products of its sizes."""
        strides: list[Any] = list(t.stride())
        beyond, step = 1, 1  # the stride of what lies densely around what was looked at; it here
        for d in sorted(range(t.ndim), key=lambda d: (t.stride(d), -d)):
            if t.stride(d) == step:
                strides[d] = beyond
            else:
                strides[d] = self._length(t.stride(d), varies[d], f"t[{k}].stride({d})")
            beyond, step = strides[d] * shape[d], t.stride(d) * t.shape[d]
        return strides

    def fake(self, k: int, real: Tensor) -> Tensor:
        """The call's tensor k as a FakeTensor; within a FakeTensorMode of ``env``."""
        shape, strides = self._given[k]
        return torch.empty_strided(shape, strides, dtype=real.dtype, device=real.device)

    def condition(self) -> Callable[[Sequence[Tensor]], bool]:
        """Whether what was compiled serves a call of these tensors: those that it was compiled for
        have as many dims. Compiling has noted in ``env`` what it took for granted."""
        from torch.utils._sympy.printers import PythonPrinter

        show = PythonPrinter().doprint
        wanted = [f"{line.partition(' ')[0]} >= 2" for line in self._learnt]
        for k, (shape, strides) in enumerate(self._given):
            for d, (size, stride) in enumerate(zip(shape, strides, strict=True)):
                wanted.append(f"t[{k}].shape[{d}] == {show(size_of(size))}")
                wanted.append(f"t[{k}].stride({d}) == {show(size_of(stride))}")
        wanted += [f"({show(guard.expr)})" for guard in self.env.guards]
        lines = ["def fits(t):", *self._learnt, f"return {' and '.join(wanted)}"]
        made: dict[str, Any] = {"math": math, "torch": torch}
        exec("\n    ".join(lines), made)  # of numbers and symbols alone
        return made["fits"]
