"""Rows in order: each element and its place are one number, which sort as such.

Its upper half is the element, mapped to integers in the order of torch's sort (NaN above all, zeros
of both signs equal); its lower half is the place, so that equal elements stay in their order. Of
elements of up to 16 bits it has 32 bits, else 64.

Compile workers import this file without torch: torch is imported inside the functions.
"""

# ruff: noqa: RET505 - Triton compiles what follows a static if, a return in it or not
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

#: elements of the longest row that one program sorts
LONGEST = 4096
#: dtypes whose elements have 32 bits or less
SORTED = ("float16", "bfloat16", "float32", "int8", "uint8", "int16", "int32", "bool")


@triton.jit
def _narrow_key(x):
    """Of an element of 16 bits or less, in int32."""
    if x.dtype.is_floating():
        wide = x.to(tl.float32)
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        bits = tl.where(wide == 0.0, 0, bits)  # no sign
        key = bits ^ ((bits >> 15) & 0x7FFF)
        return tl.where(wide != wide, 0x7FFF, key)  # NaN, of any sign
    else:
        return x.to(tl.int32)


@triton.jit
def _key(x):
    if x.dtype.is_floating():
        x = tl.where(x == 0.0, 0.0, x)
        bits = x.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return tl.where(x != x, 0x7FFFFFFF, key)
    else:
        return x


@triton.jit
def places_in_order(x, place, inside, descending, count: tl.constexpr):
    """Of rows of a power of two, the first ``count`` places, a power of two, in the elements'
    order; those that are not ``inside`` come last."""
    if x.dtype.primitive_bitwidth <= 16:
        key = _narrow_key(x)
        key = ~key if descending else key
        key = tl.where(inside, key, 0x7FFF)
        number = (key << 16) | tl.where(inside, place, 0xFFFF)
        return ((~tl.topk(~number, count)) & 0xFFFF).to(tl.int64)
    else:
        key = _key(x)
        key = ~key if descending else key
        key = tl.where(inside, key, 0x7FFFFFFF)
        number = (key.to(tl.int64) << 32) | tl.where(inside, place, 0x7FFFFFFF).to(tl.int64)
        return (~tl.topk(~number, count)) & 0xFFFFFFFF


def define(library: Any) -> None:
    """Register this on a torch Library.

    row_order: x [..., N], contiguous -> int64 [..., count]: the places of each row's first
               elements in order. ``flat``: all of x is one row, and the result [count]
    """
    import torch

    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(
        "row_order(Tensor x, bool descending, bool flat, int count) -> Tensor", tags=tags
    )
    library.impl("row_order", _row_order, "CompositeExplicitAutograd")
    torch.library.register_fake("gems::row_order", _room, lib=library)


def _room(x: Any, descending: bool, flat: bool, count: int) -> Any:
    import torch

    return x.new_empty((count,) if flat else (*x.shape[:-1], count), dtype=torch.int64)


def _row_order(x: Any, descending: bool, flat: bool, count: int) -> Any:
    import torch

    rows = x.reshape(-1) if flat else x
    places = torch.sort(rows, dim=-1, descending=descending, stable=True)[1]
    return places.narrow(-1, 0, count).contiguous()
