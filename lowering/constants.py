"""What a wrapper's names stand for, as JSON that another process reads back.

Only things that a name finds again, and small tensors. Anything else raises ``Unsaveable``: an
object of this process alone, such as a higher-order op's body, or much data.
"""

from __future__ import annotations

import base64
import builtins
import math
import operator
from typing import Any

import torch

#: bytes of a constant tensor, such as ``torch.tensor([...])`` in a model's code
MOST_BYTES = 2**16

MODULES = {"operator": operator, "math": math, "torch": torch, "builtins": builtins}


class Unsaveable(Exception):
    """It cannot be kept for another process; the text says why."""


def spelled(value: Any) -> list[Any]:
    """[kind, what finds it again ...]"""
    if isinstance(value, torch._ops.OpOverload):
        return _op(value)
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return ["torch", str(value).removeprefix("torch.")]
    if isinstance(value, torch.device):
        return ["device", value.type, value.index]
    if isinstance(value, complex):
        return ["complex", repr(value.real), repr(value.imag)]
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    for name, module in MODULES.items():
        own = getattr(value, "__name__", None)
        if callable(value) and isinstance(own, str) and getattr(module, own, None) is value:
            return ["function", name, own]
    what = value if isinstance(value, torch._ops.HigherOrderOperator) else type(value).__name__
    raise Unsaveable(f"it uses {what}, which only this process has")


def meant(spelling: list[Any]) -> Any:
    """What was spelled."""
    kind, *parts = spelling
    if kind == "op":
        return _overload(parts[0])
    if kind == "torch":
        return getattr(torch, parts[0])
    if kind == "device":
        return torch.device(*parts) if parts[1] is not None else torch.device(parts[0])
    if kind == "complex":
        return complex(float(parts[0]), float(parts[1]))
    if kind == "tensor":
        return _filled(*parts)
    if kind == "function":
        return getattr(MODULES[parts[0]], parts[1])
    raise ValueError(f"no constant is spelled {kind!r}")


def _op(op: torch._ops.OpOverload) -> list[Any]:
    name = str(op)
    if _overload(name) is not op:
        raise Unsaveable(f"torch.ops knows {name} as another op")
    return ["op", name]


def _overload(name: str) -> Any:
    space, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, space), packet), overload)


def _tensor(tensor: torch.Tensor) -> list[Any]:
    if type(tensor) is not torch.Tensor or tensor.requires_grad or not tensor.is_contiguous():
        raise Unsaveable(f"it holds a constant {type(tensor).__name__} that is not plain data")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise Unsaveable("it holds a constant tensor that is not plain data")
    size = tensor.numel() * tensor.element_size()
    if size > MOST_BYTES:
        raise Unsaveable(f"it holds a constant tensor of {size} bytes (at most {MOST_BYTES})")
    with torch.utils._python_dispatch._disable_current_modes():
        flat = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        data = base64.b64encode(bytes(flat.tolist())).decode()
    return [
        "tensor",
        data,
        str(tensor.dtype).removeprefix("torch."),
        list(tensor.shape),
        str(tensor.device),
    ]


def _filled(data: str, dtype: str, shape: list[int], device: str) -> torch.Tensor:
    with torch.utils._python_dispatch._disable_current_modes():
        raw = bytearray(base64.b64decode(data))
        if not raw:
            return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        flat = torch.frombuffer(raw, dtype=getattr(torch, dtype))
        return flat.reshape(shape).to(device)
