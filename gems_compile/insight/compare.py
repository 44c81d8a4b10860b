"""Whether a kernel's results are right: against eager's and against float64.

An element is right if it is eager's to the bit, or as near to float64 as one of these: ``ULPS``
units in its last place; twice eager's own error; sqrt(n) roundings of an accumulator, which a sum
of n terms of one sign may gather, for they go up as often as down.

Terms may cancel, sums add up in another order, and roundings fall to the other side of a tie, which
eager may be lucky with. Where the above is not enough the reference therefore tells how much its
result moves (in float64) when its operands, and whatever its ops return, move by a unit in the last
place of the narrowest intermediate: any order of a sum may be off by ``SPREAD`` times that.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import served

ULPS = 4
SPREAD = 4
DRAWS = 2
#: units in the last place of the largest element, where the reference does not run in float64
WITHOUT_WIDE = 16

Function = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Difference:
    """Where a kernel's result is wrong. ``error``, ``allowed``: of the worst element, from
    ``exact``; ``count``: elements that are wrong."""

    output: int
    count: int
    numel: int
    where: tuple[int, ...]
    got: Any
    eager: Any
    exact: Any
    error: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.count} of {self.numel} elements differ, most at {list(self.where)}: "
            f"{self.got!r}, eager has {self.eager!r}, float64 {self.exact!r} "
            f"(error {self.error:.3g}, allowed {self.allowed:.3g})"
        )


class Judge:
    """Compares results with a reference: ``plain`` in its own dtypes, ``wide`` in float64, of the
    same ``operands``. ``eps``: of the narrowest intermediate; ``length``: of its reductions."""

    def __init__(
        self,
        plain: Function,
        wide: Function,
        operands: Sequence[Tensor],
        eps: float = torch.finfo(torch.float32).eps,
        length: int = 1,
    ) -> None:
        self.wide, self.operands, self.eps, self.length = wide, operands, eps, length
        with as_eager():
            self.eager = plain(*copies(operands))
        self._exact: Sequence[Tensor] | None = None
        self._spread: list[Tensor] | None = None

    def differences(self, results: Sequence[Tensor]) -> list[Difference]:
        with as_eager():
            found = (self._difference(k, got) for k, got in enumerate(results))
            return [d for d in found if d is not None]

    def _difference(self, k: int, got: Tensor) -> Difference | None:
        # a CPU's batch norm returns float32 where its meta function, and a GPU, return bfloat16
        want = self.eager[k].reshape(got.shape).to(got.dtype)
        right = got == want
        if got.is_floating_point():
            right |= got.isnan() & want.isnan()
        if bool(right.all()):
            return None
        exact = self.exact
        if not got.is_floating_point():
            return self._of_integers(k, got, want, right)
        eager = want.double()
        truth = eager if exact is None else exact[k].reshape(got.shape).double()
        unit = ulp(truth, got.dtype)
        its = torch.where(want.isfinite(), (eager - truth).abs(), 0.0)
        if exact is None:
            unit = torch.full_like(unit, float(_largest(unit))) * (WITHOUT_WIDE / ULPS)
        allowed = torch.maximum(ULPS * unit, 2 * its)
        if self.length > 1:
            kept = torch.float64 if got.dtype == torch.float64 else torch.float32
            rounding = math.sqrt(self.length) * torch.finfo(kept).eps
            allowed = torch.maximum(allowed, rounding * truth.abs())
        error = (got.double() - truth).abs()
        right |= (error <= allowed) | (got.double() == truth)  # infinities have no difference
        if not bool(right.all()) and exact is not None:
            spread = self.spread[k].reshape(got.shape)
            usual = min(2 * float(_largest(its)), 2 * SPREAD * float(spread.square().mean().sqrt()))
            allowed = torch.maximum(allowed, (SPREAD * spread).clamp(min=usual))
            right |= error <= allowed
        return _told(k, right, got, want, truth, error, allowed)

    def _of_integers(self, k: int, got: Tensor, want: Tensor, right: Tensor) -> Difference | None:
        """Numbers and truth values: equal, but where float64 says otherwise than eager, or where a
        rounding decides."""
        if self.exact is None:
            truth = want
        else:
            truth = self.exact[k].reshape(got.shape)
            right = right | (got == truth) | (self.spread[k].reshape(got.shape) > 0)
        error = (got.double() - want.double()).abs()
        return _told(k, right, got, want, truth, error, torch.zeros_like(error))

    @property
    def exact(self) -> Sequence[Tensor] | None:
        """The results in float64; None where the reference cannot run so."""
        if self._exact is None:
            try:
                self._exact = self.wide(*copies(self.operands, _widened))
            except Exception:  # an op that has no float64 form
                return None
        return self._exact

    @property
    def spread(self) -> list[Tensor]:
        """How far each element of the results moves with the operands."""
        if self._spread is None:
            exact = self.exact
            assert exact is not None
            found = [torch.zeros_like(e, dtype=torch.float64) for e in exact]
            for draw, sign in itertools.product(range(DRAWS), (1, -1)):
                with moving(Move(draw, sign * self.eps)) as move:
                    moved = self.wide(*copies(self.operands, move))
                for total, a, b in zip(found, moved, exact, strict=True):
                    way = (a.double() - b.double()).abs()
                    torch.maximum(total, way.nan_to_num(nan=0.0, posinf=0.0), out=total)
            self._spread = found
        return self._spread


class Move:
    """Puts floating-point numbers, as float64, up or down by ``eps`` of them, at random; what has
    the same seed and -``eps`` moves them the other way."""

    def __init__(self, seed: int, eps: float) -> None:
        self.seed, self.eps = seed, eps
        self.generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, t: Tensor) -> Tensor:
        wide = _widened(t)
        if t.is_floating_point():  # the program's own generator stays as it is
            own = self.generators.get(t.device)
            if own is None:
                own = self.generators[t.device] = torch.Generator(t.device).manual_seed(self.seed)
            signs = torch.randint(0, 2, t.shape, generator=own, device=t.device) * 2 - 1
            wide *= 1 + signs * self.eps
        return wide


class _Now(threading.local):
    move: Move | None = None


now = _Now()


@contextlib.contextmanager
def moving(move: Move) -> Iterator[Move]:
    """Within, what ops of references in float64 return is moved: see ``reference_text``."""
    now.move = move
    try:
        yield move
    finally:
        now.move = None


@contextlib.contextmanager
def as_eager() -> Iterator[None]:
    """What references run under: ATen's own kernels, no gradients and no autocast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(served.plainly())
        for kind in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
            stack.enter_context(torch.autocast(kind, enabled=False))
        eager = sys.modules.get("gems_compile.eager")
        if eager is not None and eager.enabled_ops():
            stack.enter_context(eager.use_gems(only=[]))
        yield


def copies(tensors: Sequence[Tensor], copy: Callable[[Tensor], Tensor] | None = None) -> list[Any]:
    """The tensors, copied; what stands there twice is one tensor still."""
    made: dict[int, Tensor] = {}
    for t in tensors:
        if id(t) not in made:
            made[id(t)] = (copy or copied)(t)
    return [made[id(t)] for t in tensors]


def copied(t: Tensor) -> Tensor:
    """A copy that lies as the tensor does, with its gaps."""
    if not t.numel():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.detach().as_strided((span,), (1,)).clone().as_strided(t.shape, t.stride())


def _widened(t: Tensor) -> Tensor:
    return t.to(torch.float64, copy=True) if t.is_floating_point() else t.clone()


def ulp(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance to the next number of ``dtype`` at each of t's magnitudes."""
    info = torch.finfo(dtype)
    size = t.abs().nan_to_num(nan=info.tiny).clamp(min=info.tiny, max=info.max)
    return torch.ldexp(torch.full_like(t, info.eps), torch.frexp(size).exponent - 1)


def _largest(t: Tensor) -> Tensor:
    return t.nan_to_num(nan=0.0, posinf=0.0).max() if t.numel() else t.new_zeros(())


def _told(
    k: int, right: Tensor, got: Tensor, want: Tensor, truth: Tensor, error: Tensor, allowed: Tensor
) -> Difference | None:
    if bool(right.all()):
        return None
    beyond = torch.where(right, -1.0, (error - allowed).nan_to_num(nan=float("inf")))
    place = int(beyond.reshape(-1).argmax())
    where = tuple(int(n) for n in torch.unravel_index(torch.tensor(place), got.shape))
    values = (t[where].item() for t in (got, want, truth))
    numbers = (float(t[where]) for t in (error, allowed))
    count = int((~right).sum())
    return Difference(k, count, got.numel(), where, *values, *numbers)
