"""``gems::packed`` and ``gems::unpacked``: many small tensors in the memory of one.

What forward saves for backward costs the host several microseconds a tensor, however small it is.
Kernels write and read the parts where they lie (``lowering.packed``); here is what ATen would do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

#: bytes: each part begins at a multiple, a line of memory
ALIGNMENT = 128


def define(library: Any) -> None:
    """Register both in torch's library ``gems``:

    packed:   the bytes of all parts, contiguous, each from the next multiple of ALIGNMENT on
    unpacked: a copy of the tensor of that size and dtype which begins at byte ``offset``
    """
    import torch

    tags = (torch.Tag.pt2_compliant_tag,)
    library.define("packed(Tensor[] parts) -> Tensor", tags=tags)
    part = "unpacked(Tensor x, int offset, int[] size, ScalarType dtype) -> Tensor"
    library.define(part, tags=tags)
    library.impl("packed", _packed, "CompositeExplicitAutograd")
    library.impl("unpacked", _unpacked, "CompositeExplicitAutograd")
    torch.library.register_fake("gems::packed", _room, lib=library)
    torch.library.register_fake("gems::unpacked", _part, lib=library)


def offsets(parts: Sequence[Any]) -> list[int]:
    """Where the tensors begin; last: the bytes of all."""
    found = [0]
    for part in parts:
        size = part.numel() * part.element_size()  # nbytes is for fixed sizes alone
        found.append(found[-1] - -size // ALIGNMENT * ALIGNMENT)
    return found


def _room(parts: Sequence[Any]) -> Any:
    import torch

    return parts[0].new_empty((offsets(parts)[-1],), dtype=torch.uint8)


def _packed(parts: Sequence[Any]) -> Any:
    out = _room(parts)
    for part, offset in zip(parts, offsets(parts), strict=False):
        view(out, offset, part.shape, part.dtype).copy_(part)
    return out


def _part(x: Any, offset: int, size: Sequence[int], dtype: Any) -> Any:
    return x.new_empty(size, dtype=dtype)


def _unpacked(x: Any, offset: int, size: Sequence[int], dtype: Any) -> Any:
    return view(x, offset, size, dtype).clone()


def view(x: Any, offset: int, size: Sequence[int], dtype: Any) -> Any:
    """The part in place."""
    end = offset + math.prod(size) * dtype.itemsize
    return x[offset:end].view(dtype).view(size)
