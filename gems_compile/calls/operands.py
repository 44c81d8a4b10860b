"""Which operands, and options of a factory, no kernel of eager mode takes, whatever the op is; how
tensors lie in memory; what a kernel is compiled for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..kernels.target import Target

#: tensors whose calls are ours
PLAIN = (Tensor, Parameter)


def why_native(tensors: Sequence[Tensor], target: Target, options: dict[str, Any]) -> str | None:
    """Why a call with these operands is ATen's, whatever the op is. ``options``: of a factory."""
    if options.get("pin_memory") or options.get("layout") not in (None, torch.strided):
        return "its result is pinned, or of a layout that is not strided"
    devices = {t.device for t in tensors}
    device = options.get("device")
    if device is not None:
        devices.add(_indexed(torch.device(device)))
    elif not tensors:
        devices.add(torch.device("cpu"))  # with which the dispatcher came to this key
    if len(devices) != 1 or next(iter(devices)).type != target.device:
        return f"operands on {', '.join(sorted(map(str, devices)))}"
    if tensors and tensors[0].numel() == 0:
        return "its first operand is empty"
    for t in tensors:
        if t.is_complex():
            return "complex numbers"
        if t.data_ptr() & 15:
            return "an operand is not aligned to 16 bytes, and a copy costs more than the kernel"
        if _overlaps(t):
            return "an operand overlaps itself"
    return None


def _indexed(device: torch.device) -> torch.device:
    """A GPU by its number, as tensors name it."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _overlaps(t: Tensor) -> bool:
    """Whether two elements share memory otherwise than by ``expand``."""
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1 or stride == 0:
            continue
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def layout_of(t: Tensor | int | None) -> Any:
    """What a caller sees beside the values: dtype, shape, the strides that address memory; a number
    or None, which some ops return beside tensors, as it is."""
    if not isinstance(t, Tensor):
        return t
    strides = tuple(s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1)
    return t.dtype, tuple(t.shape), strides


def takes_lazily_negated(overload: torch._ops.OpOverload) -> bool:
    """Whether the dispatcher leaves it to the device's kernel to look for a lazy negation."""
    name, key = overload.name(), "Negative"
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        and torch._C._dispatch_kernel_for_dispatch_key_is_fallthrough(name, key)
    )


# describing a call -------------------------------------------------------------------------------


def describe(values: Iterable[Any], parts: list[Any], tensors: list[Tensor]) -> bool:
    """Append what a kernel is compiled for; False if one of the values is no plain tensor. It is
    the same in C, in describe.h."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            parts += (
                value.dtype,
                value.shape,
                value.stride(),
                value.get_device(),
                value.data_ptr() & 15,
            )
            tensors.append(value)
        elif kind is float:
            parts.append(value.hex())  # 0.0 equals -0.0 and 1, and a NaN not even itself
        elif kind is list or kind is tuple:
            parts.append(len(value))
            if not describe(value, parts, tensors):
                return False
        elif isinstance(value, Tensor):
            return False
        else:
            parts.append(kind)
            parts.append(value)
    return True
