"""Rules of eager mode for ops whose results' sizes are data: see ``sized``.

Ranks of what is kept come from two kernels: sums of blocks, then of all blocks before each; the
kernel that stores sums within its block again. So each element has its place, with no atomic
addition, and results are in order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.draws import exponential, uniform
from ..kernels.scan import LONGEST as LONGEST_SCAN
from ..kernels.sorting import LONGEST, SORTED
from .long_scans import in_blocks, running_sum
from .sized import Rule, Steps
from .whole import Whole

aten = torch.ops.aten

#: elements from which on 32 bits do not count them
NARROW = 2**31


# ranks -------------------------------------------------------------------------------------------


def _flags(kept: Tensor) -> Tensor:
    """1 of what counts: float32, which adds up a block exactly, and faster than 64 bits."""
    return in_blocks((kept != 0).to(torch.float32))


def _ends(kept: Tensor) -> tuple[Tensor, Tensor]:
    return _ends_of(_flags(kept))


def _ends_of(flags: Tensor) -> tuple[Tensor, Tensor]:
    """(How many count up to the end of each block, and before it)."""
    sums = flags.sum(1).long()
    ends = sums.cumsum(0)
    return ends, ends - sums


def _goals(flags: Tensor, before: Tensor) -> Tensor:
    """The rank of each that is kept, -1 of others."""
    ranks = flags.cumsum(1).long() + (before[:, None] - 1)
    return torch.where(flags != 0, ranks, -1)


def _numbers(like: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """0, 1, 2 ... in the shape of ``like``."""
    return torch.arange(like.numel(), dtype=dtype, device=like.device).view(like.shape)


# what is kept ------------------------------------------------------------------------------------


def _put_places(kept: Tensor, before: Tensor, out: Tensor) -> tuple[()]:
    flags = _flags(kept)
    torch.ops.gems.put_.default(out, _goals(flags, before), _numbers(flags, out.dtype))
    return ()


def _put_values(x: Tensor, kept: Tensor, before: Tensor, out: Tensor) -> tuple[()]:
    torch.ops.gems.put_.default(out, _goals(_flags(kept), before), in_blocks(x))
    return ()


def _coordinates(shape: torch.Size, places: Tensor) -> tuple[Tensor]:
    """[dims, places]"""
    steps = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    rows = [places // step % size for step, size in zip(steps, shape, strict=True)]
    return (torch.stack(rows).long(),)


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().view(-1)


def nonzero(steps: Steps, x: Tensor) -> Tensor:
    """[count, dims], the coordinates of a dim side by side in memory."""
    if x.ndim == 0:
        raise Whole("one number")
    flat = _flat(x)
    ends, before = steps(_ends, flat)
    return _places(steps, flat, before, x.shape, int(ends[-1]))


def _places(steps: Steps, kept: Tensor, before: Tensor, shape: torch.Size, count: int) -> Tensor:
    narrow = len(shape) > 1 and kept.numel() < NARROW
    places = kept.new_empty(count, dtype=torch.int32 if narrow else torch.int64)
    steps(_put_places, kept, before, grown=[places])
    if len(shape) == 1:
        return places.as_strided((count, 1), (1, count))
    found = steps(_coordinates, shape, grown=[places])
    if found is None:  # laid out as ATen's kernels of the device leave it
        strides = (1, 1) if kept.is_cuda else (1, 0)
        return kept.new_empty_strided((0, len(shape)), strides, dtype=torch.int64)
    return found[0].t()


def _put_coordinates(kept: Tensor, before: Tensor, shape: torch.Size, *outs: Tensor) -> tuple[()]:
    flags = _flags(kept)
    goals, places = _goals(flags, before), _numbers(flags)
    for k, out in enumerate(outs):
        step = math.prod(shape[k + 1 :])
        torch.ops.gems.put_.default(out, goals, places // step % shape[k])
    return ()


def nonzero_static(steps: Steps, x: Tensor, *, size: int, fill_value: int = -1) -> Tensor:
    """The first ``size`` rows of ``nonzero``'s, or as many with ``fill_value`` behind them."""
    if x.ndim == 0 or size < 1:
        raise Whole("nothing to write")
    flat = _flat(x)
    _, before = steps(_ends, flat)
    rows = [x.new_full((size,), fill_value, dtype=torch.int64) for _ in x.shape]
    steps(_put_coordinates, flat, before, x.shape, grown=rows)
    return torch.stack(rows).t() if x.is_cuda else torch.stack(rows, 1)  # as ATen's


def masked_select(steps: Steps, x: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise Whole(f"a mask of {mask.dtype}")
    x, mask = (_flat(t) for t in torch.broadcast_tensors(x, mask))
    ends, before = steps(_ends, mask)
    out = x.new_empty(int(ends[-1]))
    steps(_put_values, x, mask, before, grown=[out])
    return out


# copies ------------------------------------------------------------------------------------------


def _ends_of_copies(repeats: Tensor) -> tuple[Tensor, Tensor]:
    """(Where the copies of each end, how many there are in all); -1 where one is negative."""
    ends = running_sum(repeats.long())
    return ends, torch.where(repeats.amin() < 0, -1, ends[-1])


def _copied(ends: Tensor, room: Tensor) -> tuple[Tensor]:
    from .rules import searchsorted

    places = torch.arange(room.shape[0], device=room.device)
    return (searchsorted(ends, places, right=True).to(room.dtype),)


def repeat_interleave(steps: Steps, repeats: Tensor, *, output_size: int | None = None) -> Any:
    """Each place as often as its element says; ``output_size``, which must be their sum, saves the
    wait for it."""
    if repeats.ndim != 1 or repeats.dtype not in (torch.int32, torch.int64):
        raise Whole("not a vector of whole numbers")
    ends, total = steps(_ends_of_copies, repeats)
    count = int(total) if output_size is None else output_size
    if count < 0:
        return NotImplemented
    room = repeats.new_empty(1).expand(count)  # of which the step reads the size alone
    found = steps(_copied, ends, grown=[room])
    return repeats.new_empty(0) if found is None else found[0]


# distinct values ---------------------------------------------------------------------------------


def _in_order(flat: Tensor) -> tuple[Tensor, Tensor]:
    """(A short vector's elements in order, their places)."""
    places = torch.ops.gems.row_order.default(flat, False, True, flat.numel())
    return flat.gather(0, places), places


def _starts(ordered: Tensor) -> Tensor:
    """In blocks, 1 of each that is another one than the one before it; so is each NaN."""
    blocks, count = in_blocks(ordered), ordered.shape[0]
    numbers = _numbers(blocks)
    earlier = ordered[(numbers - 1).clamp(0, count - 1)]
    starts = ((blocks != earlier) | (numbers == 0)) & (numbers < count)
    return starts.to(torch.float32)


def _ends_of_runs(ordered: Tensor) -> tuple[Tensor, Tensor]:
    return _ends_of(_starts(ordered))


def _put_runs(ordered: Tensor, before: Tensor, values: Tensor, *first: Tensor) -> tuple[()]:
    """Of each run its value, and the number of its first element where there is room for it."""
    flags = _starts(ordered)
    goals = _goals(flags, before)
    torch.ops.gems.put_.default(values, goals, in_blocks(ordered))
    for numbers in first:
        torch.ops.gems.put_.default(numbers, goals, _numbers(flags))
    return ()


def _put_back(ordered: Tensor, before: Tensor, places: Tensor | None, inverse: Tensor) -> tuple[()]:
    """For each element the number of its run, at the place that it came from."""
    flags = _starts(ordered)
    ranks = flags.cumsum(1).long() + (before[:, None] - 1)
    numbers = _numbers(flags)
    goals = numbers if places is None else in_blocks(places)
    goals = torch.where(numbers < ordered.shape[0], goals, -1)
    torch.ops.gems.put_.default(inverse, goals, ranks)
    return ()


def _lengths(count: int, first: Tensor) -> tuple[Tensor]:
    return (torch.cat([first[1:], first.new_full((1,), count)]) - first,)


def _runs(
    steps: Steps, ordered: Tensor, places: Tensor | None, inverse: bool, counts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(Value of each run, the run of each element, length of each run)."""
    ends, before = steps(_ends_of_runs, ordered)
    values = ordered.new_empty(int(ends[-1]))
    first = [ends.new_empty(values.shape)] if counts else []
    steps(_put_runs, ordered, before, grown=[values, *first])
    which, lengths = ends.new_empty(0), ends.new_empty(0)
    if inverse:
        which = ends.new_empty(ordered.shape)
        steps(_put_back, ordered, before, places, grown=[which])
    if counts:
        (lengths,) = steps(_lengths, ordered.shape[0], grown=first)
    return values, which, lengths


def unique(
    steps: Steps,
    x: Tensor,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Values in order, the place among them of each element, how often each is there). Up to
    4096 elements are sorted by our kernel, more, and those of 64 bits, by ATen's."""
    flat = _flat(x)
    if flat.numel() <= LONGEST and str(x.dtype).removeprefix("torch.") in SORTED:
        ordered, places = steps(_in_order, flat)
    else:
        ordered, places = torch.sort(flat, stable=True)
    values, which, lengths = _runs(steps, ordered, places, return_inverse, return_counts)
    return values, which.view(x.shape) if return_inverse else which, lengths


def unique_consecutive(
    steps: Steps,
    x: Tensor,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if dim is not None:
        raise Whole("slices are compared")
    values, which, lengths = _runs(steps, _flat(x), None, return_inverse, return_counts)
    return values, which.view(x.shape) if return_inverse else which, lengths


# multinomial -------------------------------------------------------------------------------------


def _is_valid(p: Tensor) -> tuple[Tensor]:
    """Whether all are finite and not negative, and no row is all zeros."""
    fine = ((p >= 0) & (p < torch.inf)).all()
    return (fine & (p > 0).any(-1).all(),)


def _first_to_come(p: Tensor, count: int) -> tuple[Tensor]:
    """Places of the largest p / q of exponential q: a draw of ``count`` without replacement. What
    is not probable comes last."""
    q = exponential(p if p.dtype == torch.float64 else p.float())
    race = torch.where(p > 0, p / q, -1)
    if count == 1:
        return (race.argmax(-1, keepdim=True),)
    return (torch.ops.gems.row_order.default(race, True, False, count),)


def _with_replacement(p: Tensor, count: int) -> tuple[Tensor]:
    """Where running sums first exceed u times the sum of all, for u in [0, 1). Those of what is
    not probable are those of the one before it, whatever the order of addition; so it is not
    drawn."""
    from .rules import searchsorted

    wide = p if p.dtype == torch.float64 else p.float()
    sums = torch.where(wide > 0, wide.cumsum(-1), 0)
    sums = sums.cummax(-1)[0]
    shape = (*p.shape[:-1], count)
    u = uniform(wide.new_empty(shape)) * sums[..., -1:]
    return (searchsorted(sums, u, right=True),)


def multinomial(
    steps: Steps, p: Tensor, num_samples: int, replacement: bool = False, generator: Any = None
) -> Any:
    """Places along the last dim, each as probable as its element. Invalid ones are ATen's, which
    has the error for them."""
    if not 0 < p.ndim <= 2 or not p.is_floating_point() or num_samples < 1:
        raise Whole("no rows of probabilities")
    size, alone = p.shape[-1], num_samples == 1 or not replacement
    if alone and num_samples > size:
        raise Whole("more samples than there are")
    if size > (LONGEST if alone and num_samples > 1 else LONGEST_SCAN):
        raise Whole(f"rows of {size} probabilities")
    p = p.contiguous()
    (valid,) = steps(_is_valid, p)
    if not valid:
        return NotImplemented
    return steps(_first_to_come if alone else _with_replacement, p, num_samples)


#: overload -> its rule
SIZED: dict[Any, Rule] = {
    aten.nonzero.default: nonzero,
    aten.nonzero_static.default: nonzero_static,
    aten.masked_select.default: masked_select,
    aten.repeat_interleave.Tensor: repeat_interleave,
    aten._unique2.default: unique,
    aten.unique_consecutive.default: unique_consecutive,
    aten.multinomial.default: multinomial,
}
