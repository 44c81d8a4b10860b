"""Steps that run between CUDA graphs because their operands or results are large.

A graph reads what is made outside of it from memory of its own, and what it gives to the caller is
copied out of there. A language model's logits, say, are larger than all else together: what makes
and what reads them is launched by itself, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from .capturable import BYTES, CALL, LAUNCH, REPLAY, is_free
from .group import Group
from .indexing import is_static, product
from .ir import BITS, Value

#: bytes from which on a copy takes longer than a launch and two replays
LARGE = int(BYTES * (CALL + 2 * REPLAY))
Step = Any


def steps_apart(
    steps: Sequence[Step],
    reads: Callable[[Step], Iterable[Value]],
    makes: Callable[[Step], Iterable[Value]],
    outside: Collection[Value],
    given: Collection[Value],
    cannot: Callable[[Step], bool],
) -> dict[Step, str]:
    """step -> why it shall run between graphs; empty where that would take longer than the copies.

    ``outside`` are inputs that are copied into a graph, ``given`` are results that are copied out,
    ``cannot`` tells which steps no graph holds.
    """
    outside = {v for v in outside if _size(v) >= LARGE}
    given = {v for v in given if _size(v) >= LARGE}
    copied, apart, runs = set[Value](), dict[Step, str](), 0
    before = False  # whether the last step runs between graphs anyhow
    for step in steps:
        made = [v for v in makes(step) if _size(v) >= LARGE]
        if is_free(step):
            if not outside.isdisjoint(reads(step)):
                outside.update(made)
            continue
        if cannot(step):
            outside.update(made)
            before = True
            continue
        met = [*(v for v in reads(step) if v in outside), *(v for v in made if v in given)]
        if met:
            size = max(map(_size, met)) / 2**20
            apart[step] = f"a graph would copy a tensor of {size:.0f} MB for it"
            copied.update(met)
            outside.update(made)
            runs += not before
        before = bool(met)
    cost = REPLAY * runs + sum(LAUNCH if isinstance(s, Group) else CALL for s in apart)
    return apart if sum(map(_size, copied)) / BYTES > cost else {}


def _size(v: Value) -> int:
    """Bytes; 0 where a size is a symbol."""
    return product(v.shape) * BITS.get(v.dtype, 0) // 8 if is_static(*v.shape) else 0
