"""Rows in order: each element and its place are one number of 64 bits, which sort as such.

The upper half is the element, mapped to integers in the order of torch's sort (NaN above all, zeros
of both signs equal); the lower half is its place, so that equal elements stay in their order.

Compile workers import this file without torch: torch is imported inside the functions.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

#: elements of the longest row that one program sorts
LONGEST = 4096
#: dtypes whose elements have 32 bits or less
SORTED = ("float16", "bfloat16", "float32", "int8", "uint8", "int16", "int32", "bool")
#: the lower half
PLACE = 0xFFFFFFFF

_INFINITY = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def numbered(x, place, inside, descending):
    """The numbers of elements; those that are not ``inside`` the row come last."""
    if x.dtype.is_floating():
        wide = x.to(tl.float32)
        wide = tl.where(wide == 0.0, 0.0, wide)  # no sign
        bits = wide.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = tl.where(wide != wide, 0x7FFFFFFF, key)  # NaN, of any sign
    else:
        key = x.to(tl.int32)
    if descending:
        key = ~key
    number = (key.to(tl.int64) << 32) | place.to(tl.int64)
    return tl.where(inside, number, _INFINITY)


def define(library: Any) -> None:
    """Register this on a torch Library.

    numbered_rows: x [..., N], contiguous -> int64 [..., N]: the places of each row's elements, in
                   the order of the elements, in the lower 32 bits (``PLACE``). ``flat``: all of x
                   is one row, and the result [numel]
    """
    import torch

    tags = (torch.Tag.pt2_compliant_tag,)
    library.define("numbered_rows(Tensor x, bool descending, bool flat) -> Tensor", tags=tags)
    library.impl("numbered_rows", _numbered_rows, "CompositeExplicitAutograd")
    torch.library.register_fake("gems::numbered_rows", _room, lib=library)


def _room(x: Any, descending: bool, flat: bool) -> Any:
    import torch

    return x.new_empty((x.numel(),) if flat else x.shape, dtype=torch.int64)


def _numbered_rows(x: Any, descending: bool, flat: bool) -> Any:
    import torch

    rows = x.reshape(-1) if flat else x
    return torch.sort(rows, dim=-1, descending=descending, stable=True)[1]
