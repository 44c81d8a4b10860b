"""Tensors on memory that somebody else owns."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch


class _OnDevice:
    """Bytes at an address of a GPU, in the words that libraries hand memory to each other."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


def tensor_at(
    address: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """The tensor whose first element lies at ``address``, which is not kept alive by it."""
    if 0 in shape:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    size = dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)))
    if device.type == "cpu":
        buffer = (ctypes.c_char * size).from_address(address)
        flat = torch.frombuffer(buffer, dtype=torch.uint8)
    else:
        flat = torch.as_tensor(_OnDevice(address, size), device=device)
    return flat.view(dtype).as_strided(shape, stride)
