"""Where the kernel of one op alone measured faster than ATen's: what eager mode replaces unasked.

On a GPU a call through Python costs 10 to 20 microseconds of the host's time more than ATen's own,
so ours must save that on the device. One pointwise kernel moves the bytes that ATen's moves and
saves nothing; softmax and the norms read a long row once where ATen reads it twice or more.

The measurements are the tables ``defaults/*.json``, one a target, which ``python -m benchmarks.ops
--write-table`` writes. A GPU without a table of its own takes that of ``STANDARD``.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..kernels.target import Target

FOLDER = Path(__file__).parent.parent / "defaults"
#: whose table GPUs take that nobody has measured
STANDARD = "nvidia:sm90"
#: ops told apart by the dim that their second argument names: the last, or another
WITH_DIM = ("_softmax", "_log_softmax")

#: ops whose time is that of tensor cores: other dtypes, and heads that are filled up to a tile of
#: another width, have another speed than was measured
ATTENTION = tuple(
    f"_scaled_dot_product_{backend}_attention{suffix}"
    for backend in ("flash", "efficient")
    for suffix in ("", "_backward")
)
HEADS = (64, 128)
#: times ATen's speed that a kernel has on the device at least
LEAST_ON_DEVICE = 0.97


@dataclass(frozen=True)
class Measured:
    """What is known of one overload on one target.

    least:        elements of its largest operand from which ours is at least as fast; None: nowhere
    longest:      of ``WITH_DIM``: longer rows do not stay on the chip, and ATen's softmax loops
                  over them faster
    least_across: of ``WITH_DIM``: as ``least``, over another dim than the last, where ATen reads
                  memory across rows
    ratios:       operand's shape -> time of ATen's call over ours
    any_sizes:    which sizes are arguments, "all" or the "first" of each tensor -> least ratio of
                  the kernels' times, of calls that are ours
    note:         what else was measured
    """

    least: int | None
    longest: int | None = None
    least_across: int | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    any_sizes: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def gains(self) -> bool:
        """Whether there are calls that ours serves faster."""
        return self.least is not None or self.least_across is not None


@dataclass(frozen=True)
class Table:
    """``target``'s measurements, by overload as ATen spells it; ``measured`` on what, and how."""

    target: str
    measured: str
    how: str
    ops: Mapping[str, Measured]


def path_of(label: str, folder: Path = FOLDER) -> Path:
    """Where a target's table lies: ``defaults/nvidia-sm90.json``."""
    return folder / f"{label.replace(':', '-')}.json"


@functools.cache
def table_of(label: str) -> Table:
    """The table of a target, by its label; of ``STANDARD`` where it has none."""
    path = path_of(label)
    return read_table(path if path.exists() else path_of(STANDARD))


def read_table(path: Path) -> Table:
    data = json.loads(path.read_text())
    ops = {name: Measured(**row) for name, row in data["ops"].items()}
    return Table(data["target"], data["measured"], data["how"], ops)


def on_unasked(name: str, target: Target) -> bool:
    """Whether there are calls of an overload that are ours though nobody asked for it by name."""
    row = table_of(target.label).ops.get(name)
    return row is not None and row.gains


def least_elements(name: str, target: Target) -> int:
    """The fewest elements of its first operand with which any call of an overload may be ours."""
    row = table_of(target.label).ops.get(name)
    sizes = () if row is None else (row.least, row.least_across)
    return min((size for size in sizes if size is not None), default=sys.maxsize)


def worth_sharing(name: str, which: str, target: Target) -> bool:
    """Whether an overload's kernel with sizes as arguments, "all" or the "first" of each tensor,
    has not measured slower than ATen's."""
    row = table_of(target.label).ops.get(name)
    return row is None or row.any_sizes.get(which, 1.0) >= LEAST_ON_DEVICE


def why_not_worth(name: str, args: Sequence[Any], target: Target) -> str | None:
    """Why a call of an overload that nobody asked for by name stays ATen's, or None."""
    row = table_of(target.label).ops.get(name)
    nothing = "one kernel of ours gains nothing over ATen's"
    if row is None:
        return nothing
    if name in ATTENTION and (args[0].dtype.itemsize != 2 or args[0].shape[-1] not in HEADS):
        return "only heads of 64 and 128 elements in 16 bits were measured"
    largest = max((a.numel() for a in args if isinstance(a, Tensor)), default=0)
    least = row.least
    if name in WITH_DIM:
        x, dim = args[0], args[1]
        if dim % max(x.ndim, 1) != x.ndim - 1:
            least = row.least_across
        elif row.longest is not None and x.shape[dim] > row.longest:
            return f"a row has more than {row.longest} elements: ATen is faster"
    if least is None:
        return nothing
    if largest < least:
        return f"less than {least} elements: the call costs more than the kernel saves"
    return None
