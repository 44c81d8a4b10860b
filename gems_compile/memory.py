"""Tensors on memory that somebody else owns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

#: makes a storage of an address, which it does not own; private, seen in torch 2.11 and 2.13
_storage_at: Any = getattr(torch._C, "_construct_storage_from_data_pointer", None)


def tensor_at(
    address: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """The tensor whose first element lies at ``address``."""
    out = torch.empty(0, dtype=dtype, device=device)
    if 0 in shape:
        return out.as_strided(shape, stride)
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    storage = _storage_at(address, out.device, span * dtype.itemsize)
    return out.set_(storage, 0, tuple(shape), tuple(stride))
